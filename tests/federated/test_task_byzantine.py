"""The attacks, by their definitions, and the Byzantine task."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import toy_clients, toy_model

from equipoise import catalogue
from equipoise.errors import ArgumentError
from equipoise.federated.algorithm import Server, Update
from equipoise.federated.attacks import (
    ATTACKS,
    UnderAttack,
    flip_labels,
    forge,
    hostile,
    little_is_enough_z,
)
from equipoise.federated.claims_flag_aggregator import ARMS, CLAIMS, ByzantineGradients
from equipoise.federated.fedspeed import FedAvg, FedSpeed
from equipoise.federated.params import state_of
from equipoise.federated.task import cached_problem
from equipoise.federated.task_byzantine import Byzantine
from equipoise.training import Method

torch.set_num_threads(1)
HONEST = torch.tensor([[1.0, 2.0, -1.0], [3.0, 2.0, 1.0]])


# -- attacks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("attack", "strength", "expected"),
    [
        ("sign-flip", None, [-10, -10, 0]),
        ("sign-flip", 2.0, [-4, -4, 0]),
        ("inner-product", None, [-1, -1, 0]),
        ("little-is-enough", 2.0, [2 - 2 * 2**0.5, 2, -2 * 2**0.5]),
    ],
)
def test_attacks_by_hand(attack: str, strength: float | None, expected: list[float]) -> None:
    found = forge(attack, HONEST, 2, strength=strength)
    torch.testing.assert_close(found, torch.tensor([expected] * 2, dtype=torch.float32))
    assert found[0].data_ptr() != found[1].data_ptr()


def test_noise_by_its_moments() -> None:
    honest = 0.1 * torch.randn(12, 4000, generator=torch.Generator().manual_seed(0)) + 1
    draw = torch.Generator().manual_seed(1)
    found = forge("random", honest, 3, generator=draw)
    assert found.shape == (3, 4000) and found.abs().max() <= 10 and not torch.equal(found[0], found[1])
    assert found.std().item() == pytest.approx(10 / 3**0.5, rel=0.05)
    found = forge("noise", honest, 3, generator=draw)
    assert found.mean().item() == pytest.approx(1, abs=0.15)
    assert found.std().item() == pytest.approx(5 * honest.square().mean().sqrt().item(), rel=0.05)
    again = forge("noise", honest, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, forge("noise", honest, 3, generator=torch.Generator().manual_seed(5)))


def test_a_little_is_enough() -> None:
    # 50 workers, 24 of them attackers: s = 26 - 24 = 2, Phi(z) = (26 - 2) / 26
    assert little_is_enough_z(50, 24) == pytest.approx(1.426077, abs=1e-5)
    assert little_is_enough_z(15, 3) == pytest.approx(0.210428, abs=1e-5)
    assert little_is_enough_z(15, 0) == 0 and little_is_enough_z(4, 1) == 0
    torch.testing.assert_close(forge("little-is-enough", HONEST[:1], 1), HONEST[:1])


def test_labels_are_flipped() -> None:
    examples = toy_clients(1)[0]
    flipped = flip_labels(examples)
    assert torch.equal(flipped.targets, 2 - examples.targets) and flipped.inputs is examples.inputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forge("sign-flop", HONEST, 1), "attack = 'sign-flop'.*sign-flip"),
        (lambda: forge("label-flip", HONEST, 1), "attack = 'label-flip'"),
        (lambda: forge("noise", HONEST[:0], 1), "at least one honest update"),
        (lambda: forge("noise", HONEST, 1, strength=-1.0), "strength = -1"),
        (lambda: forge("noise", HONEST, -1), "count = -1"),
        (lambda: little_is_enough_z(4, 4), "byzantine = 4"),
        (lambda: UnderAttack(FedAvg(), "x", 1), "attack = 'x'"),
    ],
)
def test_bad_attacks(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_only_the_hostile_are_forged() -> None:
    model = toy_model()
    params, buffers = state_of(model)
    server = Server(model, params, buffers, clients=dict.fromkeys(range(4), 10))
    server.seed = next(seed for seed in range(99) if hostile(4, 1, seed) == (1,))
    updates = [Update({k: v + n for k, v in params.items()}, 10, 1, buffers, client=n) for n in range(4)]
    seen: list[Update] = []

    class Watch(FedAvg):
        def aggregate(self, server: Server, updates: list[Update]) -> None:
            seen.extend(updates)

    UnderAttack(Watch(), "sign-flip", 1).aggregate(server, updates)
    change = [float((u.params["0.weight"] - params["0.weight"]).mean()) for u in seen]
    assert change == pytest.approx([0, -5 * 5 / 3, 2, 3], abs=1e-5)
    seen.clear()
    UnderAttack(Watch(), "sign-flip", 4).aggregate(server, updates)  # nobody to learn from
    assert len(seen) == 4


def test_an_attacked_method_keeps_its_hooks() -> None:
    inner = FedSpeed()
    attacked = UnderAttack(inner, "none", 0)
    assert attacked.client_update == inner.client_update and attacked.overrides("client_update")
    assert "FedSpeed" in repr(attacked)


# -- the task ---------------------------------------------------------------------------------------------------------
SMALL: dict[str, Any] = {"rounds": 2, "epochs": 1, "batch_size": 32, "model": "linear", "clients": 7, "byzantine": 1}


def method(name: str) -> type[Method]:
    return catalogue.find("method", name).load()  # type: ignore[no-any-return]


def test_default_arms_are_those_that_hold() -> None:
    assert Byzantine().entrants() == Byzantine.methods
    assert "bulyan" not in Byzantine(byzantine=4).entrants()
    assert Byzantine(byzantine=7).entrants() == (
        "coordinate-median",
        "trimmed-mean",
        "geometric-median",
        "flag-aggregator",
    )
    assert all(catalogue.find("method", name) for name in (*Byzantine.methods, Byzantine.baseline))


def test_more_attackers_than_a_rule_tolerates_is_one_error() -> None:
    task = Byzantine(byzantine=4)
    with pytest.raises(ArgumentError, match=r"f = 4: bulyan needs at least 19 workers .* there are 15.* f <= 3"):
        task.build_method(method("bulyan"), {})
    assert task.build_method(method("krum"), {}).settings() == {"f": 4}
    assert task.build_method(method("flag-aggregator"), {"flag-aggregator.r": 5}).settings()["r"] == 5
    with pytest.raises(ArgumentError, match="trains no clients"):
        task.build_method(method("elr"), {})
    with pytest.raises(ArgumentError, match=r"f = 2: krum needs at least 7 workers .* there are 6"):
        Byzantine(clients=12, fraction=0.5, byzantine=2).build_method(method("krum"), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"byzantine": 8}, "byzantine = 8: must be less than half of the 15 clients"),
        ({"byzantine": 3, "fraction": 0.4}, "byzantine = 3: must be less than half of the 6 clients of a round"),
        ({"byzantine": -1}, "byzantine = -1"),
        ({"clients": 1}, "byzantine = 3: must be less than half of the 1 clients"),
        ({"attack": "lie"}, "attack = 'lie'"),
        ({"strength": -1.0}, "strength = -1"),
        ({"strength": 1.0, "attack": "label-flip"}, "strength = 1.0.*label-flip"),
        ({"alpha": 0.0}, "alpha = 0"),
        ({"rounds": 0}, "rounds = 0"),
        ({"validation": 1.0}, "validation = 1"),
        ({"target": "y"}, "data='file.csv'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Byzantine(**settings)


def test_the_problem_of_a_seed() -> None:
    task = Byzantine(**SMALL)
    made = cached_problem(task, 0)
    clients = task.client_data(made)
    assert len(clients) == 7 and sum(map(len, clients)) == len(made.train)
    assert made.extra["hostile"] == hostile(7, 1, 0) and len({hostile(7, 1, seed) for seed in range(9)}) > 2
    assert max(map(len, clients)) - min(map(len, clients)) <= 1
    for number, flipped in enumerate(Byzantine(**SMALL, attack="label-flip").client_data(made)):
        theirs = clients[number].targets
        assert torch.equal(flipped.targets, 9 - theirs if number in made.extra["hostile"] else theirs)
    assert cached_problem(Byzantine(**SMALL, partition="dirichlet"), 0).extra["hostile"] == made.extra["hostile"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_runs_under_every_attack(attack: str) -> None:
    pytest.importorskip("flwr")
    task = Byzantine(**SMALL, attack=attack)
    result = task.run(method("flag-aggregator"), {"lr": 0.3, "weight_decay": 0.0, "early_stopping": True}, 0)
    assert set(result.metrics) == {"last", "best"} and result.counted == "best" and len(result.curve) == 2
    assert all(math.isfinite(value) for value in result.metrics["last"].values())
    again = task.run(method("flag-aggregator"), {"lr": 0.3, "weight_decay": 0.0, "early_stopping": True}, 0)
    assert again.metrics == result.metrics


def test_a_robust_rule_survives_what_ruins_the_mean() -> None:
    pytest.importorskip("flwr")
    task = Byzantine(**{**SMALL, "clients": 7, "byzantine": 2, "rounds": 4})
    score = {
        name: task.run(method(name), {"lr": 0.5, "weight_decay": 0.0, "early_stopping": False}, 0).score(
            "test_accuracy"
        )
        for name in ("fedavg", "flag-aggregator")
    }
    assert score["fedavg"] < 0.3 < 0.7 < score["flag-aggregator"]


def test_report_and_cost(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    remarks = "\n".join(Byzantine(**{**SMALL, "byzantine": 3}).check())
    assert "3 of the clients are hostile (attack: sign-flip)" in remarks and "no defence" in remarks
    assert "with 3 Byzantine of 7 clients in a round: krum needs 9, multi-krum needs 9, bulyan needs 15." in remarks
    task = Byzantine(**SMALL)
    assert "Left out" not in "\n".join(task.check()) and task.resampled
    assert all(passed for _, passed, _ in task.sanity(0))
    config = {"lr": 0.1, "weight_decay": 0.0}
    cost = task.cost(method("krum"), config, 0)
    assert cost.flops > 0 and cost.inference_parameters == 64 * 10 + 10
    assert task.step_seconds(method("krum"), config, 0) > 0


def test_own_data_with_a_column_of_clients(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    table = tmp_path / "mine.csv"
    rows = ["a,b,who,label", *(f"{i % 7},{i % 5},site {i % 6},{'yes' if i % 4 < 2 else 'no'}" for i in range(240))]
    table.write_text("\n".join(rows), encoding="utf-8")
    own = {"data": str(table), "target": "label", "client_column": "who", "model": "linear"}
    task = Byzantine(**own, byzantine=2)  # type: ignore[arg-type]
    assert task.drawn == 6 and task.entrants() == (
        "coordinate-median",
        "trimmed-mean",
        "geometric-median",
        "flag-aggregator",
    )
    assert task.check()
    with pytest.raises(ArgumentError, match="byzantine = 3: must be less than half of the 6 clients"):
        Byzantine(**own, byzantine=3).check()  # type: ignore[arg-type]


# -- the claims' own training -----------------------------------------------------------------------------------------
def test_gradients_of_workers() -> None:
    task = ByzantineGradients(attack="sign-flip", rounds=15)
    runs = {name: task.run(method(slug), config, 3) for name, slug, config in ARMS}
    score = {name: run.score("validation_accuracy") for name, run in runs.items()}
    assert score["mean"] < 0.3 and min(score[name] for name in score if name != "mean") > 0.4
    assert runs["flag"].metrics == task.run(method("flag-aggregator"), ARMS[7][2], 3).metrics
    assert {claim.slug for claim in CLAIMS} == {"flag_aggregator"} and len({claim.id for claim in CLAIMS}) == len(
        CLAIMS
    )


def test_one_step_of_the_mean_is_a_step_of_sgd() -> None:
    """All gradients' mean is that of the batch of all workers."""
    task = ByzantineGradients(byzantine=0, attack="none", rounds=1)
    problem = cached_problem(task, 0)
    model = task.build_model(problem, 0)
    rows = torch.randint(len(problem.train), (15, 32), generator=torch.Generator().manual_seed(0)).flatten()
    inputs, targets = problem.train.inputs, problem.train.targets
    torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()  # type: ignore[index]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    nll = torch.nn.functional.cross_entropy(model(problem.test.inputs).double(), problem.test.targets).item()
    assert task.run(FedAvg, {"lr": 0.1}, 0).score("test_nll") == pytest.approx(nll, rel=1e-5)
