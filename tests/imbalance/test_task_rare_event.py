"""The rare-event task: its data, metrics, settings and refusals, and a tiny comparison from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as hard
from torch import Tensor

from equipoise import compare
from equipoise.catalogue import find
from equipoise.comparison.protocol import Arm, draw
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance import task_rare_event
from equipoise.imbalance.anyloss import AnyLossMethod
from equipoise.imbalance.claims_anyloss import CLAIMS, RareEventFolds
from equipoise.imbalance.task_rare_event import (
    OPTIMISE,
    RareEvent,
    average_precision,
    binary_cross_entropy,
    generated,
    rare_event_metrics,
)
from equipoise.imbalance.tuned_threshold import TunedThreshold

torch.set_num_threads(1)


def drawn(n: int = 60, seed: int = 0, share: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < share).long()
    return torch.randn(n, generator=generator) + labels, labels


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """120 rows, 30 of the class "fraud"."""
    rng = np.random.default_rng(0)
    label = np.where(np.arange(120) % 4 == 0, "fraud", "fair")
    frame = pd.DataFrame({"amount": rng.normal(size=120) + 2 * (label == "fraud"), "hour": rng.integers(24, size=120)})
    path = tmp_path / "data.csv"
    frame.assign(label=label, kind=np.arange(120) % 3, price=rng.normal(size=120)).to_csv(path, index=False)
    return path


# -- metrics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    logits, labels = drawn(seed=seed)
    if seed == 3:
        logits = logits.round()  # ties
    y, p = labels.numpy(), (logits > 0).numpy()
    recall, specificity = hard.recall_score(y, p), hard.recall_score(1 - y, ~p)
    expected = {
        "f1": hard.f1_score(y, p),
        "fbeta": hard.fbeta_score(y, p, beta=2),
        "gmean": (recall * specificity) ** 0.5,
        "balanced_accuracy": hard.balanced_accuracy_score(y, p),
        "auprc": hard.average_precision_score(y, logits.numpy()),
        "precision": hard.precision_score(y, p),
        "recall": recall,
        "accuracy": hard.accuracy_score(y, p),
    }
    assert rare_event_metrics(logits[:, None], labels) == pytest.approx(expected, abs=1e-12)


def test_a_model_that_predicts_no_positive() -> None:
    logits, labels = drawn()
    metrics = rare_event_metrics(logits - 10, labels)
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == 0
    assert metrics["auprc"] == pytest.approx(average_precision(logits, labels))
    assert average_precision(torch.zeros(60), labels) == pytest.approx(labels.double().mean().item())


def test_the_task_loss() -> None:
    logits, labels = drawn()
    expected = torch.nn.functional.cross_entropy(torch.stack([torch.zeros(60), logits], 1), labels)
    torch.testing.assert_close(binary_cross_entropy(logits[:, None], labels), expected)
    torch.testing.assert_close(binary_cross_entropy(logits, labels), expected)


# -- data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "name", "count", "positives"),
    [
        ({"dataset": "digits"}, "8", 1797, 174),
        ({"dataset": "digits", "rate": 0.05}, "8", 1708, 85),
        ({"dataset": "digits", "positive": "3"}, "3", 1797, 183),
        ({"dataset": "breast-cancer", "rate": 0.1}, "malignant", 397, 40),
        ({"dataset": "breast-cancer", "positive": "benign"}, "benign", 569, 357),
        ({"dataset": "wine", "positive": "class_2"}, "class_2", 178, 48),
        ({"dataset": "generated"}, "rare", 2000, 161),
    ],
)
def test_embedded_data_as_two_classes(settings: dict[str, Any], name: str, count: int, positives: int) -> None:
    task = RareEvent(**settings)
    problem = task.problem(0)
    parts = (problem.train, problem.validation, problem.test)
    assert sum(map(len, parts)) == count and sum(int(part.targets.sum()) for part in parts) == positives
    assert task._raw().class_names[1] == name
    assert problem.num_outputs == 1 and problem.train.num_classes == 2 and task.resampled


def test_the_default_has_a_test_set_of_its_own() -> None:
    task = RareEvent()
    first, other = task.problem(0), task.problem(1)
    assert (len(first.train), len(first.validation), len(first.test)) == (1000, 800, 1000) and not task.resampled
    assert int(first.test.targets.sum()) == 106 and torch.equal(first.test.targets, other.test.targets)
    assert task.check()[:-1] == [] and (task.positive, task.train_examples) == ("8", 1000)


def test_positives_are_thinned_anew_by_each_seed_and_each_split_has_its_share() -> None:
    task = RareEvent(dataset="digits", rate=0.05)
    first, again, other = task.problem(0), task.problem(0), task.problem(1)
    assert torch.equal(first.test.inputs, again.test.inputs)
    kept = [task._thin(task._raw(), seed).inputs for seed in (0, 1)]
    assert kept[0].shape == kept[1].shape and not torch.equal(*kept)
    for problem in (first, other):
        shares = [part.targets.double().mean().item() for part in (problem.train, problem.validation, problem.test)]
        assert shares == pytest.approx([0.05] * 3, abs=0.002)
    assert [passed for _, passed, _ in task.sanity(0)] == [True]


def test_the_users_own_data(csv: Path) -> None:
    task = RareEvent(data=str(csv), target="label")
    assert task.rate is None and task.positive is None
    assert task._raw().class_names == ("fair", "fraud") and int(task._raw().targets.sum()) == 30
    turned = RareEvent(data=str(csv), target="label", positive="fair")
    assert turned._raw().class_names == ("fraud", "fair") and int(turned._raw().targets.sum()) == 90
    thinned = RareEvent(data=str(csv), target="label", rate=0.1, test=0.3)
    assert int(thinned._thin(thinned._raw(), 0).targets.sum()) == 10
    assert "data_sha256" in task.fingerprint()
    assert task.check()[0].startswith("A test set holds 12 positives only: a single one moves recall by 8 points")


def test_a_test_file_of_its_own_is_thinned_too(csv: Path) -> None:
    task = RareEvent(data=str(csv), target="label", test_data=str(csv), rate=0.1, validation=0.3)
    problem = task.problem(0)
    assert not task.resampled and (len(problem.test), int(problem.test.targets.sum())) == (100, 10)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimise": "auc"}, "optimise = 'auc': must be one of 'f1', 'fbeta'"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"rate": 1.0}, r"rate = 1.0: must be a number in \(0, 1\)"),
        ({"test": 0.0}, "test = 0.0"),
        ({"dataset": "diggits"}, "Did you mean 'digits'"),
        ({"target": "y"}, "give data='file.csv' as well"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"data": "x.csv", "test_data": "y.csv", "rate": -0.1}, "rate = -0.1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        RareEvent(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": "wine"},
            r"positive = None: wine has 3 classes \(class_0, class_1, class_2, ...\), and rare-event two",
        ),
        ({"dataset": "digits", "positive": "eight"}, "positive = 'eight': must be a class of digits: 0, 1"),
        ({"dataset": "diabetes"}, "has a continuous target; rare-event needs two classes"),
        (
            {"dataset": "digits", "rate": 0.5},
            "rate = 0.5: must be at most 0.0968, the share of the positives in digits",
        ),
        ({"dataset": "digits", "rate": 0.0001}, "rate = 0.0001: must leave a positive beside the 1623 negatives"),
        (
            {"dataset": "digits", "rate": 0.003},
            "digits: has 5 examples of the positive class '8', too few for a validation set",
        ),
        (
            {"dataset": "digits", "rate": 0.01, "test": 0.05},
            "too few for a test set of 0.05 of the data. Raise rate or test",
        ),
    ],
)
def test_data_are_checked_before_any_run(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(RareEvent(**settings), ["anyloss"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_own_data_are_checked(csv: Path) -> None:
    for target, message in (("kind", "positive = None: .* has 3 classes"), ("price", "has a continuous target")):
        with pytest.raises(ArgumentError, match=message):
            RareEvent(data=str(csv), target=target).check()
    one = csv.with_name("one.csv")
    pd.read_csv(csv).query("label == 'fair'").to_csv(one, index=False)
    with pytest.raises(DataError, match="one class only"):
        RareEvent(data=str(one), target="label").check()


def test_a_model_with_two_outputs_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"its output has shape \(2, 3\)"):
        RareEvent(dataset="breast-cancer", model=f"{__name__}:three_outputs").check()


def three_outputs(input_shape: tuple[int, ...], num_outputs: int) -> torch.nn.Module:
    return torch.nn.Linear(input_shape[0], 3)


# -- methods ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimise", OPTIMISE)
def test_methods_aim_at_the_score_that_is_judged(optimise: str) -> None:
    task = RareEvent.make(optimise=optimise, beta="3")
    assert task.metric == optimise and RareEvent.metric == "accuracy"
    wanted = "f1" if optimise == "auprc" else optimise
    for method in (AnyLossMethod, TunedThreshold):
        built = task.build_method(method, {"lr": 0.1})
        assert (built.metric, built.beta) == (wanted, 3.0)
    given = task.build_method(AnyLossMethod, {"anyloss.metric": "gmean", "anyloss.amplification": 9.0})
    assert given.settings() == {"metric": "gmean", "beta": 3.0, "amplification": 9.0}
    assert (optimise == "auprc") == any("AUPRC has no threshold" in remark for remark in task.check())


def test_soap_takes_part_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(task_rare_event, "installed", lambda there=there: there)
        task = RareEvent()
        assert ("soap" in task.entrants()) == there and set(task.methods) - set(task.entrants()) <= {"soap"}
        assert any("pip install --no-deps libauc" in remark for remark in task.check()) != there
    assert RareEvent.baseline == "cross-entropy" and find("task", "rare-event").cls == "RareEvent"


def test_learned() -> None:
    task = RareEvent()
    problem = task.problem(0)
    assert not task.learned(problem, {"validation_auprc": 0.06}) and task.learned(problem, {"validation_auprc": 0.4})


def test_every_default_arm_runs_on_one_logit(csv: Path) -> None:
    task = RareEvent(data=str(csv), target="label", model="linear", epochs=2, batch_size=32)
    for slug in ("cross-entropy", *task.entrants()):
        arm = Arm(slug)
        result = task.run(arm.cls, draw(arm.space(task), 1)[0], 0)
        assert 0 <= result.metrics["last"]["test_f1"] <= 1


def test_a_tiny_comparison(csv: Path, tmp_path: Path) -> None:
    task = RareEvent(data=str(csv), target="label", model="linear", epochs=8, batch_size=32, optimise="gmean")
    out = tmp_path / "out"
    result = compare(task, ["anyloss", "tuned-threshold"], seeds=2, configs=1, out=out, measure_time=False)
    assert result.metric == "gmean" and result.arms[0].name == "cross-entropy"
    runs = result.runs()
    finals = runs[runs.kind == "final"]
    assert len(finals) == 6 and (finals.status == "done").all()
    for name in ("f1", "fbeta", "gmean", "balanced_accuracy", "auprc", "precision", "recall", "accuracy"):
        assert finals[f"last.test_{name}"].between(0, 1).all()
    assert finals.groupby("arm")["last.test_gmean"].mean()["tuned-threshold"] > 0.6


# -- the claims' task -------------------------------------------------------------------------------------------------
def test_folds_share_no_row_and_cover_all() -> None:
    task = RareEventFolds(dataset="breast-cancer", rate=0.1)
    seen = []
    for seed in range(10):
        problem = task.problem(seed)
        rows = [part.inputs.sum(1) for part in (problem.train, problem.validation, problem.test)]
        assert sum(map(len, rows)) == 397 and int(problem.test.targets.sum()) == 4
        assert problem.train.inputs.dtype == torch.float64
        torch.testing.assert_close(problem.train.inputs.mean(0), torch.zeros(30, dtype=torch.float64))
        seen.append(problem.test.targets)
    assert sum(map(len, seen)) == 397 and task.problem(100_000).test.inputs.shape[1] == 30
    scaled = RareEventFolds(dataset="breast-cancer", rate=0.1, scaling="minmax").problem(0).train.inputs
    assert scaled.min() == 0 and scaled.max() == pytest.approx(1)


def test_a_fold_is_plain_gradient_descent() -> None:
    task = RareEventFolds(dataset="breast-cancer", rate=0.1, epochs=2)
    result = task.run(Arm("cross-entropy").cls, {"lr": 0.1}, 0)
    problem = task.problem(0)
    x, y = problem.train.inputs, problem.train.targets.double()
    weight, bias = torch.zeros(30, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(20):
        error = (x @ weight + bias).sigmoid() - y
        weight, bias = weight - 0.1 * x.T @ error / len(y), bias - 0.1 * error.mean()
    expected = rare_event_metrics(problem.test.inputs @ weight + bias, problem.test.targets)
    assert result.counted == "last"
    assert {k: result.metrics["last"][f"test_{k}"] for k in expected} == pytest.approx(expected)


def test_the_claims_arms_are_valid() -> None:
    for claim in CLAIMS:
        task = claim.task.make(**claim.settings)
        names = [name for name, _, _ in claim.arms]
        assert claim.method in names and claim.reference in names and claim.seeds == 10
        for _, slug, config in claim.arms:
            for one in config if isinstance(config, tuple) else (config,):
                assert task.build_method(Arm(slug).cls, one).name == slug
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)


def test_generated_is_the_cards() -> None:
    raw = generated()
    assert raw.inputs.shape == (2000, 20) and raw.targets.double().mean().item() == pytest.approx(0.0805)
