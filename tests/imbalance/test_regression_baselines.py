"""L1, MSE, LDS, FDS and Balanced MSE: hand-computed numbers, loops in plain Python, runs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.imbalance.regression_baselines import (
    FDS,
    L1,
    LDS,
    MSE,
    BalancedMSE,
    BalancedMSELoss,
    FeatureSmoothing,
    LabelDensity,
    balanced_mse_loss,
    calibration,
    label_bins,
    smooth,
    smoothing_kernel,
    weighted_l1_loss,
)
from equipoise.testing import check_loss, check_method, check_regularizer, regression, spawn

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- losses -----------------------------------------------------------------------------------------------------------
def test_weighted_l1_by_hand() -> None:
    prediction, targets, weights = (
        torch.tensor([[1.0], [5.0], [2.0]]),
        torch.tensor([2.0, 2.0, 2.5]),
        torch.tensor([1.0, 2, 4]),
    )
    assert weighted_l1_loss(prediction, targets, weights, "none").tolist() == [1.0, 6.0, 2.0]
    assert weighted_l1_loss(prediction, targets, weights).item() == 3.0
    assert weighted_l1_loss(prediction, targets).item() == F.l1_loss(prediction[:, 0], targets).item() == 1.5
    vectors = draw(4, 3), draw(4, 3, seed=1)
    torch.testing.assert_close(weighted_l1_loss(*vectors), F.l1_loss(*vectors))


def test_balanced_mse_by_hand() -> None:
    # s^2 = 1/2: the loss is -log(exp(-(p_i - y_i)^2) / sum_j exp(-(p_i - y_j)^2)).
    prediction, targets = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    each = balanced_mse_loss(prediction, targets, 0.5**0.5, "none")
    assert each.tolist() == pytest.approx([math.log(1 + math.exp(-4)), math.log(2)])
    assert balanced_mse_loss(prediction, targets, 0.5**0.5).item() == pytest.approx(sum(each.tolist()) / 2)


@pytest.mark.parametrize("values", [1, 3])
def test_balanced_mse_against_a_loop(values: int) -> None:
    p, y, s = draw(7, values), draw(7, values, seed=1), 0.8
    expected = []
    for i in range(7):
        density = [math.exp(-((p[i] - y[j]) ** 2).sum().item() / (2 * s**2)) for j in range(7)]
        expected.append(-2 * s**2 * math.log(density[i] / sum(density)))
    assert balanced_mse_loss(p, y, s, "none").tolist() == pytest.approx(expected, abs=1e-12)
    assert balanced_mse_loss(p, y, s, "sum").item() == pytest.approx(sum(expected))
    assert BalancedMSELoss(s, learn=False)(p, y).item() == pytest.approx(sum(expected) / 7)


def test_balanced_mse_is_unmoved_by_shifts_and_follows_the_unit() -> None:
    p, y = draw(7, 1), draw(7, 1, seed=1)
    torch.testing.assert_close(balanced_mse_loss(p + 9, y + 9, 0.8), balanced_mse_loss(p, y, 0.8))
    torch.testing.assert_close(balanced_mse_loss(5 * p, 5 * y, 4.0), 25 * balanced_mse_loss(p, y, 0.8))


def test_balanced_mse_pulls_rare_labels_harder() -> None:
    # Nine equal labels and a rare one, both predicted half way: the gradient on the rare one is nine times as large.
    y = torch.tensor([0.0] * 9 + [2.0], dtype=torch.float64)
    p = torch.ones(10, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(balanced_mse_loss(p, y, 1.0, "sum"), p)
    assert gradient[9].item() == pytest.approx(-9 * gradient[0].item())
    assert gradient[0] > 0


def test_the_noise_gets_its_gradient_from_the_likelihood_only() -> None:
    p, y = draw(6, 1), draw(6, 1, seed=1)
    noise = torch.tensor(0.8, dtype=torch.float64).requires_grad_()
    (got,) = torch.autograd.grad(balanced_mse_loss(p, y, noise), noise)
    squares = (p - y.T).square()
    likelihood = lambda s: F.cross_entropy(-squares / (2 * s.square()), torch.arange(6))  # noqa: E731
    (expected,) = torch.autograd.grad(likelihood(noise), noise)
    torch.testing.assert_close(got, 2 * 0.8**2 * expected)
    assert torch.autograd.gradcheck(lambda s: balanced_mse_loss(p, y, s) / (2 * s.detach().square()), noise)


def test_loss_kit() -> None:
    pair = lambda g: (torch.randn(6, 1, generator=g), torch.randn(6, generator=g))  # noqa: E731
    check_loss(weighted_l1_loss, lambda g: (*pair(g), torch.rand(6, generator=g)))
    check_loss(balanced_mse_loss, pair)
    check_regularizer(BalancedMSELoss(0.7), pair)


def test_half_precision_and_extremes_stay_finite() -> None:
    p, y = torch.tensor([1e4, -1e4, 0], dtype=torch.float16), torch.tensor([-1e4, 1e4, 0], dtype=torch.float16)
    leaf = p.requires_grad_()
    for loss in (weighted_l1_loss(leaf, y), balanced_mse_loss(leaf, y, 1e-3), balanced_mse_loss(leaf, y, 1e6)):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_losses_compile() -> None:
    p, y, w = draw(6, 1), draw(6, seed=1), draw(6, seed=2).abs()
    for function in (lambda: weighted_l1_loss(p, y, w), lambda: balanced_mse_loss(p, y, 0.8)):
        torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(), function())


# -- label distribution smoothing -------------------------------------------------------------------------------------
def test_kernel_and_smoothing() -> None:
    weights = [math.exp(-(i**2) / 8) for i in (-2, -1, 0, 1, 2)]
    assert smoothing_kernel().tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert smoothing_kernel(1, 3.0).tolist() == [1.0]
    rows, kernel = draw(6, 2), smoothing_kernel(5, 1.0)
    for b in range(6):
        expected = sum(kernel[k] * rows[b + k - 2] for k in range(5) if 0 <= b + k - 2 < 6)
        torch.testing.assert_close(smooth(rows, kernel)[b], expected)


def test_bins_are_counted_from_zero() -> None:
    labels = torch.tensor([0.0, 0.9, 1.0, 2.5, -0.1, 17.0])
    assert label_bins(labels, 1.0).tolist() == [0, 0, 1, 2, -1, 17]
    assert label_bins(labels[:, None], 2.0).tolist() == [0, 0, 0, 1, -1, 8]
    assert label_bins(torch.tensor([18, 19, 90]), 1.0).tolist() == [18, 19, 90]


def test_label_density_by_hand() -> None:
    # Bins 3, 4, 5, 6 hold 4, 1, 0, 1 labels; with the kernel (1, 2, 1) / 4 the density is (9, 6, 2, 2) / 4.
    labels = torch.tensor([3.0, 3.2, 3.4, 3.6, 4.5, 6.0])
    third = math.sqrt(1 / (2 * math.log(2)))  # exp(-1 / (2 sigma^2)) = 1/2
    part = LabelDensity(labels, 1.0, power=1.0, kernel_size=3, sigma=third)
    inverse = [1 / 9, 1 / 6, 1 / 2, 1 / 2]
    mean = (4 * inverse[0] + inverse[1] + inverse[3]) / 6
    assert part.weights.tolist() == pytest.approx([w / mean for w in inverse])
    assert part(labels).mean().item() == pytest.approx(1.0)
    assert part(torch.tensor([[-7.0], [3.9], [5.5], [99.0]])).tolist() == pytest.approx(
        [part.weights[i].item() for i in (0, 0, 2, 3)]
    )
    root = LabelDensity(labels, 1.0, power=0.5, kernel_size=3, sigma=third)
    ratio = (part.weights / part.weights[0]).sqrt()
    torch.testing.assert_close(root.weights / root.weights[0], ratio)
    assert torch.equal(LabelDensity(labels, 1.0, power=0.0).weights, torch.ones(4))


def test_empty_bins_far_from_all_labels_have_the_rarest_weight() -> None:
    part = LabelDensity(torch.tensor([0.0, 0.0, 0.0, 50.0]), 1.0)
    assert len(part.weights) == 51 and torch.isfinite(part.weights).all()
    assert part.weights[25] == part.weights[50] == part.weights.max()


# -- feature distribution smoothing -----------------------------------------------------------------------------------
def test_calibration_by_hand() -> None:
    half = math.sqrt(1 / (2 * math.log(2)))
    kernel = smoothing_kernel(3, half)  # (1, 2, 1) / 4
    mean = torch.tensor([[0.0], [3.0], [100.0]], dtype=torch.float64)
    variance = torch.tensor([[1.0], [4.0], [100.0]], dtype=torch.float64)
    seen = torch.tensor([True, True, False])
    # Smoothed: bin 0 (2 * 0 + 3) / 3 = 1 and (2 + 4) / 3 = 2; bin 1 (0 + 6) / 3 = 2 and (1 + 8) / 3 = 3; bin 2 never seen.
    scale, offset = calibration(mean, variance, seen, kernel)
    assert scale[:, 0].tolist() == pytest.approx([math.sqrt(2), math.sqrt(3 / 4), 1.0])
    assert offset[:, 0].tolist() == pytest.approx([1.0, 2 - 3 * math.sqrt(3 / 4), 0.0])


def test_calibration_gives_the_statistics_of_the_neighbourhood() -> None:
    kernel, seen = smoothing_kernel(3, 1.0), torch.ones(3, dtype=torch.bool)
    groups = [draw(50, 2, seed=b) * (1 + 0.3 * b) + b for b in range(3)]
    mean, variance = torch.stack([g.mean(0) for g in groups]), torch.stack([g.var(0) for g in groups])
    scale, offset = calibration(mean, variance, seen, kernel)
    moved = scale[1] * groups[1] + offset[1]
    torch.testing.assert_close(moved.mean(0), kernel @ mean)
    torch.testing.assert_close(moved.var(0), kernel @ variance)


def test_calibration_of_constant_and_extreme_variances() -> None:
    mean, seen = torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)
    variance = torch.tensor([[0.0], [1.0], [1e6]])
    scale, _ = calibration(mean, variance, seen, smoothing_kernel(3, 1.0))
    assert scale[0] == 1 and scale[1].item() == pytest.approx(10**0.5)
    assert torch.isfinite(scale).all()
    nothing = calibration(mean, variance, torch.zeros(3, dtype=torch.bool), smoothing_kernel(3, 1.0))
    assert torch.equal(nothing[0], torch.ones(3, 1)) and torch.equal(nothing[1], mean)


def test_statistics_against_a_loop() -> None:
    labels = torch.tensor([0.5, 1.5, 1.2, 3.3, 0.1, 1.9, 1.0, 0.4])
    part = FeatureSmoothing(labels, 1.0, 3, momentum=0.7, kernel_size=3).double()
    running: dict[int, tuple[Tensor, Tensor]] = {}
    for epoch in range(3):
        features = draw(8, 3, seed=epoch)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(epoch))
        left_out = order[0] if epoch < 2 else None  # not every example in every epoch
        for rows in order[1 if epoch < 2 else 0 :].split(3):
            part(features[rows], labels[rows])
        for b in (0, 1, 3):
            chosen = [i for i in range(8) if int(labels[i]) == b and i != left_out]
            if not chosen:
                continue
            mean = sum(features[i] for i in chosen) / len(chosen)
            spread = sum((features[i] - mean) ** 2 for i in chosen) / max(len(chosen) - 1, 1)
            old = running.get(b)
            running[b] = (mean, spread) if old is None else (0.7 * old[0] + 0.3 * mean, 0.7 * old[1] + 0.3 * spread)
        part.end_epoch()
        assert part.count.sum() == 0
        assert part.seen.tolist() == [b in running for b in range(4)]
        for b, (mean, spread) in running.items():
            torch.testing.assert_close(part.mean[b], mean)
            torch.testing.assert_close(part.variance[b], spread)
    scale, offset = calibration(part.mean, part.variance, part.seen, smoothing_kernel(3, 2.0))
    features, bins = draw(8, 3, seed=9), labels.long()
    torch.testing.assert_close(part(features, labels), scale[bins] * features + offset[bins])


def test_only_training_remembers_and_calibrates() -> None:
    labels, features = torch.tensor([0.5, 1.5, 1.2, 3.3]), draw(4, 2).float()
    part = FeatureSmoothing(labels, 1.0, 2)
    assert torch.equal(part(features, labels), features)  # nothing is known in the first epoch
    part.end_epoch()
    assert not torch.equal(part(features, labels), features)
    before = copy.deepcopy(part.state_dict())
    part.enabled = False
    assert part(features, labels) is features
    assert part.count.sum() == 2 * 4
    part.eval()
    part.enabled = True
    assert part(features, labels) is features
    assert part.count.sum() == 2 * 4 and before["mean"].equal(part.mean)
    assert part.train()(features.bfloat16(), labels).dtype == torch.bfloat16


def test_gradients_flow_through_features_only() -> None:
    labels, features = torch.tensor([0.5, 1.5, 1.2, 3.3]), draw(4, 2).requires_grad_()
    part = FeatureSmoothing(labels, 1.0, 2).double()
    part(features, labels)
    part.end_epoch()
    (gradient,) = torch.autograd.grad(part(features, labels).sum(), features)
    torch.testing.assert_close(gradient, part.scale[labels.long()])


# -- bad input --------------------------------------------------------------------------------------------------------
LABELS = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighted_l1_loss(torch.zeros(3, 2), LABELS), r"prediction = torch.float32 \(3, 2\), targets = \(3,\)"),
        (lambda: weighted_l1_loss(torch.zeros(2), LABELS), r"must be values of the same examples"),
        (lambda: weighted_l1_loss(torch.zeros(3).long(), LABELS), r"prediction = torch.int64"),
        (lambda: weighted_l1_loss(LABELS, LABELS, torch.ones(2)), r"weights has shape \(2,\): must be \(3,\)"),
        (lambda: weighted_l1_loss(LABELS, LABELS, reduction="avg"), "reduction = 'avg'"),
        (lambda: balanced_mse_loss(LABELS, LABELS, 0.0), r"noise = 0.0: must be a number in \(0, inf\)"),
        (lambda: balanced_mse_loss(LABELS, LABELS, reduction="avg"), "reduction = 'avg'"),
        (lambda: BalancedMSELoss(-1.0), "noise = -1.0"),
        (lambda: smoothing_kernel(4), "kernel_size = 4: must be odd"),
        (lambda: smoothing_kernel(5, 0.0), "sigma = 0.0"),
        (lambda: label_bins(torch.zeros(3, 2), 1.0), r"targets has shape \(3, 2\).*one value per example"),
        (lambda: LabelDensity(LABELS, 0.0), "bin_width = 0.0"),
        (lambda: LabelDensity(LABELS, 1e-5), r"bin_width = 1e-05: must be at least 0.0002: it gives 200000 bins"),
        (lambda: LabelDensity(torch.tensor([1.0, math.nan]), 1.0), "targets holds no label, or NaN"),
        (lambda: LabelDensity(LABELS[:0], 1.0), "targets holds no label"),
        (lambda: LabelDensity(LABELS, 1.0, power=-1.0), "power = -1.0"),
        (lambda: FeatureSmoothing(LABELS, 1.0, 0), "num_features = 0"),
        (lambda: FeatureSmoothing(LABELS, 1.0, 4, momentum=1.0), r"momentum = 1.0: must be a number in \[0, 1\)"),
        (
            lambda: FeatureSmoothing(LABELS, 1.0, 4)(torch.zeros(3, 5), LABELS),
            r"features has shape \(3, 5\) for 3 labels",
        ),
        (
            lambda: FeatureSmoothing(LABELS, 1.0, 4)(torch.zeros(2, 4), LABELS),
            r"features has shape \(2, 4\) for 3 labels",
        ),
        (lambda: FDS(start=0), "start = 0: must be an integer >= 1"),
        (lambda: FDS(kernel_size=2), "kernel_size = 2: must be odd"),
        (lambda: LDS(bin_width=-1.0), "bin_width = -1.0"),
        (lambda: BalancedMSE(noise=0.0), "noise = 0.0"),
        (lambda: BalancedMSE(learn="yes"), "learn = 'yes'"),  # type: ignore[arg-type]
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- the methods in a run ---------------------------------------------------------------------------------------------
PROBLEM = replace(regression(), loss=F.l1_loss)
COUPLED = {"accumulation": "the sum runs over the labels of each micro-batch"}


@pytest.mark.parametrize(
    ("method", "settings", "skip"),
    [
        (L1, {}, {}),
        (MSE, {}, {}),
        (LDS, {"bin_width": 0.5}, {}),
        (FDS, {"bin_width": 0.5}, {}),
        (BalancedMSE, {}, COUPLED),
        (BalancedMSE, {"learn": False}, COUPLED),
    ],
)
def test_method_kit(method: Any, settings: dict[str, Any], skip: dict[str, str]) -> None:
    check_method(method, problem=PROBLEM, settings=settings, skip=skip)


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    def work() -> Any:
        from accelerate import PartialState

        rank = PartialState(cpu=True).process_index
        rows = slice(0, 3) if rank == 0 else slice(3, 8)  # uneven shares
        p, y = draw(8, 1).requires_grad_(), draw(8, seed=1)
        loss = BalancedMSELoss(0.8)(p[rows], y[rows])
        loss.backward()
        smoothing = FeatureSmoothing(y, 0.5, 1).double()
        smoothing(p.detach()[rows], y[rows])
        smoothing.end_epoch()
        yield [loss.detach(), p.grad[rows] / 2, smoothing.mean, smoothing.variance]

    ranks = [values[0] for values in spawn(work)]
    p, y = draw(8, 1).requires_grad_(), draw(8, seed=1)
    loss = BalancedMSELoss(0.8)(p, y)
    loss.backward()
    smoothing = FeatureSmoothing(y, 0.5, 1).double()
    smoothing(p.detach(), y)
    smoothing.end_epoch()
    torch.testing.assert_close(torch.cat([values[1] for values in ranks]), p.grad)
    for values in ranks:
        torch.testing.assert_close(values[0], loss.detach())
        torch.testing.assert_close(values[2:], [smoothing.mean, smoothing.variance])


def examples(n: int = 44) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(n, 5, generator=generator)
    return equipoise.Examples(inputs, inputs[:, 0].exp() * 2)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def train(*methods: Any, loss: Any = weighted_l1_loss, **options: Any) -> equipoise.Run:
    return equipoise.fit(network(), examples(), epochs=3, batch_size=20, methods=methods, loss=loss, **options)


def same(first: equipoise.Run, second: equipoise.Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_methods_replace_the_loss() -> None:
    square = lambda p, y: F.mse_loss(p[:, 0], y)  # noqa: E731
    plain, squared = train(), train(loss=square)
    assert same(train(L1(), loss=square), plain)
    assert same(train(MSE()), squared) and not same(plain, squared)
    density = LabelDensity(examples().targets, 0.5, power=0.7, sigma=1.0)
    weighted = train(loss=lambda p, y: weighted_l1_loss(p, y, density(y)))
    assert same(train(LDS(power=0.7, bin_width=0.5, sigma=1.0)), weighted) and not same(plain, weighted)
    fixed = 0.3 * examples().targets.std(correction=0).item()
    balanced = train(loss=lambda p, y: balanced_mse_loss(p, y, torch.tensor(fixed).log().exp()))
    assert same(train(BalancedMSE(learn=False)), balanced) and not same(plain, balanced)


def test_balanced_mse_learns_its_noise_without_weight_decay() -> None:
    method = BalancedMSE(noise=0.5)
    run = train(method, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1))
    start = 0.5 * examples().targets.std(correction=0)
    assert abs(method.criterion.log_noise.exp() / start - 1) > 0.01
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
    assert len(run.optimizer.param_groups[1]["params"]) == 1


def test_fds_is_calibration_by_the_last_epochs_statistics_in_a_loop() -> None:
    model, data = network(), examples()
    run = train(FDS(start=2, bin_width=1.0, momentum=0.5))
    part = FeatureSmoothing(data.targets, 1.0, 8, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for epoch in range(3):
        part.enabled = epoch >= 2
        for rows in torch.tensor(list(torch.utils.data.RandomSampler(data, generator=order))).split(20):
            x, y = data.inputs[rows], data.targets[rows]
            loss = weighted_l1_loss(model[2](part(model[:2](x), y)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        part.end_epoch()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))
    assert not same(run, train(FDS(start=3, bin_width=1.0))) and same(train(), train(FDS(start=3)))


def test_fds_leaves_evaluation_and_further_passes_alone() -> None:
    seen = []

    class Look(equipoise.Method):
        name = "look"

        def penalty(self, run: Any, batch: Any, output: Any) -> Tensor:
            again = run.forward(batch.inputs).prediction
            seen.append(torch.equal(again, output.prediction))
            torch.testing.assert_close(again, network_of(run)(batch.inputs))
            return output.prediction.new_zeros(())

    def network_of(run: Any) -> nn.Module:
        return copy.deepcopy(run.model).eval()

    run = train(FDS(bin_width=1.0), Look())
    assert seen == [True] * 3 + [False] * 6  # calibrated from the second epoch on
    assert not run.head()._forward_pre_hooks


def test_a_run_must_fit() -> None:
    inputs = examples().inputs
    vectors = equipoise.Examples(inputs, inputs[:, :2])
    constant = equipoise.Examples(inputs, torch.full((44,), 3.0))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    for method, name in ((LDS(), "LDS"), (FDS(), "FDS"), (BalancedMSE(), "Balanced MSE")):
        with pytest.raises(ArgumentError, match=f"data = without targets: {name} needs the labels"):
            equipoise.start(network(), sgd, methods=[method])
        with pytest.raises(ArgumentError, match=rf"targets = torch.float32 \(44, 2\).*{name} is for regression"):
            equipoise.start(network(), sgd, methods=[method], data=vectors)
    with pytest.raises(ArgumentError, match=r"targets = 3 in every example: there is nothing to predict"):
        equipoise.start(network(), sgd, methods=[BalancedMSE()], data=constant)
    with pytest.raises(ArgumentError, match=r"head = Conv1d: FDS needs an nn.Linear"):
        equipoise.start(nn.Sequential(nn.Conv1d(1, 1, 1)), sgd, methods=[FDS()], data=examples(), head="0")
