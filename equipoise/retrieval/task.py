"""The retrieval task: embeddings of classes that training has not seen, found by rank and accepted by one threshold.

Training, validation and test have no class in common. Embedded data have few classes, so that each of four rotations of an
image's class is a class of its own: 40 of them for digits, the default. A generated world of classes of very different spread
(`equipoise.retrieval.open_world`) is there too, and your own files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import RawData, available, fingerprint, load, read
from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.models import MLP, build
from equipoise.retrieval.baselines import PEERS, installed
from equipoise.retrieval.metrics import retrieval_metrics
from equipoise.retrieval.open_world import OPEN_WORLD, check_classes, open_world, rotated, split_classes
from equipoise.retrieval.pairs import unit_rows
from equipoise.training import Choice, Loader, LogUniform, Problem, Run, SupervisedTask
from equipoise.training.sampler import ClassBatches
from equipoise.training.space import Space
from equipoise.training.task import Config, TradeOff, cached_problem

OPTIMISE = {"recall_at_1": True, "map_at_r": True, "opis": False}  # whether higher is better


# -- the model --------------------------------------------------------------------------------------------------------
class CosineClassifier(nn.Module):
    """Cosines (N, C) of embeddings (N, D) with one direction a class: the head of a normalised-softmax network.

    Starts as in Zhai and Wu's, uniform in +-1/sqrt(D): its norm decides how fast the directions turn.
    """

    def __init__(self, num_features: int, num_classes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = num_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_classes, num_features).uniform_(-bound, bound, generator=generator))

    def forward(self, embeddings: Tensor) -> Tensor:
        return unit_rows(embeddings) @ unit_rows(self.weight).T


class Embedder(nn.Module):
    """A ``body`` that embeds inputs, (N, D), and the cosine classifier over the training classes."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def get_classifier(self) -> nn.Module:
        return self.head


def encoder(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """The task's "mlp": one hidden layer of 256 between the input and the embedding."""
    return MLP(input_shape, num_outputs, (256,), head_bias=True)


def scaled_cross_entropy(cosines: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Cross-entropy of ``scale`` times the cosines: normalised softmax with temperature ``1 / scale``."""
    return F.cross_entropy(scale * cosines, targets)


# -- the task ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Retrieval(SupervisedTask):
    """Embeddings for search and verification, tested on classes that training has not seen.

    dataset: name of an embedded set of square images (``equipoise.data.available()``), whose classes at each of four rotations
        are classes of their own; or "open-world" (generated).
    classes: of the generated data.
    optimise: the metric that is judged and tuned: "recall_at_1", "map_at_r" or "opis". All are reported.
    shared_low, shared_high: Euclidean distances of unit embeddings between which ``opis_shared`` compares all models.
    model: "mlp" (one hidden layer of 256), "cnn", "linear", or "package.module:factory" of your own; its output is the embedding.
    embedding: number of coordinates of the embedding, the ``num_outputs`` of your own factory.
    epochs: length of a training run. batch_size, per_class: size of a batch, and examples of each of its classes; a batch has
        no more classes than there are to train on.
    validation, test: shares of the classes held out; the rest is trained on.
    evaluation_size: at most so many examples of each validation and test class, drawn by the seed; none for all. All pairs
        are looked at after every epoch.
    data, target: your own file or folder, and its target column. image_size: side to resize the images of a folder to.
    """

    name: ClassVar[str] = "retrieval"
    baseline: ClassVar[str] = "normalised-softmax"
    methods: ClassVar[tuple[str, ...]] = ("tcm", "contrastive-penalty", *PEERS)
    trade_off: ClassVar[TradeOff | None] = TradeOff("opis", "recall_at_1")

    dataset: str = "digits"
    classes: int = 100
    optimise: str = "map_at_r"
    shared_low: float = 0.6
    shared_high: float = 1.0
    embedding: int = 64
    epochs: int = 20
    batch_size: int = 120
    per_class: int = 4
    validation: float = 0.15
    test: float = 0.3
    evaluation_size: int | None = 40
    data: str | None = None
    target: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimise", self.optimise, tuple(OPTIMISE))
        check_integer("embedding", self.embedding, 1)
        check_integer("per_class", self.per_class, 1)
        for name in ("validation", "test"):
            check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=True)
        check_range("shared_low", self.shared_low, 0, 2)
        check_range("shared_high", self.shared_high, self.shared_low, 2, open_low=True)
        if self.evaluation_size is not None:
            check_integer("evaluation_size", self.evaluation_size, 2)
        if self.data is None:
            check_choice("dataset", self.dataset, (OPEN_WORLD, *available()))
            if self.target is not None or self.image_size is not None:
                raise ArgumentError("target, image_size describe a file of your own: give data='file.csv' as well")
        object.__setattr__(self, "metric", self.optimise)
        object.__setattr__(self, "higher_is_better", OPTIMISE[self.optimise])
        object.__setattr__(self, "percent", OPTIMISE[self.optimise])

    @property
    def resampled(self) -> bool:
        return self.data is not None or self.dataset != OPEN_WORLD

    def entrants(self) -> tuple[str, ...]:
        return tuple(name for name in self.methods if name not in PEERS or installed())

    def check(self) -> list[str]:
        check_classes(self._raw(0), self.validation, self.test)
        problem = cached_problem(self, 0)
        body, inputs = self.build_model(problem, 0).body.eval(), problem.train.take(torch.arange(2)).inputs
        with torch.no_grad():
            shape = tuple(body(inputs).shape)
        if shape != (2, self.embedding):
            raise ArgumentError(
                f"model = {self.model!r}: its output has shape {shape} for 2 examples: must be (2, {self.embedding}), the "
                "embeddings. Change its last layer, or embedding"
            )
        if installed():
            return []
        return [
            f"{', '.join(PEERS)} did not take part: pytorch-metric-learning is missing (pip install 'equipoise[peers]')."
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), **({"data_sha256": fingerprint(self.data)} if self.data else {})}

    def problem(self, seed: int) -> Problem:
        return split_classes(self._raw(seed), seed, self.validation, self.test, self.evaluation_size)

    def build_model(self, problem: Problem, seed: int) -> Embedder:
        name = f"{__name__}:encoder" if self.model == "mlp" else self.model
        body = build(name, problem.input_shape, self.embedding, seed)
        return Embedder(body, CosineClassifier(self.embedding, problem.num_outputs, seed))

    def space(self) -> Space:
        """Learning rate and weight decay of AdamW, scale of the cosines, and whether the best epoch counts, or the last."""
        return {
            "lr": LogUniform(3e-4, 1e-2),
            "weight_decay": LogUniform(1e-6, 1e-1),
            "scale": LogUniform(4, 64),
            "early_stopping": Choice((False, True)),
        }

    def fit_options(self, problem: Problem, config: Config) -> dict[str, Any]:
        return {
            "optimizer": partial(torch.optim.AdamW, lr=config["lr"], weight_decay=config["weight_decay"]),
            "loss": partial(scaled_cross_entropy, scale=config["scale"]),
            "sampler": ClassBatches(self.per_class),
            "batch_size": self.per_class * min(problem.num_outputs, max(1, self.batch_size // self.per_class)),
            "validation": None,  # its classes are unknown to the head
        }

    def matched_space(self, ratio: float) -> Space:
        return {"compute": Choice(("longer",))}  # embeddings of different networks have no mean

    def predict(self, run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
        """The embeddings."""
        model = run.inference_model
        if not isinstance(model, Embedder):
            refuse("inference_model", type(model).__name__, "be an Embedder, whose body gives the embeddings")
        return run.predict(loader, model.body)

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        shared = (self.shared_low, self.shared_high)
        return {
            f"{part}_{name}": value
            for part in ("validation", "test")
            for name, value in retrieval_metrics(*predictions[part], shared).items()
        }

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run learned anything: recall@1 on validation data two standard errors above that of a random neighbour."""
        labels = problem.validation.targets
        n, counts = len(labels), torch.bincount(labels)
        chance = float((counts * (counts - 1)).sum()) / (n * (n - 1))
        return metrics["validation_recall_at_1"] > chance + 2 * math.sqrt(chance * (1 - chance) / n)

    def _raw(self, seed: int) -> RawData:
        if self.data is not None:
            return read(self.data, self.target, kind="classification", image_size=self.image_size)
        if self.dataset == OPEN_WORLD:
            return open_world(seed, self.classes)
        return rotated(load(self.dataset), seed)
