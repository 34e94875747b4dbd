"""ARL against the paper's formulas, hand-computed numbers, zero-filled forwards and a loop in plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.multimodal import (
    ARL,
    ConcatFusion,
    GatedFusion,
    MultimodalNet,
    SumFusion,
    arl_coefficients,
    arl_loss,
    concat_unimodal_logits,
    scale_gradient,
)
from equipoise.multimodal.arl import _weights
from equipoise.testing import TinyModalities, check_method, check_methods_ddp, check_regularizer, multimodal
from equipoise.testing.watch import leftover_hooks
from equipoise.training import Method, Output

torch.set_num_threads(1)
BY_HAND = [torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[0.5, 0], [0, 0.5]])]
LABELS = torch.tensor([0, 2, 1, 2, 0])


def logits_of(modalities: int, n: int = 5, c: int = 3, seed: int = 0, scale: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(modalities)]


# -- coefficients -----------------------------------------------------------------------------------------------------
def test_coefficients_by_hand() -> None:
    found = arl_coefficients(BY_HAND, temperature=8.0)
    assert found.entropy.tolist() == pytest.approx([0.473768, 0.662847], abs=1e-6)
    assert found.dependence.tolist() == pytest.approx([1.5, 0.5], abs=1e-6)
    assert found.weights.tolist() == pytest.approx([0.208401, 0.791599], abs=1e-6)
    assert arl_coefficients(BY_HAND, temperature=0.0).weights.tolist() == [0.5, 0.5]


def reference(
    logits: list[list[list[float]]], temperature: float, floor: float
) -> tuple[list[float], list[float], list[float]]:
    """The definition, one number at a time."""
    modalities = range(len(logits))
    entropy, dependence = [], []
    for rows in logits:
        h = c = 0.0
        for row in rows:
            weights = [math.exp(v) for v in row]
            p = [w / sum(weights) for w in weights]
            h -= sum(a * math.log(a + 1e-16) for a in p) / len(rows)
            c += sum(abs(v) for v in row) / len(rows)
        entropy.append(h)
        dependence.append(c)
    share = [max(h / sum(entropy), floor) for h in entropy]
    target = [(1 / h) / sum(1 / k for k in share) for h in share]
    current = [c / sum(dependence) for c in dependence]
    score = [
        target[m] * math.prod(current[k] for k in modalities if k != m) * len(logits) ** (len(logits) - 2)
        for m in modalities
    ]
    powers = [math.exp(temperature * q) for q in score]
    return [p / sum(powers) for p in powers], entropy, dependence


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize(("temperature", "floor"), [(8.0, 0.3), (1.0, 0.0), (30.0, 0.6)])
def test_coefficients_against_a_plain_loop(modalities: int, temperature: float, floor: float) -> None:
    logits = logits_of(modalities)
    found = arl_coefficients(logits, temperature=temperature, floor=floor)
    weights, entropy, dependence = reference([u.tolist() for u in logits], temperature, floor)
    assert found.weights.tolist() == pytest.approx(weights, abs=1e-12)
    assert found.entropy.tolist() == pytest.approx(entropy, abs=1e-12)
    assert found.dependence.tolist() == pytest.approx(dependence, abs=1e-12)
    assert found.weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_identical_modalities_have_equal_weights(modalities: int) -> None:
    weights = arl_coefficients(logits_of(1) * modalities).weights
    assert torch.equal(weights, torch.full((modalities,), 1 / modalities, dtype=torch.float64))


def test_swapping_modalities_swaps_weights() -> None:
    one, two = BY_HAND
    assert torch.equal(arl_coefficients([two, one]).weights, arl_coefficients([one, two]).weights.flip(0))
    three = logits_of(3)
    order = [2, 0, 1]
    shuffled = arl_coefficients([three[i] for i in order]).weights
    torch.testing.assert_close(shuffled, arl_coefficients(three).weights[order])


def test_a_constant_on_all_classes_changes_dependence_not_entropy() -> None:
    one, two = logits_of(2)
    plain, shifted = arl_coefficients([one, two]), arl_coefficients([one + 3, two])
    torch.testing.assert_close(shifted.entropy, plain.entropy)
    assert shifted.dependence[0] > plain.dependence[0] and shifted.dependence[1] == plain.dependence[1]


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("temperature", [0.5, 8.0, 30.0])
def test_dependence_at_its_target_gives_equal_weights(modalities: int, temperature: float) -> None:
    logits = [u.abs() for u in logits_of(modalities)]  # positive, so that a constant k adds C k to the dependence
    found = arl_coefficients(logits, floor=0.0)
    target = 1 / found.entropy
    scale = (found.dependence / target).max()
    moved = [u + (scale * t - c) / 3 for u, t, c in zip(logits, target, found.dependence, strict=True)]
    weights = arl_coefficients(moved, temperature=temperature, floor=0.0).weights
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / modalities))


def test_floor_clamps_the_share_of_the_entropy() -> None:
    def entropy(z: float) -> float:
        return arl_coefficients([torch.tensor([[z, 0.0]], dtype=torch.float64)] * 2).entropy[0].item()

    strong = brentq(lambda z: entropy(z) - 0.6 * 0.05 / 0.95, 0, 20)
    weak = brentq(lambda z: entropy(z) - 0.6, 0, 20)
    constant = (strong - weak) / 2  # equal dependence: the scores are half the targets
    logits = [torch.tensor([[strong, 0.0]]).double(), torch.tensor([[weak, 0.0]]).double() + constant]
    found = arl_coefficients(logits, temperature=1.0, floor=0.3)
    assert (found.entropy / found.entropy.sum()).tolist() == pytest.approx([0.05, 0.95])
    gap = (found.weights[0] / found.weights[1]).log().item()
    assert gap == pytest.approx((0.76 - 0.24) / 2)


@pytest.mark.parametrize(
    ("variances", "best", "error", "balanced"), [((1, 4), (0.8, 0.2), 0.8, 1.25), ((1, 1), (0.5, 0.5), 0.5, 0.5)]
)
def test_inverse_variance_is_the_best_mean(
    variances: tuple[int, int], best: tuple[float, float], error: float, balanced: float
) -> None:
    v = torch.tensor(variances, dtype=torch.float64)
    gap = _weights(v, torch.ones_like(v), 1.0, 0.0).log().diff().item() * -2  # a_1 - a_2, at equal dependence
    target = torch.tensor([(1 + gap) / 2, (1 - gap) / 2], dtype=torch.float64)
    assert target.tolist() == pytest.approx(best)
    assert (target.square() * v).sum().item() == pytest.approx(error)
    assert 1 / (1 / v).sum().item() == pytest.approx(error)
    assert (v / 4).sum().item() == pytest.approx(balanced)
    for shift in (-0.1, 0.1):
        other = target + torch.tensor([shift, -shift])
        assert (other.square() * v).sum() > error


def test_coefficients_are_constant() -> None:
    logits = [u.requires_grad_() for u in logits_of(2)]
    found = arl_coefficients(logits)
    assert not (found.weights.requires_grad or found.entropy.requires_grad or found.dependence.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_and_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    sure, zero = torch.tensor([[1e4, -1e4, 0]], dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    for logits in ([sure, zero], [sure, sure], [zero, zero], [zero, sure, sure]):
        for floor in (0.0, 0.3):
            found = arl_coefficients(logits, floor=floor)
            assert found.weights.dtype == torch.float32 and found.weights.sum().item() == pytest.approx(1.0)
    assert arl_coefficients([zero, zero]).weights.tolist() == [0.5, 0.5]
    # A modality that is certain and not used at all is what the model should lean on.
    assert arl_coefficients([sure / 1e3, 3 + zero], temperature=30.0, floor=0.0).weights[0] > 0.99


def test_half_precision_is_computed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = [u.to(dtype) for u in logits_of(2)]
        torch.testing.assert_close(arl_coefficients(half).weights, arl_coefficients([u.float() for u in half]).weights)
        loss = arl_loss(half[0], half, LABELS, 2.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, arl_loss(half[0].float(), [u.float() for u in half], LABELS, 2.0))


# -- the gradient's scale ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.25, 2])
def test_scale_gradient(dtype: torch.dtype, weight: float) -> None:
    for given in (weight, torch.tensor(float(weight)), torch.tensor([float(weight)])):
        x = torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = scale_gradient(x, given)
        assert torch.equal(y, x) and y.dtype == dtype
        upstream = torch.arange(12, dtype=dtype).reshape(4, 3)
        y.backward(upstream)
        assert torch.equal(x.grad, upstream * (1 + weight)) and x.grad.dtype == dtype


def test_scale_gradient_reads_the_weight_in_the_backward_pass_and_gives_it_no_gradient() -> None:
    x, weight = torch.ones(3, requires_grad=True), torch.zeros(2)
    y = scale_gradient(x, weight[1]).square()
    weight.copy_(torch.tensor([9.0, 0.5]))
    y.sum().backward()
    assert x.grad.tolist() == [3.0] * 3
    trained = torch.tensor(0.5, requires_grad=True)
    scale_gradient(torch.ones(3, requires_grad=True), trained).sum().backward()
    assert trained.grad is None


def test_scale_gradient_second_order_no_grad_and_in_place() -> None:
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (first,) = torch.autograd.grad(scale_gradient(x, 0.5).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 1.5 * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 1.5 * 1.5 * 6 * x)  # the scale acts on each way back
    with torch.no_grad():
        assert torch.equal(scale_gradient(x, 0.5), x)
    F.relu(scale_gradient(x, 0.5), inplace=True).sum().backward()
    torch.testing.assert_close(x.grad, 1.5 * (x > 0).double())


def test_scale_gradient_compiles() -> None:
    weight = torch.zeros(())
    compiled = torch.compile(lambda v: scale_gradient(v, weight).square().sum(), backend="aot_eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    for value in (0.5, 2.0):
        weight.zero_()
        loss = compiled(x)
        weight.fill_(value)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.tolist() == [2 * (1 + value)] * 3


# -- the loss ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("modalities", [2, 3])
def test_loss_is_its_formula(gamma: float, modalities: int) -> None:
    fused, *unimodal = logits_of(modalities + 1)
    expected = 0.0
    for row, label in enumerate(LABELS.tolist()):
        for weight, u in [(1.0, fused), *((gamma, u) for u in unimodal)]:
            values = u[row].tolist()
            expected += weight * (math.log(sum(map(math.exp, values))) - values[label]) / len(LABELS)
    assert arl_loss(fused, unimodal, LABELS, gamma).item() == pytest.approx(expected, abs=1e-12)


def test_gamma_0_is_cross_entropy_and_soft_labels_are_taken() -> None:
    fused, *unimodal = logits_of(3)
    assert torch.equal(arl_loss(fused, unimodal, LABELS, 0.0), F.cross_entropy(fused, LABELS))
    soft = F.one_hot(LABELS, 3).double()
    torch.testing.assert_close(arl_loss(fused, unimodal, soft, 2.0), arl_loss(fused, unimodal, LABELS, 2.0))


def test_loss_as_a_part() -> None:
    def three(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.randn(6, 4, generator=generator) for _ in range(3))  # type: ignore[return-value]

    labels = torch.arange(6) % 4
    part: Callable[..., Tensor] = lambda s, u, v: arl_loss(s, [u, v], labels, 3.0)  # noqa: E731
    assert check_regularizer(part, three, differentiable=(0, 1, 2)).passed


def test_loss_and_coefficients_compile() -> None:
    fused, *unimodal = logits_of(3)
    compiled = torch.compile(arl_loss, backend="aot_eager")
    torch.testing.assert_close(compiled(fused, unimodal, LABELS, 3.0), arl_loss(fused, unimodal, LABELS, 3.0))
    weights = torch.compile(lambda u: arl_coefficients(u).weights, backend="aot_eager")
    torch.testing.assert_close(weights(unimodal), arl_coefficients(unimodal).weights)


# -- the heads --------------------------------------------------------------------------------------------------------
def features_of(widths: list[int], n: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def head_of(kind: Callable[..., nn.Module], *arguments: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*arguments).double()


def zeroed(features: list[Tensor], keep: int) -> list[Tensor]:
    return [x if m == keep else torch.zeros_like(x) for m, x in enumerate(features)]


@pytest.mark.parametrize("widths", [[3, 5], [2, 4, 3]])
def test_concat_head_is_a_linear_layer_on_concatenated_features(widths: list[int]) -> None:
    head, features = head_of(ConcatFusion, widths, 4), features_of(widths)
    fused, unimodal = head(features)
    assert set(head.state_dict()) == {"fc.weight", "fc.bias"}
    torch.testing.assert_close(fused, head.fc(torch.cat(features, 1)))
    for m, u in enumerate(unimodal):
        torch.testing.assert_close(u, head.fc(torch.cat(zeroed(features, m), 1)))
    total = sum(unimodal) - (len(widths) - 1) * head.fc.bias
    torch.testing.assert_close(total, fused, rtol=0, atol=1e-14)
    _, nothing = head([torch.zeros_like(x) for x in features])
    assert all(torch.equal(u, head.fc.bias.expand(4, 4)) for u in nothing)
    free = concat_unimodal_logits(features, head.fc.weight, head.fc.bias)
    torch.testing.assert_close(free, unimodal)
    torch.testing.assert_close(concat_unimodal_logits(features, head.fc.weight)[0], unimodal[0] - head.fc.bias)


def test_sum_head() -> None:
    head, features = head_of(SumFusion, [3, 5, 2], 4), features_of([3, 5, 2])
    fused, unimodal = head(features)
    assert {name.split(".")[0] for name in head.state_dict()} == {"fcs"}
    for fc, x, u in zip(head.fcs, features, unimodal, strict=True):
        assert torch.equal(u, fc(x))
    torch.testing.assert_close(fused, sum(unimodal))


def test_gated_head() -> None:
    head, (x, y) = head_of(GatedFusion, [3, 5], 4, 7), features_of([3, 5])
    fused, unimodal = head([x, y])
    assert {name.split(".")[0] for name in head.state_dict()} == {"fc_x", "fc_y", "fc_out"}
    assert GatedFusion([3, 5], 4).fc_out.in_features == 512
    torch.testing.assert_close(fused, head.fc_out(head.fc_x(x).sigmoid() * head.fc_y(y)))
    torch.testing.assert_close(unimodal[0], head.fc_out(head.fc_x(x).sigmoid() * head.fc_x(x)))
    torch.testing.assert_close(unimodal[1], head.fc_out(head.fc_y(y).sigmoid() * head.fc_y(y)))


@pytest.mark.parametrize("kind", [ConcatFusion, SumFusion, GatedFusion])
def test_heads_have_right_gradients_and_compile(kind: Any) -> None:
    head, features = head_of(kind, [3, 2], 3), features_of([3, 2], n=2)
    if kind is GatedFusion:
        head = head_of(kind, [3, 2], 3, 4)
    run: Callable[..., Tensor] = lambda *x: torch.stack([(o := head(x))[0], *o[1]])  # noqa: E731
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in features])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*features), run(*features))
    high = run(*features)[0]
    low = head.bfloat16()([x.bfloat16() for x in features])[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), high, rtol=0.05, atol=0.05)


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arl_coefficients(BY_HAND[:1]), "logits of 1 modalities: must be a list of at least 2 tensors"),
        (lambda: arl_coefficients(torch.zeros(2, 3, 4)), "must be a list of at least 2 tensors"),
        (lambda: arl_coefficients(BY_HAND, temperature=-1.0), r"temperature = -1.0: must be a number in \[0, inf\)"),
        (lambda: arl_coefficients(BY_HAND, floor=1.0), r"floor = 1.0: must be a number in \[0, 1\)"),
        (lambda: arl_coefficients(BY_HAND, floor=-0.1), "floor = -0.1"),
        (lambda: arl_coefficients([torch.zeros(2, 3), torch.zeros(2, 4)]), r"logits\[1\] has the shape \(2, 4\)"),
        (lambda: arl_coefficients([torch.zeros(2, 3), torch.zeros(3, 3)]), r"logits\[1\] has the shape \(3, 3\)"),
        (lambda: arl_coefficients([torch.zeros(3), torch.zeros(3)]), r"logits = torch.float32 \(3,\)"),
        (lambda: arl_coefficients([torch.zeros(0, 3)] * 2), "logits have no rows"),
        (
            lambda: arl_loss(BY_HAND[0], BY_HAND, torch.tensor([0, 1]), -0.5),
            r"gamma = -0.5: must be a number in \[0, inf\)",
        ),
        (lambda: arl_loss(BY_HAND[0], BY_HAND[:1], torch.tensor([0, 1])), "logits of 1 modalities"),
        (lambda: arl_loss(torch.zeros(2, 3), BY_HAND, torch.tensor([0, 1])), r"logits\[0\] has the shape \(2, 2\)"),
        (lambda: arl_loss(BY_HAND[0], BY_HAND, torch.tensor([0, 2])), r"targets = values in \[0, 2\]"),
        (lambda: arl_loss(BY_HAND[0], BY_HAND, torch.tensor([0.0, 1.0])), "ARL needs classification"),
        (lambda: arl_loss(BY_HAND[0], BY_HAND, torch.tensor([0])), r"targets = .*\(1,\)"),
        (lambda: arl_loss(BY_HAND[0], BY_HAND, torch.zeros(2, 3)), r"targets = .*\(2, 3\)"),
        (
            lambda: scale_gradient(torch.zeros(2, 2), torch.zeros(2)),
            r"weight = \(2,\): must be a number or a tensor of one",
        ),
        (lambda: concat_unimodal_logits([torch.zeros(2, 3)] * 2, torch.zeros(4, 7)), "whose D add up to 7"),
        (lambda: concat_unimodal_logits([torch.zeros(2, 3)], torch.zeros(4, 3)), "features of 1 modalities"),
        (lambda: concat_unimodal_logits([torch.zeros(2, 3), torch.zeros(1, 3)], torch.zeros(4, 6)), "the same B"),
        (lambda: ConcatFusion([3], 2), r"in_features = \[3\]: must hold the widths of at least 2"),
        (lambda: SumFusion([3, 0], 2), "in_features = 0: must be an integer >= 1"),
        (lambda: SumFusion([3, 2], 1), "num_classes = 1: must be an integer >= 2"),
        (lambda: GatedFusion([3, 2, 2], 2), r"in_features = \[3, 2, 2\]: must hold exactly 2 widths"),
        (lambda: GatedFusion([3, 2], 2, dim=0), "dim = 0"),
        (lambda: ConcatFusion([3, 2], 4)([torch.zeros(2, 2), torch.zeros(2, 3)]), r"with D = \[3, 2\]"),
        (lambda: SumFusion([3, 2], 4)([torch.zeros(2, 3)]), "features of 1 modalities"),
        (lambda: GatedFusion([3, 2], 4)([torch.zeros(2, 3, 1), torch.zeros(2, 2)]), "features have the shapes"),
        (lambda: ARL(gamma=-1.0), "gamma = -1.0"),
        (lambda: ARL(temperature=-1.0), "temperature = -1.0"),
        (lambda: ARL(floor=1.0), "floor = 1.0"),
        (lambda: ARL(start_epoch=-2), "start_epoch = -2: must be an integer >= -1"),
        (lambda: ARL(clip=0.0), r"clip = 0.0: must be a number in \(0, inf\)"),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- the method in a run ----------------------------------------------------------------------------------------------
PROBLEM = multimodal()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def train(*methods: Method, **options: Any) -> equipoise.Run:
    return PROBLEM.train(methods, **options)


def test_the_kit() -> None:
    check_method(
        ARL,
        settings={"start_epoch": 0},
        problem=PROBLEM,
        compile=True,
        skip={"accumulation": "the factors are those of each micro-batch"},
    )


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    (report,) = check_methods_ddp([(ARL, {"start_epoch": 0})], problem=PROBLEM)
    assert report.passed == ["ddp-trains", "ddp-ranks", "ddp-equals-one"]


def test_neutral_is_joint_training_bit_for_bit() -> None:
    assert ARL.neutral is not None
    assert same(train(ARL(**ARL.neutral)).model, train().model)
    # Each of the three settings counts.
    for name, value in {"gamma": 1.0, "start_epoch": 0, "clip": 0.01}.items():
        assert not same(train(ARL(**{**ARL.neutral, name: value})).model, train().model)


def by_hand(gamma: float, temperature: float, start_epoch: int, clip: float) -> tuple[nn.Module, list[list[float]]]:
    """Training without hooks: the encoders' gradients of each batch are multiplied after the backward pass."""
    model, data = PROBLEM.network(), PROBLEM.examples
    optimizer = PROBLEM.make_optimizer(model.parameters())
    order, seen = torch.Generator().manual_seed(PROBLEM.seed), []
    for epoch in range(PROBLEM.epochs):
        sampler = torch.utils.data.RandomSampler(data, generator=order)
        for rows in torch.tensor(list(sampler)).split(PROBLEM.batch_size):
            batch = data.take(rows)
            output = model(**batch.inputs)
            started = epoch > start_epoch
            loss = F.cross_entropy(output.fused, batch.targets)
            for u in output.unimodal:
                loss = loss + (gamma if started else 1.0) * F.cross_entropy(u, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            if started:
                weights = arl_coefficients(output.unimodal, temperature=temperature).weights
                for encoder, w in zip(model.encoders.values(), weights, strict=True):
                    for parameter in encoder.parameters():
                        parameter.grad *= 1 + w
                seen.append(weights.tolist())
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model, seen


@pytest.mark.parametrize(("start_epoch", "clip"), [(-1, 40.0), (0, 1.5), (1, 40.0), (9, 40.0)])
def test_in_a_run_it_is_the_loop_by_hand(start_epoch: int, clip: float) -> None:
    run = train(ARL(gamma=3.0, temperature=4.0, start_epoch=start_epoch, clip=clip))
    model, seen = by_hand(3.0, 4.0, start_epoch, clip)
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))
    last = run.history[-1]
    if start_epoch < PROBLEM.epochs - 1:
        steps = len(run.loader)  # type: ignore[arg-type]
        mean = torch.tensor(seen[-steps:]).mean(0).tolist()
        assert [last["weight_left"], last["weight_right"]] == pytest.approx(mean, abs=1e-6)
    else:
        assert last["weight_left"] == last["weight_right"] == 0
    assert 0 < last["entropy_left"] < math.log(3) and last["dependence_right"] > 0


def test_the_factor_reaches_the_encoders_and_not_the_head() -> None:
    def gradients(*methods: Method) -> dict[str, Tensor]:
        model, batch = PROBLEM.network(), PROBLEM.examples.take(torch.arange(8))
        run = equipoise.start(model, PROBLEM.make_optimizer, data=PROBLEM.examples, methods=methods)
        run.backward(run.training_loss(batch))
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients(ARL(gamma=0.5, start_epoch=9))  # the same loss: gamma is below 1 before and after the start
    scaled = gradients(ARL(gamma=0.5, start_epoch=-1))
    weights = arl_coefficients(PROBLEM.network()(**PROBLEM.examples.take(torch.arange(8)).inputs).unimodal).weights
    assert abs(weights[0] - weights[1]) > 0.01
    factors = {"left": 1 + weights[0], "right": 1 + weights[1]}
    for name, gradient in scaled.items():
        part = name.split(".")
        torch.testing.assert_close(gradient, plain[name] * (factors[part[1]] if part[0] == "encoders" else 1))


def test_hooks_leave_keys_copies_and_evaluation_alone_and_are_removed() -> None:
    model = PROBLEM.network()
    keys = list(model.state_dict())
    method = ARL(start_epoch=-1)
    run = equipoise.start(model, PROBLEM.make_optimizer, data=PROBLEM.examples, methods=[method])
    assert list(run.model.state_dict()) == keys and leftover_hooks(run.model)
    method.modulation.weights.fill_(2.0)
    twin = copy.deepcopy(run.model)
    inputs = PROBLEM.examples.take(torch.arange(8)).inputs
    method.modulation.weights.zero_()  # the copy keeps weights of its own
    for network, training, factor in ((run.model, True, 1.0), (twin, True, 3.0), (twin, False, 1.0)):
        network.train(training).zero_grad()
        network(**inputs).fused.sum().backward()
        plain = PROBLEM.network()
        plain(**inputs).fused.sum().backward()
        assert torch.equal(network(**inputs).fused, plain(**inputs).fused)
        torch.testing.assert_close(
            network.encoders["left"][0].weight.grad, factor * plain.encoders["left"][0].weight.grad
        )
    run.finish()
    assert not leftover_hooks(run.model)


def test_compiled_models_are_modulated() -> None:
    def compiled() -> nn.Module:
        return torch.compile(PROBLEM.network(), backend="aot_eager", fullgraph=True)  # type: ignore[return-value]

    options = PROBLEM.options(validation=None)
    run = equipoise.fit(compiled(), PROBLEM.examples, methods=[ARL(start_epoch=0)], **options)
    torch.testing.assert_close(
        list(run.model.parameters()), list(train(ARL(start_epoch=0)).model.parameters()), rtol=1e-4, atol=1e-6
    )


def test_the_factors_are_those_of_each_micro_batch() -> None:
    model, batch = PROBLEM.network(), PROBLEM.examples.take(torch.arange(8))
    run = equipoise.start(
        model, PROBLEM.make_optimizer, data=PROBLEM.examples, methods=[ARL(gamma=0.5, start_epoch=-1)]
    )
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for piece in batch.split(2):
        copied = PROBLEM.network()
        output = copied(**piece.inputs)
        (arl_loss(output.fused, output.unimodal, piece.targets, 0.5) / 2).backward()
        weights = dict(zip(copied.encoders, arl_coefficients(output.unimodal).weights, strict=True))
        for name, p in copied.named_parameters():
            expected[name] += p.grad * (1 + weights[name.split(".")[1]] if name.startswith("encoders") else 1)
        run.backward(run.training_loss(piece) / 2)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_works_with_every_head_and_three_modalities() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(20, 4, generator=generator) for name in ("a", "b", "c")}
    labels = torch.arange(20) % 3
    for kind, names in ((ConcatFusion, "abc"), (SumFusion, "abc"), (GatedFusion, "ab")):
        net = MultimodalNet({name: nn.Linear(4, 5) for name in names}, kind([5] * len(names), 3))
        chosen = {name: inputs[name] for name in names}
        run = equipoise.fit(net, equipoise.Examples(chosen, labels), epochs=2, methods=[ARL(start_epoch=0)])
        weights = [run.history[-1][f"weight_{name}"] for name in names]
        assert sum(weights) == pytest.approx(1.0) and min(weights) > 0


class NoUnimodal(TinyModalities):
    def forward(self, **inputs: Tensor) -> Any:
        return super().forward(**inputs).fused


class OneUnimodal(TinyModalities):
    def forward(self, **inputs: Tensor) -> Any:
        output = super().forward(**inputs)
        return Output(output.fused, unimodal=output.unimodal[:1])


class NoFused(TinyModalities):
    def forward(self, **inputs: Tensor) -> Any:
        output = super().forward(**inputs)
        return {"prediction": output.fused, "unimodal": output.unimodal}


def test_models_that_do_not_fit_are_refused() -> None:
    def attempt(model: nn.Module) -> equipoise.Run:
        return equipoise.fit(model, PROBLEM.examples, methods=[ARL()], **PROBLEM.options(validation=None))

    with pytest.raises(ArgumentError, match=r"model = Linear: must hold the encoders of at least 2 modalities"):
        attempt(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match=r"output.unimodal = None: must be a list of 2 tensors"):
        attempt(NoUnimodal())
    with pytest.raises(ArgumentError, match=r"output.unimodal = logits of 1 modalities"):
        attempt(OneUnimodal())
    shared = TinyModalities()
    shared.encoders["right"] = shared.encoders["left"]
    with pytest.raises(ArgumentError, match="two are the same module"):
        attempt(shared)
    tuples = TinyModalities()
    tuples.encoders["left"] = nn.LSTM(4, 5)
    with pytest.raises(ArgumentError, match="encoder returned tuple: must return a tensor of features"):
        attempt(tuples)
    lonely = TinyModalities()
    del lonely.encoders["right"]
    with pytest.raises(ArgumentError, match="at least 2 modalities"):
        attempt(lonely)
    assert same(attempt(NoFused()).model, attempt(TinyModalities()).model)
