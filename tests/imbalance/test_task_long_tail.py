"""The long-tail task: its data, its metrics, its settings, and a small trial."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from torch import Tensor

from equipoise import Arm, compare
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance.baselines import Oversampling
from equipoise.imbalance.shared import recall_and_f1
from equipoise.imbalance.task_long_tail import LongTail
from equipoise.training import Examples, Problem


def sizes(examples: Examples) -> list[int]:
    return torch.bincount(examples.targets, minlength=examples.num_classes or 0).tolist()


def rows(examples: Examples) -> set[bytes]:
    assert isinstance(examples.inputs, Tensor)
    return {row.numpy().tobytes() for row in examples.inputs.flatten(1)}


# -- data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "exponents"), [("exp", [c / 9 for c in range(10)]), ("step", [0] * 5 + [1] * 5)])
def test_training_has_the_tail_and_the_test_set_none(kind: str, exponents: list[float]) -> None:
    full, problem = LongTail(ratio=1).problem(3), LongTail(kind=kind, ratio=20).problem(3)
    largest = max(sizes(full.train))
    expected = [min(n, math.floor(largest * 20**-e + 1e-6)) for n, e in zip(sizes(full.train), exponents, strict=True)]
    assert sizes(problem.train) == expected
    assert rows(problem.train) < rows(full.train)
    assert torch.equal(problem.test.targets, full.test.targets)
    assert min(sizes(problem.test)) >= 0.9 * max(sizes(problem.test))


def test_validation_is_as_skewed_but_keeps_some_of_each_class() -> None:
    problem = LongTail(kind="exp").problem(0)
    full = sizes(LongTail(ratio=1).problem(0).validation)
    tail = [max(1, math.floor(max(full) * 50 ** (-c / 9) + 1e-6)) for c in range(10)]
    bare = [min(pair) for pair in zip(full, tail, strict=True)]
    assert sizes(problem.validation) == [max(10, n) for n in bare]
    low = LongTail(kind="exp", validation_least=1).problem(0)
    assert sizes(low.validation) == bare and sizes(low.train) == sizes(problem.train)


def test_seeds_fix_the_problem() -> None:
    one, two, other = LongTail().problem(1), LongTail().problem(1), LongTail().problem(2)
    assert torch.equal(one.train.inputs, two.train.inputs) and torch.equal(one.train.targets, two.train.targets)
    assert rows(one.train) != rows(other.train)
    assert not rows(one.test) & (rows(one.train) | rows(one.validation))


def test_every_arm_sees_the_same_views() -> None:
    task = LongTail(shift=1, noise=0.3)
    augment = task.fit_options(task.problem(0), {})["augment"]
    assert (augment.shift, augment.noise) == (1, 0.3)
    plain = LongTail(shift=0, noise=0.0)
    assert plain.fit_options(plain.problem(0), {}) == {"augment": None}
    assert "sbcl" in task.entrants() and "sbcl" not in plain.entrants()
    assert any("sbcl is left out" in remark for remark in plain.check())


# -- metrics ----------------------------------------------------------------------------------------------------------
def predictions(seed: int = 0, n: int = 60, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and labels; class 4 is never predicted, class 5 neither present nor predicted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 0.8
    logits[:, 4:] = -10.0
    return logits, labels


def test_recall_and_f1_by_loops() -> None:
    logits, labels = predictions()
    predicted = logits.argmax(1)
    recall, f1 = recall_and_f1(logits, labels)
    for c in range(5):
        pairs = list(zip(predicted.tolist(), labels.tolist(), strict=True))
        right = sum(p == c == y for p, y in pairs)
        missed, false = sum(p != c == y for p, y in pairs), sum(p == c != y for p, y in pairs)
        assert recall[c].item() == pytest.approx(right / (right + missed))
        assert f1[c].item() == pytest.approx(2 * right / (2 * right + missed + false))
    assert recall[5].isnan() and f1[5].isnan()
    assert recall[:5].tolist() == pytest.approx(recall_score(labels, predicted, average=None).tolist())
    assert f1.nanmean().item() == pytest.approx(f1_score(labels, predicted, average="macro"))


def measured(counts: list[int], **settings: Any) -> dict[str, float]:
    """Metrics of ``predictions`` for training classes of these sizes."""
    labels = torch.arange(6).repeat_interleave(torch.tensor(counts))
    train = Examples(torch.zeros(len(labels), 2), labels, num_classes=6)
    problem = Problem(train, train, train, (2,), 6)
    return LongTail(**settings).measure(problem, {"validation": predictions(1), "test": predictions()})


def test_accuracy_on_many_medium_and_few_by_loops() -> None:
    metrics = measured([100, 41, 40, 10, 9, 1])
    logits, labels = predictions()
    right = (logits.argmax(1) == labels).double()
    of = lambda c: right[labels == c].mean().item()  # noqa: E731
    assert metrics["test_accuracy_many"] == pytest.approx((of(0) + of(1)) / 2)
    assert metrics["test_accuracy_medium"] == pytest.approx((of(2) + of(3)) / 2)  # both bounds belong to the middle
    assert metrics["test_accuracy_few"] == pytest.approx(of(4)) == 0.0  # class 5 is not tested
    assert metrics["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert metrics["test_macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert metrics["validation_accuracy_many"] != metrics["test_accuracy_many"]


def test_bounds_are_settings_and_an_empty_region_is_absent() -> None:
    metrics = measured([100, 50, 40, 30, 20, 15])
    assert "test_accuracy_few" not in metrics and "test_accuracy_medium" in metrics
    assert "test_accuracy_medium" not in measured([100, 100, 100, 2, 2, 2])
    moved = measured([100, 50, 40, 30, 20, 15], many=60, few=60)
    assert {"test_accuracy_many", "test_accuracy_few"} < set(moved) and "test_accuracy_medium" not in moved
    # A region whose classes are not in the test set has no accuracy either: class 5 alone has fewer than 16.
    assert "test_accuracy_few" not in measured([100, 50, 40, 30, 20, 15], few=16)


def test_an_empty_region_is_a_remark() -> None:
    assert LongTail().check() == []
    assert LongTail(kind="step").check() == []  # a step has no middle, which is no news
    many, few = LongTail(kind="exp", ratio=2, many=200, few=1).check()
    assert many.startswith("No class has more than 200 training examples (sizes 5") and "accuracy_many" in many
    assert few.startswith("No class has fewer than 1 training examples") and "accuracy_few" in few
    _, medium = LongTail(ratio=1, many=200, few=200, dataset="wine").check()
    assert medium.startswith("No class has 200 to 200 training examples")


# -- settings ---------------------------------------------------------------------------------------------------------
def test_the_ratio_is_50_for_embedded_data_and_1_for_your_own(tmp_path: Path) -> None:
    assert LongTail().ratio == 50
    assert LongTail(data=str(own(tmp_path))).ratio == 1
    assert LongTail.make(ratio="none", kind="exp") == LongTail(kind="exp")
    assert LongTail.make(data="x.csv", ratio="8").ratio == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.5}, r"ratio = 0.5: must be a number in \[1, inf\)"),
        ({"kind": "expo"}, "kind = 'expo': must be one of 'exp', 'step'. Did you mean 'exp'"),
        ({"many": 5, "few": 10}, r"many, few = \(5, 10\): must satisfy many >= few"),
        ({"few": 0}, "few = 0"),
        ({"noise": -0.1}, "noise = -0.1"),
        ({"shift": -1}, "shift = -1"),
        ({"validation": 1.0}, "validation = 1.0"),
        ({"test": 0.0}, "test = 0.0"),
        ({"validation_least": 0}, "validation_least = 0"),
        ({"target": "y"}, "give data='file.csv' as well"),
        ({"epochs": 0}, "epochs = 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LongTail(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "diabetes"}, "data = 'diabetes': has a continuous target; long-tail needs classes"),
        ({"dataset": "wine", "shift": 1}, "shift = 1: must be 0 for a table"),
        ({"dataset": "digit"}, "dataset|digits"),
        ({"train_examples": 5}, "class '0' has no example among the 5 to train on. Raise train_examples"),
        ({"validation": 0.6, "test": 0.5}, "leave examples to train on"),
        ({"model": "resnet"}, "model = 'resnet'"),
    ],
)
def test_check_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongTail(**settings).check()


# -- data of your own -------------------------------------------------------------------------------------------------
def own(folder: Path, counts: tuple[int, ...] = (90, 30, 12), name: str = "own.csv") -> Path:
    """A table whose classes have these sizes."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    x = generator.normal(size=(len(labels), 2)) + 3 * np.stack([labels == 1, labels == 2], 1)
    lines = [f"{a:.4f},{b:.4f},c{y}" for (a, b), y in zip(x, labels, strict=True)]
    path = folder / name
    path.write_text("\n".join(["a,b,label", *lines]) + "\n")
    return path


def test_your_own_data_stay_as_skewed_as_they_are(tmp_path: Path) -> None:
    task = LongTail(data=str(own(tmp_path)), target="label")
    problem = task.problem(0)
    parts = [sizes(part) for part in (problem.train, problem.validation, problem.test)]
    assert [sum(column) for column in zip(*parts, strict=True)] == [90, 30, 12]
    assert task.resampled and "own.csv" not in str(task.check())
    assert any("The smallest class has 2 test examples" in remark for remark in task.check())
    tested = LongTail(data=str(own(tmp_path)), test_data=str(own(tmp_path, (40, 40, 40), "test.csv")))
    assert sizes(tested.problem(0).test) == [40, 40, 40] and not tested.resampled
    assert set(tested.fingerprint()) >= {"data_sha256", "test_data_sha256"}
    assert not any("test example" in remark for remark in tested.check())
    partial = LongTail(data=str(own(tmp_path)), test_data=str(own(tmp_path, (40, 40), "partial.csv")))
    assert "1 of 3 classes have no test example: metrics are means over the others." in partial.check()


def test_arrays_of_your_own(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [60, 15])
    images = np.random.default_rng(0).random((75, 6, 6)).astype("float32")
    np.savez(tmp_path / "own.npz", X=images, y=labels)
    task = LongTail(data=str(tmp_path / "own.npz"), shift=1, epochs=1)
    task.check()
    assert task.problem(0).input_shape == (1, 6, 6)
    result = task.run(Oversampling, {"lr": 0.1, "weight_decay": 1e-4}, 0)
    assert 0 <= result.score("test_balanced_accuracy") <= 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [((50, 2), "classes of 'label' have fewer than 3 examples"), ((50,), "has one class only")],
)
def test_data_of_your_own_that_cannot_be_split(tmp_path: Path, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LongTail(data=str(own(tmp_path, counts)), target="label").check()


# -- a trial ----------------------------------------------------------------------------------------------------------
def test_a_small_trial(tmp_path: Path) -> None:
    config = {"lr": 0.1, "weight_decay": 1e-4}
    arms = [Arm("logit-adjustment", config=config), Arm("cross-entropy", config=config)]
    result = compare(LongTail(epochs=10), arms, seeds=2, measure_time=False, out=tmp_path / "out")
    assert result.metric == "balanced_accuracy" and not result.failed
    plain, adjusted = (result.arm(name) for name in ("cross-entropy", "logit-adjustment"))
    assert np.mean(adjusted.values) > np.mean(plain.values) + 0.05
    wanted = {"test_accuracy", "test_macro_f1", "test_accuracy_many", "test_accuracy_few"}
    assert wanted < set(adjusted.metrics.columns)
