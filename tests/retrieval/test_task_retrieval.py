"""The retrieval task: data of disjoint classes, the cosine classifier, the metrics it reports, and a comparison."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise
from equipoise.comparison.claims import Claim
from equipoise.comparison.report import render
from equipoise.data import RawData, load
from equipoise.errors import ArgumentError, DataError, MissingDependencyError
from equipoise.retrieval import (
    TCM,
    ArcFace,
    NormalisedSoftmax,
    Retrieval,
    baselines,
    claims_tcm,
    open_world,
    retrieval_metrics,
)
from equipoise.retrieval.claims import CLAIMS
from equipoise.retrieval.claims_tcm import ROTATIONS, WORLD, ContrastiveBase, Rotations
from equipoise.retrieval.open_world import rotated, split_classes
from equipoise.retrieval.task import CosineClassifier, Embedder, scaled_cross_entropy
from equipoise.training import Loader

torch.set_num_threads(1)
CONFIG = {"lr": 1e-3, "weight_decay": 1e-4, "scale": 16.0, "early_stopping": False}
SMALL: dict[str, Any] = {
    "dataset": "open-world",
    "classes": 20,
    "epochs": 2,
    "embedding": 8,
    "evaluation_size": 10,
    "batch_size": 40,
}


# -- data -------------------------------------------------------------------------------------------------------------
def test_the_generated_world_follows_its_definition() -> None:
    raw = open_world(3, classes=6, per_class=400)
    assert raw.inputs.shape == (2400, 1, 64) and raw.targets.bincount().tolist() == [400] * 6
    assert raw.inputs.abs().max() < 1.4  # tanh, and little noise
    assert torch.equal(raw.inputs, open_world(3, 6, 400).inputs)
    assert not torch.equal(raw.inputs, open_world(4, 6, 400).inputs)
    # Without the nuisance classes would differ in spread by more; they differ even so.
    spreads = torch.stack([raw.inputs[raw.targets == c].std(0).mean() for c in range(6)])
    assert spreads.max() / spreads.min() > 1.03
    for bad, name in (({"classes": 1}, "classes"), ({"per_class": 1}, "per_class")):
        with pytest.raises(ValueError, match=f"{name} = 1: must be an integer >= 2"):
            open_world(0, **bad)


def test_rotations_are_classes_and_no_image_occurs_twice() -> None:
    raw = load("digits")
    turned = rotated(raw, 5)
    assert turned.num_classes == 40 and len(turned) == len(raw) == 1797
    assert turned.class_names is not None and turned.class_names[7] == "1, 270 degrees"
    assert turned.targets.bincount(minlength=40).min() > 25
    for i in range(20):
        original, turns = divmod(int(turned.targets[i]), 4)
        assert original == raw.targets[i]
        assert torch.equal(turned.inputs[i], torch.rot90(raw.inputs[i], turns, (1, 2)))
    assert not torch.equal(turned.targets, rotated(raw, 6).targets)


def test_a_test_set_of_its_own_joins_in() -> None:
    part = RawData("images", "image", torch.rand(12, 1, 4, 4), torch.arange(12) % 3, ("a", "b", "c"))
    whole = RawData(part.name, part.kind, part.inputs, part.targets, part.class_names, test=part)
    assert len(rotated(whole, 0)) == 24


@pytest.mark.parametrize("name", ["wine", "mnist1d", "diabetes"])
def test_other_embedded_data_are_refused(name: str) -> None:
    with pytest.raises(
        ArgumentError, match=f"dataset = '{name}': must be 'open-world' or hold square images in classes"
    ):
        Retrieval(dataset=name).check()


@pytest.mark.parametrize("settings", [{}, {"dataset": "open-world"}])
def test_the_splits_share_no_class(settings: dict[str, Any]) -> None:
    task = Retrieval(**settings)
    problem = task.problem(1)
    parts = [set(part.targets.tolist()) for part in (problem.train, problem.validation, problem.test)]
    assert [len(p) for p in parts] == ([55, 15, 30] if settings else [22, 6, 12])
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    assert parts[0] == set(range(problem.num_outputs))
    assert max(problem.test.targets.bincount()) == 40 and max(problem.validation.targets.bincount()) == 40
    again, other = task.problem(1), task.problem(2)
    assert torch.equal(again.test.inputs, problem.test.inputs)
    assert not torch.equal(other.test.inputs, problem.test.inputs)
    name, passed, text = task.sanity(1)[0]
    assert name == "no leakage between splits" and passed, text


def test_the_labels_belong_to_their_rows() -> None:
    raw = RawData("x", "sequence", torch.arange(60.0).reshape(60, 1, 1), torch.arange(60) % 12, tuple("abcdefghijkl"))
    problem = split_classes(raw, 0, 0.25, 0.25, 3)
    classes: dict[int, set[int]] = {}
    for part, size in ((problem.train, 5), (problem.validation, 3), (problem.test, 3)):
        for x, y in zip(part.inputs.flatten().tolist(), part.targets.tolist(), strict=True):
            classes.setdefault(y, set()).add(int(x) % 12)
        assert set(part.targets.bincount().tolist()) <= {0, size}
    assert sorted(classes) == list(range(12)) and all(len(found) == 1 for found in classes.values())
    assert {found.pop() for found in classes.values()} == set(range(12))
    assert len(split_classes(raw, 0, 0.25, 0.25, None).test) == 15


def table(path: Path, classes: int = 12, each: int = 6) -> Path:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    frame = pd.DataFrame(rng.normal(size=(len(labels), 4)) + labels[:, None], columns=list("abcd"))
    frame["colour"] = np.where(labels % 2, "red", "blue")
    frame["item"] = [f"item {k}" for k in labels]
    frame.to_csv(path, index=False)
    return path


def test_own_tables(tmp_path: Path) -> None:
    path = table(tmp_path / "items.csv")
    task = Retrieval.make(data=str(path), target="item", epochs="1", embedding="4")
    task.check()
    assert task.resampled
    problem = task.problem(0)
    assert problem.input_shape == (6,) and problem.num_outputs == 6
    assert problem.train.inputs.mean(0)[:4].abs().max() < 1e-5  # measured on the training rows, and on no others
    assert problem.test.inputs.mean(0)[:4].abs().max() > 0.1
    result = task.run(NormalisedSoftmax, CONFIG, 0)
    assert 0 <= result.metrics["last"]["test_recall_at_1"] <= 1
    assert "data_sha256" in task.fingerprint()


def test_integers_name_classes_however_many(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(30.0), 4)
    pd.DataFrame({"x": np.random.default_rng(0).normal(size=120), "label": labels}).to_csv(tmp_path / "n.csv")
    assert Retrieval(data=str(tmp_path / "n.csv")).problem(0).num_outputs == 30 - 4 - 9


def test_own_images(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
        for i in range(4):
            side = 6 + i % 2
            Image.fromarray(rng.integers(0, 255, (side, side), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    task = Retrieval.make(data=str(tmp_path), image_size="8", model="cnn", epochs="1", validation="0.2", embedding="4")
    assert task.problem(0).input_shape == (1, 8, 8)
    assert task.run(NormalisedSoftmax, CONFIG, 0).sizes == {"train": 20, "validation": 8, "test": 12}


def test_bad_data_are_one_clear_error(tmp_path: Path) -> None:
    few = table(tmp_path / "few.csv", classes=5)
    with pytest.raises(
        ArgumentError, match=r"few.csv: 5 classes give 2 to train, 1 to validate and 2 to test on.*at least 2 each"
    ):
        Retrieval(data=str(few), target="item", test=0.4).check()
    frame = pd.read_csv(table(tmp_path / "one.csv"))
    frame.loc[0, "item"] = "alone"
    frame.to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(DataError, match=r"1 of 13 classes of 'item' have fewer than .*'alone' \(1\)"):
        Retrieval(data=str(tmp_path / "one.csv"), target="item").check()
    with pytest.raises(ArgumentError, match="2 classes give 1 to train, 0 to validate and 1 to test on"):
        Retrieval(dataset="open-world", classes=2).check()


# -- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimise": "recall"}, "optimise = 'recall': must be one of 'recall_at_1', 'map_at_r', 'opis'"),
        ({"dataset": "cub"}, "dataset = 'cub': must be one of 'open-world'"),
        ({"validation": 1.0}, r"validation = 1.0: must be a number in \(0, 1\)"),
        ({"shared_low": 1.2}, r"shared_high = 1.0: must be a number in \(1.2, 2\]"),
        ({"shared_high": 2.5}, r"shared_high = 2.5"),
        ({"evaluation_size": 1}, "evaluation_size = 1: must be an integer >= 2"),
        ({"per_class": 0}, "per_class = 0"),
        ({"embedding": 0}, "embedding = 0"),
        ({"target": "item"}, "describe a file of your own"),
        ({"image_size": 8}, "describe a file of your own"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Retrieval(**settings)


def test_the_metric_is_a_setting() -> None:
    by = {name: Retrieval(optimise=name) for name in ("recall_at_1", "map_at_r", "opis")}
    assert [(t.metric, t.higher_is_better, t.percent) for t in by.values()] == [
        ("recall_at_1", True, True),
        ("map_at_r", True, True),
        ("opis", False, False),
    ]
    assert Retrieval().metric == "map_at_r"
    sent = pickle.loads(pickle.dumps(by["opis"]))  # to other processes
    assert (sent.metric, sent.higher_is_better) == ("opis", False) and sent == by["opis"]


def test_missing_peers_are_left_out_with_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.retrieval import task as module

    monkeypatch.setattr(module, "installed", lambda: False)
    assert Retrieval().entrants() == ("tcm", "contrastive-penalty")
    (remark,) = Retrieval(**SMALL).check()
    assert "did not take part" in remark and "equipoise[peers]" in remark
    monkeypatch.setattr(module, "installed", lambda: True)
    assert set(Retrieval().entrants()) == set(Retrieval.methods) and Retrieval(**SMALL).check() == []
    monkeypatch.setattr(baselines, "installed", lambda: False)
    with pytest.raises(MissingDependencyError, match="arcface needs"):
        Retrieval(**SMALL).build_method(ArcFace, CONFIG)


# -- the model and a run ----------------------------------------------------------------------------------------------
def test_the_head_gives_cosines() -> None:
    head = CosineClassifier(4, 3, seed=1)
    embeddings = torch.randn(5, 4)
    embeddings[0] = 0
    expected = F.normalize(embeddings, dim=1) @ F.normalize(head.weight, dim=1).T
    torch.testing.assert_close(head(embeddings), expected)
    assert torch.equal(head(embeddings)[0], torch.zeros(3)) and head.weight.abs().max() <= 0.5
    assert torch.equal(CosineClassifier(4, 3, 1).weight, head.weight)
    loss = scaled_cross_entropy(head(embeddings), torch.tensor([0, 1, 2, 0, 1]), 8.0)
    torch.testing.assert_close(loss, F.cross_entropy(8 * expected, torch.tensor([0, 1, 2, 0, 1])))


def test_a_run_is_normalised_softmax_on_class_batches() -> None:
    task = Retrieval(**SMALL)
    problem = task.problem(0)
    model = task.build_model(problem, 0)
    assert isinstance(model, Embedder) and model.get_classifier() is model.head
    sizes = [tuple(p.shape) for p in model.body.parameters()]
    assert sizes == [(256, 64), (256,), (8, 256), (8,)]
    options = task.fit_options(problem, CONFIG)
    assert (
        options["batch_size"] == 40
        and Retrieval(**{**SMALL, "batch_size": 999}).fit_options(problem, CONFIG)["batch_size"]
        == 4 * problem.num_outputs
    )
    seen: list[torch.Tensor] = []

    class Look(NormalisedSoftmax):
        name = "look"

        def penalty(self, run: Any, batch: Any, output: Any) -> torch.Tensor:
            seen.append(batch.targets)
            torch.testing.assert_close(
                run.task_loss(output.prediction, batch.targets),
                F.cross_entropy(CONFIG["scale"] * output.prediction, batch.targets),
            )
            return output.prediction.new_zeros(())

    result = task.run(Look, CONFIG, 0)
    assert all(sorted(targets.bincount().tolist())[-10:] == [4] * 10 for targets in seen)
    assert result.trained and result.counted == "last" and len(result.curve) == 2
    assert set(result.metrics["last"]) == {
        f"{part}_{name}" for part in ("validation", "test") for name in retrieval_metrics(*EYE, (0.6, 1.0))
    }


EYE = (torch.eye(3)[torch.arange(6) % 3], torch.arange(6) % 3)


def test_what_is_measured_are_the_embeddings() -> None:
    task = Retrieval(**SMALL)
    problem = task.problem(0)
    model = task.build_model(problem, 0)
    run = equipoise.start(copy.deepcopy(model), lambda p: torch.optim.SGD(p, lr=0.1), num_classes=problem.num_outputs)
    embeddings, labels = task.predict(run, Loader(problem.test, 64))
    with torch.no_grad():
        torch.testing.assert_close(embeddings, model.body(problem.test.inputs))
    assert torch.equal(labels, problem.test.targets)
    expected = retrieval_metrics(embeddings, labels, (0.6, 1.0))
    measured = task.measure(problem, {"validation": (embeddings, labels), "test": (embeddings, labels)})
    assert {f"test_{name}": value for name, value in expected.items()}.items() <= measured.items()
    assert not task.learned(problem, {"validation_recall_at_1": 0.0})
    assert task.learned(problem, {"validation_recall_at_1": 0.9})
    run.inference_model = nn.Linear(3, 3)
    with pytest.raises(ArgumentError, match="inference_model = 'Linear': must be an Embedder"):
        task.predict(run, Loader(problem.test, 64))


def own_encoder(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[-1], num_outputs))


def test_a_model_of_ones_own_gives_the_embedding() -> None:
    task = Retrieval(**SMALL, model=f"{__name__}:own_encoder")
    model = task.build_model(task.problem(0), 0)
    assert model.body[1].out_features == 8
    assert task.run(TCM, CONFIG, 0).metrics["last"]["test_opis"] >= 0


def wide_encoder(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return own_encoder(input_shape, num_outputs + 1)


def test_a_model_of_another_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"wide_encoder': its output has shape \(2, 9\) .* must be \(2, 8\)"):
        Retrieval(**SMALL, model=f"{__name__}:wide_encoder").check()


def test_a_small_comparison(tmp_path: Path) -> None:
    methods = ["tcm", *(["proxy-anchor"] if baselines.installed() else [])]
    trial = equipoise.compare(
        "retrieval", methods, settings=SMALL, seeds=2, configs=2, out=tmp_path, measure_time=False
    )
    assert trial.metric == "map_at_r" and {arm.name for arm in trial.arms} >= {"normalised-softmax", *methods}
    finals = trial.runs().query("kind == 'final'")
    assert (finals.status == "done").all() and finals["last.test_opis"].between(0, 0.25).all()
    assert 'id="trade-off"' in render(trial)  # OPIS against recall


# -- the claims -------------------------------------------------------------------------------------------------------
def test_the_claims_are_well_formed() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS) and {claim.number for claim in CLAIMS} == {37}
    for claim in CLAIMS:
        assert isinstance(claim, Claim) and claim.seeds >= 5
        names = [name for name, _, _ in claim.arms]
        assert claim.method in names and claim.reference in names
    assert Retrieval(**WORLD).problem(0).num_outputs == 60 and len(Retrieval(**WORLD).problem(0).test) == 900


@pytest.mark.skipif(not baselines.installed(), reason="pytorch-metric-learning is missing")
def test_the_contrastive_base_trains_embeddings() -> None:
    task = ContrastiveBase(**SMALL)
    assert task.run(TCM, CONFIG, 0).trained


def test_the_rotations_hold_new_images_of_seen_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_tcm, "TRAIN_IMAGES", 20)
    task = Rotations(**{**ROTATIONS, "dataset": "digits", "evaluation_size": 10, "epochs": 1})
    problem = task.problem(0)
    seen = problem.extra["seen"]
    assert problem.num_outputs == 22
    assert problem.train.targets.bincount().tolist() == [20] * 22 and seen.targets.bincount().tolist() == [10] * 22
    trained = {row.numpy().tobytes() for row in problem.train.inputs}
    assert not any(row.numpy().tobytes() in trained for row in seen.inputs)
    assert 0 <= task.run(TCM, CONFIG, 0).metrics["last"]["seen_opis"] <= 0.25
