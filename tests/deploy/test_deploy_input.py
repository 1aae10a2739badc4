"""Requests that cannot be met, and damaged folders: one sentence each, nothing half written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from deploy_case import FOLDER, ROOT, exported, mask_run, run, source

import era_runtime
from era.checkpoint.reading import strip_student
from era.deploy.export import export, export_main
from era.deploy.source import load_source
from era.errors import UserError
from era_runtime import DeploymentError


def deeper(folder) -> list[str]:
    """Arguments: the run's config with weights of a deeper network that holds all of its weights."""
    weights = torch.load(run() / "model_final.pth")["model"]
    weights["student.backbone.bottom_up.res4.1.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    torch.save({"model": weights}, folder / "deeper.pth")
    return ["--config-file", str(run() / "config.yaml"), "--weights", str(folder / "deeper.pth")]


def plain_only(folder) -> list[str]:
    """Arguments: alpha 1 from a checkpoint without what the method trained."""
    weights = strip_student(torch.load(run() / "model_final.pth")["model"])
    torch.save({"model": weights}, folder / "plain.pth")
    arguments = [
        "--config-file",
        str(run() / "config.yaml"),
        "--weights",
        str(folder / "plain.pth"),
    ]
    return [*arguments, "--alpha", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda _: ["--run", str(run()), "--format", "tflite"],
            "format is 'tflite': expected one of",
        ),
        (lambda _: ["--run", str(run()), "--alpha", "2"], "--alpha is 2: expected 0"),
        (lambda _: ["--run", str(run()), "--int8"], "int8 is for format onnx"),
        (lambda p: ["--run", str(p)], "holds no config.yaml"),
        (lambda _: ["--config-file", "configs/toy/plain.yaml"], "--weights is missing"),
        (lambda _: [], "give either --run OUTPUT_DIR or --config-file"),
        (
            lambda _: [
                "--config-file",
                str(ROOT / "configs/toy/plain.yaml"),
                "--weights",
                str(FOLDER / "teacher.pth"),
            ],
            "do not fit the model of the config: the file (lacks|has)",
        ),
        (deeper, "has .*res4.1.conv1.weight, which the model lacks"),
        (lambda _: ["--run", str(mask_run()), "--alpha", "1"], "alpha 1 needs a run of a method"),
        (plain_only, "lacks the modules of ERA, which the run was distilled with"),
        (
            lambda _: ["--run", str(run()), "--classes", str(run() / "config.yaml")],
            "class names were found and MODEL.ROI_HEADS.NUM_CLASSES is 8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests_are_one_sentence_and_write_nothing(tmp_path, arguments, message):
    arguments = arguments(tmp_path)
    before = sorted(tmp_path.iterdir())
    run()
    if "--format" not in arguments:
        arguments += ["--format", "torchscript"]
    with pytest.raises(UserError, match=message) as caught:
        export_main([*arguments, "--output", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export(source(0), "torchscript", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def changed_manifest(**entries):
    """A change to a copied folder: other entries in its manifest."""

    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **entries}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.ts").open("ab").write(b"x"), "does not match the SHA-256"),
        (lambda f: (f / "classes.json").write_text("[]"), "does not match the SHA-256"),
        (lambda f: (f / "model.ts").unlink(), "is missing, though"),
        (lambda f: (f / "manifest.json").unlink(), "is no deployment folder"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
        (changed_manifest(format_version=3), "has format_version 3: this version reads 1 and 2"),
        (changed_manifest(format="tensorrt"), "has format 'tensorrt': expected one of"),
        (changed_manifest(files={}), "does not list model.ts"),
        (changed_manifest(input={}), "has no fit entry 'min_size'"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, change, message):
    shutil.copytree(exported("torchscript")[0], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(DeploymentError, match=message) as caught:
        era_runtime.load(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_alpha_1_refuses_another_teacher(tmp_path):
    checkpoint = torch.load(run() / "model_final.pth")
    checkpoint["teacher"] = {"config_file": "t.yaml", "weights": "t.pth", "sha256": "0" * 64}
    torch.save(checkpoint, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"was trained with the teacher 't\.pth'"):
        load_source(
            config_file=str(run() / "config.yaml"),
            weights=str(tmp_path / "model_final.pth"),
            alpha=1,
        )
