"""Per-example state: one row per training example, indexed by ``batch.index``.

The table itself is a plain buffer of the part that needs it (so that it moves, saves and loads with the part); these
functions are the only ones that check its index and write to it. In a distributed run every process writes the rows of
all processes, so that the tables stay equal although examples change process every epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ArgumentError


def check_index(index: Tensor, num_examples: int, batch_size: int) -> None:
    """Refuse an index that is not int64 (batch_size,) with entries in [0, num_examples)."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (batch_size,):
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise ArgumentError(
            f"index = {got}: must be int64 of shape ({batch_size},), the examples' positions in the training set"
        )
    if not batch_size:
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= num_examples:
        raise ArgumentError(
            f"index = values in [{low}, {high}]: must lie in [0, {num_examples}), the size of the table. "
            "Positions must refer to the whole training set, also when a subset or a sampler draws the batch"
        )


@torch.no_grad()
def write_rows(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``table[index] = rows``, in place. A repeated position keeps its last row; all processes write all rows.

    Returns ``table[index]`` as it then is.
    """
    given, rows = index, rows.detach().to(table.dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        index, rows = _gather(index, rows)
    if index.unique().numel() < index.numel():
        positions, inverse = index.unique(return_inverse=True)
        order = torch.arange(index.numel(), device=index.device)
        last = torch.zeros_like(positions).scatter_reduce_(0, inverse, order, "amax")
        index, rows = positions, rows[last]
    table.index_copy_(0, index, rows)
    return rows if index is given else table[given]


def _gather(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Index and rows of all processes, in rank order; processes may hold different numbers of rows."""
    from torch import distributed

    world = distributed.get_world_size()
    if world == 1:
        return index, rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=index.device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor([index.numel()], device=index.device))
    counts = [int(size) for size in sizes]
    padded_index = index.new_zeros(max(counts))
    padded_rows = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded_index[: index.numel()] = index
    padded_rows[: index.numel()] = rows
    all_index = [torch.empty_like(padded_index) for _ in range(world)]
    all_rows = [torch.empty_like(padded_rows) for _ in range(world)]
    distributed.all_gather(all_index, padded_index)
    distributed.all_gather(all_rows, padded_rows)
    return (
        torch.cat([i[:n] for i, n in zip(all_index, counts, strict=True)]),
        torch.cat([r[:n] for r, n in zip(all_rows, counts, strict=True)]),
    )
