"""The claims of the GradNormLoRP paper, as they can be checked on Fashion-MNIST.

An MLP 784-128-128-10 learns upright images (8000 of them, 500 steps); then images turned by 90 degrees, 2000 others, for 150
steps of 64, at rank 4. The constant learning rate of every arm is chosen from six on 1500 validation images; 4000 test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from equipoise.comparison.claims import Claim
from equipoise.finetuning.task import Finetune

SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "model": "mlp",
    "hidden": (128, 128),
    "pretrain_examples": 8_000,
    "pretrain_steps": 500,
    "train_examples": 2_000,
    "steps": 150,
    "epochs": 1,
    "schedule": "constant",
    "validation": 1_500 / 60_000,
    "test_examples": 4_000,
}
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


def arm(name: str, slug: str, **settings: Any) -> tuple[str, str, tuple[Mapping[str, Any], ...]]:
    """An arm whose learning rate is chosen."""
    own = {f"{slug}.{key}": value for key, value in settings.items()}
    return name, slug, tuple({"lr": lr, "weight_decay": 0.0, **own} for lr in RATES)


OURS, LAYER, BITS, LORA, FULL = (
    "gradnormlorp",
    "gradnormlorp, adapter",
    "gradnormlorp, 8 bit",
    "lora",
    "full-finetuning",
)
ARMS = (
    arm(OURS, "gradnormlorp", rank=4, update_gap=50),
    arm(BITS, "gradnormlorp", rank=4, update_gap=50, state_bits=8),
    arm(LAYER, "gradnormlorp", rank=4, mode="adapter"),
    arm(LORA, "lora", rank=4),
    arm("dora", "dora", rank=4),
    arm(FULL, "full-finetuning"),
)

claim = partial(
    Claim,
    slug="gradnormlorp",
    number=49,
    source="Huang et al., AAAI 2025, abstract (RoBERTa-base, GLUE at rank 8: 80.65 against LoRA's 79.23)",
    task=Finetune,
    settings=SETTINGS,
    arms=ARMS,
    method=OURS,
    reference=LORA,
    metric="last.test_accuracy",
    scale=100.0,
    unit="points of test accuracy",
    seeds=5,
    remarks=(
        "Means: full AdamW 78.0, GradNormLoRP 72.0 (8 bit 72.2), LoRA 70.0, its adapter 69.1, DoRA 67.1. Validation chose "
        "1e-2, the largest rate offered, for most low-rank arms; at that constant rate seeds differ by up to 11 points."
    ),
)
memory = partial(
    claim,
    reference=FULL,
    metric="last.test_optimizer_kib",
    relative=True,
    unit="% change of the bytes of the optimizer's state",
    source="Huang et al., AAAI 2025, abstract (optimizer memory reduced by up to 89.5 % in 8 bit)",
)

CLAIMS = [
    claim(claim="GradNormLoRP is 1.5 points more accurate than LoRA of the same rank.", at_least=1.5),
    claim(
        name="full",
        claim="Full fine-tuning with AdamW stays ahead of GradNormLoRP.",
        method=FULL,
        reference=OURS,
        at_least=0.5,
    ),
    claim(
        name="adapter",
        claim="GradNormLoRP's adapter is 1.5 points more accurate than LoRA of the same rank.",
        method=LAYER,
        at_least=1.5,
    ),
    memory(
        name="state",
        claim="GradNormLoRP's optimizer keeps 4.64 % of AdamW's state, as 2 max(m, n) r + min(m, n) r + 4 m says.",
        at_most=-95.3,
    ),
    memory(
        name="state-8bit",
        claim="With moments in 8 bit GradNormLoRP's optimizer keeps at most 10.5 % of AdamW's state.",
        method=BITS,
        at_most=-89.5,
    ),
    claim(
        name="8bit",
        claim="Moments in 8 bit cost GradNormLoRP no more than half a point.",
        method=BITS,
        reference=OURS,
        at_least=-0.5,
    ),
]
