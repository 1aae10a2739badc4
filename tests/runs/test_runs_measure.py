"""What trained models cost: whose parameters count, and models that take turns."""

import pytest
from builders import REPO, batch, tiny_cfg, tiny_model

from era.checkpoint.student import save_plain_student
from era.runs import measure
from era.runs.plan import Run


def parameters(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_a_training_is_measured_as_its_plain_student(tmp_path):
    model = tiny_model("era")
    save_plain_student(model.student, tiny_cfg("era"), str(tmp_path / "student"))
    loaded = measure.load(Run("era", "", "", (), tmp_path, 10))
    assert not loaded.training
    assert measure.count_parameters(loaded) == parameters(model.student)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_an_evaluation_is_measured_as_what_the_method_makes_of_it(tmp_path, monkeypatch, alpha):
    monkeypatch.chdir(REPO)
    model = tiny_model("era", "MODEL.ERA.ALPHA", alpha)
    monkeypatch.setattr(measure, "build_for_evaluation", lambda cfg, resume: model)
    loaded = measure.load(Run("era_alpha", "", "configs/toy/era.yaml", (), tmp_path, 0))
    loaded([{key: batch()[0][key] for key in ("image", "height", "width")}])
    if alpha < 1:  # no ordinary model computes a blend
        assert loaded is model and measure.count_parameters(loaded) is None
        return
    heads = model.teacher.model
    assert measure.count_parameters(loaded) == parameters(
        model.student.backbone, model.methods["era"].estimator, heads.proposal_generator, heads.roi_heads
    )  # fmt: skip


def test_models_take_turns_and_warm_up_is_not_timed():
    calls = []
    models = [lambda x, name=name: calls.append(name) for name in "abc"]
    times = measure.interleaved_times(models, [{}] * 4, warm_up=2)
    assert [len(t) for t in times] == [4, 4, 4]
    assert "".join(calls[:6]) == "abcbca" and len(calls) == 18
