"""The catalogue: which methods and tasks there are. Reads sources instead of importing them, so that listing needs no torch.

A method is a class with a literal ``name = "slug"`` in a module of a family's folder; a task is one in a module called
``task`` or ``task_*``; files called ``claims*`` are not read. Nothing else registers them. Packages of others register by
entry point, in the groups ``equipoise.methods`` and ``equipoise.tasks`` (``slug = "package.module:Class"``); these are imported
when they are listed.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from equipoise.errors import ArgumentError, EquipoiseError, suggestion

ROOT = Path(__file__).parent
NOT_FAMILIES = {"training", "comparison", "data", "models", "testing", "cli", "integrations"}


@dataclass(frozen=True)
class Entry:
    """A method or task: where it is, and what its source says of it."""

    slug: str
    kind: str
    family: str
    module: str
    cls: str
    summary: str
    doc: str = field(repr=False)
    page: str = field(repr=False)
    paper: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import the class."""
        return getattr(import_module(self.module), self.cls)


def methods() -> dict[str, Entry]:
    """All methods by slug, ours and those of installed packages."""
    return {e.slug: e for e in _entries() if e.kind == "method"}


def tasks() -> dict[str, Entry]:
    """All tasks by slug, ours and those of installed packages."""
    return {e.slug: e for e in _entries() if e.kind == "task"}


def find(kind: str, slug: str) -> Entry:
    """One method or task by its slug (hyphen or underscore). Raises ``ArgumentError`` with a suggestion."""
    known = methods() if kind == "method" else tasks()
    key = slug.strip().lower().replace("_", "-")
    if key not in known:
        hint = suggestion(key, list(known)) or f"Run `equipoise {kind}s` to see them"
        raise ArgumentError(f"{kind} = {slug!r}: there is no such {kind}. {hint}")
    return known[key]


def families() -> list[str]:
    """Names of the families: the folders that hold methods."""
    return sorted(p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name not in NOT_FAMILIES)


@lru_cache(maxsize=1)
def _entries() -> tuple[Entry, ...]:
    found: dict[tuple[str, str], Entry] = {}
    for family in families():
        for path in sorted((ROOT / family).glob("*.py")):
            if path.stem.startswith("claims"):
                continue
            for entry in _scan(path, family):
                found[entry.kind, entry.slug] = entry
    for kind in ("method", "task"):
        for point in entry_points(group=f"equipoise.{kind}s"):
            entry = _plugin(point, kind)
            if (kind, entry.slug) in found:
                raise EquipoiseError(
                    f"{kind} {entry.slug!r} is registered by {point.value} and by {found[kind, entry.slug].module}: "
                    "rename one, or uninstall its package"
                )
            found[kind, entry.slug] = entry
    return tuple(found.values())


def _scan(path: Path, family: str) -> list[Entry]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    kind = "task" if path.stem == "task" or path.stem.startswith("task_") else "method"
    page = ast.get_docstring(tree) or ""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        values: dict[str, ast.expr] = {}
        for statement in node.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                values[statement.targets[0].id] = statement.value
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
                values[statement.target.id] = statement.value
        slug = values.get("name")
        if not (isinstance(slug, ast.Constant) and isinstance(slug.value, str) and slug.value):
            continue
        doc = ast.get_docstring(node) or ""
        paper: tuple[str, ...] = ()
        call = values.get("paper")
        if isinstance(call, ast.Name):  # one paper of several classes
            call = constants.get(call.id)
        if isinstance(call, ast.Call):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            paper = tuple(a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str))
        module = f"equipoise.{family}.{path.stem}"
        found.append(Entry(slug.value, kind, family, module, node.name, _first_line(doc), doc, page, paper))
    return found


def _plugin(point: EntryPoint, kind: str) -> Entry:
    try:
        cls = point.load()
    except Exception as error:  # another package's code may raise anything
        raise EquipoiseError(
            f"{kind} {point.name!r} of {point.value} cannot be imported ({type(error).__name__}: {error}): "
            "repair or uninstall its package"
        ) from error
    doc = inspect.getdoc(cls) or ""
    page = inspect.getdoc(inspect.getmodule(cls)) or ""
    paper = getattr(cls, "paper", None)
    source = (paper.title, paper.authors, paper.venue, paper.url) if paper is not None else ()
    slug = getattr(cls, "name", "") or point.name
    return Entry(
        slug, kind, point.value.split(".")[0], cls.__module__, cls.__name__, _first_line(doc), doc, page, source
    )


def _first_line(doc: str) -> str:
    return doc.split("\n\n")[0].replace("\n", " ").strip()
