"""What a practitioner tries first: full fine-tuning, a linear probe, and the low-rank adapters of peft.

A pretrained weight `W` (out, in) is adapted with factors `A` (r, in) and `B` (out, r):

    full fine-tuning    W trains, everything trains
    linear probe        W is frozen; only the head trains
    LoRA                W + s B A,              B = 0 at the start, s = alpha / r
    rsLoRA              the same,               s = alpha / sqrt(r)
    PiSSA               (W - s B0 A0) + s B A,  B0 A0 the principal part of W, where A and B start
    DoRA                m * (W + s B A) / ||W + s B A||_row,  m (out,) trains too

The last four are peft's own code (`pip install 'equipoise[hf]'`), put into the model before training and merged into plain
`nn.Linear` layers after it: the trained model has the keys of the model that came in.

## When to use
Always, before anything else. Full fine-tuning where the model fits and data abound. A linear probe where data are very few, or as
the cheapest check of what the pretrained features hold. LoRA where the gradient and optimizer state of all weights are too much.

## When not
An adapter of low rank cannot learn what needs a change of high rank (a new modality, a new language): there full fine-tuning wins.

## Cost
Full fine-tuning: gradient and optimizer state (AdamW: 3 numbers) for every weight. LoRA: for r (in + out) of in * out numbers of a
layer; a training step needs two thin products more a layer, and no gradient of `W`. DoRA also computes the norm of every row
of `W + s B A` in each step. PiSSA: one SVD a layer at the start. Merged, none costs anything at inference.

## In a distributed run
Every process starts from the same factors, drawn from the run's seed.

## Source
LoRA: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, ICLR 2022, arXiv:2106.09685. rsLoRA: Kalajdzievski, 2023,
arXiv:2312.03732. PiSSA: Meng, Wang, Zhang, NeurIPS 2024, arXiv:2404.02948. DoRA: Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, ICML
2024, arXiv:2402.09353.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from equipoise.errors import ArgumentError, MissingDependencyError, check_integer, check_range
from equipoise.finetuning.adapters import Target, check_rank, find_targets
from equipoise.training.assemble import derived_seed
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run


class FullFinetuning(Method):
    """Train every weight that requires a gradient: the baseline. Has no hooks and no settings."""

    name = "full-finetuning"
    neutral: ClassVar[Mapping[str, Any] | None] = {}


class LinearProbe(Method):
    """Train the head alone, the layer that ``run.head()`` gives; everything before it is frozen.

    There is no neutral setting: the head is all that trains. BatchNorm goes on counting its statistics in training mode, as under
    every other method. Raises ``ArgumentError`` where the head has no parameters.
    """

    name = "linear-probe"
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def prepare(self, run: Run) -> None:
        head = run.head()
        if not any(True for _ in head.parameters()):
            raise ArgumentError(
                f"head: {type(head).__name__} has no parameters to train. Name another: head='path.to.layer'"
            )
        run.model.requires_grad_(False)
        head.requires_grad_(True)


class PeftLoRA(Method):
    """What the four adapters of peft share: put in by ``prepare``, merged by ``finish``."""

    neutral: ClassVar[Mapping[str, Any] | None] = None
    options: ClassVar[Mapping[str, Any]] = {}  # what peft's LoraConfig is told beside rank, alpha and target
    dropout: float = 0.0

    def __init__(self, rank: int = 8, alpha: float | None = None, target: Target = None) -> None:
        check_integer("rank", rank, 1)
        if alpha is not None:
            check_range("alpha", alpha, 0, open_low=True)
        if find_spec("peft") is None:
            raise MissingDependencyError(f"{self.name} needs peft, which is not installed: pip install 'equipoise[hf]'")
        self.rank, self.alpha, self.target = rank, alpha, target

    def prepare(self, run: Run) -> None:
        from peft import LoraConfig, LoraModel

        layers = find_targets(run.model, self.target)
        for layer in layers.values():
            check_rank(self.rank, layer)
        if "" in layers:
            raise ArgumentError(
                "model is an nn.Linear itself, in which peft has no place to attach. Wrap it: nn.Sequential(model)"
            )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, layers)),
            **self.options,
        )
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator of the CPU
            torch.default_generator.manual_seed(derived_seed(run.seed, self.name))
            self.tuner = LoraModel(run.model, config, "default")

    def finish(self, run: Run) -> None:
        run.model = self.tuner.merge_and_unload()


class LoRA(PeftLoRA):
    """Learn a change of low rank for each weight; the weights themselves are frozen.

    rank: of the change, in [1, min(out, in)]; a budget, not tuned. alpha: the change is scaled by alpha / rank; by default alpha is
    the rank. dropout: on the adapters' inputs, in [0, 1). target: the layers, see ``find_targets``; by default every
    ``nn.Linear``. Neutral would be rank 0, which trains nothing. Raises ``MissingDependencyError`` without peft.
    """

    name = "lora"
    paper = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
        "ICLR 2022",
        "https://arxiv.org/abs/2106.09685",
    )

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0, target: Target = None) -> None:
        super().__init__(rank, alpha, target)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.dropout = dropout


class RsLoRA(PeftLoRA):
    """LoRA whose change is scaled by alpha / sqrt(rank), so that a high rank learns as fast as a low one.

    Arguments as in ``LoRA``; alpha is by default the rank, and the scale sqrt(rank). Neutral would be rank 0, which trains nothing.
    """

    name = "rslora"
    paper = Paper(
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "Kalajdzievski",
        "arXiv 2023",
        "https://arxiv.org/abs/2312.03732",
    )
    options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


class PiSSA(PeftLoRA):
    """LoRA that starts from the principal singular vectors of each weight, of which the rest is frozen.

    Arguments as in ``LoRA``. Neutral would be rank 0, which trains nothing. A float64 weight is rounded to
    float32 first, in which peft splits it.
    """

    name = "pissa"
    paper = Paper(
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        "Meng, Wang, Zhang",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2404.02948",
    )
    options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "pissa"}

    def prepare(self, run: Run) -> None:
        layers = find_targets(run.model, self.target)
        wide = [path for path, layer in layers.items() if layer.weight.dtype == torch.float64]  # which peft refuses
        for path in wide:
            run.model.get_submodule(path).float()
        super().prepare(run)
        for path in wide:
            run.model.get_submodule(path).double()


class DoRA(PeftLoRA):
    """LoRA for the direction of each weight's rows, and a trained magnitude for each row.

    Arguments as in ``LoRA``. Neutral would be rank 0 with frozen magnitudes, which trains nothing.
    """

    name = "dora"
    paper = Paper(
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        "Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen",
        "ICML 2024",
        "https://arxiv.org/abs/2402.09353",
    )
    options: ClassVar[Mapping[str, Any]] = {"use_dora": True}
