"""FedTiny against hand-computed numbers, loops written out, FedAvg, and whole runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from federation import changed, mod, same, toy_clients, toy_model
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError
from equipoise.federated.algorithm import Client, LocalTraining, Sent, Server, Update
from equipoise.federated.fedspeed import FedAvg
from equipoise.federated.fedtiny import (
    BN,
    LOSS,
    MASK,
    STATISTICS,
    TOPK,
    FedTiny,
    MagnitudeMask,
    MaskedTraining,
    RandomMask,
    adjust_count,
    aggregate_bn_statistics,
    candidate_masks,
    collect_bn_statistics,
    erk_densities,
    grow_prune,
    layer_densities,
    load_bn_statistics,
    magnitude_mask,
    masked,
    merge_topk,
    pack_mask,
    random_mask,
    topk_gradients,
    unpack_mask,
)
from equipoise.federated.params import state_of, weighted_mean
from equipoise.training.batch import Examples

torch.set_num_threads(1)
LOCAL = LocalTraining(lr=0.1, batch_size=8, momentum=0.5, weight_decay=0.01, least_batch=2)
WEIGHTS = ("0.weight", "4.weight")  # of the toy model: 48 and 24 of 99 parameters


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulated(method: Any, model: Any = None, **settings: Any) -> Any:
    pytest.importorskip("flwr")
    from equipoise.federated.simulation import simulate

    rounds = settings.pop("rounds", 4)
    return simulate(method, model or toy_model(), toy_clients(), rounds, **{"local": LOCAL, **settings})


# -- oracle 1 ---------------------------------------------------------------------------------------------------------
def test_adjust_count() -> None:
    assert [adjust_count(1000, t, 100) for t in (0, 10, 50, 90, 100)] == [300, 292, 150, 7, 0]
    assert adjust_count(1000, 101, 100) == 0 and adjust_count(0, 0, 5) == 0
    assert adjust_count(10, 0, 1, alpha=1.0) == 10


# -- oracle 2 ---------------------------------------------------------------------------------------------------------
def test_erk_densities() -> None:
    found = erk_densities({"a": (4, 4), "b": (4, 16)}, 0.25)
    assert found == pytest.approx({"a": 0.357143, "b": 0.223214}, abs=1e-6)
    found = erk_densities({"a": (2, 2), "b": (10, 40)}, 0.2)
    assert found == pytest.approx({"a": 1.0, "b": 0.1925}, abs=1e-12)
    shapes = {"conv": (8, 4, 3, 3), "wide": (64, 128), "head": (10, 64)}
    found = erk_densities(shapes, 0.1)
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    assert found["conv"] / found["wide"] == pytest.approx(raw["conv"] / raw["wide"])
    kept = sum(found[name] * math.prod(shape) for name, shape in shapes.items())
    assert kept == pytest.approx(sum(int(0.1 * math.prod(shape)) for shape in shapes.values()))


def test_equal_layers_become_dense_together_and_density_1_is_all() -> None:
    found = erk_densities({"a": (2, 2), "b": (2, 2), "c": (100, 100)}, 0.05)
    assert found["a"] == found["b"] == 1 and 0 < found["c"] < 0.05
    shapes = {"a": (3, 7), "b": (5, 11, 3), "c": (13, 2)}
    assert erk_densities(shapes, 1.0) == layer_densities(shapes, 1.0, "uniform") == dict.fromkeys(shapes, 1.0)
    assert layer_densities(shapes, 0.3, "uniform") == dict.fromkeys(shapes, 0.3)


# -- masks ------------------------------------------------------------------------------------------------------------
def test_magnitude_mask() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0], [-2.0, 0.5, 2.0]])
    assert magnitude_mask(weight, 0.5).tolist() == [
        [True, False, True],
        [True, False, False],
    ]  # of equal ones the first
    assert magnitude_mask(weight, 1.0).all()
    assert magnitude_mask(torch.zeros(10), 0.35).nonzero().squeeze(1).tolist() == [0, 1, 2]
    weight = torch.randn(50, 40, generator=seeded()).round(decimals=1)  # many ties
    expected = weight.abs().reshape(-1).argsort(descending=True, stable=True)[:600].sort().values
    assert torch.equal(magnitude_mask(weight, 0.3).reshape(-1).nonzero().squeeze(1), expected)
    assert magnitude_mask(weight.bfloat16(), 0.3).sum() == 600


def test_random_mask() -> None:
    weight = torch.randn(20, 10)
    mask = random_mask(weight, 0.125, generator=seeded())
    assert mask.shape == weight.shape and mask.sum() == 25
    assert torch.equal(random_mask(weight, 0.125, generator=seeded()), mask)
    assert not torch.equal(random_mask(weight, 0.125, generator=seeded(1)), mask)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_candidates_meet_the_density_with_different_layers(distribution: str) -> None:
    shapes = {"a": (8, 4, 3, 3), "b": (64, 50), "c": (10, 64)}
    weights = {name: torch.randn(shape, generator=seeded()) for name, shape in shapes.items()}
    total = sum(weight.numel() for weight in weights.values())
    found = candidate_masks(weights, 0.1, num=6, generator=seeded(), distribution=distribution)
    densities = layer_densities(shapes, 0.1, distribution)
    for name in weights:
        assert torch.equal(found[0][name], magnitude_mask(weights[name], densities[name]))
    kept = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in found]
    assert all(abs(sum(counts.values()) - 0.1 * total) < 2 * len(shapes) for counts in kept)
    assert len({tuple(counts.values()) for counts in kept}) == 6
    for masks in found:
        for name, mask in masks.items():
            assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()
    again = candidate_masks(weights, 0.1, num=6, generator=seeded(), distribution=distribution)
    assert all(same(a, b) for a, b in zip(found, again, strict=True))
    assert all(
        mask.all() for masks in candidate_masks(weights, 1.0, num=3, generator=seeded()) for mask in masks.values()
    )


def test_a_noisy_candidate_caps_layers_that_would_exceed_1() -> None:
    weights = {"a": torch.randn(2, 2), "b": torch.randn(10, 40)}
    for masks in candidate_masks(weights, 0.2, num=20, noise=0.9, generator=seeded()):
        assert abs(sum(int(mask.sum()) for mask in masks.values()) - 0.2 * 404) < 4


def test_packed_masks() -> None:
    for density, dtype in ((0.01, torch.int32), (0.5, torch.uint8), (1.0, torch.uint8)):
        mask = random_mask(torch.zeros(37, 53), density, generator=seeded())
        packed = pack_mask(mask)
        assert packed.dtype == dtype and torch.equal(unpack_mask(packed, mask), mask)
        assert packed.numel() * packed.element_size() <= math.ceil(37 * 53 / 8)


# -- oracle 3: growing and pruning by hand ----------------------------------------------------------------------------
W = torch.tensor([0.5, -0.1, 0.3, 0, 0, 0])
INSIDE = torch.tensor([True, True, True, False, False, False])
GRAD = torch.tensor([0.1, 5, 0.2, -2, 0.3, 1])


def places(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().squeeze(1).tolist())


def test_grow_prune_by_hand() -> None:
    weight, mask = grow_prune(W, INSIDE, GRAD, 1)
    assert places(mask) == {0, 2, 3}
    torch.testing.assert_close(weight, torch.tensor([0.5, 0, 0.3, 0, 0, 0]))
    weight, mask = grow_prune(W, INSIDE, GRAD, 1, allow_regrow=True)
    assert torch.equal(mask, INSIDE) and weight[1] == pytest.approx(-0.1)
    assert places(grow_prune(W, INSIDE, GRAD, 2)[1]) == {0, 3, 5}


def test_topk_gradients_by_hand() -> None:
    found, values = topk_gradients(GRAD, INSIDE, 2)
    assert found.tolist() == [3, 5] and values.tolist() == [-2, 1] and found.dtype == torch.int64
    assert topk_gradients(GRAD, INSIDE, 9)[0].tolist() == [3, 5, 4]  # capped
    assert topk_gradients(GRAD, INSIDE, 0)[0].numel() == 0
    assert topk_gradients(GRAD.view(2, 3), INSIDE.view(2, 3), 2)[0].tolist() == [3, 5]
    assert topk_gradients(torch.ones(6), INSIDE, 2)[0].tolist() == [3, 4]  # of equal ones the first


# -- oracle 4: a loop written out, and what stays ---------------------------------------------------------------------
def grow_prune_loop(weight: Tensor, mask: Tensor, grad: Tensor, k: int, regrow: bool) -> tuple[list[float], list[bool]]:
    w, m, g = weight.tolist(), mask.tolist(), grad.tolist()
    inside, outside = [i for i in range(len(w)) if m[i]], [i for i in range(len(w)) if not m[i]]
    k = min(k, len(inside), len(outside))
    leave = sorted(inside, key=lambda i: (abs(w[i]), i))[:k]
    enter = sorted(outside + leave if regrow else outside, key=lambda i: (-abs(g[i]), i))[:k]
    now = [(m[i] and i not in leave) or i in enter for i in range(len(w))]
    return [w[i] if m[i] and now[i] else 0.0 for i in range(len(w))], now


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 7, 40])
def test_grow_prune_is_the_loop_and_keeps_the_count(k: int, regrow: bool) -> None:
    for seed in range(20):
        generator = seeded(seed)
        mask = torch.rand(30, generator=generator) < 0.3
        weight = (torch.randn(30, generator=generator) * mask).round(decimals=1)
        grad = torch.randn(30, generator=generator).round(decimals=1)
        new, found = grow_prune(weight, mask, grad, k, allow_regrow=regrow)
        expected = grow_prune_loop(weight, mask, grad, k, regrow)
        assert found.tolist() == expected[1] and new.tolist() == pytest.approx(expected[0])
        assert found.sum() == mask.sum() and not new[~found].any()
        if k == 0:
            assert torch.equal(found, mask) and torch.equal(new, weight)
        if not regrow:
            assert not new[found & ~mask].any()


def test_nothing_to_grow_in_a_full_or_an_empty_mask() -> None:
    for mask in (torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        for regrow in (False, True):
            new, found = grow_prune(W * mask, mask, GRAD, 3, allow_regrow=regrow)
            assert torch.equal(found, mask) and torch.equal(new, W * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    new, mask = grow_prune(W.to(dtype), INSIDE, GRAD.to(dtype), 2)
    assert new.dtype == dtype and places(mask) == {0, 3, 5}
    found, values = topk_gradients(GRAD.to(dtype), INSIDE, 2)
    assert found.tolist() == [3, 5] and values.dtype == dtype
    assert places(grow_prune(1e-30 * W.double(), INSIDE, 1e30 * GRAD.double(), 1)[1]) == {0, 2, 3}


# -- oracle 5: merging ------------------------------------------------------------------------------------------------
def test_merging_full_uploads_is_the_mean_gradient_outside() -> None:
    mask = torch.rand(5, 8, generator=seeded()) < 0.4
    grads = [torch.randn(5, 8, generator=seeded(i)) for i in range(3)]
    outside = int((~mask).sum())
    found = merge_topk([topk_gradients(grad, mask, outside) for grad in grads], [1, 2, 5], 40)
    expected = sum(n * grad for n, grad in zip([1, 2, 5], grads, strict=True)) / 8 * ~mask
    torch.testing.assert_close(found.view(5, 8), expected)
    one = merge_topk([topk_gradients(grads[0], mask, 4)], [7], 40)
    largest = topk_gradients(grads[0], mask, 4)
    assert torch.equal(one, torch.zeros(40).scatter(0, *largest))


# -- oracle 6: density 1 ----------------------------------------------------------------------------------------------
def test_density_1_is_fedavg() -> None:
    plain = simulated(FedAvg())
    for method in (FedTiny(1.0, interval=1), MagnitudeMask(1.0), RandomMask(1.0)):
        run = simulated(method)
        assert same(run.params, plain.params) and same(state_of(run.model)[1], state_of(plain.model)[1])
        assert all(mask.all() for mask in run.results["masks"].values())


@pytest.mark.parametrize("method", [FedTiny(0.6), MagnitudeMask(0.6), RandomMask(0.6)])
def test_weights_outside_are_0_after_every_step(method: MaskedTraining) -> None:
    model = toy_model()
    server = Server(model, *state_of(model), local=LOCAL)
    method.prepare(server)
    masks = {name: unpack_mask(packed, server.params[name]) for name, packed in server.extras[MASK].items()}
    assert set(masks) == set(WEIGHTS)
    kept = sum(int(mask.sum()) for mask in masks.values()) + 99 - 72
    assert 59 - 4 < kept <= 59  # int(0.6 * 99)
    client = Client(0, model, toy_clients()[0], local=LOCAL, round=2)
    seen: list[bool] = []
    train = client.train

    def watched(direction: Any) -> Any:
        def after(params: Any) -> Any:
            seen.append(all(not params[name][~masks[name]].any() for name in masks))
            return params

        return train(direction, after_step=after)

    client.train = watched  # type: ignore[method-assign]
    update = method.client_update(client, Sent(state_of(toy_model())[0], server.buffers, 2, server.extras))
    assert seen and all(seen) and len(seen) == update.num_steps
    moved = [float((update.params[name] - server.params[name]).abs().max()) for name in update.params]
    assert min(moved) > 0


# -- oracle 7: BatchNorm statistics -----------------------------------------------------------------------------------
def test_statistics_of_one_batch_and_the_model_as_it_was() -> None:
    model = toy_model().train()
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    inputs = toy_clients()[0].inputs
    (mean, variance) = collect_bn_statistics(model, [inputs])["1"]
    entering = model[0](inputs)
    torch.testing.assert_close(mean, entering.mean(0))
    torch.testing.assert_close(variance, entering.var(0, unbiased=True))
    assert same(model.state_dict(), before) and [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.1
    first, second = inputs[:10], inputs[10:]
    mean, variance = collect_bn_statistics(model, [first, second])["1"]
    torch.testing.assert_close(mean, (model[0](first).mean(0) + model[0](second).mean(0)) / 2)
    torch.testing.assert_close(variance, (model[0](first).var(0) + model[0](second).var(0)) / 2)
    with pytest.raises(RuntimeError):
        collect_bn_statistics(model, [inputs[:, :3]])
    assert same(model.state_dict(), before) and model[1].momentum == 0.1


def test_aggregated_statistics() -> None:
    parts = [torch.randn(n, 3, generator=seeded(n)) + n for n in (4, 12)]
    stats = [{"norm": (part.mean(0), part.var(0, unbiased=False))} for part in parts]
    mean, variance = aggregate_bn_statistics(stats, [4, 12])["norm"]
    torch.testing.assert_close(mean, torch.cat(parts).mean(0))
    torch.testing.assert_close(variance, 0.25 * stats[0]["norm"][1] + 0.75 * stats[1]["norm"][1])
    total = aggregate_bn_statistics(stats, [4, 12], total_variance=True)["norm"]
    torch.testing.assert_close(total[1], torch.cat(parts).var(0, unbiased=False))
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    load_bn_statistics(model, {"1": total})
    assert torch.equal(model[1].running_var, total[1]) and torch.equal(model[1].running_mean, mean)


# -- the selection ----------------------------------------------------------------------------------------------------
def test_selection_takes_the_candidate_with_the_least_loss() -> None:
    method = FedTiny(0.6, num_candidates=5, noise=0.6, dev_size=20, interval=100)
    local = LocalTraining(batch_size=100, least_batch=2)
    run = simulated(method, rounds=0, local=local)
    losses, best = run.results["dev_losses"], run.results["candidate"]
    assert len(losses) == 5 and losses[best] == min(losses) and len(set(losses)) > 1
    model = toy_model()
    params, buffers = state_of(model)
    server = Server(model, params, buffers)
    weights = {name: params[name] for name in WEIGHTS}
    generator = server.generator("fedtiny-candidates")
    candidates = candidate_masks(weights, (59 - 27) / 72, num=5, noise=0.6, generator=generator)
    assert same(run.results["masks"], candidates[best])
    expected = []
    for masks in candidates:
        model.load_state_dict({**masked(params, masks), **buffers})
        rows = []
        for number, data in enumerate(toy_clients()):
            order = torch.randperm(len(data), generator=Client(number, model, data).generator)[:20]
            rows.append(data.subset(order))
        merged = aggregate_bn_statistics([collect_bn_statistics(model, [own.inputs]) for own in rows], [20] * 4)
        load_bn_statistics(model, merged)
        model.eval().requires_grad_(False)
        expected.append(sum(float(F.cross_entropy(model(own.inputs), own.targets)) for own in rows) / 4)
        if masks is candidates[best]:
            torch.testing.assert_close(run.model.state_dict()["1.running_mean"], merged["1"][0])
            torch.testing.assert_close(run.model.state_dict()["1.running_var"], merged["1"][1])
    assert losses == pytest.approx(expected, rel=1e-4)
    assert same(run.params, masked(params, candidates[best]))


def test_queries() -> None:
    method = FedTiny(0.6, num_candidates=2, dev_size=16)
    answers = []
    for query in (STATISTICS, LOSS, "another"):
        client = Client(0, toy_model(), toy_clients()[0], local=LOCAL)
        answers.append(method.answer(client, Sent({}, {}, query=query)))
    statistics, loss, none = answers
    assert none is None and statistics is not None and loss is not None
    assert set(statistics.extras[BN]) == {"1.running_mean", "1.running_var"} and statistics.num_examples == 16
    assert math.isfinite(loss.metrics[LOSS]) and not loss.extras


def test_a_client_that_fails_in_the_selection_is_left_out() -> None:
    def fault(message: Any, context: Any, call: Any) -> Any:
        if message.content.config_records["config"]["query"] != STATISTICS:
            return call(message, context)

        def change(content: Any) -> None:
            del content["extra/bn"]

        return changed(change)(message, context, call)

    run = simulated(FedTiny(0.6, num_candidates=2), mods=[mod(fault, round=0, kind="query")])
    assert len(run.history) == 4 and len(run.results["dev_losses"]) == 2


# -- rounds -----------------------------------------------------------------------------------------------------------
def test_schedule() -> None:
    method = FedTiny(0.5, interval=2, t_stop=7, alpha=1.0)
    masks = {name: torch.arange(20) < 10 for name in ("a", "b", "c")}
    found = [method.due(round, masks) for round in range(1, 10)]
    count = lambda t: adjust_count(10, t, 7, alpha=1.0)  # noqa: E731
    assert found == [
        {"c": 10},
        {},
        {"b": count(2)},
        {},
        {"a": count(4)},
        {},
        {"c": count(6)} if count(6) else {},
        {},
        {},
    ]
    assert count(2) > count(4) > 0
    two = FedTiny(0.5, interval=1, blocks=[["b", "a"], ["c"]])
    assert [list(two.due(round, masks)) for round in (1, 2, 3)] == [["b", "a"], ["c"], ["b", "a"]]
    assert method.due(1, dict.fromkeys(masks, torch.ones(20, dtype=torch.bool))) == {}


def test_the_upload_is_of_the_gradient_at_masked_weights() -> None:
    method, model = FedTiny(0.6, interval=1, dev_size=12), toy_model()
    model[3].p = 0.0
    server = Server(model, *state_of(model), local=LOCAL, round=2)
    method.prepare(server)
    client = Client(0, model, toy_clients()[0], local=LOCAL, round=2, seed=3)
    update = method.client_update(client, Sent(server.params, server.buffers, 2, server.extras))
    (name,) = method.due(2, masks := {n: unpack_mask(p, server.params[n]) for n, p in server.extras[MASK].items()})
    assert name == "0.weight" and set(update.extras[TOPK]) == {"0.weight.indices", "0.weight.values"}
    again = Client(0, toy_model(), toy_clients()[0], local=LOCAL, round=2, seed=3)
    list(again.batches())
    rows = torch.randperm(len(again), generator=again.generator)[:12]
    data = toy_clients()[0].subset(rows)
    model.zero_grad()
    F.cross_entropy(model(data.inputs), data.targets).backward()
    expected = topk_gradients(model[0].weight.grad, masks[name], method.due(2, masks)[name])
    assert torch.equal(update.extras[TOPK]["0.weight.indices"], expected[0])
    torch.testing.assert_close(update.extras[TOPK]["0.weight.values"], expected[1])


def test_aggregate_averages_then_moves_the_mask_of_the_block() -> None:
    method, model = FedTiny(0.6, interval=1, t_stop=5), toy_model()
    server = Server(model, *state_of(model), local=LOCAL)
    method.prepare(server)
    server.round = 1
    before = {name: unpack_mask(packed, server.params[name]) for name, packed in server.extras[MASK].items()}
    updates = []
    for number, data in enumerate(toy_clients()):
        client = Client(number, toy_model(), data, local=LOCAL, round=1)
        updates.append(method.client_update(client, Sent(server.params, server.buffers, 1, server.extras)))
    mean = weighted_mean([update.params for update in updates], [len(data) for data in toy_clients()])
    method.aggregate(server, updates)
    after = {name: unpack_mask(packed, server.params[name]) for name, packed in server.extras[MASK].items()}
    (name,) = method.due(1, before)
    assert name == "4.weight" and torch.equal(after["0.weight"], before["0.weight"])
    uploads = [(u.extras[TOPK][f"{name}.indices"], u.extras[TOPK][f"{name}.values"]) for u in updates]
    grad = merge_topk(uploads, [u.num_examples for u in updates], 24)
    weight, mask = grow_prune(mean[name], before[name], grad, method.due(1, before)[name])
    assert torch.equal(after[name], mask) and not torch.equal(mask, before[name])
    assert torch.equal(server.params[name], weight)
    assert same({k: v for k, v in server.params.items() if k != name}, {k: v for k, v in mean.items() if k != name})


def test_counts_stay_and_the_fixed_mask_comes_after_t_stop() -> None:
    trace: list[dict[str, set[int]]] = []

    class Watched(FedTiny):
        def aggregate(self, server: Server, updates: list[Update]) -> None:
            super().aggregate(server, updates)
            trace.append({n: places(unpack_mask(p, server.params[n])) for n, p in server.extras[MASK].items()})
            for name, inside in trace[-1].items():
                assert places(server.params[name] != 0) <= inside

    run = simulated(Watched(0.6, interval=1, t_stop=4), rounds=6)
    assert not run.faults and len({tuple(map(len, each.values())) for each in trace}) == 1
    assert trace[0] != trace[1] and trace[3] == trace[4] == trace[5]
    again = simulated(FedTiny(0.6, interval=1, t_stop=4), rounds=6)
    assert same(again.params, run.params)


def test_a_run_resumes_with_its_mask(tmp_path: Any) -> None:
    settings = {"local": LOCAL}
    whole = simulated(FedTiny(0.6, interval=1, t_stop=6), rounds=5, **settings)
    simulated(FedTiny(0.6, interval=1, t_stop=6), rounds=2, checkpoint=tmp_path, **settings)
    resumed = simulated(FedTiny(0.6, interval=1, t_stop=6), rounds=5, checkpoint=tmp_path, resume=True, **settings)
    assert same(resumed.params, whole.params) and same(resumed.results["masks"], whole.results["masks"])


@pytest.mark.parametrize(
    ("spoilt", "text"),
    [
        (lambda indices, values: (indices + 1000, values), "must be in"),
        (lambda indices, values: (indices.float(), values), "must be integers"),
        (lambda indices, values: (indices, values[:1]), "must be"),
        (lambda indices, values: (torch.cat([indices] * 9), torch.cat([values] * 9)), "are due"),
        (lambda indices, values: (None, None), "nothing"),
    ],
)
def test_an_upload_that_does_not_fit_is_named_and_left_out(spoilt: Any, text: str, caplog: Any) -> None:
    class Spoilt(FedTiny):
        def client_update(self, client: Client, sent: Sent) -> Update:
            update = super().client_update(client, sent)
            if client.number == 2:
                found = update.extras[TOPK]
                (name,) = {key.rsplit(".", 1)[0] for key in found}
                pair = spoilt(found[f"{name}.indices"], found[f"{name}.values"])
                update.extras[TOPK] = {
                    f"{name}.{k}": v for k, v in zip(("indices", "values"), pair, strict=True) if v is not None
                }
            return update

    with caplog.at_level("WARNING", logger="equipoise.federated"):
        run = simulated(Spoilt(0.6, interval=1), rounds=1)
    assert text in caplog.text and "client 2" in caplog.text
    assert len(run.history) == 1 and run.history[0]["clients"] == [0, 1, 2, 3]


def test_convolutions_are_masked_and_other_tensors_are_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Parameter(torch.ones(3, 4))  # no weight of a layer
            self.conv = nn.Conv1d(1, 4, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x[:, None])).mean(2)) + self.embed.sum()

    torch.manual_seed(0)
    run = simulated(FedTiny(0.85, interval=1, t_stop=3), Net(), rounds=2)
    assert not run.faults and set(run.results["masks"]) == {"conv.weight", "head.weight"}
    for name, mask in run.results["masks"].items():
        assert not run.params[name][~mask].any()
    assert (run.params["embed"] != 0).all()


def test_messages_hold_the_weights_in_the_mask_alone() -> None:
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def look(message: Any, context: Any, call: Any) -> Any:
        reply = call(message, context)
        kind = message.metadata.message_type
        if kind != "query" or "arrays" in message.content.array_records:
            back = reply.content.array_records.get("arrays", {})
            there = message.content["arrays"]["0.weight"].shape
            shapes.append((kind, tuple(there), tuple(back["0.weight"].shape) if back else ()))
        return reply

    run = simulated(FedTiny(0.6, num_candidates=2, interval=1, t_stop=3), rounds=2, mods=[look], evaluate_clients=1)
    assert not run.faults and {kind for kind, *_ in shapes} == {"query", "train", "evaluate"}
    kept = int(run.results["masks"]["0.weight"].sum())
    assert kept < run.results["masks"]["0.weight"].numel()
    for kind, there, back in shapes:
        assert (
            len(there) == 1 and (kind == "query" or there == (kept,)) and back == ((kept,) if kind == "train" else ())
        )


def test_packed_weights_come_back_and_others_are_refused() -> None:
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    mask = magnitude_mask(params["w"], 0.5)
    method, extras = FedTiny(0.5), {MASK: {"w": pack_mask(mask)}}
    packed = method.pack(params, extras)
    assert packed["w"].shape == (6,) and packed["b"] is params["b"]
    assert same(method.unpack(packed, extras, params), {"w": params["w"] * mask, "b": params["b"]})
    assert same(method.pack(params, {}), params) and same(method.unpack(params, {}, params), params)
    with pytest.raises(ArgumentError, match=r"'w' arrived as \(5,\): must be \(6,\)"):
        method.unpack({**packed, "w": packed["w"][:5]}, extras, params)
    with pytest.raises(ArgumentError, match="'w' arrived as nothing"):
        method.unpack({"b": params["b"]}, extras, params)
    with pytest.raises(ArgumentError, match="mask of 'w': the model has no such parameter"):
        method.unpack(packed, extras, {"b": params["b"]})


def test_only_due_layers_are_sent_in_a_record_of_their_own() -> None:
    seen: list[set[str]] = []

    def look(message: Any, context: Any, call: Any) -> Any:
        reply = call(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            seen.append(set(reply.content.array_records))
            assert "extra/mask" in message.content.array_records
        return reply

    simulated(FedTiny(0.6, interval=2, t_stop=3), rounds=5, mods=[look])
    assert seen == [{"arrays", "extra/topk"}, {"arrays"}, {"arrays", "extra/topk"}, {"arrays"}, {"arrays"}]


# -- bad input --------------------------------------------------------------------------------------------------------
UP = (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]))


def prepared(method: Any, model: nn.Module | None = None) -> None:
    model = model or toy_model()
    method.prepare(Server(model, *state_of(model)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: erk_densities({"a": (2, 2)}, 0.0), "density"),
        (lambda: erk_densities({"a": (2, 2)}, 1.1), "density"),
        (lambda: erk_densities({"a": (2, 2)}, float("nan")), "density"),
        (lambda: erk_densities({}, 0.5), "shapes"),
        (lambda: layer_densities({"a": (2, 2)}, 0.0, "uniform"), "density"),
        (lambda: layer_densities({"a": (2, 2)}, 0.5, "even"), "distribution"),
        (lambda: magnitude_mask(W, 0.1), "at least one"),
        (lambda: magnitude_mask(W, 0.0), "density"),
        (lambda: magnitude_mask(W * math.nan, 0.5), "NaN"),
        (lambda: random_mask(W, 0.1), "at least one"),
        (lambda: candidate_masks({"a": W, "b": torch.ones(600)}, 0.05, num=1, distribution="uniform"), "'a'"),
        (lambda: candidate_masks({"a": W}, 0.5, num=0), "num"),
        (lambda: candidate_masks({"a": W}, 0.5, num=2, noise=1.0), "noise"),
        (lambda: collect_bn_statistics(nn.Linear(2, 2), [torch.ones(2, 2)]), "BatchNorm"),
        (lambda: collect_bn_statistics(toy_model(), []), "batches"),
        (lambda: aggregate_bn_statistics([], []), "updates|counts"),
        (lambda: aggregate_bn_statistics([{"a": (W, W)}], [0]), "counts"),
        (lambda: aggregate_bn_statistics([{"a": (W, W)}, {"b": (W, W)}], [1, 1]), "stats"),
        (lambda: load_bn_statistics(toy_model(), {"2": (W, W)}), "BatchNorm"),
        (lambda: load_bn_statistics(toy_model(), {"1": (W, W)}), "shape"),
        (lambda: adjust_count(10, 0, 0), "t_stop"),
        (lambda: adjust_count(10, 0, 5, alpha=0.0), "alpha"),
        (lambda: adjust_count(10, 0, 5, alpha=1.5), "alpha"),
        (lambda: adjust_count(-1, 0, 5), "num_active"),
        (lambda: adjust_count(1, -1, 5), "t = -1"),
        (lambda: topk_gradients(GRAD, INSIDE, -1), "k = -1"),
        (lambda: topk_gradients(GRAD, INSIDE[:3], 1), "mask"),
        (lambda: topk_gradients(GRAD * math.nan, INSIDE, 1), "NaN"),
        (lambda: merge_topk([], [], 6), "nothing to average"),
        (lambda: merge_topk([UP], [-1], 6), "weights"),
        (lambda: merge_topk([UP], [1], 2), "must be in"),
        (lambda: merge_topk([(UP[0] - 2, UP[1])], [1], 6), "must be in"),
        (lambda: merge_topk([(UP[0], UP[1][:1])], [1], 6), "places"),
        (lambda: merge_topk([(UP[1], UP[1])], [1], 6), "integers"),
        (lambda: merge_topk([UP], [1], 0), "numel"),
        (lambda: grow_prune(W, INSIDE, GRAD, -1), "k = -1"),
        (lambda: grow_prune(W, INSIDE.float(), GRAD, 1), "mask"),
        (lambda: grow_prune(W, INSIDE, GRAD[:3], 1), "grad"),
        (lambda: FedTiny(0.0), "density"),
        (lambda: FedTiny(1.5), "density"),
        (lambda: MagnitudeMask(-0.1), "density"),
        (lambda: FedTiny(t_stop=0), "t_stop"),
        (lambda: FedTiny(interval=0), "interval"),
        (lambda: FedTiny(alpha=0.0), "alpha"),
        (lambda: FedTiny(noise=1.0), "noise"),
        (lambda: FedTiny(num_candidates=0), "num_candidates"),
        (lambda: FedTiny(dev_size=1), "dev_size"),
        (lambda: FedTiny(distribution="even"), "distribution"),
        (lambda: FedTiny(blocks=[[]]), "blocks"),
        (lambda: prepared(FedTiny(0.6, blocks=[["5.weight"]])), "blocks"),
        (lambda: prepared(FedTiny(0.2)), "density = 0.2: must exceed 0.2929"),
        (lambda: prepared(RandomMask(0.2)), "density"),
        (lambda: prepared(FedTiny(0.6, num_candidates=2), nn.Linear(6, 3)), "num_candidates"),
        (lambda: prepared(FedTiny(0.6), nn.LayerNorm(6)), "nothing to prune"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_settings_and_spaces() -> None:
    for method in (FedTiny, MagnitudeMask, RandomMask):
        assert set(method.space) | set(method.neutral or {}) <= set(method().settings())
        for key, dimension in method.space.items():
            for u in (0.0, 0.5, 0.999):
                method(**{key: dimension.at(u)})
    assert FedTiny.paper is not None and FedTiny(0.01).density == 0.01
    with pytest.raises(ArgumentError):
        FedTiny().overrides("loss")


def test_a_client_with_few_rows() -> None:
    data = toy_clients()[0]
    client = Client(0, toy_model(), Examples(data.inputs[:3], data.targets[:3], num_classes=3), local=LOCAL)
    answer = FedTiny(0.6, num_candidates=2).answer(client, Sent({}, {}, query=STATISTICS))
    assert answer is not None and answer.num_examples == 3
