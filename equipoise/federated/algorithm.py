"""``FederatedMethod`` and what it works with: ``Client``, ``Server``, and what they exchange, ``Sent`` and ``Update``.

A round: the server draws clients and sends each its parameters (``Sent``); a client trains and answers (``Update``); the server
aggregates. Who carries the messages is none of a method's business: see ``equipoise.federated.simulate`` for one process, and
``equipoise.integrations.flower`` for Flower's simulation and deployment. Everything a method keeps is in ``client.state`` and
``server.state``, dicts of named tensors that survive from round to round and a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from equipoise.errors import ArgumentError, MethodConflictError, check_integer, check_range
from equipoise.federated.params import GradFn, Params, descend, load, state_of, weighted_mean
from equipoise.training.assemble import LossFunction, derived_seed
from equipoise.training.batch import Batch, Loader, Output, as_dataset, size_of
from equipoise.training.method import Method

Scalar = int | float | str | bool
Direction = Callable[[Params, GradFn], Params]


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round: SGD over its own data. The server decides and sends it along.

    lr: learning rate > 0; ``lr_decay`` multiplies it after each round. epochs: passes over the client's data.
    batch_size: examples of a step; a last, smaller batch is kept if it holds ``least_batch``. weight_decay, momentum: of SGD (the
    momentum starts at zero in every round). clip_norm: largest 2-norm of a step's direction before weight decay; None for none.
    """

    lr: float = 0.1
    epochs: int = 1
    batch_size: int = 32
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float | None = 10.0
    lr_decay: float = 1.0
    least_batch: int = 1

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0, open_low=True)
        check_range("lr_decay", self.lr_decay, 0, 1, open_low=True)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("momentum", self.momentum, 0, 1, open_high=True)
        if self.clip_norm is not None:
            check_range("clip_norm", self.clip_norm, 0, open_low=True)
        for name in ("epochs", "batch_size", "least_batch"):
            check_integer(name, getattr(self, name), 1)

    def at(self, round: int) -> LocalTraining:
        """The same with the learning rate of a round (1 is the first)."""
        return replace(self, lr=self.lr * self.lr_decay ** max(0, round - 1), lr_decay=1.0)

    def as_config(self) -> dict[str, Scalar]:
        """Numbers by name, ready to be sent; None is -1."""
        return {f"local-{key}": -1.0 if value is None else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, config: dict[str, Any]) -> LocalTraining:
        """What ``as_config`` gave; what is not there has its default."""
        names = {f"local-{key}": key for key in cls.__dataclass_fields__}
        found = {names[key]: value for key, value in config.items() if key in names}
        return cls(**{**found, **({"clip_norm": None} if found.get("clip_norm", 0) < 0 else {})})


@dataclass
class Sent:
    """What the server sends: the global ``params`` and ``buffers`` at the start of ``round`` (1 is the first; 0 before it), the
    named groups of tensors in ``server.extras``, the scalars in ``server.config``, and the name of a ``query`` ("" in training)."""

    params: Params
    buffers: Params
    round: int = 0
    extras: dict[str, Params] = field(default_factory=dict)
    config: dict[str, Scalar] = field(default_factory=dict)
    query: str = ""


@dataclass
class Update:
    """What a client answers. ``params`` has the names and shapes of the server's (or is empty in the answer to a query).

    buffers: the rest of the model's state. num_examples: the client's training rows. num_steps: steps done. extras: further named
    groups of tensors. metrics: numbers. client: who answered, filled in by the engine. On the server the tensors are those of the
    message: nothing may write to them.
    """

    params: Params
    num_examples: int
    num_steps: int = 0
    buffers: Params = field(default_factory=dict)
    extras: dict[str, Params] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    client: int = -1


class Client:
    """One client in one round: its data, the model with the parameters that the server sent, and the state that it keeps.

    number: which client (a partition's number). data: its training examples. test: its own test examples, or None.
    state: named groups of tensors; what a method puts here is there again the next time, on this client only.
    local: how to train, with the learning rate of this round. seed, round: of the run. num_steps: steps done so far in the round,
    at least 1 in an update that is accepted; a training loop of a method's own counts them here.
    """

    def __init__(
        self,
        number: int,
        model: nn.Module,
        data: Any,
        *,
        test: Any = None,
        state: dict[str, Params] | None = None,
        local: LocalTraining | None = None,
        round: int = 0,
        seed: int = 0,
        loss: LossFunction | None = None,
        methods: Sequence[Method] = (),
    ) -> None:
        self.number, self.model, self.data = number, model, as_dataset(data, f"data of client {number}")
        self.test = test
        self.state: dict[str, Params] = {} if state is None else state
        self.local = local or LocalTraining()
        self.round, self.seed = round, seed
        self.loss: LossFunction = loss or F.cross_entropy
        self.generator = torch.Generator().manual_seed(derived_seed(seed, f"client {number}, round {round}"))
        self.num_steps = 0
        self._loss: Tensor | float = 0.0
        self._run: Any = None
        if methods:
            from equipoise.training.run import start

            sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731  # its step is not used
            self._run = start(model, sgd, methods=methods, data=self.data, loss=self.loss, seed=seed)
            kept = [method.name for method in methods if method.state_dict()]
            if kept:
                raise ArgumentError(
                    f"{', '.join(kept)}: keeps state between steps, which a client would lose between rounds. "
                    "Combine federated methods with those that only change the loss"
                )
        self.model.train()
        self._whole = {name: buffer.clone() for name, buffer in whole_numbers(model).items()}
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = list(model.buffers())

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self._parameters.values())).device

    @property
    def params(self) -> Params:
        """Copies of the model's learned parameters as they are now."""
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def batches(self, epochs: int | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """The batches of a round: ``epochs`` passes in random orders, without batches smaller than ``local.least_batch``."""
        loader = Loader(self.data, batch_size or self.local.batch_size, device=self.device)
        for _ in range(self.local.epochs if epochs is None else epochs):
            order = torch.randperm(len(self), generator=self.generator)
            for batch in loader.batches(order):
                if len(batch) >= self.local.least_batch:
                    yield batch

    def output(self, batch: Batch) -> Output:
        """The model's output for a batch."""
        inputs = batch.inputs
        return Output.of(self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs))

    def batch_loss(self, batch: Batch) -> Tensor:
        """The loss F_i of a batch under the model as it is, with what other methods add to it."""
        if self._run is not None:
            found: Tensor = self._run.training_loss(batch)
            return found
        return self.loss(self.output(batch).prediction, batch.targets)

    def grad_fn(self, batch: Batch) -> GradFn:
        """The gradient of F_i on one batch as a function of the parameters.

        Every call draws the same dropout mask, and only the first one changes the model's buffers (running statistics).
        """
        seen: list[Tensor] = []

        def gradient(params: Params) -> Params:
            again = bool(seen)
            if again:
                torch.set_rng_state(seen[0])
                kept = [buffer.clone() for buffer in self._buffers]
            else:
                seen.append(torch.get_rng_state())
            self.set(params)
            loss = self.batch_loss(batch)
            found = torch.autograd.grad(
                loss, list(self._parameters.values()), allow_unused=True, materialize_grads=True
            )
            if not again:
                self._loss += loss.detach()
            elif kept:
                with torch.no_grad():
                    torch._foreach_copy_(self._buffers, kept)
            return dict(zip(self._parameters, found, strict=True))

        return gradient

    @torch.no_grad()
    def set(self, params: Params) -> None:
        """Put parameters into the model."""
        torch._foreach_copy_(list(self._parameters.values()), [params[name] for name in self._parameters])

    def train(
        self,
        direction: Direction | None = None,
        *,
        clip_norm: float | None = None,
        after_step: Callable[[Params], Params] | None = None,
    ) -> Params:
        """Train for the round and return the local parameters, which the model has then too.

        direction: ``(params, grad_fn) -> q``, by default the gradient; a step is ``descend`` along it. clip_norm: instead of
        ``local.clip_norm``. after_step: changes the parameters after each step (a mask, say).
        """
        params, local = self.params, self.local
        velocity = {name: torch.zeros_like(tensor) for name, tensor in params.items()} if local.momentum else None
        limit = local.clip_norm if clip_norm is None else clip_norm
        for batch in self.batches():
            grad_fn = self.grad_fn(batch)
            step = grad_fn(params) if direction is None else direction(params, grad_fn)
            params = descend(
                params,
                step,
                lr=local.lr,
                weight_decay=local.weight_decay,
                clip_norm=limit,
                momentum=local.momentum,
                velocity=velocity,
            )
            if after_step is not None:
                params = after_step(params)
            self.num_steps += 1
        if not self.num_steps:
            raise ArgumentError(
                f"client {self.number}: none of its batches has least_batch = {self.local.least_batch} examples, of {len(self)}"
            )
        self.set(params)
        return params

    def update(
        self,
        params: Params,
        *,
        extras: dict[str, Params] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> Update:
        """The answer of a round: parameters, the model's other state, counts, and the mean training loss.

        Raises ``ArgumentError`` if training has changed a buffer of whole numbers, of which no mean over clients can be taken.
        """
        found = dict(metrics or {})
        if self.num_steps:
            found.setdefault("loss", float(self._loss) / self.num_steps)
        buffers = state_of(self.model)[1]
        for name, before in self._whole.items():
            if not torch.equal(buffers[name], before):
                raise ArgumentError(
                    f"model changes its buffer {name!r} ({before.dtype}) in training: clients' whole numbers have no mean. "
                    "Keep it in floating point, or register it with persistent=False"
                )
        return Update(params, len(self), self.num_steps, buffers, dict(extras or {}), found, self.number)

    @torch.no_grad()
    def predict(self, data: Any, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Predictions and targets of a data set, in evaluation mode."""
        return predict(model or self.model, data)


@torch.no_grad()
def predict(model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    """Predictions and targets of a data set, in order, in evaluation mode; the model's mode stays as it was."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        pairs = []
        for batch in Loader(as_dataset(data), 1024, device=device):
            inputs = batch.inputs
            found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            pairs.append((Output.of(found).prediction, batch.targets))
    finally:
        for module in training:
            module.training = True
    return torch.cat([p for p, _ in pairs]), torch.cat([t for _, t in pairs])


Ask = Callable[..., list[Update]]


@dataclass
class Server:
    """The server's side of a run.

    model: built as on the clients; ``load()`` puts the current parameters into it. params, buffers: the global ones; ``aggregate``
    replaces them. state: named groups of tensors that survive from round to round (running sums, never one row a client).
    extras, config: groups of tensors and scalars that every message to a client carries from now on. local: how clients train.
    round: the current one, 1 the first, 0 in ``prepare``; rounds: how many there will be. clients: number of training examples of
    each known client, by its number. fraction: share of them that a round draws. ask: ``ask(query, extras=None, config=None,
    clients=None) -> list[Update]`` sends a query to all clients (or those of the given numbers), whose methods answer it in
    ``answer``. extra_bytes: how much an answer may hold beyond ``max_extra_bytes``; a method that asks for more raises it.
    results: what a method wants to hand over.
    """

    model: nn.Module
    params: Params
    buffers: Params
    rounds: int = 0
    seed: int = 0
    local: LocalTraining = field(default_factory=LocalTraining)
    round: int = 0
    state: dict[str, Params] = field(default_factory=dict)
    extras: dict[str, Params] = field(default_factory=dict)
    config: dict[str, Scalar] = field(default_factory=dict)
    clients: dict[int, int] = field(default_factory=dict)
    fraction: float = 1.0
    ask: Ask | None = None
    extra_bytes: int = 0
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """Number m of all known clients, drawn or not."""
        return len(self.clients)

    @property
    def num_drawn(self) -> int:
        """Number of clients that a round draws."""
        return int(self.fraction * self.num_clients + 1e-9)

    def generator(self, name: str) -> torch.Generator:
        """A generator of this round that follows from the seed and ``name``."""
        return torch.Generator().manual_seed(derived_seed(self.seed, f"server {name}, round {self.round}"))

    def load(self) -> nn.Module:
        """The model with the current global parameters and buffers."""
        load(self.model, self.params, self.buffers)
        return self.model

    def sent(self, query: str = "") -> Sent:
        """What a message of this round carries."""
        config = {**self.local.at(self.round).as_config(), **self.config}
        return Sent(self.params, self.buffers, self.round, dict(self.extras), config, query)


class FederatedMethod(Method):
    """Base of the federated methods, and federated averaging itself: a subclass overrides what it changes.

    Of the methods of one run, at most one may override each of ``client_update``, ``aggregate``, ``evaluate`` and ``pack``. The
    others are called in order. ``weighted``: whether the mean over clients weighs them by their numbers of examples, or all alike.
    """

    weighted: bool = True

    def configure_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Change the model before anything is sent. Called on the server and on every client: must depend on nothing else."""
        return model

    def prepare(self, server: Server) -> None:  # type: ignore[override]
        """Before the first round: fill ``server.state``, ``extras`` and ``config``; ``server.ask`` the clients."""

    def client_update(self, client: Client, sent: Sent) -> Update:
        """Train on a client, whose model holds what was sent, and return what it answers."""
        return client.update(client.train())

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        """Turn the updates of a round, in the order of the clients' numbers, into the next global parameters and buffers.

        ``server.params`` holds those that the clients started from. Here: the weighted mean.
        """
        weights = self.weights(updates)
        server.params = weighted_mean([update.params for update in updates], weights)
        server.buffers = self.mean_buffers(updates)

    def pack(self, params: Params, extras: Mapping[str, Params]) -> Params:
        """Parameters as a message carries them, to a client or back; ``extras`` are those of the server (a mask, say).

        A method that overrides it overrides ``unpack`` too.
        """
        return params

    def unpack(self, packed: Params, extras: Mapping[str, Params], like: Params) -> Params:
        """The inverse of ``pack``: names and shapes of ``like``. Raises ``ArgumentError`` for what ``pack`` cannot have made."""
        return packed

    def answer(self, client: Client, sent: Sent) -> Update | None:
        """Answer the query ``sent.query``; None where it is not this method's."""
        return None

    def evaluate(self, client: Client, sent: Sent) -> dict[str, float]:
        """Numbers of the global model on a client's own test examples; here accuracy and loss."""
        if client.test is None:
            return {}
        prediction, targets = client.predict(client.test)
        right = float((prediction.argmax(1) == targets).float().mean()) if prediction.ndim == 2 else math.nan
        return {"accuracy": right, "loss": float(client.loss(prediction, targets)), "num-test": float(len(targets))}

    def finish(self, server: Server) -> None:  # type: ignore[override]
        """After the last round: calibrate or realign ``server.params``; ``server.ask`` the clients."""

    # -- what subclasses use ------------------------------------------------------------------------------------------
    def weights(self, updates: Sequence[Update]) -> list[float] | None:
        """The clients' numbers of examples, or None if all count alike."""
        return [float(update.num_examples) for update in updates] if self.weighted else None

    @staticmethod
    def mean_buffers(updates: Sequence[Update]) -> Params:
        """The mean of the clients' buffers, weighted by their numbers of examples."""
        return weighted_mean([u.buffers for u in updates], [float(u.num_examples) for u in updates])

    def overrides(self, hook: str) -> bool:
        """Whether this method implements an exclusive hook. Asked for the hooks of ``fit``, it refuses: it trains on clients."""
        if hook not in EXCLUSIVE:
            raise ArgumentError(
                f"methods holds {type(self).__name__}: it trains on clients, and fit has none. Use equipoise.federated.simulate, "
                "or the apps of equipoise.integrations.flower"
            )
        return getattr(type(self), hook) is not getattr(FederatedMethod, hook) or hook in self.__dict__


EXCLUSIVE = ("client_update", "aggregate", "evaluate", "pack")


class Methods:
    """The methods of one run, as one: federated ones by their hooks, and others that define the clients' loss."""

    def __init__(self, methods: Method | Sequence[Method]) -> None:
        given = [methods] if isinstance(methods, Method) else list(methods)
        for method in given:
            if not isinstance(method, Method):
                raise ArgumentError(f"methods holds {method!r}: must hold instances of equipoise.Method")
        self.federated = [method for method in given if isinstance(method, FederatedMethod)] or [FederatedMethod()]
        self.others = [method for method in given if not isinstance(method, FederatedMethod)]
        self._owner: dict[str, FederatedMethod] = {}
        for hook in EXCLUSIVE:
            owners = [method for method in self.federated if method.overrides(hook)]
            if len(owners) > 1:
                names = " and ".join(method.name or type(method).__name__ for method in owners)
                raise MethodConflictError(f"{names} both override {hook}; a run can have one of them")
            self._owner[hook] = (owners or self.federated)[0]

    def configure_model(self, model: nn.Module, seed: int) -> nn.Module:
        for method in self.federated:
            model = method.configure_model(model, seed)
        return model

    def prepare(self, server: Server) -> None:
        for method in self.federated:
            method.prepare(server)

    def client_update(self, client: Client, sent: Sent) -> Update:
        return self._owner["client_update"].client_update(client, sent)

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        self._owner["aggregate"].aggregate(server, updates)

    def evaluate(self, client: Client, sent: Sent) -> dict[str, float]:
        return self._owner["evaluate"].evaluate(client, sent)

    @property
    def on_server(self) -> list[str]:
        """Names of the methods that are nothing without their part on the server."""
        needed = [getattr(FederatedMethod, hook) for hook in ("prepare", "aggregate", "pack")]
        return [
            method.name or type(method).__name__
            for method in self.federated
            if any(getattr(type(method), hook.__name__) is not hook for hook in needed)
        ]

    @property
    def packs(self) -> bool:
        """Whether parameters are sent in another form."""
        return self._owner["pack"].overrides("pack")

    def pack(self, params: Params, extras: Mapping[str, Params]) -> Params:
        return self._owner["pack"].pack(params, extras)

    def unpack(self, packed: Params, extras: Mapping[str, Params], like: Params) -> Params:
        return self._owner["pack"].unpack(packed, extras, like)

    def answer(self, client: Client, sent: Sent) -> Update:
        for method in self.federated:
            found = method.answer(client, sent)
            if found is not None:
                return found
        raise ArgumentError(f"query = {sent.query!r}: no method of this run answers it")

    def finish(self, server: Server) -> None:
        for method in self.federated:
            method.finish(server)

    def __repr__(self) -> str:
        return ", ".join(repr(method) for method in (*self.federated, *self.others))


def whole_numbers(model: nn.Module) -> Params:
    """Buffers in the ``state_dict`` that are whole numbers or booleans, but for BatchNorm's counts of batches."""
    counts = {
        f"{prefix}.num_batches_tracked".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    }
    kept = model.state_dict().keys() - counts
    return {
        name: b for name, b in model.named_buffers() if name in kept and not (b.is_floating_point() or b.is_complex())
    }


def rows_of(data: Any) -> int:
    """Number of examples of what a client was given; 0 for None."""
    if data is None:
        return 0
    return size_of(data[0]) if isinstance(data, tuple | list) and len(data) == 2 else len(data)


def classes_of(data: Any) -> int | None:
    """Number of distinct labels of what a client was given; None where they are no whole numbers, or not at hand."""
    targets = data[1] if isinstance(data, tuple | list) and len(data) == 2 else getattr(data, "targets", None)
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        return None
    return len(targets.unique())
