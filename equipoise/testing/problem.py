"""The tiny problem on which the kit trains: a few dozen generated examples and a network of about hundred parameters.

``classification()`` and ``regression()`` fit most methods, ``multimodal()`` those of several modalities; with ``augment`` a
problem has random views. A method that needs more (a domain of its own, a model with a special layer) gets a ``TinyProblem``
of its author's own: ``check_method(MyMethod, problem=TinyProblem(...))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.training import Examples, Method, Output, Run, fit
from equipoise.training.batch import Inputs, map_inputs


class TinyNetwork(nn.Module):
    """Two linear layers with ReLU between them, in timm's convention: ``forward_features`` then ``forward_head``.

    (N, inputs) -> (N, outputs). ``norm=True`` puts a BatchNorm in front of the ReLU. The initial weights depend on ``seed``
    alone; torch's global generator is left as it was.
    """

    def __init__(
        self, inputs: int = 6, hidden: int = 8, outputs: int = 3, *, norm: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(inputs, hidden)
            self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
            self.head = nn.Linear(hidden, outputs)

    def forward_features(self, values: Tensor) -> Tensor:
        """(N, inputs) -> (N, hidden)."""
        return torch.relu(self.norm(self.body(values)))

    def forward_head(self, features: Tensor) -> Tensor:
        """(N, hidden) -> (N, outputs)."""
        return self.head(features)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def forward(self, values: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(values))


class TinyModalities(nn.Module):
    """Inputs ``left`` (N, 4) and ``right`` (N, 3), an encoder for each in ``encoders``, and a linear head on both features.

    Returns an ``Output`` with fused and unimodal logits (N, outputs). ``norm=True`` puts a BatchNorm into each encoder. The initial
    weights depend on ``seed`` alone; torch's global generator is left as it was.
    """

    def __init__(self, hidden: int = 5, outputs: int = 3, *, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders = nn.ModuleDict(
                {
                    name: nn.Sequential(
                        nn.Linear(width, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()
                    )
                    for name, width in (("left", 4), ("right", 3))
                }
            )
            self.head = nn.Linear(2 * hidden, outputs)

    def forward(self, *, left: Tensor, right: Tensor) -> Output:
        features = [self.encoders["left"](left), self.encoders["right"](right)]
        weights = self.head.weight.chunk(2, dim=1)
        unimodal = [nn.functional.linear(x, w, self.head.bias) for x, w in zip(features, weights, strict=True)]
        fused = self.head(torch.cat(features, 1))
        return Output(fused, fused=fused, unimodal=unimodal)


class KeywordNetwork(nn.Module):
    """A network that takes its input as the keyword argument ``values``, as it does where inputs are dicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *, values: Tensor) -> Any:
        return self.network(values)


@dataclass(frozen=True)
class TinyProblem:
    """Data, a network and how to train it. ``train`` is ``equipoise.fit`` on it.

    examples, validation: at least 20 and 5 examples; ``len(examples)`` should divide by nothing (37 is good).
    network: makes the model, with the same initial weights at every call and no layer that mixes the rows of a batch.
    norm_network: the same with BatchNorm, for the checks of buffers and modes; None to do without.
    loss: the task's loss, cross-entropy by default. augment: makes random views, for methods that need them.
    """

    examples: Examples
    validation: Examples
    network: Callable[[], nn.Module]
    norm_network: Callable[[], nn.Module] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 0.1
    seed: int = 3
    augment: Callable[[Inputs, torch.Generator], Inputs] | None = None

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """SGD with momentum 0.9."""
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)

    def options(self, **changes: Any) -> dict[str, Any]:
        """The keyword arguments of ``fit`` and ``start`` for this problem."""
        common = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": self.make_optimizer,
            "validation": self.validation,
            "loss": self.loss,
            "seed": self.seed,
            "augment": self.augment,
        }
        return common | changes

    def train(self, methods: Sequence[Method] = (), **changes: Any) -> Run:
        """Train a fresh network with ``methods``; ``changes`` replace arguments of ``fit``."""
        return fit(self.network(), self.examples, methods=methods, **self.options(**changes))

    def with_norm(self) -> TinyProblem:
        """The problem with the BatchNorm network, where there is one."""
        return self if self.norm_network is None else replace(self, network=self.norm_network)

    def double(self) -> TinyProblem:
        """The problem in float64."""
        return replace(
            self,
            examples=_double(self.examples),
            validation=_double(self.validation),
            network=_Double(self.network),
            norm_network=None if self.norm_network is None else _Double(self.norm_network),
        )

    def keyword_inputs(self) -> TinyProblem:
        """The problem with inputs ``{"values": tensor}``. Only for problems whose inputs are tensors."""
        wrap = lambda data: _replace(data, {"values": data.inputs})  # noqa: E731
        return replace(
            self,
            examples=wrap(self.examples),
            validation=wrap(self.validation),
            network=_Keyword(self.network),
            norm_network=None if self.norm_network is None else _Keyword(self.norm_network),
        )

    def first(self, count: int) -> TinyProblem:
        """The problem with the first ``count`` training examples."""
        return replace(self, examples=self.examples.subset(torch.arange(count)))


def classification(count: int = 37, *, classes: int = 3, features: int = 6, seed: int = 0) -> TinyProblem:
    """Noisy clusters, float32; every fifth label is wrong.

    Extras: ``domain`` and ``group``, (count,) int64 in {0, 1}; ``protected_group``, the group as a number, and
    ``protected_score``, (count,) in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(classes, features, generator=generator)

    def draw(number: int) -> Examples:
        labels = torch.arange(number) % classes
        inputs = centres[labels] + torch.randn(number, features, generator=generator)
        labels = torch.where(torch.arange(number) % 5 == 4, (labels + 1) % classes, labels)
        return Examples(inputs, labels, num_classes=classes, **_extras(number))

    make = partial(TinyNetwork, features, outputs=classes)
    return TinyProblem(draw(count), draw(11), make, partial(make, norm=True))


def regression(count: int = 37, *, outputs: int = 1, features: int = 6, seed: int = 0) -> TinyProblem:
    """A linear law with noise, float32; targets (count, outputs), squared error; extras as in ``classification``."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.randn(features, outputs, generator=generator) / features**0.5

    def draw(number: int) -> Examples:
        inputs = torch.randn(number, features, generator=generator)
        targets = inputs @ law + 0.1 * torch.randn(number, outputs, generator=generator)
        return Examples(inputs, targets, num_classes=None, **_extras(number))

    make = partial(TinyNetwork, features, outputs=outputs)
    return TinyProblem(draw(count), draw(11), make, partial(make, norm=True), loss=nn.functional.mse_loss)


def multimodal(count: int = 37, *, classes: int = 3, seed: int = 0) -> TinyProblem:
    """Noisy clusters seen through ``left`` (count, 4), clearly, and ``right`` (count, 3), dimly; every fifth label is wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = {
        "left": torch.randn(classes, 4, generator=generator),
        "right": torch.randn(classes, 3, generator=generator),
    }

    def draw(number: int) -> Examples:
        labels = torch.arange(number) % classes
        inputs = {
            name: strength * centre[labels] + torch.randn(number, centre.shape[1], generator=generator)
            for (name, centre), strength in zip(centres.items(), (2.0, 0.7), strict=True)
        }
        labels = torch.where(torch.arange(number) % 5 == 4, (labels + 1) % classes, labels)
        return Examples(inputs, labels, num_classes=classes)

    make = partial(TinyModalities, outputs=classes)
    return TinyProblem(draw(count), draw(11), make, partial(make, norm=True))


def _extras(count: int) -> dict[str, Tensor]:
    rows = torch.arange(count)
    group = rows // 2 % 2
    score = (rows * 7 % 11).float() / 10
    return {"domain": rows % 2, "group": group, "protected_group": group.float(), "protected_score": score}


@dataclass(frozen=True)
class _Double:
    """Makes a network in float64. A class, so that the problem can be sent to another process."""

    make: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        return self.make().double()


@dataclass(frozen=True)
class _Keyword:
    make: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        return KeywordNetwork(self.make())


def _double(data: Examples) -> Examples:
    wide = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    extras = {name: wide(extra) for name, extra in data.extras.items()}
    return Examples(map_inputs(wide, data.inputs), wide(data.targets), num_classes=data.num_classes, **extras)


def _replace(data: Examples, inputs: Inputs) -> Examples:
    return Examples(inputs, data.targets, num_classes=data.num_classes, **data.extras)
