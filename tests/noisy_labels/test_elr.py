"""ELR and ELR+ against the paper's formulas, hand-computed numbers and a loop in plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.noisy_labels.elr import (
    ELR,
    ELRLoss,
    ELRPlus,
    Mixup,
    averaging_momentum,
    draw_mixup,
    elr_penalty,
    elr_plus_loss,
    sigmoid_rampup,
    update_soft_targets,
)
from equipoise.noisy_labels.two_networks import LogitAverage, make_peer


def logits_of(n: int, c: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_rows(n: int, c: int, seed: int = 1, total: float = 0.8) -> Tensor:
    return total * logits_of(n, c, seed).softmax(1)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


# -- the functional core ----------------------------------------------------------------------------------------------
def test_lam_0_is_cross_entropy_to_the_bit() -> None:
    z, y, index = logits_of(6, 4).float(), torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(6)
    part = ELRLoss(6, 4, lam=0.0)
    assert torch.equal(part(z, y, index), F.cross_entropy(z, y))
    assert torch.equal(gradient(lambda v: part(v, y, index), z), gradient(lambda v: F.cross_entropy(v, y), z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_steps_by_hand(dtype: torch.dtype) -> None:
    z, y, index = torch.tensor([[2.0, 1.0, 0.0]], dtype=dtype), torch.tensor([1]), torch.tensor([0])
    part = ELRLoss(1, 3, lam=3.0, beta=0.7).to(dtype)
    penalties, losses, sums, gradients = [], [], [], []
    for step in range(3):
        twin = copy.deepcopy(part)
        penalties.append(twin.penalty(z, index).item())
        leaf = z.clone().requires_grad_()
        loss = part(leaf, y, index)
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad[0].tolist())
        losses.append(loss.item())
        sums.append(part.soft_targets.sum().item())
        if step == 0:
            assert part.soft_targets[0].tolist() == pytest.approx([0.199572, 0.073419, 0.027009], abs=1e-6)
    assert penalties == pytest.approx([-0.166247, -0.301615, -0.408610], abs=1e-6)
    assert losses == pytest.approx([0.908865, 0.502762, 0.181775], abs=1e-6)
    assert sums == pytest.approx([0.3, 0.51, 0.657], abs=1e-6)
    assert gradients[0] == pytest.approx([0.555869, -0.686135, 0.130266], abs=1e-6)
    assert gradients[2] == pytest.approx([0.360025, -0.562338, 0.202313], abs=1e-6)


def test_gradient_has_the_closed_form() -> None:
    z, y, t, lam = logits_of(5, 4, scale=1.0), torch.tensor([3, 1, 0, 2, 2]), soft_rows(5, 4), 3.0
    got = gradient(lambda v: F.cross_entropy(v, y) + lam * elr_penalty(v, t), z)
    p = z.softmax(1)
    pull = p * ((t * p).sum(1, keepdim=True) - t * p.sum(1, keepdim=True)) / (1 - (p * t).sum(1, keepdim=True))
    torch.testing.assert_close(got, (p - F.one_hot(y, 4) + lam * pull) / 5, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_uniform_targets_pull_nowhere() -> None:
    got = gradient(lambda v: elr_penalty(v, torch.full((5, 4), 0.2, dtype=torch.float64)), logits_of(5, 4, scale=1.0))
    torch.testing.assert_close(got, torch.zeros_like(got), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-5), (torch.float32, 1e-3)])
def test_saturated_logits_stay_finite_and_without_gradient(dtype: torch.dtype, tolerance: float) -> None:
    z, index = torch.tensor([[20.0, 0, 0, 0, 0]], dtype=dtype), torch.tensor([0])
    part = ELRLoss(1, 5).to(dtype)
    for _ in range(200):
        part.penalty(z, index)
    assert part.penalty(z, index).item() == pytest.approx(-7.6013, abs=tolerance)
    assert gradient(lambda v: part.penalty(v, index), z).abs().max() == 0


def reference(
    z: list[list[float]], table: list[list[float]], index: list[int], beta: float, eps: float
) -> tuple[float, list[list[float]]]:
    """The definition, one number at a time. Of a repeated index the last row is written and used for both."""
    clamped = []
    for row in z:
        weights = [math.exp(v - max(row)) for v in row]
        clamped.append([min(max(w / sum(weights), eps), 1 - eps) if eps else w / sum(weights) for w in weights])
    old = [list(row) for row in table]
    for i, p in zip(index, clamped, strict=True):
        table[i] = [beta * t + (1 - beta) * v / sum(p) for t, v in zip(old[i], p, strict=True)]
    terms = [
        math.log(1 - sum(t * v for t, v in zip(table[i], p, strict=True))) for i, p in zip(index, clamped, strict=True)
    ]
    return sum(terms) / len(terms), table


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.1])
def test_against_a_plain_loop(eps: float) -> None:
    part = ELRLoss(7, 4, beta=0.6, eps=eps).double()
    table = part.soft_targets.tolist()
    for step, index in enumerate([[0, 3, 6, 2], [3, 3, 1, 0], [6, 5, 6, 6]]):
        z = logits_of(4, 4, seed=step, scale=4)
        expected, table = reference(z.tolist(), table, index, 0.6, eps)
        assert part.penalty(z, torch.tensor(index)).item() == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(part.soft_targets, torch.tensor(table, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    z, t, labels = logits_of(3, 4).requires_grad_(), soft_rows(3, 4), soft_rows(3, 4, 5, 1.0)
    for reduction in ("none", "sum", "mean"):
        assert torch.autograd.gradcheck(lambda v, r=reduction: elr_penalty(v, t, reduction=r), z)
    assert torch.autograd.gradcheck(lambda v: elr_plus_loss(v, labels, t, lam=3.0, ramp=0.5, reweight_labels=True), z)


def test_reductions() -> None:
    z, t = logits_of(5, 3), soft_rows(5, 3)
    each = elr_penalty(z, t, reduction="none")
    assert each.shape == (5,) and torch.equal(each.sum(), elr_penalty(z, t, reduction="sum"))
    torch.testing.assert_close(each.mean(), elr_penalty(z, t))
    y, index = torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)
    values = ELRLoss(5, 3, reduction="none")(z, y, index)
    assert values.shape == (5,)
    torch.testing.assert_close(values.mean(), ELRLoss(5, 3)(z, y, index))
    torch.testing.assert_close(values.sum(), ELRLoss(5, 3, reduction="sum")(z, y, index))


def test_targets_are_constant() -> None:
    t = soft_rows(4, 3).requires_grad_()
    elr_penalty(logits_of(4, 3).requires_grad_(), t).backward()
    assert t.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = torch.tensor([[30.0, 0, 0], [1.0, 0.5, -0.5], [-40.0, 40, 0]], dtype=dtype)
    y, index = torch.tensor([1, 0, 1]), torch.arange(3)
    low, high = ELRLoss(3, 3, beta=0.5), ELRLoss(3, 3, beta=0.5)
    for _ in range(60):
        loss, expected = low(z, y, index), high(z.float(), y, index)
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.equal(loss, expected)
    # In half precision 1 - 1e-4 rounds to 1, the clamp does nothing, and this would be log(0).
    assert low.penalty(z[:1], index[:1]).item() == pytest.approx(-8.1117, abs=1e-2)
    low.to(dtype)  # a half-precision table: coarse, never NaN
    assert torch.isfinite(low(z, y, index)) and low.soft_targets.dtype == dtype


@pytest.mark.parametrize("core", [elr_penalty, lambda z, t: elr_plus_loss(z, t / t.sum(1, keepdim=True), t, lam=3.0)])
def test_compiles(core: Callable[[Tensor, Tensor], Tensor]) -> None:
    z, t = logits_of(4, 3), soft_rows(4, 3)
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, t), core(z, t))


# -- the module -------------------------------------------------------------------------------------------------------
def test_order_does_not_matter() -> None:
    z, y = logits_of(12, 4), torch.arange(12) % 4
    plain, shuffled = ELRLoss(12, 4).double(), ELRLoss(12, 4).double()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(plain(z, y, torch.arange(12)), shuffled(z[order], y[order], order), atol=1e-14, rtol=0)
    assert torch.equal(plain.soft_targets, shuffled.soft_targets)
    for rows in torch.arange(12).split(5):
        plain.penalty(z[rows], rows)
    for rows in order.split(5):
        shuffled.penalty(z[rows], rows)
    assert torch.equal(plain.soft_targets, shuffled.soft_targets)


def test_of_a_repeated_example_the_last_row_counts() -> None:
    z, table = logits_of(3, 4), torch.zeros(5, 4, dtype=torch.float64)
    rows = update_soft_targets(table, torch.tensor([2, 4, 2]), z, beta=0.7, eps=0.0)
    torch.testing.assert_close(table[2], 0.3 * z[2].softmax(0))
    torch.testing.assert_close(table[4], 0.3 * z[1].softmax(0))
    assert torch.equal(rows, table[torch.tensor([2, 4, 2])])
    assert table[[0, 1, 3]].abs().sum() == 0


def test_update_is_in_place_and_without_gradient() -> None:
    part = ELRLoss(4, 3)
    before = part.soft_targets.data_ptr()
    part(logits_of(4, 3).float().requires_grad_(), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    assert part.soft_targets.data_ptr() == before and not part.soft_targets.requires_grad


def test_evaluation_neither_reads_nor_writes_the_table() -> None:
    z, y = logits_of(4, 3).float(), torch.tensor([0, 1, 2, 0])
    part = ELRLoss(4, 3)
    part(z, y, torch.arange(4))
    before = part.soft_targets.clone()
    part.eval()
    elsewhere = torch.tensor([100, 101, 102, 103])  # positions of validation data, beyond the table
    assert torch.equal(part(z, y, elsewhere), F.cross_entropy(z, y))
    assert part.penalty(z, elsewhere).item() == 0
    assert torch.equal(part.soft_targets, before)


def test_state_round_trip() -> None:
    z, y, index = logits_of(4, 3).float(), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 2, 1])
    part, twin = ELRLoss(4, 3), ELRLoss(4, 3)
    part(z, y, index)
    assert list(part.state_dict()) == ["soft_targets"]
    twin.load_state_dict(part.state_dict())
    assert torch.equal(part(z, y, index), twin(z, y, index))
    assert part.double().soft_targets.dtype == torch.float64


def test_suspected_noise() -> None:
    part = ELRLoss(4, 3)
    part.penalty(torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]]), torch.tensor([0, 1, 3]))
    assert part.suspected_noise(torch.tensor([0, 2, 1, 1])).tolist() == [
        False,
        True,
        False,
        True,
    ]  # 2 was never visited
    with pytest.raises(ArgumentError, match=r"targets = torch.int64 \(3,\): must be integer classes of shape \(4,\)"):
        part.suspected_noise(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -1.0}, "lam = -1.0: must be a number in"),
        ({"beta": 1.0}, r"beta = 1.0: must be a number in \[0, 1\)"),
        ({"beta": -0.1}, "beta = -0.1"),
        ({"eps": 0.5}, r"eps = 0.5: must be a number in \[0, 0.5\)"),
        ({"eps": -1e-4}, "eps = -0.0001"),
        ({"num_examples": 0}, "num_examples = 0: must be an integer >= 1"),
        ({"num_classes": 1}, "num_classes = 1: must be an integer >= 2"),
        ({"reduction": "avg"}, "reduction = 'avg': must be one of 'none', 'sum', 'mean'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELRLoss(**{"num_examples": 4, "num_classes": 3, **change})


@pytest.mark.parametrize(
    ("z", "y", "index", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 4]), r"index = values in \[0, 4\]"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([-1, 0]), r"index = values in \[-1, 0\]"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1], dtype=torch.int32), "index = torch.int32"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0]), r"index = torch.int64 \(1,\)"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 1]), r"logits = .*\(2, 4\): must .*\(N, 3\)"),
        (torch.zeros(2, 3, 3), torch.tensor([0, 1]), torch.tensor([0, 1]), "logits = "),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), "targets = .*soft labels use elr_plus_loss"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), "targets = torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), torch.tensor([0, 1]), r"targets = values in \[0, 3\]"),
    ],
)
def test_batches_are_checked_and_nothing_is_written(z: Tensor, y: Tensor, index: Tensor, message: str) -> None:
    part = ELRLoss(4, 3)
    with pytest.raises(ValueError, match=message):
        part(z, y, index)
    assert part.soft_targets.abs().sum() == 0


# -- ELR+ -------------------------------------------------------------------------------------------------------------
def test_ramp() -> None:
    got = [sigmoid_rampup(s, 40000) for s in (0, 10000, 20000, 40000, 50000)]
    assert got == pytest.approx([0.006738, 0.060055, 0.286505, 1.0, 1.0], abs=1e-6)
    assert sigmoid_rampup(0, 0) == 1.0
    with pytest.raises(ValueError, match="length = -1"):
        sigmoid_rampup(0, -1)


def test_averaging_momentum() -> None:
    assert [averaging_momentum(s, 0.9, 0) for s in (1, 3, 100)] == [0.5, 0.75, 0.9]
    assert averaging_momentum(9999, 0.997, 40000) == pytest.approx(0.997 * 0.060055, abs=1e-6)


def test_labels_are_reweighted() -> None:
    z, labels, t = logits_of(1, 3), torch.tensor([[0.7, 0.3, 0.0]]), torch.tensor([[0.6, 0.3, 0.1]])
    got = elr_plus_loss(z, labels, t, lam=0.0, reweight_labels=True)
    expected = -(torch.tensor([[0.823529, 0.176471, 0.0]]) * z.log_softmax(1)).sum()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    vanished = elr_plus_loss(
        z, torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 0.5, 0.3]]), lam=0.0, reweight_labels=True
    )
    assert vanished.item() == pytest.approx(-z.log_softmax(1)[0, 0].item())


def test_plus_loss_is_soft_cross_entropy_plus_penalty() -> None:
    z, labels, t = logits_of(5, 4), soft_rows(5, 4, 3, 1.0), soft_rows(5, 4)
    got = elr_plus_loss(z, labels, t, lam=2.0, ramp=0.25)
    torch.testing.assert_close(got, F.cross_entropy(z, labels) + 0.5 * elr_penalty(z, t))
    for bad in ({"lam": -1.0}, {"ramp": -1.0}, {"eps": 0.7}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            elr_plus_loss(z, labels, t, **{"lam": 1.0, **bad})
    with pytest.raises(ValueError, match=r"soft_labels = torch\.int64"):
        elr_plus_loss(z, torch.zeros(5, dtype=torch.int64), t, lam=1.0)
    with pytest.raises(ValueError, match=r"soft_targets = .*\(4, 4\)"):
        elr_plus_loss(z, labels, t[:4], lam=1.0)


def test_mixup_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_mixup(8, 1.0, generator, torch.device("cpu")) for _ in range(400)]
    weights = torch.tensor([d.weight for d in draws])
    assert weights.min() >= 0.5 and weights.max() <= 1
    assert weights.mean().item() == pytest.approx(0.75, abs=0.03)  # max(l, 1 - l) of a uniform l
    assert all(d.partner.sort().values.tolist() == list(range(8)) for d in draws)
    x = logits_of(8, 3)
    mixed = draws[0].rows(x)
    torch.testing.assert_close(mixed, draws[0].weight * x + (1 - draws[0].weight) * x[draws[0].partner])
    off = draw_mixup(8, 0.0, generator, torch.device("cpu"))
    assert off.inputs({"ids": torch.arange(8)})["ids"].tolist() == list(range(8))
    with pytest.raises(ArgumentError, match=r"torch.int64: mixup averages inputs .*mixup_alpha=0"):
        Mixup(0.7, torch.arange(8).flip(0)).inputs({"ids": torch.arange(8)})


# -- the methods in a run ---------------------------------------------------------------------------------------------
def data(n: int = 48) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(7)
    return equipoise.Examples(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 3))


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def train(
    method: Any, model: nn.Module | None = None, examples: equipoise.Examples | None = None, **options: Any
) -> equipoise.Run:
    methods = [] if method is None else [method]
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 20, "methods": methods, **options}
    return equipoise.fit(model or network(), examples or data(), **settings)


def test_elr_in_a_run_is_the_loss_in_a_loop() -> None:
    method = ELR(lam=2.0, beta=0.8)
    run = train(method)
    model, part, examples = network(), ELRLoss(48, 3, lam=2.0, beta=0.8), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.tensor(list(torch.utils.data.RandomSampler(examples, generator=order))).split(20):
            batch = examples.take(rows)
            optimizer.zero_grad()
            part(model(batch.inputs), batch.targets, rows).backward()
            optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))
    torch.testing.assert_close(method.regularizer.soft_targets, part.soft_targets)
    assert method.regularizer.suspected_noise(examples.targets).shape == (48,)


def test_neutral_elr_is_the_baseline() -> None:
    assert ELR.neutral is not None
    assert same(train(ELR(**ELR.neutral)).model, train(None).model)


def test_elr_needs_positions_size_and_classes() -> None:
    x, y = logits_of(4, 5).float(), torch.tensor([0, 1, 2, 0])
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"data = None: ELR keeps a row per training example .*data="):
        equipoise.start(network(), sgd, methods=[ELR()])
    with pytest.raises(ArgumentError, match="num_classes = None: ELR needs a classification task"):
        equipoise.start(network(), sgd, methods=[ELR()], data=(x, x[:, 0]))
    run = equipoise.start(network(), sgd, methods=[ELR()], data=(x, y))
    with pytest.raises(ArgumentError, match=r"batch.index = None: ELR keeps state"):
        run.training_loss((x, y))
    narrow = equipoise.start(nn.Linear(5, 7), sgd, methods=[ELR()], data=(x, y))
    with pytest.raises(ArgumentError, match=r"logits = .*\(4, 7\).*Give num_classes=7"):
        narrow.training_loss((x, y, torch.arange(4)))


@pytest.mark.parametrize("settings", [{"lam": -1}, {"beta": 1.0}, {"eps": 0.5}])
@pytest.mark.parametrize("method", [ELR, ELRPlus])
def test_method_settings_are_checked(method: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)


@pytest.mark.parametrize(
    "settings", [{"mixup_alpha": -1}, {"gamma": 1.0}, {"ramp_steps": 1.5}, {"averaging_ramp_steps": -1}]
)
def test_plus_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ELRPlus(**settings)


def test_elr_plus_is_the_algorithm_step_by_step() -> None:
    """One explicit loop with two optimizers, for the same draws of mixup."""
    settings: dict[str, Any] = {"lam": 2.0, "beta": 0.8, "gamma": 0.6, "ramp_steps": 5, "reweight_labels": True}
    method = ELRPlus(**settings)
    run = train(method)

    examples, first = data(), network()
    replay = equipoise.start(network(), lambda p: torch.optim.SGD(p, lr=0.1), data=examples)
    draws = replay.new_generator(method)
    nets = [first, make_peer(first, draws)]
    averages = [copy.deepcopy(net) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    tables = [torch.zeros(48, 3), torch.zeros(48, 3)]
    order, step = torch.Generator().manual_seed(0), 0
    for _ in range(3):
        for rows in torch.tensor(list(torch.utils.data.RandomSampler(examples, generator=order))).split(20):
            step += 1
            batch = examples.take(rows)
            labels = F.one_hot(batch.targets, 3).float()
            mixups = [draw_mixup(len(rows), 1.0, draws, torch.device("cpu")) for _ in range(2)]
            losses = []
            for k in (0, 1):
                a, j = mixups[k].weight, mixups[k].partner
                p = nets[k](a * batch.inputs + (1 - a) * batch.inputs[j]).softmax(1)
                with torch.no_grad():
                    tables[k][rows] = 0.8 * tables[k][rows] + 0.2 * averages[1 - k](batch.inputs).softmax(1)
                t = a * tables[k][rows] + (1 - a) * tables[k][rows][j]
                y = (a * labels + (1 - a) * labels[j]) * t
                y = y / y.sum(1, keepdim=True)
                ramp = math.exp(-5 * (1 - min(step, 5) / 5) ** 2)
                overlap = (p.clamp(1e-4, 1 - 1e-4) * t).sum(1)
                losses.append(-(y * p.log()).sum(1).mean() + ramp * 2.0 * (1 - overlap).log().mean())
            for k in (0, 1):
                optimizers[k].zero_grad()
                losses[k].backward()
                optimizers[k].step()
                g = min(1 - 1 / (step + 1), 0.6)
                for w, v in zip(averages[k].parameters(), nets[k].parameters(), strict=True):
                    w.data = g * w.data + (1 - g) * v.data
    close = {"atol": 2e-5, "rtol": 1e-4}
    for k in (0, 1):
        torch.testing.assert_close(list(method.networks[k].parameters()), list(nets[k].parameters()), **close)
        torch.testing.assert_close(list(method.averages[k].parameters()), list(averages[k].parameters()), **close)
        torch.testing.assert_close(method.tables[k].soft_targets, tables[k], **close)
    assert isinstance(run.model, LogitAverage)
    predicted, _ = run.predict(examples)
    run.model.eval()
    torch.testing.assert_close(predicted, 0.5 * sum(net(examples.inputs) for net in method.networks))


def test_elr_plus_leaves_the_global_generator_alone_and_repeats() -> None:
    before = torch.get_rng_state()
    one, two, other = train(ELRPlus()), train(ELRPlus()), train(ELRPlus(), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert same(one.model, two.model) and not same(one.model, other.model)


def test_elr_plus_averages_run_with_batch_statistics_and_without_dropout() -> None:
    method = ELRPlus()
    train(method, network(dropout=0.5), epochs=1)
    modes = {type(m).__name__: m.training for m in method.averages[0].modules()}
    assert modes["BatchNorm1d"] and not modes["Dropout"]
    assert not any(p.requires_grad for p in method.averages[0].parameters())


def test_elr_plus_takes_a_ready_peer_and_dict_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.offset = nn.Linear(5, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(x) + self.offset}

    examples = equipoise.Examples({"x": logits_of(30, 5).float()}, torch.arange(30) % 3)
    with pytest.raises(ArgumentError, match=r"'offset' of Named: cannot be initialised afresh .*peer="):
        train(ELRPlus(), Named(), examples)
    peer = Named()
    start = copy.deepcopy(peer.state_dict())
    run = train(ELRPlus(peer=peer), Named(), examples)
    assert run.predict(examples)[0].shape == (30, 3)
    assert all(torch.equal(start[k], v) for k, v in peer.state_dict().items())  # a copy was trained


@pytest.mark.parametrize("method", [ELR(), ELRPlus()])
def test_resumes_bit_for_bit(method: Any, tmp_path: Any) -> None:
    whole = train(copy.deepcopy(method), network(dropout=0.3), epochs=4)

    class Stop(Exception):
        pass

    def interrupt(run: equipoise.Run) -> None:
        if run.global_step == 7:
            raise Stop

    stopper = copy.deepcopy(method)
    after = type(stopper).after_step

    def after_step(run: equipoise.Run) -> None:
        after(stopper, run)
        interrupt(run)

    stopper.after_step = after_step
    with pytest.raises(Stop):
        train(stopper, network(dropout=0.3), epochs=4, checkpoint=tmp_path, checkpoint_every=2)
    resumed = train(copy.deepcopy(method), network(5, dropout=0.3), epochs=4, checkpoint=tmp_path, resume=True)
    assert same(whole.model, resumed.model)


@pytest.mark.parametrize("method", [ELR(), ELRPlus()])
def test_runs_in_bfloat16_and_with_micro_batches(method: Any) -> None:
    run = train(copy.deepcopy(method), mixed_precision="bf16", accumulation=2)
    assert all(math.isfinite(record["train_loss"]) for record in run.history)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in run.model.parameters())


def test_elr_plus_accepts_soft_labels() -> None:
    examples = equipoise.Examples(logits_of(30, 5).float(), soft_rows(30, 3, total=1.0).float())
    assert math.isfinite(train(ELRPlus(), examples=examples).history[-1]["train_loss"])


# -- the second network -----------------------------------------------------------------------------------------------
def test_peer_is_fresh_repeatable_and_leaves_the_global_generator_alone() -> None:
    model, before = network(), torch.get_rng_state()
    first = make_peer(model, torch.Generator().manual_seed(1))
    second = make_peer(model, torch.Generator().manual_seed(1))
    third = make_peer(model, torch.Generator().manual_seed(2))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, second) and not same(first, third) and not same(first, model)
    assert all(torch.isfinite(p).all() for p in first.parameters())
    double = make_peer(network().double(), torch.Generator().manual_seed(1))
    assert all(p.dtype == torch.float64 for p in double.parameters()) and same(double.float(), first)
    bound = 1 / math.sqrt(5)
    assert first[0].weight.abs().max() <= bound


def test_peer_keeps_frozen_weights_and_reaches_private_resets() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.TransformerEncoderLayer(8, 2, 16))
    peer = make_peer(model, torch.Generator().manual_seed(0))
    assert torch.equal(peer[0].weight, model[0].weight)
    assert not torch.equal(peer[1].self_attn.in_proj_weight, model[1].self_attn.in_proj_weight)


def test_peer_names_what_it_cannot_initialise() -> None:
    with pytest.raises(ArgumentError, match=r"'parametrizations.weight.original0' of ParametrizationList"):
        make_peer(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.Generator())
    model = network()
    with pytest.raises(ArgumentError, match=r"peer = Sequential: .*shares 6 parameters"):
        make_peer(model, torch.Generator(), peer=model)
    ready = network(3)
    assert make_peer(model, torch.Generator(), peer=ready) is ready


def test_logit_average() -> None:
    nets = [network(k).eval() for k in range(3)]
    both = LogitAverage(nets).eval()
    x = logits_of(4, 5).float()
    torch.testing.assert_close(both(x), sum(net(x) for net in nets) / 3)
    twin = LogitAverage([network(9).eval() for _ in range(3)])
    twin.load_state_dict(both.state_dict())
    assert torch.equal(twin(x), both(x))
    with pytest.raises(ArgumentError, match="at least one module"):
        LogitAverage([])
