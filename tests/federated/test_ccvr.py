"""CCVR against hand-computed numbers, numpy on the pooled features, and the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from federation import mod, same, toy_clients, toy_model
from torch import Tensor, nn

from equipoise.errors import ArgumentError
from equipoise.federated.algorithm import Client, LocalTraining, Sent
from equipoise.federated.ccvr import (
    CCVR,
    ClassStatistics,
    aggregate_statistics,
    calibrate_classifier,
    class_statistics,
    pack,
    sample_virtual,
    tukey_transform,
    unpack,
)
from equipoise.federated.params import state_of
from equipoise.training.batch import Examples

torch.set_num_threads(1)


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(covs: list[list[list[float]]], means: list[list[float]], count: int = 10) -> ClassStatistics:
    return ClassStatistics(
        torch.full((len(means),), count),
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(covs, dtype=torch.float64),
    )


# -- oracle 1: by hand ------------------------------------------------------------------------------------------------
A = class_statistics(torch.tensor([[1.0, 0], [3, 2]]), torch.tensor([0, 0]), 2)
B = class_statistics(torch.tensor([[2.0, 4], [0, 1]]), torch.tensor([0, 1]), 2)


def test_statistics_by_hand() -> None:
    assert A.count.tolist() == [2, 0] and A.count.dtype == torch.int64 and A.mean.dtype == torch.float64
    assert A.mean[0].tolist() == [2, 1] and A.cov[0].tolist() == [[2, 2], [2, 2]]
    assert B.count.tolist() == [1, 1] and not B.cov.any()  # one example: 0, and not NaN
    assert not A.mean[1].any() and not A.cov[1].any()  # a class without examples
    both = aggregate_statistics([A, B])
    assert both.count.tolist() == [3, 1]
    torch.testing.assert_close(both.mean, torch.tensor([[2.0, 2], [0, 1]]).double())
    torch.testing.assert_close(both.cov, torch.tensor([[[1.0, 1], [1, 4]], [[0, 0], [0, 0]]]).double())


# -- oracle 2: pooled statistics --------------------------------------------------------------------------------------
def pooled(features: Tensor, targets: Tensor, classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    z, y = features.numpy(), targets.numpy()
    return [(z[y == c].mean(0), np.cov(z[y == c].T, ddof=1)) for c in range(classes)]


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("clients", [1, 2, 7])
def test_any_partition_gives_the_pooled_statistics(clients: int, shift: float) -> None:
    features, targets = rows(90, 4) + shift, torch.arange(90) % 3
    owner = torch.randint(clients, (90,), generator=torch.Generator().manual_seed(1))
    parts = [class_statistics(features[owner == k], targets[owner == k], 3) for k in range(clients)]
    parts.insert(1, class_statistics(features[:0], targets[:0], 3))  # a client without data
    for order in (parts, parts[::-1]):
        found = aggregate_statistics(order)
        for c, (mean, cov) in enumerate(pooled(features, targets, 3)):
            np.testing.assert_allclose(found.mean[c], mean, rtol=1e-9)
            np.testing.assert_allclose(found.cov[c], cov, atol=1e-6)
        assert found.count.tolist() == [30, 30, 30]


def test_the_formula_as_the_paper_writes_it() -> None:
    stats = [class_statistics(rows(n, 3, seed=n), torch.arange(n) % 2, 2) for n in (5, 9, 3, 20)]
    n = torch.stack([s.count for s in stats]).double()
    total = n.sum(0)
    mean = sum(k.unsqueeze(1) * s.mean for k, s in zip(n, stats, strict=True)) / total.unsqueeze(1)
    outer = lambda m: m.unsqueeze(2) * m.unsqueeze(1)  # noqa: E731
    wide = lambda v: v.view(-1, 1, 1)  # noqa: E731
    cov = sum(
        wide((k - 1) / (total - 1)) * s.cov + wide(k / (total - 1)) * outer(s.mean)
        for k, s in zip(n, stats, strict=True)
    )
    cov = cov - wide(total / (total - 1)) * outer(mean)
    found = aggregate_statistics(stats)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.cov, cov)


def test_float32_far_from_the_origin_is_computed_in_double() -> None:
    features = (rows(50, 3) + 1000).float()
    found = class_statistics(features, torch.zeros(50, dtype=torch.int64), 1)
    np.testing.assert_allclose(found.cov[0], np.cov(features.double().numpy().T), atol=1e-6)
    half = class_statistics(rows(50, 3).bfloat16(), torch.zeros(50, dtype=torch.int64), 1)
    assert half.mean.dtype == torch.float64 and half.cov.isfinite().all()
    single = class_statistics(features, torch.zeros(50, dtype=torch.int64), 1, dtype=torch.float32)
    assert single.cov.dtype == torch.float32


# -- oracle 3: one client, rank, subspace -----------------------------------------------------------------------------
def test_one_client_is_its_own_aggregate_and_samples_stay_in_its_span() -> None:
    features, targets = rows(8, 6, seed=3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    own = class_statistics(features, targets, 4)
    found = aggregate_statistics([own])
    assert torch.equal(found.count, own.count)
    torch.testing.assert_close(found.mean, own.mean)
    torch.testing.assert_close(found.cov, own.cov)
    assert torch.linalg.matrix_rank(own.cov).tolist() == [3, 2, 0, 0]
    drawn, labels = sample_virtual(own, 40, dtype=torch.float64)
    assert labels.unique().tolist() == [0, 1]  # one example, and none, give no Gaussian
    for c in (0, 1):
        basis = (features[targets == c] - own.mean[c]).T
        off = drawn[labels == c] - own.mean[c]
        residual = off.T - basis @ torch.linalg.lstsq(basis, off.T, driver="gelsd").solution
        assert residual.abs().max() < 1e-5


# -- oracle 4: samples ------------------------------------------------------------------------------------------------
def test_samples_approach_the_gaussian_at_the_square_root_of_their_number() -> None:
    stats = aggregate_statistics([class_statistics(rows(40, 3) @ rows(3, 3, 9), torch.arange(40) % 2, 2)])
    errors = []
    for m in (100, 10_000):
        gaps = []
        for seed in range(30):
            generator = torch.Generator().manual_seed(seed)
            z, y = sample_virtual(stats, m, generator=generator, dtype=torch.float64)
            found = class_statistics(z, y, 2)
            gaps.append(((found.mean - stats.mean).norm() ** 2, (found.cov - stats.cov).norm() ** 2))
        errors.append([math.sqrt(sum(float(g[i]) for g in gaps) / 30) for i in (0, 1)])
    for few, many in zip(*errors, strict=True):
        assert 7 < few / many < 14  # 100 times as many: a tenth of the error


def test_samples_are_ordered_and_follow_from_the_seed() -> None:
    stats = aggregate_statistics([class_statistics(rows(40, 3), torch.arange(40) % 4, 5)])
    draw = lambda m, seed=0: sample_virtual(stats, m, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    z, y = draw(6)
    assert z.shape == (24, 3) and z.dtype == torch.float32 and y.tolist() == sorted([0, 1, 2, 3] * 6)
    assert torch.equal(z, draw(6)[0]) and not torch.equal(z, draw(6, 1)[0])
    z, y = draw([3, 0, 7, 1, 9])
    assert torch.bincount(y, minlength=5).tolist() == [3, 0, 7, 1, 0] and z.shape == (11, 3)


# -- oracle 5: calibration --------------------------------------------------------------------------------------------
def test_no_covariance_is_training_on_the_class_means() -> None:
    stats = gaussian([[[0.0, 0], [0, 0]]] * 2, [[1.0, 0], [0, 2]])
    z, y = sample_virtual(stats, 3)
    assert torch.equal(z, torch.tensor([[1.0, 0]] * 3 + [[0, 2.0]] * 3)) and y.tolist() == [0, 0, 0, 1, 1, 1]


def test_equal_isotropic_gaussians_give_the_perpendicular_bisector() -> None:
    means = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).double()
    stats = gaussian([[[0.5, 0], [0, 0.5]]] * 2, means.tolist())
    generator = torch.Generator().manual_seed(0)
    z, y = sample_virtual(stats, 4000, generator=generator)
    torch.manual_seed(0)
    head = calibrate_classifier(nn.Linear(2, 2), z, y, lr=0.05, epochs=15, generator=generator)
    w = (head.weight[1] - head.weight[0]).detach().double()
    normal = means[1] - means[0]
    assert torch.nn.functional.cosine_similarity(w, normal, dim=0) > 0.995
    middle = means.mean(0)
    at_middle = w @ middle + (head.bias[1] - head.bias[0]).detach()
    assert abs(float(at_middle)) < 0.05 * float(w.norm() * normal.norm())


def test_calibration_is_sgd_written_out() -> None:
    z, y = rows(10, 3, dtype=torch.float32), torch.arange(10) % 2
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(mine.state_dict())
    settings = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    calibrate_classifier(mine, z, y, epochs=2, batch_size=4, generator=torch.Generator().manual_seed(3), **settings)
    generator = torch.Generator().manual_seed(3)
    sgd = torch.optim.SGD(theirs.parameters(), **settings)
    for _ in range(2):
        order = torch.randperm(10, generator=generator)
        for start in (0, 4, 8):  # the last batch has two examples
            batch = order[start : start + 4]
            sgd.zero_grad()
            nn.functional.cross_entropy(theirs(z[batch]), y[batch]).backward()
            sgd.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.grad is None


def test_bfloat16_classifier() -> None:
    head = calibrate_classifier(nn.Linear(3, 2).bfloat16(), rows(10, 3), torch.arange(10) % 2, epochs=1)
    assert head.weight.dtype == torch.bfloat16 and head.weight.isfinite().all()


# -- oracle 6: the transform, the extractor ---------------------------------------------------------------------------
def test_tukey_by_hand() -> None:
    assert tukey_transform(torch.tensor([-1.0, 0, 4, 9]), 0.5).tolist() == [0, 0, 2, 3]
    assert tukey_transform(torch.tensor([-1.0, 0, 4]), 1.0).tolist() == [0, 0, 4]
    assert tukey_transform(torch.tensor([1.0, math.e]), 0.0).tolist() == pytest.approx([0, 1])
    assert tukey_transform(torch.tensor([0.0, -1.0]), 0.0).tolist() == [-math.inf, -math.inf]
    x = torch.tensor([-1.0, 0, 4], requires_grad=True)
    tukey_transform(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 0.25]
    compiled = torch.compile(tukey_transform, backend="aot_eager", fullgraph=True)
    assert compiled(torch.tensor([-1.0, 4])).tolist() == [0, 2]


# -- what is sent -----------------------------------------------------------------------------------------------------
def test_packing_keeps_every_number_and_leaves_absent_classes_out() -> None:
    stats = class_statistics(rows(9, 4), torch.tensor([0, 0, 3, 3, 3, 4, 4, 4, 4]), 6)
    sent = pack(stats)
    assert {name: tuple(t.shape) for name, t in sent.items()} == {
        "classes": (3,),
        "count": (3,),
        "mean": (3, 4),
        "cov": (3, 10),
    }
    found = unpack(sent, 6, 4)
    for name in ("count", "mean", "cov"):
        assert torch.equal(getattr(found, name), getattr(stats, name))


@pytest.mark.parametrize(
    "change",
    [
        {"cov": torch.zeros(3, 16)},
        {"mean": torch.zeros(3, 5)},
        {"classes": torch.tensor([0, 3, 6])},
        {"classes": torch.tensor([0.0, 3.0, 4.0])},
        {"count": torch.tensor([2, -3, 4])},
        {"more": torch.zeros(1)},
    ],
)
def test_unpack_refuses_what_no_client_can_have_made(change: dict[str, Tensor]) -> None:
    sent = pack(class_statistics(rows(9, 4), torch.tensor([0, 0, 3, 3, 3, 4, 4, 4, 4]), 6))
    with pytest.raises(ArgumentError, match="class statistics"):
        unpack({**sent, **change}, 6, 4)


# -- the method -------------------------------------------------------------------------------------------------------
def simulated(methods: Any, rounds: int = 2, **settings: Any) -> Any:
    pytest.importorskip("flwr")
    from equipoise.federated.simulation import simulate

    settings = {"local": LocalTraining(batch_size=8), **settings}
    return simulate(methods, toy_model(), toy_clients(), rounds, **settings)


def test_a_client_answers_with_its_statistics_in_evaluation_mode() -> None:
    data, model = toy_clients()[0], toy_model()
    client = Client(0, model, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    update = CCVR().answer(client, Sent(*state_of(model), query="class_statistics"))
    assert same(dict(model.state_dict()), before) and model.training
    assert not model[4]._forward_pre_hooks
    assert update is not None and not update.params and not update.buffers
    features = model.eval()[:4](data.inputs).detach()
    expected = class_statistics(features, data.targets, 3)
    found = unpack(update.extras["class_statistics"], 3, 8)
    torch.testing.assert_close(found.cov, expected.cov)
    torch.testing.assert_close(found.mean, expected.mean)
    assert CCVR().answer(client, Sent({}, {}, query="other")) is None


def test_method_is_training_then_the_functions_step_by_step() -> None:
    pytest.importorskip("flwr")
    from equipoise.federated.fedspeed import FedAvg, FedProx

    plain, run = simulated(FedAvg()), simulated(CCVR(num_per_class=20, epochs=2))
    assert [k for k in plain.params if not torch.equal(plain.params[k], run.params[k])] == ["4.weight", "4.bias"]
    assert same(plain.server.buffers, run.server.buffers)
    model = plain.model.eval()
    features = [model[:4](data.inputs).detach() for data in toy_clients()]
    total = aggregate_statistics(
        [class_statistics(z, data.targets, 3) for z, data in zip(features, toy_clients(), strict=True)]
    )
    torch.testing.assert_close(run.results["class_statistics"].cov, total.cov)
    generator = run.server.generator("ccvr")
    z, y = sample_virtual(total, 20, generator=generator)
    head = calibrate_classifier(model[4], z, y, epochs=2, generator=generator)
    torch.testing.assert_close(run.params["4.weight"], head.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.model[4].bias, head.bias)
    # Neutral, and beside another method.
    assert same(simulated(CCVR(epochs=0)).params, plain.params)
    proximal, both = simulated(FedProx(mu=1.0)), simulated([FedProx(mu=1.0), CCVR()])
    assert torch.equal(proximal.params["0.weight"], both.params["0.weight"])
    assert not torch.equal(proximal.params["4.weight"], both.params["4.weight"])


def test_every_client_is_asked_and_one_that_fails_is_left_out() -> None:
    pytest.importorskip("flwr")

    def damaged(message: Any, context: Any, call: Any) -> Any:
        from flwr.app import Array

        reply = call(message, context)
        reply.content["extra/class_statistics"]["cov"] = Array(np.zeros((1, 1)))
        return reply

    run = simulated(CCVR(), fraction=0.25)  # one client drawn in a round
    assert run.results["class_statistics"].count.sum() == sum(map(len, toy_clients()))

    def down(message: Any, context: Any, call: Any) -> Any:
        raise RuntimeError("out of memory")

    for fault in (damaged, down):
        # A query that names the statistics comes after the last round.
        run = simulated(CCVR(), mods=[mod(fault, client=1, round=2, kind="query")])
        assert run.results["class_statistics"].count.sum() == sum(map(len, toy_clients())) - len(toy_clients()[1])


def test_large_statistics_fit() -> None:
    """More bytes than the model's parameters 8 times over: the method raises the limit for its answers."""
    pytest.importorskip("flwr")
    from equipoise.federated.simulation import simulate

    width = 260  # 4 classes: 1.1 MB of statistics, 8 KB of parameters
    data = Examples(rows(40, 2, dtype=torch.float32), torch.arange(40) % 4)
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 4))
    run = simulate(CCVR(num_per_class=2, epochs=1), model, [data], 0)
    assert not run.faults and run.results["class_statistics"].count.tolist() == [10] * 4


def test_tukey_is_applied_from_calibration_on() -> None:
    plain, run = simulated(CCVR(epochs=0)), simulated(CCVR(tukey=0.5, num_per_class=50, lr=0.05))
    assert same({k: v for k, v in plain.params.items() if k < "4"}, {k: v for k, v in run.params.items() if k < "4"})
    model, inputs = run.model.eval(), toy_clients()[0].inputs
    assert bool(model[4].transformed)
    features = model[:4](inputs)
    torch.testing.assert_close(
        model(inputs), nn.functional.linear(features.clamp(min=0).sqrt(), model[4].weight, model[4].bias)
    )
    targets = torch.cat([data.targets for data in toy_clients()])
    predicted = model(torch.cat([data.inputs for data in toy_clients()])).argmax(1)
    assert (predicted == targets).float().mean() > 0.9  # a fresh classifier has learned from the virtual features
    fresh = CCVR(tukey=0.5).configure_model(toy_model(), 0)
    assert torch.equal(fresh.eval()(inputs), toy_model().eval()(inputs))  # in training nothing is transformed


# -- bad input --------------------------------------------------------------------------------------------------------
Z, Y = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
STATS = class_statistics(rows(4, 2), Y, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate_statistics([]), "stats"),
        (lambda: aggregate_statistics([STATS, class_statistics(rows(4, 3), Y, 2)]), r"stats\[1\]"),
        (lambda: aggregate_statistics([STATS, class_statistics(rows(4, 2), Y, 3)]), r"stats\[1\]"),
        (lambda: class_statistics(Z, torch.tensor([0, 1, 2, 0]), 2), "targets"),
        (lambda: class_statistics(Z, torch.tensor([0, 1, -1, 0]), 2), "targets"),
        (lambda: class_statistics(Z, Y.float(), 2), "features, targets"),
        (lambda: class_statistics(Z, Y[:3], 2), "features, targets"),
        (lambda: class_statistics(Z / 0, Y, 2), "finite"),
        (lambda: class_statistics(Z, Y, 0), "num_classes"),
        (lambda: ClassStatistics(Y, Z, Z), "count, mean, cov"),
        (lambda: sample_virtual(STATS, 0), "num_per_class"),
        (lambda: sample_virtual(STATS, [1, 2, 3]), "num_per_class"),
        (lambda: sample_virtual(STATS, [1, -2]), "num_per_class"),
        (lambda: sample_virtual(STATS, [0, 0]), "no class"),
        (lambda: sample_virtual(B, 5), "no class"),
        (lambda: tukey_transform(Z, -0.5), "beta"),
        (lambda: calibrate_classifier(nn.Linear(2, 2), Z, Y + 1), "targets"),
        (lambda: calibrate_classifier(nn.Linear(2, 2), Z / 0, Y), "finite"),
        (lambda: calibrate_classifier(nn.Linear(2, 2), Z, Y, lr=0), "lr"),
        (lambda: calibrate_classifier(nn.Linear(2, 2), Z, Y, batch_size=0), "batch_size"),
        (lambda: calibrate_classifier(nn.Linear(2, 2), Z, Y, momentum=1.0), "momentum"),
        (lambda: calibrate_classifier(nn.Linear(2, 2).requires_grad_(False), Z, Y), "nothing to calibrate"),
        (lambda: CCVR(num_per_class=0), "num_per_class"),
        (lambda: CCVR(lr=0), "lr"),
        (lambda: CCVR(epochs=-1), "epochs"),
        (lambda: CCVR(tukey=-1), "tukey"),
        (lambda: CCVR(classifier="nowhere").configure_model(toy_model(), 0), "head"),
        (lambda: CCVR(classifier="1").configure_model(toy_model(), 0), "classifier"),
        (lambda: CCVR().configure_model(toy_model().requires_grad_(False), 0), "classifier"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_settings_and_space() -> None:
    assert CCVR.name == "ccvr" and CCVR.paper is not None and set(CCVR.space) <= set(CCVR().settings())
    for key, dimension in CCVR.space.items():
        for u in (0.0, 0.5, 0.999):
            CCVR(**{key: dimension.at(u)})
