"""The kit passes correct methods, and names the broken rule of those that break one."""

from __future__ import annotations

import copy

import pytest
import torch
from kit_toys import BROKEN, BatchMean, Memory
from torch import nn

from equipoise import Method
from equipoise.errors import ArgumentError, check_range
from equipoise.testing import (
    METHOD_CHECKS,
    ConformanceError,
    Report,
    TinyProblem,
    check_method,
    classification,
    regression,
)

torch.set_num_threads(1)
DDP = {name for name in METHOD_CHECKS if name.startswith("ddp")}


class Dropout(Method):
    """Drop features at random, by a layer in front of the head."""

    name = "dropout"
    neutral = {"rate": 0.0}

    def __init__(self, rate: float = 0.3) -> None:
        check_range("rate", rate, 0, 1)
        self.rate = rate

    def prepare(self, run):
        owner = getattr(run.model, "network", run.model)
        owner.head = nn.Sequential(nn.Dropout(self.rate), owner.head)


class Jitter(Method):
    """Scale the loss by a random factor, one for a batch, from a generator of its own."""

    name = "jitter"
    neutral = {"width": 0.0}

    def __init__(self, width: float = 0.5) -> None:
        check_range("width", width, 0, 1)
        self.width = width

    def prepare(self, run):
        self.generator = run.new_generator(self)

    def loss(self, run, batch, output):
        factor = 1 + self.width * torch.rand((), generator=self.generator)
        return factor * run.task_loss(output.prediction, batch.targets)


class Shrink(Method):
    """Weight decay by hand, for any kind of target."""

    name = "shrink"
    neutral = {"rate": 0.0}

    def __init__(self, rate: float = 0.01) -> None:
        check_range("rate", rate, 0, 1)
        self.rate = rate

    @torch.no_grad()
    def after_step(self, run):
        for parameter in run.model.parameters():
            parameter.mul_(1 - self.rate)


def test_a_correct_method_passes_every_check():
    report = check_method(Memory, compile=True)
    assert set(report.passed) == set(METHOD_CHECKS) - DDP - {"conflict"}
    assert report.skipped["conflict"] == "the method claims no exclusive hook"
    assert report.skipped.keys() - {"conflict"} == DDP


def test_settings_are_those_that_are_checked():
    assert "settings" in check_method(Memory, settings={"strength": 2.0, "momentum": 0.9}, only=["settings"]).passed
    with pytest.raises(ConformanceError, match="'trains'"):
        check_method(Memory, settings={"strength": 1e38}, only=["trains"])


@pytest.mark.parametrize(("method", "check"), BROKEN.items(), ids=lambda v: v if isinstance(v, str) else v.__name__)
@pytest.mark.filterwarnings("ignore:std")
def test_a_broken_method_fails_the_check_of_what_it_breaks(method, check):
    with pytest.raises(ConformanceError) as caught:
        check_method(method)
    assert caught.value.check == check
    assert caught.value.seen and caught.value.remedy
    assert str(caught.value).startswith(f"{method.name} fails the check '{check}': ")


def test_random_layers_in_the_model_are_no_misuse_of_the_global_generator():
    report = check_method(Dropout)
    assert "random-state" in report.passed
    assert "random" in report.skipped["permuted-rows"]


def test_a_method_with_a_generator_of_its_own_passes():
    report = check_method(Jitter)
    assert {"determinism", "resume", "interleaved", "permuted-rows", "neutral", "conflict"} <= set(report.passed)
    assert "random" in report.skipped["accumulation"]


def test_regression_problem():
    assert "neutral" in check_method(Shrink, problem=regression(outputs=2)).passed


def test_a_problem_of_ones_own():
    base = classification(count=23, classes=4)
    layer = nn.Linear(6, 4)
    problem = TinyProblem(base.examples, base.validation, lambda: copy.deepcopy(layer), epochs=4)
    assert "resume" in check_method(Memory, problem=problem).passed
    with pytest.raises(ArgumentError, match="other initial weights at every call"):
        check_method(Memory, problem=TinyProblem(base.examples, base.validation, lambda: nn.Linear(6, 4)))


def test_declared_skips_stand_in_the_report():
    reason = "the loss looks at the mean of the batch"
    report = check_method(BatchMean, skip={"accumulation": reason})
    assert report.skipped["accumulation"] == reason
    assert reason in str(report)
    with pytest.raises(ConformanceError, match="'accumulation'"):
        check_method(BatchMean)


def test_only_some_checks():
    assert check_method(Memory, only=["name", "paper"]).passed == ["name", "paper"]
    with pytest.raises(ConformanceError) as caught:
        check_method(BROKEN_BY["resume"], only=["resume"])
    assert caught.value.check == "resume"


BROKEN_BY = {check: method for method, check in BROKEN.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": {"resum": "why"}}, "Did you mean 'resume'"),
        ({"skip": {"resume": " "}}, "must be the reason"),
        ({"only": ["everything"]}, "there is no such check"),
    ],
)
def test_names_of_checks_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        check_method(Memory, **arguments)


def test_only_classes_of_methods_are_checked():
    for wrong in (Memory(), nn.Linear, None):
        with pytest.raises(ArgumentError, match="must be a subclass of"):
            check_method(wrong)  # type: ignore[arg-type]


def test_every_check_is_described():
    assert all(len(text) > 20 and text.endswith(".") for text in METHOD_CHECKS.values())


def test_the_kit_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    check_method(Memory)
    assert torch.equal(before, torch.get_rng_state())


def test_report_prints():
    text = str(Report("toy", ["name", "resume"], {"conflict": "no hook", "compile": "not asked for"}, 1.23))
    assert text.splitlines() == [
        "toy: 2 checks passed, 2 skipped, 1.2 s",
        "  passed: name, resume",
        "  skipped: conflict (no hook)",
        "  skipped: compile (not asked for)",
    ]
