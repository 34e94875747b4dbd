"""The merging task: its models, its metrics, its errors, and the claims' settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from equipoise.comparison import compare
from equipoise.errors import ArgumentError
from equipoise.merging.baselines import GreedySoup, TaskArithmetic, WeightAveraging
from equipoise.merging.claims_pcb_merging import CLAIMS, GRIDS, MeanMerge, OwnMerge
from equipoise.merging.pcb_merging import PCBMerging
from equipoise.merging.task import VIEWS, Merge, prepared
from equipoise.testing.compare import snapshot

SMALL: dict[str, Any] = {"hidden": 16, "pretrain_steps": 60, "head_steps": 40, "steps": 40, "lr": 1e-3}


def test_views_of_an_image() -> None:
    images = torch.tensor([[[[1.0, 2], [3, 4]]]])
    labels = torch.tensor([7])
    assert VIEWS["rotate"](images, labels)[0].tolist() == [[[[2, 4], [1, 3]]]]
    assert VIEWS["invert"](images, labels)[0].tolist() == [[[[-1, -2], [-3, -4]]]]
    assert VIEWS["parity"](images, labels)[1].tolist() == [1]
    assert VIEWS["upright"](images, labels) == (images, labels)


def test_models_of_a_seed_are_made_once_and_not_written_to() -> None:
    task = Merge(**SMALL)
    made = prepared(task, 3)
    before = snapshot([made.trunk.state_dict(), made.sources])
    for method, config in ((WeightAveraging, {}), (PCBMerging, {"pcb-merging.ratio": 0.3}), (GreedySoup, {})):
        assert task.run(method, config, 3).metrics["last"] == task.run(method, config, 3).metrics["last"]
    assert prepared(task, 3) is made
    after = snapshot([made.trunk.state_dict(), made.sources])
    assert all(
        torch.equal(x, y) for x, y in zip(*(torch.utils._pytree.tree_leaves(s) for s in (before, after)), strict=True)
    )
    state = torch.get_rng_state()
    prepared(task, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_are_relative_to_the_single_models() -> None:
    task = Merge(tasks=("upright", "invert"), **SMALL)
    made = prepared(task, 0)
    result = task.run(WeightAveraging, {}, 0)
    mean = {name: (made.sources[0][name] + made.sources[1][name]) / 2 for name in made.sources[0]}
    trunk = copy.deepcopy(made.trunk)
    trunk.load_state_dict(mean)
    found = made.accuracies(trunk, "test")
    metrics = result.metrics["last"]
    assert metrics["test_accuracy"] == pytest.approx(sum(found) / 2, abs=0.003)
    single = made.single["test"]
    assert metrics["test_normalised_accuracy"] == pytest.approx(
        sum(a / b for a, b in zip(found, single, strict=True)) / 2, abs=0.01
    )
    assert metrics["test_worst_accuracy"] == pytest.approx(min(found), abs=0.003)
    assert metrics["test_single_accuracy"] == pytest.approx(sum(single) / 2)
    assert result.counted == "last" and result.sizes["test"] == 359


def test_no_coefficient_is_the_base() -> None:
    task = Merge(**SMALL)
    made = prepared(task, 0)
    base = made.accuracies(made.trunk, "test")
    found = task.run(TaskArithmetic, {"task-arithmetic.coefficient": 0.0}, 0).metrics["last"]
    assert found["test_accuracy"] == sum(base) / len(base)


def test_another_data_set_may_be_a_task() -> None:
    task = Merge(tasks=("upright", "digits"), **SMALL)
    made = prepared(task, 0)
    assert made.data["test"][1].inputs.shape[1:] == made.data["test"][0].inputs.shape[1:]  # type: ignore[union-attr]
    assert made.classes == [10, 10]


def test_a_comparison_runs() -> None:
    found = compare(Merge(**SMALL), seeds=2, configs=2, out="out", measure_time=False)
    assert {arm.name for arm in found.arms} == {Merge.baseline, *Merge.methods}
    assert found.failed == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ("upright",)}, "at least 2 different tasks"),
        ({"tasks": ("upright", "upright")}, "at least 2 different tasks"),
        ({"tasks": ("upright", "rotat")}, "Did you mean 'rotate'"),
        ({"hidden": 0}, "hidden"),
        ({"lr": 0.0}, "lr"),
        ({"validation": 1.0}, "validation"),
        ({"pretrain_examples": 5_000}, "pretrain_examples = 5000: must leave rows"),
        ({"train_examples": 5_000}, "train_examples = 5000: must be at most"),
        ({"dataset": "wine"}, "must be images with classes"),
        ({"tasks": ("upright", "diabetes")}, "must be images with classes"),
    ],
)
def test_bad_settings_are_refused_before_any_run(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Merge.make(**settings).check()


def test_the_claims_arms_are_tuned_alike() -> None:
    assert {len(grid) for name, grid in GRIDS.items() if name.startswith(("PCB", "TIES"))} == {40}
    assert {claim.id for claim in CLAIMS} == {"pcb_merging", "pcb_merging-own-validation", "pcb_merging-ties"}
    task = OwnMerge(**SMALL)
    own = task.run(PCBMerging, {"grid": "PCB sum"}, 0).metrics["last"]
    fixed = [
        MeanMerge(**SMALL).run(PCBMerging, c, 0).metrics["last"]["validation_accuracy"] for c in GRIDS["PCB sum"][::13]
    ]
    assert own["validation_accuracy"] >= max(fixed)
