"""What a practitioner tries first on rare classes: weights, focal loss, logit adjustment, balanced softmax, oversampling.

A new method must beat these, tuned as carefully as itself. For logits `z`, label `y`, `p = softmax(z)`, `n_c` training
examples of class c and their share `pi_c`; a binary model's one logit stands for `[0, z]`:

    class-balanced       - w_y log p_y,                  w_c ~ (1 - beta) / (1 - beta^n_c),  sum of w = number of classes
    focal                - w_y (1 - p_y)^gamma log p_y,  the same w (beta = 0: all 1)
    logit adjustment     - log softmax(z + tau log pi)_y
    balanced softmax     logit adjustment with tau = 1
    oversampling         cross-entropy; class c is drawn with probability ~ n_c^power

The weights run from none (beta = 0) to inverse frequency (beta = 1): `(1 - beta^n) / (1 - beta)`, the effective number, is how
many different ones are expected among n draws from `1 / (1 - beta)` possible examples. The focal factor takes weight from
what is predicted well already. Logit adjustment adds the classes' log shares in training only, so that the logits without
them, used for predictions, are those of equally frequent classes.

## When to use
Always, before anything else: they have one or two settings, no state and no extra cost. Logit adjustment (or balanced
softmax, which has nothing to tune) first, where balanced accuracy counts. Oversampling where batches should hold rare
classes at all, as with batch statistics or small batches.

## When not
Where the test data are as skewed as the training data and plain accuracy counts: cross-entropy is right then. All of them
change the probabilities: after logit adjustment they are those of balanced classes. Weights and oversampling lose their
effect once a network fits its training set, and repeat the few rare examples until they are known by heart. The focal loss
by itself knows nothing of class sizes: it is about easy and hard. Two of them at once correct twice.

## Cost
That of cross-entropy.

## In a distributed run
Class counts are those of the whole training set, and losses are means over examples: 2 processes equal 1. Oversampling
draws one global order.

## Source
Class-balanced: Cui, Jia, Lin, Song, Belongie, CVPR 2019, arXiv:1901.05555 (the weights' sum as there). Focal: Lin, Goyal,
Girshick, He, Dollár, ICCV 2017, arXiv:1708.02002; with softmax and class weights as in Cui et al., Sec. 4. Logit adjustment:
Menon et al., ICLR 2021, arXiv:2007.07314, eq. 10. Balanced softmax: Ren et al., NeurIPS 2020, arXiv:2007.10740.
Sampling by a power: Kang et al., Decoupling Representation and Classifier, ICLR 2020, arXiv:1910.09217, eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import check_choice, check_range, refuse
from equipoise.imbalance.backdoor_adjustment import LogitAdjustedLoss
from equipoise.imbalance.shared import check_class_counts, class_counts_of, two_columns
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import REDUCTIONS, check_labels, precise, reduce
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.sampler import Balanced
from equipoise.training.space import Choice, Space, Uniform

if TYPE_CHECKING:
    from torch.utils.data import Sampler

BETAS = (0.9, 0.99, 0.999, 0.9999)  # those of Cui et al.


# -- the functional core ----------------------------------------------------------------------------------------------
def class_balanced_weights(class_counts: Tensor, beta: float = 0.999) -> Tensor:
    """``(1 - beta) / (1 - beta^n_c)``, scaled to sum to the number of classes, (C,) float64.

    class_counts: (C,), all > 0. beta: in [0, 1]; 0 weighs all classes 1, 1 by inverse frequency (the limit).
    """
    check_class_counts(class_counts)
    check_range("beta", beta, 0, 1)
    counts = class_counts.double()
    # The factor 1 - beta falls out of the scaling; expm1 keeps the digits of 1 - beta^n where beta is close to 1.
    effective = counts if beta == 1 else -torch.expm1(torch.xlogy(counts, beta))
    return len(counts) / (effective * (1 / effective).sum())


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """``-w_y (1 - p_y)^gamma log p_y`` per example, reduced: "none" (N,), "sum" or "mean".

    logits: (N, C), or (N,) / (N, 1) for the one logit of class 1. targets: (N,) integer classes. gamma: >= 0; 0 is
    cross-entropy. weight: (C,), each >= 0 (the paper's alpha); None is 1.

    The mean is over examples, and not over weights as in torch's ``cross_entropy``, so that means over processes agree.
    ``1 - p_y`` is taken from the other classes' logits: sure predictions and gamma < 1 give no NaN; half precision in float32.
    """
    check_range("gamma", gamma, 0, math.inf, open_high=True)
    check_choice("reduction", reduction, REDUCTIONS)
    logits = two_columns(logits)
    check_labels(targets, len(logits), logits.shape[1])
    log_p = F.log_softmax(precise(logits), 1)
    label = targets.long()[:, None]
    losses = -log_p.gather(1, label).squeeze(1)
    if gamma > 0:
        losses = losses * torch.exp(gamma * log_p.scatter(1, label, -torch.inf).logsumexp(1))
    if weight is not None:
        if weight.shape != (logits.shape[1],):
            refuse("weight", tuple(weight.shape), f"have the shape ({logits.shape[1]},), one number a class")
        losses = losses * weight.to(losses)[label[:, 0]]
    return reduce(losses, reduction)


# -- the modules ------------------------------------------------------------------------------------------------------
class FocalLoss(nn.Module):
    """``focal_loss`` as a module. gamma: >= 0. weight: (C,), each >= 0, a buffer. reduction: "none", "sum" or "mean"."""

    weight: Tensor | None

    def __init__(self, gamma: float = 2.0, *, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        check_range("gamma", gamma, 0, math.inf, open_high=True)
        check_choice("reduction", reduction, REDUCTIONS)
        if weight is not None and not bool(((weight >= 0) & torch.isfinite(weight)).all()):
            refuse("weight", weight.tolist(), "be finite and >= 0 for every class")
        self.gamma, self.reduction = gamma, reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return focal_loss(logits, targets, self.gamma, self.weight, self.reduction)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"


class ClassBalancedLoss(FocalLoss):
    """Cross-entropy (gamma = 0) or focal loss, weighted by the effective number of examples of each class.

    class_counts: (C,), numbers of training examples, all > 0. beta: in [0, 1]; see ``class_balanced_weights``.
    """

    def __init__(
        self, class_counts: Tensor, *, beta: float = 0.999, gamma: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(gamma, weight=class_balanced_weights(class_counts, beta), reduction=reduction)


# -- the methods ------------------------------------------------------------------------------------------------------
class _Loss(Method):
    """A method that replaces the task's loss by a criterion of logits and labels, made in ``prepare``."""

    criterion: nn.Module

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return self.criterion(two_columns(output.prediction), batch.targets)


class ClassBalanced(_Loss):
    """Weigh each class by the inverse of its effective number of examples (beta = 1: by inverse frequency).

    beta: in [0, 1]; 0 is cross-entropy. Replaces the task's loss; needs single-label classification.
    """

    name = "class-balanced"
    paper = Paper(
        "Class-Balanced Loss Based on Effective Number of Samples",
        "Cui, Jia, Lin, Song, Belongie",
        "CVPR 2019",
        "https://arxiv.org/abs/1901.05555",
    )
    space: ClassVar[Space] = {"beta": Choice((*BETAS, 1.0))}
    neutral: ClassVar[Mapping[str, Any] | None] = {"beta": 0.0}

    def __init__(self, beta: float = 0.999) -> None:
        check_range("beta", beta, 0, 1)
        self.beta = beta

    def prepare(self, run: Run) -> None:
        self.criterion = ClassBalancedLoss(class_counts_of(run, self.name), beta=self.beta)


class Focal(_Loss):
    """Count examples less that are predicted well; with beta > 0 also weigh classes by their effective number.

    gamma: >= 0; 0 is cross-entropy. beta: in [0, 1], as in ``ClassBalanced``; 0 weighs all classes alike. Replaces the task's
    loss; needs single-label classification.
    """

    name = "focal"
    paper = Paper(
        "Focal Loss for Dense Object Detection",
        "Lin, Goyal, Girshick, He, Dollár",
        "ICCV 2017",
        "https://arxiv.org/abs/1708.02002",
    )
    space: ClassVar[Space] = {"gamma": Uniform(0.5, 3.0), "beta": Choice((0.0, *BETAS))}
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0, "beta": 0.0}

    def __init__(self, gamma: float = 2.0, beta: float = 0.0) -> None:
        check_range("gamma", gamma, 0, math.inf, open_high=True)
        check_range("beta", beta, 0, 1)
        self.gamma, self.beta = gamma, beta

    def prepare(self, run: Run) -> None:
        counts = class_counts_of(run, self.name) if self.beta > 0 else None
        self.criterion = (
            FocalLoss(self.gamma) if counts is None else ClassBalancedLoss(counts, beta=self.beta, gamma=self.gamma)
        )


class LogitAdjustment(_Loss):
    """Add tau times the classes' log shares to the logits in training, and predict without them.

    tau: >= 0; 0 is cross-entropy, 1 aims at the balanced error. Replaces the task's loss; needs single-label classification.
    """

    name = "logit-adjustment"
    paper = Paper(
        "Long-tail Learning via Logit Adjustment",
        "Menon, Jayasumana, Rawat, Jain, Veit, Kumar",
        "ICLR 2021",
        "https://arxiv.org/abs/2007.07314",
    )
    space: ClassVar[Space] = {"tau": Uniform(0.25, 2.5)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"tau": 0.0}

    def __init__(self, tau: float = 1.0) -> None:
        check_range("tau", tau, 0, math.inf, open_high=True)
        self.tau = tau

    def prepare(self, run: Run) -> None:
        self.criterion = LogitAdjustedLoss(class_counts_of(run, self.name), tau=self.tau).to(run.device)


class BalancedSoftmax(LogitAdjustment):
    """Softmax over classes weighted by their size: exactly logit adjustment with tau = 1, and nothing to tune.

    ``log(n_y e^z_y / sum n_c e^z_c)`` is the log-softmax of ``z + log n``, and ``log n`` differs from ``log pi`` by a constant.
    Has no neutral setting, because it has no setting. Replaces the task's loss; needs single-label classification.
    """

    name = "balanced-softmax"
    paper = Paper(
        "Balanced Meta-Softmax for Long-Tailed Visual Recognition",
        "Ren, Yu, Sheng, Ma, Zhao, Yi, Li",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2007.10740",
    )
    space: ClassVar[Space] = {}
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self) -> None:
        super().__init__(tau=1.0)


class Oversampling(Method):
    """Draw examples with replacement, so that rare classes come as often as others (power = 0), or nearly.

    power: in [0, 1]; class c with n_c examples is drawn with probability proportional to ``n_c^power``: 0 all classes equally
    often, 0.5 square-root sampling, 1 the run's own order, in which every example comes once an epoch. An epoch keeps its
    length. Decides which examples are drawn; needs classes and a run that draws the batches.
    """

    name = "oversampling"
    paper = Paper(
        "Decoupling Representation and Classifier for Long-Tailed Recognition",
        "Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis",
        "ICLR 2020",
        "https://arxiv.org/abs/1910.09217",
    )
    space: ClassVar[Space] = {"power": Uniform(0.0, 0.75)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"power": 1.0}

    def __init__(self, power: float = 0.0) -> None:
        check_range("power", power, 0, 1)
        self.power = power

    def prepare(self, run: Run) -> None:
        if run.loader is None:
            refuse(
                "data, batch_size",
                None,
                "be given, since oversampling decides which examples the run draws",
                "For a loader of your own make the sampler with equipoise.training.sampler.Balanced",
            )
        class_counts_of(run, self.name)

    def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
        if self.power == 1:
            return sampler
        assert run.loader is not None  # prepare refuses a run without one
        return Balanced(self.power)(run.data, run.loader.batch_size, run.order_generator)
