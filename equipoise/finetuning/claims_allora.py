"""The claims of the ALLoRA paper, as they can be checked on Fashion-MNIST.

An MLP 784-128-128-10 on standardised pixels learns upright images (8000 of them, 500 steps); then images turned by 90 degrees,
2000 others, for 100 steps of 64 at a constant rate without weight decay: adapters of rank 4 on all layers. LoRA's alpha is twice
the rank. Each seed chooses the rate, and ALLoRA's eta or LoRA's dropout, on 1500 validation images of its own; 4000 test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any, ClassVar

from torch import Tensor, nn

from equipoise.catalogue import find
from equipoise.comparison.claims import Claim
from equipoise.errors import NonFiniteError
from equipoise.finetuning.task import Finetune
from equipoise.models.reference import MLP
from equipoise.training import RunResult
from equipoise.training.cost import Cost
from equipoise.training.method import Method
from equipoise.training.task import Config


class Standardise(nn.Module):
    """Pixels less Fashion-MNIST's mean, over its standard deviation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.286) / 0.353


def standardised_mlp(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Two hidden layers of 128."""
    return nn.Sequential(Standardise(), MLP(input_shape, num_outputs, (128, 128), head_bias=True))


CHOICES = {"allora": {"allora.eta": (2.0, 5.0, 10.0)}, "lora": {"lora.dropout": (0.0, 0.05, 0.1)}}


@dataclass(frozen=True)
class Tuned(Finetune):
    """Fine-tuning in which each seed chooses, on its own validation data, what an arm leaves open: the rate, and ``CHOICES``.

    The best rates of SGD lie at the edge of divergence, which is elsewhere for each seed. A run that diverges is not chosen.
    """

    name: ClassVar[str] = "finetune-tuned"
    rates: ClassVar[dict[str, tuple[float, ...]]] = {
        "sgd": (0.02, 0.05, 0.1, 0.2, 0.4, 0.8),
        "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    }

    def grid(self, method: type[Method], config: Config) -> list[dict[str, Any]]:
        """Every completion of ``config``."""
        choices: dict[str, tuple[float, ...]] = {"lr": self.rates[self.optimizer], **CHOICES.get(method.name, {})}
        left = {key: values for key, values in choices.items() if key not in config}
        return [{**config, **dict(zip(left, values, strict=True))} for values in product(*left.values())]

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        results = [
            _trained(self, method.name, tuple(sorted(complete.items())), seed) for complete in self.grid(method, config)
        ]
        finite = [result for result in results if result is not None]
        if not finite:
            raise NonFiniteError(f"every configuration of {method.name} diverges for seed {seed}")
        return max(finite, key=lambda result: result.score("validation_accuracy"))

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost:
        return super().cost(method, self.grid(method, config)[0], seed)


@lru_cache(maxsize=4096)
def _trained(task: Tuned, method: str, config: tuple[tuple[str, Any], ...], seed: int) -> RunResult | None:
    """One training, kept for the arms that share it; None where it diverges."""
    chosen = dict(config)
    try:
        result = Finetune.run(task, find("method", method).load(), chosen, seed)
    except NonFiniteError:
        return None
    result.metrics["last"]["test_lr"] = chosen["lr"]
    return result


SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "shift": "rotate",
    "model": f"{__name__}:standardised_mlp",
    "pretrain_examples": 8000,
    "pretrain_steps": 500,
    "train_examples": 2000,
    "steps": 100,
    "epochs": 1,
    "schedule": "constant",
    "validation_examples": 1500,
    "test_examples": 4000,
}
SGD = {**SETTINGS, "optimizer": "sgd"}
ADAMW = {**SETTINGS, "optimizer": "adamw"}
LORA = {"weight_decay": 0.0, "lora.rank": 4, "lora.alpha": 8.0}
ARMS = (
    ("lora, dropout 0.1", "lora", {**LORA, "lora.dropout": 0.1}),
    ("lora", "lora", LORA),
    ("allora", "allora", {"weight_decay": 0.0, "allora.rank": 4}),
)

BY_SGD = (
    "ALLoRA 67.8 %, LoRA 65.6 %, with dropout 0.1 64.9 %; full fine-tuning 73.0 %. The rate 0.1 is chosen nearly always. In a "
    "first attempt one rate was chosen on another split for all seeds: 0.2 for LoRA with dropout 0.1, whose forward pass is scaled "
    "by 2, and 8 of its 10 runs diverged, so that no evidence was written; since then each seed chooses its own. Rates closer "
    "together near divergence were not tried. The bound was set after a pilot of three seeds, which had gained about a point."
)
BY_ADAMW = (
    "After 100 steps ALLoRA has 71.3 %, LoRA 74.2 %, full fine-tuning 78.3 %; after 150 steps 73.5, 76.4 and 79.5 %. Both "
    "low-rank arms are better than by SGD. ALLoRA often chooses the largest rate of the grid, since it has no forward factor "
    "where LoRA's is 2."
)

claim = partial(
    Claim,
    slug="allora",
    number=54,
    source="Huang, Balestriero, arXiv:2410.09692, 2024, abstract (language models; its tables were not accessible)",
    task=Tuned,
    arms=ARMS,
    method="allora",
    seeds=7,
    unit="points of test accuracy on rotated images",
    scale=100.0,
)

CLAIMS = [
    claim(
        claim="In a short run of SGD, ALLoRA is better than LoRA with its usual alpha and dropout.",
        settings=SGD,
        remarks=BY_SGD,
        reference="lora, dropout 0.1",
        at_least=0.5,
    ),
    claim(
        name="equal",
        claim="In a short run of SGD, ALLoRA is better than LoRA with a chosen dropout, tuned over as many configurations.",
        settings=SGD,
        remarks=BY_SGD,
        reference="lora",
        at_least=0.5,
    ),
    claim(
        name="adamw",
        claim="Under AdamW, which divides out a factor that varies slowly over rows, ALLoRA is not better than LoRA.",
        settings=ADAMW,
        remarks=BY_ADAMW,
        reference="lora",
        at_most=0.0,
    ),
    claim(
        name="adamw-150",
        claim="Nor is it after 150 steps of AdamW.",
        settings={**ADAMW, "steps": 150},
        remarks=BY_ADAMW,
        reference="lora",
        at_most=0.0,
    ),
]
