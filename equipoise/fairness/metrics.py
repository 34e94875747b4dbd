"""How unfair, and how good, predictions are: demographic-parity gaps, Jensen-Shannon divergence, unfairness, RPS.

Groups are int64 codes (n,), one for each example: a protected attribute, or the cells of several (continuous ones binned).
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range

NUMBERS = 1 << 22  # of one block of kernel values


def group_means(prediction: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Means (G, ...) of the predictions (n, ...) of each group that has an example, and the groups' sizes (G,)."""
    _check(prediction, groups)
    _, codes, sizes = groups.unique(return_inverse=True, return_counts=True)
    values = prediction.double()
    sums = values.new_zeros((len(sizes), *values.shape[1:])).index_add_(0, codes, values)
    return sums / sizes.view(-1, *[1] * (values.ndim - 1)), sizes


def parity_gap(prediction: Tensor, groups: Tensor, *, smallest: int = 1) -> Tensor:
    """The largest difference between the mean predictions of two groups: a scalar >= 0.

    prediction: (n,), decisions 0/1 for the gap in demographic parity, or values; (n, C) one-hot decisions: the largest over
    the classes. smallest: groups with fewer examples are left out; 0 if fewer than two remain.
    """
    check_integer("smallest", smallest, 1)
    means, sizes = group_means(prediction, groups)
    means = means[sizes >= smallest]
    if len(means) < 2:
        return means.new_zeros(())
    return (means.amax(0) - means.amin(0)).max()


def jensen_shannon_divergence(
    prediction: Tensor, groups: Tensor, *, bandwidth: float = 0.15, grid: int = 1000, weights: str = "proportion"
) -> Tensor:
    """How much the distributions of the predictions differ between groups: in bits, 0 if they are equal, a scalar.

    ``H(sum_g pi_g p_g) - sum_g pi_g H(p_g)``, where p_g is a Gaussian kernel density of the predictions (n,) of group g, of
    standard deviation ``bandwidth`` > 0, on ``grid`` >= 2 points from their smallest to their largest, summing to 1. In H,
    p is at least 1e-10. weights: pi_g is the group's share ("proportion") or 1/G ("equal").
    """
    check_range("bandwidth", bandwidth, 0, open_low=True)
    check_integer("grid", grid, 2)
    check_choice("weights", weights, ("proportion", "equal"))
    prediction = _flat(prediction, groups).double()
    _, codes, sizes = groups.unique(return_inverse=True, return_counts=True)
    low, high = prediction.aminmax()
    points = low + (high - low) * torch.linspace(0, 1, grid, dtype=prediction.dtype, device=prediction.device)
    density = prediction.new_zeros(len(sizes), grid)
    rows = max(1, NUMBERS // grid)
    for values, members in zip(prediction.split(rows), codes.split(rows), strict=True):
        kernel = ((points - values[:, None]) / bandwidth).square_().mul_(-0.5).exp_()
        density.index_add_(0, members, kernel)
    density /= density.sum(1, keepdim=True)
    share = (
        sizes.double() / len(prediction) if weights == "proportion" else torch.ones_like(sizes).double() / len(sizes)
    )
    return _entropy(share @ density) - share @ _entropy(density)


def unfairness(prediction: Tensor, groups: Tensor) -> Tensor:
    """Variance of the group means over the variance of the predictions (n,), both with n - 1: a scalar >= 0, UF.

    Groups count equally. 0 where there is one group, or all predictions are equal.
    """
    prediction = _flat(prediction, groups).double()
    means, _ = group_means(prediction, groups)
    total = prediction.var()
    if len(means) < 2 or not total > 0:
        return total.new_zeros(())
    return means.var() / total


def ranked_probability_score(
    probs_or_rates: Tensor, targets: Tensor, *, family: str = "bernoulli", max_count: int = 10
) -> Tensor:
    """The mean over examples of ``sum_k (F(k) - 1[y <= k])^2``, F the predicted distribution function: a scalar, 0 is best.

    family: "bernoulli" (probabilities (n,) of 1, targets 0/1; the Brier score) or "poisson" (rates (n,) >= 0, counts; k up to
    ``max_count``, which should be at least the largest count).
    """
    check_choice("family", family, ("bernoulli", "poisson"))
    check_integer("max_count", max_count, 0)
    values, y = _flat(probs_or_rates, targets).double(), targets.reshape(-1).double()
    if family == "bernoulli":
        return (values - y).square().mean()
    counts = torch.arange(max_count + 1, dtype=values.dtype, device=values.device)
    # P(Y <= k) for a rate r is the regularised upper incomplete gamma function Q(k + 1, r).
    cumulative = torch.special.gammaincc(counts + 1, values[:, None])
    return (cumulative - (y[:, None] <= counts).double()).square().sum(1).mean()


def _entropy(p: Tensor) -> Tensor:
    """Entropy in bits over the last dimension."""
    p = p.clamp(min=1e-10)
    return -(p * p.log2()).sum(-1)


def _flat(prediction: Tensor, groups: Tensor) -> Tensor:
    """The predictions as (n,)."""
    _check(prediction, groups)
    if prediction.numel() != len(prediction):
        raise ArgumentError(
            f"prediction has shape {tuple(prediction.shape)}: must be (n,), one number for each example. Take one class at a time"
        )
    return prediction.reshape(-1)


def _check(prediction: Tensor, groups: Tensor) -> None:
    if not len(prediction) or len(prediction) != len(groups) or groups.numel() != len(groups):
        raise ArgumentError(
            f"prediction, groups have shapes {tuple(prediction.shape)}, {tuple(groups.shape)}: must be (n,) and (n,), n >= 1"
        )
