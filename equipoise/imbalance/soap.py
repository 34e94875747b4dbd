"""SOAP: ascent on average precision, with the loss and the optimizer of LibAUC.

For a ranking of rare events the score is the area under the precision-recall curve, estimated by average precision: over all
positives i, the share of positives among the examples ranked at or above i. LibAUC replaces "ranked above" by a surrogate
`l(z_i - z_s) = max(margin - (z_i - z_s), 0)^2` and keeps, for each positive, running averages of numerator and denominator,
since their ratio on a batch is biased:

    u+_i <- (1 - gamma) u+_i + gamma mean over the batch of l y_s        u_i <- (1 - gamma) u_i + gamma mean of l
    gradient of  mean over positives i and s of  (u+_i - u_i y_s) / u_i^2  l(z_i - z_s)

This is a wrapper of `libauc.losses.APLoss` and `libauc.optimizers.SOAP` (in its Adam form, LibAUC's default, which clips each
entry of the gradient to [-1, 1]), not an implementation: it brings their state into checkpoints and gives them the global batch.

## When to use
The order of the scores counts and the positives are few: screening, retrieval, alerts of which the first k are looked at.

## When not
Probabilities are wanted: the scale and the zero of the scores mean nothing. For decisions a threshold is therefore chosen at
the end on validation data, where the run has them, as `tuned-threshold` does. Batches without positives teach nothing and
are passed over: make them large or stratified.

## Cost
A matrix of the batch's positives x examples, and two numbers for each training example. LibAUC counts the positives of a
batch in a Python loop over its examples, which is most of the time in large batches.

## In a distributed run
The rows of all processes are gathered, with gradient: 2 processes equal 1.

## Source
Qi, Luo, Xu, Ji, Yang: Stochastic Optimization of Areas Under Precision-Recall Curves with Provable Convergence. NeurIPS 2021,
arXiv:2104.08736. LibAUC (MIT licence), `pip install --no-deps libauc`: its list of requirements is longer than what it needs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from equipoise.errors import MissingDependencyError, check_range, refuse
from equipoise.imbalance.anyloss import Metric
from equipoise.imbalance.shared import two_columns
from equipoise.imbalance.tuned_threshold import TunedThreshold
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import check_labels
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space, Uniform
from equipoise.training.table import table_shape


def installed() -> bool:
    """Whether LibAUC can be imported."""
    return find_spec("libauc") is not None


class SOAP(Method):
    """Optimise average precision (AUPRC) with LibAUC: for rankings of rare events.

    lr: learning rate of its optimizer, > 0, which replaces the run's and keeps that one's weight decay. gamma: weight of the
    batch in the running averages, in (0, 1]. margin: of the squared hinge, > 0. metric, beta: what the threshold is chosen for,
    see ``TunedThreshold``. Replaces the task's loss too; needs two classes and batches with their positions. Has no neutral
    setting: at none is it cross-entropy. Raises ``MissingDependencyError`` where LibAUC is not installed. After ``prepare``,
    ``criterion`` is its ``APLoss``.
    """

    name = "soap"
    paper = Paper(
        "Stochastic Optimization of Areas Under Precision-Recall Curves with Provable Convergence",
        "Qi, Luo, Xu, Ji, Yang",
        "NeurIPS 2021",
        "https://arxiv.org/abs/2104.08736",
    )
    space: ClassVar[Space] = {
        "lr": LogUniform(1e-4, 1e-2),
        "gamma": Uniform(0.1, 0.9),
        "margin": Choice((0.6, 0.8, 1.0)),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = None

    criterion: torch.nn.Module

    def __init__(
        self, lr: float = 1e-3, gamma: float = 0.9, margin: float = 1.0, metric: Metric = "f1", beta: float = 1.0
    ) -> None:
        check_range("lr", lr, 0, open_low=True)
        check_range("gamma", gamma, 0, 1, open_low=True)
        check_range("margin", margin, 0, open_low=True)
        self.lr, self.gamma, self.margin, self.metric, self.beta = lr, gamma, margin, metric, beta
        self._threshold = TunedThreshold(metric, beta)
        if not installed():
            raise MissingDependencyError("soap needs LibAUC, which is not installed: pip install --no-deps libauc")

    def prepare(self, run: Run) -> None:
        from libauc.losses.auc import APLoss

        examples, classes = table_shape(run, "SOAP")
        if classes != 2:
            refuse("num_classes", classes, "be 2 for SOAP", "Train one model for each class against the rest")
        part = APLoss(examples, gamma=self.gamma, margin=self.margin, device=run.device)
        part.distributed = False  # the rows are gathered here: LibAUC's way needs shares of equal size
        dtype = next(run.model.parameters()).dtype
        for name in ("u_all", "u_pos"):  # plain tensors, which a checkpoint would not hold
            table = getattr(part, name)
            delattr(part, name)
            part.register_buffer(name, table.to(dtype))
        self.criterion = run.register(self, "criterion", part)
        if run.validation is not None:
            self._threshold.prepare(run)

    def configure_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        from libauc.optimizers.soap import SOAP as Optimizer

        groups = [
            {"params": group["params"], "weight_decay": group.get("weight_decay", 0.0)}
            for group in optimizer.param_groups
        ]
        made: Optimizer = Optimizer(groups, lr=self.lr, mode="adam", device=run.device)
        return made

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        logits = two_columns(output.prediction)
        check_labels(batch.targets, len(logits), 2)
        rows = gather_rows(logits[:, 1] - logits[:, 0], batch.targets, batch.positions("SOAP"))
        scores, targets, index = rows
        if len(scores) < 2 or not int(targets.sum()):
            return 0 * output.prediction.sum()
        table = self.criterion.get_buffer("u_all")
        result: Tensor = self.criterion(scores.to(table.dtype), targets, index)
        return result

    def finish(self, run: Run) -> None:
        if run.validation is not None:
            self._threshold.finish(run)
