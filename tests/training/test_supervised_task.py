"""``Task.make`` and ``SupervisedTask`` on a tiny in-memory problem."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar

import pytest
import torch
from small import blobs, mlp
from torch import Tensor, nn

import equipoise
from equipoise import Examples, Method, Run, Task
from equipoise.errors import ArgumentError
from equipoise.training import Choice, LogUniform, Problem, SupervisedTask
from equipoise.training.task import cosine

CONFIG: dict[str, Any] = {"lr": 0.1, "weight_decay": 1e-4}


class Plain(Method):
    name = "plain"


class Doubled(Method):
    """Predicts with two networks; ``finish`` may ship something else."""

    name = "doubled"

    def __init__(self, strength: float = 1.0, broken: bool = False) -> None:
        self.strength, self.broken = strength, broken

    def prepare(self, run: Run) -> None:
        twin = run.register(self, "twin", nn.Linear(6, 3), optimize=True)
        run.inference_model = Mean(run.model, twin)

    def penalty(self, run: Run, batch: Any, output: Any) -> Tensor:
        return self.strength * output.prediction.square().mean()


class Mean(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).mean(0)


class Ruin(Method):
    """Ships a constant model."""

    name = "ruin"

    def finish(self, run: Run) -> None:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.zero_()


@dataclass(frozen=True)
class Clouds(SupervisedTask):
    name: ClassVar[str] = "clouds"
    epochs: int = 3
    batch_size: int = 32
    size: int = 120
    share: float = 0.5
    kind: str = "a"
    note: str | None = None
    fast: bool = False
    tags: tuple[str, ...] = ()
    rate: float | str = 0.1

    def problem(self, seed: int) -> Problem:
        inputs, labels = blobs(self.size, seed=seed)
        cut = self.size // 3
        parts = [
            Examples(inputs[i * cut : (i + 1) * cut], labels[i * cut : (i + 1) * cut], num_classes=3) for i in range(3)
        ]
        return Problem(*parts, (6,), 3)

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        return mlp(seed=seed)


# -- settings ----------------------------------------------------------------------------------------------------------
def test_make_parses_strings() -> None:
    task = Clouds.make(
        epochs="7", **{"batch-size": "8"}, share="0.25", note="none", fast="Yes", tags="a, b", rate="none", kind="b"
    )
    assert task == Clouds(
        epochs=7, batch_size=8, share=0.25, note=None, fast=True, tags=("a", "b"), rate="none", kind="b"
    )
    assert Clouds.make(note="x", rate="0.3") == Clouds(note="x", rate=0.3)
    assert Clouds.make(epochs=2, tags=("c",)).settings() == {**Clouds().settings(), "epochs": 2, "tags": ("c",)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "many"}, "epochs = 'many': must be of type int"),
        ({"share": "x"}, "share = 'x': must be of type float"),
        ({"fast": "maybe"}, "fast = 'maybe': must be of type bool"),
        ({"epochs": "0"}, "epochs = 0: must be an integer >= 1"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"batch-size": "-1"}, "batch_size = -1"),
        ({"epoch": 3}, r"epoch = 3: clouds has no such setting. Did you mean 'epochs'\? Its settings are batch_size, "),
        ({"zzz": 3}, "zzz = 3: clouds has no such setting"),
    ],
)
def test_make_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Clouds.make(**settings)


def test_make_reads_annotations_that_are_no_strings() -> None:
    """A plugin's module need not postpone the evaluation of its annotations."""
    fields = [("count", int, 1), ("share", float | None, 0.5), ("tags", tuple[str, ...], ())]
    Plugin = make_dataclass("Plugin", fields, bases=(Task,), frozen=True)
    task = Plugin.make(count="3", share="none", tags="a,b")
    assert (task.count, task.share, task.tags) == (3, None, ("a", "b"))


def test_the_base_leaves_the_rest_open() -> None:
    task = Task()
    assert (task.space(), task.check(), task.sanity(0), task.resampled) == ({}, [], [], False)
    assert task.cost(Plain, {}, 0) is task.step_seconds(Plain, {}, 0) is task.matched_space(2.0) is None
    with pytest.raises(NotImplementedError):
        task.run(Plain, {}, 0)


# -- runs --------------------------------------------------------------------------------------------------------------
def test_a_run_is_fit_on_the_seeds_problem() -> None:
    task = Clouds()
    result = task.run(Plain, CONFIG, 5)
    problem = task.problem(5)
    run = equipoise.fit(
        mlp(seed=5),
        problem.train,
        epochs=3,
        batch_size=32,
        seed=5,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
        scheduler=cosine,
    )
    logits, labels = run.predict(problem.test)
    assert result.metrics["last"]["test_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert result.sizes == {"train": 40, "validation": 40, "test": 40}
    assert result.counted == "last" and result.trained
    assert [row["epoch"] for row in result.curve] == [0, 1, 2]
    assert set(result.curve[0]) >= {"train_loss", "validation_accuracy", "test_accuracy", "validation_nll", "test_ece"}
    again = task.run(Plain, CONFIG, 5)
    assert again == result and task.run(Plain, CONFIG, 6) != result
    assert result.score("test_nll") == result.metrics["last"]["test_nll"]


def test_early_stopping_counts_the_first_best_epoch_on_validation_data() -> None:
    task = Clouds(epochs=8)
    stopped, last = (task.run(Plain, {**CONFIG, "lr": 0.4, "early_stopping": flag}, 0) for flag in (True, False))
    assert (stopped.counted, last.counted) == ("best", "last")
    assert stopped.curve == last.curve and stopped.metrics == last.metrics
    scores = [row["validation_accuracy"] for row in stopped.curve]
    best = stopped.curve[scores.index(max(scores))]
    assert stopped.score("test_nll") == best["test_nll"]
    assert last.score("test_nll") == last.curve[-1]["test_nll"]


def test_lower_may_be_better() -> None:
    @dataclass(frozen=True)
    class Low(Clouds):
        metric: ClassVar[str] = "nll"
        higher_is_better: ClassVar[bool] = False

    result = Low(epochs=6).run(Plain, {**CONFIG, "early_stopping": True}, 0)
    assert result.score("validation_nll") == min(row["validation_nll"] for row in result.curve)


def test_more_compute_as_longer_training_or_as_an_ensemble() -> None:
    task = Clouds()
    single = task.run(Plain, CONFIG, 0)
    longer = task.run(Plain, {**CONFIG, "compute": "longer", "compute_ratio": 1.6}, 0)
    assert len(single.curve) == 3 and len(longer.curve) == 5
    ensemble = task.run(Plain, {**CONFIG, "compute": "ensemble", "compute_ratio": 1.6}, 0)
    assert ensemble.curve == []  # no member's curve is the ensemble's
    assert ensemble.metrics["last"] != single.metrics["last"]
    problem = task.problem(0)
    logits = []
    for seed in (0, 1_000_003):
        run = equipoise.fit(
            mlp(seed=seed),
            problem.train,
            epochs=3,
            batch_size=32,
            seed=seed,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
            scheduler=cosine,
        )
        logits.append(run.predict(problem.test)[0])
    wanted = nn.functional.cross_entropy((logits[0] + logits[1]).double() / 2, problem.test.targets).item()
    assert ensemble.metrics["last"]["test_nll"] == pytest.approx(wanted, rel=1e-6)
    assert task.matched_space(2.0)["compute"] == Choice(("longer", "ensemble"))


def test_cost_is_that_of_training_and_of_what_is_shipped() -> None:
    task = Clouds()
    single = task.cost(Plain, CONFIG, 0)
    per_row = 2 * (2 * (6 * 16 + 16 * 3) + 16 * 3)
    assert single.flops == 40 * 3 * per_row
    assert single == task.cost(Plain, CONFIG, 1)
    longer = task.cost(Plain, {**CONFIG, "compute": "longer", "compute_ratio": 2.0}, 0)
    ensemble = task.cost(Plain, {**CONFIG, "compute": "ensemble", "compute_ratio": 2.0}, 0)
    assert longer.flops == ensemble.flops == 2 * single.flops
    assert ensemble.inference_parameters == 2 * longer.inference_parameters == 2 * single.inference_parameters
    doubled = task.cost(Doubled, CONFIG, 0)
    assert doubled.inference_parameters == single.inference_parameters + 7 * 3  # both networks predict
    assert task.step_seconds(Plain, CONFIG, 0) > 0


def test_what_evaluation_sees_is_what_is_shipped() -> None:
    task = Clouds()
    ruined = task.run(Ruin, CONFIG, 0)
    assert ruined.metrics["last"]["test_nll"] == pytest.approx(1.0986, abs=1e-3)  # log 3: the constant model
    assert ruined.curve[-1]["test_nll"] != ruined.metrics["last"]["test_nll"]
    doubled = task.run(Doubled, CONFIG, 0)
    assert doubled.curve[-1]["test_nll"] == doubled.metrics["last"]["test_nll"]  # the two networks' mean, both times


def test_methods_take_their_settings_from_the_config() -> None:
    built = Clouds().build_method(Doubled, {**CONFIG, "doubled.strength": 0.5, "plain.strength": 3})
    assert isinstance(built, Doubled) and built.strength == 0.5
    assert Clouds().run(Doubled, {**CONFIG, "doubled.strength": 9.0}, 0) != Clouds().run(Doubled, CONFIG, 0)


def test_sanity_sees_leakage_and_runs_that_learned_nothing() -> None:
    @dataclass(frozen=True)
    class Leaky(Clouds):
        def problem(self, seed: int) -> Problem:
            clean = super().problem(seed)
            inputs = torch.cat([clean.train.inputs[:4], clean.test.inputs[4:]])
            return Problem(clean.train, clean.validation, Examples(inputs, clean.test.targets), (6,), 3)

    assert [passed for _, passed, _ in Clouds().sanity(0)] == [True]
    ((_, passed, text),) = Leaky().sanity(0)
    assert not passed and "4 distinct rows of the test set of seed 0" in text
    assert not Clouds(epochs=1).run(Plain, {"lr": 1e-9, "weight_decay": 0.0}, 2).trained
    assert isinstance(Clouds().space()["lr"], LogUniform)
