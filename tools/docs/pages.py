"""What the docs site has beside the pages of ``docs/``: a hook of MkDocs, named in ``mkdocs.yml``.

Files of the repository become pages (:data:`PAGES`; README is the home page), every public module of the packages gets a page of
the reference, and links that lead out of ``docs/`` are rewritten: to such a page, or to a copy of the file. Every page is
therefore written once, with links that work where the repository is browsed.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[2]
SOURCES = REPO / "projects" / "ERA"
PACKAGES = ("era", "era_runtime")
PAGES = {  # files of the repository outside of docs/ that are pages: where they stand in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "datasets/README.md": "datasets.md",
}
COPIES = "files"  # the site's folder for copies of other files of the repository that pages link to
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_config(config: MkDocsConfig) -> None:
    """Put the reference below the last entry of the navigation."""
    config.nav.append({"Reference": [*map(_entry, map(_tree, PACKAGES))]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that lie outside of ``docs/``, and those of the reference."""
    for source, place in PAGES.items():
        text = (REPO / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    for module in public_modules():
        files.append(File.generated(config, place_of(module), content=f"::: {module}\n"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make relative links lead to the same place from where the page stands in the site."""
    place = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == place), f"docs/{place}")

    def rewritten(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        found = _in_site(target, files, config)
        if found is None:  # MkDocs says that it is dead
            return link[0]
        return posixpath.relpath(found, posixpath.dirname(place) or ".") + (link["anchor"] or "")

    return LINK.sub(rewritten, markdown)


def public_modules() -> Iterator[str]:
    """Dotted names of all modules no part of whose name begins with ``_``, packages before their modules."""
    for package in PACKAGES:
        for path in sorted(
            (SOURCES / package).rglob("*.py"), key=lambda p: p.with_suffix("").parts
        ):
            parts = path.relative_to(SOURCES).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                yield ".".join(parts)


def place_of(module: str) -> str:
    """The page of a module in the site."""
    path = module.replace(".", "/")
    return f"reference/{path}/index.md" if (SOURCES / path).is_dir() else f"reference/{path}.md"


def _in_site(target: str, files: Files, config: MkDocsConfig) -> str | None:
    """Where a file of the repository stands in the site, copied there if need be; None = nowhere."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        place = target.removeprefix("docs/")
        return place if files.get_file_from_path(place) else None
    if target.startswith("..") or not (REPO / target).is_file():
        return None
    place = f"{COPIES}/{target}"
    if files.get_file_from_path(place) is None:
        copy = File.generated(config, place, abs_src_path=os.fspath(REPO / target))
        files.append(copy)
    return place


def _tree(package: str) -> dict:
    """Modules by name, each with those below it."""
    tree: dict = {}
    for module in public_modules():
        if module.split(".")[0] == package:
            below = tree
            for end in range(1, module.count(".") + 2):
                below = below.setdefault(".".join(module.split(".")[:end]), {})
    return tree


def _entry(tree: dict) -> dict:
    """A package's part of the navigation: its own page first, then what lies below it."""
    ((module, below),) = tree.items()
    label = module.rpartition(".")[2]
    if not below:
        return {label: place_of(module)}
    return {label: [place_of(module), *(_entry({m: b}) for m, b in below.items())]}
