"""The imbalanced-regression task: its data, regions, metrics, refusals, and a comparison from end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import equipoise
from equipoise.errors import ArgumentError, DataError
from equipoise.imbalance.conr import ConR
from equipoise.imbalance.regression_baselines import FDS, L1, LDS
from equipoise.imbalance.task_imbalanced_regression import ImbalancedRegression, ScaledOutput, balanced_mae, rotate
from equipoise.training import Examples, Problem
from equipoise.training.features import find_head

torch.set_num_threads(1)
CONFIG = {"lr": 3e-3, "weight_decay": 1e-6, "early_stopping": False}


def table(folder: Path, labels: Any, name: str = "mine.csv") -> str:
    """A file whose column x tells the target y."""
    noise = np.random.default_rng(0).normal(size=len(labels))
    path = folder / name
    pd.DataFrame({"x": np.asarray(labels) + 0.1 * noise, "z": noise, "y": labels}).to_csv(path, index=False)
    return str(path)


def skewed(n: int = 300) -> Any:
    return np.round(1000 * np.random.default_rng(1).exponential(size=n), 1)


# -- the data ---------------------------------------------------------------------------------------------------------
def test_training_angles_are_skewed_and_the_others_even() -> None:
    problem = ImbalancedRegression(train_examples=4000).problem(0)
    angle, even = problem.train.targets, problem.test.targets
    assert problem.input_shape == (1, 8, 8) and len(angle) == 4000 and len(problem.validation) == 300
    assert angle.min() >= 0 and max(angle.max(), even.max()) <= 90
    # Means of the truncated exponential law and of the uniform one.
    mean = 12 - 90 / math.expm1(90 / 12)
    assert abs(angle.mean() - mean) < 4 * 12 / 4000**0.5
    assert abs(even.mean() - 45) < 4 * 26 / 600**0.5
    again = ImbalancedRegression(train_examples=4000).problem(0)
    assert torch.equal(again.train.inputs, problem.train.inputs) and torch.equal(again.test.targets, even)
    assert not torch.equal(ImbalancedRegression().problem(1).test.targets, even)


def test_digits_do_not_recur_between_splits() -> None:
    task = ImbalancedRegression(skew=1e-3)
    assert [passed for _, passed, _ in ImbalancedRegression().sanity(0)] == [True]
    # With hardly any turning the images are those of the data set: no test image is among the training images.
    problem = task._rotated_digits(0)
    digits = equipoise.data.load("digits").inputs.flatten(1)
    nearest = torch.cdist(problem[0].inputs.flatten(1)[:200], digits).min(1)
    assert nearest.values.max() < 0.05
    assert len(nearest.indices.unique()) > 100


def test_rotation() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 0, 2], image[0, 0, 2, 3] = 1, 2
    turned = rotate(image.expand(3, 1, 5, 5), torch.tensor([0.0, 90.0, 180.0]))
    for got, expected in zip(turned, (image[0], image[0].rot90(1, (1, 2)), image[0].rot90(2, (1, 2))), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_own_data_are_split_alike_in_label_order(tmp_path: Path) -> None:
    task = ImbalancedRegression(data=table(tmp_path, skewed()), target="y")
    problem = task.problem(3)
    assert [len(p) for p in (problem.train, problem.validation, problem.test)] == [180, 60, 60]
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    cuts = [p.targets.quantile(quantiles) for p in (problem.train, problem.validation, problem.test)]
    assert max((cuts[0] / cut - 1).abs().max() for cut in cuts[1:]) < 0.2
    union = torch.cat([problem.train.targets, problem.validation.targets, problem.test.targets]).sort().values
    torch.testing.assert_close(union, torch.tensor(np.sort(skewed()), dtype=torch.float32))
    # Inputs belong to their labels: x was y with a little noise, then standardised.
    assert np.corrcoef(problem.test.inputs[:, 0], problem.test.targets)[0, 1] > 0.99
    assert not torch.equal(task.problem(4).train.targets, problem.train.targets)
    small = ImbalancedRegression(data=table(tmp_path, skewed()), target="y", train_examples=30)
    assert len(small.problem(0).train) == 30


def test_own_test_file(tmp_path: Path) -> None:
    test = table(tmp_path, np.linspace(0, 5000, 40), "test.csv")
    task = ImbalancedRegression(data=table(tmp_path, skewed()), target="y", test_data=test)
    problem = task.problem(0)
    assert not task.resampled and len(problem.test) == 40
    torch.testing.assert_close(problem.test.targets, torch.linspace(0, 5000, 40))
    assert {"data_sha256", "test_data_sha256"} <= set(task.fingerprint())


# -- regions and metrics ----------------------------------------------------------------------------------------------
def test_regions_by_hand(tmp_path: Path) -> None:
    # Bins of width 10 on [0, 40]: 12, 6, 0, 1 and 1 of 20 labels; the average bin has 20 / 4 = 5.
    labels = [0.0] + [1.0] * 11 + [15.0] * 6 + [35.0, 40.0]
    task = ImbalancedRegression(data=table(tmp_path, labels), target="y", bin_width=10.0, many=1.2, few=0.5)
    given = torch.tensor([0.0, 9.9, 10.0, 19.0, 20.0, 29.0, 35.0, 99.0, -5.0])
    # 12 > 6 are the many; 6 is neither more than 6 nor less than 2.5; 1, and bins without any, are the few.
    assert task._regions(given).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    other = ImbalancedRegression(data=task.data, target="y", bin_width=10.0, many=1.1, few=0.1)
    assert other._regions(given).tolist() == [0, 0, 0, 0, 2, 2, 1, 2, 2]


def test_regions_of_rotated_digits_follow_the_law() -> None:
    task = ImbalancedRegression(bin_width=5.0, skew=12.0)
    share = lambda a: (math.exp(-a / 12) - math.exp(-(a + 5) / 12)) / (1 - math.exp(-90 / 12)) * 18  # noqa: E731
    for a in range(0, 90, 5):
        expected = 0 if share(a) > 1 else 2 if share(a) < 0.5 else 1
        assert task._regions(torch.tensor([a + 0.1, a + 4.9])).tolist() == [expected] * 2


@pytest.mark.parametrize("seed", range(6))
def test_every_split_of_every_seed_has_every_region(seed: int, tmp_path: Path) -> None:
    for task in (
        ImbalancedRegression(dataset="diabetes"),
        ImbalancedRegression(data=table(tmp_path, skewed()), target="y"),
        ImbalancedRegression(
            data=table(tmp_path, skewed(600), "b.csv"), target="y", train_examples=60, validation=0.15
        ),
    ):
        problem = task.problem(seed)
        for part in (problem.train, problem.validation, problem.test):
            assert task._regions(part.targets).bincount(minlength=3).min() >= 1


def test_metrics_by_hand() -> None:
    task = ImbalancedRegression()
    targets = torch.tensor([1.0, 2.0, 15.0, 25.0, 26.0])
    prediction = torch.tensor([[2.0], [4.0], [19.0], [25.0], [42.0]])  # errors 1, 2, 4, 0, 16
    regions = torch.tensor([0, 0, 1, 2, 2])
    extra = {"regions": {"validation": regions, "test": regions}, "width": 10.0}
    data = Examples(torch.zeros(5, 2), targets)
    problem = Problem(data, data, data, (2,), 1, extra)
    seen = task.measure(problem, {"validation": (prediction, targets), "test": (prediction[:, 0], targets)})
    expected = {"mae": 23 / 5, "balanced_mae": (1.5 + 4 + 8) / 3, "many_mae": 1.5, "medium_mae": 4.0, "few_mae": 8.0}
    expected |= {"many_gm": 2**0.5, "medium_gm": 4.0, "few_gm": (16e-10) ** 0.5, "gm": (1 * 2 * 4 * 16 * 1e-10) ** 0.2}
    for split in ("validation", "test"):
        assert {name: seen[f"{split}_{name}"] for name in expected} == pytest.approx(expected)
    assert len(seen) == 2 * len(expected)
    assert balanced_mae(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([-0.1, 0.1, 0.2]), 1.0) == (1 + 5.5) / 2


def test_learned_means_better_than_the_median() -> None:
    task = ImbalancedRegression()
    problem = task.problem(0)
    median = problem.train.targets.median()
    sets = {"validation": problem.validation, "test": problem.test}
    constant = task.measure(problem, {name: (median.expand(len(s)), s.targets) for name, s in sets.items()})
    right = task.measure(problem, {name: (s.targets + 1, s.targets) for name, s in sets.items()})
    assert task.learned(problem, right) and not task.learned(problem, constant)


# -- units ------------------------------------------------------------------------------------------------------------
def test_settings_in_label_units_come_from_the_task() -> None:
    task = ImbalancedRegression()
    conr = task.build_method(ConR, {"lr": 1e-3})
    assert (conr.window, conr.pushing) == (4.5, 1 / 90)
    assert task.build_method(LDS, {}).bin_width == task.build_method(FDS, {}).bin_width == 4.5
    wide = ImbalancedRegression(bin_width=9.0)
    assert wide.build_method(ConR, {"conr.pushing": 0.5}).settings() == ConR(window=9.0, pushing=0.5).settings()
    assert isinstance(task.build_method(L1, {}), L1)


def test_scaled_output() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    model = ScaledOutput(inner, 50.0, 20.0)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), 50 + 20 * inner(x))
    assert find_head(model) is inner[2]
    assert dict(model.named_buffers()).keys() == {"location", "scale"}
    built = ImbalancedRegression().build_model(problem := ImbalancedRegression().problem(0), 0)
    assert built.location == problem.train.targets.median() and built.scale == problem.train.targets.std()


def test_views_are_made_where_there_is_noise() -> None:
    task, problem = ImbalancedRegression(epochs=1), ImbalancedRegression().problem(0)
    assert task.fit_options(problem, CONFIG)["augment"].noise == 0.05
    for plain in (ImbalancedRegression(noise=0.0), ImbalancedRegression(dataset="diabetes")):
        assert plain.fit_options(problem, CONFIG)["augment"] is None
    assert ImbalancedRegression(dataset="diabetes", noise=0.1).fit_options(problem, CONFIG)["augment"].noise == 0.1


# -- training and comparing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset", ["rotated-digits", "diabetes"])
def test_a_run_learns(dataset: str) -> None:
    task = ImbalancedRegression(dataset=dataset, epochs=4)
    result = task.run(L1, {**CONFIG, "lr": 1e-2}, 0)
    assert result.trained and result.score("test_many_mae") < 60
    assert result.counted == "last" and len(result.curve) == 4


def test_few_test_examples_are_remarked() -> None:
    assert ImbalancedRegression().check() == []
    (remark,) = ImbalancedRegression(dataset="diabetes").check()
    assert "region 'few' of labels has" in remark and "test examples (seed 0)" in remark


def test_compare_end_to_end(tmp_path: Path) -> None:
    settings = {"epochs": 2, "train_examples": 300}
    trial = equipoise.compare(
        "imbalanced-regression", settings=settings, seeds=2, configs=1, measure_time=False, out=tmp_path
    )
    names = [arm.name for arm in trial.arms]
    assert names[:6] == ["l1", "conr", "lds", "fds", "balanced-mse", "mse"]
    assert trial.metric == "balanced_mae" and not trial.higher_is_better
    assert all(len(arm.values) == 2 and all(map(math.isfinite, arm.values)) for arm in trial.arms)


def test_compare_on_own_data_by_another_metric(tmp_path: Path) -> None:
    settings = {"data": table(tmp_path, skewed()), "target": "y", "metric": "few_mae", "epochs": "2", "noise": "0.1"}
    trial = equipoise.compare(
        "imbalanced-regression", ["conr"], settings=settings, seeds=2, configs=1, measure_time=False, out=tmp_path / "o"
    )
    assert trial.metric == "few_mae"
    assert all(math.isfinite(value) for arm in trial.arms for value in arm.values)


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "rmse"}, "metric = 'rmse': must be one of 'balanced_mae', 'mae'"),
        ({"skew": 0.0}, r"skew = 0.0: must be a number in \(0, inf\)"),
        ({"bin_width": -1.0}, "bin_width = -1.0"),
        ({"many": 1.0, "few": 1.0}, r"few = 1.0: must be a number in \(0, 1\)"),
        ({"noise": -0.1}, "noise = -0.1"),
        ({"validation": 1.0}, "validation = 1.0"),
        ({"train_examples": 1}, "train_examples = 1: must be an integer >= 2"),
        ({"target": "y"}, "give data='file.csv' as well"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImbalancedRegression(**settings)


def test_bad_data_are_refused_before_a_run(tmp_path: Path) -> None:
    labels = skewed()
    missing = labels.copy()
    missing[7] = math.nan
    even = np.linspace(0, 1, 300)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": table(tmp_path, missing, "a.csv"), "target": "y"}, r"'y' is missing in data row 8"),
        ({"data": table(tmp_path, np.full(300, 4.0), "b.csv"), "target": "y"}, "'y' is 4 in every row"),
        (
            {"data": table(tmp_path, even, "c.csv"), "target": "y"},
            r"many, few = 1, 0.5: the region '(many|few)' holds \d+ of all examples, and needs 10",
        ),
        ({"dataset": "wine"}, "dataset = 'wine': has classes; imbalanced-regression needs values"),
        ({"bin_width": 1e-4}, r"bin_width = 0.0001: must be at least 0.009"),
        ({"bin_width": 100.0}, r"Change many, few or bin_width"),
        ({"few": 1e-9}, r"the region 'few' holds 0 validation examples, and needs 1"),
        ({"dataset": "diabetes", "few": 0.1}, r"the region 'few' holds \d of all examples, and needs 10"),
        ({"model": "torch.nn:Identity"}, "model = "),
    ]
    for settings, message in cases:
        with pytest.raises((ArgumentError, DataError), match=message):
            equipoise.compare("imbalanced-regression", settings=settings, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_model_of_ones_own_must_give_one_value(tmp_path: Path) -> None:
    assert ImbalancedRegression(model="equipoise.models.reference:Linear").check() == []
    with pytest.raises(ArgumentError, match=r"its output has shape \(2, 5\) for 2 examples: must be \(2, 1\)"):
        ImbalancedRegression(model=f"{__name__}:five_outputs").check()


def five_outputs(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 5))
