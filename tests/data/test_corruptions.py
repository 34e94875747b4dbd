"""Label noise and long tails: exact properties, and rates within four standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.data.corruptions import (
    instance_noise,
    instance_projection,
    long_tail,
    pair_noise,
    symmetric_noise,
    uniform_noise,
)
from equipoise.errors import ArgumentError

N, C = 40_000, 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, C, (N,), generator=seeded(99))


def near(share: Tensor | float, expected: float, n: int) -> bool:
    return abs(float(share) - expected) < 4 * math.sqrt(expected * (1 - expected) / n) + 1e-12


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_symmetric_rate_and_uniform_choice_of_other_classes(labels: Tensor, rate: float) -> None:
    noisy = symmetric_noise(labels, rate, C, seeded())
    wrong = noisy != labels
    assert near(wrong.double().mean(), rate, N)
    if rate in (0, 1):
        assert wrong.all() == bool(rate)
    if rate:
        step = ((noisy - labels) % C)[wrong]
        assert all(near((step == k).double().mean(), 1 / (C - 1), len(step)) for k in range(1, C))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_uniform_redraws_over_all_classes(labels: Tensor, rate: float) -> None:
    noisy = uniform_noise(labels, rate, C, seeded())
    assert near((noisy != labels).double().mean(), rate * (C - 1) / C, N)
    if rate == 1:
        assert all(near((noisy == c).double().mean(), 1 / C, N) for c in range(C))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_pair_noise_moves_to_the_next_class_only(labels: Tensor, rate: float) -> None:
    noisy = pair_noise(labels, rate, C, seeded())
    step = (noisy - labels) % C
    assert set(step.unique().tolist()) <= {0, 1}
    assert near(step.double().mean(), rate, N)
    if rate == 1:
        assert torch.equal(noisy, (labels + 1) % C)


@pytest.mark.parametrize("noise", [symmetric_noise, uniform_noise, pair_noise])
def test_noise_is_reproducible_nested_and_out_of_place(labels: Tensor, noise) -> None:  # type: ignore[no-untyped-def]
    before, state = labels.clone(), torch.random.get_rng_state()
    low, high = noise(labels, 0.2, C, seeded(5)), noise(labels, 0.5, C, seeded(5))
    assert torch.equal(low, noise(labels, 0.2, C, seeded(5)))
    changed = low != labels
    assert torch.equal(low[changed], high[changed])
    assert torch.equal(labels, before) and torch.equal(torch.random.get_rng_state(), state)
    assert low.dtype == torch.int64
    assert noise(labels[:0], 0.5, C, seeded()).shape == (0,)


def test_two_classes_flip_to_each_other() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    assert symmetric_noise(labels, 1, 2, seeded()).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("rate", [1.2, -0.1, float("nan"), "0.4"])
@pytest.mark.parametrize("noise", [symmetric_noise, uniform_noise, pair_noise])
def test_rates_outside_0_and_1_are_refused(noise, rate) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match="rate"):
        noise(torch.tensor([0, 1]), rate, 2, seeded())
    with pytest.raises(ArgumentError, match="rate"):
        instance_noise(torch.tensor([0, 1]), torch.zeros(2, 3), rate, 2, seeded())


def test_bad_labels_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"values in \[0, 3\]"):
        symmetric_noise(torch.tensor([0, 3]), 0.1, 3, seeded())
    with pytest.raises(ArgumentError, match="integer classes"):
        pair_noise(torch.tensor([0.0, 1.0]), 0.1, 3, seeded())
    with pytest.raises(ArgumentError, match="num_classes"):
        uniform_noise(torch.tensor([0, 0]), 0.1, 1, seeded())


# -- instance-dependent -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_instance_noise_has_its_rate(labels: Tensor, rate: float) -> None:
    inputs = torch.randn(N, 5, generator=seeded(1))
    noisy = instance_noise(labels, inputs, rate, C, seeded())
    assert near((noisy != labels).double().mean(), rate, N)
    assert noisy.dtype == torch.int64 and torch.equal(noisy, instance_noise(labels, inputs, rate, C, seeded()))


def test_instance_noise_matches_its_probabilities() -> None:
    """One input repeated: the wrong labels follow the softmax over the other classes of x W[y]."""
    x, y, n = torch.tensor([0.3, -0.8, 0.5]), 2, 60_000
    weights = instance_projection(3, 4, seeded(8))
    noisy = instance_noise(torch.full((n,), y), x.repeat(n, 1), 0.5, 4, seeded(), projection=weights)
    scores = x @ weights[y]
    scores[y] = -torch.inf
    expected = scores.softmax(0)
    wrong = noisy[noisy != y]
    assert near(len(wrong) / n, 0.5, n)
    assert all(near((wrong == c).double().mean(), float(expected[c]), len(wrong)) for c in range(4) if c != y)


def test_instance_noise_rates_vary_as_the_truncated_normal() -> None:
    """The mean of q near an edge is that of the truncated normal: 0.1009 for rate 0.05."""
    n = 60_000
    noisy = instance_noise(torch.zeros(n, dtype=torch.int64), torch.zeros(n, 1), 0.05, 2, seeded())
    assert near(noisy.double().mean(), 0.1009, n)
    assert not instance_noise(torch.zeros(50, dtype=torch.int64), torch.zeros(50, 1), 0.0, 2, seeded()).any()


def test_instance_noise_depends_on_the_input_and_survives_large_ones() -> None:
    labels = torch.zeros(2000, dtype=torch.int64)
    inputs = torch.randn(2000, 1, 4, 4, generator=seeded(3)) * 1e3
    weights = instance_projection(16, 5, seeded(4))
    noisy = instance_noise(labels, inputs, 0.6, 5, seeded(), projection=weights)
    scores = inputs.flatten(1) @ weights[0]
    favourite = scores[:, 1:].argmax(1) + 1
    wrong = noisy != 0
    assert (noisy[wrong] == favourite[wrong]).double().mean() > 0.99


def test_instance_noise_refuses_misfits() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ArgumentError, match="inputs"):
        instance_noise(labels, torch.zeros(3, 2), 0.1, 2, seeded())
    with pytest.raises(ArgumentError, match="projection"):
        instance_noise(labels, torch.zeros(2, 2), 0.1, 2, seeded(), projection=torch.zeros(2, 3, 2))


# -- long tails -------------------------------------------------------------------------------------------------------
def test_exponential_tail_has_exact_counts() -> None:
    labels = torch.arange(10).repeat_interleave(500)[torch.randperm(5000, generator=seeded(1))]
    kept = long_tail(labels, 100, seeded())
    assert torch.bincount(labels[kept]).tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert torch.equal(kept, kept.sort().values) and len(kept.unique()) == len(kept)
    assert not torch.equal(kept, long_tail(labels, 100, seeded(1)))


@pytest.mark.parametrize(("classes", "expected"), [(4, [60, 60, 6, 6]), (5, [60, 60, 60, 6, 6])])
def test_step_tail_has_exact_counts(classes: int, expected: list[int]) -> None:
    labels = torch.arange(classes).repeat(60)
    assert torch.bincount(labels[long_tail(labels, 10, seeded(), kind="step")]).tolist() == expected


def test_tail_keeps_nested_examples_and_at_least_one() -> None:
    labels = torch.arange(4).repeat(50)
    mild, strong = (set(long_tail(labels, ratio, seeded(2)).tolist()) for ratio in (5, 1000))
    assert strong < mild
    assert torch.bincount(labels[torch.tensor(sorted(strong))]).tolist() == [50, 5, 1, 1]
    assert long_tail(labels, 1, seeded()).tolist() == list(range(200))


def test_tail_with_a_least_size_keeps_more_of_rare_classes_and_the_same_of_others() -> None:
    labels = torch.cat([torch.arange(4).repeat(50), torch.full((7,), 4)])
    plain, padded = (set(long_tail(labels, 1000, seeded(2), least=n).tolist()) for n in (1, 10))
    assert plain < padded
    assert torch.bincount(labels[torch.tensor(sorted(padded))]).tolist() == [50, 10, 10, 10, 7]


def test_tail_of_unequal_classes_never_invents_examples() -> None:
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 100)
    assert torch.bincount(labels[long_tail(labels, 4, seeded())]).tolist() == [30, 8, 25]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"ratio": 0.5}, "ratio"),
        ({"kind": "linear"}, "kind"),
        ({"least": 0}, "least"),
        ({"labels": torch.ones(3)}, "labels"),
    ],
)
def test_tail_refuses_bad_arguments(arguments: dict[str, object], name: str) -> None:
    given = {"labels": torch.tensor([0, 1]), "ratio": 10, "generator": seeded(), **arguments}
    with pytest.raises(ArgumentError, match=name):
        long_tail(**given)  # type: ignore[arg-type]
