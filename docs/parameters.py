"""Shows the parameters that a docstring describes, one a line (``name: what it is``), as a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(`*\w+`*(?:(?:, | / )`*\w+`*)*): (?=\S)")


def as_list(text: str) -> str:
    """Turn paragraphs that begin with ``name: `` into Markdown lists; lines that begin otherwise go on with their item."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if ITEM.match(lines[0]):
            lines = [ITEM.sub(r"- **\1**: ", line) if ITEM.match(line) else f"  {line.strip()}" for line in lines]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


class Parameters(griffe.Extension):
    """Applies ``as_list`` to every docstring of the API pages."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_list(obj.docstring.value)
