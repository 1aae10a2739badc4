"""TEST.LOSS: what is averaged, and that it changes nothing."""

import pytest
import torch
from builders import cli, tiny_model
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.events import EventStorage
from resume_case import Kill, difference, left_behind, lines, run

from era.data.seeds import random_numbers_of
from era.engine.launch import argument_parser
from era.engine.preflight import check_data, setup_config
from era.engine.validation_loss import validation_losses

RUN = ["SEED", "5", "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "4",
       "SOLVER.WARMUP_ITERS", "0", "MODEL.RESNETS.NORM", "BN"]  # fmt: skip


def config(tiny_data, tmp_path, *opts):
    cfg = setup_config(argument_parser().parse_args(cli(tiny_data, tmp_path, *opts)))
    check_data(cfg, for_training=True)
    return cfg


@pytest.mark.parametrize("name", ["plain", "era"])
def test_it_is_the_mean_over_pictures_of_the_students_losses(name, tiny_data, tmp_path):
    cfg = config(tiny_data, tmp_path, "INPUT.MIN_SIZE_TEST", "96")
    model = tiny_model(name, "MODEL.RESNETS.NORM", "BN")
    student = model.student if name == "era" else model
    before = {key: t.clone() for key, t in model.state_dict().items()}
    random = torch.get_rng_state()
    found = validation_losses(cfg, model)
    assert difference(dict(model.state_dict()), before) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in student.modules())

    # By Detectron2's own mapper, picture by picture. Statistics of normalisation stay those of a new model.
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(96, cfg.INPUT.MAX_SIZE_TEST)],
        image_format="BGR",
    )
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    pictures = []
    with torch.no_grad(), EventStorage(1):
        for record in DatasetCatalog.get("tiny_val"):
            with random_numbers_of(0):
                pictures.append(student([mapper(record)]))
    assert len(pictures) == 4 and found.keys() == {*pictures[0], "total_loss"}
    for key in pictures[0]:
        expected = sum(float(losses[key]) for losses in pictures) / 4
        assert found[key] == pytest.approx(expected, rel=1e-5) and expected > 0
    assert found["total_loss"] == pytest.approx(
        sum(v for k, v in found.items() if k != "total_loss")
    )


def test_a_run_with_it_is_the_run_without_and_resumes_exactly(tiny_data, tmp_path):
    log = tmp_path / "log.txt"

    def args(folder, *opts):
        return cli(tiny_data, tmp_path / folder, *RUN, "MODEL.EMA.ENABLED", "True", *opts)

    on = ["TEST.LOSS", "True"]
    assert run(args("with", *on), log=log) == 0, log.read_text()[-3000:]
    assert run(args("without"), log=log) == 0
    assert run(args("killed", *on), kill=Kill(step=5), log=log) == -9
    assert run(["--resume", *args("killed", *on)], log=log) == 0
    whole, killed, without = (
        left_behind(tmp_path / name) for name in ("with", "killed", "without")
    )
    assert difference(killed, whole) is None
    told = [
        line["validation/total_loss"]
        for line in whole["metrics"]
        if "validation/total_loss" in line
    ]
    assert len(told) == 2 and told[0] != told[1]
    for left in (whole, without):
        left["metrics"] = [
            {k: v for k, v in line.items() if not k.startswith("validation/")}
            for line in left["metrics"]
        ]
        for file in ("model_0000005.pth", "model_final.pth"):
            scalars = left[file]["trainer"]["place"]["scalars"]
            for key in [key for key in scalars if key.startswith("validation/")]:
                del scalars[key]
    assert difference(whole, without) is None


def test_two_processes_find_what_one_finds(tiny_data, tmp_path):
    """Of a run that learns nothing, so that both have the same weights."""
    log = tmp_path / "log.txt"
    opts = ["SEED", "5", "SOLVER.MAX_ITER", "1", "TEST.LOSS", "True", "SOLVER.BASE_LR", "1e-30",
            "MODEL.RESNETS.NORM", "FrozenBN"]  # fmt: skip
    for count in ("1", "2"):
        args = ["--num-gpus", count, *cli(tiny_data, tmp_path / count, *opts, config="plain")]
        assert run(args, log=log) == 0, log.read_text()[-3000:]
    one, two = (
        next(line for line in lines(tmp_path / count) if "validation/total_loss" in line)
        for count in ("1", "2")
    )
    names = [name for name in one if name.startswith("validation/")]
    assert len(names) == 5
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-4)
