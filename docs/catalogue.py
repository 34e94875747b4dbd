"""Builds the catalogue from the code: one page for each module of methods, made of its docstring, spaces and evidence."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from equipoise import catalogue
from equipoise.comparison.claims import evidence

sys.path.insert(0, str(Path(__file__).parent))
from parameters import as_list  # beside this file, which no package holds
from pictures import picture


def on_files(files: Any, config: Any) -> Any:
    """Add ``catalogue.md`` and ``methods/<module>.md`` to the site."""
    modules: dict[str, list[catalogue.Entry]] = {}
    for entry in catalogue.methods().values():
        if entry.module.startswith("equipoise."):
            modules.setdefault(entry.module, []).append(entry)
    pages = {"catalogue.md": overview(modules)}
    for module, entries in modules.items():
        pages[f"methods/{page_name(module)}.md"] = page(module, entries)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def page_name(module: str) -> str:
    """Name of a module's page: the paper's, and for baselines, which every family has, with the family before it."""
    _, family, name = module.split(".")
    return f"{family}-{name}" if "baselines" in name else name


def overview(modules: dict[str, list[catalogue.Entry]]) -> str:
    """The table of all methods and tasks."""
    lines = ["# Catalogue", "", "Every method in the library, with the verdicts of its paper's claims.", ""]
    lines += ["| method | problem | what it is | claims |", "|---|---|---|---|"]
    for module, entries in modules.items():
        name = module.rsplit(".", 1)[-1]
        verdicts = ", ".join(document["verdict"] for document in evidence(name)) or "none"
        for entry in entries:
            link = f"[{entry.slug}](methods/{page_name(module)}.md)"
            lines.append(f"| {link} | {entry.family.replace('_', ' ')} | {entry.summary} | {verdicts} |")
    lines += ["", "## Tasks", "", "| task | what it is |", "|---|---|"]
    lines += [f"| {entry.slug} | {entry.summary} |" for entry in catalogue.tasks().values()]
    return "\n".join(lines) + "\n"


def page(module: str, entries: list[catalogue.Entry]) -> str:
    """One module: its docstring, each method's settings and what is tuned, and the evidence."""
    text = entries[0].page
    title, _, rest = text.partition("\n")
    lines = [f"# {title.rstrip('.')}", "", rest.strip(), ""]
    for entry in entries:
        cls = entry.load()
        lines += [
            f"## `{entry.cls}`",
            "",
            f"`from {module} import {entry.cls}`, on the command line `{entry.slug}`.",
            "",
            as_list(entry.doc),
            "",
        ]
        parameters = inspect.signature(cls).parameters.values()
        if parameters:
            lines += ["| setting | default | tuned over |", "|---|---|---|"]
            for parameter in parameters:
                default = "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
                lines.append(f"| `{parameter.name}` | {default} | {cls.space.get(parameter.name, '')} |")
            lines.append("")
    found = evidence(module.rsplit(".", 1)[-1])
    if found:
        lines += [
            "## Evidence",
            "",
            picture(found),
            "",
            "| claim | expected | measured (95 % interval) | verdict |",
            "|---|---|---|---|",
        ]
        for document in found:
            measured = "{effect:+.3g} [{low:+.3g}, {high:+.3g}] {unit}, n = {n}".format(**document["measured"])
            lines.append(f"| {document['claim']} | {document['expected']} | {measured} | **{document['verdict']}** |")
        remarks = [f"- {document['claim']} *{document['remarks']}*" for document in found if document["remarks"]]
        lines += ["", "Remarks:", "", *remarks] if remarks else []
        lines += ["", f"Run it again: `equipoise reproduce {module.rsplit('.', 1)[-1]}`.", ""]
    return "\n".join(lines) + "\n"
