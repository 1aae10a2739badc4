"""Levels of other strides and other names: paired by stride, resampled by powers of two where asked for, refused in a sentence."""

import math

import numpy as np
import pytest
import torch
from builders import FROM_P2, batch, losses_of, tiny_model
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from torch.nn import functional as F

from era.errors import UserError
from era.modeling.backbones.small_resnet import build_small_resnet_fpn_backbone
from era.modeling.levels import LevelMap, describe, pair_levels, resample
from era.modeling.step import Step
from era.modeling.teacher import aligned


class ShiftedFPN(FPN):
    """An FPN whose levels are named one stride too small: p2 of stride 8."""

    def forward(self, x):
        return {_shifted(name): value for name, value in super().forward(x).items()}

    def output_shape(self):
        return {_shifted(name): shape for name, shape in super().output_shape().items()}


def _shifted(name):
    return f"p{int(name[1:]) - 1}"


@pytest.fixture(scope="module", autouse=True)
def _shifted_backbone():
    def build_shifted_backbone(cfg, input_shape):
        found = build_small_resnet_fpn_backbone(cfg, input_shape)
        found.__class__ = ShiftedFPN
        return found

    BACKBONE_REGISTRY.register(build_shifted_backbone)
    yield
    BACKBONE_REGISTRY._obj_map.pop("build_shifted_backbone")


SHIFTED = [
    "MODEL.BACKBONE.NAME", "build_shifted_backbone",
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"],
]  # fmt: skip


def of(*strides, first=None, channels=16):
    """Shapes of levels by the names of an FPN, or from a number on."""
    names = [f"p{int(math.log2(s)) if first is None else first + i}" for i, s in enumerate(strides)]
    return {n: ShapeSpec(channels=channels, stride=s) for n, s in zip(names, strides, strict=True)}


# ---- which levels are paired --------------------------------------------------------------------


def test_the_levels_of_a_retinanet_and_of_a_faster_rcnn_share_four():
    found = pair_levels(of(4, 8, 16, 32, 64), of(8, 16, 32, 64, 128), resample=False)
    assert found.names == {f"p{i}": f"p{i}" for i in range(3, 8)} and not found.changes
    found = pair_levels(of(4, 8, 16, 32, 64), of(8, 16, 32, 64, 128), resample=True)
    assert found.resampled == {"p2": ("p3", 2.0)}
    found = pair_levels(of(8, 16, 32, 64, 128), of(4, 8, 16, 32, 64), resample=True)
    assert found.resampled == {"p7": ("p6", 0.5)}


def test_a_shift_of_names_is_paired_by_stride():
    """The teacher's p3 of stride 4 is the student's p2; what has no pair keeps its name, but for a name that is taken."""
    found = pair_levels(of(4, 8, 16), of(2, 4, 8, first=2), resample=False)
    assert found.names == {"p2": "p2 of stride 2", "p3": "p2", "p4": "p3"}
    found = pair_levels(of(8, 16), of(8, 16, 32, first=0), resample=False)
    assert found.names == {"p0": "p3", "p1": "p4", "p2": "p2"}


def test_two_levels_of_one_stride_are_not_guessed_between():
    teacher = {"a": ShapeSpec(channels=4, stride=8), "b": ShapeSpec(channels=4, stride=8)}
    assert pair_levels(of(8), teacher, resample=False).names == {"a": "a", "b": "b"}
    assert pair_levels(of(8), teacher | of(8), resample=False).names["p3"] == "p3"


def test_strides_that_are_no_power_of_two_apart_have_no_pair():
    found = pair_levels(of(8, 16), of(12, 24, first=3), resample=True)
    assert not found.resampled
    assert found.names == {"p3": "p3 of stride 12", "p4": "p4 of stride 24"}


def test_of_two_as_near_the_finer_one_is_taken():
    found = pair_levels(of(8), {**of(4), **of(16)}, resample=True)
    assert found.resampled == {"p3": ("p2", 0.5)}


def test_the_table_says_every_level():
    own, other = of(4, 8, 16), of(8, 16, 32, first=0)
    found = pair_levels(own, other, resample=True)
    rows = [" ".join(line.split()) for line in describe(found, own, other).splitlines()[2:]]
    assert rows == [
        "p2 of stride 4 p0 of stride 8 enlarged 2 times",
        "p3 of stride 8 p0 of stride 8 as it is",
        "p4 of stride 16 p1 of stride 16 as it is",
        "- p2 of stride 32 no pair",
    ]
    plain = describe(pair_levels(own, other, resample=False), own, other)
    assert plain.splitlines()[2].split() == ["p2", "of", "stride", "4", "-", "no", "pair"]


# ---- the maps -----------------------------------------------------------------------------------


def test_maps_are_enlarged_by_repetition_and_averaged_over_squares():
    value = torch.arange(6.0).view(1, 1, 2, 3)
    grown = resample(value, 2.0)
    assert np.array_equal(grown[0, 0].numpy(), value[0, 0].numpy().repeat(2, 0).repeat(2, 1))
    small = resample(value, 0.5)  # the last square is cut by the border
    torch.testing.assert_close(small, torch.tensor([[[[2.0, 3.5]]]]))
    torch.testing.assert_close(resample(grown, 0.5), value)
    assert resample(value, 1.0).equal(value)


def test_a_level_map_gives_maps_and_their_shapes():
    found = LevelMap({"p3": "p2", "p4": "p3"}, {"p4": ("p3", 0.5)})
    shapes = found.shapes(of(4, 8, first=3))
    assert {n: s.stride for n, s in shapes.items()} == {"p2": 4, "p3": 8, "p4": 16}
    maps = found.read({"p3": torch.ones(1, 2, 8, 8), "p4": torch.ones(1, 2, 4, 4)})
    assert {n: tuple(x.shape[2:]) for n, x in maps.items()} == {
        "p2": (8, 8),
        "p3": (4, 4),
        "p4": (2, 2),
    }


# ---- distillers ---------------------------------------------------------------------------------

JUDGES = [
    "MODEL.ERA.KD_WEIGHT",
    "1.0",
    "MODEL.ERA.TWI.SOFT_RPN_WEIGHT",
    "1.0",
    "MODEL.ERA.TWI.SOFT_ROI_WEIGHT",
    "1.0",
]


def shifted_pair(*opts):
    """The same teacher by the student's names, and by names that are one stride off."""
    models = [tiny_model("era", *opts, teacher_opts=extra) for extra in ([], SHIFTED)]
    state = models[0].teacher.model.state_dict()
    models[1].teacher.model.load_state_dict(state)
    return models


def test_a_teacher_with_shifted_names_teaches_the_same():
    """Maps, judges and class distributions: the heads read their levels by the student's names too."""
    plain, shifted = shifted_pair(*JUDGES)
    losses = [losses_of(model, batch())[0] for model in (plain, shifted)]
    assert "loss_era_soft_rpn" in losses[0] and "loss_era_kd" in losses[0]
    torch.testing.assert_close(*losses)
    plain, shifted = (model.eval() for model in (plain, shifted))
    for teacher in (plain.teacher, shifted.teacher):
        teacher.detector.set_score_threshold(0.0)
    found, expected = (m.teacher(batch())[0]["instances"] for m in (shifted, plain))
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_and_its_heads_detect_on_the_students_levels(alpha):
    plain, shifted = shifted_pair("MODEL.ERA.ALPHA", str(alpha))
    shifted.load_state_dict(plain.state_dict())
    outputs = []
    for model in (plain.eval(), shifted.eval()):
        with torch.no_grad():
            outputs.append(model(batch())[0]["instances"].scores)
    torch.testing.assert_close(*outputs)
    if alpha == 1.0:
        assert shifted.deployable().proposal_generator.in_features == ["p3", "p4", "p5", "p6"]


def test_a_copy_of_the_teacher_reads_alike_and_no_cache_takes_its_maps_for_others():
    plain, shifted = shifted_pair()
    size = (64, 64)
    copied = shifted.teacher.copy().maps(batch(), size)
    assert copied.keys() == plain.teacher.maps(batch(), size).keys()
    assert shifted.teacher._scope() != plain.teacher._scope()


MIMIC = [
    "MODEL.DISTILLER.METHODS",
    "['Mimic']",
    "MODEL.MIMIC.LEVELS",
    "['p2', 'p3', 'p4', 'p5', 'p6']",
    *FROM_P2,
]


@pytest.mark.parametrize("teacher", ["retinanet_teacher", "teacher"])
def test_a_level_that_the_teacher_lacks_is_made_of_the_next(teacher):
    """p2 of the student against the teacher's p3, every position of it four times."""
    model = tiny_model("era", *MIMIC, "MODEL.DISTILLER.RESAMPLE_LEVELS", "True", teacher=teacher)
    with model.detector.record() as recording:
        losses_of(model.student, batch())
    step = Step(batch(), recording, model.detector, model.teacher)
    maps = step.teacher_features
    levels = ["p2", "p3", "p4", "p5", "p6"]
    repeated = maps["p3"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(maps["p2"], repeated)
    assert all(maps[x].shape[2:] == recording.features[x].shape[2:] for x in levels)
    method = model.methods["mimic"]
    expected = sum(F.mse_loss(method.adapters[x](recording.features[x]), maps[x]) for x in levels)
    found = method.losses(step)["loss_mimic_feature"]
    torch.testing.assert_close(found, method.weight * expected)


def test_odd_sides_are_cut_as_the_students():
    model = tiny_model("era", *MIMIC, "MODEL.DISTILLER.RESAMPLE_LEVELS", "True")
    losses, _ = losses_of(model, batch((1,), size=(50, 75)) + batch((2,), size=(64, 33), seed=1))
    assert torch.isfinite(sum(losses.values()))
    like = {"p2": torch.zeros(1, 1, 9, 9)}
    assert aligned({"p2": torch.ones(1, 2, 10, 10)}, like)["p2"].shape == (1, 2, 9, 9)


def test_without_the_key_the_sentence_names_it():
    with pytest.raises(
        UserError, match=r"teacher's backbone has no \['p2'\].*RESAMPLE_LEVELS True"
    ):
        tiny_model("era", *MIMIC)


def test_a_head_that_reads_a_level_of_its_own_is_refused():
    """p7 of a RetinaNet: no map that is made for the student stands for it."""
    opts = ["MODEL.DISTILLER.METHODS", "['TRED']", "MODEL.TRED.STAGE", "disentangle",
            "MODEL.TRED.LEVELS", "['p3', 'p4', 'p5', 'p6']"]  # fmt: skip
    with pytest.raises(UserError, match="RetinaNet"):
        tiny_model("era", *opts, teacher="retinanet_teacher")
