"""Gathering rows over processes: two processes on uneven shares give the loss and the gradients of one on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from equipoise.testing import spawn
from equipoise.training.gather import gather_rows, world_size


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, generator=generator, dtype=torch.float64), torch.arange(7) % 3


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 2).double()


def pair_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """No mean over rows: on a share it is another function."""
    same = labels[:, None] == labels[None, :]
    return torch.where(same, torch.cdist(features, features) ** 2, 0.0).sum() / same.sum()


def test_one_process_gets_back_what_it_gave() -> None:
    x, y = batch()
    assert world_size() == 1
    assert gather_rows(x) is x
    first, second = gather_rows(x, y)
    assert first is x and second is y


def _share() -> Any:
    rank = int(__import__("os").environ["RANK"])
    torch.distributed.init_process_group("gloo")
    x, y = batch()
    rows = slice(0, 4) if rank == 0 else slice(4, 7)
    model = DistributedDataParallel(network())
    features, labels = gather_rows(model(x[rows]), y[rows])
    mask = gather_rows(y[rows] > 0)  # other types too
    # The run's own weight for uneven shares must not disturb the exactness.
    loss = pair_loss(features, labels) * (len(x[rows]) * 2 / len(x))
    loss.backward()
    yield {
        "labels": labels,
        "mask": mask,
        "features": features.detach(),
        "gradient": [p.grad for p in model.parameters()],
    }


@pytest.mark.distributed
def test_two_processes_give_the_gradient_of_the_whole_batch() -> None:
    results = spawn(_share)
    x, y = batch()
    model = network()
    features = model(x)
    pair_loss(features, y).backward()
    assert [r[0].get("trace") for r in results] == [None, None]
    for (result,) in results:
        assert torch.equal(result["labels"], y) and torch.equal(result["mask"], y > 0)
        torch.testing.assert_close(result["features"], features.detach())
        for mine, wanted in zip(result["gradient"], model.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted.grad)
