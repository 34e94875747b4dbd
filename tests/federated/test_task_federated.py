"""The federated task: who holds which rows, what is measured, the user's own data, and a small comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from equipoise import catalogue, compare
from equipoise.errors import ArgumentError, DataError

pytest.importorskip("flwr")

from equipoise.federated.algorithm import predict
from equipoise.federated.fedspeed import SCAFFOLD, FedAvg, FedSpeed
from equipoise.federated.task import FederatedTask

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"rounds": 3, "epochs": 1, "clients": 5, "fraction": 0.4, "hidden": 8}
CONFIG = {"lr": 0.1, "weight_decay": 1e-3}


def test_the_catalogue_knows_task_and_methods() -> None:
    assert catalogue.find("task", "federated").load() is FederatedTask
    for slug in ("fedavg", "fedprox", "scaffold", "fedsam", "fedspeed"):
        assert catalogue.find("method", slug).load().name == slug


def test_default_settings_are_checked_and_sane() -> None:
    task = FederatedTask()
    assert any("20 clients" in remark for remark in task.check())
    assert all(passed for _, passed, _ in task.sanity(0))


@pytest.mark.parametrize("partition", ["dirichlet", "shards", "iid"])
def test_a_run_measures_everything(partition: str) -> None:
    task = FederatedTask(**SMALL, partition=partition)
    result = task.run(FedSpeed, {**CONFIG, "fedspeed.prox": 0.2}, 0)
    last = result.metrics["last"]
    for name in ("accuracy", "balanced_accuracy", "nll", "client_accuracy", "worst_client_accuracy"):
        assert last[f"validation_{name}"] >= 0 and last[f"test_{name}"] >= 0
    assert last["test_worst_client_accuracy"] <= last["test_client_accuracy"]
    assert last["test_megabytes_up"] == last["test_megabytes_down"] > 0 and last["test_left_out"] == 0
    assert len(result.curve) == 3 and result.sizes == {"train": 1079, "validation": 359, "test": 359}
    assert task.run(FedSpeed, {**CONFIG, "fedspeed.prox": 0.2}, 0).metrics == result.metrics


def test_client_accuracy_weighs_classes_by_the_clients_shares() -> None:
    task = FederatedTask(**SMALL)
    problem = task.problem(0)
    model = task.build_model(problem, 0)
    logits, targets = predict(model, problem.test)
    right = logits.argmax(1) == targets
    found = task.client_accuracy(problem, problem.test, logits)
    for client, rows in enumerate(problem.extra["parts"]):
        labels = problem.train.targets[rows]
        expected = sum(float(right[targets == c].double().mean()) * int((labels == c).sum()) for c in labels.unique())
        assert float(found[client]) == pytest.approx(expected / len(rows))


def test_rounds_to_the_target() -> None:
    easy = FederatedTask(**SMALL, target_accuracy=0.0).run(FedAvg, CONFIG, 0)
    never = FederatedTask(**SMALL, target_accuracy=1.0).run(FedAvg, CONFIG, 0)
    assert easy.metrics["last"]["test_rounds_to_target"] == 1 and never.metrics["last"]["test_rounds_to_target"] == 4


def test_scaffold_sends_twice_as_much_down() -> None:
    last = FederatedTask(**SMALL).run(SCAFFOLD, CONFIG, 0).metrics["last"]
    assert last["test_megabytes_down"] == pytest.approx(2 * last["test_megabytes_up"])


def test_compute_goes_into_local_epochs() -> None:
    task = FederatedTask(**SMALL)
    once, twice = (
        task.cost(FedAvg, {**CONFIG, **more}, 0) for more in ({}, {"compute_ratio": 2.0, "compute": "epochs"})
    )
    assert once is not None and twice is not None and twice.flops == 2 * once.flops
    speed = task.cost(FedSpeed, CONFIG, 0)
    assert speed is not None and speed.flops == 2 * once.flops
    assert task.step_seconds(FedAvg, CONFIG, 0) > 0


def own_data(path: Path, rows: int = 160) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3))
    site = rng.choice(["berlin", "lyon", "oslo"], rows, p=[0.5, 0.3, 0.2])
    y = np.where(x[:, 0] + 0.3 * (site == "oslo") > 0, "ill", "well")
    pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "site": site, "state": y}).to_csv(path, index=False)
    return path


def test_own_data_by_column(tmp_path: Path) -> None:
    path = own_data(tmp_path / "own.csv")
    task = FederatedTask.make(
        data=str(path), target="state", **{"client-column": "site"}, rounds="5", fraction="1.0", epochs="2"
    )
    assert isinstance(task, FederatedTask) and task.partition == "column"
    task.check()
    problem = task.problem(0)
    assert len(problem.extra["parts"]) == 3 and problem.input_shape == (3,)  # the column is no input
    for rows in problem.extra["parts"]:
        assert len(problem.train.extras["group"][rows].unique()) == 1
    result = task.run(FedAvg, CONFIG, 0)
    assert result.metrics["last"]["test_accuracy"] > 0.7
    logits, targets = predict(task.build_model(problem, 0), problem.test)
    own = task.client_accuracy(problem, problem.test, logits)
    right, site = logits.argmax(1) == targets, problem.test.extras["group"]
    expected = [float(right[site == value].double().mean()) for value in problem.extra["values"]]
    assert own.tolist() == pytest.approx(expected)


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_federated_model.py").write_text(
        "from torch import nn\n\n\ndef make(input_shape, num_outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_outputs))\n"
    )
    monkeypatch.chdir(tmp_path)
    task = FederatedTask(**SMALL, model="my_federated_model:make")
    task.check()
    assert "model_source" in task.fingerprint()
    assert isinstance(task.build_model(task.problem(0), 0), nn.Sequential)


def test_a_small_comparison(tmp_path: Path) -> None:
    found = compare(FederatedTask(**SMALL), ["fedspeed"], configs=1, seeds=2, out=tmp_path, measure_time=False)
    runs = found.runs()
    assert (runs.status == "done").all()
    names = {arm.name for arm in found.arms}
    assert {
        "fedavg",
        "fedspeed",
        "2x fedavg",
    } <= names  # two gradients a step meet a baseline with twice the local epochs


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"partition": "random"}, "partition"),
        ({"fraction": 0.01}, "draws none of 20 clients"),
        ({"clients": 0}, "clients"),
        ({"rounds": 0}, "rounds"),
        ({"target": "y"}, "give data='file.csv'"),
        ({"partition": "column"}, "client_column"),
        ({"data": "x.csv", "client_column": "site", "partition": "iid"}, "client_column"),
        ({"lr_decay": 0.0}, "lr_decay"),
        ({"validation": 0.0}, "validation"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        FederatedTask(**settings)


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="continuous target"):
        FederatedTask(dataset="diabetes").check()
    path = own_data(tmp_path / "own.csv")
    with pytest.raises(DataError, match="site = 'berlin' has 55 training rows in seed 0, fewer than least = 60"):
        FederatedTask(data=str(path), target="state", client_column="site", least=60).check()
    with pytest.raises(ArgumentError, match="draws of 1079 rows of 10 classes left a client with fewer"):
        FederatedTask(least=100, alpha=0.05, clients=10).check()
    frame = pd.read_csv(path)
    frame.loc[frame.site == "oslo", "state"] = "ill"
    frame.to_csv(path, index=False)
    settings: dict[str, Any] = {"data": str(path), "target": "state", "client_column": "site"}
    with pytest.raises(
        DataError, match="site = 'oslo' has 1 of the classes in its training rows in seed 0, fewer than least_classes"
    ):
        FederatedTask(**settings).check()
    assert any("1 of them hold one class" in remark for remark in FederatedTask(**settings, least_classes=1).check())


def test_least_classes_of_drawn_clients() -> None:
    loose, strict = FederatedTask(), FederatedTask(least_classes=3)
    fewest = []
    for task in (loose, strict):
        problem = task.problem(0)
        fewest.append(min(len(problem.train.targets[rows].unique()) for rows in problem.extra["parts"]))
    assert fewest[0] < 3 <= fewest[1]
    with pytest.raises(DataError, match=r"client \d+ has 1 of the classes in its training rows in seed 0"):
        FederatedTask(partition="shards", shards=1, least_classes=2).problem(0)
