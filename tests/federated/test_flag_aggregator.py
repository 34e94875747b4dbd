"""The flag aggregator and its baselines: the reference numbers, slow references, invariances, bad input, Flower's own rules."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from federation import toy_clients, toy_model
from torch import Tensor

from equipoise.errors import ArgumentError
from equipoise.federated import flag_aggregator as module
from equipoise.federated.algorithm import LocalTraining, Server, Update
from equipoise.federated.flag_aggregator import (
    RULES,
    Bulyan,
    CoordinateMedian,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MultiKrum,
    RobustAggregate,
    TrimmedMean,
    aggregate,
    bulyan,
    coordinate_median,
    flag_aggregate,
    geometric_median,
    krum,
    krum_scores,
    least_workers,
    mean,
    multi_krum,
    trimmed_mean,
)
from equipoise.federated.params import state_of

torch.set_num_threads(1)
G = torch.tensor([[2, 1, 0], [1, 2, 1], [0, 1, 3], [-4, 0, 1]], dtype=torch.float64)
FIVE = torch.tensor([[1, 2], [2, 1], [3, 0], [2, 2], [10, -10]], dtype=torch.float64)
SEVEN = torch.tensor([[1, 2], [2, 1], [3, 0], [2, 2], [1, 1], [2.5, 1.5], [10, -10]], dtype=torch.float64)


def random(p: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(p, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: object, abs: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, atol=abs, rtol=0)


# -- oracles of the flag aggregator -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "expected", "ratios", "objective"),
    [
        ({"max_iter": 0}, (0.205899, 0.702681, 0.861461), (0.999010, 0.931274, 0.926285, 0.957599), 0.771046),
        ({"max_iter": 1}, (0.195181, 0.729834, 0.844994), (0.999836, 0.945527, 0.911973, 0.955156), 0.754642),
        ({"scale": "mean"}, (0.097590, 0.364917, 0.422497), (0.999836, 0.945527, 0.911973, 0.955156), 0.754642),
        ({"scale": "median_norm"}, (0.239047, 0.893861, 1.034902), (0.999836, 0.945527, 0.911973, 0.955156), 0.754642),
    ],
)
def test_oracle_1_and_2_flag_mean_and_one_step(
    settings: dict[str, object], expected: tuple[float, ...], ratios: tuple[float, ...], objective: float
) -> None:
    found = flag_aggregate(G, 2, **settings)  # type: ignore[arg-type]
    close(found.aggregate, expected)
    close(found.ratios, ratios)
    close(found.objective[-1], objective)
    assert found.iterations == settings.get("max_iter", 1) == len(found.objective) - 1


def test_oracle_3_many_steps_interpolate_r_rows() -> None:
    found = flag_aggregate(G, 2, max_iter=200, tol=1e-12)
    assert found.converged and found.iterations < 200
    close(found.ratios, (1, 1, 0.649963, 0.995838))
    close(found.objective[-1], 0.656609)


def test_oracle_4_pairs() -> None:
    found = flag_aggregate(G, 2, lam=2.0)
    close(found.objective, (1.334047, 1.322716))
    close(found.aggregate, (0.202728, 0.713251, 0.855082))
    close(flag_aggregate(G, 2, lam=2.0, max_iter=0).objective, [1.334047])


def test_oracle_5_full_rank_and_invariances() -> None:
    whole = flag_aggregate(G, 3)
    close(whole.aggregate, (0.110844, 0.526646, 0.533156))
    assert whole.converged and whole.ratios.eq(1).all() and whole.objective.tolist() == [0.0]

    base = flag_aggregate(G, 2)
    scaled = flag_aggregate(G * torch.tensor([[3.0], [0.1], [1.0], [1e4]]), 2)
    close(scaled.aggregate, base.aggregate, 1e-9)
    order = torch.tensor([2, 0, 3, 1])
    close(flag_aggregate(G[order], 2).ratios, base.ratios[order], 1e-9)
    turn = torch.linalg.qr(random(3, 3)).Q
    close(flag_aggregate(G @ turn.T, 2).aggregate, base.aggregate @ turn.T, 1e-9)


def test_oracle_6_baselines() -> None:
    close(coordinate_median(FIVE), (2, 1))
    close(trimmed_mean(FIVE, 1), (2.333333, 1))
    close(krum_scores(FIVE, 1), (3, 3, 7, 2, 334))
    close(krum(FIVE, 1), (2, 2))
    close(multi_krum(FIVE, 1, 2), (1.5, 2))
    found = geometric_median(FIVE)
    close(found.aggregate, (2, 1))
    close(found.objective, 3.485980)
    assert found.converged
    close(krum_scores(SEVEN, 1), (6.5, 4.5, 14.5, 4.5, 6.5, 6, 724.5))
    close(bulyan(SEVEN, 1), (1.666667, 1.333333))


# -- slow references --------------------------------------------------------------------------------------------------
def slow_flag(
    grads: Tensor, r: int, lam: float, eps: float, steps: int, basis: Tensor | None = None
) -> tuple[Tensor, Tensor, list[float]]:
    """IRLS by the SVD of the whole column matrix: Y Y^T sum_i u_i, Y Y^T, and the objectives."""
    p = len(grads)
    units = [g / g.norm() if g.norm() else g for g in grads]
    pairs = [(units[i] - units[j]) / (units[i] - units[j]).norm() for i in range(p) for j in range(p) if i != j]
    share = lam / (p * (p - 1))
    ratio = lambda basis, u: (basis.T @ u).square().sum()  # noqa: E731

    def objective(basis: Tensor) -> float:
        root = lambda u: (1 - ratio(basis, u)).clamp_min(0).sqrt()  # noqa: E731
        return float(sum(map(root, units)) + share * sum(map(root, pairs)))

    if basis is None:
        basis = torch.linalg.svd(torch.stack(units, 1), full_matrices=False).U[:, :r]
    seen = [objective(basis)]
    for _ in range(steps):
        columns = [((1 - ratio(basis, u)).abs() + eps) ** -0.25 * u for u in units]
        columns += [math.sqrt(share) * ((1 - ratio(basis, d)).abs() + eps) ** -0.25 * d for d in pairs] if lam else []
        candidate = torch.linalg.svd(torch.stack(columns, 1), full_matrices=False).U[:, :r]
        if objective(candidate) >= seen[-1]:
            break
        basis = candidate
        seen.append(objective(basis))
    return basis @ (basis.T @ sum(units)), basis @ basis.T, seen


@pytest.mark.parametrize("lam", [0.0, 3.0])
@pytest.mark.parametrize(("p", "dim", "r"), [(5, 9, 2), (7, 30, 4), (6, 4, 3)])
def test_oracle_7_equals_the_svd_route_and_never_increases(p: int, dim: int, r: int, lam: float) -> None:
    grads = random(p, dim, seed=p)
    for steps in (0, 1, 4):
        found = flag_aggregate(grads, r, lam=lam, max_iter=steps, tol=0)
        total, projector, objective = slow_flag(grads, r, lam, 1e-7, steps)
        close(found.aggregate, total / r, 1e-8)
        close(found.subspace @ found.subspace.T, projector, 1e-8)  # type: ignore[union-attr]
        close(found.objective, objective, 1e-8)
        assert (found.objective.diff() <= 0).all()
        close(found.subspace.T @ found.subspace, torch.eye(r), 1e-9)  # type: ignore[union-attr]


def test_flag_starts_where_it_is_told() -> None:
    grads, start = random(6, 12), torch.linalg.qr(random(12, 3, seed=4)).Q
    for steps in (0, 1):
        total, _, objective = slow_flag(grads, 3, 0.0, 1e-7, steps, start)
        found = flag_aggregate(grads, 3, init=start, max_iter=steps)
        close(found.aggregate, total / 3, 1e-8)
        close(found.objective, objective, 1e-8)
    close(flag_aggregate(grads, 3, init=start * 7).aggregate, found.aggregate, 1e-9)


def test_flag_weights_and_defaults() -> None:
    found = flag_aggregate(G)  # r = 3
    close(found.aggregate, flag_aggregate(G, 3).aggregate)
    found = flag_aggregate(G, 2)
    close(found.weights, (1 - found.ratios + 1e-7) ** -0.25, 1e-9)
    assert flag_aggregate(random(9, 2)).subspace.shape == (2, 2)  # type: ignore[union-attr]
    assert flag_aggregate(G, 2, return_subspace=False).subspace is None


def test_flag_degenerate_rows() -> None:
    zero = torch.cat([G, torch.zeros(1, 3, dtype=G.dtype)])
    found = flag_aggregate(zero, 2, scale="mean")
    close(found.aggregate, flag_aggregate(G, 2, scale="mean").aggregate * 4 / 5, 1e-9)
    assert found.ratios[-1] == 0 and found.weights[-1].item() == pytest.approx(1)
    nothing = flag_aggregate(torch.zeros(4, 6), 2)
    assert nothing.aggregate.eq(0).all() and nothing.converged
    close(nothing.subspace.T @ nothing.subspace, torch.eye(2))  # type: ignore[union-attr]
    alike = flag_aggregate(random(1, 8).expand(5, 8), 3, lam=1.0)
    assert alike.converged and alike.ratios.eq(1).all()
    close(alike.subspace.T @ alike.subspace, torch.eye(3), 1e-9)  # type: ignore[union-attr]
    close(flag_aggregate(random(1, 4)).aggregate, random(1, 4)[0] / random(1, 4).norm())


def test_blocks_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = random(11, 50, dtype=torch.float32)
    whole = {rule: aggregate(rule, grads, 0 if rule == "mean" else 2) for rule in RULES}
    monkeypatch.setattr(module, "BLOCK", 7)
    for rule, expected in whole.items():
        close(aggregate(rule, grads, 0 if rule == "mean" else 2), expected, 1e-5)
    start = random(50, 3)
    close(
        flag_aggregate(grads, 3, init=start).aggregate,
        flag_aggregate(grads.double(), 3, init=start).aggregate.float(),
        1e-5,
    )
    half = grads.bfloat16()
    for rule in RULES:
        found = aggregate(rule, half, 0 if rule == "mean" else 2)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found.double(), aggregate(rule, half.double(), 0 if rule == "mean" else 2), atol=0.02, rtol=0.02
        )


@pytest.mark.parametrize(("p", "f"), [(5, 0), (6, 1), (11, 2), (12, 2), (15, 3)])
def test_baselines_equal_loops(p: int, f: int) -> None:
    grads = (random(p, 6, seed=p) * 4).round() / 4  # with ties, in exact numbers
    rows, table = grads.tolist(), grads.numpy()
    close(mean(grads), table.mean(0))
    close(coordinate_median(grads), np.median(table, axis=0))
    close(trimmed_mean(grads, f), np.sort(table, axis=0)[f : p - f].mean(0))

    def scores(left: list[int]) -> list[float]:
        found = []
        for i in left:
            distances = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in left if j != i)
            found.append(sum(distances[: max(1, len(left) - f - 2)]))
        return found

    close(krum_scores(grads, f), scores(list(range(p))), 1e-9)
    order = np.argsort(np.round(scores(list(range(p))), 9), kind="stable")
    close(krum(grads, f), table[order[0]])
    close(multi_krum(grads, f), table[order[: p - f - 2]].mean(0))
    if p >= 4 * f + 3:
        left, chosen = list(range(p)), []
        for _ in range(p - 2 * f):
            chosen.append(left.pop(int(np.argmin(np.round(scores(left), 9)))))
        selected = table[sorted(chosen)]
        near = np.argsort(np.round(abs(selected - np.median(selected, axis=0)), 9), axis=0, kind="stable")[: p - 4 * f]
        close(bulyan(grads, f), np.take_along_axis(selected, near, 0).mean(0), 1e-9)


def test_geometric_median_weights_and_stationarity() -> None:
    grads, weights = random(8, 5), torch.arange(1.0, 9.0)
    found = geometric_median(grads, weights=weights, max_iter=2000, tol=0)
    away = grads - found.aggregate
    pull = ((weights / away.norm(dim=1))[:, None] * away).sum(0)
    close(pull, torch.zeros(5), 1e-5)
    close(found.objective, (weights / weights.sum()) @ away.norm(dim=1).float(), 1e-6)
    close(geometric_median(grads, max_iter=0).aggregate, grads.mean(0), 1e-12)
    close(mean(grads, weights), (weights.double() @ grads) / 36, 1e-12)
    same = geometric_median(random(1, 5).expand(4, 5))
    assert same.converged and same.objective < 1e-7


# -- rows that are not finite -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    good = random(9, 6)
    spoilt = torch.cat([good, torch.full((2, 6), bad, dtype=good.dtype)])
    for f in (2,):
        assert krum_scores(spoilt, f)[-2:].isinf().all()
        for rule in (krum, multi_krum, bulyan):
            assert rule(spoilt, f).isfinite().all()
    with pytest.warns(UserWarning, match=r"rows \[9, 10\].*not finite"):
        found = flag_aggregate(spoilt)
    close(found.aggregate, flag_aggregate(good).aggregate, 1e-12)
    assert found.ratios[-2:].eq(0).all() and found.weights[-2:].eq(0).all()
    with pytest.warns(UserWarning, match="geometric_median"):
        close(geometric_median(spoilt).aggregate, geometric_median(good).aggregate, 1e-12)
    last = torch.cat([good, torch.full((2, 6), math.inf, dtype=good.dtype)])
    close(coordinate_median(spoilt), coordinate_median(last))
    close(trimmed_mean(spoilt, 2), trimmed_mean(last, 2))
    assert torch.equal(spoilt[:-2], good)  # left as it was
    with pytest.raises(ArgumentError, match="none of the 3 rows is finite"), warnings.catch_warnings():
        flag_aggregate(torch.full((3, 2), bad))


def test_one_row_is_not_written_to() -> None:
    row = torch.tensor([[1.0, math.nan]])
    assert coordinate_median(row).isinf().tolist() == [False, True]
    assert row.isnan().any()


def test_extreme_values() -> None:
    grads = random(7, 6, dtype=torch.float32)
    for factor in (1e-30, 1e30):
        found = flag_aggregate(grads * factor, 3)
        close(found.aggregate, flag_aggregate(grads, 3).aggregate, 1e-5)
        assert bulyan(grads * factor, 1).isfinite().all() and krum(grads * factor, 1).isfinite().all()


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flag_aggregate(G[0]), "grads = "),
        (lambda: flag_aggregate(G[:0]), "grads = "),
        (lambda: flag_aggregate(G.long()), "grads = "),
        (lambda: flag_aggregate(G, 0), "r = 0"),
        (lambda: flag_aggregate(G, 4), "r = 4"),
        (lambda: flag_aggregate(G, lam=-1.0), "lam = -1"),
        (lambda: flag_aggregate(G, eps=0.0), "eps = 0"),
        (lambda: flag_aggregate(G, max_iter=-1), "max_iter = -1"),
        (lambda: flag_aggregate(G, tol=-1.0), "tol = -1"),
        (lambda: flag_aggregate(G, scale="n"), "scale = 'n'"),  # type: ignore[arg-type]
        (lambda: flag_aggregate(G, 2, init=torch.eye(3)), "init = "),
        (lambda: mean(G, [1, 2]), "weights = "),
        (lambda: mean(G, [1, 1, 1, -1]), "weights = "),
        (lambda: geometric_median(G, weights=[0, 0, 0, 0]), "weights = "),
        (lambda: geometric_median(G, eps=0.0), "eps = 0"),
        (lambda: trimmed_mean(G, 2), "f = 2: trimmed-mean needs at least 5 workers .* there are 4.* f <= 1"),
        (lambda: trimmed_mean(G, -1), "f = -1"),
        (lambda: krum_scores(G, 1), "f = 1: krum needs at least 5 workers"),
        (lambda: krum(G, 1), "needs at least 5 workers"),
        (lambda: multi_krum(FIVE, 1, 3), "m = 3"),
        (lambda: multi_krum(FIVE, 1, 0), "m = 0"),
        (lambda: bulyan(FIVE, 1), "f = 1: bulyan needs at least 7 workers .* f <= 0"),
        (lambda: aggregate("mean", G, 1), "f = 1: must be 0 for a mean"),
        (lambda: aggregate("flag", G, 2), "f = 2: flag needs at least 5"),
        (lambda: aggregate("krumm", G), "rule = 'krumm'.*Did you mean 'krum'"),
        (lambda: RobustAggregate("krum", -1), "f = -1"),
        (lambda: FlagAggregator(r=0), "r = 0"),
        (lambda: MultiKrum(m=0), "m = 0"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


# -- methods ----------------------------------------------------------------------------------------------------------
METHODS = [FlagAggregator(1), CoordinateMedian(1), TrimmedMean(1), Krum(1), MultiKrum(1), Bulyan(1), GeometricMedian(1)]


def server_and_updates(p: int = 7) -> tuple[Server, list[Update]]:
    model = toy_model()
    params, buffers = state_of(model)
    server = Server(model, params, buffers, clients=dict.fromkeys(range(p), 24))
    updates = []
    for number in range(p):
        generator = torch.Generator().manual_seed(number)
        noisy = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in params.items()}
        updates.append(Update(noisy, 10 * (number + 1), 1, {k: v + number for k, v in buffers.items()}, client=number))
    return server, updates


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_add_the_aggregate_of_the_differences(method: RobustAggregate) -> None:
    server, updates = server_and_updates()
    start = server.params
    deltas = torch.stack([torch.cat([(u.params[k] - start[k]).flatten() for k in start]) for u in updates])
    method.prepare(server)
    method.aggregate(server, updates)
    change = torch.cat([(server.params[k] - start[k]).flatten() for k in start])
    close(change, method.combine(deltas), 1e-6)
    assert server.buffers["1.num_batches_tracked"].item() == 3  # the plain mean of 0 to 6
    assert server.buffers["1.num_batches_tracked"].dtype == torch.int64
    assert method.rule in repr(method) or method.name.replace("-", "") in repr(method).lower()


def test_too_few_answers_leave_the_parameters(caplog: pytest.LogCaptureFixture) -> None:
    server, updates = server_and_updates()
    start = server.params
    with caplog.at_level(logging.WARNING, "equipoise.federated"):
        Bulyan(1).aggregate(server, updates[:6])
    assert server.params is start and "6 usable answers, and bulyan with f = 1 needs 7" in caplog.text
    with pytest.raises(ArgumentError, match=r"f = 2: bulyan needs at least 11 workers .* f <= 1"):
        Bulyan(2).prepare(server)
    server.fraction = 0.5
    with pytest.raises(ArgumentError, match=r"f = 1: krum needs at least 5 workers .* there are 3"):
        Krum(1).prepare(server)
    assert [least_workers(rule, 2) for rule in RULES] == [5, 5, 5, 7, 7, 11, 5, 5]


def test_a_run_withstands_a_poisoned_client() -> None:
    pytest.importorskip("flwr")
    from equipoise.federated.attacks import UnderAttack
    from equipoise.federated.fedspeed import FedAvg
    from equipoise.federated.simulation import simulate

    clients, local = toy_clients(7), LocalTraining(lr=0.1)
    runs = {
        name: simulate(UnderAttack(method, attack, 1), toy_model(), clients, 2, local=local).params
        for name, method, attack in (
            ("mean", RobustAggregate("mean"), "none"),
            ("fedavg", FedAvg(weighted=False), "none"),
            ("flag", FlagAggregator(1), "random"),
            ("poisoned", FedAvg(), "random"),
        )
    }
    for key, tensor in runs["fedavg"].items():
        torch.testing.assert_close(runs["mean"][key], tensor, atol=1e-5, rtol=1e-5)
    far = {name: max(float((run[k] - runs["fedavg"][k]).abs().max()) for k in run) for name, run in runs.items()}
    assert far["flag"] < 0.5 < far["poisoned"]


# -- Flower's own rules -----------------------------------------------------------------------------------------------
def test_flowers_own_rules_where_they_agree_and_differ() -> None:
    """Of equal numbers of examples, median, trimmed mean, Krum and Multi-Krum are the same; Bulyan selects once, by Multi-Krum."""
    pytest.importorskip("flwr")
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
    from flwr.serverapp.strategy.multikrum import select_multikrum

    grads = random(11, 20, seed=3, dtype=torch.float32)
    grads[:2] += 5
    rows = grads.numpy()
    contents = [
        RecordDict({"arrays": ArrayRecord({"w": Array(row)}), "metrics": MetricRecord({"num-examples": 1})})
        for row in rows
    ]
    chosen = lambda m: [contents.index(c) for c in select_multikrum(contents, 2, m)]  # noqa: E731
    close(krum(grads, 2), rows[chosen(1)[0]])
    close(multi_krum(grads, 2), rows[chosen(7)].mean(0), 1e-5)
    close(coordinate_median(grads), np.median(rows, axis=0))
    close(trimmed_mean(grads, 2), trim_mean(rows, 2 / 11 + 1e-9), 1e-5)
    selected = rows[chosen(7)]  # once, where ours removes the winner and scores the others again
    theirs = aggregate_n_closest_weights([np.median(selected, axis=0)], [[row] for row in selected], 3)[0]
    close(module._nearest(torch.from_numpy(selected), 3), theirs, 1e-5)
    assert not np.allclose(bulyan(grads, 2), theirs)
