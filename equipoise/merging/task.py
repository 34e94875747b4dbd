"""The merging task: models fine-tuned from one base on different tasks become one that is to do them all.

A trunk with a head is trained on images; then, for each task, a new head on the fixed trunk, and the trunk with that head fixed.
The methods merge the trunks; each task keeps its head. A task is a view of the images (turned, negated, asked for parity) or
another data set of images. Base and fine-tuned models are made once for each seed, and their cost is in no arm's: all arms merge
the same models, and are tuned on the same validation data.

For models of your own use `equipoise merge`, which merges folders; what is best on your validation data only you can measure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import Splits, available, load, split
from equipoise.errors import ArgumentError, check_integer, check_range, refuse, suggestion
from equipoise.training import Examples, Method, RunResult, TradeOff, start
from equipoise.training.metrics import accuracy
from equipoise.training.task import Config, Task

View = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels to those of a task
VIEWS: dict[str, View] = {
    "upright": lambda images, labels: (images, labels),
    "rotate": lambda images, labels: (images.rot90(1, (-2, -1)), labels),
    "invert": lambda images, labels: (-images, labels),
    "parity": lambda images, labels: (images, labels % 2),
}


@dataclass(frozen=True)
class Merge(Task):
    """Merge models fine-tuned on different tasks into one; each task counts relative to its own model's accuracy.

    dataset: name of an embedded data set of images (``equipoise.data.available()``), on which the base is trained.
    tasks: at least 2 of "upright", "rotate" (by 90 degrees), "invert" (negated), "parity" (of the class), and names of further
        embedded data sets of images, which are resized.
    hidden: width of the trunk's two layers.
    pretrain_examples, pretrain_steps: of the base, with AdamW at 1e-3; by default half of the training rows.
    train_examples: of each task, of the rows that the base has not seen; by default all of them. Tasks are views of the same rows.
    head_steps, head_lr, steps, lr: of each task's head on the fixed trunk, and of its trunk then, with AdamW.
    batch_size: of all these trainings.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    """

    name: ClassVar[str] = "merge"
    metric: ClassVar[str] = "normalised_accuracy"
    baseline: ClassVar[str] = "weight-averaging"
    methods: ClassVar[tuple[str, ...]] = ("task-arithmetic", "ties", "dare", "greedy-soup", "pcb-merging")
    trade_off: ClassVar[TradeOff | None] = TradeOff("worst_accuracy", "accuracy", x_higher=True)

    dataset: str = "digits"
    tasks: tuple[str, ...] = ("upright", "rotate", "invert", "parity")
    hidden: int = 64
    pretrain_examples: int | None = None
    pretrain_steps: int = 300
    train_examples: int | None = None
    head_steps: int = 150
    head_lr: float = 2e-3
    steps: int = 300
    lr: float = 3e-4
    batch_size: int = 64
    validation: float = 0.2
    test: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            refuse("tasks", self.tasks, "name at least 2 different tasks")
        known = [*VIEWS, *available()]
        for task in self.tasks:
            if task not in known:
                refuse("tasks", task, f"be one of {', '.join(known)}", suggestion(task, known))
        for name in ("hidden", "pretrain_steps", "head_steps", "steps", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("pretrain_examples", "train_examples"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1)
        for name in ("head_lr", "lr"):
            check_range(name, getattr(self, name), 0, open_low=True)
        for name in ("validation", "test"):
            check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=True)

    @property
    def resampled(self) -> bool:
        return load(self.dataset).test is None

    def check(self) -> list[str]:
        for name in (self.dataset, *(task for task in self.tasks if task not in VIEWS)):
            raw = load(name)
            if raw.kind != "image" or raw.class_names is None:
                raise ArgumentError(f"data {name!r}: must be images with classes, which the tasks are views of")
        divided(self, 0)
        return [
            f"The base and the {len(self.tasks)} models fine-tuned from it are made once for each seed; that is in no arm's cost."
        ]

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        parts, _, _ = divided(self, seed)
        shared = len((_images(parts.train) | _images(parts.validation)) & _images(parts.test))
        text = f"{shared} distinct images of the test set of seed {seed} also occur in its training or validation data"
        return [("no leakage between splits", shared == 0, text)]

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        made = prepared(self, seed)
        merged = self.merged(made, method, config, seed)
        metrics = {
            f"{part}_{name}": value
            for part in ("validation", "test")
            for name, value in self.score(made, merged, part).items()
        }
        chance = sum(1 / classes for classes in made.classes) / len(made.classes)
        return RunResult(
            {"last": metrics, "best": metrics}, sizes=made.sizes, trained=metrics["validation_accuracy"] > chance
        )

    def merged(self, made: Prepared, method: type[Method], config: Config, seed: int) -> nn.Module:
        """The trunk that a method makes of the fine-tuned ones."""
        sgd = partial(torch.optim.SGD, lr=1.0)  # no step is taken
        run = start(copy.deepcopy(made.trunk), sgd, methods=[self.build_method(method, config)], seed=seed)
        run.merge_sources = made.sources  # type: ignore[attr-defined]
        run.merge_score = lambda trunk: self.score(made, trunk, "validation")[self.metric]  # type: ignore[attr-defined]
        return run.finish()

    def score(self, made: Prepared, trunk: nn.Module, part: str) -> dict[str, float]:
        """Accuracies of a trunk with the tasks' heads: mean, worst, and the mean of those divided by the single models'."""
        single = made.single[part]
        found = made.accuracies(trunk, part)
        return {
            "normalised_accuracy": sum(a / max(b, 1e-9) for a, b in zip(found, single, strict=True)) / len(found),
            "accuracy": sum(found) / len(found),
            "worst_accuracy": min(found),
            "single_accuracy": sum(single) / len(single),
        }


# -- the models of a seed ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prepared:
    """The base trunk, the fine-tuned ones and their heads, and the data of every task. Nothing may write to it."""

    trunk: nn.Module
    sources: list[dict[str, Tensor]]
    heads: Sequence[nn.Module]
    data: Mapping[str, list[Examples]]
    single: dict[str, list[float]]
    classes: list[int]
    sizes: dict[str, int]

    def accuracies(self, trunk: nn.Module, part: str) -> list[float]:
        """The accuracy on each task of the trunk with the task's head."""
        pairs = zip(self.heads, self.data[part], strict=True)
        return [_accuracy(trunk, head, examples) for head, examples in pairs]


@lru_cache(maxsize=2)
def divided(task: Merge, seed: int) -> tuple[Splits, Examples, Examples]:
    """The split of a seed; its training rows for the base, and those for the tasks."""
    parts = split(load(task.dataset), seed, validation=task.validation, test=task.test, standardise=True)
    count = task.pretrain_examples or len(parts.train) // 2
    if count >= len(parts.train):
        refuse("pretrain_examples", count, f"leave rows to fine-tune on, of {len(parts.train)}")
    rows = torch.arange(len(parts.train))
    left = rows[count:]
    if (wanted := task.train_examples) is not None and wanted > len(left):
        refuse("train_examples", wanted, f"be at most {len(left)}, which are left after pre-training")
    return parts, parts.train.subset(rows[:count]), parts.train.subset(left[:wanted])


@lru_cache(maxsize=10)
def prepared(task: Merge, seed: int) -> Prepared:
    """The models of a seed, made once for all arms."""
    parts, pretrain, train = divided(task, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = _trunk(parts.input_shape, task.hidden)
        head = nn.Linear(task.hidden, parts.num_outputs)
        fit = partial(_fit, batch_size=task.batch_size, generator=draw)
        whole = nn.Sequential(trunk, head)
        fit(whole, whole.parameters(), pretrain, task.pretrain_steps, 1e-3)
        sources, heads, single = [], [], {"validation": [], "test": []}  # type: ignore[var-annotated]
        data: dict[str, list[Examples]] = {"validation": [], "test": []}
        classes = []
        for name in task.tasks:
            theirs = (
                [_view(VIEWS[name], e) for e in (train, parts.validation, parts.test)]
                if name in VIEWS
                else _other(name, task, seed, parts)
            )
            classes.append(int(max(e.targets.max() for e in theirs)) + 1)
            tuned, head = copy.deepcopy(trunk), nn.Linear(task.hidden, classes[-1])
            fit(nn.Sequential(tuned, head), head.parameters(), theirs[0], task.head_steps, task.head_lr)
            fit(nn.Sequential(tuned, head), tuned.parameters(), theirs[0], task.steps, task.lr)
            sources.append({key: value.detach() for key, value in tuned.state_dict().items()})
            heads.append(head)
            for part, examples in zip(("validation", "test"), theirs[1:], strict=True):
                data[part].append(examples)
                single[part].append(_accuracy(tuned, head, examples))
    sizes = {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)}
    return Prepared(trunk, sources, heads, data, single, classes, sizes)


def _trunk(shape: Sequence[int], hidden: int) -> nn.Module:
    size = torch.Size(shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())


def _fit(
    model: nn.Module,
    parameters: object,
    examples: Examples,
    steps: int,
    lr: float,
    *,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Train some parameters of a model for exactly ``steps`` steps of AdamW, at a constant rate."""
    chosen = list(parameters)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(chosen, lr=lr)
    inputs: Tensor = examples.inputs  # type: ignore[assignment]  # images
    for _ in range(steps):
        rows = torch.randint(len(examples), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(inputs[rows]), examples.targets[rows])
        for parameter, gradient in zip(chosen, torch.autograd.grad(loss, chosen), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in chosen:
        parameter.grad = None


def _view(view: View, examples: Examples) -> Examples:
    images, labels = view(examples.inputs, examples.targets)  # type: ignore[arg-type]
    return Examples(images, labels)


def _other(name: str, task: Merge, seed: int, parts: Splits) -> list[Examples]:
    """Training, validation and test set of another data set, its images brought to the base's size."""
    theirs = split(load(name), seed, validation=1 / 6, test=1 / 3, standardise=True)
    train = theirs.train
    if task.train_examples is not None and len(train) > task.train_examples:
        train = train.subset(torch.arange(task.train_examples))
    channels, *size = parts.input_shape
    return [
        Examples(_resized(examples.inputs, channels, size), examples.targets)  # type: ignore[arg-type]
        for examples in (train, theirs.validation, theirs.test)
    ]


def _resized(images: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    images = F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)
    return images if images.shape[1] == channels else images.mean(1, keepdim=True).expand(-1, channels, -1, -1)


@torch.no_grad()
def _accuracy(trunk: nn.Module, head: nn.Module, examples: Examples) -> float:
    return accuracy(head(trunk(examples.inputs)), examples.targets)


def _images(examples: Examples) -> set[bytes]:
    return {row.tobytes() for row in examples.inputs.flatten(1).contiguous().numpy()}  # type: ignore[union-attr]
