"""What a comparison found: a plain record, rebuilt from the store alone, so that a report never needs a run."""

from __future__ import annotations

import math
import statistics as stdlib_statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.comparison import statistics
from equipoise.comparison.store import Row, Store
from equipoise.errors import StoreError

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class ArmResult:
    """One arm. Differences are arm minus baseline; ``p`` is Holm-corrected over the arms.

    values: the metric of each final seed, in order; NaN where a run failed. matched: the same comparison against a
    baseline given as much compute, for an arm that costs more than 1.5 times the baseline. edges: tuned settings whose best
    value lies on the edge of the space. What could not be measured is None.
    """

    name: str
    baseline: bool
    method: str | None
    mean: float | None
    iqm: float | None
    sd: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: str | None
    sentence: str
    flops_ratio: float | None
    step_time_ratio: float | None
    peak_memory_ratio: float | None
    inference_parameters: int | None
    config: dict[str, Any]
    values: list[float]
    differences: list[float]
    tuning: list[dict[str, Any]]
    edges: list[str]
    matched: dict[str, Any] | None
    curves: DataFrame
    metrics: DataFrame
    failed: int
    tried: DataFrame | None = None  # metrics of every configuration tried, averaged over the tuning seeds


@dataclass
class Comparison:
    """A finished trial. ``summary``, ``runs`` and ``curves`` give DataFrames; ``to_json`` the record that others read."""

    task: str
    task_summary: str
    settings: dict[str, Any]
    metric: str
    higher_is_better: bool
    percent: bool
    counted: str
    seeds: list[int]
    configs: int
    correction: float
    arms: list[ArmResult]
    warnings: list[str]
    checks: list[tuple[str, bool, str]]
    versions: dict[str, str]
    store: Path
    report: Path
    seconds: float
    command: str
    trade_off: dict[str, Any] | None = None  # the task's ``TradeOff``

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read the latest comparison of a folder. Raises ``StoreError`` if there is none."""
        folder = Path(folder)
        path = folder / "store.sqlite"
        if not path.exists():
            raise StoreError(
                f"folder = {str(folder)!r}: holds no store.sqlite; give the folder of a comparison (its --out)"
            )
        with Store(path) as store:
            plan = store.latest_plan()
            if plan is None:
                raise StoreError(
                    f"folder = {str(folder)!r}: its comparison has not finished; run the same `equipoise compare` again"
                )
            keys = [key for arm in plan["arms"] for group in arm["rows"].values() for key in group]
            rows = {row.key: row for row in store.rows(keys=keys)}
        return _build(cls, plan, rows, folder)

    def arm(self, name: str) -> ArmResult:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def failed(self) -> int:
        """Number of final runs that failed, and of arms none of whose configurations could be trained."""
        return sum(arm.failed for arm in self.arms)

    def summary(self) -> DataFrame:
        """One row an arm: what ``to_json`` gives, without lists."""
        import pandas as pd

        return pd.DataFrame(
            [{k: v for k, v in arm.items() if k not in ("values", "config")} for arm in self.to_json()["arms"]]
        )

    def runs(self) -> DataFrame:
        """One row a run of any kind: arm, kind, seed, status, seconds, configuration, metrics, cost."""
        import pandas as pd

        names = {a.name for a in self.arms}
        with Store(self.store) as store:
            plan = store.latest_plan() or {"arms": []}
            keys = [
                key for arm in plan["arms"] if arm["name"] in names for group in arm["rows"].values() for key in group
            ]
            rows = store.rows(keys=keys)
        records = []
        for row in rows:
            record: dict[str, Any] = {
                "arm": row.arm,
                "kind": row.kind,
                "seed": row.seed,
                "status": row.status,
                "seconds": row.seconds,
            }
            record |= {f"config.{key}": value for key, value in (row.config or {}).items()}
            metrics = row.metrics or {}
            for which, values in metrics.get("metrics", {}).items():
                record |= {f"{which}.{key}": value for key, value in values.items()}
            record |= {f"cost.{key}": value for key, value in (row.cost or {}).items()}
            records.append(record | {"error": row.error})
        return pd.DataFrame(records)

    def curves(self) -> DataFrame:
        """One row an epoch of a final run: arm, seed, epoch, losses and metrics."""
        import pandas as pd

        frames = [arm.curves.assign(arm=arm.name) for arm in self.arms if len(arm.curves)]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def to_json(self) -> dict[str, Any]:
        """The object that ``compare --json`` prints."""
        keys = [
            "name", "baseline", "mean", "iqm", "difference", "low", "high", "p", "verdict", "flops_ratio", "step_time_ratio",
            "peak_memory_ratio", "inference_parameters", "config", "values", "matched", "sentence", "failed", "edges",
        ]  # fmt: skip
        arms = [{key: value for key, value in _shallow(arm).items() if key in keys} for arm in self.arms]
        document = {
            "task": self.task,
            "settings": self.settings,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "seeds": len(self.seeds),
            "configs": self.configs,
            "store": str(self.store),
            "report": str(self.report),
            "warnings": self.warnings,
            "arms": [{key: arm[key] for key in keys} for arm in arms],
        }
        return _plain(document)


def _shallow(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(cls: type[Comparison], plan: dict[str, Any], rows: dict[str, Row], folder: Path) -> Comparison:
    metric, percent, higher = plan["metric"], plan["percent"], plan["higher_is_better"]
    described = {arm["name"]: arm for arm in plan["arms"]}
    baseline = next(arm for arm in plan["arms"] if arm["baseline"])
    values = {name: [_value(rows[key], metric) for key in arm["rows"]["final"]] for name, arm in described.items()}
    correction = _correction(plan, rows, baseline)

    def estimate(name: str, other: str) -> statistics.Estimate | None:
        mine, theirs = values[name], values[other]
        usable = len(mine) == len(theirs) == len(plan["seeds"]) and all(map(math.isfinite, [*mine, *theirs]))
        return statistics.paired_difference(mine, theirs, correction=correction) if usable else None

    estimates: dict[str, statistics.Estimate | None] = {}
    adjusted: dict[str, float | None] = {}
    # Compute-matched baselines are controls: they do not take from the level that the methods share.
    for control in (False, True):
        family = [
            n for n, arm in described.items() if not arm["baseline"] and (arm["matched_ratio"] is not None) == control
        ]
        found_here = [estimate(name, baseline["name"]) for name in family]
        estimates |= dict(zip(family, found_here, strict=True))
        adjusted |= dict(zip(family, statistics.holm([e.p if e else None for e in found_here]), strict=True))
    flops = {name: _cost(rows, arm, "flops") for name, arm in described.items()}
    matched = _matched(described, estimate, metric, percent, higher)

    results = []
    for name, arm in described.items():
        mine = values[name]
        good = [v for v in mine if math.isfinite(v)]
        found = estimates.get(name)
        verdict = sentence = None
        if found is not None:
            verdict = statistics.verdict(found, adjusted[name], higher)
            sentence = statistics.sentence(
                name, baseline["name"], found, verdict, metric, p_holm=adjusted[name], percent=percent
            )
        elif arm["config"] is None:
            why = next((entry["status"] for entry in arm["tuning"] if entry["score"] is None), "")
            sentence = f"{name}: no configuration could be trained. {why}"
        elif not arm["baseline"]:
            sentence = (
                f"{name}: no verdict, {len(mine) - len(good)} of {len(mine)} final runs failed, or the baseline's did"
            )
        reference = values[baseline["name"]]
        results.append(
            ArmResult(
                name=name,
                baseline=arm["baseline"],
                method=arm["method"],
                mean=stdlib_statistics.fmean(good) if good else None,
                iqm=statistics.interquartile_mean(good) if good else None,
                sd=stdlib_statistics.stdev(good) if len(good) > 1 else None,
                difference=found.difference if found else None,
                low=found.low if found else None,
                high=found.high if found else None,
                p=adjusted.get(name),
                verdict=verdict,
                sentence=sentence or f"{name} is the tuned baseline",
                flops_ratio=_ratio(flops[name], flops[baseline["name"]]),
                step_time_ratio=_time_ratio(rows, arm, baseline),
                peak_memory_ratio=_ratio(_cost(rows, arm, "peak_memory"), _cost(rows, baseline, "peak_memory")),
                inference_parameters=_cost(rows, arm, "inference_parameters"),
                config=arm["config"] or {},
                values=mine,
                differences=[a - b for a, b in zip(mine, reference, strict=False)],
                tuning=arm["tuning"],
                edges=arm["edges"],
                matched=matched.get(name),
                curves=_curves(rows, arm),
                metrics=_metrics(rows, arm),
                failed=len(mine) - len(good) if arm["config"] is not None else 1,
                tried=_tried(rows, arm),
            )
        )
    checks = [(str(n), bool(ok), str(text)) for n, ok, text in plan["sanity"]] + _checks(plan, rows, results)
    warnings = [*plan["remarks"], *(text for _, passed, text in checks if not passed)]
    counted = {row.metrics["counted"] for row in rows.values() if row.kind == "final" and row.metrics}
    return cls(
        task=plan["task"],
        task_summary=plan["summary"],
        settings=plan["settings"],
        metric=metric,
        higher_is_better=higher,
        percent=percent,
        counted=" or ".join(sorted(counted)),
        seeds=plan["seeds"],
        configs=plan["configs"],
        correction=correction,
        arms=results,
        warnings=warnings,
        checks=checks,
        versions=plan["versions"],
        store=folder / "store.sqlite",
        report=folder / "report.html",
        seconds=sum(row.seconds or 0.0 for row in rows.values()),
        command=plan["command"],
        trade_off=plan.get("trade_off"),
    )


def _value(row: Row, metric: str) -> float:
    if row.status != "done" or not row.metrics:
        return math.nan
    return float(row.metrics["metrics"][row.metrics["counted"]][f"test_{metric}"])


def _correction(plan: dict[str, Any], rows: dict[str, Row], baseline: dict[str, Any]) -> float:
    """n_test / n_train where seeds re-split one data set (Nadeau and Bengio), else 0."""
    if not plan["resampled"]:
        return 0.0
    sizes = next((found["sizes"] for k in baseline["rows"]["final"] if (found := rows[k].metrics)), None)
    return sizes["test"] / sizes["train"] if sizes else 0.0


def _cost(rows: dict[str, Row], arm: dict[str, Any], name: str) -> int | None:
    row = rows[arm["rows"]["cost"][0]] if arm["rows"]["cost"] else None
    value = (row.cost or {}).get(name) if row is not None and row.status == "done" else None
    return None if value is None else int(value)


def _ratio(mine: float | None, reference: float | None) -> float | None:
    return mine / reference if mine is not None and reference else None


def _time_ratio(rows: dict[str, Row], arm: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    """Median over the rounds of this arm's time over the baseline's in the same round."""
    seconds = [[(rows[key].cost or {}).get("step_seconds") for key in a["rows"]["time"]] for a in (arm, baseline)]
    ratios = [mine / base for mine, base in zip(*seconds, strict=False) if mine and base]
    return stdlib_statistics.median(ratios) if ratios else None


def _curves(rows: dict[str, Row], arm: dict[str, Any]) -> DataFrame:
    import pandas as pd

    records = [{"seed": rows[key].seed, **point} for key in arm["rows"]["final"] for point in rows[key].curve or ()]
    return pd.DataFrame(records)


def _metrics(rows: dict[str, Row], arm: dict[str, Any]) -> DataFrame:
    import pandas as pd

    records = []
    for key in arm["rows"]["final"]:
        if found := rows[key].metrics:
            records.append({"seed": rows[key].seed, **found["metrics"][found["counted"]]})
    return pd.DataFrame(records)


def _tried(rows: dict[str, Row], arm: dict[str, Any]) -> DataFrame:
    """One row a configuration tried: what it is, and its metrics at the epoch that counts."""
    import pandas as pd

    records = []
    for key in arm["rows"]["tune"]:
        if found := rows[key].metrics:
            records.append({"config": str(rows[key].config), **found["metrics"][found["counted"]]})
    frame = pd.DataFrame(records)
    return frame.groupby("config", sort=False).mean(numeric_only=True).reset_index() if records else frame


def _matched(
    described: dict[str, dict[str, Any]],
    estimate: Any,
    metric: str,
    percent: bool,
    higher: bool,
) -> dict[str, dict[str, Any]]:
    """Dear arms against the baseline that was given their compute; these tests are a family of their own."""
    pairs = {name: arm["control"] for name, arm in described.items() if arm["control"] is not None}
    estimates = {name: estimate(name, other) for name, other in pairs.items()}
    adjusted = dict(zip(pairs, statistics.holm([e.p if e else None for e in estimates.values()]), strict=True))
    found = {}
    for name, other in pairs.items():
        e = estimates[name]
        if e is not None:
            verdict = statistics.verdict(e, adjusted[name], higher)
            sentence = statistics.sentence(name, other, e, verdict, metric, p_holm=adjusted[name], percent=percent)
            found[name] = {**asdict(e), "name": other, "p": adjusted[name], "verdict": verdict, "sentence": sentence}
    return found


def _checks(plan: dict[str, Any], rows: dict[str, Row], arms: list[ArmResult]) -> list[tuple[str, bool, str]]:
    finals = [row for row in rows.values() if row.kind == "final"]
    idle = sorted({row.arm for row in finals if row.metrics and not row.metrics.get("trained", True)})
    edges = [f"{arm.name}: {', '.join(arm.edges)}" for arm in arms if arm.edges]
    failed = [f"{arm.name}: {arm.failed}" for arm in arms if arm.failed]
    mixed = {
        str(sorted((versions or {}).items())) for versions in (plan["versions"], *(r.versions for r in rows.values()))
    }
    return [
        (
            "every arm trained",
            not idle,
            f"arms that did not train (not better than chance): {', '.join(idle)}"
            if idle
            else "all are better than chance",
        ),
        (
            "no best setting on the edge of its space",
            not edges,
            f"best settings on the edge of their space: {'; '.join(edges)} (a wider space may do better)"
            if edges
            else "all best settings lie inside",
        ),
        (
            "no final run failed",
            not failed,
            f"failed final runs: {'; '.join(failed)}" if failed else f"all {len(finals)} finished",
        ),
        (
            "one version of everything",
            len(mixed) <= 1,
            "runs of this store come from different versions or machines"
            if len(mixed) > 1
            else "all runs share versions and machine",
        ),
    ]
