"""The methods as a table for people, and the page that describes them."""

import re

from builders import REPO, TOY, run_tool

from era.methods import Needs
from era.methods.listing import methods_table, needs_in_words
from era.registry import METHOD_REGISTRY

NAMES = {name for name, _ in METHOD_REGISTRY}


def test_every_method_is_listed_with_idea_and_paper():
    table = methods_table()
    for name, method in METHOD_REGISTRY:
        assert re.search(rf"│ {name} +│", table), name
        assert method.idea and method.paper and method.__doc__, name


def test_needs_in_words():
    assert needs_in_words(Needs()) == "teacher, labels"
    assert needs_in_words(Needs(teacher=False, labels=False)) == "nothing"
    more = Needs(labels=False, more=("a view",), teacher_at_inference=True)
    assert needs_in_words(more) == "teacher, a view, teacher at inference"


def test_the_command_prints_the_table_and_ends():
    done = run_tool("train_net.py", "--list-methods")
    assert done.returncode == 0 and methods_table() in done.stdout


def test_every_method_has_a_row_and_a_config():
    """In docs/methods.md, and below configs/toy."""
    rows = set(re.findall(r"^\| `(\w+)`", (REPO / "docs" / "methods.md").read_text(), re.MULTILINE))
    assert rows == NAMES
    for name in NAMES - {"ERA"}:
        assert (TOY / "methods" / f"{name.lower()}.yaml").is_file(), name
