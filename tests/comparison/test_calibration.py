"""A small version of benchmarks/calibration.py: the shipped statistics are as right as they say, and the benchmark would notice."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats

from equipoise.comparison.statistics import Estimate

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration.py"
TRIALS = 2_000


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def error(rate: float, trials: int = TRIALS) -> float:
    """Standard error of a share of ``trials`` that is ``rate`` in truth."""
    return math.sqrt(rate * (1 - rate) / trials)


def tally(calibration: ModuleType, kind: str, arms: int, seeds: int, effect: float = 0.0, trials: int = TRIALS) -> Any:
    rng = np.random.default_rng([1, arms, seeds])
    found = calibration.Tally("", arms, seeds, (calibration.FALSE_POSITIVES, calibration.COVERAGE))
    for values, truth in calibration.independent(rng, trials, arms, seeds, effect, kind):
        found.add(values, truth)
    return found


@pytest.mark.parametrize("kind", ["normal", "counts"])
@pytest.mark.parametrize("seeds", [5, 10])
def test_equal_arms_on_independent_test_sets(calibration: ModuleType, kind: str, seeds: int) -> None:
    found = tally(calibration, kind, 3, seeds)
    # The exact rate with two rivals of one baseline is 4.8 %, as their intervals are not independent.
    assert abs(found.rate - 0.048) < 3.5 * error(0.048)
    assert abs(found.coverage - 0.95) < 3.5 * error(0.95)
    assert found.passed


def test_a_known_effect_is_covered_and_the_equal_arm_is_left_alone(calibration: ModuleType) -> None:
    found = tally(calibration, "normal", 3, 5, effect=0.02)
    assert abs(found.coverage - 0.95) < 3.5 * error(0.95)
    assert found.rate < 0.05 + 3.5 * error(0.05)
    assert found.found / found.effects > 0.4


def test_resampled_trials_need_the_correction(calibration: ModuleType) -> None:
    trials = 500
    corrected, plain = calibration.Tally("", 3, 5), calibration.Tally("", 3, 5)
    for values, truth in calibration.resampled(np.random.default_rng(0), trials, 3, 5):
        corrected.add(values, truth, correction=60 / 240)
        plain.add(values, truth)
    assert corrected.coverage > 0.95 - 3.5 * error(0.95, trials)
    assert corrected.rate < 0.05 + 3.5 * error(0.05, trials)
    assert plain.coverage < 0.95 - 3.5 * error(0.95, trials)


def test_the_benchmark_notices_a_missing_correction_for_many_arms(
    calibration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "holm", list)
    found = tally(calibration, "normal", 3, 5)
    assert found.rate > calibration.FALSE_POSITIVES[1] and not found.passed


def test_the_benchmark_notices_intervals_for_many_seeds_used_on_few(
    calibration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def normal(values: np.ndarray, baseline: np.ndarray, *, correction: float) -> Estimate:
        d = values - baseline
        mean, deviation = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
        p = 2 * scipy.stats.norm.sf(abs(mean) / deviation)
        return Estimate(mean, mean - 1.96 * deviation, mean + 1.96 * deviation, p, len(d))

    monkeypatch.setattr(calibration, "paired_difference", normal)
    found = tally(calibration, "normal", 3, 5, trials=500)
    assert found.coverage < calibration.COVERAGE[0] and not found.passed


def test_trials_from_a_pool(calibration: ModuleType) -> None:
    accuracies = np.random.default_rng(0).normal(0.9, 0.01, (200, 6)) + np.linspace(0, 0.1, 200)[:, None]
    corrected, plain = calibration.real(accuracies, 500, 5, 2)
    assert plain.trials == 500 and abs(plain.rate - 0.05) < 3.5 * error(0.05, 500)
    assert plain.rate + plain.coverage == pytest.approx(1)  # one rival: each false positive is an interval without 0
    assert corrected.rate < plain.rate and corrected.passed


def test_the_pool_is_of_real_trainings(calibration: ModuleType) -> None:
    accuracies = [[calibration.train(split, seed, epochs=2) for seed in (0, 1)] for split in (0, 1)]
    assert np.min(accuracies) > 0.5 and np.max(accuracies) < 1
    assert len(np.unique(accuracies)) > 2
    assert calibration.train(1, 1, epochs=2) == accuracies[1][1]


def test_the_command(
    calibration: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "FALSE_POSITIVES", calibration.ALL)  # 20 trials say nothing about rates
    monkeypatch.setattr(calibration, "COVERAGE", calibration.ALL)
    assert calibration.main(["--trials", "20"]) == 0
    assert "All requirements met" in capsys.readouterr().out
    monkeypatch.setattr(calibration, "COVERAGE", (0.999, 0.9991))
    assert calibration.main(["--trials", "20"]) == 1
    printed = capsys.readouterr().out
    assert "OUTSIDE" in printed and "NOT met" in printed
