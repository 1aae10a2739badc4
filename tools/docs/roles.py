"""Cross references of docstrings, written as Sphinx roles, for mkdocstrings: an extension of Griffe.

``:func:`name``` becomes a link to what ``name`` stands for where the docstring is: a member of its class, of a base, or of its module,
imported or not, or a dotted path; ``:func:`~a.b.c``` shows ``c`` alone. What is private or belongs to another library has no
place in the site and is shown as code. A name that stands for nothing is a warning, which fails a strict build.
"""

from __future__ import annotations

import ast
import builtins
import re

import griffe
from mkdocs.plugins import get_plugin_logger

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
LITERAL = re.compile(
    r"(?<=\S)::$", re.MULTILINE
)  # of reStructuredText; the indented lines below are code in Markdown too

logger = get_plugin_logger("roles")


class SphinxRoles(griffe.Extension):
    """Rewrites the docstrings of a package, private ones too, as soon as it is loaded whole."""

    def on_node(
        self, *, node: ast.AST | griffe.ObjectNode, agent: griffe.Visitor, **kwargs: object
    ) -> None:
        """Called by Griffe, which leaves names out that are assigned together: ``a, b = 1, 2``."""
        if not isinstance(node, ast.Assign):
            return
        together = [target for target in node.targets if isinstance(target, ast.Tuple)]
        node.targets = [target for target in node.targets if target not in together]
        for names in together:
            values = node.value.elts if isinstance(node.value, ast.Tuple) else []
            if len(values) != len(names.elts):
                values = [ast.Constant(...)] * len(names.elts)
            for name, value in zip(names.elts, values, strict=True):
                single = ast.copy_location(ast.Assign([name], value), node)
                single.parent = node.parent
                agent.visit(single)

    def on_package(
        self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object
    ) -> None:
        """Called by Griffe."""
        _rewrite(pkg, loader.modules_collection)


def _rewrite(owner: griffe.Object, modules: griffe.ModulesCollection) -> None:
    """All docstrings of an object and of what it holds."""
    if owner.docstring is not None:
        text = LITERAL.sub(":", owner.docstring.value)
        owner.docstring.value = ROLE.sub(lambda role: _reference(role, owner, modules), text)
    for member in owner.members.values():
        if not member.is_alias:
            _rewrite(member, modules)


def _reference(role: re.Match, owner: griffe.Object, modules: griffe.ModulesCollection) -> str:
    """What stands for a role in Markdown."""
    shown = role["name"].rpartition(".")[2] if role["short"] else role["name"]
    path = find(role["name"], owner, modules)
    if path is None:
        logger.warning(f"{owner.path}: {role[0]} stands for nothing there")
    if path is None or not _in_reference(path, modules):
        return f"`{shown}`"
    return f"[`{shown}`][{path}]"


def find(name: str, owner: griffe.Object, modules: griffe.ModulesCollection) -> str | None:
    """The path of what a name stands for in the scope of an object; None = nothing."""
    first, *rest = name.split(".")
    if first in modules.members:
        found = first
    else:
        found = _member(owner, first, modules)
        if found is None and owner.parent is not None:
            return find(name, owner.parent, modules)
        if found is None and not rest and hasattr(builtins, first):
            return f"builtins.{first}"
    for part in rest:
        if found is None or found.split(".")[0] not in modules.members:
            return found if found is None else name  # of another library: its members are not known
        found = _member(modules[found], part, modules)
    return found


def _member(owner: griffe.Object, name: str, modules: griffe.ModulesCollection) -> str | None:
    """The path of an object's member, of a class also those of its bases; None = it has none of that name."""
    if name in owner.members:
        return _path(owner.members[name], modules)
    if owner.is_class:
        for base in owner.bases:
            path = find(str(base).partition("[")[0], owner.parent, modules)
            if path is not None and path.split(".")[0] in modules.members:
                inherited = _member(modules[path], name, modules)
                if inherited is not None:
                    return inherited
            elif path is not None:
                return f"{path}.{name}"  # of another library: what it has is not known
    return None


def _path(member: griffe.Object | griffe.Alias, modules: griffe.ModulesCollection) -> str:
    """Where a member is defined: through imports, as far as the loaded packages know."""
    while member.is_alias:
        package = member.target_path.split(".")[0]
        if package not in modules.members:
            return member.target_path
        member = modules[member.target_path]
    return member.path


def _in_reference(path: str, modules: griffe.ModulesCollection) -> bool:
    """Whether an object has a place in the site."""
    package, *names = path.split(".")
    return package in modules.members and not any(name.startswith("_") for name in names)
