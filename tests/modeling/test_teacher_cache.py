"""The teacher's cache: the same losses to the bit, keys that tell apart what differs, honest figures."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from builders import batch, cli, tiny_cfg, tiny_model
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from era.config import validate_config
from era.data.keyed import pixels_hash
from era.engine.launch import argument_parser, train_net
from era.engine.preflight import check_data, setup_config
from era.engine.trainer import Trainer
from era.errors import UserError
from era.modeling.teacher_cache import TeacherCache, build_teacher_cache
from era.modeling.teacher_cache.entry import Entry
from era.modeling.teacher_cache.memory import MemoryStore

SIZE = (64, 64)


def keyed(inputs):
    """Inputs with the keys that the mapper would note."""
    return [{**item, "picture_key": pixels_hash(item["image"])} for item in inputs]


def flipped(item):
    """An input turned left to right, as the mapper would turn it."""
    turned = T.HFlipTransform(item["image"].shape[-1])
    instances = item["instances"]
    boxes = turned.apply_box(instances.gt_boxes.tensor.numpy())
    other = type(instances)(instances.image_size, gt_classes=instances.gt_classes)
    other.gt_boxes = type(instances.gt_boxes)(torch.as_tensor(boxes, dtype=torch.float32))
    return {**item, "image": item["image"].flip(-1), "instances": other}


def draws(steps: int, of: int = 3, per_batch: int = 2):
    """Batches drawn from a few pictures, each flipped or not, from a seed of their own."""
    pictures = batch([2, 1, 3, 1][:of], size=(50, 64))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randperm(of, generator=generator)[:per_batch].tolist()
        turn = torch.randint(0, 2, (per_batch,), generator=generator).tolist()
        yield keyed([flipped(pictures[i]) if t else pictures[i]
                     for i, t in zip(chosen, turn, strict=True)])  # fmt: skip


def course(config, cache_at, *opts, steps=9):
    """Losses of every step and the weights after the last, and the cache."""
    cfg = tiny_cfg(config, "MODEL.TEACHER.CACHE", str(cache_at), *opts)
    torch.manual_seed(3)
    model = build_model(cfg)
    model.teacher.cache = build_teacher_cache(cfg)
    optimizer = build_optimizer(cfg, model)
    history = []
    with EventStorage(0):
        for inputs in draws(steps):
            losses = model(inputs)
            history.append({name: loss.item() for name, loss in losses.items()})
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return history, model.state_dict(), model.teacher.cache


@pytest.mark.parametrize("config, layout", [("era", "always"), ("methods/pkd", "never")])
def test_training_is_the_same_to_the_bit(config, layout, tmp_path):
    opts = ["MODEL.TEACHER.CHANNELS_LAST", layout, "MODEL.FPN.OUT_CHANNELS", "16"]
    plain, weights, none = course(config, "off", *opts)
    assert none is None
    for where in ("memory", tmp_path, tmp_path):  # the second time the folder is full
        history, found, cache = course(config, where, *opts)
        assert history == plain
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        assert 0 < cache.served <= cache.asked == 18
    assert cache.served == cache.asked


def test_a_run_is_the_same_to_the_bit(tiny_data, tmp_path, caplog):
    """Through the trainer, its loader and its mapper, with the flips that it draws."""

    def run(name, *opts):
        opts = ["SOLVER.MAX_ITER", "12", "DATASETS.TRAIN", "('tiny_val',)", "DATASETS.TEST", "()",
                "SEED", "5", *opts]  # fmt: skip
        cfg = setup_config(argument_parser().parse_args(cli(tiny_data, tmp_path / name, *opts)))
        check_data(cfg, for_training=True)
        (tmp_path / name).mkdir()
        seed_all_rng(1)
        trainer = Trainer(cfg)
        trainer.train()
        return trainer

    plain = run("plain")
    with caplog.at_level(logging.INFO, logger="era"):
        cached = run("cached", "MODEL.TEACHER.CACHE", "memory")
    assert re.search(r"Teacher cache \(memory\): \d+ of 24 pictures served", caplog.text)
    weights = plain.bare_model.state_dict()
    for name, value in cached.bare_model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    figures = {name: value for name, (value, _) in cached.storage.latest().items()}
    cache = cached.bare_model.teacher.cache
    assert cache.asked == 24 and cache.served > 0
    assert figures["teacher_cache/hit_rate"] == cache.served / 24
    assert figures["teacher_cache/gib"] > 0 and "teacher_cache/saved_ms" in figures
    assert not any(name.startswith("teacher_cache") for name in plain.storage.latest())


@pytest.fixture
def teacher():
    """A tiny teacher with a cache in memory."""
    found = tiny_model().teacher
    found.cache = TeacherCache(MemoryStore(1 << 30))
    return found


def without_cache(teacher, inputs, size=SIZE):
    cache, teacher.cache = teacher.cache, None
    maps = teacher.maps(inputs, size)
    teacher.cache = cache
    return maps


def served(teacher, inputs, size=SIZE):
    """How many of the pictures need no computation; the maps are as without the cache, to the bit."""
    before = teacher.cache.served
    expected = without_cache(teacher, inputs, size)
    found = teacher.maps(inputs, size)
    assert found.keys() == expected.keys()
    for level, value in expected.items():
        assert torch.equal(found[level], value) and found[level].dtype == value.dtype
    return teacher.cache.served - before


def test_what_is_served(teacher):
    a, b, c = keyed(batch((1, 1, 1)))
    assert served(teacher, [a, b]) == 0
    assert served(teacher, [a, b]) == served(teacher, [b, a]) == 2
    assert served(teacher, [a, c]) == 0, "one is missing: both run, in a batch of two"
    assert served(teacher, [c, b]) == 2
    assert served(teacher, [a]) == 0, "alone, the last bits differ"
    assert served(teacher, [a]) == 1


def test_what_the_key_holds(teacher):
    """Flip, padded size, precision, layout, weights and settings: each is another entry, or another teacher's."""
    inputs = keyed(batch((1, 1)))
    assert served(teacher, inputs) == 0 and served(teacher, inputs) == 2
    assert served(teacher, keyed([flipped(item) for item in inputs])) == 0
    assert served(teacher, inputs, (64, 128)) == 0 and served(teacher, inputs, (64, 128)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert served(teacher, inputs) == 0 and served(teacher, inputs) == 2
        assert teacher.maps(inputs, SIZE)["p3"].dtype == torch.bfloat16
    teacher.set_memory_format(channels_last=False)
    assert served(teacher, inputs) == 0
    others = {
        "weights": tiny_model(seed=1),
        "mean": tiny_model("era", teacher_opts=["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"]),
        "fusion": tiny_model("era", teacher_opts=["MODEL.FPN.FUSE_TYPE", "avg"]),
        "channel order": tiny_model("era", "INPUT.FORMAT", "RGB"),
    }
    for name, model in others.items():
        model.teacher.cache = teacher.cache
        assert served(model.teacher, inputs) == 0, name
        assert served(model.teacher, inputs) == 2, name
    same = tiny_model().teacher
    same.cache = teacher.cache
    assert served(same, inputs) == 2


def test_a_served_map_can_be_written_to(teacher):
    inputs = keyed(batch((1,)))
    for _ in range(3):
        maps = teacher.maps(inputs, SIZE)
        assert torch.equal(maps["p3"], without_cache(teacher, inputs)["p3"])
        maps["p3"].zero_()


def test_half_precision_rounds_always_alike_and_computes_what_is_missing_alone(teacher):
    teacher.cache = TeacherCache(MemoryStore(1 << 30), half=True)
    a, b, c = keyed(batch((1, 1, 1)))
    first = teacher.maps([a, b], SIZE)
    expected = without_cache(teacher, [a, b])
    for level, value in expected.items():
        assert first[level].dtype == torch.float32
        assert torch.equal(first[level], value.half().float())
    full = sum(value.nbytes for value in expected.values())
    assert teacher.cache.store.held == full // 2
    second = teacher.maps([a, c], SIZE)
    assert teacher.cache.served == 1
    assert all(torch.equal(second[level][0], first[level][0]) for level in first)


def test_what_half_precision_cannot_hold_stays_as_it_is():
    cache = TeacherCache(MemoryStore(1 << 20), half=True)
    large, small = torch.tensor([1.0, 70000.0]), torch.tensor([1.0, 65504.0])
    assert cache.packed(large) is large
    assert cache.packed(small).dtype == torch.float16
    boxes = torch.tensor([1, 2])
    assert cache.packed(boxes) is boxes


def test_pictures_without_a_key_are_computed_and_named_once(teacher, caplog):
    cropped = [{**item, "unkeyed_by": "RandomCrop"} for item in batch((1, 1))]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert served(teacher, cropped) == served(teacher, batch((1, 1))) == 0
    said = [record.getMessage() for record in caplog.records]
    assert [("RandomCrop" in line, "notes no keys" in line) for line in said] == [
        (True, False),
        (False, True),
    ]
    assert teacher.cache.store.held == 0
    (whole,) = keyed(batch((1,), seed=9))
    assert served(teacher, [cropped[0], whole]) == 0
    assert teacher.cache.store.held > 0


def test_figures_by_hand():
    """Two of five pictures served, which took 3 s and 4 s to compute."""
    store = MemoryStore(1 << 30)
    cache = TeacherCache(store)
    one = {"x": torch.zeros(256)}
    store.put("a", Entry(one, 3.0))
    store.put("b", Entry(one, 4.0))

    def compute(positions):
        return [{"x": torch.full((2,), float(i))} for i in positions]

    found = cache.get_or_compute(["a", "c", "b", None], compute, whole=False)
    assert [entry["x"][0].item() for entry in found] == [0, 1, 0, 3]
    assert (cache.asked, cache.served) == (4, 2)
    assert cache.saved_seconds == pytest.approx(7.0, abs=0.5) and cache.saved_seconds < 7.0
    cache.get_or_compute(["d"], compute, whole=True)
    figures = cache.figures()
    assert figures["teacher_cache/hit_rate"] == 0.4
    assert figures["teacher_cache/gib"] == (2 * 1024 + 2 * 8) / 2**30
    assert "2 of 5 pictures served (40.0%)" in cache.summary() and "of 1 GiB" in cache.summary()
    assert TeacherCache(store).figures()["teacher_cache/hit_rate"] == 0.0


def test_tensors_of_any_kind_and_number_a_picture():
    """What pictures differ in, such as detections."""
    cache = TeacherCache(MemoryStore(1 << 20))
    boxes = [torch.rand(count, 4) for count in (0, 3)]

    def compute(positions):
        return [{"boxes": boxes[i], "classes": torch.arange(len(boxes[i]))} for i in positions]

    for _ in range(2):
        found = cache.get_or_compute(["a", "b"], compute, whole=True)
        for entry, expected in zip(found, boxes, strict=True):
            assert torch.equal(entry["boxes"], expected) and len(entry["classes"]) == len(expected)
    assert cache.served == 2


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("CACHE", "mem", r"'mem': expected off, memory, or a folder .* such as \./mem"),
        ("CACHE", "s3://bucket/maps", "folder of this machine"),
        ("CACHE", "", "expected off, memory"),
        ("CACHE_GIB", "0", "CACHE_GIB is 0"),
        ("CACHE_GIB", "inf", "CACHE_GIB is"),
        ("CACHE_DTYPE", "int8", "float32, float16"),
    ],
)
def test_keys_that_do_not_fit(key, value, message):
    cfg = tiny_cfg()
    cfg.MODEL.TEACHER[key] = float(value) if key == "CACHE_GIB" else value
    with pytest.raises(UserError, match=message):
        validate_config(cfg)


def test_a_folder_that_cannot_be_written_is_told_before_training(tiny_data, tmp_path):
    (tmp_path / "file").write_text("")
    args = cli(tiny_data, tmp_path / "run", "MODEL.TEACHER.CACHE", str(tmp_path / "file" / "maps"))
    with pytest.raises(UserError, match=r"MODEL\.TEACHER\.CACHE .*file/maps cannot be written"):
        train_net(args)
    assert not (tmp_path / "run").exists()
    cfg = tiny_cfg("era", "MODEL.TEACHER.CACHE", str(tmp_path / "file" / "maps"))
    with pytest.raises(UserError, match="cannot be written"):
        build_teacher_cache(cfg)
