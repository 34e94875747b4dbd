"""Sums over all pairs of examples, without the matrix of all pairs: what distance covariance is computed with.

Every measure of ``distance_covariance`` is, as a function of one variable y, a weighted sum of that variable's distances:

    sum_ij T_ij ||y_i - y_j||,        T symmetric, fixed by the other variables

so that its gradient in y is ``2 sum_j T_ij (y_i - y_j) / ||y_i - y_j||``, and, since it is homogeneous of degree one, its value
is the inner product of y and that gradient. One pass gives both. For two scalar variables the pass is a sort and partial sums
in the order of both, O(n log n); for all else it goes through blocks of rows, O(n^2) in time and O(block) in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import ArgumentError

SORT_FROM = 768  # examples from which sorting is faster than all pairs
LEAF = 32  # examples of the smallest block of the sorted form
PAIRS = {"cpu": 1 << 18}  # numbers in one block of the pairwise form: what a cache holds
PAIRS_ELSEWHERE = 1 << 24  # what keeps a GPU busy
KEPT = 1 << 21  # matrices of all pairs are kept between two passes up to this size, and else computed again


def measure(c: float | None, *variables: Tensor) -> Tensor:
    """A measure of two or more variables (n, p), differentiable in all of them.

    c: the constant of JdCov; None for the sum of ``dCov^2`` between the first variable and each other one, which is then
    differentiable in the first only, unless there are but two.
    """
    needed = tuple(i for i, x in enumerate(variables) if x.requires_grad) if torch.is_grad_enabled() else ()
    if not needed:
        return value_and_gradient(variables[0], variables[1:], c)[0]
    return _Measure.apply(c, needed, *variables)


class _Measure(torch.autograd.Function):
    """The value of a measure, with its gradients in the variables at the places ``needed``."""

    @staticmethod
    def forward(ctx: Any, c: float | None, needed: tuple[int, ...], *variables: Tensor) -> Tensor:
        found = [value_and_gradient(variables[i], (*variables[:i], *variables[i + 1 :]), c) for i in needed]
        ctx.needed, ctx.count = needed, len(variables)
        ctx.curved = any(variables[i].shape[1] > 1 for i in needed)
        ctx.save_for_backward(*(gradient for _, gradient in found))
        return found[0][0]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.curved and torch.is_grad_enabled():
            raise ArgumentError(
                "create_graph = True: the measure has second derivatives for scalar predictions (N,) only, which are zero"
            )
        gradients: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(ctx.needed, ctx.saved_tensors, strict=True):
            gradients[i] = outer[0] * gradient
        return None, None, *gradients


@torch.no_grad()
def value_and_gradient(y: Tensor, others: Sequence[Tensor], c: float | None) -> tuple[Tensor, Tensor]:
    """The measure of y (n, k) and the others (n, p), and its gradient in y (n, k)."""
    n = len(y)
    scale = 1 / (n * (n - 3))
    constant: Tensor | float = 0.0
    if c is not None and len(others) > 1:
        pull, constant = _product(y, others, c)
    else:
        flat = [n >= SORT_FROM and y.shape[1] == s.shape[1] == 1 for s in others]
        pulls = [_sorted(y[:, 0], s[:, 0]) for s, scalar in zip(others, flat, strict=True) if scalar]
        rest = [s for s, scalar in zip(others, flat, strict=True) if not scalar]
        pull = _sum(y, rest) if rest else pulls.pop()[:, None].to(y.dtype)
        for other in pulls:
            pull += other[:, None]
    gradient = pull.mul_(2 * scale)
    return ((y - y.mean(0)) * gradient).sum() + constant * scale, gradient


# -- all pairs, in blocks of rows -------------------------------------------------------------------------------------
class Variable:
    """A variable x (n, p) and the differences of its pairs, by blocks of at most ``step`` rows."""

    def __init__(self, x: Tensor, step: int) -> None:
        self.columns = x.T.contiguous()
        self.scratch = x.new_empty(step * x.numel())  # one for all blocks: new memory costs more than the sums

    def differences(self, rows: slice) -> Tensor:
        """``x_i - x_j`` (p, b, n) for the given rows i, until the next call."""
        (p, n), b = self.columns.shape, rows.stop - rows.start
        out = self.scratch[: p * b * n].view(p, b, n)
        return torch.sub(self.columns[:, rows, None], self.columns[:, None, :], out=out)

    def pull(self, rows: slice, weights: Tensor) -> Tensor:
        """``sum_j T_ij e_ij`` (b, p), ``e_ij = (x_i - x_j) / ||x_i - x_j||``, for the rows of ``weights`` T (b, n), used up.

        Pairs at the same place count zero, so that the diagonal is not read.
        """
        difference = self.differences(rows)
        if len(difference) == 1:
            return weights.mul_(difference[0].sign_()).sum(1, keepdim=True)
        # The differences themselves, not x_i sum(T / d) - (T / d) x: for close points that would lose all digits. The
        # smallest normal number stands for the square of distances that underflow.
        squares = difference.square().sum(0).clamp_min_(torch.finfo(weights.dtype).tiny)
        return difference.mul_(weights.mul_(squares.rsqrt_())).sum(2).T


class Centred(Variable):
    """The U-centred distances of x (n, p), by blocks of rows.

    ``U_ij = r_i + r_j - a_ij - m`` off the diagonal and 0 on it, ``r_i = sum_k a_ik / (n - 2)``,
    ``m = sum_kl a_kl / ((n - 1)(n - 2))``: minus the usual U-centring, so that rows sum to zero too.
    """

    def __init__(self, x: Tensor, blocks: Sequence[slice]) -> None:
        super().__init__(x, blocks[0].stop)
        n, self.kept = len(x), None
        sums = x.new_empty(n)
        kept = x.new_empty(n, n) if n * n <= KEPT else None
        for rows in blocks:
            a = self.distances(rows)
            sums[rows] = a.sum(1)
            if kept is not None:
                kept[rows] = a
        self.kept, self.r = kept, sums / (n - 2)
        self.m = self.r.sum() / (n - 1)

    def distances(self, rows: slice) -> Tensor:
        """Euclidean distances (b, n) of the given rows to all; exact for close points."""
        if self.kept is not None:
            return self.kept[rows]
        difference = self.differences(rows)
        return difference[0].abs_() if len(difference) == 1 else difference.square_().sum(0).sqrt_()

    def off_diagonal(self, rows: slice) -> Tensor:
        """``U`` (b, n) for the given rows, where the diagonal will not be read."""
        return (self.r - self.distances(rows)).add_((self.r[rows] - self.m)[:, None])

    def block(self, rows: slice) -> Tensor:
        """``U`` (b, n) for the given rows."""
        u = self.off_diagonal(rows)
        u.diagonal(rows.start).zero_()
        return u


def _blocks(*variables: Tensor) -> list[slice]:
    n, widest = len(variables[0]), max(x.shape[1] for x in variables)
    step = min(n, max(1, PAIRS.get(variables[0].device.type, PAIRS_ELSEWHERE) // (n * widest)))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _sum(y: Tensor, others: Sequence[Tensor]) -> Tensor:
    """``sum_j T_ij e_ij`` (n, k) for ``T = -sum_m U^m``, the weights of ``sum_m dCov^2(y, s_m)``: see ``Variable.pull``."""
    blocks = _blocks(y, *others)
    variable = Variable(y, blocks[0].stop)
    first, *more = [Centred(s, blocks) for s in others]
    pull = torch.empty_like(y)
    for rows in blocks:
        weights = first.off_diagonal(rows)
        for other in more:
            weights += other.off_diagonal(rows)
        pull[rows] = variable.pull(rows, weights)
    return pull.neg_()


def _product(y: Tensor, others: Sequence[Tensor], c: float) -> tuple[Tensor, Tensor]:
    """``sum_j T_ij e_ij`` (n, k), and ``c sum_ij M_ij``, for the weights T of JdCov.

    With ``M = prod_m (U^m + c) - c^d``, whose diagonal is zero, ``JdCov n(n - 3) = sum_ij (U^y_ij + c) M_ij``; the centring in
    U^y is a self-adjoint map, so that the sum is that of the distances of y, weighted by M centred once more.
    """
    n, blocks = len(y), _blocks(y, *others)
    variable = Variable(y, blocks[0].stop)
    first, *more = [Centred(s, blocks) for s in others]

    def products(rows: slice) -> Tensor:
        product = first.block(rows).add_(c)
        for other in more:
            product *= other.block(rows).add_(c)
        return product.sub_(c ** len(others))

    kept = [products(rows) for rows in blocks] if n * n <= KEPT else None
    sums, pull = y.new_empty(n), torch.empty_like(y)
    for rows, product in zip(blocks, map(products, blocks) if kept is None else kept, strict=True):
        sums[rows] = product.sum(1)
    r, m = sums / (n - 2), sums.sum() / ((n - 1) * (n - 2))
    for rows, product in zip(blocks, map(products, blocks) if kept is None else kept, strict=True):
        pull[rows] = variable.pull(rows, (r - product).add_((r[rows] - m)[:, None]))
    return pull, c * sums.sum()


# -- two scalar variables: in the order of both -----------------------------------------------------------------------
def _sorted(y: Tensor, x: Tensor) -> Tensor:
    """``- sum_j sign(y_i - y_j) U^x_ij`` (n,) float64, for y and x (n,), in O(n log n).

    With x sorted, ``sum_j |x_i - x_j| sign(y_i - y_j)`` needs, beside partial sums along either order, for each i the sum of
    ``x_i - x_j`` over the j before i in both orders; equal y are put in the order of x, and their share is taken out again.
    """
    n = len(y)
    y, x = y.double(), x.double()
    x, by_x = (x - x.mean()).sort()
    y, order = y[by_x].sort(stable=True)  # order: the place along x, listed along y
    place = torch.arange(n, device=y.device)
    row = torch.sub(x * (2 * place + (2 - n)), x.cumsum(0), alpha=2)  # sum_j |x_i - x_j|, since x sums to zero
    before = _before_in_both(order, x)[order]
    x, row = x[order], row[order]
    first, last = torch.searchsorted(y, y), torch.searchsorted(y, y, right=True)  # the equal ones
    sums = F.pad(x.cumsum(0), (1, 0))
    pull = 4 * before + 2 * sums[:-1] + sums[last] - sums[first] - x * (2 * place + last - first) - row
    r = row / (n - 2)
    m = r.sum() / (n - 1)
    partial = F.pad(r.cumsum(0), (1, 0))
    pull -= (first + last - n) * (r - m) + partial[first] + partial[last] - partial[-1]
    return torch.empty_like(pull).scatter_(0, by_x[order], pull)


def _before_in_both(order: Tensor, x: Tensor) -> Tensor:
    """``sum of x_p - x_q over q < p that stand before p in order too``, for each place p; (n,).

    order: (n,) int64, a permutation of the places. Blocks of places, each listed in ``order``, are halved until they are small:
    in each, the left half's counts and partial sums are read at the members of the right half.
    """
    n = len(x)
    levels = max(0, (-(-n // LEAF) - 1).bit_length())
    leaf = -(-n // 2**levels)
    total = leaf << levels
    places = torch.arange(total, device=x.device)
    order = torch.cat([order, places[n:]])  # what is added stands last in both orders, before nothing
    x = F.pad(x, (0, total - n))
    found = torch.zeros_like(x)
    width = total
    while width > leaf:
        half = width // 2
        start = places[::width, None]
        listed = x[order].view(-1, width)
        left = order.view(-1, width) < start + half
        count = left.cumsum(1)
        term = (listed * count).sub_((listed * left).cumsum(1))
        found.scatter_add_(0, order, term.masked_fill_(left, 0).view(-1))
        target = torch.where(left, count + (start - 1), (places + half).view(-1, width) - count)
        order = torch.empty_like(order).scatter_(0, target.view(-1), order)
        width = half
    rank = torch.empty_like(order).scatter_(0, order, places).view(-1, leaf)
    both = (rank[:, None, :] < rank[:, :, None]).tril_(-1).to(x.dtype)
    x = x.view(-1, leaf)
    counted, summed = (both @ torch.stack([torch.ones_like(x), x], 2)).unbind(2)
    return (found + (x * counted - summed).view(-1))[:n]
