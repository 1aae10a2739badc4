"""Training through the launcher: end to end, resumed, in two processes, accumulated, in bfloat16."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from builders import TINY_TEACHER, Once, batch, cli, run_tool, tiny_cfg, tiny_model
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer, launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image

from era.engine.evaluation import evaluate
from era.engine.hooks import GPU_MEMORY, GpuMemory
from era.engine.launch import argument_parser, train_net
from era.engine.preflight import check_data, setup_config
from era.engine.schedule import amp_dtype, scale_to_world
from era.engine.stepping import StepTrainer
from era.engine.trainer import Trainer
from era.errors import UserError


def trainer_of(args, seed=1):
    """A Trainer as the launcher makes it, in this process; the random teacher follows the seed."""
    torch.manual_seed(seed)
    cfg = setup_config(argument_parser().parse_args(args))
    check_data(cfg, for_training=True)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return Trainer(cfg)


def metrics(output):
    """The last value of everything that the run logged."""
    with open(output / "metrics.json") as f:
        return {key: value for line in f for key, value in json.loads(line).items()}


def test_train_evaluate_and_leave_a_student(tiny_data, tmp_path):
    """The command line end to end: losses logged apart, teacher evaluated, plain student left."""
    run = tmp_path / "run"
    done = run_tool(
        "train_net.py",
        *cli(tiny_data, run, "SOLVER.MAX_ITER", "20", "TEST.EVAL_TEACHER", "True", "SEED", "5"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = metrics(run)
    for name in ("feature", "residual", "twi_rpn", "twi_roi"):
        assert f"loss_era_{name}" in last
    assert "era/p3/residual_e4" in last and "bbox/AP" in last and "teacher/bbox/AP" in last
    parts = [v for k, v in last.items() if k.startswith("loss_")]
    assert last["total_loss"] == pytest.approx(sum(parts), rel=0.2)  # medians of one window
    assert {p.name for p in (run / "student").iterdir()} == {"model_final.pth", "config.yaml"}
    assert (run / "model_final.pth").exists() and list(run.glob("events.out.tfevents.*"))

    evaluated = run_tool(
        "train_net.py", "--eval-only",
        *cli(tiny_data, tmp_path / "eval", "MODEL.WEIGHTS", run / "model_final.pth",
             "MODEL.TEACHER.CONFIG_FILE", "", "MODEL.TEACHER.ALLOW_RANDOM", "False"),
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]  # alpha 0 needs no teacher
    assert "copypaste: AP,AP50" in evaluated.stdout


def test_masks_come_through_training_evaluation_and_the_student(tiny_data, tmp_path):
    """A Mask R-CNN distilled through the command line; its student is one of stock Detectron2."""
    run = tmp_path / "run"
    opts = ["SOLVER.MAX_ITER", "20", "TEST.EVAL_TEACHER", "True", "SEED", "5"]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
    teacher = [*TINY_TEACHER, "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
    done = run_tool(
        "train_net.py",
        *cli(tiny_data, run, *opts, "MODEL.TEACHER.OPTS", str(teacher), config="mask_era"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = metrics(run)
    assert {"loss_mask", "loss_era_feature"} < last.keys()
    for name in ("bbox/AP", "segm/AP", "teacher/bbox/AP", "teacher/segm/AP"):
        assert 0 <= last[name] <= 100, name

    cfg = get_cfg()
    cfg.merge_from_file(str(run / "student" / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(run / "student" / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    found = DefaultPredictor(cfg)(torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy())
    masks = found["instances"].pred_masks
    assert len(masks) > 0 and masks.dtype == torch.bool and masks.shape[1:] == (48, 64)


@pytest.mark.parametrize("config, kinds", [("plain", {"bbox"}), ("mask_plain", {"bbox", "segm"})])
def test_no_detection_at_all_is_ap_0(tiny_data, tmp_path, config, kinds):
    args = cli(tiny_data, tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0", config=config)
    trainer = trainer_of(args)
    results = evaluate(trainer.cfg, trainer.bare_model.eval())
    assert results.keys() == kinds
    assert all(r["AP"] == r["AP50"] == 0.0 for r in results.values())


def test_resume_continues_iteration_learning_rate_and_weights(tiny_data, tmp_path):
    args = cli(tiny_data, tmp_path, "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4",
               "DATASETS.TEST", "()", "SOLVER.WARMUP_ITERS", "0")  # fmt: skip
    first = trainer_of(args)
    first.resume_or_load(resume=False)
    first.train()
    rates = [g["lr"] for g in first.optimizer.param_groups]
    os.remove(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")

    second = trainer_of(args)
    second.resume_or_load(resume=True)
    assert second.start_iter == 4
    at_four = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["model"]
    assert all(torch.equal(v, at_four[k]) for k, v in second.bare_model.state_dict().items())
    moments = [s["momentum_buffer"] for s in second.optimizer.state.values()]
    assert moments and any(m.abs().sum() > 0 for m in moments)
    assert second.scheduler.last_epoch == 4
    second.train()
    assert second.iter == 8
    assert [g["lr"] for g in second.optimizer.param_groups] == pytest.approx(rates)


def test_resuming_with_another_teacher_is_refused(tiny_data, tmp_path):
    args = cli(tiny_data, tmp_path, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    first = trainer_of(args)
    first.train()
    with pytest.raises(UserError, match="name the same teacher"):
        trainer_of(args, seed=2).resume_or_load(resume=True)


def test_inheritance_happens_at_the_start_and_not_on_resume(tiny_data, tmp_path):
    args = cli(
        tiny_data, tmp_path, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()", config="plain_init"
    )

    def distance(model):
        pairs = zip(model.student.roi_heads.parameters(), model.teacher.model.roi_heads.parameters(),
                    strict=True)  # fmt: skip
        return sum((a - b).abs().sum().item() for a, b in pairs)

    first = trainer_of(args)
    assert distance(first.bare_model) > 0
    first.resume_or_load(resume=False)
    assert distance(first.bare_model) == 0
    first.train()
    after = distance(first.bare_model)
    assert after > 0
    second = trainer_of(args)
    second.resume_or_load(resume=True)
    assert distance(second.bare_model) == pytest.approx(after)


# Nothing is sampled: all anchors, and as many proposals from every image, so that losses of a batch
# are the mean of its images' losses.
ALL_SAMPLED = [
    "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0",  # which part is chosen is random
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "12", "MODEL.RPN.NMS_THRESH", "1.0",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.ERA.NORM", "GN", "MODEL.ERA.KD_WEIGHT", "1.0",
]  # fmt: skip
IMAGES = batch((2, 2), seed=4)
# The teacher detects nothing on them, so that as many proposals come from each.
NOTHING_DETECTED = ["MODEL.DISTILLER.PSEUDO_SCORE", "1.0"]
UNLABELED = [{"unlabeled": True, "image": item["image"]} for item in batch((1, 1), seed=6)]


def one_step(batches, accumulation_steps=1, amp=None, opts=()):
    """Parameters and mean losses after one optimiser step on given batches."""
    torch.manual_seed(comm.get_rank() + 1)
    model = tiny_model("era", *ALL_SAMPLED, *opts, seed=0)
    if comm.get_world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    trainer = StepTrainer(
        model,
        Once(*batches),
        torch.optim.SGD(model.parameters(), lr=0.01),
        accumulation_steps=accumulation_steps,
        amp_dtype=amp,
        device_type="cpu",
    )
    with EventStorage(0) as storage:
        trainer.iter = 0
        trainer.run_step()
        losses = {k: v[0] for k, v in storage.latest().items() if "loss" in k}
    return getattr(model, "module", model), losses


def _two_ranks(folder, others):
    rank = comm.get_rank()
    model, losses = one_step([[IMAGES[rank], *others[rank : rank + 1]]], opts=NOTHING_DETECTED)
    torch.save((model.state_dict(), losses), os.path.join(folder, f"{rank}.pth"))


@pytest.mark.parametrize("others", [[], UNLABELED], ids=["labelled", "labelled and others"])
def test_two_processes_equal_one(others, tmp_path):
    """Two gloo processes of one image each, and of one without labels, end with equal parameters, and with
    the losses and the parameters of one process on all images."""
    torch.set_num_threads(1)
    launch(_two_ranks, 2, dist_url="auto", args=(str(tmp_path), others))
    (a, losses), (b, _) = (torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    model, expected = one_step([[*IMAGES, *others]], opts=NOTHING_DETECTED)
    assert losses.keys() == expected.keys() and len(losses) > 8
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    for key, value in model.state_dict().items():
        torch.testing.assert_close(a[key], value, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_large_batch():
    accumulated, losses = one_step([IMAGES[:1], IMAGES[1:]], accumulation_steps=2)
    at_once, expected = one_step([IMAGES])
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    for a, b in zip(accumulated.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mixed_precision_on_the_cpu_is_close_to_float32():
    _, half = one_step([IMAGES], amp=torch.bfloat16)
    _, full = one_step([IMAGES])
    for name, value in full.items():
        assert half[name] == pytest.approx(value, rel=0.15, abs=0.02), name
    assert half["loss_era_feature"] != full["loss_era_feature"]


@pytest.mark.parametrize(
    "opts, expected",
    [
        (["SOLVER.AMP.ENABLED", "False"], None),
        (["SOLVER.AMP.ENABLED", "True"], torch.bfloat16),
        (["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cuda"], torch.float16),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], torch.float16),
    ],
)
def test_type_of_mixed_precision(opts, expected):
    assert amp_dtype(tiny_cfg("plain", *opts)) == expected


def test_a_folder_of_pictures_beside_the_labels(tiny_data, tmp_path):
    """Through the command line, in batches of two accumulated ones, stopped and resumed."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, item in enumerate(batch((0, 0, 0), size=(40, 60))):
        pixels = item["image"].permute(1, 2, 0).byte().numpy()
        Image.fromarray(pixels).save(photos / f"{i}.{('jpg', 'png', 'JPEG')[i]}")
    args = cli(
        tiny_data, tmp_path / "run", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2",
        "DATASETS.IMAGE_FOLDERS", f"[['own_photos_beside', '{photos}']]",
        "DATASETS.UNLABELED", "('own_photos_beside',)",
        "SOLVER.IMS_PER_BATCH", "4", "SOLVER.UNLABELED_PER_BATCH", "2", "SOLVER.ACCUMULATION_STEPS", "2",
        "MODEL.DISTILLER.METHODS", "['ERA', 'PKD']", "MODEL.PKD.LEVELS", "['p3', 'p4', 'p5']",
        "MODEL.DISTILLER.PSEUDO_SCORE", "0.0", "INPUT.RANDOM_FLIP", "vertical",
    )  # fmt: skip
    train_net([*args, "SOLVER.MAX_ITER", "2"])
    os.remove(tmp_path / "run" / "model_final.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    train_net(["--resume", *args, "SOLVER.MAX_ITER", "4"])
    last = metrics(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.json") as f:
        iterations = [json.loads(line)["iteration"] for line in f]
    assert max(iterations) == 3 and last["unlabeled/pseudo_boxes"] > 0
    names = {"loss_era_feature", "loss_era_residual", "loss_era_twi_roi", "loss_pkd_feature"}
    assert names < last.keys() and "unlabeled/rpn/num_pos_anchors" in last
    cfg = get_cfg()  # what is left behind is stock Detectron2
    cfg.merge_from_file(str(tmp_path / "run" / "student" / "config.yaml"))
    assert "UNLABELED" not in cfg.DATASETS


def test_resuming_without_a_usable_marker(tiny_data, tmp_path):
    """The newest whole checkpoint is used, through the command line; a fresh start takes none."""
    args = cli(tiny_data, tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2", "DATASETS.TEST", "()",
               "SOLVER.WARMUP_ITERS", "0", config="plain")  # fmt: skip
    train_net([*args, "SOLVER.MAX_ITER", "4"])
    last = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.pth")}
    assert set(last) == {"model_0000001.pth", "model_0000003.pth", "model_final.pth"}
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-500])
    os.remove(tmp_path / "metrics.json")

    train_net(["--resume", *args, "SOLVER.MAX_ITER", "6"])
    for name in ("model_0000001.pth", "model_0000003.pth"):
        assert (tmp_path / name).stat().st_mtime_ns == last[name]
    assert metrics(tmp_path)["iteration"] == 5
    assert "Starting training from iteration 4" in (tmp_path / "log.txt").read_text()

    fresh = trainer_of([*args, "SOLVER.MAX_ITER", "6"])
    fresh.resume_or_load(resume=False)  # as Detectron2
    assert fresh.start_iter == 0
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole checkpoint to resume from"):
        train_net(["--resume", *args])
    assert all(path.read_bytes() == b"nothing" for path in tmp_path.glob("*.pth"))


def test_another_number_of_processes_rescales(caplog):
    cfg = tiny_cfg("plain", "SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "16",
                   "SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER", "90000",
                   "SOLVER.STEPS", "(60000, 80000)")  # fmt: skip
    with caplog.at_level("INFO", logger="era.engine"):
        one = scale_to_world(cfg, 1).SOLVER
    assert (one.IMS_PER_BATCH, one.BASE_LR, one.MAX_ITER) == (2, 0.0025, 720000)
    assert one.STEPS == (480000, 640000)
    assert re.search(r"IMS_PER_BATCH 16 -> 2.*MAX_ITER 90000 -> 720000", caplog.text)
    cfg.SOLVER.ACCUMULATION_STEPS = 8  # one GPU then follows the recipe of eight
    assert scale_to_world(cfg, 1) is cfg


@pytest.mark.parametrize("reference", [3, -1])
def test_a_reference_that_does_not_divide(reference):
    cfg = tiny_cfg("plain", "SOLVER.REFERENCE_WORLD_SIZE", str(reference))
    with pytest.raises(UserError, match=r"SOLVER\.REFERENCE_WORLD_SIZE"):
        scale_to_world(cfg, 1)


def test_own_datasets_are_known_to_the_catalogs(tiny_data, tmp_path):
    trainer_of(cli(tiny_data, tmp_path, config="plain"))
    assert len(DatasetCatalog.get("tiny_val")) == 4
    assert len(MetadataCatalog.get("tiny_val").thing_classes) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hundred_steps_of_half_precision_stay_finite(dtype):
    """All losses on, at a learning rate that moves the weights; float16 with its loss scaling."""
    options = ["MODEL.ERA.KD_WEIGHT", "1.0", "MODEL.TEACHER.CHANNELS_LAST", "always"]
    model = tiny_model("era", *options).train()
    trainer = StepTrainer(
        model,
        Once(*[batch((2, 1), seed=i % 5) for i in range(100)]),
        torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9),
        amp_dtype=dtype,
        device_type="cpu",
    )
    with EventStorage(0) as storage:
        for trainer.iter in range(100):
            storage.iter = trainer.iter
            trainer.run_step()  # raises FloatingPointError for a loss that is not finite
    assert all(torch.isfinite(p).all() for p in model.parameters())
    history = [value for value, _ in storage.history("total_loss").values()]
    assert sum(history[-20:]) < sum(history[:20])


def test_the_memory_of_a_gpu_is_a_scalar_that_is_written(monkeypatch):
    hook = GpuMemory()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(storage=storage)
        hook.after_step()
        assert storage.latest_with_smoothing_hint()[GPU_MEMORY] == (3.0, 0)

    writer = object()
    monkeypatch.setattr(DefaultTrainer, "build_hooks", lambda self: [writer])
    monkeypatch.setattr(Trainer, "bare_model", None)  # no distiller
    trainer = Trainer.__new__(Trainer)
    trainer.checkpointer, trainer.schedule = None, SimpleNamespace(iterations=10)
    for device, expected in (("cuda:0", GpuMemory), ("cpu", object)):
        trainer.cfg = tiny_cfg("plain", "MODEL.DEVICE", device)
        hooks = trainer.build_hooks()
        assert writer in hooks and expected in map(type, hooks)
        assert (GpuMemory in map(type, hooks)) == (expected is GpuMemory)
