"""A student published in the Hub's layout, and read back from a folder and from a server that stands for the Hub."""

import functools
import http.server
import json
import threading

import pytest
import torch
import yaml
from builders import cli, tiny_cfg
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from era.checkpoint.hub import hub_file
from era.checkpoint.reading import SafeCheckpointer, load_exactly
from era.config import load_config
from era.deploy.export import export_main
from era.engine.launch import train_net
from era.errors import UserError
from era.report.cli import report_main
from era_runtime.manifest import read_classes


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """OUTPUT_DIR of a distilled run."""
    folder = tmp_path_factory.mktemp("run") / "distilled_|_run"
    train_net(
        cli(tiny_data, folder, "SOLVER.MAX_ITER", "2", "SEED", "5", "TEST.EVAL_TEACHER", "True")
    )
    return folder


@pytest.fixture(scope="module")
def published(run):
    """The folder that the report wrote about it."""
    folder = run.parent / "hub" / "my-student"
    report_main([str(run), "--output", str(run.parent / "r.html"), "--pictures", "0",
                 "--publish", str(folder), "--license", "apache-2.0"])  # fmt: skip
    return folder


@pytest.fixture
def served(published, monkeypatch, tmp_path):
    """The folder at ``owner/name`` of a server of this machine."""
    root = tmp_path / "root"
    place = root / "owner" / "name" / "resolve" / "main"
    place.parent.mkdir(parents=True)
    place.symlink_to(published)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        yield "hf://owner/name"
        server.shutdown()


def student_weights(run):
    return torch.load(run / "student" / "model_final.pth", weights_only=True)["model"]


def test_stock_detectron2_reads_what_was_published(run, published):
    """Config by a stock ``get_cfg``, weights by name; nothing of this machine is in them."""
    assert sorted(p.name for p in published.iterdir()) == ["README.md", "classes.txt", "config.yaml", "model.safetensors"]  # fmt: skip
    cfg = get_cfg()
    cfg.merge_from_file(str(published / "config.yaml"))
    assert cfg.MODEL.WEIGHTS == "" and str(run) not in cfg.dump()
    from safetensors.torch import load_file

    found, expected = load_file(published / "model.safetensors"), student_weights(run)
    assert found.keys() == expected.keys() == build_model(cfg).state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_card_tells_what_the_hub_and_a_reader_want(run, published):
    text = (published / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "object-detection"
    assert front["library_name"] == "detectron2" and "era" in front["tags"]
    (result,) = front["model-index"][0]["results"]
    with open(run / "metrics.json") as file:
        metrics = [json.loads(line) for line in file]
    recorded = next(line["bbox/AP"] for line in reversed(metrics) if "bbox/AP" in line)
    assert {"type": "bbox_AP", "value": round(recorded, 2)} in result["metrics"]
    rows = [line for line in body.splitlines() if line.startswith("| distilled")]
    assert rows and rows[0].startswith(r"| distilled\_\|\_run |")  # a name breaks no table
    assert "Faster R-CNN on small\\_resnet\\_fpn, trained with ERA by a teacher of" in body
    classes = (published / "classes.txt").read_text().split()
    assert len(classes) == 8 and all(name in body for name in classes)


@pytest.mark.parametrize("place", ["folder", "repository"])
def test_it_stands_wherever_weights_and_configs_are_named(place, run, published, request):
    address = request.getfixturevalue("served") if place == "repository" else f"hf://{published}"
    model = build_model(load_config(address, ["MODEL.DEVICE", "cpu"]))
    load_exactly(model, address, what="MODEL.WEIGHTS")
    expected = student_weights(run)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_it_teaches_and_is_exported(tiny_data, published, tmp_path):
    """As MODEL.TEACHER of a run, and by tools/export.py, which finds the classes' names beside it."""
    address = f"hf://{published}"
    train_net([*cli(tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"),
               "MODEL.TEACHER.CONFIG_FILE", address, "MODEL.TEACHER.WEIGHTS", address, "MODEL.TEACHER.OPTS", "[]",
               "MODEL.TEACHER.ALLOW_RANDOM", "False", "MODEL.DISTILLER.METHODS", "('Mimic',)",
               "MODEL.MIMIC.LEVELS", "['p3', 'p4']"])  # fmt: skip
    export_main(["--config-file", address, "--weights", address, "--format", "torchscript",
                 "--output", str(tmp_path / "deployed")])  # fmt: skip
    names = (published / "classes.txt").read_text().split()
    assert [c["name"] for c in read_classes(tmp_path / "deployed")] == names


def test_what_cannot_be_published_leaves_nothing(run, published, tmp_path):
    def refused(message, *args):
        with pytest.raises(UserError, match=message):
            report_main(
                [str(run), "--output", str(tmp_path / "r.html"), "--pictures", "0", *map(str, args)]
            )

    folder = tmp_path / "out"
    refused("--publish FOLDER and --license NAME belong together", "--publish", folder)
    refused(
        "--license is 'my own': expected a short name", "--publish", folder, "--license", "my own"
    )
    refused(
        r"--publish .* exists and is not an empty folder",
        "--publish",
        published,
        "--license",
        "mit",
    )
    (run / "student" / "model_final.pth").rename(run / "away")
    try:
        refused("has left no student", "--publish", folder, "--license", "mit")
    finally:
        (run / "away").rename(run / "student" / "model_final.pth")
    assert not folder.exists()


@pytest.mark.parametrize("address, message", [
    ("hf://nowhere", "is neither a folder nor OWNER/NAME"),
    ("hf://a/b/c", "is neither a folder nor OWNER/NAME"),
    ("hf://../no/such/folder", "has '.' or '..' in its path"),
    ("hf://owner/absent", "cannot be downloaded"),
])  # fmt: skip
def test_addresses_that_lead_nowhere(address, message, monkeypatch, served):
    with pytest.raises(UserError, match=message):
        SafeCheckpointer(build_model(tiny_cfg("plain"))).load(address)
    with pytest.raises(UserError, match=message):
        load_config(address)


def test_a_damaged_file_is_told(published, tmp_path):
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(UserError, match=r"is no safetensors file that can be read"):
        SafeCheckpointer(build_model(tiny_cfg("plain"))).load(f"hf://{tmp_path}")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(
        UserError, match=r"holds no classes\.txt: expected a folder that tools/report\.py --publish"
    ):
        hub_file(f"hf://{tmp_path}", "classes.txt", what="--config-file")
