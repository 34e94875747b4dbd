"""Batches, in-memory examples and the loader that draws one from the other.

``Examples`` holds a data set as tensors and hands out whole batches by index, without a Python loop over examples. Any
other map-style ``torch.utils.data.Dataset`` works too, through ``torch.utils.data.DataLoader``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from equipoise.errors import ArgumentError, DataError, check_integer

Inputs = Tensor | dict[str, Tensor]
TARGET_KEYS = ("targets", "labels", "label", "target")


def size_of(inputs: Inputs) -> int:
    """Number of rows of a tensor, or of the tensors in a dict."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to a tensor, or to each tensor of a dict."""
    return function(inputs) if isinstance(inputs, Tensor) else {k: function(v) for k, v in inputs.items()}


@dataclass(slots=True)
class Batch:
    """One batch of N examples.

    inputs: tensor (N, ...) or dict of such tensors; a dict is passed to the model as keyword arguments.
    targets: (N,) int64 classes, (N, C) soft labels, or (N,) / (N, K) values.
    index: (N,) int64 positions in the training set, on the batch's device; None if the loader does not give them.
    extras: named further tensors with N rows (``domain``, ``group``, a second view, ...).
    weight: factor on the loss that makes the mean over uneven shards exact in a distributed run.
    views: number of random views that are stacked view-major: row ``v * (N / views) + i`` is view v of example i.
    """

    inputs: Inputs
    targets: Tensor
    index: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    views: int = 1

    def __len__(self) -> int:
        return len(self.targets)

    def positions(self, method: str) -> Tensor:
        """``index``, or one clear error for the method that needs it."""
        if self.index is None:
            raise ArgumentError(
                f"batch.index = None: {method} keeps state per training example and must know which examples are in the batch. "
                "Let the loader yield (inputs, targets, index), for instance by wrapping the data set: equipoise.indexed(dataset)"
            )
        return self.index

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device (the very same object if it is there already)."""
        if self.targets.device == device:
            return self
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return Batch(
            map_inputs(move, self.inputs),
            move(self.targets),
            None if self.index is None else move(self.index),
            {k: move(v) if isinstance(v, Tensor) else v for k, v in self.extras.items()},
            self.weight,
            self.views,
        )

    def with_views(self, views: Sequence[Inputs]) -> Batch:
        """The batch with random views of its inputs in their place, stacked view-major; all else is repeated with them."""
        count = len(views)
        if count == 1:
            return replace(self, inputs=views[0])
        repeat = lambda t: t.repeat(count, *[1] * (t.ndim - 1))  # noqa: E731
        first = views[0]
        stacked: Inputs = (
            torch.cat([v for v in views if isinstance(v, Tensor)])
            if isinstance(first, Tensor)
            else {key: torch.cat([v[key] for v in views if not isinstance(v, Tensor)]) for key in first}
        )
        return replace(
            self,
            inputs=stacked,
            targets=repeat(self.targets),
            index=None if self.index is None else repeat(self.index),
            extras={k: repeat(v) if isinstance(v, Tensor) else v for k, v in self.extras.items()},
            views=count,
        )

    def split(self, parts: int) -> list[Batch]:
        """At most ``parts`` consecutive micro-batches, none of them empty; equally many in all processes of a run."""
        # Shards differ by one row; a process with one more must not cut one more piece, or collective calls would not meet.
        parts = min(parts, int(len(self) / self.weight + 1e-6))
        pieces = []
        for number in range(parts):
            rows = slice(number * len(self) // parts, (number + 1) * len(self) // parts)
            take = lambda t, rows=rows: t[rows]  # noqa: E731
            pieces.append(
                replace(
                    self,
                    inputs=map_inputs(take, self.inputs),
                    targets=self.targets[rows],
                    index=None if self.index is None else self.index[rows],
                    extras={k: v[rows] if isinstance(v, Tensor) else v for k, v in self.extras.items()},
                )
            )
        return pieces

    @classmethod
    def of(cls, item: Any) -> Batch:
        """Make a batch of what a loader yields: a Batch, (inputs, targets), (inputs, targets, index), or a dict.

        A dict is read as ``{"inputs": ..., "targets": ..., "index": ..., extras...}`` if it has ``inputs``, else in the
        Hugging Face way: ``labels`` are the targets, ``index`` the positions, and all else goes to the model.
        """
        if isinstance(item, cls):
            return item
        if isinstance(item, Mapping):
            fields = dict(item)
            index = fields.pop("index", None)
            key = next((k for k in TARGET_KEYS if k in fields), None)
            if key is None:
                raise DataError(
                    f"batch has keys {sorted(fields)}: it must hold targets under one of {', '.join(TARGET_KEYS)}"
                )
            targets = fields.pop(key)
            if "inputs" in fields:
                return cls(fields.pop("inputs"), targets, index, fields)
            return cls(fields, targets, index)
        if isinstance(item, Sequence) and len(item) in (2, 3):
            return cls(*item)
        raise DataError(
            f"batch = {type(item).__name__}: must be an equipoise.Batch, a dict, (inputs, targets) or (inputs, targets, index)"
        )


@dataclass(slots=True)
class Output:
    """What a model gave for a batch: ``prediction`` (N, C) logits or (N, ...) values and, where present, the rest."""

    prediction: Tensor
    features: Tensor | None = None
    fused: Tensor | None = None
    unimodal: Any = None
    router: Any = None

    @classmethod
    def of(cls, result: Any) -> Output:
        """Read a tensor, an ``Output``, a dict, or a Hugging Face model output (its ``logits``)."""
        if isinstance(result, Tensor):
            return cls(result)
        if isinstance(result, cls):
            return result
        if isinstance(result, Mapping):
            known = {k: result[k] for k in ("prediction", "features", "fused", "unimodal", "router") if k in result}
            if "prediction" not in known and "logits" in result:
                known["prediction"] = result["logits"]
            if "prediction" in known:
                return cls(**known)
        if isinstance(getattr(result, "logits", None), Tensor):
            return cls(result.logits)
        raise ArgumentError(
            f"model output = {type(result).__name__}: must be a tensor, an equipoise.Output, a dict with 'prediction' or "
            "'logits', or an object with .logits"
        )


class Examples(Dataset[Any]):
    """A data set in memory: every tensor has one row per example.

    >>> train = Examples(torch.randn(100, 8), torch.randint(0, 3, (100,)))
    >>> train.take(torch.tensor([4, 2])).targets.shape
    torch.Size([2])
    """

    def __init__(self, inputs: Inputs, targets: Tensor, *, num_classes: int | None = None, **extras: Tensor) -> None:
        self.inputs, self.targets, self.extras = inputs, targets, extras
        tensors = {"targets": targets, **(inputs if isinstance(inputs, dict) else {"inputs": inputs}), **extras}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise DataError(f"{name} = {type(tensor).__name__}: must be a tensor with one row per example")
            if len(tensor) != len(targets):
                raise DataError(
                    f"{name} has {len(tensor)} rows but targets has {len(targets)}: every tensor needs one row per example"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int(
                    (~torch.isfinite(tensor)).flatten(1).any(1).sum()
                    if tensor.ndim > 1
                    else (~torch.isfinite(tensor)).sum()
                )
                raise DataError(
                    f"{name} holds NaN or infinite values in {bad} of {len(tensor)} rows: remove or impute them"
                )
        classes = not targets.is_floating_point() and targets.ndim == 1
        if classes:
            self.targets = targets = targets.to(torch.int64)  # what cross-entropy takes
        if classes and len(targets) and int(targets.min()) < 0:
            raise DataError(f"targets holds the class {int(targets.min())}: classes are numbered from 0")
        if classes and num_classes is None and len(targets):
            num_classes = int(targets.max()) + 1
        if classes and num_classes is not None and len(targets) and int(targets.max()) >= num_classes:
            raise DataError(f"targets holds the class {int(targets.max())} but num_classes = {num_classes}")
        self.num_classes = num_classes if classes else (targets.shape[1] if targets.ndim == 2 else None)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> Any:
        inputs, target = map_inputs(lambda t: t[i], self.inputs), self.targets[i]
        if self.extras:
            return {"inputs": inputs, "targets": target, "index": i, **{k: v[i] for k, v in self.extras.items()}}
        return inputs, target, i

    def take(self, index: Tensor) -> Batch:
        """The batch of the examples at ``index`` (N,) int64."""
        index = index.to(self.targets.device)
        extras = {k: v.index_select(0, index) for k, v in self.extras.items()} if self.extras else {}
        inputs = self.inputs
        taken: Inputs = (
            inputs.index_select(0, index)
            if isinstance(inputs, Tensor)
            else {k: v.index_select(0, index) for k, v in inputs.items()}
        )
        return Batch(taken, self.targets.index_select(0, index), index, extras)

    def subset(self, index: Tensor | Sequence[int]) -> Examples:
        """A new data set of the given rows (positions, or a mask); its positions start at 0 again."""
        index = torch.as_tensor(index)
        part = self.take(index.nonzero().squeeze(1) if index.dtype == torch.bool else index.to(torch.int64))
        return Examples(part.inputs, part.targets, num_classes=self.num_classes, **part.extras)


class Indexed(Dataset[Any]):
    """A map-style data set whose items carry their position: see ``indexed``."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        item = self.dataset[i]
        if isinstance(item, Mapping):
            return {**item, "index": i}
        if isinstance(item, Sequence) and len(item) == 2:
            return (*item, i)
        raise DataError(f"item {i} of the data set is {type(item).__name__}: must be (inputs, target) or a dict")


def indexed(dataset: Dataset[Any]) -> Dataset[Any]:
    """Let a data set of (inputs, target) pairs or dicts also yield each example's position, for methods that need it."""
    return dataset if isinstance(dataset, Examples | Indexed) else Indexed(dataset)


def as_dataset(data: Any, name: str = "data") -> Dataset[Any]:
    """Accept ``Examples``, a map-style Dataset, or a pair (inputs, targets) of tensors, and refuse an empty set."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        data = Examples(data[0], data[1])
    arrays = isinstance(data, tuple | list) and len(data) > 0 and hasattr(data[0], "__array__")
    if arrays or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DataError(
            f"{name} = {type(data).__name__}: must be (inputs, targets) tensors, equipoise.Examples or a map-style Dataset. "
            "Make tensors of arrays with torch.as_tensor, float32 for inputs"
        )
    if len(data) == 0:
        raise DataError(f"{name} is empty: training needs at least one example")
    if type(data).__name__ == "TensorDataset" and len(getattr(data, "tensors", ())) == 2:
        return Examples(*data.tensors)
    return indexed(data)


class Loader:
    """Batches of a data set, on a device, in the order of a sampler; the same global batches for any number of processes.

    ``batch_size`` counts the examples of one optimizer step over all processes; process ``rank`` of ``world`` receives its
    share. Each pass draws a new order from ``sampler``; ``batches(order, skip)`` goes on with an order drawn before, without
    its first ``skip`` batches. (Random numbers that a Dataset draws inside ``num_workers`` start anew then.)
    """

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        *,
        sampler: Sampler[int] | None = None,
        device: torch.device | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        if min(batch_size, len(data)) < world:  # type: ignore[arg-type]
            raise ArgumentError(
                f"batch_size = {batch_size}, for {len(data)} examples: must give each of the {world} processes at least one"  # type: ignore[arg-type]
            )
        self.data = data
        self.batch_size = batch_size
        self.sampler: Sampler[int] = SequentialSampler(data) if sampler is None else sampler  # type: ignore[arg-type]
        self.device = device or torch.device("cpu")
        self.rank, self.world, self.num_workers = rank, world, num_workers

    def __len__(self) -> int:
        count = len(self.sampler)  # type: ignore[arg-type]
        full, rest = divmod(count, self.batch_size)
        return full + (rest >= self.world)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def order(self) -> Tensor:
        """The positions of one pass, (M,) int64."""
        sampler = self.sampler
        if isinstance(sampler, SequentialSampler):
            return torch.arange(len(sampler))
        return torch.tensor(list(sampler), dtype=torch.int64)

    def batches(self, order: Tensor | None = None, skip: int = 0) -> Iterator[Batch]:
        order = self.order() if order is None else order
        rows = list(order.split(self.batch_size))[skip : len(self) if self.world > 1 else None]
        total = [len(r) for r in rows]
        if self.world > 1:
            rows = [r.tensor_split(self.world)[self.rank] for r in rows]
        if isinstance(self.data, Examples):
            batches: Iterator[Batch] = map(self.data.take, rows)
        else:
            # The workers' base seed: another one every epoch and process, and never from the global generator.
            seed = zlib.crc32(order.numpy().tobytes(), self.rank)
            loader = DataLoader(
                self.data,
                batch_sampler=[r.tolist() for r in rows],
                num_workers=self.num_workers,
                generator=torch.Generator().manual_seed(seed),
            )
            batches = map(Batch.of, loader)
        for batch, of in zip(batches, total, strict=True):
            if self.world > 1:
                batch.weight = len(batch) * self.world / of
            yield batch.to(self.device)
