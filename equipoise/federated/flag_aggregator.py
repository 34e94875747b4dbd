"""Flag Aggregator: average what most workers' updates have in common, where some workers send anything at all; and its baselines.

A mean of p updates is at the mercy of one. The flag aggregator fits a subspace of r < p dimensions that reconstructs most of the
updates well, in a norm that forgives large errors of a few, and averages the updates' shares in it:

    g_i                  update of worker i, a row of (p, D);  u_i = g_i / ||g_i||
    v_i = ||Y^T u_i||^2  how much of it the subspace reconstructs, in [0, 1];  Y (D, r), Y^T Y = I
    A(Y) = sum_i sqrt(1 - v_i) + lam / (p (p - 1)) sum_{i != j} sqrt(1 - v_ij),  v_ij of (u_i - u_j) / ||u_i - u_j||
    Y   <- the r leading left singular vectors of the columns w_i u_i,  w_i = (|1 - v_i| + eps)^(-1/4), and those of the pairs
    sum_i Y Y^T u_i / r  is handed over; with scale="median_norm", / p and times the median norm of the updates

It starts at equal weights (the flag mean) and takes one or few such steps: the exact minimiser reconstructs r updates perfectly and
forgets the others. All singular vectors come from the p x p matrix of inner products, never from a matrix with D columns.

The module also defines mean, coordinate median, trimmed mean, Krum, Multi-Krum, Bulyan and geometric median, each as a function on
the stacked updates and as a federated method.

## When to use
Some clients may be broken, hostile, or trained on spoilt data, and it is not known which; at least half of them are honest, with
data that are alike. Federated training (the methods here), or gradients of data-parallel workers (the functions).

## When not
Honest clients whose data differ much: every rule here, the flag aggregator too, takes a client that is alone with its data for an
attacker. Attacks that stay inside the honest spread ("a little is enough") pass all of them. r >= p - f keeps every direction: no
defence, and with f just under half so does the default r. A majority of attackers, against which nothing here helps. A known f: on
digits, with 3 of 15 workers flipping the sign, the mean ends at 10.0 %, the flag aggregator and the median at 94.6 %, and
Multi-Krum, which is told f, at 95.8 %.

## Cost
O(D p^2) for the inner products, one read of the updates, O(p^3) and O(D p); no memory beside the updates. Krum and the geometric
median work on the same matrix; the median, the trimmed mean and the second half of Bulyan sort D times p numbers.

## In a distributed run
The server aggregates. Inner products are sums over parameters, so that shards of the updates may be reduced before the p x p work.

## Source
Hamidreza Almasi, Harsh Mishra, Balajee Vamanan and Sathya N. Ravi: Flag Aggregator: Scalable Distributed Training under Failures
and Augmented Losses using Convex Optimization. ICLR 2024, arXiv:2302.05865. The term of the pairs has normalised differences,
which the authors' code has not (lam is 0 by default). ``median_norm`` is an addition, which keeps the size of an update.
Median and trimmed mean: Yin et al., ICML 2018. Krum: Blanchard et al., NeurIPS 2017. Bulyan: El Mhamdi et al., ICML 2018, with its
iterated selection. Geometric median: Weiszfeld's iteration; Pillutla et al., IEEE TSP 2022.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.federated.algorithm import FederatedMethod, Server, Update
from equipoise.federated.params import plus, stack, unstack, weighted_mean
from equipoise.training.method import Paper
from equipoise.training.space import Choice, Space

logger = logging.getLogger("equipoise.federated")

BLOCK = 2**12  # coordinates that are worked on at once
CUTOFF = (
    1e-12  # of an eigenvalue of the unit rows' inner products, relative to the largest: what is smaller is no direction
)
SCALES = ("r", "mean", "median_norm")


@dataclass(frozen=True)
class FlagResult:
    """What ``flag_aggregate`` returns, in the dtype of the updates.

    aggregate: (D,). subspace: Y (D, r), or None. weights: w_i (p,) at Y. ratios: v_i (p,). objective: A at the start and after each
    step, (iterations + 1,), lam's term included. iterations: steps that lowered it. converged: a further step would not.
    Rows that are not finite have weight and ratio 0.
    """

    aggregate: Tensor
    subspace: Tensor | None
    weights: Tensor
    ratios: Tensor
    objective: Tensor
    iterations: int
    converged: bool


@dataclass(frozen=True)
class GeometricMedianResult:
    """What ``geometric_median`` returns.

    aggregate: (D,). objective: sum_i a_i ||g_i - aggregate||, (), the weights a_i normalised. iterations, converged: of Weiszfeld's
    iteration.
    """

    aggregate: Tensor
    objective: Tensor
    iterations: int
    converged: bool


# -- rows -------------------------------------------------------------------------------------------------------------
def _check(grads: Tensor) -> None:
    if grads.ndim != 2 or not grads.shape[0] or not grads.shape[1] or not grads.is_floating_point():
        refuse(
            "grads", f"{grads.dtype} {tuple(grads.shape)}", "hold floating-point rows (p, D), one a worker, p, D >= 1"
        )


def least_workers(rule: str, f: int) -> int:
    """The least number p of workers of which a rule (of ``RULES``, a mean excepted) tolerates ``f`` Byzantine ones."""
    return {"krum": 2 * f + 3, "multi-krum": 2 * f + 3, "bulyan": 4 * f + 3}.get(rule, 2 * f + 1)


def check_workers(rule: str, p: int, f: int) -> None:
    """Refuse more Byzantine workers ``f`` than a rule tolerates of ``p``."""
    check_integer("f", f, 0)
    if rule == "mean" and f:
        refuse("f", f, "be 0 for a mean, which tolerates no Byzantine worker", f"Choose another of {', '.join(RULES)}")
    least = least_workers(rule, f)
    if p < least:
        most = max((g for g in range(f) if least_workers(rule, g) <= p), default=None)
        raise ArgumentError(
            f"f = {f}: {rule} needs at least {least} workers to withstand {f} Byzantine ones, and there are {p}. "
            "Take more workers" + ("" if most is None else f", or f <= {most}")
        )


def _blocks(grads: Tensor) -> Iterator[Tensor]:
    return iter(grads.split(BLOCK, dim=1))


def _combine(coefficients: Tensor, grads: Tensor) -> Tensor:
    """``coefficients @ grads`` for coefficients (..., p), summed in float64: (..., D) in the dtype of grads."""
    return torch.cat([(coefficients @ block.double()).to(grads.dtype) for block in _blocks(grads)], -1)


def _gram(grads: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the rows in float64, (p, p), and which rows are finite, (p,)."""
    gram = grads.new_zeros((len(grads), len(grads)), dtype=torch.float64)
    for block in _blocks(grads):
        precise = block.double()
        gram.addmm_(precise, precise.T)
    return gram, gram.diagonal().isfinite()


def _finite(grads: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """The finite rows, their inner products, and which of all rows they are. Warns of others."""
    gram, finite = _gram(grads)
    if finite.all():
        return grads, gram, finite
    lost = (~finite).nonzero()[:, 0].tolist()
    if len(lost) == len(grads):
        raise ArgumentError(f"grads: none of the {len(grads)} rows is finite. Nothing is left to aggregate")
    warnings.warn(f"{rule}: rows {lost} of grads are not finite, and are left out", stacklevel=3)
    return grads[finite], gram[finite][:, finite], finite


def _ascending(block: Tensor) -> Tensor:
    """Each coordinate's values in ascending order, those that are not finite last: (p, B) to (B, p)."""
    columns = block.T.contiguous()
    columns = columns.float() if columns.element_size() < 4 else columns
    columns = columns.masked_fill(~columns.isfinite(), torch.inf) if not columns.sum().isfinite() else columns
    if columns.device.type == "cpu":  # numpy's sort of short rows is several times as fast
        return torch.from_numpy(np.sort(columns.numpy(), axis=1))
    return columns.sort(1).values


def _middle(ordered: Tensor) -> Tensor:
    """The median of rows in ascending order: (B, p) to (B,)."""
    p = ordered.shape[1]
    return (ordered[:, (p - 1) // 2] + ordered[:, p // 2]) / 2 if p % 2 == 0 else ordered[:, p // 2]


def _eigenbasis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above the cutoff, (k,), and their eigenvectors (p, k)."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUTOFF * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return values[kept], vectors[:, kept]


# -- the flag aggregator ----------------------------------------------------------------------------------------------
@torch.no_grad()
def flag_aggregate(
    grads: Tensor,
    r: int | None = None,
    *,
    lam: float = 0.0,
    eps: float = 1e-7,
    max_iter: int = 1,
    tol: float = 1e-10,
    init: Tensor | None = None,
    scale: Literal["r", "mean", "median_norm"] = "r",
    return_subspace: bool = True,
) -> FlagResult:
    """The updates' mean in the subspace that reconstructs most of them.

    grads: (p, D), one row a worker. r: dimension, in [1, min(p, D)]; by default (p + 2) // 2, at most D. lam: weight of the
    pairs, >= 0. eps: > 0, in the weights. max_iter: steps from the flag mean, or from ``init`` (D, r), whose columns are made
    orthonormal. tol: least decrease of the objective. scale: with s = sum_i Y Y^T u_i, "r" hands over s / r as the authors' code,
    "mean" s / p, "median_norm" s / p times the (lower) median of the norms. Rows that are not finite are left out with a warning.

    Raises ``ArgumentError``: grads not (p, D), r, lam, eps, max_iter, tol, init or scale out of range.
    """
    _check(grads)
    p, dim = grads.shape
    if r is not None:
        check_integer("r", r, 1, min(p, dim))
    check_range("lam", lam, 0)
    check_range("eps", eps, 0, open_low=True)
    check_range("tol", tol, 0)
    check_integer("max_iter", max_iter, 0)
    check_choice("scale", scale, SCALES)
    kept, gram, finite = _finite(grads, "flag_aggregate")
    p = len(kept)
    r = min((p + 2) // 2 if r is None else r, p, dim)
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)  # a zero row stays zero
    unit = inverse[:, None] * gram * inverse
    values, vectors = _eigenbasis(unit)
    points = values.sqrt()[:, None] * vectors.T  # the unit rows in an orthonormal basis of their span, (k, p)
    apart = unit.diagonal()[:, None] + unit.diagonal() - 2 * unit  # ||u_i - u_j||^2
    different = apart > CUTOFF
    share = lam / (p * (p - 1)) if p > 1 else 0.0

    def look(seen: Tensor, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals 1 - v_i and 1 - v_ij, and the objective, from the projected rows Y^T u_i, (r, p)."""
        if everything:  # exact, where rounding would leave a root of 1e-16 in the objective
            single, pairs = (norms == 0).double(), torch.zeros_like(apart)
        else:
            single = (1 - seen.square().sum(0)).clamp(0, 1)
            pairs = (1 - torch.cdist(seen.T, seen.T).square() / apart.where(different, 1.0)).clamp(0, 1)
        return single, pairs, single.sqrt().sum() + share * (pairs.sqrt() * different).sum()

    def leading(balance: Tensor) -> Tensor:
        """The leading r directions of the rows under the weights, in the basis of their span: (k, <= r)."""
        return torch.linalg.eigh(points @ balance @ points.T).eigenvectors[:, -r:]

    basis: Tensor | None = None
    if init is None:
        basis = leading(torch.eye(p, dtype=gram.dtype, device=gram.device))
        seen = basis.T @ points
    else:
        if init.shape != (dim, r):
            refuse("init", tuple(init.shape), f"have the shape ({dim}, {r})")
        start = torch.linalg.qr(init.to(grads.device, torch.float64)).Q
        rows = start.split(BLOCK)
        seen = (sum(b.double() @ y for b, y in zip(_blocks(kept), rows, strict=True)) * inverse[:, None]).T
    single, pairs, value = look(seen, basis is not None and len(values) <= r)
    objective, iterations = [value], 0
    converged = bool(value <= tol) or (basis is not None and len(values) <= r)
    while not converged and iterations < max_iter:
        balance = (single + eps).rsqrt().diag()  # squared column weights
        if share:
            edge = 2 * share * (pairs + eps).rsqrt() * different / apart.where(different, 1.0)
            balance = balance + edge.sum(1).diag() - edge
        candidate = leading(balance)
        found = look(candidate.T @ points, len(values) <= r)
        if not found[2] < value:
            converged = True
            break
        converged = bool(value - found[2] <= tol or found[2] <= tol)
        basis, seen = candidate, candidate.T @ points
        single, pairs, value = found
        objective.append(value)
        iterations += 1

    factor = {"r": 1 / r, "mean": 1 / p, "median_norm": norms.median().item() / p}[scale]
    total = factor * seen.sum(1)  # Y^T sum_i u_i
    if basis is None:
        aggregate, subspace = (start @ total).to(grads.dtype), start.to(grads.dtype)
    else:
        rows = inverse[:, None] * (vectors / values.sqrt()) @ basis  # Y = kept^T rows
        aggregate = _combine(rows @ total, kept)
        subspace = _completed(_combine(rows.T, kept).T, r) if return_subspace else None
    weights, ratios = (grads.new_zeros(len(grads)) for _ in range(2))
    weights[finite] = (single + eps).pow(-0.25).to(grads.dtype)
    ratios[finite] = (1 - single).to(grads.dtype)
    return FlagResult(
        aggregate,
        subspace if return_subspace else None,
        weights,
        ratios,
        torch.stack(objective).to(grads.dtype),
        iterations,
        converged,
    )


def _completed(subspace: Tensor, r: int) -> Tensor:
    """Further orthonormal columns for a basis (D, k) of less than r dimensions."""
    missing = r - subspace.shape[1]
    if not missing:
        return subspace
    axes = torch.eye(len(subspace), r, dtype=torch.float64, device=subspace.device)
    whole = torch.linalg.qr(torch.cat([subspace.double(), axes], 1)).Q
    return torch.cat([subspace, whole[:, subspace.shape[1] : r].to(subspace.dtype)], 1)


# -- baselines --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def mean(grads: Tensor, weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """The mean of the rows (p, D), weighted by ``weights`` (p,) >= 0 if given: (D,). Raises ``ArgumentError``."""
    _check(grads)
    return grads.mean(0) if weights is None else _combine(_normalised(weights, grads), grads)


@torch.no_grad()
def coordinate_median(grads: Tensor) -> Tensor:
    """The median of each coordinate, of an even number of workers the mean of the two middle values: (D,)."""
    _check(grads)
    return torch.cat([_middle(_ascending(block)) for block in _blocks(grads)]).to(grads.dtype)


@torch.no_grad()
def trimmed_mean(grads: Tensor, f: int) -> Tensor:
    """Of each coordinate, the mean without the f smallest and the f largest values: (D,). Raises ``ArgumentError``: p <= 2 f."""
    _check(grads)
    p = len(grads)
    check_workers("trimmed-mean", p, f)
    return torch.cat([_ascending(block)[:, f : p - f].mean(1) for block in _blocks(grads)]).to(grads.dtype)


def _distances(grads: Tensor) -> Tensor:
    """Squared distances between rows in float64, (p, p); infinite to oneself and to rows that are not finite."""
    gram, finite = _gram(grads)
    norms = gram.diagonal()
    found = (norms[:, None] + norms - 2 * gram).clamp_min(0)
    blocked = ~(finite[:, None] & finite) | torch.eye(len(grads), dtype=torch.bool, device=grads.device)
    return found.masked_fill(blocked, torch.inf)


def _scores(distances: Tensor, f: int) -> Tensor:
    neighbours = max(1, len(distances) - f - 2)
    return distances.sort(1).values[:, :neighbours].sum(1)


@torch.no_grad()
def krum_scores(grads: Tensor, f: int) -> Tensor:
    """For each row, the sum of its squared distances to its p - f - 2 nearest others: (p,).

    Raises ``ArgumentError``: f < 0, p < 2 f + 3. A row that is not finite is infinitely far from all others.
    """
    _check(grads)
    check_workers("krum", len(grads), f)
    return _scores(_distances(grads), f).to(grads.dtype)


@torch.no_grad()
def krum(grads: Tensor, f: int) -> Tensor:
    """The row of the lowest score, of equal ones the first: (D,). Raises as ``krum_scores``."""
    return multi_krum(grads, f, 1)


@torch.no_grad()
def multi_krum(grads: Tensor, f: int, m: int | None = None) -> Tensor:
    """The mean of the m rows of the lowest scores, by default p - f - 2: (D,).

    Raises ``ArgumentError`` as ``krum_scores``, and for m not in [1, p - f - 2].
    """
    _check(grads)
    p = len(grads)
    check_workers("multi-krum", p, f)
    if m is None:
        m = p - f - 2
    check_integer("m", m, 1, p - f - 2)
    chosen = _scores(_distances(grads), f).argsort(stable=True)[:m]
    return mean(grads[chosen])


@torch.no_grad()
def bulyan(grads: Tensor, f: int) -> Tensor:
    """Krum selects p - 2 f rows, one at a time; of each coordinate, the mean of the p - 4 f values nearest to their median: (D,).

    Of equally near values those of the first workers count. Raises ``ArgumentError``: f < 0, p < 4 f + 3.
    """
    _check(grads)
    p = len(grads)
    check_workers("bulyan", p, f)
    distances, left, chosen = _distances(grads), list(range(p)), []
    for _ in range(p - 2 * f):
        scores = _scores(distances[left][:, left], f)
        chosen.append(left.pop(int(scores.argsort(stable=True)[0])))
    selected = grads[sorted(chosen)]
    count = p - 4 * f
    return torch.cat([_nearest(block, count) for block in _blocks(selected)]).to(grads.dtype)


def _nearest(block: Tensor, count: int) -> Tensor:
    """The mean of the ``count`` values of each coordinate that are nearest to its median: (p, B) to (B,)."""
    block = block.float() if block.element_size() < 4 else block
    away = (block - _middle(_ascending(block))).abs_()
    limit = _ascending(away)[:, count - 1]
    nearer, level = away < limit, away == limit
    level &= level.cumsum(0) <= count - nearer.sum(0)
    return block.where(nearer | level, 0.0).sum(0) / count


@torch.no_grad()
def geometric_median(
    grads: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    max_iter: int = 100,
    tol: float = 1e-10,
    eps: float = 1e-12,
) -> GeometricMedianResult:
    """The point of the least (weighted) mean distance to the rows (p, D), by Weiszfeld's iteration from their mean.

    It runs on the rows' p x p inner products, in float64, until the objective changes by no more than ``tol`` of itself. eps: the
    least distance that divides. Rows that are not finite are left out with a warning. Raises ``ArgumentError``: weights negative or
    summing to 0, max_iter < 0, tol < 0, eps <= 0.
    """
    _check(grads)
    check_integer("max_iter", max_iter, 0)
    check_range("tol", tol, 0)
    check_range("eps", eps, 0, open_low=True)
    shares = _normalised(weights, grads)
    kept, gram, finite = _finite(grads, "geometric_median")
    shares = _normalised(shares[finite], kept)
    centred = gram - (gram @ shares)[:, None]
    centred = centred - shares @ centred
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    points = vectors * values.clamp_min(0).sqrt()  # rows less their mean, (p, p)

    def distances(coefficients: Tensor) -> Tensor:
        return torch.linalg.vector_norm(points - coefficients @ points, dim=1)

    coefficients, away = shares, distances(shares)
    objective = shares @ away
    iterations, converged = 0, bool(objective == 0)
    while not converged and iterations < max_iter:
        coefficients = shares / away.clamp_min(eps)
        coefficients = coefficients / coefficients.sum()
        away = distances(coefficients)
        before, objective = objective, shares @ away
        iterations += 1
        converged = bool((before - objective).abs() <= tol * before)
    return GeometricMedianResult(_combine(coefficients, kept), objective.to(grads.dtype), iterations, converged)


def _normalised(weights: Tensor | Sequence[float] | None, grads: Tensor) -> Tensor:
    p = len(grads)
    if weights is None:
        return torch.full((p,), 1 / p, dtype=torch.float64, device=grads.device)
    given = torch.as_tensor(weights, dtype=torch.float64, device=grads.device)
    if given.shape != (p,) or not (given >= 0).all() or not 0 < given.sum() < math.inf:
        refuse("weights", given.tolist(), f"be {p} numbers >= 0 with a positive sum")
    return given / given.sum()


# -- methods ----------------------------------------------------------------------------------------------------------
RULES: tuple[str, ...] = (
    "mean",
    "coordinate-median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "bulyan",
    "geometric-median",
    "flag",
)
NEEDS_F = ("trimmed-mean", "krum", "multi-krum", "bulyan")


def aggregate(rule: str, grads: Tensor, f: int = 0, **settings: Any) -> Tensor:
    """The aggregate (D,) of the rows (p, D) by the rule of a name (``RULES``), with the settings of its function.

    The flag aggregator's scale is "median_norm" here. Raises ``ArgumentError``: an unknown rule, f < 0, more Byzantine workers than
    the rule tolerates of p.
    """
    check_choice("rule", rule, RULES)
    _check(grads)
    check_workers(rule, len(grads), f)
    if rule == "flag":
        return flag_aggregate(grads, **{"scale": "median_norm", "return_subspace": False, **settings}).aggregate
    if rule == "geometric-median":
        return geometric_median(grads, **settings).aggregate
    functions: dict[str, Any] = {
        "mean": mean,
        "coordinate-median": coordinate_median,
        "trimmed-mean": trimmed_mean,
        "krum": krum,
        "multi-krum": multi_krum,
        "bulyan": bulyan,
    }
    return functions[rule](grads, *([f] if rule in NEEDS_F else []), **settings)


class RobustAggregate(FederatedMethod):
    """Clients train as in FedAvg; the server adds a robust aggregate of the differences that they send.

    rule: one of ``RULES``. f: how many Byzantine clients a round must withstand; refused before the first round where the rule
    does not tolerate so many. Other settings are those of the rule's function. Clients count alike, since a hostile one may claim
    any number of examples; buffers (running statistics) are averaged plainly, and no rule guards them. A round in which so many
    clients fail that the rule does not hold leaves the parameters as they were.
    """

    weighted = False

    def __init__(self, rule: str, f: int = 0, **kwargs: Any) -> None:
        check_choice("rule", rule, RULES)
        check_integer("f", f, 0)
        self.rule, self.f, self.kwargs = rule, f, kwargs

    def combine(self, grads: Tensor) -> Tensor:
        """The rule's aggregate (D,) of stacked updates (p, D): also for gradients of workers, in a loop of one's own."""
        return aggregate(self.rule, grads, self.f, **self.kwargs)

    def prepare(self, server: Server) -> None:  # type: ignore[override]
        check_workers(self.rule, server.num_drawn, self.f)

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        least = least_workers(self.rule, self.f)
        if len(updates) < least:
            logger.warning(
                "round %d: %d usable answers, and %s with f = %d needs %d; the parameters stay as they were",
                server.round,
                len(updates),
                self.rule,
                self.f,
                least,
            )
            return
        grads = stack([update.params for update in updates]).sub_(stack([server.params]))
        server.params = plus(server.params, unstack(self.combine(grads), server.params))
        server.buffers = weighted_mean([update.buffers for update in updates])


class FlagAggregator(RobustAggregate):
    """The clients' mean in the subspace that reconstructs most of their differences, at the differences' median size.

    f: Byzantine clients, used for the check alone. r: dimension of the subspace, by default half of the clients of a round and one.
    lam: weight of the pairs. max_iter: steps from the flag mean (0).
    """

    name: ClassVar[str] = "flag-aggregator"
    paper: ClassVar[Paper | None] = Paper(
        "Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex Optimization",
        "Hamidreza Almasi, Harsh Mishra, Balajee Vamanan, Sathya N. Ravi",
        "ICLR 2024",
        "https://arxiv.org/abs/2302.05865",
    )
    space: ClassVar[Space] = {"max_iter": Choice((0, 1, 5))}

    def __init__(self, f: int = 0, r: int | None = None, lam: float = 0.0, max_iter: int = 1) -> None:
        if r is not None:
            check_integer("r", r, 1)
        check_range("lam", lam, 0)
        check_integer("max_iter", max_iter, 0)
        self.r, self.lam, self.max_iter = r, lam, max_iter
        super().__init__("flag", f, r=r, lam=lam, max_iter=max_iter)


YIN = Paper(
    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    "Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett",
    "ICML 2018",
    "https://arxiv.org/abs/1803.01498",
)
BLANCHARD = Paper(
    "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    "Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer",
    "NeurIPS 2017",
    "https://arxiv.org/abs/1703.02757",
)


class NamedRule(RobustAggregate):
    """A rule under its own name, with no setting but f."""

    def __init__(self, f: int = 0) -> None:
        super().__init__(self.name, f)


class CoordinateMedian(NamedRule):
    """The median of each parameter's differences. f: Byzantine clients, used for the check alone."""

    name: ClassVar[str] = "coordinate-median"
    paper: ClassVar[Paper | None] = YIN


class TrimmedMean(NamedRule):
    """The mean of each parameter's differences without the f smallest and the f largest."""

    name: ClassVar[str] = "trimmed-mean"
    paper: ClassVar[Paper | None] = YIN


class Krum(NamedRule):
    """The differences of the one client that is nearest to its neighbours. f: Byzantine clients; needs 2 f + 3 in a round."""

    name: ClassVar[str] = "krum"
    paper: ClassVar[Paper | None] = BLANCHARD


class MultiKrum(RobustAggregate):
    """The mean of the differences of the m clients that are nearest to their neighbours.

    f: Byzantine clients; needs 2 f + 3 in a round. m: by default all but f + 2.
    """

    name: ClassVar[str] = "multi-krum"
    paper: ClassVar[Paper | None] = BLANCHARD

    def __init__(self, f: int = 0, m: int | None = None) -> None:
        if m is not None:
            check_integer("m", m, 1)
        self.m = m
        super().__init__("multi-krum", f, m=m)


class Bulyan(NamedRule):
    """Clients selected by repeated Krum, then the mean of the values nearest to each parameter's median.

    f: Byzantine clients; needs 4 f + 3 in a round.
    """

    name: ClassVar[str] = "bulyan"
    paper: ClassVar[Paper | None] = Paper(
        "The Hidden Vulnerability of Distributed Learning in Byzantium",
        "El Mahdi El Mhamdi, Rachid Guerraoui, Sebastien Rouault",
        "ICML 2018",
        "https://arxiv.org/abs/1802.07927",
    )


class GeometricMedian(NamedRule):
    """The point of the least total distance to the clients' differences. f: Byzantine clients, used for the check alone."""

    name: ClassVar[str] = "geometric-median"
    paper: ClassVar[Paper | None] = Paper(
        "Robust Aggregation for Federated Learning",
        "Krishna Pillutla, Sham M. Kakade, Zaid Harchaoui",
        "IEEE Transactions on Signal Processing 2022",
        "https://arxiv.org/abs/1912.13445",
    )
