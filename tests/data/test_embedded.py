"""Embedded data sets: contents, no shared memory between callers, and clear errors for what is missing or damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from equipoise.data import RawData, available, load, mnist1d, synthetic
from equipoise.data.embedded import FASHION_FILES, FASHION_FOLDER, FASHION_VARIABLE
from equipoise.data.idx import read_idx
from equipoise.errors import ArgumentError, DataError, MissingDependencyError

SHAPES = {
    "digits": (1797, 10),
    "breast-cancer": (569, 2),
    "wine": (178, 3),
    "iris": (150, 3),
    "diabetes": (442, None),
    "mnist1d": (4000, 10),
}


@pytest.mark.parametrize("name", SHAPES)
def test_load(name: str) -> None:
    raw = load(name)
    assert (len(raw), raw.num_classes) == SHAPES[name]
    assert raw.name == name and available()[name].installed
    if raw.num_classes is not None:
        assert raw.targets.dtype == torch.int64
        assert set(raw.targets.tolist()) == set(range(raw.num_classes))
    else:
        assert raw.targets.dtype == torch.float32


def test_digits_are_images_between_0_and_1() -> None:
    raw = load("digits")
    assert isinstance(raw.inputs, Tensor)
    assert raw.kind == "image" and raw.inputs.shape == (1797, 1, 8, 8) and raw.inputs.dtype == torch.float32
    assert raw.inputs.min() == 0 and raw.inputs.max() == 1
    assert raw.inputs[0, 0, 0, 2] == 5 / 16


def test_diabetes_is_not_scaled_beforehand() -> None:
    frame = load("diabetes").inputs
    assert isinstance(frame, pd.DataFrame)
    assert frame["age"].between(19, 79).all()


@pytest.mark.parametrize("name", ["digits", "wine", "mnist1d"])
def test_callers_cannot_change_what_others_load(name: str) -> None:
    first, untouched = load(name), load(name)
    first.targets.zero_()
    if isinstance(first.inputs, Tensor):
        first.inputs.zero_()
    else:
        first.inputs.iloc[:, :] = 0.0
    again = load(name)
    assert torch.equal(again.targets, untouched.targets)
    if isinstance(again.inputs, Tensor) and isinstance(untouched.inputs, Tensor):
        assert torch.equal(again.inputs, untouched.inputs)
    else:
        assert isinstance(again.inputs, pd.DataFrame) and isinstance(untouched.inputs, pd.DataFrame)
        assert again.inputs.equals(untouched.inputs)
    if first.test is not None and again.test is not None:
        assert first.test.targets.data_ptr() != again.test.targets.data_ptr()


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ArgumentError, match=r"dataset = 'digit'.*Did you mean 'digits'"):
        load("digit")


def test_folder_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="folder"):
        load("digits", tmp_path)


# -- MNIST-1D ---------------------------------------------------------------------------------------------------------
def test_mnist1d_follows_the_recipe() -> None:
    raw = mnist1d(2000, seed=3)
    assert raw.test is not None and isinstance(raw.inputs, Tensor) and isinstance(raw.test.inputs, Tensor)
    everything = torch.cat([raw.inputs, raw.test.inputs])
    labels = torch.cat([raw.targets, raw.test.targets])
    assert raw.inputs.shape == (1600, 1, 40) and raw.test.inputs.shape == (400, 1, 40)
    assert torch.bincount(labels).tolist() == [200] * 10
    assert everything.mean().abs() < 1e-5 and abs(everything.std().item() - 1) < 1e-3
    same, other = mnist1d(2000, seed=3), mnist1d(2000, seed=4)
    assert isinstance(same.inputs, Tensor) and isinstance(other.inputs, Tensor)
    assert torch.equal(same.inputs, raw.inputs) and not torch.equal(other.inputs, raw.inputs)


def test_mnist1d_without_noise_shows_its_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise, shear and scale off, a signal is its stretched pattern, shifted, on a flat background."""
    for constant in ("SCALE", "SHEAR", "SMOOTH_NOISE", "WHITE_NOISE"):
        monkeypatch.setattr(synthetic, constant, 0.0)
    monkeypatch.setattr(synthetic, "PADDING", (60, 60))
    monkeypatch.setattr(synthetic, "MAX_SHIFT", 1)
    signals = synthetic._signals(np.arange(10), np.random.default_rng(0))
    pattern = np.asarray(synthetic.PATTERNS[0], dtype=float)
    pattern = (pattern - pattern.mean()) / pattern.std()
    pattern = (pattern - pattern[0]) / 6
    positions = np.linspace(0, 71, 40)
    assert np.allclose(signals[0], np.interp(positions, np.arange(72), np.pad(pattern, (0, 60))))
    assert (signals[:, positions > 12] == 0).all()


def test_mnist1d_refuses_too_few() -> None:
    with pytest.raises(ArgumentError, match="num_examples"):
        mnist1d(50)


# -- Fashion-MNIST ----------------------------------------------------------------------------------------------------
def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A tiny set of the right form, half of it gzipped."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    sizes = {"train": 40, "t10k": 20}
    for stem in FASHION_FILES:
        n = sizes[stem.split("-")[0]]
        array = rng.integers(0, 256, (n, 28, 28)) if "images" in stem else np.arange(n) % 10
        if stem.startswith("train"):
            (folder / f"{stem}.gz").write_bytes(gzip.compress(_idx(array)))
        else:
            (folder / stem).write_bytes(_idx(array))
    return folder


def test_fashion_from_a_folder(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load("fashion-mnist", fashion)
    assert raw.test is not None and isinstance(raw.inputs, Tensor)
    assert raw.inputs.shape == (40, 1, 28, 28) and len(raw.test) == 20 and raw.num_classes == 10
    pixels = read_idx(fashion / "train-images-idx3-ubyte.gz")
    assert torch.equal(raw.inputs[:, 0], torch.from_numpy(pixels.astype(np.float32)) / 255)
    small = load("fashion-mnist-14", fashion)
    assert isinstance(small.inputs, Tensor)
    torch.testing.assert_close(small.inputs, torch.nn.functional.avg_pool2d(raw.inputs, 2))
    monkeypatch.setenv(FASHION_VARIABLE, str(fashion))
    assert available()["fashion-mnist-14"].installed
    assert torch.equal(load("fashion-mnist").targets, raw.targets)


def test_fashion_memory_is_not_shared(fashion: Path) -> None:
    first = load("fashion-mnist", fashion)
    expected = first.inputs.clone() if isinstance(first.inputs, Tensor) else None
    first.inputs.zero_()  # type: ignore[operator]
    first.targets.zero_()
    again = load("fashion-mnist", fashion)
    assert expected is not None and torch.equal(again.inputs, expected) and again.targets.any()  # type: ignore[arg-type]


def test_missing_fashion_names_package_and_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match=r"dataset-fashion-mnist.*folder=.*EQUIPOISE_FASHION_MNIST"):
        load("fashion-mnist", tmp_path)
    monkeypatch.setenv(FASHION_VARIABLE, str(tmp_path))
    assert not available()["fashion-mnist"].installed


def test_damaged_fashion_files(fashion: Path) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="train-images"):
        load("fashion-mnist", fashion)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(DataError, match="header promises"):
        load("fashion-mnist", fashion)
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DataError, match="no IDX file"):
        load("fashion-mnist", fashion)
    path.write_bytes(gzip.compress(_idx(np.zeros((40, 14, 14)))))
    with pytest.raises(DataError, match="28x28"):
        load("fashion-mnist", fashion)


@pytest.mark.skipif(
    not (FASHION_FOLDER / "train-labels-idx1-ubyte.gz").exists(), reason="dataset-fashion-mnist is not installed"
)
def test_installed_fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FASHION_VARIABLE, raising=False)
    raw = load("fashion-mnist-14")
    assert raw.test is not None and isinstance(raw.inputs, Tensor)
    assert raw.inputs.shape == (60000, 1, 14, 14) and len(raw.test) == 10000
    assert torch.bincount(raw.targets).tolist() == [6000] * 10
    assert raw.inputs.mean().item() == pytest.approx(0.2860, abs=1e-4)


def test_raw_data_refuses_uneven_parts() -> None:
    with pytest.raises(DataError, match="inputs has 3 rows but targets has 2"):
        RawData("x", "image", torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    with pytest.raises(DataError, match="class_names"):
        RawData("x", "image", torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
