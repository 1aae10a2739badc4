"""The house: no part of the package imports one that is built upon it, nor in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import era

PACKAGE = Path(era.__file__).parent
# Parts from the ground up: each may import those above it in this list, and none below.
ORDER = (
    "errors", "compat", "devices", "environment", "addresses", "registry", "losses", "config", "checkpoint", "modeling", "methods",
    "data", "engine", "runs", "deploy", "convert", "report", "benchmark", "doctor", "study", "distil", "demo",
    "__main__",
)  # fmt: skip


def part_of(path: Path) -> str:
    """The folder or file directly below ``era`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts that a file imports, also inside its functions; what only type checkers see left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "era":
            names = [f"era.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("era.")}
    return found


def violations(files: dict[Path, set[str]]) -> list[str]:
    """Imports against :data:`ORDER`, as sentences."""
    wrong = []
    for path, parts in sorted(files.items()):
        part = part_of(path)
        for other in sorted(parts - {part}):
            known = part in ORDER and other in ORDER
            if not known or ORDER.index(other) > ORDER.index(part):
                wrong.append(f"{path.relative_to(PACKAGE)} imports era.{other}")
    return wrong


def test_no_part_imports_what_is_built_upon_it():
    files = {
        path: imported(path)
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE or path.name != "__init__.py"
    }
    assert violations(files) == []


def test_an_import_inside_a_function_counts(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from era.demo.cli import main\n"
        "def f():\n    from era import report\n    import era.engine.trainer\n"
    )
    assert imported(file) == {"report", "engine"}
    found = violations({PACKAGE / "runs" / "plan.py": {"engine", "study", "runs"}})
    assert found == ["runs/plan.py imports era.study"]


def test_the_methods_name_stands_in_its_own_room_alone():
    """No name and no key of ERA outside methods/era: everything else knows it through the registry."""
    words = (
        "MODEL.ERA",
        "cfg.MODEL.ERA",
        '"ERA"',
        'methods["era"]',
        "MBRNet",
        "loss_era",
        "methods.era",
    )
    wrong = [
        f"{path.relative_to(PACKAGE)}: {word}"
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in (".py", ".html", ".js", ".css")
        and (PACKAGE / "methods" / "era") not in path.parents
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert not wrong, wrong
