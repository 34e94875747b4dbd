"""The long-tailed fine-tuning task: its pre-trainings, what each arm is given, the user's own backbones, bad input."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from equipoise import catalogue
from equipoise.comparison import compare
from equipoise.data import load, split
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance.backdoor_adjustment import (
    BackdoorAdjustment,
    BackdoorAdjustmentMethod,
    SamePretrainingEnsemble,
)
from equipoise.imbalance.task_long_tail_finetuning import LongTailFinetuning
from equipoise.training import fit

torch.set_num_threads(1)
DIGITS: dict[str, Any] = {"dataset": "digits", "model": "mlp"}
QUICK: dict[str, Any] = {**DIGITS, "pretrain_epochs": 1, "epochs": 1}
RATES = {"lr": 0.05, "weight_decay": 1e-4, "early_stopping": False}


@pytest.fixture(scope="module")
def task() -> LongTailFinetuning:
    return LongTailFinetuning(**QUICK)


def method(slug: str) -> Any:
    return catalogue.find("method", slug).load()


# -- the problem of a seed --------------------------------------------------------------------------------------------
def test_fine_tuning_is_a_tail_in_an_order_of_its_own(task: LongTailFinetuning) -> None:
    problem = task.problem(0)
    order, counts = problem.extra["order"], torch.bincount(problem.train.targets)
    sizes = counts[order].tolist()
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 53 and sizes[-1] == 2
    held = torch.bincount(problem.validation.targets)[order]
    assert int(held.min()) == 20 and int(held[0]) > 30
    assert len(problem.test) == 359 and problem.extra["training_rows"] == 1797 - 2 * 359
    orders = [order, *problem.extra["orders"]]
    assert len(orders) == 4 and len({tuple(o.tolist()) for o in orders}) == 4
    assert all(sorted(o.tolist()) == list(range(10)) for o in orders)
    assert all(passed for _, passed, _ in task.sanity(0))


def test_inputs_are_the_features_of_every_backbone(task: LongTailFinetuning) -> None:
    problem = task.problem(0)
    inputs: Any = problem.test.inputs
    assert list(inputs) == [f"backbone_{number}" for number in range(5)]
    images = split(load("digits"), 0).test.inputs
    known = [*problem.extra["backbones"], *problem.extra["replicas"][1:]]
    for number, backbone in enumerate(known):
        torch.testing.assert_close(backbone.model.backbone(images), inputs[f"backbone_{number}"])
        assert torch.equal(backbone(**inputs), inputs[f"backbone_{number}"])
        assert not any(p.requires_grad for p in backbone.parameters())
    assert problem.extra["replicas"][0] is known[0] and len(problem.extra["replicas"]) == 3
    features = list(inputs.values())
    assert not any(torch.equal(features[i], features[j]) for i in range(5) for j in range(i))


def test_replicas_see_the_same_rows_and_other_pretrainings_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def pretrain(self: LongTailFinetuning, examples: Any, parts: Any, initial: int) -> nn.Module:
        seen.append((examples, initial))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 10))

    monkeypatch.setattr(LongTailFinetuning, "_pretrain", pretrain)
    problem = replace_seed(LongTailFinetuning(**DIGITS, pretrainings=3, pretrain_examples=400))
    rows = [{row.numpy().tobytes() for row in examples.inputs} for examples, _ in seen]
    assert rows[0] == rows[3] == rows[4] and len({len(r) for r in rows[:3]}) <= 3
    assert rows[0] != rows[1] != rows[2] and len({initial for _, initial in seen}) == 5
    for (examples, _), order in zip(seen, problem.extra["orders"], strict=False):
        sizes = torch.bincount(examples.targets)[order].tolist()
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == 40 and sizes[-1] == 1
    parts = split(load("digits"), 7)
    inputs: Any = parts.train.inputs
    pool = {row.numpy().tobytes() for row in inputs[:400]}
    assert all(r <= pool for r in rows)
    assert len(problem.train) < len(parts.train) - 400


def replace_seed(task: LongTailFinetuning) -> Any:
    """The problem of a seed that no other test has asked for, made anew."""
    return task._make(7)


def test_the_same_seed_gives_the_same_problem() -> None:
    one, two = (LongTailFinetuning(**QUICK)._make(3) for _ in range(2))
    for part in ("train", "validation", "test"):
        mine, theirs = getattr(one, part), getattr(two, part)
        assert torch.equal(mine.targets, theirs.targets)
        assert all(torch.equal(mine.inputs[key], theirs.inputs[key]) for key in mine.inputs)


# -- what each arm is given -------------------------------------------------------------------------------------------
def test_plain_methods_have_the_first_backbone(task: LongTailFinetuning) -> None:
    problem = task.problem(0)
    model = task.build_model(problem, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 256 * 16 + 16 + 16 * 256 + 256 + 10 * 256
    assert sum(p.numel() for p in model.parameters()) == trained + 64 * 256 + 256 + 256 * 256 + 256
    inputs: Any = problem.test.inputs
    assert torch.equal(model(**inputs), model(**{**inputs, "backbone_1": inputs["backbone_1"] * 0}))
    state = [p.clone() for p in model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(task.build_model(problem, 0).parameters(), state, strict=True))


@pytest.mark.parametrize(
    ("slug", "keys"),
    [
        ("backdoor-adjustment", ["backbone_0", "backbone_1", "backbone_2"]),
        ("cross-entropy-ensemble", ["backbone_0", "backbone_1", "backbone_2"]),
        ("same-pretraining-ensemble", ["backbone_0", "backbone_3", "backbone_4"]),
    ],
)
def test_ensembles_have_theirs(task: LongTailFinetuning, slug: str, keys: list[str]) -> None:
    problem = task.problem(0)
    options = {"epochs": 1, "methods": [task.build_method(method(slug), {})]}
    model: Any = fit(task.build_model(problem, 0), problem.train, **options).model
    assert isinstance(model, BackdoorAdjustment) and [m.backbone.model.key for m in model.models] == keys
    single: Any = task.build_model(problem, 0)
    again: Any = task.build_method(method(slug), {})
    run = fit(single, problem.train, epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), methods=[again])
    first: Any = run.model.models[0]  # type: ignore[index,union-attr]
    for p, q in zip(first.parameters(), task.build_model(problem, 0).parameters(), strict=True):
        assert torch.equal(p, q)  # every arm starts from the same weights


def test_methods_get_the_tasks_adapter_and_number_of_members() -> None:
    task = LongTailFinetuning(adapter=7, pretrainings=4)
    assert task.build_method(BackdoorAdjustmentMethod, {}).settings()["adapter"] == 7
    made = task.build_method(SamePretrainingEnsemble, {"same-pretraining-ensemble.adapter": 0})
    assert made.settings()["adapter"] == 0 and made.settings()["members"] == 4
    assert (
        LongTailFinetuning(backbones=("a:b", "c:d")).build_method(SamePretrainingEnsemble, {}).settings()["members"]
        == 2
    )


def test_metrics_by_frequency_one_class_at_a_time(task: LongTailFinetuning) -> None:
    problem = task.problem(0)
    logits = torch.randn(len(problem.test), 10, generator=torch.Generator().manual_seed(0))
    pair = (logits, problem.test.targets)
    found = task.measure(problem, {"validation": pair, "test": pair})
    counts = torch.bincount(problem.train.targets).tolist()
    ranked = sorted(range(10), key=lambda c: -counts[c])
    hits = (logits.argmax(1) == problem.test.targets).tolist()
    recall = []
    for c in range(10):
        mine = [hit for hit, label in zip(hits, problem.test.targets.tolist(), strict=True) if label == c]
        recall.append(sum(mine) / len(mine))
    for name, classes in (("head", ranked[:3]), ("tail", ranked[-3:])):
        assert found[f"test_accuracy_{name}"] == pytest.approx(sum(recall[c] for c in classes) / 3)
    assert found["test_balanced_accuracy"] == pytest.approx(sum(recall) / 10)


def test_a_run_counts_the_rows_that_the_split_set_apart(task: LongTailFinetuning) -> None:
    result = task.run(method("logit-adjustment"), RATES, 0)
    assert result.sizes == {"train": 1079, "validation": len(task.problem(0).validation), "test": 359}
    assert set(result.metrics) == {"last", "best"} and task.resampled
    one, three = (task.cost(method(slug), RATES, 0) for slug in ("logit-adjustment", "backdoor-adjustment"))
    assert three.flops == 3 * one.flops and three.inference_parameters == 3 * one.inference_parameters


def test_a_trial_end_to_end(tmp_path: Path) -> None:
    task = LongTailFinetuning(**QUICK, pretrainings=2)
    result = compare(task, seeds=2, configs=1, out=tmp_path, measure_time=False)
    arms = {arm.name for arm in result.arms}
    assert {"cross-entropy", *LongTailFinetuning.methods} <= arms
    assert {"2x cross-entropy"} <= arms  # the baseline with as much compute as two fine-tunings
    assert all(arm.mean is not None for arm in result.arms)
    assert any("in no arm's cost" in remark for remark in result.warnings)


# -- the user's own ---------------------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a skewed data set and a module of backbones, in which the process runs."""
    (tmp_path / "my_backbones.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def narrow(input_shape, num_outputs):
                return nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.ReLU())

            class Wide(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.body = nn.Linear(8, 20)
                def forward(self, x):
                    return torch.tanh(self.body(x.flatten(1)))

            def spatial(input_shape):
                return nn.Unflatten(1, (4, 2))

            def infinite(input_shape):
                return nn.Threshold(1e9, float("nan"))

            def broken():
                raise RuntimeError("no weights")
            """
        )
    )
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [90, 40, 20])
    x = rng.normal(size=(150, 8)) + 2 * np.eye(3, 8)[y]
    np.savez(tmp_path / "mine.npz", X=x.astype(np.float32), y=y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_backbones", raising=False)
    return tmp_path


def test_own_backbones_on_own_data(own: Path) -> None:
    task: Any = LongTailFinetuning.make(
        data="mine.npz", backbones="my_backbones:narrow, my_backbones:Wide", epochs="2", target="y"
    )
    assert task.backbones == ("my_backbones:narrow", "my_backbones:Wide") and task.ratio == 1.0
    remarks = task.check()
    assert len(remarks) == 2 and "weaker control" in remarks[1]
    problem = task.problem(0)
    inputs: Any = problem.train.inputs
    assert {name: value.shape[1] for name, value in inputs.items()} == {"backbone_0": 12, "backbone_1": 20}
    assert torch.bincount(problem.train.targets).tolist() == [54, 24, 12] and problem.extra["replicas"] == ()
    assert task.problem(1).extra["backbones"][1].model.backbone is not None
    for slug, parts in (("backdoor-adjustment", (12, 20)), ("same-pretraining-ensemble", (12, 12))):
        made = task.build_method(method(slug), {})
        model: Any = fit(task.build_model(problem, 0), problem.train, epochs=1, methods=[made]).model
        assert tuple(m.head.weight.shape[1] for m in model.models) == parts
    assert task.run(method("backdoor-adjustment"), RATES, 0).trained
    assert "backbone_sources" in task.fingerprint() and "data_sha256" in task.fingerprint()


def test_own_data_without_backbones_are_pretrained_on_here(own: Path) -> None:
    task = LongTailFinetuning(data="mine.npz", target="y", pretrain_ratio=4.0, **QUICK)
    task.check()
    assert len(task.problem(0).extra["backbones"]) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("my_backbones:narrow", "my_backbones:missing"), "backbones = .*my_backbones has no 'missing'"),
        (("my_backbones:narrow", "my_backbones:broken"), "backbones = .*RuntimeError: no weights"),
        (("my_backbones:narrow", "no_such_module:f"), "backbones = .*there is no module 'no_such_module'"),
        (
            ("my_backbones:narrow", "my_backbones:spatial"),
            r"backbone output = \(\d+, 4, 2\): must be features \(N, D\)",
        ),
        (("my_backbones:narrow", "my_backbones:infinite"), "backbone_1 holds NaN or infinite values"),
    ],
)
def test_own_backbones_are_checked(own: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises((ArgumentError, DataError), match=message):
        LongTailFinetuning(data="mine.npz", target="y", backbones=names).check()


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.5}, r"ratio = 0.5: must be a number in \[1, inf\)"),
        ({"pretrain_ratio": 0.0}, "pretrain_ratio = 0.0"),
        ({"pretrainings": 1}, "pretrainings = 1: must be an integer >= 2"),
        ({"pretrain_epochs": 0}, "pretrain_epochs = 0"),
        ({"adapter": -1}, "adapter = -1"),
        ({"epochs": 0}, "epochs = 0"),
        ({"validation": 1.0}, "validation = 1.0"),
        ({"test": 0.0}, "test = 0.0"),
        ({"validation_least": 0}, "validation_least = 0"),
        ({"train_examples": 0}, "train_examples = 0"),
        ({"pretrain_examples": 1.5}, "pretrain_examples = 1.5"),
        ({"backbones": ("a:b",)}, r"backbones = \('a:b',\): must name at least 2 factories"),
        ({"backbones": ("resnet50", "vit")}, "must name at least 2 factories, as 'package.module:factory'"),
        ({"backbones": ("a:b", "c:d"), "pretrain_examples": 5}, "pretrain_examples = 5: must be left out"),
        ({"target": "y"}, "target, test_data describe a file of your own"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LongTailFinetuning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "diabetes"}, "has a continuous target; long-tail-finetuning needs classes"),
        ({"dataset": "digit"}, "dataset = 'digit'"),
        ({"model": "resnet"}, "model = 'resnet'"),
        ({"pretrain_examples": 5_000}, "pretrain_examples = 5000: must leave rows to fine-tune on, of 1079"),
        ({"pretrain_examples": 1_079}, "pretrain_examples = 1079: must leave rows"),
        ({"train_examples": 900}, "train_examples = 900: must leave rows to fine-tune on, of 540"),
        ({"train_examples": 4}, "mean over class .* is zero or not finite"),
    ],
)
def test_data_are_checked_before_any_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, DataError), match=message):
        replace(LongTailFinetuning(**QUICK), **settings).check()
