"""What the methods and tasks for skewed data share: binary logits as two columns, counts of classes, recall of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, DataError
from equipoise.training.losses import check_logits
from equipoise.training.run import Run


def two_columns(logits: Tensor) -> Tensor:
    """Logits (N, C) as every multi-class loss takes them: one logit (N,) or (N, 1) of class 1 becomes [0, z], (N, 2).

    ``softmax([0, z]) = [1 - sigmoid(z), sigmoid(z)]``: every multi-class loss is the binary one. Two and more columns come
    back as they are.
    """
    if logits.ndim == 1:
        logits = logits[:, None]
    check_logits(logits)
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def check_class_counts(class_counts: Tensor) -> None:
    """Refuse numbers of examples that are not finite and positive, of shape (C,) with C >= 2."""
    if not isinstance(class_counts, Tensor) or class_counts.ndim != 1 or len(class_counts) < 2:
        got = tuple(class_counts.shape) if isinstance(class_counts, Tensor) else type(class_counts).__name__
        raise ArgumentError(
            f"class_counts = {got}: must be a tensor (C,), the number of training examples of each of at least 2 classes"
        )
    bad = ~((class_counts > 0) & torch.isfinite(class_counts))
    if bool(bad.any()):
        c = int(bad.nonzero()[0])
        raise ArgumentError(
            f"class_counts = {class_counts[c].item():g} for class {c}: must be positive. Every class needs a training example"
        )


def class_counts_of(run: Run, method: str) -> Tensor:
    """Number of training examples of each class of a run, (C,) int64 on the run's device, for a ``method`` that needs them.

    Raises ``ArgumentError`` where the run does not know them, ``DataError`` naming the classes without an example.
    """
    counts = run.class_counts
    if counts is None:
        raise ArgumentError(
            f"data = without classes: {method} needs the number of training examples of each class. "
            "Give data=... with integer targets (N,): equipoise.Examples, a pair of tensors, or a Dataset with .targets"
        )
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing or len(counts) < 2:
        what = f"class {', '.join(map(str, missing))}" if missing else "any class but 0"
        raise DataError(
            f"targets hold no example of {what}: {method} needs one of each of the {len(counts)} classes, and at least 2 "
            "classes. Add examples, or number the classes without gaps"
        )
    return counts.to(run.device)


def recall_and_f1(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Recall and F1 of each class, (C,) float64 in [0, 1]; predicted is the class of the largest logit.

    logits: (N, C). targets: (N,) integer classes. With TP examples of a class predicted right, FN missed and FP of others taken for
    it: recall = TP / (TP + FN), NaN for a class without examples; F1 = 2 TP / (2 TP + FP + FN), NaN for one that is neither
    present nor predicted. The mean of F1 without NaN is the macro F1 of scikit-learn.
    """
    classes, predicted = logits.shape[1], logits.argmax(1)
    right, present, taken = (
        torch.bincount(labels, minlength=classes).double()
        for labels in (targets[predicted == targets], targets, predicted)
    )
    return right / present, 2 * right / (present + taken)
