"""The baselines: the contrastive penalty against a loop, pytorch-metric-learning's losses in a run, and their absence."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError, MissingDependencyError
from equipoise.retrieval import (
    TCM,
    ArcFace,
    Contrastive,
    ContrastivePenalty,
    NormalisedSoftmax,
    ProxyAnchor,
    Triplet,
    baselines,
    contrastive_penalty,
    tcm_loss,
)
from equipoise.testing import check_method, check_methods_ddp, check_regularizer
from equipoise.training.sampler import ClassBatches

torch.set_num_threads(1)
peers = pytest.mark.skipif(not baselines.installed(), reason="pytorch-metric-learning is missing")
PEERS = (Contrastive, Triplet, ProxyAnchor, ArcFace)
PAIRS = {"accumulation": "the loss is over the pairs of a batch"}


def drawn(n: int = 14, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return centres[labels] + 0.6 * torch.randn(n, 5, generator=generator, dtype=torch.float64), labels


# -- the contrastive penalty ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("margins", [(0.9, 0.5), (0.7, 0.1)])
def test_contrastive_penalty_against_a_plain_loop(margins: tuple[float, float]) -> None:
    embeddings, labels = drawn()
    positive, negative = [], []
    rows = embeddings.tolist()
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            s = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            if labels[i] != labels[j]:
                negative.append(max(s - margins[1], 0))
            elif i != j:
                positive.append(max(margins[0] - s, 0))
    expected = 2 * sum(positive) / len(positive) + 3 * sum(negative) / len(negative)
    options = {"pos_margin": margins[0], "neg_margin": margins[1], "pos_weight": 2.0, "neg_weight": 3.0}
    assert contrastive_penalty(embeddings, labels, **options).item() == pytest.approx(expected, abs=1e-12)
    hard = tcm_loss(embeddings, labels, **options)
    assert 0 < expected < hard.item()  # some pairs are not hard, and count here only


def test_contrastive_penalty_is_tcm_where_all_pairs_are_hard() -> None:
    embeddings, labels = drawn()
    widest = {"pos_margin": 1.0, "neg_margin": -1.0}
    torch.testing.assert_close(
        contrastive_penalty(embeddings, labels, **widest), tcm_loss(embeddings, labels, **widest)
    )


def test_contrastive_penalty_is_a_regulariser() -> None:
    part = partial(contrastive_penalty, neg_margin=0.1)
    check_regularizer(part, lambda g: (torch.randn(6, 4, generator=g), torch.arange(6) % 2))
    assert contrastive_penalty(torch.ones(1, 2), torch.tensor([0])).item() == 0
    with pytest.raises(ValueError, match=r"pos_margin = 0.4: must be greater than neg_margin = 0.5"):
        contrastive_penalty(*drawn(), pos_margin=0.4)


# -- methods ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [NormalisedSoftmax, ContrastivePenalty])
def test_the_method_kit(method: Any) -> None:
    check_method(method, skip=PAIRS)


@peers
@pytest.mark.parametrize("method", PEERS)
def test_the_method_kit_of_peers(method: Any) -> None:
    check_method(method, skip={} if method is ArcFace else PAIRS)


@peers
@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    for report in check_methods_ddp([ContrastivePenalty, Triplet, ProxyAnchor]):
        assert report.passed == ["ddp-trains", "ddp-ranks", "ddp-equals-one"]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def train(method: Any, **options: Any) -> equipoise.Run:
    inputs, labels = drawn(36)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 9, "sampler": ClassBatches(per_class=3), **options}
    return equipoise.fit(network(), (inputs.float(), labels), methods=[method], **settings)


@peers
def test_a_peer_in_a_run_is_its_loss_in_a_loop() -> None:
    from pytorch_metric_learning.losses import ArcFaceLoss

    inputs, labels = drawn(36)
    examples, model = equipoise.Examples(inputs.float(), labels), network()
    starts: list[nn.Module] = []

    class Watched(ArcFace):
        name = "watched"

        def build(self, classes: int, width: int) -> nn.Module:
            starts.append(super().build(classes, width))
            return copy.deepcopy(starts[0])

    run = train(Watched(margin=10.0, scale=16.0))
    (criterion,) = starts
    assert isinstance(criterion, ArcFaceLoss) and criterion.W.shape == (8, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05, momentum=0.9)
    order = ClassBatches(per_class=3)(examples, 9, torch.Generator().manual_seed(0))
    for _ in range(2):
        for rows in torch.tensor(list(order)).split(9):
            optimizer.zero_grad()
            criterion(model[:2](examples.inputs[rows]), labels[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))
    torch.testing.assert_close(list(run.methods[0].criterion.parameters()), list(criterion.parameters()))


@peers
def test_settings_reach_the_losses() -> None:
    contrastive = train(Contrastive(0.1, 0.9)).methods[0].criterion
    assert (contrastive.pos_margin, contrastive.neg_margin) == (0.1, 0.9)
    triplet = train(Triplet(0.3, "semihard")).methods[0].criterion
    assert (triplet.of.margin, triplet.miner.margin, triplet.miner.type_of_triplets) == (0.3, 0.3, "semihard")
    anchor = train(ProxyAnchor(0.2, 12.0)).methods[0].criterion
    assert (anchor.margin, anchor.alpha, anchor.proxies.shape) == (0.2, 12.0, (3, 8))
    arcface = train(ArcFace(20.0, 10.0)).methods[0].criterion
    assert (arcface.margin, arcface.scale) == (pytest.approx(math.radians(20)), 10.0)


@peers
def test_proxies_learn_at_their_own_rate() -> None:
    run = train(ProxyAnchor(proxy_rate=40.0))
    model, proxies = run.optimizer.param_groups
    assert proxies["params"] == list(run.methods[0].criterion.parameters()) and len(model["params"]) == 4
    assert proxies["lr"] == pytest.approx(40 * model["lr"])
    assert len(train(ProxyAnchor(proxy_rate=1.0)).optimizer.param_groups) == 1


@pytest.mark.parametrize("method", PEERS)
def test_a_missing_package_is_named(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "installed", lambda: False)
    with pytest.raises(
        MissingDependencyError, match=rf"{method.name} needs pytorch-metric-learning.*equipoise\[peers\]"
    ):
        method()


@peers
def test_a_head_without_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Identity())
    with pytest.raises(ArgumentError, match=r"head = 'Identity': must have a weight \(classes, features\)"):
        equipoise.start(model, lambda p: torch.optim.SGD(p, lr=0.1), methods=[ArcFace()], head="1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrastive(1.0, 0.5), r"neg_margin = 0.5: must be a number in \(1, 2\]"),
        (lambda: Contrastive(-0.1, 0.5), "pos_margin = -0.1"),
        (lambda: Triplet(margin=3.0), "margin = 3.0"),
        (lambda: Triplet(mining="semi-hard"), "mining = 'semi-hard': must be one of .* Did you mean 'semihard'"),
        (lambda: ProxyAnchor(margin=1.5), "margin = 1.5"),
        (lambda: ProxyAnchor(alpha=0.0), "alpha = 0.0"),
        (lambda: ProxyAnchor(proxy_rate=0.0), "proxy_rate = 0.0"),
        (lambda: ArcFace(margin=100.0), "margin = 100.0"),
        (lambda: ArcFace(scale=-1.0), "scale = -1.0"),
        (lambda: ContrastivePenalty(pos_margin=0.1), "pos_margin = 0.1"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_penalty_searches_at_least_where_tcm_does() -> None:
    for name, dimension in TCM.space.items():
        ours = ContrastivePenalty.space[name]
        assert ours.low <= dimension.low and ours.high >= dimension.high
