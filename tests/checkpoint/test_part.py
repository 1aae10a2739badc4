"""A part of a method that one run trains and another one uses."""

import pytest
import torch
from torch import nn

from era.checkpoint.part import load_part
from era.errors import UserError

PREFIX = "methods.mine.head."


def write(path, head, sha="a" * 64):
    weights = {f"{PREFIX}{key}": value for key, value in head.state_dict().items()}
    weights["student.backbone.weight"] = torch.zeros(3)
    torch.save({"model": weights, "teacher": {"sha256": sha}, "iteration": 5}, path)
    return str(path)


def load(module, path, teacher="a" * 64):
    load_part(module, path, PREFIX, what="MODEL.MINE.HEAD", teacher=teacher)


def test_the_part_is_filled_and_nothing_else_is_looked_at(tmp_path):
    trained, fresh = nn.Linear(4, 2), nn.Linear(4, 2)
    load(fresh, write(tmp_path / "model_final.pth", trained))
    torch.testing.assert_close(fresh.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    "case, words",
    [
        ("none", r'MODEL\.MINE\.HEAD is "": expected the checkpoint'),
        ("absent", r"absent\.pth.* cannot be opened"),
        ("no checkpoint", r"cannot be read"),
        ("no part", r"holds no methods\.mine\.head\."),
        ("other teacher", r"was trained with another teacher than MODEL\.TEACHER\.WEIGHTS"),
        ("other shape", r"does not fit: below methods\.mine\.head\. it has .*weight.* of shape"),
        ("one key less", r"does not fit: below methods\.mine\.head\. it lacks bias"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(tmp_path, case, words):
    path, head, teacher = tmp_path / "model_final.pth", nn.Linear(4, 2), "a" * 64
    if case == "none":
        path = ""
    elif case == "absent":
        path = tmp_path / "absent.pth"
    elif case == "no checkpoint":
        path.write_bytes(b"no checkpoint")
    elif case == "no part":
        torch.save({"model": {"student.x": torch.zeros(1)}}, path)
    elif case == "other teacher":
        write(path, head, sha="b" * 64)
    elif case == "other shape":
        write(path, nn.Linear(4, 3))
    else:
        write(path, nn.Linear(4, 2, bias=False))
    with pytest.raises(UserError, match=words):
        load(head, str(path), teacher)
