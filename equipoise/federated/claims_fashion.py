"""What the claims of CCVR and FedLoGe share: clients on Fashion-MNIST, an MLP 784-128-64-10, SGD at a constant rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from equipoise.data import split
from equipoise.federated.algorithm import LocalTraining
from equipoise.federated.partition import class_shares
from equipoise.federated.task import FederatedTask
from equipoise.models.factory import _seeded
from equipoise.models.reference import MLP
from equipoise.training import Method, Problem
from equipoise.training.task import Config


@dataclass(frozen=True)
class Fashion(FederatedTask):
    """The federated task on ``train_examples`` rows of Fashion-MNIST, pixels in [0, 1], and ``test_examples`` of its test set."""

    name: ClassVar[str] = "federated-fashion"

    dataset: str = "fashion-mnist"
    clients: int = 10
    fraction: float = 1.0
    clip_norm: float = 0.0
    lr_decay: float = 1.0
    validation: float = 0.02
    train_examples: int = 6000
    test_examples: int = 4000
    momentum: float = 0.9

    def problem(self, seed: int) -> Problem:
        parts = split(self._raw(), seed, validation=self.validation, train_examples=self.train_examples)
        assert parts.num_classes is not None  # Fashion-MNIST has 10
        drawn = torch.randperm(len(parts.test), generator=torch.Generator().manual_seed(seed))[: self.test_examples]
        rows = self.deal(parts.train, seed)
        extra: dict[str, Any] = {
            "parts": rows,
            "shares": class_shares(parts.train.targets, rows, parts.num_classes).double(),
        }
        test = parts.test.subset(drawn)
        return Problem(parts.train, parts.validation, test, parts.input_shape, parts.num_classes, extra)

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        with _seeded(seed):
            return MLP(problem.input_shape, problem.num_outputs, hidden=(128, 64), head_bias=True)

    def cost(self, method: type[Method], config: Config, seed: int) -> None:  # type: ignore[override]
        """Left out: the claims compare accuracies."""

    def local(self, config: Config) -> LocalTraining:
        return replace(super().local(config), momentum=self.momentum)
