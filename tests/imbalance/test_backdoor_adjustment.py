"""Backdoor adjustment against hand-computed numbers, loops in plain Python, and each model trained alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError, DataError, MethodConflictError
from equipoise.imbalance.backdoor_adjustment import (
    AdaptedClassifier,
    BackdoorAdjustment,
    BackdoorAdjustmentMethod,
    BestPretraining,
    CosineClassifier,
    CrossEntropyEnsemble,
    FrozenBackbone,
    LogitAdjustedLoss,
    SamePretrainingEnsemble,
    adapted,
    backdoor_adjust,
    cosine_logits,
    estimate_label_prior,
    group_recall,
    imbalance_groups,
    logit_adjusted_cross_entropy,
    prior_groups,
)
from equipoise.imbalance.baselines import LogitAdjustment
from equipoise.testing import check_layer, check_loss, check_method
from equipoise.training import Batch, Examples, Method, Output, Run

torch.set_num_threads(1)
COUNTS = torch.tensor([80, 15, 5])


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- logit adjustment -------------------------------------------------------------------------------------------------
def test_oracle_1_adjusted_loss() -> None:
    z = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    loss = LogitAdjustedLoss(COUNTS.double())
    one, two = (loss(z, torch.tensor([label])) for label in (1, 2))
    assert [one.item(), two.item()] == pytest.approx([1.110673, 3.709285], abs=1e-6)
    assert F.cross_entropy(z, torch.tensor([1])).item() == pytest.approx(0.464369, abs=1e-6)
    (gradient,) = torch.autograd.grad(one, z)
    assert gradient[0].tolist() == pytest.approx([0.646168, -0.670663, 0.024495], abs=1e-6)


def test_oracle_1_equal_counts_and_tau_0_are_cross_entropy() -> None:
    z, y = normal(6, 3), torch.arange(6) % 3
    plain = F.cross_entropy(z, y)
    torch.testing.assert_close(LogitAdjustedLoss(torch.tensor([7, 7, 7]))(z, y), plain)
    assert torch.equal(LogitAdjustedLoss(COUNTS, tau=0.0)(z, y), plain)


def test_adjusted_loss_is_its_formula_one_number_at_a_time() -> None:
    z, y, tau = normal(5, 3), [2, 0, 1, 1, 0], 1.7
    each = []
    for row, label in zip(z.tolist(), y, strict=True):
        shifted = [v + tau * math.log(n / 100) for v, n in zip(row, COUNTS.tolist(), strict=True)]
        each.append(math.log(sum(math.exp(v) for v in shifted)) - shifted[label])
    loss = LogitAdjustedLoss(COUNTS.double(), tau=tau, reduction="none")
    assert loss(z, torch.tensor(y)).tolist() == pytest.approx(each, abs=1e-12)
    assert loss.log_prior.exp().tolist() == pytest.approx([0.8, 0.15, 0.05])
    assert LogitAdjustedLoss(3.5 * COUNTS, tau=tau, reduction="sum")(z, torch.tensor(y)).item() == pytest.approx(
        sum(each)
    )


def test_adjusted_loss_satisfies_the_kit() -> None:
    check_loss(LogitAdjustedLoss(torch.tensor([50, 20, 9, 1])))
    check_loss(lambda z, y, reduction="mean": logit_adjusted_cross_entropy(z, y, torch.zeros(4), 0.5, reduction))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitAdjustedLoss(torch.tensor([3, 0, 1])), "class_counts = 0 for class 1: must be positive"),
        (lambda: LogitAdjustedLoss(torch.tensor([3.0, -1.0])), "class_counts = -1 for class 1"),
        (lambda: LogitAdjustedLoss(torch.tensor([3.0, math.nan])), "class_counts = nan for class 1"),
        (lambda: LogitAdjustedLoss(torch.tensor([3])), r"class_counts = \(1,\)"),
        (lambda: LogitAdjustedLoss(COUNTS, tau=-0.1), r"tau = -0.1: must be a number in \[0, inf\)"),
        (lambda: LogitAdjustedLoss(COUNTS, tau=math.inf), "tau = inf"),
        (lambda: LogitAdjustedLoss(COUNTS, reduction="max"), "reduction = 'max'"),
        (lambda: LogitAdjustedLoss(COUNTS)(torch.zeros(2, 4), torch.tensor([0, 1])), r"logits = .*\(2, 4\)"),
        (lambda: LogitAdjustedLoss(COUNTS)(torch.zeros(2, 3), torch.tensor([0, 3])), r"targets = values in \[0, 3\]"),
        (lambda: LogitAdjustedLoss(COUNTS)(torch.zeros(2, 3), torch.zeros(2, 3)), r"targets = .*\(2, 3\)"),
    ],
)
def test_adjusted_loss_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- averaging --------------------------------------------------------------------------------------------------------
def test_oracle_2_one_model_and_equal_models() -> None:
    z = normal(5, 3)
    assert torch.equal(backdoor_adjust([z]), z)
    torch.testing.assert_close(backdoor_adjust([z], space="probs"), z.log_softmax(1))
    for space in ("logits", "probs"):
        one = backdoor_adjust([z], space=space)
        torch.testing.assert_close(backdoor_adjust([z, z, z], space=space), one)
        torch.testing.assert_close(backdoor_adjust([z, z], weights=[0.9, 0.1], space=space), one)


def test_oracle_3_the_rules_differ() -> None:
    z = torch.tensor([[[4.0, 0.0]], [[0.0, 1.5]], [[0.0, 1.5]]], dtype=torch.float64)
    mean, mixture = backdoor_adjust(z), backdoor_adjust(z, space="probs")
    assert mean[0].tolist() == pytest.approx([1.333333, 1.0], abs=1e-6)
    assert mixture.exp()[0].tolist() == pytest.approx([0.448955, 0.551045], abs=1e-6)
    assert (mean.argmax().item(), mixture.argmax().item()) == (0, 1)


def test_oracle_4_a_constant_per_example_changes_nothing() -> None:
    z = normal(3, 6, 4, scale=3.0)
    moved = torch.stack([z[0] + 10 * normal(6, 1, seed=1), z[1], z[2]])
    assert torch.equal(backdoor_adjust(moved).argmax(1), backdoor_adjust(z).argmax(1))
    torch.testing.assert_close(backdoor_adjust(moved, space="probs"), backdoor_adjust(z, space="probs"))


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0), (0.0, 1.0, 1.0)])
def test_averages_are_their_formulas_one_number_at_a_time(weights: tuple[float, ...] | None) -> None:
    z, shares = normal(3, 4, 5, scale=2.0), weights or (1.0, 1.0, 1.0)
    mean, mixture = backdoor_adjust(z, weights=weights), backdoor_adjust(z, weights=weights, space="probs")
    for n in range(4):
        sums = [sum(math.exp(v) for v in model[n].tolist()) for model in z]
        for c in range(5):
            logits = [w / sum(shares) * model[n, c].item() for w, model in zip(shares, z, strict=True)]
            probs = [w / sum(shares) * math.exp(model[n, c]) / s for w, model, s in zip(shares, z, sums, strict=True)]
            assert mean[n, c].item() == pytest.approx(sum(logits), abs=1e-12)
            assert mixture[n, c].item() == pytest.approx(math.log(sum(probs)), abs=1e-12)


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_averages_have_right_gradients_and_survive_extremes(space: str) -> None:
    z = normal(2, 3, 4).requires_grad_()
    for weights in (None, (0.2, 0.8), (0.0, 1.0)):
        assert torch.autograd.gradcheck(lambda v, w=weights: backdoor_adjust(v, weights=w, space=space), z)
    wild = (1e4 * normal(2, 3, 4).sign()).float().requires_grad_()
    result = backdoor_adjust(wild, space=space)
    (gradient,) = torch.autograd.grad(result.sum(), wild)
    assert torch.isfinite(result).all() and torch.isfinite(gradient).all()
    low = backdoor_adjust(normal(2, 3, 4).to(torch.bfloat16), space=space)
    assert low.dtype == torch.float32
    assert backdoor_adjust(z[:, :0], space=space).shape == (0, 4)
    compiled = torch.compile(lambda v: backdoor_adjust(v, space=space), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), backdoor_adjust(z, space=space))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ([], {}, r"logits = \[\]: must hold at least one tensor"),
        (torch.zeros(0, 2, 3), {}, r"logits = .*\(0, 2, 3\)"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], {}, r"logits = \[\(2, 3\), \(2, 4\)\]"),
        (torch.zeros(2, 3), {}, r"logits = torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), {}, r"logits = torch.int64"),
        (torch.zeros(2, 3, 4), {"weights": [1.0]}, r"weights = \[1.0\]: must be 2 finite numbers"),
        (torch.zeros(2, 3, 4), {"weights": [1.0, -1.0]}, "weights"),
        (torch.zeros(2, 3, 4), {"weights": [0.0, 0.0]}, "not all 0"),
        (torch.zeros(2, 3, 4), {"weights": [1.0, math.nan]}, "weights"),
        (
            torch.zeros(2, 3, 4),
            {"space": "prob"},
            "space = 'prob': must be one of 'logits', 'probs'. Did you mean 'probs'",
        ),
    ],
)
def test_averaging_refuses(logits: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backdoor_adjust(logits, **options)


def test_module_averages_its_models() -> None:
    models = [nn.Linear(4, 3) for _ in range(3)]
    x = normal(5, 4).float()
    for weights, space in ((None, "logits"), ([1.0, 2.0, 1.0], "probs")):
        module = BackdoorAdjustment(models, weights=weights, space=space)
        expected = backdoor_adjust([model(x) for model in models], weights=weights, space=space)
        assert torch.equal(module(x), expected)
    with pytest.raises(ValueError, match="models = "):
        BackdoorAdjustment([])
    with pytest.raises(ValueError, match="weights = "):
        BackdoorAdjustment(models, weights=[1.0])
    with pytest.raises(ValueError, match="space = 'mean'"):
        BackdoorAdjustment(models, space="mean")


# -- the estimate of the prior ----------------------------------------------------------------------------------------
def test_oracle_5_prior_of_four_examples() -> None:
    z = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0.5, 0, 1], [1.5, 0, 0]])
    y = torch.tensor([0, 1, 2, 0])
    found = estimate_label_prior(z, y)
    assert found.prior.dtype == torch.float64 and found.converged and found.iterations < 10
    assert found.prior.tolist() == pytest.approx([0.338744, 0.411636, 0.249619], abs=1e-6)
    assert found.loss == pytest.approx(0.444355, abs=1e-6) and found.prior.sum().item() == pytest.approx(1.0)
    weights = torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6], dtype=torch.float64)
    mean = weights @ (z.double() - found.prior.log()).softmax(1)
    assert mean.tolist() == pytest.approx([1 / 3] * 3, abs=1e-8)


@pytest.mark.parametrize("d", [-3.0, 0.0, 1.5, 1000.0])
def test_oracle_6_equal_logits(d: float) -> None:
    found = estimate_label_prior(torch.tensor([[d, 0.0]]).repeat(5, 1), torch.tensor([0, 1, 1, 1, 0]))
    assert found.converged
    torch.testing.assert_close(found.prior, torch.tensor([d, 0.0], dtype=torch.float64).softmax(0))
    if d == 1.5:
        assert found.prior[0].item() == pytest.approx(0.817574, abs=1e-6)


def test_oracle_7_consistency_and_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(10_000) % 4
    means = 1.5 * normal(4, 3, seed=1)
    x = means[y] + torch.randn(len(y), 3, generator=generator, dtype=torch.float64)
    calibrated = -0.5 * (x[:, None] - means).square().sum(2)  # log-likelihoods: the logits of balanced classes
    r = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    found = estimate_label_prior(calibrated + r.log(), y)
    torch.testing.assert_close(found.prior, r, atol=0.02, rtol=0)
    u = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    moved = estimate_label_prior(calibrated + r.log() + u, y)
    torch.testing.assert_close(moved.prior, (found.prior.log() + u).softmax(0))


def optimum(z: Tensor, y: Tensor, balanced: bool) -> tuple[Tensor, float]:
    """By scipy's L-BFGS, with gradients."""
    counts = torch.bincount(y, minlength=z.shape[1])
    v = (1 / (z.shape[1] * counts))[y] if balanced else torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    v = v.double()

    def objective(b: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(b, requires_grad=True)
        loss = v @ F.cross_entropy(z - leaf, y, reduction="none")
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), gradient.numpy()

    found = minimize(
        objective, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-15}
    )
    return torch.tensor(found.x).softmax(0), found.fun


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("scale", [0.5, 3.0, 20.0])
def test_prior_is_the_optimum_of_another_solver(scale: float, balanced: bool) -> None:
    z, y = normal(200, 6, scale=scale) + normal(6, seed=2), torch.cat([torch.arange(6), torch.arange(194) % 4])
    found = estimate_label_prior(z, y, class_balanced=balanced)
    prior, loss = optimum(z, y, balanced)
    assert found.converged and found.loss <= loss + 1e-12
    torch.testing.assert_close(found.prior, prior, atol=2e-5, rtol=0)


def test_prior_of_many_classes_by_conjugate_gradients() -> None:
    classes = 1_100  # above which the Hessian is never formed
    y = torch.arange(classes + 200) % classes
    z = 2 * normal(len(y), classes) + 3 * F.one_hot(y, classes)
    z += 1.5 * normal(classes, seed=3)
    found = estimate_label_prior(z, y)
    mean = (z - found.prior.log()).softmax(1) / torch.bincount(y)[y][:, None] / classes
    assert found.converged and found.iterations < 15
    torch.testing.assert_close(mean.sum(0), torch.full((classes,), 1 / classes, dtype=torch.float64), atol=1e-9, rtol=0)


def test_prior_stops_at_max_iter_and_never_goes_up() -> None:
    z, y = normal(60, 5, scale=4.0), torch.arange(60) % 5
    losses = [estimate_label_prior(z, y, max_iter=steps).loss for steps in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[1]
    stopped = estimate_label_prior(z, y, max_iter=1)
    assert stopped.iterations == 1 and not stopped.converged
    assert estimate_label_prior(z, y, max_iter=0).prior.tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_prior_of_extreme_logits_is_finite(scale: float) -> None:
    found = estimate_label_prior(normal(40, 3, scale=scale), torch.arange(40) % 3)
    assert torch.isfinite(found.prior).all() and math.isfinite(found.loss)


@pytest.mark.parametrize(
    ("z", "y", "options", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 1, 3]), {}, "targets hold no example of class 2"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), {}, "targets hold no example of class 0, 1"),
        (torch.full((2, 2), math.nan), torch.tensor([0, 1]), {}, "logits = NaN or infinite values"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), {}, "targets = values in"),
        (torch.zeros(2), torch.tensor([0, 1]), {}, r"logits = torch.float32 \(2,\)"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), {"max_iter": -1}, "max_iter = -1"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), {"tol": 0.0}, "tol = 0.0"),
    ],
)
def test_prior_refuses(z: Tensor, y: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_label_prior(z, y, **options)


# -- groups -----------------------------------------------------------------------------------------------------------
def test_groups_by_count_and_by_prior() -> None:
    assert imbalance_groups(torch.tensor([300, 101, 100, 20, 19, 0])).tolist() == [0, 0, 1, 1, 2, 2]
    assert imbalance_groups(torch.tensor([5.0, 4.0, 3.0]), many=4, few=4).tolist() == [0, 1, 2]
    assert prior_groups(torch.tensor([0.1, 0.4, 0.2, 0.05, 0.15, 0.1])).tolist() == [1, 0, 0, 2, 1, 2]
    assert torch.bincount(prior_groups(torch.rand(10))).tolist() == [4, 3, 3]


def test_group_recall_one_class_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    y, predicted = (torch.randint(0, 7, (90,), generator=generator) for _ in range(2))
    y = torch.where(y == 6, 5, y)  # class 6 has no test example
    data, parameters = torch.tensor([0, 0, 1, 2, 2, 2, 1]), torch.tensor([0, 0, 2, 1, 1, 2, 1])
    found = group_recall(predicted, y, data, parameters)
    assert found.shape == (3, 3) and found.dtype == torch.float64
    for i in range(3):
        for j in range(3):
            recalls = [
                sum(int(p == c) for p, t in zip(predicted.tolist(), y.tolist(), strict=True) if t == c)
                / y.tolist().count(c)
                for c in range(6)
                if data[c] == i and parameters[c] == j
            ]
            expected = sum(recalls) / len(recalls) if recalls else math.nan
            assert found[i, j].item() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found[1, 1].item())  # only class 6 is there


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imbalance_groups(COUNTS, many=10, few=20), r"many, few = \(10, 20\): must satisfy many >= few"),
        (lambda: imbalance_groups(torch.tensor([1, -1])), "counts = "),
        (lambda: imbalance_groups(torch.tensor([1.0, math.nan])), "counts = "),
        (lambda: imbalance_groups(torch.ones(2, 2)), "counts = "),
        (lambda: group_recall(COUNTS * 0, COUNTS * 0, COUNTS * 0 + 3, COUNTS * 0), r"data_groups = \[3, 3, 3\]"),
        (lambda: group_recall(COUNTS * 0, COUNTS * 0, COUNTS * 0, COUNTS[:2] * 0), "parameter_groups"),
        (lambda: group_recall(COUNTS * 0.0, COUNTS * 0, COUNTS * 0, COUNTS * 0), "predictions = torch.float32"),
        (lambda: group_recall(COUNTS[:2], COUNTS * 0, COUNTS * 0, COUNTS * 0), "predictions = "),
        (lambda: group_recall(COUNTS, COUNTS, COUNTS * 0, COUNTS * 0), "targets = values in"),
    ],
)
def test_groups_refuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- the cosine head --------------------------------------------------------------------------------------------------
def test_oracle_8_cosine_head() -> None:
    head = CosineClassifier(5, 3).double()
    x = normal(7, 5)
    logits = head(x)
    assert logits.abs().max() <= 25.0 and head.weight.shape == (3, 5)
    expected = [[25 * F.cosine_similarity(row, w, dim=0).item() for w in head.weight.detach()] for row in x]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(head(x * torch.linspace(0.01, 1e5, 7, dtype=torch.float64)[:, None]), logits)
        head.weight.mul_(torch.tensor([[1e-4], [3.0], [1e4]]))
        torch.testing.assert_close(head(x), logits)


def test_stacked_heads_are_the_heads_one_by_one() -> None:
    x, w = normal(3, 6, 4), normal(3, 5, 4, seed=1)
    torch.testing.assert_close(
        cosine_logits(x, w), torch.stack([cosine_logits(a, b) for a, b in zip(x, w, strict=True)])
    )
    torch.testing.assert_close(cosine_logits(x[0], w)[2], cosine_logits(x[0], w[2]))


def test_cosine_head_satisfies_the_kit_and_stays_in_float32() -> None:
    def make() -> CosineClassifier:
        torch.manual_seed(0)
        return CosineClassifier(6, 4)

    check_layer(make, shape=(4,), skip={"dtype": "logits of half-precision features are float32"})
    head, x = make(), normal(5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), make()(x)) and head(x).dtype == torch.float32
    assert torch.equal(head(x.bfloat16()), head(x.bfloat16().float()))
    compiled = torch.compile(cosine_logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, head.weight), head(x))


def test_features_of_zero_norm_give_logits_and_gradients_of_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    logits = cosine_logits(x, w)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0], [15, 0]]))
    assert x.grad is not None and w.grad is not None
    assert x.grad[0].tolist() == [0, 0] and w.grad[1].tolist() == [0, 0] and torch.isfinite(w.grad).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "in_features = 0"),
        ((3, 0), "num_classes = 0"),
        ((3, 2, 0.0), "scale = 0.0"),
        ((3, 2, -1), "scale = -1"),
    ],
)
def test_cosine_head_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineClassifier(*arguments[:2], **({"scale": arguments[2]} if len(arguments) > 2 else {}))


# -- frozen backbones and adapters ------------------------------------------------------------------------------------
def backbone(seed: int = 0, width: int = 8, norm: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(width), nn.Dropout(0.5)] if norm else []
        return nn.Sequential(nn.Linear(6, width), *middle, nn.ReLU())


def data(n: int = 60, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    y[:3] = torch.arange(3)
    return Examples(torch.randn(n, 6, generator=generator) + 2 * F.one_hot(y, 6), y)


def test_frozen_backbone_stays_frozen_and_in_evaluation_mode() -> None:
    frozen = FrozenBackbone(backbone())
    outer = nn.Sequential(frozen, nn.Linear(8, 3))
    outer.train()
    assert not any(module.training for module in frozen.modules()) and outer[1].training
    assert not any(p.requires_grad for p in frozen.parameters())
    x = torch.randn(4, 6)
    assert not frozen(x).requires_grad and torch.equal(frozen(x), frozen(x))
    with pytest.raises(ArgumentError, match=r"backbone output = \(4, 6, 1\): must be features \(N, D\)"):
        FrozenBackbone(nn.Unflatten(1, (6, 1)))(x)
    with pytest.raises(ArgumentError, match="backbone output = Output"):
        FrozenBackbone(Wrapped())(x)


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Output:
        return Output(x)


def test_adapter_starts_as_the_identity_and_the_head_at_the_class_means() -> None:
    examples = data()
    frozen = FrozenBackbone(backbone())
    features = frozen(examples.inputs)
    state = torch.get_rng_state()
    model = adapted(frozen, features, examples.targets, 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.forward_features(examples.inputs), features)
    for c in range(3):
        mean = features[examples.targets == c].mean(0)
        torch.testing.assert_close(model.head.weight[c], mean / mean.norm())
    torch.testing.assert_close(model(examples.inputs), cosine_logits(features, model.head.weight))
    assert model.get_classifier() is model.head
    without = AdaptedClassifier(frozen, 8, 3, adapter=0)
    assert without.adapter is None and sum(p.numel() for p in without.parameters() if p.requires_grad) == 24


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.ones(3, 4), torch.tensor([0, 1, 1]), "mean over class 2 is zero or not finite"),
        (torch.tensor([[0.0, 0], [1, 2], [3, 4]]), torch.tensor([0, 1, 2]), "mean over class 0"),
        (torch.tensor([[math.nan, 0], [1, 2], [3, 4]]), torch.tensor([0, 1, 2]), "mean over class 0"),
    ],
)
def test_class_means_that_are_no_directions_are_refused(features: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        AdaptedClassifier(nn.Identity(), features.shape[1], 3).start_from(features, targets)


# -- the method in a run ----------------------------------------------------------------------------------------------
BACKBONES = (1, 2, 3)


def train(method: Method, *others: Method, model: nn.Module | None = None, **options: Any) -> Run:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    settings = {"epochs": 3, "batch_size": 16, "optimizer": optimizer, "validation": data(30, 1), **options}
    return equipoise.fit(model or nn.Linear(6, 3), settings.pop("data", data()), methods=[*others, method], **settings)


def make(cls: type[BackdoorAdjustmentMethod] = BackdoorAdjustmentMethod, **settings: Any) -> BackdoorAdjustmentMethod:
    return cls(backbones=[backbone(seed, 6 + seed) for seed in BACKBONES], adapter=4, **settings)


class Idle(Method):
    """Changes nothing, but might: with it, features are not kept."""

    name = "idle"

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        return batch


def test_every_model_is_trained_as_if_alone() -> None:
    run = train(make(tau=0.7), Idle())
    assert isinstance(run.model, BackdoorAdjustment) and run.model is run.inference_model
    members: Any = run.model.models
    for number, (member, seed) in enumerate(zip(members, BACKBONES, strict=True)):
        examples, frozen = data(), FrozenBackbone(backbone(seed, 6 + seed))
        features = frozen(examples.inputs)
        plain = adapted(frozen, features, examples.targets, 3, seed=1_000_003 * number, adapter=4)
        alone = train(LogitAdjustment(tau=0.7), model=plain).model
        for one, other in zip(member.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_loss_is_the_mean_and_its_gradients_those_of_every_model() -> None:
    method = make()
    run = equipoise.start(nn.Linear(6, 3), lambda p: torch.optim.SGD(p, lr=0.1), methods=[method], data=data())
    batch = data().take(torch.arange(20))
    loss = run.training_loss(batch)
    run.backward(loss)
    counts = torch.bincount(data().targets)
    each = []
    for model in method.joint.adjusted.models:
        alone = copy.deepcopy(model)
        alone.zero_grad()
        own = LogitAdjustedLoss(counts)(alone(batch.inputs), batch.targets)
        own.backward()
        each.append(own.item())
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (not p.requires_grad)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
    assert loss.item() == pytest.approx(sum(each) / 3, abs=1e-5)


def test_kept_features_change_nothing() -> None:
    one, two = train(make()).model, train(make(), Idle()).model
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_features_are_kept_where_nothing_can_change_the_inputs() -> None:
    def kept(*others: Method, **options: Any) -> list[Tensor]:
        method = make()
        given = {"data": data(), "batch_size": 16, **options}
        run = equipoise.start(nn.Linear(6, 3), lambda p: torch.optim.SGD(p, lr=0.1), methods=[method, *others], **given)
        found = method.joint.kept
        run.finish()
        assert not method.joint.kept  # memory that a finished run needs no more
        return found

    assert [tuple(table.shape) for table in kept()] == [(60, 7), (60, 8), (60, 9)]
    assert not kept(Idle()) and not kept(data=Listed(data())) and not kept(augment=lambda inputs, generator: inputs)


class Listed(torch.utils.data.Dataset[Any]):
    """A data set whose items are made when they are asked for."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.targets = examples, examples.targets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        return self.examples.inputs[i], int(self.targets[i])  # type: ignore[index]


def test_backbones_are_untouched_by_gradients_weight_decay_and_statistics() -> None:
    method = make()
    before = [copy.deepcopy(b.state_dict()) for b in method.backbones]
    run = train(method, Idle())
    for b, old in zip(method.backbones, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in b.state_dict().items())
    trained = {id(p) for p in run.trainable_parameters()}
    assert not trained & {id(p) for b in method.backbones for p in b.parameters()} and len(trained) == 3 * 5


def test_backbones_are_those_of_the_model_where_it_has_them() -> None:
    model: Any = nn.Linear(6, 3)
    model.backbones = tuple(backbone(seed) for seed in (1, 2))
    found: Any = train(BackdoorAdjustmentMethod(), model=model).model
    assert [m.backbone.model for m in found.models] == list(model.backbones)
    network = nn.Sequential(backbone(4), nn.Linear(8, 3))
    single: Any = train(BackdoorAdjustmentMethod(), model=network).model
    assert len(single.models) == 1 and single.models[0].head.weight.shape == (3, 8)
    torch.testing.assert_close(single.models[0].backbone(data().inputs), backbone(4).eval()(data().inputs))
    bare: Any = train(BackdoorAdjustmentMethod(), model=nn.Linear(6, 3)).model
    assert isinstance(bare.models[0].backbone.model, nn.Identity)


def test_controls() -> None:
    tau_0 = train(make(BackdoorAdjustmentMethod, tau=0.0)).model
    ce = train(make(CrossEntropyEnsemble)).model
    for p, q in zip(tau_0.parameters(), ce.parameters(), strict=True):
        assert torch.equal(p, q)
    same: Any = train(make(SamePretrainingEnsemble, members=2)).model
    assert len(same.models) == 2 and same.models[0].backbone.model is same.models[1].backbone.model
    assert not torch.equal(same.models[0].adapter[0].weight, same.models[1].adapter[0].weight)
    model: Any = nn.Linear(6, 3)
    model.backbones, model.replicas = (backbone(1),), (backbone(1), backbone(2))
    replicas: Any = train(SamePretrainingEnsemble(members=3), model=model).model
    assert [m.backbone.model for m in replicas.models] == [*model.replicas, model.replicas[0]]


def test_best_pretraining_is_the_best_on_validation_data() -> None:
    method = make(BestPretraining)
    seen: list[Any] = []
    run = train(method, on_epoch_end=lambda run: seen.append(run.inference_model))
    members = list(method.joint.adjusted.models)
    scores = [equipoise.training.metrics.balanced_accuracy(*run.predict(data(30, 1), m)) for m in members]
    assert run.model is members[scores.index(max(scores))] and all(model in members for model in seen)
    with pytest.raises(ArgumentError, match="validation = None: must be given: best-pretraining chooses"):
        train(make(BestPretraining), validation=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": -1}, "adapter = -1"),
        ({"tau": -1.0}, "tau = -1.0"),
        ({"tau": math.inf}, "tau = inf"),
        ({"space": "mean"}, "space = 'mean'"),
        ({"backbones": nn.Linear(2, 2)}, "backbones: must be a sequence"),
        ({"backbones": ["clip"]}, "backbones: must be a sequence"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackdoorAdjustmentMethod(**settings)
    with pytest.raises(ValueError, match="members = 0"):
        SamePretrainingEnsemble(members=0)


def test_bad_data_is_refused_before_training() -> None:
    gap = Examples(torch.randn(8, 6), torch.tensor([0, 2] * 4))
    with pytest.raises(DataError, match="targets hold no example of class 1: backdoor-adjustment needs"):
        train(make(), data=gap)
    with pytest.raises(ArgumentError, match="data = without classes"):
        train(make(), data=(torch.randn(8, 6), torch.randn(8, 3)), loss=F.mse_loss, validation=None)
    dead = nn.Sequential(nn.Linear(6, 4), nn.Threshold(1e9, 0.0))
    with pytest.raises(DataError, match="mean over class 0, 1, 2 is zero"):
        train(BackdoorAdjustmentMethod([dead]))
    with pytest.raises(MethodConflictError, match="needy works on the features of one model"):
        train(make(), Needy())


class Needy(Method):
    """Needs features."""

    name = "needy"
    needs_features = True


@pytest.mark.parametrize(
    "cls", [BackdoorAdjustmentMethod, SamePretrainingEnsemble, CrossEntropyEnsemble, BestPretraining]
)
def test_conformance(cls: type[Method]) -> None:
    check_method(cls, compile=cls is BackdoorAdjustmentMethod)


def test_conformance_of_heads_alone_and_probabilities() -> None:
    check_method(BackdoorAdjustmentMethod, settings={"space": "probs", "adapter": 0})
