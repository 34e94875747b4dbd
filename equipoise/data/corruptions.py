"""Label noise and long tails, with exact definitions.

Every function draws from the ``torch.Generator`` it is given, one fixed set of numbers per example, and returns new tensors.
The same generator state and a higher rate (or ratio) corrupts the same examples and more: amounts can be compared pairwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range


def symmetric_noise(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """With probability ``rate`` a label becomes one of the C - 1 *other* classes, each equally likely.

    labels: (N,) integers in [0, C). rate in [0, 1] is the expected share of wrong labels. Returns (N,) int64.
    """
    _check(labels, rate, num_classes)
    flip = _uniform(labels, generator) < rate
    offset = torch.randint(1, num_classes, labels.shape, generator=generator, device=generator.device)
    return torch.where(flip, (labels.long() + offset.to(labels.device)) % num_classes, labels.long())


def uniform_noise(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """With probability ``rate`` a label is redrawn uniformly from *all* C classes, so that it may stay what it was.

    labels: (N,) integers in [0, C). The expected share of wrong labels is ``rate * (C - 1) / C``, and not ``rate``.
    Returns (N,) int64. This convention is used for "symmetric" noise in Liu et al., NeurIPS 2020, and elsewhere.
    """
    _check(labels, rate, num_classes)
    flip = _uniform(labels, generator) < rate
    redrawn = torch.randint(0, num_classes, labels.shape, generator=generator, device=generator.device)
    return torch.where(flip, redrawn.to(labels.device), labels.long())


def pair_noise(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """With probability ``rate`` the label c becomes (c + 1) mod C ("pair flip": Han et al., NeurIPS 2018).

    labels: (N,) integers in [0, C). rate in [0, 1]; from 0.5 on most labels of a class are wrong. Returns (N,) int64.
    """
    _check(labels, rate, num_classes)
    flip = _uniform(labels, generator) < rate
    return (labels.long() + flip) % num_classes


def instance_noise(
    labels: Tensor,
    inputs: Tensor,
    rate: float,
    num_classes: int,
    generator: torch.Generator,
    *,
    projection: Tensor | None = None,
) -> Tensor:
    """Noise that depends on the input: Xia et al., "Part-dependent Label Noise", NeurIPS 2020, Algorithm 2.

    For example i with input x_i (flattened to S numbers) and class y_i::

        q_i ~ Normal(rate, 0.1^2) truncated to [0, 1]        the probability that its label is wrong
        p_i = q_i * softmax over c != y_i of (x_i W[y_i])_c,   p_i[y_i] = 1 - q_i
        new label ~ p_i

    labels: (N,) integers in [0, C). inputs: (N, ...) floating point, used at the scale they have: the larger, the more the
    input alone decides which class replaces the label. ``projection`` is W (C, S, C); by default it is drawn from the
    generator. Give the same one (``instance_projection``) to corrupt training and validation labels by the same rule.
    Returns (N,) int64. rate in [0, 1]; 0 changes nothing. Truncation moves the mean of q_i away from a rate that is within
    0.2 of 0 or 1 (0.05 gives 0.10 on average).
    """
    _check(labels, rate, num_classes)
    if len(inputs) != len(labels) or not inputs.is_floating_point():
        raise ArgumentError(
            f"inputs = {inputs.dtype} {tuple(inputs.shape)}: must be floating point with one row for each of {len(labels)} labels"
        )
    flat = inputs.flatten(1).to(torch.float32)
    if projection is None:
        projection = instance_projection(flat.shape[1], num_classes, generator)
    if projection.shape != (num_classes, flat.shape[1], num_classes):
        raise ArgumentError(
            f"projection = {tuple(projection.shape)}: must have the shape {(num_classes, flat.shape[1], num_classes)}"
        )
    flip = _truncated_normal(_uniform(labels, generator), rate, 0.1) if rate > 0 else labels.new_zeros(len(labels))
    choice = _uniform(labels, generator)
    wrong = _uniform(labels, generator) < flip
    scores = flat.new_zeros(len(labels), num_classes)
    for c in range(num_classes):
        rows = labels == c
        scores[rows] = flat[rows] @ projection[c].to(flat)
    scores.scatter_(1, labels.long().unsqueeze(1), -torch.inf)
    # Inverse transform sampling; the own class has probability 0, and rounding must not lead past the last possible class.
    steps = scores.double().softmax(1).cumsum(1)
    other = torch.searchsorted(steps, choice.unsqueeze(1) * steps[:, -1:], right=True).squeeze(1)
    return torch.where(wrong, other.clamp(max=num_classes - 1), labels.long())


def instance_projection(num_features: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """The matrices W (C, S, C) of ``instance_noise``, standard normal."""
    check_integer("num_features", num_features, 1)
    check_integer("num_classes", num_classes, 2)
    return torch.randn(num_classes, num_features, num_classes, generator=generator, device=generator.device)


def long_tail(labels: Tensor, ratio: float, generator: torch.Generator, *, kind: str = "exp", least: int = 1) -> Tensor:
    """Positions (M,) int64, in ascending order, of the examples that stay when the classes are made unequally frequent.

    Class c of C keeps ``n_c`` examples, drawn at random, where ``n_max`` is the size of the largest class:

    - ``kind="exp"``: ``n_c = n_max * ratio^(-c / (C - 1))``, rounded down (Cui et al., CVPR 2019);
    - ``kind="step"``: ``n_max`` for the first half of the classes (the larger half if C is odd), ``n_max / ratio`` for the
      others (Buda et al., Neural Networks 2018).

    labels: (N,) integers, classes numbered from 0. ratio >= 1: size of the largest class over that of the smallest; reached
    up to rounding if classes were equally frequent. least >= 1: no ``n_c`` is smaller. A class with fewer examples keeps all.
    """
    check_range("ratio", ratio, 1)
    check_integer("least", least, 1)
    check_choice("kind", kind, ("exp", "step"))
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels) or int(labels.min()) < 0:
        raise ArgumentError(
            f"labels = {labels.dtype} {tuple(labels.shape)}: must be integer classes (N,) numbered from 0"
        )
    counts = torch.bincount(labels)
    classes = len(counts)
    if classes < 2:
        raise ArgumentError("labels = one class: a long tail needs at least 2")
    position = torch.arange(classes, dtype=torch.float64, device=labels.device)
    exponent = position / (classes - 1) if kind == "exp" else (position >= classes - classes // 2).double()
    # The tolerance keeps 5000 / 100 from becoming 49.
    sizes = (counts.max() * ratio**-exponent + 1e-6).long().clamp(min=least)
    order = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < sizes[labels[order]]].sort().values


def _check(labels: Tensor, rate: float, num_classes: int) -> None:
    check_range("rate", rate, 0, 1)
    check_integer("num_classes", num_classes, 2)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ArgumentError(f"labels = {labels.dtype} {tuple(labels.shape)}: must be integer classes of shape (N,)")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ArgumentError(
            f"labels = values in [{int(labels.min())}, {int(labels.max())}]: must lie in [0, {num_classes})"
        )


def _uniform(labels: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) for each label, float64, on the labels' device."""
    numbers = torch.rand(len(labels), generator=generator, device=generator.device, dtype=torch.float64)
    return numbers.to(labels.device)


def _truncated_normal(u: Tensor, mean: float, sd: float) -> Tensor:
    """Quantiles ``u`` of the normal distribution truncated to [0, 1]."""
    low, high = torch.special.ndtr(torch.tensor([-mean / sd, (1 - mean) / sd], dtype=torch.float64)).tolist()
    return (mean + sd * torch.special.ndtri(low + u * (high - low))).clamp(0, 1)
