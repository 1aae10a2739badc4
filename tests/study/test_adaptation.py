"""The adaptation cost by hand and against numpy, the order of teachers on made-up costs, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import TINY_TEACHER, run_tool, tiny_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from era.errors import UserError
from era.study.adaptation import MAX_POSITIONS, Moments, no_nearer, teacher_order
from era.study.adaptation_cli import Source, common_levels, main


def costs(*maps, batches=1):
    """Of maps (B, C, H, W), counted in at once or in parts."""
    found = Moments([m.shape[1] for m in maps])
    for parts in zip(*(m.chunk(batches) for m in maps), strict=True):
        found.add(parts)
    return np.array(found.costs())


def row(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def drawn(channels, *, seed, count=4, size=(12, 10)):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def test_the_cost_by_hand():
    """Against 0 1 2 3: 2x + 1 is free; 0 1 1 0 is uncorrelated; 0 0 0 1 has r^2 = 1.5^2 / (5 * 0.75) = 0.6."""
    line, image = row(0.0, 1.0, 2.0, 3.0), row(1.0, 3.0, 5.0, 7.0)
    found = costs(line, image, row(0.0, 1.0, 1.0, 0.0), row(0.0, 0.0, 0.0, 1.0))
    np.testing.assert_allclose(found[0], [0, 0, 1, 0.4], atol=1e-12)
    np.testing.assert_allclose(found[:, 0], [0, 0, 1, 0.4], atol=1e-12)


def test_identical_maps_and_linear_images_cost_nothing_and_unrelated_ones_all():
    maps = drawn(6, seed=0) + 3
    mixing = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    image = torch.einsum("dc,bchw->bdhw", mixing, maps) * 1e3 - 50
    found = costs(maps, image, drawn(6, seed=2))
    assert found[0, 0] < 1e-9 and found[1, 1] < 1e-9 and found[0, 1] < 1e-9
    assert 0.2 < found[1, 0] < 0.5  # 4 of 6 directions are left: it is no metric
    assert 0.95 < found[0, 2] < 1 and 0.95 < found[2, 0] < 1


def test_against_numpys_least_squares_in_parts_and_at_any_scale():
    a, b = drawn(5, seed=3).double(), drawn(3, seed=4).double()
    b = b + a.sum(1, keepdim=True).tanh()
    x, y = (m.movedim(1, -1).flatten(0, -2).numpy() for m in (a, b))
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    _, residual, _, _ = np.linalg.lstsq(x, y, rcond=None)
    expected = residual.sum() / ((y - y.mean(0)) ** 2).sum()
    assert 0.05 < expected < 0.95
    for found in (costs(a, b), costs(a, b, batches=4), costs(a * 1e-3 + 7, b * 1e3)):
        assert found[0, 1] == pytest.approx(expected, rel=1e-6)


def test_dead_and_repeated_channels_neither_explain_nor_break():
    a, b = drawn(3, seed=5), drawn(2, seed=6)
    dead = torch.cat([a, a[:, :1], torch.full_like(a[:, :1], 2.0)], 1)
    found = costs(a, b, dead, torch.zeros_like(b))
    assert found[2, 1] == pytest.approx(found[0, 1]) and found[0, 2] < 1e-9
    assert found[3, 1] == 1 and (found[:, 3] == 0).all()


def test_a_large_map_is_thinned():
    found = Moments([1, 1])
    found.add([drawn(1, seed=i, count=1, size=(130, 100)) for i in (0, 1)])
    assert 65 * 50 == found.count <= MAX_POSITIONS


def made_up(names, *rows):
    """Costs from each of these (rows) to each (columns)."""
    return {a: dict(zip(names, row, strict=True)) for a, row in zip(names, rows, strict=True)}


def test_the_order_by_hand():
    """To D: B 0.2, C 0.3, A 0.4. To B: A 0.3, C 0.4, and that A and C are near to each other does not count. Then C."""
    costs = made_up(
        "ABCD",
        (0.0, 0.3, 0.1, 0.4),
        (0.5, 0.0, 0.5, 0.2),
        (0.1, 0.4, 0.0, 0.3),
        (0.0, 0.0, 0.0, 0.0),
    )
    assert teacher_order(costs, "D") == ["C", "A", "B", "D"]
    assert teacher_order(costs, "A") == ["C", "B", "D", "A"]
    costs["C"]["B"] = 0.3  # equal: the first
    assert teacher_order(costs, "D") == ["C", "A", "B", "D"]


def test_teachers_that_shorten_no_way_by_hand():
    """From S to C it is 0.5: from B 0.5 too. To B it is 0.6, from A 0.4."""
    costs = made_up(
        "SABC", (0.0, 0.9, 0.6, 0.5), (0.0, 0.0, 0.4, 0.1), (0.0, 0.0, 0.0, 0.5), (0.0,) * 4
    )
    assert no_nearer(costs, "S", ["A", "B", "C"]) == ["B"]
    costs["S"]["C"] = 0.51
    assert no_nearer(costs, "S", ["A", "B", "C"]) == []


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detectors(tiny_data, tmp_path_factory):
    """Config and weights of a tiny student, of teachers, and of what does not go with them."""
    folder = tmp_path_factory.mktemp("detectors")

    def made(name, config, *opts, seed):
        cfg = tiny_cfg(config, *tiny_data, *opts)
        (folder / f"{name}.yaml").write_text(cfg.dump())
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict()}, folder / f"{name}.pth")
        return [str(folder / f"{name}.yaml"), str(folder / f"{name}.pth")]

    coarse = ["MODEL.FPN.IN_FEATURES", "['res4', 'res5']", "MODEL.RPN.IN_FEATURES", "['p4', 'p5', 'p6']",
              "MODEL.ROI_HEADS.IN_FEATURES", "['p4', 'p5']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [96]]"]  # fmt: skip
    return {
        "student": made("student", "plain", seed=0),
        "distilled": made("distilled", "era", seed=0),
        "weak": made("weak", "teacher", *TINY_TEACHER, seed=1),
        "strong": made("strong", "teacher", *TINY_TEACHER, "INPUT.FORMAT", "RGB", seed=2),
        "coarse": made("coarse", "teacher", *TINY_TEACHER, *coarse, seed=3),
    }


def arguments(detectors, output, *more, student="student", teachers=("weak", "strong")):
    each = [x for name in teachers for x in ("--teacher", name, *detectors[name])]
    return ["--student", *detectors[student], *each, "--output", str(output), *more]


def test_the_command_prints_and_writes(detectors, tmp_path):
    output = tmp_path / "new" / "costs.json"
    done = run_tool(
        "adaptation_cost.py", *arguments(detectors, output, "--levels", "p3", "p4", "--pictures", "12")
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "order: student -> weak (" in done.stdout and "12/12" in done.stderr
    found = json.loads(output.read_text())
    names = ["student", "weak", "strong"]
    assert list(found["costs"]) == list(found["detectors"]) == names
    assert found["order"] == ["weak", "strong"] and found["dataset"] == "tiny_train"
    assert found["pictures"] == 12 and found["positions"] == {"p3": 12 * 64, "p4": 12 * 16}
    for a in names:
        assert found["costs"][a][a] < 1e-9
        for b in set(names) - {a}:
            levels = [found["costs_by_level"][level][a][b] for level in ("p3", "p4")]
            assert found["costs"][a][b] == pytest.approx(sum(levels) / 2)
            assert min(levels) > 0 and max(levels) < 1
            assert f"{found['costs'][a][b]:.3f}" in done.stdout


def test_the_student_of_a_distilled_checkpoint_and_twice_the_same_detector(detectors, tmp_path):
    """Its own weights again are at no distance; and the same picture is shown in either channel order."""
    output = tmp_path / "costs.json"
    args = arguments(detectors, output, "--levels", "p3", student="distilled", teachers=("student", "weak"))  # fmt: skip
    args[args.index("--teacher") + 1] = "twin"
    assert main(args) == 0
    found = json.loads(output.read_text())["costs"]
    assert found["student"]["twin"] < 1e-6 and found["student"]["weak"] > 0.01


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teachers": ("weak",)}, r"--teacher is given 1 time\(s\): expected two teachers"),
        ({"teachers": ()}, r"--teacher is given 0 time\(s\)"),
        ({"teachers": ("weak", "weak")}, r"--teacher names 'weak', which another detector"),
        ({"teachers": ("weak", "student")}, r"--teacher names 'student', which another detector"),
        ({"teachers": ("coarse", "strong"), "more": ["--levels", "p3"]},
         r"--teacher coarse does not pair with the student: --levels is \['p3'\], but the teacher's backbone has no"),
        ({"more": ["--levels", "p9"]}, r"the student's backbone has no \['p9'\]"),
        ({"more": ["--levels", "p3", "p3"]}, r"--levels is \['p3', 'p3'\], with a level twice"),
        ({"more": ["--pictures", "0"]}, r"--pictures is 0: expected at least 1"),
        ({"more": ["--pictures", "2"]}, r"p3 has 128 positions in 2 picture\(s\), .* 160 or more; raise --pictures"),
        ({"more": ["--dataset", "nowhere"]}, r"--dataset names 'nowhere', which is not a registered"),
        ({"more": ["--output", "/proc/era/costs.json"]}, r"the folder of --output /proc/era cannot be written"),
        ({"more": ["--output", "/tmp"]}, r"--output /tmp is a folder"),
        ({"more": ["--teacher", "absent", "COCO-Detection/none.yaml", "w.pth"]}, r"--teacher absent is 'COCO-D"),
        ({"more": ["--teacher", "absent", "configs/toy/teacher.yaml", "absent.pth"]},
         r"weights 'absent\.pth' cannot be opened"),
        ({"more": ["--teacher", "unnamed", "configs/toy/teacher.yaml", ""]}, r'--teacher unnamed has the weights ""'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    detectors, tmp_path, monkeypatch, repo, change, words
):
    monkeypatch.chdir(repo)
    output = tmp_path / "costs.json"
    more = ["--levels", "p3", "p4", *change.pop("more", [])]
    with pytest.raises(UserError, match=words) as error:
        main(arguments(detectors, output, *more, **change))
    assert "\n" not in str(error.value) and not output.exists()


def test_weights_of_another_architecture(detectors, tmp_path):
    mixed = {**detectors, "weak": [detectors["weak"][0], detectors["coarse"][1]]}
    with pytest.raises(UserError, match=r"--teacher weak .* does not fit the model of its config"):
        main(arguments(mixed, tmp_path / "costs.json"))


def with_strides(**strides):
    """What is read of a detector to choose the levels."""
    shapes = {level: ShapeSpec(channels=4, stride=stride) for level, stride in strides.items()}
    return SimpleNamespace(detector=SimpleNamespace(feature_shapes=shapes))


def test_levels_are_those_of_all_detectors_and_their_strides_pair():
    sources = [Source(name, "", "") for name in ("student", "weak", "strong")]
    usual, fewer = with_strides(p3=8, p4=16, p5=32, p6=64), with_strides(p4=16, p5=32, p6=64)
    assert common_levels(sources, [usual, usual, usual], None) == ["p3", "p4", "p5"]
    assert common_levels(sources, [usual, fewer, usual], None) == ["p4", "p5"]
    assert common_levels(sources, [usual, fewer, usual], ["p6"]) == ["p6"]
    words = r"--teacher strong does not pair with the student: --levels names p5, which has stride 32 .* 16"
    with pytest.raises(UserError, match=words):
        common_levels(sources, [usual, fewer, with_strides(p4=16, p5=16)], None)
    with pytest.raises(UserError, match="--levels is empty"):
        common_levels(sources, [usual, with_strides(a=4), usual], None)
