"""``check_loss``, ``check_regularizer`` and ``check_layer`` pass what is right and name what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equipoise.testing import (
    LAYER_CHECKS,
    LOSS_CHECKS,
    REGULARIZER_CHECKS,
    ConformanceError,
    check_layer,
    check_loss,
    check_regularizer,
)

torch.set_num_threads(1)


def cross_entropy(logits, targets, reduction="mean"):
    if len(logits) != len(targets):
        raise ValueError(f"targets has {len(targets)} rows, logits {len(logits)}")
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction=reduction)


class AveragedTargets(nn.Module):
    """Has a table that training updates."""

    def __init__(self, rows: int, classes: int, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("table", torch.full((rows, classes), 1 / classes))

    def forward(self, logits, targets, index):
        if not len(logits) == len(targets) == len(index):
            raise ValueError("one row per example")
        if self.training:
            self.table[index] = 0.5 * self.table[index] + 0.5 * logits.detach().softmax(1).to(self.table.dtype)
        soft = 0.5 * F.one_hot(targets, logits.shape[1]) + 0.5 * self.table[index]
        return F.cross_entropy(logits, soft.to(logits.dtype), reduction=self.reduction)


def with_index(generator):
    return torch.randn(6, 4, generator=generator), torch.arange(6) % 4, torch.arange(6).flip(0)


def test_right_losses_pass():
    assert check_loss(cross_entropy).passed == list(LOSS_CHECKS)
    assert check_loss(AveragedTargets(8, 4).eval(), with_index).passed == list(LOSS_CHECKS)
    assert check_loss(nn.CrossEntropyLoss()).passed == list(LOSS_CHECKS)


def in_place(logits, targets, reduction="mean"):
    with torch.no_grad():
        logits.sub_(logits.mean())
    return cross_entropy(logits, targets, reduction)


def sum_is_mean(logits, targets, reduction="mean"):
    return cross_entropy(logits, targets, "mean" if reduction == "sum" else reduction)


def by_position(logits, targets, reduction="mean"):
    weights = torch.arange(1, len(logits) + 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = weights * cross_entropy(logits, targets, "none")
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def detached(logits, targets, reduction="mean"):
    return cross_entropy(logits, targets, reduction) + cross_entropy(logits.detach(), targets, reduction)


def wide(logits, targets, reduction="mean"):
    return cross_entropy(logits, targets, reduction).double()


def half(logits, targets, reduction="mean"):
    return cross_entropy(logits + 1000 - 1000, targets, reduction)


def overflows(logits, targets, reduction="mean"):
    if len(logits) != len(targets):
        raise ValueError
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    losses = -p.gather(1, targets[:, None])[:, 0].log()
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def broadcasts(logits, targets, reduction="mean"):
    losses = (logits.double().sum(1) - targets[0]).square().to(torch.promote_types(logits.dtype, torch.float32)) / 1e9
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


@pytest.mark.parametrize(
    ("loss", "check"),
    [
        (in_place, "arguments-unchanged"),
        (sum_is_mean, "reduction"),
        (by_position, "rows"),
        (detached, "gradient"),
        (wide, "dtype"),
        (half, "bf16"),
        (overflows, "extreme"),
        (broadcasts, "shapes"),
    ],
)
def test_wrong_losses_fail(loss, check):
    with pytest.raises(ConformanceError) as caught:
        check_loss(loss, skip={"rows": "compares with the first row"} if loss is broadcasts else None)
    assert caught.value.check == check
    assert caught.value.subject == loss.__name__


def test_regularizers():
    def decay(features):
        return features.to(torch.promote_types(features.dtype, torch.float32)).square().sum(1).mean()

    assert check_regularizer(decay).passed == list(REGULARIZER_CHECKS)
    for wrong, check in (
        (lambda x: x.square().sum(1), "scalar"),
        (lambda x: decay(x) * torch.rand(()), "scalar"),
        (lambda x: decay(x.detach()) + 0 * x.sum(), "gradient"),
        (lambda x: x.norm(dim=1).mean() + x.square().mean().log(), "extreme"),
    ):
        with pytest.raises(ConformanceError) as caught:
            check_regularizer(wrong)
        assert caught.value.check == check


def test_right_layers_pass():
    assert check_layer(lambda: nn.BatchNorm1d(6)).passed == list(LAYER_CHECKS)
    assert check_layer(lambda: nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)), shape=(2,)).passed == list(LAYER_CHECKS)


class Halves(nn.Module):
    def forward(self, x):
        return x[:, :3]


class Straight(nn.Module):
    def forward(self, x):
        return x + (x - x.detach()) * 2


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0 * x.detach() + torch.rand(()).to(x.dtype) * x.detach().sign() * 0 + torch.rand_like(x) * 0.1


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * 1


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(())

    def forward(self, x):
        return x * self.scale.to(x.dtype)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.ones(6)

    def forward(self, x):
        return x + self.offset


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (Halves, "shape"),
        (Straight, "gradient"),
        (Counting, "evaluation"),
        (Hidden, "state-dict"),
        (Fixed, "dtype"),
    ],
)
def test_wrong_layers_fail(make, check):
    with pytest.raises(ConformanceError) as caught:
        check_layer(make)
    assert caught.value.check == check


def test_a_layer_that_draws_in_evaluation_fails():
    with pytest.raises(ConformanceError) as caught:
        check_layer(Noisy, skip={"gradient": "random"})
    assert caught.value.check == "evaluation"
