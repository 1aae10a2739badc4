"""Bad pictures: named with their path everywhere, found before training, skipped where that is asked for."""

import json
import logging
import multiprocessing
import os
import signal

import hostile
import numpy as np
import pytest
import torch
from builders import cli, tiny_cfg
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.utils.events import EventStorage
from PIL import Image

from era.data import pictures
from era.data.datasets import check_datasets, register_from_config
from era.data.pictures import (
    BadTestPictures,
    UnreadablePicture,
    WatchedLoader,
    check_pictures,
    picture_mapper,
    raise_if_killed,
)
from era.data.toy.draw import CLASSES
from era.data.validation import check_annotation_file
from era.engine.launch import argument_parser, train_net
from era.engine.preflight import check_data, setup_config
from era.engine.trainer import Trainer
from era.errors import UserError
from era_runtime import read_image

COUNT = 6


@pytest.fixture
def own(tmp_path):
    """A COCO-format set of its own name, six pictures of 40 x 30 with an object each: its folder and overrides."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        (folder / f"{i}.jpg").write_bytes(hostile.encoded("JPEG", pixels))
        data["images"].append({"id": i + 1, "file_name": f"{i}.jpg", "width": 40, "height": 30})
        data["annotations"].append({"id": i + 1, "image_id": i + 1, "category_id": 1 + i % 8,
                                    "bbox": [4, 5, 20, 15], "area": 300, "iscrowd": 0})  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(data))
    name = f"own_{abs(hash(str(tmp_path)))}"
    yield folder, [
        "DATASETS.COCO_FORMAT", str([[name, str(tmp_path / "own.json"), str(folder)]]),
        "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)",
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SEED", "3",
    ]  # fmt: skip
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)


@pytest.fixture
def told(caplog):
    """What the package logs, also after a command line has set its logging up."""
    era_logger = logging.getLogger("era")
    passes_on, era_logger.propagate = era_logger.propagate, False  # or everything comes twice
    era_logger.addHandler(caplog.handler)
    yield caplog
    era_logger.removeHandler(caplog.handler)
    era_logger.propagate = passes_on


def config(opts, *more):
    cfg = tiny_cfg("plain", *opts, *more)
    register_from_config(cfg)
    return cfg


def cut(path):
    """Break a picture off behind its head."""
    path.write_bytes(path.read_bytes()[:-300])


# ---- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    """Pillow alone would make white of everything above 255."""
    path = tmp_path / f"a.{suffix}"
    values = np.array([[0, 255, 256, 300, 25700, 65535]] * 8, np.uint16)
    Image.fromarray(values).save(path)
    record = {"file_name": str(path), "width": 6, "height": 8, "image_id": 1}
    mapper = picture_mapper(tiny_cfg("plain", "INPUT.MIN_SIZE_TEST", "0"), is_train=False)
    expected = [0, 0, 1, 1, 100, 255]
    assert read_image(str(path))[0, :, 1].tolist() == expected
    assert mapper(record)["image"][2, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_right_pictures_are_read_as_detectron2_reads_them(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(hostile.encoded("JPEG", exif=exif))
    stock = detection_utils.read_image(str(path), "BGR")
    assert np.array_equal(read_image(str(path)), stock)
    height, width = stock.shape[:2]
    record = {"file_name": str(path), "width": width, "height": height, "image_id": 1}
    for is_train in (True, False):
        cfg = tiny_cfg(
            "plain",
            "INPUT.MIN_SIZE_TRAIN",
            "(0,)",
            "INPUT.MIN_SIZE_TEST",
            "0",
            "INPUT.RANDOM_FLIP",
            "none",
        )
        seen = picture_mapper(cfg, is_train=is_train)(record)["image"]
        assert np.array_equal(seen.permute(1, 2, 0).numpy(), stock)
    with pytest.raises(UnreadablePicture, match=r"a\.jpg has .* and its annotation says .*EXIF"):
        picture_mapper(cfg, is_train=True)(record | {"width": height, "height": width})


def test_the_limit_of_pixels_can_be_set(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (40, 30)).save(path)
    record = {"file_name": str(path), "width": 40, "height": 30, "image_id": 1}
    for limit, fits in ((1200, True), (1199, False)):
        cfg = tiny_cfg("plain", "INPUT.MAX_IMAGE_PIXELS", limit)
        mapper = picture_mapper(cfg, is_train=False)
        if fits:
            mapper(record)
            check_pictures(cfg, "set", [record])
            continue
        with pytest.raises(UnreadablePicture, match="40 x 30 pixels, more than the limit of 1199"):
            mapper(record)
        with pytest.raises(UserError, match="more than the limit of 1199"):
            check_pictures(cfg, "set", [record])


# ---- before training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["absent", "exchanged", "EXIF", "noise"])
def test_bad_pictures_are_found_before_training(own, damage, tmp_path, told):
    folder, opts = own
    path = folder / "4.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "exchanged": hostile.encoded("JPEG", np.zeros((40, 30, 3), np.uint8)),
        "EXIF": hostile.encoded("JPEG", exif=exif),
        "noise": b"noise",
    }.get(damage)
    path.unlink() if content is None else path.write_bytes(content)
    cfg = config(opts)
    for for_training in (True, False):
        with pytest.raises(
            UserError, match=r"1 of 6 pictures cannot be used.*4\.jpg.*ON_BAD_IMAGE"
        ) as e:
            check_datasets(cfg, for_training, pictures=True)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="1 of 6 pictures"):
        train_net(cli(opts, tmp_path / "run", config="plain"))
    assert not (tmp_path / "run").exists()
    cfg = config(opts, "INPUT.ON_BAD_IMAGE", "skip")
    check_datasets(cfg, True, pictures=True)
    assert "1 of 6 pictures cannot be used" in told.text


def test_pictures_that_are_never_read_may_be_absent(own):
    folder, opts = own
    file = folder.parent / "own.json"
    data = json.loads(file.read_text())
    data["images"].append({"id": 99, "file_name": "gone.jpg", "width": 40, "height": 30})
    file.write_text(json.dumps(data))
    cfg = config([*opts, "DATASETS.TEST", "()"])
    check_datasets(cfg, True, pictures=True)  # without an object it is not trained on


def test_boxes_without_area_on_their_picture_are_counted(tmp_path, told):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    data = hostile.coco()
    boxes = [[0, 0, 0, 5], [0, 0, -3, 5], [40, 0, 5, 5], [-9, 0, 5, 5], [0, 30, 5, 5], [35, 5, 10, 5],
             [0, 0, 40.5, 30.5], [0, 0, 40, 30]]  # fmt: skip
    base = data["annotations"][0]
    data["annotations"] = [base | {"id": i + 1, "bbox": box} for i, box in enumerate(boxes)]
    (tmp_path / "a.json").write_text(json.dumps(data))
    check_annotation_file("own", str(tmp_path / "a.json"), str(tmp_path), True)
    for words in ("of 8 boxes 2 have a width or height of 0 or less (first: annotations[0]",
                  "3 lie outside their picture (first: annotations[2]",
                  "1 reach out of it by more than a pixel (first: annotations[5]"):  # fmt: skip
        assert words in told.text


def test_a_model_with_keypoints_needs_as_many_of_each_object(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    path = tmp_path / "a.json"
    for keypoints, fits in (([1, 2, 2] * 3, True), ([1, 2, 2] * 2, False), (None, False)):
        path.write_text(json.dumps(hostile.coco(keypoints=keypoints)))
        arguments = "own", str(path), str(tmp_path), True
        if fits:
            check_annotation_file(*arguments, num_keypoints=3)
        else:
            with pytest.raises(UserError, match=r"keypoints .*3 \(MODEL.ROI_KEYPOINT_HEAD"):
                check_annotation_file(*arguments, num_keypoints=3)


# ---- in training -------------------------------------------------------------------------------------


def loader(cfg):
    assert cfg.SOLVER.IMS_PER_BATCH == 2
    return Trainer.build_train_loader(cfg)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_off_is_named(own, workers):
    folder, opts = own
    for i in range(COUNT):
        cut(folder / f"{i}.jpg")
    cfg = config(opts, "DATALOADER.NUM_WORKERS", workers)
    check_datasets(cfg, True, pictures=True)  # their heads are whole
    with pytest.raises(UnreadablePicture) as e:
        next(iter(loader(cfg)))
    assert str(e.value).startswith(f"the picture {folder}") and "\n" not in str(e.value)
    assert "INPUT.ON_BAD_IMAGE skip" in str(e.value)
    cfg = config(opts, "DATALOADER.NUM_WORKERS", workers, "INPUT.ON_BAD_IMAGE", "skip")
    with pytest.raises(UnreadablePicture, match="nor can any of 6 other pictures be used"):
        next(iter(loader(cfg)))


def test_skipped_pictures_are_replaced_alike_counted_and_named_once(own, told):
    folder, opts = own
    cut(folder / "2.jpg")
    cut(folder / "3.jpg")
    runs = []
    for workers in (0, 0, 1):
        told.clear()
        cfg = config(opts, "DATALOADER.NUM_WORKERS", workers, "INPUT.ON_BAD_IMAGE", "skip")
        watched = loader(cfg)
        with EventStorage(0) as storage:
            batches = [item for _, item in zip(range(12), watched, strict=False)]
            assert all(len(item) == 2 for item in batches)
            assert storage.latest()["replaced_pictures"][0] >= 4
        assert told.text.count("2.jpg cannot be read") == 1
        assert told.text.count("3.jpg cannot be read") == 1
        runs.append([item["file_name"][-5:] for pair in batches for item in pair])
    assert runs[0] == runs[1] and {"2.jpg", "3.jpg"}.isdisjoint(runs[0])
    # Which pictures come is the same in a loader's process.
    assert runs[2] == runs[0]


# ---- in evaluation -----------------------------------------------------------------------------------


def trainer(opts, output, *more):
    args = argument_parser().parse_args(cli(opts, output, *more, config="plain"))
    cfg = setup_config(args)
    check_data(cfg, for_training=True)
    output.mkdir(exist_ok=True)
    made = Trainer(cfg)
    made.resume_or_load(resume=False)
    return made


@pytest.fixture
def bad_test_set(own, tiny_data):
    """Overrides: good pictures to train on, and a test set with one that breaks off."""
    folder, opts = own
    cut(folder / "2.jpg")
    names = dict(zip(opts[::2], opts[1::2], strict=True))
    both = dict(zip(tiny_data[::2], tiny_data[1::2], strict=True))
    sets = str([*json.loads(names["DATASETS.COCO_FORMAT"].replace("'", '"')),
                *json.loads(both["DATASETS.COCO_FORMAT"].replace("'", '"'))])  # fmt: skip
    return [*opts, "DATASETS.COCO_FORMAT", sets, "DATASETS.TRAIN", both["DATASETS.TRAIN"],
            "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "4"]  # fmt: skip


@pytest.mark.parametrize("period", [0, 2])
def test_a_bad_test_picture_costs_no_student(bad_test_set, period, tmp_path):
    made = trainer(bad_test_set, tmp_path / "run", "TEST.EVAL_PERIOD", str(period))
    with pytest.raises(
        BadTestPictures, match=r"1 pictures of the test set .*2\.jpg cannot be read"
    ):
        made.train()
    run = tmp_path / "run"
    if period:  # in the middle: the run can go on from there
        saved = torch.load(run / "model_0000001.pth")
        assert saved["iteration"] == 1
        assert (run / "last_checkpoint").read_text() == "model_0000001.pth"
    else:
        assert (run / "last_checkpoint").read_text() == "model_final.pth"
        assert (run / "model_final.pth").exists() and (run / "student" / "model_final.pth").exists()


def test_a_skipped_test_picture_counts_as_missed(bad_test_set, tmp_path, told):
    made = trainer(bad_test_set, tmp_path / "run", "INPUT.ON_BAD_IMAGE", "skip")
    made.train()
    assert "1 pictures of the test set" in told.text and "counts as missed" in told.text
    assert (tmp_path / "run" / "student" / "model_final.pth").exists()
    found = json.loads((tmp_path / "run" / "inference" / "coco_instances_results.json").read_text())
    assert 3 not in {entry["image_id"] for entry in found}


# ---- processes of the loader -------------------------------------------------------------------------


class Breaks:
    """A loader whose process is killed while it hands over a batch: the connection breaks before torch looks."""

    def __init__(self, error: Exception, kills: bool):
        self.error, self.kills = error, kills

    def __iter__(self):
        others = multiprocessing.active_children()  # of loaders that earlier tests left behind
        batches = iter(torch.utils.data.DataLoader(range(100), num_workers=1, collate_fn=list))
        yield from ([{"image": x}] for x in next(batches))
        if self.kills:
            (worker,) = set(multiprocessing.active_children()).difference(others)
            os.kill(worker.pid, signal.SIGKILL)
        raise self.error


@pytest.fixture
def no_child_signal():
    """torch hears of a dead process by SIGCHLD, which may come later than the broken connection: here never."""
    before = signal.getsignal(signal.SIGCHLD)
    yield lambda: signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer")])
def test_a_process_killed_in_the_middle_of_a_batch_is_told_as_such(error, no_child_signal):
    batches = iter(WatchedLoader(Breaks(error, kills=True)))
    assert next(batches) == [{"image": 0}]
    no_child_signal()
    with pytest.raises(
        RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"
    ):
        next(batches)


def test_a_broken_connection_with_all_processes_alive_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(pictures, "raise_if_killed", lambda: raise_if_killed(0.1))
    batches = iter(WatchedLoader(Breaks(EOFError("lost"), kills=False)))
    next(batches)
    with pytest.raises(EOFError, match="lost"):
        next(batches)
