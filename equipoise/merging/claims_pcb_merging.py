"""The claims of PCB-Merging, as they can be checked on Fashion-MNIST and the digits.

A trunk of two layers of 256 is trained on 10,000 images of Fashion-MNIST (500 steps); four models are fine-tuned from it, on 5,000
images as they are, turned by 90 degrees, negated, and on the digits (28x28). Coefficient and ratio of every arm are chosen by the
mean accuracy on validation data of a split that no final seed meets. Measured: the mean of the four test accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

from equipoise.comparison.claims import Claim
from equipoise.merging.task import Merge, prepared
from equipoise.training import Choice, Method, RunResult
from equipoise.training.space import Space
from equipoise.training.task import Config


@dataclass(frozen=True)
class MeanMerge(Merge):
    """The merging task, judged by the plain mean of the accuracies."""

    name: ClassVar[str] = "merge-mean"
    metric: ClassVar[str] = "accuracy"


LAMBDAS = (0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 2.4, 2.8, 3.2)
RATIOS = (0.05, 0.1, 0.2, 0.5)
SETTINGS: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "tasks": ("upright", "rotate", "invert", "digits"),
    "hidden": 256,
    "pretrain_examples": 10_000,
    "pretrain_steps": 500,
    "train_examples": 5_000,
    "head_steps": 150,
    "head_lr": 2e-3,
    "steps": 300,
    "lr": 3e-4,
    "validation": 0.025,
}


def pcb(**settings: Any) -> tuple[dict[str, Any], ...]:
    """PCB-Merging with a clip of 0.01, over coefficients and ratios."""
    return tuple(
        {
            f"pcb-merging.{key}": value
            for key, value in {"coefficients": lam, "ratio": ratio, "clip": 0.01, **settings}.items()
        }
        for lam, ratio in product(LAMBDAS, RATIOS)
    )


ARMS: tuple[tuple[str, str, Mapping[str, Any] | tuple[Mapping[str, Any], ...]], ...] = (
    ("weight-averaging", "weight-averaging", {}),
    ("task arithmetic", "task-arithmetic", tuple({"task-arithmetic.coefficient": lam / 4} for lam in LAMBDAS)),
    (
        "TIES",
        "ties",
        tuple({"ties.coefficient": lam, "ties.ratio": ratio} for lam, ratio in product(LAMBDAS, RATIOS)),
    ),
    ("PCB sum", "pcb-merging", pcb(inter="sum")),
    ("PCB normalized_sum", "pcb-merging", pcb(inter="normalized_sum")),
    ("PCB pairwise", "pcb-merging", pcb(inter="pairwise")),
    ("PCB softmax", "pcb-merging", pcb(form="softmax")),
)
GRIDS = {name: config if isinstance(config, tuple) else (config,) for name, _, config in ARMS}


@dataclass(frozen=True)
class OwnMerge(MeanMerge):
    """The same, where each seed's models are merged with what is best on that seed's own validation data."""

    name: ClassVar[str] = "merge-own"

    def space(self) -> Space:
        return {"grid": Choice(tuple(GRIDS))}

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        made = prepared(self, seed)

        def accuracy(candidate: Config) -> float:
            return self.score(made, self.merged(made, method, candidate, seed), "validation")["accuracy"]

        return super().run(method, max(GRIDS[config["grid"]], key=accuracy), seed)


claim = partial(
    Claim,
    slug="pcb_merging",
    number=31,
    task=MeanMerge,
    settings=SETTINGS,
    arms=ARMS,
    seeds=5,
    scale=100.0,
    unit="points of mean test accuracy over four tasks",
)

averaging = partial(
    claim,
    claim="Merged by PCB-Merging, four models lose less accuracy than averaged.",
    source="Du et al., NeurIPS 2024 (better than earlier merging methods)",
    method="PCB sum",
    reference="weight-averaging",
    at_least=0.3,
)

CLAIMS = [
    averaging(
        remarks="Coefficient and ratio are chosen on one further split, for all seeds.",
    ),
    averaging(
        name="own-validation",
        task=OwnMerge,
        arms=tuple((name, method, {"grid": name}) for name, method, _ in ARMS),
        remarks=(
            "Coefficient and ratio are chosen for each seed's models on that seed's own validation data, as one would do with "
            "models one has; written after the result with one choice for all seeds was known, with the same expectation. "
            "Mean test accuracy: averaging 81.20 %, task arithmetic 81.41 %, TIES 81.55 %, PCB-Merging 81.35 % (sum), "
            "81.31 % (pairwise), 81.27 % (normalized_sum) and 81.26 % (softmax). In three of five seeds PCB-Merging "
            "(sum) is ahead of averaging."
        ),
    ),
    claim(
        name="ties",
        claim="PCB-Merging beats TIES (T5-large, kept ratio 0.05 / 0.1 / 0.2: 82.1 / 81.1 / 80.3 against 80.3 / 80.3 / 78.7).",
        source="Du et al., NeurIPS 2024, figure of the kept ratio",
        method="PCB sum",
        reference="TIES",
        at_least=0.8,
        remarks="Not expected at this scale: in a pilot of three seeds, before this was written, the difference was -0.3 points.",
    ),
]
