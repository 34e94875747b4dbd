"""Recall, MAP@R and the spread of thresholds against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.retrieval import map_at_r, opis, recall_at_k, retrieval_metrics, threshold_spread
from equipoise.retrieval import pairs as pairs_module

torch.set_num_threads(1)
SHARED = (0.5, 1.1)


def drawn(n: int = 30, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes, the last two examples alone in theirs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    labels[-2:] = torch.tensor([70, 71])
    centres = torch.randn(100, 4, generator=generator, dtype=torch.float64)
    return centres[labels] + 0.7 * torch.randn(n, 4, generator=generator, dtype=torch.float64), labels


def rankings(embeddings: Tensor, labels: Tensor) -> list[list[bool]]:
    """For each query, whether each other example is of its class, nearest first."""
    unit = torch.nn.functional.normalize(embeddings, dim=1).tolist()
    names, found = labels.tolist(), []
    for i, query in enumerate(unit):
        others = [j for j in range(len(unit)) if j != i]
        if not any(names[j] == names[i] for j in others):
            continue
        cosine = {j: sum(a * b for a, b in zip(query, unit[j], strict=True)) for j in others}
        others.sort(key=lambda j, cosine=cosine: -cosine[j])
        found.append([names[j] == names[i] for j in others])
    return found


@pytest.mark.parametrize("block", [pairs_module.BLOCK, 30 * 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_plain_loops(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "BLOCK", block)
    embeddings, labels = drawn(seed=seed)
    lists = rankings(embeddings, labels)
    assert len(lists) == 28
    for k in (1, 2, 5):
        expected = sum(any(ranking[:k]) for ranking in lists) / len(lists)
        assert recall_at_k(embeddings, labels, k) == pytest.approx(expected, abs=1e-12)
    total = 0.0
    for ranking in lists:
        r = sum(ranking)
        total += sum(sum(ranking[: i + 1]) / (i + 1) for i in range(r) if ranking[i]) / r
    assert map_at_r(embeddings, labels) == pytest.approx(total / len(lists), abs=1e-12)


def test_map_at_r_by_hand() -> None:
    # On a line of angles: 0 and 1 belong together, 2 and 3 too; 1 is nearer to 2 than to 0.
    angles = torch.deg2rad(torch.tensor([0.0, 30, 50, 90]))
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 0, 1, 1])
    assert recall_at_k(embeddings, labels) == 0.5  # 0 and 3 find their like
    assert recall_at_k(embeddings, labels, 2) == 1.0
    assert map_at_r(embeddings, labels) == 0.5
    three = torch.tensor([0, 0, 0, 1, 1])
    angles = torch.deg2rad(torch.tensor([0.0, 10, 21, 15, 90]))
    # Of class 0: 0 sees 1, 3 (no), then 2: precision 1/1 at the first of R = 2, the second is wrong: 1/2.
    # 1 sees 3 (no), 0, then 2: 1/2 at the second: 1/4. 2 sees 3 (no), 1: 1/4. Of class 1 (R = 1): 3 and 4 see others: 0.
    assert map_at_r(torch.stack([angles.cos(), angles.sin()], 1), three) == pytest.approx((0.5 + 0.25 + 0.25) / 5)


def test_ties_count_against_the_model() -> None:
    labels = torch.arange(12) % 3
    for collapsed in (torch.ones(12, 3), torch.zeros(12, 3)):
        assert recall_at_k(collapsed, labels, 8) == 0 and map_at_r(collapsed, labels) == 0
        assert recall_at_k(collapsed, labels, 9) == 1  # 8 examples of other classes come first
    twins = torch.eye(3)[labels]  # identical within a class, orthogonal between
    assert recall_at_k(twins, labels) == 1 and map_at_r(twins, labels) == 1


def spread_loop(embeddings: Tensor, labels: Tensor, far: float) -> float:
    unit, names = torch.nn.functional.normalize(embeddings, dim=1), labels.tolist()
    distances = (2 - 2 * unit @ unit.T).clamp(min=0).sqrt().tolist()
    found = []
    for name in sorted({x for x in names if names.count(x) > 1}):
        outer = [distances[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if a == name != b]
        fitting = [g / 200 for g in range(401) if sum(d <= g / 200 for d in outer) <= far * len(outer) + 1e-9]
        found.append(max(fitting))
    mean = sum(found) / len(found)
    return math.sqrt(sum((t - mean) ** 2 for t in found) / len(found))


@pytest.mark.parametrize("far", [0.05, 0.3])
def test_threshold_spread_against_a_plain_loop(far: float) -> None:
    embeddings, labels = drawn()
    assert threshold_spread(embeddings, labels, far) == pytest.approx(spread_loop(embeddings, labels, far), abs=1e-12)


def test_threshold_spread_of_alike_classes_is_0() -> None:
    assert threshold_spread(torch.eye(3)[torch.arange(9) % 3], torch.arange(9) % 3) == 0


def test_all_metrics_are_those_of_their_functions() -> None:
    embeddings, labels = drawn(60, classes=12)
    found = retrieval_metrics(embeddings.float(), labels, SHARED)
    low = embeddings.float()
    own, shared = opis(low, labels), opis(low, labels, calibration_range=SHARED)
    expected = {
        "recall_at_1": recall_at_k(low, labels),
        "recall_at_5": recall_at_k(low, labels, 5),
        "map_at_r": map_at_r(low, labels),
        "opis": own.opis,
        "epsilon_opis": own.epsilon(),
        "opis_shared": shared.opis,
        "epsilon_opis_shared": shared.epsilon(),
        "threshold_spread": threshold_spread(low, labels),
        "far_low": own.calibration_range[0],
        "far_high": own.calibration_range[1],
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["opis"] != found["opis_shared"]


def test_the_values_of_pytorch_metric_learning() -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    embeddings, labels = drawn(60)
    embeddings, labels = embeddings[:-2], labels[:-2]  # theirs has no class of one example
    wanted = ("precision_at_1", "mean_average_precision_at_r")
    theirs = AccuracyCalculator(include=wanted, knn_func=CustomKNN(CosineSimilarity())).get_accuracy(embeddings, labels)
    assert recall_at_k(embeddings, labels) == pytest.approx(theirs["precision_at_1"])
    assert map_at_r(embeddings, labels) == pytest.approx(theirs["mean_average_precision_at_r"])


def test_arguments_are_checked() -> None:
    embeddings, labels = drawn()
    with pytest.raises(ValueError, match="k = 0: must be an integer >= 1"):
        recall_at_k(embeddings, labels, 0)
    with pytest.raises(ValueError, match=r"far = 1.0: must be a number in \(0, 1\)"):
        threshold_spread(embeddings, labels, 1.0)
    with pytest.raises(ValueError, match="labels = 0 of 30 classes with at least 2 examples"):
        map_at_r(embeddings, torch.arange(30))
