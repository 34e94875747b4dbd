"""The tuned threshold against trying every one, and in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance.anyloss import METRICS
from equipoise.imbalance.tuned_threshold import TunedThreshold, best_threshold
from equipoise.testing import check_method
from equipoise.testing.problem import classification

torch.set_num_threads(1)


def drawn(n: int = 40, seed: int = 0, share: float = 0.25) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < share).long()
    return torch.randn(n, generator=generator, dtype=torch.float64) + 1.5 * labels - 2, labels


def score(metric: str, labels: Tensor, predicted: Tensor) -> float:
    """The hard score, from sets of examples; 0 / 0 counts as 0."""
    actual, found = ({i for i, flag in enumerate(flags.tolist()) if flag} for flags in (labels, predicted))
    tp, everything = len(actual & found), len(labels)
    recall = tp / max(1, len(actual))
    specificity = (everything - len(actual | found)) / max(1, everything - len(actual))
    return {
        "accuracy": 1 - len(actual ^ found) / everything,
        "f1": 2 * tp / max(1, len(actual) + len(found)),
        "fbeta": 5 * tp / max(1, 4 * len(actual) + len(found)),
        "gmean": (recall * specificity) ** 0.5,
        "balanced_accuracy": (recall + specificity) / 2,
    }[metric]


# -- the functional core ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("metric", METRICS)
def test_no_threshold_is_better(metric: str) -> None:
    for seed in range(4):
        logits, labels = drawn(seed=seed)
        if seed == 3:
            logits = logits.round()  # ties, which no threshold can tell apart
        threshold = best_threshold(logits, labels, metric, beta=2.0)
        tried = [score(metric, labels, (logits > t).long()) for t in [*(logits - 1e-9).tolist(), 1e9]]
        assert score(metric, labels, (logits > threshold).long()) == pytest.approx(max(tried), abs=1e-12)


def test_by_hand() -> None:
    logits, labels = torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.tensor([1, 1, 0, 0])
    assert best_threshold(logits, labels) == 0.5
    assert best_threshold(logits, torch.tensor([1, 0, 0, 0]), "accuracy") == 2
    assert best_threshold(logits, torch.ones(4, dtype=torch.int64)) == -3
    assert best_threshold(logits, torch.zeros(4, dtype=torch.int64), "accuracy") == 4
    assert best_threshold(torch.tensor([2.0]), torch.tensor([1])) == 1


def test_one_and_two_columns_agree() -> None:
    logits, labels = drawn()
    expected = best_threshold(logits, labels)
    assert best_threshold(logits[:, None], labels) == expected
    assert best_threshold(torch.stack([logits * 0 + 1, logits + 1], 1), labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64), r"logits = \(3, 3\): must have the shape \(N,\)"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.int64), "with at least one example"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), r"targets = values in \[0, 2\]"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), r"targets = .*\(2,\)"),
    ],
)
def test_bad_input(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        best_threshold(logits, labels)


# -- the method -------------------------------------------------------------------------------------------------------
def test_the_kit() -> None:
    check_method(TunedThreshold, problem=classification(classes=2))


def data(seed: int, n: int = 60) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 8 == 0).long()
    inputs = torch.randn(n, 4, generator=generator) + labels[:, None]
    return equipoise.Examples(inputs, labels, num_classes=2)


def train(*methods: equipoise.Method, model: nn.Module, **options: Any) -> equipoise.Run:
    loss = lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float())  # noqa: E731
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 20, "loss": loss, "validation": data(1), **options}
    return equipoise.fit(model, data(0), methods=methods, **settings)


def network(bias: bool, outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, outputs, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_the_baseline_with_another_bias(bias: bool) -> None:
    method = TunedThreshold("balanced_accuracy")
    run, plain = train(method, model=network(bias)), train(model=network(bias))
    for (name, mine), theirs in zip(run.model.state_dict().items(), plain.model.state_dict().values(), strict=False):
        assert name == "2.bias" or torch.equal(mine, theirs)
    before, labels = plain.predict(data(1))
    after, _ = run.predict(data(1))
    torch.testing.assert_close(after, before - method.threshold)
    scores = [score("balanced_accuracy", labels, (z[:, 0] > 0).long()) for z in (before, after)]
    assert scores[1] > scores[0]


def test_two_logits() -> None:
    method = TunedThreshold()
    run, plain = (train(*m, model=network(True, 2), loss=None) for m in ([method], []))
    shift = run.predict(data(1))[0] - plain.predict(data(1))[0]
    torch.testing.assert_close(shift, torch.tensor([[0.0, -method.threshold]]).expand(60, 2))


def test_refusals_before_training() -> None:
    for settings, message in (({"metric": "f3"}, "metric = 'f3'"), ({"beta": 0}, "beta = 0")):
        with pytest.raises(ArgumentError, match=message):
            TunedThreshold(**settings)
    with pytest.raises(ArgumentError, match="validation = None: must be given, since the threshold is chosen on it"):
        train(TunedThreshold(), model=network(True), validation=None)
    one_class = data(1).subset(data(1).targets == 0)
    with pytest.raises(DataError, match=r"validation holds the targets \[0\]: must hold both classes"):
        train(TunedThreshold(), model=network(True), validation=one_class)
    with pytest.raises(ArgumentError, match="tuned-threshold moves the bias of a last layer"):
        train(TunedThreshold(), model=network(True, 3))
