"""What merging methods are held against: averaging, task arithmetic, TIES, DARE and the greedy soup.

All act on task vectors (fine-tuned minus base weights, (n, d)), need no training, and take one pass, TIES three (two find its
thresholds). The greedy soup alone needs a score on validation data, n + n - 1 times.

- Weight averaging: the mean of the models. Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves
  accuracy without increasing inference time, ICML 2022, arXiv:2203.05482; the greedy soup is from there too.
- Task arithmetic: a coefficient times the sum. Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089.
- TIES: the largest entries of each task, and of these the mean of those that have the sign of their sum. Yadav et al.,
  TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv:2306.01708.
- DARE: entries are dropped at random and the others enlarged, which keeps the expectation; then averaged, or as in TIES. Yu et al.,
  Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024, arXiv:2311.03099.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range
from equipoise.merging.method import MergingMethod
from equipoise.merging.selection import Blocks, kth_smallest
from equipoise.merging.vectors import Plan, State, Weigh, check_task_vectors, merge_state_dicts, merge_vectors
from equipoise.training.assemble import derived_seed
from equipoise.training.method import Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space, Uniform


# -- plans ------------------------------------------------------------------------------------------------------------
def averaging_plan() -> Plan:
    """The mean."""
    return lambda blocks, n, d: lambda tau: tau.mean(0)


def arithmetic_plan(coefficient: float) -> Plan:
    """A coefficient times the sum."""
    check_range("coefficient", coefficient, -math.inf, math.inf, open_low=True, open_high=True)
    return lambda blocks, n, d: lambda tau: coefficient * tau.sum(0)


def ties_plan(ratio: float, coefficient: float) -> Plan:
    """Trim each row to its largest magnitudes, elect a sign, and average what agrees with it."""
    check_range("ratio", ratio, 0, 1, open_low=True)
    check_range("coefficient", coefficient, -math.inf, math.inf, open_low=True, open_high=True)

    def plan(blocks: Blocks, n: int, d: int) -> Weigh:
        magnitudes = lambda: (tau.abs() for tau in blocks())  # noqa: E731
        threshold = kth_smallest(magnitudes, [min(int(d * (1 - ratio)), d - 1)])
        return lambda tau: coefficient * _elected_mean(torch.where(tau.abs() >= threshold, tau, 0))

    return plan


def dare_plan(density: float, coefficient: float, elect_sign: bool, seed: int) -> Plan:
    """Keep each entry with probability ``density``, divided by it; then the mean, or the mean of those of the elected sign."""
    check_range("density", density, 0, 1, open_low=True)
    check_range("coefficient", coefficient, -math.inf, math.inf, open_low=True, open_high=True)
    check_choice("elect_sign", elect_sign, (False, True))
    check_integer("seed", seed, 0)

    def plan(blocks: Blocks, n: int, d: int) -> Weigh:
        # One stream a model, so that the mask of an entry does not depend on how the entries are cut into blocks.
        streams = [torch.Generator().manual_seed(derived_seed(seed, f"dare/{row}")) for row in range(n)]

        def weigh(tau: Tensor) -> Tensor:
            drawn = torch.stack([torch.rand(tau.shape[1], generator=g, dtype=torch.float32) for g in streams])
            kept = torch.where(drawn.to(tau.device) < density, tau / density, 0)
            return coefficient * (_elected_mean(kept) if elect_sign else kept.mean(0))

        return weigh

    return plan


def _elected_mean(kept: Tensor) -> Tensor:
    """Mean over the rows whose entry has the sign of the sum; 0 where the sum is 0."""
    agree = kept * kept.sum(0).sign() > 0
    return torch.where(agree, kept, 0).sum(0) / agree.sum(0).clamp(min=1)


# -- functions of task vectors ----------------------------------------------------------------------------------------
def weight_averaging(task_vectors: Tensor) -> Tensor:
    """The mean of task vectors (n, d): (d,)."""
    return merge_vectors(averaging_plan(), task_vectors)


def task_arithmetic(task_vectors: Tensor, coefficient: float = 0.4) -> Tensor:
    """``coefficient * sum_i tau_i`` of task vectors (n, d): (d,). With 1 / n it is the mean."""
    return merge_vectors(arithmetic_plan(coefficient), task_vectors)


def ties_merge(task_vectors: Tensor, *, ratio: float = 0.2, coefficient: float = 1.0) -> Tensor:
    """TIES of task vectors (n, d): (d,).

    ratio: share of the entries of each task that are kept, the largest, in (0, 1]; those equal to the smallest of them too. The
    elected sign is that of the sum of what is kept; where that is 0 the result is.
    """
    return merge_vectors(ties_plan(ratio, coefficient), task_vectors)


def dare_merge(
    task_vectors: Tensor, *, density: float = 0.5, coefficient: float = 1.0, elect_sign: bool = False, seed: int = 0
) -> Tensor:
    """DARE of task vectors (n, d): (d,). density: share of the entries that is kept, at random, in (0, 1].

    elect_sign: average only the entries of the elected sign, as TIES does ("dare-ties"), and not all ("dare-linear").
    """
    return merge_vectors(dare_plan(density, coefficient, elect_sign, seed), task_vectors)


def greedy_soup(task_vectors: Tensor, evaluate: Callable[[Tensor], float]) -> tuple[Tensor, tuple[int, ...]]:
    """The greedy soup of task vectors (n, d), and the rows that it holds.

    evaluate: score of a merged task vector (d,) on validation data, the higher the better. The best model comes first; each other,
    in the order of their scores, joins the average if this makes it no worse.
    """
    task_vectors = check_task_vectors(task_vectors)
    mean = lambda rows: task_vectors[list(rows)].mean(0)  # noqa: E731
    chosen = _greedy(len(task_vectors), lambda rows: evaluate(mean(rows)))
    return mean(chosen), chosen


def _greedy(n: int, evaluate: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    scores = [evaluate((row,)) for row in range(n)]
    first, *others = sorted(range(n), key=lambda row: -scores[row])
    chosen: tuple[int, ...] = (first,)
    best = scores[first]
    for row in others:
        if (score := evaluate((*chosen, row))) >= best:
            chosen, best = (*chosen, row), score
    return chosen


# -- the methods ------------------------------------------------------------------------------------------------------
class WeightAveraging(MergingMethod):
    """Merge fine-tuned models by the mean of their weights.

    exclude: names of tensors or modules that stay as they are. There is no neutral setting: merging replaces the weights.
    """

    name = "weight-averaging"
    paper = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
        "Wortsman et al.",
        "ICML 2022",
        "https://arxiv.org/abs/2203.05482",
    )

    def __init__(self, *, exclude: tuple[str, ...] = ()) -> None:
        self.exclude = exclude

    def plan(self, seed: int = 0) -> Plan:
        return averaging_plan()


class TaskArithmetic(MergingMethod):
    """Merge fine-tuned models by adding the sum of what they changed, times a coefficient.

    coefficient: factor on the sum; 1 / n gives the mean of n models. exclude: names of tensors or modules that stay as they are.
    There is no neutral setting: merging replaces the weights.
    """

    name = "task-arithmetic"
    paper = Paper(
        "Editing Models with Task Arithmetic",
        "Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi",
        "ICLR 2023",
        "https://arxiv.org/abs/2212.04089",
    )
    space: ClassVar[Space] = {"coefficient": Uniform(0.1, 0.8)}

    def __init__(self, *, coefficient: float = 0.4, exclude: tuple[str, ...] = ()) -> None:
        arithmetic_plan(coefficient)
        self.coefficient, self.exclude = coefficient, exclude

    def plan(self, seed: int = 0) -> Plan:
        return arithmetic_plan(self.coefficient)


class TIES(MergingMethod):
    """Merge fine-tuned models by the mean of those of their largest changes that agree in sign.

    ratio: share of the changes kept, in (0, 1]. coefficient: factor on what is merged. exclude: names of tensors or modules that
    stay as they are. There is no neutral setting: merging replaces the weights.
    """

    name = "ties"
    paper = Paper(
        "TIES-Merging: Resolving Interference When Merging Models",
        "Yadav, Tam, Choshen, Raffel, Bansal",
        "NeurIPS 2023",
        "https://arxiv.org/abs/2306.01708",
    )
    space: ClassVar[Space] = {"coefficient": Uniform(0.5, 3.2), "ratio": LogUniform(0.05, 0.6)}

    def __init__(self, *, ratio: float = 0.2, coefficient: float = 1.0, exclude: tuple[str, ...] = ()) -> None:
        ties_plan(ratio, coefficient)
        self.ratio, self.coefficient, self.exclude = ratio, coefficient, exclude

    def plan(self, seed: int = 0) -> Plan:
        return ties_plan(self.ratio, self.coefficient)


class DARE(MergingMethod):
    """Merge fine-tuned models after dropping changes at random and enlarging the others.

    density: share of the changes kept, in (0, 1]. coefficient: factor on the mean. elect_sign: average only what agrees in sign,
    as TIES does. exclude: names of tensors or modules that stay as they are. There is no neutral setting: merging replaces the
    weights.
    """

    name = "dare"
    paper = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Yu, Yu, Yu, Huang, Li",
        "ICML 2024",
        "https://arxiv.org/abs/2311.03099",
    )
    space: ClassVar[Space] = {
        "coefficient": Uniform(0.5, 3.2),
        "density": LogUniform(0.1, 1.0),
        "elect_sign": Choice((False, True)),
    }

    def __init__(
        self,
        *,
        density: float = 0.5,
        coefficient: float = 1.0,
        elect_sign: bool = False,
        exclude: tuple[str, ...] = (),
    ) -> None:
        dare_plan(density, coefficient, elect_sign, 0)
        self.density, self.coefficient, self.elect_sign, self.exclude = density, coefficient, elect_sign, exclude

    def plan(self, seed: int = 0) -> Plan:
        return dare_plan(self.density, self.coefficient, self.elect_sign, seed)


class GreedySoup(MergingMethod):
    """Average those fine-tuned models whose average is best on validation data, joined one by one.

    The score of a model is ``run.merge_score(model)``, the higher the better, if you set that function on the run; else minus the
    task's loss on the run's validation data. exclude: names of tensors or modules that stay as they are. There is no neutral
    setting: merging replaces the weights. After ``finish``, ``chosen`` holds the positions of the models in the soup.
    """

    name = "greedy-soup"
    paper = WeightAveraging.paper

    def __init__(self, *, exclude: tuple[str, ...] = ()) -> None:
        self.exclude = exclude

    def merge(self, run: Run, base: State, sources: Sequence[State]) -> State:
        score = getattr(run, "merge_score", None)
        if score is None and run.validation is None:
            raise ArgumentError(
                "run.merge_score: the greedy soup needs a score of a model, or validation data. "
                "Set the function on the run, or give validation=..."
            )
        candidate = copy.deepcopy(self.base)

        def mean(rows: tuple[int, ...]) -> Mapping[str, Tensor]:
            return merge_state_dicts(averaging_plan(), base, [sources[row] for row in rows], self.exclude)

        def evaluate(rows: tuple[int, ...]) -> float:
            candidate.load_state_dict(mean(rows))
            return float(_validation_score(run, candidate) if score is None else score(candidate))

        self.chosen = _greedy(len(sources), evaluate)
        return mean(self.chosen)


def _validation_score(run: Run, model: nn.Module) -> float:
    with torch.no_grad():
        prediction, targets = run.predict(run.validation, model)
        return -float(run.task_loss(prediction, targets))
