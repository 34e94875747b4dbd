"""The federated long-tail task: the union of all clients is a long tail, and each client holds another part of it.

Embedded data are balanced; the training rows are thinned to a tail, by an order of the classes that each seed draws, and dealt out
to clients, by default by Dirichlet shares of each class. Validation and test rows stay with the judge, as balanced as the data
are. Two things count: the global accuracy, in which each class counts the same, and the personal one: each client's own prediction
among the classes that it has, on the test rows, weighed by the client's shares of the classes. Methods without personal models
predict with the global one. Data of your own are skewed already: the ratio is 1, and nothing is thinned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from equipoise.data.corruptions import long_tail
from equipoise.errors import check_range
from equipoise.federated import partition as partitions
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update, predict
from equipoise.federated.fedloge import FedLoGe
from equipoise.federated.task import FederatedTask, cached_problem
from equipoise.training import Examples, LogUniform, Method, Problem, TradeOff
from equipoise.training.cost import Cost
from equipoise.training.metrics import balanced_accuracy
from equipoise.training.space import Space
from equipoise.training.task import Config

if TYPE_CHECKING:
    from equipoise.federated.simulation import FederatedRun

QUERY = "personal-accuracy"


@dataclass(frozen=True)
class FederatedLongTail(FederatedTask):
    """A long tail over clients that are skewed differently; judged on all classes alike, and on each client's own mix of them.

    The metric is ``global_accuracy``: the shared model's mean over classes of the share of their test rows that it predicts right.
    Beside it stand ``accuracy_head`` and ``accuracy_tail``, the same over the third of the classes that is most and least frequent;
    ``personal_accuracy``, the mean over clients (see the module), and ``worst_client_accuracy``, that of the worst; and for
    FedLoGe ``realigned_accuracy``, the global accuracy of its realigned head. The last round counts: it has the clients' models.

    ratio: size of the largest over that of the smallest class among all clients, >= 1; by default 20 for embedded data and 1 for
        your own. All other settings are those of the task ``federated``.
    """

    name: ClassVar[str] = "federated-long-tail"
    metric: ClassVar[str] = "global_accuracy"
    baseline: ClassVar[str] = "fedavg"
    methods: ClassVar[tuple[str, ...]] = ("fedprox", "ccvr", "fedloge")
    trade_off: ClassVar[TradeOff | None] = TradeOff("personal_accuracy", "global_accuracy", x_higher=True)

    ratio: float | None = None
    alpha: float = 0.3
    clients: int = 10
    fraction: float = 1.0
    rounds: int = 15
    epochs: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            object.__setattr__(self, "ratio", 1.0 if self.data else 20.0)
        check_range("ratio", self.ratio, 1)  # type: ignore[arg-type]  # None was replaced

    def check(self) -> list[str]:
        remarks = [remark for remark in super().check() if not remark.startswith("A client's accuracy")]
        return [
            *remarks,
            "Personal accuracy is among the classes that a client trained on, each weighed by its share in the client's rows.",
        ]

    def space(self) -> Space:
        """Learning rate and weight decay of the clients. The last round counts for every arm."""
        return {"lr": LogUniform(0.01, 0.5), "weight_decay": LogUniform(1e-5, 1e-2)}

    def build_method(self, method: type[Method], config: Config) -> Method:
        """FedLoGe's fixed classifier takes 1000 steps, which do for so few classes, unless the configuration says otherwise."""
        short = {"fedloge.etf_steps": 1000} if method.name == "fedloge" else {}
        return super().build_method(method, {**short, **config})

    def build_methods(self, method: type[Method], config: Config) -> list[Method]:
        made = super().build_methods(method, config)
        return [*made, PersonalAccuracy(self, made[0])]

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost:
        """As every task's; FedLoGe's fixed classifier, made once in a process, is made before and not counted."""
        model = self.build_model(cached_problem(self, seed), seed)
        for made in self.build_methods(method, config):
            if isinstance(made, FedLoGe):
                made.configure_model(model, seed)
        return super().cost(method, config, seed)

    # -- data ---------------------------------------------------------------------------------------------------------
    def problem(self, seed: int) -> Problem:
        problem = super().problem(seed)
        rows = problem.extra["parts"]
        shares = partitions.class_shares(problem.train.targets, rows, problem.num_outputs).double()
        counts = torch.bincount(problem.train.targets[torch.cat(rows)], minlength=problem.num_outputs)
        return replace(problem, extra={**problem.extra, "shares": shares, "counts": counts}, pool=len(problem.train))

    def deal(self, train: Examples, seed: int) -> list[Tensor]:
        """Each client's rows of the training set, of those that the tail leaves."""
        kept = self.tail(train, torch.Generator().manual_seed(seed * 1_000 + 2))
        return [kept[rows] for rows in super().deal(train.subset(kept), seed)]

    def tail(self, train: Examples, generator: torch.Generator) -> Tensor:
        """The rows that stay; which class is how frequent is drawn."""
        assert self.ratio is not None and train.num_classes is not None
        if self.ratio == 1:  # the data as they are, which need not be balanced
            return torch.arange(len(train))
        place = torch.randperm(train.num_classes, generator=generator)
        return long_tail(place[train.targets], self.ratio, generator)

    # -- metrics ------------------------------------------------------------------------------------------------------
    def measure(self, problem: Problem, model: nn.Module) -> dict[str, float]:
        found = super().measure(problem, model)
        order = problem.extra["counts"].argsort(descending=True, stable=True)
        third = max(1, len(order) // 3)
        for part, examples in (("validation", problem.validation), ("test", problem.test)):
            found[f"{part}_global_accuracy"] = found[f"{part}_balanced_accuracy"]
            found[f"{part}_personal_accuracy"] = found.pop(f"{part}_client_accuracy")
            logits, targets = predict(model, examples)
            for name, classes in (("head", order[:third]), ("tail", order[-third:])):
                rows = torch.isin(targets, classes)
                if rows.any():
                    found[f"{part}_accuracy_{name}"] = balanced_accuracy(logits[rows], targets[rows])
        return found

    def client_accuracy(self, problem: Problem, examples: Examples, logits: Tensor) -> Tensor:
        """Personal accuracy of each client that uses the global model; clients with a class of the test rows."""
        found = [personal_accuracy(logits, examples.targets, shares) for shares in problem.extra["shares"]]
        each = torch.tensor(found, dtype=torch.float64)
        return each[~each.isnan()]

    def personal(self, method: Method, client: Client, examples: Examples, shares: Tensor) -> dict[str, float]:
        """What a client's own model reaches on a set of the judge's."""
        if isinstance(method, FedLoGe):
            logits, targets = method.personal_logits(client, examples)
        else:
            logits, targets = client.predict(examples)
        return {"personal_accuracy": personal_accuracy(logits, targets, shares)}

    def examine(self, problem: Problem, run: FederatedRun) -> dict[str, float]:
        """The clients' own models, and FedLoGe's realigned head."""
        found: dict[str, float] = dict(run.results[QUERY])
        if "realigned" in run.results:
            for part, examples in (("validation", problem.validation), ("test", problem.test)):
                found[f"{part}_realigned_accuracy"] = balanced_accuracy(*predict(run.results["realigned"], examples))
        return found


def personal_accuracy(logits: Tensor, targets: Tensor, shares: Tensor) -> float:
    """Accuracy of logits (N, C) among the classes with a share > 0, with each class's rows weighed by its share (C,).

    Classes without a row among targets (N,) do not count; NaN if no class is left.
    """
    right = (logits.masked_fill(shares == 0, -torch.inf).argmax(1) == targets).double()
    counts = torch.bincount(targets, minlength=len(shares))
    weights = shares * (counts > 0)
    by_class = torch.bincount(targets, right, minlength=len(shares)) / counts.clamp(min=1)
    return float(weights @ by_class / weights.sum())


class PersonalAccuracy(FederatedMethod):
    """Changes nothing; after the run every client measures its own model on the judge's rows, and sends the numbers."""

    def __init__(self, task: FederatedLongTail, method: Method) -> None:
        self.task, self.method = task, method

    def answer(self, client: Client, sent: Sent) -> Update | None:
        if sent.query != QUERY:
            return None
        problem = cached_problem(self.task, client.seed)
        shares = problem.extra["shares"][client.number]
        metrics = {
            f"{part}_{name}": value
            for part, examples in (("validation", problem.validation), ("test", problem.test))
            for name, value in self.task.personal(self.method, client, examples, shares).items()
        }
        return Update({}, len(client), metrics=metrics)

    def finish(self, server: Server) -> None:  # type: ignore[override]
        assert server.ask is not None  # the engine sets it
        each = [update.metrics for update in server.ask(QUERY)]
        values = {name: torch.tensor([metrics[name] for metrics in each]) for name in each[0]}
        found = {name: float(value.nanmean()) for name, value in values.items()}
        for part in ("validation", "test"):
            own = values[f"{part}_personal_accuracy"]
            found[f"{part}_worst_client_accuracy"] = float(own[~own.isnan()].min())
        server.results[QUERY] = found
