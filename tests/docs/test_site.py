"""The docs site: everything public is in the reference, what is dead fails the build, nothing comes from the network."""

from __future__ import annotations

import ast
import html
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from builders import REPO

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from mkdocstrings import Inventory

SOURCES = REPO / "projects" / "ERA"
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=\"?([^\"\s>]+)|<link\b[^>]*?\shref=\"?([^\"\s>]+)")  # fmt: skip
HREF = re.compile(r"<a\b[^>]*?\shref=\"?([^\"\s>]+)")
IDENT = re.compile(r"\sid=\"?([^\"\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, str]:
    """The text of every page."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}


def defined_names() -> Iterator[str]:
    """Modules, and the classes, functions and methods that they define, read from the sources."""
    for path in SOURCES.rglob("*.py"):
        parts = list(path.relative_to(SOURCES).with_suffix("").parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        yield ".".join(parts)
        yield from _defined(ast.parse(path.read_text(encoding="utf-8")), ".".join(parts))


def _defined(node: ast.AST, inside: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{inside}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _defined(child, f"{inside}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _defined(child, inside)


def test_everything_public_is_in_the_reference(site):
    with (site / "objects.inv").open("rb") as file:
        listed = Inventory.parse_sphinx(file, domain_filter=["py"])
    defined = set(defined_names())
    private = {n for n in defined if re.search(r"\._(?!_call__$)", n)}
    public = defined - private
    assert len(public) > 1000 and len(private) > 100  # the sources were read
    assert sorted(public - set(listed)) == []
    assert sorted(private & set(listed)) == []
    for name in ("era.losses.mse", "era.methods.kd.KD.losses", "era_runtime.predictor.load"):
        page, _, anchor = listed[name].uri.partition("#")
        assert f'id="{anchor.replace("$", name)}"' in (site / page).read_text(encoding="utf-8")


def test_roles_of_docstrings_are_links(pages):
    raw = re.compile(r":(?:attr|class|data|func|meth|mod):")
    found = {p.name: m[0] for p, text in pages.items() if (m := raw.search(_prose(text)))}
    assert found == {}
    text = next(
        t for p, t in pages.items() if p.as_posix().endswith("reference/era/runs/plan.html")
    )
    assert re.search(
        r'href="?schema.html#era.runs.schema.read_plan"?[^>]*><code>read_plan</code>', text
    )


def _prose(text: str) -> str:
    """A page without code, where a role may be shown as it is written."""
    return re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.S)


def test_every_link_leads_somewhere(site, pages):
    """Looked at in the pages that were written, by other means than the build's own."""
    anchors = {path: set(IDENT.findall(text)) for path, text in pages.items()}
    dead = set()
    for path, text in pages.items():
        if path.name == "404.html":  # served for every missing address: its links are absolute
            continue
        for link in set(HREF.findall(text)):
            url = urlsplit(html.unescape(link))
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (
                url.fragment and unquote(url.fragment) not in anchors.get(target, ())
            ):
                dead.add((path.name, link))
    assert sorted(dead) == []


def test_nothing_is_fetched_from_the_network(site, pages):
    foreign = {
        (path.name, address)
        for path, text in pages.items()
        for match in LOADED.findall(text)
        for address in match
        if urlsplit(address).netloc
    }
    assert foreign == set()
    styles = [
        p for p in site.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", p.read_text())
    ]
    assert styles == []


def test_home_is_the_readme(pages):
    home = next(text for path, text in pages.items() if path.name == "index.html")
    title = (REPO / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert title in home and 'href="results.html"' in home and 'src="demo.png"' in home


# ---- what is dead fails the build ----------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the site is made of, but for the packages, which hold a function each."""
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(REPO / name, tmp_path / name)
    for name in ("docs", "tools/docs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("*.json"))
    (tmp_path / "datasets").mkdir()
    shutil.copy(REPO / "datasets" / "README.md", tmp_path / "datasets" / "README.md")
    for name in ("era", "era_runtime"):
        package = tmp_path / "projects" / "ERA" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "projects" / "ERA" / "era" / "one.py").write_text(
        '"""A module."""\n\nFIRST, SECOND = 1, 2\n\n\ndef one():\n    """See :data:`SECOND`."""\n'
    )
    return tmp_path


FAULTS = {
    # what is spoilt: (file, what is added to it, what the build says)
    "link of README": ("README.md", "[here](docs/gone.md)", "contains a link 'docs/gone.md', but the target is not found"),
    "anchor of README": ("README.md", "[here](docs/era.md#gone)", "'era.md' does not contain an anchor '#gone'"),
    "link of a page": ("docs/era.md", "[here](../tools/gone.py)", "contains a link '../tools/gone.py', but the target is not found"),
    "picture": ("docs/era.md", "![a picture](gone.png)", "contains a link 'gone.png', but the target is not found"),
    "page that nothing names": ("docs/lost.md", "# Lost", 'not included in the "nav" configuration'),
    "role": ("projects/ERA/era/one.py", '\ndef two():\n    """See :func:`gone`."""', "era.one.two: :func:`gone` stands for nothing there"),
    "role with a path": ("projects/ERA/era/one.py", '\ndef two():\n    """See :func:`~era.one.gone`."""', "era.one.two: :func:`~era.one.gone` stands for nothing there"),
    "argument list": ("docs/era.md", "[here][era.gone]", "Could not find cross-reference target 'era.gone'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_what_is_dead_fails_the_build(fault, copy, caplog):
    """And without a fault the copy is built."""
    file, added, said = FAULTS[fault] if fault else ("README.md", "", "")
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{added}\n")
    with caplog.at_level(logging.WARNING, logger="mkdocs"):
        config = load_config(str(copy / "mkdocs.yml"), site_dir=str(copy / "site"))
        if not fault:
            build(config)
            text = (copy / "site" / "reference" / "era" / "one.html").read_text()
            assert re.search(r'href="?#era.one.SECOND"?[^>]*><code>SECOND</code>', text)
            return
        with pytest.raises(Abort, match=r"Aborted with \d+ warnings? in strict mode"):
            build(config)
    assert said in caplog.text


# ---- the pages themselves ------------------------------------------------------------------------


def test_the_readme_is_two_screens():
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100


def test_pages_have_no_syntax_that_looks_broken_in_the_repository():
    """Admonitions, tabs, attributes, snippets and references of MkDocs' extensions."""
    syntax = re.compile(
        r"^(!!!|\?\?\?\+?|===) |^:::|\{:? *[.#][\w-]+|--8<--|\]\[[\w.]*\]", re.MULTILINE
    )
    for path in [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")]:
        text = re.sub(
            r"```.*?```|`[^`\n]*`|^    .*$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M
        )
        assert not (found := syntax.search(text)), (path.name, found[0])
        code = re.findall(r"`[^`\n]*`", path.read_text(encoding="utf-8"))
        assert not [c for c in code if r"\|" in c], path.name  # the site shows the backslash


def test_every_key_of_the_frame_and_of_era_is_explained():
    """In docs/config.md, with their defaults; keys of other methods, backbones and families stand beside them."""
    from detectron2.config import get_cfg

    from era import get_era_cfg

    page = (REPO / "docs" / "config.md").read_text(encoding="utf-8")
    explained: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE):
        for name, default in re.findall(r"`([\w.]+)`(?: \[([^]]*)\])?", row):
            if name.startswith("."):  # of the key before it
                name = next(reversed(explained)).rpartition(".")[0] + name
            explained[name] = default
    ours = dict(_keys(get_era_cfg()))
    parts = ("MODEL.DISTILLER.", "MODEL.TEACHER.", "MODEL.ERA.", "MODEL.EMA.", "MODEL.LAZY.")
    added = {k for k in ours if k.startswith(parts) or not k.startswith("MODEL.")}
    added -= dict(_keys(get_cfg())).keys()
    assert len(added) > 60
    assert sorted(added - explained.keys()) == []
    assert sorted(explained.keys() - ours.keys()) == []
    for name, default in explained.items():
        if default in ("True", "False"):
            assert str(ours[name]) == default, name
        elif re.fullmatch(r"[\d.e, ]+", default):
            values = ours[name] if isinstance(ours[name], list) else [ours[name]]
            assert values == [float(part) for part in default.split(",")], name


def _keys(cfg, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in cfg.items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_set_up_installs_what_the_site_needs():
    assert "docs" in re.search(r"-e '\.\[([^]]+)\]'", (REPO / "Makefile").read_text())[1].split(",")
    pinned = re.findall(r"^([\w-]+)==", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert {"mkdocs-material", "mkdocstrings", "mkdocstrings-python", "griffelib"} <= set(pinned)
    assert importlib.util.find_spec("mkdocs") is not None
