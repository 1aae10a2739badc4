"""What is wrong with a request or its data is one sentence, before anything is written or a step is taken."""

import json

import pytest
from distil_case import make_stranger
from PIL import Image

from era.distil import cli
from era.errors import UserError


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """With files beside it that are wrong in one way each."""
    stranger = make_stranger(tmp_path_factory.mktemp("stranger"), pictures=4)
    folder = stranger.folder
    data = json.loads((folder / "my.json").read_text())

    def write(name, **changes):
        (folder / name).write_text(json.dumps(data | changes))

    of_no_class = [a | {"category_id": 99} for a in data["annotations"]]
    write("no_class.json", annotations=of_no_class)
    first = data["images"][0]["id"]
    one = [a for a in data["annotations"] if a["image_id"] == first]
    write("one.json", images=data["images"][:1], annotations=one)
    write("no_boxes.json", annotations=[])
    write(
        "other_classes.json", categories=[c | {"name": f"x{c['id']}"} for c in data["categories"]]
    )
    flat = [a | {"bbox": [1, 1, "2", 3]} for a in data["annotations"]]
    write("text_box.json", annotations=flat)
    (folder / "noise.json").write_text("[1, 2")
    (folder / "empty").mkdir()
    (folder / "study").mkdir()
    (folder / "study" / "table.md").write_text("mine")
    (folder / "broken").mkdir()
    for image in data["images"]:
        (folder / "broken" / image["file_name"]).write_bytes(b"no picture")
    (folder / "c4.yaml").write_text("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}\nVERSION: 2")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return stranger


WRONG = {
    "no such folder": (["--data", "F/my.json", "F/nowhere"], "--data F/nowhere is not there: expected the folder"),
    "no such file": (["--data", "F/none.json", "F/photos"], "--data F/none.json is not there"),
    "the folder first": (["--data", "F/photos", "F/my.json"], "--data F/photos is a folder: expected a file"),
    "no JSON": (["--data", "F/noise.json", "F/photos"], "--data: .*noise.json is not JSON"),
    "boxes of no class": (["--data", "F/no_class.json", "F/photos"], r"category_id 99, which is no id in categories"),
    "no boxes": (["--data", "F/no_boxes.json", "F/photos"], "no object to train on"),
    "a box of text": (["--data", "F/text_box.json", "F/photos"], "four finite numbers"),
    "one picture": (["--data", "F/one.json", "F/photos"], "1 picture with objects: expected at least 2"),
    "a folder without the pictures": (["--data", "F/my.json", "F/empty"], "pictures cannot be used"),
    "pictures that are none": (["--data", "F/my.json", "F/broken"], "4 of 4 pictures cannot be used"),
    "validation of other classes": (["--val", "F/other_classes.json", "F/photos"], "--val has the classes x1"),
    "validation on the same pictures": (["--val", "F/my.json", "F/photos"], "--val has 4 pictures of --data"),
    "an unknown student": (["--student", "r19"], "--student is 'r19': expected one of toy, mv2, r18, .* or torchvision:NAME, timm:NAME"),
    "a library without a network": (["--student", "torchvision:"], "--student is 'torchvision:': expected one of"),
    "an unknown network of torchvision": (["--student", "torchvision:mobilenet_v9"], "--student torchvision: is 'mobilenet_v9': expected a classification network of torchvision, such as mobilenet"),
    "a network that can be no backbone": (["--student", "torchvision:vit_b_32"], "--student torchvision:vit_b_32: torchvision's vit_b_32 cannot be a backbone"),
    "student weights that are not there": (["--student-weights", "F/no.pth"], "--student-weights F/no.pth is not there: expected a file, an address, or none"),
    "student weights of no kind": (["--student-weights", "s3://x/y.pth"], "--student-weights 's3://x/y.pth' begins with s3://, which is unknown"),
    "student weights of nothing": (["--student-weights", "F/noise.json"], "--student-weights .*noise.json' cannot be read without running code"),
    "weights among the overrides": (["--opts", "MODEL.WEIGHTS", "x.pth"], "--opts sets MODEL.WEIGHTS: that follows from other options"),
    "an unknown teacher": (["--teacher", "nobody.yaml"], "--teacher is 'nobody.yaml', neither a file nor a name"),
    "a teacher's config with code": (["--teacher", "COCO-Detection/retinanet_R_101_FPN_3x.yaml"], "--teacher .* is not a config that can be read"),
    "a teacher without an FPN": (["--teacher", "F/c4.yaml"], "without an FPN: expected a detector"),
    "a teacher without weights": (["--teacher-weights", ""], "--teacher-weights is missing: expected the checkpoint"),
    "weights that are not there": (["--teacher-weights", "F/no.pth"], "--teacher-weights F/no.pth is not there"),
    "an address of no kind": (["--teacher-weights", "s3://x/y.pth"], "begins with s3://, which is unknown"),
    "overrides of what options set": (["--opts", "SEED", "1"], "--opts sets SEED: that follows from other options"),
    "no time": (["--time", "soon", "--opts", "SEED", "1"], "--time is 'soon': expected a duration"),
    "time and iterations": (["--time", "2h"], "--time and SOLVER.MAX_ITER of --opts both set the schedule"),
    "an unknown format": (["--formats", "coreml"], "--formats: format is 'coreml': expected one of"),
    "an unknown method": (["--method", "Magic"], "--method is 'Magic': expected names of"),
    "half an override": (["--opts", "SOLVER.BASE_LR"], "--opts 'SOLVER.BASE_LR' are not pairs"),
    "an unknown key": (["--opts", "SOLVER.NO", "1"], "--opts has overrides that do not fit"),
    "data among the overrides": (["--teacher-opts", "DATASETS.TRAIN", "('x',)"], "--teacher-opts sets DATASETS.TRAIN"),
    "a seed below 0": (["--seed", "-1"], "--seed is -1"),
    "GPUs that are not there": (["--num-gpus", "99"], "--num-gpus is 99: expected 0 to"),
    "the output of something else": (["--output", "F/study"], r"holds files of something else \(table.md"),
    "an output that is a file": (["--output", "F/my.json"], "is a file: expected a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_sentence_and_nothing_written(stranger, tmp_path, monkeypatch, case):
    def never(*_, **__):
        raise AssertionError("steps were taken")

    monkeypatch.setattr(cli, "measure", never)
    more, sentence = WRONG[case]
    folder = str(stranger.folder)
    args = stranger.args(tmp_path / "out", *(text.replace("F/", f"{folder}/") for text in more))
    before = sorted(stranger.folder.rglob("*"))
    with pytest.raises(UserError, match=sentence.replace("F/", f"{folder}/")) as caught:
        cli.main(args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert "DATASETS.COCO_FORMAT" not in str(caught.value)  # nobody wrote a config
    assert not (tmp_path / "out").exists() and sorted(stranger.folder.rglob("*")) == before


def test_weights_of_another_detector_are_told(stranger, tmp_path):
    args = stranger.args(
        tmp_path / "out", "--teacher", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    )
    with pytest.raises(UserError, match=r"fills [0-9]+ of [0-9]+ tensors of --teacher"):
        cli.main(args)
    assert not (tmp_path / "out").exists()


def test_a_state_that_cannot_be_read_is_told(stranger, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "distil.json").write_text('{"schema": 1, "request": []}')
    with pytest.raises(UserError, match=r"distil.json cannot be read"):
        cli.main(stranger.args(tmp_path / "out"))
