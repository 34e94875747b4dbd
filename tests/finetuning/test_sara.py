"""SaRA against the card's numbers, torch's AdamW, and its dense and sparse forms against each other."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import equipoise
from equipoise.errors import ArgumentError
from equipoise.finetuning.sara import (
    SaRA,
    SaRAAdamW,
    adaptive_lr,
    apply_sparse_delta,
    below_threshold_mask,
    export_sparse_delta,
    masked_nuclear_norm,
    remove_sparse,
    reselect,
    sparse_entries,
    sparse_parametrize,
)
from equipoise.testing import TinyNetwork, check_method, check_methods_ddp, check_regularizer, classification
from equipoise.training import Run, checkpoint

torch.set_num_threads(1)
THRESHOLD = 0.2  # of the tiny network's weights about half
SETTINGS: dict[str, Any] = {"threshold": THRESHOLD, "lr": 0.05, "lambda_rank": 0.0}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [
        nn.Parameter(random(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate([(5, 4), (7,), (2, 3, 2)])
    ]


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int, first: int = 0) -> None:
    """Steps with the gradients of a noisy quadratic."""
    for t in range(first, first + count):
        for i, p in enumerate(parameters):
            p.grad = p.detach() - 3 + random(*p.shape, seed=100 * t + i).to(p.dtype)
        optimizer.step()


# -- numbers ----------------------------------------------------------------------------------------------------------
def test_adaptive_lr_of_the_paper() -> None:
    for threshold, rate in ((2e-3, 4.965853e-4), (8e-4, 7.557837e-4), (2e-4, 9.323938e-4)):
        assert adaptive_lr(threshold) == pytest.approx(rate, rel=1e-6)


def test_the_mask_is_strict_and_detached() -> None:
    p = nn.Parameter(torch.tensor([0.5, -0.5, 0.4999, 0.0, -2.0]))
    mask = below_threshold_mask(p, 0.5)
    assert mask.tolist() == [False, False, True, True, False] and mask.dtype == torch.bool and not mask.requires_grad


def test_nuclear_norm_by_hand() -> None:
    p = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
    norm = masked_nuclear_norm(p, torch.tensor([[True, True], [False, True]]))
    norm.backward()
    assert norm.item() == pytest.approx(5)
    torch.testing.assert_close(p.grad, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_nuclear_norm_against_the_definition_and_the_kit() -> None:
    p, mask = random(6, 4), random(6, 4, seed=1) > 0
    torch.testing.assert_close(masked_nuclear_norm(p, mask), torch.linalg.matrix_norm(p * mask, "nuc"))
    check_regularizer(masked_nuclear_norm, lambda g: (torch.randn(6, 4, generator=g), mask), skip={})
    assert masked_nuclear_norm(p.bfloat16(), mask).dtype == torch.float32
    poisoned = p.masked_fill(~mask, float("nan"))
    torch.testing.assert_close(masked_nuclear_norm(poisoned, mask), masked_nuclear_norm(p, mask))


def test_two_steps_by_hand_with_a_second_choice() -> None:
    p = nn.Parameter(torch.tensor([0.001, -0.0015, 0.5, 0.0019], dtype=torch.float64))
    optimizer = SaRAAdamW([p], 6e-4, threshold=2e-3, weight_decay=0.0, progressive_step=1)
    p.grad = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == pytest.approx([0.0016, -0.0021, 0.5, 0.0013], abs=2e-11)
    assert optimizer.mask(p).tolist() == [True, True, False, True]
    optimizer.step()
    assert p.tolist() == pytest.approx([0.0022, -0.0021, 0.5, 0.0007], abs=2e-11)
    assert optimizer.mask(p).tolist() == [True, False, False, True]
    ((indices, values),) = optimizer.delta().values()
    assert indices.tolist() == [0, 1, 3] and values.tolist() == pytest.approx([0.0012, -0.0006, -0.0012], abs=4e-11)


# -- the optimizer ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_with_every_entry_it_is_adamw(weight_decay: float) -> None:
    ours, theirs = leaves(), leaves()
    one = SaRAAdamW(ours, 0.01, threshold=1e9, weight_decay=weight_decay)
    two = torch.optim.AdamW(theirs, 0.01, weight_decay=weight_decay)
    steps(one, ours, 20)
    steps(two, theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frozen_entries_keep_their_bits(dtype: torch.dtype) -> None:
    parameters = leaves(dtype=dtype)
    before = [p.detach().clone() for p in parameters]
    optimizer = SaRAAdamW(parameters, 0.05, threshold=0.5, weight_decay=0.5, progressive_step=5)
    steps(optimizer, parameters, 5)
    half = [p.detach().clone() for p in parameters]
    steps(optimizer, parameters, 10, first=5)
    dropped = 0
    for p, old, then in zip(parameters, before, half, strict=True):
        chosen, still = below_threshold_mask(old, 0.5), below_threshold_mask(then, 0.5)
        assert torch.equal(optimizer.mask(p), chosen & still)
        assert torch.equal(p[~chosen], old[~chosen])
        assert torch.equal(p[chosen & ~still], then[chosen & ~still])  # though their moments are not zero
        assert (p[chosen & still] != then[chosen & still]).any()
        dropped += int((chosen & ~still).sum())
    assert dropped


def test_a_large_weight_that_shrank_stays_frozen() -> None:
    p = nn.Parameter(torch.tensor([0.1, 2.0]))
    optimizer = SaRAAdamW([p], 0.01, threshold=0.5, progressive_step=1)
    p.data[1] = 0.2  # by another hand
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    assert p[1] == 0.2 and optimizer.mask(p).tolist() == [True, False]


def test_nothing_that_is_not_a_number_enters_from_frozen_entries() -> None:
    p = nn.Parameter(torch.tensor([0.1, 2.0]))
    optimizer = SaRAAdamW([p], 0.01, threshold=0.5)
    p.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert p[1] == 2.0 and p[0] != 0.1 and torch.isfinite(p).all()


def matrices() -> list[nn.Parameter]:
    return [nn.Parameter(0.1 * random(70, 66, seed=i)) for i in range(3)]


def test_the_rank_term_shrinks_the_nuclear_norm() -> None:
    (p, *_) = matrices()
    optimizer = SaRAAdamW([p], 1e-4, threshold=0.15, lambda_rank=1.0, weight_decay=0.0)
    mask, seen = optimizer.mask(p), []
    for _ in range(5):
        seen.append(masked_nuclear_norm(p.detach(), mask).item())
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.999 * seen[0]


def test_the_rank_term_is_that_of_one_matrix_drawn_by_the_generator() -> None:
    parameters = [*matrices(), nn.Parameter(0.1 * random(64, 70))]  # the last is not longer than 64
    ours = SaRAAdamW(
        parameters, 0.01, threshold=0.15, lambda_rank=0.5, generator=torch.Generator().manual_seed(7), weight_decay=0.0
    )
    twin, drawn = torch.Generator().manual_seed(7), set()
    for _ in range(6):
        i = int(torch.randint(3, (1,), generator=twin))
        before = [p.detach().clone() for p in parameters]
        fresh = [ours.state[p].get("exp_avg", torch.zeros_like(p)).clone() for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        ours.step()
        drawn.add(i)
        for j, (p, m) in enumerate(zip(parameters, fresh, strict=True)):
            mask = ours.mask(p)
            u, _, vh = torch.linalg.svd(before[j] * mask, full_matrices=False)
            extra = 0.5 * (u @ vh) * mask if i == j else torch.zeros_like(p)
            torch.testing.assert_close(ours.state[p]["exp_avg"], 0.9 * m + 0.1 * extra)
    assert len(drawn) > 1


def test_a_small_mask_has_no_rank_term() -> None:
    p = nn.Parameter(1 + random(70, 66).abs())
    p.data.view(-1)[:100] = 0.01
    for count, moved in ((100, False), (101, True)):
        p.data.view(-1)[:count] = 0.01
        optimizer = SaRAAdamW([p], 0.01, threshold=0.5, lambda_rank=1.0, weight_decay=0.0)
        p.grad = torch.zeros_like(p)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(before, p) is not moved


def test_a_rank_term_without_a_matrix_warns_once() -> None:
    with pytest.warns(UserWarning, match="lambda_rank does nothing here: no matrix .* longer than 64"):
        optimizer = SaRAAdamW(leaves(), 0.01, threshold=1.0, lambda_rank=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, [p for g in optimizer.param_groups for p in g["params"]], 2)


def test_closure_missing_gradients_and_groups() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = SaRAAdamW([{"params": [a], "lr": 0.1}, {"params": [b], "threshold": 8e-4}])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, pytest.approx(7.557837e-4, rel=1e-6)]

    def closure() -> Tensor:
        loss = (a - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (a != 0).all() and (b == 0).all()


@pytest.mark.parametrize("at", [3, 8])
def test_a_resumed_optimizer_goes_on_bit_for_bit(at: int, tmp_path: Path) -> None:
    def make() -> tuple[list[nn.Parameter], SaRAAdamW]:
        parameters = [*leaves(dtype=torch.bfloat16), *(nn.Parameter(p.data.float()) for p in matrices())]
        return parameters, SaRAAdamW(parameters, 0.01, threshold=0.3, progressive_step=5, lambda_rank=0.1)

    parameters, optimizer = make()
    steps(optimizer, parameters, at)
    checkpoint.save({"optimizer": optimizer.state_dict(), "p": [p.data for p in parameters]}, tmp_path)
    twin = copy.deepcopy(optimizer)
    steps(optimizer, parameters, 4, first=at)
    saved = checkpoint.load(tmp_path)
    others, resumed = make()
    resumed.load_state_dict(saved["optimizer"])
    for p, value in zip(others, saved["p"], strict=True):
        p.data.copy_(value)
    steps(resumed, others, 4, first=at)
    copied = [p for group in twin.param_groups for p in group["params"]]
    steps(twin, copied, 4, first=at)
    for p, q, r in zip(parameters, others, copied, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        assert resumed.mask(q).dtype == torch.bool and torch.equal(optimizer.mask(p), resumed.mask(q))


def test_a_tied_tensor_has_one_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = SaRAAdamW(model.parameters(), 0.1, threshold=0.3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert model[0].weight is model[1].weight and len(optimizer.state) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, r"threshold = 0.0: must be a number in \(0, inf\)"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] = 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] = -0.1"),
        ({"eps": -1e-8}, "eps = -1e-08"),
        ({"lambda_rank": -1.0}, "lambda_rank = -1.0"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"progressive_step": 0}, "progressive_step = 0: must be an integer >= 1"),
        ({"min_rank_dim": -1}, "min_rank_dim = -1"),
        ({"threshold": 1e-9}, "threshold = 1e-09: must be above .*, the smallest .*: nothing would train"),
    ],
)
def test_bad_settings_of_the_optimizer(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SaRAAdamW(leaves(), **{"lr": 0.1, "threshold": 1.0, **change})


def test_bad_input_elsewhere() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="threshold"):
            adaptive_lr(bad)
        with pytest.raises(ArgumentError, match="threshold"):
            below_threshold_mask(torch.ones(2), bad)
    with pytest.raises(ArgumentError, match=r"mask = torch.bool \(2, 3\): must be torch.bool of .* \(3, 2\)"):
        masked_nuclear_norm(torch.ones(3, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"mask = torch.float32 \(3, 2\)"):
        masked_nuclear_norm(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ArgumentError, match=r"param = shape \(3,\): must be a matrix"):
        masked_nuclear_norm(torch.ones(3), torch.ones(3, dtype=torch.bool))
    layer = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match=r"mask = torch.bool \(3, 2\)"):
        sparse_parametrize(layer, "weight", torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"mask = torch.uint8"):
        sparse_parametrize(layer, "weight", torch.ones(2, 3, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match=r"name = 'wieght': must be a parameter of Linear: weight, bias"):
        sparse_parametrize(layer, "wieght", torch.ones(2, 3, dtype=torch.bool))
    lstm = nn.LSTM(2, 2)
    with pytest.raises(ArgumentError, match="LSTM: reads its weights past a parametrization"):
        sparse_parametrize(lstm, "weight_hh_l0", torch.ones(8, 2, dtype=torch.bool))
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = SaRAAdamW(embedding.parameters(), 0.1, threshold=9.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ArgumentError, match="gradient = sparse tensor"):
        optimizer.step()


# -- the sparse form --------------------------------------------------------------------------------------------------
def test_only_the_chosen_entries_are_a_leaf() -> None:
    layer = nn.Linear(6, 5)
    weight, mask = layer.weight, below_threshold_mask(layer.weight, THRESHOLD)
    dense = weight.detach().clone()
    x = random(4, 6, dtype=torch.float32)
    layer(x).square().sum().backward()
    gradient = weight.grad
    sparse_parametrize(layer, "weight", mask)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]
    leaf = layer.parametrizations.weight.original
    assert leaf is weight and leaf.shape == (int(mask.sum()),) and leaf.grad is None and leaf.is_leaf
    assert {name.rsplit(".")[-1] for name, _ in layer.named_buffers()} == {"base", "index", "trains"}
    assert torch.equal(layer.weight, dense)
    layer(x).square().sum().backward()
    torch.testing.assert_close(leaf.grad, gradient[mask])
    (entries,) = (entry for _, _, entry in sparse_entries(layer).values())
    assert torch.equal(entries.mask(), mask) and entries.index.dtype == torch.int32
    layer.weight = 2 * dense
    torch.testing.assert_close(leaf.data, 2 * dense[mask])
    remove_sparse(layer)
    assert layer.weight is weight and list(layer.state_dict()) == ["weight", "bias"] and type(layer) is nn.Linear
    torch.testing.assert_close(layer.weight[~mask], dense[~mask])


def test_gradcheck_of_the_sparse_form() -> None:
    layer = sparse_parametrize(nn.Linear(4, 3).double(), "weight", random(3, 4, seed=3) > 0)
    x, chain = random(5, 4), layer.parametrizations.weight
    values = chain.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: (x @ chain[0](v).T).sin(), (values,))


def train_twice(progressive: float | None, weight_decay: float) -> tuple[Run, Run]:
    settings = {**SETTINGS, "progressive": progressive, "weight_decay": weight_decay}
    problem = classification().double()
    return problem.train([SaRA(**settings)]), problem.train([SaRA(**settings, sparse=False)])


@pytest.mark.parametrize("progressive", [None, 0.4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_sparse_equals_dense(progressive: float | None, weight_decay: float) -> None:
    sparse, dense = train_twice(progressive, weight_decay)
    assert list(sparse.model.state_dict()) == list(dense.model.state_dict())
    fresh = classification().double().network()
    for p, q, old in zip(sparse.model.parameters(), dense.model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        assert torch.equal(p[~below_threshold_mask(old, THRESHOLD)], old[~below_threshold_mask(old, THRESHOLD)])
        assert torch.equal(p, old) is not bool(below_threshold_mask(old, THRESHOLD).any())


def test_the_second_choice_freezes_and_keeps_the_moments() -> None:
    layer = sparse_parametrize(nn.Linear(6, 8).double(), "weight", torch.ones(8, 6, dtype=torch.bool))
    leaf = layer.parametrizations.weight.original
    optimizer = torch.optim.AdamW([leaf], 0.05, weight_decay=0.1)
    x = random(9, 6)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    step()
    moments = optimizer.state[leaf]["exp_avg"].clone()
    before = layer.weight.detach().clone()
    reselect(layer, THRESHOLD)
    assert torch.equal(layer.weight, before) and torch.equal(optimizer.state[leaf]["exp_avg"], moments)
    small = below_threshold_mask(before, THRESHOLD)
    (_, _, entries) = sparse_entries(layer)["weight"]
    assert torch.equal(entries.mask(), small) and 0 < small.sum() < 48
    for _ in range(3):
        step()
        assert torch.equal(layer.weight[~small], before[~small]) and not (leaf.grad.view(8, 6)[~small]).any()
    assert (layer.weight[small] != before[small]).all()
    reselect(layer, 1e9)  # no way back
    assert torch.equal(entries.mask(), small)


def test_state_of_the_sparse_form_is_that_of_the_chosen_entries() -> None:
    problem = classification()
    run = equipoise.start(problem.network(), problem.make_optimizer, methods=[SaRA(**SETTINGS, progressive=None)])
    run.backward(run.training_loss(problem.examples.take(torch.arange(8))))
    chosen = sum(int(below_threshold_mask(p, THRESHOLD).sum()) for p in problem.network().parameters())
    assert run.methods[0].chosen == chosen
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    assert sum(g.numel() for g in gradients) == chosen
    run.step()
    state = [t for s in run.optimizer.state.values() for t in s.values() if t.ndim]
    assert sum(t.numel() for t in state) == 2 * chosen


@pytest.mark.parametrize("kind", ["conv", "norm", "embedding", "attention"])
def test_other_layers_take_part(kind: str) -> None:
    torch.manual_seed(0)
    layers = {
        "conv": lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()),
        "norm": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 4)),
        "embedding": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 4)),
        "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    }
    model = layers[kind]()
    if kind == "embedding":
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(9, 4))
        x = torch.tensor([[0, 1, 2], [4, 4, 1]])
    else:
        x = torch.randn(2, 3, 4) if kind == "attention" else torch.randn(2, 1, 3, 3)
    twin = copy.deepcopy(model)
    masks = {name: below_threshold_mask(p, THRESHOLD) for name, p in model.named_parameters()}
    for name, mask in masks.items():
        path, _, key = name.rpartition(".")
        sparse_parametrize(model.get_submodule(path), key, mask)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    gradients = {
        name: module.parametrizations[key].original.grad for name, (module, key, _) in sparse_entries(model).items()
    }
    for name, p in twin.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad[masks[name]])
    keys = list(twin.state_dict())
    assert list(remove_sparse(model).state_dict()) == keys
    torch.testing.assert_close(model(x), twin(x))
    if kind == "norm":  # zero biases are chosen, ones are not
        assert masks["1.bias"].all() and not masks["1.weight"].any()


def test_bf16_autocast_and_compile() -> None:
    model = TinyNetwork()
    for name in ("weight", "bias"):
        sparse_parametrize(model.body, name, below_threshold_mask(getattr(model.body, name), THRESHOLD))
    x = random(4, 6, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    got = model.body.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model.body.parametrizations.weight.original.grad)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), model(x).float())
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), model(x), atol=0.03, rtol=0.05)


# -- deltas -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse", [True, False])
def test_a_delta_gives_the_model_and_the_base(sparse: bool) -> None:
    base = classification().network().state_dict()
    model = classification().train([SaRA(**SETTINGS, sparse=sparse)]).model
    delta = export_sparse_delta(model, base)
    for name, change in delta.items():
        chosen = below_threshold_mask(base[name], THRESHOLD).flatten()
        assert change["indices"].dtype == torch.int64 and chosen[change["indices"]].all()
        assert change["values"].shape == change["indices"].shape
    for scale in (0.0, 1.0, 0.6):
        result = apply_sparse_delta(base, delta, scale=scale)
        assert list(result) == list(base)
        for name, p in model.named_parameters():
            expected = base[name] + scale * (p.detach() - base[name])
            torch.testing.assert_close(result[name], expected, rtol=1e-6, atol=1e-7)
            assert scale or torch.equal(result[name], base[name])


def test_deltas_of_one_base_add() -> None:
    base = classification().network().state_dict()
    deltas = []
    for seed in (1, 2):
        model = classification().train([SaRA(**SETTINGS)], seed=seed).model
        deltas.append(export_sparse_delta(model, base))
    both = apply_sparse_delta(apply_sparse_delta(base, deltas[0], scale=0.6), deltas[1], scale=0.6)
    for name, tensor in base.items():
        expected = tensor.clone().flatten()
        for delta in (delta for delta in deltas if name in delta):
            expected[delta[name]["indices"]] += 0.6 * delta[name]["values"]
        torch.testing.assert_close(both[name].flatten(), expected)


def test_a_delta_of_a_model_in_training_and_its_buffers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    problem = classification().with_norm()
    base = problem.network().state_dict()
    run = equipoise.start(problem.network(), problem.make_optimizer, methods=[SaRA(**SETTINGS, progressive=None)])
    run.backward(run.training_loss(problem.examples.take(torch.arange(8))))
    run.step()
    delta = export_sparse_delta(run.model, base)
    assert "norm.running_mean" in delta and "norm.weight" not in delta and "norm.num_batches_tracked" in delta
    save_file({f"{n}/{k}": t for n, change in delta.items() for k, t in change.items()}, tmp_path / "delta.safetensors")
    read: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(tmp_path / "delta.safetensors").items():
        name, part = key.split("/")
        read.setdefault(name, {})[part] = tensor
    result = apply_sparse_delta(base, read)
    state = run.finish().state_dict()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


def test_deltas_of_other_models_are_refused() -> None:
    model = TinyNetwork()
    base = model.state_dict()
    with pytest.raises(
        ArgumentError, match=r"base_state_dict = .*: must have 'body.weight': it belongs to another model"
    ):
        export_sparse_delta(model, {"body.wieght": base["body.weight"]})
    with pytest.raises(
        ArgumentError, match=r"base_state_dict\['body.weight'\] has shape \(4, 6\): must be .* \(8, 6\)"
    ):
        export_sparse_delta(model, {**base, "body.weight": torch.zeros(4, 6)})
    change = {"indices": torch.tensor([48]), "values": torch.tensor([1.0])}
    with pytest.raises(ArgumentError, match="must lie below 48, the size of the tensor"):
        apply_sparse_delta(base, {"body.weight": change})
    with pytest.raises(ArgumentError, match=r"Did you mean 'body.weight'\?"):
        apply_sparse_delta(base, {"body.wieght": change})
    with pytest.raises(ArgumentError, match="scale = inf"):
        apply_sparse_delta(base, {}, scale=float("inf"))


# -- the method -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse", [True, False])
def test_the_kit(sparse: bool) -> None:
    check_method(
        SaRA, settings={**SETTINGS, "sparse": sparse}, only=["trains", "resume", "state", "determinism", "random-state"]
    )


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    for report in check_methods_ddp([(SaRA, SETTINGS), (SaRA, {**SETTINGS, "sparse": False})]):
        assert report.passed == ["ddp-trains", "ddp-ranks", "ddp-equals-one"]


def test_the_learning_rate_and_the_schedule_of_the_method() -> None:
    problem = classification()
    for sparse in (True, False):
        run = equipoise.start(
            problem.network(),
            problem.make_optimizer,
            methods=[SaRA(threshold=0.05, lambda_rank=0.0, sparse=sparse)],
            data=problem.examples,
            batch_size=8,
            epochs=2,
            scheduler=lambda o, n: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, n),
        )
        assert run.optimizer.param_groups[0]["lr"] == adaptive_lr(0.05) and run.total_steps == 10
        assert isinstance(run.optimizer, torch.optim.AdamW if sparse else SaRAAdamW)
        assert sparse or run.optimizer.param_groups[0]["progressive_step"] == 5


def test_the_rank_term_of_the_sparse_form_is_a_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(66, 70), nn.ReLU(), nn.Linear(70, 3))
    data = equipoise.Examples(torch.randn(8, 66), torch.arange(8) % 3)

    def loss(lambda_rank: float) -> float:
        method = SaRA(threshold=0.05, lr=0.1, lambda_rank=lambda_rank, progressive=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = equipoise.start(copy.deepcopy(model), lambda p: torch.optim.SGD(p, lr=0.1), methods=[method])
        values = [run.training_loss(data.take(torch.arange(8))).item() for _ in range(2)]
        assert values[0] == values[1]  # one draw a step, however many micro-batches
        return values[0]

    weight = model[0].weight.detach()
    norm = masked_nuclear_norm(weight, below_threshold_mask(weight, 0.05)).item()
    assert loss(0.5) - loss(0.0) == pytest.approx(0.5 * norm, rel=1e-4)


def test_the_method_warns_and_refuses() -> None:
    problem = classification()

    def begin(method: SaRA, model: nn.Module | None = None, **options: Any) -> Run:
        return equipoise.start(model or problem.network(), problem.make_optimizer, methods=[method], **options)

    with pytest.warns(UserWarning, match="lambda_rank does nothing here"):
        begin(SaRA(threshold=0.2, progressive=None))
    with pytest.raises(ArgumentError, match="total_steps = None: must be a fixed number"):
        begin(SaRA(threshold=0.2))
    with pytest.raises(ArgumentError, match="nothing would train"):
        begin(SaRA(threshold=1e-12), total_steps=5)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ArgumentError, match=r"'0.weight' and '1.weight' are one tied tensor, .* SaRA\(sparse=False\)"):
        begin(SaRA(**SETTINGS, progressive=None), tied)
    begin(SaRA(**SETTINGS, progressive=None, sparse=False), tied)
    for change, message in (
        ({"threshold": 0.0}, "threshold"),
        ({"lr": -1.0}, "lr"),
        ({"lambda_rank": -1.0}, "lambda_rank"),
        ({"progressive": 0.0}, "progressive"),
        ({"progressive": 1.5}, "progressive"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ):
        with pytest.raises(ArgumentError, match=f"^{message} = "):
            SaRA(**change)


def test_parameters_without_a_chosen_entry_are_frozen_and_others_frozen_before_stay() -> None:
    model = TinyNetwork(norm=True)
    model.head.requires_grad_(False)
    run = equipoise.start(model, lambda p: torch.optim.SGD(p, lr=0.1), methods=[SaRA(**SETTINGS, progressive=None)])
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{m}.parametrizations.{k}.original" for m, k in (("body", "weight"), ("body", "bias"), ("norm", "bias"))
    }


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
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    tokens = torch.randint(2, 30, (48, 8), generator=torch.Generator().manual_seed(0))
    data = equipoise.Examples(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, (tokens[:, 1] > 15).long()
    )
    method = SaRA(threshold=0.01, lr=0.01, lambda_rank=0.0)
    run = equipoise.fit(
        model, data, methods=[method], epochs=8, batch_size=16, optimizer=lambda p: torch.optim.AdamW(p)
    )
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    after = run.model.state_dict()
    assert list(after) == keys
    for name, old in before.items():
        frozen = old.abs() >= 0.01
        assert torch.equal(after[name][frozen], old[frozen])


def test_parametrizations_of_others_are_left_alone() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert sparse_entries(layer) == {} and parametrize.is_parametrized(remove_sparse(layer))


def test_a_frozen_model_has_one_clear_error() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    data = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(
        ArgumentError, match=r"model: has no parameter that requires a gradient.*requires_grad_\(True\)"
    ):
        equipoise.fit(model, data, epochs=1, methods=[SaRA()])
