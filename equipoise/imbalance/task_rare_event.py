"""The rare-event task: two classes, one of them rare, judged by F1, F-beta, G-mean, balanced accuracy or AUPRC.

The model gives one logit; the task's loss is binary cross-entropy. Data with more classes become one class against the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.data import RawData, available, fingerprint, load, read, split
from equipoise.errors import ArgumentError, check_choice, check_range, refuse, suggestion
from equipoise.imbalance.anyloss import AnyLossMethod, SoftConfusion, metric_value
from equipoise.imbalance.soap import SOAP, installed
from equipoise.imbalance.tuned_threshold import TunedThreshold
from equipoise.training import Method, Problem, SupervisedTask, TradeOff
from equipoise.training.space import LogUniform, Space
from equipoise.training.task import Config

OPTIMISE = ("f1", "fbeta", "gmean", "balanced_accuracy", "auprc")
GENERATED = "generated"
DEFAULTS: dict[str, dict[str, Any]] = {  # of embedded data with more than two classes
    "mnist1d": {"positive": "8", "train_examples": 1000},
    "digits": {"positive": "8"},
}
FEW = 20  # positives in a test set below which the report says how little they tell


# -- metrics ----------------------------------------------------------------------------------------------------------
def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Area under the precision-recall curve as the sum of precision times the steps of recall, in [0, 1]; ties share a step.

    scores: (N,). targets: (N,) in {0, 1}, with at least one positive.
    """
    scores, order = scores.double().sort(descending=True)
    positive = targets[order].double()
    last = F.pad(scores[1:] != scores[:-1], (0, 1), value=True)  # of the examples that share a score
    found = positive.cumsum(0)[last]
    precision = found / (torch.arange(len(scores), device=scores.device)[last] + 1)
    steps = found.diff(prepend=found.new_zeros(1))
    return float((precision * steps).sum() / positive.sum())


def rare_event_metrics(logits: Tensor, targets: Tensor, beta: float = 2.0) -> dict[str, float]:
    """What a decision at logit 0 and the order of the logits are worth; 0 / 0 counts as 0.

    logits: (N,) or (N, 1) of class 1. targets: (N,) in {0, 1}, with at least one positive. beta: of ``fbeta``.
    """
    logits = logits.reshape(-1)
    yes, positive = logits > 0, targets == 1
    parts = (yes & positive, yes & ~positive, ~yes & positive, ~yes & ~positive)
    counts = SoftConfusion(*torch.stack(parts).sum(1).double().unbind())
    names = ("f1", "fbeta", "gmean", "balanced_accuracy", "accuracy")
    metrics = {name: float(metric_value(counts, name, beta=beta)) for name in names}
    predicted, found = float(counts.tp + counts.fp), float(counts.tp)
    return {
        **metrics,
        "auprc": average_precision(logits, targets),
        "precision": found / predicted if predicted else 0.0,
        "recall": found / float(counts.tp + counts.fn),
    }


# -- the task ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RareEvent(SupervisedTask):
    """Two classes, one of them rare: find it, as F1, F-beta, G-mean, balanced accuracy or AUPRC judge.

    dataset: name of an embedded data set (``equipoise.data.available()``), or "generated" (2000 rows, 8 % positives).
    positive: name of the positive class, by default the rarer of two; of more than two classes it is one against the rest ("8"
        of mnist1d and digits).
    rate: share of the positives, in (0, 1), to which they are thinned at random; by default they stay as they are.
    optimise: the score that is judged, tuned, and optimised by methods that can: "f1", "fbeta", "gmean",
        "balanced_accuracy" or "auprc" (of the ranking; methods that need a threshold then aim at F1).
    beta: of "fbeta": how much more recall counts than precision, > 0.
    model: "mlp", "cnn", "linear", or "package.module:factory" of your own, with one output.
    epochs, batch_size: length and batch of a training run. Large batches: one without a positive teaches a score nothing.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    train_examples: use only so many training examples, drawn anew by each seed; by default 1000 of mnist1d, else all.
    data, target, test_data: your own file or folder, its target column, and a file to test on.
    """

    name: ClassVar[str] = "rare-event"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = (
        "anyloss",
        "class-balanced",
        "focal",
        "logit-adjustment",
        "oversampling",
        "tuned-threshold",
        "soap",
    )
    trade_off: ClassVar[TradeOff | None] = TradeOff("recall", "precision", x_higher=True)

    dataset: str = "mnist1d"
    positive: str | None = None
    rate: float | None = None
    optimise: str = "f1"
    beta: float = 2.0
    epochs: int = 60
    batch_size: int = 256
    validation: float = 0.2
    test: float = 0.4
    train_examples: int | None = None
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            if self.target is not None or self.test_data is not None:
                raise ArgumentError("target, test_data describe a file of your own: give data='file.csv' as well")
            check_choice("dataset", self.dataset, (*available(), GENERATED))
            for key, value in DEFAULTS.get(self.dataset, {}).items():
                if getattr(self, key) is None:
                    object.__setattr__(self, key, value)
        check_choice("optimise", self.optimise, OPTIMISE)
        check_range("beta", self.beta, 0, open_low=True)
        if self.rate is not None:
            check_range("rate", self.rate, 0, 1, open_low=True, open_high=True)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        object.__setattr__(self, "metric", self.optimise)

    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def entrants(self) -> tuple[str, ...]:
        return tuple(name for name in self.methods if name != "soap" or installed())

    def check(self) -> list[str]:
        raw = self._raw()
        remarks = []
        kept = int(self._thin(raw, 0).targets.sum())
        shares = {"validation": self.validation} | ({"test": self.test} if raw.test is None else {})
        for part, share in shares.items():
            if kept * share < 2:  # from two on each seed's set holds one, since it is within one of its share
                raise ArgumentError(
                    f"{raw.name}: has {kept} examples of the positive class {raw.class_names[1]!r}, too few for a "  # type: ignore[index]
                    f"{part} set of {share:g} of the data. Raise rate or {part}, or add examples"
                )
        tested = kept * self.test if raw.test is None else int(self._thin(raw.test, 0).targets.sum())
        super().check()
        if tested < FEW:
            remarks.append(
                f"A test set holds {tested:.0f} positives only: a single one moves recall by {100 / tested:.0f} points."
            )
        if self.optimise == "auprc":
            remarks.append("AUPRC has no threshold: AnyLoss and the tuned threshold, which need one, aim at F1.")
        if not installed():
            remarks.append(
                "The AUPRC surrogate (soap) did not take part: LibAUC is missing (pip install --no-deps libauc)."
            )
        return remarks

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        return {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}

    def problem(self, seed: int) -> Problem:
        raw = self._raw()
        thin = self._thin(raw, seed)
        if raw.test is not None:
            thin = replace(thin, test=self._thin(raw.test, seed))
        shares = {"validation": self.validation, "test": self.test, "train_examples": self.train_examples}
        parts = split(thin, seed, **shares, standardise=True)  # type: ignore[arg-type]
        return Problem(parts.train, parts.validation, parts.test, parts.input_shape, 1)

    def space(self) -> Space:
        """That of every supervised task, with higher learning rates: large batches leave few steps."""
        return {**super().space(), "lr": LogUniform(0.005, 1.0)}

    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return binary_cross_entropy

    def build_method(self, method: type[Method], config: Config) -> Method:
        if issubclass(method, AnyLossMethod | TunedThreshold | SOAP):
            metric = "f1" if self.optimise == "auprc" else self.optimise
            config = {f"{method.name}.metric": metric, f"{method.name}.beta": self.beta, **config}
        return super().build_method(method, config)

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        return {
            f"{part}_{name}": value
            for part in ("validation", "test")
            for name, value in rare_event_metrics(*predictions[part], self.beta).items()
        }

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run learned anything: average precision two standard errors above the positives' share, that of chance."""
        positives = problem.validation.targets.double()
        share = float(positives.mean())
        return metrics["validation_auprc"] > share + 2 * math.sqrt(share * (1 - share) / float(positives.sum()))

    def _raw(self) -> RawData:
        """The data as two classes, 1 the positive one."""
        if self.data is not None:
            raw = read(self.data, self.target, test=self.test_data)
        else:
            raw = generated() if self.dataset == GENERATED else load(self.dataset)
        names = raw.class_names
        if names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; rare-event needs two classes")
        if self.positive is None and len(names) > 2:
            raise ArgumentError(
                f"positive = None: {raw.name} has {len(names)} classes ({', '.join(names[:5])}, ...), and rare-event two. "
                "Name one that is to be found among the rest"
            )
        if self.positive is not None and self.positive not in names:
            hint = suggestion(self.positive, list(names))
            refuse("positive", self.positive, f"be a class of {raw.name}: {', '.join(names[:10])}", hint)
        counts = torch.bincount(raw.targets, minlength=len(names))
        chosen = int(counts.argmin()) if self.positive is None else names.index(self.positive)
        rest = names[1 - chosen] if len(names) == 2 else f"not {names[chosen]}"

        def binary(part: RawData) -> RawData:
            return replace(part, targets=(part.targets == chosen).long(), class_names=(rest, names[chosen]), test=None)

        return replace(binary(raw), test=None if raw.test is None else binary(raw.test))

    def _thin(self, raw: RawData, seed: int) -> RawData:
        """The data with positives left out at random until their share is ``rate``."""
        if self.rate is None:
            return raw
        positives, negatives = int(raw.targets.sum()), int((raw.targets == 0).sum())
        keep = round(self.rate * negatives / (1 - self.rate))
        if keep > positives:
            share = positives / len(raw)
            refuse("rate", self.rate, f"be at most {share:.3g}, the share of the positives in {raw.name}")
        if not keep:
            refuse("rate", self.rate, f"leave a positive beside the {negatives} negatives of {raw.name}")
        order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
        of_class = raw.targets[order] == 1
        rows = torch.cat([order[of_class][:keep], order[~of_class]]).sort().values
        inputs = raw.inputs[rows] if isinstance(raw.inputs, Tensor) else raw.inputs.iloc[rows.numpy()]
        return replace(raw, inputs=inputs, targets=raw.targets[rows], groups=None)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of one logit, (N,) or (N, 1), and classes (N,) in {0, 1}."""
    return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets.to(logits.dtype))


@cache
def generated() -> RawData:
    """2000 rows of 20 columns, 6 of them informative, 8 % positives, 2 % of the labels redrawn."""
    from sklearn.datasets import make_classification

    inputs, targets = make_classification(
        2000, 20, n_informative=6, weights=[0.93], flip_y=0.02, class_sep=0.8, random_state=1
    )
    frame = pd.DataFrame(inputs, columns=[f"x{i}" for i in range(20)])
    return RawData(GENERATED, "table", frame, torch.from_numpy(targets).long(), ("common", "rare"))
