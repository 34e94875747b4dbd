"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement, the balancing method that others are held against.

In joint training the modality that predicts best drives the loss down and leaves the other encoders little gradient. OGM-GE
slows the encoder of the leading modality down, so that the others catch up, and adds noise to the encoders' gradients to make
up for the stochasticity that is lost.

For modalities `m = 1 .. M` with unimodal logits `u_m` and fused logits `s`, in every step

    z_m    =  u_m - (sum_k u_k - s) / M                     contributions: sum_m z_m = s
    S_m    =  sum over the batch of softmax(z_m)_y
    rho_m  =  S_m / mean_{k != m} S_k                       discrepancy
    k_m    =  1 - tanh(alpha rho_m)  if rho_m > 1, else 1
    g_m    <- k_m g_m + noise std(g_m) e,    e ~ N(0, 1)    every parameter's gradient in encoder m

The loss is the cross-entropy of the fused logits. With a concatenation head `z_m = W_m x_m + b / M`, the paper's. After epoch
`end_epoch` training is plain.

## When to use
As the balancing baseline, wherever ARL is considered; when labels and a late fusion are given and one modality runs ahead.

## When not
Few training steps: the noise has the size of the gradient itself and slows training down. With an adaptive optimizer, which
divides a constant factor out again.

## Cost
The unimodal logits and O(B C) work on them; a normal number for each parameter of the encoders, drawn on the CPU.

## In a distributed run
The scores are summed over the processes and the noise is the same in all of them: 2 processes equal 1. So are the scores of
micro-batches under gradient accumulation.

## Source
Peng, Wei, Deng, Wang, Hu: Balanced Multimodal Learning via On-the-fly Gradient Modulation. CVPR 2022, arXiv:2203.15332. For more
than two modalities the mean of the others is this library's reading. The authors' script modulates the convolutions' weights only;
here it is every parameter of an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import check_integer, check_range
from equipoise.multimodal.arl import check_modalities, encoders_of, unimodal_of
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import check_labels, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space


# -- the functional core ----------------------------------------------------------------------------------------------
@torch.no_grad()
def modality_scores(fused: Tensor, unimodal: Sequence[Tensor], targets: Tensor) -> Tensor:
    """``S_m`` (M,): what each modality's contribution alone gives to the right classes, summed over the batch.

    fused: (B, C) logits. unimodal: M >= 2 tensors (B, C). targets: (B,) integer classes.
    """
    check_modalities(unimodal, fused)
    check_labels(targets, len(fused), fused.shape[1], "OGM-GE needs single-label classification")
    stacked = torch.stack([precise(u) for u in unimodal])
    contributions = stacked - (stacked.sum(0) - precise(fused)) / len(stacked)
    return contributions.softmax(-1)[:, torch.arange(len(fused), device=fused.device), targets.long()].sum(1)


def ogm_coefficients(scores: Tensor, alpha: float) -> Tensor:
    """``k_m`` (M,), in (0, 1]: what each encoder's gradient is multiplied by. scores: (M,). alpha: >= 0; at 0 all are 1."""
    check_range("alpha", alpha, 0)
    others = (scores.sum() - scores) / (len(scores) - 1)
    ratio = scores / others.clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.where(ratio > 1, 1 - (alpha * ratio).tanh(), 1)


# -- the method -------------------------------------------------------------------------------------------------------
class OGMGE(Method):
    """Slow the encoder of the leading modality down, and add noise to the encoders' gradients.

    alpha: how much, >= 0. noise: standard deviation of the noise relative to that of the gradient, >= 0; at 0 it is OGM.
    end_epoch: last 0-based epoch with modulation, >= 0. Computes the cross-entropy of the fused logits; needs a model with
    ``encoders`` and ``unimodal`` logits (``MultimodalNet``), and single-label classification.
    """

    name = "ogm-ge"
    paper = Paper(
        "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
        "Peng, Wei, Deng, Wang, Hu",
        "CVPR 2022",
        "https://arxiv.org/abs/2203.15332",
    )
    space: ClassVar[Space] = {"alpha": LogUniform(0.05, 1.0), "noise": Choice((0.0, 1.0))}
    neutral: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "noise": 0.0}

    def __init__(self, alpha: float = 0.1, noise: float = 1.0, end_epoch: int = 50) -> None:
        check_range("alpha", alpha, 0)
        check_range("noise", noise, 0)
        check_integer("end_epoch", end_epoch, 0)
        self.alpha, self.noise, self.end_epoch = alpha, noise, end_epoch

    def prepare(self, run: Run) -> None:
        self._encoders = [list(encoder.parameters()) for encoder in encoders_of(run.model).values()]
        self._generator = run.new_generator(self)
        self._scores: Tensor | None = None

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        fused, unimodal = unimodal_of(output, len(self._encoders))
        scores = modality_scores(fused, unimodal, batch.targets)
        self._scores = scores if self._scores is None else self._scores + scores
        return F.cross_entropy(precise(fused), batch.targets)

    def after_backward(self, run: Run) -> None:
        scores, self._scores = self._scores, None
        if scores is None or run.epoch > self.end_epoch:
            return
        factors = ogm_coefficients(gather_rows(scores[None]).sum(0), self.alpha)
        for parameters, factor in zip(self._encoders, factors.unbind(), strict=True):
            for parameter in parameters:
                if parameter.grad is not None:
                    self._modulate(parameter.grad, factor)

    def _modulate(self, gradient: Tensor, factor: Tensor) -> None:
        scale = self.noise * gradient.std() if gradient.numel() > 1 else 0.0
        gradient *= factor
        if self.noise:
            gradient += scale * torch.randn(gradient.shape, generator=self._generator).to(gradient)
