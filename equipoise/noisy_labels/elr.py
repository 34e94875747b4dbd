"""ELR: early-learning regularization, and ELR+ with two networks.

Part of the training labels is wrong. A network first learns what the correct labels have in common ("early learning") and
only later memorises the wrong ones. ELR remembers, for each training example, a running average of what the network itself
has predicted, and adds a term to the loss that rewards agreeing with it: the pull of a wrong label is cancelled before the
network has given in to it.

For logits `z` of example `i` with label `y`, probabilities `p = softmax(z)`, clamped to `pc = clamp(p, eps, 1 - eps)`, and
the example's row `T_i` of a table that starts at zero, each training step does

    T_i   <-  beta T_i + (1 - beta) pc / sum(pc)              before the loss, without gradient
    R      =  mean over the batch of log(1 - <pc, T_i>)       gradient through pc only
    loss   =  cross-entropy(z, y) + lam R

`R` is negative and smallest where the prediction agrees with the average. The clamp bounds it from below by about `log(eps)`
and ends the gradient of saturated probabilities.

ELR+ trains two networks `k = 1, 2`, each on mixup batches, with the targets of one made by a weight average of the other.
Per step and network, with mixup weight `l' = max(l, 1 - l)`, `l ~ Beta(a, a)`, and partner `j` of example `i`:

    T_k[i]  <-  beta T_k[i] + (1 - beta) softmax(averaged network of the other, on the unmixed example)
    T~       =  l' T_k[i] + (1 - l') T_k[j],      y~ = l' y_i + (1 - l') y_j
    loss_k   =  -sum(y~ log softmax(z)) + ramp(s) lam log(1 - <clamp(softmax(z)), T~>)
    z        =  logits of network k for the mixed example
    ramp(s)  =  exp(-5 (1 - min(s, S) / S)^2) at step s, 1 for S = 0

after which each average follows its network's weights, and prediction is the mean of the two networks' logits.

## When to use
Labels from crowds, scraping or heuristics with a substantial share of errors (it was shown on 20 to 80 % symmetric, 40 %
asymmetric and real web noise), and enough epochs that plain training would memorise. It needs no clean labels. ELR+ is
for when twice the training and inference compute is acceptable for a few points more.

## When not
Clean labels: the term then slows the fitting of rare and hard examples, which look like mistakes. A single epoch, or data
seen once (the table never fills). Augmentations that change the class. `beta = 0` makes a network agree with itself only and
does not work. Loaders must give each example's position in the whole training set; a step that evaluates its loss several
times (LBFGS, gradient replays) updates the table each time.

## Cost
ELR: no extra pass; one table of examples x classes (float32: 4 n C bytes) and elementwise work on the batch's logits.
ELR+: two networks to train and to predict with, two further copies in memory, two tables, and one extra forward pass per
network and step: about 2.7 times the training FLOPs of plain training, twice the inference FLOPs.

## In a distributed run
The tables are equal on all processes: every step exchanges the rows of all of them. ELR with 2 processes equals ELR with 1.
ELR+ draws mixup partners inside each process's share of the batch, so that it agrees with one process only for
`mixup_alpha = 0`.

## Differences from the released code
The two networks of ELR+ take their steps together, on the same batch (each with its own mixup), instead of an epoch each in
turn; their losses are added, which gives each network exactly its own gradient. The averages start as copies of their
networks. The averages run in training mode, as in the released code, so that batch normalisation uses the batch's
statistics (the averaged weights have no others that fit them), but with dropout off.

## Source
Liu, Niles-Weed, Razavian, Fernandez-Granda: Early-Learning Regularization Prevents Memorization of Noisy Labels.
NeurIPS 2020, arXiv:2007.00151; clamp, ramps and the order of the steps from the authors' code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range
from equipoise.noisy_labels.two_networks import LogitAverage, make_peer
from equipoise.training.batch import Batch, Inputs, Output, map_inputs
from equipoise.training.losses import (
    REDUCTIONS,
    check_labels,
    check_logits,
    check_rows,
    precise,
    reduce,
)
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform
from equipoise.training.table import check_index, table_shape, write_rows


# -- the functional core ----------------------------------------------------------------------------------------------
def elr_penalty(logits: Tensor, soft_targets: Tensor, *, eps: float = 1e-4, reduction: str = "mean") -> Tensor:
    """``log(1 - <clamp(softmax(logits), eps, 1 - eps), soft_targets>)`` per example, reduced.

    logits: (N, C). soft_targets: (N, C), held constant; non-negative rows that sum to at most 1.
    eps: in [0, 0.5); 0 switches the clamp off, and the penalty is then unbounded. reduction: "none" (N,), "sum" or "mean".
    Half-precision logits are computed in float32. Source: Sec. 4, with the clamp of the authors' code.
    """
    check_logits(logits)
    check_rows("soft_targets", soft_targets, logits)
    _check_eps(eps)
    return reduce(_disagreement(_clamped_softmax(logits, eps), soft_targets.detach()), reduction)


@torch.no_grad()
def update_soft_targets(table: Tensor, index: Tensor, logits: Tensor, *, beta: float, eps: float = 1e-4) -> Tensor:
    """Move the rows ``index`` of ``table`` towards the predictions, in place: ``T <- beta T + (1 - beta) pc / sum(pc)``.

    table: (n, C). index: (N,) int64 in [0, n). logits: (N, C). beta: in [0, 1). eps: in [0, 0.5), 0 for no clamp.
    Returns the batch's new rows (N, C). Of an example that occurs twice the last occurrence counts, for all its occurrences.
    Source: Sec. 4, "temporal ensembling", with the clamp of the authors' code.
    """
    check_logits(logits, table.shape[1])
    check_range("beta", beta, 0, 1, open_high=True)
    _check_eps(eps)
    return _move_rows(table, index, _clamped_softmax(logits, eps), beta)


def elr_plus_loss(
    logits: Tensor,
    soft_labels: Tensor,
    soft_targets: Tensor,
    *,
    lam: float,
    eps: float = 1e-4,
    ramp: float = 1.0,
    reweight_labels: bool = False,
) -> Tensor:
    """Soft cross-entropy plus ``ramp * lam * elr_penalty``: the loss of one network of ELR+, a mean over the batch.

    logits, soft_labels (rows sum to 1), soft_targets (constant): (N, C). lam: >= 0. ramp: >= 0, see ``sigmoid_rampup``.
    reweight_labels: multiply the labels by the targets and renormalise first (the authors do so on CIFAR-100); a row whose
    product vanishes keeps its labels.
    """
    check_logits(logits)
    check_rows("soft_labels", soft_labels, logits)
    check_range("lam", lam, 0)
    check_range("ramp", ramp, 0)
    if reweight_labels:
        check_rows("soft_targets", soft_targets, logits)
        agreed = soft_labels * soft_targets.detach()
        total = agreed.sum(1, keepdim=True)
        soft_labels = torch.where(total > 0, agreed / total, soft_labels)
    cross_entropy = -(soft_labels * F.log_softmax(precise(logits), 1)).sum(1).mean()
    return cross_entropy + ramp * lam * elr_penalty(logits, soft_targets, eps=eps)


def sigmoid_rampup(step: int, length: int) -> float:
    """``exp(-5 (1 - min(step, length) / length)^2)``: from exp(-5) to 1 over ``length`` steps; 1 if ``length`` is 0."""
    check_integer("length", length, 0)
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(max(step, 0), length) / length) ** 2)


def _disagreement(probabilities: Tensor, rows: Tensor) -> Tensor:
    # The constant factor takes the sign, so that nothing more is to be differentiated.
    return torch.log1p((probabilities * -rows).sum(1))


@torch.no_grad()
def _move_rows(table: Tensor, index: Tensor, probabilities: Tensor, beta: float) -> Tensor:
    index = index.to(table.device)
    check_index(index, len(table), len(probabilities))
    # In place, since with many classes most of the time goes into new memory.
    share = ((1 - beta) * probabilities).div_(probabilities.sum(1, keepdim=True))
    return write_rows(table, index, precise(table.index_select(0, index)).mul_(beta).add_(share))


def _clamped_softmax(logits: Tensor, eps: float) -> Tensor:
    # Never in half precision: 1 - 1e-4 rounds to 1 in bfloat16, and the clamp would do nothing.
    probabilities = F.softmax(precise(logits), 1)
    # hardtanh is clamp with a gradient in one pass instead of four; it ends the gradient at eps and 1 - eps themselves too.
    return F.hardtanh(probabilities, eps, 1 - eps) if eps > 0 else probabilities


def _check_eps(eps: float) -> None:
    check_range("eps", eps, 0, 0.5, open_high=True)


def _check_settings(lam: float, beta: float, eps: float) -> None:
    check_range("lam", lam, 0)
    check_range("beta", beta, 0, 1, open_high=True)
    _check_eps(eps)


# -- the module -------------------------------------------------------------------------------------------------------
class ELRLoss(nn.Module):
    """Cross-entropy plus the ELR penalty, for any training loop.

    >>> loss = ELRLoss(num_examples=100, num_classes=3)
    >>> loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.tensor([7, 0, 42, 99])).shape
    torch.Size([])

    num_examples, num_classes: size of the table, >= 1 and >= 2. lam: weight of the penalty, >= 0. beta: memory of the table,
    in [0, 1). eps: clamp of the probabilities, in [0, 0.5). reduction: "none", "sum" or "mean". Raises ``ArgumentError`` (a
    ``ValueError``) for anything else.

    ``soft_targets`` is a buffer (num_examples, num_classes): it moves, casts and saves with the module. Keep it in half
    precision only for beta <= 0.9, above which rounding stalls the average. It is used in training mode only: in evaluation
    mode positions refer to other data, so ``forward`` is plain cross-entropy and ``penalty`` zero.
    """

    soft_targets: Tensor

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        eps: float = 1e-4,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_integer("num_examples", num_examples, 1)
        check_integer("num_classes", num_classes, 2)
        _check_settings(lam, beta, eps)
        check_choice("reduction", reduction, REDUCTIONS)
        self.lam, self.beta, self.eps, self.reduction = lam, beta, eps, reduction
        self.register_buffer("soft_targets", torch.zeros(num_examples, num_classes))

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        """``cross-entropy + lam * penalty``. logits: (N, C). targets: (N,) integer. index: (N,) int64, training-set positions."""
        check_logits(logits, self.soft_targets.shape[1])
        check_labels(targets, len(logits), logits.shape[1], "For soft labels use elr_plus_loss")
        cross_entropy = F.cross_entropy(precise(logits), targets.long(), reduction=self.reduction)
        return cross_entropy + self.lam * self.penalty(logits, index)

    def penalty(self, logits: Tensor, index: Tensor) -> Tensor:
        """The regulariser alone: updates the rows, then returns ``elr_penalty`` against them (not multiplied by ``lam``)."""
        check_logits(logits, self.soft_targets.shape[1])
        if not self.training:
            return reduce(precise(logits).new_zeros(len(logits)), self.reduction)
        probabilities = _clamped_softmax(logits, self.eps)  # once for the update and the penalty
        rows = _move_rows(self.soft_targets, index, probabilities.detach(), self.beta)
        return reduce(_disagreement(probabilities, rows), self.reduction)

    def suspected_noise(self, labels: Tensor) -> Tensor:
        """Which labels (num_examples,) differ from the class that the table favours: (num_examples,) bool.

        An example that was never visited is not suspected.
        """
        labels = labels.to(self.soft_targets.device)
        check_labels(labels, *self.soft_targets.shape)
        visited = self.soft_targets.sum(1) > 0
        return (self.soft_targets.argmax(1) != labels) & visited

    def extra_repr(self) -> str:
        n, classes = self.soft_targets.shape
        return f"{n}, {classes}, lam={self.lam}, beta={self.beta}, eps={self.eps}, reduction={self.reduction!r}"


# -- the methods ------------------------------------------------------------------------------------------------------
class ELR(Method):
    """Agree with your own early predictions, so that wrong labels are not memorised (early-learning regularization).

    Adds ``lam * R`` to the task's loss; with cross-entropy that is the paper's ELR. lam: >= 0 (3 for symmetric noise, 1 for
    asymmetric, 7 for 100 classes). beta: in [0, 1) (0.7; 0.9 for asymmetric noise and 100 classes). eps: in [0, 0.5).
    After ``prepare``, ``regularizer`` is the ``ELRLoss`` with the table: ``regularizer.suspected_noise(labels)``.
    """

    name = "elr"
    paper = Paper(
        "Early-Learning Regularization Prevents Memorization of Noisy Labels",
        "Liu, Niles-Weed, Razavian, Fernandez-Granda",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2007.00151",
    )
    space: ClassVar[Space] = {"lam": LogUniform(1, 10), "beta": Uniform(0.5, 0.95)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}

    regularizer: ELRLoss

    def __init__(self, lam: float = 3.0, beta: float = 0.7, eps: float = 1e-4) -> None:
        _check_settings(lam, beta, eps)
        self.lam, self.beta, self.eps = lam, beta, eps

    def prepare(self, run: Run) -> None:
        part = ELRLoss(*table_shape(run, "ELR"), lam=self.lam, beta=self.beta, eps=self.eps)
        self.regularizer = run.register(self, "regularizer", part)

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return self.lam * self.regularizer.penalty(output.prediction, batch.positions("ELR"))


@dataclass(frozen=True)
class Mixup:
    """One draw of mixup: ``weight`` in [0.5, 1] of each row, the rest from the row at ``partner`` (N,) int64."""

    weight: float
    partner: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """``weight * values + (1 - weight) * values[partner]``, for (N, ...) floating point values."""
        if self.weight == 1:
            return values
        if not values.is_floating_point():
            raise ArgumentError(
                f"inputs of {values.dtype}: mixup averages inputs and must have floating-point ones. "
                "Convert them, or switch mixup off: mixup_alpha=0"
            )
        return values.lerp(values[self.partner], 1 - self.weight)

    def inputs(self, inputs: Inputs) -> Inputs:
        """``rows`` of a tensor or of each tensor in a dict."""
        return map_inputs(self.rows, inputs)


def draw_mixup(size: int, alpha: float, generator: torch.Generator, device: torch.device) -> Mixup:
    """Draw ``l ~ Beta(alpha, alpha)``, ``weight = max(l, 1 - l)`` and partners for ``size`` rows; no mixing for alpha = 0."""
    if alpha == 0:
        return Mixup(1.0, torch.arange(size, device=device))
    # One number for any size, so that the generator stays the same in all processes; and torch's own Beta distribution
    # would draw from the global generator.
    numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    weight = float(numbers.beta(alpha, alpha))
    return Mixup(max(weight, 1 - weight), torch.from_numpy(numbers.permutation(size)).to(device))


class ELRPlus(Method):
    """ELR with two networks that teach each other, weight averaging and mixup.

    lam, beta, eps: as for ``ELR``. mixup_alpha: of mixup's Beta distribution, >= 0, 0 for none. gamma: momentum of the weight
    averages, in [0, 1) (0.9999 on Clothing1M). ramp_steps: steps over which the penalty is ramped up (40000 on CIFAR-100, else
    0). reweight_labels: multiply the labels by the targets (on CIFAR-100). averaging_ramp_steps: S > 0 makes the momentum
    ``gamma * ramp(s + 1)`` over S steps (40000 on CIFAR-10 and -100), 0 makes it ``min(1 - 1 / (s + 1), gamma)``.
    peer: a ready second network (a copy of it is trained); by default one like the model with fresh weights, see ``make_peer``.

    The loss of the run is the sum of both networks' losses; evaluation uses the mean of their logits. A gradient clipped by
    norm is clipped over both. With lam and mixup_alpha 0 the first network trains as the baseline does; prediction still takes
    the mean of two.
    """

    name = "elr-plus"
    paper = Paper(
        "Early-Learning Regularization Prevents Memorization of Noisy Labels",
        "Liu, Niles-Weed, Razavian, Fernandez-Granda",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2007.00151",
    )
    space: ClassVar[Space] = {"lam": LogUniform(1, 10), "beta": Uniform(0.5, 0.95)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0, "mixup_alpha": 0.0}

    def __init__(
        self,
        lam: float = 3.0,
        beta: float = 0.7,
        mixup_alpha: float = 1.0,
        gamma: float = 0.997,
        ramp_steps: int = 0,
        *,
        eps: float = 1e-4,
        reweight_labels: bool = False,
        averaging_ramp_steps: int = 0,
        peer: nn.Module | None = None,
    ) -> None:
        _check_settings(lam, beta, eps)
        check_range("mixup_alpha", mixup_alpha, 0)
        check_range("gamma", gamma, 0, 1, open_high=True)
        check_integer("ramp_steps", ramp_steps, 0)
        check_integer("averaging_ramp_steps", averaging_ramp_steps, 0)
        self.lam, self.beta, self.mixup_alpha, self.gamma, self.ramp_steps = lam, beta, mixup_alpha, gamma, ramp_steps
        self.eps, self.reweight_labels = eps, reweight_labels
        self.averaging_ramp_steps, self.peer = averaging_ramp_steps, peer

    def prepare(self, run: Run) -> None:
        size = table_shape(run, "ELR+")
        self.generator = run.new_generator(self)
        second = make_peer(run.model, self.generator, peer=copy.deepcopy(self.peer))
        second = run.register(self, "second", second, optimize=True)
        self.networks = (run.model, second)
        self.averages = [
            run.register(self, f"average_{k}", _averaged_copy(network)) for k, network in enumerate(self.networks, 1)
        ]
        self.tables = [run.register(self, f"table_{k}", ELRLoss(*size, beta=self.beta, eps=self.eps)) for k in (1, 2)]
        run.inference_model = LogitAverage(self.networks)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        labels = batch.targets
        if labels.ndim == 1:
            num_classes = self.tables[0].soft_targets.shape[1]
            check_labels(labels, len(batch), num_classes)
            labels = F.one_hot(labels.long(), num_classes).float()
        draw = lambda: draw_mixup(len(batch), self.mixup_alpha, self.generator, labels.device)  # noqa: E731
        mixups = (draw(), draw())
        return replace(
            batch,
            inputs=mixups[0].inputs(batch.inputs),
            targets=mixups[0].rows(labels),
            extras={**batch.extras, self.name: (batch.inputs, labels, mixups)},
        )

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        inputs, labels, mixups = batch.extras[self.name]
        first = output.prediction
        second = run.forward(mixups[1].inputs(inputs), self.networks[1]).prediction
        ramp = sigmoid_rampup(run.global_step + 1, self.ramp_steps)
        losses = []
        for logits, teacher, table, mixup in zip(
            (first, second), reversed(self.averages), self.tables, mixups, strict=True
        ):
            with torch.no_grad():
                taught = run.forward(inputs, teacher).prediction
            rows = update_soft_targets(table.soft_targets, batch.positions("ELR+"), taught, beta=self.beta, eps=0.0)
            losses.append(
                elr_plus_loss(
                    logits,
                    mixup.rows(labels),
                    mixup.rows(rows),
                    lam=self.lam,
                    eps=self.eps,
                    ramp=ramp,
                    reweight_labels=self.reweight_labels,
                )
            )
        return losses[0] + losses[1]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        momentum = averaging_momentum(run.global_step, self.gamma, self.averaging_ramp_steps)
        for average, network in zip(self.averages, self.networks, strict=True):
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - momentum)

    def finish(self, run: Run) -> None:
        run.model = run.inference_model


def averaging_momentum(step: int, gamma: float, ramp_steps: int) -> float:
    """Momentum of ELR+'s weight averages after step ``step`` (from 1): ramped up to gamma, or a true mean until gamma."""
    return gamma * sigmoid_rampup(step + 1, ramp_steps) if ramp_steps else min(1 - 1 / (step + 1), gamma)


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _averaged_copy(network: nn.Module) -> nn.Module:
    """A copy that is never optimised, in training mode but for dropout (see "Differences" above)."""
    average = copy.deepcopy(network).requires_grad_(False).train()
    for module in average.modules():
        if isinstance(module, _DROPOUT):
            module.eval()
    return average
