"""The user's own files: every form that is read, and every kind of bad data with its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from equipoise.data import fingerprint, read, split
from equipoise.errors import ArgumentError, DataError


def frame(n: int = 30) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": np.arange(n) + 20,
            "city": [["Bonn", "Oslo", "Rome"][i % 3] for i in range(n)],
            "member": [i % 2 == 0 for i in range(n)],
            "label": ["yes" if i % 3 else "no" for i in range(n)],
        }
    )


def csv(path: Path, table: pd.DataFrame, **settings: object) -> Path:
    table.to_csv(path, index=False, **settings)  # type: ignore[call-overload]
    return path


def inputs_of(path: Path, **settings: object) -> pd.DataFrame:
    found = read(path, **settings).inputs  # type: ignore[arg-type]
    assert isinstance(found, pd.DataFrame)
    return found


# -- tables -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.tsv", "d.parquet"])
def test_forms_of_a_table_agree(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame().to_parquet(path)
    else:
        csv(path, frame(), sep="\t" if name.endswith(".tsv") else ",")
    raw = read(path, "label")
    assert isinstance(raw.inputs, pd.DataFrame)
    assert raw.name == name and raw.kind == "table" and raw.class_names == ("no", "yes")
    assert raw.targets.tolist() == [int(i % 3 > 0) for i in range(30)]
    assert list(raw.inputs) == ["age", "city", "member"] and raw.inputs["age"].dtype == "float64"
    assert raw.inputs["member"].tolist() == ["True", "False"] * 15
    assert split(raw, 0).input_shape == (1 + 3 + 2,)


@pytest.mark.parametrize("name", ["target", "label", "y"])
def test_target_has_default_names(tmp_path: Path, name: str) -> None:
    path = csv(tmp_path / "d.csv", frame().rename(columns={"label": name}))
    assert read(path).class_names == ("no", "yes")


def test_unknown_target_lists_the_columns(tmp_path: Path) -> None:
    path = csv(tmp_path / "d.csv", frame().rename(columns={"label": "churned"}))
    with pytest.raises(ArgumentError, match=r"target = None.*age, city, member, churned"):
        read(path)
    with pytest.raises(ArgumentError, match=r"target = 'churn'.*Did you mean 'churned'"):
        read(path, "churn")


def test_groups_are_no_inputs(tmp_path: Path) -> None:
    path = csv(tmp_path / "d.csv", frame())
    raw = read(path, "label", ["city", "member"])
    assert raw.groups is not None and list(raw.groups) == ["city", "member"] and list(raw.inputs) == ["age"]
    assert read(path, "label", "city").groups is not None
    with pytest.raises(ArgumentError, match="group = 'town'"):
        read(path, "label", "town")
    with pytest.raises(ArgumentError, match="must not hold the target"):
        read(path, "label", ["label"])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False, True], ("False", "True")),
        ([3, 10, 7], ("3", "7", "10")),
        ([0.0, 1.0, 2.0], ("0", "1", "2")),
        (["b", "a", "c"], ("a", "b", "c")),
    ],
)
def test_class_names_are_sorted(tmp_path: Path, values: Any, names: tuple[str, ...]) -> None:
    raw = read(csv(tmp_path / "d.csv", frame().assign(label=values * 10)))
    assert raw.class_names == names
    assert [names[t] for t in raw.targets[:3].tolist()] == [str(v).removesuffix(".0") for v in values]


def test_regression_is_recognised_or_asked_for(tmp_path: Path) -> None:
    path = csv(tmp_path / "d.csv", frame().assign(label=np.linspace(0, 1, 30)))
    raw = read(path)
    assert raw.class_names is None and raw.targets.dtype == torch.float32
    whole = csv(tmp_path / "w.csv", frame().assign(label=np.arange(30) * 1000))
    with pytest.raises(DataError, match=r"30 of 30 classes.*kind='regression'"):
        read(whole)
    assert read(whole, kind="regression").targets[2] == 2000
    with pytest.raises(ArgumentError, match="kind"):
        read(whole, kind="ranking")
    with pytest.raises(DataError, match="'label' is 'no' in data rows 1, 2, 3, 4, 5 and 25 more"):
        read(csv(tmp_path / "t.csv", frame()), kind="regression")


def test_missing_labels_name_the_rows(tmp_path: Path) -> None:
    table = frame()
    table.loc[[2, 5, 8, 11, 14, 17, 20], "label"] = None
    with pytest.raises(
        DataError, match=r"'label' is missing in data rows 3, 6, 9, 12, 15 and 2 more.*Fill in or remove"
    ):
        read(csv(tmp_path / "d.csv", table))
    table = frame()
    table.loc[4, "label"] = "  "
    with pytest.raises(DataError, match=r"missing in data row 5:"):
        read(csv(tmp_path / "e.csv", table))


@pytest.mark.parametrize("label", ["yes", 1, True])
def test_one_class(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match="one class only"):
        read(csv(tmp_path / "d.csv", frame().assign(label=label)))


def test_constant_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is 2.5 in every row"):
        read(csv(tmp_path / "d.csv", frame().assign(label=2.5)))


@pytest.mark.parametrize("n", [0, 3, 9])
def test_too_few_examples(tmp_path: Path, n: int) -> None:
    with pytest.raises(DataError, match=rf"has {n} examples: at least 10"):
        read(csv(tmp_path / "d.csv", frame().head(n)))


def test_class_too_small_for_every_split(tmp_path: Path) -> None:
    table = frame()
    table.loc[[0, 1], "label"] = "maybe"
    path = csv(tmp_path / "d.csv", table)
    with pytest.raises(DataError, match=r"fewer than 3.*train, validation and test: 'maybe' \(2\)"):
        read(path)
    assert read(path, test=csv(tmp_path / "t.csv", frame())).num_classes == 3


def test_text_in_a_numeric_column(tmp_path: Path) -> None:
    table = frame().astype({"age": object})
    table.loc[6, "age"] = "unknown"
    table.loc[9, "age"] = "?"
    with pytest.raises(
        DataError, match=r"column 'age' is numeric but for 'unknown' in data rows 7, 10.*Correct the value"
    ):
        read(csv(tmp_path / "d.csv", table))
    labels = frame().assign(label=[str(i) for i in range(29)] + ["?"])
    with pytest.raises(DataError, match=r"'label' is '\?' in data row 30"):
        read(csv(tmp_path / "e.csv", labels))


def test_text_with_some_numbers_is_text(tmp_path: Path) -> None:
    table = frame().assign(code=(["V27", "250", "E11"] * 10))
    assert inputs_of(csv(tmp_path / "d.csv", table))["code"].tolist()[:3] == ["V27", "250", "E11"]


def test_missing_inputs_are_imputed_but_infinite_ones_refused(tmp_path: Path) -> None:
    table = frame().astype({"age": float})
    table.loc[[1, 2], "age"] = np.nan
    table.loc[3, "city"] = None
    parts = split(read(csv(tmp_path / "d.csv", table)), 0)
    assert isinstance(parts.train.inputs, Tensor) and torch.isfinite(parts.train.inputs).all()
    table.loc[4, "age"] = np.inf
    with pytest.raises(DataError, match=r"column 'age' is infinite in data row 5"):
        read(csv(tmp_path / "e.csv", table))


def test_types_that_are_neither_numbers_nor_text(tmp_path: Path) -> None:
    cases: Any = (
        ("when", pd.date_range("2024-01-01", periods=30), "column 'when' holds datetime"),
        ("list", [[1, 2]] * 30, "column 'list' holds ndarray"),
    )
    for name, values, message in cases:
        path = tmp_path / f"{name}.parquet"
        frame().assign(**{name: values}).to_parquet(path)
        with pytest.raises(DataError, match=message):
            read(path)


def test_compound_labels(tmp_path: Path) -> None:
    several: Any = [["a", "b"]] * 30
    frame().assign(label=several).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match="column 'label': holds lists"):
        read(tmp_path / "d.parquet")


def test_decimals_are_numbers(tmp_path: Path) -> None:
    from decimal import Decimal

    prices: Any = [Decimal("1.50")] * 29 + [None]
    frame().assign(price=prices).to_parquet(tmp_path / "d.parquet")
    read_back = inputs_of(tmp_path / "d.parquet")["price"]
    assert read_back.dtype == "float64" and read_back[0] == 1.5 and np.isnan(read_back[29])


def test_a_saved_row_number_is_left_out(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "d.csv")
    assert list(inputs_of(tmp_path / "d.csv")) == ["age", "city", "member"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"", "cannot be read as a table"),
        ("d.csv", b"a;label\n1;x\n2;y\n", "one column only"),
        ("d.csv", b'a,label\n1,"x\n', "cannot be read as a table"),
        ("d.csv", b"a,label\n\xff\xfe,x\n", "cannot be read as a table"),
        ("d.csv.gz", b"hello", "cannot be read as a table"),
        ("d.parquet", b"PAR1 damaged", "cannot be read as a table"),
        ("d.npz", b"PK damaged", "cannot be read"),
        ("d.npz", b"", "cannot be read"),
        ("d.xlsx", b"", r"unknown form: must be .csv"),
    ],
)
def test_damaged_and_unknown_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_absent_file_gets_a_suggestion(tmp_path: Path) -> None:
    csv(tmp_path / "customers.csv", frame())
    with pytest.raises(DataError, match=r"no such file.*Did you mean 'customers.csv'"):
        read(tmp_path / "customer.csv")
    with pytest.raises(DataError, match="no such file"):
        fingerprint(tmp_path / "nowhere" / "x.csv")


def test_only_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input columns"):
        read(csv(tmp_path / "d.csv", frame()[["city", "label"]]), "label", "city")


# -- a test file ------------------------------------------------------------------------------------------------------
def test_a_test_file_has_the_training_classes_and_types(tmp_path: Path) -> None:
    train = csv(tmp_path / "a.csv", frame().assign(code=["x1", "2"] * 15))
    other = frame(6).assign(code=[2] * 6, more=0)[["label", "code", "more", "member", "city", "age"]]
    raw = read(train, test=csv(tmp_path / "b.csv", other))
    assert raw.test is not None and raw.test.class_names == raw.class_names
    assert raw.test.targets.tolist() == [0, 1, 1, 0, 1, 1]
    assert isinstance(raw.test.inputs, pd.DataFrame)
    assert list(raw.test.inputs) == ["age", "city", "member", "code"]
    assert raw.test.inputs["code"].tolist() == ["2"] * 6
    parts = split(raw, 0)
    assert len(parts.test) == 6 and len(parts.train) == 24


def test_bad_test_files(tmp_path: Path) -> None:
    train = csv(tmp_path / "a.csv", frame())
    with pytest.raises(DataError, match="no column 'age'"):
        read(train, test=csv(tmp_path / "b.csv", frame().drop(columns="age")))
    with pytest.raises(DataError, match=r"'label' is 'perhaps' in data row 2.*classes are no, yes"):
        read(train, test=csv(tmp_path / "c.csv", frame(3).assign(label=["no", "perhaps", "yes"])))
    with pytest.raises(DataError, match=r"'age' is numeric but for 'old' in data rows 1, 2"):
        read(train, test=csv(tmp_path / "d.csv", frame(3).assign(age=["old", "older", "5"])))
    with pytest.raises(ArgumentError, match="target = 'label'"):
        read(train, test=csv(tmp_path / "e.csv", frame().drop(columns="label")))
    with pytest.raises(DataError, match="no examples"):
        read(train, test=csv(tmp_path / "f.csv", frame(0)))


def test_integer_labels_match_across_types(tmp_path: Path) -> None:
    train = csv(tmp_path / "a.csv", frame().assign(label=[0, 1] * 15))
    assert read(train, test=csv(tmp_path / "b.csv", frame(4).assign(label=[1.0, 0.0, 1.0, 1.0]))).test is not None


# -- reading again ----------------------------------------------------------------------------------------------------
def test_changes_of_the_file_are_seen_and_memory_is_not_shared(tmp_path: Path) -> None:
    path = csv(tmp_path / "d.csv", frame())
    first = read(path)
    first.targets.zero_()
    first.inputs.loc[:, "age"] = -1.0  # type: ignore[union-attr]
    again = read(path)
    assert again.targets.any() and isinstance(again.inputs, pd.DataFrame) and (again.inputs["age"] >= 20).all()
    csv(path, frame(40))
    assert len(read(path)) == 40


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, two = csv(tmp_path / "a.csv", frame()), csv(tmp_path / "b.csv", frame())
    assert fingerprint(one) == fingerprint(two) and len(fingerprint(one)) == 64
    csv(two, frame(31))
    assert fingerprint(one) != fingerprint(two)
    folder = tmp_path / "folder"
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "1").write_text("a")
    before = fingerprint(folder)
    (folder / ".hidden").write_text("b")
    assert fingerprint(folder) == before
    (folder / "x" / "1").rename(folder / "x" / "2")
    assert fingerprint(folder) != before


# -- NPZ --------------------------------------------------------------------------------------------------------------
def test_npz_images_and_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(20) % 2
    path = tmp_path / "d.npz"
    np.savez(path, X=rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8), y=y)
    raw = read(path)
    assert isinstance(raw.inputs, Tensor) and raw.kind == "image" and raw.class_names == ("0", "1")
    assert raw.inputs.shape == (20, 3, 8, 6) and raw.inputs.max() <= 1
    np.savez(path, x=rng.normal(size=(20, 8, 6)), targets=np.array(["a", "b"])[y], site=y)
    raw = read(path, group="site")
    assert isinstance(raw.inputs, Tensor) and raw.inputs.shape == (20, 1, 8, 6) and raw.class_names == ("a", "b")
    assert raw.groups is not None and raw.groups["site"].tolist() == y.tolist()
    np.savez(path, inputs=rng.normal(size=(20, 4)), labels=rng.normal(size=20))
    raw = read(path)
    assert raw.kind == "table" and raw.class_names is None and split(raw, 0).input_shape == (4,)
    np.savez(path, inputs=rng.normal(size=20), quality=y)
    assert split(read(path, "quality"), 0).input_shape == (1,)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((0, 2)), "y": np.zeros(0, dtype=int)}, "has 0 examples"),
        ({"X": np.zeros((20, 2))}, r"target = None.*arrays are X"),
        ({"y": np.zeros(20)}, r"inputs = None.*arrays are y"),
        ({"X": np.zeros((20, 2)), "y": np.eye(20)}, r"'y' has the shape \(20, 20\).*argmax"),
        ({"X": np.zeros((20, 2)), "y": np.zeros(19)}, r"must be \(20,\)"),
        ({"X": np.array([["a"]] * 20), "y": np.arange(20) % 2}, "must be numbers"),
        (
            {"X": np.full((20, 2), np.nan), "y": np.arange(20) % 2},
            "NaN or infinite in data rows 1, 2, 3, 4, 5 and 15 more",
        ),
        ({"X": np.zeros((20, 1, 2, 2, 2)), "y": np.arange(20) % 2}, "5 dimensions"),
        ({"X": np.zeros((20, 2)), "y": np.where(np.arange(20) == 3, np.nan, 0.5)}, "'y' is missing in data row 4"),
        ({"X": np.array([object()] * 20), "y": np.arange(20)}, "Python objects"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises((ArgumentError, DataError), match=message):
        read(tmp_path / "d.npz")


def test_a_single_array_and_a_cut_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros(3))
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    with pytest.raises(DataError, match="single array"):
        read(tmp_path / "d.npz")
    np.savez_compressed(tmp_path / "e.npz", X=np.random.default_rng(0).normal(size=(20, 50)), y=np.arange(20) % 2)
    whole = bytearray((tmp_path / "e.npz").read_bytes())
    whole[2000:2040] = bytes(40)
    (tmp_path / "e.npz").write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "e.npz")


def test_test_npz_of_another_shape(tmp_path: Path) -> None:
    for name, side in (("a", 4), ("b", 5)):
        np.savez(tmp_path / f"{name}.npz", X=np.zeros((20, side, side)), y=np.arange(20) % 2)
    with pytest.raises(DataError, match=r"\(1, 5, 5\), but \(1, 4, 4\)"):
        read(tmp_path / "a.npz", test=tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", X=np.zeros((20, 2)), y=np.arange(20) % 2)
    with pytest.raises(DataError, match=r"kind 'table'.*kind 'image'"):
        read(tmp_path / "a.npz", test=tmp_path / "c.npz")


# -- folders of images ------------------------------------------------------------------------------------------------
def pictures(root: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4), count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for name in ("dog", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("1", 1), ("P", 3), ("RGBA", 3)])
def test_image_folder(tmp_path: Path, mode: str, channels: int) -> None:
    root = pictures(tmp_path / "photos", mode)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    raw = read(root)
    assert isinstance(raw.inputs, Tensor)
    assert raw.inputs.shape == (12, channels, 4, 6) and raw.class_names == ("cat", "dog") and raw.name == "photos"
    assert raw.targets.tolist() == [0] * 6 + [1] * 6
    assert raw.inputs.min() >= 0 and raw.inputs.max() <= 1
    with Image.open(root / "cat" / "0.png") as image:
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    assert np.allclose(raw.inputs[0].permute(1, 2, 0).numpy().squeeze(), expected)


def test_grey_and_coloured_images_become_rgb(tmp_path: Path) -> None:
    root = pictures(tmp_path / "p", "L")
    Image.new("RGB", (6, 4), (255, 0, 0)).save(root / "dog" / "red.jpg")
    raw = read(root)
    assert isinstance(raw.inputs, Tensor) and raw.inputs.shape[1] == 3
    assert torch.equal(raw.inputs[0, 0], raw.inputs[0, 2])


def test_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    root = pictures(tmp_path / "p")
    Image.new("RGB", (8, 8)).save(root / "dog" / "9.png")
    with pytest.raises(DataError, match=r"9.png is 8x8 pixels, but .*0.png is 4x6.*image_size"):
        read(root)
    resized = read(root, image_size=(5, 7)).inputs
    assert isinstance(resized, Tensor) and resized.shape == (13, 3, 5, 7)
    assert read(root, image_size=5).inputs.shape == (13, 3, 5, 5)
    with pytest.raises(ArgumentError, match="image_size"):
        read(root, image_size=0)


def test_folder_with_a_test_folder(tmp_path: Path) -> None:
    root, clean = pictures(tmp_path / "p", "L"), pictures(tmp_path / "t", "RGB", count=2)
    raw = read(root, test=clean)
    assert raw.test is not None and raw.test.inputs.shape == (4, 1, 4, 6) and raw.test.targets.tolist() == [0, 0, 1, 1]
    with Image.open(clean / "cat" / "0.png") as image:
        luma = np.asarray(image.convert("L"), dtype=np.float32) / 255
    assert isinstance(raw.test.inputs, Tensor) and np.allclose(raw.test.inputs[0, 0].numpy(), luma)
    (clean / "dog").rename(clean / "wolf")
    with pytest.raises(DataError, match="'folder' is 'wolf'"):
        read(root, test=clean)
    with pytest.raises(DataError, match="training images are 4x6"):
        read(root, test=pictures(tmp_path / "u", size=(9, 9)))


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no subfolders"):
        read(tmp_path / "none")
    root = pictures(tmp_path / "p")
    with pytest.raises(ArgumentError, match="must be left out for a folder"):
        read(root, "label")
    (root / "bird").mkdir()
    with pytest.raises(DataError, match="'bird' holds no images"):
        read(root)
    (root / "bird").rmdir()
    (root / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0.png: cannot be read as an image"):
        read(root)
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(root / "dog" / "0.png")
    with pytest.raises(DataError, match="8 bits"):
        read(root)
    with pytest.raises(ArgumentError, match="image_size"):
        read(csv(tmp_path / "d.csv", frame()), image_size=4)
