"""What all adapters share: where they attach, how they merge, their files, peft, and training in several processes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, DataError
from equipoise.finetuning.adapters import (
    LoRALinear,
    Target,
    adapters_of,
    attach,
    detach_adapters,
    export_peft,
    find_targets,
    import_peft,
    load_adapter,
    lora_parameters,
    merge_adapters,
    merged,
    save_adapter,
    trainable_report,
)
from equipoise.testing import spawn

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.fc = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.fc(self.q_proj(x) * self.v_proj(x).sigmoid())))


class Network(nn.Module):
    """Two blocks, a norm and a head; ``fc`` also at the top, so that names are ends of other names."""

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fc = nn.Linear(5, width)
            self.blocks = nn.Sequential(Block(width), Block(width))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.fc(x))))


LINEAR = [name for name, module in Network().named_modules() if isinstance(module, nn.Linear)]
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def lora(rank: int = 2, *, seed: int = 0, zero: bool = False, **options: Any) -> Any:
    """A ``make`` for ``attach``: LoRA whose B is not zero, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def make(layer: nn.Linear) -> LoRALinear:
        adapter = LoRALinear(layer, rank, generator=generator, **options)
        if not zero:
            with torch.no_grad():
                adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) / 3)
        return adapter

    return make


def adapted(target: Target = None, rank: int = 2, **options: Any) -> nn.Module:
    return attach(Network(), target, lora(rank, **options))


def same(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def digest(model: nn.Module) -> dict[str, Any]:
    modules = {name: (type(module).__name__, module.training) for name, module in model.named_modules()}
    return modules | {name: (p.requires_grad, id(p), p.tolist()) for name, p in model.named_parameters()}


# -- one layer --------------------------------------------------------------------------------------------------------
def test_lora_is_its_formula() -> None:
    base = nn.Linear(4, 3)
    layer = LoRALinear(base, 2, alpha=3.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 2, 4)
    expected = x @ base.weight.T + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T + base.bias
    same(layer(x), expected)
    same(layer.merged_weight(), base.weight + 1.5 * layer.lora_B @ layer.lora_A)
    a, b = layer.lora_factors()
    same(layer.original_weight() + b @ a, layer.merged_weight())
    assert layer.weight is base.weight and layer.bias is base.bias


def test_lora_starts_as_the_layer_with_A_inside_its_bound() -> None:
    base = nn.Linear(50, 40)
    layer = LoRALinear(base, 30, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 50)
    assert torch.equal(layer(x), base(x))
    bound = 1 / math.sqrt(50)
    assert 0.95 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    again, _ = lora_parameters(base.weight, 30, torch.Generator().manual_seed(0))
    assert torch.equal(layer.lora_A, again)


def test_dropout_acts_on_the_path_of_the_adapter_in_training_only() -> None:
    layer = lora(dropout=0.5)(nn.Linear(6, 6))
    x = torch.randn(4, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    same(layer(x), nn.functional.linear(x, layer.merged_weight(), layer.bias))


def test_gradient_is_right_and_reaches_the_factors_alone() -> None:
    layer = lora(alpha=3.0)(nn.Linear(4, 3)).double()

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    inputs = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (inputs, layer.lora_A, layer.lora_B))
    layer(inputs).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None


def test_bfloat16_and_autocast() -> None:
    model, half = adapted(), adapted().bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    same(half(X.bfloat16()).float(), model(X), atol=0.1)
    assert merge_adapters(half)(X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_half_precision_merges_in_float32() -> None:
    layer = lora(4)(nn.Linear(64, 64)).bfloat16()
    exact = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merged_weight(), exact.bfloat16())


def test_compile() -> None:
    model = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(compiled(X), model(X))
    compiled(X).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(X).sum().backward()
    for a, b in zip(ours, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        same(a, b)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (nn.Linear(4, 3), {"rank": 4}, "rank = 4: must be at most 3 for a layer 4 -> 3. Lower the rank"),
        (nn.Linear(4, 3), {"rank": 0}, "rank = 0: must be an integer >= 1"),
        (nn.Linear(4, 3), {"rank": 2, "alpha": 0.0}, "alpha = 0.0: must be a number in (0"),
        (nn.Linear(4, 3), {"rank": 2, "dropout": 1.0}, "dropout = 1.0: must be a number in [0, 1)"),
        (nn.Conv2d(4, 3, 1), {"rank": 2}, "base = Conv2d: must be an nn.Linear"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
            {"rank": 2},
            "must have a plain floating-point weight (3, 4). Remove its parametrization",
        ),
    ],
)
def test_bad_layers(base: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        LoRALinear(base, **options)  # type: ignore[arg-type]
    assert message in str(error.value)


# -- where ------------------------------------------------------------------------------------------------------------
NAMES: list[Any] = [
    ["q_proj"],
    ["q_proj", "v_proj"],
    ["fc"],
    ["blocks.0.fc"],
    ["0.fc", "head"],
    "head",
    r"blocks\.\d\.(q|v)_proj",
    r".*fc",
    "(fc|head)",
]


@pytest.mark.parametrize("target", NAMES, ids=str)
def test_names_mean_what_they_mean_in_peft(target: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=target, r=2), Network())
    theirs = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert list(find_targets(Network(), target)) == theirs


def test_other_forms_of_target() -> None:
    model = Network()
    assert list(find_targets(model)) == list(find_targets(model, nn.Linear)) == LINEAR
    assert find_targets(model)["head"] is model.head
    narrow = find_targets(model, lambda name, module: isinstance(module, nn.Linear) and module.in_features == 12)
    assert list(narrow) == ["blocks.0.out", "blocks.1.out"]
    assert list(find_targets(model, lambda name, module: name.startswith("blocks.1"))) == LINEAR[5:9]
    assert list(find_targets(nn.Linear(2, 2))) == [""]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ["q_prj"],
            "target = 'q_prj': matches no nn.Linear of the model. Did you mean 'q_proj'? Its linear layers are fc,",
        ),
        (["q_proj", "v_prj"], "target = 'v_prj': matches no nn.Linear of the model. Did you mean 'v_proj'?"),
        ("hed", "Did you mean 'head'? Its linear layers are fc, blocks.0.q_proj"),
        (["proj"], "and 4 more"),
        ([], "target = []: matches no nn.Linear of the model. Its linear layers"),
        (["norm"], "target = 'norm': 'norm' is LayerNorm: must be nn.Linear. Name the linear layers in it"),
        (["blocks", "head"], "target = 'blocks': 'blocks' is Sequential: must be nn.Linear"),
        (nn.LayerNorm, "'norm' is LayerNorm: must be nn.Linear"),
        ("[", "target = '[': must be a regular expression"),
        (lambda name, module: False, "matches no nn.Linear of the model. Its linear layers"),
    ],
    ids=range(10),
)
def test_a_target_that_means_no_linear_layer(target: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        find_targets(Network(), target)
    assert message in str(error.value)


def test_layers_of_adapters_do_not_count() -> None:
    model = adapted(["fc"])
    assert list(find_targets(model)) == [name for name in LINEAR if not name.endswith("fc")]
    with pytest.raises(ArgumentError, match=r"has no nn\.Linear left without an adapter"):
        find_targets(adapted())


def test_a_second_attach_leaves_the_first_adapters_training() -> None:
    model = attach(adapted(["q_proj"], rank=2), ["head"], lora(3))
    ranks = {name: adapter.rank for name, adapter in adapters_of(model).items()}
    assert ranks == {"blocks.0.q_proj": 2, "blocks.1.q_proj": 2, "head": 3}
    assert {name.rsplit(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert trainable_report(model).trainable == 2 * 2 * 12 + 3 * 9


def test_tied_weights_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.head.weight = self.embed.weight
            self.again = self.fc

    with pytest.raises(ArgumentError, match=r"head.weight is tied to embed.weight: an adapter on one would untie them"):
        find_targets(Tied(), ["head"])
    with pytest.raises(ArgumentError, match=r"fc.weight is tied to again.weight"):
        find_targets(Tied(), ["fc"])


def test_layers_that_torch_does_not_call_are_refused() -> None:
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)})
    with pytest.raises(
        ArgumentError, match=r"'layer.self_attn.out_proj' belongs to nn.MultiheadAttention.*Leave it out"
    ):
        find_targets(model)
    with pytest.raises(
        ArgumentError, match=r"'layer.linear1' belongs to nn.TransformerEncoderLayer.*fastpath_enabled\(False"
    ):
        find_targets(model, ["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attach(model, ["linear1", "linear2"], lora())
        layer, x = model["layer"], torch.randn(2, 3, 8)
        expected = layer(x)
        with torch.no_grad():
            same(layer.eval()(x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# -- attached, merged, and back ---------------------------------------------------------------------------------------
def test_attach_changes_the_model_in_place_and_freezes_the_rest() -> None:
    model = Network()
    model.blocks[1].eval()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    before = model(X)
    assert attach(model, ["q_proj", "head"], lora(zero=True)) is model
    assert torch.equal(model(X), before)
    assert not model.blocks[1].q_proj.training and model.head.training
    for name, parameter in parameters.items():
        assert dict(model.named_parameters())[name] is parameter and not parameter.requires_grad
    added = [name for name in model.state_dict() if name not in keys]
    layers = ("blocks.0.q_proj", "blocks.1.q_proj", "head")
    assert added == [f"{name}.lora_{factor}" for name in layers for factor in "AB"]
    assert list(adapters_of(model)) == list(layers)


def test_attach_without_freezing() -> None:
    model = attach(Network(), ["head"], lora(), freeze=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["head.weight", "head.bias"]


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Network().requires_grad_(True)
    model.norm.requires_grad_(False)
    before = digest(model)
    with pytest.raises(ArgumentError, match=r"rank = 5: must be at most 3 for a layer 6 -> 3"):
        attach(model, None, lora(5))
    with pytest.raises(ArgumentError, match="matches no"):
        attach(model, ["heads"], lora(2))
    assert digest(model) == before
    nn.utils.parametrizations.weight_norm(model.blocks[1].fc)
    with pytest.raises(ArgumentError, match="must have a plain floating-point weight"):
        attach(model, ["fc"], lora(2))


def test_a_model_that_is_a_linear_layer() -> None:
    base = nn.Linear(4, 3)
    adapter = attach(base, None, lora())
    assert isinstance(adapter, LoRALinear)
    x = torch.randn(2, 4)
    with merged(adapter) as plain:
        assert type(plain) is nn.Linear
        same(plain(x), adapter(x))
    same(merge_adapters(adapter)(x), adapter(x))
    assert torch.equal(detach_adapters(adapter)(x), base(x))


def test_merge_equals_forward_and_gives_the_plain_model_back() -> None:
    model = adapted(alpha=3.0).eval()
    expected = model(X)
    assert merge_adapters(model) is model
    same(model(X), expected)
    assert list(model.state_dict()) == list(Network().state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in Network().modules()]
    assert not any(m.training for m in model.modules())
    with pytest.raises(ArgumentError, match="model = Network: has no adapters"):
        merge_adapters(model)


def test_detach_restores() -> None:
    model = detach_adapters(adapted())
    assert torch.equal(model(X), Network()(X))
    assert [type(m) for m in model.modules()] == [type(m) for m in Network().modules()]
    with pytest.raises(ArgumentError, match="has no adapters"):
        detach_adapters(model)


def test_merged_is_a_context() -> None:
    model = adapted()
    before, expected = digest(model), model(X)
    with merged(model) as plain:
        assert plain is model and not any(isinstance(m, LoRALinear) for m in plain.modules())
        same(plain(X), expected)
    assert digest(model) == before
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    assert digest(model) == before
    with pytest.raises(ArgumentError, match="has no adapters"), merged(Network()):
        pass


def test_trainable_report_counts_as_peft() -> None:
    report = trainable_report(adapted(["q_proj", "head"], rank=2))
    assert report.trainable == 2 * 2 * 12 + 2 * 9
    assert report.layers == {"blocks.0.q_proj": 24, "blocks.1.q_proj": 24, "head": 18}
    assert str(report) == "trainable parameters: 66 of 615 (10.73 %), 3 adapters"
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["q_proj", "head"], r=2))
    assert theirs.get_nb_trainable_parameters() == (report.trainable, report.total)
    plain = trainable_report(Network())
    assert (plain.trainable, plain.total, plain.layers) == (549, 549, {})


def test_copies_and_state_dicts() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    same(twin(X), model(X))
    other = attach(Network(seed=3), None, lora(seed=5))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


# -- files ------------------------------------------------------------------------------------------------------------
def test_an_adapter_is_saved_alone_and_loaded(tmp_path: Path) -> None:
    model, path = adapted(["q_proj", "head"]), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    from safetensors.torch import load_file

    assert sorted(load_file(path)) == sorted(
        f"{name}.lora_{factor}" for name in ("blocks.0.q_proj", "blocks.1.q_proj", "head") for factor in "AB"
    )
    other = attach(Network(), ["q_proj", "head"], lora(seed=9))
    assert load_adapter(other, path) is other
    assert torch.equal(other(X), model(X))


def test_a_compiled_model_is_saved_as_the_model(tmp_path: Path) -> None:
    model = adapted(["head"])
    save_adapter(torch.compile(model), tmp_path / "adapter.safetensors")
    load_adapter(torch.compile(other := adapted(["head"], seed=9)), tmp_path / "adapter.safetensors")
    assert torch.equal(other(X), model(X))
    export_peft(torch.compile(model), tmp_path)
    assert torch.equal(import_peft(Network(), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attach(Network(width=8), ["head"], lora()), "another base: 'head' is .*6.* there and .*8.* here"),
        (lambda: adapted(["fc"]), "has an adapter for 'head', where the model has none"),
        (lambda: adapted(["head", "q_proj"]), "has nothing for the adapter of 'blocks.0.q_proj'. Attach adapters to"),
        (lambda: adapted(["head"], rank=3), r"head.lora_A is \(2, 6\) there and \(3, 6\) here. Use the same rank"),
    ],
)
def test_an_adapter_of_another_base(make: Any, message: str, tmp_path: Path) -> None:
    save_adapter(adapted(["head"]), tmp_path / "adapter.safetensors")
    model = make()
    before = digest(model)
    with pytest.raises(DataError, match=message):
        load_adapter(model, tmp_path / "adapter.safetensors")
    assert digest(model) == before


def test_files_that_are_not_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = adapted(["head"])
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter.pt")
    with pytest.raises(DataError, match="may be a pickle, which can run code"):
        load_adapter(model, tmp_path / "adapter.pt")
    (tmp_path / "adapter.pt").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(DataError, match="is no safetensors file"):
        load_adapter(model, tmp_path / "renamed.safetensors")
    with pytest.raises(DataError, match="no such file"):
        load_adapter(model, tmp_path / "none.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="was not written by save_adapter"):
        load_adapter(model, tmp_path / "other.safetensors")
    with pytest.raises(ArgumentError, match="has no adapters"):
        save_adapter(Network(), tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="may be a pickle"):
        import_peft(model, tmp_path)


# -- peft -------------------------------------------------------------------------------------------------------------
def exported(model: nn.Module, path: Path, base: nn.Module | None = None) -> nn.Module:
    """What peft loads over the original model."""
    peft = pytest.importorskip("peft")
    export_peft(model, path)
    return peft.PeftModel.from_pretrained(Network() if base is None else base, path)


@pytest.mark.parametrize("target", [None, ["q_proj", "head"], "fc", ["blocks.1.fc"]], ids=str)
def test_peft_loads_an_export_with_equal_outputs(target: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = adapted(target, alpha=3.0)
    theirs = exported(model, tmp_path)
    same(theirs(X), model(X))
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    lora_layers = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert [name.removeprefix("base_model.model.") for name in lora_layers] == list(adapters_of(model))
    same(theirs.merge_and_unload()(X), model(X))


def test_ranks_may_differ_between_layers_also_where_a_name_ends_another(tmp_path: Path) -> None:
    model = Network()
    for rank, target in enumerate(["fc", "head", r"blocks\.0\.fc", r"blocks\.1\..*", r"blocks\.0\.(out|q_proj)"], 1):
        attach(model, target, lora(rank, alpha=2.0))
    same(exported(model, tmp_path)(X), model(X))
    same(import_peft(Network(), tmp_path)(X), model(X))


def test_export_refuses_what_peft_cannot_hold(tmp_path: Path) -> None:
    class Other(LoRALinear):
        peft_config = {"use_dora": True}

    model = attach(adapted(["fc"]), ["head"], lambda layer: Other(layer, 2))
    with pytest.raises(ArgumentError, match="kinds that one peft configuration cannot hold"):
        export_peft(model, tmp_path)
    with pytest.raises(ArgumentError, match=r"Wrap the layer: nn.Sequential\(layer\)"):
        export_peft(lora()(nn.Linear(3, 3)), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 3},
        {"r": 3, "lora_alpha": 2, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 3, r"blocks\.1\.fc": 1}, "alpha_pattern": {"fc": 5, "blocks.0.q_proj": 7}},
        {"r": 2, "use_rslora": True, "alpha_pattern": {"head": 9}, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_a_lora_that_peft_saved_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "fc", "head"], **options)
    theirs = peft.get_peft_model(Network(), config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(Network(), tmp_path)
    same(ours(X), theirs(X))
    same(merge_adapters(ours)(X), theirs(X))


def test_folders_of_peft_that_are_refused(tmp_path: Path) -> None:
    def edit(**changes: Any) -> None:
        export_peft(adapted(["head"]), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))

    with pytest.raises(DataError, match=r"adapter_config.json: no such file"):
        import_peft(Network(), tmp_path / "nowhere")
    for changes in ({"use_dora": True}, {"peft_type": "LOHA"}, {"bias": "all"}, {"init_lora_weights": "pissa"}):
        edit(**changes)
        with pytest.raises(DataError, match="only plain LoRA over the base's own weight"):
            import_peft(Network(), tmp_path)
    edit()
    before = digest(model := Network(width=8))
    with pytest.raises(DataError, match=r"another base: 'head' is \(3, 6\) there and \(3, 8\) here"):
        import_peft(model, tmp_path)
    assert digest(model) == before
    with pytest.raises(DataError, match="is for 'head', which is no linear layer here"):
        import_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)


# -- a Hugging Face model ---------------------------------------------------------------------------------------------
def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def test_a_hugging_face_model_as_it_is(tmp_path: Path) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    model = attach(bert(), ["query", "value", "classifier"], lora())
    assert len(adapters_of(model)) == 3
    expected = model(input_ids=tokens).logits
    assert (expected - bert()(input_ids=tokens).logits).abs().max() > 0.01
    same(exported(model, tmp_path, bert())(input_ids=tokens).logits, expected)
    same(import_peft(bert(), tmp_path)(input_ids=tokens).logits, expected)
    merge_adapters(model).save_pretrained(tmp_path / "whole")
    same(type(model).from_pretrained(tmp_path / "whole")(input_ids=tokens).logits, expected)


# -- several processes ------------------------------------------------------------------------------------------------
def train(model: nn.Module, shard: slice) -> Iterator[float]:
    """Three steps of SGD on a share of the rows, the loss of each, whatever wraps the model."""
    targets = torch.arange(7) % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(X[:6][shard]), targets[:6][shard])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def test_two_processes_train_as_one_under_ddp_and_fsdp2() -> None:
    def work() -> Iterator[Any]:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group("gloo")
        shard = slice(dist.get_rank(), None, 2)
        model = adapted()
        list(train(DistributedDataParallel(model), shard))
        yield {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model = adapted()
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        list(train(model, shard))
        yield {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        plain = merge_adapters(model)
        yield {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in plain.state_dict().items()}

    one = adapted()
    losses = list(train(one, slice(None)))
    assert losses[-1] < losses[0]
    ranks = spawn(work)
    assert not [result for rank in ranks for result in rank if "error" in result], ranks
    trained = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    plain = merge_adapters(one).state_dict()
    for rank in ranks:
        for states, expected in zip(rank, (trained, trained, plain), strict=True):
            assert states.keys() == expected.keys()
            for name, tensor in expected.items():
                same(states[name], tensor, atol=1e-6)
