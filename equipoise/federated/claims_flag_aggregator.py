"""The claims of the Flag Aggregator paper, as they can be checked on digits.

Data-parallel training as the paper's: 15 workers, of which 3 are hostile; in each of 150 steps every worker sends the gradient of
its own random minibatch of 32, the rule makes one of the 15, and the server takes a step of SGD at 0.1 with momentum 0.9. An MLP
64-64-10. Attacks: none, random (uniform in [-10, 10] by coordinate), and sign flip (-5 times the honest mean). Beside the arms,
which all train at that rate, every trial has the mean with a tuned rate (``fedavg``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.comparison.claims import Claim
from equipoise.federated.attacks import OF_UPDATES, forge
from equipoise.federated.flag_aggregator import RobustAggregate, mean
from equipoise.federated.task import cached_problem
from equipoise.federated.task_byzantine import Byzantine
from equipoise.models import build
from equipoise.models.reference import MLP
from equipoise.training import Method, Problem, RunResult
from equipoise.training.task import Config


@dataclass(frozen=True)
class ByzantineGradients(Byzantine):
    """Data-parallel SGD with hostile workers: ``rounds`` steps, in each of which every worker sends one gradient."""

    name: ClassVar[str] = "byzantine-gradients"

    rounds: int = 150
    batch_size: int = 32
    momentum: float = 0.9
    standardise: bool = False

    def check(self) -> list[str]:
        return []

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        return build(f"{__name__}:narrow_mlp", problem.input_shape, problem.num_outputs, seed)

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        problem, rule = cached_problem(self, seed), self.build_method(method, config)
        combine = rule.combine if isinstance(rule, RobustAggregate) else mean
        model, draw = self.build_model(problem, seed), torch.Generator().manual_seed(seed)
        inputs, targets = problem.train.inputs, problem.train.targets
        assert isinstance(inputs, Tensor)
        weights = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]

        def loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, params, strict=True)), x), y)

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        sgd = torch.optim.SGD(weights, lr=config["lr"], momentum=self.momentum)
        hostile = list(problem.extra["hostile"])
        honest = [number for number in range(self.clients) if number not in hostile]
        for _ in range(self.rounds):
            rows = torch.randint(len(targets), (self.clients, self.batch_size), generator=draw)
            found = gradients([w.detach() for w in weights], inputs[rows], targets[rows])
            grads = torch.cat([gradient.flatten(1) for gradient in found], 1)  # (p, D)
            if self.attack in OF_UPDATES:
                options: dict[str, Any] = {"generator": draw, "strength": self.strength}
                grads[hostile] = forge(self.attack, grads[honest], len(hostile), **options)
            for weight, part in zip(weights, combine(grads).split([w.numel() for w in weights]), strict=True):
                weight.grad = part.view_as(weight)
            sgd.step()
        metrics = self.measure(problem, model)
        sizes = {name: len(getattr(problem, name)) for name in ("train", "validation", "test")}
        return RunResult({"last": metrics, "best": metrics}, sizes=sizes)


def narrow_mlp(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """One hidden layer of 64."""
    return MLP(input_shape, num_outputs, (64,), head_bias=True)


def arm(name: str, method: str, **settings: Any) -> tuple[str, str, dict[str, Any]]:
    """An arm with its method's own settings, at the rate 0.1."""
    return name, method, {"lr": 0.1, **{f"{method}.{key}": value for key, value in settings.items()}}


ARMS = (
    arm("mean", "fedavg"),
    arm("median", "coordinate-median"),
    arm("trimmed mean", "trimmed-mean"),
    arm("krum", "krum"),
    arm("multi-krum", "multi-krum"),
    arm("bulyan", "bulyan"),
    arm("geometric median", "geometric-median"),
    arm("flag", "flag-aggregator", r=8, max_iter=1),
    arm("flag mean", "flag-aggregator", r=8, max_iter=0),
    arm("flag, 5 steps", "flag-aggregator", r=8, max_iter=5),
)
claim = partial(
    Claim,
    slug="flag_aggregator",
    number=23,
    source=(
        "Almasi et al., ICLR 2024: CIFAR-10, ResNet-18, 15 workers, 1 to 3 of them Byzantine; better, in fewer iterations, than "
        "Multi-Krum, Bulyan, trimmed mean, median, Phocas and MeaMed (figures; no table was available)"
    ),
    task=ByzantineGradients,
    arms=ARMS,
    method="flag",
    seeds=5,
    scale=100.0,
    unit="points of test accuracy",
)
none, random, sign = (partial(claim, settings={"attack": attack}) for attack in ("none", "random", "sign-flip"))

CLAIMS = [
    none(
        claim="Without an attack the flag aggregator loses at most one point to the mean.",
        name="no-attack",
        reference="mean",
        at_least=-1.0,
    ),
    random(
        claim="With 3 of 15 workers sending noise it gains at least 8 points on the mean.",
        name="random",
        reference="mean",
        at_least=8.0,
    ),
    sign(
        claim="With 3 of 15 workers flipping the sign it gains at least 70 points on the mean.",
        name="sign-flip",
        reference="mean",
        at_least=70.0,
    ),
    sign(
        claim="Under sign flip it is better than the coordinate median, by half a point or more.",
        name="median",
        reference="median",
        at_least=0.5,
    ),
    sign(
        claim="Under sign flip it is better than the trimmed mean, by half a point or more.",
        name="trimmed-mean",
        reference="trimmed mean",
        at_least=0.5,
    ),
    random(
        claim="Under random updates it is within 1.5 points of Multi-Krum, the best rule of a prototype.",
        name="random-best",
        reference="multi-krum",
        at_least=-1.5,
    ),
    sign(
        claim="Under sign flip it is within 1.5 points of Multi-Krum, the best rule of a prototype.",
        name="sign-flip-best",
        reference="multi-krum",
        at_least=-1.5,
    ),
    sign(
        claim="The paper's superiority: under sign flip it is better than Multi-Krum, by half a point or more.",
        name="superiority",
        reference="multi-krum",
        at_least=0.5,
    ),
]
