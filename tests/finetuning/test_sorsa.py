"""SORSA against the paper's formulas, hand-computed numbers, automatic derivatives, PiSSA, peft, and a loop by hand."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.finetuning.adapters import adapters_of, detach_adapters, load_adapter, save_adapter, trainable_report
from equipoise.finetuning.ba_lora import PiSSALinear, apply_pissa
from equipoise.finetuning.sorsa import (
    SORSA,
    SORSALinear,
    add_orthonormal_gradient,
    apply_sorsa,
    condition_number,
    export_peft,
    merge_adapters,
    orthonormal_penalty,
)
from equipoise.testing import check_layer, check_method, classification
from equipoise.training import Examples

torch.set_num_threads(1)
PROBLEM = classification()


def diagonal(*values: float) -> nn.Linear:
    linear = nn.Linear(len(values), len(values), bias=False)
    linear.weight.data = torch.diag(torch.tensor(values, dtype=torch.float32))
    return linear


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


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters() if p.requires_grad]


# -- oracles of the layer and the penalty -----------------------------------------------------------------------------
def test_oracle_1_a_diagonal_weight() -> None:
    layer = SORSALinear(diagonal(3, 2, 1), 2)
    torch.testing.assert_close(layer.sorsa_S.detach(), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(layer.weight.detach(), torch.diag(torch.tensor([0.0, 0, 1])))
    loss = orthonormal_penalty(layer)
    loss.backward()
    assert loss.item() == 0 and torch.equal(layer.sorsa_A.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    layer.zero_grad()
    assert add_orthonormal_gradient(layer, 5.0).item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (layer.sorsa_A, layer.sorsa_B))  # type: ignore[arg-type]


def by_hand() -> SORSALinear:
    layer = SORSALinear(diagonal(3, 2, 1), 2)
    with torch.no_grad():
        layer.sorsa_A.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
        layer.sorsa_B.copy_(torch.eye(3)[:, :2])
    return layer


def test_oracle_2_penalty_by_hand() -> None:
    layer = by_hand()
    loss = orthonormal_penalty(layer)
    loss.backward()
    assert loss.item() == 1.5
    torch.testing.assert_close(layer.sorsa_A.grad, torch.tensor([[0.0, 0, 0], [0, 2, 0]]))
    assert torch.equal(layer.sorsa_B.grad, torch.zeros(3, 2)) and layer.sorsa_S.grad is None  # type: ignore[arg-type]
    torch.testing.assert_close(layer.merged_weight(), torch.diag(torch.tensor([3.0, 4, 1])))
    layer.zero_grad()
    assert add_orthonormal_gradient(layer, 0.5).item() == 1.5
    torch.testing.assert_close(layer.sorsa_A.grad, torch.tensor([[0.0, 0, 0], [0, 1, 0]]))
    assert torch.equal(layer.sorsa_B.grad, torch.zeros(3, 2))  # type: ignore[arg-type]
    assert condition_number(layer).item() == pytest.approx(4 / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, 1.0), (5, 20.0), (5, None)])
def test_oracle_3_the_layer_begins_as_its_base(rank: int, alpha: float | None, dtype: torch.dtype) -> None:
    base = nn.Linear(7, 5).to(dtype)
    before = base.weight.detach().clone()
    layer = SORSALinear(base, rank, alpha=alpha)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    near: Any = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]}
    torch.testing.assert_close(layer(x), base(x), **near)
    assert torch.equal(base.weight, before) and layer.sorsa_A.dtype == dtype
    if rank == 5 and alpha is None:
        torch.testing.assert_close(layer.weight, torch.zeros_like(before), **near)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["sorsa_A", "sorsa_S", "sorsa_B"]
    assert [tuple(p.shape) for p in (layer.sorsa_A, layer.sorsa_S, layer.sorsa_B)] == [(rank, 7), (rank,), (5, rank)]


def test_oracle_4_gradients_are_those_of_pissa() -> None:
    base = nn.Linear(6, 5).double()
    ours, pissa = SORSALinear(base, 3), PiSSALinear(base, 3)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), pissa(x))
    for layer in (ours, pissa):
        layer(x).square().sum().backward()
    root = ours.sorsa_S.detach().sqrt()
    torch.testing.assert_close(ours.sorsa_A.grad, root[:, None] * pissa.lora_A.grad)  # type: ignore[operator]
    torch.testing.assert_close(ours.sorsa_B.grad, root * pissa.lora_B.grad)  # type: ignore[operator]


def test_oracle_5_penalty_does_not_see_rotations_or_values() -> None:
    model = moved(apply_sorsa(network(), 2)).double()
    before = orthonormal_penalty(model)
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        model[0].sorsa_A.copy_(turn @ model[0].sorsa_A)
        model[2].sorsa_B.copy_(model[2].sorsa_B @ turn)
        model[0].sorsa_S.mul_(-3)
    torch.testing.assert_close(orthonormal_penalty(model), before)
    total = 0.0
    for layer in (model[0], model[2]):
        for rows in (layer.sorsa_A.tolist(), layer.sorsa_B.T.tolist()):
            squares = 0.0
            for i, one in enumerate(rows):
                for j, two in enumerate(rows):
                    squares += (sum(a * b for a, b in zip(one, two, strict=True)) - (i == j)) ** 2
            total += math.sqrt(squares)
    assert before.item() == pytest.approx(total / 4, rel=1e-12) and total > 0
    torch.testing.assert_close(orthonormal_penalty([model[0], model[2]]), before)
    torch.testing.assert_close(
        orthonormal_penalty(model), (orthonormal_penalty(model[0]) + orthonormal_penalty(model[2])) / 2
    )


def test_oracle_6_closed_form_gradient_is_autograds() -> None:
    model = moved(apply_sorsa(network(), 2)).double()
    (0.7 * orthonormal_penalty(model)).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    value = add_orthonormal_gradient(model, 0.7)
    assert not value.requires_grad
    torch.testing.assert_close(value, orthonormal_penalty(model).detach())
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    grad = model[0].sorsa_A.grad
    add_orthonormal_gradient(model, 1.4)
    assert model[0].sorsa_A.grad is grad  # in place, as gradients that are views of a bucket need it
    torch.testing.assert_close(grad, 3 * expected[0])  # type: ignore[operator]


def test_gradcheck_of_layer_and_penalty() -> None:
    layer = moved(SORSALinear(nn.Linear(5, 4).double(), 2, alpha=3.0))
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    parameters = [layer.sorsa_A, layer.sorsa_S, layer.sorsa_B]

    def outputs(*_: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), orthonormal_penalty(layer)

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


def test_oracle_7_factors_over_the_original_weight() -> None:
    base = nn.Linear(7, 5).double()
    layer = SORSALinear(base, 3, alpha=4.0)
    a, b = layer.lora_factors()
    assert a.shape == (6, 7) and b.shape == (5, 6)
    assert (b @ a).abs().max() < 1e-14
    moved(layer)
    a, b = layer.lora_factors()
    torch.testing.assert_close(base.weight + b @ a, layer.merged_weight())
    torch.testing.assert_close(layer.original_weight(), base.weight.detach())


def test_oracle_8_forward_merged_and_factored() -> None:
    layer = moved(SORSALinear(nn.Linear(7, 5).double(), 3, alpha=4.0))
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    dense = layer.scaling * ((layer.sorsa_B * layer.sorsa_S) @ layer.sorsa_A)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + x @ dense.T + layer.bias)
    torch.testing.assert_close(layer.merge()(x), layer(x))
    sigma = torch.linalg.svdvals(dense)
    torch.testing.assert_close(condition_number(layer), sigma[0] / sigma[2])
    with torch.no_grad():
        layer.sorsa_S[0] = 0.0
    assert condition_number(layer) > 1e10


def test_the_official_layer_computes_the_same() -> None:
    found = importlib.util.find_spec("sorsa")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package sorsa")
    # The file alone: the package imports a trainer for another version of transformers.
    spec = importlib.util.spec_from_file_location("sorsa_layer", Path(found.submodule_search_locations[0]) / "layer.py")
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    base = nn.Linear(7, 5)
    theirs = official.Linear(7, 5, r=3, alpha=2.0, bias=True)
    theirs.weight.data, theirs.bias.data = base.weight.data.clone(), base.bias.data.clone()
    theirs.sorsa_init()
    ours = SORSALinear(base, 3, alpha=2.0)
    x = torch.randn(4, 7)
    torch.testing.assert_close(ours.weight.data, theirs.weight.data, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.sorsa_S, theirs.sorsa_S)
    for part in ("sorsa_A", "sorsa_S", "sorsa_B"):  # the same signs
        getattr(ours, part).data.copy_(getattr(theirs, part).data)
    moved(ours)
    for part in ("sorsa_A", "sorsa_S", "sorsa_B"):
        getattr(theirs, part).data.copy_(getattr(ours, part).data)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(orthonormal_penalty(ours), official.calc_ortho(theirs))


# -- the layer --------------------------------------------------------------------------------------------------------
def test_the_layer_passes_the_kit() -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return moved(SORSALinear(nn.Linear(6, 5), 2, alpha=3.0, dropout=0.2))

    check_layer(make, shape=(5,))


def test_dropout_is_on_the_trained_path_only() -> None:
    base = nn.Linear(6, 5)
    layer = SORSALinear(base, 2, dropout=0.9)
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    kept = F.dropout(x, 0.9)
    torch.manual_seed(0)
    a, b = layer.factors()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + kept @ (b @ a).T)
    torch.testing.assert_close(layer.eval()(x), base(x))


def test_layer_penalty_and_gradient_in_low_precision_and_compiled() -> None:
    layer = moved(SORSALinear(nn.Linear(6, 5).bfloat16(), 2))
    x = torch.randn(4, 6).bfloat16()
    loss = layer(x).float().sum() + orthonormal_penalty(layer)
    loss.backward()
    wide = copy.deepcopy(layer).float()
    assert orthonormal_penalty(layer).dtype == torch.float32
    torch.testing.assert_close(orthonormal_penalty(layer), orthonormal_penalty(wide))
    add_orthonormal_gradient(layer, 0.1)
    assert layer.sorsa_A.grad is not None and layer.sorsa_A.grad.dtype == torch.bfloat16
    model = moved(apply_sorsa(network(), 2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(3, 6)), model(torch.ones(3, 6)))
    penalty = torch.compile(orthonormal_penalty, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(penalty(model), orthonormal_penalty(model))


def test_without_init_it_merges_but_is_not_exported_over_the_original(tmp_path: Path) -> None:
    base = network()
    model = copy.deepcopy(base)
    for i in (0, 2):
        model[i] = SORSALinear(model[i], 2, keep_init=False)  # type: ignore[arg-type]
    moved(model)
    assert not any("init" in key for key in model.state_dict())
    for attempt in (lambda: export_peft(model, tmp_path), model[0].lora_factors, model[0].original_weight):  # type: ignore[operator]
        with pytest.raises(ArgumentError, match="keep_init = False: must be True"):
            attempt()
    export_peft(model, tmp_path, over="residual")
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), merge_adapters(model)(x))


# -- files ------------------------------------------------------------------------------------------------------------
def test_merging_and_saving(tmp_path: Path) -> None:
    base = network()
    model = apply_sorsa(copy.deepcopy(base), 2, alpha=3.0)
    assert trainable_report(model).trainable == 2 * (6 + 8 + 1) + 2 * (8 + 3 + 1)
    moved(model)
    x = torch.randn(5, 6)
    expected = model(x)
    save_adapter(model, tmp_path / "a.safetensors")
    other = load_adapter(moved(apply_sorsa(copy.deepcopy(base), 2, alpha=3.0), seed=5), tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(detach_adapters(copy.deepcopy(other))(x), base(x))
    merged = merge_adapters(model)
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(x), expected)
    with pytest.raises(ArgumentError, match="merged already"):
        merge_adapters(merged)


@pytest.mark.parametrize("over", ["original", "residual"])
def test_oracle_7_peft_loads_the_export(tmp_path: Path, over: str) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    base = network()
    model = moved(apply_sorsa(copy.deepcopy(base), 2, alpha=3.0))
    export_peft(model, tmp_path, over=over)
    x = torch.randn(5, 6)
    expected = model(x)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (4 if over == "original" else 2)
    if over == "residual":
        base.load_state_dict(load_file(tmp_path / "residual.safetensors"), strict=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)


def test_state_of_the_model_holds_the_start() -> None:
    model = moved(apply_sorsa(network(), 2))
    other = apply_sorsa(network(seed=3), 2)
    other.load_state_dict(model.state_dict())
    for one, two in zip(model[0].lora_factors(), other[0].lora_factors(), strict=True):
        assert torch.equal(one, two)


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SORSALinear(nn.Linear(3, 2), 0), "rank = 0"),
        (lambda: SORSALinear(nn.Linear(3, 2), 3), "rank = 3: must be at most 2"),
        (lambda: SORSALinear(nn.Linear(3, 2), 1, dropout=1.0), r"dropout = 1.0: must be a number in \[0, 1\)"),
        (lambda: SORSALinear(nn.Linear(3, 2), 1, dropout=-0.1), "dropout"),
        (lambda: SORSALinear(nn.Linear(3, 2), 1, alpha=0.0), "alpha"),
        (lambda: SORSALinear(diagonal(1.0, math.inf), 1), "holds NaN or infinite values"),
        (lambda: apply_sorsa(network(), 2, target=["body"]), "matches no nn.Linear"),
        (lambda: orthonormal_penalty(network()), "module = Sequential: has no SORSA layers"),
        (lambda: add_orthonormal_gradient([], 1.0), "module = list: has no SORSA layers"),
        (lambda: export_peft(network(), "x"), "has no adapters"),
        (lambda: export_peft(apply_sorsa(network(), 2), "x", over="base"), "over = 'base'"),
        (lambda: export_peft(apply_pissa(network(), 2), "x", over="residual"), "over = 'residual'"),
        (lambda: SORSA(rank=0), "rank"),
        (lambda: SORSA(gamma=-1e-4), "gamma = -0.0001"),
        (lambda: SORSA(alpha=0.0), "alpha"),
        (lambda: SORSA(dropout=1.0), "dropout"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- in a run ---------------------------------------------------------------------------------------------------------
def by_hand_in_a_loop(gamma: float, clip: float | None, schedule: bool) -> nn.Module:
    problem = PROBLEM.double()
    model = apply_sorsa(problem.network(), 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    source = equipoise.start(
        problem.network(), problem.make_optimizer, data=problem.examples, epochs=3, batch_size=8, seed=problem.seed
    )
    step = 0
    for _ in range(3):
        for batch in source.batches():
            optimizer.param_groups[0]["lr"] = 0.02 * (0.5 * (1 + math.cos(math.pi * step / 15)) if schedule else 1.0)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for layer in (model.body, model.head):
                for parameter, rows in ((layer.sorsa_A, layer.sorsa_A), (layer.sorsa_B, layer.sorsa_B.T)):
                    defect = (rows @ rows.T - torch.eye(2, dtype=rows.dtype)).detach()
                    direction = defect @ rows.detach() / max(defect.norm().item(), 1e-12)
                    direction = direction.T if parameter is layer.sorsa_B else direction
                    parameter.grad += gamma / 0.02 * 2 / 4 * direction
            optimizer.step()
            step += 1
        source.end_epoch()
    return merge_adapters(model)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def cosine(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


@pytest.mark.parametrize(("clip", "schedule"), [(None, False), (0.05, True)])
def test_in_a_run_it_is_the_loop_by_hand_whose_penalty_is_not_clipped(clip: float | None, schedule: bool) -> None:
    options: dict[str, Any] = {"optimizer": adamw, "clip_norm": clip, "scheduler": cosine if schedule else None}
    run = PROBLEM.double().train([SORSA(rank=2, gamma=0.01)], **options)
    expected = by_hand_in_a_loop(0.01, clip, schedule)
    for ours, theirs in zip(run.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_meet_the_penalty_once() -> None:
    problem = PROBLEM.double()
    one, two = (problem.train([SORSA(rank=2, gamma=0.05)], accumulation=n) for n in (1, 2))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("scheduler", "peak"),
    [
        (None, 0.02),
        (cosine, 0.02),
        (lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / steps), 0.02),
        (lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps + 1), 0.3),
    ],
)
def test_the_coefficient_is_gamma_over_the_peak_rate(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, peak: float
) -> None:
    seen: list[float] = []

    def note(module: Any, coefficient: float) -> Tensor:
        seen.append(coefficient)
        return torch.zeros(())

    monkeypatch.setattr("equipoise.finetuning.sorsa.add_orthonormal_gradient", note)

    class Decay(equipoise.Method):
        """Lowers the rate by hand, as a loop without a schedule may."""

        name = "decay"

        def after_step(self, run: equipoise.Run) -> None:
            if scheduler is None:
                run.optimizer.param_groups[0]["lr"] *= 0.5

    PROBLEM.train([SORSA(rank=2, gamma=0.003), Decay()], optimizer=adamw, scheduler=scheduler)
    assert seen == pytest.approx([0.003 / peak] * 15)
    seen.clear()
    PROBLEM.train([SORSA(rank=2, gamma=0.0)], optimizer=adamw)
    assert not seen


def test_the_regulariser_keeps_the_vectors_nearer_to_orthonormal() -> None:
    class Look(SORSA):
        """Notes R before it merges."""

        name = "look"
        value = 0.0

        def finish(self, run: equipoise.Run) -> None:
            self.value = orthonormal_penalty(run.model).item()
            super().finish(run)

    methods = [Look(rank=2, gamma=gamma) for gamma in (0.0, 0.02)]
    for method in methods:
        run = PROBLEM.train([method], optimizer=adamw, epochs=10)
        assert run.model.state_dict().keys() == PROBLEM.network().state_dict().keys()
    assert 0 < methods[1].value < 0.7 * methods[0].value


@pytest.mark.parametrize("clip", [None, 1.0])
def test_scaled_gradients_are_unscaled_before_the_penalty_meets_them(clip: float | None) -> None:
    """As under fp16, whose scaler of gradients exists on accelerators only: 1024 times the gradient, until somebody divides."""
    run = equipoise.start(PROBLEM.network(), adamw, data=PROBLEM.examples, methods=[SORSA(rank=2, gamma=0.02)])
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    def unscale(optimizer: Any = None) -> None:
        for p in parameters:
            p.grad.div_(1024)  # type: ignore[union-attr]

    scale = 1024 if clip is None else 1  # clipping unscales
    for p in parameters:
        p.grad = torch.full_like(p, float(scale))
    run.clip_norm = clip
    run.accelerator = SimpleNamespace(scaler=object(), unscale_gradients=unscale)  # type: ignore[assignment]
    moved(run.model)
    run.methods[0].before_step(run)
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    add_orthonormal_gradient(run.model, 1.0)
    for mine, p in zip(found, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad)


def test_several_rates_or_none_are_refused_before_training() -> None:
    def groups(rates: list[float]) -> Any:
        return lambda parameters: torch.optim.SGD(
            [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)], lr=0.1
        )

    start = partial(equipoise.start, data=PROBLEM.examples, methods=[SORSA(rank=2)])
    with pytest.raises(
        ArgumentError, match=r"optimizer = \[0.1, 0.2\]: must give the adapters' parameters one learning"
    ):
        start(PROBLEM.network(), groups([0.1] * 5 + [0.2]))
    with pytest.raises(ArgumentError, match="above 0"):
        start(PROBLEM.network(), groups([0.0] * 6))
    start(PROBLEM.network(), groups([0.1] * 6))


CHECKS: dict[str, Any] = {"settings": {"rank": 2, "gamma": 0.01}}


def test_method_passes_the_kit() -> None:
    check_method(SORSA, **CHECKS, compile=True)
    check_method(SORSA, settings={"rank": 2, "dropout": 0.3, "alpha": 1.0})


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

    class Export(SORSA):
        """Exports before it merges."""

        name = "export"

        def finish(self, run: equipoise.Run) -> None:
            assert len(adapters_of(run.model)) == 3
            export_peft(run.model, tmp_path)
            super().finish(run)

    method = Export(rank=2, target=["query", "value", "classifier"])
    data = Examples(inputs, tokens[:, 1] % 3)
    run = equipoise.fit(copy.deepcopy(base), data, epochs=2, batch_size=8, methods=[method], optimizer=adamw)
    assert run.model.state_dict().keys() == base.state_dict().keys()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = run.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
        assert (base.eval()(**inputs).logits - expected).abs().max() > 0.01
