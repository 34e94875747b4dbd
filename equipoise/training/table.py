"""Per-example state: one row per training example, indexed by ``batch.index``.

The table itself is a plain buffer of the part that needs it (so that it moves, saves and loads with the part); these
functions are the only ones that check its index and write to it. In a distributed run every process writes the rows of
all processes, so that the tables stay equal although examples change process every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.errors import ArgumentError
from equipoise.training.gather import gather_rows

if TYPE_CHECKING:
    from equipoise.training.run import Run


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
    index, rows = gather_rows(index, rows)
    if index.unique().numel() < index.numel():
        positions, inverse = index.unique(return_inverse=True)
        order = torch.arange(index.numel(), device=index.device)
        last = torch.zeros_like(positions).scatter_reduce_(0, inverse, order, "amax")
        index, rows = positions, rows[last]
    table.index_copy_(0, index, rows)
    return rows if index is given else table[given]


def table_shape(run: Run, method: str) -> tuple[int, int]:
    """Numbers of training examples and classes of a run, which a per-example table of ``method`` needs."""
    if run.num_examples is None:
        raise ArgumentError(
            f"data = None: {method} keeps a row per training example and must know how many there are. "
            "Give the training set: equipoise.start(..., data=train_set)"
        )
    if run.num_classes is None:
        raise ArgumentError(
            f"num_classes = None: {method} needs a classification task and its number of classes, which the data do not tell. "
            "Give num_classes=..."
        )
    return run.num_examples, run.num_classes
