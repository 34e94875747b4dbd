"""What predictions are worth. All of them take predictions and targets of a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of examples whose largest logit (N, C) is at the target (N,); in [0, 1]."""
    return (logits.argmax(1) == targets).double().mean().item()


def balanced_accuracy(logits: Tensor, targets: Tensor) -> float:
    """Mean over the classes present of the share of their examples that are predicted right; in [0, 1]."""
    right = (logits.argmax(1) == targets).double()
    counts = torch.bincount(targets, minlength=logits.shape[1])
    per_class = torch.bincount(targets, weights=right, minlength=logits.shape[1])[counts > 0] / counts[counts > 0]
    return per_class.mean().item()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits.double(), targets).item()


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over ``bins`` equal-width bins of confidence, weighted by size; in [0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == targets).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.bincount(place, weights=right - confidence, minlength=bins)
    return gap.abs().sum().item() / len(targets)


def classification_metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """``accuracy``, ``balanced_accuracy``, ``nll`` and ``ece``."""
    return {
        "accuracy": accuracy(logits, targets),
        "balanced_accuracy": balanced_accuracy(logits, targets),
        "nll": negative_log_likelihood(logits, targets),
        "ece": expected_calibration_error(logits, targets),
    }
