"""Gaps, divergences and scores against numbers by hand, scikit-learn and scipy; the encoding of protected attributes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from equipoise.errors import ArgumentError, DataError
from equipoise.fairness.metrics import (
    group_means,
    jensen_shannon_divergence,
    parity_gap,
    ranked_probability_score,
    unfairness,
)
from equipoise.fairness.protected import ProtectedEncoder, detect_kind, intersections


def draw(n: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, groups, (n,), generator=g)
    return (torch.rand(n, generator=g, dtype=torch.float64) + 0.1 * codes).clamp(max=1), codes


# -- metrics ----------------------------------------------------------------------------------------------------------
def test_oracle_9_identical_and_disjoint_groups() -> None:
    once = torch.linspace(0, 1, 50)
    both, halves = once.repeat(2), torch.arange(2).repeat_interleave(50)
    assert jensen_shannon_divergence(both, halves).item() == pytest.approx(0, abs=1e-12)
    assert unfairness(both, halves).item() == pytest.approx(0, abs=1e-12)
    apart = torch.cat([once, once + 100])
    assert jensen_shannon_divergence(apart, halves).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("weights", ["proportion", "equal"])
def test_divergence_is_that_of_kernel_densities(weights: str) -> None:
    from sklearn.neighbors import KernelDensity

    values, codes = draw(60, 3)
    points = np.linspace(values.min(), values.max(), 200)[:, None]
    densities = []
    for g in range(3):
        members = values[codes == g].numpy()[:, None]
        p = np.exp(KernelDensity(kernel="gaussian", bandwidth=0.15).fit(members).score_samples(points))
        densities.append(p / p.sum())
    shares = [float((codes == g).double().mean()) if weights == "proportion" else 1 / 3 for g in range(3)]

    def entropy(p: Any) -> float:
        return -sum(max(v, 1e-10) * math.log2(max(v, 1e-10)) for v in p)

    mixed = sum(s * p for s, p in zip(shares, densities, strict=True))
    expected = entropy(mixed) - sum(s * entropy(p) for s, p in zip(shares, densities, strict=True))
    got = jensen_shannon_divergence(values, codes, grid=200, weights=weights)
    assert got.item() == pytest.approx(expected, abs=1e-9)


def test_divergence_in_blocks_and_of_constants(monkeypatch: Any) -> None:
    values, codes = draw(101, 4)
    whole = jensen_shannon_divergence(values.float(), codes * 7 - 3)  # codes may be any integers
    monkeypatch.setattr("equipoise.fairness.metrics.NUMBERS", 10_000)
    torch.testing.assert_close(jensen_shannon_divergence(values.float(), codes), whole)
    assert jensen_shannon_divergence(torch.full((9,), 0.3), torch.arange(9) % 2).item() == pytest.approx(0, abs=1e-12)
    assert jensen_shannon_divergence(values, torch.zeros(101, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-12)


def test_group_means_gap_and_unfairness_by_hand() -> None:
    values, codes = torch.tensor([0.0, 1, 1, 1, 0, 4]), torch.tensor([3, 3, 5, 5, 8, 9])
    means, sizes = group_means(values, codes)
    assert means.tolist() == [0.5, 1, 0, 4] and sizes.tolist() == [2, 2, 1, 1]
    assert parity_gap(values, codes).item() == 4
    assert parity_gap(values, codes, smallest=2).item() == 0.5
    assert parity_gap(values, codes, smallest=3).item() == 0
    frame = pd.DataFrame({"p": values.numpy(), "g": codes.numpy()})
    expected = frame.groupby("g")["p"].mean().var(ddof=1) / frame["p"].var(ddof=1)
    assert unfairness(values, codes).item() == pytest.approx(expected)
    assert unfairness(values, torch.zeros(6, dtype=torch.int64)).item() == 0
    assert unfairness(torch.ones(6), codes).item() == 0
    one_hot = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    assert parity_gap(one_hot, torch.tensor([0, 0, 1, 1])).item() == 0.5


def test_the_gap_is_fairlearns_demographic_parity_difference() -> None:
    fairlearn = pytest.importorskip("fairlearn.metrics")
    values, codes = draw(200, 5)
    decided = (values > 0.6).long()
    theirs = fairlearn.demographic_parity_difference(decided, decided, sensitive_features=codes.numpy())
    assert parity_gap(decided, codes).item() == pytest.approx(theirs)


def test_ranked_probability_score() -> None:
    from scipy.stats import poisson

    p, y = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0, 1, 1])
    assert ranked_probability_score(p, y).item() == pytest.approx((0.04 + 0.01 + 0.25) / 3)
    assert ranked_probability_score(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])).item() == 0
    rates, counts = torch.tensor([0.1, 2.5, 0.0]), torch.tensor([0, 4, 0])
    expected = np.mean(
        [
            sum((poisson.cdf(k, float(r)) - (c <= k)) ** 2 for k in range(7))
            for r, c in zip(rates.double(), counts.tolist(), strict=True)
        ]
    )
    got = ranked_probability_score(rates, counts, family="poisson", max_count=6)
    assert got.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: jensen_shannon_divergence(p, g, bandwidth=0.0), "bandwidth = 0.0"),
        (lambda p, g: jensen_shannon_divergence(p, g, grid=1), "grid = 1: must be an integer >= 2"),
        (lambda p, g: jensen_shannon_divergence(p, g, weights="size"), "weights = 'size'"),
        (
            lambda p, g: jensen_shannon_divergence(p[:, None].expand(6, 2), g),
            r"prediction has shape \(6, 2\).*one class",
        ),
        (lambda p, g: unfairness(p, g[:5]), r"prediction, groups have shapes \(6,\), \(5,\)"),
        (lambda p, g: parity_gap(p[:0], g[:0]), r"shapes \(0,\), \(0,\): must be \(n,\) and \(n,\), n >= 1"),
        (lambda p, g: parity_gap(p, g, smallest=0), "smallest = 0"),
        (lambda p, g: ranked_probability_score(p, g, family="normal"), "family = 'normal'"),
        (lambda p, g: ranked_probability_score(p, g, max_count=-1), "max_count = -1"),
    ],
)
def test_bad_input_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(torch.rand(6), torch.arange(6) % 2)


# -- the encoder ------------------------------------------------------------------------------------------------------
TABLE = pd.DataFrame(
    {
        "sex": ["m", "f", "m", "f"],
        "race": ["b", "a", "c", "a"],
        "age": [20, 60, 40, 30],
        "paid": [True, False, True, True],
    }
)


def test_each_kind_is_encoded() -> None:
    encoder = ProtectedEncoder().fit(TABLE, ["binary", "categorical", "continuous", "binary"])
    sex, race, age, paid = encoder.transform(TABLE)
    assert sex.tolist() == [1, 0, 1, 0] and paid.tolist() == [1, 0, 1, 1]
    assert race.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert age.tolist() == [0, 1, 0.5, 0.25]
    assert all(column.dtype == torch.float32 for column in (sex, race, age, paid))
    assert encoder.values == {"sex": ["f", "m"], "race": ["a", "b", "c"], "paid": ["False", "True"]}
    (beyond,) = encoder.transform({**TABLE, "age": [80, 0, 20, 60]})[2:3]
    assert beyond.tolist() == [1.5, -0.5, 0, 1]


def test_columns_come_in_any_form() -> None:
    kinds = {"0": "categorical", "1": "continuous"}
    columns = [torch.tensor([2, 10, 2]), np.array([0.0, 1.0, 4.0])]
    encoder = ProtectedEncoder().fit(columns, kinds)
    assert encoder.values == {"0": ["2", "10"]}  # in the order of the numbers
    assert [c.tolist() for c in encoder.transform(columns)] == [[[1, 0], [0, 1], [1, 0]], [0, 0.25, 1]]
    assert encoder.transform([["10", "2"], [0, 0]])[0].tolist() == [[0, 1], [1, 0]]  # 10 and "10" are spelt alike


def test_kinds_are_detected() -> None:
    numbers = pd.Series(np.arange(11.0))
    assert detect_kind(pd.Series([0, 1, 1])) == detect_kind(pd.Series(["x", "y"])) == "binary"
    assert detect_kind(numbers) == "continuous"
    assert detect_kind(numbers[:10]) == detect_kind(numbers.astype(str)) == "categorical"
    assert ProtectedEncoder().fit(TABLE).kinds == ["binary", "categorical", "categorical", "binary"]


def test_an_unseen_category_is_a_row_of_zeros_with_a_warning() -> None:
    encoder = ProtectedEncoder().fit({"race": ["a", "b", "c"]}, ["categorical"])
    with pytest.warns(UserWarning, match="'race' is 'z' in data row 2, which the training data lack: encoded as zeros"):
        (race,) = encoder.transform({"race": ["b", "z"]})
    assert race.tolist() == [[0, 1, 0], [0, 0, 0]]
    with pytest.warns(UserWarning, match="encoded as zeros"):
        assert encoder.groups({"race": ["b", "z"]})["race"].tolist() == [1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.transform({"race": ["c", "a"]})


def test_groups_and_their_intersections() -> None:
    encoder = ProtectedEncoder().fit(TABLE, ["binary", "categorical", "continuous", "binary"])
    groups = encoder.groups(TABLE, bins=2)
    assert {name: g.tolist() for name, g in groups.items()} == {
        "sex": [1, 0, 1, 0],
        "race": [1, 0, 2, 0],
        "age": [0, 1, 1, 0],  # the median is 35
        "paid": [1, 0, 1, 1],
    }
    assert encoder.groups({**TABLE, "age": [0, 35, 34.9, 99]}, bins=2)["age"].tolist() == [0, 1, 0, 1]
    assert encoder.groups(TABLE, bins=4)["age"].tolist() == [0, 3, 2, 1]
    first, second = (
        {"a": torch.tensor([0, 1, 0]), "b": torch.tensor([5, 5, 5])},
        {"a": torch.tensor([1]), "b": torch.tensor([5])},
    )
    one, two = intersections(first, second)
    assert one.tolist() == [0, 1, 0] and two.tolist() == [1]


@pytest.mark.parametrize(
    ("columns", "kinds", "error", "message"),
    [
        ({"s": ["x"] * 4}, ["binary"], DataError, "'s' is 'x' in all 4 rows: a constant has no groups"),
        ({"s": [2.0] * 4}, ["continuous"], DataError, "'s' is '2' in all 4 rows"),
        ({"s": ["x", None, "y"]}, ["binary"], DataError, "'s' is missing in data row 2: fill it in"),
        ({"s": [1.0, float("nan"), 3.0]}, ["continuous"], DataError, "'s' is missing in data row 2"),
        ({"s": [1.0, float("inf"), 3.0]}, ["continuous"], DataError, "'s' is 'inf' in data row 2"),
        ({"s": ["1", "x", "3"]}, ["continuous"], DataError, "'s' is 'x' in data row 2: a continuous one is a finite"),
        ({"s": ["x", "y", "z"]}, ["binary"], DataError, "'s' has 3 values: a binary one has 2. Call it categorical"),
        ({"s": []}, ["binary"], DataError, "'s' has no rows"),
        ({"s": [0, 1]}, ["ordinal"], ArgumentError, "kinds = 'ordinal': must be one of 'continuous'"),
        ({"s": [0, 1]}, {"t": "binary"}, ArgumentError, "kinds = None: must be one of"),
        ({"s": [0, 1]}, ["binary", "binary"], ArgumentError, "must name one kind for each of s"),
        ({"s": [0, 1], "t": [1]}, ["binary", "binary"], ArgumentError, "columns have shapes"),
        ([torch.zeros(3, 2)], ["continuous"], ArgumentError, "columns have shapes"),
    ],
)
def test_attributes_that_cannot_be_encoded_are_refused(columns: Any, kinds: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ProtectedEncoder().fit(columns, kinds)


def test_other_data_must_have_the_same_attributes() -> None:
    encoder = ProtectedEncoder().fit(TABLE, ["binary", "categorical", "continuous", "binary"])
    with pytest.raises(DataError, match="protected attribute 'age' is missing; given are sex, race, paid"):
        encoder.transform(TABLE.drop(columns="age"))
    with pytest.raises(
        DataError, match=r"'sex' is 'x' in data row 1, which the training data lack\. Correct these rows"
    ):
        encoder.transform(TABLE.assign(sex=["x", "m", "f", "f"]))
    with pytest.raises(DataError, match="'race' is missing in data rows 1, 2"):
        encoder.transform(TABLE.assign(race=[None, None, "a", "b"]))
    with pytest.raises(ArgumentError, match="bins = 1"):
        encoder.groups(TABLE, bins=1)
    with pytest.raises(ArgumentError, match="ProtectedEncoder is not fitted"):
        ProtectedEncoder().transform(TABLE)
