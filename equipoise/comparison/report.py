"""A comparison for people: a table in the terminal, one self-contained ``report.html``, and tables for other programs.

The page asks for nothing over the network, and says so in its content security policy, which also lets no script run but its
own: names and paths come from users. What it shows stands in four files: this one prepares it, ``figures.py`` draws,
``templates/report.html`` lays it out, ``templates/report.css`` and ``report.js`` are put into the page.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.comparison import figures
from equipoise.comparison.figures import good, number, ratio, setting
from equipoise.errors import StoreError

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table as RichTable

    from equipoise.comparison.result import ArmResult, Comparison

TEMPLATES = Path(__file__).parent / "templates"
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDER = {"better": 0, "no difference seen": 1, "worse": 2, None: 3}
NAMED = 3  # so many winners are described in the answer; the others are only named


@dataclass(frozen=True)
class Units:
    """How the metric of a comparison is written: shares in percent, with the decimals that its uncertainty is worth."""

    metric: str
    percent: bool
    decimals: int

    @classmethod
    def of(cls, comparison: Comparison) -> Units:
        scale = 100.0 if comparison.percent else 1.0
        halves = [(a.high - a.low) / 2 for a in comparison.arms if a.low is not None and a.high is not None]
        spreads = sorted(s * scale for s in (halves or [a.sd for a in comparison.arms if a.sd is not None]) if s > 0)
        decimals = 1 - math.floor(math.log10(spreads[len(spreads) // 2])) if spreads else 2
        return cls(comparison.metric.replace("_", " "), comparison.percent, max(int(comparison.percent), decimals))

    @property
    def scale(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def label(self) -> str:
        """The metric with its unit."""
        return f"{self.metric} (%)" if self.percent else self.metric

    @property
    def points(self) -> str:
        """The unit of a difference, with a space before it."""
        return " points" if self.percent else ""

    def value(self, x: float | None) -> str:
        return number(x, self.decimals, self.scale)

    def difference(self, x: float | None) -> str:
        return number(x, self.decimals, self.scale, sign="+")

    def interval(self, low: float | None, high: float | None) -> str:
        return "–" if low is None or high is None else f"{self.value(low)} to {self.value(high)}"


# -- the answer in words ----------------------------------------------------------------------------------------------
def baseline_of(comparison: Comparison) -> ArmResult:
    return next(arm for arm in comparison.arms if arm.baseline)


def is_control(comparison: Comparison, arm: ArmResult) -> bool:
    """Whether an arm is the baseline with more compute, which others are held against, and no method of its own."""
    names = {a.matched["name"] for a in comparison.arms if a.matched}
    same = arm.method is not None and arm.method == baseline_of(comparison).method
    return not arm.baseline and (arm.name in names or (same and "compute_ratio" in arm.config))


def ranked(comparison: Comparison, arms: Iterable[ArmResult]) -> list[ArmResult]:
    """Best mean first; arms without a result last."""
    sign = -1 if comparison.higher_is_better else 1
    return sorted(arms, key=lambda a: (not good(a.mean), sign * (a.mean if good(a.mean) else 0.0)))


def by_verdict(comparison: Comparison, arms: Iterable[ArmResult]) -> list[ArmResult]:
    """Better, no difference seen, worse, no verdict; within these the best difference first."""
    sign = -1 if comparison.higher_is_better else 1
    return sorted(arms, key=lambda a: (ORDER.get(a.verdict, 3), sign * (a.difference if good(a.difference) else 0.0)))


def headline(comparison: Comparison) -> tuple[str, list[str]]:
    """The answer in one line, and the sentences that it stands on: by how much, at what cost, and what of the others."""
    units, reference = Units.of(comparison), baseline_of(comparison)
    baseline = f"tuned {reference.name}" if reference.tuning else reference.name
    arms = by_verdict(comparison, (a for a in comparison.arms if not a.baseline and not is_control(comparison, a)))
    groups = {verdict: [a.name for a in arms if a.verdict == verdict] for verdict in ORDER}
    winners, n = [a for a in arms if a.verdict == "better"], len(arms)
    judged = n - len(groups[None])
    if n == 1 and judged:
        start = {"better": f"{arms[0].name} beats", "worse": f"{arms[0].name} does worse than"}
        title = f"{start.get(str(arms[0].verdict), f'No difference seen between {arms[0].name} and')} {baseline}"
    elif not judged:
        title = f"No verdict on {arms[0].name if n == 1 else f'{_count(n)} methods'}: runs failed"
    elif winners:
        share = f"all {_count(n)}" if len(winners) == n else f"{_count(len(winners))} of {_count(n)}"
        title = f"{share.capitalize()} methods {'beats' if len(winners) == 1 else 'beat'} {baseline}"
    else:
        title = f"None of {_count(n)} methods was seen to beat {baseline}"
    lines = [_win(arm, units) for arm in winners[:NAMED]]
    if len(winners) > NAMED:
        others = [arm.name for arm in winners[NAMED:]]
        lines.append(f"It is also beaten, by less, by {_list(others)}.")
    same, worse, failed = (groups[verdict] for verdict in ("no difference seen", "worse", None))
    if n == 1 and same:
        low, high = units.difference(arms[0].low), units.difference(arms[0].high)
        if arms[0].low == arms[0].high:
            lines.append(
                f"The difference is {low}{units.points} on every seed: chance cannot be told, {_cost(arms[0])}."
            )
        else:
            lines.append(f"The data are compatible with anything from {low} to {high}{units.points}, {_cost(arms[0])}.")
    elif n == 1 and worse:
        lines.append(
            f"The difference is {_effect(arms[0].difference, arms[0].low, arms[0].high, units)}, {_cost(arms[0])}."
        )
    else:
        lines += [f"No difference was seen for {_list(same)}."] if same else []
        lines += [f"Worse than it: {_list(worse)}."] if worse else []
    lines += [f"No verdict on {_list(failed)}: runs failed."] if failed and judged else []
    return title, lines


def _win(arm: ArmResult, units: Units) -> str:
    verb = "raises" if (arm.difference or 0.0) > 0 else "lowers"
    amount = f"{number(abs(arm.difference or 0.0), units.decimals, units.scale)}{units.points}"
    text = f"{arm.name} {verb} {units.metric} by {amount} (95\u00a0% interval {units.interval(arm.low, arm.high)}) {_cost(arm)}."
    if arm.matched:
        m = arm.matched
        result = {"better": "it is still better", "worse": "it is worse"}.get(m["verdict"], "no difference is seen")
        text += f" Against {m['name']}, {result}: {_effect(m['difference'], m['low'], m['high'], units)}."
    return text


def _effect(
    difference: float | None, low: float | None, high: float | None, units: Units, unit: str | None = None
) -> str:
    if not good(difference):
        return "–"
    return f"{units.difference(difference)}{units.points if unit is None else unit} [{units.value(low)}, {units.value(high)}]"


def _cost(arm: ArmResult) -> str:
    if not good(arm.flops_ratio):
        return "at a cost that was not measured"
    same = abs(arm.flops_ratio - 1) < 0.005
    return "at the same training compute" if same else f"at {ratio(arm.flops_ratio)} the training compute"


def _count(n: int) -> str:
    return COUNTS[n] if n < len(COUNTS) else str(n)


def _list(names: Sequence[str]) -> str:
    if len(names) > NAMED + 1:
        return f"{_count(len(names))} methods"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- the terminal -----------------------------------------------------------------------------------------------------
def terminal_table(comparison: Comparison, width: int = 80) -> RichTable:
    """The leaderboard, best first. Above 110 columns also the corrected p-value, step time, memory and parameters."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    units, wide = Units.of(comparison), width >= 110
    headers = ["arm", "verdict", units.label.replace(" (%)", "\n(%)")]
    headers += [f"difference{', points' if units.percent else ''}\n[95 % interval]"]
    headers += (
        ["Holm p", "train\ncompute", "step\ntime", "peak\nmemory", "inference\nparameters"]
        if wide
        else ["train\ncompute"]
    )
    arms, rows = ranked(comparison, comparison.arms), []
    for arm in arms:
        verdict = "baseline" if arm.baseline else arm.verdict or "no verdict"
        effect = "" if arm.baseline else _effect(arm.difference, arm.low, arm.high, units, "")
        row = [arm.name, verdict, units.value(arm.mean), effect, ratio(arm.flops_ratio)]
        if wide:
            row.insert(4, "" if arm.baseline else p_value(arm.p))
            row += [ratio(arm.step_time_ratio), ratio(arm.peak_memory_ratio), _whole(arm.inference_parameters)]
        rows.append(row)
    if width < 76:  # the cost has no room
        headers, rows = headers[:4], [row[:4] for row in rows]
    # Names get what the other columns leave, and are broken at their hyphens.
    others = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(headers, *rows, strict=True)
    ]
    room = max(12, width - sum(others[1:]) - 2 * len(headers))
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for i, header in enumerate(headers):
        firm = i > 1 or (i == 1 and width >= 80)  # in a narrow terminal the verdict takes two lines
        table.add_column(
            header, justify="left" if i < 2 else "right", no_wrap=firm, overflow="fold", min_width=12 if i < 2 else None
        )
    styles = {"better": "bold green", "worse": "bold red"}
    for arm, (name, verdict, *cells) in zip(arms, rows, strict=True):
        name = textwrap.fill(figures.short(name, 2 * room), room)
        style = "bold" if arm.verdict == "better" else ""
        table.add_row(Text(name, style=style), Text(verdict, style=styles.get(verdict, "dim")), *cells)
    return table


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """The answer, the leaderboard, the warnings, and where the whole report is."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    title, lines = headline(comparison)
    console.print()
    console.print(Text(title, style="bold"))
    for text in lines:
        console.print(Text(text))
    console.print()
    console.print(terminal_table(comparison, console.width))
    console.print()
    for warning in comparison.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    console.print(Text(f"The whole report: {comparison.report}"), soft_wrap=True)


# -- the page ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """``sort`` orders the column; None (no result) always comes last. ``style`` is a class of the style sheet."""

    text: str
    sort: float | str | None = None
    style: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of each row names the row. ``sorted_by``: a column and "ascending" or "descending"."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    sorted_by: tuple[int, str] | None = None
    marked: set[int] = field(default_factory=set)

    def numeric(self, column: int) -> bool:
        return any("number" in row[column].style for row in self.rows)


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write ``folder/report.html`` and return its path. Raises ``StoreError`` if that fails; an old report then stays."""
    path = Path(folder) / "report.html"
    page = render(comparison).encode("utf-8", errors="replace")  # a file name need not be valid Unicode
    _write(path, lambda part: part.write_bytes(page))
    return path


def render(comparison: Comparison) -> str:
    """The page as text: the same bytes for the same comparison."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    units = Units.of(comparison)
    reference = baseline_of(comparison)
    controls = [a for a in comparison.arms if is_control(comparison, a)]
    methods = [a for a in comparison.arms if not a.baseline and a not in controls]
    order = ranked(comparison, comparison.arms)
    title, lines = headline(comparison)
    return environment.get_template("report.html").render(
        c=comparison,
        title=title,
        lines=lines,
        units=units,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        reference=reference,
        methods=by_verdict(comparison, methods),
        controls=by_verdict(comparison, controls),
        matched=by_verdict(comparison, (a for a in methods if a.matched)),
        leaderboard=_leaderboard(comparison, units, order),
        forest=figures.forest(comparison, units, by_verdict(comparison, methods + controls), reference.name),
        cost=figures.cost(units, order, comparison.higher_is_better),
        trade_off=figures.trade_off(comparison, order),
        curves=figures.curves(
            units, [reference, *by_verdict(comparison, methods + controls)], comparison.higher_is_better
        ),
        tuning_figure=figures.tuning(units, comparison.arms),
        tuning=[(arm, _tuning(arm, units, comparison.higher_is_better)) for arm in comparison.arms],
        values=_values(comparison, units),
        others=_others(comparison),
        settings=[(name, setting(value)) for name, value in comparison.settings.items()],
        trial=_trial(comparison, units),
        describe=figures.settings,
        duration=_duration(comparison.seconds),
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _name(arm: ArmResult) -> Cell:
    return Cell(arm.name, arm.name.lower(), "long" if len(arm.name) > 30 else "")


def _leaderboard(comparison: Comparison, units: Units, order: list[ArmResult]) -> Table:
    columns = [
        "Arm",
        "Verdict",
        f"Mean {units.label}",
        "IQM",
        "SD",
        "Difference (points)" if units.percent else "Difference",
        "95 % interval",
    ]
    columns += ["Holm p", "Train compute", "Step time", "Peak memory", "Inference parameters"]
    failed = any(arm.failed for arm in order)
    columns += ["Failed runs"] if failed else []
    rows = []
    for arm in order:
        verdict = "baseline" if arm.baseline else arm.verdict or "no verdict"
        row = [
            _name(arm),
            Cell(verdict, ORDER.get(arm.verdict, 3) + 0.5 * arm.baseline, f"verdict {figures.kind_of(arm)}"),
            Cell(units.value(arm.mean), arm.mean, "number strong"),
            Cell(units.value(arm.iqm), arm.iqm, "number"),
            Cell(units.value(arm.sd), arm.sd, "number"),
            Cell("" if arm.baseline else units.difference(arm.difference), arm.difference, "number strong"),
            Cell("" if arm.baseline else units.interval(arm.low, arm.high), arm.low, "number"),
            Cell("" if arm.baseline else p_value(arm.p), arm.p, "number"),
            *(Cell(ratio(x), x, "number") for x in (arm.flops_ratio, arm.step_time_ratio, arm.peak_memory_ratio)),
            Cell(_whole(arm.inference_parameters), arm.inference_parameters, "number"),
            *([Cell(str(arm.failed), arm.failed, "number")] if failed else []),
        ]
        rows.append(row)
    marked = {i for i, arm in enumerate(order) if arm.baseline}
    caption = f"All arms, best mean test {units.metric} first. Cost is given as a multiple of the baseline's."
    return Table(caption, columns, rows, (2, "descending" if comparison.higher_is_better else "ascending"), marked)


def _tuning(arm: ArmResult, units: Units, higher: bool) -> Table | None:
    """The configurations tried, best first, the chosen one marked."""
    if not arm.tuning:
        return None
    names = list(dict.fromkeys(key for entry in arm.tuning for key in entry["config"]))
    sign = -1 if higher else 1
    found = sorted(arm.tuning, key=lambda e: (not good(e["score"]), sign * e["score"] if good(e["score"]) else 0))
    chosen = next((i for i, entry in enumerate(found) if good(entry["score"]) and entry["config"] == arm.config), None)
    rows = []
    for i, entry in enumerate(found):
        score, status = entry["score"], "chosen" if i == chosen else str(entry["status"])
        cells = [
            Cell(setting(v := entry["config"].get(key, "–")), v if _is_number(v) else str(v), "number") for key in names
        ]
        rows.append(
            [
                Cell(str(i + 1), i + 1, "rank"),
                Cell(units.value(score), score, "number strong"),
                Cell(status, status),
                *cells,
            ]
        )
    caption = f"{arm.name}: configurations tried, by validation {units.label}"
    return Table(
        caption, ["Rank", "Score", "Status", *names], rows, (0, "ascending"), set() if chosen is None else {chosen}
    )


def _values(comparison: Comparison, units: Units) -> Table:
    """The metric of every final run."""
    columns = ["Arm", *(f"Seed {seed}" for seed in comparison.seeds), "Mean", "SD"]
    rows = []
    for arm in ranked(comparison, comparison.arms):
        values: list[float | None] = [*arm.values, *[None] * (len(comparison.seeds) - len(arm.values))]
        cells = [Cell("failed" if arm.values and not good(v) else units.value(v), v, "number") for v in values]
        summary = [Cell(units.value(v), v, "number strong") for v in (arm.mean, arm.sd)]
        rows.append([_name(arm), *cells, *summary])
    return Table(f"Test {units.label} of every final run", columns, rows)


def _others(comparison: Comparison) -> Table | None:
    """Means over the seeds of everything that was measured."""
    arms = ranked(comparison, comparison.arms)
    names = list(dict.fromkeys(str(c) for arm in arms for c in arm.metrics.columns if c != "seed"))
    if not names:
        return None
    rows = []
    for arm in arms:
        means = arm.metrics.mean(numeric_only=True)
        found = [float(means[name]) if name in means else None for name in names]
        rows.append([_name(arm), *(Cell(number(v, 4), v, "number") for v in found)])
    return Table(
        "Means over the seeds, at the epoch that counts", ["Arm", *(name.replace("_", " ") for name in names)], rows
    )


def _trial(comparison: Comparison, units: Units) -> list[tuple[str, str]]:
    counted = {"last": "the last", "best": "the best on validation data"}
    counted["best or last"] = "the last, or the best on validation data, as tuned"
    added = number(comparison.correction, 3) if comparison.correction else "0 (independent test data)"
    return [
        ("Metric", f"test {units.label}, {'higher' if comparison.higher_is_better else 'lower'} is better"),
        ("Epoch that counts", counted.get(comparison.counted, comparison.counted or "–")),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Configurations for each arm", str(comparison.configs)),
        ("Added to 1/n in the variance", added),
        ("Computing time of all runs", _duration(comparison.seconds)),
        ("Store", str(comparison.store)),
    ]


def p_value(p: float | None) -> str:
    """Three decimals, or as many as keep a p-value on its side of 0.05."""
    if not good(p):
        return "–"
    if p < 0.001:
        return "< 0.001"
    return next((t for d in (3, 4, 5) if (float(t := f"{p:.{d}f}") < 0.05) == (p < 0.05)), f"{p:.6f}")


def _whole(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 90:
        return f"{number(seconds, 0)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- tables for other programs ------------------------------------------------------------------------------------------
def write_tables(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write ``results.csv`` and ``results.parquet`` (a row a run) and ``summary.csv`` (a row an arm); return their paths."""
    runs, folder = _storable(comparison.runs()), Path(folder)
    summary = _storable(comparison.summary())
    paths = [folder / "results.csv", folder / "results.parquet", folder / "summary.csv"]
    _write(paths[0], lambda part: runs.to_csv(part, index=False))
    _write(paths[1], lambda part: runs.to_parquet(part, index=False))
    _write(paths[2], lambda part: summary.to_csv(part, index=False))
    return paths


def write_all(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write the report and the tables; return their paths, the report first."""
    return [write_report(comparison, folder), *write_tables(comparison, folder)]


def _storable(frame: DataFrame) -> DataFrame:
    """Parquet wants one type a column: lists and mixed columns become text."""
    frame = frame.copy()
    for name in [column for column in frame.columns if frame[column].dtype == "object"]:
        found = [v for v in frame[name] if v is not None and v == v]
        kinds = {type(v) for v in found}
        if kinds & {dict, list, tuple} or len(kinds) > 1:
            plain = [
                v if isinstance(v, str) or v is None or v != v else json.dumps(v, default=str) for v in frame[name]
            ]
            frame[name] = plain
    return frame


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that what was there before is never half overwritten."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be missing
            part.unlink(missing_ok=True)
        raise StoreError(
            f"{str(path)!r} cannot be written ({error.strerror or error}). The runs are kept: "
            "make room or choose a folder that can be written, and run `equipoise report`"
        ) from error
