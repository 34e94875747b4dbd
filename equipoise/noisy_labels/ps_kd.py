"""PS-KD: progressive self-knowledge distillation.

One-hot labels ask for certainty, and a network trained on them becomes overconfident. PS-KD softens the label of each
training example with what the network itself predicted for that example one epoch earlier, by a weight that grows as the
network becomes a better teacher: label smoothing that knows the example.

In epoch `t = 1 .. T`, for an example with one-hot label `y`, logits `z`, and `P_{t-1}` the softmax predicted for it in the
epoch before,

    alpha_t  =  alpha_T t / T
    q_t      =  (1 - alpha_t) y + alpha_t P_{t-1}            constant, no gradient
    loss     =  - mean over the batch of sum(q_t log softmax(z))

`P_t` is the softmax of the logits of the training pass itself (training mode, augmented input, weights before the step). An
example without an earlier prediction uses its own label, so that the first epoch is plain cross-entropy. The gradient is
`softmax(z) - q_t`: compared with cross-entropy, examples whose error has shrunk since the last epoch weigh less.

## When to use
Any single-label classification in which probabilities matter: calibration and log-likelihood improve most, accuracy a
little. It can replace a tuned label smoothing where the right amount of smoothing is not known.

## When not
As the only remedy for wrong labels: the target keeps a share of the given label, so that memorisation is slowed, not
prevented (see ELR). Few epochs, or data seen once. Together with mixup or CutMix, unless the memory is refreshed from
unmixed inputs (`update=False`): the prediction for a mixture is not that of either example. Do not expect it to beat a tuned
label smoothing on small problems.

## Cost
No extra pass; one table of examples x classes (float32: 4 n C bytes; cast the module to half precision for large ones) and
elementwise work on the batch's logits.

## In a distributed run
The tables are equal on all processes: every step exchanges the rows of all of them. 2 processes equal 1.

## Source
Kim, Ji, Yoon, Hwang: Self-Knowledge Distillation with Progressive Refinement of Targets. ICCV 2021, arXiv:2006.12000; the
first epoch and the moment of writing as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import check_choice, check_integer, check_range, refuse
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import REDUCTIONS, check_labels, check_logits, check_rows, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Space, Uniform
from equipoise.training.table import check_index, table_shape, write_rows


# -- the functional core ----------------------------------------------------------------------------------------------
def soft_cross_entropy(logits: Tensor, soft_targets: Tensor, reduction: str = "mean") -> Tensor:
    """``-sum_c q_c log softmax(z)_c`` per example, reduced: "none" (N,), "sum" or "mean".

    logits, soft_targets: (N, C), rows of the targets sum to 1. Half-precision logits are computed in float32.
    """
    check_logits(logits)
    check_rows("soft_targets", soft_targets, logits)
    check_choice("reduction", reduction, REDUCTIONS)
    logits = precise(logits)
    return F.cross_entropy(logits, soft_targets.to(logits.dtype), reduction=reduction)


def refine_targets(targets: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) y + alpha P``: targets softened by an earlier prediction, (N, C), constant.

    targets: (N,) integer classes, or (N, C) soft labels. previous: (N, C) probabilities. alpha: in [0, 1].
    """
    check_logits(previous)
    check_range("alpha", alpha, 0, 1)
    previous = precise(previous.detach())
    return (1 - alpha) * _rows(targets, previous) + alpha * previous


def _rows(targets: Tensor, like: Tensor) -> Tensor:
    """Targets as rows of probabilities (N, C): classes become one-hot."""
    if targets.ndim == 2:
        check_rows("targets", targets, like)
        return targets.detach().to(like.dtype)
    check_labels(targets, len(like), like.shape[1])
    return torch.zeros_like(like).scatter_(1, targets.long()[:, None], 1)  # one_hot would count in int64 first


# -- the module -------------------------------------------------------------------------------------------------------
class PSKDLoss(nn.Module):
    """Cross-entropy with progressively refined targets, for any training loop; call ``set_epoch`` before each epoch.

    >>> loss = PSKDLoss(num_examples=100, num_classes=3, total_epochs=10)
    >>> loss.set_epoch(4)
    >>> round(loss.alpha, 3)
    0.4

    num_examples, total_epochs: >= 1. num_classes: >= 2. alpha_T: weight of the earlier prediction in the last epoch, in
    [0, 1]. reduction: "none", "sum" or "mean". Raises ``ArgumentError`` (a ``ValueError``) for anything else.

    Buffers, saved with the module: ``memory`` (num_examples, num_classes) probabilities, ``seen`` (num_examples,) bool,
    ``epoch`` int64 scalar, 0-based. An example that a sampler leaves out keeps its older prediction. The memory is written in
    training mode only; on validation data, whose positions mean other examples, use plain cross-entropy.
    """

    memory: Tensor
    seen: Tensor
    epoch: Tensor

    def __init__(
        self, num_examples: int, num_classes: int, total_epochs: int, *, alpha_T: float = 0.8, reduction: str = "mean"
    ) -> None:
        super().__init__()
        check_integer("num_examples", num_examples, 1)
        check_integer("num_classes", num_classes, 2)
        check_integer("total_epochs", total_epochs, 1)
        check_range("alpha_T", alpha_T, 0, 1)
        check_choice("reduction", reduction, REDUCTIONS)
        self.total_epochs, self.alpha_T, self.reduction = total_epochs, alpha_T, reduction
        self.register_buffer("memory", torch.zeros(num_examples, num_classes))
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.bool))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    @property
    def alpha(self) -> float:
        """Weight of the earlier prediction in this epoch: ``alpha_T * (epoch + 1) / total_epochs``."""
        return self.alpha_T * (int(self.epoch) + 1) / self.total_epochs

    def set_epoch(self, epoch: int) -> None:
        """Begin the 0-based ``epoch``, in [0, total_epochs)."""
        check_integer("epoch", epoch, 0, self.total_epochs - 1)
        self.epoch.fill_(epoch)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor, *, update: bool = True) -> Tensor:
        """The loss against the refined targets; then, in training mode and with ``update``, remember the predictions.

        logits: (N, C). targets: (N,) integer classes, or (N, C) soft labels. index: (N,) int64 positions in the training set.
        Of an example that occurs twice in the batch the last prediction is remembered.
        """
        check_logits(logits, self.memory.shape[1])
        loss = soft_cross_entropy(logits, self.targets_for(targets, index), self.reduction)
        if self.training and update:
            self._remember(logits.detach(), index.to(self.memory.device))
        return loss

    def targets_for(self, targets: Tensor, index: Tensor) -> Tensor:
        """The refined targets (N, C) of a batch, without change of state."""
        index = index.to(self.memory.device)
        check_index(index, len(self.memory), len(targets))
        previous = precise(self.memory.index_select(0, index))
        # In the first epoch nothing was predicted "in the epoch before", even for an example that is drawn twice.
        known = self.seen.index_select(0, index) & (self.epoch > 0)
        labels = _rows(targets, previous)
        return refine_targets(labels, torch.where(known[:, None], previous, labels), self.alpha)

    def _remember(self, logits: Tensor, index: Tensor) -> None:
        write_rows(self.memory, index, F.softmax(precise(logits), 1))
        write_rows(self.seen, index, torch.ones_like(index, dtype=torch.bool))

    def extra_repr(self) -> str:
        n, classes = self.memory.shape
        return f"{n}, {classes}, total_epochs={self.total_epochs}, alpha_T={self.alpha_T}, reduction={self.reduction!r}"


# -- the method -------------------------------------------------------------------------------------------------------
class PSKD(Method):
    """Soften each label with the model's own prediction of the epoch before, more and more (self-distillation).

    alpha_T: weight of that prediction in the last epoch, in [0, 1]; at 0 training is plain cross-entropy. Replaces the task's
    loss; needs single-label classification and a run with a fixed number of epochs.
    After ``prepare``, ``criterion`` is the ``PSKDLoss``.
    """

    name = "ps-kd"
    paper = Paper(
        "Self-Knowledge Distillation with Progressive Refinement of Targets",
        "Kim, Ji, Yoon, Hwang",
        "ICCV 2021",
        "https://arxiv.org/abs/2006.12000",
    )
    space: ClassVar[Space] = {"alpha_T": Uniform(0.2, 1.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha_T": 0.0}

    criterion: PSKDLoss

    def __init__(self, alpha_T: float = 0.8) -> None:
        check_range("alpha_T", alpha_T, 0, 1)
        self.alpha_T = alpha_T

    def prepare(self, run: Run) -> None:
        if run.total_epochs is None:
            refuse("epochs", None, "be a fixed number for PS-KD, whose weight grows over all epochs", "Give epochs=...")
        part = PSKDLoss(*table_shape(run, "PS-KD"), run.total_epochs, alpha_T=self.alpha_T)
        self.criterion = run.register(self, "criterion", part)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        remedy = "PS-KD needs single-label classification with unmixed examples; leave out the method that mixes them"
        check_labels(batch.targets, len(output.prediction), self.criterion.memory.shape[1], remedy)
        return self.criterion(output.prediction, batch.targets, batch.positions("PS-KD"))

    def epoch_end(self, run: Run) -> None:
        if run.epoch + 1 < self.criterion.total_epochs:
            self.criterion.set_epoch(run.epoch + 1)
