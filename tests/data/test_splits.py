"""Splits: disjoint, stratified, reproducible, and preprocessed with training rows only."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from equipoise.data import RawData, leakage, load, split
from equipoise.data.preprocessing import MAX_CATEGORIES, TablePreprocessor
from equipoise.errors import ArgumentError


def images(n: int = 200, classes: int = 4, test: int | None = None) -> RawData:
    rng = torch.Generator().manual_seed(n)
    names = tuple("abcdefghij"[:classes])
    official = images(test, classes) if test else None
    return RawData(
        "toy", "image", torch.rand(n, 3, 4, 4, generator=rng), torch.arange(n) % classes, names, test=official
    )


def table(frame: pd.DataFrame, targets: Tensor | None = None) -> RawData:
    targets = torch.arange(len(frame)) % 2 if targets is None else targets
    return RawData("table", "table", frame, targets, ("no", "yes"))


def test_parts_are_disjoint_and_complete() -> None:
    raw = images()
    parts = split(raw, 0)
    rows = torch.cat([parts.train_rows, parts.validation_rows, parts.test_rows])
    assert rows.sort().values.tolist() == list(range(200))
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (120, 40, 40)
    assert parts.input_shape == (3, 4, 4) and parts.num_classes == parts.num_outputs == 4
    assert torch.equal(parts.train.targets, raw.targets[parts.train_rows])
    assert isinstance(raw.inputs, Tensor) and isinstance(parts.test.inputs, Tensor)
    assert torch.equal(parts.test.inputs, raw.inputs[parts.test_rows])
    assert parts.description.startswith("toy: 120 training, 40 validation, 40 test")


def test_a_seed_gives_one_split_and_touches_no_global_state() -> None:
    raw, state = images(), np.random.get_state(legacy=False)["state"]["key"].sum()  # noqa: NPY002
    assert torch.equal(split(raw, 7).train_rows, split(raw, 7).train_rows)
    assert not torch.equal(split(raw, 7).train_rows, split(raw, 8).train_rows)
    assert np.random.get_state(legacy=False)["state"]["key"].sum() == state  # noqa: NPY002
    assert len({tuple(split(raw, s).test_rows.tolist()) for s in range(20)}) == 20


def test_classes_keep_their_shares() -> None:
    targets = torch.tensor([0] * 700 + [1] * 250 + [2] * 47 + [3] * 3)
    raw = RawData("tail", "image", torch.rand(1000, 1, 2, 2), targets, tuple("abcd"))
    for seed in range(10):
        parts = split(raw, seed, train_examples=300)
        for part in (parts.train, parts.validation, parts.test):
            counts = torch.bincount(part.targets, minlength=4)
            expected = torch.tensor([0.7, 0.25, 0.047, 0.003]) * len(part)
            assert (counts - expected).abs().max() <= 1.5


def test_every_row_is_equally_likely_to_be_tested() -> None:
    raw, counts, seeds = images(40), torch.zeros(40), 1500
    for seed in range(seeds):
        counts[split(raw, seed).test_rows] += 1
    assert (counts / seeds - 0.2).abs().max() < 4.5 * (0.2 * 0.8 / seeds) ** 0.5


def test_official_test_set_is_used_whole() -> None:
    raw = images(100, test=30)
    parts = split(raw, 0, validation=0.1, test=0.5)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (90, 10, 30)
    assert parts.test_rows.tolist() == list(range(30))
    assert raw.test is not None and torch.equal(parts.test.targets, raw.test.targets)
    assert "own test set" in parts.description


def test_fewer_training_examples_are_a_subset_of_more() -> None:
    raw = images()
    few, more = split(raw, 3, train_examples=20), split(raw, 3, train_examples=80)
    assert set(few.train_rows.tolist()) < set(more.train_rows.tolist())
    assert torch.bincount(few.train.targets).tolist() == [5, 5, 5, 5]
    assert torch.equal(few.test_rows, more.test_rows) and torch.equal(few.validation_rows, more.validation_rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0}, "validation = 0"),
        ({"test": 1.0}, "test = 1.0"),
        ({"validation": 0.5, "test": 0.5}, "leave examples to train on"),
        ({"train_examples": 121}, "at most 120"),
        ({"train_examples": 2}, r"class '.' has no example.*Raise train_examples"),
        ({"train_examples": 0}, "train_examples = 0"),
    ],
)
def test_impossible_splits_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        split(images(), 0, **settings)  # type: ignore[arg-type]


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ArgumentError, match="seed"):
        split(images(), -1)


def test_regression_has_no_classes() -> None:
    parts = split(load("diabetes"), 0)
    assert parts.num_classes is None and parts.num_outputs == 1
    assert parts.train.targets.dtype == torch.float32 and "regression" in parts.description


def test_standardise_uses_training_rows() -> None:
    raw = images()
    parts = split(raw, 0, standardise=True)
    assert (
        isinstance(parts.train.inputs, Tensor)
        and isinstance(parts.test.inputs, Tensor)
        and isinstance(raw.inputs, Tensor)
    )
    assert parts.train.inputs.mean((0, 2, 3)).abs().max() < 1e-5
    assert (parts.train.inputs.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    train = raw.inputs[parts.train_rows]
    expected = (raw.inputs[parts.test_rows] - train.mean((0, 2, 3), keepdim=True)) / train.std(
        (0, 2, 3), correction=0, keepdim=True
    )
    torch.testing.assert_close(parts.test.inputs, expected)


def test_standardise_leaves_a_constant_channel_finite() -> None:
    raw = RawData("flat", "image", torch.ones(20, 1, 2, 2), torch.arange(20) % 2, ("a", "b"))
    parts = split(raw, 0, standardise=True)
    assert isinstance(parts.train.inputs, Tensor) and not parts.train.inputs.any()


# -- tables -----------------------------------------------------------------------------------------------------------
def test_numbers_are_imputed_and_scaled_with_training_rows_only() -> None:
    frame = pd.DataFrame({"a": np.arange(50.0), "b": np.arange(50.0) ** 2})
    frame.loc[::7, "a"] = np.nan
    raw = table(frame)
    parts = split(raw, 1)
    train = frame.iloc[parts.train_rows.numpy()]
    filled = train.fillna(train.median())
    expected = (frame.iloc[parts.test_rows.numpy()].fillna(train.median()) - filled.mean()) / filled.std(ddof=0)
    torch.testing.assert_close(parts.test.inputs, torch.tensor(expected.to_numpy(), dtype=torch.float32))
    assert isinstance(parts.train.inputs, Tensor)
    assert parts.train.inputs.mean(0).abs().max() < 1e-6


def test_test_rows_do_not_influence_the_preprocessing() -> None:
    frame = pd.DataFrame({"a": np.arange(50.0), "c": list("xyzxy") * 10})
    parts = split(table(frame), 2)
    changed = frame.copy()
    changed.loc[parts.test_rows.numpy(), "a"] *= 1000
    changed.loc[parts.test_rows.numpy(), "c"] = "new"
    other = split(table(changed), 2)
    assert isinstance(parts.train.inputs, Tensor) and isinstance(other.train.inputs, Tensor)
    assert torch.equal(parts.train.inputs, other.train.inputs)
    assert torch.equal(parts.validation.inputs, other.validation.inputs)  # type: ignore[arg-type]


def test_categories_become_one_hot_and_unknown_ones_zero() -> None:
    train = pd.DataFrame({"city": ["A", "B", "A", None], "flag": [True, False, True, True], "n": [1, 2, 3, 4]})
    preprocessor = TablePreprocessor().fit(train)
    assert preprocessor.transform(train)[:, 1:].tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1]]
    new = pd.DataFrame({"n": [2.5, np.nan], "flag": [False, None], "city": ["Z", None]})
    assert preprocessor.transform(new).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 1]]


def test_nullable_and_categorical_types() -> None:
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None, 3], dtype="Int64"),
            "b": pd.array([True, None, False], dtype="boolean"),
            "c": pd.Categorical(["x", None, "y"]),
            "s": pd.array(["u", None, "u"], dtype="string"),
        }
    )
    rows = TablePreprocessor().fit(frame).transform(frame)
    assert rows.shape == (3, 1 + 2 + 2 + 1) and torch.isfinite(rows).all()


@pytest.mark.parametrize("kind", ["number", "text"])
def test_a_column_without_any_training_value(kind: str) -> None:
    empty = pd.Series([np.nan] * 4) if kind == "number" else pd.Series([None] * 4, dtype=object)
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "e": empty})
    preprocessor = TablePreprocessor().fit(frame)
    later = pd.DataFrame({"a": [1.0], "e": [5.0] if kind == "number" else ["text"]})
    assert torch.isfinite(preprocessor.transform(frame)).all()
    assert torch.isfinite(preprocessor.transform(later)).all()


def test_many_categories_share_a_column() -> None:
    frame = pd.DataFrame({"id": [f"name {i}" for i in range(1000)]})
    assert TablePreprocessor().fit(frame).transform(frame).shape == (1000, MAX_CATEGORIES)


def test_groups_travel_with_the_examples() -> None:
    frame = pd.DataFrame({"a": np.arange(40.0)})
    groups = pd.DataFrame({"sex": ["f", "m"] * 20, "old": [True, True, False, None] * 10})
    raw = RawData("g", "table", frame, torch.arange(40) % 2, ("no", "yes"), groups)
    parts = split(raw, 0)
    assert parts.group_names == ("f, False", "f, True", "m, (missing)", "m, True")
    for part, rows in ((parts.train, parts.train_rows), (parts.test, parts.test_rows)):
        names = [parts.group_names[g] for g in part.extras["group"].tolist()]
        assert [name.split(", ")[0] for name in names] == groups["sex"].iloc[rows.numpy()].tolist()
    assert split(images(), 0).group_names == () and not split(images(), 0).train.extras


def test_leakage_counts_test_rows_seen_before() -> None:
    raw = images(100, test=10)
    assert raw.test is not None and isinstance(raw.inputs, Tensor) and isinstance(raw.test.inputs, Tensor)
    assert leakage(split(raw, 0)) == 0
    raw.test.inputs[:3] = raw.inputs[[5, 50, 50]]
    assert leakage(split(raw, 0)) == 3
    zeros = RawData("z", "image", torch.zeros(20, 1, 1, 1), torch.arange(20) % 2, ("a", "b"))
    zeros.inputs[::2] = -0.0
    assert leakage(split(zeros, 0)) == 4
