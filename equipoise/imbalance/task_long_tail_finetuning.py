"""The long-tailed fine-tuning task: several pre-trained backbones, a downstream long tail, a balanced test.

By default the pre-trainings happen here: the training rows are cut into two disjoint halves; each backbone is a model trained on
a long tail of the first half, with an order of the classes of its own, so that every backbone knows other classes badly. The
second half, thinned to a tail in yet another order, is what every arm is fine-tuned on. Beside the backbones stand as many
*replicas*: further runs of the first backbone's pre-training, on the same rows, from other initial weights. They answer the
question whether a gain of several pre-trainings is more than an ensemble's.

Every arm trains a residual adapter and a cosine head on frozen backbones (``AdaptedClassifier``). Plain methods, the baseline
among them, have one backbone, the first; those of ``equipoise.imbalance.backdoor_adjustment`` take several. Pre-training and the
features of all rows are computed once for each seed and kept: their cost is in no arm's, whose training cost is that of
adapters and heads. The parameters at inference count the backbones.

With ``backbones`` of your own nothing is pre-trained here, and there are no replicas: ``same-pretraining-ensemble`` then fine-tunes
the first backbone several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.data import RawData, Splits, corruptions, fingerprint, load, read, split
from equipoise.errors import ArgumentError, check_integer, check_range, refuse
from equipoise.imbalance.backdoor_adjustment import (
    BackdoorAdjustmentMethod,
    FrozenBackbone,
    SamePretrainingEnsemble,
    adapted,
    without_head,
)
from equipoise.imbalance.shared import recall_and_f1
from equipoise.models import build, source_digest
from equipoise.training import Examples, Loader, LogUniform, Method, Problem, RunResult, SupervisedTask, TradeOff, fit
from equipoise.training.batch import Inputs
from equipoise.training.features import find_head
from equipoise.training.space import Choice, Space


class Extracted(nn.Module):
    """A backbone whose features were computed beforehand, and are one of the inputs; its parameters still count."""

    def __init__(self, backbone: nn.Module, key: str) -> None:
        super().__init__()
        self.backbone, self.key = backbone, key

    def forward(self, **features: Tensor) -> Tensor:
        return features[self.key]


@dataclass(frozen=True)
class LongTailFinetuning(SupervisedTask):
    """Fine-tune frozen, differently pre-trained backbones on a long tail; each class counts the same in the test.

    dataset: name of an embedded data set (``equipoise.data.available()``).
    ratio: size of the largest over that of the smallest class in fine-tuning, >= 1; by default 20 for embedded data and 1 for your
        own, which stay as they are.
    pretrainings: number of backbones, >= 2, and of replicas of the first one's pre-training.
    pretrain_ratio: imbalance of each pre-training, >= 1. pretrain_epochs: its length, with Adam.
    pretrain_examples, train_examples: rows from which the tails of pre-training and fine-tuning are cut; by default half of the
        training rows and what is left.
    backbones: "package.module:factory,package.module:other": your own, at least 2, in place of all pre-training. A factory is
        called as that of a model is, and returns a module that maps inputs to features (N, D).
    model: what is pre-trained otherwise: "cnn", "mlp" (for tables), "linear", or "package.module:factory".
    adapter: width of the residual bottleneck of every model; 0 trains the heads alone.
    epochs, batch_size: length and batch of a fine-tuning.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own). The validation
        set is as skewed as fine-tuning, but keeps ``validation_least`` examples of each class, as far as there are so many.
    data, target, test_data: your own file or folder, its target column, and a file to test on.
    """

    name: ClassVar[str] = "long-tail-finetuning"
    metric: ClassVar[str] = "balanced_accuracy"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = (
        "logit-adjustment",
        "best-pretraining",
        "same-pretraining-ensemble",
        "cross-entropy-ensemble",
        "backdoor-adjustment",
    )
    trade_off: ClassVar[TradeOff | None] = TradeOff("accuracy_head", "accuracy_tail", x_higher=True)

    model: str = "cnn"
    dataset: str = "mnist1d"
    ratio: float | None = None
    pretrainings: int = 3
    pretrain_ratio: float = 50.0
    pretrain_epochs: int = 12
    pretrain_examples: int | None = None
    train_examples: int | None = None
    backbones: tuple[str, ...] = ()
    adapter: int = 16
    epochs: int = 15
    validation: float = 0.2
    test: float = 0.2
    validation_least: int = 20
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            object.__setattr__(self, "ratio", 1.0 if self.data else 20.0)
        check_range("ratio", self.ratio, 1)  # type: ignore[arg-type]  # None was replaced
        check_range("pretrain_ratio", self.pretrain_ratio, 1)
        check_integer("pretrainings", self.pretrainings, 2)
        check_integer("pretrain_epochs", self.pretrain_epochs, 1)
        check_integer("adapter", self.adapter, 0)
        check_integer("validation_least", self.validation_least, 1)
        for name in ("pretrain_examples", "train_examples"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        object.__setattr__(self, "backbones", tuple(self.backbones))
        if len(self.backbones) == 1 or not all(":" in name for name in self.backbones):
            refuse("backbones", self.backbones, "name at least 2 factories, as 'package.module:factory'")
        if self.backbones and self.pretrain_examples is not None:
            refuse("pretrain_examples", self.pretrain_examples, "be left out with backbones of your own")
        if self.data is None and (self.target is not None or self.test_data is not None):
            raise ArgumentError("target, test_data describe a file of your own: give data='file.csv' as well")

    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def check(self) -> list[str]:
        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; {self.name} needs classes")
        super().check()
        where = "of your own" if self.backbones else f"pre-trained here for {self.pretrain_epochs} epochs"
        remarks = [
            f"The {len(self.backbones) or self.pretrainings} backbones are {where}. Their pre-training and their features, "
            "computed once for each seed, are in no arm's cost."
        ]
        if self.backbones:
            remarks.append(
                "There are no replicas of your backbones' pre-training: same-pretraining-ensemble fine-tunes the first backbone "
                "several times, which is a weaker control."
            )
        return remarks

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        found = {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}
        sources = [source_digest(name) for name in self.backbones]
        return {**found, "backbone_sources": sources} if sources else found

    def space(self) -> Space:
        """As every task's, with rates that suit a cosine head of scale 25."""
        return {
            "lr": LogUniform(0.003, 0.3),
            "weight_decay": LogUniform(1e-6, 1e-2),
            "early_stopping": Choice((False, True)),
        }

    def build_method(self, method: type[Method], config: Mapping[str, Any]) -> Method:
        ours: dict[str, Any] = {}
        if issubclass(method, BackdoorAdjustmentMethod):
            ours["adapter"] = self.adapter
        if issubclass(method, SamePretrainingEnsemble):
            ours["members"] = len(self.backbones) or self.pretrainings
        return super().build_method(
            method, {**{f"{method.name}.{key}": value for key, value in ours.items()}, **config}
        )

    def problem(self, seed: int) -> Problem:
        return _problem(self, seed)

    def run(self, method: type[Method], config: Mapping[str, Any], seed: int) -> RunResult:
        """As every task's; its training rows are all that the split sets apart for pre-training and fine-tuning.

        How much the runs of several seeds overlap, by which intervals are widened, depends on that number, and not on the rows
        that are left when the tails are cut.
        """
        result = super().run(method, config, seed)
        result.sizes["train"] = self.problem(seed).extra["training_rows"]
        return result

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        """The first backbone, adapted; it offers them all (``backbones``), and the ``replicas`` of the first."""
        first, targets = problem.extra["backbones"][0], problem.train.targets
        features = first(**problem.train.inputs)  # type: ignore[arg-type]  # a dict, see _extract
        model: Any = adapted(first, features, targets, problem.num_outputs, seed=seed, adapter=self.adapter)
        # Tuples, so that what one backbone's arm does not use is not among its parameters.
        model.backbones, model.replicas = problem.extra["backbones"], problem.extra["replicas"]
        return model

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Classification metrics, and the mean recall of the third of the classes that is most (head) and least (tail) frequent."""
        metrics = super().measure(problem, predictions)
        counts = torch.bincount(problem.train.targets, minlength=problem.num_outputs)
        order, third = counts.argsort(descending=True, stable=True), max(1, len(counts) // 3)
        for part in ("validation", "test"):
            recall, _ = recall_and_f1(*predictions[part])
            metrics[f"{part}_accuracy_head"] = recall[order[:third]].nanmean().item()
            metrics[f"{part}_accuracy_tail"] = recall[order[-third:]].nanmean().item()
        return metrics

    # -- the problem of a seed ----------------------------------------------------------------------------------------
    def _raw(self) -> RawData:
        return read(self.data, self.target, test=self.test_data) if self.data else load(self.dataset)

    def _make(self, seed: int) -> Problem:
        parts = split(self._raw(), seed, validation=self.validation, test=self.test)
        assert parts.num_classes is not None  # check refuses a continuous target
        train, orders, heads, rows = parts.train, [], [], len(parts.train)
        if self.backbones:
            models = list(_own(self.backbones, parts.input_shape, parts.num_classes))
        else:
            # Rows are stratified: each run of consecutive ones holds each class in proportion.
            pool, train = self._cut("pretrain_examples", self.pretrain_examples or len(train) // 2, train)
            orders = [self._order(parts.num_classes, seed, number) for number in range(1, self.pretrainings + 1)]
            pretrained = self._pretrainings(pool, orders, parts, seed)
            heads = [find_head(model) for model in pretrained]
            models = [without_head(model, head) for model, head in zip(pretrained, heads, strict=True)]
        if self.train_examples is not None:
            train, _ = self._cut("train_examples", self.train_examples, train)
        order = self._order(parts.num_classes, seed, 0)
        train = self._tail(train, order, self.ratio, seed, 1)
        validation = self._tail(parts.validation, order, self.ratio, seed, 2, self.validation_least)
        frozen = [FrozenBackbone(model) for model in models]
        examples = [_extract(frozen, part) for part in (train, validation, parts.test)]
        known = [FrozenBackbone(Extracted(backbone, key(number))) for number, backbone in enumerate(frozen)]
        count = len(self.backbones) or self.pretrainings
        extra = {
            "backbones": tuple(known[:count]),
            "replicas": () if self.backbones else (known[0], *known[count : 2 * count - 1]),
            "others": tuple(known[2 * count - 1 :]),
            "heads": heads,
            "order": order,
            "orders": orders,
            "training_rows": rows,
        }
        return Problem(examples[0], examples[1], examples[2], parts.input_shape, parts.num_classes, extra)

    def _pretrainings(self, pool: Examples, orders: list[Tensor], parts: Splits, seed: int) -> list[nn.Module]:
        """A model for each order of the classes, then the replicas of the first: the same rows, other initial weights."""
        tails = [self._tail(pool, order, self.pretrain_ratio, seed, 10 + run) for run, order in enumerate(orders)]
        tails += [tails[0]] * (self.pretrainings - 1)
        return [self._pretrain(tail, parts, seed * 1_000 + number) for number, tail in enumerate(tails)]

    def _pretrain(self, examples: Examples, parts: Splits, initial: int) -> nn.Module:
        model = build(self.model, parts.input_shape, parts.num_outputs, initial)
        adam = partial(torch.optim.Adam, lr=1e-3)
        fit(model, examples, epochs=self.pretrain_epochs, batch_size=self.batch_size, optimizer=adam, seed=initial)
        return model

    def _cut(self, name: str, count: int, examples: Examples) -> tuple[Examples, Examples]:
        """The first ``count`` examples, and the others."""
        if count > len(examples) - (name == "pretrain_examples"):
            refuse(name, count, f"leave rows to fine-tune on, of {len(examples)}")
        rows = torch.arange(len(examples))
        return examples.subset(rows[:count]), examples.subset(rows[count:])

    def _order(self, classes: int, seed: int, stream: int) -> Tensor:
        """Classes from the most to the least frequent, (C,)."""
        return torch.randperm(classes, generator=_generator(seed, 100 + stream))

    def _tail(
        self, examples: Examples, order: Tensor, ratio: float | None, seed: int, stream: int, least: int = 1
    ) -> Examples:
        assert ratio is not None  # replaced in __post_init__
        place = order.argsort()[examples.targets]
        return examples.subset(corruptions.long_tail(place, ratio, _generator(seed, stream), least=least))


def key(number: int) -> str:
    """The name under which the features of a backbone are among the inputs."""
    return f"backbone_{number}"


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000 + stream)


@lru_cache(maxsize=10)
def _problem(task: LongTailFinetuning, seed: int) -> Problem:
    """The problem of a seed, kept for all final seeds of a trial: pre-training it again for each arm would take longest."""
    return task._make(seed)


@lru_cache(maxsize=1)
def _own(names: tuple[str, ...], input_shape: tuple[int, ...], num_outputs: int) -> tuple[nn.Module, ...]:
    """The user's backbones, made once: no run writes to them."""
    try:
        return tuple(build(name, input_shape, num_outputs) for name in names)
    except ArgumentError as error:
        raise ArgumentError(f"backbones = {names}: {error}") from error


def _extract(backbones: list[FrozenBackbone], examples: Examples) -> Examples:
    """The examples with the features of every backbone, (N, D_b) each, as inputs."""
    inputs: Inputs = {
        key(number): torch.cat([backbone(batch.inputs) for batch in Loader(examples, 1024)])
        for number, backbone in enumerate(backbones)
    }
    return Examples(inputs, examples.targets, num_classes=examples.num_classes)
