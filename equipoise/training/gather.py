"""``gather_rows``: the rows of all processes, with gradient, for losses whose mathematics needs the whole batch.

Contrastive terms, soft confusion counts and dependence measures are no means over examples: on a share of the batch they are
another function. Every process gathers the rows and computes the same loss of the global batch. The gradient that reaches
a process's own rows is the sum of the gradients of all processes' losses; so the average of gradients over processes that
``DistributedDataParallel`` takes is exactly the gradient of the loss of the global batch, for shares of any sizes.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of processes of the default group; 1 outside a distributed run."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@overload
def gather_rows(first: Tensor, /) -> Tensor: ...
@overload
def gather_rows(first: Tensor, second: Tensor, /, *others: Tensor) -> tuple[Tensor, ...]: ...
def gather_rows(first: Tensor, /, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The rows of all processes, in rank order; what is given where there is one process.

    Tensors (N, ...) with the same number of rows N, which may differ between processes; dtypes may be any. A single tensor
    comes back as it is, several as a tuple. Gradients flow to the rows of every process (once differentiable). Every process
    must call it the same number of times.
    """
    tensors = (first, *others)
    if world_size() > 1:
        counts = _counts(len(first), first.device)
        tensors = tuple(_Gather.apply(tensor, counts) for tensor in tensors)
    return tensors if others else tensors[0]


def _counts(rows: int, device: torch.device) -> list[int]:
    """Number of rows of each process."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    torch.distributed.all_gather(sizes, torch.tensor([rows], device=device))
    return [int(size) for size in sizes]


class _Gather(torch.autograd.Function):
    """Concatenates over processes; the backward pass adds up over processes and keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives take equal shapes: pad to the largest share.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rank = torch.distributed.get_rank()
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        start = sum(ctx.counts[:rank])
        return total[start : start + ctx.counts[rank]], None
