"""The Flower apps in one process: the rounds, the faults of clients, restarts, and what is sent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import changed, mod, same, spoil, toy_clients, toy_model
from torch import nn

from equipoise.errors import ArgumentError, CheckpointError, DataError, MethodConflictError
from equipoise.federated.algorithm import Client, FederatedMethod, LocalTraining, Sent, Server, Update
from equipoise.federated.fedspeed import SCAFFOLD, FedAvg, FedProx, FedSAM, FedSpeed
from equipoise.federated.fedtiny import MagnitudeMask
from equipoise.federated.params import Params, state_of
from equipoise.training import Examples, Method
from equipoise.training.assemble import derived_seed

pytest.importorskip("flwr")

from equipoise.federated.simulation import FederatedRun, simulate
from equipoise.integrations import flower

torch.set_num_threads(1)
LOCAL = LocalTraining(lr=0.1, batch_size=8, epochs=2)
ALL = [FedAvg(), FedProx(), FedSAM(), SCAFFOLD(), FedSpeed(), FedSpeed(correction="active")]
STATEFUL = [FedSpeed(), SCAFFOLD()]
identify = lambda method: type(method).__name__ + getattr(method, "correction", "")  # noqa: E731


def run(method: Any, rounds: int = 3, **options: Any) -> FederatedRun:
    return simulate(method, toy_model, toy_clients(), rounds, **{"local": LOCAL, **options})


def state(found: FederatedRun) -> Params:
    return {**found.server.params, **found.server.buffers}


# -- the rounds -------------------------------------------------------------------------------------------------------
def by_hand(method: FederatedMethod, rounds: int, draw: Callable[[int], list[int]]) -> Params:
    """The same rounds as a loop, without Flower."""
    data, states = toy_clients(), [{} for _ in range(4)]
    params, buffers = state_of(toy_model())
    sizes = {i: len(d) for i, d in enumerate(data)}
    server = Server(toy_model(), params, buffers, local=LOCAL, rounds=rounds, clients=sizes)
    method.prepare(server)
    for round in range(1, rounds + 1):
        server.round = round
        sent, updates = server.sent(), []
        if not draw(round):
            continue
        for number in draw(round):
            client = Client(
                number, server.load(), data[number], state=states[number], local=LOCAL.at(round), round=round
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derived_seed(0, f"global, client {number}, round {round}"))
                updates.append(method.client_update(client, sent))
        method.aggregate(server, updates)
    return {**server.params, **server.buffers}


@pytest.mark.parametrize("method", ALL, ids=identify)
def test_apps_do_what_the_loop_does(method: FederatedMethod) -> None:
    found = run(method)
    assert same(state(found), by_hand(method, 3, lambda round: [0, 1, 2, 3]))
    assert found.faults == [] and [record["clients"] for record in found.history] == [[0, 1, 2, 3]] * 3
    loaded = found.model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state(found).items())


def test_drawn_clients_follow_from_the_seed() -> None:
    found = run(FedSpeed(), rounds=4, fraction=0.5)
    drawn = {record["round"]: record["clients"] for record in found.history}
    assert all(len(clients) == 2 for clients in drawn.values()) and len(set(map(tuple, drawn.values()))) > 1
    assert same(state(found), by_hand(FedSpeed(), 4, lambda round: drawn[round]))
    assert [r["clients"] for r in run(FedAvg(), rounds=4, fraction=0.5).history] == list(drawn.values())
    assert [r["clients"] for r in run(FedAvg(), rounds=4, fraction=0.5, seed=1).history] != list(drawn.values())


def test_a_run_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(FedAvg(), rounds=1)
    assert torch.equal(before, torch.get_rng_state())


def test_integer_buffers_are_averaged_and_come_back_as_integers() -> None:
    found = run(FedAvg())
    counter = found.server.buffers["1.num_batches_tracked"]
    # Steps of a round: 2 epochs of ceil(n / 8) batches, n = 24 to 30; the mean is weighted by n.
    sizes = [24, 26, 28, 30]
    steps = [2 * -(-n // 8) for n in sizes]
    mean = sum(n * s for n, s in zip(sizes, steps, strict=True)) / sum(sizes)
    assert counter.dtype == torch.int64 and abs(int(counter) - 3 * mean) <= 1.5


class Counting(nn.Module):
    """A linear layer that counts its rows in a buffer of whole numbers."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("rows", torch.tensor(0), persistent=persistent)
        self.register_buffer("order", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.layer(x[:, :6]) + 0 * self.rows


def test_a_model_that_counts_is_refused_unless_the_count_stays_with_the_client() -> None:
    with pytest.raises(
        ArgumentError, match=r"buffer 'rows' \(torch.int64\) in training: clients' whole numbers have no mean"
    ):
        simulate(FedAvg(), Counting(True), toy_clients(), 1, local=LOCAL)
    counts: list[int] = []

    class Look(FedAvg):
        def client_update(self, client: Client, sent: Sent) -> Update:
            update = super().client_update(client, sent)
            counts.append(int(client.model.rows))  # type: ignore[operator,arg-type]
            return update

    found = simulate(Look(), Counting(False), toy_clients(), 1, local=LOCAL)
    assert found.faults == [] and found.model.order.tolist() == [0, 1, 2]  # type: ignore[operator,union-attr]
    assert counts == [2 * len(data) for data in toy_clients()]  # none has those of the clients before it


def test_bytes_are_those_of_the_arrays() -> None:
    one = run(FedAvg(), rounds=2)
    per_message = sum(len(array.data) for array in flower.encode(state(one)).values())
    assert one.bytes_down == one.bytes_up == 2 * 4 * per_message
    control = run(SCAFFOLD(), rounds=2)
    extra = sum(len(array.data) for array in flower.encode(control.server.extras["scaffold-control"]).values())
    assert control.bytes_up == one.bytes_up and control.bytes_down == one.bytes_down + 2 * 4 * extra


def test_evaluation_on_the_server_and_on_clients() -> None:
    data = toy_clients()
    pairs = [(examples, examples.subset(torch.arange(5))) for examples in data]
    found = simulate(
        FedAvg(),
        toy_model,
        pairs,
        4,
        local=LOCAL,
        evaluate=lambda model, round: {"twice": 2.0 * round},
        evaluate_clients=2,
    )
    assert [record["twice"] for record in found.history] == [2, 4, 6, 8]
    assert ["clients_accuracy" in record for record in found.history] == [False, True, False, True]
    for number, (_, test) in enumerate(pairs):
        right = (found.model.eval()(test.inputs).argmax(1) == test.targets).float().mean()
        assert found.client_metrics[number]["accuracy"] == pytest.approx(float(right))


class Chatty(FederatedMethod):
    """A method that uses everything: a query before and after, extras both ways, numbers, client state."""

    def configure_model(self, model: nn.Module, seed: int) -> nn.Module:
        model.register_parameter("seeded", nn.Parameter(torch.full((1,), float(seed))))  # takes no part: no gradient
        return model

    def prepare(self, server: Server) -> None:  # type: ignore[override]
        answers = server.ask("rows", {"times": {"two": torch.tensor(2)}}, {"plus": 1})  # type: ignore[misc]
        server.results["rows"] = [int(answer.extras["rows"]["n"]) for answer in answers]
        server.config["schedule"] = "0.weight"
        server.extras["mask"] = {"0.weight": torch.ones(8, 6, dtype=torch.bool)}

    def client_update(self, client: Client, sent: Sent) -> Update:
        assert sent.config["schedule"] == "0.weight" and sent.extras["mask"]["0.weight"].dtype == torch.bool
        visits = client.state.get("visits", {"n": torch.zeros((), dtype=torch.int64)})
        client.state["visits"] = {"n": visits["n"] + 1}
        topk = {"index": torch.tensor([3, 5]), "value": torch.tensor([0.5, -0.5])}
        return client.update(
            client.train(), extras={"topk": topk}, metrics={"visits": float(client.state["visits"]["n"])}
        )

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        super().aggregate(server, updates)
        assert all(update.extras["topk"]["index"].tolist() == [3, 5] for update in updates)

    def answer(self, client: Client, sent: Sent) -> Update | None:
        if sent.query == "rows":
            number = len(client) * int(sent.extras["times"]["two"]) + int(sent.config["plus"])
            return Update({}, len(client), extras={"rows": {"n": torch.tensor(number)}})
        if sent.query == "visits":
            return Update({}, len(client), metrics={"visits": float(client.state["visits"]["n"])})
        return None

    def finish(self, server: Server) -> None:  # type: ignore[override]
        server.results["visits"] = [answer.metrics["visits"] for answer in server.ask("visits")]  # type: ignore[misc]
        server.params = {name: tensor.clone().fill_(1.0) for name, tensor in server.params.items()}


def test_queries_extras_state_and_phases() -> None:
    found = run(Chatty(), seed=4)
    assert found.results["rows"] == [2 * n + 1 for n in (24, 26, 28, 30)]
    assert found.results["visits"] == [3, 3, 3, 3]
    assert [record["visits"] for record in found.history] == pytest.approx([1, 2, 3])
    assert all(bool((tensor == 1).all()) for tensor in found.params.values())
    assert found.model.seeded.item() == 1.0  # type: ignore[operator,union-attr]


def test_an_unknown_query_is_a_fault_of_every_client() -> None:
    class Asks(FederatedMethod):
        def prepare(self, server: Server) -> None:  # type: ignore[override]
            assert server.ask is not None and server.ask("secret") == []

    found = run(Asks(), rounds=1)
    assert len(found.faults) == 4 and "no method of this run answers it" in found.faults[0].reason


def test_methods_join() -> None:
    class Double(FederatedMethod):
        def aggregate(self, server: Server, updates: list[Update]) -> None:
            super().aggregate(server, updates)
            server.state["seen"] = {"n": torch.tensor(len(updates))}

    class Scaled(Method):
        name = "scaled"

        def loss(self, run: Any, batch: Any, output: Any) -> Any:
            return 0.0 * nn.functional.cross_entropy(output.prediction, batch.targets)

    assert same(state(run([FedProx(), Double()])), state(run(FedProx())))
    still = run([FedAvg(), Scaled()])
    for key, tensor in state_of(toy_model())[0].items():  # the loss of the other method is what clients minimise
        torch.testing.assert_close(still.params[key], tensor)
    with pytest.raises(MethodConflictError, match="fedspeed and scaffold both override client_update"):
        run([FedSpeed(), SCAFFOLD()])


def test_a_method_with_state_between_steps_is_refused() -> None:
    class Counts(Method):
        name = "counts"

        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

    with pytest.raises(ArgumentError, match="lose between rounds"):
        run([FedAvg(), Counts()], rounds=1)


# -- faults -----------------------------------------------------------------------------------------------------------
def dies(message: Any, context: Any, call: Any) -> Any:
    raise RuntimeError("out of memory")


def dies_after_training(message: Any, context: Any, call: Any) -> Any:
    call(message, context)
    raise RuntimeError("lost the network")


def stale(content: Any) -> None:
    content["metrics"]["server-round"] = 1


def huge(content: Any) -> None:
    from flwr.app import ArrayRecord

    content["extra/junk"] = ArrayRecord({"junk": flower.Array(np.zeros(10**6))})


def garbage(content: Any) -> None:
    content["arrays"]["0.weight"].data = b"\x93NUMPY not what it says"


def liar(content: Any) -> None:
    """A header that asks for 8 TB."""
    array = content["arrays"]["0.weight"]
    array.data = array.data.replace(b"(8, 6)", b"(1000000, 1000000)", 1)


def fewer(content: Any) -> None:
    del content["arrays"]["0.weight"]


def no_arrays(content: Any) -> None:
    del content["arrays"]


def no_metrics(content: Any) -> None:
    del content["metrics"]


def no_examples(content: Any) -> None:
    content["metrics"]["num-examples"] = 0


def no_steps(content: Any) -> None:
    content["metrics"]["num-steps"] = 0


def poke(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array.flat[3] = value
        return array

    return edit


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "dies": (dies, "failed: RuntimeError: out of memory"),
    "dies after training": (dies_after_training, "lost the network"),
    "nan": (changed(spoil(poke(np.nan))), "NaN or infinite"),
    "inf": (changed(spoil(poke(np.inf))), "NaN or infinite"),
    "nan in a buffer": (changed(spoil(poke(np.nan), "1.running_mean")), "NaN or infinite"),
    "wrong shape": (changed(spoil(lambda a: a[:, :5])), "shape"),
    "wrong type": (changed(spoil(lambda a: a.astype(np.complex64))), "complex64"),
    "fewer names": (changed(fewer), "names of the parameters differ"),
    "stale": (changed(stale), "stale update, of round 1"),
    "huge": (changed(huge), "a message of 8"),
    "garbage": (changed(garbage), "is damaged"),
    "a header that lies": (changed(liar), "is damaged"),
    "no arrays": (changed(no_arrays), "names of the parameters differ"),
    "no metrics": (changed(no_metrics), "stale update"),
    "no examples": (changed(no_examples), "no usable number"),
    "no steps": (changed(no_steps), "no usable number"),
}


@pytest.mark.parametrize("method", STATEFUL, ids=identify)
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_client_is_named_and_left_out(
    name: str, method: FederatedMethod, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 2 fails in round 2: the result is that of a run without it in that round, and it takes part again in round 3."""
    fault, reason = FAULTS[name]
    with caplog.at_level(logging.WARNING, "equipoise.federated"):
        found = run(method, mods=[mod(fault)])
    assert [(fault.round, fault.client) for fault in found.faults] == [(2, 2)]
    assert reason in found.faults[0].reason
    assert "round 2: client 2 is left out" in caplog.text
    assert [record["clients"] for record in found.history] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    expected = by_hand(method, 3, lambda round: [0, 1, 3] if round == 2 else [0, 1, 2, 3])
    assert same(state(found), expected)


@pytest.mark.parametrize("method", STATEFUL, ids=identify)
def test_a_late_client_is_named_and_left_out(method: FederatedMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    real, late = time.perf_counter, [0.0]

    def slow(message: Any, context: Any, call: Any) -> Any:
        late[0] += 1000.0
        return call(message, context)

    monkeypatch.setattr(time, "perf_counter", lambda: real() + late[0])
    found = run(method, mods=[mod(slow)], timeout=500.0)
    assert [(fault.round, fault.client, fault.reason) for fault in found.faults] == [(2, 2, "did not answer in time")]
    assert same(state(found), by_hand(method, 3, lambda round: [0, 1, 3] if round == 2 else [0, 1, 2, 3]))


def test_a_round_without_an_answer_keeps_the_parameters(caplog: pytest.LogCaptureFixture) -> None:
    def later(message: Any, context: Any, call: Any) -> Any:
        training = message.metadata.message_type == "train" and message.content["config"]["server-round"] > 1
        return dies(message, context, call) if training else call(message, context)

    found = run(FedSpeed(), mods=[later])
    assert same(found.params, run(FedSpeed(), rounds=1).params)
    assert len(found.faults) == 8 and "no usable answer" in caplog.text


def test_if_all_clients_fail_at_once_the_program_is_wrong() -> None:
    def loss(prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise KeyError("weights")

    with pytest.raises(ArgumentError, match=r"all 4 clients failed .* KeyError: 'weights'"):
        run(FedAvg(), loss=loss)
    with pytest.raises(ArgumentError, match="all 1 clients failed"):
        simulate(FedAvg(), toy_model, toy_clients(1), 1, local=LOCAL, loss=loss)


def test_one_drawn_client_that_fails_at_once_stops_nothing() -> None:
    first = run(FedAvg(), rounds=1, fraction=0.25).history[0]["clients"][0]
    found = run(FedAvg(), rounds=3, fraction=0.25, mods=[mod(dies, client=first, round=1)])
    assert [(fault.round, fault.client) for fault in found.faults] == [(1, first)]
    assert [len(record["clients"]) for record in found.history] == [0, 1, 1]


def test_finite_updates_with_an_infinite_mean_do_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    biggest = float(np.finfo(np.float32).max)
    found = run(FedSpeed(), mods=[mod(changed(spoil(lambda a: np.full_like(a, biggest))), client=c) for c in (1, 2)])
    assert "the aggregate is not finite" in caplog.text and all(t.isfinite().all() for t in found.params.values())
    assert same(state(found), by_hand(FedSpeed(), 3, lambda round: [] if round == 2 else [0, 1, 2, 3]))
    assert len(found.history) == 3


def test_a_client_that_cannot_say_who_it_is_is_left_out() -> None:
    def broken(message: Any, context: Any, call: Any) -> Any:
        if context.node_config["partition-id"] == 1:
            raise OSError("no disk")
        return call(message, context)

    found = run(FedAvg(), mods=[broken])
    assert all(fault.reason == "does not say who it is (node 2): OSError: no disk" for fault in found.faults)
    assert [record["clients"] for record in found.history] == [[0, 2, 3]] * 3


def test_an_answer_that_nobody_asked_for_is_named() -> None:
    class Twice(flower.InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return replies + replies[:1] if replies[0].metadata.message_type == "train" else replies

    app = flower.client_app(FedAvg(), toy_model, toy_clients())
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4)
    strategy.start(Twice(app, 4), num_rounds=2)
    assert [fault.reason for fault in strategy.faults] == ["node 1 answered without being asked, or twice"] * 2
    assert same(strategy.server.params, run(FedAvg(), rounds=2).params)


# -- restarts ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole() -> dict[str, FederatedRun]:
    return {identify(method): run(method, rounds=4, fraction=0.75) for method in STATEFUL}


def killed(method: FederatedMethod, folder: Path, client: int, round: int) -> None:
    """A process that trains with checkpoints and dies, without any tidying up, when one client trains in one round."""
    child = os.fork()
    if child == 0:
        try:
            die = mod(lambda *_: os._exit(9), client, round)
            run(method, rounds=4, fraction=0.75, checkpoint=folder, mods=[die])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("round", [1, 2, 3, 4])
@pytest.mark.parametrize("method", STATEFUL, ids=identify)
def test_a_killed_server_goes_on_with_the_same_result(
    method: FederatedMethod, round: int, tmp_path: Path, whole: dict[str, FederatedRun]
) -> None:
    expected = whole[identify(method)]
    last = expected.history[round - 1]["clients"][-1]  # the others have trained in this round, and must undo it
    killed(method, tmp_path / "run", last, round)
    found = run(method, rounds=4, fraction=0.75, checkpoint=tmp_path / "run", resume=True)
    assert same(state(found), state(expected))
    assert found.history == expected.history


def test_a_finished_run_is_not_run_again_and_can_go_on(tmp_path: Path, whole: dict[str, FederatedRun]) -> None:
    expected = whole["FedSpeedall"]
    run(FedSpeed(), rounds=2, fraction=0.75, checkpoint=tmp_path / "run")
    trained = []
    count = mod(lambda m, c, call: trained.append(1) or call(m, c), client=0, round=1)
    found = run(FedSpeed(), rounds=4, fraction=0.75, checkpoint=tmp_path / "run", resume=True, mods=[count])
    assert not trained and same(state(found), state(expected))
    again = run(FedSpeed(), rounds=4, fraction=0.75, checkpoint=tmp_path / "run", resume=True)
    assert same(state(again), state(expected)) and again.history == expected.history


def test_checkpoints_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    run(FedSpeed(), rounds=1, checkpoint=tmp_path / "run")
    with pytest.raises(ArgumentError, match="resume=True"):
        run(FedSpeed(), rounds=1, checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(FedAvg(), rounds=2, checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="model: "):
        simulate(FedSpeed(), plain_model, toy_clients(), 2, local=LOCAL, checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        run(FedSpeed(), rounds=2, seed=1, checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(ArgumentError, match="checkpoint = None"):
        run(FedSpeed(), rounds=1, resume=True)
    files = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}


def test_state_that_is_lost_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flower keeps the state of a client for one run of its own: to go on in another, the client needs a folder."""
    for folder, warnings in ((tmp_path / "clients", 0), (None, 4)):
        caplog.clear()
        for rounds in (1, 2):
            app = flower.client_app(FedSpeed(), toy_model, toy_clients(), state=folder)
            saved: dict[str, Any] = {"checkpoint": tmp_path / f"run-{warnings}", "resume": rounds == 2}
            strategy = flower.FederatedStrategy(FedSpeed(), toy_model, local=LOCAL, clients=4, **saved)
            strategy.start(flower.InProcessGrid(app, 4), num_rounds=rounds)
        assert sum("has lost what it kept until round 1" in message for message in caplog.messages) == warnings


def test_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    """A client that keeps its state in a folder starts anew when the server does."""
    results = []
    for _ in range(2):
        app = flower.client_app(FedSpeed(), toy_model, toy_clients(), state=tmp_path / "clients")
        strategy = flower.FederatedStrategy(FedSpeed(), toy_model, local=LOCAL, clients=4)
        strategy.start(flower.InProcessGrid(app, 4), num_rounds=2)
        results.append(strategy.server.params)
    assert same(*results)


# -- as Flower's own strategies ---------------------------------------------------------------------------------------
def test_server_app_and_run_config() -> None:
    from flwr.app import Context, RecordDict

    seen: list[flower.FederatedStrategy] = []
    keep = lambda strategy, _: seen.append(strategy)  # noqa: E731
    app = flower.server_app(FedSpeed(), toy_model, rounds=2, finished=keep, local=LOCAL, clients=4)
    grid = flower.InProcessGrid(flower.client_app(FedSpeed(), toy_model, toy_clients()), 4)
    context = Context(1, 0, {}, RecordDict(), {"rounds": 3, "seed": 0})
    app(grid, context)
    assert same(seen[0].server.params, run(FedSpeed()).params)


def test_initial_arrays_and_result_are_those_of_a_state_dict() -> None:
    from flwr.app import ArrayRecord

    model = toy_model()
    nn.init.zeros_(model[0].weight)
    grid = flower.InProcessGrid(flower.client_app(FedAvg(), toy_model, toy_clients()), 4)
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    assert same(state_of(model)[0], strategy.server.params)
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert same(simulate(FedAvg(), model, toy_clients(), 0).params, strategy.server.params)


def test_inside_flowers_own_differential_privacy() -> None:
    """Flower's wrapper around the strategy, driven by Flower's own loop."""
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

    grid = flower.InProcessGrid(flower.client_app(FedAvg(), plain_model, toy_clients()), 4)
    inner = flower.FederatedStrategy(FedAvg(), plain_model, local=LOCAL, clients=4)
    outer = DifferentialPrivacyServerSideFixedClipping(inner, 1e-3, 0.1, 4)
    result = outer.start(grid, flower.encode(plain_model().state_dict()), num_rounds=2)
    start, end = plain_model().state_dict(), result.arrays.to_torch_state_dict()
    moved = torch.linalg.vector_norm(torch.cat([(end[key] - start[key]).flatten() for key in start]))
    assert 0 < float(moved) < 0.25 and inner.faults == []  # two rounds of at most 0.1, and a little noise
    masked = flower.FederatedStrategy(MagnitudeMask(0.8), plain_model, local=LOCAL, clients=4)
    outer = DifferentialPrivacyServerSideFixedClipping(masked, 1e-3, 0.1, 4)
    with pytest.raises(ArgumentError, match="which a strategy that is wrapped around this one cannot read"):
        outer.start(grid, flower.encode(plain_model().state_dict()), num_rounds=1)


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "FedAdam"])
def test_flowers_own_strategies_drive_the_same_clients(name: str) -> None:
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp import strategy as flowers

    grid = flower.InProcessGrid(flower.client_app(FedProx(mu=0.1), plain_model, toy_clients()), 4)
    strategy = getattr(flowers, name)(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=4)
    config = ConfigRecord(LOCAL.as_config())
    result = strategy.start(grid, ArrayRecord(plain_model().state_dict()), num_rounds=3, train_config=config)
    assert len(result.train_metrics_clientapp) == len(result.evaluate_metrics_clientapp) == 3
    if name == "FedAvg":  # theirs weighs clients by their examples, as ours does
        mine = simulate(FedProx(mu=0.1), plain_model, toy_clients(), 3, local=LOCAL).params
        for key, tensor in flower.decode(result.arrays).items():
            torch.testing.assert_close(tensor, mine[key])
    for method, what in ((FedSpeed(), "fedspeed"), (SCAFFOLD(), "scaffold")):
        grid = flower.InProcessGrid(flower.client_app(method, plain_model, toy_clients()), 4)
        with pytest.raises(ArgumentError, match=f"methods holds {what}, which has a part on the server"):
            strategy.start(grid, ArrayRecord(plain_model().state_dict()), num_rounds=1)


def test_clients_get_what_a_wrapper_has_made_of_the_parameters() -> None:
    """Noise that a wrapper adds after a round is in what the clients are sent in the next."""
    from flwr.app import ArrayRecord

    class Doubled(flower.FederatedStrategy):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            changed = ArrayRecord({k: flower.Array(2 * a.numpy()) for k, a in arrays.items()})
            given.append(flower.decode(changed))
            return super().configure_train(server_round, changed, config, grid)

        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            changed = ArrayRecord({k: flower.Array(2 * a.numpy()) for k, a in arrays.items()})
            given.append(flower.decode(changed))
            return super().configure_evaluate(server_round, changed, config, grid)

    given: list[Params] = []
    seen: list[Params] = []
    look = lambda m, c, call: seen.append(flower.decode(m.content["arrays"])) or call(m, c)  # noqa: E731
    mods = [mod(look, client=1, round=round, kind=kind) for round in (1, 2) for kind in ("train", "evaluate")]
    app = flower.client_app(FedAvg(), plain_model, toy_clients(), mods=mods)
    strategy = Doubled(FedAvg(), plain_model, local=LOCAL, clients=4, evaluate_clients=1)
    strategy.start(flower.InProcessGrid(app, 4), num_rounds=2)
    assert len(seen) == 4 and all(same(*pair) for pair in zip(seen, given, strict=True))


def plain_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Linear(6, 3)


def test_half_precision_model_travels() -> None:
    found = simulate(FedSpeed(), lambda: plain_model().to(torch.bfloat16), halves(), 2, local=LOCAL)
    assert found.faults == [] and all(t.dtype == torch.bfloat16 for t in found.params.values())
    assert all(t.isfinite().all() for t in found.params.values())


def halves() -> list[Examples]:
    return [Examples(e.inputs.to(torch.bfloat16), e.targets, num_classes=3) for e in toy_clients()]  # type: ignore[union-attr]


# -- bad input --------------------------------------------------------------------------------------------------------
def one_class() -> list[Any]:
    first, second, *_ = toy_clients()
    return [first, (second.inputs, torch.zeros_like(second.targets))]


def test_one_class_is_taken_if_allowed() -> None:
    assert simulate(FedAvg(), toy_model, one_class(), 1, local=LOCAL, allow_one_class=True).faults == []
    numbers = [(torch.randn(8, 6), torch.ones(8, 3)) for _ in range(2)]  # of a regression, where labels say nothing
    assert simulate(FedAvg(), plain_model, numbers, 1, local=LOCAL, loss=nn.functional.mse_loss).faults == []


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: run(FedAvg(), fraction=0.2), ArgumentError, "draws none of 4 clients"),
        (lambda: run(FedAvg(), fraction=0.0), ArgumentError, "fraction"),
        (lambda: simulate(FedAvg(), toy_model, [], 1), ArgumentError, "clients"),
        (lambda: simulate(FedAvg(), toy_model, [None, toy_clients()[0]], 1), DataError, "client 0 has no data"),
        (lambda: simulate(FedAvg(), toy_model, [toy_clients()[0].subset([])], 1), DataError, "client 0 has no data"),
        (lambda: simulate(FedAvg(), toy_model, one_class(), 1), DataError, "client 1 has examples of one class alone"),
        (lambda: simulate(FedAvg(), lambda: 3, toy_clients(), 1), ArgumentError, "must be a torch.nn.Module"),
        (lambda: simulate(FedAvg(), nn.Sequential(), toy_clients(), 1), ArgumentError, "nothing to train"),
        (lambda: run(["fedavg"]), ArgumentError, "instances of equipoise.Method"),
        (lambda: run(FedAvg(), rounds=-1), ArgumentError, "rounds"),
        (lambda: LocalTraining(lr=0.0), ArgumentError, "lr"),
        (lambda: LocalTraining(epochs=0), ArgumentError, "epochs"),
        (lambda: LocalTraining(momentum=1.0), ArgumentError, "momentum"),
        (lambda: LocalTraining(clip_norm=0.0), ArgumentError, "clip_norm"),
    ],
)
def test_bad_input(call: Callable[[], object], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_clients_with_another_model_are_named() -> None:
    models = [toy_model(), plain_model(), toy_model(), toy_model()]
    apps = [flower.client_app(FedAvg(), model, toy_clients()) for model in models]
    call: Any = lambda message, context: apps[context.node_config["partition-id"]](message, context)  # noqa: E731
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4)
    strategy.start(flower.InProcessGrid(call, 4), num_rounds=1)
    assert len(strategy.faults) == 1 and strategy.faults[0].client == 1
    assert "names of the parameters differ" in strategy.faults[0].reason
    everyone = flower.InProcessGrid(flower.client_app(FedAvg(), plain_model, toy_clients()), 4)
    with pytest.raises(ArgumentError, match=r"all 4 clients failed .* names of the parameters differ"):
        flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4).start(everyone, num_rounds=1)


def test_two_nodes_with_one_partition() -> None:
    grid = flower.InProcessGrid(flower.client_app(FedAvg(), toy_model, toy_clients()), 4)
    grid.contexts[2].node_config["partition-id"] = 0
    with pytest.raises(ArgumentError, match="partition-id = 0: is given to two nodes"):
        flower.FederatedStrategy(FedAvg(), toy_model, clients=4).start(grid, num_rounds=1)


def test_bytes_of_queries_count() -> None:
    found = run(Chatty(), rounds=2)
    in_rounds = {way: sum(record[f"bytes_{way}"] for record in found.history) for way in ("up", "down")}
    assert found.bytes_up > in_rounds["up"] and found.bytes_down > in_rounds["down"]


class Restless(flower.InProcessGrid):
    """Nodes come and go: before a message of round r, those in ``away[r]`` are not there."""

    away: dict[int, set[int]] = {}
    round = 0

    def get_node_ids(self) -> Any:
        return [node for node in super().get_node_ids() if node not in self.away.get(self.round, set())]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        self.round += any(message.metadata.message_type == "train" for message in messages)
        return super().send_and_receive(messages, timeout=timeout)


def test_clients_may_come_and_go() -> None:
    grid = Restless(flower.client_app(FedSpeed(), toy_model, toy_clients()), 4)
    grid.away = {0: {4}, 1: {1, 2}}  # node 4 comes after the first round, in which nodes 1 and 2 leave for one round
    strategy = flower.FederatedStrategy(FedSpeed(), toy_model, local=LOCAL, clients=3)
    strategy.start(grid, num_rounds=3)
    assert [record["clients"] for record in strategy.history] == [[0, 1, 2], [2, 3], [0, 1, 2, 3]]
    assert strategy.server.num_clients == 4 and strategy.faults == []


def test_a_second_node_of_a_client_takes_no_part_later() -> None:
    grid = Restless(flower.client_app(FedAvg(), toy_model, toy_clients()), 4)
    grid.contexts[4].node_config["partition-id"] = 0
    grid.away = {0: {4}}
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=3)
    strategy.start(grid, num_rounds=2)
    assert [record["clients"] for record in strategy.history] == [[0, 1, 2]] * 2
    assert [(f.client, "second node" in f.reason) for f in strategy.faults] == [(0, True)]


class Dying(Restless):
    """From round 2 on node 2 is silent, or Flower says in its place that it is gone; the grid still lists it."""

    def __init__(self, app: Any, clients: int, says: bool) -> None:
        super().__init__(app, clients)
        self.says = says

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        from flwr.app import Error, Message

        replies = list(super().send_and_receive(messages, timeout=timeout))
        for reply in [reply for reply in replies if reply.metadata.src_node_id == 2 and self.round > 1]:
            replies.remove(reply)
            if self.says:
                sent = reply.metadata.reply_to_message_id
                reply = Message(Error(5, "Error: Node Unavailable"), reply_to=reply)
                reply.metadata.__dict__.update(_src_node_id=99, _reply_to_message_id=sent)
                replies.append(reply)
        return replies


@pytest.mark.parametrize("says", [False, True])
def test_a_dead_node_is_named_by_its_client(says: bool) -> None:
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4)
    strategy.start(Dying(flower.client_app(FedAvg(), toy_model, toy_clients()), 4, says), num_rounds=2)
    reason = "failed: Error: Node Unavailable" if says else "did not answer in time"
    assert strategy.faults == [flower.Fault(2, 1, reason)]


def test_a_node_that_was_killed_and_started_again_takes_its_place() -> None:
    grid = Dying(flower.client_app(FedAvg(), toy_model, toy_clients()), 5, says=False)
    grid.contexts[5].node_config["partition-id"] = 1
    grid.away = {0: {5}, 1: {5}}
    strategy = flower.FederatedStrategy(FedAvg(), toy_model, local=LOCAL, clients=4)
    strategy.start(grid, num_rounds=4)
    assert [record["clients"] for record in strategy.history] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert strategy.faults == [flower.Fault(2, 1, "did not answer in time")]


def test_state_changed_in_place_is_undone_too() -> None:
    class Careless(FederatedMethod):
        def client_update(self, client: Client, sent: Sent) -> Update:
            visits = client.state.setdefault("visits", {"n": torch.zeros(1)})
            visits["n"] += 1
            return client.update(client.train(), metrics={"visits": visits["n"].item()})

    found = run(Careless(), rounds=4, mods=[mod(dies_after_training)])
    seen = found.history[-1]["visits"]
    rows = [24, 26, 28, 30]
    assert seen == pytest.approx((4 * (rows[0] + rows[1] + rows[3]) + 3 * rows[2]) / sum(rows))


def test_waiting_for_clients_has_an_end() -> None:
    grid = flower.InProcessGrid(flower.client_app(FedAvg(), toy_model, toy_clients()), 4)
    with pytest.raises(ArgumentError, match="only 4 nodes are connected"):
        flower.FederatedStrategy(FedAvg(), toy_model, clients=5).start(grid, num_rounds=1, timeout=0.0)


def test_without_flwr_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    from equipoise.errors import MissingDependencyError

    for name in list(sys.modules):
        if name.split(".")[0] == "flwr":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "equipoise.integrations.flower")
    with pytest.raises(MissingDependencyError, match=r"equipoise\[federated\]"):
        importlib.import_module("equipoise.integrations.flower")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)
    yield
    logging.getLogger("flwr").setLevel(level)
