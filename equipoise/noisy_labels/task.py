"""The noisy-labels task: classification when part of the training labels is wrong.

Validation labels are as noisy as training labels, as in practice; the test set is clean. For data of your own whose labels
are already noisy, ``noise`` is "none", and a clean test file may be given; without one the report says that the estimate is
on noisy labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.data import RawData, corruptions, fingerprint, load, read, split
from equipoise.errors import ArgumentError, check_choice, check_range
from equipoise.training import Examples, Problem, SupervisedTask

NOISE = ("symmetric", "uniform", "pair", "instance", "none")


@dataclass(frozen=True)
class NoisyLabels(SupervisedTask):
    """Classification when part of the training labels is wrong; tested on clean labels.

    dataset: name of an embedded data set (``equipoise.data.available()``).
    noise: "symmetric" (to another class), "uniform" (redrawn over all classes), "pair" (to the next class), "instance"
        (depends on the input) or "none"; by default symmetric for embedded data and none for your own.
    rate: probability that a label is redrawn, in [0, 1].
    model: "mlp", "cnn", "linear", or "package.module:factory" of your own.
    epochs, batch_size: length and batch of a training run.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    clean_validation: keep the validation labels clean, for users who have a small trusted set.
    train_examples: use only so many training examples, drawn anew by each seed.
    standardise: bring images to mean 0 and standard deviation 1, measured on the training rows (tables always are).
    data, target, test_data: your own file or folder, its target column, and a file with clean labels to test on.
    """

    name: ClassVar[str] = "noisy-labels"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = (
        "elr",
        "nested-dropout",
        "ps-kd",
        "label-smoothing",
        "generalized-cross-entropy",
    )

    dataset: str = "digits"
    noise: str | None = None
    rate: float = 0.4
    validation: float = 0.2
    test: float = 0.2
    clean_validation: bool = False
    train_examples: int | None = None
    standardise: bool = False
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is None:
            object.__setattr__(self, "noise", "none" if self.data else "symmetric")
        check_choice("noise", self.noise, NOISE)
        check_range("rate", self.rate, 0, 1)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        if self.data is None and (self.target is not None or self.test_data is not None):
            raise ArgumentError("target, test_data describe a file of your own: give data='file.csv' as well")

    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def check(self) -> list[str]:
        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; noisy-labels needs classes")
        super().check()
        if self.data is not None and self.test_data is None:
            return [
                "The test labels come from your own data and may be as noisy as the rest: the estimates are on noisy labels."
            ]
        return []

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        return {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}

    def problem(self, seed: int) -> Problem:
        raw = self._raw()
        parts = split(
            raw,
            seed,
            validation=self.validation,
            test=self.test,
            train_examples=self.train_examples,
            standardise=self.standardise,
        )
        # One stream for each split, so that the training noise does not depend on the size of the validation set.
        noisy_train = self._corrupt(parts.train, seed, 1)
        noisy_validation = parts.validation if self.clean_validation else self._corrupt(parts.validation, seed, 2)
        assert parts.num_classes is not None  # check refuses a continuous target
        extra = {"clean": parts.train.targets, "corrupted": noisy_train.targets != parts.train.targets}
        return Problem(noisy_train, noisy_validation, parts.test, parts.input_shape, parts.num_classes, extra)

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Classification metrics, and ``memorised``: the share of wrong training labels that the model predicts."""
        metrics = super().measure(problem, predictions)
        logits, labels = predictions["train"]
        wrong = problem.extra["corrupted"]
        if wrong.any():
            metrics["memorised"] = (logits.argmax(1) == labels)[wrong].double().mean().item()
        return metrics

    def _raw(self) -> RawData:
        return read(self.data, self.target, test=self.test_data) if self.data else load(self.dataset)

    def _corrupt(self, examples: Examples, seed: int, stream: int) -> Examples:
        generator = torch.Generator().manual_seed(seed * 1_000 + stream)
        labels, classes = examples.targets, examples.num_classes
        assert classes is not None and isinstance(examples.inputs, Tensor)  # split gives classes and one tensor
        if self.noise == "symmetric":
            noisy = corruptions.symmetric_noise(labels, self.rate, classes, generator)
        elif self.noise == "uniform":
            noisy = corruptions.uniform_noise(labels, self.rate, classes, generator)
        elif self.noise == "pair":
            noisy = corruptions.pair_noise(labels, self.rate, classes, generator)
        elif self.noise == "instance":
            # One projection a seed: training and validation labels come from the same annotators.
            shared = torch.Generator().manual_seed(seed * 1_000)
            projection = corruptions.instance_projection(examples.inputs[0].numel(), classes, shared)
            noisy = corruptions.instance_noise(
                labels, examples.inputs, self.rate, classes, generator, projection=projection
            )
        else:
            noisy = labels
        return Examples(examples.inputs, noisy, num_classes=classes)
