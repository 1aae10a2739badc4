"""Checkpoints that are verified, the last and the best that are kept, and what does not fit a resume."""

import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
from builders import cli, digest
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.settings import differences, settings_of
from era.checkpoint.writing import damage
from era.engine.hooks import BEST, Checkpoints, KeepBest, best_metric
from era.engine.launch import argument_parser
from era.engine.preflight import preflight, setup_config
from era.errors import UserError


class Progress:
    """A run's trainer, as a checkpoint holds it."""

    def state_dict(self):
        return {"iteration": 0}

    def load_state_dict(self, state):
        pass


def checkpointer_of(folder):
    return SafeCheckpointer(torch.nn.Linear(40, 40), str(folder), trainer=Progress())


def flip(path, place=0.5):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


# ---- the hash beside each ---------------------------------------------------------------------------------


def test_the_hash_is_sha256sums(tmp_path):
    checkpointer_of(tmp_path).save("m", iteration=3)
    expected = hashlib.sha256((tmp_path / "m.pth").read_bytes()).hexdigest()
    assert (tmp_path / "m.pth.sha256").read_text() == f"{expected}  m.pth\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last_checkpoint", "m.pth", "m.pth.sha256",
    ]  # fmt: skip


@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.9])
def test_one_flipped_bit_is_named_and_the_checkpoint_before_is_used(place, tmp_path, caplog):
    checkpointer = checkpointer_of(tmp_path)
    for iteration in (3, 7, 11):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    flip(tmp_path / "model_0000011.pth", place)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000007.pth")
    (line,) = [line for line in caplog.text.splitlines() if "resuming from" in line]
    assert "model_0000007.pth, iteration 7" in line and "model_0000011.pth: " in line
    assert "SHA-256" in line or "unreadable" in line
    checkpointer = checkpointer_of(tmp_path)
    with pytest.raises(UserError, match=r"model_0000011\.pth' (are damaged|cannot be read)"):
        checkpointer.load(str(tmp_path / "model_0000011.pth"))
    checkpointer.load(str(tmp_path / "model_0000007.pth"))


def test_without_a_whole_checkpoint_nothing_is_resumed(tmp_path):
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.save("model_0000003", iteration=3)
    flip(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match=r"no whole checkpoint.*model_0000003\.pth: its SHA-256"):
        checkpointer.get_checkpoint_file()


def test_a_file_without_a_hash_is_taken_as_it_is(tmp_path):
    """As those of earlier versions, and one whose hash was not yet written when the process was killed."""
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.save("model_0000003", iteration=3)
    (tmp_path / "model_0000003.pth.sha256").unlink()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000003.pth")
    assert damage(str(tmp_path / "model_0000003.pth")) is None
    (tmp_path / "model_0000003.pth.sha256").write_bytes(b"\xff\xfe")
    assert "cannot be read" in damage(str(tmp_path / "model_0000003.pth"))


def test_a_hash_that_is_none_is_named_and_not_waited_for(tmp_path):
    checkpointer_of(tmp_path).save("m", iteration=3)
    path, beside = tmp_path / "m.pth", tmp_path / "m.pth.sha256"
    for content in (b"", b" \n", b"\0" * 64, b"x" * 9999, b"<html>404</html>"):
        beside.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.pth' are damaged \(") as e:
            checkpointer_of(tmp_path).load(str(path))
        assert len(str(e.value)) < 400 and "\n" not in str(e.value)
    beside.unlink()
    beside.mkdir()
    assert "cannot be read" in damage(str(path))
    beside.rmdir()
    os.mkfifo(beside)
    assert "cannot be read" in damage(str(path))
    beside.unlink()
    checkpointer_of(tmp_path).load(str(path))


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_a_bit_of_the_best_is_noticed_when_it_is_used(query, tmp_path):
    """Also with the settings that Detectron2 reads behind a file's name."""
    evaluations(tmp_path, [5.0])
    path = tmp_path / f"{BEST}.pth"
    checkpointer_of(tmp_path).load(f"{path}{query}")
    flip(path, 0.9)
    with pytest.raises(UserError, match=r"model_best\.pth.* (are damaged|cannot be read)"):
        checkpointer_of(tmp_path).load(f"{path}{query}")


# ---- the last and the best --------------------------------------------------------------------------------


def train(hook, iterations, *, max_iter=100):
    hook.trainer = SimpleNamespace(max_iter=max_iter)
    for hook.trainer.iter in iterations:
        hook.after_step()


def names(folder):
    return sorted(path.stem for path in folder.glob("*.pth"))


def test_the_last_are_kept_and_nothing_of_others_goes(tmp_path):
    (tmp_path / "model_0000001.pth").write_bytes(b"of an earlier run")
    (tmp_path / "model_0000003.pth.partial").write_bytes(b"of a killed process")
    hook = Checkpoints(checkpointer_of(tmp_path), period=2, keep=2)
    hook.before_train()
    train(hook, range(2, 10), max_iter=10)
    assert names(tmp_path) == ["model_0000001", "model_0000007", "model_0000009", "model_final"]
    assert not list(tmp_path.glob("*.partial")) and len(list(tmp_path.glob("*.sha256"))) == 3
    assert hook.names == ["model_0000007", "model_0000009"]

    resumed = Checkpoints(checkpointer_of(tmp_path), period=2, keep=2)
    resumed.go_on_with(
        ["model_0000003", "model_0000005", "model_0000007"]
    )  # it was 9 that was damaged
    assert resumed.names == ["model_0000005", "model_0000007"]
    train(resumed, range(8, 12))
    assert names(tmp_path) == ["model_0000001", "model_0000009", "model_0000011", "model_final"]


@pytest.mark.parametrize("period, keep, count", [(2, 0, 5), (0, 3, 0), (3, 3, 3)])
def test_how_many_are_kept(period, keep, count, tmp_path):
    hook = Checkpoints(checkpointer_of(tmp_path), period=period, keep=keep)
    train(hook, range(10), max_iter=10)
    assert len(names(tmp_path)) == count + 1  # and model_final


def evaluations(folder, values, *, resumed=False, metric="bbox/AP"):
    """The hook after evaluations at iterations 1, 2, ..."""
    checkpointer = checkpointer_of(folder)
    hook = KeepBest(checkpointer, metric, resumed=lambda: resumed)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(storage=storage)
        hook.before_train()
        for storage.iter, value in enumerate(values, start=1):
            if value is not None:
                storage.put_scalar("bbox/AP", value, smoothing_hint=False)
            torch.nn.init.constant_(checkpointer.model.weight, storage.iter)
            hook.after_step()
        hook.after_train()
    return hook


def best(folder):
    return torch.load(folder / f"{BEST}.pth", weights_only=True)


def test_the_best_is_the_first_of_the_highest(tmp_path):
    evaluations(tmp_path, [1.0, 3.0, None, 3.0, 2.0])
    found = best(tmp_path)
    assert found["best"] == {"metric": "bbox/AP", "value": 3.0, "iteration": 2}
    assert (found["model"]["weight"] == 2).all()
    assert not checkpointer_of(tmp_path).has_checkpoint()  # nothing to resume from

    evaluations(tmp_path, [2.0, 2.5], resumed=True)
    assert best(tmp_path)["best"]["value"] == 3.0
    evaluations(tmp_path, [3.5], resumed=True)
    assert best(tmp_path)["best"]["value"] == 3.5
    evaluations(tmp_path, [0.0])  # another run in the same folder
    assert best(tmp_path)["best"]["value"] == 0.0


def test_a_best_that_is_damaged_or_of_another_metric_counts_for_nothing(tmp_path, caplog):
    evaluations(tmp_path, [5.0])
    assert evaluations(tmp_path, [], resumed=True, metric="segm/AP").value is None
    flip(tmp_path / f"{BEST}.pth")
    evaluations(tmp_path, [1.0], resumed=True)
    assert "model_best.pth is damaged" in caplog.text and best(tmp_path)["best"]["value"] == 1.0


@pytest.mark.parametrize("said", [5, None, "bbox/AP", ["metric"], {"metric": "bbox/AP"},
                                  {"metric": "bbox/AP", "value": "high"}])  # fmt: skip
def test_a_best_that_says_something_else_counts_for_nothing(said, tmp_path):
    torch.save({"model": {}, "best": said}, tmp_path / f"{BEST}.pth")
    evaluations(tmp_path, [1.0], resumed=True)
    assert best(tmp_path)["best"]["value"] == 1.0


def test_no_evaluation_is_best_that_gives_no_number(tmp_path, caplog):
    evaluations(tmp_path, [float("nan")])
    assert not list(tmp_path.glob("*.pth"))
    evaluations(tmp_path, [1.0, 2.0], metric="segm/AP")
    assert not list(tmp_path.glob("*.pth"))
    assert caplog.text.count("name one such as bbox/AP") == 1


def test_which_metric_is_meant(tiny_data, tmp_path):
    def metric(*opts):
        args = cli(tiny_data, tmp_path, "TEST.EVAL_PERIOD", "5", *opts, config="plain")
        return best_metric(setup_config(argument_parser().parse_args(args)))

    assert metric() == "bbox/AP"
    assert metric("DATASETS.TEST", "('tiny_val', 'tiny_train')") == "tiny_val/bbox/AP"
    assert metric("TEST.EVAL_PERIOD", "0") is metric("TEST.BEST_METRIC", "") is None


@pytest.mark.parametrize("value", ["1", "-1"])
def test_a_single_checkpoint_is_too_few(value, tiny_data, tmp_path):
    args = cli(tiny_data, tmp_path, "SOLVER.CHECKPOINTS_KEPT", value, config="plain")
    with pytest.raises(UserError, match=r"SOLVER\.CHECKPOINTS_KEPT is -?1: expected at least 2"):
        setup_config(argument_parser().parse_args(args))


# ---- what does not fit ------------------------------------------------------------------------------------


MISFITS = {
    "FPN width": (["MODEL.FPN.OUT_CHANNELS", "24"], ["MODEL.FPN.OUT_CHANNELS was 16 and is 24"]),
    "branches": (["MODEL.ERA.NUM_BRANCHES", "2", "MODEL.ERA.SCALES", "[1.0, 0.5]"],
                 ["MODEL.ERA.NUM_BRANCHES was 4 and is 2"]),
    "architecture": (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
                     ["MODEL.META_ARCHITECTURE was Distiller and is GeneralizedRCNN"]),
    "depth": (["MODEL.RESNETS.DEPTH", "18"], ["MODEL.RESNETS.DEPTH was 10 and is 18"]),
}  # fmt: skip


def test_another_model_is_refused_before_training(tiny_data, tmp_path):
    def parsed(*opts):
        args = argument_parser().parse_args(["--resume", *cli(tiny_data, tmp_path, *opts)])
        return setup_config(args), args

    cfg, args = parsed()
    SafeCheckpointer(
        build_model(cfg), str(tmp_path), settings=settings_of(cfg, processes=1), trainer=Progress()
    ).save("model_0000003", iteration=3)
    preflight(cfg, args)
    before = digest(tmp_path)
    for opts, words in MISFITS.values():
        with pytest.raises(UserError) as e:
            preflight(*parsed(*opts))
        sentence = str(e.value)
        assert "\n" not in sentence and sentence.startswith(f"{tmp_path}/model_0000003.pth")
        for word in [*words, "does not fit this config's model", "another OUTPUT_DIR"]:
            assert word in sentence, (word, sentence)
    assert digest(tmp_path) == before


def test_settings_that_change_nothing_are_not_mentioned():
    then = {"SEED": "1", "OUTPUT_DIR": "a", "SOLVER.BASE_LR": "0.1", "OLD": "1"}
    now = {"SEED": "1", "OUTPUT_DIR": "b", "SOLVER.BASE_LR": "0.2", "NEW": "1"}
    assert differences(then, now) == ["SOLVER.BASE_LR was 0.1 and is 0.2"]
    assert differences(then, now, prefix="MODEL.") == []
