"""Draws the evidence of a paper with the report's own figures: each claim's effect, its interval, and what was expected."""

from __future__ import annotations

import re
from typing import Any

from equipoise.comparison.figures import Axis, Strip, number, strips

BOUND = re.compile(r"at (least|most) ([+-]?[\d.]+(?:e-?\d+)?)")
KINDS = {"reproduced": "reproduced", "not reproduced here": "unseen", "contradicted": "contradicted"}
UNITS = ("points", "% change", "dB")


def axis_of(unit: str) -> str:
    """What unit's axis a claim is drawn on."""
    return next((name for name in UNITS if unit.startswith(name)), unit.split(" of ")[0])


def compared(document: dict[str, Any], unit: str) -> str:
    """Which two arms (or metrics of one), and what of them."""
    what = document["measured"]["unit"].removeprefix(unit).removeprefix(" of ").removeprefix("the ").strip()
    arms = document["expected"].split(": at ")[0].replace("last.test_", "").replace("_", " ")
    return ", ".join(filter(None, (arms, what)))


def picture(documents: list[dict[str, Any]]) -> str:
    """A drawing for each kind of unit, with a row for each claim, as HTML."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        groups.setdefault(axis_of(document["measured"]["unit"]), []).append(document)
    drawn = []
    for unit, members in groups.items():
        rows = []
        for document in members:
            measured = document["measured"]
            effect, low, high = (float(measured[key]) for key in ("effect", "low", "high"))
            decimals = 2 if max(abs(low), abs(high)) < 1 else 1
            result = f"{number(effect, decimals, sign='+')} [{number(low, decimals)}, {number(high, decimals)}]"
            bound = float(BOUND.findall(document["expected"])[-1][1])
            kind, name = KINDS[document["verdict"]], compared(document, unit)
            if sum(compared(other, unit) == name for other in members) > 1:
                name = document["claim"].rstrip(".")
            rows.append(Strip(name, result, kind, effect, (low, high), [(bound, f"expected: {document['expected']}")]))
        axis = Axis.around([0.0, *(v for row in rows for v in (*(row.interval or ()), row.dots[0][0]))], 7)
        spoken = "; ".join(f"{row.name}: {row.result}" for row in rows)
        drawn.append(f"<p class='unit'>{unit}</p>{strips(f'Evidence in {unit}. {spoken}', rows, axis, zero=True)}")
    legend = "".join(f"<span class='{kind}'>{verdict}</span>" for verdict, kind in KINDS.items())
    note = "Bars are 95 % intervals over seeds; the ring below is what was expected at least, or at most."
    body = "".join(drawn)
    return f"<figure class='evidence'>{body}<figcaption>{legend} {note}</figcaption></figure>"
