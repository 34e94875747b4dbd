"""``equipoise show``: a method's or task's page in the terminal, made from its docstrings, its space and its evidence."""

from __future__ import annotations

import inspect
import json
from typing import Any

from equipoise.catalogue import Entry


def show_method(entry: Entry, as_json: bool) -> None:
    """Print a method: its page, its settings with defaults and what is tuned, and the evidence for its paper's claims."""
    from equipoise.comparison.claims import claim_slug_of, evidence

    cls = entry.load()
    settings = [
        {
            "name": name,
            "default": None if parameter.default is inspect.Parameter.empty else parameter.default,
            "tuned over": str(cls.space[name]) if name in cls.space else "",
        }
        for name, parameter in inspect.signature(cls).parameters.items()
    ]
    found = evidence(claim_slug_of(entry.module))
    if as_json:
        fields: dict[str, Any] = {
            "slug": entry.slug,
            "family": entry.family,
            "class": f"{entry.module}.{entry.cls}",
            "paper": list(entry.paper),
        }
        fields |= {"summary": entry.summary, "page": entry.page, "settings": settings, "evidence": found}
        print(json.dumps(fields, indent=2, default=str))
        return
    console = _console()
    console.print(f"[bold]{entry.slug}[/bold]: {entry.summary}")
    console.print(f"from {entry.module} import {entry.cls}\n", style="dim", highlight=False)
    _markdown(console, entry.page)
    _table(console, "Settings", settings)
    rows = [
        {
            "claim": document["claim"],
            "verdict": document["verdict"],
            "measured": "{effect:+.3g} [{low:+.3g}, {high:+.3g}] {unit}".format(**document["measured"]),
            "remarks": document["remarks"],
        }
        for document in found
    ]
    _table(console, "Evidence", rows)


def show_task(entry: Entry, as_json: bool) -> None:
    """Print a task: its page, its settings, its baseline and the methods that enter by default."""
    from dataclasses import MISSING, fields

    cls = entry.load()
    settings = [
        {"setting": f.name.replace("_", "-"), "default": None if f.default is MISSING else f.default}
        for f in fields(cls)
    ]
    task = cls()
    space = {name: str(dimension) for name, dimension in task.space().items()}
    if as_json:
        document = {
            "slug": entry.slug,
            "summary": entry.summary,
            "page": entry.doc,
            "settings": settings,
            "space": space,
        }
        print(
            json.dumps(
                document | {"metric": task.metric, "baseline": task.baseline, "methods": task.methods},
                indent=2,
                default=str,
            )
        )
        return
    console = _console()
    console.print(f"[bold]{entry.slug}[/bold]\n")
    _markdown(console, entry.page + "\n\n" + "\n".join(f"    {line}" for line in entry.doc.split("\n")[2:]))
    _table(console, "Settings", settings)
    _table(console, "Tuned for every arm", [{"setting": k, "range": v} for k, v in space.items()])
    console.print(f"\nMetric: {task.metric}. Baseline: {task.baseline}. Enter by default: {', '.join(task.methods)}.")


def _console() -> Any:
    from rich.console import Console

    return Console()


def _markdown(console: Any, text: str) -> None:
    from rich.markdown import Markdown

    console.print(Markdown(text))


def _table(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print()
    console.print(table)
