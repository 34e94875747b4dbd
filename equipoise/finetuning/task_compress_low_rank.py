"""The compression task: a pre-trained model made smaller by low-rank factors, and repaired with few examples.

By default the pre-training happens here, once for each seed: a multilayer perceptron with wide layers learns the training rows.
Every arm but `full-finetuning`, the reference, then gives it the same low-rank layers (``ratio`` times fewer numbers each), and
trains for the same number of steps on the same few of those rows. Beside the accuracy stand the parameters and the floating-point
operations for one row at inference, and what was lost against the model as it was. The pre-training is in no arm's cost.

A trial is held at one ratio, so that all compressed arms have one size and differ in quality alone; run it at several for the
curve of quality against size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equipoise.data import Splits, fingerprint, split
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer, check_range, refuse, suggestion
from equipoise.finetuning.adapters import checked_file
from equipoise.finetuning.compression_baselines import SVDFinetune
from equipoise.finetuning.pela import PELA, checked_names, compress
from equipoise.finetuning.task import OPTIMIZERS, Finetune, _accuracy, _predict
from equipoise.training import Choice, Examples, Problem, Run, TradeOff
from equipoise.training.batch import Loader
from equipoise.training.method import Method
from equipoise.training.space import Space
from equipoise.training.task import SupervisedTask

PRETRAIN_STEPS = 300


@dataclass(frozen=True)
class CompressLowRank(Finetune):
    """Make a pre-trained model smaller by low-rank factors, and repair it with few examples; quality against size.

    dataset: name of an embedded data set (``equipoise.data.available()``).
    ratio: how many times fewer numbers the factors of a layer hold than its weight, > 1.
    skip: layers whose path contains one of these words stay as they are.
    pretrain_examples, pretrain_steps: length of the pre-training (AdamW, rate 1e-3, batches of 64), by default on all training rows
        for 300 steps; 0 where a ``model`` of your own comes pre-trained, and the default with ``weights``.
    train_examples: how many of those rows the compressed model is trained on.
    steps: optimizer steps of that training, in ``epochs`` equal parts after each of which the metrics are taken.
    batch_size: examples of a step; the rows are gone through in random order, again and again.
    optimizer: "adamw" or "sgd" (without momentum). schedule: "cosine" to zero, or "constant".
    model: "mlp" (layers of widths ``hidden``), "transformer" (rows of an image are its tokens), or "package.module:factory" of
        your own.
    weights: safetensors file with the ``state_dict`` of the ``model``, in the place of the pre-training.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    validation_examples, test_examples: at most so many of them.
    data, target: your own file or folder, and its target column.
    """

    name: ClassVar[str] = "compress-low-rank"
    baseline: ClassVar[str] = "svd-finetune"
    methods: ClassVar[tuple[str, ...]] = ("full-finetuning", "svd-only", "svd-distill", "low-rank-scratch", "pela")
    trade_off: ClassVar[TradeOff | None] = TradeOff("parameters", "accuracy", x_higher=False)
    # What Finetune has and this task has not: data that differ from those of the pre-training, and adapters.
    shift: ClassVar[str] = "none"  # type: ignore[misc]
    source: ClassVar[str | None] = None  # type: ignore[misc]
    rank: ClassVar[int] = 8  # type: ignore[misc]

    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256, 256)
    ratio: float = 12.0
    skip: tuple[str, ...] = ("head",)
    pretrain_steps: int | None = None  # type: ignore[assignment]  # replaced below
    train_examples: int = 200
    steps: int = 100
    epochs: int = 4
    weights: str | None = None

    def __post_init__(self) -> None:
        SupervisedTask.__post_init__(self)
        if not self.hidden or not all(str(width).isdecimal() and int(width) for width in self.hidden):
            refuse("hidden", self.hidden, "name at least one width, as in 256,256")
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        object.__setattr__(self, "skip", checked_names("skip", self.skip))
        steps = self.pretrain_steps
        if steps is None:
            steps = PRETRAIN_STEPS if self.weights is None else 0
        check_integer("pretrain_steps", steps, 0)
        object.__setattr__(self, "pretrain_steps", steps)
        check_range("ratio", self.ratio, 1, open_low=True)
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        for name in ("train_examples", "steps", "pretrain_examples", "validation_examples", "test_examples"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1)
        for name in ("validation", "test"):
            check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=True)
        if self.steps < self.epochs:
            refuse("steps", self.steps, f"be at least epochs = {self.epochs}")
        if self.data is None and self.target is not None:
            raise ArgumentError("target describes a file of your own: give data='file.csv' as well")
        if self.weights is not None and self.pretrain_steps:
            refuse("pretrain_steps", self.pretrain_steps, "be 0 with weights of your own")
        if not self.pretrain_steps and self.weights is None and ":" not in self.model:
            refuse("pretrain_steps", 0, "be more", "Or give weights, or a model of your own that comes pre-trained")

    # -- what a trial needs to know -----------------------------------------------------------------------------------
    def check(self) -> list[str]:
        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; {self.name} needs classes")
        SupervisedTask.check(self)
        problem = self.problem(0)
        dense: nn.Module = problem.extra["pretrained"]
        sizes = [
            sum(p.numel() for p in model.parameters()) for model in (compress(dense, self.ratio, skip=self.skip), dense)
        ]
        how = f"pre-trained here for {self.pretrain_steps} steps, once for each seed, at no arm's cost; its"
        before = 100 * problem.extra["before"]["test"]
        return [
            f"The model was {how if self.pretrain_steps else 'given pre-trained; its'} accuracy on the test data of seed 0 is "
            f"{before:.1f} %. Ratio {self.ratio:g} leaves {sizes[0]:,} of its {sizes[1]:,} parameters."
        ]

    def fingerprint(self) -> dict[str, Any]:
        found = super().fingerprint()
        return {**found, "weights_sha256": fingerprint(self.weights)} if self.weights else found

    def build_method(self, method: type[Method], config: Mapping[str, Any]) -> Method:
        ours = {"ratio": self.ratio, "skip": self.skip} if issubclass(method, PELA | SVDFinetune) else {}
        return super().build_method(
            method, {**{f"{method.name}.{key}": value for key, value in ours.items()}, **config}
        )

    def matched_space(self, ratio: float) -> Space:
        """Longer training: an ensemble would have another size."""
        return {"compute": Choice(("longer",))}

    def examine(self, problem: Problem, run: Run) -> dict[str, float]:
        """The finished model's size, what one row costs, and the accuracy that is lost against the model as it was."""
        model = run.inference_model
        found = {}
        for part, examples in (("validation", problem.validation), ("test", problem.test)):
            accuracy = _accuracy(*self.predict(run, Loader(examples, 4096)))
            found[f"{part}_accuracy_lost"] = problem.extra["before"][part] - accuracy
            found[f"{part}_parameters"] = float(sum(p.numel() for p in model.parameters()))
            with FlopCounterMode(display=False) as counter:
                run.predict(examples.subset([0]), model)
            found[f"{part}_flops"] = float(counter.get_total_flops())
        return found

    # -- the problem of a seed ----------------------------------------------------------------------------------------
    def _make(self, seed: int) -> Problem:
        parts = split(self._raw(), seed, validation=self.validation, test=self.test)
        assert parts.num_classes is not None  # check refuses a continuous target
        # Rows are stratified: the first so many hold each class in proportion.
        pool = parts.train if self.pretrain_examples is None else _first_rows("pretrain_examples", self, parts.train)
        train = _first_rows("train_examples", self, pool)
        held = {"validation": parts.validation, "test": parts.test}
        for part, examples in held.items():
            if (limit := getattr(self, f"{part}_examples")) is not None:
                held[part] = examples.subset(torch.arange(min(limit, len(examples))))
        model = self._pretrained(pool, parts, seed)
        extra = {
            "pretrained": model,
            "before": {part: _accuracy(*_predict(model, examples)) for part, examples in held.items()},
            "training_rows": len(parts.train),
        }
        return Problem(train, held["validation"], held["test"], parts.input_shape, parts.num_classes, extra)

    def _pretrained(self, pool: Examples, parts: Splits, seed: int) -> nn.Module:
        model = super()._pretrained(pool, parts, seed)
        return model if self.weights is None else load_weights(model, self.weights)


def _first_rows(name: str, task: CompressLowRank, examples: Examples) -> Examples:
    """The first of the examples, as many as the setting ``name`` says."""
    count = getattr(task, name)
    if count > len(examples):
        refuse(name, count, f"be at most {len(examples)}, which there are")
    return examples.subset(torch.arange(count))


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill ``model`` from a safetensors file of its ``state_dict``. Raises ``DataError`` where the file does not fit it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(checked_file(path))
    except SafetensorError as error:
        raise DataError(f"{path}: is no safetensors file ({error})") from error
    mine = model.state_dict()
    for key, tensor in mine.items():
        if key not in state:
            raise DataError(f"{path}: has no {key!r}, which the model has. {suggestion(key, list(state))}".rstrip())
        if state[key].shape != tensor.shape:
            there, here = tuple(state[key].shape), tuple(tensor.shape)
            raise DataError(
                f"{path}: {key!r} has the shape {there}, and {here} in the model: was it saved from another?"
            )
    if extra := sorted(state.keys() - mine.keys()):
        raise DataError(
            f"{path}: has {extra[0]!r}, which the model has not. {suggestion(extra[0], list(mine))}".rstrip()
        )
    model.load_state_dict(state)
    return model
