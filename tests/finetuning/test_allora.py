"""ALLoRA against hand-computed numbers, plain LoRA, and the backward pass as a loop over examples and rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.finetuning.adapters import LoRALinear, load_adapter, save_adapter
from equipoise.finetuning.allora import (
    ALLoRA,
    ALLoRALinear,
    allora_linear,
    allora_scale,
    apply_allora,
    export_peft,
    merge_adapters,
)
from equipoise.testing import check_layer, check_method, check_methods_ddp, classification

torch.set_num_threads(1)
BY_HAND = [[3.0, 4.0]], [[1.0], [0.0], [2.0]]


def by_hand() -> tuple[Tensor, Tensor]:
    a, b = (torch.tensor(values).requires_grad_() for values in BY_HAND)
    return a, b


def factors(
    r: int = 3, n_in: int = 5, n_out: int = 4, seed: int = 0, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, n_in, generator=g, dtype=dtype), torch.randn(n_out, r, generator=g, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def inputs(*shape: int, seed: int = 1, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def gradients(output: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum of the outputs."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), of)


# -- the scale --------------------------------------------------------------------------------------------------------
def test_scale_by_hand() -> None:
    assert allora_scale(*by_hand(), 2.0).tolist() == pytest.approx([0.436436, 2.0, 0.312348], abs=1e-6)


@pytest.mark.parametrize("eta", [0.5, 2.0, 10.0, math.inf])
@pytest.mark.parametrize("r", [1, 3])
def test_scale_against_the_dense_product(eta: float, r: int) -> None:
    a, b = factors(r)
    with torch.no_grad():
        b[1] = 0
    expected = []
    for row in (b @ a).tolist():
        norm = math.sqrt(sum(v * v for v in row))
        expected.append(1 / math.sqrt(max(norm, 1e-12) if eta == math.inf else norm + 1 / eta**2))
    scale = allora_scale(a, b, eta)
    assert scale.tolist() == pytest.approx(expected, rel=1e-9) and not scale.requires_grad
    assert scale[1].item() == pytest.approx(1e6 if eta == math.inf else eta)


def test_scale_is_at_most_one_from_a_norm_on_and_falls_as_the_root() -> None:
    a, b = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([0.75, 1e8, 4e8], dtype=torch.float64))
    scale = allora_scale(a, b, 2.0)
    assert scale[0] == 1  # a norm of 1 - 1 / eta^2
    assert (scale[1] / scale[2]).item() == pytest.approx(2.0)
    assert scale[1].item() == pytest.approx(1e-4)


def test_scale_is_invariant_to_the_factorisation() -> None:
    a, b = factors()
    q, _ = torch.linalg.qr(inputs(3, 3).detach())
    expected = allora_scale(a, b, 2.0)
    torch.testing.assert_close(allora_scale(q @ a, b @ q.T, 2.0), expected)
    torch.testing.assert_close(allora_scale(a / 7, 7 * b, 2.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_is_computed_in_float32_and_stays_finite(dtype: torch.dtype) -> None:
    a, b = (t.detach().to(dtype) for t in factors())
    scale = allora_scale(a, b, 2.0)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, allora_scale(a.double(), b.double(), 2.0).float())
    # Rows that cancel exactly, which rounding may leave below zero, and large ones.
    opposite = torch.tensor([[1.0, 1], [1, 1]], dtype=dtype), torch.tensor([[1.0, -1], [300, 300]], dtype=dtype)
    assert allora_scale(*opposite, 2.0)[0] == 2
    assert torch.isfinite(allora_scale(*opposite, 2.0)).all()


# -- the product and its gradients ------------------------------------------------------------------------------------
def test_linear_by_hand() -> None:
    a, b = by_hand()
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    y = allora_linear(x, a, b, 2.0)
    y.sum().backward()
    assert y.tolist() == [[7, 0, 14]] and x.grad.tolist() == [[9, 12]]
    assert a.grad.flatten().tolist() == pytest.approx([1.061131, 1.061131], abs=1e-6)
    assert b.grad.flatten().tolist() == pytest.approx([3.055050, 14.0, 2.186433], abs=1e-6)
    a, b = by_hand()
    F.linear(F.linear(x.detach(), a), b).sum().backward()
    assert a.grad.tolist() == [[3, 3]] and b.grad.flatten().tolist() == [7, 7, 7]


@pytest.mark.parametrize("lead", [(6,), (2, 3), (), (2, 1, 3)])
@pytest.mark.parametrize("eta", [2.0, 0.7])
def test_gradients_against_a_loop_over_examples_and_rows(lead: tuple[int, ...], eta: float) -> None:
    a, b = factors()
    x = inputs(*lead, 5)
    y = allora_linear(x, a, b, eta)
    torch.testing.assert_close(y, x @ a.T @ b.T)
    delta = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    grad_x, grad_a, grad_b = gradients(y, x, a, b)
    wanted_a, wanted_b, wanted_x = torch.zeros_like(a), torch.zeros_like(b), []
    dense = (b @ a).detach()
    for row, d in zip(x.detach().reshape(-1, 5), delta.reshape(-1, 4), strict=True):
        wanted_x.append(d @ dense)
        for i in range(4):
            s = 1 / math.sqrt(dense[i].norm().item() + 1 / eta**2)
            of_row = s * d[i] * row  # the example's gradient of row i of B A, scaled before the chain rule
            wanted_b[i] += (a @ of_row).detach()
            wanted_a += torch.outer(b[i], of_row).detach()
    torch.testing.assert_close(grad_a, wanted_a)
    torch.testing.assert_close(grad_b, wanted_b)
    torch.testing.assert_close(grad_x, torch.stack(wanted_x).reshape(x.shape))


def test_at_zero_the_gradient_of_b_is_eta_times_the_plain_one() -> None:
    a, b = factors()
    with torch.no_grad():
        b.zero_()
    x = inputs(6, 5)
    grad_a, grad_b = gradients(allora_linear(x, a, b, 3.0), a, b)
    (plain,) = gradients(x @ a.T @ b.T, b)
    assert torch.equal(grad_a, torch.zeros_like(a))
    torch.testing.assert_close(grad_b, 3 * plain)


def test_gradient_of_the_input_and_of_layers_below_is_that_of_lora() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = inputs(7, 6)
    found = []
    for kind in (ALLoRALinear, LoRALinear):
        model = copy.deepcopy(base)
        model[2] = kind(model[2], 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model[2].lora_B.copy_(factors(2, 5, 4)[1])
        found.append(gradients(model(x), x, model[0].weight))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rows_of_equal_norm_leave_the_direction_unchanged() -> None:
    a, b = torch.eye(3, dtype=torch.float64, requires_grad=True), torch.eye(3, dtype=torch.float64, requires_grad=True)
    x = inputs(6, 3)
    scale = 1 / math.sqrt(1 + 1 / 4)
    for ours, plain in zip(gradients(allora_linear(x, a, b, 2.0), a, b), gradients(x @ a.T @ b.T, a, b), strict=True):
        torch.testing.assert_close(ours, scale * plain)


def test_one_sgd_step_from_zero_is_loras_at_eta_times_the_rate() -> None:
    base, x = nn.Linear(5, 4).double(), inputs(6, 5)
    steps = []
    for kind, rate in ((ALLoRALinear, 0.1), (LoRALinear, 0.1 * 2.0)):
        layer = kind(copy.deepcopy(base), 2, generator=torch.Generator().manual_seed(0))
        start = layer.lora_A.detach().clone()
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=rate)
        layer(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(layer.lora_A, start)
        steps.append(layer.merged_weight())
    torch.testing.assert_close(steps[0], steps[1])
    assert (steps[0] - base.weight).abs().max() > 0.01


def test_factors_of_the_forward_pass_are_used_and_a_changed_one_is_an_error() -> None:
    a, b = factors()
    loss = allora_linear(inputs(6, 5), a, b, 2.0).sum()
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_shared_layer_adds_up_and_accumulation_does_too() -> None:
    a, b = factors(3, 4, 4)
    x = inputs(6, 4)
    first = allora_linear(x, a, b, 2.0)
    together = gradients(allora_linear(torch.cat([x, first.detach()]), a, b, 2.0), b)
    weights = torch.linspace(-1, 2, 48, dtype=x.dtype).reshape(12, 4).split(6)
    halves = [
        torch.autograd.grad((allora_linear(rows, a, b, 2.0) * w).sum(), b)[0]
        for rows, w in zip((x, first.detach()), weights, strict=True)
    ]
    torch.testing.assert_close(together[0], halves[0] + halves[1])


def test_an_empty_batch_gives_zero_gradients() -> None:
    a, b = factors()
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    y = allora_linear(x, a, b, 2.0)
    y.sum().backward()
    assert y.shape == (0, 4) and x.grad.shape == (0, 5)
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


def test_double_backward_raises() -> None:
    a, b = factors()
    (first,) = torch.autograd.grad(allora_linear(inputs(6, 5), a, b, 2.0).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_what_needs_a_gradient_gets_one() -> None:
    a, b = factors()
    x = inputs(6, 5).detach()
    (alone,) = gradients(allora_linear(x, a.detach(), b, 2.0), b)
    torch.testing.assert_close(alone, gradients(allora_linear(x, a, b, 2.0), b)[0])
    frozen = inputs(6, 5)
    (through,) = gradients(allora_linear(frozen, a.detach(), b.detach(), 2.0), frozen)
    torch.testing.assert_close(through, gradients(frozen @ a.T @ b.T, frozen)[0])
    with torch.no_grad():
        assert not allora_linear(x, a, b, 2.0).requires_grad


def test_extreme_values_stay_finite() -> None:
    a, b = (t.detach().float().mul(1e4).requires_grad_() for t in factors())
    x = inputs(6, 5, dtype=torch.float32)
    for eta in (1e-3, 2.0, math.inf):
        for gradient in gradients(allora_linear(x, a, b, eta), x, a, b):
            assert torch.isfinite(gradient).all()


def test_autocast_takes_the_scale_from_float32() -> None:
    a, b = factors(dtype=torch.float32)
    x = inputs(6, 5, dtype=torch.float32)
    exact = gradients(allora_linear(x, a, b, 2.0), x, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(x, a, b, 2.0)
        assert y.dtype == torch.bfloat16
        scale = y.grad_fn.next_functions[0][0].saved_tensors[0]
    assert torch.equal(scale, allora_scale(a, b, 2.0)) and scale.dtype == torch.float32
    found = torch.autograd.grad((y.float() * torch.linspace(-1, 2, 24).reshape(6, 4)).sum(), (x, a, b))
    for half, full in zip(found, exact, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.1)


def test_compiles_whole() -> None:
    a, b = factors()
    x = inputs(6, 5)
    compiled = torch.compile(allora_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradients(compiled(x, a, b, 2.0), x, a, b), gradients(allora_linear(x, a, b, 2.0), x, a, b)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 5), *factors(), 0.0), "eta = 0.0: must be a number in (0"),
        ((torch.ones(2, 5), *factors(), -1.0), "eta = -1.0"),
        ((torch.ones(2, 5), *factors(), math.nan), "eta = nan"),
        ((torch.ones(2, 4), *factors(), 2.0), "x has shape (2, 4): must be (..., 5)"),
        ((torch.ones(()), *factors(), 2.0), "x has shape ()"),
        ((torch.ones(2, 5), factors()[0], factors(2)[1], 2.0), "A, B = (3, 5), (4, 2): must be (r, in) and (out, r)"),
        ((torch.ones(2, 5), factors()[0][0], factors()[1], 2.0), "A, B = (5,), (4, 3)"),
    ],
)
def test_bad_input(arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        allora_linear(*arguments)
    assert message in str(error.value)


# -- the layer --------------------------------------------------------------------------------------------------------
def test_layer_starts_as_its_base_and_trains_the_factors_alone() -> None:
    base = nn.Linear(6, 4)
    layer = ALLoRALinear(base, 2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), base(x)) and layer.weight is base.weight
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (2, 6) and layer.lora_B.shape == (4, 2)
    assert 0 < layer.lora_A.abs().max() <= 1 / math.sqrt(6) and not layer.lora_B.any()
    assert "eta=2.0" in repr(layer)


def test_layer_as_a_part() -> None:
    def make() -> ALLoRALinear:
        layer = ALLoRALinear(nn.Linear(6, 4), 2, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
        return layer.eval()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reason = "its gradient is scaled on purpose"
        assert check_layer(make, shape=(4,), skip={"gradient": reason}).passed


def test_gradients_of_the_layer_are_those_of_its_parts() -> None:
    layer = ALLoRALinear(nn.Linear(6, 4).double(), 2)
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    x = inputs(5, 3, 6).transpose(0, 1)  # not contiguous
    found = []
    for thawed in (False, True):
        layer.weight.requires_grad_(thawed)
        found.append(gradients(layer(x), x, layer.lora_A, layer.lora_B))
    parts = F.linear(x, layer.weight, layer.bias) + allora_linear(x, layer.lora_A, layer.lora_B, 2.0)
    for one, two, whole in zip(*found, gradients(parts, x, layer.lora_A, layer.lora_B), strict=True):
        torch.testing.assert_close(one, whole)
        torch.testing.assert_close(two, whole)
    (of_weight,) = gradients(layer(x), layer.weight)
    torch.testing.assert_close(of_weight, gradients(F.linear(x, layer.weight), layer.weight)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_merge_gives_the_plain_layer(bias: bool) -> None:
    layer = ALLoRALinear(nn.Linear(6, 4, bias=bias), 2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    merged = layer.merge()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0, atol=0)
    a, b = layer.lora_factors()
    torch.testing.assert_close(layer.original_weight() + b @ a, layer.merged_weight())


@pytest.mark.parametrize("rank", [0, 5, 1.5])
def test_bad_rank_and_eta_of_the_layer(rank: Any) -> None:
    with pytest.raises(ArgumentError, match="rank ="):
        ALLoRALinear(nn.Linear(6, 4), rank)
    with pytest.raises(ArgumentError, match="eta ="):
        ALLoRALinear(nn.Linear(6, 4), 2, eta=0.0)


# -- in a model -------------------------------------------------------------------------------------------------------
def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(model: nn.Module) -> nn.Module:
    """The model after a few steps."""
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_apply_and_merge_a_model() -> None:
    plain = network()
    model = apply_allora(copy.deepcopy(plain), 2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.lora_{factor}" for i in (0, 2) for factor in "AB"
    }
    x = torch.randn(5, 6)
    assert torch.equal(model(x), plain(x))
    before = trained(model)(x)
    assert not torch.allclose(before, plain(x), atol=1e-2)
    merged = merge_adapters(model)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(merged(x), before)
    with pytest.raises(ArgumentError, match="has no adapters"):
        merge_adapters(model)


@pytest.mark.parametrize("target", [["2"], lambda name, _: name == "2"])
def test_target(target: Any) -> None:
    model = apply_allora(network(), 2, target=target)
    assert [type(module).__name__ for module in model] == ["Linear", "ReLU", "ALLoRALinear"]
    with pytest.raises(ArgumentError, match=r"matches no nn\.Linear"):
        apply_allora(network(), 2, target=["head"])


def test_the_first_factors_are_the_generators() -> None:
    one, two = (apply_allora(network(), 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0].lora_A, two[0].lora_A)


def test_peft_reads_the_export(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra equipoise[hf]")
    plain = network()
    model = trained(apply_allora(copy.deepcopy(plain), 2))
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    x = torch.randn(7, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=2e-6)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (2, 2, 0.0, False)


def test_saved_adapter_is_read_back(tmp_path: Any) -> None:
    model = trained(apply_allora(network(), 2))
    save_adapter(model, tmp_path / "a.safetensors")
    other = load_adapter(apply_allora(network(), 2), tmp_path / "a.safetensors")
    x = torch.randn(7, 6)
    assert torch.equal(other(x), model(x))


# -- the method -------------------------------------------------------------------------------------------------------
def test_method() -> None:
    check_method(ALLoRA, settings={"rank": 2})
    check_methods_ddp([(ALLoRA, {"rank": 2, "eta": 5.0})])


def test_method_is_the_loop_of_ones_own() -> None:
    problem = classification()
    run = problem.train([ALLoRA(rank=2, target=["head"])])
    assert run.model.state_dict().keys() == problem.network().state_dict().keys()
    start, end = problem.network().state_dict(), run.model.state_dict()
    assert [name for name in start if not torch.equal(start[name], end[name])] == ["head.weight"]
    assert torch.linalg.matrix_rank((end["head.weight"] - start["head.weight"]).double(), rtol=1e-5) == 2


def test_method_refuses_a_rank_that_does_not_fit_before_training() -> None:
    with pytest.raises(ArgumentError, match="rank = 8: must be at most"):
        classification().train([ALLoRA()])
    for settings in ({"rank": 0}, {"eta": -1.0}):
        with pytest.raises(ArgumentError):
            ALLoRA(**settings)


def test_a_hugging_face_model_unchanged() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
    keys = model.state_dict().keys()
    tokens = torch.randint(2, 30, (32, 8), generator=torch.Generator().manual_seed(0))
    data = equipoise.Examples({"input_ids": tokens}, (tokens[:, 1] > 15).long())
    run = equipoise.fit(
        model,
        data,
        methods=[ALLoRA(rank=2, target=["query", "value", "classifier"])],
        epochs=8,
        batch_size=16,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert run.model.state_dict().keys() == keys
