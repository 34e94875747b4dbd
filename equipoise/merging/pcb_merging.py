"""PCB-Merging: merge fine-tuned models by letting their parameters compete.

Several models, fine-tuned from the same weights on different tasks, are to become one that does all of them, without data and
without training. Averaging dilutes what one task needs with what the others do not. PCB-Merging gives every entry of every
task vector (fine-tuned minus base weights) a coefficient of its own: high where the entry is large within its task and agrees
with the other tasks; entries with a low score are dropped, and the rest is a weighted average.

With task vectors `tau_i` of `d` entries, `n` of them, `minmax` over the entries of a task, and `a_i` the magnitudes `|tau_i|`
clamped between their quantiles `q` and `1 - q`,

    intra_i  =  exp(n minmax(a_i)^2)                                   large within its task
    inter_i  =  tanh(tau_i sum_j tau_j)                                of one sign with the others
    scale_i  =  minmax(max(intra_i inter_i, threshold_i))              the threshold drops all but a share r of the entries
    theta    =  theta_0 + sum_i lambda_i scale_i sign(tau_i) a_i / sum_i scale_i

where no scale is positive the base's weight stays. Two further forms of `inter` and the printed form of the score (softmax over
all entries in place of exponential, tanh and min-max) are there; the default is what the released code does.

## When to use
Models fine-tuned from one base on different tasks, of which you want one model, and have no data to train it with or no time;
a few validation examples of each task suffice to choose `ratio` and the coefficient. Cheap enough to try beside TIES and task
arithmetic.

## When not
Models that do not share a base: their weights do not correspond. Tasks that contradict each other on the same inputs (flipped
or half-turned images): every merging method fails. Where the tasks' data may be trained on together, that is better. With small
networks expect no more than tuned task arithmetic or TIES give. BatchNorm statistics are no parameters: exclude them and compute
them anew.

## Cost
No training. Five passes over the models' tensors: two for the quantiles, two for the threshold, one that merges (the softmax form
takes more, in float64). Memory: a block of entries; `pcb_merge` also returns two matrices of the task vectors' size. The forms
"pairwise" and "softmax" take n^2 d operations, the others n d.

## In a distributed run
It acts after training, on weights that are equal in all processes, and draws no random numbers: every process does the same.

## Source
Du, Lee, Li, Jiang, Guo, Yu, Liu, Goh, Tang, He, Zhang: Parameter Competition Balancing for Model Merging. NeurIPS 2024,
arXiv:2410.02396; the default form as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.merging.baselines import task_arithmetic as task_arithmetic
from equipoise.merging.baselines import ties_merge as ties_merge
from equipoise.merging.method import Coefficients, MergingMethod, check_coefficients
from equipoise.merging.selection import Blocks, columns, kth_smallest
from equipoise.merging.vectors import Exclude, Plan, State, Weigh, check_task_vectors, merge_state_dicts
from equipoise.merging.vectors import task_vector as task_vector
from equipoise.training.method import Paper
from equipoise.training.space import LogUniform, Space, Uniform

INTERS = ("sum", "normalized_sum", "pairwise")
FORMS = ("tanh", "softmax")
Score = Callable[[Tensor], tuple[Tensor, Tensor]]  # entries (n, k) to their scale and clipped values, (n, k) each


# -- the functional core ----------------------------------------------------------------------------------------------
def balance(blocks: Blocks, n: int, d: int, *, ratio: float, clip: float, inter: str, form: str) -> Score:
    """Look at all task vectors, n of d entries, and return what gives a block's ``scale`` and ``clipped`` values."""
    return _softmax_form(blocks, n, d, ratio) if form == "softmax" else _tanh_form(blocks, n, d, ratio, clip, inter)


def average(scale: Tensor, clipped: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_i lambda_i scale_i clipped_i / sum_i scale_i``, (n, k) to (k,); 0 where all scales are. coefficients: () or (n,)."""
    return (_weights(scale) * (coefficients.reshape(-1, 1) * clipped)).sum(0)


def _weights(scale: Tensor) -> Tensor:
    total = scale.sum(0)
    return scale / torch.where(total > 0, total, 1)


def _tanh_form(blocks: Blocks, n: int, d: int, ratio: float, clip: float, inter: str) -> Score:
    magnitudes = lambda: (tau.abs() for tau in blocks())  # noqa: E731
    ends = kth_smallest(magnitudes, [int(d * clip), int(d * (1 - clip) - 1)])
    low, high = ends[:, :1], ends[:, 1:]
    least = torch.minimum(low, high)  # of 3 entries the upper quantile may lie below the lower one
    top = low.new_full((n, 1), -math.inf)

    def score(tau: Tensor) -> Tensor:
        size = _minmax_(tau.abs().clamp_(low, high), least, high)
        if inter == "sum":
            agreement = (tau * tau.sum(0)).tanh_()
        elif inter == "normalized_sum":
            agreement = (tau * (tau.sign() * size).sum(0)).tanh_()
        else:
            signed = tau.sign() * size
            agreement = sum(((signed * other).tanh_() for other in signed), start=torch.zeros_like(signed))
        # A factor on the scores of all entries falls out of the second minmax: exp(-n) keeps many tasks from an overflow.
        return size.square_().sub_(1).mul_(n).exp_().mul_(agreement)

    def scored() -> Iterator[Tensor]:
        for tau in blocks():
            found = score(tau)
            torch.maximum(top, found.amax(1, keepdim=True), out=top)
            yield found

    threshold = kth_smallest(scored, [_dropped(d, ratio)])

    def weigh(tau: Tensor) -> tuple[Tensor, Tensor]:
        scale = _minmax_(score(tau).clamp_(min=threshold), threshold, top)
        return scale, tau.abs().clamp_(low, high).mul_(tau.sign())

    return weigh


def _softmax_form(blocks: Blocks, n: int, d: int, ratio: float) -> Score:
    wide = lambda: (tau.double() for tau in blocks())  # noqa: E731  # scores are about 1 / d^2
    products = lambda tau: (tau * other for other in tau)  # noqa: E731
    ends: list[tuple[Tensor, Tensor]] = []  # smallest and largest square, and product with each task, (n, 1)
    for tau in wide():
        found = [(p.amin(1, keepdim=True), p.amax(1, keepdim=True)) for p in (tau.square(), *products(tau))]
        pairs = zip(ends or found, found, strict=True)
        ends = [(low.minimum(least), high.maximum(most)) for (low, high), (least, most) in pairs]

    def exponentials(tau: Tensor) -> tuple[Tensor, ...]:
        # Of numbers in [-n, 0] and [0, 1], so that no further care is needed.
        inter = (torch.exp(_minmax_(p, *end)) for p, end in zip(products(tau), ends[1:], strict=True))
        return torch.exp(n * (_minmax_(tau.square(), *ends[0]) - 1)), *inter

    totals = [torch.zeros(()) for _ in range(n + 1)]
    for tau in wide():
        totals = [t.to(tau) + e.sum(1, keepdim=True) for t, e in zip(totals, exponentials(tau), strict=True)]

    def scores(tau: Tensor) -> Tensor:
        intra, *inter = (e / total for e, total in zip(exponentials(tau), totals, strict=True))
        return intra * sum(inter, start=torch.zeros_like(tau))

    threshold = kth_smallest(lambda: map(scores, wide()), [_dropped(d, ratio)])

    def weigh(tau: Tensor) -> tuple[Tensor, Tensor]:
        score = scores(tau.double())
        return torch.where(score >= threshold, score, 0), tau

    return weigh


def _minmax_(values: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """``(x - min) / (max - min)`` in place, 0 where all are equal."""
    width = most - least
    return values.sub_(least).div_(torch.where(width > 0, width, 1))


def _dropped(d: int, ratio: float) -> int:
    return min(int(d * (1 - ratio)), d - 1)


# -- on task vectors and state_dicts ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PCBResult:
    """The merged task vector (d,), and the ``scale`` and ``clipped`` task vectors (n, d) of which it is the weighted average."""

    merged: Tensor
    scale: Tensor
    clipped: Tensor


def pcb_merge(
    task_vectors: Tensor,
    *,
    ratio: float = 0.1,
    coefficients: Coefficients = 1.0,
    clip: float = 1e-4,
    inter: str = "sum",
    form: str = "tanh",
) -> PCBResult:
    """Merge task vectors (n, d), n >= 1, d >= 2, computed in float32 at least; dtype and device stay.

    >>> pcb_merge(torch.tensor([[1.0, -2, 3, 0, 4], [2, 2, -1, 1, 0]]), ratio=0.4, clip=0.0).merged
    tensor([2., 0., 0., 0., 4.])

    ratio: share of the entries of each task that are kept, in (0, 1]. coefficients: factor lambda on what is merged, a number or
    one for each task (n,). clip: share of the magnitudes that is clamped at either end, in [0, 0.5).
    inter: "sum" (the product with the sum of the task vectors), "normalized_sum" (of the min-max scaled ones), or "pairwise" (a sum
    over pairs of scaled ones); the first grows with the size of the task vectors, the others do not.
    form: "tanh", as released, or "softmax", as printed, which has no ``clip`` and ``inter``; its scale is the masked score, and its
    clipped values are the task vectors.

    Raises ``ArgumentError`` (a ``ValueError``) for anything else, and for NaN or infinite entries.
    """
    _check_options(ratio, clip, inter, form)
    task_vectors = check_task_vectors(task_vectors)
    n, d = task_vectors.shape
    wide = task_vectors.dtype if task_vectors.dtype.itemsize >= 4 else torch.float32
    lam = check_coefficients(coefficients, n).to(task_vectors.device, wide)
    scale, clipped = torch.empty_like(task_vectors), torch.empty_like(task_vectors)
    merged = task_vectors.new_empty(d)
    blocks = columns(task_vectors)
    with torch.no_grad():
        weigh = balance(blocks, n, d, ratio=ratio, clip=clip, inter=inter, form=form)
        first = 0
        for block in blocks():
            part = slice(first, first := first + block.shape[1])
            weights, values = weigh(block)
            scale[:, part], clipped[:, part] = weights, values
            merged[part] = average(weights, values, lam.to(weights.dtype))
    return PCBResult(merged, scale, clipped)


def pcb_plan(*, ratio: float, coefficients: Coefficients, clip: float, inter: str, form: str) -> Plan:
    """``pcb_merge`` for task vectors that are read block by block."""
    _check_options(ratio, clip, inter, form)

    def plan(blocks: Blocks, n: int, d: int) -> Weigh:
        lam = check_coefficients(coefficients, n)
        weigh = balance(blocks, n, d, ratio=ratio, clip=clip, inter=inter, form=form)

        def merged(block: Tensor) -> Tensor:
            scale, clipped = weigh(block)
            return average(scale, clipped, lam.to(scale)).to(block.dtype)

        return merged

    return plan


def pcb_merge_state_dicts(
    base: State,
    finetuned: Sequence[State],
    *,
    ratio: float = 0.1,
    coefficients: Coefficients = 1.0,
    clip: float = 1e-4,
    inter: str = "sum",
    form: str = "tanh",
    exclude: Exclude = (),
) -> dict[str, Tensor]:
    """Merge state_dicts fine-tuned from ``base``; the result has the base's keys, dtypes and devices. Arguments as ``pcb_merge``.

    One ranking runs over all merged tensors of a model. Integer and boolean tensors, and those that ``exclude`` names (a function
    of the name; or names of tensors or modules, or patterns with ``*``), are the base's. Tied tensors count once.
    Raises ``ArgumentError`` for other keys or shapes, for NaN (naming model and tensor), and where nothing is left to merge.
    """
    plan = pcb_plan(ratio=ratio, coefficients=coefficients, clip=clip, inter=inter, form=form)
    return merge_state_dicts(plan, base, finetuned, exclude)


def search_coefficients(
    result: PCBResult,
    evaluate: Callable[[Tensor], float],
    *,
    bounds: tuple[float, float] = (0.8, 1.3),
    init: float = 1.0,
    budget: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Search one coefficient a task that maximises ``evaluate(merged task vector)``; return them (n,) and the best score.

    A (1+1) evolution strategy with the one-fifth rule: a Gaussian step from the best point, longer after a success, shorter after
    a failure. bounds: of each coefficient. init: where all of them start, inside the bounds. budget: number of evaluations, >= 1,
    the first at ``init``. generator: on the CPU; by default one seeded with 0. A score of NaN counts as a failure.
    """
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        refuse("bounds", bounds, "be two finite numbers, the smaller first")
    check_range("init", init, low, high)
    check_integer("budget", budget, 1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    scale = result.scale if result.scale.dtype.itemsize >= 4 else result.scale.float()
    parts = _weights(scale) * result.clipped
    step = (high - low) / 4

    def score(point: Tensor) -> float:
        value = float(evaluate((point.to(parts) @ parts).to(result.merged.dtype)))
        return -math.inf if math.isnan(value) else value

    best = torch.full((len(parts),), float(init), dtype=torch.float64)
    best_score = score(best)
    for _ in range(budget - 1):
        noise = torch.randn(len(parts), generator=generator, dtype=torch.float64)
        point = (best + step * noise).clamp(low, high)
        if (value := score(point)) > best_score:
            best, best_score, step = point, value, min(step * 1.5, high - low)
        else:
            step /= 1.5**0.25
    if best_score == -math.inf:
        raise ArgumentError(
            "evaluate: gave NaN or minus infinity each time; it must return a score, the higher the better"
        )
    return best.to(parts), best_score


def _check_options(ratio: float, clip: float, inter: str, form: str) -> None:
    check_range("ratio", ratio, 0, 1, open_low=True)
    check_range("clip", clip, 0, 0.5, open_high=True)
    check_choice("inter", inter, INTERS)
    check_choice("form", form, FORMS)


# -- the method -------------------------------------------------------------------------------------------------------
class PCBMerging(MergingMethod):
    """Merge fine-tuned models; entries that are large and agree with the other tasks count most, the rest is dropped.

    ratio: share of the entries kept, in (0, 1]. coefficients: factor on what is merged, or one for each model. clip: share of the
    magnitudes clamped at either end, in [0, 0.5). inter: "sum", "normalized_sum" or "pairwise". form: "tanh" or "softmax".
    exclude: names of tensors or modules that stay as they are. See ``pcb_merge``, and ``MergingMethod`` for what is merged.
    There is no neutral setting: merging replaces the weights, after training.
    """

    name = "pcb-merging"
    paper = Paper(
        "Parameter Competition Balancing for Model Merging",
        "Du, Lee, Li, Jiang, Guo, Yu, Liu, Goh, Tang, He, Zhang",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2410.02396",
    )
    space: ClassVar[Space] = {"coefficients": Uniform(0.5, 3.2), "ratio": LogUniform(0.05, 0.6)}

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        coefficients: Coefficients = 1.0,
        clip: float = 1e-4,
        inter: str = "sum",
        form: str = "tanh",
        exclude: tuple[str, ...] = (),
    ) -> None:
        _check_options(ratio, clip, inter, form)
        check_coefficients(coefficients)
        self.ratio, self.coefficients, self.clip = ratio, coefficients, clip
        self.inter, self.form, self.exclude = inter, form, exclude

    def plan(self, seed: int = 0) -> Plan:
        return pcb_plan(
            ratio=self.ratio, coefficients=self.coefficients, clip=self.clip, inter=self.inter, form=self.form
        )
