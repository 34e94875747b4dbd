"""Metrics against explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.training.metrics import (
    accuracy,
    balanced_accuracy,
    classification_metrics,
    expected_calibration_error,
    negative_log_likelihood,
)


def problem(seed: int, count: int = 200, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    return 2 * torch.randn(count, classes, generator=generator) + 2 * torch.eye(classes)[targets], targets


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z - max(row)) for z in row]
    return [p / sum(powers) for p in powers]


def slow_ece(logits: Tensor, targets: Tensor, bins: int) -> float:
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        probabilities = softmax(row)
        confidence = max(probabilities)
        for m in range(1, bins + 1):  # the interval ((m - 1) / M, m / M] of Guo et al.
            if (m - 1) / bins < confidence <= m / bins:
                groups[m - 1].append((confidence, probabilities.index(confidence) == target))
    total = 0.0
    for group in groups:
        if group:
            mean_confidence = sum(c for c, _ in group) / len(group)
            share = sum(right for _, right in group) / len(group)
            total += len(group) / len(targets) * abs(share - mean_confidence)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_against_slow_references(seed: int, bins: int) -> None:
    logits, targets = problem(seed)
    assert expected_calibration_error(logits, targets, bins) == pytest.approx(
        slow_ece(logits, targets, bins), abs=1e-12
    )
    rows = [softmax(row) for row in logits.double().tolist()]
    labels = targets.tolist()
    nll = -sum(math.log(row[label]) for row, label in zip(rows, labels, strict=True)) / len(rows)
    assert negative_log_likelihood(logits, targets) == pytest.approx(nll, rel=1e-12)
    hits = [row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)]
    assert accuracy(logits, targets) == pytest.approx(sum(hits) / len(hits))
    shares = [
        sum(hit for hit, label in zip(hits, labels, strict=True) if label == c) / labels.count(c) for c in set(labels)
    ]
    assert balanced_accuracy(logits, targets) == pytest.approx(sum(shares) / len(shares))


def test_extremes() -> None:
    sure = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert classification_metrics(sure, right) == {"accuracy": 1, "balanced_accuracy": 1, "nll": 0, "ece": 0}
    assert expected_calibration_error(sure, wrong) == 1 and negative_log_likelihood(sure, wrong) == 1000
    # a class without examples does not count; half precision is evaluated in double
    assert balanced_accuracy(torch.eye(3), torch.tensor([0, 1, 1])) == pytest.approx(0.75)
    assert negative_log_likelihood(sure.bfloat16(), wrong) == 1000
