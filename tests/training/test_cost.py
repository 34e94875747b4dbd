"""FLOPs, memory and parameters of a training."""

from __future__ import annotations

import gc

import torch
from small import blobs, mlp
from torch import Tensor, nn

import equipoise
from equipoise.training.cost import Cost, PeakMemory, measure


def cost(rows: int = 90, epochs: int = 2, batch_size: int = 32, model: nn.Module | None = None) -> Cost:
    def train() -> nn.Module:
        return equipoise.fit(mlp() if model is None else model, blobs(rows), epochs=epochs, batch_size=batch_size).model

    return measure(train)


def test_flops_of_an_mlp_are_exact() -> None:
    """Forward and weight gradients of each layer, input gradients of each but the first: 2 N in out each."""
    forward = 6 * 16 + 16 * 3
    per_row = 2 * (forward + forward + 16 * 3)
    assert cost().flops == 90 * 2 * per_row
    assert cost(batch_size=90).flops == cost().flops  # does not depend on the batches
    assert cost(epochs=6).flops == 3 * cost().flops


def test_flops_of_evaluation_and_convolutions_count() -> None:
    images = torch.randn(10, 1, 5, 5)
    model = nn.Conv2d(1, 4, 3)
    assert measure(lambda: nn.Sequential(model, nn.Identity()).train()).flops == 0

    def forward() -> nn.Module:
        with torch.no_grad():
            model(images)
        return model

    found = measure(forward)
    assert found.flops == 2 * 10 * 3 * 3 * 4 * 9
    assert found.inference_parameters == 4 * 9 + 4


def test_measuring_changes_no_bit() -> None:
    plain, measured = mlp(), mlp()
    equipoise.fit(plain, blobs(), epochs=2, batch_size=32)
    cost(model=measured)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), measured.parameters(), strict=True))


def test_peak_memory_is_the_largest_sum_alive() -> None:
    with PeakMemory() as memory:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        third = torch.cat([second, second])  # 4000 + 8000 = 12000, the peak
        del second
        view = third.view(2, -1)[0]  # no memory of its own
        third.add_(1)
        small = view[:10].clone()
    assert memory.peak == 12000
    assert memory.alive == 8000 + 40
    del view, third, small
    assert memory.alive == 0


def test_peak_memory_is_positive_repeatable_and_grows_with_the_batch() -> None:
    costs = []
    for _ in range(3):
        costs.append(cost())
        gc.collect()
        garbage: list[Tensor | list] = [torch.ones(10)]
        garbage.append(garbage)  # a cycle, collected at some other time
    assert len(set(costs)) == 1
    weights = sum(p.numel() for p in mlp().parameters()) * 4
    assert costs[0].peak_memory > 3 * weights  # weights, gradients, momentum
    assert cost(batch_size=90).peak_memory > costs[0].peak_memory
    assert costs[0].inference_parameters * 4 == weights
