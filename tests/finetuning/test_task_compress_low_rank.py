"""The compression task: its pre-training, what each arm is given, sizes and costs, the user's own data and model, bad input."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from equipoise.comparison import Arm, compare
from equipoise.data import load, split
from equipoise.errors import ArgumentError, DataError
from equipoise.finetuning.baselines import FullFinetuning
from equipoise.finetuning.compression_baselines import LowRankScratch, SVDDistill, SVDFinetune, SVDOnly
from equipoise.finetuning.pela import PELA, LowRankLinear, compress
from equipoise.finetuning.task_compress_low_rank import CompressLowRank, load_weights
from equipoise.models.reference import MLP
from equipoise.training import Method, fit

torch.set_num_threads(1)
QUICK: dict[str, Any] = {"hidden": (32, 32), "ratio": 2.0, "pretrain_steps": 60, "steps": 8, "epochs": 2}
RATES = {"lr": 3e-3, "weight_decay": 1e-4}
COMPRESSED: list[type[Method]] = [SVDFinetune, SVDOnly, SVDDistill, LowRankScratch, PELA]


@pytest.fixture(scope="module")
def task() -> CompressLowRank:
    return CompressLowRank(**QUICK)


# -- the problem of a seed --------------------------------------------------------------------------------------------
def test_training_rows_are_the_first_of_those_of_the_pretraining(task: CompressLowRank) -> None:
    problem = task.problem(0)
    inputs: Any = split(load("digits"), 0).train.inputs
    assert torch.equal(problem.train.inputs, inputs[:200]) and len(problem.train) == 200  # type: ignore[arg-type]
    assert torch.bincount(problem.train.targets).min() >= 19 and problem.extra["training_rows"] == len(inputs)
    small = CompressLowRank(**QUICK, pretrain_examples=50, train_examples=50, validation_examples=30, test_examples=20)
    problem = small.problem(0)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (50, 30, 20)
    assert all(passed for _, passed, _ in task.sanity(0))


def test_every_arm_starts_from_the_pretrained_model(task: CompressLowRank) -> None:
    problem = task.problem(0)
    model, again = task.build_model(problem, 0), task.build_model(problem, 0)
    assert model is not again and model is not problem.extra["pretrained"]
    for p, q in zip(model.parameters(), problem.extra["pretrained"].parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
    assert problem.extra["before"]["test"] > 0.2
    assert task.problem(1).extra["pretrained"] is not problem.extra["pretrained"]


def test_seeds_make_the_same_problem_again(task: CompressLowRank) -> None:
    one, two = task._make(3), task._make(3)
    assert torch.equal(one.test.targets, two.test.targets) and one.extra["before"] == two.extra["before"]
    for p, q in zip(one.extra["pretrained"].parameters(), two.extra["pretrained"].parameters(), strict=True):
        assert torch.equal(p, q)


def test_methods_get_the_ratio_and_the_words_of_the_task() -> None:
    task = CompressLowRank.make(ratio="3", skip="head,embedding", hidden="64,32", model="transformer")
    for method in COMPRESSED:
        settings = task.build_method(method, {}).settings()
        assert (settings["ratio"], settings["skip"]) == (3.0, ("head", "embedding"))
    assert task.build_method(PELA, {"pela.ratio": 4.0, "pela.alpha": 2.0}).settings()["ratio"] == 4.0
    assert task.build_method(FullFinetuning, {}).settings() == {}
    assert task.settings().keys().isdisjoint({"shift", "source"})


# -- a run ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [FullFinetuning, *COMPRESSED])
def test_sizes_costs_and_losses_of_a_run(task: CompressLowRank, method: type[Method]) -> None:
    result = task.run(method, RATES, 0)
    found = result.metrics["last"]
    dense = 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    ranks = (64 * 32 // (2 * 96), 32 * 32 // (2 * 64))
    factors = ranks[0] * 96 + 32 + ranks[1] * 64 + 32 + 32 * 10 + 10
    products = {True: 64 * 32 + 32 * 32 + 320, False: ranks[0] * 96 + ranks[1] * 64 + 320}
    whole = method is FullFinetuning
    assert found["test_parameters"] == (dense if whole else factors)
    assert found["test_flops"] == 2 * products[whole]
    before = task.problem(0).extra["before"]
    for part in ("validation", "test"):
        assert found[f"{part}_accuracy_lost"] == pytest.approx(before[part] - found[f"{part}_accuracy"])
    assert result.sizes["train"] == task.problem(0).extra["training_rows"] and result.counted == "last"
    assert task.cost(method, RATES, 0).inference_parameters == found["test_parameters"]


def test_svd_only_is_the_svd_of_the_pretrained_model(task: CompressLowRank) -> None:
    problem = task.problem(0)
    expected = compress(problem.extra["pretrained"], 2.0, skip=["head"]).eval()
    with torch.no_grad():
        hits = (expected(problem.test.inputs).argmax(1) == problem.test.targets).double().mean().item()
    assert task.run(SVDOnly, RATES, 0).metrics["last"]["test_accuracy"] == pytest.approx(hits)


def test_repair_beats_the_svd_alone_and_training_from_scratch() -> None:
    task = CompressLowRank(hidden=(64, 64), ratio=6.0, pretrain_steps=200)
    accuracy = {
        method: task.run(method, RATES, 0).metrics["last"]["test_accuracy"]
        for method in (SVDOnly, LowRankScratch, SVDFinetune, PELA)
    }
    assert min(accuracy[SVDFinetune], accuracy[PELA]) > max(accuracy[SVDOnly], accuracy[LowRankScratch])


def test_the_compute_matched_baseline_trains_longer_at_the_same_size(task: CompressLowRank) -> None:
    (choice,) = task.matched_space(3.0).values()
    assert choice.at(0.5) == "longer"
    longer = {**RATES, "compute": "longer", "compute_ratio": 3.0}
    plain, more = task.cost(SVDFinetune, RATES, 0), task.cost(SVDFinetune, longer, 0)
    assert more.flops == 3 * plain.flops and more.inference_parameters == plain.inference_parameters


def test_a_transformer() -> None:
    task = CompressLowRank(model="transformer", ratio=2.0, pretrain_steps=2, steps=2, epochs=1)
    (remark,) = task.check()
    assert "of its" in remark and "pre-trained here for 2 steps" in remark
    problem = task.problem(0)
    model: Any = fit(task.build_model(problem, 0), problem.train, epochs=1, methods=[task.build_method(PELA, {})]).model
    assert isinstance(model.blocks[0].attention.query, LowRankLinear) and isinstance(model.head, nn.Linear)
    assert task.run(PELA, RATES, 0).metrics["last"]["test_flops"] > 0


def test_a_trial_end_to_end(tmp_path: Path) -> None:
    task = CompressLowRank(**{**QUICK, "pretrain_steps": 20, "steps": 4})
    arms: Any = [*COMPRESSED, FullFinetuning]
    result = compare(task, arms, seeds=2, configs=1, out=tmp_path, measure_time=False)
    names = {arm.name: arm for arm in result.arms}
    assert {"svd-finetune", *CompressLowRank.methods} <= names.keys()
    assert all(arm.mean is not None for arm in result.arms)
    assert result.trade_off is not None and result.trade_off["x"] == "parameters"
    assert any("at no arm's cost" in remark for remark in result.warnings)
    assert {"last.test_flops", "last.test_accuracy_lost"} <= set(result.runs().columns)


# -- the user's own ---------------------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table, a module of models and weights for one of them, in which the process runs."""
    (tmp_path / "my_models.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def wide(input_shape, num_outputs):
                return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, num_outputs))

            def attention(input_shape, num_outputs):
                layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                return nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (1, 16)), layer, nn.Flatten(), nn.Linear(16, num_outputs))

            def narrow(input_shape, num_outputs):
                return nn.Linear(8, num_outputs)
            """
        )
    )
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 60)
    x = rng.normal(size=(180, 8)) + 2 * np.eye(3, 8)[y]
    rows = "\n".join(",".join([*(f"{v:.4f}" for v in row), f"c{label}"]) for row, label in zip(x, y, strict=True))
    (tmp_path / "mine.csv").write_text(",".join([*"abcdefgh", "kind"]) + "\n" + rows + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_models", raising=False)
    return tmp_path


OWN: dict[str, Any] = {
    "data": "mine.csv",
    "target": "kind",
    "train_examples": 60,
    "steps": 4,
    "epochs": 1,
    "ratio": 2.0,
}


def test_own_data_with_a_model_of_ours(own: Path) -> None:
    task = CompressLowRank(**OWN, hidden=(32, 32), pretrain_steps=30)
    task.check()
    assert task.problem(0).num_outputs == 3 and "data_sha256" in task.fingerprint()
    assert task.run(PELA, RATES, 0).metrics["last"]["test_accuracy"] > 0.5


def test_own_model_pretrained_here(own: Path) -> None:
    task = CompressLowRank(**OWN, model="my_models:wide", pretrain_steps=30)
    (remark,) = task.check()
    assert "1,083" not in remark and "parameters" in remark
    assert task.run(PELA, RATES, 0).metrics["last"]["test_parameters"] < 8 * 40 + 40 * 40 + 120 + 83
    assert "model_source" in task.fingerprint()


def test_own_weights(own: Path) -> None:
    first = CompressLowRank(**OWN, model="my_models:wide", pretrain_steps=30)
    trained = first.problem(0).extra["pretrained"]
    save_file(trained.state_dict(), own / "wide.safetensors")
    task = CompressLowRank(**OWN, model="my_models:wide", weights="wide.safetensors")
    assert task.pretrain_steps == 0
    problem = task.problem(0)
    for p, q in zip(trained.parameters(), problem.extra["pretrained"].parameters(), strict=True):
        assert torch.equal(p, q)
    (remark,) = task.check()
    assert "given pre-trained" in remark and "weights_sha256" in task.fingerprint()


def test_a_model_that_comes_pretrained(own: Path) -> None:
    task = CompressLowRank(**OWN, model="my_models:wide", pretrain_steps=0)
    task.check()
    assert task.run(SVDOnly, RATES, 0).metrics["last"]["test_parameters"] > 0


def test_torch_attention_needs_its_word(own: Path) -> None:
    settings = {**OWN, "model": "my_models:attention", "pretrain_steps": 2}
    with pytest.raises(ArgumentError, match=r"MultiheadAttention.*skip=\['out_proj'\]"):
        CompressLowRank(**settings).check()
    task = CompressLowRank.make(**{**settings, "skip": "out_proj"})
    task.check()
    assert task.run(PELA, RATES, 0).metrics["last"]["test_accuracy"] >= 0


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"steps": 2}, "steps = 2: must be at least epochs = 4"),
        ({"train_examples": 0}, "train_examples"),
        ({"pretrain_steps": -1}, "pretrain_steps"),
        ({"pretrain_steps": 0}, "pretrain_steps = 0.*weights"),
        ({"weights": "w.safetensors", "pretrain_steps": 5}, "pretrain_steps = 5: must be 0"),
        ({"optimizer": "adam"}, "optimizer.*Did you mean 'adamw'"),
        ({"schedule": "step"}, "schedule"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": ("wide",)}, "hidden"),
        ({"skip": "head"}, "skip"),
        ({"target": "kind"}, "target.*data="),
        ({"validation": 0.0}, "validation"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        CompressLowRank(**settings)


def test_settings_of_the_sibling_are_unknown_here() -> None:
    with pytest.raises(ArgumentError, match="shift"):
        CompressLowRank.make(shift="rotate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "diabetes"}, "continuous target"),
        ({"train_examples": 5000}, "train_examples = 5000: must be at most"),
        ({"pretrain_examples": 5000}, "pretrain_examples = 5000: must be at most"),
        ({"hidden": (8, 8)}, "no layer of MLP to compress"),
        ({"ratio": 500.0}, "ratio = 500.0.*no layer"),
        ({"model": "cnn"}, "no layer of ConvNet"),
        ({"model": "mpl"}, "model = 'mpl'"),
    ],
)
def test_what_a_trial_cannot_use_is_refused_before_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        CompressLowRank(**{**QUICK, "pretrain_steps": 1, **settings}).check()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = MLP((8,), 3, (16,), head_bias=True), tmp_path / "w.safetensors"
    state = model.state_dict()
    with pytest.raises(DataError, match="no such file"):
        load_weights(model, path)
    with pytest.raises(DataError, match="pickle"):
        load_weights(model, tmp_path / "w.pt")
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="no safetensors"):
        load_weights(model, path)
    save_file({("heed" + key[4:] if key.startswith("head") else key): v for key, v in state.items()}, path)
    with pytest.raises(DataError, match=r"has no 'head.weight'.*'heed.weight'"):
        load_weights(model, path)
    save_file({**state, "more": torch.ones(1)}, path)
    with pytest.raises(DataError, match="'more', which the model has not"):
        load_weights(model, path)
    save_file(MLP((8,), 3, (17,), head_bias=True).state_dict(), path)
    with pytest.raises(DataError, match=r"shape \(17, 8\), and \(16, 8\)"):
        load_weights(model, path)


def test_a_pipeline_that_cannot_be_compressed_fails_once(own: Path) -> None:
    with pytest.raises(ArgumentError, match="no layer of Linear"):
        compare(
            CompressLowRank(**OWN, model="my_models:narrow", pretrain_steps=2), [Arm(SVDFinetune), Arm(PELA)], out=own
        )
