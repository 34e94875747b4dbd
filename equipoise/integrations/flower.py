"""Flower: the library's federated methods as Flower apps, in the one module that knows Flower (extra ``equipoise[federated]``).

In a Flower project of your own:

    app = client_app(FedSpeed(), make_model, data)                 # client_app.py; data(context) -> examples of this client
    app = server_app(FedSpeed(), make_model, rounds=20, clients=10)  # server_app.py

The same two apps run in one process on ``InProcessGrid``, on Flower's simulation engine, and on SuperLink and SuperNodes; under
one seed with equal results, where the clients are numbered by ``partition-id`` in their node's configuration. Method and model must
be made alike on both sides; how to train (``LocalTraining``) and the seed are the server's, and sent along. ``examples/federated``
is such a project, and runs in all three ways.

Strategies of Flower's own (FedAdam, FedMedian, ...) drive the same ``client_app`` where the method changes local training alone
(FedAvg, FedProx, FedSAM, a loss). How to train is their ``train_config``: ``ConfigRecord(LocalTraining(lr=0.05).as_config())``, or
``LocalTraining()`` without one.

A round never stops for a client: one that fails, does not answer in time, or answers with what cannot be used is named in the log
(logger ``equipoise.federated``) and in ``strategy.faults``, and left out. What a client changed of its state in a round that the
server did not accept is undone on that client the next time.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.errors import (
    ArgumentError,
    CheckpointError,
    MissingDependencyError,
    check_integer,
    check_range,
)
from equipoise.federated.algorithm import Client, LocalTraining, Methods, Scalar, Sent, Server, Update, rows_of
from equipoise.federated.params import Params, check_same, is_finite, size, state_of
from equipoise.training import checkpoint as checkpoints
from equipoise.training.assemble import LossFunction, derived_seed
from equipoise.training.method import Method

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Result, Strategy
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise MissingDependencyError(
        f"flwr cannot be imported ({error}): federated training needs Flower. pip install 'equipoise[federated]'"
    ) from error

logger = logging.getLogger("equipoise.federated")

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # names of the records, those of Flower's own strategies
EXTRA, STATE, BEFORE = "extra/", "equipoise", "before/"
# What the engine adds to the config of a message; and what holds where a strategy of Flower's own sends it, which adds the first.
OWN: dict[str, Any] = {"server-round": 0, "query": "", "seed": 0, "accepted": 2**31, "run": ""}
Data = Sequence[Any] | Callable[[Context], Any]
ModelFactory = nn.Module | Callable[[], nn.Module]


# -- tensors and records ----------------------------------------------------------------------------------------------
def encode(params: Params) -> ArrayRecord:
    """An ``ArrayRecord``, as ``ArrayRecord(state_dict)`` makes it; bfloat16, which numpy lacks, becomes float32."""
    return ArrayRecord({name: _array(tensor) for name, tensor in params.items()})


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return Array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy())


def decode(record: ArrayRecord, device: torch.device | None = None, *, copy: bool = True) -> Params:
    """The tensors of a record. Raises ``ArgumentError`` for data that are not what their header says.

    Without ``copy`` the tensors are the record's own memory, and nothing may write to them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that is read-only
        return {name: _tensor(name, array, copy).to(device or "cpu") for name, array in record.items()}


def _tensor(name: str, array: Array, copy: bool) -> Tensor:
    # Not numpy.load: it would allocate whatever a damaged or malicious header asks for.
    if array.stype != "numpy.ndarray":
        raise ArgumentError(f"array {name!r} is serialised as {array.stype!r}: must be 'numpy.ndarray'")
    stream = BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError, SyntaxError) as error:
        raise ArgumentError(f"array {name!r} is damaged ({error})") from error
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(array.data) - stream.tell():
        raise ArgumentError(f"array {name!r} is damaged: {len(array.data)} bytes for {dtype} {shape}")
    values = np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(values.copy() if copy else values)


def nbytes(content: RecordDict) -> int:
    """Bytes of the arrays of a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _make(model: ModelFactory) -> nn.Module:
    made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"model() returned {type(made).__name__}: must be a torch.nn.Module")
    return made


# -- the client -------------------------------------------------------------------------------------------------------
def client_app(
    methods: Method | Sequence[Method],
    model: ModelFactory,
    data: Data,
    *,
    loss: LossFunction | None = None,
    state: str | Path | None = None,
    mods: list[Any] | None = None,
) -> ClientApp:
    """A Flower ``ClientApp`` that trains, evaluates and answers queries by the methods.

    methods: one federated method, or several (a local rule and an aggregation, say); others that change only the loss may join.
    model: a module, which is copied, or a function that makes one; on every client and the server the same.
    data: ``data(context) -> examples`` or ``-> (examples, test examples)``, or a sequence of these by ``partition-id``.
        Examples are what ``fit`` takes; a pair of tensors is (inputs, targets).
    loss: of a batch, by default cross-entropy.
    state: folder in which a client also keeps its state, so that it outlives the node; by default in Flower's ``context.state``.
    mods: Flower's.
    """
    worker = _Worker(Methods(methods), model, data, loss, None if state is None else Path(state))
    app = ClientApp(mods=mods)
    app.train()(worker.train)
    app.evaluate()(worker.evaluate)
    app.query()(worker.query)
    return app


@dataclass
class _Worker:
    """What the client's app does with a message. Holds nothing of a client, since Flower makes apps anew for each message."""

    methods: Methods
    model: ModelFactory
    data: Data
    loss: LossFunction | None
    folder: Path | None
    _built: tuple[int, nn.Module, list[tuple[Tensor, Tensor]]] | None = (
        None  # seed, model, buffers as they are at first
    )

    def train(self, message: Message, context: Context) -> Message:
        client, sent, before = self._open(message, context)
        update = self._seeded(client, sent, self.methods.client_update)
        accepted = message.content.config_records[CONFIG].get("accepted", 0)
        if client.state and not before and accepted:
            lost = "client %d: has lost what it kept until round %s (give client_app a folder: state=...)"
            logger.warning(lost, client.number, accepted)
        self._keep(message, context, client, before)
        return self._reply(message, sent, update)

    def query(self, message: Message, context: Context) -> Message:
        if message.content.config_records[CONFIG].get("query") == "describe":
            number = int(cast(int, context.node_config.get("partition-id", -1)))
            rows = rows_of(self._data(context)[0])
            metrics = MetricRecord({"partition-id": number, "num-examples": rows})
            return Message(RecordDict({METRICS: metrics}), reply_to=message)
        client, sent, _ = self._open(message, context)
        update = self._seeded(client, sent, self.methods.answer)
        self._keep(message, context, client)
        return self._reply(message, sent, update)

    def evaluate(self, message: Message, context: Context) -> Message:
        client, sent, _ = self._open(message, context)
        found = self.methods.evaluate(client, sent)
        metrics = {**found, "num-examples": len(client), "server-round": sent.round}
        return Message(RecordDict({METRICS: MetricRecord(cast(Any, metrics))}), reply_to=message)

    # -- opening and closing ------------------------------------------------------------------------------------------
    def _open(self, message: Message, context: Context) -> tuple[Client, Sent, dict[str, ArrayRecord]]:
        """The client as a method sees it, what was sent, and the records of the client's state."""
        content = message.content
        config = dict(content.config_records[CONFIG])
        if "run" not in config and (needed := self.methods.on_server):
            raise ArgumentError(
                f"methods holds {needed[0]}, which has a part on the server: drive the clients by server_app or "
                "FederatedStrategy of equipoise.integrations.flower, not by a strategy of Flower's own"
            )
        round, query, seed, accepted, run = (config.pop(key, default) for key, default in OWN.items())
        model = self._model(cast(int, seed))
        device = next(model.parameters()).device
        arrays = decode(content.array_records[ARRAYS], device)
        extras = {
            name.removeprefix(EXTRA): decode(record, device)
            for name, record in content.array_records.items()
            if name.startswith(EXTRA)
        }
        learned = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        packed = {name: tensor for name, tensor in arrays.items() if name in learned}
        buffers = {name: tensor for name, tensor in arrays.items() if name not in learned}
        params = self.methods.unpack(packed, extras, learned)
        check_same({**params, **buffers}, model.state_dict(), "the server's parameters")
        model.load_state_dict({**params, **buffers})
        sent = Sent(params, buffers, cast(int, round), extras, cast(dict[str, Scalar], config), cast(str, query))
        data, test = self._data(context)
        number = int(cast(int, context.node_config.get("partition-id", context.node_id)))
        kept = self._kept(context, number, cast(str, run), cast(int, accepted))
        client = Client(
            number,
            model,
            data,
            test=test,
            state={name: decode(record, device) for name, record in kept.items()},
            local=LocalTraining.of(config),
            round=sent.round,
            seed=cast(int, seed),
            loss=self.loss,
            methods=self.methods.others,
        )
        return client, sent, kept

    def _seeded(self, client: Client, sent: Sent, work: Callable[[Client, Sent], Update]) -> Update:
        """Dropout and the like draw from the global generator: its stream is that of this client and round."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which leaves a seed waiting for every accelerator that is not in use.
            torch.default_generator.manual_seed(
                derived_seed(client.seed, f"global, client {client.number}, round {client.round}")
            )
            return work(client, sent)

    def _reply(self, message: Message, sent: Sent, update: Update) -> Message:
        metrics = {
            **update.metrics,
            "num-examples": update.num_examples,
            "num-steps": update.num_steps,
            "server-round": sent.round,
        }
        content = RecordDict({METRICS: MetricRecord(cast(Any, metrics))})
        if update.params or update.buffers:
            params = update.params if sent.query else self.methods.pack(update.params, sent.extras)
            content[ARRAYS] = encode({**params, **update.buffers})
        for name, params in update.extras.items():
            content[EXTRA + name] = encode(params)
        return Message(content, reply_to=message)

    def _model(self, seed: int) -> nn.Module:
        if self._built is None or self._built[0] != seed:
            made = self.methods.configure_model(_make(self.model), seed)
            self._built = seed, made, [(buffer, buffer.clone()) for buffer in made.buffers()]
        with torch.no_grad():  # those that are not sent would go from one client to the next
            for buffer, first in self._built[2]:
                buffer.copy_(first)
        return self._built[1]

    def _data(self, context: Context) -> tuple[Any, Any]:
        if callable(self.data):
            found = self.data(context)
        else:
            number = context.node_config.get("partition-id")
            if not isinstance(number, int) or not 0 <= number < len(self.data):
                raise ArgumentError(
                    f"partition-id = {number!r}: must be in [0, {len(self.data) - 1}], a client of the data"
                )
            found = self.data[number]
        if isinstance(found, tuple) and len(found) == 2 and not isinstance(found[1], Tensor):
            return found
        return found, None

    # -- state: kept as it was before and after the last round, of which the server says whether it accepted it ----------
    def _kept(self, context: Context, number: int, run: str, accepted: int) -> dict[str, ArrayRecord]:
        """What this client kept in this run of the server, without what it kept in a round that the server did not accept."""
        state = context.state
        if STATE not in state and self.folder is not None and checkpoints.exists(self.folder / str(number)):
            saved = checkpoints.load(self.folder / str(number))
            before, after = ({n: encode(p) for n, p in saved[which].items()} for which in ("before", "after"))
            _put(state, saved["stamp"], before, after)
        stamp = state.config_records.get(STATE)
        if stamp is None or stamp["run"] != run:
            return {}
        undone = cast(int, stamp["round"]) > accepted
        if undone:
            logger.info("client %d: undoes what it kept of round %s", number, stamp["round"])
        records = state.array_records.items()
        return {name.removeprefix(BEFORE): record for name, record in records if name.startswith(BEFORE) == undone}

    def _keep(
        self, message: Message, context: Context, client: Client, before: dict[str, ArrayRecord] | None = None
    ) -> None:
        """Keep the client's state; ``before`` is what it was, by default the same."""
        after = {name: encode(params) for name, params in client.state.items()}
        before = after if before is None else before
        if not before and not after:
            return
        config = message.content.config_records[CONFIG]
        round, run = (config.get(key, OWN[key]) for key in ("server-round", "run"))
        stamp: dict[str, Scalar] = {"round": cast(int, round), "run": cast(str, run)}
        _put(context.state, stamp, before, after)
        if self.folder is not None:
            then = {name: decode(record) for name, record in before.items()}
            checkpoints.save({"stamp": stamp, "before": then, "after": client.state}, self.folder / str(client.number))


def _put(
    state: RecordDict, stamp: dict[str, Scalar], before: dict[str, ArrayRecord], after: dict[str, ArrayRecord]
) -> None:
    for name in list(state.array_records):
        del state[name]
    for name, record in (*after.items(), *((BEFORE + name, record) for name, record in before.items())):
        state[name] = record
    state[STATE] = ConfigRecord(cast(Any, stamp))


# -- the server -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """A client that was left out of a round, and why."""

    round: int
    client: int
    reason: str


class _Rejected(Exception):
    """An answer that cannot be used; says why."""


class FederatedStrategy(Strategy):
    """A Flower ``Strategy`` that runs federated methods: see ``server_app``, which makes one, for the settings.

    Attributes: ``server`` (an ``equipoise.federated.Server``), ``faults``, ``history`` (one dict a round: who answered, mean
    training metrics, bytes, and what ``evaluate`` gave), ``bytes`` (of the whole run, "up" and "down"), ``client_metrics`` (what
    each client's evaluation gave last, by its number).
    """

    def __init__(
        self,
        methods: Method | Sequence[Method],
        model: ModelFactory,
        *,
        local: LocalTraining | None = None,
        fraction: float = 1.0,
        clients: int = 1,
        seed: int = 0,
        evaluate: Callable[[nn.Module, int], Mapping[str, float] | None] | None = None,
        evaluate_clients: int = 0,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        max_extra_bytes: int | None = None,
    ) -> None:
        check_range("fraction", fraction, 0, 1, open_low=True)
        check_integer("clients", clients, 1)
        check_integer("seed", seed, 0)
        check_integer("evaluate_clients", evaluate_clients, 0)
        if resume and checkpoint is None:
            raise ArgumentError("checkpoint = None: must name a folder where resume is given")
        self.methods, self.fraction, self.clients = Methods(methods), fraction, clients
        self.evaluate, self.evaluate_clients = evaluate, evaluate_clients
        self.checkpoint, self.resume = None if checkpoint is None else Path(checkpoint), resume
        made = self.methods.configure_model(_make(model), seed)
        params, buffers = state_of(made)
        self.server = Server(made, params, buffers, seed=seed, local=local or LocalTraining(), fraction=fraction)
        self.max_extra_bytes = 8 * size({**params, **buffers}) + 2**20 if max_extra_bytes is None else max_extra_bytes
        self.faults: list[Fault] = []
        self.history: list[dict[str, Any]] = []
        self.client_metrics: dict[int, dict[str, float]] = {}
        self._nodes: dict[int, int] = {}  # a client's number: its node
        self._silent: set[int] = set()  # nodes that did not answer when they were last asked
        self._left: set[int] = set()  # nodes in whose place another is: Flower lists a dead one for up to a minute
        self._accepted: dict[int, int] = {}  # a client's number: the last round in which its update was accepted
        self._addressed: list[int] = []
        self._sent: list[Any] = []  # metadata of the messages to them, which get their ids when they are sent
        self.bytes = {"up": 0, "down": 0}  # of all arrays of all messages
        self._before = dict(self.bytes)
        self._run = uuid4().hex  # tells clients that keep their state in a folder which run it belongs to
        self._begun, self._started, self._timeout = False, False, 3600.0
        self._arrays: ArrayRecord | None = None
        self._grid: Grid | None = None

    # -- Flower's interface -------------------------------------------------------------------------------------------
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.methods.packs and not self._started:
            raise ArgumentError(
                f"methods = {self.methods!r}: sends parameters in a form of its own, which a strategy that is wrapped around this "
                "one cannot read. Run it without a wrapper"
            )
        self._begin(grid, arrays)
        server = self.server
        self._accept(arrays)
        server.round = server_round
        server.config.update(cast(dict[str, Scalar], dict(config)))
        self._before = dict(self.bytes)
        self._find_clients()
        return self._messages("train", self._draw(), server.sent())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        server = self.server
        updates = self._read(replies, training=True)
        record: dict[str, Any] = {"round": server_round, "clients": [update.client for update in updates]}
        if updates:
            kept = server.params, server.buffers, dict(server.state), dict(server.extras)
            self.methods.aggregate(server, updates)
            if is_finite({**server.params, **server.buffers}):
                self._accepted |= dict.fromkeys(record["clients"], server_round)
                self._arrays = encode({**server.params, **server.buffers})
                record |= _mean_metrics(updates)
            else:
                server.params, server.buffers, server.state, server.extras = kept
                logger.warning("round %d: the aggregate is not finite; the parameters stay as they were", server_round)
        else:
            logger.warning("round %d: no usable answer; the parameters stay as they were", server_round)
        record |= {f"bytes_{way}": total - self._before[way] for way, total in self.bytes.items()}
        self.history.append(record)
        metrics = {k: v for k, v in record.items() if isinstance(v, int | float)}
        return self._arrays, MetricRecord(cast(Any, metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.evaluate_clients or server_round % self.evaluate_clients:
            return []
        self._accept(arrays)
        return self._messages("evaluate", sorted(self._nodes), self.server.sent())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found = self._read(replies, training=False)
        if not found:
            return None
        for update in found:
            self.client_metrics[update.client] = update.metrics
        means = _mean_metrics(found)
        self.history[-1] |= {f"clients_{name}": value for name, value in means.items()}
        return MetricRecord(cast(Any, means))

    def summary(self) -> None:
        logger.info("%r: fraction %g of the clients, %s", self.methods, self.fraction, self.server.local)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds as Flower's strategies do, from the checkpoint where there is one to resume; ``prepare`` and ``finish``
        of the methods come before and after them. Without ``initial_arrays`` the model's own parameters are the first."""
        check_integer("num_rounds", num_rounds, 0)
        self._started, self._timeout, self.server.rounds = True, timeout, num_rounds
        self._begin(grid, initial_arrays)
        result, server = Result(), self.server
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        self.summary()
        while server.round < num_rounds:
            round = server.round + 1
            assert self._arrays is not None
            messages = self.configure_train(round, self._arrays, train_config, grid)
            _, metrics = self.aggregate_train(round, self._exchange(messages))
            if metrics is not None:
                result.train_metrics_clientapp[round] = metrics
            messages = list(self.configure_evaluate(round, self._arrays, evaluate_config, grid))
            metrics = self.aggregate_evaluate(round, self._exchange(messages)) if messages else None
            if metrics is not None:
                result.evaluate_metrics_clientapp[round] = metrics
            if evaluate_fn is not None and (metrics := evaluate_fn(round, self._arrays)) is not None:
                result.evaluate_metrics_serverapp[round] = metrics
            if self.evaluate is not None:
                self.history[-1] |= dict(self.evaluate(server.load(), round) or {})
            self._save()
        self.methods.finish(server)
        self._arrays = encode({**server.params, **server.buffers})
        server.load()
        result.arrays = self._arrays
        return result

    # -- clients ------------------------------------------------------------------------------------------------------
    def _begin(self, grid: Grid, arrays: ArrayRecord | None) -> None:
        if self._begun:
            return
        self._begun, self._grid = True, grid
        resumed = self.resume and self.checkpoint is not None and checkpoints.exists(self.checkpoint)
        if resumed:
            self._restore(checkpoints.load(cast(Path, self.checkpoint)))
        elif arrays is not None:
            self._take(arrays)
        self._find_clients(wait=True)
        self.server.ask = self._ask
        if not resumed:
            self.methods.prepare(self.server)
        self._arrays = encode({**self.server.params, **self.server.buffers})

    def _accept(self, arrays: ArrayRecord) -> None:
        """Go on from these arrays, if another strategy is wrapped around this one and has changed them (by noise, say)."""
        if arrays is not self._arrays:
            self._take(arrays)
            self._arrays = arrays

    def _take(self, arrays: ArrayRecord) -> None:
        found, server = decode(arrays), self.server
        check_same(found, {**server.params, **server.buffers}, "arrays")
        server.params = {name: found[name] for name in server.params}
        server.buffers = {name: found[name] for name in server.buffers}

    def _find_clients(self, wait: bool = False) -> None:
        """Who is there: ask nodes that were not met before for their client's number and its number of examples."""
        assert self._grid is not None
        end = time.time() + self._timeout
        needed = self.clients if wait else 1
        while len(nodes := sorted(self._grid.get_node_ids())) < needed:
            if time.time() > end:
                raise ArgumentError(
                    f"clients = {needed}: only {len(nodes)} nodes are connected after {self._timeout:g} s"
                )
            logger.info("waiting for clients: %d of %d are connected", len(nodes), needed)
            time.sleep(0.5)
        self._nodes = {number: node for number, node in self._nodes.items() if node in nodes}
        self._left.intersection_update(nodes)
        new = [node for node in nodes if node not in self._nodes.values() and node not in self._left]
        if not new:
            return
        content = RecordDict({CONFIG: ConfigRecord({"query": "describe"})})
        messages = [Message(content, node, "query") for node in new]
        for reply in sorted(self._exchange(messages), key=lambda reply: reply.metadata.src_node_id):
            node = reply.metadata.src_node_id
            said = None if reply.has_error() else reply.content.metric_records.get(METRICS)
            if said is None or not all(isinstance(said.get(key), int) for key in ("partition-id", "num-examples")):
                reason = _short(reply.error.reason) if reply.has_error() else "no usable answer"
                self._fault(-1, f"does not say who it is (node {node}): {reason}")
                continue
            number, rows = cast(int, said["partition-id"]), cast(int, said["num-examples"])
            if number < 0:
                number = max(self.server.clients, default=-1) + 1
            if self._nodes.get(number) in self._silent:
                self._left.add(self._nodes.pop(number))
                logger.info("client %d: is back, as node %d", number, node)
            if number in self._nodes:
                remedy = "Start each node with its own --node-config 'partition-id=...'"
                if wait:
                    raise ArgumentError(f"partition-id = {number}: is given to two nodes. {remedy}")
                self._fault(number, f"is given to a second node, {node}, which takes no part. {remedy}")
            elif rows < 1:
                self._fault(number, "has no data")
            else:
                self._nodes[number] = node
                self.server.clients[number] = rows
        if not self._nodes:
            raise ArgumentError("clients: none of the nodes has data to train on")

    def _draw(self) -> list[int]:
        """The clients of a round, by number: a function of the seed, the round and who is there."""
        present, known = sorted(self._nodes), self.server.num_clients
        count = int(self.fraction * known + 1e-9)
        if count < 1:
            raise ArgumentError(f"fraction = {self.fraction}: draws none of {known} clients. Raise it to {1 / known:g}")
        order = torch.randperm(len(present), generator=self.server.generator("draw"))[:count]
        return sorted(present[i] for i in order.tolist())

    # -- messages -----------------------------------------------------------------------------------------------------
    def _messages(self, kind: str, numbers: Sequence[int], sent: Sent) -> list[Message]:
        self._addressed = list(numbers)
        arrays = self._arrays  # as they are encoded already
        if arrays is None or sent.query or self.methods.packs:
            arrays = encode({**self.methods.pack(sent.params, sent.extras), **sent.buffers})
        extras = {EXTRA + name: encode(params) for name, params in sent.extras.items()}
        own: tuple[Scalar, ...] = (sent.round, sent.query, self.server.seed, 0, self._run)
        config = {**sent.config, **dict(zip(OWN, own, strict=True))}
        messages = []
        for number in numbers:
            config["accepted"] = self._accepted.get(number, 0)
            records = {ARRAYS: arrays, CONFIG: ConfigRecord(cast(Any, config)), **extras}
            content = RecordDict(cast(Any, records))
            self.bytes["down"] += nbytes(content)
            messages.append(Message(content, self._nodes[number], kind))
        self._sent = [message.metadata for message in messages]
        return messages

    def _exchange(self, messages: Iterable[Message]) -> list[Message]:
        assert self._grid is not None
        return list(self._grid.send_and_receive(messages, timeout=self._timeout))

    def _ask(
        self,
        query: str,
        extras: dict[str, Params] | None = None,
        config: Mapping[str, Scalar] | None = None,
        clients: Sequence[int] | None = None,
    ) -> list[Update]:
        """Send a query to clients; their answers, in the order of the clients' numbers."""
        sent = self.server.sent(query)
        sent.extras |= extras or {}
        sent.config |= config or {}
        numbers = sorted(self._nodes) if clients is None else [number for number in clients if number in self._nodes]
        return self._read(self._exchange(self._messages("query", numbers, sent)), training=False)

    def _read(self, replies: Iterable[Message], training: bool) -> list[Update]:
        """The usable answers, in the order of the clients' numbers; every other is named and left out."""
        numbers = {node: number for number, node in self._nodes.items()}
        asked = set(self._addressed)
        waiting, updates = set(asked), {}
        sent = {metadata.message_id: numbers.get(metadata.dst_node_id, -1) for metadata in self._sent}
        self._addressed = []
        for reply in replies:
            number = numbers.get(reply.metadata.src_node_id, -1)
            if number < 0 and reply.has_error():  # Flower answers in the place of a node that is gone
                number = sent.get(reply.metadata.reply_to_message_id, -1)
            if number not in waiting:
                self._fault(number, f"node {reply.metadata.src_node_id} answered without being asked, or twice")
                continue
            waiting.discard(number)
            try:
                updates[number] = self._update(number, reply, training)
            except _Rejected as rejected:
                self._fault(number, str(rejected))
        for number in sorted(waiting):
            self._fault(number, "did not answer in time")
        self._silent = {self._nodes[number] for number in waiting} | (self._silent - {self._nodes[n] for n in asked})
        return [updates[number] for number in sorted(updates)]

    def _update(self, number: int, reply: Message, training: bool) -> Update:
        if reply.has_error():
            raise _Rejected(f"failed: {_short(reply.error.reason)}")
        content, server = reply.content, self.server
        arrived = nbytes(content)
        self.bytes["up"] += arrived
        metrics = dict(content.metric_records.get(METRICS, {}))
        rows, steps, round = (
            metrics.pop(key, default) for key, default in (("num-examples", 0), ("num-steps", 0), ("server-round", -1))
        )
        if round != server.round:
            raise _Rejected(f"sent a stale update, of round {round}")
        if not isinstance(rows, int) or rows < 1 or not isinstance(steps, int) or (training and steps < 1):
            raise _Rejected(f"sent no usable number of examples or steps: {rows!r}, {steps!r}")
        expected = {**server.params, **server.buffers} if training else {}
        room = size(expected) + 4096 * (len(expected) + 1) + self.max_extra_bytes + server.extra_bytes
        if arrived > room:
            raise _Rejected(f"sent a message of {arrived} bytes, where at most {room} fit")
        try:
            groups = {name: decode(record, copy=False) for name, record in content.array_records.items()}
            found = groups.pop(ARRAYS, {})
            if training:
                packed = {name: found[name] for name in server.params if name in found}
                found = {**found, **self.methods.unpack(packed, server.extras, server.params)}
                check_same(found, expected, "its parameters")
                wrong = [name for name in expected if not torch.can_cast(found[name].dtype, expected[name].dtype)]
                if wrong:
                    raise ArgumentError(f"{wrong[0]!r} is {found[wrong[0]].dtype}: must be {expected[wrong[0]].dtype}")
                found = {name: found[name].to(expected[name]) for name in expected}
        except (ValueError, TypeError, RuntimeError) as error:
            raise _Rejected(f"sent what does not fit: {error}") from error
        if not all(map(is_finite, (found, *groups.values()))):
            raise _Rejected("sent NaN or infinite numbers")
        params = {name: found[name] for name in server.params if name in found} if training else found
        buffers = {name: found[name] for name in server.buffers} if training else {}
        extras = {name.removeprefix(EXTRA): group for name, group in groups.items()}
        return Update(params, rows, steps, buffers, extras, cast(dict[str, float], metrics), number)

    def _fault(self, client: int, reason: str) -> None:
        self.faults.append(Fault(self.server.round, client, reason))
        logger.warning("round %d: client %d is left out: it %s", self.server.round, client, reason)

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def _identity(self) -> dict[str, Any]:
        return {
            "methods": re.sub(r" at 0x[0-9a-f]+", "", repr(self.methods)),
            "model": str({name: tuple(tensor.shape) for name, tensor in self.server.model.state_dict().items()}),
            "seed": self.server.seed,
            "fraction": self.fraction,
            "local": repr(self.server.local),
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        server = self.server
        state = {
            "identity": self._identity(),
            "run": self._run,
            "round": server.round,
            "params": server.params,
            "buffers": server.buffers,
            "state": server.state,
            "extras": server.extras,
            "config": server.config,
            "clients": server.clients,
            "accepted": self._accepted,
            "bytes": self.bytes,
            "history": self.history,
            "client_metrics": self.client_metrics,
            "faults": [(fault.round, fault.client, fault.reason) for fault in self.faults],
        }
        checkpoints.save(state, self.checkpoint)

    def _restore(self, saved: dict[str, Any]) -> None:
        mine, theirs = self._identity(), saved["identity"]
        different = [
            f"{key}: {theirs.get(key)!r} there, {mine[key]!r} here" for key in mine if mine[key] != theirs.get(key)
        ]
        if different:
            raise CheckpointError(
                f"checkpoint belongs to another run ({'; '.join(different)}): use another folder, or the same settings"
            )
        server = self.server
        for name in ("round", "params", "buffers", "state", "extras", "config", "clients"):
            setattr(server, name, saved[name])
        self._run, self._accepted, self.history = saved["run"], saved["accepted"], saved["history"]
        self.client_metrics, self.bytes = saved["client_metrics"], saved["bytes"]
        self.faults = [Fault(*fault) for fault in saved["faults"]]
        logger.info("resumes after round %d", server.round)


def server_app(
    methods: Method | Sequence[Method],
    model: ModelFactory,
    *,
    rounds: int,
    timeout: float = 3600,
    finished: Callable[[FederatedStrategy, Context], None] | None = None,
    **settings: Any,
) -> ServerApp:
    """A Flower ``ServerApp`` that runs the methods for so many rounds.

    methods, model: as in ``client_app``. timeout: seconds to wait for the clients of a round. finished: is handed the strategy and
    Flower's context at the end (``strategy.server.load()`` is the model). Settings, those of ``FederatedStrategy``:

    local: a ``LocalTraining``, how clients train. fraction: share of the clients drawn in a round. clients: how many nodes to
    wait for. seed: of everything. evaluate: ``(model, round) -> numbers`` after each round. evaluate_clients: let all clients
    evaluate the model on their own test examples every so many rounds; 0 for never. checkpoint: folder to save to after each
    round. resume: go on from it. max_extra_bytes: what a client may send beside its parameters, by default 8 times their size
    and 1 MiB.

    ``rounds``, ``timeout``, ``fraction``, ``clients``, ``seed``, ``checkpoint`` ("" for none) and ``resume`` are overridden by
    entries of these names in Flower's ``run_config``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config: dict[str, Any] = dict(context.run_config)
        known = ("fraction", "clients", "seed", "checkpoint", "resume")
        given = {key: config[key] for key in known if key in config}
        if given.get("checkpoint") == "":  # there is no None in a run_config
            given["checkpoint"] = None
        strategy = FederatedStrategy(methods, model, **{**settings, **given})
        times = {"num_rounds": config.get("rounds", rounds), "timeout": config.get("timeout", timeout)}
        strategy.start(grid, **times)
        if finished is not None:
            finished(strategy, context)

    return app


# -- one process ------------------------------------------------------------------------------------------------------
class InProcessGrid(Grid):
    """Runs a ``ClientApp`` for each of ``clients`` nodes in this process, one after the other: no Ray, no network, no waiting.

    Messages, records and each client's ``context.state`` are Flower's own. A client that raises becomes an error reply; one
    that takes longer than the timeout is not heard. If the first time that clients train all of them raise (two or more, or the
    only one there is), then so does the grid: here that is the program's mistake, and every further round would be lost.
    """

    def __init__(self, app: ClientApp, clients: int, run_config: Mapping[str, Any] | None = None) -> None:
        check_integer("clients", clients, 1)
        self.app, self.run_id = app, 1
        self.contexts = {
            node: Context(
                run_id=self.run_id,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in range(1, clients + 1)
        }
        self._replies: dict[str, Message] = {}
        self._trained = False
        with contextlib.suppress(RuntimeError):  # inside a run of Flower's the identity is set, and stays
            _ = TaskIdentity.task_id
            return
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, self.run_id, 0

    def set_run(self, run: Any) -> None:
        pass

    @property
    def run(self) -> Any:
        raise NotImplementedError("a run in one process has no record of Flower's")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._call(message)[0] for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        calls = [self._call(message) for message in messages]
        replies = {key: reply for key, _ in calls for reply in self.pull_messages([key])}
        if not self._trained and messages and messages[0].metadata.message_type == "train":
            errors = [reply.error.reason for reply in replies.values() if reply.has_error()]
            if len(errors) == len(messages) and (len(errors) > 1 or len(self.contexts) == 1):
                raise ArgumentError(
                    f"all {len(errors)} clients failed in the first round that trains, the first one by {_short(errors[0])}"
                )
            self._trained = len(errors) < len(messages)
        return [replies[key] for key, seconds in calls if key in replies and (timeout is None or seconds <= timeout)]

    def _call(self, message: Message) -> tuple[str, float]:
        key = str(uuid4())
        message.metadata.__dict__["_message_id"] = key
        start = time.perf_counter()
        try:
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # what a client's code raises must not stop the round
            logger.debug("client of node %d failed", message.metadata.dst_node_id, exc_info=True)
            reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
        self._replies[key] = reply
        return key, time.perf_counter() - start


# -- small things -----------------------------------------------------------------------------------------------------
def _mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Mean of the metrics that all clients gave, weighted by their numbers of examples."""
    total = sum(update.num_examples for update in updates)
    names = [name for name in updates[0].metrics if all(name in update.metrics for update in updates)]
    return {name: sum(u.num_examples * float(u.metrics[name]) for u in updates) / total for name in names}


def _short(reason: str | None) -> str:
    lines = [line.strip() for line in (reason or "no reason given").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
