"""A correct method with per-example state, and methods that each break one rule of the contract."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from equipoise import Method, Paper
from equipoise.errors import ArgumentError, check_range
from equipoise.training import LogUniform, Uniform
from equipoise.training.table import write_rows


class Table(nn.Module):
    """One row per training example."""

    def __init__(self, examples: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(examples, classes))


class Memory(Method):
    """Pull each prediction towards the running average of the predictions for its example."""

    name = "memory"
    paper = Paper("A toy", "Nobody", "Nowhere 2000", "https://example.org")
    space: ClassVar[dict[str, Any]] = {"strength": LogUniform(0.1, 10), "momentum": Uniform(0, 0.9)}
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}

    def __init__(self, strength: float = 1.0, momentum: float = 0.5) -> None:
        check_range("strength", strength, 0)
        check_range("momentum", momentum, 0, 1, open_high=True)
        self.strength, self.momentum = strength, momentum

    def prepare(self, run):
        if run.num_examples is None or run.num_classes is None:
            raise ArgumentError("data = None: memory needs the training set; give data=...")
        self.table = run.register(self, "table", Table(run.num_examples, run.num_classes))

    def penalty(self, run, batch, output):
        p = output.prediction.softmax(1)
        return self.strength * self.distance(p, self.remember(batch.positions(self.name), p.detach()))

    def distance(self, p, average):
        return (p - average).square().sum(1).mean()

    def remember(self, index, p):
        average = self.momentum * self.table.rows[index] + (1 - self.momentum) * p
        write_rows(self.table.rows, index, average)
        return average


# -- declaration ------------------------------------------------------------------------------------------------------
class BadSlug(Memory):
    """Has a name with capitals and blanks."""

    name = "Bad Slug"


class InheritedName(Memory):
    """Has no name of its own."""


class NoSummary(Memory):
    name = "no-summary"


class LongSummary(Memory):
    """Says what it does in a summary that
    goes on for two lines."""

    name = "long-summary"


class TextPaper(Memory):
    """Names its paper in a string."""

    name = "text-paper"
    paper = "Nobody: A toy. Nowhere 2000"  # type: ignore[assignment]


class WrongSignature(Memory):
    """Takes the arguments of a hook in another order."""

    name = "wrong-signature"

    def penalty(self, run, output, batch):
        return super().penalty(run, batch, output)


class NearMiss(Memory):
    """Misspells a hook."""

    name = "near-miss"

    def after_steps(self, run):
        """Never called."""


class Renames(Memory):
    """Keeps an argument under another name."""

    name = "renames"

    def __init__(self, strength: float = 1.0, momentum: float = 0.5, power: float = 2.0) -> None:
        super().__init__(strength, momentum)
        check_range("power", power, 0)
        self.exponent = power


class Required(Memory):
    """Has an argument without default."""

    name = "required"

    def __init__(self, strength: float, momentum: float = 0.5) -> None:
        super().__init__(strength, momentum)


class SpaceOfNothing(Memory):
    """Tunes an argument that it does not have."""

    name = "space-of-nothing"
    space: ClassVar[dict[str, Any]] = {"power": Uniform(0, 1)}


class WideSpace(Memory):
    """Tunes beyond what it accepts."""

    name = "wide-space"
    space: ClassVar[dict[str, Any]] = {"momentum": Uniform(0, 2)}


class Gullible(Memory):
    """Accepts NaN."""

    name = "gullible"

    def __init__(self, strength: float = 1.0, momentum: float = 0.5) -> None:
        self.strength, self.momentum = strength, momentum


# -- behaviour --------------------------------------------------------------------------------------------------------
class Diverges(Memory):
    """Has an infinite term."""

    name = "diverges"

    def distance(self, p, average):
        return (p - p).sum().log()


class ClassState(Memory):
    """Counts steps on the class."""

    name = "class-state"
    steps = 0

    def after_step(self, run):
        ClassState.steps += 1


COUNTS = {"steps": 0}


class ModuleState(Memory):
    """Counts steps in a variable of the module."""

    name = "module-state"

    def after_step(self, run):
        COUNTS["steps"] += 1


class Unseeded(Memory):
    """Draws from the operating system."""

    name = "unseeded"

    def distance(self, p, average):
        return super().distance(p, average) * (1 + os.urandom(1)[0] / 255)


class GlobalRandom(Memory):
    """Draws from torch's global generator."""

    name = "global-random"

    def distance(self, p, average):
        return super().distance(p, average) * torch.rand(())


class GlobalNumpy(Memory):
    """Draws from numpy's global generator, seeded so that it is deterministic."""

    name = "global-numpy"

    def prepare(self, run):
        super().prepare(run)
        np.random.seed(0)  # noqa: NPY002 - what is to be found

    def distance(self, p, average):
        return super().distance(p, average) * np.random.rand()  # noqa: NPY002


class RandomLayer(Memory):
    """Makes a layer with weights from the global generator."""

    name = "random-layer"

    def prepare(self, run):
        super().prepare(run)
        self.layer = run.register(self, "layer", nn.Linear(3, 3), optimize=True)


class StealsOrder(Memory):
    """Draws from the generator of the data order."""

    name = "steals-order"

    def after_step(self, run):
        if run.loader is not None:
            torch.rand((), generator=run.order_generator)


class MutatesBatch(Memory):
    """Writes into the batch that it is given."""

    name = "mutates-batch"

    def transform_batch(self, run, batch):
        batch.extras["domain"].zero_()
        return batch


class LeavesEval(Memory):
    """Leaves the model in evaluation mode."""

    name = "leaves-eval"

    def after_step(self, run):
        run.model.eval()


class LeavesHook(Memory):
    """Leaves a hook on the model."""

    name = "leaves-hook"

    def prepare(self, run):
        super().prepare(run)
        run.model.register_forward_hook(lambda module, inputs, output: None)


class NotNeutral(Memory):
    """Keeps some strength at strength 0."""

    name = "not-neutral"

    def distance(self, p, average):
        return super().distance(p, average) * (1 if self.strength else 0) + 0.01 * p.square().sum(1).mean()

    def penalty(self, run, batch, output):
        p = output.prediction.softmax(1)
        return (self.strength or 1.0) * self.distance(p, self.remember(batch.positions(self.name), p.detach()))


class CountsCalls(Memory):
    """Puts a layer into the model that counts its calls, in evaluation too."""

    name = "counts-calls"
    neutral = None  # type: ignore[assignment]

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    def prepare(self, run):
        super().prepare(run)
        run.model.head = nn.Sequential(self.Counter(), run.model.head)


class SetInState(Memory):
    """Keeps a set in its state."""

    name = "set-in-state"

    def state_dict(self):
        return {**super().state_dict(), "seen": {1, 2}}

    def load_state_dict(self, state):
        super().load_state_dict(state)


class KeepsLoaded(Memory):
    """Goes on with the very tensors that it was given to load."""

    name = "keeps-loaded"

    def load_state_dict(self, state):
        self.table.rows = state["table"]["rows"]


class Forgets(Memory):
    """Has a counter that is in no checkpoint."""

    name = "forgets"

    def prepare(self, run):
        super().prepare(run)
        self.visits = 0

    def distance(self, p, average):
        self.visits += 1
        return super().distance(p, average) * (1 + self.visits)


def _box(value: float | None = None, kept: list[float] = [0.0]) -> float:  # noqa: B006 - what is to be found
    if value is not None:
        kept[0] = value
    return kept[0]


class SharedCache(Memory):
    """Keeps something of the run where the next run finds it."""

    name = "shared-cache"

    def prepare(self, run):
        super().prepare(run)
        _box(run.seed / 10)

    def distance(self, p, average):
        return super().distance(p, average) * _box()


class ByPosition(Memory):
    """Takes the position in the batch for the position in the data."""

    name = "by-position"

    def remember(self, index, p):
        return super().remember(torch.arange(len(index)), p)


class Spread(Memory):
    """Needs two rows in a batch."""

    name = "spread"

    def distance(self, p, average):
        return p.std(0).sum()


class SinglePrecision(Memory):
    """Assumes float32."""

    name = "single-precision"

    def distance(self, p, average):
        return (p @ torch.eye(p.shape[1], dtype=torch.float32)).square().mean()


class HalfBlind(Memory):
    """Overflows where the run computes in half precision."""

    name = "half-blind"

    def penalty(self, run, batch, output):
        scale = float("inf") if run.mixed_precision == "bf16" else 1.0
        return super().penalty(run, batch, output) * scale


class SumsRows(Memory):
    """Sums over the batch."""

    name = "sums-rows"

    def distance(self, p, average):
        return (p - average).square().sum()


class TensorsOnly(Memory):
    """Assumes that inputs are a tensor."""

    name = "tensors-only"

    def transform_batch(self, run, batch):
        return replace(batch, inputs=1.0 * batch.inputs)


class NoDataCheck(Memory):
    """Fails obscurely without data."""

    name = "no-data-check"

    def prepare(self, run):
        self.table = run.register(self, "table", Table(run.num_examples, run.num_classes))


class NoIndexCheck(Memory):
    """Guesses the index."""

    name = "no-index-check"

    def penalty(self, run, batch, output):
        if batch.index is None:
            batch = replace(batch, index=torch.arange(len(batch)))
        return super().penalty(run, batch, output)


# -- distributed ------------------------------------------------------------------------------------------------------
class LocalTable(Memory):
    """Writes only the rows of its own process."""

    name = "local-table"

    def remember(self, index, p):
        average = self.momentum * self.table.rows[index] + (1 - self.momentum) * p
        self.table.rows[index] = average.to(self.table.rows.dtype)
        return average


class BatchMean(Memory):
    """Compares with the mean of the batch."""

    name = "batch-mean"

    def distance(self, p, average):
        return (p.mean(0) - 0.5).square().sum()


class FailsInOne(Memory):
    """Stops in the second process."""

    name = "fails-in-one"

    def after_step(self, run):
        if run.accelerator.process_index == 1:
            raise RuntimeError("the second process has had enough")


BROKEN: dict[type[Method], str] = {
    BadSlug: "name",
    InheritedName: "name",
    NoSummary: "summary",
    LongSummary: "summary",
    TextPaper: "paper",
    WrongSignature: "hooks",
    NearMiss: "hooks",
    Renames: "settings",
    Required: "settings",
    SpaceOfNothing: "space",
    WideSpace: "space",
    Gullible: "errors",
    Diverges: "trains",
    ClassState: "global-state",
    ModuleState: "global-state",
    Unseeded: "determinism",
    GlobalRandom: "random-state",
    GlobalNumpy: "random-state",
    RandomLayer: "random-state",
    StealsOrder: "data-order",
    MutatesBatch: "batch-unchanged",
    LeavesEval: "modes",
    LeavesHook: "modes",
    NotNeutral: "neutral",
    CountsCalls: "evaluation",
    SetInState: "state",
    KeepsLoaded: "state",
    Forgets: "resume",
    SharedCache: "interleaved",
    ByPosition: "permuted-rows",
    Spread: "last-batch",
    SinglePrecision: "float64",
    HalfBlind: "bf16",
    SumsRows: "accumulation",
    TensorsOnly: "dict-inputs",
    NoDataCheck: "missing-data",
    NoIndexCheck: "missing-index",
}
