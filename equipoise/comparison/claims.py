"""``Claim``: a paper's statement that can be checked here, as a comparison with an expected outcome.

Running one leaves a JSON file in ``evidence/``: what was claimed, what was measured, and one of three verdicts.
"reproduced": the effect reaches what was expected, and its interval excludes zero where an improvement was expected.
"contradicted": the whole interval lies on the other side. "not reproduced here": all else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise import catalogue
from equipoise.comparison.protocol import Arm, Progress, compare, versions
from equipoise.comparison.statistics import Estimate, paired_difference
from equipoise.errors import ArgumentError, EquipoiseError, refuse, suggestion

if TYPE_CHECKING:
    from equipoise.training import Task


@dataclass(frozen=True)
class Claim:
    """One statement of one paper, as it can be checked here.

    slug, number: of the paper's module and its number in the plan. name: distinguishes several claims of one paper.
    claim, source: the statement and where it stands. task, settings: the setting. arms: name, method's slug, and a complete
    configuration; or a tuple of them, of which validation data choose (on splits that no final seed meets).
    method, reference: the two arms that are compared (paired over ``seeds`` seeds).
    metric: a column of ``Comparison.runs()`` such as ``last.test_accuracy``; ``reference_metric`` if it is another one.
    relative: the effect is the paired difference of logarithms, given as a relative change.
    at_least / at_most: what the effect (method minus reference) must reach. unit: of the effect.
    scale: factor on the effect (100 turns shares into points). remarks: what a reader should know.
    """

    slug: str
    number: int
    claim: str
    source: str
    task: str | type[Task]
    settings: Mapping[str, Any]
    arms: tuple[tuple[str, str, Mapping[str, Any] | tuple[Mapping[str, Any], ...]], ...]
    method: str
    reference: str
    unit: str
    name: str = ""
    seeds: int = 3
    metric: str = "last.test_accuracy"
    reference_metric: str | None = None
    relative: bool = False
    at_least: float | None = None
    at_most: float | None = None
    scale: float = 1.0
    remarks: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            refuse("at_least, at_most", (self.at_least, self.at_most), "be given one of them")

    @property
    def id(self) -> str:
        """Name of the evidence file: the slug, and the claim's own name if there are several."""
        return f"{self.slug}-{self.name}" if self.name else self.slug

    @property
    def expected(self) -> str:
        """The expectation in words."""
        bound = f"at least {self.at_least:+g}" if self.at_least is not None else f"at most {self.at_most:+g}"
        if self.method == self.reference:  # two metrics of one arm
            return f"{self.method}, {self.metric} minus {self.reference_metric}: {bound} {self.unit}"
        of = "" if self.reference_metric is None else f" ({self.reference_metric})"
        return f"{self.method} minus {self.reference}{of}: {bound} {self.unit}"

    def judge(self, effect: Estimate) -> str:
        """The verdict on a measured effect (in the claim's unit); an expectation of "at least" is meant, "at most" is its mirror.

        reproduced: a gain that reaches the expectation, and whose interval excludes zero; of an expectation that is no gain ("no
        worse than", "costs at most"), the whole interval. contradicted: the interval excludes zero, or the expectation if that is
        below zero, on the wrong side. All else is not reproduced here.
        """
        sign = 1 if self.at_least is not None else -1
        bound = sign * (self.at_least if self.at_least is not None else self.at_most)  # type: ignore[operator]
        value, low, high = sorted_interval(effect, sign)
        if low >= bound or (value >= bound > 0 and low > 0):
            return "reproduced"
        return "contradicted" if high < min(bound, 0) else "not reproduced here"

    def run(self, out: Path, *, jobs: int = 1, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Carry the claim's comparison out (rows that are in the store of ``out`` are not run again); return the evidence."""
        arms = [
            Arm(slug, name, candidates=config) if isinstance(config, tuple) else Arm(slug, name, config)
            for name, slug, config in self.arms
        ]
        task = catalogue.find("task", self.task).load() if isinstance(self.task, str) else self.task
        comparison = compare(
            task.make(**self.settings),
            arms,
            seeds=self.seeds,
            jobs=jobs,
            out=out,
            measure_time=False,
            progress=progress,
            retry_failed=True,
        )
        runs = comparison.runs()
        finals = runs[runs.kind == "final"].set_index(["arm", "seed"]).sort_index()
        if (finals.status != "done").any():
            errors = "; ".join(str(e).split("\n")[0] for e in finals["error"].dropna().unique())
            raise EquipoiseError(f"claim {self.id}: a final run failed, so nothing was written. {errors}")
        values: dict[str, list[float]] = {}
        for arm, metric in ((self.method, self.metric), (self.reference, self.reference_metric or self.metric)):
            values[f"{arm} ({metric})"] = [float(v) for v in finals.loc[arm][metric]]
        mine, theirs = (
            np.asarray(v) for v in (list(values.values()) if len(values) == 2 else list(values.values()) * 2)
        )
        if self.relative:
            logs = paired_difference(np.log(mine), np.log(theirs))
            change, low, high = (self.scale * float(np.expm1(v)) for v in (logs.difference, logs.low, logs.high))
            effect = Estimate(change, low, high, logs.p, logs.n)
        else:
            effect = paired_difference(self.scale * mine, self.scale * theirs)
        every_arm = {
            arm.name: {"config": arm.config, self.metric: [float(v) for v in finals.loc[arm.name][self.metric]]}
            for arm in comparison.arms  # compute-matched baselines too
        }
        return {
            "slug": self.slug,
            "number": self.number,
            "claim": self.claim,
            "source": self.source,
            "setting": {"task": task.name, **self.settings, "seeds": self.seeds},
            "expected": self.expected,
            "measured": {
                "effect": effect.difference,
                "low": effect.low,
                "high": effect.high,
                "n": effect.n,
                "unit": self.unit,
            },
            "verdict": self.judge(effect),
            "remarks": self.remarks,
            "command": f"equipoise reproduce {self.id}",
            "versions": versions(),
            "seconds": round(comparison.seconds, 1),
            "date": date.today().isoformat(),
            "values": values,
            "arms": every_arm,
        }


def sorted_interval(effect: Estimate, sign: int) -> tuple[float, float, float]:
    """Value, low and high of the effect, turned so that larger is what was expected."""
    low, high = sorted((sign * effect.low, sign * effect.high))
    return sign * effect.difference, low, high


def claims() -> dict[str, Claim]:
    """All claims by their id, from the ``claims`` modules of the families."""
    found = {}
    for family in catalogue.families():
        if (catalogue.ROOT / family / "claims.py").exists():
            for claim in import_module(f"equipoise.{family}.claims").CLAIMS:
                found[claim.id] = claim
    return found


def select(names: list[str]) -> list[Claim]:
    """The claims of the given ids or slugs. Raises ``ArgumentError`` with a suggestion for an unknown one."""
    known = claims()
    chosen: dict[str, Claim] = {}
    for given in names:
        key = given.lower()
        hits = [
            c
            for c in known.values()
            if key in (c.id, c.slug) or key.replace("-", "_") in (c.id.replace("-", "_"), c.slug)
        ]
        if not hits:
            hint = suggestion(key, sorted({*known, *(c.slug for c in known.values())}))
            raise ArgumentError(f"claim = {given!r}: there is no such claim. {hint} Known: {', '.join(sorted(known))}")
        chosen |= {claim.id: claim for claim in hits}
    return list(chosen.values())


def evidence_folder() -> Path:
    """Where evidence lies: beside the package in a checkout, inside it when installed."""
    inside = catalogue.ROOT / "evidence"
    return inside if inside.exists() else catalogue.ROOT.parent / "evidence"


def evidence(slug: str) -> list[dict[str, Any]]:
    """The evidence of one paper's claims that is on disk."""
    files = sorted(evidence_folder().glob("*.json"), key=lambda path: path.stem)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [document for document in found if document["slug"].replace("_", "-") == slug.replace("_", "-")]


def write(document: dict[str, Any], claim: Claim, folder: Path) -> Path:
    """Write one claim's evidence as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim.id}.json"
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def claim_slug_of(module: str) -> str:
    """The slug under which the claims of a method's module are filed: the module's name."""
    return module.rsplit(".", 1)[-1]


__all__ = ["Claim", "claim_slug_of", "claims", "evidence", "evidence_folder", "select", "write"]
