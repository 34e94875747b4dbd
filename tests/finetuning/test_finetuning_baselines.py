"""Full fine-tuning, the linear probe, and peft's adapters as methods of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError, MissingDependencyError
from equipoise.finetuning import baselines
from equipoise.finetuning.baselines import DoRA, FullFinetuning, LinearProbe, LoRA, PiSSA, RsLoRA
from equipoise.testing import TinyNetwork, classification
from equipoise.training import Method, Run

peft = pytest.importorskip("peft", reason="needs the extra equipoise[hf]")
torch.set_num_threads(1)
ADAPTERS = [LoRA, RsLoRA, PiSSA, DoRA]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def started(method: Method, model: nn.Module | None = None, seed: int = 0) -> Run:
    return equipoise.start(TinyNetwork() if model is None else model, sgd, methods=[method], num_classes=3, seed=seed)


def trained(method: Method, **options: Any) -> Run:
    return classification().train([method], **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_full_finetuning_is_a_run_without_methods() -> None:
    plain, full = classification().train(), trained(FullFinetuning())
    for a, b in zip(plain.model.parameters(), full.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_linear_probe_trains_the_head_alone() -> None:
    before, after = weights(TinyNetwork()), weights(trained(LinearProbe()).model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}


def test_linear_probe_takes_the_head_that_the_run_names() -> None:
    after = weights(trained(LinearProbe(), head="body").model)
    moved = {name for name, old in weights(TinyNetwork()).items() if not torch.equal(old, after[name])}
    assert moved == {"body.weight", "body.bias"}


def test_linear_probe_refuses_a_head_without_parameters() -> None:
    with pytest.raises(ArgumentError, match="Identity has no parameters to train"):
        equipoise.start(TinyNetwork(), sgd, methods=[LinearProbe()], num_classes=3, head="norm")


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_changes_nothing_at_the_start_and_trains_few_numbers(method: type[Method]) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    run = started(method(rank=2))
    torch.testing.assert_close(run.model(x), TinyNetwork()(x), atol=1e-6, rtol=1e-5)
    trainable = sum(p.numel() for p in run.trainable_parameters())
    assert trainable == 2 * (6 + 8) + 2 * (8 + 3) + (8 + 3 if method is DoRA else 0)


@pytest.mark.parametrize("method", ADAPTERS)
def test_finish_merges_into_the_model_as_it_was(method: type[Method]) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    class Look(Method):
        def finish(self, run: Run) -> None:
            seen.append(run.predict((x, torch.zeros(5)))[0])

    before = TinyNetwork()
    run = classification().train([Look(), method(rank=2)])
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert list(run.model.state_dict()) == list(before.state_dict())
    assert [type(m) for m in run.model.modules()] == [type(m) for m in before.modules()]
    assert not hasattr(run.model, "peft_config")
    torch.testing.assert_close(run.model(x), seen[0], atol=1e-5, rtol=1e-5)
    for name in ("body", "head"):
        change = run.model.get_submodule(name).weight - before.get_submodule(name).weight
        assert change.abs().max() > 1e-3
        rank = torch.linalg.matrix_rank(change, rtol=1e-4)
        assert method is DoRA or rank <= (4 if method is PiSSA else 2)


def test_scaling() -> None:
    def of(method: Method) -> float:
        return started(method).model.body.scaling["default"]

    assert of(LoRA(rank=2)) == of(PiSSA(rank=2)) == of(DoRA(rank=2)) == 1
    assert of(LoRA(rank=2, alpha=3.0)) == 1.5
    assert of(RsLoRA(rank=2)) == pytest.approx(math.sqrt(2))
    assert of(RsLoRA(rank=2, alpha=3.0)) == pytest.approx(3 / math.sqrt(2))


@pytest.mark.parametrize("method", [LoRA, RsLoRA, DoRA])
def test_the_seed_of_the_run_draws_the_factors_and_the_global_generator_does_not(method: type[Method]) -> None:
    def factor(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        run = started(method(rank=2), seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return run.model.body.lora_A["default"].weight.detach()

    assert torch.equal(factor(0, 1), factor(0, 2))
    assert not torch.equal(factor(0, 1), factor(1, 1))


def test_pissa_starts_from_the_principal_part_and_splits_float64_too() -> None:
    model = TinyNetwork().double()
    u, s, v = torch.linalg.svd(model.body.weight.detach())
    layer = started(PiSSA(rank=2), model).model.body
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert product.dtype == torch.float64
    torch.testing.assert_close(product, u[:, :2] * s[:2] @ v[:2], atol=1e-6, rtol=1e-5)
    assert {p.dtype for p in started(PiSSA(rank=2), TinyNetwork().double()).model.parameters()} == {torch.float64}


def test_dropout_is_on_the_adapters_input_in_training() -> None:
    run = started(LoRA(rank=2, dropout=0.5, target=["body"]))
    assert run.model.body.lora_dropout["default"].p == 0.5


def test_target_names_the_layers_exactly() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4), "fcx": nn.Linear(4, 4)})

    model = started(LoRA(rank=2, target=lambda path, _: path == "fc"), Nested()).model
    adapted = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert adapted == ["fc"]


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="rank = 0"):
        LoRA(rank=0)
    with pytest.raises(ArgumentError, match="alpha = -1"):
        DoRA(alpha=-1)
    with pytest.raises(ArgumentError, match="dropout = 1"):
        LoRA(dropout=1)
    with pytest.raises(ArgumentError, match=r"rank = 8: must be at most 6.*6 -> 8"):
        started(LoRA())
    with pytest.raises(ArgumentError, match="Did you mean 'body'"):
        started(LoRA(rank=2, target=["bdy"]))
    with pytest.raises(ArgumentError, match=r"Wrap it: nn.Sequential\(model\)"):
        started(LoRA(rank=2), nn.Linear(4, 3))


@pytest.mark.parametrize("method", ADAPTERS)
def test_without_peft(method: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'equipoise\[hf\]'"):
        method()
