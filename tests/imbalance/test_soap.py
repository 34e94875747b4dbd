"""The wrapper of LibAUC's SOAP: its loss, its state, its threshold. Skipped where LibAUC is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError, MissingDependencyError
from equipoise.imbalance import soap
from equipoise.testing import check_method
from equipoise.testing.problem import classification

torch.set_num_threads(1)
needs_libauc = pytest.mark.skipif(not soap.installed(), reason="pip install --no-deps libauc")


def data(n: int = 60, seed: int = 0, classes: int = 2) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 6 == 0).long()
    return equipoise.Examples(torch.randn(n, 4, generator=generator) + labels[:, None], labels, num_classes=classes)


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())


def train(method: equipoise.Method, **options: Any) -> equipoise.Run:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
    settings: dict[str, Any] = {"epochs": 20, "batch_size": 60, "loss": bce, "data": data(), **options}
    return equipoise.fit(model, methods=[method], **settings)


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "find_spec", lambda name: None)
    assert not soap.installed()
    with pytest.raises(MissingDependencyError, match="pip install --no-deps libauc"):
        soap.SOAP()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0"),
        ({"gamma": 1.5}, r"gamma = 1.5: must be a number in \(0, 1\]"),
        ({"margin": 0}, "margin = 0"),
        ({"metric": "auc"}, "metric = 'auc'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        soap.SOAP(**settings)


@needs_libauc
def test_the_kit() -> None:
    report = check_method(
        soap.SOAP,
        problem=classification(classes=2),
        skip={"accumulation": "the loss compares all rows of a batch"},
    )
    assert "resume" in report.passed and "permuted-rows" in report.passed


@needs_libauc
def test_gradient_and_averages_are_the_papers() -> None:
    method, examples = soap.SOAP(gamma=0.3, margin=1.0), data(12)
    run = equipoise.start(nn.Linear(4, 1), lambda p: torch.optim.SGD(p, lr=0.1), methods=[method], data=examples)
    z = torch.randn(12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    batch, output = examples.take(torch.arange(12).flip(0)), equipoise.Output(z.flip(0)[:, None])
    (slope,) = torch.autograd.grad(method.loss(run, batch, output), z)
    expected, scores = torch.zeros(12), z.detach()
    positives = [i for i in range(12) if examples.targets[i]]
    for i in positives:
        pairs = (1 - (scores[i] - scores)).clamp(min=0) ** 2
        u_pos, u_all = 0.3 * (pairs * examples.targets).mean(), 0.3 * pairs.mean()
        assert method.criterion.u_all[i] == pytest.approx(u_all.item())
        assert method.criterion.u_pos[i] == pytest.approx(u_pos.item())
        weight = (u_pos - u_all * examples.targets) / u_all**2 / (12 * len(positives))
        steepness = -2 * (1 - (scores[i] - scores)).clamp(min=0) * weight
        expected[i] += steepness.sum()
        expected -= steepness
    torch.testing.assert_close(slope, expected)
    assert set(method.state_dict()["criterion"]) == {"u_all", "u_pos"}
    assert not method.criterion.u_all[examples.targets == 0].any()


@needs_libauc
def test_it_ranks_and_places_the_threshold() -> None:
    method = soap.SOAP(lr=0.05)
    run = train(method, validation=data(seed=1))
    logits, labels = run.predict(data())
    assert average_precision_score(labels.numpy(), logits[:, 0].numpy()) > 0.6
    assert 0 < (logits > 0).double().mean() < 0.5
    plain = train(soap.SOAP(lr=0.05)).predict(data())[0]
    torch.testing.assert_close((logits - plain).diff(dim=0), torch.zeros(59, 1), atol=1e-5, rtol=0)


@needs_libauc
def test_batches_without_a_positive_are_passed_over() -> None:
    run = train(soap.SOAP(), batch_size=3, epochs=2)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@needs_libauc
def test_more_than_two_classes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_classes = 3: must be 2 for SOAP"):
        train(soap.SOAP(), data=data(classes=3), loss=None)
