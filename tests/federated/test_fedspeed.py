"""FedSpeed and its baselines against the paper's formulas, numbers by hand, and loops in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from federation import toy_clients, toy_model
from torch import Tensor, nn

from equipoise.errors import ArgumentError
from equipoise.federated.algorithm import Client, FederatedMethod, LocalTraining, Sent, Server, Update
from equipoise.federated.fedspeed import (
    SCAFFOLD,
    FedAvg,
    FedProx,
    FedSAM,
    FedSpeed,
    fedavg_aggregate,
    fedavg_step,
    fedprox_step,
    fedsam_step,
    fedspeed_aggregate,
    fedspeed_dual,
    fedspeed_step,
    sam_gradient,
    scaffold_control,
    scaffold_step,
)
from equipoise.federated.params import GradFn, Params, minus, plus, state_of, zeros

torch.set_num_threads(1)
RATE = {"lr": 0.1}


def scalar(value: float) -> Params:
    return {"x": torch.tensor([value], dtype=torch.float64)}


def parabola(curvature: float, centre: float) -> GradFn:
    return lambda params: {"x": curvature * (params["x"] - centre)}


def vectors(seed: int, *shapes: tuple[int, ...]) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(shapes)}


SHAPES = ((3, 2), (4,), ())


def bumpy(params: Params) -> Params:
    """The gradient of a smooth function that is not quadratic, by autograd."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    joint = torch.cat([v.reshape(-1) for v in leaves.values()])
    value = joint.sin().sum() + (joint**2).sum() * joint[0].cos() + joint.prod()
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


# -- oracle 1: one step -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("anchor", "settings", "expected"),
    [
        (1.0, {"rho": 0.0}, 1.390000),
        (0.8, {"rho": 0.1}, 1.406000),
        (0.8, {"rho": 0.1, "alpha": 0.5, "weight_decay": 0.01}, 1.395000),
    ],
)
def test_one_step_by_hand(anchor: float, settings: dict[str, float], expected: float) -> None:
    found = fedspeed_step(
        scalar(1.0), parabola(2.0, 3.0), anchor=scalar(anchor), dual=scalar(0.5), lr=0.1, prox=0.2, **settings
    )
    assert found["x"].item() == pytest.approx(expected, abs=1e-6)


# -- oracle 2: two clients, trajectories and limits -------------------------------------------------------------------
CLIENTS = [parabola(1.0, 0.0), parabola(2.0, 3.0)]
STEPS, PULL = 5, 0.5


def fedspeed_rounds(rounds: int) -> tuple[list[float], list[Params]]:
    x, duals, seen = scalar(1.0), [scalar(0.0), scalar(0.0)], []
    for _ in range(rounds):
        locals_ = []
        for i, grad_fn in enumerate(CLIENTS):
            w = x
            for _ in range(STEPS):
                w = fedspeed_step(w, grad_fn, anchor=x, dual=duals[i], prox=PULL, rho=0.0, **RATE)
            duals[i] = fedspeed_dual(duals[i], w, x)
            locals_.append(w)
        x = fedspeed_aggregate(locals_, fedavg_aggregate(duals))
        seen.append(x["x"].item())
    return seen, duals


def averaging_rounds(rounds: int, step: Callable[[Params, GradFn, Params], Params]) -> list[float]:
    x, seen = scalar(1.0), []
    for _ in range(rounds):
        locals_ = []
        for grad_fn in CLIENTS:
            w = x
            for _ in range(STEPS):
                w = step(w, grad_fn, x)
            locals_.append(w)
        x = fedavg_aggregate(locals_)
        seen.append(x["x"].item())
    return seen


def scaffold_rounds(rounds: int) -> tuple[list[float], list[float]]:
    x, ours, own, seen = scalar(1.0), scalar(0.0), [scalar(0.0), scalar(0.0)], []
    for _ in range(rounds):
        locals_, changes = [], []
        for i, grad_fn in enumerate(CLIENTS):
            w = x
            for _ in range(STEPS):
                w = scaffold_step(w, grad_fn, client_control=own[i], server_control=ours, **RATE)
            new = scaffold_control(own[i], ours, w, x, num_steps=STEPS, lr=0.1)
            changes.append(minus(new, own[i]))
            own[i] = new
            locals_.append(w)
        x = fedavg_aggregate(locals_)
        ours = plus(ours, fedavg_aggregate(changes))
        seen.append(x["x"].item())
    return seen, [control["x"].item() for control in own]


def test_fedspeed_reaches_the_common_minimum() -> None:
    seen, duals = fedspeed_rounds(300)
    assert seen[:3] == pytest.approx([1.849449, 2.172922, 2.164179], abs=1e-6)
    assert seen[-1] == pytest.approx(2.0, abs=1e-9)
    assert [dual["x"].item() for dual in duals] == pytest.approx([-4.0, 4.0], abs=1e-8)


def test_fedavg_is_biased() -> None:
    seen = averaging_rounds(300, lambda w, g, x: fedavg_step(w, g, **RATE))
    assert seen[:3] == pytest.approx([1.467565, 1.682217, 1.780761], abs=1e-6)
    share = [1 - (1 - 0.1 * a) ** STEPS for a in (1, 2)]
    assert seen[-1] == pytest.approx(3 * share[1] / sum(share), abs=1e-9) == pytest.approx(1.864396, abs=1e-6)


def test_fedprox_is_biased_too() -> None:
    seen = averaging_rounds(300, lambda w, g, x: fedprox_step(w, g, anchor=x, mu=PULL, **RATE))
    assert seen[:3] == pytest.approx([1.424725, 1.641118, 1.751368], abs=1e-6)
    assert seen[-1] == pytest.approx(1.865884, abs=1e-6)


def test_scaffold_reaches_the_common_minimum() -> None:
    seen, own = scaffold_rounds(300)
    assert seen[:3] == pytest.approx([1.467565, 1.746551, 1.886484], abs=1e-6)
    assert seen[-1] == pytest.approx(2.0, abs=1e-9)
    assert own == pytest.approx([2.0, -2.0], abs=1e-8)


# -- oracle 3: limits -------------------------------------------------------------------------------------------------
def test_limits() -> None:
    w, x, h = (vectors(seed, *SHAPES) for seed in (1, 2, 3))
    nothing = zeros(w)
    common = {"lr": 0.1, "weight_decay": 0.01, "clip_norm": 0.7}

    def same(a: Params, b: Params) -> None:
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-14)

    same(
        fedspeed_step(w, bumpy, anchor=x, dual=nothing, prox=0.0, rho=0.2, **common),
        fedsam_step(w, bumpy, rho=0.2, **common),
    )
    same(fedspeed_step(w, bumpy, anchor=x, dual=nothing, prox=0.0, rho=0.0, **common), fedavg_step(w, bumpy, **common))
    same(
        fedspeed_step(w, bumpy, anchor=x, dual=nothing, prox=0.3, rho=0.0, **common),
        fedprox_step(w, bumpy, anchor=x, mu=0.3, **common),
    )
    same(
        fedspeed_step(w, bumpy, anchor=x, dual=h, prox=0.3, rho=0.2, alpha=0.0, **common),
        fedspeed_step(w, bumpy, anchor=x, dual=h, prox=0.3, rho=0.0, **common),
    )
    same(scaffold_step(w, bumpy, client_control=h, server_control=h, **common), fedavg_step(w, bumpy, **common))


def test_step_against_a_loop_over_numbers() -> None:
    w, x, h = (vectors(seed, *SHAPES) for seed in (1, 2, 3))
    lr, prox, rho, alpha, decay, clip = 0.1, 0.3, 0.2, 0.7, 0.05, 0.9

    def flat(params: Params) -> list[float]:
        return torch.cat([v.reshape(-1) for v in params.values()]).tolist()

    def shaped(numbers: list[float]) -> Params:
        left = iter(numbers)
        return {
            k: torch.tensor([next(left) for _ in range(v.numel())], dtype=v.dtype).reshape(v.shape)
            for k, v in w.items()
        }

    g1 = flat(bumpy(w))
    length = math.sqrt(sum(g * g for g in g1)) + 1e-7
    g2 = flat(bumpy(shaped([a + rho * g / length for a, g in zip(flat(w), g1, strict=True)])))
    q = [
        (1 - alpha) * a + alpha * b + prox * (c - d + e)
        for a, b, c, d, e in zip(g1, g2, flat(w), flat(x), flat(h), strict=True)
    ]
    scale = min(1.0, clip / (math.sqrt(sum(v * v for v in q)) + 1e-6))
    expected = [a - lr * (v * scale + decay * a) for a, v in zip(flat(w), q, strict=True)]
    found = fedspeed_step(
        w, bumpy, anchor=x, dual=h, lr=lr, prox=prox, rho=rho, alpha=alpha, weight_decay=decay, clip_norm=clip
    )
    assert flat(found) == pytest.approx(expected, abs=1e-12)


# -- oracle 4 and 5: stationary points, sums --------------------------------------------------------------------------
def test_stationary_points_are_kept() -> None:
    x, h = scalar(2.0), scalar(-3.0)
    grad_fn: GradFn = lambda params: {"x": 0.5 * params["x"] - 1.0 + 1.5}  # noqa: E731  # grad = 1.5 at 2: prox (0 + h) = -1.5
    w = x
    for _ in range(5):
        w = fedspeed_step(w, grad_fn, anchor=x, dual=h, lr=0.1, prox=0.5, rho=0.0)
    assert torch.equal(w["x"], x["x"])
    assert torch.equal(fedspeed_dual(h, w, x)["x"], h["x"])
    assert torch.equal(fedspeed_aggregate([w], zeros(h))["x"], x["x"])


class Loop:
    """The rounds without Flower: every client in turn, messages as function calls."""

    def __init__(
        self, method: FederatedMethod, local: LocalTraining, draw: Callable[[int], list[int]] | None = None
    ) -> None:
        self.method, self.data = method, toy_clients()
        self.states: list[dict[str, Params]] = [{} for _ in self.data]
        params, buffers = state_of(toy_model())
        sizes = {i: len(data) for i, data in enumerate(self.data)}
        self.server = Server(toy_model(), params, buffers, local=local, clients=sizes)
        self.draw = draw or (lambda round: list(range(len(self.data))))
        method.prepare(self.server)

    def round(self) -> list[Update]:
        server = self.server
        server.round += 1
        sent, updates = server.sent(), []
        for number in self.draw(server.round):
            model = server.load()
            client = Client(
                number,
                model,
                self.data[number],
                state=self.states[number],
                local=server.local.at(server.round),
                round=server.round,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                updates.append(self.method.client_update(client, sent))
        self.method.aggregate(server, updates)
        return updates


def test_the_server_keeps_the_sum_of_all_duals() -> None:
    loop = Loop(FedSpeed(), LocalTraining(batch_size=8), draw=lambda round: [0, 2] if round % 2 else [1, 2])
    for _ in range(4):
        loop.round()
    kept = [state["fedspeed-dual"] for state in loop.states if state]
    assert len(kept) == 3  # client 3 was never drawn, and counts as 0 of m = 4
    total = loop.server.state["fedspeed-dual-sum"]
    for key in total:
        torch.testing.assert_close(sum(dual[key] for dual in kept), total[key], rtol=1e-5, atol=1e-7)


def test_the_sum_is_exact_in_the_same_order() -> None:
    generator = torch.Generator().manual_seed(0)
    drifts = [torch.randn(1000, generator=generator) for _ in range(6)]
    server = Server(nn.Linear(1, 1), {"x": torch.zeros(1000)}, {}, clients=dict.fromkeys(range(6), 1))
    own = [{"x": torch.zeros(1000)} for _ in range(6)]
    total = torch.zeros(1000)
    anchor = server.params
    for i, drift in enumerate(drifts):
        own[i] = fedspeed_dual(own[i], {"x": drift}, anchor)
        total = total + own[i]["x"]
    FedSpeed().aggregate(server, [Update({"x": drift}, 1, 1) for drift in drifts])
    assert torch.equal(server.state["fedspeed-dual-sum"]["x"], total)


# -- the methods use these functions ----------------------------------------------------------------------------------
def test_method_is_the_functions_step_by_step() -> None:
    """One client's round of FedSpeed, and the server's step, written out with the functions of this module."""
    local = LocalTraining(lr=0.2, epochs=2, batch_size=7, weight_decay=0.01, clip_norm=None)
    loop = Loop(FedSpeed(prox=0.3, rho=0.2, alpha=0.6, clip_norm=0.5), local, draw=lambda round: [1, 3])
    first = loop.round()
    x, before = loop.server.params, {k: dict(v) for k, v in loop.states[1].items()}
    total = loop.server.state["fedspeed-dual-sum"]
    second = loop.round()

    model = toy_model()
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({**x, **loop.method.mean_buffers(first)})
    client = Client(1, model, loop.data[1], local=local, round=2)
    w = {name: x[name].clone() for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for batch in client.batches():
            grad_fn = client.grad_fn(batch)
            w = fedspeed_step(
                w,
                grad_fn,
                anchor=x,
                dual=before["fedspeed-dual"],
                lr=0.2,
                prox=0.3,
                rho=0.2,
                alpha=0.6,
                weight_decay=0.01,
                clip_norm=0.5,
            )
    for name in names:
        torch.testing.assert_close(w[name], second[0].params[name])
    for update in second:
        total = fedspeed_dual(total, update.params, x)
    mean = {name: tensor / 4 for name, tensor in total.items()}
    expected = fedspeed_aggregate([update.params for update in second], mean)
    for name in names:
        torch.testing.assert_close(loop.server.params[name], expected[name])


def run(method: FederatedMethod, rounds: int = 3, **local: float) -> Params:
    loop = Loop(method, LocalTraining(**{"batch_size": 8, "epochs": 2, **local}))  # type: ignore[arg-type]
    for _ in range(rounds):
        loop.round()
    return loop.server.params


@pytest.mark.parametrize(
    ("method", "like"),
    [
        (FedProx(mu=0.0), FedAvg()),
        (FedSAM(rho=0.0), FedAvg()),
        (FedSpeed(prox=0.0, rho=0.0), FedAvg(weighted=False)),
        (FedSpeed(prox=0.0, rho=0.2), FedSAM(rho=0.2, weighted=False)),
        (FedSpeed(prox=0.2, rho=0.1, alpha=0.0), FedSpeed(prox=0.2, rho=0.0)),
    ],
)
def test_neutral_settings(method: FederatedMethod, like: FederatedMethod) -> None:
    mine, theirs = run(method), run(like)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_settings_change_what_is_learned() -> None:
    base = run(FedAvg())
    for method in (FedProx(), FedSAM(), FedSpeed(), SCAFFOLD(), FedSpeed(correction="active")):
        other = run(method)
        assert any(not torch.equal(other[key], base[key]) for key in base)


def test_all_clients_drawn_make_both_corrections_one() -> None:
    mine, theirs = run(FedSpeed(correction="all")), run(FedSpeed(correction="active"))
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-6)


def test_scaffold_controls_add_up() -> None:
    """The server's control is the mean of all clients', though they send none of it."""
    loop = Loop(
        SCAFFOLD(),
        LocalTraining(lr=0.05, batch_size=8, lr_decay=0.9),
        draw=lambda round: [0, 2] if round % 2 else [1, 2],
    )
    for _ in range(4):
        updates = loop.round()
        assert not any(update.extras for update in updates)
    kept = [state["scaffold-control"] for state in loop.states if state]
    for key, control in loop.server.extras["scaffold-control"].items():
        torch.testing.assert_close(sum(own[key] for own in kept) / 4, control, rtol=1e-4, atol=1e-5)


def test_scaffold_with_one_client_is_fedavg_but_for_rounding() -> None:
    one = Loop(SCAFFOLD(), LocalTraining(batch_size=8, clip_norm=None))
    one.server.clients = {0: 24}
    one.draw = lambda round: [0]
    two = Loop(FedAvg(), LocalTraining(batch_size=8, clip_norm=None), draw=lambda round: [0])
    for _ in range(3):
        one.round(), two.round()
    for key, tensor in two.server.params.items():
        torch.testing.assert_close(one.server.params[key], tensor, rtol=1e-4, atol=1e-5)


def test_scaffold_refuses_momentum() -> None:
    with pytest.raises(ArgumentError, match="Use momentum = 0"):
        Loop(SCAFFOLD(), LocalTraining(momentum=0.9))


# -- gradients on one minibatch ---------------------------------------------------------------------------------------
def test_both_gradients_see_one_minibatch_one_mask_and_update_statistics_once() -> None:
    model = toy_model()
    client = Client(0, model, toy_clients()[0], local=LocalTraining(batch_size=8))
    batch = next(client.batches())
    grad_fn = client.grad_fn(batch)
    start = model.state_dict()["1.running_mean"].clone()
    first = grad_fn(client.params)
    once = model.state_dict()["1.running_mean"].clone()
    again = grad_fn(client.params)
    assert all(torch.equal(first[key], again[key]) for key in first)  # the same dropout mask
    assert not torch.equal(start, once)
    assert torch.equal(once, model.state_dict()["1.running_mean"])
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1
    fresh = client.grad_fn(batch)(client.params)
    assert any(not torch.equal(first[key], fresh[key]) for key in first)  # another minibatch draws another mask


def test_the_training_loss_is_that_of_the_first_gradients() -> None:
    model = nn.Linear(6, 3)  # no statistics, no dropout
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    client = Client(0, model, toy_clients()[0], local=LocalTraining(lr=1e-9, batch_size=8))
    update = FedSpeed(rho=0.5).client_update(client, Sent(client.params, {}))
    assert update.metrics["loss"] == pytest.approx(math.log(3), abs=1e-5)


def test_zero_gradient_is_no_nan() -> None:
    found = sam_gradient(scalar(3.0), parabola(2.0, 3.0), rho=0.1)
    assert found["x"].item() == 0.0
    step = fedspeed_step(scalar(3.0), parabola(2.0, 3.0), anchor=scalar(3.0), dual=scalar(0.0), lr=0.1, clip_norm=1.0)
    assert step["x"].item() == 3.0


def test_sam_calls_the_gradient_once_without_radius() -> None:
    calls = []

    def counted(params: Params) -> Params:
        calls.append(1)
        return bumpy(params)

    sam_gradient(vectors(1, *SHAPES), counted, rho=0.0)
    assert len(calls) == 1
    sam_gradient(vectors(1, *SHAPES), counted, rho=0.1, alpha=0.0)
    assert len(calls) == 2
    sam_gradient(vectors(1, *SHAPES), counted, rho=0.1)
    assert len(calls) == 4


def test_the_ascent_norm_is_over_all_parameters_jointly() -> None:
    asked: list[Params] = []

    def seen(params: Params) -> Params:
        asked.append(params)
        return {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}

    sam_gradient({"a": torch.zeros(1), "b": torch.zeros(1)}, seen, rho=0.5)
    assert asked[1]["a"].item() == pytest.approx(0.3, abs=1e-6) and asked[1]["b"].item() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    w, x, h = (vectors(seed, (3, 2), (4,)) for seed in (1, 2, 3))
    exact = fedspeed_step(w, lambda p: {k: v.sin() for k, v in p.items()}, anchor=x, dual=h, lr=0.1, clip_norm=2.0)
    half = [{k: v.to(dtype) for k, v in p.items()} for p in (w, x, h)]
    found = fedspeed_step(
        half[0], lambda p: {k: v.sin() for k, v in p.items()}, anchor=half[1], dual=half[2], lr=0.1, clip_norm=2.0
    )
    for key in exact:
        assert found[key].dtype == dtype
        torch.testing.assert_close(found[key].double(), exact[key], rtol=2e-2, atol=2e-2)


# -- bad input --------------------------------------------------------------------------------------------------------
def bad_step(**settings: float) -> Params:
    given = {"lr": 0.1, **settings}
    return fedspeed_step(scalar(1.0), parabola(1, 0), anchor=scalar(1.0), dual=scalar(0.0), **given)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bad_step(prox=-0.1), "prox"),
        (lambda: bad_step(rho=-0.1), "rho"),
        (lambda: bad_step(alpha=1.1), "alpha"),
        (lambda: bad_step(lr=0.0), "lr"),
        (lambda: bad_step(clip_norm=0.0), "clip_norm"),
        (lambda: fedprox_step(scalar(1), parabola(1, 0), anchor=scalar(1), lr=0.1, mu=-1), "mu"),
        (lambda: scaffold_control(scalar(0), scalar(0), scalar(1), scalar(0), num_steps=0, lr=0.1), "num_steps"),
        (lambda: scaffold_control(scalar(0), scalar(0), scalar(1), scalar(0), num_steps=1, lr=0.0), "lr"),
        (lambda: fedavg_aggregate([]), "nothing to average"),
        (lambda: fedavg_aggregate([scalar(1)], [0.0]), "weights"),
        (lambda: fedavg_aggregate([scalar(1), scalar(2)], [1.0, -1.0]), "weights"),
        (lambda: fedavg_aggregate([scalar(1), {"y": torch.zeros(1)}]), "names of the parameters differ"),
        (lambda: fedavg_aggregate([scalar(1), {"x": torch.zeros(2)}]), "shape"),
        (lambda: fedspeed_dual(scalar(1), {"x": torch.zeros(2)}, scalar(1)), "shape"),
        (lambda: FedSpeed(prox=-1), "prox"),
        (lambda: FedSpeed(rho=-1), "rho"),
        (lambda: FedSpeed(alpha=2), "alpha"),
        (lambda: FedSpeed(correction="some"), "correction"),
        (lambda: FedSpeed(clip_norm=0), "clip_norm"),
        (lambda: FedProx(mu=-1), "mu"),
        (lambda: FedSAM(rho=-1), "rho"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_fit_refuses_a_federated_method() -> None:
    import equipoise

    with pytest.raises(ArgumentError, match="trains on clients"):
        equipoise.fit(nn.Linear(6, 3), toy_clients()[0], epochs=1, methods=[FedAvg()])


def test_settings_and_spaces() -> None:
    for cls in (FedSpeed, FedAvg, FedProx, FedSAM, SCAFFOLD):
        method = cls()
        assert set(cls.space) <= set(method.settings())
        assert cls.paper is not None and cls.name
        for key, dimension in cls.space.items():
            for u in (0.0, 0.5, 0.999):
                cls(**{key: dimension.at(u)})


def tensor_sum(params: Params) -> Tensor:
    return torch.stack([tensor.sum() for tensor in params.values()]).sum()


def test_a_client_without_the_round_has_no_state() -> None:
    loop = Loop(FedSpeed(), LocalTraining(batch_size=8), draw=lambda round: [0])
    loop.round()
    assert [bool(state) for state in loop.states] == [True, False, False, False]
    sent = Sent(loop.server.params, loop.server.buffers)
    assert sent.extras == {}
    assert torch.isfinite(tensor_sum(loop.server.params))
