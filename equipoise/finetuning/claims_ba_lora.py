"""The claims of the BA-LoRA paper, as they can be checked on Fashion-MNIST: robustness to imbalance and wrong labels.

An MLP 784-128-128-10 learns 4000 balanced, rightly labelled images for 300 steps. Then it is fine-tuned for 300 steps of 64
(AdamW at a constant rate, no weight decay, rank 8 on all linear layers) on other images: 500 each of classes 0 to 4 and 10 each
of classes 5 to 9, a fifth of the labels replaced by random ones. What counts is the accuracy on the 5000 test images of classes
5 to 9. The rate of every arm is chosen on 1500 balanced, rightly labelled images; "at 2e-3" stands for that rate, without a
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.comparison.claims import Claim
from equipoise.finetuning.task import Finetune
from equipoise.training import Examples, Problem

RARE, KEPT, WRONG = 5, 10, 0.2  # classes from the first on are rare, of which so many remain; share of labels replaced


@dataclass(frozen=True)
class Biased(Finetune):
    """Fine-tuning on few rare classes and wrong labels; ``rare_accuracy`` is the accuracy on the rare classes."""

    name: ClassVar[str] = "finetune-biased"

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        found = super().measure(problem, predictions)
        for part in ("validation", "test"):
            logits, targets = predictions[part]
            rare = targets >= RARE
            found[f"{part}_rare_accuracy"] = (logits[rare].argmax(1) == targets[rare]).double().mean().item()
        return found

    def _make(self, seed: int) -> Problem:
        problem = super()._make(seed)
        return replace(problem, train=biased(problem.train, torch.Generator().manual_seed(seed)))


def biased(examples: Examples, generator: torch.Generator) -> Examples:
    """All examples of the frequent classes, the first ``KEPT`` of each rare one; then a share of the labels drawn anew."""
    targets, classes = examples.targets, examples.num_classes or 0
    rows = [torch.nonzero(targets == c).flatten()[: KEPT if c >= RARE else None] for c in range(classes)]
    kept = examples.subset(torch.cat(rows).sort().values)
    count = len(kept)
    drawn = torch.randint(classes, (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < WRONG
    return Examples(kept.inputs, torch.where(wrong, drawn, kept.targets), num_classes=classes)


SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "shift": "none",
    "model": "mlp",
    "hidden": (128, 128),
    "pretrain_examples": 4_000,
    "pretrain_steps": 300,
    "train_examples": 5_000,
    "steps": 300,
    "epochs": 1,
    "schedule": "constant",
    "validation": 1_500 / 60_000,
}
RATES = (5e-4, 1e-3, 2e-3, 5e-3)


def arm(name: str, slug: str, **settings: Any) -> list[tuple[str, str, Any]]:
    """The arm with its rate chosen on validation data, and at the rate 2e-3."""
    own = {f"{slug}.{key}": value for key, value in {"rank": 8, **settings}.items()}
    common = {"weight_decay": 0.0, **own}
    return [
        (name, slug, tuple({"lr": lr, **common} for lr in RATES)),
        (f"{name}, at 2e-3", slug, {"lr": 2e-3, **common}),
    ]


ARMS = (
    *arm("ba-lora", "ba-lora"),
    *arm("ba-lora, l1 = 0.5", "ba-lora", lambdas=(0.5, 0.03, 0.03)),
    *arm("without consistency", "ba-lora", lambdas=(0.0, 0.03, 0.03)),
    *arm("consistency alone", "ba-lora", lambdas=(0.15, 0.0, 0.0)),
    *arm("diversity alone", "ba-lora", lambdas=(0.0, 0.03, 0.0)),
    *arm("spectrum alone", "ba-lora", lambdas=(0.0, 0.0, 0.03)),
    *arm("pissa", "pissa"),
    *arm("lora", "lora"),
)

claim = partial(
    Claim,
    slug="ba_lora",
    number=16,
    source="Chang et al., ICLR 2026 (GLUE average, DeBERTa-v3-base: LoRA 88.56, PiSSA 89.47, BA-LoRA 90.67; imbalanced MNLI, "
    "minority recall: 5.8, 26.4, 61.7)",
    task=Biased,
    settings=SETTINGS,
    arms=ARMS,
    seeds=5,
    metric="last.test_rare_accuracy",
    scale=100.0,
    unit="points of accuracy on the rare classes",
)

CLAIMS = [
    claim(
        claim="Fine-tuned on imbalanced data with wrong labels, BA-LoRA is at least 3 points above PiSSA on the rare classes.",
        method="ba-lora",
        reference="pissa",
        at_least=3.0,
        remarks=(
            "For both, the validation data choose the lowest rate that was tried (5e-4), at which PiSSA forgets little. Means "
            "on the rare classes: BA-LoRA 70.4 %, PiSSA 68.7 %, full fine-tuning 69.6 %. Of the terms, consistency alone reaches "
            "71.2 %, diversity alone 68.5 %, the spectrum alone 68.5 %."
        ),
    ),
    claim(
        name="same-rate",
        claim="The same at one rate for both, 2e-3.",
        method="ba-lora, at 2e-3",
        reference="pissa, at 2e-3",
        at_least=3.0,
        remarks=(
            "BA-LoRA is above PiSSA in each of the five seeds (69.0 % and 64.6 %). A penalty against forgetting gains more where "
            "the rate makes PiSSA forget more. Consistency alone reaches 67.9 %, diversity alone 65.4 %, the spectrum alone 64.2 %."
        ),
    ),
    claim(
        name="strong-consistency",
        claim="With the weight 0.5 on consistency BA-LoRA is at least 5 points above PiSSA on the rare classes.",
        method="ba-lora, l1 = 0.5",
        reference="pissa",
        at_least=5.0,
        remarks="72.9 % and 68.7 %; at the rate 2e-3 for both, 72.5 % and 64.6 %.",
    ),
    claim(
        name="without-consistency",
        claim="Without consistency nothing is gained: at most 1 point over PiSSA on the rare classes.",
        method="without consistency",
        reference="pissa",
        at_most=1.0,
        remarks="68.4 % and 68.7 %; at the rate 2e-3 for both, 64.8 % and 64.6 %.",
    ),
    claim(
        name="lora",
        claim="Against LoRA it is a draw at the paper's weights: BA-LoRA gains at most 2 points on the rare classes.",
        method="ba-lora",
        reference="lora",
        at_most=2.0,
        remarks=(
            "No difference seen: 70.4 % and 68.1 %, the interval holds zero. At the rate 2e-3 for both, 69.0 % and 67.7 %; with "
            "the weight 0.5 on consistency BA-LoRA reaches 72.9 %, LoRA 68.1 %."
        ),
    ),
]
