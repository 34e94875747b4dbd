"""The report's figures: inline SVG that follows the page's width, its colours and its dark mode.

Horizontal positions are percentages and type sizes are CSS pixels, so that one figure fills a phone and a wide screen and its
text never shrinks. Colours are classes of the style sheet. Curves cannot be given in percentages: they are drawn in a
1000 x 1000 box that is stretched, with strokes that do not scale. Tick labels hang over the drawing's edge, into its margin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from pandas import DataFrame

    from equipoise.comparison.report import Units
    from equipoise.comparison.result import ArmResult, Comparison

ROW = 50  # pixels that a row takes: its name, an interval, and dots below it
NARROW, WIDE = 21, 70  # letters of a name that a phone and a wide screen have room for
CROWD = 10  # so many arms can all be named beside their marks
MARKS = {
    "better": "M0,-6L6,5H-6Z",
    "worse": "M0,6L6,-5H-6Z",
    "baseline": "M0,-6L6,0L0,6L-6,0Z",
    "none": "M0,-5A5,5 0 1 1 0,5A5,5 0 1 1 0,-5Z",
    "chosen": "M0,-7A7,7 0 1 1 0,7A7,7 0 1 1 0,-7Z",
}


# -- numbers ----------------------------------------------------------------------------------------------------------
def number(x: float | None, decimals: int = 2, scale: float = 1.0, sign: str = "-") -> str:
    """``x`` times ``scale`` with a real minus sign; a dash for None, NaN and infinity. Never a zero that it is not."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x * scale:{sign}.{min(decimals, 8)}f}"
    if abs(x * scale) >= 1e7 or (x != 0 and float(text) == 0):
        text = f"{x * scale:{sign}.2g}"
    return text.replace("-", "−")


def ratio(x: float | None) -> str:
    """``1.02×``."""
    return (
        "–"
        if x is None or not math.isfinite(x)
        else f"{x:.2f}×"
        if x < 9.995
        else f"{x:.3g}×"
        if x < 1e4
        else f"{x:,.0f}×"
    )


def short(name: str, length: int = 30) -> str:
    """``name`` with its middle left out where it is longer than ``length``; its beginning and end tell arms apart."""
    return name if len(name) <= length else f"{name[: length * 2 // 3]}…{name[-(length - length * 2 // 3 - 1) :]}"


@dataclass(frozen=True)
class Axis:
    """The numbers from ``low`` to ``high`` (already scaled), with round ticks between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], count: int = 5, margin: float = 0.05) -> Axis:
        found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(found), max(found)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        pad = margin * (high - low)
        low, high = low - pad, high + pad
        power = 10.0 ** math.floor(math.log10((high - low) / count))
        step = next((m * power for m in (1, 2, 2.5, 5) if (high - low) / (m * power) <= count), 10 * power)
        first = math.ceil(low / step)
        return cls(low, high, tuple((first + i) * step for i in range(math.floor(high / step) - first + 1)))

    @classmethod
    def ratios(cls, values: Sequence[float]) -> Axis:
        """For multiples of the baseline's cost; logarithmic where they span more than a factor of four."""
        low, high = min(values), max(values)
        if low <= 0 or high / low <= 4:
            return cls.around([low - 0.05, high + 0.05], 4)
        low, high = low * 0.8, high * 1.25
        ticks = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        keep = -(-len(ticks) // 6)
        return cls(low, high, tuple(ticks[::keep]), log=True)

    def at(self, value: float) -> float:
        """Position: 0 at the low end, 1 at the high end."""
        f = math.log if self.log else float
        return (f(value) - f(self.low)) / (f(self.high) - f(self.low))

    def x(self, value: float) -> str:
        return f"{100 * self.at(value):.2f}%"

    def text(self, tick: float, sign: str = "-") -> str:
        if self.log:
            return f"{tick:g}"
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(self.high - self.low)
        decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
        tick = 0.0 if abs(tick) < 1e-9 * step else tick
        return number(tick, decimals, sign=sign if tick else "-")


# -- SVG --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Panel:
    name: str
    svg: Markup


@dataclass(frozen=True)
class Figure:
    """What the template shows: a title, what to see and how to read it, drawings, and the same numbers as a table."""

    id: str
    title: str
    note: str
    panels: list[Panel]
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; attributes are escaped, content is unless it is markup. ``class_`` is class, ``_`` in names is ``-``."""
    given = {
        "class" if key == "class_" else key.replace("_", "-"): value
        for key, value in attributes.items()
        if value is not None
    }
    text = Markup("").join(Markup(' {}="{}"').format(Markup(key), str(value)) for key, value in given.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, Markup("").join(map(escape, content)))


def drawing(name: str, height: float, *content: str, class_: str = "plot") -> Markup:
    """A picture as wide as its place: to a screen reader one image called ``name``."""
    return tag("svg", *content, class_=class_, role="img", aria_label=name, width="100%", height=f"{height:g}")


def line(class_: str, x1: str, y1: float, x2: str, y2: float) -> Markup:
    return tag("line", class_=class_, x1=x1, y1=f"{y1:g}", x2=x2, y2=f"{y2:g}")


def words(content: str, x: str, y: float, class_: str, anchor: str | None = None) -> Markup:
    return tag("text", content, class_=class_, x=x, y=f"{y:g}", text_anchor=anchor)


def label(name: str, narrow: int, wide: int, x: str, y: float, class_: str, anchor: str | None = None) -> Markup:
    """A name, shortened as the screen demands; the style sheet shows one of the two."""
    if len(name) <= narrow:
        return words(name, x, y, class_, anchor)
    texts = ((short(name, narrow), "narrow"), (short(name, wide), "wide"))
    return Markup("").join(words(text, x, y, f"{class_} {screen}", anchor) for text, screen in texts)


def at(x: str, *content: str) -> Markup:
    """Content in pixels around the horizontal position ``x``, which is a percentage."""
    return tag("svg", *content, x=x, overflow="visible")


def mark(kind: str, y: float) -> Markup:
    return tag("path", class_=f"mark {kind}", d=MARKS.get(kind, MARKS["none"]), transform=f"translate(0,{y:g})")


def kind_of(arm: ArmResult) -> str:
    return "baseline" if arm.baseline else arm.verdict if arm.verdict in ("better", "worse") else "none"


# -- rows of intervals and dots -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Strip:
    """One row: a name, a result in words, an interval, a marked value, and dots with their explanations."""

    name: str
    result: str
    kind: str
    value: float | None
    interval: tuple[float, float] | None
    dots: list[tuple[float, str]]


def strips(name: str, rows: Sequence[Strip], axis: Axis, *, zero: bool, ends: tuple[str, str] = ("", "")) -> Markup:
    height, middle, below = (ROW, 28, 39) if zero else (ROW - 10, 28, 28)
    top = 24 if any(ends) else 4
    bottom = top + height * len(rows)
    parts = [line("grid", axis.x(t), top, axis.x(t), bottom) for t in axis.ticks]
    parts += [words(axis.text(t, "+" if zero else "-"), axis.x(t), bottom + 18, "tick", "middle") for t in axis.ticks]
    if zero:
        parts.append(line("zero", axis.x(0), top, axis.x(0), bottom))
    parts += [words(ends[0], "0%", 12, "tick"), words(ends[1], "100%", 12, "tick", "end")] if any(ends) else []
    for i, row in enumerate(rows):
        y = top + height * i
        parts.append(line("grid", "0%", y, "100%", y))
        parts.append(label(row.name, NARROW, WIDE, "0%", y + 15, "name halo"))
        parts.append(words(row.result, "100%", y + 15, f"result halo {row.kind}", "end"))
        if row.interval:
            low, high = (axis.x(v) for v in row.interval)
            parts.append(line(f"interval {row.kind}", low, y + middle, high, y + middle))
        parts += [
            at(axis.x(v), tag("circle", tag("title", text), class_="dot", cy=f"{y + below}", r="3"))
            for v, text in row.dots
        ]
        if row.value is not None:
            parts.append(at(axis.x(row.value), mark(row.kind, y + middle)))
    parts.append(line("grid", "0%", bottom, "100%", bottom))
    return drawing(name, bottom + 24, *parts)


def forest(comparison: Comparison, units: Units, arms: Sequence[ArmResult], baseline: str) -> Figure:
    """Each arm's paired difference from the baseline with its interval, and every seed's difference as a dot."""
    rows, table = [], []
    for arm in arms:
        seeds = [(s, d) for s, d in zip(comparison.seeds, arm.differences, strict=False) if math.isfinite(d)]
        dots = [(d * units.scale, f"seed {s}: {units.difference(d)}") for s, d in seeds]
        value, interval, result = None, None, "no verdict"
        if good(arm.difference) and good(arm.low) and good(arm.high):
            value, interval = arm.difference * units.scale, (arm.low * units.scale, arm.high * units.scale)
            result = f"{units.difference(arm.difference)} [{units.interval(arm.low, arm.high)}]"
        rows.append(Strip(arm.name, result, kind_of(arm), value, interval, dots))
        each = [units.difference(d) for d in arm.differences]
        table.append([arm.name, units.difference(arm.difference), units.value(arm.low), units.value(arm.high), *each])
    axis = Axis.around([0.0, *(v for row in rows for v in (*(row.interval or ()), *(d for d, _ in row.dots)))], 7)
    ends = ("← worse", "better →") if comparison.higher_is_better else ("← better", "worse →")
    name = f"Paired differences in {units.metric} from {baseline}. " + "; ".join(f"{r.name}: {r.result}" for r in rows)
    unit = "percentage points" if units.percent else f"units of {units.metric}"
    note = (
        f"Difference in {units.metric} from {baseline} on the same seed, in {unit}. Marks are means, bars 95 % intervals, "
        "dots single seeds; the upright line is the baseline."
    )
    header = ["Arm", "Mean difference", "95 % low", "95 % high", *(f"Seed {s}" for s in comparison.seeds)]
    return Figure(
        "forest", "Paired differences", note, [Panel("", strips(name, rows, axis, zero=True, ends=ends))], header, table
    )


def tuning(units: Units, arms: Sequence[ArmResult]) -> Figure | None:
    """The validation score of every configuration tried, with a ring around the chosen one."""
    rows = []
    for arm in arms:
        if not arm.tuning:
            continue
        dots = [(e["score"] * units.scale, settings(e["config"])) for e in arm.tuning if good(e["score"])]
        best = next((e["score"] for e in arm.tuning if e["config"] == arm.config and good(e["score"])), None)
        failed = f", {len(arm.tuning) - len(dots)} failed" if len(dots) < len(arm.tuning) else ""
        result = f"best {units.value(best)} of {len(arm.tuning)}{failed}"
        rows.append(Strip(arm.name, result, "chosen", None if best is None else best * units.scale, None, dots))
    if not rows:
        return None
    axis = Axis.around([d for row in rows for d, _ in row.dots])
    name = f"Validation {units.metric} of the configurations tried. " + "; ".join(f"{r.name}: {r.result}" for r in rows)
    note = f"Validation {units.label} of every configuration that was tried; the ring is around the one chosen."
    return Figure("tuning-figure", "Every configuration tried", note, [Panel("", strips(name, rows, axis, zero=False))])


# -- quality against cost -----------------------------------------------------------------------------------------------
def cost(units: Units, arms: Sequence[ArmResult], higher: bool) -> Figure | None:
    """The mean of the metric against the multiple of the baseline's training FLOPs."""
    found = [(a, a.flops_ratio, a.mean * units.scale) for a in arms if good(a.flops_ratio) and good(a.mean)]
    if all(arm.baseline for arm, _, _ in found):
        return None
    # Where it gets crowded, only what differs from the baseline is named.
    named = [i for i, (arm, _, _) in enumerate(found) if len(found) <= CROWD or kind_of(arm) != "none"]
    height = max(260, 18 * len(named) + 40)
    horizontal = Axis.ratios([x for _, x, _ in found])
    vertical = Axis.around([y for _, _, y in found], margin=0.12)
    points = [(horizontal.at(x), height * (1 - vertical.at(y))) for _, x, y in found]
    parts = level(vertical, height, -8)
    parts += [line("grid", horizontal.x(t), 0, horizontal.x(t), height) for t in horizontal.ticks]
    parts += [words(f"{horizontal.text(t)}×", horizontal.x(t), height + 18, "tick", "middle") for t in horizontal.ticks]
    parts += labels([arm.name for arm, _, _ in found], points, named, height)
    # Marks come last, so that no label's halo covers one.
    parts += [at(f"{100 * x:.2f}%", mark(kind_of(a), y)) for (a, _, _), (x, y) in zip(found, points, strict=True)]
    rows = [[a.name, ratio(x), units.value(a.mean), units.value(a.sd)] for a, x, _ in found]
    title = f"Mean {units.label} against training compute. " + "; ".join(f"{r[0]}: {r[2]} at {r[1]}" for r in rows)
    note = (
        f"Mean test {units.label} against training compute (FLOPs) as a multiple of the baseline's"
        f"{', on a logarithmic scale' if horizontal.log else ''}. {'Up' if higher else 'Down'} and left is better value."
    )
    if len(named) < len(found):
        note += " Arms without a difference are not named in the drawing."
    if missing := [arm.name for arm in arms if not (good(arm.flops_ratio) and good(arm.mean))]:
        note += f" Not shown, for want of a cost or a result: {', '.join(missing)}."
    svg = drawing(title, height + 24, *parts, class_="plot axis")
    header = ["Arm", "Training compute", f"Mean {units.label}", "Standard deviation over seeds"]
    return Figure("cost-figure", "Quality against cost", note, [Panel("", svg)], header, rows)


def trade_off(comparison: Comparison, arms: Sequence[ArmResult]) -> Figure | None:
    """Two metrics that pull against each other: every configuration tried, every arm's mean, and their Pareto front."""
    if comparison.trade_off is None:
        return None
    x, y, x_higher, y_higher = (comparison.trade_off[key] for key in ("x", "y", "x_higher", "y_higher"))
    columns = [f"test_{x}", f"test_{y}"]

    def pairs(frame: DataFrame | None) -> list[tuple[float, float]]:
        if frame is None or any(column not in frame for column in columns):
            return []
        return [(float(a), float(b)) for a, b in frame[columns].to_numpy() if math.isfinite(a) and math.isfinite(b)]

    tried = [(arm, point) for arm in arms for point in pairs(arm.tried)]
    finals = [
        (arm, (sum(a for a, _ in f) / len(f), sum(b for _, b in f) / len(f)))
        for arm in arms
        if (f := pairs(arm.metrics))
    ]
    if not finals:
        return None
    best = front([point for _, point in [*tried, *finals]], x_higher, y_higher)
    height = max(300, 18 * len(finals) + 40)
    # Configurations far from everything that counts must not press flat what is to be compared.
    core = [*best, *(point for _, point in finals)]
    windows = [(2 * min(v) - max(v), 2 * max(v) - min(v)) for v in zip(*core, strict=True)]
    everywhere = tried
    tried = [(a, p) for a, p in tried if all(lo <= v <= hi for v, (lo, hi) in zip(p, windows, strict=True))]
    shown = [*core, *(point for _, point in tried)]
    horizontal, vertical = (Axis.around([p[i] for p in shown], 6) for i in (0, 1))
    place_of = lambda p: (horizontal.at(p[0]), height * (1 - vertical.at(p[1])))  # noqa: E731
    parts = level(vertical, height, -8)
    parts += [line("grid", horizontal.x(t), 0, horizontal.x(t), height) for t in horizontal.ticks]
    parts += [words(horizontal.text(t), horizontal.x(t), height + 18, "tick", "middle") for t in horizontal.ticks]
    # A staircase: between two points of the front nothing was seen that is better than the worse of both.
    for (x1, y1), (x2, y2) in itertools.pairwise(best):
        corner = (x2, y1)
        for start, end in (((x1, y1), corner), (corner, (x2, y2))):
            (a, b), (c, d) = place_of(start), place_of(end)
            parts.append(line("front", f"{100 * a:.2f}%", b, f"{100 * c:.2f}%", d))
    for arm, point in tried:
        a, b = place_of(point)
        told = f"{arm.name}, a configuration tried: {y} {number(point[1], 3)}, {x} {number(point[0], 3)}"
        parts.append(at(f"{100 * a:.2f}%", tag("circle", tag("title", told), class_="dot", cy=f"{b:.1f}", r="3")))
    points = [place_of(point) for _, point in finals]
    parts += labels([arm.name for arm, _ in finals], points, range(len(finals)), height)
    parts += [at(f"{100 * a:.2f}%", mark(kind_of(arm), b)) for (arm, _), (a, b) in zip(finals, points, strict=True)]
    names = [text.replace("_", " ") for text in (x, y)]
    better = f"{'right' if x_higher else 'left'} and {'up' if y_higher else 'down'} is better"
    note = (
        f"Test {names[1]} (upright) against {names[0]} (across): {better}. Dots are single configurations that tuning tried, on a "
        "tuning split; marks are the tuned arms' means over the final seeds; the line joins what nothing else beats in both."
    )
    if left_out := len(everywhere) - len(tried):
        note += f" {left_out} of {len(everywhere)} configurations lie far outside the picture."
    rows = [
        [arm.name, number(point[0], 4), number(point[1], 4), "yes" if point in best else "no"] for arm, point in finals
    ]
    title = f"{names[1].capitalize()} against {names[0]}"
    told = f"{title}. " + "; ".join(f"{r[0]}: {r[2]} at {r[1]}" for r in rows)
    svg = drawing(told, height + 24, *parts, class_="plot axis")
    header = ["Arm", f"Mean {names[0]}", f"Mean {names[1]}", "On the front"]
    return Figure("trade-off-figure", title, note, [Panel("", svg)], header, rows)


def front(points: Sequence[tuple[float, float]], x_higher: bool, y_higher: bool) -> list[tuple[float, float]]:
    """The Pareto front: points that no other one equals or beats in both coordinates, from the best x to the best y."""
    sign_x, sign_y = (1 if higher else -1 for higher in (x_higher, y_higher))
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda p: (-sign_x * p[0], -sign_y * p[1])):
        if not found or sign_y * point[1] > sign_y * found[-1][1]:
            found.append(point)
    return found


def level(axis: Axis, height: float, x: float) -> list[Markup]:
    """Horizontal grid lines with their numbers at ``x`` pixels."""
    down = [(t, height * (1 - axis.at(t))) for t in axis.ticks]
    numbers = [at("0%", words(axis.text(t), f"{x:g}", y + 4, "tick", "end")) for t, y in down]
    return [line("grid", "0%", y, "100%", y) for _, y in down] + numbers


def labels(
    names: Sequence[str], points: Sequence[tuple[float, float]], named: Iterable[int], height: float
) -> list[Markup]:
    """Names beside the marks at (x in [0, 1], y) of those that are ``named``, each with a line to its mark."""
    parts = []
    for i, label_y in place(points, named, height).items():
        (x, y), side = points[i], 1 if points[i][0] < 0.5 else -1
        leader = tag("path", class_="leader", d=f"M{6 * side},{y:.1f}L{16 * side},{label_y:.1f}")
        anchor, down = "start" if side > 0 else "end", round(label_y + 4, 1)
        name = label(names[i], NARROW - 3, WIDE - 25, f"{19 * side}", down, "label halo", anchor)
        parts.append(at(f"{100 * x:.2f}%", leader, name))
    return parts


def place(
    points: Sequence[tuple[float, float]], named: Iterable[int], height: float, gap: float = 17
) -> dict[int, float]:
    """For marks at (x in [0, 1], y), where labels of some go: near their mark, off other labels and off other marks."""
    placed: dict[int, float] = {}
    for i in named:
        x, y = points[i]
        # A label lies to the right of a mark in the left half, and to the left of one in the right half.
        marks = [v for u, v in points if (u - x) * (0.5 - x) > 0 and abs(u - x) > 0.02]
        nearest = sorted((abs(gap / 2 + k - y), gap / 2 + k) for k in range(int(height - gap)))
        free = [v for _, v in nearest if all(abs(v - other) >= gap for other in placed.values())] or [y]
        placed[i] = next((v for v in free if all(abs(v - other) >= 12 for other in marks)), free[0])
    return placed


# -- learning curves ----------------------------------------------------------------------------------------------------
def curves(units: Units, arms: Sequence[ArmResult], higher: bool) -> list[Figure]:
    """For each quantity recorded by epoch, a panel an arm: its mean over seeds, its range, and the baseline's mean."""
    metric = units.metric.replace(" ", "_")
    known = [str(c) for arm in arms for c in arm.curves.columns]
    first = [f"test_{metric}", f"validation_{metric}", f"train_{metric}"]
    wanted = [c for c in dict.fromkeys([*first, *(c for c in known if c.endswith("loss"))]) if c in known]
    made = []
    for column in wanted[:5]:
        ours = column in first
        made.append(curve(arms, column, units.scale if ours else 1.0, units.decimals if ours else 3, higher and ours))
    return [figure for figure in made if figure]


def curve(arms: Sequence[ArmResult], column: str, scale: float, decimals: int, higher: bool) -> Figure | None:
    bands = {arm.name: band(arm.curves, column, scale) for arm in arms}
    bands = {name: points for name, points in bands.items() if points}
    if not bands:
        return None
    title = column.replace("_", " ").capitalize() + (" (%)" if scale == 100 else "")
    # The steep first epochs, or an arm that explodes, must not press flat what is to be compared.
    everything = sorted((v for points in bands.values() for p in points for v in p[1:]), reverse=not higher)
    vertical = Axis.around(everything[len(everything) // 12 :], 5)
    last = max(points[-1][0] for points in bands.values())
    start = min(points[0][0] for points in bands.values())
    baseline = next((bands[arm.name] for arm in arms if arm.baseline and arm.name in bands), [])
    panels, rows = [], []
    marks = sorted({round(start + (last - start) * i / 8) for i in range(9)})
    for arm in arms:
        points = bands.get(arm.name)
        if not points:
            continue
        best = max(points, key=lambda p: p[1] if higher else -p[1])
        ends = [f"{number(p[1], decimals)} in epoch {p[0] + 1}" for p in (points[0], points[-1], best)]
        name = f"{arm.name}: {title} from {ends[0]} to {ends[1]}; {'highest' if higher else 'lowest'} {ends[2]}"
        reference = [] if arm.baseline else baseline
        panels.append(Panel(short(arm.name, 44), panel(name, points, reference, vertical, start, last)))
        means = {epoch: mean for epoch, mean, _, _ in points}
        rows.append([arm.name, *(number(means.get(epoch), decimals) for epoch in marks)])
    note = (
        "Line: mean over seeds. Band: from the lowest to the highest seed. Dashed: the baseline's mean. "
        "All panels have the same scales, which may leave out the steep beginning."
    )
    return Figure(f"curve-{column}", title, note, panels, ["Mean by arm", *(f"Epoch {e + 1}" for e in marks)], rows)


def band(frame: DataFrame, column: str, scale: float) -> list[tuple[int, float, float, float]]:
    """(epoch, mean, lowest, highest) over the seeds, where there is a finite value."""
    if column not in frame or "epoch" not in frame:
        return []
    finite = frame.loc[frame[column].abs() < math.inf]
    grouped = finite.groupby("epoch")[column].agg(["mean", "min", "max"]) * scale
    return [
        (int(str(epoch)), float(row["mean"]), float(row["min"]), float(row["max"])) for epoch, row in grouped.iterrows()
    ]


def panel(name: str, points: list[Any], reference: list[Any], vertical: Axis, start: int, last: int) -> Markup:
    height = 120

    def path(class_: str, values: list[tuple[int, float]], end: str = "") -> Markup:
        d = f"M{outline(values, start, last, vertical)}{end}"
        return tag("path", class_=class_, d=d, vector_effect="non-scaling-stroke")

    area = [*((epoch, high) for epoch, _, _, high in points), *((epoch, low) for epoch, _, low, _ in reversed(points))]
    drawn = [path("band", area, "Z"), *([path("reference", [p[:2] for p in reference])] if reference else [])]
    drawn.append(path("curve", [p[:2] for p in points]))
    box = tag("svg", *drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=f"{height}")
    ends = (
        words(f"{start + 1}", "0%", height + 15, "tick"),
        words(f"epoch {last + 1}", "100%", height + 15, "tick", "end"),
    )
    return drawing(name, height + 20, *level(vertical, height, -6), *ends, box, class_="plot panel-plot")


def outline(points: Sequence[tuple[int, float]], start: int, last: int, vertical: Axis) -> str:
    """Points in the stretched box, for a path. A single epoch is drawn as a line across."""
    wide = [(points[0][0], points[0][1]), (start + 1, points[0][1])] if last == start else points
    span = max(1, last - start)
    # Far outside the box the exact place does not matter, and a very large number might not be drawn.
    return "L".join(
        f"{1000 * (e - start) / span:.0f},{1000 * (1 - min(9, max(-9, vertical.at(v)))):.0f}" for e, v in wide
    )


# -- configurations -----------------------------------------------------------------------------------------------------
def good(x: float | None) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)


def setting(value: object) -> str:
    """One setting as a reader wants it: four figures of a number."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {setting(value)}" for key, value in config.items()) or "no settings"
