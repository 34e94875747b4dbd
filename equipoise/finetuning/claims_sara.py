"""The claims of the SaRA paper, as they can be checked on Fashion-MNIST.

An MLP 784-256-256-10 learns upright images (10,000 of them, 800 steps); then images turned by 90 degrees, 2000 others, for 200
steps of 64, AdamW at a constant rate without weight decay. A tenth of all parameters trains: the smallest in absolute value, the
largest, or a random tenth. What is kept of the old task is the accuracy on 4000 upright test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.comparison.claims import Claim
from equipoise.finetuning.sara import SaRA
from equipoise.finetuning.task import Finetune
from equipoise.training import Problem, Run

SHARE = 0.1


def level(model: nn.Module) -> float:
    """The absolute value below which a tenth of a model's parameters lie."""
    sizes = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    return float(sizes.kthvalue(int(SHARE * len(sizes)) + 1).values)


@dataclass(frozen=True)
class Kept(Finetune):
    """Fine-tuning, which also asks how many of the smallest tenth of the parameters are still as small at the end."""

    name: ClassVar[str] = "finetune-kept"

    def examine(self, problem: Problem, run: Run) -> dict[str, float]:
        before = problem.extra["pretrained"]
        limit = level(before)
        chosen = [p.detach().abs() < limit for p in before.parameters()]
        small = sum(int((p.abs() < limit)[m].sum()) for p, m in zip(run.model.parameters(), chosen, strict=True))
        total = sum(int(m.sum()) for m in chosen)
        return {**super().examine(problem, run), "test_still_small": small / total}


class Smallest(SaRA):
    """SaRA whose threshold is the value below which a tenth of the parameters lie."""

    name = "sara-smallest"

    def __init__(self, *, lr: float = 1e-3, lambda_rank: float = 0.0, progressive: float | None = None) -> None:
        super().__init__(threshold=1.0, lr=lr, lambda_rank=lambda_rank, progressive=progressive, weight_decay=0.0)

    def prepare(self, run: Run) -> None:
        self.threshold = level(run.model)
        self.draws = run.new_generator(self, "draws")
        super().prepare(run)


class Largest(Smallest):
    """The largest tenth instead."""

    name = "sara-largest"

    def prepare(self, run: Run) -> None:
        sizes = torch.cat([p.detach().abs().flatten() for p in run.model.parameters()])
        self.limit = float(sizes.kthvalue(len(sizes) - int(SHARE * len(sizes))).values)
        super().prepare(run)

    def _choose(self, run: Run, parameter: Tensor) -> Tensor:
        return parameter.detach().abs() > self.limit


class Random(Smallest):
    """A random tenth instead."""

    name = "sara-random"

    def _choose(self, run: Run, parameter: Tensor) -> Tensor:
        return (torch.rand(parameter.shape, generator=self.draws) < SHARE).to(parameter.device)


SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "model": "mlp",
    "hidden": (256, 256),
    "pretrain_examples": 10_000,
    "pretrain_steps": 800,
    "train_examples": 2_000,
    "steps": 200,
    "epochs": 1,
    "schedule": "constant",
    "validation": 1_500 / 60_000,
    "test_examples": 4_000,
}
RATES = {"1e-3": 1e-3, "2e-3": 2e-3, "4e-3": 4e-3}
COMMON = {"weight_decay": 0.0}


def arm(name: str, method: Any, rate: str, **settings: Any) -> tuple[str, Any, Mapping[str, Any]]:
    slug = method if isinstance(method, str) else method.name
    own = {} if isinstance(method, str) else {f"{slug}.lr": RATES[rate]}
    return (
        f"{name}, {rate}",
        method,
        {**COMMON, "lr": RATES[rate], **own, **{f"{slug}.{k}": v for k, v in settings.items()}},
    )


KINDS = (("smallest", Smallest), ("largest", Largest), ("random", Random), ("full", "full-finetuning"))
ARMS = (
    *(arm(name, method, rate) for rate in RATES for name, method in KINDS),
    arm("smallest, second choice", Smallest, "2e-3", progressive=0.5, lambda_rank=5e-4),
)
POINTS = "points of accuracy"

claim = partial(
    Claim,
    slug="sara",
    number=39,
    source="Hu et al., ICLR 2025, Table 2 (FID / CLIP: smallest 131.56 / 27.34, largest 130.55 / 25.42, random 133.57 / 26.58)",
    task=Kept,
    settings=SETTINGS,
    arms=ARMS,
    scale=100.0,
    seeds=5,
    remarks=(
        "Means of old / new accuracy. Rate 1e-3: smallest 53.6 / 66.0, largest 42.0 / 69.5, random 55.4 / 67.1, all weights "
        "12.5 / 78.8. 2e-3: 30.9 / 73.1, 26.2 / 75.0, 31.0 / 73.9, 8.9 / 80.4. 4e-3: 18.2 / 76.6, 19.5 / 78.7, 19.8 / 77.2, "
        "5.9 / 80.4. The largest tenth learns faster and forgets more at one rate; along all rates the three selections lie near "
        "one curve. The smallest tenth is not seen to beat a random one."
    ),
)
kept = partial(claim, metric="last.test_source_accuracy", unit=f"{POINTS} on the old task")
learned = partial(claim, metric="last.test_accuracy", unit=f"{POINTS} on the new task")

CLAIMS = [
    kept(
        claim="At a rate of 2e-3, training the smallest tenth keeps 3 points more of the old task than training the largest.",
        method="smallest, 2e-3",
        reference="largest, 2e-3",
        at_least=3.0,
    ),
    kept(
        name="faster",
        claim="At a rate of 4e-3, training the smallest tenth keeps 3 points more of the old task than training the largest.",
        method="smallest, 4e-3",
        reference="largest, 4e-3",
        at_least=3.0,
    ),
    learned(
        name="new-task",
        claim="At a rate of 2e-3 the smallest tenth learns the new task as well as the largest, to half a point.",
        method="smallest, 2e-3",
        reference="largest, 2e-3",
        at_least=-0.5,
    ),
    learned(
        name="new-task-faster",
        claim="At a rate of 4e-3 the smallest tenth learns the new task as well as the largest, to half a point.",
        method="smallest, 4e-3",
        reference="largest, 4e-3",
        at_least=-0.5,
    ),
    kept(
        name="random",
        claim="At a rate of 2e-3, training the smallest tenth keeps 3 points more of the old task than training a random tenth.",
        method="smallest, 2e-3",
        reference="random, 2e-3",
        at_least=3.0,
    ),
    claim(
        name="second-choice",
        claim="With the second choice half-way, 5 % fewer of the chosen entries are still below the threshold at the end.",
        source="Hu et al., ICLR 2025, Section 4.3 (15 % without, 2 % with)",
        method="smallest, second choice, 2e-3",
        reference="smallest, 2e-3",
        metric="last.test_still_small",
        at_most=-5.0,
        unit="points of the share of the chosen entries",
        remarks=(
            "The share is 23.9 % without and 27.9 % with the second choice and the low-rank term, which were not taken apart. "
            "With both, 53.5 % of the old task is kept and 65.1 % of the new one learned, without 30.9 % and 73.1 %."
        ),
    ),
]
