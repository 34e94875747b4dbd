"""Pairs of embeddings: unit vectors, checks, and the distances of all pairs of a test set, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice

DISTANCES = ("euclidean", "cosine")
BLOCK = 2**20  # pairs held at a time
BINS = 2**16  # of cosine distances; a power of two, so that what lies in a bin is exact


def unit_rows(embeddings: Tensor) -> Tensor:
    """Embeddings (N, D) scaled to norm 1. A zero row has no direction: it stays zero and gets no gradient; its cosines are 0."""
    norm = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    return embeddings / norm.masked_fill(norm == 0, math.inf)


def check_pairs(embeddings: Tensor, labels: Tensor, prefix: str = "") -> None:
    """Refuse embeddings that are not floating point (N, D), and labels that are not integers (N,)."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ArgumentError(
            f"{prefix}embeddings = {embeddings.dtype} {tuple(embeddings.shape)}: must be floating point of shape (N, D)"
        )
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ArgumentError(
            f"{prefix}labels = {labels.dtype} {tuple(labels.shape)}: must be integer classes of shape ({len(embeddings)},), one "
            "for each embedding"
        )


class PairDistances:
    """The cosine distances ``1 - s`` of all pairs of n embeddings, in float64; distances of either kind go in and out.

    embeddings: (n, D), finite. labels: (n,) integers. distance: "euclidean" (``sqrt(2 - 2 s)``) or "cosine" (``1 - s``).
    ``codes``: (n,) the class of each row, numbered from 0. ``counts``: examples of each. ``eligible``: which have two or more.
    ``classes``: (T,) the labels of these, ascending. Raises ``ArgumentError`` where there are fewer than two of them.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, distance: str = "euclidean") -> None:
        check_choice("distance", distance, DISTANCES)
        check_pairs(embeddings, labels)
        if not torch.isfinite(embeddings).all():
            raise ArgumentError("embeddings hold NaN or infinite values: must be finite. Did the training diverge?")
        present, self.codes, self.counts = labels.unique(return_inverse=True, return_counts=True)
        self.eligible = self.counts > 1
        self.classes = present[self.eligible]
        if len(self.classes) < 2:
            raise ArgumentError(
                f"labels = {len(self.classes)} of {len(present)} classes with at least 2 examples: must be at least 2. Give "
                "more examples a class"
            )
        self.unit, self.euclidean = unit_rows(embeddings.double()), distance == "euclidean"
        self.size = max(1, BLOCK // len(labels))
        self.whole = self._block(0) if self.size >= len(labels) else None

    def _block(self, start: int) -> Tensor:
        return (self.unit[start : start + self.size] @ self.unit.T).neg_().add_(1).clamp_(min=0)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of rows, their cosine distances (rows, n), and which of these pairs are of one class (the row's own self too)."""
        for start in range(0, len(self.codes), self.size):
            rows = slice(start, start + self.size)
            block = self._block(start) if self.whole is None else self.whole
            yield rows, block, self.codes[rows, None] == self.codes

    def negative_quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """The distances below which these shares of all unordered negative pairs lie, linearly interpolated.

        Exact: a histogram finds the bins of the order statistics, a second pass collects what lies in these bins.
        """

        def binned() -> Iterator[tuple[Tensor, Tensor]]:
            for _, block, same in self.blocks():
                yield block, _bins(block).masked_fill_(same, BINS)

        sizes = sum(torch.bincount(bins.flatten(), minlength=BINS + 1) for _, bins in binned())[:BINS]  # type: ignore[index]
        upto = sizes.cumsum(0)
        places = [share * (int(upto[-1]) // 2 - 1) for share in shares]  # every pair is counted from both its ends
        ranks = torch.tensor([[2 * math.floor(p), 2 * math.ceil(p)] for p in places], device=upto.device)
        of_rank = torch.searchsorted(upto, ranks, right=True)
        wanted = torch.zeros(BINS + 1, dtype=torch.bool, device=upto.device)
        wanted[of_rank] = True
        inside = torch.cat([block[wanted[bins]] for block, bins in binned()]).sort().values
        passed = (sizes * ~wanted[:BINS]).cumsum(0)  # what was not collected and lies below
        found = inside[ranks - passed[of_rank]]
        found = (2 * found).sqrt() if self.euclidean else found
        return tuple(a + (b - a) * (p - math.floor(p)) for (a, b), p in zip(found.tolist(), places, strict=True))

    def curves(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Sensitivity and specificity (T, G) of the classes at distances (G,) >= 0, in float64."""
        ordered, order = thresholds.double().clamp(max=3).sort()  # no pair is farther than 2
        cosine = ordered.square() / 2 if self.euclidean else ordered
        # A pair belongs to the first threshold that accepts it. Its bin tells which, but for bins that hold a threshold.
        held = torch.bincount(_bins(cosine), minlength=BINS)
        below = held.cumsum(0) - held
        width = len(ordered) + 1
        counts = torch.zeros(2 * len(self.counts) * width + 1, dtype=torch.int64, device=self.unit.device)
        for rows, block, same in self.blocks():
            bins = _bins(block).flatten()
            key = below.index_select(0, bins).view_as(block)
            unclear = held.index_select(0, bins).view_as(block) > 0
            key[unclear] = torch.bucketize(block[unclear], cosine)
            # One histogram for all classes at once.
            key.add_(2 * width * self.codes[rows, None]).add_(same, alpha=width)
            key.diagonal(rows.start).fill_(len(counts) - 1)  # no pair
            counts += torch.bincount(key.flatten(), minlength=len(counts))
        accepted = counts[:-1].view(-1, 2, width).cumsum(2)[self.eligible].double()
        share = (accepted[..., :-1] / accepted[..., -1:])[..., order.argsort()]
        return share[:, 1], 1 - share[:, 0]


def _bins(distances: Tensor) -> Tensor:
    """The bin, int32 in [0, BINS), of cosine distances in [0, 2]."""
    return (distances * (BINS / 2)).int().clamp_(max=BINS - 1)
