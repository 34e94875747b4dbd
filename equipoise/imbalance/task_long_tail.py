"""The long-tail task: classification when some classes are rare in training and matter as much as the others.

Embedded data are balanced; the training rows are thinned to a tail by ``equipoise.data.corruptions.long_tail``, class 0 being
the most frequent. The test set stays balanced. The validation set is what one has in practice: as skewed as training, but with
at least ``validation_least`` examples of each class, for a balanced accuracy from one or two examples chooses by lot. For data
of your own, which are skewed already, the ratio is 1 and nothing is thinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.data import RawData, corruptions, fingerprint, load, read, split
from equipoise.data.augment import Jitter
from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.imbalance.backdoor_adjustment import imbalance_groups
from equipoise.imbalance.shared import recall_and_f1
from equipoise.training import Examples, Problem, SupervisedTask, TradeOff
from equipoise.training.task import cached_problem

GROUPS = ("many", "medium", "few")  # in the order of imbalance_groups


@dataclass(frozen=True)
class LongTail(SupervisedTask):
    """Classification when some classes are rare; each class counts the same in the test.

    The metric is balanced accuracy: the mean over classes of the share of their test examples that are predicted right. Beside
    it stand ``accuracy``, ``macro_f1``, and ``accuracy_many``, ``accuracy_medium`` and ``accuracy_few``: the same mean over
    the classes with more than ``many``, with ``few`` to ``many`` and with fewer than ``few`` training examples. A region without
    classes has no such metric, and the report says so.

    dataset: name of an embedded data set (``equipoise.data.available()``).
    kind: "exp" (class sizes fall exponentially) or "step" (half of the classes are rare).
    ratio: size of the largest over that of the smallest class in training, >= 1; by default 50 for embedded data and 1 for
        your own, which stay as they are.
    many, few: numbers of training examples that bound the three regions. The literature's 100 and 20 are for data whose
        largest classes have 500 examples and more; with about 100 in the largest class 40 and 10 cut the tail into three.
    shift, noise: every arm sees training batches shifted by up to ``shift`` pixels, with Gaussian noise of that standard deviation
        (``equipoise.data.augment.Jitter``). On digits noise helps cross-entropy too, and a shift costs it.
    model: "mlp", "cnn", "linear", or "package.module:factory" of your own.
    epochs, batch_size: length and batch of a training run.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    validation_least: examples of a rare class that stay in the validation set, as far as there are so many.
    train_examples: use only so many training examples before the tail is made, drawn anew by each seed.
    standardise: bring images to mean 0 and standard deviation 1, measured on the training rows (tables always are).
    data, target, test_data: your own file or folder, its target column, and a file to test on.
    """

    name: ClassVar[str] = "long-tail"
    metric: ClassVar[str] = "balanced_accuracy"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = (
        "class-balanced",
        "focal",
        "logit-adjustment",
        "balanced-softmax",
        "oversampling",
        "sbcl",
    )
    trade_off: ClassVar[TradeOff | None] = TradeOff("accuracy_many", "accuracy_few", x_higher=True)

    dataset: str = "digits"
    kind: str = "exp"
    ratio: float | None = None
    many: int = 40
    few: int = 10
    shift: int = 0
    noise: float = 0.2
    validation: float = 0.2
    test: float = 0.2
    validation_least: int = 10
    train_examples: int | None = None
    standardise: bool = False
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            object.__setattr__(self, "ratio", 1.0 if self.data else 50.0)
        check_choice("kind", self.kind, ("exp", "step"))
        check_range("ratio", self.ratio, 1)  # type: ignore[arg-type]  # None was replaced
        check_integer("few", self.few, 1)
        check_integer("many", self.many, 1)
        if self.many < self.few:
            refuse("many, few", (self.many, self.few), "satisfy many >= few")
        check_integer("shift", self.shift, 0)
        check_range("noise", self.noise, 0)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        check_integer("validation_least", self.validation_least, 1)
        if self.data is None and (self.target is not None or self.test_data is not None):
            raise ArgumentError("target, test_data describe a file of your own: give data='file.csv' as well")

    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def entrants(self) -> tuple[str, ...]:
        return tuple(slug for slug in self.methods if slug != "sbcl" or self.augment is not None)

    def check(self) -> list[str]:
        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; long-tail needs classes")
        if self.shift and raw.kind == "table":
            refuse("shift", self.shift, "be 0 for a table")
        super().check()
        problem = cached_problem(self, 0)
        counts, tested = _counts(problem.train), _counts(problem.test)
        known = set(imbalance_groups(counts, many=self.many, few=self.few).tolist())
        if self.kind == "step" and self.ratio != 1:
            known.add(GROUPS.index("medium"))  # a step has no middle
        text = {
            "many": f"more than {self.many}",
            "medium": f"{self.few} to {self.many}",
            "few": f"fewer than {self.few}",
        }
        remarks = [
            f"No class has {text[name]} training examples (sizes {_range(counts)}): accuracy_{name} is not reported. Set many, few."
            for number, name in enumerate(GROUPS)
            if number not in known
        ]
        if absent := int((tested == 0).sum()):
            remarks.append(
                f"{absent} of {len(tested)} classes have no test example: metrics are means over the others."
            )
        if (smallest := int(tested[tested > 0].min())) < 10:
            remarks.append(
                f"The smallest class has {smallest} test examples: its part of balanced accuracy is coarse, and the intervals "
                "are wide. Give a larger test file, or more seeds."
            )
        if self.augment is None:
            remarks.append("Without shift and noise there are no two views of an example: sbcl is left out.")
        return remarks

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        return {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}

    @property
    def augment(self) -> Jitter | None:
        """The random view of every training batch; None where ``shift`` and ``noise`` are 0."""
        return Jitter(self.shift, self.noise) if self.shift or self.noise else None

    def fit_options(self, problem: Problem, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"augment": self.augment}

    def problem(self, seed: int) -> Problem:
        parts = split(
            self._raw(),
            seed,
            validation=self.validation,
            test=self.test,
            train_examples=self.train_examples,
            standardise=self.standardise,
        )
        # One stream for each split, so that the training tail does not depend on the size of the validation set.
        train, validation = (
            self._tail(parts.train, seed, 1),
            self._tail(parts.validation, seed, 2, self.validation_least),
        )
        assert parts.num_classes is not None  # check refuses a continuous target
        shape, classes = parts.input_shape, parts.num_classes
        return Problem(train, validation, parts.test, shape, classes, pool=len(parts.train))

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        metrics = super().measure(problem, predictions)
        groups = imbalance_groups(_counts(problem.train), many=self.many, few=self.few)
        for part in ("validation", "test"):
            logits, labels = predictions[part]
            recall, f1 = recall_and_f1(logits, labels)
            metrics[f"{part}_macro_f1"] = f1.nanmean().item()
            for number, name in enumerate(GROUPS):
                known = recall[(groups == number) & ~recall.isnan()]
                if len(known):
                    metrics[f"{part}_accuracy_{name}"] = known.mean().item()
        return metrics

    def _raw(self) -> RawData:
        return read(self.data, self.target, test=self.test_data) if self.data else load(self.dataset)

    def _tail(self, examples: Examples, seed: int, stream: int, least: int = 1) -> Examples:
        generator = torch.Generator().manual_seed(seed * 1_000 + stream)
        assert self.ratio is not None  # replaced in __post_init__
        rows = corruptions.long_tail(examples.targets, self.ratio, generator, kind=self.kind, least=least)
        return examples.subset(rows)


def _counts(examples: Examples) -> Tensor:
    return torch.bincount(examples.targets, minlength=examples.num_classes or 0)


def _range(counts: Tensor) -> str:
    return f"{int(counts.min())} to {int(counts.max())}"
