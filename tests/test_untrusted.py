"""Files of strangers: a config runs no code and fetches nothing, an address stays inside the cache."""

import http.server
import os
import pickle
import threading

import pytest
import torch
from builders import REPO, TINY, tiny_cfg, tiny_model
from detectron2.modeling import build_model

from era.addresses import check_address
from era.checkpoint.reading import SafeCheckpointer
from era.config import load_config
from era.deploy.model import load_folder
from era.deploy.source import load_source
from era.engine.launch import train_net
from era.errors import UserError
from era.runs.reading import read_run

PLAIN = str(REPO / "configs" / "toy" / "plain.yaml")


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def server(tmp_path):
    """A local HTTP server that hands out tmp_path/served: its address and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def translate_path(self, path):  # whatever the path, as a stranger's server would
            return str(tmp_path / "served" / os.path.basename(path))

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of downloads, two folders below a folder that must stay as it is."""
    folder = tmp_path / "home" / "nested" / "cache"
    folder.mkdir(parents=True)
    monkeypatch.setenv("FVCORE_CACHE", str(folder))
    return folder


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- a config runs no code ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["training", "evaluation"])
@pytest.mark.parametrize("where", ["file", "overrides"])
def test_proposals_of_a_config_are_not_unpickled(tmp_path, flags, where):
    proposals = tmp_path / "proposals.pkl"
    proposals.write_bytes(pickle.dumps(Bomb(tmp_path / "trap")))
    opts = ["MODEL.LOAD_PROPOSALS", "True"]
    for split in ("TRAIN", "TEST"):
        opts += [f"DATASETS.PROPOSAL_FILES_{split}", f"('{proposals}',)"]
        opts += [f"DATASETS.{split}", "('era_toy_val',)"]
    config = PLAIN
    if where == "file":
        cfg = tiny_cfg("plain", *opts)
        config, opts = str(tmp_path / "config.yaml"), []
        (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(UserError, match=r"MODEL\.LOAD_PROPOSALS") as e:
        train_net(
            [*flags, "--config-file", config, *TINY, "OUTPUT_DIR", str(tmp_path / "run"), *opts]
        )
    assert "\n" not in str(e.value)
    assert not (tmp_path / "trap").exists() and not (tmp_path / "run").exists()


def test_a_teachers_config_that_loads_proposals_is_refused(tmp_path):
    (tmp_path / "teacher.yaml").write_text("MODEL: {LOAD_PROPOSALS: True}")
    cfg = tiny_cfg("era", "MODEL.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml"))
    with pytest.raises(UserError, match=r"MODEL\.TEACHER\.CONFIG_FILE .* MODEL\.LOAD_PROPOSALS"):
        build_model(cfg)


# ---- a config fetches nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    ["{url}/base.yaml", "{url}/../../escaped.yaml", "[plain.yaml, '{url}/base.yaml']", "middle.yaml",
     "detectron2://base.yaml", "catalog://base.yaml", "ftp://127.0.0.1/base.yaml"],
)  # fmt: skip
def test_a_remote_base_is_refused_before_a_request(base, server, cache, tmp_path, monkeypatch):
    url, asked = server
    (tmp_path / "served" / "base.yaml").write_text("SEED: 7")
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "plain.yaml").write_text("SEED: 1")
    (folder / "middle.yaml").write_text(f"_BASE_: '{url}/base.yaml'")
    base = base.format(url=url)
    (folder / "config.yaml").write_text(f"_BASE_: {base if base[0] == '[' else repr(base)}")
    monkeypatch.chdir(folder)
    for path in ("config.yaml", str(folder / "config.yaml")):
        with pytest.raises(UserError, match=r"_BASE_.*local file") as e:
            load_config(path)
        assert "\n" not in str(e.value)
    assert not asked
    assert files_below(tmp_path / "home") == []


def test_local_bases_still_work(tmp_path):
    """Relative to the file that names them, several, and one of them twice."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("SEED: 1")
    (tmp_path / "sub" / "a.yaml").write_text("_BASE_: ../root.yaml\nVIS_PERIOD: 2")
    (tmp_path / "sub" / "b.yaml").write_text(f"_BASE_: {tmp_path}/root.yaml\nVIS_PERIOD: 3")
    (tmp_path / "top.yaml").write_text("_BASE_: [sub/a.yaml, sub/b.yaml]")
    cfg = load_config(str(tmp_path / "top.yaml"))
    assert (cfg.SEED, cfg.VIS_PERIOD) == (1, 3)


@pytest.mark.parametrize("chain", [("config",), ("other", "config"), (7,)])
def test_a_base_that_leads_nowhere(chain, tmp_path):
    names = ["config", *chain]
    for name, base in zip(names, chain, strict=False):
        base = base if isinstance(base, int) else f"{base}.yaml"
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}")
    with pytest.raises(UserError, match="_BASE_") as e:
        load_config(str(tmp_path / "config.yaml"))
    assert "\n" not in str(e.value)


def test_an_address_is_no_config_and_no_output_folder(server):
    url, asked = server
    with pytest.raises(UserError, match="neither a file"):
        load_config(f"{url}/config.yaml")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        load_config(PLAIN, ["OUTPUT_DIR", f"{url}/../.."])
    assert not asked


# ---- weights' addresses ------------------------------------------------------------------------------

ESCAPES = [
    "{url}/../../escaped.pth",
    "{url}/..",
    "{url}/a/../../escaped.pth?matching_heuristics=True",
    "{url}/escaped.pth#/..",
    " {url}/../../escaped.pth",
    "{upper}/../../escaped.pth",
    "{url}/%2e%2e/%2E./escaped.pth",
    "{url}/..\\..\\escaped.pth",
    "detectron2://../../../escaped.pth",
    "ftp://127.0.0.1:1/../../escaped.pth",
]


@pytest.mark.parametrize("address", ESCAPES)
def test_an_address_cannot_leave_the_cache(address, server, cache, tmp_path):
    url, asked = server
    torch.save({"model": {}}, tmp_path / "served" / "escaped.pth")
    address = address.format(url=url, upper=url.replace("http", "HTTP"))
    with pytest.raises(UserError, match="outside the cache") as e:
        SafeCheckpointer(tiny_model("plain"), save_to_disk=False).load(address)
    assert "\n" not in str(e.value)
    assert not asked
    assert files_below(tmp_path / "home") == []


def test_a_teachers_address_cannot_leave_the_cache(server, cache, tmp_path):
    url, asked = server
    with pytest.raises(UserError, match="outside the cache"):
        build_model(tiny_cfg("era", "MODEL.TEACHER.WEIGHTS", f"{url}/../../x.pth"))
    assert not asked and files_below(tmp_path / "home") == []


def test_an_honest_address_is_fetched_into_the_cache(server, cache, tmp_path):
    url, asked = server
    source, target = tiny_model("plain", seed=1), tiny_model("plain", seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "served" / "w.pth")
    SafeCheckpointer(target, save_to_disk=False).load(f"{url}/models/w.pth")
    assert asked == ["/models/w.pth"]
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    stored = [name for name in files_below(tmp_path / "home") if not name.endswith(".lock")]
    port = url.rpartition(":")[2]
    assert stored == [f"nested/cache/era_downloads/http_127.0.0.1_{port}/models/w.pth"]


@pytest.mark.parametrize(
    "address",
    ["detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
     "catalog://ImageNetPretrained/MSRA/R-50", "https://host/a..b/w.pth?x=1", "w.pth", "../w.pth",
     "/a/../w.pth", ""],
)  # fmt: skip
def test_addresses_and_paths_that_are_fine(address):
    check_address(address, what="weights")


def test_an_unknown_scheme_is_told():
    with pytest.raises(UserError, match=r"begins with s3://.*https://"):
        check_address("s3://bucket/w.pth", what="MODEL.WEIGHTS")


# ---- received folders --------------------------------------------------------------------------------


@pytest.fixture
def received(server, tmp_path):
    """A run's folder whose config names addresses for everything."""
    url, _ = server
    cfg = tiny_cfg("era")
    cfg.MODEL.WEIGHTS = f"{url}/../../student.pth"
    cfg.MODEL.TEACHER.WEIGHTS = f"{url}/teacher.pth"
    folder = tmp_path / "received"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    (folder / "inference").mkdir()
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    torch.save({"model": tiny_model("era").state_dict()}, folder / "model_final.pth")
    return folder


def test_report_and_export_download_nothing(received, server, cache, tmp_path):
    url, asked = server
    read_run(received, "received")
    load_source(run=str(received), alpha=0)  # the student alone
    with pytest.raises(UserError, match=r"MODEL\.TEACHER\.WEIGHTS .*nothing is downloaded"):
        load_source(run=str(received), alpha=1)
    assert not asked and files_below(tmp_path / "home") == []
    with pytest.raises(UserError, match="cannot be downloaded"):  # the user's own word: it is tried
        load_source(
            run=str(received), alpha=1, opts=["MODEL.TEACHER.WEIGHTS", f"{url}/teacher.pth"]
        )
    assert asked == ["/teacher.pth"]


def test_a_manifest_downloads_nothing(received, server):
    """Neither by the config that it names nor by the overrides that it recorded."""
    url, asked = server
    files = {
        "config_file": str(received / "config.yaml"),
        "weights": str(received / "model_final.pth"),
    }
    for recorded in ([], ["MODEL.TEACHER.WEIGHTS", f"{url}/other.pth"]):
        with pytest.raises(UserError, match="nothing is downloaded"):
            load_source(**files, recorded_opts=recorded, alpha=1)
    assert not asked


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_deployment_folder_downloads_nothing(alpha, received, server):
    _, asked = server
    (received / "teacher.yaml").write_text(
        load_config(str(REPO / "configs/toy/teacher.yaml")).dump()
    )
    with pytest.raises(UserError):  # its model.pth is missing, or the teacher has no weights
        load_folder(received, {"alpha": alpha})
    assert not asked
