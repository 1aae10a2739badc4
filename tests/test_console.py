"""The console command: every tool under its name, as the script has it."""

import configparser
import sys
from importlib import import_module

import pytest
from builders import REPO

from era import __main__ as console
from era.engine.stopping import how_to_go_on


@pytest.fixture(autouse=True)
def _arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def _run(*arguments):
    with pytest.raises(SystemExit) as left:
        console.main(list(arguments))
    return left.value.code


def test_help_teaches_every_command(capsys):
    assert _run("--help") == 0
    said = capsys.readouterr().out
    for name, (*_, script) in console.COMMANDS.items():
        assert f"\n  {name} " in said and (REPO / "tools" / script).is_file()
    assert list(console.COMMANDS) == [
        "distil",
        "train",
        "export",
        "evaluate",
        "predict",
        "report",
        "study",
        "doctor",
    ]
    assert "era distil  --data my.json photos/" in said
    assert _run() == 2  # without a command, the same is a mistake


@pytest.mark.parametrize("name", console.COMMANDS)
def test_a_command_is_the_script_of_the_same_name(name, capsys):
    """Its ``--help`` names it, and the script calls the same function."""
    assert _run(name, "--help") == 0
    assert f"usage: era {name} " in capsys.readouterr().out
    module, function, _, script = console.COMMANDS[name]
    text = (REPO / "tools" / script).read_text()
    assert f"from {module} import" in text and function in text
    assert callable(getattr(import_module(module), function))


def test_an_unknown_command_is_one_sentence(capsys):
    assert _run("destil") == 2
    assert (
        "error: there is no command 'destil': expected one of distil, train"
        in capsys.readouterr().err
    )


def test_a_users_mistake_is_one_sentence(capsys):
    assert _run("train", "--config-file", "nowhere.yaml") == 2
    assert capsys.readouterr().err.startswith("error: --config-file is 'nowhere.yaml'")


def test_a_study_outside_of_a_checkout_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    monkeypatch.chdir(tmp_path)
    assert _run("study", "full") == 2
    assert "era study trains the plans and configs of the repository" in capsys.readouterr().err
    monkeypatch.chdir(REPO)
    assert console.repository() == REPO


def test_a_stopped_command_says_how_it_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["era train", "--config-file", "a b.yaml"])
    assert how_to_go_on().endswith(
        f"{sys.executable} -m era train --resume --config-file 'a b.yaml'"
    )


def test_the_package_installs_it():
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].split("\n")
    assert "era = era.__main__:main" in scripts
    assert "recipe.yaml" in setup["options.package_data"]["era.distil"]
