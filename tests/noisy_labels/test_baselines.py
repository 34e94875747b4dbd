"""The baselines: cross-entropy, label smoothing and generalized cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.noisy_labels.baselines import (
    CrossEntropy,
    GCELoss,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    generalized_cross_entropy,
)
from equipoise.training import Method


def logits_of(n: int, c: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 3, 1, 2, 2])


@pytest.mark.parametrize("q", [1e-3, 0.3, 0.7, 1.0])
def test_generalized_cross_entropy_is_its_formula(q: float) -> None:
    z = logits_of(5, 4)
    expected = [
        (1 - math.exp(row[y]) ** q) / q for row, y in zip(z.log_softmax(1).tolist(), LABELS.tolist(), strict=True)
    ]
    assert generalized_cross_entropy(z, LABELS, q, "none").tolist() == pytest.approx(expected, abs=1e-12)
    assert generalized_cross_entropy(z, LABELS, q, "sum").item() == pytest.approx(sum(expected))
    assert GCELoss(q)(z, LABELS).item() == pytest.approx(sum(expected) / 5)


def test_q_1_is_half_the_l1_distance() -> None:
    z = logits_of(5, 4)
    distance = (z.softmax(1) - F.one_hot(LABELS, 4)).abs().sum(1)
    torch.testing.assert_close(generalized_cross_entropy(z, LABELS, 1.0, "none"), distance / 2)


def test_q_0_is_cross_entropy_and_so_is_its_limit() -> None:
    z = logits_of(5, 4)
    assert torch.equal(generalized_cross_entropy(z, LABELS, 0.0), F.cross_entropy(z, LABELS))
    torch.testing.assert_close(generalized_cross_entropy(z, LABELS, 1e-12), F.cross_entropy(z, LABELS))


def test_gradient() -> None:
    z = logits_of(5, 4).requires_grad_()
    for q in (0.0, 1e-6, 0.7, 1.0):
        assert torch.autograd.gradcheck(lambda v, q=q: generalized_cross_entropy(v, LABELS, q), z)
    (ours,) = torch.autograd.grad(generalized_cross_entropy(z, LABELS, 0.7, "sum"), z)
    (plain,) = torch.autograd.grad(F.cross_entropy(z, LABELS, reduction="sum"), z)
    weight = z.softmax(1).gather(1, LABELS[:, None]) ** 0.7
    torch.testing.assert_close(ours, weight * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    z = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype=dtype).requires_grad_()
    for q in (1e-8, 0.7):
        loss = generalized_cross_entropy(z, torch.tensor([0, 0]), q, "none")
        assert loss.dtype == torch.float32
        assert loss.tolist() == pytest.approx([0.0, -math.expm1(-2000 * q) / q], rel=1e-5)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert torch.isfinite(grad).all()


def test_compiles() -> None:
    compiled = torch.compile(generalized_cross_entropy, backend="aot_eager")
    torch.testing.assert_close(compiled(logits_of(5, 4), LABELS), generalized_cross_entropy(logits_of(5, 4), LABELS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GCELoss(q=1.1), r"q = 1.1: must be a number in \[0, 1\]"),
        (lambda: GCELoss(reduction="avg"), "reduction = 'avg'"),
        (lambda: GeneralizedCrossEntropy(q=-0.1), "q = -0.1"),
        (lambda: LabelSmoothing(smoothing=1.5), r"smoothing = 1.5: must be a number in \[0, 1\]"),
        (lambda: generalized_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3])), r"targets = values in \[0, 3\]"),
        (lambda: generalized_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3)), "targets = "),
        (lambda: generalized_cross_entropy(torch.zeros(2), torch.tensor([0, 1])), "logits = "),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def train(*methods: Method, loss: Any = None) -> equipoise.Run:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(48, 5, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return equipoise.fit(model, (x, y), epochs=2, batch_size=20, methods=methods, loss=loss)


def same(first: equipoise.Run, second: equipoise.Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("method", [CrossEntropy, LabelSmoothing, GeneralizedCrossEntropy])
def test_neutral_is_plain_training(method: Any) -> None:
    assert same(train(method(**method.neutral)), train())


def test_methods_replace_the_loss() -> None:
    smooth = train(loss=lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2))
    assert same(train(LabelSmoothing(0.2)), smooth)
    assert same(train(GeneralizedCrossEntropy(0.5)), train(loss=GCELoss(0.5)))
    assert not same(smooth, train())
