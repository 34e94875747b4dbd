"""Which examples are drawn: batches of P classes x K examples, and classes drawn equally often.

What a task asks for: ``fit(..., sampler=ClassBatches(per_class=4))``. Each makes a sampler of positions, of which
consecutive ``batch_size`` form a batch; an epoch has as many as the data have examples, so that its length does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler

from equipoise.errors import ArgumentError, check_integer, check_range


@dataclass(frozen=True)
class ClassBatches:
    """Batches of ``batch_size // per_class`` different classes with ``per_class`` examples of each, for losses over pairs.

    per_class: K >= 1. Classes are drawn without replacement within a batch; the examples of a class are gone through in a
    random order, so that a batch repeats one only where its class has fewer than K. Raises ``ArgumentError`` where the batch
    is no multiple of K, or would need more classes than there are.
    """

    per_class: int = 4

    def __post_init__(self) -> None:
        check_integer("per_class", self.per_class, 1)

    def __call__(self, data: Any, batch_size: int, generator: torch.Generator) -> Sampler[int]:
        labels = labels_of(data)
        present, labels = labels.unique(return_inverse=True)
        if batch_size % self.per_class or batch_size // self.per_class > len(present):
            raise ArgumentError(
                f"batch_size = {batch_size}: must be a multiple of per_class = {self.per_class} and at most "
                f"{self.per_class * len(present)}, for {len(present)} classes"
            )
        return _ClassBatchSampler(labels, batch_size, self.per_class, generator)


@dataclass(frozen=True)
class Balanced:
    """Examples drawn with replacement, so that class c with n_c examples comes with probability proportional to ``n_c^power``.

    power: in [0, 1]; 0 draws all classes equally often (oversampling), 1 every example, 0.5 is square-root sampling.
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        check_range("power", self.power, 0, 1)

    def __call__(self, data: Any, batch_size: int, generator: torch.Generator) -> Sampler[int]:
        labels = labels_of(data)
        weights = torch.bincount(labels).double()[labels] ** (self.power - 1)
        return WeightedRandomSampler(weights, len(labels), replacement=True, generator=generator)  # type: ignore[arg-type]


def labels_of(data: Any) -> Tensor:
    """The integer classes (N,) of a data set with ``targets``, on the CPU. Raises ``ArgumentError`` where it has none."""
    targets = getattr(data, "targets", None)
    if targets is None:
        targets = getattr(getattr(data, "dataset", None), "targets", None)
    labels = None if targets is None else torch.as_tensor(targets)
    if labels is None or labels.is_floating_point() or labels.shape != (len(data),):
        raise ArgumentError(
            "sampler: needs the class of every example, but the data set has no integer targets of shape (N,). "
            "Give equipoise.Examples, or a Dataset with the attribute targets"
        )
    return labels.cpu().long()


class _ClassBatchSampler(Sampler[int]):
    def __init__(self, labels: Tensor, batch_size: int, per_class: int, generator: torch.Generator) -> None:
        self.labels, self.batch_size, self.per_class, self.generator = labels, batch_size, per_class, generator
        self.counts = torch.bincount(labels)

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        k, batches = self.per_class, len(self) // self.batch_size
        ranks = torch.rand(batches, len(self.counts), generator=self.generator).argsort(1)
        classes = ranks[:, : self.batch_size // k]
        # How often each class was chosen in earlier batches says where in its shuffled members to go on.
        chosen = torch.zeros(batches, len(self.counts), dtype=torch.int64).scatter_(1, classes, 1)
        earlier = (chosen.cumsum(0) - chosen).gather(1, classes)
        order = torch.randperm(len(self.labels), generator=self.generator)
        members = order[self.labels[order].argsort(stable=True)]
        place = (earlier[..., None] * k + torch.arange(k)) % self.counts[classes][..., None]
        start = (self.counts.cumsum(0) - self.counts)[classes][..., None]
        return iter(members[start + place].flatten().tolist())
