"""The Byzantine task: federated training where some clients are hostile; the server's aggregation rule is what is compared.

The clients are those of the federated task, alike by default. Each seed draws who is hostile. In every round all clients train, the
hostile ones replace what they would send by what the attack says (``equipoise.federated.attacks``), and the rule aggregates. Rules
are told f, as their authors have it; the mean (``fedavg``), the medians and the flag aggregator make no use of it. The server holds
a clean validation set, on which every arm is tuned alike, and a clean test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.federated.algorithm import FederatedMethod
from equipoise.federated.attacks import ATTACKS, OF_UPDATES, UnderAttack, flip_labels, hostile
from equipoise.federated.flag_aggregator import RobustAggregate, check_workers, least_workers
from equipoise.federated.task import FederatedTask, cached_problem
from equipoise.training import LogUniform, Method, Problem, TradeOff
from equipoise.training.space import Space
from equipoise.training.task import Config


@dataclass(frozen=True)
class Byzantine(FederatedTask):
    """Federated training in which some clients are hostile, tested on clean data: which aggregation rule withstands them?

    byzantine: f, how many of the clients are hostile, from 0 to just under half of those drawn in a round.
    attack: "none", "random", "noise", "sign-flip", "little-is-enough", "inner-product" or "label-flip", as
        ``equipoise.federated.attacks`` defines them. strength: the attack's, by default its own.
    partition, alpha, shards, clients, least, fraction: the clients, as in the federated task; by default they are alike ("iid").
    rounds, epochs, batch_size, clip_norm, lr_decay: of training. model, hidden, validation, test, standardise, target_accuracy, and
        dataset or data, target, client_column, test_data: as in the federated task.
    """

    name: ClassVar[str] = "byzantine"
    baseline: ClassVar[str] = "fedavg"
    methods: ClassVar[tuple[str, ...]] = (
        "coordinate-median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "bulyan",
        "geometric-median",
        "flag-aggregator",
    )
    trade_off: ClassVar[TradeOff | None] = None

    byzantine: int = 3
    attack: str = "sign-flip"
    strength: float | None = None
    clients: int = 15
    fraction: float = 1.0
    rounds: int = 10
    epochs: int = 2

    def __post_init__(self) -> None:
        if self.partition is None and not self.client_column:
            object.__setattr__(self, "partition", "iid")
        super().__post_init__()
        check_choice("attack", self.attack, ATTACKS)
        check_integer("byzantine", self.byzantine, 0)
        if self.strength is not None:
            check_range("strength", self.strength, 0)
            if self.attack not in OF_UPDATES:
                refuse("strength", self.strength, f"be left out with the attack {self.attack!r}, which has none")
        if self.partition != "column":
            self._check_half()

    def space(self) -> Space:
        """As the federated task's, with rates that suit so few rounds."""
        return {**super().space(), "lr": LogUniform(0.03, 1.0)}

    @property
    def drawn(self) -> int:
        """How many clients take part in a round."""
        column = self.partition == "column"
        return int(self.fraction * (len(cached_problem(self, 0).extra["parts"]) if column else self.clients) + 1e-9)

    def _check_half(self) -> None:
        if 2 * self.byzantine >= self.drawn:
            must = f"be less than half of the {self.drawn} clients of a round: no rule withstands more"
            refuse("byzantine", self.byzantine, must)

    def entrants(self) -> tuple[str, ...]:
        """The rules that tolerate so many Byzantine clients."""
        return tuple(name for name in self.methods if least_workers(name, self.byzantine) <= self.drawn)

    def check(self) -> list[str]:
        remarks = super().check()
        self._check_half()
        remarks.append(
            f"{self.byzantine} of the clients are hostile (attack: {self.attack}); which, each seed draws anew. The server's "
            "validation and test data are clean."
        )
        if left_out := [name for name in self.methods if name not in self.entrants()]:
            needs = ", ".join(f"{name} needs {least_workers(name, self.byzantine)}" for name in left_out)
            remarks.append(f"Left out, with {self.byzantine} Byzantine of {self.drawn} clients in a round: {needs}.")
        if self.byzantine and (self.drawn + 2) // 2 >= self.drawn - self.byzantine:
            remarks.append(
                "With so many Byzantine clients the flag aggregator's default dimension keeps every direction, an attacker's "
                "too: it is no defence. A smaller flag-aggregator.r may be one."
            )
        return remarks

    def build_method(self, method: type[Method], config: Mapping[str, Any]) -> Method:
        """A rule is told f. Raises ``ArgumentError`` where it does not tolerate so many."""
        told = {f"{method.name}.f": self.byzantine} if issubclass(method, RobustAggregate) else {}
        made = super().build_method(method, {**told, **config})
        if not isinstance(made, FederatedMethod):
            raise ArgumentError(f"method = {method.name!r}: trains no clients. Choose a federated method")
        if isinstance(made, RobustAggregate):
            check_workers(made.rule, self.drawn, made.f)
        return made

    def build_methods(self, method: type[Method], config: Config) -> list[Method]:
        rule = self.build_method(method, config)
        assert isinstance(rule, FederatedMethod)
        return [UnderAttack(rule, self.attack, self.byzantine, self.strength)]

    def problem(self, seed: int) -> Problem:
        """As the federated task's; ``extra["hostile"]`` holds the numbers of the hostile clients."""
        made = super().problem(seed)
        return replace(made, extra={**made.extra, "hostile": hostile(len(made.extra["parts"]), self.byzantine, seed)})

    def client_data(self, problem: Problem) -> list[Any]:
        clients = super().client_data(problem)
        if self.attack == "label-flip":
            for number in problem.extra["hostile"]:
                clients[number] = flip_labels(clients[number])
        return clients
