"""Exact order statistics of more numbers than fit into memory, by counting digits.

The bits of a floating-point number, with the negative ones turned over, order as integers. A pass over the numbers counts the
16 leading bits, which says in which of 65,536 drawers the wanted rank lies; the next pass counts the 16 bits that follow among
the numbers of that drawer. Two passes find a float32 exactly, four a float64. Counting costs less than sorting, and less than
``torch.kthvalue``, so that it is also what is used for numbers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Blocks (n, k) of an (n, d) matrix, column after column, float32 or float64; each call gives the same blocks again.
Blocks = Callable[[], Iterator[Tensor]]
BLOCK = 1 << 18  # columns of a block: small enough for the caches, large enough that the count's own cost vanishes
_BITS = 16
_DRAWERS = 1 << _BITS


def columns(matrix: Tensor) -> Blocks:
    """A matrix (n, d) in blocks of columns, in float32 at least."""
    wide = matrix.dtype if matrix.dtype.itemsize >= 4 else torch.float32
    return lambda: (block.to(wide) for block in matrix.split(BLOCK, 1))


def kth_smallest(blocks: Blocks, ranks: Sequence[int]) -> Tensor:
    """The k-th smallest of each row, (n, len(ranks)), for k in ``ranks``, counted from 0; equal to those of a sort.

    Ranks must lie in [0, d). NaN has no rank and must not occur.
    """
    found: dict[tuple[int, int], int] = {}  # by row and rank: the leading bits known so far
    within: dict[tuple[int, int], int] = {}  # and the rank among the numbers that have them
    width = 32
    for level in range(4):  # at most: float64
        counts: dict[tuple[int, int | None], Tensor] = {}
        for block in blocks():
            width = 8 * block.dtype.itemsize
            shift = width - _BITS * (level + 1)
            for row, numbers in enumerate(_ordered(block)):
                for prefix in {found.get((row, rank)) for rank in ranks}:
                    chosen = numbers
                    if prefix is not None:
                        chosen = numbers[(numbers >> (shift + _BITS)) == prefix]
                    if len(chosen):
                        # The leading digit carries the sign: its drawers begin with the most negative.
                        digits = chosen >> shift
                        digits = digits + _DRAWERS // 2 if prefix is None else digits & (_DRAWERS - 1)
                        counted = torch.bincount(digits, minlength=_DRAWERS)
                        key = (row, prefix)
                        counts[key] = counts[key] + counted if key in counts else counted
        rows = 1 + max(row for row, _ in counts)
        for row in range(rows):
            for rank in set(ranks):
                prefix = found.get((row, rank))
                below = counts[row, prefix].cumsum(0)
                left = within.get((row, rank), rank)
                digit = int(torch.searchsorted(below, left, right=True))
                within[row, rank] = left - (int(below[digit - 1]) if digit else 0)
                found[row, rank] = digit - _DRAWERS // 2 if prefix is None else (prefix << _BITS) + digit
        if _BITS * (level + 1) == width:
            break
    integers = torch.tensor(
        [[found[row, rank] for rank in ranks] for row in range(rows)], device=block.device, dtype=_integer(block)
    )
    return _turned(integers).view(block.dtype)


def _ordered(block: Tensor) -> Tensor:
    """Integers (n, k) that order as the numbers do."""
    return _turned(block.contiguous().view(_integer(block)))


def _turned(bits: Tensor) -> Tensor:
    """All but the sign bit of negative numbers inverted; its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _integer(block: Tensor) -> torch.dtype:
    return torch.int32 if block.dtype.itemsize == 4 else torch.int64
