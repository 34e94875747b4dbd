"""FedSpeed's claims, as they can be checked on handwritten digits.

20 clients, each class dealt out by shares of Dirichlet(0.1), 5 of them drawn in each of 40 rounds; a client trains 5 epochs of
batches of 16, SGD at 0.1 with weight decay 1e-3, the direction clipped to norm 10, and the rate multiplied by 0.998 after each
round; an MLP 64-64-64-10 on pixels in [0, 1]. 80 % of the 1797 images are with the clients, 20 % are the test set; nothing is
chosen, so that there are no validation images. Clients count alike in the mean, as in the authors' code. "Round 10" is the
mean accuracy after rounds 9 to 11, "the end" that after the last five.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from equipoise.comparison.claims import Claim
from equipoise.federated.algorithm import LocalTraining
from equipoise.federated.partition import class_shares
from equipoise.federated.task import FederatedTask
from equipoise.training import Examples, Method, Problem, RunResult
from equipoise.training.space import Choice, Space
from equipoise.training.task import Config


@dataclass(frozen=True)
class Rounds(FederatedTask):
    """The federated task without validation rows, which also gives the accuracy around the tenth round and at the end."""

    name: ClassVar[str] = "federated-rounds"

    def problem(self, seed: int) -> Problem:
        parts = super().problem(seed)
        inputs = torch.cat([parts.train.inputs, parts.validation.inputs])  # type: ignore[list-item]  # images
        targets = torch.cat([parts.train.targets, parts.validation.targets])
        train = Examples(inputs, targets, num_classes=parts.num_outputs)
        rows = self.deal(train, seed)
        extra = {"parts": rows, "shares": class_shares(targets, rows, parts.num_outputs).double()}
        return replace(parts, train=train, extra=extra)

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        found = super().run(method, config, seed)
        seen = [record["test_accuracy"] for record in found.curve]
        means = {"test_accuracy_round_10": sum(seen[8:11]) / 3, "test_accuracy_end": sum(seen[-5:]) / 5}
        found.metrics = {which: {**metrics, **means} for which, metrics in found.metrics.items()}
        return found

    def space(self) -> Space:
        """As every arm's, and the number of local epochs."""
        return {**super().space(), "epochs": Choice((5, 10))}

    def local(self, config: Config) -> LocalTraining:
        return replace(super().local(config), epochs=config["epochs"])

    def cost(self, method: type[Method], config: Config, seed: int) -> None:  # type: ignore[override]
        """Not measured: the claims have arms of their own with as many gradients."""


SETTINGS: dict[str, Any] = {"rounds": 40, "least": 1, "standardise": False}
RECIPE = {"lr": 0.1, "weight_decay": 1e-3, "early_stopping": False, "epochs": 5}
FEDAVG, FEDPROX = {"fedavg.weighted": False}, {"fedprox.weighted": False, "fedprox.mu": 0.1}
TWICE = {"epochs": 10}
ARMS = (
    ("fedavg", "fedavg", {**RECIPE, **FEDAVG}),
    ("fedprox", "fedprox", {**RECIPE, **FEDPROX}),
    ("fedsam", "fedsam", {**RECIPE, "fedsam.weighted": False, "fedsam.rho": 0.1}),
    ("scaffold", "scaffold", RECIPE),
    ("fedspeed", "fedspeed", {**RECIPE, "fedspeed.prox": 0.1, "fedspeed.rho": 0.1}),
    ("fedavg, twice the steps", "fedavg", {**RECIPE, **FEDAVG, **TWICE}),
    ("scaffold, twice the steps", "scaffold", {**RECIPE, **TWICE}),
)
EARLY, END = "last.test_accuracy_round_10", "last.test_accuracy_end"

claim = partial(
    Claim,
    slug="fedspeed",
    number=40,
    source="Sun et al., ICLR 2023; authors' README (CIFAR-10, Dir-0.1, 10 % of 100 clients: 77.31 to 82.26, SCAFFOLD 79.92)",
    task=Rounds,
    settings=SETTINGS,
    arms=ARMS,
    method="fedspeed",
    seeds=5,
    scale=100.0,
)
early = partial(claim, metric=EARLY, unit="points of test accuracy at round 10")
end = partial(claim, metric=END, unit="points of test accuracy at the end")

CLAIMS = [
    early(claim="At round 10 FedSpeed is at least 8 points above FedAvg.", reference="fedavg", at_least=8.0),
    early(
        name="fedprox",
        claim="At round 10 FedSpeed is at least 8 points above FedProx.",
        reference="fedprox",
        at_least=8.0,
    ),
    end(
        name="end",
        claim="At the end FedSpeed is at least 3 points above FedAvg.",
        reference="fedavg",
        at_least=3.0,
    ),
    end(
        name="fedprox-end",
        claim="At the end FedSpeed is at least 3 points above FedProx.",
        reference="fedprox",
        at_least=3.0,
    ),
    early(
        name="scaffold",
        claim="At round 10 FedSpeed is at least level with SCAFFOLD.",
        reference="scaffold",
        at_least=0.0,
    ),
    end(
        name="scaffold-end",
        claim="At the end FedSpeed is at least level with SCAFFOLD.",
        reference="scaffold",
        at_least=0.0,
    ),
    early(
        name="equal-gradients",
        claim="At round 10 FedSpeed is above FedAvg with twice the local steps, which takes as many gradients.",
        reference="fedavg, twice the steps",
        at_least=0.0,
    ),
    end(
        name="equal-gradients-end",
        claim="At the end FedSpeed is above FedAvg with twice the local steps, which takes as many gradients.",
        reference="fedavg, twice the steps",
        at_least=0.0,
    ),
    early(
        name="equal-gradients-scaffold",
        claim="At round 10 FedSpeed is at least level with SCAFFOLD with twice the local steps, which takes as many gradients.",
        reference="scaffold, twice the steps",
        at_least=0.0,
    ),
]
