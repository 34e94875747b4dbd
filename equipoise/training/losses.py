"""What losses share: checks with one kind of message, precision, reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice

REDUCTIONS = ("none", "sum", "mean")


def check_logits(logits: Tensor, num_classes: int | None = None) -> None:
    """Refuse logits that are not floating point (N, C), with C = ``num_classes`` where that is known."""
    if logits.ndim == 2 and logits.is_floating_point() and num_classes in (None, logits.shape[1]):
        return
    remedy = ""
    if logits.ndim == 2 and num_classes is not None:
        remedy = f". Give num_classes={logits.shape[1]}, or change the model's last layer"
    raise ArgumentError(
        f"logits = {logits.dtype} {tuple(logits.shape)}: must be floating point of shape "
        f"(N, {'C' if num_classes is None else num_classes}){remedy}"
    )


def check_labels(targets: Tensor, batch_size: int, num_classes: int, remedy: str = "") -> None:
    """Refuse targets that are not integer classes (N,) in [0, C).

    The range is checked on the CPU only: on an accelerator that would wait for the device, and its kernels check it anyway.
    """
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != (batch_size,):
        raise ArgumentError(
            f"targets = {targets.dtype} {tuple(targets.shape)}: must be integer classes of shape ({batch_size},)"
            + (f". {remedy}" if remedy else "")
        )
    if targets.device.type == "cpu" and batch_size and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ArgumentError(
            f"targets = values in [{int(targets.min())}, {int(targets.max())}]: must lie in [0, {num_classes})"
        )


def check_rows(name: str, rows: Tensor, logits: Tensor) -> None:
    """Refuse ``rows`` (soft labels, targets, earlier predictions) of another shape than the logits'."""
    if rows.shape != logits.shape or not rows.is_floating_point():
        raise ArgumentError(
            f"{name} = {rows.dtype} {tuple(rows.shape)}: must be floating point of the logits' shape {tuple(logits.shape)}"
        )


def precise(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, others as they are: softmax and logarithms are never taken in half precision."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Per-example values (N,) as they are, their sum or their mean."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
