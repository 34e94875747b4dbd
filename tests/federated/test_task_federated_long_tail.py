"""The federated long-tail task: the tail, who holds what, personal accuracy, the user's own data, and a small comparison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from equipoise import catalogue, compare
from equipoise.errors import ArgumentError

pytest.importorskip("flwr")

from equipoise.federated.algorithm import predict
from equipoise.federated.ccvr import CCVR
from equipoise.federated.fedloge import HEAD, FedLoGe, LoGeHead, local_logits
from equipoise.federated.fedspeed import FedAvg, FedProx
from equipoise.federated.task_long_tail import FederatedLongTail, personal_accuracy

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"rounds": 3, "epochs": 1, "clients": 5, "hidden": 16}
CONFIG = {"lr": 0.2, "weight_decay": 1e-4, "fedloge.etf_steps": 50, "fedloge.norm": 3.0}


def test_the_catalogue_knows_task_and_methods() -> None:
    assert catalogue.find("task", "federated-long-tail").load() is FederatedLongTail
    assert catalogue.find("method", "ccvr").load() is CCVR and catalogue.find("method", "fedloge").load() is FedLoGe


# -- data -------------------------------------------------------------------------------------------------------------
def test_the_union_is_a_tail_in_a_drawn_order_and_is_dealt_out_once() -> None:
    task = FederatedLongTail(**SMALL, ratio=20.0)
    problem = task.problem(0)
    counts = problem.extra["counts"]
    assert counts.max() / counts.min() == pytest.approx(20, rel=0.15)
    assert counts.sort(descending=True).values.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts.tolist() != sorted(counts.tolist(), reverse=True)  # the order is drawn
    assert counts.argsort().tolist() != task.problem(1).extra["counts"].argsort().tolist()
    rows = torch.cat(problem.extra["parts"])
    assert len(rows.unique()) == len(rows) == int(counts.sum()) < len(problem.train)
    shares = problem.extra["shares"]
    assert shares.shape == (5, 10) and torch.allclose(shares.sum(1), torch.ones(5).double())
    for part, mine in zip(problem.extra["parts"], shares, strict=True):
        assert set(problem.train.targets[part].tolist()) == set(mine.nonzero().squeeze(1).tolist())
    again = task.problem(0)
    assert all(torch.equal(a, b) for a, b in zip(problem.extra["parts"], again.extra["parts"], strict=True))
    assert torch.bincount(problem.test.targets).min() > 30  # the judge's rows stay balanced


def test_ratio_of_one_leaves_the_data_as_they_are() -> None:
    problem = FederatedLongTail(**SMALL, ratio=1.0).problem(0)
    assert int(problem.extra["counts"].sum()) == len(problem.train)


# -- personal accuracy ------------------------------------------------------------------------------------------------
def test_personal_accuracy_by_hand() -> None:
    logits = torch.tensor([[9.0, 1, 0], [9, 1, 0], [2, 1, 9], [0, 1, 9]])
    targets = torch.tensor([0, 1, 1, 2])
    shares = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64)
    # Class 2 is absent: row 2 becomes class 0. Class 0 is always right, class 1 never.
    assert personal_accuracy(logits, targets, shares) == pytest.approx(0.25)
    shares = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    assert personal_accuracy(logits, targets, shares) == pytest.approx(0.5 * 0.5 + 0.5 * 1.0)
    only = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert personal_accuracy(logits, targets, only) == 1.0
    assert math.isnan(personal_accuracy(logits[:1], targets[:1], only))


def test_a_run_measures_the_global_and_the_personal_models() -> None:
    task = FederatedLongTail(**SMALL)
    result = task.run(FedAvg, CONFIG, 0)
    last = result.metrics["last"]
    assert result.counted == "last" and result.sizes["train"] == 1079
    assert last["test_global_accuracy"] == last["test_balanced_accuracy"]
    problem = task.problem(0)
    model = task.train(problem, FedAvg, CONFIG, 0).model
    logits, targets = predict(model, problem.test)
    each = [personal_accuracy(logits, targets, shares) for shares in problem.extra["shares"]]
    assert last["test_personal_accuracy"] == pytest.approx(sum(each) / 5, abs=1e-6)
    assert last["test_worst_client_accuracy"] == pytest.approx(min(each), abs=1e-6)
    order = problem.extra["counts"].argsort(descending=True, stable=True)
    recall = [float((logits[targets == c].argmax(1) == c).double().mean()) for c in order]
    assert last["test_accuracy_head"] == pytest.approx(sum(recall[:3]) / 3)
    assert last["test_accuracy_tail"] == pytest.approx(sum(recall[-3:]) / 3)
    assert "test_realigned_accuracy" not in last
    assert all(0 <= record["test_personal_accuracy"] <= 1 for record in result.curve)
    assert task.run(FedAvg, CONFIG, 0).metrics == result.metrics


def test_fedloge_is_judged_by_the_clients_own_models() -> None:
    task = FederatedLongTail(**SMALL)
    problem = task.problem(0)
    expected: dict[int, float] = {}

    class Spied(FedLoGe):
        def personal_logits(self, client: Any, data: Any) -> Any:
            logits, targets = super().personal_logits(client, data)
            if data is not client.data and len(targets) == len(problem.test):
                head = client.model.head
                assert isinstance(head, LoGeHead)
                features = client.model.eval().forward_features(data.inputs)
                own = client.state[HEAD]["weight"], client.state[HEAD]["bias"]
                shares = problem.extra["shares"][client.number]
                mine = local_logits(features, (head.auxiliary.weight, head.auxiliary.bias), own, shares > 0)
                torch.testing.assert_close(logits, mine.detach())
                expected[client.number] = personal_accuracy(logits, targets, shares)
            return logits, targets

    last = task.run(Spied, CONFIG, 0).metrics["last"]
    assert last["test_personal_accuracy"] == pytest.approx(sum(expected.values()) / 5, abs=1e-6)
    assert last["test_personal_accuracy"] > last["test_global_accuracy"]
    assert 0 <= last["test_realigned_accuracy"] <= 1
    assert task.build_method(FedLoGe, {}).etf_steps == 1000
    assert task.build_method(FedLoGe, CONFIG).etf_steps == 50


def test_calibration_is_judged_too() -> None:
    task = FederatedLongTail(**SMALL)
    config = {**CONFIG, "ccvr.num_per_class": 100, "ccvr.lr": 0.05}
    plain, calibrated = (task.run(method, config, 0).metrics["last"] for method in (FedAvg, CCVR))
    assert calibrated["test_global_accuracy"] > plain["test_global_accuracy"] + 0.05
    assert task.run(FedProx, {**CONFIG, "fedprox.mu": 0.0}, 0).metrics["last"] == plain


def test_costs_and_sanity() -> None:
    task = FederatedLongTail(**{**SMALL, "rounds": 1})
    costs = [task.cost(method, CONFIG, 0) for method in (FedAvg, FedLoGe)]
    assert costs[0] is not None and costs[1] is not None
    assert 1 < costs[1].flops / costs[0].flops < 1.2  # two heads
    assert task.cost(FedLoGe, CONFIG, 0) == costs[1]
    assert all(passed for _, passed, _ in task.sanity(0))
    assert any("Personal accuracy" in remark for remark in task.check())


# -- the user's own data ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", [None, "site"])
def test_own_data_stay_as_they_are(tmp_path: Path, column: str | None) -> None:
    rng = np.random.default_rng(0)
    x, site = rng.normal(size=(200, 3)), rng.choice(["berlin", "lyon", "oslo"], 200)
    state = np.where(x[:, 0] > 1, "ill", "well")
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "site": site, "state": state})
    frame.to_csv(tmp_path / "own.csv", index=False)
    given: dict[str, Any] = {"data": str(tmp_path / "own.csv"), "target": "state", "clients": "3", "rounds": "2"}
    task = FederatedLongTail.make(**given, **({"client-column": column} if column else {}))
    assert isinstance(task, FederatedLongTail) and task.ratio == 1.0
    task.check()
    problem = task.problem(0)
    assert int(problem.extra["counts"].sum()) == len(problem.train)
    for method in (FedLoGe, CCVR):
        last = task.run(method, CONFIG, 0).metrics["last"]
        assert last["test_personal_accuracy"] > 0.6


def test_bad_settings() -> None:
    with pytest.raises(ArgumentError, match="ratio"):
        FederatedLongTail(ratio=0.5)
    with pytest.raises(ArgumentError, match="alpha"):
        FederatedLongTail(alpha=0.0)


def test_a_small_comparison(tmp_path: Path) -> None:
    task = FederatedLongTail(**{**SMALL, "rounds": 2})
    found = compare(task, ["fedprox"], configs=1, seeds=2, out=tmp_path, measure_time=False)
    assert [arm.name for arm in found.arms] == ["fedavg", "fedprox"]
    assert (found.runs().status == "done").all()
