"""What a practitioner tries first to make a model smaller: the truncated SVD, with and without training after it.

All of them have the layers, ranks and size that `pela` gives a model at the same `ratio` and `skip`:

    svd-only            the SVD's factors, and no training
    svd-finetune        the SVD's factors, then training on the task
    svd-distill         the same, with the original model's features and logits as further targets
    low-rank-scratch    untrained factors, then training on the task

The uncompressed model, trained as long, is `full-finetuning`.

## When to use
`svd-only` where no data are at hand, at mild ratios. `svd-finetune` first wherever there are data: it has nothing to tune but
the learning rate. `svd-distill` where labels are few or noisy beside what the original model knows. `low-rank-scratch` is the
control that says whether the pre-training was worth keeping.

## When not
See `pela`, whose layers they share.

## Cost
As `pela`: an SVD a layer at the start, and for `svd-distill` a forward pass of the original model a step. `svd-only` goes through
the steps of the run without using them; in use it costs the SVD alone.

## In a distributed run
2 processes equal 1.

## Source
Truncated SVD of trained layers: Xue, Li, Gong, Interspeech 2013; Denton et al., NeurIPS 2014, arXiv:1404.0736. Distillation:
Hinton, Vinyals, Dean, 2015, arXiv:1503.02531; of logits by squared error: Ba, Caruana, NeurIPS 2014, arXiv:1312.6184; of
features: Romero et al., FitNets, ICLR 2015, arXiv:1412.6550. Initial factors whose product has He's variance: He et al., ICCV
2015, arXiv:1502.01852; on the task's digits and on Fashion-MNIST they train better than the SVD of an untrained weight
(spectral initialisation: Khodak et al., ICLR 2021, arXiv:2105.01029).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from equipoise.errors import check_range
from equipoise.finetuning.pela import PELA, checked_names, compress_in_place, low_rank_layers
from equipoise.training.method import Method
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space


class SVDFinetune(Method):
    """Factorise the model's linear layers by the truncated SVD, and train the factors on the task.

    ratio, skip: see ``equipoise.finetuning.pela.compress``. No neutral setting: another set of parameters trains.
    """

    name = "svd-finetune"
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, *, ratio: float = 2.0, skip: Sequence[str] = ("head",)) -> None:
        check_range("ratio", ratio, 0, open_low=True)
        checked_names("skip", skip)
        self.ratio, self.skip = ratio, skip

    def prepare(self, run: Run) -> None:
        run.model = compress_in_place(run.model, self.ratio, self.skip)


class SVDOnly(SVDFinetune):
    """Factorise the model's linear layers by the truncated SVD, and leave them so: no weight is trained.

    ratio, skip: as in ``SVDFinetune``. No neutral setting: the factors are other parameters.
    """

    name = "svd-only"

    def after_backward(self, run: Run) -> None:
        for parameter in run.trainable_parameters():
            parameter.grad = None  # an optimizer passes over it, weight decay included


class LowRankScratch(SVDFinetune):
    """Train a model of the same layers and size from scratch.

    ratio, skip: as in ``SVDFinetune``. The factors are normal, with deviations ``1 / sqrt(in)`` and ``sqrt(2 / rank)``. Every
    other module with ``reset_parameters`` starts anew; a parameter of no such module (an embedding of positions, say) is drawn
    normally with the mean and deviation that it has. No neutral setting: the weights given are not used.
    """

    name = "low-rank-scratch"

    def prepare(self, run: Run) -> None:
        fresh = copy.deepcopy(run.model).cpu().float()  # the same numbers for every device and precision
        generator = run.new_generator(self)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            for module in fresh.modules():
                _reset(module)
        run.model.load_state_dict(fresh.state_dict())
        super().prepare(run)
        with torch.no_grad():
            for layer in low_rank_layers(run.model).values():
                deviations = layer.in_features**-0.5, (2 / layer.rank) ** 0.5
                for factor, deviation in zip(layer.factors, deviations, strict=True):
                    factor.copy_(deviation * torch.randn(factor.shape, generator=generator))


def _reset(module: nn.Module) -> None:
    """Give a module's own parameters (not its children's) initial values, drawn from torch's global generator."""
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        parameter.copy_(parameter.mean() + parameter.std(correction=0) * torch.randn(parameter.shape))


class SVDDistill(PELA):
    """Factorise by the truncated SVD, and distil the original model's features and logits: PELA without weight perturbation.

    ratio, skip, features, intermediate_steps: as in ``PELA``. alpha, beta: weights of features and logits, >= 0. No neutral
    setting, as there.
    """

    name = "svd-distill"
    paper = None
    space: ClassVar[Space] = {
        "alpha": LogUniform(0.1, 10.0),
        "beta": LogUniform(0.01, 1.0),
        "intermediate_steps": Choice((0.5, 1.0)),
    }

    def __init__(
        self,
        *,
        ratio: float = 2.0,
        skip: Sequence[str] = ("head",),
        features: list[str] | None = None,
        alpha: float = 1.0,
        beta: float = 0.1,
        intermediate_steps: int | float = 1.0,
    ) -> None:
        super().__init__(
            ratio=ratio,
            skip=skip,
            features=features,
            alpha=alpha,
            beta=beta,
            gamma=0.0,
            intermediate_steps=intermediate_steps,
        )
