"""Statistics: against scipy, against numbers worked out by hand, and what the sentences may say."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats

from equipoise.comparison.statistics import Estimate, holm, interquartile_mean, paired_difference, sentence, verdict
from equipoise.errors import ArgumentError

BASELINE = [0.70, 0.72, 0.69, 0.75, 0.71]
BETTER = [0.74, 0.75, 0.73, 0.77, 0.76]


# -- paired_difference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_equals_scipys_paired_t_test(n: int, level: float) -> None:
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    expected = scipy.stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(level)
    found = paired_difference(ours, theirs, level=level)
    assert found.n == n
    assert found.difference == pytest.approx((ours - theirs).mean(), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_corrected_variance_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, variance 1; with n_test / n_train = 1/4 the variance of the mean is 1/3 + 1/4 = 7/12.
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], correction=0.25)
    half = 4.302652729911275 * math.sqrt(7 / 12)  # 97.5 % quantile of t with 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    t = 2 / math.sqrt(7 / 12)
    assert found.p == pytest.approx(
        1 - t / math.sqrt(2 + t * t), rel=1e-9
    )  # closed form of t with 2 degrees of freedom


def test_p_and_interval_agree_and_swap_with_the_arms() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        ours, theirs = rng.normal(0, 1, 5) + 0.8, rng.normal(0, 1, 5)
        correction = float(rng.choice([0.0, 0.25]))
        found = paired_difference(ours, theirs, correction=correction)
        swapped = paired_difference(theirs, ours, correction=correction)
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
        assert (swapped.difference, swapped.low, swapped.high) == (-found.difference, -found.high, -found.low)
        assert swapped.p == found.p


def test_no_difference_on_any_seed() -> None:
    assert paired_difference(BASELINE, BASELINE) == Estimate(0.0, 0.0, 0.0, 1.0, 5)


def test_the_same_difference_on_every_seed() -> None:
    baseline = [0.1, 0.2, 0.3, 0.7]
    shifted = [value + 0.1 for value in baseline]
    assert np.std(np.subtract(shifted, baseline)) > 0  # rounding makes equal differences unequal
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(shifted, baseline)
    assert found.low == found.difference == found.high == pytest.approx(0.1)
    assert np.isnan(found.p)


def test_one_more_right_answer_on_every_seed_is_no_proof() -> None:
    """Accuracies on 359 examples move in steps: the same small difference on three seeds is chance, not p = 0."""
    ours, theirs = np.array([335, 337, 336]) / 359, np.array([334, 336, 335]) / 359
    found = paired_difference(ours, theirs, correction=1 / 3)
    adjusted = holm([found.p, 0.03])
    assert adjusted == [None, 0.03]
    assert verdict(found, adjusted[0], True) == "no difference seen"


def test_refuses_what_cannot_be_estimated() -> None:
    with pytest.raises(ArgumentError, match=r"seeds = 1: must be at least 2.*--seeds"):
        paired_difference([0.7], [0.6])
    with pytest.raises(ArgumentError, match="seeds = 0"):
        paired_difference([], [])
    with pytest.raises(ArgumentError, match="one number for each seed"):
        paired_difference(BETTER, BASELINE[:4])
    for bad in (math.nan, math.inf):
        with pytest.raises(ArgumentError, match=r"values = .*must be finite"):
            paired_difference([bad, *BETTER[1:]], BASELINE)
        with pytest.raises(ArgumentError, match=r"baseline = .*must be finite"):
            paired_difference(BETTER, [*BASELINE[:4], bad])
    with pytest.raises(ArgumentError, match="correction"):
        paired_difference(BETTER, BASELINE, correction=-0.1)
    with pytest.raises(ArgumentError, match="level"):
        paired_difference(BETTER, BASELINE, level=1.0)
    with pytest.raises(ArgumentError, match="flat list"):
        paired_difference([BETTER], [BASELINE])  # type: ignore[list-item]


# -- holm ---------------------------------------------------------------------------------------------------------------
def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to 0.06, the one before), 0.2 * 1.
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.8, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_leaves_out_arms_that_were_not_tested() -> None:
    assert holm([0.01, None, 0.02, math.nan]) == [0.02, None, 0.02, None]
    assert holm([None]) == [None]


def test_holm_rejects_what_the_closed_test_of_bonferronis_rejects() -> None:
    # Holm is the closure of Bonferroni: a hypothesis falls if every set it belongs to is rejected by Bonferroni's test.
    rng = np.random.default_rng(1)
    for _ in range(50):
        p = list(rng.uniform(0, 0.1, 4))
        for i, corrected in enumerate(holm(p)):
            sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size) if i in s]
            assert corrected == pytest.approx(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(ArgumentError, match="p_values"):
        holm([0.5, 1.2])


# -- interquartile_mean ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 3.0], 2.0),
        (
            [0.0, 6.0, 100.0],
            (0 + 4 * 6 + 100) / 6,
        ),  # a quarter of the weight is 3/4 of a value: 1/4 of each end is left
        ([-50.0, 1.0, 2.0, 99.0], 1.5),
        ([-50.0, 1.0, 2.0, 4.0, 99.0], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),
        ([float(i) for i in range(8)], 3.5),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert interquartile_mean(values) == pytest.approx(expected, rel=1e-12)
    assert interquartile_mean(values[::-1]) == interquartile_mean(values)


def test_interquartile_mean_against_a_fine_grid() -> None:
    rng = np.random.default_rng(2)
    for n in (3, 5, 6, 7, 10, 12, 13):
        values = rng.normal(size=n)
        grid = np.repeat(np.sort(values), 4)  # 4n equal parts, of which the middle 2n are averaged
        assert interquartile_mean(values) == pytest.approx(grid[n : 3 * n].mean(), rel=1e-12)
        if n % 4 == 0:
            assert interquartile_mean(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25), rel=1e-12)


def test_interquartile_mean_refuses() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        interquartile_mean([])
    with pytest.raises(ArgumentError, match="finite"):
        interquartile_mean([1.0, math.nan])


# -- verdict ----------------------------------------------------------------------------------------------------------------
def test_verdict_needs_both_the_p_value_and_the_interval() -> None:
    up, down, wide = Estimate(3, 1, 5, 0.01, 5), Estimate(-3, -5, -1, 0.01, 5), Estimate(3, -1, 7, 0.1, 5)
    assert verdict(up, 0.02, higher_is_better=True) == "better"
    assert verdict(up, 0.02, higher_is_better=False) == "worse"
    assert verdict(down, 0.02, higher_is_better=True) == "worse"
    assert verdict(down, 0.02, higher_is_better=False) == "better"
    for higher in (True, False):
        assert verdict(up, 0.05, higher) == "no difference seen"
        assert verdict(up, None, higher) == "no difference seen"
        assert verdict(wide, 0.01, higher) == "no difference seen"
        assert verdict(Estimate(2, 0, 4, 0.05, 5), 0.04, higher) == "no difference seen"
    assert verdict(up, 0.02, True, alpha=0.01) == "no difference seen"
    assert verdict(paired_difference(BASELINE, BASELINE), 1.0, True) == "no difference seen"


# -- sentence ---------------------------------------------------------------------------------------------------------------
def test_sentences_in_points() -> None:
    better = Estimate(0.032, 0.011, 0.053, 0.006, 5)
    assert (
        sentence("elr", "cross-entropy", better, "better", "accuracy", p_holm=0.012, percent=True)
        == "elr is better than cross-entropy: accuracy +3.2 points [1.1, 5.3], Holm p = 0.012, 5 seeds"
    )
    null = Estimate(0.004, -0.010, 0.018, 0.46, 5)
    assert sentence("elr", "cross-entropy", null, "no difference seen", "accuracy", p_holm=0.92, percent=True) == (
        "no difference seen between elr and cross-entropy: accuracy +0.4 points, "
        "the data are compatible with anything from -1.0 to +1.8 points, Holm p = 0.92, 5 seeds"
    )


def test_sentences_in_plain_numbers() -> None:
    error = Estimate(-120.4, -190.2, -50.6, 0.0001, 10)
    assert (
        sentence("conr", "plain", error, "better", "mean_squared_error", p_holm=0.0004)
        == "conr is better than plain: mean squared error -120 [-190, -51], Holm p < 0.001, 10 seeds"
    )
    small = Estimate(0.0000312, 0.0000101, 0.0000523, 0.01, 5)
    assert "+0.000031 [0.000010, 0.000052]" in sentence("a", "b", small, "worse", "loss", p_holm=0.01)
    tiny = Estimate(3.12e-9, 1.01e-9, 5.23e-9, 0.01, 5)
    assert "+3.1e-09 [1e-09, 5.2e-09]" in sentence("a", "b", tiny, "worse", "loss", p_holm=0.01)


def test_a_sentence_never_rounds_an_end_to_zero_or_p_across_the_line() -> None:
    close = Estimate(0.02, 0.00003, 0.03997, 0.0499, 5)
    text = sentence("a", "b", close, "better", "accuracy", p_holm=0.0499, percent=True)
    assert text == "a is better than b: accuracy +2.0 points [0.003, 4.0], Holm p = 0.0499, 5 seeds"
    null = Estimate(0.02, -0.00003, 0.04003, 0.0501, 5)
    above = sentence("a", "b", null, "no difference seen", "accuracy", p_holm=0.0501, percent=True)
    assert "from -0.003 to +4.0 points, Holm p = 0.050, 5 seeds" in above


def test_a_null_that_only_the_correction_made_says_so() -> None:
    alone = Estimate(0.021, 0.002, 0.040, 0.03, 5)
    text = sentence("a", "b", alone, "no difference seen", "balanced_accuracy", p_holm=0.09, percent=True)
    assert text == (
        "no difference seen between a and b: balanced accuracy +2.1 points [0.2, 4.0] taken alone, "
        "which does not stand once corrected for the number of arms, Holm p = 0.090, 5 seeds"
    )
    assert "compatible" not in text


def test_sentences_without_any_spread() -> None:
    same = paired_difference(BASELINE, BASELINE)
    assert (
        sentence("a", "b", same, "no difference seen", "accuracy", p_holm=1.0, percent=True)
        == "no difference seen between a and b: accuracy is the same on each of 5 seeds"
    )
    shifted = paired_difference([0.75, 0.85, 0.5], [0.5, 0.6, 0.25])
    assert (
        sentence("a", "b", shifted, verdict(shifted, None, True), "accuracy", p_holm=None, percent=True)
        == "no difference seen between a and b: accuracy +25.0 points on each of 3 seeds, "
        "and without any spread chance cannot be told; add seeds"
    )


def test_every_sentence_keeps_the_signs_of_its_numbers() -> None:
    rng = np.random.default_rng(3)
    for _ in range(500):
        scale = 10.0 ** rng.uniform(-4, 3)
        found = paired_difference(rng.normal(rng.uniform(-2, 2), 1, 5) * scale, rng.normal(0, 1, 5) * scale)
        decided = verdict(found, found.p, True)
        text = sentence("a", "b", found, decided, "score", p_holm=found.p, percent=bool(rng.integers(2)))
        assert text.startswith("no difference seen" if found.low <= 0 <= found.high else f"a is {decided}")
        assert ("from -" in text and "to +" in text) == (found.low < 0 < found.high)
        assert "-0.0 " not in text and "[0.0," not in text and "e+" not in text


def test_sentence_refuses_an_unknown_verdict() -> None:
    with pytest.raises(ArgumentError, match="verdict = 'great'"):
        sentence("a", "b", Estimate(0, 0, 0, 1, 5), "great", "accuracy", p_holm=1.0)  # type: ignore[arg-type]
