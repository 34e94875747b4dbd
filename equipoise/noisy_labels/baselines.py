"""What a practitioner tries first: cross-entropy, label smoothing, generalized cross-entropy.

A new method must beat these, tuned as carefully as itself. For logits `z`, label `y`, C classes, `p = softmax(z)`:

    cross-entropy                -log p_y
    label smoothing              -sum(q log p),   q = (1 - s) onehot(y) + s / C
    generalized cross-entropy    (1 - p_y^q) / q

Cross-entropy asks for certainty about every label, wrong ones included. Label smoothing asks for a little less. Generalized
cross-entropy runs from cross-entropy (q -> 0), which fits hard examples most, to the mean absolute error (q = 1), which
tolerates wrong labels but learns slowly: its gradient is that of cross-entropy times `p_y^q`, so that examples which the
network finds implausible count less.

## When to use
Always, before anything else: they have one setting at most, no state and no extra cost. Label smoothing for calibration and
mild noise; generalized cross-entropy where many labels are wrong.

## When not
Label smoothing before knowledge distillation (it blurs what a teacher knows about similarity). Generalized cross-entropy with
q near 1 and many classes: training may not start.

## Cost
That of cross-entropy.

## Source
Label smoothing: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
arXiv:1512.00567. Generalized cross-entropy: Zhang, Sabuncu: Generalized Cross Entropy Loss for Training Deep Neural
Networks with Noisy Labels, NeurIPS 2018, arXiv:1805.07836.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import check_choice, check_range
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import REDUCTIONS, check_labels, check_logits, precise, reduce
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Space, Uniform


# -- the functional core ----------------------------------------------------------------------------------------------
def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float = 0.7, reduction: str = "mean") -> Tensor:
    """``(1 - p_y^q) / q`` per example, reduced: "none" (N,), "sum" or "mean". In [0, 1/q].

    logits: (N, C). targets: (N,) integer classes. q: in [0, 1]; 0 is cross-entropy, 1 is half the L1 distance of p and the
    one-hot label. Computed from log p, so that small q and small p_y lose no digits; half precision in float32.
    """
    check_range("q", q, 0, 1)
    check_logits(logits)
    check_labels(targets, len(logits), logits.shape[1])
    check_choice("reduction", reduction, REDUCTIONS)
    if q == 0:
        return F.cross_entropy(precise(logits), targets.long(), reduction=reduction)
    minus_log_p = F.cross_entropy(precise(logits), targets.long(), reduction="none")
    return reduce(torch.expm1(-q * minus_log_p) / -q, reduction)


# -- the module -------------------------------------------------------------------------------------------------------
class GCELoss(nn.Module):
    """``generalized_cross_entropy`` as a module. q: in [0, 1]. reduction: "none", "sum" or "mean"."""

    def __init__(self, q: float = 0.7, reduction: str = "mean") -> None:
        super().__init__()
        check_range("q", q, 0, 1)
        check_choice("reduction", reduction, REDUCTIONS)
        self.q, self.reduction = q, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return generalized_cross_entropy(logits, targets, self.q, self.reduction)

    def extra_repr(self) -> str:
        return f"q={self.q}, reduction={self.reduction!r}"


# -- the methods ------------------------------------------------------------------------------------------------------
class CrossEntropy(Method):
    """The task's own loss and nothing else: the baseline.

    Has no hooks and no settings; for classification the task's loss is cross-entropy.
    """

    name = "cross-entropy"
    neutral: ClassVar[Mapping[str, Any] | None] = {}


class LabelSmoothing(Method):
    """Cross-entropy against labels of which a share is spread over all classes.

    smoothing: that share, in [0, 1]; 0 is cross-entropy. Replaces the task's loss; takes classes or soft labels.
    """

    name = "label-smoothing"
    paper = Paper(
        "Rethinking the Inception Architecture for Computer Vision",
        "Szegedy, Vanhoucke, Ioffe, Shlens, Wojna",
        "CVPR 2016",
        "https://arxiv.org/abs/1512.00567",
    )
    space: ClassVar[Space] = {"smoothing": Uniform(0.02, 0.6)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"smoothing": 0.0}

    def __init__(self, smoothing: float = 0.1) -> None:
        check_range("smoothing", smoothing, 0, 1)
        self.smoothing = smoothing

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return F.cross_entropy(output.prediction, batch.targets, label_smoothing=self.smoothing)


class GeneralizedCrossEntropy(Method):
    """Between cross-entropy and the mean absolute error: implausible labels count less.

    q: in [0, 1]; 0 is cross-entropy, 1 the mean absolute error; 0.7 is the paper's. Replaces the task's loss; needs
    single-label classification.
    """

    name = "generalized-cross-entropy"
    paper = Paper(
        "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        "Zhang, Sabuncu",
        "NeurIPS 2018",
        "https://arxiv.org/abs/1805.07836",
    )
    space: ClassVar[Space] = {"q": Uniform(0.1, 0.95)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"q": 0.0}

    def __init__(self, q: float = 0.7) -> None:
        check_range("q", q, 0, 1)
        self.q = q

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return generalized_cross_entropy(output.prediction, batch.targets, self.q)
