"""The tiny task: what is kept, what is counted, the user's own data and model, and a small comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from equipoise import catalogue, compare
from equipoise.errors import ArgumentError

pytest.importorskip("flwr")

from equipoise.federated.fedspeed import FedAvg
from equipoise.federated.fedtiny import FedTiny, MagnitudeMask, RandomMask, magnitude_mask
from equipoise.federated.task_tiny import FederatedTiny, count, layer_positions
from equipoise.training import Examples

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"rounds": 3, "clients": 4, "hidden": 16, "density": 0.2}
CONFIG = {"lr": 0.1, "weight_decay": 1e-3}
TOTAL, WEIGHTS = 64 * 16 + 16 * 16 + 16 * 10 + 2 * 16 * 3 + 10, (64 * 16, 16 * 16, 16 * 10)


def test_the_catalogue_knows_task_and_methods() -> None:
    assert catalogue.find("task", "federated-tiny").load() is FederatedTiny
    for method in (FedTiny, MagnitudeMask, RandomMask):
        assert catalogue.find("method", method.name).load() is method


def test_default_settings_are_checked_and_sane() -> None:
    task = FederatedTiny()
    assert any("keep 1331 of 26634 parameters" in remark for remark in task.check())
    assert all(passed for _, passed, _ in task.sanity(0))


@pytest.mark.parametrize("method", [MagnitudeMask, RandomMask, FedTiny, FedAvg])
def test_a_run_measures_everything(method: Any) -> None:
    task = FederatedTiny(**SMALL)
    result = task.run(method, CONFIG, 0)
    for which in ("last", "best"):
        found = result.metrics[which]
        assert 0 <= found["test_accuracy"] <= 1 and found["test_left_out"] == 0
        expected = 1.0 if method is FedAvg else int(0.2 * TOTAL) / TOTAL
        assert found["test_density"] == pytest.approx(expected, abs=4 / TOTAL)
        for name in ("client_kilobytes", "megabytes_up", "megabytes_down", "training_megaflops"):
            assert found[f"test_{name}"] > 0
    assert task.run(method, CONFIG, 0).metrics == result.metrics


def test_fedtiny_is_told_density_and_schedule_and_may_be_told_otherwise() -> None:
    task = FederatedTiny(**{**SMALL, "rounds": 20})
    made = task.build_method(FedTiny, {})
    assert isinstance(made, FedTiny) and (made.density, made.interval, made.t_stop) == (0.2, 1, 15)
    other = task.build_method(FedTiny, {"fedtiny.interval": 2, "fedtiny.alpha": 0.5})
    assert isinstance(other, FedTiny) and (other.interval, other.alpha) == (2, 0.5)
    assert task.build_method(RandomMask, {}).settings() == {"density": 0.2, "distribution": "erk"}
    assert FederatedTiny(**{**SMALL, "rounds": 1}).build_method(FedTiny, {}).settings()["t_stop"] == 1


# -- what is counted --------------------------------------------------------------------------------------------------
def test_positions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    examples = Examples(torch.zeros(7, 1, 8, 8), torch.zeros(7, dtype=torch.int64), num_classes=3)
    assert layer_positions(model, examples) == {"0.weight": 64, "2.weight": 4, "4.weight": 1}


def test_counts_by_hand() -> None:
    params = {"0.weight": torch.randn(10, 40), "0.bias": torch.zeros(10), "1.weight": torch.randn(5, 10)}
    masks = {"0.weight": magnitude_mask(params["0.weight"], 0.1), "1.weight": magnitude_mask(params["1.weight"], 0.5)}
    positions, drawn, kept = {"0.weight": 4, "1.weight": 1}, [[30, 6], [30]], 40 + 10 + 25
    forward = 2 * (40 * 4 + 25)
    weights = 4 * kept + 50 + 7  # a bit a place: 400 and 50 of them
    fixed = count(MagnitudeMask(0.2), params, masks, positions, drawn, 2)
    assert fixed == pytest.approx(
        {
            "density": 75 / 460,
            "client_kilobytes": (weights + 4 * kept) / 1e3,
            "training_megaflops": 66 * 2 * 3 * forward / 1e6,
        }
    )
    method = FedTiny(0.2, interval=1, t_stop=100, alpha=0.4, dev_size=8)
    moving = count(method, params, masks, positions, drawn, 2)
    due = [method.due(round, masks) for round in (1, 2)]
    assert due[0] == {"1.weight": 10} and list(due[1]) == ["0.weight"]
    k = due[1]["0.weight"]
    assert moving["client_kilobytes"] == pytest.approx((weights + 4 * 400 + 12 * k) / 1e3)
    more = 8 * (2 * forward + 2 * 50) + 6 * (2 * forward + 2 * 50) + 8 * (2 * forward + 2 * 400 * 4)
    assert moving["training_megaflops"] == pytest.approx(fixed["training_megaflops"] + more / 1e6)
    dense = count(FedAvg(), params, None, positions, drawn, 2)
    assert dense["density"] == 1 and dense["client_kilobytes"] == pytest.approx(8 * 460 / 1e3)
    assert dense["training_megaflops"] == pytest.approx(66 * 2 * 3 * 2 * (400 * 4 + 50) / 1e6)


# -- the user's own ---------------------------------------------------------------------------------------------------
def own_data(path: Path, rows: int = 200) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3))
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2]})
    frame.assign(site=rng.choice(["berlin", "oslo"], rows), state=np.where(x[:, 0] > 0, "ill", "well")).to_csv(
        path, index=False
    )
    return path


def test_own_data(tmp_path: Path) -> None:
    path = own_data(tmp_path / "own.csv")
    task = FederatedTiny.make(
        data=str(path), target="state", **{"client-column": "site"}, density="0.6", rounds="8", hidden="16"
    )
    assert isinstance(task, FederatedTiny)
    task.check()
    result = task.run(FedTiny, CONFIG, 0)
    assert result.metrics["last"]["test_accuracy"] > 0.7


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tiny_model.py").write_text(
        "from torch import nn\n\n\ndef make(input_shape, num_outputs):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_outputs))\n"
    )
    monkeypatch.chdir(tmp_path)
    task = FederatedTiny(**{**SMALL, "rounds": 1}, model="my_tiny_model:make")
    task.check()
    result = task.run(FedTiny, CONFIG, 0)
    assert result.metrics["last"]["test_density"] == pytest.approx(0.2, abs=0.01)
    assert result.metrics["last"]["test_left_out"] == 0


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ArgumentError, match="density"):
        FederatedTiny(density=density)


def test_a_density_that_leaves_no_weights_is_refused_before_any_run() -> None:
    with pytest.raises(ArgumentError, match="must exceed"):
        FederatedTiny(density=0.01).check()


def test_a_small_comparison(tmp_path: Path) -> None:
    task = FederatedTiny(**{**SMALL, "rounds": 1, "clients": 2})
    found = compare(task, ["random-mask", "fedtiny"], configs=1, seeds=2, out=tmp_path, measure_time=False)
    runs = found.runs()
    assert (runs.status == "done").all()
    assert {arm.name for arm in found.arms} == {"magnitude-mask", "random-mask", "fedtiny"}
    assert (runs["last.test_density"].dropna() < 0.21).all()
