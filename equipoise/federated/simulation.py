"""``simulate``: a whole federated run in one process, on the apps that Flower would run, and ``FederatedRun``, its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from equipoise.errors import ArgumentError, DataError, check_integer
from equipoise.federated.algorithm import LocalTraining, Server, classes_of, rows_of
from equipoise.federated.params import Params
from equipoise.training.assemble import LossFunction
from equipoise.training.method import Method

if TYPE_CHECKING:
    from equipoise.integrations.flower import Fault, ModelFactory


@dataclass
class FederatedRun:
    """What a federated run gives back.

    model: with the final parameters. params: those it learned. history: one dict a round: ``round``, ``clients`` (who
    answered), mean training metrics, ``bytes_up``, ``bytes_down``, and what ``evaluate`` gave. faults: who was left out of
    which round, and why. client_metrics: of the last evaluation on clients, by the client's number. server: its state.
    seconds, bytes_up, bytes_down: of the whole run, queries and evaluation included.
    """

    model: nn.Module
    params: Params
    history: list[dict[str, Any]]
    faults: list[Fault]
    client_metrics: dict[int, dict[str, float]]
    server: Server
    seconds: float
    bytes_up: int
    bytes_down: int
    results: dict[str, Any] = field(default_factory=dict)


def simulate(
    methods: Method | Sequence[Method],
    model: ModelFactory,
    clients: Sequence[Any],
    rounds: int,
    *,
    local: LocalTraining | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    loss: LossFunction | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float] | None] | None = None,
    evaluate_clients: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    timeout: float = 3600,
    mods: list[Any] | None = None,
    max_extra_bytes: int | None = None,
    allow_one_class: bool = False,
) -> FederatedRun:
    """Train ``model`` over ``clients`` for so many rounds, in this process. Needs ``pip install 'equipoise[federated]'``.

    >>> run = simulate(FedSpeed(), model, clients, rounds=20, fraction=0.25)  # doctest: +SKIP

    methods: one federated method, or several. model: a module, which is copied, or a function that makes one. clients: for each its
    examples, or a pair (examples, test examples). The rest: see ``equipoise.integrations.flower.server_app`` and ``client_app``;
    with ``checkpoint`` the clients keep their state in the same folder. Raises ``DataError`` for a client without data, or with
    examples of one class alone, which may be a mistake: ``allow_one_class`` takes it as it is.
    """
    from equipoise.integrations import flower

    check_integer("rounds", rounds, 0)
    if not len(clients):
        raise ArgumentError("clients = []: must hold the data of at least one client")
    for number, data in enumerate(clients):
        split = isinstance(data, tuple) and len(data) == 2 and not hasattr(data[1], "dtype")
        own = data[0] if split else data
        if rows_of(own) < 1:
            raise DataError(f"client {number} has no data: leave it out, or partition the data with least = 1")
        if classes_of(own) == 1 and not allow_one_class:
            raise DataError(
                f"client {number} has examples of one class alone: leave it out, partition the data with least_classes = 2, or "
                "give allow_one_class=True"
            )
    start = time.perf_counter()
    kept = None if checkpoint is None else Path(checkpoint) / "clients"
    if kept is not None and not resume and kept.exists():
        raise ArgumentError(
            f"checkpoint = {str(checkpoint)!r}: holds a run. Give resume=True to go on, or another folder"
        )
    app = flower.client_app(methods, model, clients, loss=loss, state=kept, mods=mods)
    strategy = flower.FederatedStrategy(
        methods,
        model,
        local=local,
        fraction=fraction,
        clients=len(clients),
        seed=seed,
        evaluate=evaluate,
        evaluate_clients=evaluate_clients,
        checkpoint=checkpoint,
        resume=resume,
        max_extra_bytes=max_extra_bytes,
    )
    strategy.start(flower.InProcessGrid(app, len(clients)), num_rounds=rounds, timeout=timeout)
    server = strategy.server
    return FederatedRun(
        server.model,
        server.params,
        strategy.history,
        strategy.faults,
        strategy.client_metrics,
        server,
        time.perf_counter() - start,
        strategy.bytes["up"],
        strategy.bytes["down"],
        server.results,
    )
