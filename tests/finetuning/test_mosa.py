"""MoSA against hand-computed numbers, loops over experts, plain adapters, and models of several makes."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.finetuning.adapters import attach, load_adapter, save_adapter
from equipoise.finetuning.model import FeedForward, RowTransformer
from equipoise.finetuning.mosa import (
    MoSA,
    MoSAAdapter,
    MoSALoRALinear,
    SplitLinear,
    export_adapter,
    export_peft,
    insert_adapters,
    merge_adapters,
    random_split,
    split_by_score,
    symmetric_kl,
)
from equipoise.testing import (
    TinyProblem,
    check_layer,
    check_method,
    check_methods_ddp,
    check_regularizer,
    classification,
)
from equipoise.training import Batch, Output, Run

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: Any) -> Any:
    """The module with every parameter drawn anew, in float64."""
    generator = seeded(5)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(1), dtype=torch.float64)


# -- the split --------------------------------------------------------------------------------------------------------
def test_split_by_hand() -> None:
    score = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.7, 0.2]])
    assert split_by_score(score, 3).tolist() == [[2, 0, 1], [1, 2, 0]]
    assert split_by_score(score, 3, mode="row").tolist() == [[2, 0, 1], [1, 2, 0]]
    assert split_by_score(score, 2, mode="column").tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(("shape", "experts"), [((5, 7), 4), ((3, 4), 12), ((11,), 3), ((2, 3, 4), 5), ((4, 4), 1)])
def test_every_entry_has_one_owner_and_sizes_are_the_formulas(shape: tuple[int, ...], experts: int) -> None:
    score = torch.rand(shape, generator=seeded())
    owner = split_by_score(score, experts)
    n = score.numel()
    assert owner.shape == score.shape and owner.dtype == torch.int64
    for e in range(experts):
        low, high = e * n // experts, (e + 1) * n // experts
        ranks = [int((score < value).sum()) for value in score[owner == e]]
        assert sorted(ranks) == list(range(low, high))


def test_modes_deal_out_each_row_or_column_by_itself() -> None:
    owner = random_split((6, 7), 3, mode="row", generator=seeded())
    assert all(torch.bincount(row, minlength=3).tolist() == [2, 2, 3] for row in owner)
    owner = random_split((6, 7), 3, mode="column", generator=seeded())
    assert all(torch.bincount(column, minlength=3).tolist() == [2, 2, 2] for column in owner.T)
    assert torch.equal(owner, random_split((6, 7), 3, mode="column", generator=seeded()))
    assert not torch.equal(owner, random_split((6, 7), 3, mode="column", generator=seeded(1)))


def test_equal_scores_are_dealt_out_in_order() -> None:
    assert split_by_score(torch.zeros(6), 3).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("shape", "experts", "mode", "message"),
    [
        ((2, 3), 0, "all", "num_experts = 0"),
        ((2, 3), 7, "all", "num_experts = 7: must be at most 6, the number of entries"),
        ((2, 3), 4, "row", "at most 3, the number of entries of a row"),
        ((2, 3), 3, "column", "at most 2, the number of entries of a column"),
        ((2, 3), 2, "rows", "mode = 'rows': must be one of 'all', 'row', 'column'. Did you mean 'row'?"),
        ((6,), 2, "row", "score has shape (6,): must be a matrix"),
        ((), 1, "all", "score has shape ()"),
    ],
)
def test_bad_split(shape: tuple[int, ...], experts: int, mode: str, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        split_by_score(torch.rand(shape), experts, mode=mode)
    assert message in str(error.value)


# -- the consistency term ---------------------------------------------------------------------------------------------
def test_symmetric_kl_by_hand() -> None:
    one, two = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    assert symmetric_kl(one, two).item() == pytest.approx(0.137327, abs=1e-6)
    assert symmetric_kl(two, one).item() == pytest.approx(0.137327, abs=1e-6)


def test_symmetric_kl_against_a_loop() -> None:
    one, two = inputs(5, 3).requires_grad_(), (2 * inputs(5, 3).flip(1)).requires_grad_()
    loss = symmetric_kl(one, two)
    expected = 0.0
    for a, b in zip(one.softmax(1).tolist(), two.softmax(1).tolist(), strict=True):
        for p, q in zip(a, b, strict=True):
            expected += (q * math.log(q / p) + p * math.log(p / q)) / 2 / 5
    assert loss.item() == pytest.approx(expected)
    grads = torch.autograd.grad(loss, (one, two))
    difference = (one.softmax(1) - two.softmax(1)).detach() / 10
    torch.testing.assert_close(grads[0], difference)
    torch.testing.assert_close(grads[1], -difference)


def test_symmetric_kl_of_equal_logits() -> None:
    one, two = (inputs(5, 3).requires_grad_() for _ in range(2))
    loss = symmetric_kl(one, two + 7)  # a constant on all classes changes nothing
    loss.backward()
    assert abs(loss.item()) < 1e-12 and one.grad.abs().max() < 1e-12 and two.grad.abs().max() < 1e-12
    assert symmetric_kl(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_symmetric_kl_as_a_part() -> None:
    pair = lambda g: (torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g))  # noqa: E731
    reason = "each KL's first argument is constant"
    assert check_regularizer(symmetric_kl, pair, differentiable=(0, 1), skip={"gradient": reason}).passed
    for bad in ((torch.zeros(5, 4),), (torch.zeros(6),)):
        with pytest.raises(ArgumentError, match="logits"):
            symmetric_kl(*bad, torch.zeros(6, 4))


# -- the split layer --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("zero_init", [True, False])
def test_experts_of_a_layer_against_a_loop(zero_init: bool) -> None:
    layer = SplitLinear(5, 4, 3, zero_init=zero_init, generator=seeded())
    start = layer.weight.detach().double().clone()
    assert (layer.init_weight is None) == zero_init and layer.owner.dtype == torch.uint8
    assert layer.weight.shape == (4, 5) and layer.bias.shape == (3, 4) and not layer.bias.any()
    assert zero_init == (not start.any()) and start.abs().max() <= 1 / math.sqrt(5)
    layer = randomised(layer)
    experts = []
    for e in range(3):
        wanted = start.clone()
        for i, j in itertools.product(range(4), range(5)):
            if layer.owner[i, j] == e:
                wanted[i, j] = layer.weight[i, j]
        experts.append(wanted)
        assert torch.equal(layer.expert_weight(e), wanted)
        torch.testing.assert_close(layer(inputs(2, 5), e), inputs(2, 5) @ wanted.T + layer.bias[e])
    torch.testing.assert_close(layer.merged_weight(), torch.stack(experts).mean(0))
    torch.testing.assert_close(sum(w - start for w in experts), layer.weight - start)
    merged = layer.eval().merge()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(inputs(2, 5)), layer(inputs(2, 5)))


def test_training_draws_experts_uniformly_and_evaluation_draws_nothing() -> None:
    layer = randomised(SplitLinear(5, 4, 3, generator=seeded()))
    x = inputs(2, 5)
    each = [layer(x, e) for e in range(3)]
    counts = [0, 0, 0]
    for _ in range(300):
        y = layer(x)
        counts[next(e for e in range(3) if torch.equal(y, each[e]))] += 1
    assert min(counts) > 70
    before, own = torch.get_rng_state(), layer.generator.get_state()
    layer.eval()(x)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(own, layer.generator.get_state())


def test_without_a_generator_torchs_own_draws() -> None:
    layer = randomised(SplitLinear(5, 4, 3))
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append([layer(inputs(2, 5)) for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_step_changes_the_experts_entries_alone() -> None:
    adapter = randomised(MoSAAdapter(6, 4, num_experts=3, dropout=0.0, generator=seeded()))
    before = copy.deepcopy(adapter.up.state_dict())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter(inputs(5, 6), expert=(0, 2)).square().sum().backward()
    optimizer.step()
    assert torch.equal(adapter.up.weight != before["weight"], adapter.up.owner == 2)
    assert (adapter.up.bias != before["bias"]).all(1).tolist() == [False, False, True]
    assert torch.equal(adapter.up.bias[:2], before["bias"][:2])


def test_state_is_enough() -> None:
    one = randomised(SplitLinear(5, 4, 3, generator=seeded()))
    two = SplitLinear(5, 4, 3, generator=seeded(1)).double()
    two.load_state_dict(one.state_dict())
    assert set(one.state_dict()) == {"weight", "bias", "owner", "init_weight"}
    for e in range(3):
        assert torch.equal(one(inputs(2, 5), e), two(inputs(2, 5), e))
    assert torch.equal(one.eval()(inputs(2, 5)), two.eval()(inputs(2, 5)))
    assert "bias" not in SplitLinear(5, 4, 3, bias=False).state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SplitLinear(6, 6, 3, generator=seeded()).eval(),
        lambda: SplitLinear(6, 6, 3, bias=False, zero_init=True, mode="row", generator=seeded()).eval(),
        lambda: MoSAAdapter(6, 4, share="none", generator=seeded()).eval(),
        lambda: MoSAAdapter(6, 4, num_experts=1, norm=False, activation=nn.ReLU, generator=seeded()).eval(),
    ],
)
def test_layers_as_parts(make: Any) -> None:
    assert check_layer(make).passed


def test_gradient_in_training_mode() -> None:
    adapter = randomised(MoSAAdapter(4, 3, num_experts=2, share="none", dropout=0.0, generator=seeded()))
    assert torch.autograd.gradcheck(lambda x: adapter(x, expert=(1, 0)), inputs(2, 4).requires_grad_())


# -- the adapter ------------------------------------------------------------------------------------------------------
def adapter_by_hand(adapter: MoSAAdapter, x: Tensor, down: Any, up: Any) -> Tensor:
    h = F.layer_norm(x, (x.shape[-1],), adapter.norm.weight, adapter.norm.bias, 1e-6)
    h = h @ down[0].T + down[1]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return adapter.scale * (h @ up[0].T + up[1])


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_adapter_against_its_formula(share: str) -> None:
    adapter = randomised(MoSAAdapter(6, 4, num_experts=3, share=share, scale=0.3, dropout=0.0, generator=seeded()))
    x = inputs(2, 5, 6)

    def parts(layer: Any, e: int | None) -> tuple[Tensor, Tensor]:
        if isinstance(layer, nn.Linear):
            return layer.weight, layer.bias
        return (layer.merged_weight(), layer.merged_bias()) if e is None else (layer.expert_weight(e), layer.bias[e])

    assert (type(adapter.down) is nn.Linear, type(adapter.up) is nn.Linear) == (share == "down", share == "up")
    for e_down, e_up in itertools.product(range(3), repeat=2):
        wanted = adapter_by_hand(adapter, x, parts(adapter.down, e_down), parts(adapter.up, e_up))
        torch.testing.assert_close(adapter(x, expert=(e_down, e_up)), wanted)
    wanted = adapter_by_hand(adapter, x, parts(adapter.down, None), parts(adapter.up, None))
    torch.testing.assert_close(adapter.eval()(x), wanted)
    merged = adapter.merge()
    assert merged.num_experts == 1 and not merged.training
    torch.testing.assert_close(merged(x), wanted)
    torch.testing.assert_close(merged.train()(x), wanted)


def test_evaluation_is_the_mean_over_experts_of_the_shared_down_adapter() -> None:
    adapter = randomised(MoSAAdapter(6, 4, num_experts=4, dropout=0.0, generator=seeded()))
    mean = torch.stack([adapter(inputs(5, 6), expert=(0, e)) for e in range(4)]).mean(0)
    torch.testing.assert_close(adapter.eval()(inputs(5, 6)), mean)


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_output_is_zero_at_the_start(share: str) -> None:
    adapter = MoSAAdapter(6, 4, num_experts=3, share=share, generator=seeded())
    x = inputs(5, 6).float()
    assert not adapter(x).any() and not adapter.eval()(x).any()
    assert not any(adapter(x, expert=pair).any() for pair in itertools.product(range(3), repeat=2))
    assert not adapter.merge()(x).any()


def test_one_expert_is_a_plain_adapter() -> None:
    split = MoSAAdapter(6, 4, num_experts=4, dropout=0.0, generator=seeded())
    plain = MoSAAdapter(6, 4, num_experts=1, dropout=0.0, generator=seeded())
    assert type(plain.down) is type(plain.up) is nn.Linear
    assert torch.equal(plain.down.weight, split.down.weight)  # the same start for the same seed
    plain = randomised(plain)
    x = inputs(5, 6)
    wanted = adapter_by_hand(plain, x, (plain.down.weight, plain.down.bias), (plain.up.weight, plain.up.bias))
    before = torch.get_rng_state()
    torch.testing.assert_close(plain(x), wanted)
    torch.testing.assert_close(plain(x, expert=(0, 0)), wanted)
    assert torch.equal(before, torch.get_rng_state())
    layer = randomised(SplitLinear(5, 4, 1, generator=seeded()))
    assert torch.equal(layer(inputs(2, 5)), F.linear(inputs(2, 5), layer.weight, layer.bias[0]))
    assert torch.equal(layer.eval()(inputs(2, 5)), F.linear(inputs(2, 5), layer.weight, layer.bias[0]))


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_numbers_of_parameters(share: str) -> None:
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    plain = MoSAAdapter(6, 4, num_experts=1)
    split = MoSAAdapter(6, 4, num_experts=3, share=share)
    extra = {"down": 2 * 6, "up": 2 * 4, "none": 2 * 6 + 2 * 4}[share]
    assert count(plain) == 2 * 6 * 4 + 4 + 6 + 2 * 6
    assert count(split) == count(plain) + extra
    assert count(split.merge()) == count(plain)
    assert split.merge().state_dict().keys() == plain.state_dict().keys()


def test_dropout_acts_on_the_bottleneck_in_training() -> None:
    adapter = randomised(MoSAAdapter(6, 50, num_experts=1, dropout=0.5))
    torch.manual_seed(0)
    x = inputs(5, 6)
    mean = torch.stack([adapter(x) for _ in range(2000)]).mean(0)
    assert not torch.equal(adapter(x), adapter(x))
    torch.testing.assert_close(mean, adapter.eval()(x), rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts = 0: must be an integer in [1, 256]"),
        ({"num_experts": 257}, "num_experts = 257"),
        ({"num_experts": 25}, "num_experts = 25: must be at most 24, the number of entries"),
        ({"share": "both"}, "share = 'both': must be one of 'down', 'up', 'none'"),
        ({"scale": 0}, "scale = 0: must be finite and not 0"),
        ({"scale": math.inf}, "scale = inf"),
        ({"dropout": 1.0}, "dropout = 1.0: must be a number in [0, 1)"),
        ({"dropout": -0.1}, "dropout = -0.1"),
        ({"bottleneck": 0}, "bottleneck = 0"),
        ({"dim": 0}, "dim = 0"),
    ],
)
def test_bad_adapter(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        MoSAAdapter(**{"dim": 6, "bottleneck": 4, **settings})
    assert message in str(error.value)


@pytest.mark.parametrize("expert", [(0, 3), (-1, 0), (3, 0), (0, 1.0)])
def test_bad_expert(expert: Any) -> None:
    with pytest.raises(ArgumentError, match="expert ="):
        MoSAAdapter(6, 4, num_experts=3)(torch.ones(1, 6), expert=expert)
    layer = SplitLinear(6, 4, 3)
    for call in (layer.expert_weight, lambda e: layer(torch.ones(1, 6), e)):
        with pytest.raises(ArgumentError, match="expert = 3"):
            call(3)


@pytest.mark.parametrize("share", ["down", "none"])
def test_adapter_compiles(share: str) -> None:
    adapter = randomised(MoSAAdapter(6, 4, num_experts=3, share=share, dropout=0.0))
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    x = inputs(5, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = adapter(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(x), wanted)
    adapter.eval()
    torch.testing.assert_close(compiled(x), adapter(x))


def test_autocast() -> None:
    adapter = randomised(MoSAAdapter(6, 4, num_experts=3, share="none", dropout=0.0)).float()
    x = inputs(5, 6).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x, expert=(1, 2))
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), adapter(x, expert=(1, 2)), rtol=0.05, atol=0.1)
    assert torch.isfinite(x.grad).all() and adapter.up.weight.grad.dtype == torch.float32


# -- the LoRA variant -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_lora_variant_against_a_loop(share: str) -> None:
    base = nn.Linear(5, 4).double()
    layer = MoSALoRALinear(base, 2, alpha=3.0, num_experts=3, share=share, generator=seeded())
    x, scaling = inputs(2, 5), 1.5
    start = layer.lora_A.detach().clone()
    assert torch.equal(layer(x), base(x)) and layer.weight is base.weight
    with torch.no_grad():
        layer.lora_A.add_(0.3)
        layer.lora_B.normal_(generator=seeded(2))

    def of(factor: Tensor, owner: Tensor | None, initial: Tensor, e: int) -> Tensor:
        return factor if owner is None else torch.where(owner == e, factor, initial)

    zero = torch.zeros_like(layer.lora_B)
    factors_a = [of(layer.lora_A, layer.owner_A, start, e) for e in range(3)]
    factors_b = [of(layer.lora_B, layer.owner_B, zero, e) for e in range(3)]
    possible = [base(x) + scaling * x @ a.T @ b.T for a in factors_a for b in factors_b]
    seen = {
        next(i for i, y in enumerate(possible) if torch.allclose(y, found)) for found in (layer(x) for _ in range(60))
    }
    assert len(seen) == (9 if share == "none" else 3)
    merged = base.weight + scaling * torch.stack(factors_b).mean(0) @ torch.stack(factors_a).mean(0)
    torch.testing.assert_close(layer.merged_weight(), merged)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, merged, base.bias))
    torch.testing.assert_close(layer.merge()(x), layer(x))


def small_network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def lora_network() -> nn.Module:
    model = attach(
        small_network(), None, lambda layer: MoSALoRALinear(layer, 2, alpha=6.0, num_experts=3, generator=seeded())
    )
    for module in model.modules():
        if isinstance(module, MoSALoRALinear):
            nn.init.normal_(module.lora_B, generator=seeded(1))
    return model.eval()


def test_peft_reads_the_lora_variant(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra equipoise[hf]")
    model = lora_network()
    export_peft(model, tmp_path)
    x = inputs(7, 6).float()
    loaded = peft.PeftModel.from_pretrained(small_network(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=5e-6)
    torch.testing.assert_close(merge_adapters(copy.deepcopy(model))(x), model(x), rtol=0, atol=5e-6)


def test_saved_lora_variant_is_read_back(tmp_path: Any) -> None:
    model = lora_network()
    save_adapter(model, tmp_path / "a.safetensors")
    other = attach(small_network(), None, lambda layer: MoSALoRALinear(layer, 2, alpha=6.0, num_experts=3)).eval()
    load_adapter(other, tmp_path / "a.safetensors")
    x = inputs(7, 6).float()
    assert torch.equal(other(x), model(x)) and torch.equal(other[0].owner_B, model[0].owner_B)


def test_bad_lora_variant(tmp_path: Any) -> None:
    for settings in ({"rank": 5}, {"alpha": 0.0}, {"num_experts": 0}, {"num_experts": 9}, {"share": "A"}):
        with pytest.raises(ArgumentError):
            MoSALoRALinear(nn.Linear(6, 4), **{"rank": 2, **settings})
    with pytest.raises(ArgumentError, match="use export_adapter"):
        export_peft(insert_adapters(residual(), partial(MoSAAdapter, bottleneck=4)), tmp_path)


# -- into models ------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """An MLP with one residual branch."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        h = self.norm(self.body(values))
        return self.head(h + self.branch(h))


def residual(norm: bool = False) -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual(norm)


def adapted(model: nn.Module, insert: Any = None) -> nn.Module:
    """The model with adapters that are not zero."""
    insert_adapters(model, lambda dim: MoSAAdapter(dim, 4, num_experts=2, dropout=0.0, generator=seeded(dim)), insert)
    for module in model.modules():
        if isinstance(module, SplitLinear):
            nn.init.normal_(module.weight, generator=seeded(3))
    return model


def places(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, MoSAAdapter)]


def check_inserted(plain: nn.Module, wanted: list[str], *call: Any, **named: Any) -> nn.Module:
    """Adapters stand at ``wanted``, keys are kept, the model starts as it was, and only adapters train."""
    result = lambda model: Output.of(model(*call, **named)).prediction  # noqa: E731
    model = copy.deepcopy(plain).eval()
    before = result(model)
    insert_adapters(model, partial(MoSAAdapter, bottleneck=4))
    assert places(model) == wanted
    assert torch.equal(result(model), before)
    assert [key for key in model.state_dict() if ".mosa." not in key] == list(plain.state_dict())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".mosa." in n
    }
    changed = adapted(copy.deepcopy(plain).eval())
    assert not torch.allclose(result(changed), before, atol=1e-6)
    assert torch.equal(result(copy.deepcopy(changed)), result(changed))
    return changed


def test_into_the_tasks_transformer() -> None:
    model = RowTransformer((1, 8, 8), 10)
    x = torch.rand(3, 1, 8, 8)
    changed = check_inserted(model, ["blocks.0.mlp.mosa", "blocks.1.mlp.mosa"], x)
    block, h = changed.blocks[0], torch.rand(3, 8, 64)
    stream = h + block.attention(block.attention_norm(h))
    read = block.mlp_norm(stream)
    torch.testing.assert_close(block(h), stream + model.blocks[0].mlp(read) + block.mlp.mosa(read))
    assert isinstance(block.mlp, FeedForward)


def test_into_a_residual_mlp() -> None:
    model = residual()
    x = torch.rand(5, 6)
    changed = check_inserted(model, ["branch.mosa"], x)
    h = changed.body(x)
    torch.testing.assert_close(changed(x), changed.head(h + model.branch(h) + changed.branch.mosa(h)))


def bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=2,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def tokens() -> Tensor:
    return torch.randint(2, 30, (32, 8), generator=seeded())


def test_into_hugging_faces_bert() -> None:
    plain = bert()
    changed = check_inserted(plain, [f"bert.encoder.layer.{i}.output.mosa" for i in range(2)], input_ids=tokens())
    layer, old, x = changed.bert.encoder.layer[0], plain.bert.encoder.layer[0].eval(), torch.rand(2, 8, 16)
    wanted = old.output.LayerNorm(old.output.dense(old.intermediate(x)) + x + layer.output.mosa(x))
    torch.testing.assert_close(layer.feed_forward_chunk(x), wanted)


@pytest.mark.parametrize("name", ["DistilBert", "ViT", "Llama", "T5"])
def test_into_other_hugging_face_models(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
    sizes: dict[str, dict[str, Any]] = {
        "DistilBert": {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "ViT": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        "Llama": {
            "vocab_size": 30,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        "T5": {"vocab_size": 30, "d_model": 16, "d_kv": 12, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    }
    wanted = {"DistilBert": "ffn", "ViT": "mlp", "Llama": "mlp", "T5": "DenseReluDense"}[name]
    kind = "T5EncoderModel" if name == "T5" else f"{name}Model"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes[name]))
    insert_adapters(model, partial(MoSAAdapter, bottleneck=4))
    assert len(places(model)) == 2 and all(path.endswith(f"{wanted}.mosa") for path in places(model))


@pytest.mark.parametrize("norm_first", [True, False])
def test_into_torchs_transformer_whose_fast_path_is_off(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), nn.Linear(8, 3))
    x, mask = torch.rand(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    plain = model.eval()[0]
    with torch.no_grad():  # under which torch would take its fast path
        changed = check_inserted(model, [f"0.layers.{i}.mosa" for i in range(2)], x)
        for given in (None, mask):
            fast = changed[0](x, src_key_padding_mask=given)
            with torch.enable_grad():
                slow = changed[0](x, src_key_padding_mask=given)
            torch.testing.assert_close(fast, slow)
        one, h = changed[0].layers[0], torch.rand(2, 5, 8)
        torch.testing.assert_close(one._ff_block(h), plain.layers[0]._ff_block(h) + one.mosa(h))
    decoder = nn.Sequential(nn.TransformerDecoderLayer(8, 2, 12))
    insert_adapters(decoder, partial(MoSAAdapter, bottleneck=4))
    assert places(decoder) == ["0.mosa"]


@pytest.mark.parametrize("insert", [["mlp"], FeedForward, r"blocks\.\d\.mlp", lambda path, _: path.endswith("mlp")])
def test_insert_where_told(insert: Any) -> None:
    assert places(adapted(RowTransformer((1, 8, 8), 10), insert)) == ["blocks.0.mlp.mosa", "blocks.1.mlp.mosa"]


def test_insert_beside_other_parts() -> None:
    model = RowTransformer((1, 8, 8), 10).eval()
    x = torch.rand(3, 8, 64)
    plain = copy.deepcopy(model)
    adapted(model, ["attention", "mlp_norm"])
    assert len(places(model)) == 4
    block = model.blocks[1]
    torch.testing.assert_close(block.attention(x), plain.blocks[1].attention(x) + block.attention.mosa(x))
    torch.testing.assert_close(block.mlp_norm(x), plain.blocks[1].mlp_norm(x) + block.mlp_norm.mosa(x))


@pytest.mark.parametrize(
    ("insert", "message"),
    [
        (None, "insert = None: the model has no feed-forward part to put an adapter beside. Name modules"),
        (["heads"], "insert = 'heads': fits no module of the model. Did you mean 'head'?"),
        (["body", "heads"], "insert = 'heads': fits no module"),
        (nn.Conv2d, "Conv2d'>: fits no module"),
        (["head"], "insert: 'head' (Linear) maps 8 to 3: must give what is as wide as what it reads"),
        (["norm"], "insert: 'norm' (Identity) maps an unknown width"),
    ],
)
def test_where_nothing_fits(insert: Any, message: str) -> None:
    model = classification().network()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ArgumentError) as error:
        insert_adapters(model, partial(MoSAAdapter, bottleneck=4), insert)
    assert message in str(error.value)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_inserting_twice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="adapters already"):
        adapted(adapted(residual()))


def test_merge_a_model_and_export_it() -> None:
    model = adapted(residual()).eval()
    x = torch.rand(5, 6)
    before = model(x)
    exported = export_adapter(model)
    names = ["norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias"]
    assert list(exported) == [f"branch.mosa.{name}" for name in names]
    merged = merge_adapters(model)
    torch.testing.assert_close(merged(x), before)
    assert merged.branch.mosa.num_experts == 1 and export_adapter(merged).keys() == exported.keys()
    plain = MoSAAdapter(8, 4, num_experts=1).eval()
    plain.load_state_dict({key.removeprefix("branch.mosa."): tensor for key, tensor in exported.items()})
    h = torch.rand(5, 8)
    torch.testing.assert_close(plain(h), merged.branch.mosa(h))
    for call in (merge_adapters, lambda m: export_adapter(small_network())):
        with pytest.raises(ArgumentError):
            call(merged)
    alone = MoSAAdapter(8, 4, generator=seeded())
    assert isinstance(merge_adapters(alone), MoSAAdapter) and "down.weight" in export_adapter(alone)


# -- the method -------------------------------------------------------------------------------------------------------
PROBLEM = TinyProblem(classification().examples, classification().validation, residual, partial(residual, norm=True))


def test_method() -> None:
    settings = {"bottleneck": 4, "dropout": 0.0}
    check_method(MoSA, settings=settings, problem=PROBLEM)
    own = {"ddp-equals-one": "dropout is each process's own"}
    entries = [(MoSA, settings), (MoSA, {**settings, "share": "none"}), (MoSA, {"bottleneck": 4}, own)]
    check_methods_ddp(entries, problem=PROBLEM)


def test_loss_is_its_formula() -> None:
    method = MoSA(bottleneck=4, reg_weight=0.7, add_weight=0.3)
    with torch.random.fork_rng(devices=[]):
        run = equipoise.start(residual(), PROBLEM.make_optimizer, methods=[method], data=PROBLEM.examples)
        for module in run.model.modules():
            if isinstance(module, SplitLinear):
                nn.init.normal_(module.weight, generator=seeded(3))
        batch = PROBLEM.examples.take(torch.arange(8))
        states = [method.owned["generator"].get_state(), torch.get_rng_state()]
        loss = run.training_loss(batch)
        method.owned["generator"].set_state(states[0])
        torch.set_rng_state(states[1])
        one, two = run.model(batch.inputs), run.model(batch.inputs)
    assert not torch.equal(one, two)
    wanted = (
        F.cross_entropy(one, batch.targets) + 0.3 * F.cross_entropy(two, batch.targets) + 0.7 * symmetric_kl(one, two)
    )
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ("settings", "passes"), [({"reg_weight": 0.0}, 1), ({}, 2), ({"reg_weight": 0.0, "add_weight": 1.0}, 2)]
)
def test_second_pass_only_where_it_is_used(settings: dict[str, Any], passes: int) -> None:
    run = equipoise.start(
        residual(), PROBLEM.make_optimizer, methods=[MoSA(bottleneck=4, **settings)], data=PROBLEM.examples
    )
    calls: list[int] = []
    handle = run.model.register_forward_hook(lambda *_: calls.append(1))
    run.training_loss(PROBLEM.examples.take(torch.arange(8)))
    handle.remove()
    assert len(calls) == passes


def test_what_trains_and_what_is_left() -> None:
    run = equipoise.start(residual(), PROBLEM.make_optimizer, methods=[MoSA(bottleneck=4)], data=PROBLEM.examples)
    assert {n for n, p in run.model.named_parameters() if not p.requires_grad} == {
        n for n, _ in residual().named_parameters() if not n.startswith("head")
    }
    run = PROBLEM.train([MoSA(bottleneck=4)])
    keys = list(residual().state_dict())
    assert [key for key in run.model.state_dict() if ".mosa." not in key] == keys
    assert places(run.model) == ["branch.mosa"] and run.model.branch.mosa.num_experts == 1
    assert isinstance(PROBLEM.train([MoSA(bottleneck=4, num_experts=1)]).model.branch.mosa.up, nn.Linear)


def test_layers_placed_by_hand_are_trained_as_they_are() -> None:
    problem = classification()
    layers = lambda: attach(problem.network(), None, lambda layer: MoSALoRALinear(layer, 2, num_experts=2))  # noqa: E731
    run = equipoise.fit(layers(), problem.examples, methods=[MoSA()], **problem.options())
    assert run.model.state_dict().keys() == problem.network().state_dict().keys()
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


def test_logits_of_tokens_and_bad_ones() -> None:
    method = MoSA(bottleneck=4)

    class Fixed(Run):
        """A run whose second pass gives fixed logits."""

        def __init__(self, second: Tensor) -> None:
            self.second, self.task_loss = second, F.cross_entropy

        def forward(self, inputs: Any, model: Any = None) -> Output:
            return Output(self.second)

    one, two = torch.randn(2, 3, 5, generator=seeded()), torch.randn(2, 3, 5, generator=seeded(1))
    targets = torch.zeros(2, 5, dtype=torch.int64)
    loss = method.loss(Fixed(two), Batch(one, targets), Output(one))
    rows = [z.permute(0, 2, 1).reshape(10, 3) for z in (one, two)]
    torch.testing.assert_close(loss, F.cross_entropy(one, targets) + symmetric_kl(*rows))
    for bad in (torch.zeros(4, 1), torch.zeros(4)):
        run = Fixed(bad)
        run.task_loss = lambda prediction, targets: prediction.sum()
        with pytest.raises(ArgumentError, match="at least two classes"):
            method.loss(run, Batch(bad, targets), Output(bad))


@pytest.mark.parametrize(
    "settings",
    [
        {"reg_weight": -1.0},
        {"add_weight": -0.1},
        {"num_experts": 0},
        {"share": "all"},
        {"scale": 0.0},
        {"dropout": 1.0},
        {"bottleneck": 0},
    ],
)
def test_bad_settings_of_the_method(settings: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(settings))} ="):
        MoSA(**settings)


def test_a_hugging_face_model_trains() -> None:
    ids = tokens()
    model = bert(hidden_dropout_prob=0.0)
    keys = list(model.state_dict())
    run = equipoise.fit(
        model,
        equipoise.Examples({"input_ids": ids}, (ids[:, 1] > 15).long()),
        methods=[MoSA(bottleneck=8, scale=1.0)],
        epochs=8,
        batch_size=16,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert [key for key in run.model.state_dict() if ".mosa." not in key] == keys
