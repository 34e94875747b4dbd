"""FedLoGe against the paper's formulas, hand-computed numbers, autograd, and three optimizers written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from federation import same, toy_clients, toy_model
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError
from equipoise.federated.algorithm import Client, LocalTraining, Sent, Server, Update
from equipoise.federated.fedloge import (
    HEAD,
    FedLoGe,
    LoGeHead,
    SSEClassifier,
    _etf_gradient,
    global_realign,
    local_logits,
    local_realign,
    optimize_sparse_etf,
    present_classes,
    simplex_etf,
    sparsify,
)
from equipoise.federated.params import Params, state_of
from equipoise.training.batch import Examples

torch.set_num_threads(1)
FAST = {"etf_steps": 50, "norm": 1.0}
BY_HAND = torch.tensor([[1, 0, -0.5], [0, 1, -0.5], [0.5, 0, 0], [0, 0.5, 0.5]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- oracle 1: the simplex --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("classes", "width"), [(2, 2), (4, 4), (4, 9), (10, 64)])
def test_simplex(classes: int, width: int) -> None:
    etf = simplex_etf(classes, width, generator=seeded(), dtype=torch.float64)
    assert etf.shape == (width, classes)
    expected = classes / (classes - 1) * (torch.eye(classes).double() - 1 / classes)
    torch.testing.assert_close(etf.T @ etf, expected, atol=1e-12, rtol=0)
    assert etf.sum(1).abs().max() < 1e-12
    if classes == 4:
        assert (etf.T @ etf)[0, 1].item() == pytest.approx(-0.333333, abs=1e-6)
    assert simplex_etf(classes, width).dtype == torch.float32
    assert torch.equal(simplex_etf(classes, width, generator=seeded()), etf.float())
    assert not torch.equal(simplex_etf(classes, width, generator=seeded(1)), etf.float())


# -- oracle 2: the loss and one step of Adam --------------------------------------------------------------------------
def etf_loss(w: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Both parts as the card writes them; one neighbour a class."""
    lengths = w.norm(dim=0)
    unit = w / lengths
    cosines = unit.T @ unit
    cosines = cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool), -1.0)
    angle = torch.arccos(cosines.max(1).values.clamp(-0.99999, 0.99999))
    return ((lengths - norm) ** 2).sum(), -angle.mean()


def test_loss_and_first_step_by_hand() -> None:
    parts = etf_loss(BY_HAND, 0.1)
    assert [part.item() for part in parts] == pytest.approx([2.659581, -1.657849], abs=1e-6)
    found = optimize_sparse_etf(BY_HAND, BY_HAND != 0, steps=1, lr=1e-3)
    expected = BY_HAND.sign() * (BY_HAND.abs() - 1e-3)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)
    assert found[0].tolist() == pytest.approx([0.999, 0, -0.499], abs=1e-7) and found[3, 2].item() == pytest.approx(
        0.499
    )
    assert torch.equal(found == 0, BY_HAND == 0)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_is_autograds(seed: int) -> None:
    w, mask = sparsify(simplex_etf(5, 7, generator=seeded(seed), dtype=torch.float64), 0.5, generator=seeded(seed))
    w = (w + 0.1 * mask * torch.randn(7, 5, generator=seeded(seed), dtype=torch.float64)).requires_grad_()
    (expected,) = torch.autograd.grad(sum(etf_loss(w, 0.3)), w)  # type: ignore[arg-type]
    torch.testing.assert_close(_etf_gradient(w.detach(), 0.3), expected)


def test_optimisation_is_adam_on_the_kept_entries() -> None:
    sparse, mask = sparsify(simplex_etf(4, 6, generator=seeded(), dtype=torch.float64), 0.4, generator=seeded())
    w = sparse.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=2e-3)
    for _ in range(60):
        adam.zero_grad()
        sum(etf_loss(w, 0.1)).backward()  # type: ignore[union-attr]
        w.grad *= mask  # type: ignore[operator]
        adam.step()
    torch.testing.assert_close(optimize_sparse_etf(sparse, mask, steps=60, lr=2e-3), w.detach(), atol=1e-10, rtol=1e-7)


def test_parallel_columns_give_no_infinite_gradient() -> None:
    w = torch.ones(3, 2, dtype=torch.float64)
    found = optimize_sparse_etf(w, torch.ones(3, 2, dtype=torch.bool), steps=20, lr=1e-2)
    assert found.isfinite().all()


# -- oracle 3: sparsity -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.6])
def test_kept_entries_are_counted_and_zeros_stay(sparsity: float) -> None:
    etf = simplex_etf(5, 8, generator=seeded())
    sparse, mask = sparsify(etf, sparsity, generator=seeded())
    assert int(mask.sum()) == 40 - int(sparsity * 40) and mask.dtype == torch.bool
    assert torch.equal(sparse, etf * mask)
    found = optimize_sparse_etf(sparse, mask, steps=30, lr=1e-3)
    assert not found[~mask].any() and found[mask].all() and found.dtype == torch.float32
    if sparsity:
        assert not torch.equal(sparsify(etf, sparsity, generator=seeded(1))[1], mask)


def test_an_empty_column_is_drawn_anew_or_refused() -> None:
    etf = simplex_etf(3, 3, generator=seeded())
    for seed in range(20):  # 4 of 9 entries are left: half of the draws leave a column empty
        assert sparsify(etf, 0.6, generator=seeded(seed))[1].any(0).all()
    with pytest.raises(ArgumentError, match="sparsity"):
        sparsify(etf, 0.9, generator=seeded())


def test_classifier() -> None:
    made = SSEClassifier(16, 4, steps=400, lr=5e-3, generator=seeded())
    assert made.weight.shape == made.mask.shape == (4, 16) and not list(made.parameters())
    assert set(made.state_dict()) == {"weight", "mask"}
    z = torch.randn(5, 16)
    torch.testing.assert_close(made(z), z @ made.weight.T)
    torch.testing.assert_close(made.weight.norm(dim=1), torch.full((4,), 0.1), atol=0.02, rtol=0)
    start, _ = sparsify(simplex_etf(4, 16, generator=seeded()), 0.6, generator=seeded())
    worst = lambda w: etf_loss(w.double(), 1.0)[1]  # noqa: E731
    assert worst(made.weight.T) < worst(start)  # angles have grown
    assert torch.equal(SSEClassifier(16, 4, steps=400, lr=5e-3, generator=seeded()).weight, made.weight)


# -- oracles 4 and 5: realignment -------------------------------------------------------------------------------------
def test_global_realignment_by_hand() -> None:
    w = torch.tensor([[3.0, 4], [0, 2]])
    torch.testing.assert_close(global_realign(w, 1.7), torch.tensor([[1.02, 1.36], [0, 1.7]]))
    assert global_realign(w, 0.3).norm(dim=1).tolist() == pytest.approx([0.3, 0.3])
    z = torch.randn(50, 2, generator=seeded())
    predictions = [(z @ global_realign(w, tau).T).argmax(1).tolist() for tau in (0.01, 1.7, 100.0)]
    assert predictions[0] == predictions[1] == predictions[2]
    assert not global_realign(torch.zeros(2, 2)).any()


def test_local_realignment_by_hand() -> None:
    found = local_realign(torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[1.0, 0], [6, 8]]))
    assert found.tolist() == [[3, 4], [0, 20]]


def test_local_logits_are_the_definition() -> None:
    generator = seeded()
    z, wg, wk = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (3, 5), (3, 5)))
    bg, bk = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    present = torch.tensor([True, False, True])
    found = local_logits(z, (wg, bg), (wk, bk), present)
    for i in range(6):
        for c in range(3):
            value = z[i] @ wg[c] * wk[c].norm() + bg[c] + z[i] @ wk[c] + bk[c] if present[c] else -math.inf
            assert float(found[i, c]) == pytest.approx(float(value), rel=1e-4, abs=1e-5)
    assert local_logits(z, (wg, bg), (wk, bk)).isfinite().all()
    compiled = torch.compile(local_logits, backend="aot_eager")
    torch.testing.assert_close(compiled(z, (wg, bg), (wk, bk), present), found)


# -- oracle 6: three steps --------------------------------------------------------------------------------------------
def configured(**settings: Any) -> tuple[FedLoGe, nn.Module]:
    method = FedLoGe(**{**FAST, **settings})
    return method, method.configure_model(toy_model(), 0)


def test_the_head_takes_the_classifiers_place() -> None:
    method, model = configured()
    head = model[4]
    assert isinstance(head, LoGeHead) and torch.equal(head.auxiliary.weight, toy_model()[4].weight)
    learned, rest = state_of(model)
    assert {"4.auxiliary.weight", "4.auxiliary.bias"} <= set(learned)
    assert not any("sse" in name for name in (*learned, *rest))  # never sent
    assert torch.equal(head.sse.weight, method.configure_model(toy_model(), 0)[4].sse.weight)
    assert not torch.equal(head.sse.weight, method.configure_model(toy_model(), 1)[4].sse.weight)
    x = toy_clients()[0].inputs
    model.eval()
    torch.testing.assert_close(model(x), model[:4](x) @ head.sse.weight.T)


def test_larger_rows_are_scaled_and_their_angles_kept() -> None:
    small, large = configured(norm=0.1)[1][4].sse.weight, configured(norm=3.0)[1][4].sse.weight
    torch.testing.assert_close(F.normalize(large), F.normalize(small))
    assert large.norm(dim=1).mean().item() == pytest.approx(3.0)
    none = configured(norm=2.0, etf_steps=0)[1][4].sse.weight
    assert none.norm(dim=1).mean().item() == pytest.approx(2.0)


def test_a_head_without_bias_gets_one() -> None:
    model = FedLoGe(**FAST).configure_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=False)), 0)
    assert model[1].auxiliary.bias is not None and not model[1].auxiliary.bias.any()


def test_one_loss_moves_what_it_may() -> None:
    _, model = configured()
    head, data = model[4], toy_clients()[0]
    F.cross_entropy(model(data.inputs), data.targets).backward()
    assert head.auxiliary.weight.grad is None and head.auxiliary.bias.grad is None
    assert all(p.grad is not None for p in (model[0].weight, model[1].weight))
    assert head.sse.weight.grad is None and not head.sse.weight.requires_grad
    model.zero_grad(set_to_none=True)
    F.cross_entropy(head.auxiliary(head.features), data.targets).backward()
    assert head.auxiliary.weight.grad is not None and model[0].weight.grad is None


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_client_update_is_three_optimizers_on_the_same_features(momentum: float) -> None:
    method, model = configured()
    local = LocalTraining(lr=0.1, momentum=momentum, epochs=2, batch_size=7, clip_norm=None, weight_decay=0.01)
    params, buffers = state_of(model)
    own = {"weight": torch.randn(3, 8, generator=seeded(4)), "bias": torch.zeros(3)}
    twin = copy.deepcopy(model).train()
    client = Client(0, model, toy_clients()[0], state={HEAD: dict(own)}, local=local, round=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        update = method.client_update(client, Sent(params, buffers, round=1))

    private = nn.Linear(8, 3)
    private.load_state_dict(own)
    auxiliary = twin[4].auxiliary
    backbone = [p for name, p in twin.named_parameters() if "auxiliary" not in name]
    sgd = [
        torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=0.01)
        for p in (backbone, auxiliary.parameters(), private.parameters())
    ]
    again = Client(0, twin, toy_clients()[0], local=local, round=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in again.batches():
            z = twin[:4](batch.inputs)
            heads = [lambda z=z: z @ twin[4].sse.weight.T, lambda z=z: auxiliary(z.detach())]
            heads.append(lambda z=z: private(z.detach()))
            for optimizer, head in zip(sgd, heads, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(head(), batch.targets).backward()
                optimizer.step()
    expected = dict(twin.named_parameters())
    assert update.params.keys() == params.keys() and update.num_steps == 8 and update.num_examples == 24
    for name, tensor in update.params.items():
        torch.testing.assert_close(tensor, expected[name].detach(), msg=name)
    for name, tensor in client.state[HEAD].items():
        torch.testing.assert_close(tensor, getattr(private, name).detach())
    assert math.isfinite(update.metrics["loss"])
    assert set(update.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_one_client_averages_to_itself() -> None:
    method, model = configured()
    params, buffers = state_of(model)
    update = Update({k: v + 1 for k, v in params.items()}, 5, 1, buffers)
    server = Server(model, params, buffers)
    method.aggregate(server, [update])
    assert same(server.params, update.params)


# -- oracle 7: personal predictions -----------------------------------------------------------------------------------
def test_a_client_of_one_class_predicts_it_always() -> None:
    method, model = configured()
    params, buffers = state_of(model)
    everything = toy_clients()[1]
    one = everything.subset(everything.targets == 1)
    client = Client(0, model, one, test=everything, local=LocalTraining(batch_size=8, least_batch=2))
    for _ in range(2):  # before and after it has a head of its own
        logits, targets = method.personal_logits(client, everything)
        assert (logits.argmax(1) == 1).all() and torch.equal(targets, everything.targets)
        assert method.evaluate(client, Sent(params, buffers))["accuracy"] == pytest.approx(
            float((targets == 1).float().mean())
        )
        method.client_update(client, Sent(params, buffers))


def test_a_client_never_drawn_uses_the_global_head() -> None:
    method, model = configured()
    data = toy_clients()[0]
    client = Client(0, model, data)
    logits, _ = method.personal_logits(client, data)
    features = model.eval()[:4](data.inputs)
    torch.testing.assert_close(logits, model[4].auxiliary(features).detach())
    weight, bias = torch.randn(3, 8), torch.randn(3)
    client.state[HEAD] = {"weight": weight, "bias": bias}
    logits, _ = method.personal_logits(client, data)
    auxiliary = model[4].auxiliary
    expected = local_logits(features, (auxiliary.weight, auxiliary.bias), (weight, bias))
    torch.testing.assert_close(logits, expected.detach())


def test_presence_is_read_from_the_training_labels() -> None:
    data = toy_clients()[0]
    client = Client(0, toy_model(), data.subset(data.targets != 1), test=data)
    assert present_classes(client, 3).tolist() == [True, False, True]

    class Lazy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            return torch.zeros(6), torch.tensor([2, 2, 0][i])

    assert present_classes(Client(0, toy_model(), Lazy()), 3).tolist() == [True, False, True]


# -- a whole run ------------------------------------------------------------------------------------------------------
def test_run_in_process() -> None:
    pytest.importorskip("flwr")
    from equipoise.federated.simulation import simulate

    clients = [(data, data) for data in toy_clients()]
    settings = {"local": LocalTraining(batch_size=8, epochs=2), "evaluate_clients": 6, "fraction": 0.5}
    run = simulate(FedLoGe(etf_steps=500, norm=3.0), toy_model(), clients, 6, **settings)
    assert not run.faults and set(run.params) == set(state_of(run.model)[0])
    assert all(metrics["accuracy"] >= 0.6 for metrics in run.client_metrics.values())
    assert "4.sse.weight" in run.model.state_dict()  # complete, once clients no longer train
    realigned = run.results["realigned"].eval()
    model = run.model.eval()
    x = clients[0][0].inputs
    features = model[:4](x)
    weight, bias = run.params["4.auxiliary.weight"], run.params["4.auxiliary.bias"]
    torch.testing.assert_close(realigned(x), F.linear(features, global_realign(weight, 1.7), bias))
    torch.testing.assert_close(model(x), features @ model[4].sse.weight.T)
    again = simulate(FedLoGe(etf_steps=500, norm=3.0), toy_model(), clients, 6, **settings)
    assert same(again.params, run.params)


def test_heads_stay_on_their_clients_and_only_backbone_and_global_head_are_sent() -> None:
    pytest.importorskip("flwr")
    from equipoise.federated.params import size
    from equipoise.federated.simulation import simulate

    seen: list[set[str]] = []

    def look(message: Any, context: Any, call: Any) -> Any:
        reply = call(message, context)
        if message.metadata.message_type == "train":
            seen.append(set(reply.content.array_records))
            assert HEAD in context.state.array_records
            names = set(reply.content["arrays"])
            assert not any("sse" in name for name in names) and "4.auxiliary.weight" in names
        return reply

    run = simulate(FedLoGe(**FAST), toy_model(), toy_clients(), 1, mods=[look], local=LocalTraining(batch_size=8))
    assert seen == [{"arrays"}] * 4
    assert size(run.params) < size(state_of(toy_model())[0]) + 16


# -- bad input --------------------------------------------------------------------------------------------------------
W, B = torch.ones(3, 4), torch.ones(3)
ALL = torch.ones(4, 3, dtype=torch.bool)


def linear_only() -> Params:
    return state_of(FedLoGe(**FAST).configure_model(nn.Linear(6, 3), 0))[0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: simplex_etf(1, 4), "num_classes"),
        (lambda: simplex_etf(5, 4), "feat_dim"),
        (lambda: SSEClassifier(4, 5), "feat_dim"),
        (lambda: sparsify(W.T, 1.0), "sparsity"),
        (lambda: sparsify(W.T, -0.1), "sparsity"),
        (lambda: sparsify(W.T, 0.99), "without an entry"),
        (lambda: sparsify(B), "etf"),
        (lambda: optimize_sparse_etf(W.T, ALL.T), "mask"),
        (lambda: optimize_sparse_etf(W.T, ALL.float()), "mask"),
        (lambda: optimize_sparse_etf(W.T, torch.zeros_like(ALL)), "no kept entry"),
        (lambda: optimize_sparse_etf(W.T, ALL, norm=0.0), "norm"),
        (lambda: optimize_sparse_etf(W.T, ALL, lr=0.0), "lr"),
        (lambda: optimize_sparse_etf(W.T, ALL, steps=-1), "steps"),
        (lambda: global_realign(W, 0.0), "tau"),
        (lambda: global_realign(B), "weight"),
        (lambda: local_realign(W, W.T), "local_weight"),
        (lambda: local_logits(torch.ones(2, 5), (W, B), (W, B)), "features"),
        (lambda: local_logits(torch.ones(2, 4), (W, B[:2]), (W, B)), "global_head"),
        (lambda: local_logits(torch.ones(2, 4), (W, B), (W, B[:2])), "local_head"),
        (lambda: local_logits(torch.ones(2, 4), (W, B), (W.T, B)), "local_weight"),
        (lambda: local_logits(torch.ones(2, 4), (W, B), (W, B), torch.zeros(3, dtype=torch.bool)), "present"),
        (lambda: local_logits(torch.ones(2, 4), (W, B), (W, B), torch.ones(2, dtype=torch.bool)), "present"),
        (lambda: FedLoGe(sparsity=1.0), "sparsity"),
        (lambda: FedLoGe(norm=0.0), "norm"),
        (lambda: FedLoGe(etf_steps=-1), "etf_steps"),
        (lambda: FedLoGe(tau=0.0), "tau"),
        (lambda: FedLoGe(classifier="1").configure_model(toy_model(), 0), "classifier"),
        (lambda: FedLoGe().configure_model(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3)), 0), "feat_dim"),
        (linear_only, "one linear layer"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_a_client_without_a_large_enough_batch() -> None:
    method, model = configured()
    client = Client(
        0, model, Examples(torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64)), local=LocalTraining(least_batch=8)
    )
    with pytest.raises(ArgumentError, match="least_batch"):
        method.client_update(client, Sent(*state_of(model)))


def test_settings_and_space() -> None:
    assert FedLoGe.name == "fedloge" and FedLoGe.paper is not None and set(FedLoGe.space) <= set(FedLoGe().settings())
    for key, dimension in FedLoGe.space.items():
        for u in (0.0, 0.5, 0.999):
            FedLoGe(**{key: dimension.at(u)})
