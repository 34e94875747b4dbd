"""``Task``: one concrete problem on which methods compete; ``SupervisedTask``: the kind that trains with ``fit``.

A task is a frozen dataclass; its fields are its settings. ``compare`` needs no more than ``Task``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_integer, refuse
from equipoise.training.batch import Examples, Loader, Output, map_inputs
from equipoise.training.cost import Cost, measure
from equipoise.training.fit import fit
from equipoise.training.method import Method
from equipoise.training.metrics import classification_metrics
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space

Config = Mapping[str, Any]


@dataclass
class RunResult:
    """What one run gives back.

    metrics: for ``"last"`` and ``"best"`` epoch, a dict with ``validation_<metric>`` and ``test_<metric>`` entries.
    counted: which of the two counts.
    curve: one dict an epoch. sizes: numbers of training, validation and test examples. trained: whether it learned anything.
    """

    metrics: dict[str, dict[str, float]]
    counted: str = "last"
    curve: list[dict[str, float]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    trained: bool = True

    def score(self, name: str) -> float:
        """A metric at the epoch that counts."""
        return self.metrics[self.counted][name]


@dataclass(frozen=True)
class TradeOff:
    """Two metrics that pull against each other, by their names without the split; ``*_higher``: whether higher is better."""

    x: str
    y: str
    x_higher: bool = False
    y_higher: bool = True


@dataclass(frozen=True)
class Task:
    """Base of every task. A subclass is a frozen dataclass whose fields are its settings.

    Class attributes: ``name`` (slug), ``metric`` (its runs give ``validation_<metric>`` and ``test_<metric>``),
    ``higher_is_better``, ``percent`` (show the metric in points of 100), ``baseline`` (slug), ``methods`` (slugs that enter
    by default), ``resampled`` (whether seeds split one finite data set anew, so that runs overlap).
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    baseline: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()
    trade_off: ClassVar[TradeOff | None] = None

    # -- what a task must say -----------------------------------------------------------------------------------------
    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        """Train and evaluate ``method`` once. ``seed`` fixes split, corruption, initialisation and batch order."""
        raise NotImplementedError

    def space(self) -> Space:
        """What is tuned for every arm, beside the method's own space."""
        return {}

    # -- what it may say ----------------------------------------------------------------------------------------------
    @property
    def resampled(self) -> bool:
        """Whether seeds split one finite data set anew, so that the test sets of different seeds overlap."""
        return False

    def check(self) -> list[str]:
        """Refuse bad settings or data before any run; return remarks that belong in the report."""
        return []

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        """Checks of the problem itself: (name, passed, what was seen)."""
        return []

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost | None:
        """Measure one training of ``method``; None where that has no meaning."""
        return None

    def step_seconds(self, method: type[Method], config: Config, seed: int) -> float | None:
        """Seconds of a short training, for the interleaved comparison of step times; None to leave it out."""
        return None

    def matched_space(self, ratio: float) -> Space | None:
        """What a baseline given ``ratio`` times the compute may choose from; None where it cannot use more compute."""
        return None

    def entrants(self) -> tuple[str, ...]:
        """The methods that enter by default: ``methods``, less those whose optional package is missing."""
        return self.methods

    def fingerprint(self) -> dict[str, Any]:
        """The settings, and whatever else changes results when it changes (the content of the user's files)."""
        return self.settings()

    def settings(self) -> dict[str, Any]:
        """The settings and their values."""
        return asdict(self)

    @classmethod
    def make(cls, **settings: Any) -> Task:
        """Build the task from settings that may be strings (from a command line). Unknown names get a suggestion."""
        known = {f.name: f for f in fields(cls)}
        values = {}
        for given, value in settings.items():
            key = given.replace("-", "_")
            if key not in known:
                from equipoise.errors import suggestion

                raise ArgumentError(
                    f"{given} = {value!r}: {cls.name} has no such setting. {suggestion(key, list(known))} "
                    f"Its settings are {', '.join(sorted(known))}"
                )
            annotation = known[key].type  # a string under "from __future__ import annotations"
            values[key] = _parse(given, value, annotation.__name__ if isinstance(annotation, type) else str(annotation))
        return cls(**values)

    def build_method(self, method: type[Method], config: Config) -> Method:
        """The method with the settings that ``config`` holds for it, under keys ``<slug>.<argument>``."""
        prefix = f"{method.name}."
        return method(**{key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)})


def _parse(name: str, value: Any, annotation: str) -> Any:
    """Turn a string into what a field's annotation says: int, float, bool, tuple of str, or str; ``none`` where allowed."""
    if not isinstance(value, str):
        return value
    if "None" in annotation and value.lower() in ("none", ""):
        return None
    kinds = [kind.strip() for kind in annotation.split("|")]
    try:
        if "bool" in kinds:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        if "int" in kinds:
            return int(value)
        if "float" in kinds:
            return float(value)
    except (KeyError, ValueError):
        if "str" in kinds:
            return value
        refuse(name, value, f"be of type {annotation}")
    return tuple(part.strip() for part in value.split(",")) if annotation.startswith("tuple") else value


@dataclass(frozen=True)
class Problem:
    """The data of one seed. ``extra`` holds what a task's own metrics need (the clean labels, groups, ...).

    pool: training rows that the split set apart, where ``train`` is thinned out of them. How much the runs of several seeds
    overlap, by which intervals are widened, depends on the shares of the split, and not on what a tail leaves of them.
    """

    train: Examples
    validation: Examples
    test: Examples
    input_shape: tuple[int, ...]
    num_outputs: int
    extra: dict[str, Any] = field(default_factory=dict)
    pool: int | None = None


@dataclass(frozen=True)
class SupervisedTask(Task):
    """A task that trains a model with ``fit``: SGD with momentum 0.9 and a cosine schedule.

    A subclass gives ``problem(seed)``, and ``measure`` where its metrics are not those of classification.
    """

    model: str = "mlp"
    epochs: int = 50
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 1)

    def check(self) -> list[str]:
        """Build the first problem and its model, and refuse a model whose output does not fit the targets."""
        problem = cached_problem(self, 0)
        model = self.build_model(problem, 0).eval()
        rows = min(2, len(problem.train))
        with torch.no_grad():
            inputs = map_inputs(lambda t: t[:rows], problem.train.inputs)
            prediction = Output.of(model(**inputs) if isinstance(inputs, dict) else model(inputs)).prediction
        wanted = (rows, problem.num_outputs)
        if tuple(prediction.shape) not in (wanted, wanted[: problem.train.targets.ndim]):
            raise ArgumentError(
                f"model = {self.model!r}: its output has shape {tuple(prediction.shape)} for {rows} examples: must be {wanted}. "
                "Change the model's last layer"
            )
        return []

    def fingerprint(self) -> dict[str, Any]:
        from equipoise.models import source_digest

        source = source_digest(self.model) if ":" in self.model else ""
        return {**super().fingerprint(), **({"model_source": source} if source else {})}

    def problem(self, seed: int) -> Problem:
        """Split, corrupt and preprocess the data of one seed."""
        raise NotImplementedError

    def space(self) -> Space:
        """Learning rate, weight decay, and whether the epoch that is best on validation data counts, or the last."""
        return {
            "lr": LogUniform(0.005, 0.5),
            "weight_decay": LogUniform(1e-6, 1e-2),
            "early_stopping": Choice((False, True)),
        }

    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Metrics from the predictions and targets of "train", "validation" and "test"."""
        return {
            f"{split}_{name}": value
            for split in ("validation", "test")
            for name, value in classification_metrics(*predictions[split]).items()
        }

    def examine(self, problem: Problem, run: Run) -> dict[str, float]:
        """Metrics of the finished model that need more than its predictions; they join those of the last epoch."""
        return {}

    def loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The task's loss; None is cross-entropy."""
        return None

    def fit_options(self, problem: Problem, config: Config) -> dict[str, Any]:
        """Keyword arguments of ``fit`` that this task sets otherwise: optimizer, augment, sampler, batch_size, ..."""
        return {}

    def predict(self, run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
        """What ``measure`` receives for a split: predictions and targets."""
        return run.predict(loader)

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        """The model with the initial weights of ``seed``."""
        from equipoise.models import build

        return build(self.model, problem.input_shape, problem.num_outputs, seed)

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        problem = cached_problem(self, seed)
        ratio = float(config.get("compute_ratio", 1.0))
        members = math.ceil(ratio) if config.get("compute") == "ensemble" else 1
        epochs = math.ceil(self.epochs * ratio) if config.get("compute") == "longer" else self.epochs
        trials = [self._train(problem, method, config, seed, member, epochs) for member in range(members)]
        counted = "best" if config.get("early_stopping") else "last"
        metrics = trials[0][0]
        if members > 1:
            # An ensemble averages the members' logits, each at its own last or best epoch.
            metrics = {
                which: self.measure(problem, _average([trial[1][which] for trial in trials])) for which in metrics
            }
        return RunResult(
            metrics,
            counted,
            trials[0][2] if members == 1 else [],
            {
                "train": problem.pool or len(problem.train),
                "validation": len(problem.validation),
                "test": len(problem.test),
            },
            trained=self.learned(problem, metrics["best"]),
        )

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run learned anything: balanced accuracy on validation data two standard errors above chance."""
        chance = 1 / problem.num_outputs
        margin = 2 * math.sqrt(chance * (1 - chance) / len(problem.validation))
        return metrics.get("validation_balanced_accuracy", 1.0) > chance + margin

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost:
        problem = cached_problem(self, seed)
        ratio = float(config.get("compute_ratio", 1.0))
        epochs = math.ceil(self.epochs * ratio) if config.get("compute") == "longer" else self.epochs
        cost = measure(lambda: self._fit(problem, method, config, seed, 0, epochs, lambda run: {}).inference_model)
        if config.get("compute") == "ensemble":
            members = math.ceil(ratio)
            cost = replace(cost, flops=cost.flops * members, inference_parameters=cost.inference_parameters * members)
        return cost

    def step_seconds(self, method: type[Method], config: Config, seed: int) -> float:
        problem = cached_problem(self, seed)
        start = time.perf_counter()
        self._fit(problem, method, config, seed, 0, min(self.epochs, 4), lambda run: {})
        members = math.ceil(config.get("compute_ratio", 1.0)) if config.get("compute") == "ensemble" else 1
        return (time.perf_counter() - start) * members

    def matched_space(self, ratio: float) -> Space:
        return {"compute": Choice(("longer", "ensemble"))}

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        problem = cached_problem(self, seed)
        seen = _rows(problem.train) | _rows(problem.validation)
        shared = len(seen & _rows(problem.test))
        text = f"{shared} distinct rows of the test set of seed {seed} also occur in its training or validation data"
        return [("no leakage between splits", shared == 0, text)]

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
        initial = seed if member == 0 else seed + 1_000_003 * member
        options: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": self.batch_size,
            "scheduler": cosine,
            "methods": [self.build_method(method, config)],
            "loss": self.loss(),
            "validation": problem.validation,
            "seed": initial,
            "num_classes": problem.train.num_classes,
            "on_epoch_end": on_epoch_end,
            **self.fit_options(problem, config),
        }
        if "optimizer" not in options:
            rates = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
            options["optimizer"] = partial(torch.optim.SGD, momentum=0.9, **rates)
        return fit(self.build_model(problem, initial), problem.train, **options)

    def _train(
        self, problem: Problem, method: type[Method], config: Config, seed: int, member: int, epochs: int
    ) -> tuple[dict[str, dict[str, float]], dict[str, Any], list[dict[str, float]]]:
        """Metrics and predictions at the last and the validation-best epoch, and the curve."""
        loaders = {
            "train": Loader(problem.train, 4096),
            "validation": Loader(problem.validation, 4096),
            "test": Loader(problem.test, 4096),
        }
        key = f"validation_{self.metric}"
        sign = 1 if self.higher_is_better else -1
        metrics: dict[str, dict[str, float]] = {}
        kept: dict[str, Any] = {}

        def look(run: Run) -> dict[str, float]:
            predictions = {name: self.predict(run, loader) for name, loader in loaders.items()}
            seen = self.measure(problem, predictions)
            if "best" not in metrics or sign * seen[key] > sign * metrics["best"][key]:
                metrics["best"], kept["best"] = seen, predictions
            metrics["last"], kept["last"] = seen, predictions
            return seen

        run = self._fit(problem, method, config, seed, member, epochs, look)
        # What a method does in ``finish`` belongs to the model that a user would ship, and may be the best there is.
        look(run)
        metrics["last"] = metrics["last"] | self.examine(problem, run)
        return (
            metrics,
            kept,
            [{k: v for k, v in record.items() if isinstance(v, int | float)} for record in run.history],
        )


def cosine(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The cosine schedule from the given learning rate to zero."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)


@lru_cache(maxsize=4)
def cached_problem(task: SupervisedTask, seed: int) -> Problem:
    """The problem of a seed, kept for the arms that meet it next. Nothing may write to it."""
    return task.problem(seed)


def _average(predictions: list[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        split: (torch.stack([p[split][0] for p in predictions]).mean(0), targets)
        for split, (_, targets) in predictions[0].items()
    }


def _rows(examples: Examples) -> set[bytes]:
    inputs = examples.inputs
    if isinstance(inputs, dict):
        inputs = torch.cat([tensor.flatten(1).double() for tensor in inputs.values()], 1)
    flat = inputs.flatten(1).contiguous().numpy()
    return {row.tobytes() for row in flat}
