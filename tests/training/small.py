"""Small data, models and a hand-written loop, shared by the tests of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler, TensorDataset

from equipoise import Batch, Method, Run


def blobs(count: int = 90, width: int = 6, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``classes`` overlapping clouds: inputs (count, width) float32, labels (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 1.5 * torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def mlp(width: int = 6, classes: int = 3, dropout: float = 0.0, norm: bool = False, seed: int = 1) -> nn.Sequential:
    """Two layers; the same weights for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(width, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes))


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def cosine(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def hand_loop(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    scheduler: Callable[..., Any] | None = None,
    clip: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """The loop anyone would write, in the documented order of examples."""
    inputs, labels = data
    sampler = RandomSampler(TensorDataset(*data), generator=torch.Generator().manual_seed(seed))
    chosen = optimizer(model.parameters())
    schedule = scheduler(chosen, epochs * math.ceil(len(labels) / batch_size)) if scheduler else None
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.tensor(list(sampler)).split(batch_size):
                chosen.zero_grad()
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                chosen.step()
                if schedule is not None:
                    schedule.step()
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models hold the same bits, buffers included."""
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def far(left: nn.Module, right: nn.Module) -> float:
    """The largest difference of two models' weights."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


class Stateful(Method):
    """Owns one of each: generator, module in the optimizer, optimizer of its own, counter; all of them matter."""

    name = "stateful"

    def prepare(self, run: Run) -> None:
        self.noise = run.new_generator(self)
        self.scale = run.register(self, "scale", nn.Linear(3, 3), optimize=True)
        self.temperature = run.register(self, "temperature", nn.Linear(1, 1))
        self.own = run.register(self, "own", torch.optim.Adam(self.temperature.parameters(), lr=0.01))
        nn.init.eye_(self.scale.weight)
        for constant in (self.scale.bias, *self.temperature.parameters()):
            nn.init.zeros_(constant)
        self.calls = 0

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        batch.inputs = batch.inputs + 0.1 * torch.randn(batch.inputs.shape, generator=self.noise)
        return batch

    def loss(self, run: Run, batch: Batch, output: Any) -> Tensor:
        self.calls += 1
        logits = run.forward(output.prediction, self.scale).prediction
        heat = self.temperature(torch.full((1, 1), 1.0 + 0.01 * self.calls))
        return F.cross_entropy(logits * (1 + heat), batch.targets)

    def after_step(self, run: Run) -> None:
        self.own.step()
        self.own.zero_grad()
        run.log("calls", self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.calls = state["calls"]
