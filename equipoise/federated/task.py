"""The federated task: clients with skewed data train one model in rounds, and never show their data.

The training rows are dealt out to clients (``equipoise.federated.partition``); validation and test rows stay with the judge,
and are never seen in training. ``FederatedTask`` is also the base of the family's other tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.data import RawData, Splits, fingerprint, load, read, split
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer, check_range
from equipoise.federated import partition as partitions
from equipoise.federated.algorithm import LocalTraining, predict
from equipoise.models import build, source_digest
from equipoise.models.factory import _seeded
from equipoise.models.reference import MLP
from equipoise.training import Examples, LogUniform, Method, Problem, RunResult, TradeOff
from equipoise.training.cost import Cost, measure
from equipoise.training.metrics import classification_metrics
from equipoise.training.space import Choice, Space
from equipoise.training.task import Config, Task, _rows

if TYPE_CHECKING:
    from equipoise.federated.simulation import FederatedRun

PARTITIONS = ("dirichlet", "shards", "iid", "column")


@dataclass(frozen=True)
class FederatedTask(Task):
    """Clients with skewed data train one model; it is judged on everybody's data, and on each client's own mix of them.

    dataset: name of an embedded data set (``equipoise.data.available()``).
    partition: "dirichlet" (each class dealt out by shares of Dirichlet(``alpha``)), "shards" (``shards`` runs of the rows sorted by
        class for each client), "iid", or "column" (the values of ``client_column``); exact definitions:
    ``equipoise.federated.partition``. alpha: of "dirichlet", > 0; the smaller, the more skewed. shards: of "shards", for each
    client. clients: how many, except for "column". least: fewest training rows of a client. least_classes: fewest classes of a
    client; by default 2 for "column", where a client with one class may be a mistake in the data, and 1 for clients that are drawn.
    fraction: share of the clients drawn in a round. rounds: how many.
    epochs, batch_size, clip_norm, lr_decay: of a client's training in a round, SGD; clip_norm 0 for none.
    model: "mlp" (two layers of ``hidden``), "cnn", "linear", or "package.module:factory" of your own.
    target_accuracy: for ``rounds_to_target``, the first round whose validation accuracy reaches it; rounds + 1 where none does.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    standardise: bring images to mean 0 and standard deviation 1, measured on the training rows (tables always are).
    data, target, client_column, test_data: your own file, its target column, the column that says whose row it is, and a file
        to test on.
    """

    name: ClassVar[str] = "federated"
    baseline: ClassVar[str] = "fedavg"
    methods: ClassVar[tuple[str, ...]] = ("fedprox", "scaffold", "fedsam", "fedspeed")
    trade_off: ClassVar[TradeOff | None] = TradeOff("worst_client_accuracy", "accuracy", x_higher=True)

    dataset: str = "digits"
    partition: str | None = None
    alpha: float = 0.1
    shards: int = 2
    clients: int = 20
    least: int = 2
    least_classes: int | None = None
    fraction: float = 0.25
    rounds: int = 20
    epochs: int = 5
    batch_size: int = 16
    clip_norm: float = 10.0
    lr_decay: float = 0.998
    model: str = "mlp"
    hidden: int = 64
    target_accuracy: float = 0.8
    validation: float = 0.2
    test: float = 0.2
    standardise: bool = True
    data: str | None = None
    target: str | None = None
    client_column: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        if self.partition is None:
            object.__setattr__(self, "partition", "column" if self.client_column else "dirichlet")
        if self.least_classes is None:
            object.__setattr__(self, "least_classes", 2 if self.partition == "column" else 1)
        check_choice("partition", self.partition, PARTITIONS)
        check_range("alpha", self.alpha, 0, open_low=True)
        for name in ("shards", "clients", "least", "least_classes", "rounds", "epochs", "batch_size", "hidden"):
            check_integer(name, getattr(self, name), 1)
        check_range("fraction", self.fraction, 0, 1, open_low=True)
        check_range("clip_norm", self.clip_norm, 0)
        check_range("lr_decay", self.lr_decay, 0, 1, open_low=True)
        check_range("target_accuracy", self.target_accuracy, 0, 1)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        if self.data is None and any(v is not None for v in (self.target, self.test_data, self.client_column)):
            raise ArgumentError(
                "target, test_data, client_column describe a file of your own: give data='file.csv' as well"
            )
        if (self.partition == "column") != (self.client_column is not None):
            raise ArgumentError(
                f"partition = {self.partition!r}, client_column = {self.client_column!r}: give the column for partition = 'column'"
            )
        if self.partition != "column" and int(self.fraction * self.clients + 1e-9) < 1:
            raise ArgumentError(f"fraction = {self.fraction}: draws none of {self.clients} clients. Raise it")

    # -- what compare asks for ----------------------------------------------------------------------------------------
    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def check(self) -> list[str]:
        from equipoise.integrations import flower  # noqa: F401  # says what to install before any run

        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; {self.name} needs classes")
        problem = cached_problem(self, 0)
        prediction, _ = predict(
            self.build_model(problem, 0), problem.test.subset(torch.arange(min(2, len(problem.test))))
        )
        if prediction.ndim != 2 or prediction.shape[1] != problem.num_outputs:
            raise ArgumentError(
                f"model = {self.model!r}: its output has shape {tuple(prediction.shape)}: must be (N, {problem.num_outputs})"
            )
        sizes = [len(rows) for rows in problem.extra["parts"]]
        alone = sum(len(problem.train.targets[rows].unique()) == 1 for rows in problem.extra["parts"])
        remarks = [
            f"Seed 0 has {len(sizes)} clients with {min(sizes)} to {max(sizes)} training rows; {alone} of them hold one class."
        ]
        if self.partition != "column":
            remarks.append(
                "A client's accuracy is that on the test rows, each class weighed by its share in the client's training rows."
            )
        return remarks

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        found = {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}
        source = source_digest(self.model) if ":" in self.model else ""
        return {**found, "model_source": source} if source else found

    def space(self) -> Space:
        """Learning rate and weight decay of clients, and whether the round that is best on validation data counts, or the last."""
        return {
            "lr": LogUniform(0.01, 0.5),
            "weight_decay": LogUniform(1e-5, 1e-2),
            "early_stopping": Choice((False, True)),
        }

    def matched_space(self, ratio: float) -> Space:
        """More compute goes into more local epochs: more rounds would cost communication, which the other arms do not have."""
        return {"compute": Choice(("epochs",))}

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        problem = cached_problem(self, seed)
        metrics: dict[str, dict[str, float]] = {}
        curve: list[dict[str, float]] = []

        def look(model: nn.Module, round: int) -> dict[str, float]:
            seen = self.measure(problem, model)
            if (
                "best" not in metrics
                or seen[f"validation_{self.metric}"] > metrics["best"][f"validation_{self.metric}"]
            ):
                metrics["best"] = seen
            curve.append({"round": round, **seen})
            return {}

        run = self.train(problem, method, config, seed, evaluate=look)
        metrics["last"] = self.measure(problem, run.model)  # what a method did in ``finish`` belongs to the model
        if (
            "best" not in metrics
            or metrics["last"][f"validation_{self.metric}"] > metrics["best"][f"validation_{self.metric}"]
        ):
            metrics["best"] = metrics["last"]
        reached = [record["round"] for record in curve if record["validation_accuracy"] >= self.target_accuracy]
        totals = {
            "test_rounds_to_target": float(reached[0] if reached else self.rounds + 1),
            "test_megabytes_up": run.bytes_up / 1e6,
            "test_megabytes_down": run.bytes_down / 1e6,
            "test_left_out": float(len(run.faults)),
        }
        metrics = {which: {**seen, **totals} for which, seen in metrics.items()}
        metrics["last"] |= self.examine(problem, run)
        for record, history in zip(curve, run.history, strict=True):
            record["train_loss"] = history.get("loss", math.nan)
        sizes = {
            "train": problem.pool or len(problem.train),
            "validation": len(problem.validation),
            "test": len(problem.test),
        }
        counted = "best" if config.get("early_stopping") else "last"
        return RunResult(metrics, counted, curve, sizes, self.learned(problem, metrics["best"]))

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost:
        """Of the first two rounds, and as much for every further one as for the second: counting all of them would take long."""
        problem = cached_problem(self, seed)

        def first(rounds: int) -> Cost:
            return measure(lambda: self.train(problem, method, config, seed, rounds=rounds).model)

        one, two = first(1), first(2)
        return replace(two, flops=one.flops + (self.rounds - 1) * (two.flops - one.flops))

    def step_seconds(self, method: type[Method], config: Config, seed: int) -> float:
        problem = cached_problem(self, seed)
        start = time.perf_counter()
        self.train(problem, method, config, seed, rounds=min(self.rounds, 3))
        return time.perf_counter() - start

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        problem = cached_problem(self, seed)
        shared = len((_rows(problem.train) | _rows(problem.validation)) & _rows(problem.test))
        rows = torch.cat(problem.extra["parts"])
        return [
            (
                "no leakage between splits",
                shared == 0,
                f"{shared} distinct rows of the test set of seed {seed} also occur in its training or validation data",
            ),
            (
                "every training row is one client's",
                len(rows.unique()) == len(rows),
                f"{len(rows)} of {len(problem.train)} training rows are with clients, {len(rows) - len(rows.unique())} twice",
            ),
        ]

    # -- what a subclass may say otherwise ----------------------------------------------------------------------------
    def problem(self, seed: int) -> Problem:
        """The data of one seed; ``extra["parts"]`` holds each client's rows of the training set."""
        parts = split(self._raw(), seed, validation=self.validation, test=self.test, standardise=self.standardise)
        assert parts.num_classes is not None  # check refuses a continuous target
        rows = self.deal(parts.train, seed)
        self._check_clients(parts, rows, seed)
        extra: dict[str, Any] = {"parts": rows}
        if self.partition == "column":
            extra["values"] = parts.train.extras["group"][torch.stack([part[0] for part in rows])]
        else:
            extra["shares"] = partitions.class_shares(parts.train.targets, rows, parts.num_classes).double()
        return Problem(parts.train, parts.validation, parts.test, parts.input_shape, parts.num_classes, extra)

    def deal(self, train: Examples, seed: int) -> list[Tensor]:
        """Each client's rows of the training set."""
        generator = torch.Generator().manual_seed(seed * 1_000 + 1)
        if self.partition == "column":
            return partitions.by_column(train.extras["group"])[1]
        if self.partition == "iid":
            return partitions.iid(len(train), self.clients, generator, least=self.least)
        if self.partition == "shards":
            return partitions.shards(train.targets, self.clients, self.shards, generator)
        assert self.least_classes is not None  # None was replaced
        limits = {"least": self.least, "least_classes": self.least_classes}
        return partitions.dirichlet(train.targets, self.clients, self.alpha, generator, **limits)

    def _check_clients(self, parts: Splits, rows: list[Tensor], seed: int) -> None:
        """Refuse a client with too few rows or classes, by its name."""
        for number, own in enumerate(rows):
            client = f"client {number}"
            if self.partition == "column":
                client = f"{self.client_column} = {parts.group_names[int(parts.train.extras['group'][own[0]])]!r}"
            held = {"least": len(own), "least_classes": len(parts.train.targets[own].unique())}
            for name, found in held.items():
                if found < (limit := getattr(self, name)):
                    unit = "training rows" if name == "least" else "of the classes in its training rows"
                    raise DataError(
                        f"{client} has {found} {unit} in seed {seed}, fewer than {name} = {limit}: leave the client out, or "
                        f"lower {name}"
                    )

    def client_data(self, problem: Problem) -> list[Any]:
        """What each client holds: training examples, or a pair of training and test examples."""
        return [problem.train.subset(rows) for rows in problem.extra["parts"]]

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        """The model with the initial weights of ``seed``."""
        if self.model == "mlp":
            with _seeded(seed):
                return MLP(problem.input_shape, problem.num_outputs, hidden=(self.hidden, self.hidden))
        return build(self.model, problem.input_shape, problem.num_outputs, seed)

    def build_methods(self, method: type[Method], config: Config) -> list[Method]:
        """The methods of an arm: ``method``, and what a task adds to it."""
        return [self.build_method(method, config)]

    def local(self, config: Config) -> LocalTraining:
        """How clients train; a baseline that is given more compute trains for more local epochs."""
        epochs = math.ceil(self.epochs * float(config.get("compute_ratio", 1.0)) - 1e-9)
        clip = self.clip_norm or None
        return LocalTraining(
            config["lr"], epochs, self.batch_size, config["weight_decay"], clip_norm=clip, lr_decay=self.lr_decay
        )

    def options(self, problem: Problem, config: Config) -> dict[str, Any]:
        """Further keyword arguments of ``simulate``."""
        return {}

    def train(
        self,
        problem: Problem,
        method: type[Method],
        config: Config,
        seed: int,
        *,
        rounds: int | None = None,
        evaluate: Any = None,
    ) -> FederatedRun:
        """One federated run of an arm."""
        from equipoise.federated.simulation import simulate

        return simulate(
            self.build_methods(method, config),
            self.build_model(problem, seed),
            self.client_data(problem),
            self.rounds if rounds is None else rounds,
            **{
                "local": self.local(config),
                "fraction": self.fraction,
                "seed": seed,
                "evaluate": evaluate,
                "allow_one_class": True,  # ``least_classes`` has its say before
                **self.options(problem, config),
            },
        )

    def measure(self, problem: Problem, model: nn.Module) -> dict[str, float]:
        """Metrics of the global model on validation and test rows: everybody's, and the mean and worst over clients."""
        found: dict[str, float] = {}
        for part, examples in (("validation", problem.validation), ("test", problem.test)):
            logits, targets = predict(model, examples)
            own = self.client_accuracy(problem, examples, logits)
            metrics = classification_metrics(logits, targets)
            metrics |= {"client_accuracy": own.mean().item(), "worst_client_accuracy": own.min().item()}
            found |= {f"{part}_{name}": value for name, value in metrics.items()}
        return found

    def client_accuracy(self, problem: Problem, examples: Examples, logits: Tensor) -> Tensor:
        """Accuracy of each client, float64: on its own rows where a column says whose they are (clients that have some), else on
        all rows with each class weighed by its share in the client's training rows."""
        right = (logits.argmax(1) == examples.targets).double()
        if self.partition == "column":
            owner, values = examples.extras["group"], problem.extra["values"]
            size = int(max(owner.max(), values.max())) + 1
            counts = torch.bincount(owner, minlength=size)[values]
            sums = torch.bincount(owner, right, minlength=size)[values]
            return sums[counts > 0] / counts[counts > 0]
        counts = torch.bincount(examples.targets, minlength=problem.num_outputs)
        by_class = torch.bincount(examples.targets, right, minlength=problem.num_outputs) / counts.clamp(min=1)
        shares = problem.extra["shares"] * (counts > 0)
        return (shares @ by_class) / shares.sum(1).clamp(min=1e-12)

    def examine(self, problem: Problem, run: FederatedRun) -> dict[str, float]:
        """Metrics that need more than the global model (personal models, masks); they join those of the last round."""
        return {}

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run learned anything: balanced accuracy on validation data two standard errors above chance."""
        chance = 1 / problem.num_outputs
        margin = 2 * math.sqrt(chance * (1 - chance) / len(problem.validation))
        return metrics.get("validation_balanced_accuracy", 1.0) > chance + margin

    def _raw(self) -> RawData:
        if self.data is None:
            return load(self.dataset)
        return read(self.data, self.target, self.client_column or (), self.test_data)


@lru_cache(maxsize=4)
def cached_problem(task: FederatedTask, seed: int) -> Problem:
    """The problem of a seed, kept for the arms that meet it next. Nothing may write to it."""
    return task.problem(seed)
