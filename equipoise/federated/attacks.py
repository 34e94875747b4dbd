"""What Byzantine clients send, to try aggregation rules with: exact definitions, as functions of the honest clients' updates.

Of p clients, f are Byzantine and h = p - f honest. H (h, D) holds the honest updates of the round, mu their mean and sigma their
standard deviation, by coordinate (unbiased; 0 for one client). The attackers see all of it and collude; they do not know the rule.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range
from equipoise.federated.algorithm import FederatedMethod, Server, Update
from equipoise.federated.params import minus, plus, stack, unstack
from equipoise.training import Examples
from equipoise.training.assemble import derived_seed

STRENGTHS = {"random": 10.0, "noise": 5.0, "sign-flip": 5.0, "inner-product": 0.5}  # by default
OF_UPDATES = (*STRENGTHS, "little-is-enough")
ATTACKS = ("none", *OF_UPDATES, "label-flip")


def forge(
    attack: str, honest: Tensor, count: int, *, generator: torch.Generator | None = None, strength: float | None = None
) -> Tensor:
    """The updates (f, D) that ``count`` = f attackers send, given the honest ones (h, D), h >= 1. By name:

    random: each coordinate of each attacker uniform in [-strength, strength] (10).
    noise: mu + strength * s * n for each attacker, n standard normal, s the root mean square of H's coordinates (5).
    sign-flip: -strength * mu (5). inner-product: -strength * mu with a strength below 1, so that its norm gives nothing away (0.5;
        Xie, Koyejo and Gupta, UAI 2019).
    little-is-enough: mu - z * sigma, all attackers alike; z is the largest for which enough honest clients are expected farther
        from mu than the attackers (Baruch, Baruch and Goldberg, NeurIPS 2019): Phi(z) = (h - s) / h, s = floor(p / 2 + 1) - f,
        not below 0. With a strength, z = strength.

    In brackets the default strength. "none" and "label-flip" forge no updates: with the first the attackers are honest, with the
    second they train honestly on the labels C - 1 - y (``flip_labels``). Raises ``ArgumentError``: an unknown attack, no honest
    update, strength < 0.
    """
    check_choice("attack", attack, OF_UPDATES)
    check_integer("count", count, 0)
    if honest.ndim != 2 or not len(honest):
        raise ArgumentError(f"honest has the shape {tuple(honest.shape)}: must hold at least one honest update, (h, D)")
    if strength is not None:
        check_range("strength", strength, 0)
    shape, centre = (count, honest.shape[1]), honest.mean(0)
    if attack == "little-is-enough":
        z = little_is_enough_z(len(honest) + count, count) if strength is None else strength
        spread = honest.std(0) if len(honest) > 1 else torch.zeros_like(centre)
        return (centre - z * spread).expand(shape).clone()
    amount = STRENGTHS[attack] if strength is None else strength
    if attack == "random":
        return (2 * torch.rand(shape, generator=generator, dtype=honest.dtype) - 1).to(honest.device) * amount
    if attack == "noise":
        drawn = torch.randn(shape, generator=generator, dtype=honest.dtype).to(honest.device)
        return centre + amount * honest.square().mean().sqrt() * drawn
    return (-amount * centre).expand(shape).clone()  # sign-flip, inner-product


def little_is_enough_z(workers: int, byzantine: int) -> float:
    """The deviation z >= 0 of "a little is enough", see ``forge``."""
    check_integer("byzantine", byzantine, 0, workers - 1)
    honest = workers - byzantine
    share = (honest - (math.floor(workers / 2 + 1) - byzantine)) / honest
    return max(0.0, NormalDist().inv_cdf(min(share, 1 - 1e-9))) if share > 0 else 0.0


def flip_labels(examples: Examples) -> Examples:
    """The same examples with the labels C - 1 - y, of C classes."""
    classes = examples.num_classes
    if classes is None:
        raise ArgumentError("examples.num_classes = None: label flip needs the number of classes")
    return Examples(examples.inputs, classes - 1 - examples.targets, num_classes=classes)


def hostile(clients: int, count: int, seed: int) -> tuple[int, ...]:
    """The numbers of ``count`` hostile clients of ``clients``, drawn by the seed of a run, ascending."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "hostile clients"))
    return tuple(sorted(torch.randperm(clients, generator=generator)[:count].tolist()))


class UnderAttack(FederatedMethod):
    """A federated method whose Byzantine clients' updates are forged before it aggregates them: for trials of defences.

    method: what runs otherwise. attack, strength: see ``forge``. byzantine: how many clients are hostile, drawn by the run's seed
    (``hostile``). What they send beside their parameters stays as it was. A round without an honest client is left as it is.
    """

    def __init__(self, method: FederatedMethod, attack: str, byzantine: int, strength: float | None = None) -> None:
        check_choice("attack", attack, ATTACKS)
        check_integer("byzantine", byzantine, 0)
        self.method, self.attack, self.byzantine, self.strength = method, attack, byzantine, strength
        self.client_update = method.client_update  # type: ignore[method-assign]
        self.prepare = method.prepare  # type: ignore[method-assign]
        self.answer = method.answer  # type: ignore[method-assign]
        self.evaluate = method.evaluate  # type: ignore[method-assign]
        self.finish = method.finish  # type: ignore[method-assign]
        self.configure_model = method.configure_model  # type: ignore[method-assign]
        self.pack, self.unpack = method.pack, method.unpack  # type: ignore[method-assign]

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        numbers = hostile(server.num_clients, self.byzantine, server.seed)
        honest = [update for update in updates if update.client not in numbers]
        others = [update for update in updates if update.client in numbers]
        if self.attack in OF_UPDATES and honest and others:
            seen = stack([minus(update.params, server.params) for update in honest])
            options: dict[str, Any] = {"generator": server.generator("attack"), "strength": self.strength}
            for update, forged in zip(others, forge(self.attack, seen, len(others), **options), strict=True):
                update.params = plus(server.params, unstack(forged, server.params))
        self.method.aggregate(server, updates)
