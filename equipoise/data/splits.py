"""Training, validation and test sets from one seed; whatever is learned from data is learned from training rows only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.data.columns import as_text
from equipoise.data.preprocessing import TablePreprocessor
from equipoise.data.raw import RawData
from equipoise.errors import ArgumentError, DataError, check_integer, check_range, refuse
from equipoise.training.batch import Examples


@dataclass(frozen=True)
class Splits:
    """The three sets of one seed, ready for a model.

    train, validation, test: examples; groups, where the data have them, are their extra ``group`` (N,) int64.
    input_shape: shape of one input. num_classes: None for regression. group_names: what each number of ``group`` stands for.
    train_rows, validation_rows, test_rows: (N,) int64 positions in the raw data (``test_rows``: in ``raw.test`` if it exists).
    description: sizes and shapes in a sentence.
    """

    train: Examples
    validation: Examples
    test: Examples
    input_shape: tuple[int, ...]
    num_classes: int | None
    description: str
    train_rows: Tensor
    validation_rows: Tensor
    test_rows: Tensor
    group_names: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """What a model must return per example: one logit a class, or one value."""
        return self.num_classes or 1


def split(
    raw: RawData,
    seed: int,
    *,
    validation: float = 0.2,
    test: float = 0.2,
    train_examples: int | None = None,
    standardise: bool = False,
) -> Splits:
    """Split by a seed, stratified by class for classification, and preprocess.

    raw: the data. If it has a test set of its own, that is the test set, and ``test`` is not used.
    validation, test: shares of the raw examples, in (0, 1); the rest is for training.
    train_examples: use only so many of the training examples; fewer of them are a subset of more, at the same seed.
    standardise: bring each channel of images or sequences to mean 0 and standard deviation 1 on the training rows. Tables
        are always preprocessed (``TablePreprocessor``).

    The same seed gives the same rows on any machine. Each set holds each class in proportion, up to one example. Raises
    ``ArgumentError`` for shares or counts that leave no example of some class to train on.
    """
    check_integer("seed", seed, 0)
    check_range("validation", validation, 0, 1, open_low=True, open_high=True)
    check_range("test", test, 0, 1, open_low=True, open_high=True)
    held_out = [0 if raw.test is not None else max(1, round(test * len(raw))), max(1, round(validation * len(raw)))]
    left = len(raw) - sum(held_out)
    if left < 1:
        refuse("validation, test", (validation, test), "leave examples to train on")
    if train_examples is not None:
        check_integer("train_examples", train_examples, 1)
        if train_examples > left:
            refuse("train_examples", train_examples, f"be at most {left}, which are left after validation and test")
        left = train_examples

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(raw)) if raw.class_names is None else _stratified_order(raw.targets.numpy(), rng)
    test_rows, validation_rows, train_rows, _ = map(torch.from_numpy, np.split(order, np.cumsum([*held_out, left])))
    _check_classes(raw, train_rows, train_examples)
    tested = raw
    if raw.test is not None:
        tested, test_rows = raw.test, torch.arange(len(raw.test))

    parts = [(raw, train_rows), (raw, validation_rows), (tested, test_rows)]
    inputs = _preprocess(parts, standardise)
    groups, group_names = _groups(parts)
    examples = [
        Examples(x, data.targets[rows], num_classes=raw.num_classes, **({"group": group} if group is not None else {}))
        for x, (data, rows), group in zip(inputs, parts, groups, strict=True)
    ]
    shape = tuple(inputs[0].shape[1:])
    official = "" if raw.test is None else " (the data's own test set)"
    kind = f"{raw.num_classes} classes" if raw.num_classes else "regression"
    sizes = f"{len(train_rows)} training, {len(validation_rows)} validation, {len(test_rows)} test examples{official}"
    description = f"{raw.name}: {sizes}, inputs {'x'.join(map(str, shape))}, {kind}"
    row_ids = (train_rows, validation_rows, test_rows)
    return Splits(examples[0], examples[1], examples[2], shape, raw.num_classes, description, *row_ids, group_names)


def leakage(splits: Splits) -> int:
    """Number of test examples whose inputs also occur, number for number, among the training or validation examples."""
    seen = _digests(splits.train) | _digests(splits.validation)
    return sum(digest in seen for digest in _digest_list(splits.test))


def _stratified_order(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which every run of consecutive rows holds each class in proportion, up to about one example.

    Systematic sampling: the shuffled members of a class are spread evenly over [0, 1) from a random start.
    """
    order = rng.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    counts = np.bincount(classes)
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[classes[order]]
    start = rng.random(len(counts))
    key = (rank + start[classes[order]]) / counts[classes[order]]
    return order[np.argsort(key, kind="stable")]


def _check_classes(raw: RawData, train_rows: Tensor, train_examples: int | None) -> None:
    if raw.class_names is None:
        return
    absent = (torch.bincount(raw.targets[train_rows], minlength=len(raw.class_names)) == 0).nonzero().flatten().tolist()
    if absent:
        remedy = "Raise train_examples" if train_examples is not None else "Give it more examples, or hold out less"
        raise ArgumentError(
            f"{raw.name}: class {raw.class_names[absent[0]]!r} has no example among the {len(train_rows)} to train on. {remedy}"
        )


def _preprocess(parts: list[tuple[RawData, Tensor]], standardise: bool) -> list[Tensor]:
    frames = []
    tensors = []
    for data, rows in parts:
        if isinstance(data.inputs, Tensor):
            tensors.append(data.inputs[rows])
        else:
            frames.append(data.inputs.iloc[rows.numpy()])
    if frames:
        preprocessor = TablePreprocessor().fit(frames[0])
        return [preprocessor.transform(frame) for frame in frames]
    if standardise:
        axes = [axis for axis in range(tensors[0].ndim) if axis != 1]
        mean = tensors[0].double().mean(axes, keepdim=True).float()
        sd = tensors[0].double().std(axes, correction=0, keepdim=True).float()
        return [(x - mean) / torch.where(sd > 0, sd, 1.0) for x in tensors]
    return tensors


def _groups(parts: list[tuple[RawData, Tensor]]) -> tuple[list[Tensor | None], tuple[str, ...]]:
    """The combination of the group columns' values as one number an example, the same in all three sets."""
    labels = []
    for data, rows in parts:
        if data.groups is None:
            return [None] * len(parts), ()
        columns = [as_text(data.groups[name].iloc[rows.numpy()]).fillna("(missing)") for name in data.groups]
        labels.append(np.array([", ".join(values) for values in zip(*columns, strict=True)], dtype=str))
    names, codes = np.unique(np.concatenate(labels), return_inverse=True)
    cuts = np.cumsum([len(part) for part in labels])[:-1]
    return [torch.from_numpy(part.astype(np.int64)) for part in np.split(codes, cuts)], tuple(map(str, names))


def _digest_list(examples: Examples) -> list[bytes]:
    if not isinstance(examples.inputs, Tensor):
        raise DataError("inputs = dict: leakage compares the rows of one tensor")
    rows = examples.inputs.flatten(1).contiguous() + 0.0  # -0.0 and 0.0 are the same input
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.numpy()]


def _digests(examples: Examples) -> set[bytes]:
    return set(_digest_list(examples))
