"""What is noted beside numbers: versions, machine, commit."""

import re
import sys

import torch

import era
from era import environment


def test_versions_name_what_numbers_depend_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "no_such_distribution", None)
    found = environment.versions("pillow", "no_such_distribution")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["era"] == era.__version__
    assert found["torch"] == torch.__version__.split("+")[0]
    assert re.match(r"\d+\.", found["detectron2"]) and re.match(r"\d+\.", found["pillow"])
    assert found["no_such_distribution"] == "unknown"


def test_machine_is_plain_values():
    found = environment.machine()
    assert found["cpu"] and found["cpu_cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert all(type(v) in (str, int, float, type(None)) for v in found.values())


def test_commit_is_a_hash_or_unknown(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,}(, with changes)?|unknown", environment.commit())
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == "unknown"
