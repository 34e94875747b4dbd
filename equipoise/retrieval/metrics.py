"""What embeddings of classes are worth: for search by rank, and for one threshold that all classes share.

Every example with another one of its class is a query, all other examples are the gallery. Of equally near examples (cosines
within 1e-12) those of another class rank first, so that a model that maps everything to one point finds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import check_integer, check_range
from equipoise.retrieval.pairs import PairDistances
from equipoise.retrieval.tcm import consistency, equally_spaced

TIE = 1e-12
FAR_RANGE = (0.01, 0.1)  # false accept rates between which a model's own range of thresholds lies
THRESHOLDS = 101
SPREAD_FAR = 0.05
SPREAD_GRID = (0.0, 2.0), 401


def recall_at_k(embeddings: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of the queries with at least one of their class among the k nearest, in [0, 1].

    embeddings: (n, D), of any norm. labels: (n,) integers. k: >= 1.
    """
    check_integer("k", k, 1)
    return _recall(PairDistances(embeddings, labels), k)


def map_at_r(embeddings: Tensor, labels: Tensor) -> float:
    """Mean over the queries of ``(1/R) sum over i <= R of precision at i, where the i-th nearest is of the class``, in [0, 1].

    R is the number of other examples of the query's class. Arguments as for ``recall_at_k``. Source: Musgrave, Belongie, Lim:
    A Metric Learning Reality Check, ECCV 2020, Sec. 3.2.
    """
    return _map_at_r(PairDistances(embeddings, labels))


def threshold_spread(embeddings: Tensor, labels: Tensor, far: float = SPREAD_FAR) -> float:
    """How far apart the thresholds lie that suit each class: their standard deviation over classes, a distance in [0, 1].

    A class's threshold is the largest Euclidean distance of unit embeddings, to 0.005, at which at most the share ``far`` of
    its pairs with other classes is accepted. far: in (0, 1). Other arguments as for ``recall_at_k``.
    """
    check_range("far", far, 0, 1, open_low=True, open_high=True)
    pairs = PairDistances(embeddings, labels)
    grid = equally_spaced(*SPREAD_GRID).to(pairs.unit)
    return _spread(grid, pairs.curves(grid)[1], far)


@torch.no_grad()
def retrieval_metrics(embeddings: Tensor, labels: Tensor, shared_range: tuple[float, float]) -> dict[str, float]:
    """All of it, with one pass over the pairs for the curves. Arguments as for ``recall_at_k``.

    ``recall_at_1``, ``recall_at_5``, ``map_at_r``, ``threshold_spread``; ``opis`` and ``epsilon_opis`` (the worst tenth of the
    classes) between the distances ``far_low`` and ``far_high`` at which this model accepts 1 % and 10 % of all negative pairs;
    ``opis_shared`` and ``epsilon_opis_shared`` between the distances ``shared_range``, the same for every model.
    """
    pairs = PairDistances(embeddings, labels)
    own = pairs.negative_quantiles(FAR_RANGE)
    spans = [(own, THRESHOLDS), (shared_range, THRESHOLDS), SPREAD_GRID]
    thresholds = [equally_spaced(*span).to(pairs.unit) for span in spans]
    sizes = [len(t) for t in thresholds]
    curves = zip(*(curve.split(sizes, 1) for curve in pairs.curves(torch.cat(thresholds))), strict=True)
    mine, shared, grid = zip(thresholds, curves, strict=True)
    found = {"recall_at_1": _recall(pairs, 1), "recall_at_5": _recall(pairs, 5), "map_at_r": _map_at_r(pairs)}
    for name, (at, rates) in {"": mine, "_shared": shared}.items():
        result = consistency(pairs.classes, at, *rates)
        found |= {f"opis{name}": result.opis, f"epsilon_opis{name}": result.epsilon()}
    spread = _spread(grid[0], grid[1][1], SPREAD_FAR)
    return found | {"threshold_spread": spread, "far_low": own[0], "far_high": own[1]}


def _spread(grid: Tensor, specificity: Tensor, far: float) -> float:
    # 1e-9: a share such as 1 - 0.95 is a little more than 0.05
    last = (specificity >= 1 - far - 1e-9).sum(1) - 1
    return grid[last.clamp(min=0)].std(correction=0).item()


def _queries(pairs: PairDistances, rows: slice) -> Tensor:
    """Which of the rows have another example of their class."""
    return pairs.eligible[pairs.codes[rows]]


def _recall(pairs: PairDistances, k: int) -> float:
    hits = []
    for rows, block, same in pairs.blocks():
        own = block.masked_fill(~same, 3)
        own.diagonal(rows.start).fill_(3)
        nearer = ((block <= own.amin(1, keepdim=True) + TIE) & ~same).sum(1)
        hits.append((nearer < k)[_queries(pairs, rows)])
    return torch.cat(hits).double().mean().item()


def _map_at_r(pairs: PairDistances) -> float:
    wanted = pairs.counts[pairs.codes] - 1
    longest = int(wanted.max())
    place = torch.arange(1, longest + 1, device=pairs.unit.device)
    found = []
    for rows, block, same in pairs.blocks():
        far = block + TIE * same
        far.diagonal(rows.start).fill_(3)  # a query does not find itself
        nearest = same.gather(1, far.topk(longest, largest=False).indices).double()
        r = wanted[rows, None]
        terms = nearest * nearest.cumsum(1) / place * (place <= r)
        found.append((terms.sum(1) / r.squeeze(1))[_queries(pairs, rows)])
    return torch.cat(found).mean().item()
