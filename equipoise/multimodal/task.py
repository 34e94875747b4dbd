"""The multimodal task: classification from two or more modalities of unequal strength.

By default the modalities are the left and the right half of an embedded image, under Gaussian noise that is stronger on the
right. For data of your own they are groups of a table's columns, or a table and a folder of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.data import fingerprint, load, split
from equipoise.data.multimodal import VIEWS, Modalities, read_modalities
from equipoise.errors import ArgumentError, check_choice, check_range
from equipoise.models import build
from equipoise.multimodal.model import ENCODERS, FUSIONS, AllLogits, check_names, make_net
from equipoise.training import Examples, Loader, LogUniform, Problem, Run, SupervisedTask
from equipoise.training.metrics import accuracy, classification_metrics
from equipoise.training.space import Space

NOISE = (0.2, 0.6)
OWN = ("target", "modalities", "images", "image_column", "image_size", "test_data")


@dataclass(frozen=True)
class Multimodal(SupervisedTask):
    """Classification from two or more modalities of unequal strength.

    dataset: name of an embedded data set of images (``equipoise.data.available()``).
    views: "halves" (left and right) or "fourier" (pixels and magnitudes of their Fourier transform).
    noise: standard deviation of Gaussian noise on each modality, in training, validation and test; by default 0.2 and 0.6 on
        embedded data, none on your own.
    model: encoder of each modality, "mlp" or "cnn" (where it is an image), or "package.module:factory" of your own, called with
        ``input_shapes`` (a dict) and ``num_outputs``; see ``MultimodalNet`` for what it must return.
    fusion: "concat", "sum" or "gated".
    hidden, features: widths of the encoders' two layers.
    epochs, batch_size: length and batch of a training run.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    train_examples: use only so many training examples, drawn anew by each seed.
    standardise: bring images to mean 0 and standard deviation 1, measured on the training rows (tables always are).
    data, target, test_data: your own table, its target column, and a table of the same columns to test on.
    modalities: columns of each modality, "a=col1,col2;b=x*" (see ``equipoise.data.multimodal.read_modalities``).
    images, image_column, image_size: folder of images, the column with their file names, and a side to resize them to.
    """

    name: ClassVar[str] = "multimodal"
    baseline: ClassVar[str] = "joint"
    methods: ClassVar[tuple[str, ...]] = ("arl", "aux", "aux-scaled", "ogm-ge", "unimodal")

    dataset: str = "digits"
    views: str = "halves"
    noise: tuple[float, ...] | None = None
    fusion: str = "concat"
    hidden: int = 128
    features: int = 32
    epochs: int = 20
    validation: float = 0.2
    test: float = 0.2
    train_examples: int | None = None
    standardise: bool = False
    data: str | None = None
    target: str | None = None
    modalities: str | None = None
    images: str | None = None
    image_column: str | None = None
    image_size: int | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("views", self.views, tuple(VIEWS))
        check_choice("fusion", self.fusion, tuple(FUSIONS))
        if ":" not in self.model:
            check_choice("model", self.model, ENCODERS)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        given = [name for name in OWN if getattr(self, name) is not None]
        if self.data is None and given:
            raise ArgumentError(f"{', '.join(given)}: describe a file of your own; give data='file.csv' as well")
        if self.noise is None and self.data is None:
            object.__setattr__(self, "noise", NOISE)
        if self.noise is not None:
            object.__setattr__(self, "noise", tuple(map(_number, self.noise)))

    @property
    def resampled(self) -> bool:
        return next(iter(self._modalities()[0].values())).test is None

    def check(self) -> list[str]:
        modalities, unused = self._modalities()
        first = next(iter(modalities.values()))
        if first.class_names is None:
            raise ArgumentError(f"data = {first.name!r}: has a continuous target; multimodal needs classes")
        check_names(modalities)
        if self.noise is not None and len(self.noise) != len(modalities):
            raise ArgumentError(f"noise = {self.noise}: must give one number for each of {', '.join(modalities)}")
        super().check()
        if unused:
            return [f"Columns that belong to no modality are not used: {', '.join(unused)}."]
        return []

    def fingerprint(self) -> dict[str, Any]:
        files = ("data", "test_data", "images")
        found = {f"{key}_sha256": fingerprint(path) for key in files if (path := getattr(self, key))}
        return {**super().fingerprint(), **found}

    def space(self) -> Space:
        """As for every task; unimodal losses multiply the gradient, so that learning rates may be lower."""
        return {**super().space(), "lr": LogUniform(0.003, 0.3)}

    def problem(self, seed: int) -> Problem:
        options: dict[str, Any] = {
            "validation": self.validation,
            "test": self.test,
            "train_examples": self.train_examples,
        }
        modalities, _ = self._modalities()
        parts = {name: split(raw, seed, standardise=self.standardise, **options) for name, raw in modalities.items()}
        first = next(iter(parts.values()))
        assert first.num_classes is not None  # check refuses a continuous target
        deviations = self.noise or (0.0,) * len(parts)

        def examples(which: str, stream: int) -> Examples:
            # One stream for each split, so that the test noise does not depend on the number of training examples.
            generator = torch.Generator().manual_seed(seed * 1_000 + stream)
            inputs: dict[str, Tensor] = {}
            for (name, found), deviation in zip(parts.items(), deviations, strict=True):
                clean = getattr(found, which).inputs
                noise = torch.randn(clean.shape, generator=generator) if deviation else 0.0
                inputs[name] = clean + deviation * noise
            return Examples(inputs, getattr(first, which).targets, num_classes=first.num_classes)

        train, validation, test = (examples(which, i) for i, which in enumerate(("train", "validation", "test"), 1))
        shapes = {name: found.input_shape for name, found in parts.items()}
        size = sum(tensor[0].numel() for tensor in train.inputs.values())
        return Problem(train, validation, test, (size,), first.num_classes, {"input_shapes": shapes})

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        shapes = problem.extra["input_shapes"]
        if ":" in self.model:
            return build(self.model, shapes, problem.num_outputs, seed)
        sizes = {"hidden": self.hidden, "features": self.features}
        return make_net(shapes, problem.num_outputs, encoder=self.model, fusion=self.fusion, **sizes, seed=seed)

    def predict(self, run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
        """The prediction and the unimodal logits (N, 1 + M, C)."""
        return run.predict(loader, AllLogits(run.inference_model))

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Classification metrics of the prediction, and ``accuracy_<modality>`` of each modality's own logits."""
        metrics: dict[str, float] = {}
        for part in ("validation", "test"):
            logits, targets = predictions[part]
            found = classification_metrics(logits[:, 0], targets)
            for name, own in zip(problem.extra["input_shapes"], logits[:, 1:].unbind(1), strict=False):
                found[f"accuracy_{name}"] = accuracy(own, targets)
            metrics |= {f"{part}_{name}": value for name, value in found.items()}
        return metrics

    def _modalities(self) -> tuple[Modalities, tuple[str, ...]]:
        if self.data is None:
            return VIEWS[self.views](load(self.dataset)), ()
        return read_modalities(
            self.data,
            self.target,
            self.modalities,
            images=self.images,
            image_column=self.image_column,
            image_size=self.image_size,
            test=self.test_data,
        )


def _number(value: float | str) -> float:
    """A standard deviation, which is a string when it comes from a command line."""
    with suppress(ValueError):
        value = float(value)
    check_range("noise", value, 0)  # type: ignore[arg-type]
    return float(value)
