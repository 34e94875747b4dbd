"""Views of embedded images, and the user's tables and image folders, with every way in which a modality can be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from equipoise.data import load, split
from equipoise.data.multimodal import columns_of, fourier, halves, read_modalities
from equipoise.errors import ArgumentError, DataError


def table(rows: int = 24, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(rows, 4)), columns=["a_1", "a_2", "b_1", "b_2"])
    frame["colour"] = np.where(rng.random(rows) < 0.5, "red", "blue")
    frame["note"] = range(rows)
    frame["file"] = [f"{row}.png" for row in range(rows)]
    frame["y"] = np.arange(rows) % 2
    return frame


def write(folder: Path, frame: pd.DataFrame, name: str = "data.csv") -> Path:
    path = folder / name
    frame.to_csv(path, index=False)
    return path


def pictures(folder: Path, count: int = 24, size: tuple[int, int] = (4, 6)) -> Path:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(images / f"{number}.png")
    return images


# -- embedded ---------------------------------------------------------------------------------------------------------
def test_halves_are_the_image() -> None:
    raw = load("digits")
    found = halves(raw)
    assert list(found) == ["left", "right"] and found["left"].test is None
    assert torch.equal(torch.cat([found["left"].inputs, found["right"].inputs], 3), raw.inputs)  # type: ignore[list-item]
    assert all(torch.equal(part.targets, raw.targets) for part in found.values())


def test_spectrum_has_no_phase() -> None:
    raw = load("digits")
    found = fourier(raw)
    assert torch.equal(found["pixels"].inputs, raw.inputs)  # type: ignore[arg-type]
    moved = fourier(type(raw)("moved", "image", raw.inputs.roll((2, 3), (2, 3)), raw.targets, raw.class_names))  # type: ignore[union-attr]
    torch.testing.assert_close(moved["spectrum"].inputs, found["spectrum"].inputs, rtol=1e-4, atol=1e-5)
    assert found["spectrum"].inputs.shape[1:] == (1, 8, 5)


def test_views_are_of_images_only() -> None:
    with pytest.raises(
        ArgumentError, match=r"views = 'halves': must be views of images, but iris is of the kind 'table'"
    ):
        halves(load("iris"))


# -- tables -----------------------------------------------------------------------------------------------------------
def test_groups_of_columns(tmp_path: Path) -> None:
    frame = table()
    path = write(tmp_path, frame)
    found, unused = read_modalities(path, "y", "first=a_1,colour;second=b_*")
    assert list(found) == ["first", "second"] and unused == ("a_2", "note", "file")
    assert list(found["first"].inputs) == ["a_1", "colour"] and list(found["second"].inputs) == ["b_1", "b_2"]
    assert found["first"].class_names == ("0", "1")
    prefixed, _ = read_modalities(path, "y", "a;b")
    assert list(prefixed["a"].inputs) == ["a_1", "a_2"] and list(prefixed["b"].inputs) == ["b_1", "b_2"]
    # One split of each modality gives the same rows.
    parts = [split(raw, seed=3) for raw in found.values()]
    assert torch.equal(parts[0].train_rows, parts[1].train_rows) and torch.equal(parts[0].test_rows, parts[1].test_rows)
    assert parts[0].input_shape == (3,)  # a number and two colours
    expected = frame["b_1"].to_numpy()[parts[1].train_rows]
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(parts[1].train.inputs[:, 0], expected, rtol=1e-5)  # type: ignore[index, call-overload]


def test_a_test_file(tmp_path: Path) -> None:
    path, other = write(tmp_path, table()), write(tmp_path, table(12, seed=1), "test.csv")
    found, _ = read_modalities(path, "y", "a;b", test=other)
    assert {name: len(raw.test) for name, raw in found.items()} == {"a": 12, "b": 12}  # type: ignore[arg-type]
    write(tmp_path, table(12).drop(columns="b_2"), "test.csv")
    with pytest.raises(DataError, match="has no column 'b_2', which the training data have"):
        read_modalities(path, "y", "a;b", test=other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", r"must name at least 2 modalities, all different, not \['a'\]"),
        ("", "must name at least 2 modalities"),
        ("a;a=b_1", "must be name=column,column with a name of its own"),
        ("a;b=", "must be name=column,column"),
        ("=a_1;b", "must be name=column,column"),
        ("a;c=c_1", r"modality 'c' is missing, there is no column 'c_1'.*Columns are a_1, a_2, b_1, b_2, colour"),
        ("a;d", r"modality 'd' is missing, there is no column 'd_\*'. Columns are"),
        ("a;c=colr", r"there is no column 'colr'. Did you mean 'colour'\?"),
        ("a;b=b_1,a_2", "column 'a_2' is in it twice"),
    ],
)
def test_bad_groups(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, table())
    with pytest.raises(ArgumentError, match=message):
        read_modalities(path, "y", text)


def test_columns_of_takes_names_before_patterns() -> None:
    assert columns_of("one = x*, z ; two=y", ["x*", "x1", "y", "z"]) == {"one": ["x*", "z"], "two": ["y"]}


def test_missing_modalities_name_their_rows(tmp_path: Path) -> None:
    frame = table()
    frame.loc[[2, 6], ["b_1", "b_2"]] = np.nan
    frame.loc[4, "a_1"] = np.nan  # a gap within a modality is filled in, as in every table
    path = write(tmp_path, frame)
    with pytest.raises(
        DataError, match=r"modality 'b' is missing in data rows 3, 7: all of b_1, b_2 are empty. Every example"
    ):
        read_modalities(path, "y", "a;b")
    frame.loc[[2, 6], "b_1"] = 0.0
    found, _ = read_modalities(write(tmp_path, frame), "y", "a;b")
    assert split(found["a"], 0).train.inputs.isfinite().all()  # type: ignore[union-attr]
    late = table(12)
    late.loc[11, ["a_1", "a_2"]] = np.nan
    with pytest.raises(DataError, match=r"test.csv: modality 'a' is missing in data row 12"):
        read_modalities(path, "y", "a;b", test=write(tmp_path, late, "test.csv"))


def test_without_groups_or_images(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"modalities = None: must say which columns belong together"):
        read_modalities(write(tmp_path, table()), "y")
    np.savez(tmp_path / "data.npz", X=np.zeros((20, 2, 3)), y=np.arange(20) % 2)
    with pytest.raises(DataError, match="must be a table with named columns"):
        read_modalities(tmp_path / "data.npz", "y", "a;b")


# -- images -----------------------------------------------------------------------------------------------------------
def test_a_table_and_images(tmp_path: Path) -> None:
    path, images = write(tmp_path, table()), pictures(tmp_path)
    found, unused = read_modalities(path, "y", images=images, image_column="file")
    assert list(found) == ["table", "image"] and unused == ()
    assert "file" not in found["table"].inputs
    assert found["image"].kind == "image" and found["image"].inputs.shape == (24, 1, 4, 6)
    pixels = np.asarray(Image.open(images / "5.png")) / 255
    np.testing.assert_allclose(found["image"].inputs[5, 0], pixels, atol=1e-6)  # type: ignore[index, call-overload]
    both, left = read_modalities(path, "y", "a;b", images=images, image_column="file", image_size=2)
    assert list(both) == ["a", "b", "image"] and left == ("colour", "note")
    assert both["image"].inputs.shape == (24, 1, 2, 2)
    shuffled = table(12).iloc[::-1]
    tested, _ = read_modalities(
        path, "y", images=images, image_column="file", test=write(tmp_path, shuffled, "test.csv")
    )
    assert torch.equal(tested["image"].test.inputs[0], found["image"].inputs[11])  # type: ignore[union-attr, index]


def test_missing_images_name_their_rows(tmp_path: Path) -> None:
    images, frame = pictures(tmp_path), table()
    frame.loc[22, "file"] = "gone.png"
    with pytest.raises(DataError, match=r"modality 'image' is missing in data row 23: .*images has no file 'gone.png'"):
        read_modalities(write(tmp_path, frame), "y", images=images, image_column="file")
    frame.loc[[0, 2], "file"] = None
    with pytest.raises(DataError, match=r"modality 'image' is missing in data rows 1, 3: column 'file' is empty"):
        read_modalities(write(tmp_path, frame), "y", images=images, image_column="file")


def test_bad_images(tmp_path: Path) -> None:
    path, images = write(tmp_path, table()), pictures(tmp_path)
    read: Any = lambda **options: read_modalities(path, "y", **options)  # noqa: E731
    with pytest.raises(ArgumentError, match="must be given together"):
        read(images=images)
    with pytest.raises(ArgumentError, match="image_size = 8: must be left out without images"):
        read(modalities="a;b", image_size=8)
    with pytest.raises(ArgumentError, match="image_size = 0: must be an integer >= 1"):
        read(images=images, image_column="file", image_size=0)
    with pytest.raises(ArgumentError, match=r"group = 'files': not found. Did you mean 'file'"):
        read(images=images, image_column="files")
    with pytest.raises(DataError, match="no such file or folder"):
        read(images=tmp_path / "nowhere", image_column="file")
    with pytest.raises(ArgumentError, match="all different"):
        read(modalities="image=a_1;b", images=images, image_column="file")
    Image.new("L", (9, 9)).save(images / "7.png")
    with pytest.raises(DataError, match=r"7.png is 9x9 pixels, but .*0.png is 4x6"):
        read(images=images, image_column="file")
