"""AnyLoss: the score that matters, made smooth, is the loss.

Where one class is rare, cross-entropy is content with a model that hardly ever predicts it; what counts then is F1, G-mean or
balanced accuracy, which are steps in the weights and have no gradient. AnyLoss pushes each predicted probability through a
sigmoid so steep that it acts almost like a hard label, counts a confusion matrix with these, and descends on 1 minus the score.

For probabilities `p` (the sigmoid of the logit) and labels `y` in {0, 1}, sums over the batch,

    A(p)  =  1 / (1 + exp(-L (p - 0.5)))                       L = 73
    TP = sum y A       FN = sum y (1 - A)       FP = sum (1 - y) A       TN = sum (1 - y) (1 - A)
    loss  =  1 - score(TP, FP, FN, TN)

    accuracy           (TP + TN) / (TP + FP + FN + TN)
    F-beta             (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP)
    balanced accuracy  (TP / (TP + FN) + TN / (TN + FP)) / 2
    G-mean             sqrt(TP / (TP + FN) * TN / (TN + FP))

L = 73 is the largest whole number at which A(1) is still below 1 in float64; in float32 that is 33, and above it examples
predicted with p > 0.5 + 16.6 / L hardly move any more. The threshold is built in: predict the positive class where p > 0.5.

## When to use
Binary classification judged by one of these scores, above all F1 with few positives, with a linear model or a small network
in full or large batches, where no validation data are left to tune a threshold on. Here, a linear model on generated data with
8 % positives: F1 0.45 against 0.26 of cross-entropy and 0.35 of class-weighted cross-entropy.

## When not
Before cross-entropy with a tuned threshold was tried, which had 0.49 there. For balanced accuracy: class weights are simpler and
were no worse. Calibrated probabilities are wanted (they are driven to 0 and 1), or a ranking (AUPRC, AUC). Small batches: one
without a positive says nothing, and the mean of 1 - F1 over batches is not 1 - F1 of the data. Fine-tuning of a model that is
already sure: confident errors have no gradient left. The loss has plateaus, on which the inputs' scale, the learning rate or
the start may leave it: on standardised breast cancer data AnyLoss for balanced accuracy ended at F1 0.50, where cross-entropy
had 0.94; with inputs scaled to [0, 1] it had 0.90. With an MLP on MNIST-1D it was worse than tuned cross-entropy.

## Cost
A few elementwise operations on N numbers, as cross-entropy; no further pass, no state. Not a mean over examples: micro-batches
(`accumulation`) give another loss, the mean of theirs.

## In a distributed run
The four counts are summed over all processes, with gradient: 2 processes equal 1.

## Source
Han, Moniz, Chawla: AnyLoss: Transforming Classification Metrics into Loss Functions. KDD 2024, arXiv:2405.14745. Where the
authors' notebooks differ from the paper (the whole training set's size for N, a linear output, an approximate gradient of
G-mean) this follows the paper; G-mean keeps its root. The reason given for 73 is arithmetic, not the paper's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_choice, check_range, refuse
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows, world_size
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space

TOLERATED = 0.05  # share of batches with one class that is passed over in silence
METRICS = ("accuracy", "f1", "fbeta", "gmean", "balanced_accuracy")

log = logging.getLogger(__name__)


# -- the functional core ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SoftConfusion:
    """True positives, false positives, false negatives, true negatives: scalars, or tensors of one shape."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


Metric = str | Callable[[SoftConfusion], Tensor]


def amplify(probs: Tensor, amplification: float = 73.0) -> Tensor:
    """``A(p)``: probabilities in [0, 1], of any shape, pushed towards 0 and 1; A(0.5) = 0.5, with slope L / 4.

    amplification: L > 0. Half precision in float32. Raises ``ArgumentError`` for values outside [0, 1], which are likely logits.
    """
    check_range("amplification", amplification, 0, open_low=True)
    _check_probabilities(probs)
    return torch.sigmoid(_scores(probs, amplification))


def soft_confusion(
    probs: Tensor, targets: Tensor, amplification: float = 73.0, *, weight: Tensor | None = None
) -> SoftConfusion:
    """The confusion matrix of amplified probabilities, scalars; TP + FN and FP + TN are the (weighted) class counts.

    probs: (N,) or (N, 1) in [0, 1], N >= 1. targets: (N,) or (N, 1) in {0, 1}. weight: (N,), of each example.
    """
    check_range("amplification", amplification, 0, open_low=True)
    _check_probabilities(probs)
    probs = _column(probs, "probs")
    return _confusion(probs, _labels(targets, probs), amplification, weight)


def metric_value(confusion: SoftConfusion, metric: Metric = "f1", *, beta: float = 1.0, eps: float = 1e-12) -> Tensor:
    """The score of (soft or hard) counts, in [0, 1], elementwise where the counts are tensors.

    metric: one of ``METRICS``, or a function of the counts. beta: > 0, of "fbeta": recall weighs beta times as much as
    precision ("f1" is beta = 1). eps: smallest denominator, and smallest radicand of G-mean; 0 / 0 counts as 0.
    """
    check_metric(metric, beta)
    if callable(metric):
        return metric(confusion)
    tp, fp, fn, tn = confusion.tp, confusion.fp, confusion.fn, confusion.tn

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return part / whole.clamp(min=eps)

    if metric == "accuracy":
        return share(tp + tn, tp + fp + fn + tn)
    if metric in ("f1", "fbeta"):
        squared = beta**2 if metric == "fbeta" else 1.0
        hits = (1 + squared) * tp
        return share(hits, hits + torch.add(fp, fn, alpha=squared))
    recall, specificity = share(tp, tp + fn), share(tn, tn + fp)
    if metric == "balanced_accuracy":
        return (recall + specificity) / 2
    return (recall * specificity).clamp(min=eps).sqrt()  # the root has infinite slope at 0


def _scores(probs: Tensor, amplification: float) -> Tensor:
    """The argument of the steep sigmoid; its negative gives 1 - A without cancellation."""
    return amplification * (precise(probs) - 0.5)


def _confusion(probs: Tensor, labels: Tensor, amplification: float, weight: Tensor | None = None) -> SoftConfusion:
    scores = _scores(probs, amplification)
    positive, negative = labels, 1 - labels
    if weight is not None:
        if weight.shape != probs.shape:
            refuse("weight", tuple(weight.shape), f"have the shape {tuple(probs.shape)}, one number for each example")
        weight = weight.to(labels.dtype)
        positive, negative = positive * weight, negative * weight
    yes, no = torch.sigmoid(scores), torch.sigmoid(-scores)
    return SoftConfusion(positive.dot(yes), negative.dot(yes), positive.dot(no), negative.dot(no))


def _over_processes(own: SoftConfusion) -> SoftConfusion:
    """The counts summed over all processes, with gradient."""
    if world_size() == 1:
        return own
    counts = torch.stack([own.tp, own.fp, own.fn, own.tn])
    return SoftConfusion(*gather_rows(counts[None]).sum(0).unbind())


def _column(values: Tensor, name: str) -> Tensor:
    """(N,) of (N,) or (N, 1), floating point, N >= 1."""
    flat = values.ndim == 1
    if not values.is_floating_point() or not (flat or (values.ndim == 2 and values.shape[1] == 1)):
        raise ArgumentError(
            f"{name} = {values.dtype} {tuple(values.shape)}: must be floating point of shape (N,) or (N, 1). AnyLoss is for two "
            "classes; with more, train one model for each class against the rest"
        )
    if not values.numel():
        refuse(name, tuple(values.shape), "hold at least one example")
    return values if flat else values.squeeze(1)


def _labels(targets: Tensor, probs: Tensor) -> Tensor:
    """Targets as numbers 0 and 1 of the probabilities' precision, (N,). Values are looked at on the CPU only."""
    if targets.shape not in (probs.shape, (len(probs), 1)):
        raise ArgumentError(
            f"targets = {targets.dtype} {tuple(targets.shape)}: must have the shape ({len(probs)},) or ({len(probs)}, 1)"
        )
    labels = (targets if targets.ndim == 1 else targets.squeeze(1)).to(precise(probs).dtype)
    # Of all numbers only 0 and 1 are their own squares.
    if _may_look(labels) and not torch.equal(labels * labels, labels):
        values = ", ".join(f"{value:g}" for value in labels.unique().tolist()[:5])
        raise ArgumentError(f"targets = values {values}: must lie in {{0, 1}}. AnyLoss is for two classes")
    return labels


def _check_probabilities(probs: Tensor) -> None:
    if _may_look(probs) and probs.numel():
        low, high = (float(value) for value in probs.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ArgumentError(
                f"probs = values in [{low:g}, {high:g}]: must lie in [0, 1]. Take the sigmoid of logits first"
            )


def _may_look(values: Tensor) -> bool:
    """Whether looking at values is free: elsewhere it would wait for the device, or break the compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_metric(metric: Metric, beta: float) -> None:
    """Refuse a metric that is neither one of ``METRICS`` nor a function, and a ``beta`` that is not positive."""
    if not callable(metric):
        check_choice("metric", metric, METRICS)
    check_range("beta", beta, 0, open_low=True)


# -- the module -------------------------------------------------------------------------------------------------------
class AnyLoss(nn.Module):
    """``1 - score`` of the amplified predictions of a batch.

    >>> loss = AnyLoss("balanced_accuracy")
    >>> float(loss(torch.tensor([3.0, -3.0, 0.0]), torch.tensor([1, 0, 0])))
    0.125

    metric, beta, eps: see ``metric_value``. amplification: L > 0. from_logits: whether the inputs are logits: (N,) or (N, 1),
    or (N, 2) of two classes; otherwise probabilities (N,) or (N, 1) of class 1.

    A batch that holds one class only has a finite loss, but teaches nothing of the other: draw batches that hold both. In a
    distributed run every process must call the module. Raises ``ArgumentError`` (a ``ValueError``) for settings out of range,
    targets other than 0 and 1, more than two columns, probabilities outside [0, 1], and an empty batch.
    """

    def __init__(
        self,
        metric: Metric = "f1",
        *,
        beta: float = 1.0,
        amplification: float = 73.0,
        from_logits: bool = True,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check_metric(metric, beta)
        check_range("amplification", amplification, 0, open_low=True)
        check_range("eps", eps, 0, open_low=True)
        self.metric, self.beta, self.eps = metric, beta, eps
        self.amplification, self.from_logits = amplification, from_logits

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar in [0, 1]. targets: (N,) or (N, 1), in {0, 1}."""
        return self.of(self.confusion(inputs, targets))

    def confusion(self, inputs: Tensor, targets: Tensor) -> SoftConfusion:
        """The soft counts of the batch, of all processes."""
        probs = self._probabilities(inputs)
        return _over_processes(_confusion(probs, _labels(targets, probs), self.amplification))

    def of(self, confusion: SoftConfusion) -> Tensor:
        """The loss of given counts."""
        return 1 - metric_value(confusion, self.metric, beta=self.beta, eps=self.eps)

    def _probabilities(self, inputs: Tensor) -> Tensor:
        if not self.from_logits:
            _check_probabilities(inputs)
            return _column(inputs, "inputs")
        if inputs.ndim == 2 and inputs.shape[1] == 2:
            inputs = precise(inputs)
            inputs = inputs[:, 1] - inputs[:, 0]
        return torch.sigmoid(precise(_column(inputs, "inputs")))

    def extra_repr(self) -> str:
        return f"{self.metric!r}, beta={self.beta}, amplification={self.amplification}, from_logits={self.from_logits}"


# -- the method -------------------------------------------------------------------------------------------------------
class AnyLossMethod(Method):
    """Train on a smooth F1, G-mean or balanced accuracy itself, for rare classes judged by such a score.

    metric: one of "accuracy", "f1", "fbeta", "gmean", "balanced_accuracy", or a function of the four counts. beta: of "fbeta",
    > 0. amplification: L > 0. Replaces the task's loss; needs two classes, and a model with one logit or two. Has no neutral
    setting: at no amplification is it cross-entropy. Let batches be large, or stratified: one that holds a single class
    teaches nothing; such batches are counted (``one_class_batches``), and one warning tells of them where they are more than
    5 %. After ``prepare``, ``criterion`` is the ``AnyLoss``.
    """

    name = "anyloss"
    paper = Paper(
        "AnyLoss: Transforming Classification Metrics into Loss Functions",
        "Han, Moniz, Chawla",
        "KDD 2024",
        "https://arxiv.org/abs/2405.14745",
    )
    space: ClassVar[Space] = {"amplification": LogUniform(4.0, 110.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = None

    criterion: AnyLoss
    one_class_batches: Tensor

    def __init__(self, metric: Metric = "f1", beta: float = 1.0, amplification: float = 73.0) -> None:
        check_metric(metric, beta)
        check_range("amplification", amplification, 0, open_low=True)
        self.metric, self.beta, self.amplification = metric, beta, amplification
        self.warned = False

    def prepare(self, run: Run) -> None:
        if run.num_classes not in (None, 2):
            refuse(
                "num_classes", run.num_classes, "be 2 for AnyLoss", "Train one model for each class against the rest"
            )
        self.criterion = AnyLoss(self.metric, beta=self.beta, amplification=self.amplification)
        self.one_class_batches = torch.zeros((), dtype=torch.int64, device=run.device)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        confusion = self.criterion.confusion(output.prediction, batch.targets)
        with torch.no_grad():
            self.one_class_batches += torch.minimum(confusion.tp + confusion.fn, confusion.fp + confusion.tn) == 0
        return self.criterion.of(confusion)

    def epoch_end(self, run: Run) -> None:
        count = int(self.one_class_batches)
        if count > TOLERATED * run.global_step and not self.warned and run.accelerator.is_main_process:
            self.warned = True
            log.warning(
                "AnyLoss: %d of %d batches so far held one class only, and taught nothing. Raise batch_size, or draw "
                "stratified batches",
                count,
                run.global_step,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"one_class_batches": self.one_class_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.one_class_batches.copy_(state["one_class_batches"])
