"""PELA against the paper's formulas, hand-computed numbers, a loop in plain Python, and what a compressed model must still do."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.finetuning.adapters import LoRALinear, attach, merge_adapters
from equipoise.finetuning.compression_baselines import LowRankScratch, SVDDistill, SVDFinetune, SVDOnly
from equipoise.finetuning.pela import (
    PELA,
    FeatureTap,
    LowRankLinear,
    PELALoss,
    compress,
    export_peft,
    feature_distillation_loss,
    low_rank_factors,
    merge_low_rank,
    pela_rank,
    weight_perturbation_loss,
)
from equipoise.testing import (
    TinyNetwork,
    check_layer,
    check_method,
    check_methods_ddp,
    check_regularizer,
    classification,
)
from equipoise.testing.watch import leftover_hooks
from equipoise.training import Batch, Method, Output, Run

torch.set_num_threads(1)
WIDE = replace(
    classification(), network=partial(TinyNetwork, 6, 16, 3), norm_network=partial(TinyNetwork, 6, 16, 3, norm=True)
)
COMPRESSED: list[type[Method]] = [PELA, SVDOnly, SVDFinetune, SVDDistill, LowRankScratch]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed: int = 0) -> nn.Sequential:
    """Four layers, of which ``head`` stays dense."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        net.add_module("head", nn.Linear(16, 3))
    return net.double()


def shaken(model: nn.Module, seed: int = 1, by: float = 0.05) -> nn.Module:
    """The model with noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


# -- rank and factors -------------------------------------------------------------------------------------------------
def test_rank_by_hand() -> None:
    assert [pela_rank(768, 3072, ratio) for ratio in (1.5, 2, 3)] == [409, 307, 204]
    assert pela_rank(768, 768, 2) == 192 and pela_rank(20, 14, 1.5) == 5 and pela_rank(4, 3, 2) == 0
    assert isinstance(pela_rank(768, 768, 2.5), int)


@pytest.mark.parametrize(("wide", "high", "ratio"), [(768, 3072, 1.5), (20, 14, 1.5), (33, 17, 2.7), (64, 64, 1.01)])
def test_factors_hold_at_most_the_share_of_the_weight(wide: int, high: int, ratio: float) -> None:
    rank = pela_rank(wide, high, ratio)
    assert rank * (wide + high) <= wide * high / ratio < (rank + 1) * (wide + high)
    layer = LowRankLinear.from_linear(nn.Linear(wide, high), rank)
    assert sum(p.numel() for p in layer.parameters()) == rank * (wide + high) + high


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), 0.5])
def test_a_ratio_that_gains_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        pela_rank(16, 16, ratio)
    with pytest.raises(ValueError, match="ratio"):
        compress(network(), ratio)


def test_factors_by_hand() -> None:
    down, up = low_rank_factors(torch.diag(torch.tensor([4.0, 1.0])), 1)
    assert down.abs().tolist() == [[2.0, 0.0]] and up.abs().tolist() == [[2.0], [0.0]]
    assert (up @ down).tolist() == [[4.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_of_the_factors_is_the_sum_of_the_dropped_squares(rank: int) -> None:
    weight = random(6, 9)
    down, up = low_rank_factors(weight, rank)
    assert down.shape == (rank, 9) and up.shape == (6, rank) and down.dtype == torch.float64
    dropped = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - up @ down).square().sum(), dropped, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(down @ down.T, up.T @ up)  # the square roots balance the factors
    torch.testing.assert_close((down @ down.T).diagonal(), torch.linalg.svdvals(weight)[:rank])


def test_half_precision_is_decomposed_in_float32() -> None:
    weight = random(12, 10).bfloat16()
    down, up = low_rank_factors(weight, 4)
    assert down.dtype == up.dtype == torch.bfloat16
    exact = low_rank_factors(weight.float(), 4)
    assert torch.equal(down, exact[0].bfloat16()) and torch.equal(up, exact[1].bfloat16())


@pytest.mark.parametrize("rank", [0, 7, -1, 2.0, True])
def test_ranks_out_of_range_are_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank"):
        low_rank_factors(random(6, 9), rank)
    with pytest.raises(ValueError, match="rank"):
        LowRankLinear.from_linear(nn.Linear(9, 6), rank)
    with pytest.raises(ValueError, match="rank"):
        LowRankLinear(9, 6, rank)


def test_weights_that_are_no_matrix_of_numbers_are_refused() -> None:
    for bad in (random(6), torch.ones(3, 3, dtype=torch.int64), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="weight"):
            low_rank_factors(bad, 1)


# -- the layer --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_gives_the_outputs_of_the_layer(bias: bool) -> None:
    linear = nn.Linear(9, 6, bias=bias).double()
    layer, x = LowRankLinear.from_linear(linear, 6), random(4, 5, 9)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-12, rtol=0)
    assert list(layer.state_dict()) == ["0.weight", "1.weight", "1.bias"][: 2 + bias]
    assert layer[0].weight.shape == (6, 9) and layer[1].weight.shape == (6, 6) and layer[0].bias is None
    assert all(p.requires_grad for p in layer.parameters())
    assert layer.bias is not linear.bias or not bias


def test_the_layer_merges_to_one_that_computes_the_same() -> None:
    layer = shaken(LowRankLinear.from_linear(nn.Linear(9, 6).double(), 2))
    assert isinstance(layer, LowRankLinear)
    plain, x = layer.merge(), random(4, 9)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x), atol=1e-12, rtol=0)
    assert torch.equal(layer.weight, layer.merged_weight()) and torch.equal(plain.weight, layer.merged_weight())
    with torch.no_grad():
        plain.bias.add_(1)  # its own
    assert not torch.equal(plain.bias, layer[1].bias)


def test_the_layer_satisfies_the_kit() -> None:
    check_layer(lambda: LowRankLinear(6, 5, 2), lambda g: (torch.randn(4, 6, generator=g),), shape=(5,))


# -- whole models -----------------------------------------------------------------------------------------------------
def test_compress_makes_a_smaller_copy_and_leaves_the_model_alone() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = compress(model, 2.0, skip=["head"])
    kinds = [type(small.get_submodule(name)) for name in ("0", "2", "4", "head")]
    assert kinds == [LowRankLinear] * 3 + [nn.Linear]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_which_layers_stay() -> None:
    model = nn.ModuleDict({"patch_embed": nn.Linear(20, 20), "few": nn.Linear(20, 9), "thin": nn.Linear(2, 30)})
    model["body"], model["headed"] = nn.Linear(20, 10), nn.Linear(20, 20)
    small = compress(model, 2.0, skip=["head", "patch"])
    assert [name for name, module in small.named_modules() if isinstance(module, LowRankLinear)] == ["body"]
    small = compress(model, 2.0, min_out_features=9)
    found = [name for name, module in small.named_modules() if isinstance(module, LowRankLinear)]
    assert found == ["patch_embed", "few", "body", "headed"]  # thin: rank 0


def test_compressing_twice_changes_nothing() -> None:
    once = compress(network(), skip=["head"])
    twice = compress(once, 3.0, skip=["head"])
    assert list(twice.state_dict()) == list(once.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))
    layer = LowRankLinear(200, 100, 50)  # its inner layers are large enough by themselves
    assert isinstance(compress(layer), LowRankLinear) and type(compress(layer)[0]) is nn.Linear


def test_merging_gives_plain_layers_and_the_same_outputs() -> None:
    small = shaken(compress(network(), skip=["head"]))
    merged, x = merge_low_rank(small), random(7, 20)
    torch.testing.assert_close(merged(x), small(x), atol=1e-12, rtol=0)
    assert not any(isinstance(module, LowRankLinear) for module in merged.modules())
    assert list(merged.state_dict()) == list(network().state_dict())
    with pytest.raises(ValueError, match="twice"):
        merge_low_rank(merged)


def test_a_model_that_is_one_layer() -> None:
    linear = nn.Linear(20, 20)
    small = compress(linear)
    assert isinstance(small, LowRankLinear) and type(merge_low_rank(small)) is nn.Linear
    assert weight_perturbation_loss(small, linear) > 0


def test_frozen_parameters_stay_frozen_and_factors_train() -> None:
    model = network()
    model.head.requires_grad_(False)
    model[0].weight.requires_grad_(False)
    small: Any = compress(model, skip=["head"]).eval()
    assert not small.head.weight.requires_grad and small[0][0].weight.requires_grad and small[0][1].weight.requires_grad
    assert not compress(model.eval())[0].training


def test_tied_weights_share_their_factors() -> None:
    model = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)])
    model[1].weight = model[0].weight
    model.append(model[2])
    small: Any = compress(model)
    assert small[0] is not small[1] and small[2] is small[3]
    assert all(small[0][i].weight is small[1][i].weight for i in (0, 1)) and small[0][1].bias is not small[1][1].bias
    numbers = sum(p.numel() for p in small.parameters())
    assert numbers == 2 * 5 * 40 + 3 * 20
    merged: Any = merge_low_rank(small)
    assert merged[0].weight is merged[1].weight and merged[2] is merged[3]


def test_a_weight_that_something_else_uses_is_refused() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(40, 20), "decoder": nn.Linear(20, 40, bias=False)})
    model["decoder"].weight = model["tokens"].weight
    with pytest.raises(ValueError, match=r"'decoder' is tied to 'tokens'.*skip="):
        compress(model)
    half = nn.ModuleDict({"a": nn.Linear(20, 20), "head": nn.Linear(20, 20)})
    half["head"].weight = half["a"].weight
    with pytest.raises(ValueError, match="'a' is tied to 'head'"):
        compress(half, skip=["head"])


def test_attention_of_torch_is_refused_unless_its_layer_is_left_out() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    with pytest.raises(ValueError, match=r"MultiheadAttention.*skip=\['out_proj'\]"):
        compress(layer)
    small, x = compress(layer, skip=["out_proj"]), random(2, 5, 32, dtype=torch.float32)
    trained = small(x)
    with torch.no_grad():
        quick = small.eval()(x)  # torch's fast path reads the layers' weights
    torch.testing.assert_close(quick, trained.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"skip": ["0", "2", "4", "head"]}, {"ratio": 1000.0}, {"min_out_features": 99}])
def test_nothing_to_compress_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no layer of Sequential to compress"):
        compress(network(), **options)
    with pytest.raises(ValueError, match="no layer"):
        compress(nn.Conv2d(3, 3, 3))


def test_one_word_is_no_list_of_words() -> None:
    with pytest.raises(ValueError, match=r"skip = 'head'.*\['head'\]"):
        compress(network(), skip="head")
    with pytest.raises(ValueError, match="skip"):
        compress(network(), skip=[""])  # would be in every name
    with pytest.raises(ValueError, match="min_out_features"):
        compress(network(), min_out_features=0)


def test_the_state_of_a_compressed_model_loads_into_another(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small, other = shaken(compress(network(), skip=["head"])), compress(network(7), skip=["head"])
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    other.load_state_dict(load_file(tmp_path / "small.safetensors"))
    x = random(5, 20)
    assert torch.equal(other(x), small(x))


def test_there_is_no_lora_to_export(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="replace"):
        export_peft(compress(network()), tmp_path)


def test_lora_on_a_compressed_model() -> None:
    small, x = compress(network(), skip=["head"]), random(5, 20)
    before = small(x)
    attach(small, nn.Linear, lambda linear: LoRALinear(linear, 1))
    torch.testing.assert_close(small(x), before)
    torch.testing.assert_close(merge_adapters(small)(x), before)


def test_convolutions_and_other_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 16))
    small = compress(model)
    assert [type(m).__name__ for m in small] == ["Conv2d", "Flatten", "LayerNorm", "LowRankLinear"]


# -- the losses -------------------------------------------------------------------------------------------------------
def test_feature_distillation_by_hand() -> None:
    student, teacher = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])], [torch.zeros(1, 2), torch.tensor([5.0])]
    assert feature_distillation_loss(student, teacher).item() == 3.25
    assert feature_distillation_loss(student, student).item() == 0


def test_the_teacher_is_constant() -> None:
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    feature_distillation_loss([student], [teacher]).backward()
    assert teacher.grad is None and student.grad is not None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 12)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        feature_distillation_loss([random(2)], [])
    with pytest.raises(ValueError, match="at least one"):
        feature_distillation_loss([], [])
    with pytest.raises(ValueError, match=r"features 1: have shape \(2,\) in the student and \(3,\)"):
        feature_distillation_loss([random(1), random(2)], [random(1), random(3)])
    missing: Any = [None]
    with pytest.raises(ValueError, match="called"):
        feature_distillation_loss(missing, [random(1)])


def test_weight_perturbation_by_hand() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.data = torch.diag(torch.tensor([4.0, 1.0]))
    small = LowRankLinear.from_linear(linear, 1)
    assert weight_perturbation_loss(small, linear, 1e-3).item() == pytest.approx(0.998001, abs=1e-6)
    assert weight_perturbation_loss(small, linear, 1.0).item() == pytest.approx(0, abs=1e-12)
    assert weight_perturbation_loss(small, linear, 2.0).item() == pytest.approx(1, abs=1e-6)  # two-sided


def by_loops(student: nn.Module, teacher: nn.Module, eps: float) -> float:
    """The definition, one number at a time."""
    terms = []
    for name, layer in student.named_modules():
        if isinstance(layer, LowRankLinear):
            up, down = layer[1].weight.tolist(), layer[0].weight.tolist()
            weight = teacher.get_submodule(name).weight.tolist()  # type: ignore[operator,union-attr]
            largest = 0.0
            for i, row in enumerate(weight):
                for j, value in enumerate(row):
                    product = sum(up[i][r] * down[r][j] for r in range(len(down)))
                    largest = max(largest, abs(product - value))
            terms.append((largest - eps) ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 5.0])
def test_weight_perturbation_against_a_plain_loop(eps: float) -> None:
    teacher = network()
    student = shaken(compress(teacher, skip=["head"]))
    found = weight_perturbation_loss(student, teacher, eps)
    assert found.item() == pytest.approx(by_loops(student, teacher, eps), rel=1e-12) and found.dtype == torch.float64


def test_weight_perturbation_reaches_the_factors_through_one_entry() -> None:
    teacher = network()
    student = shaken(compress(teacher, skip=["head"]))
    weight_perturbation_loss(student, teacher, 1e-3).backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, p in student.named_parameters():
        assert (p.grad is None) == (name.startswith("head") or name.endswith("bias"))
    for name in ("0", "2", "4"):
        down, up = (student.get_submodule(name)[i].weight for i in (0, 1))  # type: ignore[index]
        error = (up @ down - teacher.get_submodule(name).weight).detach()  # type: ignore[operator]
        i, j = divmod(int(error.abs().argmax()), error.shape[1])
        expected = torch.zeros_like(up)
        expected[i] = 2 * (error[i, j].abs() - 1e-3) * error[i, j].sign() * down[:, j] / 3
        torch.testing.assert_close(up.grad, expected)
        assert down.grad.nonzero()[:, 1].unique().tolist() == [j]


def test_weight_perturbation_satisfies_the_kit() -> None:
    teacher = network()
    student = compress(teacher, skip=["head", "2", "4"])

    def loss(down: Tensor, up: Tensor) -> Tensor:
        layer: Any = copy.deepcopy(student)
        for i, value in enumerate((down, up)):
            del layer[0][i].weight
            layer[0][i].weight = value
        return weight_perturbation_loss(layer, teacher)

    skip = {"bf16": "rounding the factors may change which entry of the error is the largest"}
    check_regularizer(
        loss,
        lambda g: (torch.randn(6, 20, generator=g), torch.randn(32, 6, generator=g)),
        differentiable=(0, 1),
        skip=skip,
    )


def test_features_satisfy_the_kit() -> None:
    check_regularizer(
        lambda ours, theirs: feature_distillation_loss([ours], [theirs]),
        lambda g: (torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)),
    )


def test_a_teacher_in_half_precision() -> None:
    teacher = network().float()
    student, x = compress(teacher, skip=["head"]), random(5, 20).float()
    half = copy.deepcopy(teacher).bfloat16()
    inputs = [student(x)], [half(x.bfloat16())], student(x), half(x.bfloat16())
    loss = PELALoss(beta=1.0)(*inputs, student, half)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_a_change_of_basis_changes_neither_outputs_nor_loss() -> None:
    teacher = network()
    student: Any = shaken(compress(teacher, skip=["head"]))
    turned, x = copy.deepcopy(student), random(5, 20)
    basis = random(len(student[0][0].weight), len(student[0][0].weight), seed=3)
    with torch.no_grad():
        turned[0][0].weight.copy_(basis @ student[0][0].weight)
        turned[0][1].weight.copy_(student[0][1].weight @ torch.linalg.inv(basis))
    torch.testing.assert_close(turned(x), student(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(weight_perturbation_loss(turned, teacher), weight_perturbation_loss(student, teacher))


def test_another_teacher_is_refused() -> None:
    student = compress(network(), skip=["head"])
    other = network()
    other[2] = nn.Identity()
    with pytest.raises(ValueError, match="20 -> 32 at '0'"):
        weight_perturbation_loss(student, nn.Sequential(nn.Linear(20, 31)))
    with pytest.raises(ValueError, match="at '2'"):
        weight_perturbation_loss(student, other)
    with pytest.raises(ValueError, match="no compressed layer"):
        weight_perturbation_loss(network(), network())
    with pytest.raises(ValueError, match="eps"):
        weight_perturbation_loss(student, network(), -1.0)


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    teacher = network().float()
    student = compress(teacher, skip=["head"])
    exact = weight_perturbation_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_perturbation_loss(student, teacher), exact)
    half = weight_perturbation_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=0.1)
    close = feature_distillation_loss([torch.ones(3).bfloat16()], [torch.ones(3).bfloat16() * 1.0078125])
    assert close.dtype == torch.float32 and close.item() == pytest.approx(0.0078125**2)


def test_loss_is_the_weighted_sum() -> None:
    teacher = network()
    student, x = shaken(compress(teacher, skip=["head"])), random(5, 20)
    with FeatureTap(student, ["0", "4"]) as ours, FeatureTap(teacher, ["0", "4"]) as theirs:
        logits = student(x), teacher(x)
    both = (ours, theirs, *logits, student, teacher)
    features, matching = feature_distillation_loss(ours, theirs), F.mse_loss(*logits)
    perturbation = weight_perturbation_loss(student, teacher, 1e-3)
    torch.testing.assert_close(PELALoss()(*both), features + perturbation)
    found = PELALoss(alpha=2.0, beta=3.0, gamma=0.5, eps=0.1)(*both)
    torch.testing.assert_close(
        found, 2 * features + 3 * matching + 0.5 * weight_perturbation_loss(student, teacher, 0.1)
    )
    assert PELALoss(alpha=0.0, gamma=0.0)([], [], *logits, student, teacher).item() == 0
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ValueError, match="logits"):
        PELALoss(beta=1.0)(ours, theirs, logits[0], logits[1][:, :2], student, teacher)
    assert "gamma=0.5" in repr(PELALoss(gamma=0.5))


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "eps"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_weights_below_zero_are_refused(name: str, value: float) -> None:
    for kind in (PELALoss, PELA):
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})


def test_the_loss_compiles() -> None:
    teacher = network()
    student, x = shaken(compress(teacher, skip=["head"])), random(5, 20)
    inputs = [student(x)], [teacher(x)], student(x), teacher(x)
    loss = torch.compile(PELALoss(beta=1.0), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(*inputs, student, teacher), PELALoss(beta=1.0)(*inputs, student, teacher))
    torch.compiler.reset()


def test_exact_repair_has_no_gradient_and_no_nan() -> None:
    teacher = network()
    full: Any = nn.Sequential(LowRankLinear.from_linear(teacher[0], 20))  # type: ignore[arg-type]
    with torch.no_grad():
        full[0][0].weight.copy_(torch.eye(20))
        full[0][1].weight.copy_(teacher[0].weight)
    loss = weight_perturbation_loss(full, teacher, 0.0)
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in full.parameters() if p.grad is not None)


# -- features ---------------------------------------------------------------------------------------------------------
def test_tap_keeps_outputs_in_the_order_of_the_names() -> None:
    model, x = network(), random(5, 20)
    with FeatureTap(model, ["4", "0"]) as features:
        model(x)
        torch.testing.assert_close(features[1], model[0](x))  # type: ignore[operator]
        again = model(x + 1)
    torch.testing.assert_close(features[1], model[0](x + 1))  # type: ignore[operator]
    assert features[0].shape == (5, 16) and again.shape == (5, 3)
    kept = features[0]
    model(x)
    assert features[0] is kept and not leftover_hooks(model)


def test_tap_takes_the_first_tensor_and_leaves_no_hooks_after_an_error() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": (x + 1, None)}

    model = nn.Sequential(Pair())
    tap = FeatureTap(model, ["0"])

    def fails() -> None:
        with tap as features:
            model(random(3))
            kept.extend(features)
            raise RuntimeError("stop")

    kept: list[Any] = []
    with pytest.raises(RuntimeError, match="stop"):
        fails()
    torch.testing.assert_close(kept[0], random(3) + 1)
    assert not leftover_hooks(model)


def test_tap_refuses_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"features = 'heat'.*Did you mean 'head'"):
        FeatureTap(network(), ["heat"])
    name: Any = "head"
    with pytest.raises(ValueError, match="features"):
        FeatureTap(network(), name)


# -- the method -------------------------------------------------------------------------------------------------------
def test_conformance_with_features_named() -> None:
    settings = {"intermediate_steps": 1.0, "features": ["body", "head"], "gamma": 0.0}
    check_method(PELA, settings=settings, problem=WIDE, skip={"dict-inputs": "the features are named by path"})


def test_two_processes_equal_one() -> None:
    check_methods_ddp([(PELA, {"intermediate_steps": 4, "beta": 1.0}), SVDDistill], problem=WIDE)


class Watcher(Method):
    """Records what a run's batches cost PELA: calls of the student, and whether the teacher is there."""

    name = "watcher"

    def __init__(self, pela: PELA) -> None:
        self.pela, self.calls, self.teachers, self.modes = pela, 0, [], []

    def prepare(self, run: Run) -> None:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            self.calls += 1

        self.handle = run.model.register_forward_hook(count)

    def after_backward(self, run: Run) -> None:
        teacher = self.pela.teacher
        self.teachers.append(teacher is not None)
        self.modes.append((run.model.training, teacher is not None and teacher.training))
        assert teacher is None or all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    def finish(self, run: Run) -> None:
        self.handle.remove()


@pytest.mark.parametrize(("length", "steps"), [(0.4, 6), (1.0, 15), (4, 4), (99, 15), (0, 0), (0.001, 1)])
def test_the_stage_has_its_length_and_the_student_runs_once_a_step(length: int | float, steps: int) -> None:
    pela = PELA(intermediate_steps=length)
    watcher = Watcher(pela)
    run = WIDE.train([pela, watcher], validation=None)
    assert watcher.teachers == [True] * steps + [False] * (15 - steps)
    assert watcher.calls == 15 and set(watcher.modes) <= {(True, False)}
    assert pela.teacher is None and "teacher" not in pela.state_dict() and not leftover_hooks(run.model)
    assert isinstance(run.model.body, LowRankLinear) and type(run.model.head) is nn.Linear


def test_the_run_minimises_the_terms_of_the_paper() -> None:
    pela = PELA(alpha=2.0, beta=0.5, gamma=3.0, intermediate_steps=1.0)
    teacher: Any = WIDE.network()
    run = equipoise.start(WIDE.network(), data=WIDE.examples, methods=[pela], **WIDE.options())
    batch = WIDE.examples.take(torch.arange(8))
    student: Any = copy.deepcopy(run.model)
    x, labels = batch.inputs, batch.targets
    loss = F.cross_entropy(student(x), labels)
    loss = loss + 2 * F.mse_loss(student.body(x), teacher.body(x)) + 0.5 * F.mse_loss(student(x), teacher(x))
    error = student.body.merged_weight() - teacher.body.weight
    torch.testing.assert_close(run.training_loss(batch), loss + 3 * (error.abs().max() - 1e-3) ** 2)


def test_after_the_stage_the_loss_is_the_tasks() -> None:
    pela = PELA(intermediate_steps=3)
    run = equipoise.start(WIDE.network(), data=WIDE.examples, methods=[pela], **WIDE.options())
    batch = WIDE.examples.take(torch.arange(8))
    for _ in range(3):
        run.backward(run.training_loss(batch))
        run.step()
    expected = F.cross_entropy(run.model(batch.inputs), batch.targets)
    torch.testing.assert_close(run.training_loss(batch), expected)


def test_the_teacher_is_gone_after_the_stage() -> None:
    pela = PELA(intermediate_steps=3)
    run = equipoise.start(WIDE.network(), data=WIDE.examples, methods=[pela], **WIDE.options())
    assert pela.teacher is not None
    teacher = weakref.ref(pela.teacher)
    for step in range(3):
        assert teacher() is not None, step
        run.backward(run.training_loss(WIDE.examples.take(torch.arange(8))))
        run.step()
    gc.collect()
    assert teacher() is None


def test_without_terms_it_is_plain_training_of_the_factors() -> None:
    one = WIDE.train([PELA(alpha=0.0, gamma=0.0)])
    two = WIDE.train([SVDFinetune()])
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_teacher_is_saved_and_comes_back(tmp_path: Path) -> None:
    """Also where the model that is handed over on resuming is not the one that was trained first."""
    pela = PELA(intermediate_steps=12)
    options = {"checkpoint": tmp_path, "checkpoint_every": 7}
    whole = WIDE.train([PELA(intermediate_steps=12)])

    class Stop(Method):
        name = "stop"

        def after_step(self, run: Run) -> None:
            if run.global_step == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WIDE.train([pela, Stop()], **options)
    other = replace(WIDE, network=partial(TinyNetwork, 6, 16, 3, seed=5))

    class Go(Method):
        name = "stop"

    Go.__qualname__ = Stop.__qualname__
    Go.__name__ = Stop.__name__
    resumed = other.train([PELA(intermediate_steps=12), Go()], **options, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_bad_settings_are_refused() -> None:
    for bad in (0.0, 1.5, -1, float("nan"), True):
        with pytest.raises(ValueError, match="intermediate_steps"):
            PELA(intermediate_steps=bad)
    word: Any = "head"
    for settings in ({"ratio": 0.0}, {"skip": word}, {"features": []}, {"features": word}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PELA(**settings)  # type: ignore[arg-type]
    for kind in (SVDFinetune, LowRankScratch, SVDOnly):
        with pytest.raises(ValueError, match="ratio"):
            kind(ratio=-1.0)


def test_a_share_needs_the_length_of_the_run() -> None:
    with pytest.raises(ArgumentError, match="total_steps"):
        equipoise.start(WIDE.network(), WIDE.make_optimizer, methods=[PELA()])


def test_names_and_models_that_do_not_fit_are_refused_before_training() -> None:
    with pytest.raises(ArgumentError, match=r"features = 'bodi'.*'body'"):
        WIDE.train([PELA(features=["bodi"])])
    with pytest.raises(ArgumentError, match="no layer of TinyNetwork"):
        classification().train([PELA()])

    class Idle(TinyNetwork):
        def __init__(self) -> None:
            super().__init__(6, 16, 3)
            self.idle = nn.Linear(16, 16)

    with pytest.raises(ArgumentError, match=r"'idle'.*called"):
        replace(WIDE, network=Idle).train([PELA()])


def test_outputs_under_bfloat16_autocast() -> None:
    run = WIDE.train([PELA(beta=1.0, intermediate_steps=1.0)], mixed_precision="bf16")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in run.model.parameters())


def test_the_optimizer_gets_the_factors() -> None:
    run = WIDE.train([PELA()])
    held = {id(p) for p in run.trainable_parameters()}
    assert held == {id(p) for p in run.model.parameters()}


# -- the baselines ----------------------------------------------------------------------------------------------------
def test_svd_only_trains_nothing() -> None:
    run = WIDE.train([SVDOnly()], optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
    expected = compress(WIDE.network(), skip=["head"])
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), expected.parameters(), strict=True))


def test_scratch_forgets_the_weights_given() -> None:
    class Positioned(TinyNetwork):
        def __init__(self, seed: int) -> None:
            super().__init__(6, 16, 3, norm=True, seed=seed)
            self.position = nn.Parameter(0.02 * random(400, seed=seed, dtype=torch.float32))

    still: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "epochs": 1}
    one, two = (
        replace(WIDE, network=partial(Positioned, seed)).train([LowRankScratch()], **still).model for seed in (0, 1)
    )
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert name == "position" or torch.equal(p, q)
    given = Positioned(0)
    assert not torch.equal(one.position, given.position) and 0.015 < one.position.std() < 0.025
    trained = compress(given, skip=["head"])
    assert not torch.equal(one.body[0].weight, trained.body[0].weight)
    assert not torch.equal(one.head.weight, given.head.weight)


def test_all_have_the_size_of_pela() -> None:
    shapes = [[p.shape for p in WIDE.train([kind()]).model.parameters()] for kind in COMPRESSED]
    assert all(found == shapes[0] for found in shapes)


# -- Hugging Face -----------------------------------------------------------------------------------------------------
def test_a_hugging_face_model_trains_as_it_is() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(2, 30, (48, 8), generator=torch.Generator().manual_seed(0))
    data = equipoise.Examples({"input_ids": tokens}, (tokens[:, 1] > 15).long())
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for features in (None, blocks):
        pela = PELA(features=features, beta=0.1, intermediate_steps=1.0)
        options: dict[str, Any] = {"epochs": 4, "batch_size": 16, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}
        run = equipoise.fit(copy.deepcopy(model), data, methods=[pela], **options)
        losses = [record["train_loss"] for record in run.history]
        assert losses[-1] < losses[0]
        small = [name for name, module in run.model.named_modules() if isinstance(module, LowRankLinear)]
        assert len(small) == 2 * 6 + 1 and "bert.pooler.dense" in small
        merged = merge_low_rank(run.model).eval()
        torch.testing.assert_close(merged(tokens).logits, run.model.eval()(tokens).logits, atol=1e-5, rtol=0)


def test_batches_and_outputs_are_read_only() -> None:
    pela = PELA(beta=1.0)
    run = equipoise.start(WIDE.network(), data=WIDE.examples, methods=[pela], **WIDE.options())
    batch = WIDE.examples.take(torch.arange(8))
    output = run.forward(batch.inputs)
    before = output.prediction.clone()
    first = pela.penalty(run, Batch(batch.inputs, batch.targets), Output(output.prediction))
    assert torch.equal(before, output.prediction)
    assert torch.equal(first, pela.penalty(run, batch, output))
