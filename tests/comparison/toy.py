"""A task without training: results are a formula of configuration and seed, and every run leaves a line in a log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from equipoise.errors import NonFiniteError
from equipoise.noisy_labels.baselines import CrossEntropy
from equipoise.training import Choice, LogUniform, Method, RunResult, Task
from equipoise.training.cost import Cost
from equipoise.training.space import Space


class Good(Method):
    """A method that helps by five points, at the baseline's cost."""

    name = "good"
    space: ClassVar[Space] = {"strength": Choice((0.5, 1.0, 2.0), ordered=True)}

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength


class Dear(Method):
    """A method that helps, but less than three times the compute helps the baseline."""

    name = "dear"


class Broken(Method):
    """A method that never finishes a run."""

    name = "broken"


@dataclass(frozen=True)
class Toy(Task):
    """Accuracy by formula."""

    name: ClassVar[str] = "toy"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = ()

    log: str = ""
    pause: float = 0.0

    def space(self) -> Space:
        return {"lr": LogUniform(0.01, 1.0)}

    def run(self, method: type[Method], config: Mapping[str, Any], seed: int) -> RunResult:
        if self.log:
            line = f"{method.name} {sorted(config.items())} {seed}\n"
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        time.sleep(self.pause)
        if method is Broken:
            raise NonFiniteError("step 3: the task's loss is nan")
        gain = {CrossEntropy: 0.0, Good: 0.05, Dear: 0.06}[method]
        if config.get("compute"):
            gain += 0.08 if config["compute"] == "ensemble" else 0.01
        shared, own = np.random.default_rng(seed), np.random.default_rng([seed, len(method.name)])
        score = 0.7 + gain - 0.01 * abs(math.log10(config["lr"]) + 1) + 0.03 * shared.normal() + 0.002 * own.normal()
        metrics = {"validation_accuracy": score - 0.01, "test_accuracy": score}
        sizes = {"train": 600, "validation": 200, "test": 200}
        return RunResult({"last": metrics, "best": metrics}, "last", [{"epoch": 0, "train_loss": 1 - score}], sizes)

    def cost(self, method: type[Method], config: Mapping[str, Any], seed: int) -> Cost:
        factor = 3 if method is Dear else float(config.get("compute_ratio", 1.0))
        return Cost(int(1_000_000 * factor), 1000, 10)

    def step_seconds(self, method: type[Method], config: Mapping[str, Any], seed: int) -> float:
        return 0.001 * (3 if method is Dear else 1)

    def matched_space(self, ratio: float) -> Space:
        return {"compute": Choice(("longer", "ensemble"))}
