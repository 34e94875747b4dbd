"""SBCL against the paper's formulas, hand-computed numbers and loops in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.data.augment import Jitter
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance.sbcl import (
    SBCL,
    SBCLLoss,
    assign_subclasses,
    balanced_classifier,
    balanced_kmeans,
    class_temperatures,
    cosine_kmeans,
    num_subclasses,
    sbcl_loss,
)
from equipoise.testing import (
    TinyNetwork,
    check_loss,
    check_method,
    check_methods_ddp,
    check_regularizer,
    classification,
    spawn,
)
from equipoise.training import Method
from equipoise.training.batch import Inputs, map_inputs

LABELS, SUBCLASSES = torch.tensor([0, 0, 1, 0, 2, 1, 0]), torch.tensor([0, 1, 2, 0, 4, 3, 1])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(drawn(*shape, seed=seed), dim=-1)


def at_degrees(*angles: float) -> Tensor:
    radians = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)


def reference(
    features: Tensor,
    labels: Tensor,
    subclasses: Tensor,
    temperature: float = 0.1,
    class_temperature: Tensor | None = None,
    weight: float = 0.2,
    base_temperature: float | None = None,
) -> list[float]:
    """The definition, one anchor and one number at a time; the mean over the views of each example."""
    size, views, _ = features.shape
    z = [features[i, v].tolist() for v in range(views) for i in range(size)]
    y, s = labels.tolist() * views, subclasses.tolist() * views
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))  # noqa: E731
    losses = [0.0] * size
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        own = [a for a in others if a % size == i % size]
        same_subclass = [a for a in others if s[a] == s[i]]
        across = [a for a in others if y[a] == y[i] and s[a] != s[i]] + own
        candidates = [a for a in others if s[a] != s[i]] + own
        tau = temperature if class_temperature is None else float(class_temperature[y[i]])
        terms = []
        for positives, against, t in ((same_subclass, others, temperature), (across, candidates, tau)):
            log_sum = math.log(sum(math.exp(dot(z[i], z[a]) / t) for a in against))
            terms.append(-sum(dot(z[i], z[p]) / t - log_sum for p in positives) / len(positives))
        c = 1.0 if base_temperature is None else temperature / base_temperature
        losses[i % size] += (c * terms[0] + weight * terms[1]) / views
    return losses


# -- the loss ---------------------------------------------------------------------------------------------------------
def test_oracle_1_by_hand() -> None:
    z = torch.stack([at_degrees(0, 20, 100), at_degrees(5, 30, 110)], 1)
    y, s = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    loss = partial(sbcl_loss, z, y, s, temperature=0.5)
    assert loss(weight=0.0).item() == pytest.approx(0.892892, abs=1e-6)
    assert (loss(weight=1.0) - loss(weight=0.0)).item() == pytest.approx(0.956015, abs=1e-6)
    assert loss().item() == pytest.approx(1.084095, abs=1e-6)
    warm = torch.tensor([0.8, 0.8])
    second = loss(weight=1.0, class_temperature=warm) - loss(weight=0.0)
    assert second.item() == pytest.approx(1.117958, abs=1e-6)
    assert loss(class_temperature=warm).item() == pytest.approx(1.116484, abs=1e-6)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_loss_is_its_definition(views: int, reduction: str) -> None:
    z, tau = unit(7, views, 5), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    settings: dict[str, Any] = {"temperature": 0.4, "class_temperature": tau, "weight": 0.7, "base_temperature": 0.3}
    each = torch.tensor(reference(z, LABELS, SUBCLASSES, **settings), dtype=torch.float64)
    expected = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    torch.testing.assert_close(sbcl_loss(z, LABELS, SUBCLASSES, **settings, reduction=reduction), expected)
    torch.testing.assert_close(
        sbcl_loss(z, LABELS, SUBCLASSES, reduction="none").tolist(), reference(z, LABELS, SUBCLASSES)
    )
    module = SBCLLoss(temperature=0.4, weight=0.7, base_temperature=0.3)
    torch.testing.assert_close(module(z, LABELS, SUBCLASSES, tau), each.mean())


def test_oracle_2_limits_are_supcon_and_simclr() -> None:
    z, ids = unit(7, 2, 5), torch.arange(7)
    flat = torch.cat([z[:, 0], z[:, 1]])
    log_p = (flat @ flat.T / 0.2).fill_diagonal_(-torch.inf).log_softmax(1)
    positives = (LABELS.repeat(2)[:, None] == LABELS.repeat(2)) & ~torch.eye(14, dtype=torch.bool)
    supcon = -log_p.masked_fill(~positives, 0).sum(1) / positives.sum(1)
    torch.testing.assert_close(sbcl_loss(z, LABELS, LABELS, temperature=0.2, weight=0.0), supcon.mean())
    simclr = F.cross_entropy(log_p, (torch.arange(14) + 7) % 14)
    torch.testing.assert_close(sbcl_loss(z, ids, ids, temperature=0.2, weight=0.0), simclr)


def test_oracle_2_limits_are_the_peers_losses() -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    z, ids = unit(7, 2, 5), torch.arange(7)
    flat = torch.cat([z[:, 0], z[:, 1]])
    for peer, labels in ((peers.SupConLoss(0.2), LABELS), (peers.NTXentLoss(0.2), ids)):
        ours = sbcl_loss(z, labels, labels, temperature=0.2, weight=0.0)
        torch.testing.assert_close(ours, peer(flat, labels.repeat(2)), atol=1e-6, rtol=1e-6)


def test_oracle_3_base_temperature_multiplies_the_first_term_only() -> None:
    z = unit(7, 2, 5)
    loss = partial(sbcl_loss, z, LABELS, SUBCLASSES, temperature=0.2)
    first = loss(weight=0.0)
    torch.testing.assert_close(loss(weight=0.0, base_temperature=0.07), first * 0.2 / 0.07)
    torch.testing.assert_close(
        loss(weight=0.3, base_temperature=0.07) - loss(weight=0.0, base_temperature=0.07), loss(weight=0.3) - first
    )


def test_oracle_4_one_subclass_a_class_leaves_the_second_term_its_own_views() -> None:
    def second(z: Tensor) -> Tensor:
        return sbcl_loss(z, LABELS, LABELS, weight=1.0, reduction="none") - sbcl_loss(
            z, LABELS, LABELS, weight=0.0, reduction="none"
        )

    z, moved = unit(7, 2, 5), unit(7, 2, 5)
    moved[[1, 3, 6]] = unit(3, 2, 5, seed=1)  # the others of class 0
    assert torch.isfinite(second(z)).all()
    torch.testing.assert_close(second(z)[0], second(moved)[0])
    assert not torch.isclose(second(z)[2], second(moved)[2])
    similar = [float(z[0, 0] @ z[j, v]) / 0.1 for j in (2, 4, 5) for v in (0, 1)] + [float(z[0, 0] @ z[0, 1]) / 0.1]
    swapped = [float(z[0, 1] @ z[j, v]) / 0.1 for j in (2, 4, 5) for v in (0, 1)] + [similar[-1]]
    expected = sum(math.log(sum(map(math.exp, values))) - values[-1] for values in (similar, swapped)) / 2
    assert second(z)[0].item() == pytest.approx(expected)


def test_oracle_7_invariances() -> None:
    z, tau = unit(7, 2, 5), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    loss = partial(sbcl_loss, class_temperature=tau, reduction="none")
    wanted = loss(z, LABELS, SUBCLASSES)
    rotation = torch.linalg.qr(drawn(5, 5, seed=1)).Q
    torch.testing.assert_close(loss(z @ rotation, LABELS, SUBCLASSES), wanted)
    torch.testing.assert_close(loss(z, LABELS, torch.tensor([40, 3, 17, -2, 8])[SUBCLASSES]), wanted)
    torch.testing.assert_close(loss(z.flip(1), LABELS, SUBCLASSES), wanted)
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    torch.testing.assert_close(loss(z[order], LABELS[order], SUBCLASSES[order]), wanted[order])


def test_nothing_but_the_features_carries_a_gradient() -> None:
    z = unit(7, 2, 5).requires_grad_()
    tau = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    sbcl_loss(z, LABELS, SUBCLASSES, class_temperature=tau).backward()
    assert tau.grad is None and z.grad is not None
    for settings in ({"class_temperature": tau.detach()}, {"weight": 0.0}, {"base_temperature": 0.07}):
        assert torch.autograd.gradcheck(lambda v, s=settings: sbcl_loss(v, LABELS, SUBCLASSES, **s), z)


def test_kit_for_the_parts() -> None:
    def arguments(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(torch.randn(7, 2, 4, generator=generator), dim=2), LABELS, SUBCLASSES

    check_loss(sbcl_loss, arguments)
    check_regularizer(SBCLLoss(temperature=0.2, weight=0.5), arguments)


def test_half_precision_and_autocast_are_float32() -> None:
    z = unit(7, 2, 5).bfloat16()
    wanted = sbcl_loss(z.float(), LABELS, SUBCLASSES)
    assert sbcl_loss(z, LABELS, SUBCLASSES).dtype == torch.float32
    torch.testing.assert_close(sbcl_loss(z, LABELS, SUBCLASSES), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sbcl_loss(z.float(), LABELS, SUBCLASSES), wanted)


def test_small_temperatures_do_not_overflow() -> None:
    z = unit(7, 2, 5).float().requires_grad_()
    tau = torch.full((3,), 1e-3)
    loss = sbcl_loss(z, LABELS, SUBCLASSES, temperature=1e-3, class_temperature=tau)
    loss.backward()
    assert torch.isfinite(loss) and z.grad is not None and torch.isfinite(z.grad).all()


def test_a_batch_of_one_class_and_one_subclass_is_finite() -> None:
    z, same = unit(4, 2, 3).requires_grad_(), torch.zeros(4, dtype=torch.int64)
    loss = sbcl_loss(z, same, same)
    loss.backward()
    assert loss.item() == pytest.approx(sum(reference(z.detach(), same, same)) / 4) and torch.isfinite(z.grad).all()


def test_compiles_without_a_break() -> None:
    z, tau = unit(7, 2, 5), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    module = SBCLLoss()
    compiled = torch.compile(lambda v: module(v, LABELS, SUBCLASSES, tau), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), module(z, LABELS, SUBCLASSES, tau))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(7, 1, 4)}, r"features = \(7, 1, 4\): must hold at least 2 examples and 2 views"),
        ({"features": torch.zeros(1, 2, 4), "labels": LABELS[:1], "subclasses": LABELS[:1]}, "at least 2 examples"),
        ({"features": torch.zeros(14, 4)}, r"features = torch.float32 \(14, 4\): must be .*\(B, V, D\)"),
        ({"features": torch.zeros(7, 2, 4, dtype=torch.int64)}, "features = torch.int64"),
        ({"labels": LABELS[:, None]}, r"labels = torch.int64 \(7, 1\): must be integers of shape \(7,\)"),
        ({"labels": LABELS.float()}, "labels = torch.float32"),
        ({"subclasses": SUBCLASSES[:6]}, r"subclasses = torch.int64 \(6,\)"),
        (
            {"subclasses": torch.tensor([0, 1, 0, 0, 4, 3, 1])},
            "subclasses = 0 for examples of the classes 0 and 1: must belong to one class. Number the subclasses",
        ),
        ({"temperature": 0.0}, r"temperature = 0.0: must be a number in \(0, inf\)"),
        ({"base_temperature": -1.0}, "base_temperature = -1.0"),
        ({"weight": -0.1}, r"weight = -0.1: must be a number in \[0, inf\)"),
        ({"class_temperature": torch.tensor([0.1, 0.0, 0.1])}, "class_temperature = 0.0: must be positive"),
        ({"class_temperature": torch.tensor([0.1, torch.nan, 0.1])}, "class_temperature = nan: must be positive"),
        ({"class_temperature": torch.full((2,), 0.1)}, r"labels = values in \[0, 2\]: must lie in \[0, 2\)"),
        ({"class_temperature": torch.full((3, 1), 0.1)}, r"class_temperature = \(3, 1\): must have the shape \(C,\)"),
        ({"reduction": "max"}, "reduction = 'max'"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"features": torch.ones(7, 2, 4), "labels": LABELS, "subclasses": SUBCLASSES, **change}
    with pytest.raises(ValueError, match=message):
        sbcl_loss(given.pop("features"), given.pop("labels"), given.pop("subclasses"), **given)
    settings = {key: value for key, value in given.items() if key in ("temperature", "weight", "base_temperature")}
    if settings:
        with pytest.raises(ValueError, match=message):
            SBCLLoss(**settings)


def test_two_processes_see_the_whole_batch() -> None:
    z, tau = unit(7, 2, 5), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    labels, subclasses = LABELS, SUBCLASSES

    def parts() -> Any:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        rows = slice(0, 4) if rank == 0 else slice(4, 7)
        network = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        network.weight.data = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
        loss = SBCLLoss(weight=0.5)(F.normalize(network(z[rows]), dim=2), labels[rows], subclasses[rows], tau)
        loss.backward()
        torch.distributed.all_reduce(network.weight.grad)
        yield [loss.detach(), network.weight.grad / 2]  # DistributedDataParallel's average

    weight = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).requires_grad_()
    loss = sbcl_loss(F.normalize(z @ weight.T, dim=2), labels, subclasses, class_temperature=tau, weight=0.5)
    (gradient,) = torch.autograd.grad(loss, weight)
    for ((theirs, slope),) in spawn(parts):
        torch.testing.assert_close(theirs, loss.detach())
        torch.testing.assert_close(slope, gradient)


# -- subclasses -------------------------------------------------------------------------------------------------------
def test_oracle_5_number_of_subclasses() -> None:
    assert num_subclasses(torch.tensor([500, 299, 100, 35, 10, 4]), 10).tolist() == [50, 29, 10, 3, 1, 1]
    assert num_subclasses(torch.tensor([500, 299, 100, 35]), 10).tolist() == [14, 8, 2, 1]
    for counts in ([3, 0], [[1, 2]], []):
        with pytest.raises(ValueError, match="class_counts = "):
            num_subclasses(torch.tensor(counts, dtype=torch.int64))
    with pytest.raises(ValueError, match="min_size = 0"):
        num_subclasses(torch.tensor([3, 4]), 0)


def test_oracle_6_balanced_kmeans_by_hand() -> None:
    found = balanced_kmeans(at_degrees(0, 5, 10, 20, 60, 90), 2, init=at_degrees(0, 90))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and found.converged and found.iterations == 2
    torch.testing.assert_close(found.centroids[0], at_degrees(0, 5, 10).mean(0))
    found = balanced_kmeans(drawn(29, 3), 4, generator=torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(found.labels).tolist()) == [7, 7, 7, 8]


def greedy(similarity: Tensor) -> list[int]:
    """The card's rule, a pair at a time. similarity: (K, n)."""
    clusters, n = similarity.shape
    labels = [-1] * n
    for room in (n // clusters, 1):
        taken = [0] * clusters
        pairs = [
            (-similarity[k, i].item(), k * n + i, k, i) for k in range(clusters) for i in range(n) if labels[i] < 0
        ]
        for _, _, k, i in sorted(pairs):
            if labels[i] < 0 and taken[k] < room:
                labels[i] = k
                taken[k] += 1
    return labels


@pytest.mark.parametrize(("n", "clusters"), [(6, 2), (29, 4), (40, 13), (12, 12), (9, 1)])
@pytest.mark.parametrize("levels", [None, 3])
def test_balanced_assignment_is_the_greedy_loop(n: int, clusters: int, levels: int | None) -> None:
    for seed in range(3):
        x, centroids = unit(n, 3, seed=seed), unit(clusters, 3, seed=seed + 10)
        if levels is not None:  # points on a coarse grid: many equal similarities
            x, centroids = (F.normalize((t * levels).round() + 0.5, dim=1) for t in (x, centroids))
        for normalize in (False, True):
            found = balanced_kmeans(x, clusters, init=centroids, max_iter=1, normalize_rows=normalize)
            similarity = (F.normalize(x, dim=1) @ F.normalize(centroids, dim=1).T).T
            if normalize:
                similarity = similarity / similarity.sum(1, keepdim=True)
            assert found.labels.tolist() == greedy(similarity)
            assert found.iterations == 1


def test_kmeans_finds_what_is_there() -> None:
    centres = at_degrees(10, 130, 250)
    x = centres.repeat_interleave(8, 0) + 0.05 * drawn(24, 2)
    for kmeans in (balanced_kmeans, cosine_kmeans):
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            found = kmeans(x, 3, generator=generator)
            blocks = found.labels.view(3, 8)
            assert found.converged and (blocks == blocks[:, :1]).all() and len(blocks[:, 0].unique()) == 3
            again = kmeans(x, 3, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(found.labels, again.labels) and torch.equal(found.centroids, again.centroids)


def test_kmeans_takes_equal_points_and_half_precision() -> None:
    same = at_degrees(*[30.0] * 7)
    assert sorted(torch.bincount(balanced_kmeans(same, 3).labels, minlength=3).tolist()) == [2, 2, 3]
    empty = cosine_kmeans(same, 3)  # two clusters stay without a point, and start again
    assert empty.labels.tolist() == [0] * 7 and torch.isfinite(empty.centroids).all()
    half = balanced_kmeans(unit(20, 4).half(), 4, generator=torch.Generator().manual_seed(0))
    assert half.centroids.dtype == torch.float32 and torch.bincount(half.labels).tolist() == [5] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: balanced_kmeans(x, 0), r"n_clusters = 0: must be an integer in \[1, 6\]"),
        (lambda x: balanced_kmeans(x, 7), "n_clusters = 7"),
        (lambda x: cosine_kmeans(x, 7), "n_clusters = 7"),
        (lambda x: balanced_kmeans(x[:, 0], 2), r"x = torch.float64 \(6,\)"),
        (lambda x: balanced_kmeans(x, 2, init="random"), "init = 'random': must be one of 'k-means\\+\\+'"),
        (lambda x: balanced_kmeans(x, 2, init=x[:3]), r"init = \(3, 2\): must have the shape \(2, 2\)"),
        (lambda x: balanced_kmeans(x, 2, max_iter=0), "max_iter = 0"),
        (lambda x: balanced_kmeans(x, 2, tol=-1.0), "tol = -1.0"),
        (lambda x: balanced_kmeans(x.index_fill(0, torch.tensor(4), 0.0), 2), r"x\[4\] has the norm 0.0"),
        (lambda x: balanced_kmeans(x.index_fill(0, torch.tensor(1), torch.nan), 2), r"x\[1\] has the norm nan"),
    ],
)
def test_kmeans_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(at_degrees(0, 5, 10, 20, 60, 90))


def spread_by_loop(features: Tensor, labels: Tensor, alpha: float) -> list[float]:
    spreads = []
    for c in range(int(labels.max()) + 1):
        rows = features[labels == c]
        distance = sum((row - rows.mean(0)).norm().item() for row in rows) / len(rows)
        spreads.append(distance / math.log(len(rows) + alpha))
    ordered, position = sorted(spreads), [0.2 * (len(spreads) - 1), 0.8 * (len(spreads) - 1)]
    low, high = (
        ordered[int(p)] + (p - int(p)) * (ordered[min(int(p) + 1, len(ordered) - 1)] - ordered[int(p)])
        for p in position
    )
    return [min(max(spread, low), high) for spread in spreads]


def test_oracle_8_class_temperatures() -> None:
    z, labels = unit(40, 5), torch.arange(40) % 6 * (torch.arange(40) > 3)
    z[labels == 2] = F.normalize(z[labels == 2] + torch.tensor([3.0, 0, 0, 0, 0]), dim=1)
    many = torch.full((6,), 2)
    tau = class_temperatures(z, labels, many, temperature=0.3, alpha=5.0)
    spread = spread_by_loop(z, labels, 5.0)
    mean = sum(spread) / 6
    assert tau.tolist() == pytest.approx([0.3 * s / mean for s in spread]) and tau[2] == tau.min()
    assert tau.mean().item() == pytest.approx(0.3)
    exp = class_temperatures(z, labels, many, temperature=0.3, alpha=5.0, form="exp")
    assert exp.tolist() == pytest.approx([0.3 * math.exp(s / mean) for s in spread])
    some = class_temperatures(z, labels, torch.tensor([3, 1, 2, 2, 1, 2]), temperature=0.3, alpha=5.0)
    assert some[[1, 4]].tolist() == [pytest.approx(0.3)] * 2 and torch.equal(some[[0, 2, 3, 5]], tau[[0, 2, 3, 5]])


def test_oracle_8_identical_classes_keep_the_temperature() -> None:
    labels = torch.arange(4).repeat_interleave(5)
    for z in (unit(5, 3).repeat(4, 1), torch.ones(20, 3, dtype=torch.float64)):
        tau = class_temperatures(z, labels, torch.full((4,), 2))
        assert tau.tolist() == pytest.approx([0.1] * 4)


def test_assignment_by_class() -> None:
    labels = torch.tensor([0] * 43 + [1] * 21 + [2] * 10 + [3] * 4)
    labels = labels[torch.randperm(78, generator=torch.Generator().manual_seed(1))]
    z = unit(78, 6)
    found = assign_subclasses(z, labels, min_size=5, generator=torch.Generator().manual_seed(0))
    assert found.n_subclasses.tolist() == [8, 4, 2, 1]
    assert found.subclass.min() == 0 and found.subclass.max() == 14
    start = [0, 8, 12, 14]
    for c, clusters in enumerate(found.n_subclasses.tolist()):
        sizes = torch.bincount(found.subclass[labels == c] - start[c], minlength=clusters)
        assert len(sizes) == clusters and sizes.max() - sizes.min() <= 1
    torch.testing.assert_close(found.temperature, class_temperatures(z, labels, found.n_subclasses))
    assert found.temperature[3] == pytest.approx(0.1)
    plain = assign_subclasses(z, labels, min_size=5, cluster="kmeans", generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.n_subclasses, found.n_subclasses) and not torch.equal(plain.subclass, found.subclass)
    rows = labels.argsort(stable=True)  # the data need not be sorted by class, and it does not matter if they are
    moved = assign_subclasses(z[rows], labels[rows], min_size=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved.subclass, found.subclass[rows])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda z, y: assign_subclasses(z, y, cluster="agglomerative"), "cluster = 'agglomerative'"),
        (
            lambda z, y: assign_subclasses(z, y + (y > 0)),
            "labels hold no example of class 1: every one of the 3 classes",
        ),
        (lambda z, y: assign_subclasses(z, y[:3]), r"labels = torch.int64 \(3,\): must be integers of shape \(8,\)"),
        (lambda z, y: assign_subclasses(z, y - 1), r"labels = values in \[-1, 0\]"),
        (lambda z, y: assign_subclasses(z[:0], y[:0]), r"features = torch.float64 \(0, 3\)"),
        (lambda z, y: assign_subclasses(z, y, min_size=0), "min_size = 0"),
        (lambda z, y: class_temperatures(z, y, torch.ones(2), form="square"), "form = 'square'"),
        (lambda z, y: class_temperatures(z, y, torch.ones(2), temperature=0.0), "temperature = 0.0"),
        (lambda z, y: class_temperatures(z, y, torch.ones(2), alpha=-1.0), "alpha = -1.0"),
        (lambda z, y: class_temperatures(z, y, torch.ones(3)), "labels hold no example of class 2"),
        (lambda z, y: class_temperatures(z, y, torch.ones(1)), r"labels = values in \[0, 1\]: must lie in \[0, 1\)"),
        (lambda z, y: balanced_classifier(z, y, decay=-1.0), "decay = -1.0"),
    ],
)
def test_assignment_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(unit(8, 3), torch.arange(8) % 2)


# -- the classifier ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_classifier_is_balanced_logistic_regression(bias: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    labels = torch.tensor([0] * 60 + [1] * 25 + [2] * 6)
    x = 3 * drawn(91, 4) + labels[:, None] * torch.tensor([1.0, -1.0, 0.0, 2.0]) + 5
    x[:, 2] = 7.0  # a constant feature
    fitted = balanced_classifier(x, labels, decay=0.05, bias=bias)
    scale = torch.where(x.std(0, correction=0) > 1e-9, x.std(0, correction=0), 1)
    centred = (x - x.mean(0) if bias else x) / scale
    peer = LogisticRegression(C=1 / (0.05 * 91), class_weight="balanced", fit_intercept=bias, tol=1e-8, max_iter=9999)
    wanted = torch.from_numpy(peer.fit(centred.numpy(), labels.numpy()).decision_function(centred.numpy()))
    logits = fitted(x).detach()
    assert fitted.weight.dtype == torch.float64 and (fitted.bias is not None) == bias
    torch.testing.assert_close(logits.log_softmax(1), wanted.log_softmax(1), atol=2e-4, rtol=1e-3)


# -- the method -------------------------------------------------------------------------------------------------------
def one_factor(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """A view that does not depend on where an example stands in the batch."""
    return map_inputs(lambda t: t * (1 + 0.1 * torch.randn((), generator=generator)), inputs)


SMALL: dict[str, Any] = {"warm_up": 1, "step": 1, "min_size": 4, "projection": 4}


def test_method_in_the_kit() -> None:
    skip = {
        "accumulation": "the loss contrasts the examples of a micro-batch",
        "data-order": "every position stands in the batch once for each view",
    }
    check_method(SBCL, problem=replace(classification(), augment=one_factor), settings=SMALL, skip=skip, compile=True)


def test_method_in_two_processes() -> None:
    # Without randomness in the views, which every process draws for itself.
    check_methods_ddp([(SBCL, SMALL)], problem=replace(classification(), augment=Jitter()))


def skewed(sizes: tuple[int, ...] = (40, 20, 6), seed: int = 0) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centres = 1.2 * torch.randn(len(sizes), 6, generator=torch.Generator().manual_seed(3))
    inputs = centres[labels] + torch.randn(len(labels), 6, generator=generator)
    return equipoise.Examples(inputs, labels)


def train(*methods: Method, model: nn.Module | None = None, **options: Any) -> equipoise.Run:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 16, "augment": Jitter(noise=0.1), **options}
    data = settings.pop("data", skewed())
    return equipoise.fit(TinyNetwork() if model is None else model, data, methods=methods, **settings)


class Watch(Method):
    """Notes the subclasses and temperatures before every epoch."""

    name = "watch"

    def __init__(self, other: SBCL) -> None:
        self.other = other
        self.tables: list[Tensor] = []
        self.temperatures: list[Tensor] = []

    def epoch_end(self, run: Any) -> None:
        self.tables.append(self.other.owned["table"].subclass.clone())
        self.temperatures.append(self.other.owned["table"].temperature.clone())


def test_subclasses_are_found_on_schedule_and_by_index() -> None:
    method = SBCL(min_size=5, warm_up=2, step=2, projection=8)
    watch = Watch(method)
    train(method, watch, epochs=7)
    tables, labels = watch.tables, skewed().targets
    changed = [i for i in range(1, 7) if not torch.equal(tables[i], tables[i - 1])]
    assert not tables[0].any() and changed == [1, 3, 5]  # at the end of epochs 2, 4, 6, counted from 1
    for table in tables[1:]:
        assert [len(table[labels == c].unique()) for c in range(3)] == [6, 3, 1]
        assert table[labels == 2].tolist() == [9] * 6
        assert torch.bincount(table).min() >= 6
    assert (watch.temperatures[0] == 0.1).all() and watch.temperatures[-1][2] == pytest.approx(0.1)
    assert watch.temperatures[-1][0] != pytest.approx(0.1)


def test_warm_up_is_supcon_and_weight_0_keeps_it_supcon() -> None:
    """One step of a run is one step of plain training with the SupCon loss on two views."""
    data, network = skewed((5, 4, 3)), TinyNetwork().double()
    data = equipoise.Examples(data.inputs.double(), data.targets)
    method = SBCL(weight=0.0, warm_up=100, projection=4, temperature=0.3)
    run = equipoise.start(
        network, lambda p: torch.optim.SGD(p, lr=0.1), methods=[method], data=data, batch_size=12, augment=Jitter()
    )
    batch = data.take(torch.arange(12))
    loss = run.training_loss(batch)
    z = F.normalize(method.owned["projection"](network.forward_features(batch.inputs)), dim=1)
    log_p = (torch.cat([z, z]) @ torch.cat([z, z]).T / 0.3).fill_diagonal_(-torch.inf).log_softmax(1)
    positives = (data.targets.repeat(2)[:, None] == data.targets.repeat(2)) & ~torch.eye(24, dtype=torch.bool)
    torch.testing.assert_close(loss, (-log_p.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean())
    wanted = torch.autograd.grad(loss, network.body.weight, retain_graph=True)[0]
    before, projected = network.body.weight.detach().clone(), method.owned["projection"][0].weight.detach().clone()
    run.backward(loss)
    run.step()
    torch.testing.assert_close(network.body.weight.detach(), before - 0.1 * wanted)
    assert not torch.equal(method.owned["projection"][0].weight, projected)  # the optimizer has it


def test_finish_writes_the_classifier_into_the_models_own_head() -> None:
    model = TinyNetwork()
    keys, first = list(model.state_dict()), model.head.weight.detach().clone()
    head_during: list[Tensor] = []

    class Look(Method):
        name = "look"

        def epoch_end(self, run: Any) -> None:
            head_during.append(run.model.head.weight.detach().clone())

    method = SBCL(**SMALL, decay=0.1)
    decaying = lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)  # noqa: E731
    run = train(method, Look(), model=model, optimizer=decaying)
    assert run.model is model and list(model.state_dict()) == keys
    assert all(torch.equal(head, first) for head in head_during)  # frozen, also against weight decay
    assert all(p.requires_grad for p in model.parameters())
    data = skewed()
    with torch.no_grad():
        fitted = balanced_classifier(model.eval().forward_features(data.inputs), data.targets, decay=0.1)
    torch.testing.assert_close(model.head.weight, fitted.weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.head.bias, fitted.bias, atol=1e-4, rtol=1e-3)
    predictions, targets = run.predict(skewed((30, 30, 30), seed=1))
    assert (predictions.argmax(1) == targets).double().mean() > 0.7


def test_binary_model_of_one_logit_and_head_without_bias() -> None:
    data = skewed((40, 8))
    for outputs, bias in ((1, True), (2, True), (1, False)):
        model = TinyNetwork(outputs=outputs)
        if not bias:
            model.head = nn.Linear(8, outputs, bias=False)
        loss = (lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float())) if outputs == 1 else None
        train(SBCL(**SMALL), model=model, data=data, loss=loss)
        with torch.no_grad():
            fitted = balanced_classifier(model.eval().forward_features(data.inputs), data.targets, bias=bias)
            theirs = fitted(model.forward_features(data.inputs))
            mine = model(data.inputs)
        gap = theirs[:, 1] - theirs[:, 0]
        torch.testing.assert_close(mine[:, 0] if outputs == 1 else mine[:, 1] - mine[:, 0], gap, atol=1e-3, rtol=1e-3)


def test_a_named_head_and_a_last_batch_of_one() -> None:
    run = train(SBCL(**SMALL), head="head", data=skewed((20, 9, 4)))
    assert len(skewed((20, 9, 4))) % 16 == 1
    assert all(math.isfinite(record["train_loss"]) for record in run.history)


def test_a_run_must_fit() -> None:
    with pytest.raises(ArgumentError, match=r"augment = None: must make random views.*Give augment="):
        train(SBCL(), augment=None)
    gap = equipoise.Examples(torch.randn(9, 6), torch.tensor([0, 2, 0, 2, 0, 2, 0, 0, 2]))
    with pytest.raises(DataError, match="targets hold no example of class 1: SBCL needs one"):
        train(SBCL(), data=gap)
    with pytest.raises(ArgumentError, match="head = Sequential: SBCL fits a linear classifier"):
        train(SBCL(), model=nn.Sequential(nn.Sequential(nn.Linear(6, 3))), head="0")
    soft = equipoise.Examples(torch.randn(9, 6), torch.rand(9, 3))
    tokens = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match=r"the head's inputs have shape \(32, 2, 3\): SBCL needs features"):
        train(SBCL(), model=tokens, loss=lambda z, y: z.sum())
    with pytest.raises(ArgumentError, match="data = without classes: SBCL needs"):
        train(SBCL(), data=soft)

    class Mix(Method):
        name = "mix"

        def transform_batch(self, run: Any, batch: Any) -> Any:
            return equipoise.Batch(batch.inputs, F.one_hot(batch.targets, 3).float(), batch.index, views=batch.views)

    with pytest.raises(ArgumentError, match=r"targets = torch.float32 .*leave out the method that mixes"):
        train(SBCL(), Mix())


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"weight": -1.0},
        {"min_size": 0},
        {"step": 0},
        {"warm_up": 0},
        {"cluster": "spectral"},
        {"projection": 0},
        {"decay": -0.1},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} = "):
        SBCL(**change)
