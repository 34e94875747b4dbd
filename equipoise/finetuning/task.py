"""The fine-tuning task: a model pre-trained on one data set is adapted to a shifted one with few examples.

By default the pre-training happens here, once for each seed: a small transformer learns upright images; then their rotated
versions, other images and few of them, are what every arm adapts it to, for the same number of steps. Beside the accuracy on
shifted test images stand what is left on upright ones (``source_accuracy``, and ``forgetting``, the drop), how many numbers
were trained, and the optimizer's memory. The pre-training is in no arm's cost.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from equipoise.data import RawData, Splits, fingerprint, load, read, split
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer, check_range, refuse
from equipoise.finetuning import text
from equipoise.models import build
from equipoise.models.reference import MLP
from equipoise.training import Examples, Loader, LogUniform, Problem, Run, RunResult, SupervisedTask, TradeOff, fit
from equipoise.training.method import Method
from equipoise.training.space import Space
from equipoise.training.task import Config, cosine

BY_PEFT = ("lora", "rslora", "pissa", "dora")
SHAKESPEARE = "shakespeare"
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Finetune(SupervisedTask):
    """Adapt a pre-trained model to shifted data with few examples; the metric is the accuracy on shifted test data.

    dataset: name of an embedded set of images or sequences (``equipoise.data.available()``); or "shakespeare", whose genres in
        modern spelling are the old task of ``model`` "minilm", and in the Folio's the new one (``equipoise.finetuning.text``).
    shift: what makes the new data of the old: "rotate" (images by 90 degrees), "invert" (dark and light, or the sign, change
        places) or "none".
    pretrain_examples, pretrain_steps: length of the pre-training (AdamW, rate 1e-3, batches of 64), on rows that fine-tuning does
        not see; by default all that ``train_examples`` leave. 0 steps: the ``model`` of your own comes pre-trained.
    train_examples: shifted examples to adapt to. validation_examples, test_examples: at most so many.
    steps: optimizer steps of an adaptation, in ``epochs`` equal parts after each of which the metrics are taken.
    batch_size: examples of a step; the rows are gone through in random order, again and again.
    rank: of every adapter that has one: a budget, which is not tuned. Layers that cannot hold it stay as they are.
    optimizer: "adamw" or "sgd" (without momentum). schedule: "cosine" to zero, or "constant".
    model: "transformer" (rows of an image are its tokens), "mlp" (layers of widths ``hidden``), "cnn", "linear",
        "minilm" (for "shakespeare"), or "package.module:factory" of your own.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    data, target: your own file or folder to adapt to, and its target column, with ``shift`` "none".
    source: the file or folder that your own data's model is pre-trained on, with the same target; forgetting is measured on it.
    """

    name: ClassVar[str] = "finetune"
    baseline: ClassVar[str] = "full-finetuning"
    methods: ClassVar[tuple[str, ...]] = (
        "linear-probe",
        *BY_PEFT,
        "ba-lora",
        "sara",
        "gradnormlorp",
        "sorsa",
        "allora",
        "mosa",
    )
    trade_off: ClassVar[TradeOff | None] = TradeOff("source_accuracy", "accuracy", x_higher=True)

    model: str = "transformer"
    dataset: str = "digits"
    shift: str = "rotate"
    hidden: tuple[int, ...] = (128, 128)
    pretrain_examples: int | None = None
    pretrain_steps: int = 300
    train_examples: int = 100
    steps: int = 40
    epochs: int = 2
    rank: int = 8
    optimizer: str = "adamw"
    schedule: str = "cosine"
    validation: float = 0.2
    test: float = 0.2
    validation_examples: int | None = None
    test_examples: int | None = None
    data: str | None = None
    target: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        check_choice("shift", self.shift, ("rotate", "invert", "none"))
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_integer("pretrain_steps", self.pretrain_steps, 0)
        for name in ("train_examples", "steps", "rank"):
            check_integer(name, getattr(self, name), 1)
        for name in ("pretrain_examples", "validation_examples", "test_examples"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1)
        for name in ("validation", "test"):
            check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=True)
        if self.steps < self.epochs:
            refuse("steps", self.steps, f"be at least epochs = {self.epochs}")
        if (self.dataset == SHAKESPEARE) != (self.model == "minilm"):
            refuse("dataset, model", (self.dataset, self.model), "be 'shakespeare' and 'minilm' together, or neither")
        if self.data is None:
            if self.target is not None or self.source is not None:
                raise ArgumentError("target, source describe files of your own: give data='file.csv' as well")
        elif self.shift != "none":
            object.__setattr__(self, "shift", "none")
        if self.data is not None and self.source is None and self.pretrain_steps:
            refuse(
                "pretrain_steps",
                self.pretrain_steps,
                "be 0 for data of your own without source",
                "Give source='old.csv' to pre-train on, or model='package.module:factory' that returns a pre-trained model",
            )

    # -- what a trial needs to know -----------------------------------------------------------------------------------
    @property
    def resampled(self) -> bool:
        return self.dataset == SHAKESPEARE or self._raw().test is None

    def entrants(self) -> tuple[str, ...]:
        return tuple(slug for slug in self.methods if slug not in BY_PEFT or find_spec("peft") is not None)

    def check(self) -> list[str]:
        if self.dataset != SHAKESPEARE and (raw := self._raw()).class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; {self.name} needs classes")
        super().check()
        remarks = []
        if self.pretrain_steps:
            before = self.problem(0).extra["before"]["test"]
            remarks.append(
                f"The model was pre-trained here for {self.pretrain_steps} steps, once for each seed (accuracy on unshifted test "
                f"data {100 * before:.1f} % for seed 0). That is in no arm's cost."
            )
        sizes = _linear_sizes(self.problem(0).extra["pretrained"])
        if small := [name for name, size in sizes.items() if size < self.rank]:
            remarks.append(
                f"{', '.join(small)}: too small for adapters of rank {self.rank}, and frozen under them. Give a lower rank to "
                "adapt such layers."
            )
        if missing := [slug for slug in self.methods if slug not in self.entrants()]:
            remarks.append(f"{', '.join(missing)} did not take part: peft is missing (pip install 'equipoise[hf]').")
        return remarks

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "source") if (path := getattr(self, key))}
        return {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}

    def space(self) -> Space:
        """Learning rate and weight decay; the last step counts."""
        low, high = (1e-4, 2e-2) if self.optimizer == "adamw" else (1e-2, 1.0)
        return {"lr": LogUniform(low, high), "weight_decay": LogUniform(1e-6, 1e-1)}

    # -- a run --------------------------------------------------------------------------------------------------------
    def problem(self, seed: int) -> Problem:
        return _problem(self, seed)

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        return copy.deepcopy(problem.extra["pretrained"])

    def fit_options(self, problem: Problem, config: Config) -> dict[str, Any]:
        rates = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
        return {
            "optimizer": partial(OPTIMIZERS[self.optimizer], **rates),
            "scheduler": cosine if self.schedule == "cosine" else None,
            "sampler": Passes(-(-self.steps // self.epochs) * self.batch_size),
        }

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        """As every task's; its training rows are all that the split sets apart, for pre-training and adaptation."""
        result = super().run(method, config, seed)
        result.sizes["train"] = self.problem(seed).extra["training_rows"]
        return result

    def examine(self, problem: Problem, run: Run) -> dict[str, float]:
        """What is left of the old task, and what the adaptation took."""
        memory = state_bytes(run.optimizer.state_dict()["state"]) / 1024
        found = {}
        for part in ("validation", "test"):
            found[f"{part}_trainable"], found[f"{part}_optimizer_kib"] = float(run.trained), memory  # type: ignore[attr-defined]
            if (examples := problem.extra[f"source_{part}"]) is not None:
                left = _accuracy(*self.predict(run, Loader(examples, 4096)))
                found[f"{part}_source_accuracy"] = left
                found[f"{part}_forgetting"] = problem.extra["before"][part] - left
        return found

    def shifted(self, inputs: Tensor) -> Tensor:
        """The new data (N, ...) of the old."""
        if self.shift == "rotate":
            if inputs.ndim != 4 or inputs.shape[2] != inputs.shape[3]:
                refuse(
                    "shift", self.shift, f"be 'invert' or 'none' for inputs {tuple(inputs.shape[1:])}: no square images"
                )
            return inputs.rot90(1, (2, 3)).contiguous()
        if self.shift == "invert":
            return 1 - inputs if inputs.ndim == 4 else -inputs
        return inputs

    def _fit(
        self,
        problem: Problem,
        method: type[Method],
        config: Config,
        seed: int,
        member: int,
        epochs: int,
        on_epoch_end: Callable[[Run], dict[str, Any]],
    ) -> Run:
        def look(run: Run) -> dict[str, Any]:
            # Counted while it trains: in the end a method may have made dense again what trained in part.
            groups = run.optimizer.param_groups
            trained.append(sum(p.numel() for group in groups for p in group["params"] if p.requires_grad))
            return on_epoch_end(run)

        trained: list[int] = []
        config = {**self._budget(problem, method, config), **config}
        run = super()._fit(problem, method, config, seed, member, epochs, look)
        run.trained = trained[-1]  # type: ignore[attr-defined]  # for examine
        return run

    def _budget(self, problem: Problem, method: type[Method], config: Config) -> dict[str, Any]:
        """Rank and target of a method that has them: every layer that can hold the rank."""
        if not {"rank", "target"} <= set(signature(method).parameters):
            return {}
        rank = int(config.get(f"{method.name}.rank", self.rank))
        sizes = _linear_sizes(problem.extra["pretrained"])
        fitting = [name for name, size in sizes.items() if size >= rank]
        target = None if len(fitting) in (0, len(sizes)) else fitting
        return {f"{method.name}.rank": rank, f"{method.name}.target": target}

    def step_seconds(self, method: type[Method], config: Config, seed: int) -> float:
        """Of one part of the steps: an epoch here is no pass over the data."""
        problem, start = self.problem(seed), time.perf_counter()
        self._fit(problem, method, config, seed, 0, 1, lambda run: {})
        members = math.ceil(config.get("compute_ratio", 1.0)) if config.get("compute") == "ensemble" else 1
        return (time.perf_counter() - start) * members

    # -- the problem of a seed ----------------------------------------------------------------------------------------
    def _raw(self) -> RawData:
        return read(self.data, self.target) if self.data else load(self.dataset)

    def _make(self, seed: int) -> Problem:
        if self.dataset == SHAKESPEARE:
            return self._passages(seed)
        parts = split(self._raw(), seed, validation=self.validation, test=self.test)
        assert parts.num_classes is not None  # check refuses a continuous target
        if self.source is not None:
            old = split(read(self.source, self.target), seed, validation=self.validation, test=self.test)
            if (old.input_shape, old.num_classes) != (parts.input_shape, parts.num_classes):
                raise DataError(
                    f"{self.source}: has inputs {old.input_shape} and {old.num_classes} classes, {self.data} "
                    f"{parts.input_shape} and {parts.num_classes}: must be the same"
                )
            pool, new = old.train, self._first("train_examples", self.train_examples, parts.train)[0]
        else:
            old = parts
            # Rows are stratified: each run of consecutive ones holds each class in proportion.
            new, pool = self._first("train_examples", self.train_examples, parts.train)
        if self.pretrain_examples is not None:
            pool, _ = self._first("pretrain_examples", self.pretrain_examples, pool)
        validation, test = (
            examples if limit is None else examples.subset(torch.arange(min(limit, len(examples))))
            for examples, limit in ((parts.validation, self.validation_examples), (parts.test, self.test_examples))
        )
        held: dict[str, Examples | None] = {"validation": validation, "test": test}
        if self.data is not None:
            own = self.source is not None
            held = {"validation": old.validation if own else None, "test": old.test if own else None}
        model = self._pretrained(pool, old, seed)
        new, validation, test = (self._shift(examples) for examples in (new, validation, test))
        return self._assembled(model, held, new, validation, test, parts.input_shape, len(parts.train))

    def _passages(self, seed: int) -> Problem:
        found = text.domains(self, seed)
        model = text.probed(found["pool"], self.pretrain_steps, seed)
        old = {part: found[f"source_{part}"] for part in ("validation", "test")}
        new, validation, test = (found[name] for name in ("new", "validation", "test"))
        return self._assembled(model, old, new, validation, test, (text.TOKENS,), len(new) + len(found["pool"]))

    def _assembled(
        self,
        model: nn.Module,
        old: Mapping[str, Examples] | Mapping[str, Examples | None],
        new: Examples,
        validation: Examples,
        test: Examples,
        shape: tuple[int, ...],
        rows: int,
    ) -> Problem:
        before = {part: _accuracy(*_predict(model, held)) for part, held in old.items() if held is not None}
        sources = {f"source_{part}": held for part, held in old.items()}
        extra = {"pretrained": model, "before": before, "training_rows": rows, **sources}
        return Problem(new, validation, test, shape, new.num_classes or 0, extra)

    def _first(self, name: str, count: int, examples: Examples) -> tuple[Examples, Examples]:
        """The first ``count`` examples, and the others."""
        if count > len(examples) - (name == "train_examples" and self.pretrain_steps > 0 and self.source is None):
            refuse(name, count, f"leave rows, of {len(examples)}")
        rows = torch.arange(len(examples))
        return examples.subset(rows[:count]), examples.subset(rows[count:])

    def _shift(self, examples: Examples) -> Examples:
        assert isinstance(examples.inputs, Tensor)  # split gives one tensor
        return Examples(self.shifted(examples.inputs), examples.targets, num_classes=examples.num_classes)

    def _pretrained(self, pool: Examples, parts: Splits, seed: int) -> nn.Module:
        named = {"mlp": partial(MLP, hidden=self.hidden, head_bias=True)}
        if self.model in named:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model: nn.Module = named[self.model](parts.input_shape, parts.num_outputs)
        else:
            name = "equipoise.finetuning.model:RowTransformer" if self.model == "transformer" else self.model
            model = build(name, parts.input_shape, parts.num_outputs, seed)
        if self.pretrain_steps:
            adamw = partial(torch.optim.AdamW, lr=1e-3)
            fit(
                model,
                pool,
                epochs=1,
                batch_size=64,
                optimizer=adamw,
                sampler=Passes(64 * self.pretrain_steps),
                seed=seed,
            )
        return model


@dataclass(frozen=True)
class Passes:
    """``count`` positions: the rows in random order, again and again; a run's length does not depend on the number of rows."""

    count: int

    def __call__(self, data: Any, batch_size: int, generator: torch.Generator) -> Sampler[int]:
        return _PassSampler(len(data), self.count, generator)


class _PassSampler(Sampler[int]):
    def __init__(self, rows: int, count: int, generator: torch.Generator) -> None:
        self.rows, self.count, self.generator = rows, count, generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        passes = -(-self.count // self.rows)
        order = torch.cat([torch.randperm(self.rows, generator=self.generator) for _ in range(passes)])
        return iter(order[: self.count].tolist())


def _linear_sizes(model: nn.Module) -> dict[str, int]:
    """The smaller dimension of every linear layer."""
    return {name: min(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in an optimizer's state, single numbers such as step counters aside."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size() if state.numel() > 1 else 0
    if isinstance(state, Mapping):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0


def _accuracy(prediction: Tensor, targets: Tensor) -> float:
    return (prediction.argmax(1) == targets).double().mean().item()


@torch.no_grad()
def _predict(model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
    was = model.training
    model.eval()
    loader = Loader(examples, 4096)
    logits = torch.cat([model(**b.inputs) if isinstance(b.inputs, dict) else model(b.inputs) for b in loader])
    model.train(was)
    return logits, examples.targets


@lru_cache(maxsize=10)
def _problem(task: Finetune, seed: int) -> Problem:
    """The problem of a seed, kept for all final seeds of a trial: pre-training it again for each arm would take longest."""
    return task._make(seed)
