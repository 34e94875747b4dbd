"""The baselines for rare classes, and what the family shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.imbalance.baselines import (
    BalancedSoftmax,
    ClassBalanced,
    ClassBalancedLoss,
    Focal,
    FocalLoss,
    LogitAdjustment,
    Oversampling,
    class_balanced_weights,
    focal_loss,
)
from equipoise.imbalance.shared import check_class_counts, class_counts_of, two_columns
from equipoise.testing import check_loss, check_method
from equipoise.training import Examples, Method
from equipoise.training.losses import precise

METHODS = (ClassBalanced, Focal, LogitAdjustment, BalancedSoftmax, Oversampling)
COUNTS = torch.tensor([80, 15, 5])
LABELS = torch.tensor([0, 2, 1, 0, 1])


def logits_of(n: int = 5, c: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1.5 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


# -- shared -----------------------------------------------------------------------------------------------------------
def test_one_logit_is_two_columns_with_the_sigmoid_as_softmax() -> None:
    z = torch.tensor([-2.0, 0.5, 3.0])
    assert two_columns(z).tolist() == [[0.0, -2.0], [0.0, 0.5], [0.0, 3.0]]
    assert torch.equal(two_columns(z[:, None]), two_columns(z))
    torch.testing.assert_close(two_columns(z).softmax(1)[:, 1], z.sigmoid())
    wide = logits_of()
    assert two_columns(wide) is wide


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4), torch.tensor(1.0), torch.tensor([1, 2])])
def test_two_columns_refuses(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="logits = "):
        two_columns(bad)


def test_class_counts_of_a_run() -> None:
    run = equipoise.start(nn.Linear(2, 3), torch.optim.SGD, data=skewed_data(), batch_size=8)
    assert class_counts_of(run, "x").tolist() == [30, 9, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data = without classes: x needs the number of training examples"),
        ((torch.zeros(4, 2), torch.rand(4)), "data = without classes"),
        (
            (torch.zeros(4, 2), torch.tensor([0, 0, 3, 3])),
            "no example of class 1, 2: x needs one of each of the 4 classes",
        ),
        ((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), "no example of any class but 0"),
    ],
)
def test_class_counts_of_refuses(data: Any, message: str) -> None:
    run = equipoise.start(nn.Linear(2, 4), torch.optim.SGD, data=data, loss=F.mse_loss)
    with pytest.raises(ValueError, match=message):
        class_counts_of(run, "x")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 3], "class_counts = list: must be a tensor"),
        (torch.tensor([5]), r"class_counts = \(1,\): must be"),
        (torch.ones(2, 2), r"class_counts = \(2, 2\)"),
        (torch.tensor([5, 0, 1]), "class_counts = 0 for class 1: must be positive"),
        (torch.tensor([5.0, math.nan]), "class_counts = nan for class 1"),
        (torch.tensor([math.inf, 1.0]), "class_counts = inf for class 0"),
    ],
)
def test_check_class_counts(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_class_counts(counts)


# -- class-balanced weights -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.9999])
def test_weights_are_the_inverse_effective_number(beta: float) -> None:
    inverse = [(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()]
    expected = [w * 3 / sum(inverse) for w in inverse]
    assert class_balanced_weights(COUNTS, beta).tolist() == pytest.approx(expected, rel=1e-9)


def test_weights_by_hand() -> None:
    # beta = 0.5: effective numbers of 1 and 2 examples are 1 and 1.5; weights 1 and 2/3, scaled to sum to 2.
    assert class_balanced_weights(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8])


def test_beta_runs_from_no_weights_to_inverse_frequency() -> None:
    assert class_balanced_weights(COUNTS, 0.0).tolist() == [1.0, 1.0, 1.0]
    inverse = class_balanced_weights(COUNTS, 1.0)
    torch.testing.assert_close(inverse * COUNTS, torch.full((3,), float(inverse[0] * 80), dtype=torch.float64))
    torch.testing.assert_close(class_balanced_weights(COUNTS, 1 - 1e-12), inverse, rtol=1e-9, atol=0)
    huge = class_balanced_weights(torch.tensor([10**9, 1]), 0.9999)
    assert huge.tolist() == pytest.approx([2e-4 / 1.0001, 2 / 1.0001])


# -- the focal loss ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0])])
def test_focal_loss_is_its_formula(gamma: float, weight: Tensor | None) -> None:
    z, expected = logits_of(), []
    for row, y in zip(z.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(row[y]) / sum(map(math.exp, row))
        expected.append(-(1 if weight is None else float(weight[y])) * (1 - p) ** gamma * math.log(p))
    assert focal_loss(z, LABELS, gamma, weight, "none").tolist() == pytest.approx(expected, rel=1e-6)
    assert focal_loss(z, LABELS, gamma, weight, "sum").item() == pytest.approx(sum(expected), rel=1e-6)
    assert FocalLoss(gamma, weight=weight)(z, LABELS).item() == pytest.approx(sum(expected) / 5, rel=1e-6)


def test_focal_loss_of_one_logit_is_the_binary_one() -> None:
    z, y = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64), torch.tensor([1, 0, 1])
    p = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    expected = -((1 - p) ** 2) * p.log() * torch.where(y == 1, 0.25, 0.75)
    for logits in (z, z[:, None]):
        torch.testing.assert_close(focal_loss(logits, y, 2.0, torch.tensor([0.75, 0.25]), "none"), expected)


def test_gamma_0_is_cross_entropy_and_large_gamma_ignores_what_is_predicted_well() -> None:
    z = logits_of()
    torch.testing.assert_close(focal_loss(z, LABELS, 0.0, None, "none"), F.cross_entropy(z, LABELS, reduction="none"))
    easy = torch.tensor([[4.0, 0.0]])
    assert focal_loss(easy, torch.tensor([0]), 2.0) < 1e-3 * F.cross_entropy(easy, torch.tensor([0]))


def test_class_balanced_loss_is_the_weighted_mean_over_examples() -> None:
    z = logits_of()
    w = class_balanced_weights(COUNTS, 0.99)
    expected = (w[LABELS] * F.cross_entropy(z, LABELS, reduction="none")).mean()
    torch.testing.assert_close(ClassBalancedLoss(COUNTS, beta=0.99)(z, LABELS), expected)
    focal = (w[LABELS] * focal_loss(z, LABELS, 1.0, None, "none")).mean()
    torch.testing.assert_close(ClassBalancedLoss(COUNTS, beta=0.99, gamma=1.0)(z, LABELS), focal)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients(gamma: float) -> None:
    z = logits_of().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: focal_loss(v, LABELS, gamma, torch.tensor([0.5, 1.0, 2.0])), z)
    (ours,) = torch.autograd.grad(focal_loss(z, LABELS, gamma, None, "sum"), z)
    p = z.detach().softmax(1).gather(1, LABELS[:, None])
    slope = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()  # dFL/dz = slope (softmax - onehot)
    torch.testing.assert_close(ours, slope * (z.detach().softmax(1) - F.one_hot(LABELS, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_extreme_logits_stay_finite(dtype: torch.dtype, gamma: float) -> None:
    z = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype=dtype, requires_grad=True)
    loss = focal_loss(z, torch.tensor([0, 0]), gamma, torch.tensor([1.0, 0.1]), "none")
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0, 2000.0]
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(grad).all()


def test_parts_conform() -> None:
    check_loss(focal_loss)
    check_loss(FocalLoss(0.5, weight=torch.tensor([0.1, 1.0, 2.0, 0.0])))
    check_loss(ClassBalancedLoss(torch.tensor([50, 9, 4, 1]), beta=0.99, gamma=1.0))


def test_parts_compile_and_save() -> None:
    loss = ClassBalancedLoss(COUNTS, beta=0.99, gamma=2.0)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(logits_of(), LABELS), loss(logits_of(), LABELS))
    other = ClassBalancedLoss(torch.tensor([1, 1, 1]), gamma=2.0)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(logits_of(), LABELS), loss(logits_of(), LABELS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(-1.0), r"gamma = -1.0: must be a number in \[0, inf\)"),
        (lambda: FocalLoss(reduction="avg"), "reduction = 'avg'"),
        (lambda: FocalLoss(weight=torch.tensor([1.0, -1.0])), r"weight = \[1.0, -1.0\]: must be finite and >= 0"),
        (lambda: focal_loss(logits_of(), LABELS, 2.0, torch.ones(2)), r"weight = \(2,\): must have the shape \(3,\)"),
        (lambda: focal_loss(logits_of(), LABELS + 1), r"targets = values in \[1, 3\]"),
        (lambda: focal_loss(logits_of(), F.one_hot(LABELS).double()), "targets = "),
        (lambda: focal_loss(torch.zeros(2), torch.tensor([0, 2])), r"must lie in \[0, 2\)"),
        (lambda: ClassBalancedLoss(torch.tensor([3, 0])), "class_counts = 0 for class 1"),
        (lambda: ClassBalancedLoss(COUNTS, beta=1.1), r"beta = 1.1: must be a number in \[0, 1\]"),
        (lambda: ClassBalanced(beta=-0.1), "beta = -0.1"),
        (lambda: Focal(gamma=math.nan), "gamma = nan"),
        (lambda: Focal(beta=2), "beta = 2"),
        (lambda: Focal(gamma=math.inf), "gamma = inf"),
        (lambda: LogitAdjustment(tau=-1.0), "tau = -1.0"),
        (lambda: Oversampling(power=1.5), r"power = 1.5: must be a number in \[0, 1\]"),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- the methods ------------------------------------------------------------------------------------------------------
def skewed_data(counts: tuple[int, ...] = (30, 9, 3)) -> Examples:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centres = 2 * torch.eye(len(counts), 5)
    return Examples(centres[labels] + torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(1)), labels)


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, outputs))


def train(*methods: Method, **options: Any) -> equipoise.Run:
    return equipoise.fit(network(), skewed_data(), epochs=2, batch_size=16, methods=methods, **options)


def same(first: equipoise.Run, second: equipoise.Run) -> bool:
    return all(torch.allclose(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("method", [m for m in METHODS if m.neutral is not None])
def test_neutral_is_plain_training(method: Any) -> None:
    assert same(train(method(**method.neutral)), train())
    assert not same(train(method()), train())


def adjusted(tau: float) -> Any:
    prior = torch.tensor([30.0, 9.0, 3.0]) / 42
    return lambda z, y: F.cross_entropy(precise(z) + tau * prior.log(), y)


def test_methods_replace_the_loss() -> None:
    counts = torch.tensor([30, 9, 3])
    assert same(train(ClassBalanced(0.9)), train(loss=ClassBalancedLoss(counts, beta=0.9)))
    assert same(train(Focal(1.5)), train(loss=FocalLoss(1.5)))
    assert same(train(Focal(1.5, 0.9)), train(loss=ClassBalancedLoss(counts, beta=0.9, gamma=1.5)))
    assert same(train(LogitAdjustment(0.7)), train(loss=adjusted(0.7)))


def test_balanced_softmax_is_logit_adjustment_with_tau_1_and_the_softmax_of_the_paper() -> None:
    assert same(train(BalancedSoftmax()), train(LogitAdjustment(1.0)))
    assert same(train(BalancedSoftmax()), train(loss=adjusted(1.0)))
    method, z = BalancedSoftmax(), logits_of()
    run = equipoise.start(network(), torch.optim.SGD, data=skewed_data(), methods=[method])
    sizes = [30, 9, 3]
    expected = [
        -math.log(sizes[y] * math.exp(row[y]) / sum(n * math.exp(v) for n, v in zip(sizes, row, strict=True)))
        for row, y in zip(z.tolist(), LABELS.tolist(), strict=True)
    ]
    seen = method.loss(run, equipoise.Batch(z, LABELS), equipoise.training.Output(z))
    assert seen.item() == pytest.approx(sum(expected) / 5, rel=1e-6)
    assert method.settings() == {}


@pytest.mark.parametrize(
    "method", [ClassBalanced(0.99), Focal(2.0, 0.9), Focal(), LogitAdjustment(1.3), BalancedSoftmax()]
)
def test_one_logit_trains_as_two_columns(method: Method) -> None:
    data, z = skewed_data((30, 6)), torch.linspace(-2, 2, 7)[:, None]
    y = torch.arange(7) % 2
    run = equipoise.start(network(1), torch.optim.SGD, data=data, methods=[method], loss=F.mse_loss)
    one, two = (method.loss(run, equipoise.Batch(z, y), equipoise.training.Output(v)) for v in (z, two_columns(z)))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_methods_conform(method: type[Method]) -> None:
    check_method(method)


def test_methods_refuse_bad_runs() -> None:
    empty = Examples(torch.zeros(6, 5), torch.tensor([0, 0, 0, 2, 2, 2]))
    for method in (ClassBalanced(), Focal(2.0, 0.9), LogitAdjustment(), BalancedSoftmax(), Oversampling()):
        with pytest.raises(ValueError, match="no example of class 1"):
            equipoise.fit(network(), empty, epochs=1, batch_size=2, methods=[method])
    equipoise.fit(network(), empty, epochs=1, batch_size=2, methods=[Focal(2.0)])  # needs no counts
    with pytest.raises(ValueError, match="data, batch_size = None: must be given, since oversampling decides"):
        equipoise.start(network(), torch.optim.SGD, data=empty, methods=[Oversampling()])


# -- oversampling -----------------------------------------------------------------------------------------------------
def drawn(power: float, epochs: int = 300) -> Tensor:
    """Share of each class among the examples of many epochs."""
    data = skewed_data()
    run = equipoise.start(
        network(), torch.optim.SGD, data=data, batch_size=16, epochs=epochs, methods=[Oversampling(power)]
    )
    assert run.loader is not None
    assert run.total_steps == epochs * 3
    rows = torch.cat([run.loader.order() for _ in range(epochs)])
    assert len(rows) == 42 * epochs
    return torch.bincount(data.targets[rows], minlength=3).double() / len(rows)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_classes_come_in_proportion_to_the_power_of_their_size(power: float) -> None:
    sizes = [n**power for n in (30, 9, 3)]
    expected = torch.tensor([s / sum(sizes) for s in sizes], dtype=torch.float64)
    # 12,600 draws: the standard error of a share is at most 0.0045.
    torch.testing.assert_close(drawn(power), expected, rtol=0, atol=0.018)


def test_within_a_class_every_example_is_as_likely() -> None:
    data = skewed_data()
    run = equipoise.start(network(), torch.optim.SGD, data=data, batch_size=16, methods=[Oversampling()])
    assert run.loader is not None
    times = torch.bincount(torch.cat([run.loader.order() for _ in range(300)]), minlength=42)[:30].double()
    expected = 42 * 300 / 3 / 30  # 140 times each; Poisson: standard deviation 12
    assert (times - expected).abs().max() < 60
