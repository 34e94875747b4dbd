"""BA-LoRA against the paper's formulas, hand-computed numbers, loops in plain Python, peft, and PiSSA in a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError, NonFiniteError
from equipoise.finetuning.adapters import detach_adapters, load_adapter, save_adapter, trainable_report
from equipoise.finetuning.ba_lora import (
    BALoRA,
    BALoRALoss,
    PiSSALinear,
    apply_pissa,
    ba_lora_weights,
    consistency_loss,
    covariance_diversity_loss,
    entropy_diversity_loss,
    export_peft,
    merge_adapters,
    next_token_mask,
    svd_loss,
    teacher_mode,
)
from equipoise.testing import check_layer, check_method, check_regularizer, classification, spawn
from equipoise.training import Examples, Method

torch.set_num_threads(1)
PROBLEM = classification()


def logits_of(n: int = 6, d: int = 4, seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with its trained parameters changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


# -- consistency ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_oracle_1_consistency_with_oneself_is_zero_and_so_is_its_gradient(kind: str) -> None:
    z = logits_of().requires_grad_()
    loss = consistency_loss(z, z.detach().clone(), temperature=2.0, kind=kind)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(0, abs=1e-15) and gradient.abs().max() < 1e-15


def test_oracle_2_consistency_by_hand_and_its_gradient() -> None:
    student = torch.tensor([[math.log(3), 0.0]])
    for temperature, value in ((1.0, 0.143841), (2.0, 0.149009)):
        assert consistency_loss(student, torch.zeros(1, 2), temperature=temperature).item() == pytest.approx(
            value, abs=1e-6
        )
    z, teacher = logits_of().requires_grad_(), logits_of(seed=1).requires_grad_()
    for temperature in (0.5, 3.0):
        z.grad = None
        consistency_loss(z, teacher, temperature=temperature).backward()
        expected = temperature * ((z / temperature).softmax(1) - (teacher / temperature).softmax(1)) / len(z)
        torch.testing.assert_close(z.grad, expected.detach())
    assert teacher.grad is None


def test_consistency_is_the_definition() -> None:
    z, teacher, temperature = logits_of().tolist(), logits_of(seed=1).tolist(), 1.7

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(v / temperature) for v in row]
        return [p / sum(powers) for p in powers]

    total = 0.0
    for row, wanted in zip(z, teacher, strict=True):
        for p, q in zip(softmax(row), softmax(wanted), strict=True):
            total += q * math.log(q / p)
    found = consistency_loss(torch.tensor(z), torch.tensor(teacher), temperature=temperature)
    assert found.item() == pytest.approx(temperature**2 * total / len(z), rel=1e-5)
    peer = temperature**2 * nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(logits_of() / temperature, 1), F.softmax(logits_of(seed=1) / temperature, 1)
    )
    torch.testing.assert_close(consistency_loss(logits_of(), logits_of(seed=1), temperature=temperature), peer)
    squares = 0.0
    for row, wanted in zip(z, teacher, strict=True):
        one, two = math.hypot(*row), math.hypot(*wanted)
        squares += sum((a / one - b / two) ** 2 for a, b in zip(row, wanted, strict=True))
    found = consistency_loss(torch.tensor(z), torch.tensor(teacher), temperature=9.0, kind="mse")
    assert found.item() == pytest.approx(squares / 24, rel=1e-5)


def test_consistency_kind_mse_of_a_row_of_zeros_has_a_moderate_gradient() -> None:
    z = torch.zeros(1, 3, requires_grad=True)
    loss = consistency_loss(z, torch.ones(1, 3), kind="mse")
    loss.backward()
    assert loss.item() == pytest.approx(1 / 3) and z.grad is not None and z.grad.abs().max() < 1


# -- diversity --------------------------------------------------------------------------------------------------------
def test_oracle_3_covariance_by_hand() -> None:
    z = torch.tensor([[1.0, 0, 2], [0, 1, 0], [2, 2, 1]])
    assert covariance_diversity_loss(z).item() == 0.5
    shifted = covariance_diversity_loss(z + torch.tensor([3.0, -7.0, 0.0]))
    assert shifted.item() == pytest.approx(0.5, abs=1e-5)
    diagonal = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert covariance_diversity_loss(diagonal).item() == 0
    assert covariance_diversity_loss(z[:, :1]).item() == 0


def test_covariance_is_the_definition() -> None:
    z = logits_of(5, 3)
    total = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                mean = [float(z[:, c].mean()) for c in (i, j)]
                c = sum((float(row[i]) - mean[0]) * (float(row[j]) - mean[1]) for row in z) / 4
                total += c * c
    assert covariance_diversity_loss(z).item() == pytest.approx(total / 3, rel=1e-12)


def test_oracle_4_entropy_by_hand() -> None:
    z = torch.tensor([[2.0, 1.0, 0.0, -5.0]])
    assert entropy_diversity_loss(z, top_k=2).item() == pytest.approx(-0.582203, abs=1e-6)
    assert entropy_diversity_loss(z).item() == pytest.approx(-0.836988, abs=1e-6)
    assert entropy_diversity_loss(torch.ones(3, 50), top_k=20).item() == pytest.approx(-2.995732, abs=1e-6)
    torch.testing.assert_close(entropy_diversity_loss(z, top_k=9), entropy_diversity_loss(z))


# -- spectrum ---------------------------------------------------------------------------------------------------------
def test_oracle_5_spectrum_by_hand() -> None:
    rank_one = torch.tensor([[1.0], [2.0], [-1.0]]) @ torch.tensor([[1.0, -3.0]])
    for k in (1, 2, 7):
        for norm in ("nuclear", "fro"):
            assert svd_loss(rank_one, k, norm=norm).item() == pytest.approx(-1, abs=1e-6)
    z = torch.tensor([[3.0, 0], [0, 4], [0, 0]])
    assert svd_loss(z, 1).item() == pytest.approx(-4 / 7)
    assert svd_loss(z, 1, norm="fro").item() == pytest.approx(-0.8)
    for k in (1, 2, 4):
        assert svd_loss(torch.eye(4), k).item() == pytest.approx(-k / 4)
        assert svd_loss(torch.eye(4), k, norm="fro").item() == pytest.approx(-k / 2)
    for norm in ("nuclear", "fro"):
        for randomized in (False, True):
            leaf = logits_of().requires_grad_()
            generator = torch.Generator().manual_seed(0)
            loss = svd_loss(leaf, 2, norm=norm, randomized=randomized, generator=generator)
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert (gradient * leaf).sum().abs() < 1e-12 < gradient.norm()
            generator.manual_seed(0)
            scaled = svd_loss(7 * leaf, 2, norm=norm, randomized=randomized, generator=generator)
            torch.testing.assert_close(scaled, loss)


def test_spectrum_is_skipped_where_there_is_none() -> None:
    for z in (torch.ones(1, 4), torch.ones(4, 1), torch.zeros(4, 3), torch.full((4, 3), 1e-10)):
        leaf = z.clone().requires_grad_()
        loss = svd_loss(leaf, 2)
        loss.backward()
        assert loss.item() == 0 and torch.equal(leaf.grad, torch.zeros_like(z))  # type: ignore[arg-type]
    bad = torch.ones(3, 3)
    for value in (math.nan, math.inf):
        bad[1, 1] = value
        assert not svd_loss(bad, 1).isfinite()


def test_random_projection_gives_value_and_gradient_of_dominant_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 4, generator=generator), torch.randn(4, 5000, generator=generator)
    z = (left @ right + 0.01 * torch.randn(30, 5000, generator=generator)).requires_grad_()
    exact = svd_loss(z, 4, norm="fro", randomized=False)
    (wanted,) = torch.autograd.grad(exact, z)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = svd_loss(z, 4, norm="nuclear", generator=generator)  # 5000 columns: by itself, and then always Frobenius
    (gradient,) = torch.autograd.grad(found, z)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    assert (gradient - wanted).norm() < 0.02 * wanted.norm()
    peer = -torch.svd_lowrank(z, q=9, niter=2)[1][:4].sum() / z.norm()
    torch.testing.assert_close(found, peer, rtol=1e-4, atol=0)
    full = svd_loss(z, 30)  # k is not below the number of singular values: exact, nuclear
    assert full.item() == pytest.approx(-1, abs=1e-6)


# -- the schedule -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (0.025, 0, 0)),
        (200, (0.0228514, 0, 0)),
        (225, (0.0223046, 0.0025, 0.0025)),
        (250, (0.0217050, 0.005, 0.005)),
        (1000, (0.0025, 0.005, 0.005)),
    ],
)
def test_oracle_6_weights_of_generation(step: int, expected: tuple[float, float, float]) -> None:
    lambdas = (0.025, 0.005, 0.005)
    assert ba_lora_weights(step, 1000, lambdas=lambdas) == pytest.approx(expected, abs=1e-7)
    assert BALoRALoss(task="nlg").weights(step, 1000) == pytest.approx(expected, abs=1e-7)
    assert BALoRALoss(task="nlu").weights(step, 1000) == (0.15, 0.03, 0.03)
    assert BALoRALoss(task="nlg").weights() == lambdas


def test_weights_of_a_short_training_and_beyond_its_end() -> None:
    assert ba_lora_weights(0, 1, lambdas=(1, 1, 1)) == (1, 0, 0)
    assert ba_lora_weights(9, 3, lambdas=(1, 1, 1)) == pytest.approx((0.1, 1, 1))
    assert ba_lora_weights(0, 10, lambdas=(1, 1, 1), warmup_ratio=0.0, ramp_ratio=0.0) == (1, 0, 0)
    assert ba_lora_weights(1, 10, lambdas=(1, 1, 1), warmup_ratio=0.0, ramp_ratio=0.0, floor=1.0) == (1, 1, 1)


# -- masks ------------------------------------------------------------------------------------------------------------
def test_a_mask_picks_the_rows_that_count() -> None:
    z, teacher = logits_of(12, 5).reshape(3, 4, 5), logits_of(12, 5, seed=1).reshape(3, 4, 5)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    rows, wanted = z[mask], teacher[mask]
    for kind in ("kl", "mse"):
        torch.testing.assert_close(
            consistency_loss(z, teacher, mask=mask, kind=kind), consistency_loss(rows, wanted, kind=kind)
        )
    torch.testing.assert_close(entropy_diversity_loss(z, top_k=3, mask=mask), entropy_diversity_loss(rows, top_k=3))
    torch.testing.assert_close(svd_loss(z, 2, mask=mask), svd_loss(rows, 2))
    for task in ("nlu", "nlg"):
        loss = BALoRALoss(task=task)
        torch.testing.assert_close(loss(z, teacher, mask=mask), loss(rows, wanted))
        torch.testing.assert_close(loss(z, teacher), loss(z.flatten(0, 1), teacher.flatten(0, 1)))
    leaf = z.clone().requires_grad_()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    losses = [consistency_loss(leaf, teacher, mask=nothing), consistency_loss(leaf, teacher, mask=nothing, kind="mse")]
    losses += [entropy_diversity_loss(leaf, mask=nothing), svd_loss(leaf, 1, mask=nothing)]
    losses += [BALoRALoss(task=task)(leaf, teacher, mask=nothing) for task in ("nlu", "nlg")]
    for value in losses:
        value.backward()
        assert value.item() == 0 and torch.equal(leaf.grad, torch.zeros_like(z))  # type: ignore[arg-type]


def test_labels_of_a_causal_model_are_shifted() -> None:
    labels = torch.tensor([[-100, -100, 5, 7], [3, -100, -100, 2]])
    expected = [[False, True, True, False], [False, False, True, False]]
    assert next_token_mask(labels).tolist() == expected
    assert next_token_mask(labels.clamp(min=0), ignore_index=0).tolist() == expected


# -- the sum ----------------------------------------------------------------------------------------------------------
def test_penalty_is_the_weighted_sum() -> None:
    z, teacher = logits_of(), logits_of(seed=1)
    found = BALoRALoss(lambdas=(0.3, 0.2, 0.1), k=2, temperature=1.5)(z, teacher)
    parts = consistency_loss(z, teacher, temperature=1.5), covariance_diversity_loss(z), svd_loss(z, 2)
    torch.testing.assert_close(found, 0.3 * parts[0] + 0.2 * parts[1] + 0.1 * parts[2])
    loss = BALoRALoss(task="nlg", lambdas=(0.3, 0.2, 0.1), k=2, top_k=3)
    parts = (
        consistency_loss(z, teacher, temperature=2.0),
        entropy_diversity_loss(z, top_k=3),
        svd_loss(z, 2, norm="fro"),
    )
    torch.testing.assert_close(loss(z, teacher), 0.3 * parts[0] + 0.2 * parts[1] + 0.1 * parts[2])
    torch.testing.assert_close(loss(z, teacher, step=0, total_steps=10), 0.3 * parts[0])
    a, b, c = loss.weights(7, 10)
    torch.testing.assert_close(loss(z, teacher, step=7, total_steps=10), a * parts[0] + b * parts[1] + c * parts[2])
    assert "mse" in repr(BALoRALoss(kind="mse"))
    one = BALoRALoss()(z[:1], teacher[:1])
    torch.testing.assert_close(one, 0.15 * consistency_loss(z[:1], teacher[:1], temperature=2.0))


def test_losses_pass_the_kit() -> None:
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    for kind in ("kl", "mse"):
        check_regularizer(lambda z, kind=kind: consistency_loss(z, teacher.to(z.dtype), temperature=2.0, kind=kind))
    check_regularizer(covariance_diversity_loss)
    check_regularizer(lambda z: entropy_diversity_loss(z, top_k=3))
    for norm in ("nuclear", "fro"):
        check_regularizer(lambda z, norm=norm: svd_loss(z, 2, norm=norm))
    for task in ("nlu", "nlg"):
        check_regularizer(lambda z, task=task: BALoRALoss(task=task, k=2, top_k=3)(z, teacher.to(z.dtype)))


def test_gradcheck_of_the_random_projection_that_spans_all() -> None:
    def loss(z: Tensor) -> Tensor:
        return svd_loss(z, 2, randomized=True, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, logits_of(4, 7).requires_grad_())


@pytest.mark.parametrize("task", ["nlu", "nlg"])
def test_penalty_compiles(task: str) -> None:
    loss = BALoRALoss(task=task, k=2)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    z, teacher = logits_of().requires_grad_(), logits_of(seed=1)
    (one,), (two,) = (torch.autograd.grad(f(z, teacher), z) for f in (loss, compiled))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("task", ["nlu", "nlg"])
def test_degenerate_and_extreme_batches_stay_finite(task: str) -> None:
    batches = [torch.zeros(4, 3), torch.ones(4, 3), torch.eye(3), torch.full((4, 3), 3e4), torch.ones(1, 3)]
    for z in (*batches, *(b.bfloat16() for b in batches)):
        leaf = z.clone().requires_grad_()
        loss = BALoRALoss(task=task)(leaf, torch.zeros_like(z))
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()


# -- the layer --------------------------------------------------------------------------------------------------------
def diagonal(*values: float) -> nn.Linear:
    linear = nn.Linear(len(values), len(values), bias=False)
    linear.weight.data = torch.diag(torch.tensor(values, dtype=torch.float32))
    return linear


def test_oracle_7_the_layer_of_a_diagonal_weight() -> None:
    layer = PiSSALinear(diagonal(3, 2, 1), 1)
    torch.testing.assert_close(layer.weight, torch.diag(torch.tensor([0.0, 2, 1])))
    torch.testing.assert_close(layer.lora_A.detach().abs(), torch.tensor([[math.sqrt(3), 0, 0]]))
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, torch.diag(torch.tensor([3.0, 0, 0])))
    scaled = PiSSALinear(diagonal(3, 2, 1), 1, alpha=4.0)
    torch.testing.assert_close(scaled.lora_A.detach().abs(), torch.tensor([[math.sqrt(0.75), 0, 0]]))


@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, 1.0), (5, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_layer_begins_as_its_base_and_says_what_it_is(rank: int, alpha: float | None, dtype: torch.dtype) -> None:
    base = nn.Linear(7, 5).to(dtype)
    before = base.weight.detach().clone()
    layer = PiSSALinear(base, rank, alpha=alpha)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    close: dict[str, Any] = {
        torch.float32: {"atol": 1e-5},
        torch.float64: {"atol": 1e-12},
        torch.bfloat16: {"atol": 0.05},
    }
    near = {"rtol": 0, **close[dtype]}
    torch.testing.assert_close(layer(x), base(x), **near)
    assert torch.equal(base.weight, before) and base.weight is not layer.weight and layer.lora_A.dtype == dtype
    torch.testing.assert_close(layer.original_weight(), before, **near)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    moved(layer)
    a, b = layer.lora_factors()
    assert a.shape == (2 * rank, 7) and b.shape == (5, 2 * rank)
    torch.testing.assert_close((before + b @ a).to(dtype), layer.merged_weight(), **near)
    torch.testing.assert_close(layer.merge()(x), layer(x), **near)
    assert (layer(x) - base(x)).abs().max() > 0.1
    torch.testing.assert_close(layer.original_weight(), before, **near)


def test_the_layer_passes_the_kit() -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return moved(PiSSALinear(nn.Linear(6, 5), 2, alpha=3.0))

    check_layer(make, shape=(5,))


# -- teacher ----------------------------------------------------------------------------------------------------------
def test_teacher_mode_is_the_pretrained_model_and_is_left_as_it_was() -> None:
    base = nn.Sequential(network(), nn.Dropout(0.5))
    model = moved(apply_pissa(copy.deepcopy(base), 2)).train()
    model[0][1].eval()
    modes = [module.training for module in model.modules()]
    x = torch.randn(5, 6)
    with teacher_mode(model) as teacher:
        assert teacher is model and not any(module.training for module in model.modules())
        torch.testing.assert_close(model(x), base.eval()(x))
        with teacher_mode(model):
            pass
        torch.testing.assert_close(model(x), base(x))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError), teacher_mode(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes
    assert (model.eval()(x) - base(x)).abs().max() > 0.01
    with pytest.raises(ArgumentError, match="has no PiSSA layers"), teacher_mode(base):
        pass


def test_teacher_mode_and_the_layers_compile() -> None:
    base = network()
    model = moved(apply_pissa(copy.deepcopy(base), 2))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 6)
    torch.testing.assert_close(compiled(x), model(x))
    with teacher_mode(compiled):
        torch.testing.assert_close(compiled(x), base(x))
    torch.testing.assert_close(compiled(x), model(x))


# -- files ------------------------------------------------------------------------------------------------------------
def test_merging_and_saving(tmp_path: Path) -> None:
    base = network()
    model = apply_pissa(copy.deepcopy(base), 2)
    assert trainable_report(model).trainable == 2 * (6 + 8) + 2 * (8 + 3)
    moved(model)
    x = torch.randn(5, 6)
    expected = model(x)
    save_adapter(model, tmp_path / "a.safetensors")
    other = moved(apply_pissa(copy.deepcopy(base), 2), seed=7)
    with torch.no_grad():  # the signs of singular vectors are arbitrary: another machine may have others
        for layer in (other[0], other[2]):
            for parameter in (layer.lora_A, layer.lora_B, layer.init_A, layer.init_B):
                parameter.neg_()
    load_adapter(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(detach_adapters(copy.deepcopy(other))(x), base(x))
    merged = merge_adapters(model)
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(x), expected)
    with pytest.raises(ArgumentError, match="merged already"):
        merge_adapters(merged)


def test_oracle_8_peft_loads_the_export_over_the_original_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = network()
    model = moved(apply_pissa(copy.deepcopy(base), 2, alpha=3.0))
    export_peft(model, tmp_path)
    x = torch.randn(5, 6)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(x), merge_adapters(model)(x), rtol=0, atol=1e-5)


def test_starts_as_the_pissa_of_peft() -> None:
    peft = pytest.importorskip("peft")
    base = network()
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa", target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model
    ours = apply_pissa(copy.deepcopy(base), 2, alpha=3.0)
    for i in (0, 2):
        torch.testing.assert_close(ours[i].weight, theirs[i].base_layer.weight, rtol=0, atol=1e-5)
        a, b = theirs[i].lora_A["default"].weight, theirs[i].lora_B["default"].weight
        torch.testing.assert_close(ours[i].lora_B @ ours[i].lora_A, b @ a, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[i].lora_A.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------
Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: consistency_loss(Z, Z, temperature=0.0), r"temperature = 0.0: must be a number in \(0, inf\)"),
        (lambda: consistency_loss(Z, Z, kind="kll"), "kind = 'kll'"),
        (lambda: consistency_loss(Z, torch.zeros(4, 2)), r"teacher_logits = \(4, 2\): must be of the logits' shape"),
        (
            lambda: consistency_loss(Z, Z, mask=torch.ones(4)),
            r"mask = torch.float32 \(4,\): must be bool of shape \(4,\)",
        ),
        (lambda: consistency_loss(Z, Z, mask=torch.ones(3, dtype=torch.bool)), "mask"),
        (lambda: consistency_loss(Z[0], Z[0]), r"logits = torch.float32 \(3,\)"),
        (lambda: consistency_loss(Z.long(), Z.long()), "logits = torch.int64"),
        (lambda: covariance_diversity_loss(Z[:1]), r"logits = \(1, 3\): must have at least 2 rows"),
        (lambda: covariance_diversity_loss(Z[None]), "logits"),
        (lambda: entropy_diversity_loss(Z, top_k=-1), "top_k = -1"),
        (lambda: svd_loss(Z, 0), "k = 0: must be an integer >= 1"),
        (lambda: svd_loss(Z, 1, norm="l1"), "norm = 'l1'"),
        (lambda: ba_lora_weights(0, 0, lambdas=(1, 1, 1)), "total_steps = 0"),
        (lambda: ba_lora_weights(-1, 5, lambdas=(1, 1, 1)), "step = -1"),
        (lambda: ba_lora_weights(0, 5, lambdas=(1, -1, 1)), "lambdas = -1"),
        (lambda: ba_lora_weights(0, 5, lambdas=(1, 1, 1), warmup_ratio=1.5), "warmup_ratio = 1.5"),
        (lambda: ba_lora_weights(0, 5, lambdas=(1, 1, 1), ramp_ratio=-0.1), "ramp_ratio = -0.1"),
        (lambda: ba_lora_weights(0, 5, lambdas=(1, 1, 1), floor=2.0), "floor = 2.0"),
        (lambda: BALoRALoss(task="nlx"), "task = 'nlx': must be one of 'nlu', 'nlg'"),
        (lambda: BALoRALoss(lambdas=(1, 2)), "lambdas"),
        (lambda: BALoRALoss(lambdas="abc"), "lambdas"),
        (lambda: BALoRALoss(k=0), "k = 0"),
        (lambda: BALoRALoss(temperature=-1.0), "temperature"),
        (lambda: BALoRALoss(top_k=-1), "top_k"),
        (lambda: BALoRALoss(kind="l1"), "kind"),
        (lambda: BALoRALoss()(Z, Z[:2]), "teacher_logits"),
        (lambda: BALoRALoss(task="nlg")(Z, Z, step=1), "total_steps = None: must be given with step"),
        (lambda: PiSSALinear(nn.Linear(3, 2), 0), "rank = 0"),
        (lambda: PiSSALinear(nn.Linear(3, 2), 3), "rank = 3: must be at most 2"),
        (lambda: PiSSALinear(nn.Linear(3, 2), 1, alpha=0.0), "alpha"),
        (lambda: PiSSALinear(nn.Conv1d(3, 2, 1), 1), "base = Conv1d"),
        (lambda: PiSSALinear(diagonal(1.0, math.nan), 1), "holds NaN or infinite values"),
        (lambda: apply_pissa(network(), 9), "rank = 9"),
        (lambda: apply_pissa(network(), 2, target=["body"]), "matches no nn.Linear"),
        (lambda: BALoRA(rank=0), "rank"),
        (lambda: BALoRA(alpha=-1.0), "alpha"),
        (lambda: BALoRA(lambdas=(1, 1, -1)), "lambdas"),
        (lambda: BALoRA(task="x"), "task"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- in a run ---------------------------------------------------------------------------------------------------------
class PlainPiSSA(Method):
    """PiSSA with our layers, without penalties."""

    name = "plain-pissa"

    def prepare(self, run: equipoise.Run) -> None:
        run.model = apply_pissa(run.model, 2)

    def finish(self, run: equipoise.Run) -> None:
        run.model = merge_adapters(run.model)


def test_oracle_7_without_weights_it_is_pissa() -> None:
    ours = PROBLEM.train([BALoRA(rank=2, lambdas=(0, 0, 0))])
    plain = PROBLEM.train([PlainPiSSA()])
    penalised = PROBLEM.train([BALoRA(rank=2)])
    for one, two, three in zip(*(run.model.parameters() for run in (ours, plain, penalised)), strict=True):
        assert torch.equal(one, two)
        assert one.shape == three.shape
    assert not torch.equal(ours.model.head.weight, penalised.model.head.weight)
    assert ours.model.state_dict().keys() == PROBLEM.network().state_dict().keys()


def test_in_a_run_it_is_the_loop_by_hand() -> None:
    run = PROBLEM.train([BALoRA(rank=2, lambdas=(0.5, 0.1, 0.2), k=2, temperature=1.5)])
    base = PROBLEM.network()
    model = apply_pissa(copy.deepcopy(base), 2)
    optimizer = PROBLEM.make_optimizer([p for p in model.parameters() if p.requires_grad])
    spy = equipoise.start(
        PROBLEM.network(),
        PROBLEM.make_optimizer,
        data=PROBLEM.examples,
        **{key: value for key, value in PROBLEM.options().items() if key in ("epochs", "batch_size", "seed")},
    )
    for _ in range(PROBLEM.epochs):
        for batch in spy.batches():
            z = model(batch.inputs)
            loss = F.cross_entropy(z, batch.targets)
            with torch.no_grad():
                teacher = base(batch.inputs)
            loss = loss + 0.5 * consistency_loss(z, teacher, temperature=1.5)
            loss = loss + 0.1 * covariance_diversity_loss(z) + 0.2 * svd_loss(z, 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spy.end_epoch()
    for ours, theirs in zip(run.model.parameters(), merge_adapters(model).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_schedule_of_generation_follows_the_run() -> None:
    seen = []

    class Watch(BALoRA):
        """Notes the weights of each step."""

        name = "watch"

        def penalty(self, run: Any, batch: Any, output: Any) -> Tensor:
            seen.append(self.criterion.weights(run.global_step, run.total_steps))
            return super().penalty(run, batch, output)

    PROBLEM.train([Watch(rank=2, task="nlg", k=2, top_k=2)])
    assert seen == [ba_lora_weights(t, 15, lambdas=(0.025, 0.005, 0.005)) for t in range(15)]
    assert seen[2][1] == 0 < seen[4][1]


CHECKS: dict[str, Any] = {
    "settings": {"rank": 2, "k": 2},
    "skip": {"accumulation": "covariance and spectrum are those of each micro-batch"},
}


def test_method_passes_the_kit() -> None:
    check_method(BALoRA, **CHECKS, compile=True)
    check_method(BALoRA, settings={"rank": 2, "task": "nlg", "k": 2, "top_k": 2}, skip=CHECKS["skip"])


def test_two_processes_train_a_model_with_batch_norm() -> None:
    """Whose running statistics DistributedDataParallel broadcasts between the student's pass and its backward."""

    def work() -> Any:
        run = PROBLEM.with_norm().train([BALoRA(rank=2, k=2)])
        yield from run.model.parameters()

    one, two = spawn(work)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match="logits of at least 2 outputs"):
        equipoise.fit(
            nn.Linear(6, 1), (torch.randn(8, 6), torch.randn(8, 1)), epochs=1, loss=F.mse_loss, methods=[BALoRA(rank=1)]
        )
    with pytest.raises(ArgumentError, match="total_steps = None"):
        equipoise.start(network(), PROBLEM.make_optimizer, methods=[BALoRA(rank=2, task="nlg")])
    with pytest.raises(NonFiniteError):
        PROBLEM.train([BALoRA(rank=2)], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30))


# -- token models -----------------------------------------------------------------------------------------------------
def test_a_causal_language_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        tie_word_embeddings=False,
        attention_dropout=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (24, 8), generator=generator)
    labels = tokens.clone()
    labels[:, :3] = -100  # the prompt
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def next_token_loss(prediction: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(prediction[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    seen: dict[str, Tensor] = {}

    class Watch(BALoRA):
        """Notes the last batch's mask and compares the penalty with its parts."""

        name = "watch"

        def penalty(self, run: Any, batch: Any, output: Any) -> Tensor:
            found = super().penalty(run, batch, output)
            mask = torch.zeros(batch.targets.shape, dtype=torch.bool)
            mask[:, 2:-1] = True  # position 2 predicts token 3; the last predicts nothing
            with torch.no_grad():
                teacher = copy.deepcopy(base).eval()(**batch.inputs).logits
            step, total = run.global_step, run.total_steps
            expected = self.criterion(output.prediction[mask], teacher[mask], step=step, total_steps=total)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            seen["penalty"] = found
            return found

    method = Watch(rank=2, task="nlg", lambdas=(0.5, 0.1, 0.1), k=3, target=["q_proj", "v_proj", "lm_head"])
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "loss": next_token_loss}
    run = equipoise.fit(
        copy.deepcopy(base), Examples(inputs, labels), epochs=3, batch_size=8, methods=[method], **options
    )
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] and seen["penalty"].isfinite()
    assert run.model.state_dict().keys() == base.state_dict().keys()
    changed = [k for k, v in run.model.state_dict().items() if not torch.equal(v, base.state_dict()[k])]
    assert sorted({name.split(".")[-2] for name in changed}) == ["lm_head", "q_proj", "v_proj"]
    with pytest.raises(ArgumentError, match="must be labels of shape"):
        method._supervised(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    tokens_of_classes = BALoRA(rank=2)._supervised(torch.zeros(1, 3, 4), torch.tensor([[1, -100, 2]]))
    assert tokens_of_classes is not None and tokens_of_classes.tolist() == [[True, False, True]]


def test_a_classifier_of_transformers_and_peft(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(1, 30, (24, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    class Export(BALoRA):
        """Exports before it merges."""

        name = "export"

        def finish(self, run: equipoise.Run) -> None:
            export_peft(run.model, tmp_path)
            super().finish(run)

    method = Export(rank=2, target=["query", "value", "classifier"])
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.01)  # noqa: E731
    data = Examples(inputs, tokens[:, 1] % 3)
    run = equipoise.fit(copy.deepcopy(base), data, epochs=2, batch_size=8, methods=[method], optimizer=optimizer)
    assert run.model.state_dict().keys() == base.state_dict().keys()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = run.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
        assert (base.eval()(**inputs).logits - expected).abs().max() > 0.01
