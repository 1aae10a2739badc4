"""The roads that want a network or GPUs, on a machine with neither: a zoo of this machine, and devices that are described."""

import functools
import http.server
import json
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from detectron2.model_zoo import model_zoo
from detectron2.modeling import build_model
from distil_case import Forked, make_stranger

from era.checkpoint import fetching
from era.config import load_config, student_config
from era.distil import cli, configs, timing
from era.distil.annotations import Data, Split
from era.distil.pretrained import RANDOM
from era.distil.request import argument_parser, read_request

ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
WEIGHTS = "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
# The zoo's detector with a few channels: quick on a CPU.
HEADS = ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
NARROW = [*HEADS, "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
          "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]  # fmt: skip
GIB = 2**30


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Detectron2's zoo as a server of this machine, with weights of 80 classes as it keeps them; its model."""
    monkeypatch.setattr(fetching, "get_cache_dir", lambda: str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = build_model(load_config(ZOO, [*NARROW, "MODEL.DEVICE", "cpu"]))
    file = tmp_path / "zoo" / WEIGHTS
    file.parent.mkdir(parents=True)
    content = {"model": {k: v.numpy() for k, v in model.state_dict().items()}, "__author__": "Detectron2 Model Zoo"}  # fmt: skip
    file.write_bytes(pickle.dumps(content))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "zoo"))  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(model_zoo._ModelZooUrls, "S3_PREFIX", address)
        yield model
        server.shutdown()


def test_a_teacher_of_the_zoo_is_fine_tuned_to_three_classes(zoo, tmp_path, monkeypatch, capsys):
    stranger = make_stranger(tmp_path, pictures=6)
    data = json.loads((stranger.folder / "my.json").read_text())
    data["categories"] = data["categories"][:3]
    kept = {c["id"] for c in data["categories"]}
    # every object becomes one of the three
    for index, annotation in enumerate(data["annotations"]):
        annotation["category_id"] = sorted(kept)[index % 3]
    (stranger.folder / "three.json").write_text(json.dumps(data))
    args = stranger.args(tmp_path / "out", "--teacher", ZOO, teacher=False)
    args[1] = str(stranger.folder / "three.json")
    for option, opts in (("--opts", HEADS), ("--teacher-opts", NARROW)):
        place = args.index(option) + 1
        args[place:place] = opts
    monkeypatch.setattr(cli, "go_on_process", Forked)
    monkeypatch.setattr(timing, "take_steps", lambda *_, **__: {"seconds": [0.1], "test_seconds": 0.1})  # fmt: skip
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "fine-tuned: its 80 classes are not the 3 of the data" in said
    out = tmp_path / "out"
    begun = (out / "teacher" / "train.log").read_text()
    assert WEIGHTS in begun  # downloaded, not found beside it
    tuned = torch.load(out / "teacher" / "student" / "model_final.pth", weights_only=True)["model"]
    assert tuned["roi_heads.box_predictor.cls_score.weight"].shape == (4, 16)
    stem = "backbone.bottom_up.stem.conv1.weight"  # frozen: still the zoo's
    assert torch.equal(tuned[stem], zoo.state_dict()[stem])
    cfg = load_config(str(out / "distilled.yaml"))
    assert str(out / "teacher.yaml") == cfg.MODEL.TEACHER.CONFIG_FILE
    assert student_config(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert (out / "deployed" / "torchscript" / "manifest.json").is_file()
    assert "Teacher" in said and "Distilled student" in said


@pytest.fixture
def gpus(monkeypatch):
    """A machine of so many GPUs of so much memory, as far as anybody asks for them."""

    def describe(count, gib):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))  # fmt: skip
        monkeypatch.setattr(timing, "usable_cores", lambda: 32)

    return describe


def photos(count):
    """Annotations of so many photos of 1333 x 800 pixels, of one large object each."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 1333, "height": 800} for i in range(count)
    ]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 300, 200], "iscrowd": 0}
        for i in range(count)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    split = Split(content, "/photos")
    return Data(split, split, None, False, {})


@pytest.mark.parametrize(
    ("count", "gib", "batch", "rate"),
    [
        (8, 80, 16, 0.02),  # the public recipe's
        (1, 80, 16, 0.02),
        (2, 12, 6, 0.0075),  # 3 of 3.5 GiB on each
        (1, 4, 1, 0.00125),
    ],
)
def test_batch_rate_and_size_follow_the_gpus(tmp_path, gpus, count, gib, batch, rate):
    gpus(count, gib)
    stranger = make_stranger(tmp_path, pictures=2)
    args = ["--data", str(stranger.folder / "my.json"), str(stranger.folder / "photos"), "--formats", "none"]  # fmt: skip
    request = read_request(argument_parser().parse_args(args))
    assert (request.num_gpus, request.device, request.processes) == (count, "cuda", count)
    data = photos(1000)
    tried = []

    def steps(request, data, chosen, folder):
        tried.append(chosen)
        return {name: timing.Times(0.5, 0.05) for name in chosen.trainings}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_take_steps", steps)
        measured = timing.measure(request, data, RANDOM, 0.0)
    chosen = measured.chosen
    assert tried[0].batch == batch and chosen.workers == min(4, 32 // count - 1)  # of 32 cores
    made = configs.make_configs(request, data, chosen, tmp_path)
    cfg = made["distilled"]
    assert ("cuda", batch) == (cfg.MODEL.DEVICE, cfg.SOLVER.IMS_PER_BATCH)
    assert pytest.approx(2 * rate) == cfg.SOLVER.BASE_LR  # twice, from random weights
    assert pytest.approx(rate / 4) == made["teacher"].SOLVER.BASE_LR
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (640, 672, 704, 736, 768, 800)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1344)
    assert round(2 * 100_000 / batch) == cfg.SOLVER.MAX_ITER  # 100 passes, twice


def test_a_plan_for_gpus_starts_a_process_on_each(tmp_path, gpus, monkeypatch, capsys):
    gpus(2, 24)
    stranger, tried = make_stranger(tmp_path), []

    def steps(case, processes, *, on_gpu):
        tried.append((case.processes, on_gpu, case.cfg.MODEL.DEVICE, case.cfg.SOLVER.IMS_PER_BATCH))
        if tried[-1][-1] > 4:
            return {"problem": "CUDA out of memory. Tried to allocate 2 GiB", "output": ""}
        return {"seconds": [0.2], "test_seconds": 0.01}

    monkeypatch.setattr(timing, "take_steps", steps)
    assert cli.main([*stranger.args(tmp_path / "o"), "--dry-run"]) == 0
    assert tried[0] == (2, True, "cuda", 8) and tried[-1] == (2, True, "cuda", 4)
    said = capsys.readouterr().out
    assert "2 GPU(s)" in said and "4 pictures" in said and "on cuda" in said
