"""Data of many classes: a generated open world, images whose rotations are classes, and splits into disjoint classes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from equipoise.data import RawData
from equipoise.data.preprocessing import TablePreprocessor
from equipoise.errors import ArgumentError, check_integer
from equipoise.training import Examples, Problem

OPEN_WORLD = "open-world"


def open_world(seed: int, classes: int = 100, per_class: int = 40) -> RawData:
    """Classes of very different spread, seen through a nonlinear map with nuisances: vectors (1, 64), classes x per_class.

    A class has a centre ``mu ~ N(0, I_8)`` and a spread s, log-uniform in [0.15, 0.7]; an example is ``u = mu + s N(0, I_8)``,
    with a nuisance ``v ~ 1.5 N(0, I_8)``, observed as ``x = tanh(u A + v B) + 0.05 N``. ``A ~ 0.35 N`` and ``B ~ 0.25 N`` (8 x 64),
    like all else, follow from ``seed``.
    """
    check_integer("classes", classes, 2)
    check_integer("per_class", per_class, 2)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    centres = normal(classes, 8)
    spreads = torch.exp(math.log(0.15) + torch.rand(classes, generator=generator) * math.log(0.7 / 0.15))
    labels = torch.arange(classes).repeat_interleave(per_class)
    seen, nuisance = 0.35 * normal(8, 64), 0.25 * normal(8, 64)
    inner = centres[labels] + spreads[labels, None] * normal(len(labels), 8)
    inputs = torch.tanh(inner @ seen + 1.5 * normal(len(labels), 8) @ nuisance) + 0.05 * normal(len(labels), 64)
    return RawData(OPEN_WORLD, "sequence", inputs[:, None], labels, tuple(map(str, range(classes))))


def rotated(raw: RawData, seed: int) -> RawData:
    """Square images, each turned by 0, 90, 180 or 270 degrees, drawn from ``seed``; class and turn make four times the classes."""
    images, labels = raw.inputs, raw.targets
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or images.shape[2] != images.shape[3]
        or raw.class_names is None
    ):
        raise ArgumentError(f"dataset = {raw.name!r}: must be {OPEN_WORLD!r} or hold square images in classes")
    if raw.test is not None:
        assert isinstance(raw.test.inputs, Tensor)  # of the same kind
        images, labels = torch.cat([images, raw.test.inputs]), torch.cat([labels, raw.test.targets])
    turns = torch.randint(4, (len(labels),), generator=torch.Generator().manual_seed(seed))
    every = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    names = tuple(f"{name}, {90 * k} degrees" for name in raw.class_names for k in range(4))
    return RawData(raw.name, raw.kind, every[turns, torch.arange(len(labels))], 4 * labels + turns, names)


def check_classes(raw: RawData, validation: float, test: float) -> None:
    """Refuse data of too few classes to give each split at least two."""
    assert raw.class_names is not None  # read and rotated give classes
    sizes = _sizes(len(raw.class_names), validation, test)
    if min(sizes) < 2:
        raise ArgumentError(
            f"{raw.name}: {len(raw.class_names)} classes give {sizes[0]} to train, {sizes[1]} to validate and {sizes[2]} to test "
            f"on, none of them shared: must be at least 2 each. Use data with more classes, or change validation = {validation:g}, "
            f"test = {test:g}"
        )


def _sizes(classes: int, validation: float, test: float) -> tuple[int, int, int]:
    """Numbers of classes to train, validate and test on."""
    held_out = round(validation * classes), round(test * classes)
    return classes - sum(held_out), *held_out


def split_classes(raw: RawData, seed: int, validation: float, test: float, evaluation_size: int | None) -> Problem:
    """Training, validation and test sets without a common class.

    Labels are numbered through: training classes from 0, then those of validation, then those of the test. evaluation_size:
    at most so many examples of each validation and test class. Tables are preprocessed by what the training rows tell.
    """
    assert raw.class_names is not None  # as above
    classes = len(raw.class_names)
    sizes = _sizes(classes, validation, test)
    rng = np.random.default_rng(seed)
    number = torch.empty(classes, dtype=torch.int64)
    number[torch.from_numpy(rng.permutation(classes))] = torch.arange(classes)
    order = torch.from_numpy(rng.permutation(len(raw)))
    labels = number[raw.targets[order]]
    order, labels = order[labels.argsort(stable=True)], labels.sort().values
    counts = torch.bincount(labels, minlength=classes)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    first = torch.tensor([0, sizes[0], sizes[0] + sizes[1], classes])
    rows = []
    for part in range(3):
        inside = (labels >= first[part]) & (labels < first[part + 1])
        kept = inside & (rank < evaluation_size) if part and evaluation_size is not None else inside
        rows.append((order[kept], labels[kept]))
    if isinstance(raw.inputs, Tensor):
        inputs = [raw.inputs[index] for index, _ in rows]
    else:
        frames = [raw.inputs.iloc[index.numpy()] for index, _ in rows]
        preprocessor = TablePreprocessor().fit(frames[0])
        inputs = [preprocessor.transform(frame) for frame in frames]
    counted = (sizes[0], classes, classes)
    train, held_out, tested = (
        Examples(x, y, num_classes=c) for x, (_, y), c in zip(inputs, rows, counted, strict=True)
    )
    return Problem(train, held_out, tested, tuple(inputs[0].shape[1:]), sizes[0])
