"""The multimodal task: its data, models and metrics, on embedded and on the user's own data, and a small comparison."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_multimodal_data import pictures, table, write
from torch import nn

from equipoise import compare
from equipoise.errors import ArgumentError, DataError
from equipoise.multimodal import (
    ARL,
    ConcatFusion,
    GatedFusion,
    Joint,
    Multimodal,
    MultimodalNet,
    SumFusion,
    Unimodal,
    make_net,
)
from equipoise.training.metrics import accuracy

torch.set_num_threads(1)
CONFIG: dict[str, Any] = {"lr": 0.05, "weight_decay": 1e-4, "early_stopping": False}
SMALL: dict[str, Any] = {"epochs": 2, "hidden": 8, "features": 4}


# -- the models -------------------------------------------------------------------------------------------------------
def test_net_takes_modalities_by_name() -> None:
    net = make_net({"left": (1, 8, 4), "right": (1, 8, 4)}, 10, seed=1)
    inputs = {name: torch.randn(3, 1, 8, 4) for name in ("left", "right")}
    output = net(**inputs)
    assert output.prediction is output.fused and output.fused.shape == (3, 10)
    assert [tuple(u.shape) for u in output.unimodal] == [(3, 10), (3, 10)]
    assert all(name.startswith(("encoders.left.", "encoders.right.", "fusion.fc.")) for name in net.state_dict())
    for given in ({"left": inputs["left"]}, {**inputs, "depth": inputs["left"]}):
        with pytest.raises(ArgumentError, match="must hold the modalities left, right, one tensor for each"):
            net(**given)


def test_net_is_seeded_and_leaves_the_global_generator() -> None:
    shapes = {"a": (3,), "b": (2, 5)}
    state = torch.get_rng_state()
    first, second, other = (make_net(shapes, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.fusion.fc.weight, other.fusion.fc.weight)


@pytest.mark.parametrize(("fusion", "kind"), [("concat", ConcatFusion), ("sum", SumFusion), ("gated", GatedFusion)])
def test_every_fusion_and_encoder(fusion: str, kind: type[nn.Module]) -> None:
    net = make_net({"a": (1, 6, 6), "b": (3,)}, 4, encoder="cnn", fusion=fusion, features=6)
    assert isinstance(net.fusion, kind)
    assert net(a=torch.randn(5, 1, 6, 6), b=torch.randn(5, 3)).fused.shape == (5, 4)


@pytest.mark.parametrize("name", ["two words", "self", "items", "1st", "weight-a"])
def test_names_that_cannot_be_arguments(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"modality = {name!r}: must be a word"):
        MultimodalNet({name: nn.Linear(2, 2), "b": nn.Linear(2, 2)}, SumFusion([2, 2], 2))


def test_bad_nets() -> None:
    with pytest.raises(ArgumentError, match="hold at least 2 modalities"):
        MultimodalNet({"a": nn.Linear(2, 2)}, SumFusion([2, 2], 2))
    with pytest.raises(ArgumentError, match="encoder = 'rnn': must be one of 'mlp', 'cnn'"):
        make_net({"a": (2,), "b": (2,)}, 2, encoder="rnn")
    with pytest.raises(ArgumentError, match=r"fusion = 'concta'.*Did you mean 'concat'"):
        make_net({"a": (2,), "b": (2,)}, 2, fusion="concta")
    with pytest.raises(ArgumentError, match="exactly 2 widths"):
        make_net({"a": (2,), "b": (2,), "c": (2,)}, 2, fusion="gated")


# -- the problem ------------------------------------------------------------------------------------------------------
def test_problem_of_digits() -> None:
    task = Multimodal()
    one, again, other = task.problem(1), task.problem(1), task.problem(2)
    assert list(one.train.inputs) == ["left", "right"]  # type: ignore[arg-type]
    assert [len(part) for part in (one.train, one.validation, one.test)] == [1079, 359, 359]
    assert one.extra["input_shapes"] == {"left": (1, 8, 4), "right": (1, 8, 4)} and one.num_outputs == 10
    for name in ("left", "right"):
        assert torch.equal(one.train.inputs[name], again.train.inputs[name])  # type: ignore[index, call-overload]
        assert not torch.equal(one.train.inputs[name], other.train.inputs[name])  # type: ignore[index, call-overload]
    assert task.check() == [] and task.resampled


def test_noise_is_what_was_asked_for() -> None:
    clean, noisy = Multimodal(noise=(0.0, 0.0)).problem(0), Multimodal(noise=(0.5, 1.5)).problem(0)
    for part in ("train", "validation", "test"):
        for name, deviation in (("left", 0.5), ("right", 1.5)):
            noise = getattr(noisy, part).inputs[name] - getattr(clean, part).inputs[name]
            assert noise.std().item() == pytest.approx(deviation, rel=0.03) and abs(noise.mean()) < 0.05
    assert Multimodal.make(noise="0.5, 1.5") == Multimodal(noise=(0.5, 1.5))
    assert Multimodal().noise == Multimodal.make(noise="none").noise == (0.2, 0.6)


def test_fourier_views_and_fewer_examples() -> None:
    problem, whole = (Multimodal(views="fourier", train_examples=count).problem(0) for count in (50, None))
    assert list(problem.train.inputs) == ["pixels", "spectrum"] and len(problem.train) == 50  # type: ignore[arg-type]
    for name in problem.test.inputs:
        assert torch.equal(problem.test.inputs[name], whole.test.inputs[name])  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": "thirds"}, "views = 'thirds': must be one of 'halves', 'fourier'"),
        ({"fusion": "attention"}, "fusion = 'attention'"),
        ({"model": "resnet"}, "model = 'resnet': must be one of 'mlp', 'cnn'"),
        ({"noise": "a lot,1"}, r"noise = 'a lot': must be a number in \[0, inf\)"),
        ({"noise": "0.1,-1"}, "noise = -1.0"),
        ({"target": "y", "images": "x"}, "target, images: describe a file of your own; give data='file.csv' as well"),
        ({"validation": 1.0}, r"validation = 1.0: must be a number in \(0, 1\)"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Multimodal.make(**settings)


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"noise = \(0.1,\): must give one number for each of left, right"):
        Multimodal(noise=(0.1,)).check()
    with pytest.raises(ArgumentError, match="must be views of images"):
        Multimodal(dataset="iris").check()
    frame = table()
    frame["y"] = np.linspace(0, 1, len(frame))
    with pytest.raises(ArgumentError, match="has a continuous target; multimodal needs classes"):
        Multimodal(data=str(write(tmp_path, frame)), target="y", modalities="a;b").check()
    frame = table()
    frame["y"] = 0
    with pytest.raises(DataError, match="'y' has one class only"):
        Multimodal(data=str(write(tmp_path, frame)), target="y", modalities="a;b").check()
    with pytest.raises(ArgumentError, match="modality = 'my-a': must be a word"):
        Multimodal(data=str(write(tmp_path, table())), target="y", modalities="my-a=a_1;b").check()


# -- metrics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [Joint, Unimodal])
def test_metrics_of_the_prediction_and_of_each_modality(method: Any) -> None:
    task = Multimodal(**SMALL)
    kept: dict[str, Any] = {}

    class Keeping(Multimodal):
        def examine(self, problem: Any, run: Any) -> dict[str, float]:
            kept["run"], kept["problem"] = run, problem
            return {}

    found = Keeping(**SMALL).run(method, CONFIG, 0).metrics["last"]
    run, problem = kept["run"], kept["problem"]
    output = run.model.eval()(**problem.test.inputs)
    prediction, _ = run.predict(problem.test)
    assert found["test_accuracy"] == pytest.approx(accuracy(prediction, problem.test.targets))
    for name, logits in zip(("left", "right"), output.unimodal, strict=True):
        assert found[f"test_accuracy_{name}"] == pytest.approx(accuracy(logits, problem.test.targets))
    if method is Unimodal:
        assert found["test_accuracy"] == found[f"test_accuracy_{('left', 'right')[run.inference_model.modality]}"]
    assert {"test_balanced_accuracy", "validation_accuracy_right", "test_nll"} <= found.keys()
    assert task.run(method, CONFIG, 0).metrics["last"] == found


def test_ensembles_average_prediction_and_modalities() -> None:
    config = {**CONFIG, "compute": "ensemble", "compute_ratio": 2.0}
    found = Multimodal(**SMALL).run(Joint, config, 0).metrics["last"]
    assert {"test_accuracy", "test_accuracy_left", "test_accuracy_right"} <= found.keys()


# -- the user's own ---------------------------------------------------------------------------------------------------
def own(folder: Path, rows: int = 60, **changes: Any) -> Multimodal:
    path = write(folder, table(rows))
    return Multimodal(data=str(path), target="y", **{"modalities": "a;b", "batch_size": 16, **SMALL, **changes})


def test_own_table_and_images(tmp_path: Path) -> None:
    task = own(tmp_path)
    assert task.noise is None
    assert task.check() == ["Columns that belong to no modality are not used: colour, note, file."]
    assert task.run(ARL, CONFIG, 0).sizes["train"] == 36
    pictured = own(
        tmp_path,
        modalities=None,
        images=str(pictures(tmp_path, 60)),
        image_column="file",
        model="cnn",
        noise=(0.0, 0.1),
    )
    assert pictured.check() == []
    metrics = pictured.run(ARL, CONFIG, 0).metrics["last"]
    assert {"test_accuracy_table", "test_accuracy_image"} <= metrics.keys()
    before = pictured.fingerprint()
    assert {"data_sha256", "images_sha256"} <= before.keys()
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    assert pictured.fingerprint() != before


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_towers", raising=False)
    (tmp_path / "my_towers.py").write_text(
        textwrap.dedent(
            """
            import torch
            from equipoise.multimodal import MultimodalNet, SumFusion

            def build(input_shapes, num_outputs):
                encoders = {name: torch.nn.Linear(*shape, 3) for name, shape in input_shapes.items()}
                return MultimodalNet(encoders, SumFusion([3] * len(encoders), num_outputs))

            class Early(torch.nn.Module):
                def __init__(self, input_shapes, num_outputs):
                    super().__init__()
                    self.head = torch.nn.Linear(sum(shape[0] for shape in input_shapes.values()), num_outputs)

                def forward(self, **inputs):
                    return self.head(torch.cat(list(inputs.values()), 1))

            def wrong(input_shape, num_outputs):
                return None
            """
        )
    )
    task = own(tmp_path, model="my_towers:build")
    task.check()
    assert isinstance(task.build_model(task.problem(0), 0).fusion, SumFusion)
    assert "test_accuracy_a" in task.run(ARL, CONFIG, 0).metrics["last"]
    early = own(tmp_path, model="my_towers:Early")  # no unimodal logits: joint training works, ARL says what it needs
    assert "test_accuracy_a" not in early.run(Joint, CONFIG, 0).metrics["last"]
    with pytest.raises(ArgumentError, match="must hold the encoders of at least 2 modalities"):
        early.run(ARL, CONFIG, 0)
    with pytest.raises(ArgumentError, match="must take input_shapes and num_outputs"):
        own(tmp_path, model="my_towers:wrong").check()


# -- all of it --------------------------------------------------------------------------------------------------------
def test_a_small_comparison(tmp_path: Path) -> None:
    settings = {**SMALL, "train_examples": 60}
    found = compare("multimodal", settings=settings, seeds=2, configs=1, measure_time=False, out=tmp_path)
    assert {arm.name: arm.baseline for arm in found.arms if arm.baseline} == {"joint": True}
    assert {"arl", "aux", "aux-scaled", "ogm-ge", "unimodal"} <= {arm.name for arm in found.arms}
    finals = found.runs().query("kind == 'final'")
    assert found.failed == 0 and finals["last.test_accuracy_left"].notna().all()
