"""The statistics of a trial: paired differences, their intervals, correction for many arms, and verdicts in words.

Five seeds are few. A percentile or BCa bootstrap of five values under-covers, and the smallest p-value of a permutation
test of five pairs is 2/32 = 0.0625. So the interval is Student's t on the paired differences ``d`` of ``n`` seeds:

    mean(d) +- t(level, n - 1) * sqrt(var(d) * (1 / n + correction)),    correction = n_test / n_train or 0

Where every seed brings test data of its own, the differences are independent and ``correction`` is 0. Where seeds re-split
one finite data set, training and test sets overlap and the plain variance is too small; ``correction`` is then
``n_test / n_train`` (Nadeau and Bengio: Inference for the generalization error. Machine Learning 52, 2003). It assumes
the correlation between splits to be ``n_test / (n_test + n_train)``, which is a rule of thumb and no theorem.
`benchmarks/calibration.py` measures the error rates and the coverage of both.

p-values are corrected over the arms of a trial by Holm's step-down procedure (Holm: A simple sequentially rejective
multiple test procedure. Scandinavian Journal of Statistics 6, 1979), which assumes nothing about how arms depend on each
other. Intervals are not corrected: each covers its own true difference with the stated probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# scipy.stats takes half a second to import and 0.2 ms a call; these two are what its t distribution is made of.
from scipy.special import stdtr, stdtrit

from equipoise.errors import check_choice, check_range, refuse

Verdict = Literal["better", "no difference seen", "worse"]
Values = Sequence[float] | np.ndarray
VERDICTS: tuple[Verdict, ...] = ("better", "no difference seen", "worse")


@dataclass(frozen=True)
class Estimate:
    """A paired difference (arm minus baseline), its interval [low, high], its uncorrected two-sided p and n pairs.

    p is NaN where the difference is the same number on every seed, so that nothing tells it from chance.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(values: Values, baseline: Values, *, correction: float = 0.0, level: float = 0.95) -> Estimate:
    """Student's t interval and two-sided p-value for the mean of ``values - baseline``, paired by position (seed).

    values, baseline: n >= 2 finite numbers each. correction: added to 1/n in the variance; n_test / n_train where seeds
    re-split one data set, else 0. level: of the interval, in (0, 1).

    Differences that are all zero give the interval [0, 0] and p = 1. Differences that are all the same number other than
    zero (up to rounding) give low = high = difference and p = NaN, no test: they come from a deterministic method, or from a
    metric of few steps such as accuracy, where one more right answer on each of three seeds is chance and no proof.

    Raises ``ArgumentError`` for fewer than two pairs, unequal lengths, or a number that is not finite.
    """
    check_range("correction", correction, 0.0, math.inf, open_high=True)
    check_range("level", level, 0.0, 1.0, open_low=True, open_high=True)
    ours, theirs = _finite("values", values), _finite("baseline", baseline)
    n = len(ours)
    if len(theirs) != n:
        refuse("values, baseline", (n, len(theirs)), "have one number for each seed in both", "Pair them by seed")
    if n < 2:
        refuse("seeds", n, "be at least 2 to tell a difference from chance", "Use --seeds 5, or more")
    differences = ours - theirs
    mean = float(differences.mean())
    deviation = float(differences.std(ddof=1))
    # Subtraction alone makes equal differences unequal by about this much.
    rounding = 4 * np.finfo(float).eps * float(max(np.abs(ours).max(), np.abs(theirs).max()))
    if deviation <= rounding:
        if abs(mean) <= rounding:
            return Estimate(0.0, 0.0, 0.0, 1.0, n)
        return Estimate(mean, mean, mean, math.nan, n)
    error = deviation * math.sqrt(1 / n + correction)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Estimate(mean, mean - half, mean + half, p, n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected by Holm's step-down procedure, in the order given.

    The i-th smallest of m (i from 1) is multiplied by m - i + 1, kept at least as large as the one before and at most 1.
    None or NaN stands for an arm that was not tested (its runs failed, or differ by the same number on every seed): it
    stays None and does not count in m.
    """
    tested = [(p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p)]
    corrected: list[float | None] = [None] * len(p_values)
    smallest = 0.0
    for rank, (p, i) in enumerate(sorted(tested)):
        check_range("p_values", p, 0.0, 1.0)
        smallest = max(smallest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = smallest
    return corrected


def interquartile_mean(values: Values) -> float:
    """Mean of the middle half of the values: a typical run, with outliers on both sides left out.

    Exactly a quarter of the weight is cut off at each end, also where that divides a value: of five sorted values the
    result is (0.75 b + c + 0.75 d) / 2.5. (``scipy.stats.trim_mean(values, 0.25)`` cuts whole values only, so that of five
    it keeps the middle 60 %, and of three all.) Needs one finite value or more.
    """
    ordered = np.sort(_finite("values", values))
    n = len(ordered)
    if n == 0:
        refuse("values", [], "hold at least one number")
    # In quarters of a value, the i-th one spans [4i, 4i + 4) and the middle half of all spans [n, 3n): no rounding.
    start = 4 * np.arange(n)
    weights = np.clip(np.minimum(start + 4, 3 * n) - np.maximum(start, n), 0, None)
    return float(weights @ ordered / (2 * n))


def verdict(estimate: Estimate, p_holm: float | None, higher_is_better: bool, alpha: float = 0.05) -> Verdict:
    """What may be said of an arm: a difference only if Holm's p is below ``alpha`` and the interval excludes zero.

    p_holm: from ``holm`` over all arms; None is an arm that was not tested, of which nothing is said.
    """
    check_range("alpha", alpha, 0.0, 1.0, open_low=True, open_high=True)
    if p_holm is None or not p_holm < alpha or estimate.low <= 0 <= estimate.high:
        return "no difference seen"
    return "better" if (estimate.difference > 0) == higher_is_better else "worse"


def sentence(
    name: str,
    baseline: str,
    estimate: Estimate,
    verdict: Verdict,
    metric: str,
    *,
    p_holm: float | None,
    percent: bool = False,
) -> str:
    """The verdict in words, with the difference, its interval, Holm's p and the number of seeds.

    percent: the metric lies in [0, 1], as accuracy does, and differences are shown in points of a hundred; else as plain
    numbers. Numbers are rounded to two figures of the interval's half width, but never to a zero that they are not.
    """
    check_choice("verdict", verdict, VERDICTS)
    metric = metric.replace("_", " ")
    unit = " points" if percent else ""
    difference, low, high = (_number(x, estimate, percent) for x in (estimate.difference, estimate.low, estimate.high))
    interval = f"[{low.lstrip('+')}, {high.lstrip('+')}]"
    tail = (f", {_p_value(p_holm)}" if p_holm is not None else "") + f", {estimate.n} seeds"
    if verdict != "no difference seen":
        return f"{name} is {verdict} than {baseline}: {metric} {difference}{unit} {interval}{tail}"
    start = f"no difference seen between {name} and {baseline}: {metric}"
    if estimate.low == estimate.high == 0:
        return f"{start} is the same on each of {estimate.n} seeds"
    if p_holm is None:
        return f"{start} {difference}{unit} on each of {estimate.n} seeds, and without any spread chance cannot be told; add seeds"
    if estimate.low <= 0 <= estimate.high:
        return f"{start} {difference}{unit}, the data are compatible with anything from {low} to {high}{unit}{tail}"
    return f"{start} {difference}{unit} {interval} taken alone, which does not stand once corrected for the number of arms{tail}"


def _finite(argument: str, values: Values) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        refuse(argument, f"an array of shape {numbers.shape}", "be a flat list of numbers")
    if not np.isfinite(numbers).all():
        refuse(argument, numbers.tolist(), "be finite", "Leave an arm with failed runs out")
    return numbers


def _number(value: float, estimate: Estimate, percent: bool) -> str:
    """A signed number with as many decimals as the interval is worth."""
    scale = 100.0 if percent else 1.0
    half = (estimate.high - estimate.low) / 2 or abs(estimate.difference)
    decimals = max(1 if percent else 0, 1 - math.floor(math.log10(scale * half))) if half > 0 else 1
    text = f"{scale * value:+.{min(decimals, 15)}f}"
    if decimals > 6 or (value != 0 and float(text) == 0):
        text = f"{scale * value:+.2g}"
    return text.lstrip("+-") if float(text) == 0 else text


def _p_value(p: float) -> str:
    """``Holm p = 0.012``, with more figures where three would put it on the wrong side of 0.05."""
    if p < 0.001:
        return "Holm p < 0.001"
    for decimals in (2 if p >= 0.1 else 3, 4, 5, 6):
        text = f"{p:.{decimals}f}"
        if (float(text) < 0.05) == (p < 0.05):
            break
    return f"Holm p = {text}"
