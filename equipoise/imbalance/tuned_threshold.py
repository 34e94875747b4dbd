"""The rival that every loss for rare events must beat: cross-entropy, and a threshold chosen on validation data.

A model trained with cross-entropy ranks examples well and knows how rare the positives are; that it hardly ever predicts them
at p > 0.5 is a matter of the threshold. Of all thresholds that tell the validation examples apart, in the order of their
logits `z`, take the best

    t  =  argmax over t of score(TP, FP, FN, TN),    positive where z > t

and move the bias of the last layer by `-t`, so that the shipped model decides at p = 0.5 again.

## When to use
Always, before a loss made for the score: it costs nothing, the score may be any, and may change after training.

## When not
Few validation positives: the threshold is as uncertain as the score estimated on them. Where probabilities are used: they are
no longer those of the data. It changes no ranking (AUPRC, AUC).

## Cost
One pass over the validation data and a sort.

## In a distributed run
Every process evaluates the validation data, to the same threshold.

## Source
Folklore; for F1 see Lipton, Elkan, Naryanaswamy: Optimal Thresholding of Classifiers to Maximize F1 Measure, ECML PKDD 2014.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, DataError, refuse
from equipoise.imbalance.anyloss import Metric, SoftConfusion, check_metric, metric_value
from equipoise.imbalance.shared import two_columns
from equipoise.training.losses import check_labels
from equipoise.training.method import Method
from equipoise.training.run import Run


# -- the functional core ----------------------------------------------------------------------------------------------
def best_threshold(logits: Tensor, targets: Tensor, metric: Metric = "f1", *, beta: float = 1.0) -> float:
    """The logit above which class 1 is to be predicted for the best score; of equally good ones that nearest to 0.

    logits: (N,) or (N, 1) of class 1, or (N, 2), N >= 1. targets: (N,) integers in {0, 1}. metric, beta: see ``metric_value``.
    Halfway between two examples' logits, or 1 beyond the last where all or none are best predicted positive.
    """
    z = _difference(logits)
    check_labels(targets, len(z), 2)
    z, order = z.sort(descending=True)
    positive = targets[order].double()
    zero = positive.new_zeros(1)
    tp, fp = torch.cat([zero, positive.cumsum(0)]), torch.cat([zero, (1 - positive).cumsum(0)])
    score = metric_value(SoftConfusion(tp, fp, tp[-1] - tp, fp[-1] - fp), metric, beta=beta)
    cuts = torch.cat([z[:1] + 1, (z[1:] + z[:-1]) / 2, z[-1:] - 1])
    tied = torch.nn.functional.pad(z[1:] == z[:-1], (1, 1))
    score = score.masked_fill(tied, -torch.inf)
    best = cuts[score == score.max()]
    return float(best[best.abs().argmin()])


def _difference(logits: Tensor) -> Tensor:
    """The logit of class 1 against class 0, (N,) float64."""
    columns = two_columns(logits.double())
    if columns.shape[1] != 2 or not len(columns):
        refuse("logits", tuple(logits.shape), "have the shape (N,), (N, 1) or (N, 2), with at least one example")
    return columns[:, 1] - columns[:, 0]


# -- the method -------------------------------------------------------------------------------------------------------
class TunedThreshold(Method):
    """Train with the task's loss, then choose the decision threshold on validation data, for the score that counts.

    metric: one of "accuracy", "f1", "fbeta", "gmean", "balanced_accuracy", or a function of the counts. beta: of "fbeta", > 0.
    Needs two classes, validation data of both, and a last layer ``nn.Linear`` with one or two outputs, which gets a bias where
    it has none. Has no neutral setting: the threshold always moves. After ``finish``, ``threshold`` is the logit chosen.
    """

    name = "tuned-threshold"
    neutral: ClassVar[Mapping[str, Any] | None] = None

    threshold: float

    def __init__(self, metric: Metric = "f1", beta: float = 1.0) -> None:
        check_metric(metric, beta)
        self.metric, self.beta = metric, beta

    def prepare(self, run: Run) -> None:
        if run.validation is None:
            refuse(
                "validation", None, "be given, since the threshold is chosen on it", "Give validation=(inputs, targets)"
            )
        targets = torch.cat([batch.targets for batch in run.validation])
        if targets.is_floating_point() or targets.unique().tolist() != [0, 1]:
            raise DataError(
                f"validation holds the targets {targets.unique().tolist()[:5]}: must hold both classes, 0 and 1, for a threshold "
                "to be chosen. Hold out more examples"
            )
        self._head(run)

    def finish(self, run: Run) -> None:
        logits, targets = run.predict(run.validation)
        self.threshold = best_threshold(logits, targets, self.metric, beta=self.beta)
        head = self._head(run)
        if head.bias is None:
            head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
        with torch.no_grad():
            head.bias[-1] -= self.threshold

    @staticmethod
    def _head(run: Run) -> nn.Linear:
        head = run.head()
        if not (isinstance(head, nn.Linear) and head.out_features in (1, 2)):
            raise ArgumentError(
                f"model ends in {head}: tuned-threshold moves the bias of a last layer nn.Linear with one or two outputs. "
                "Name that layer: head='path.to.layer'"
            )
        return head
