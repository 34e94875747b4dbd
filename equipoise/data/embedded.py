"""Data sets that need no download: scikit-learn's, a generated one, and Fashion-MNIST and COMPAS where they are installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from equipoise.data import compas, idx
from equipoise.data.raw import RawData
from equipoise.data.synthetic import mnist1d
from equipoise.errors import DataError, MissingDependencyError, check_choice, refuse

DESCRIPTIONS = {
    "digits": "handwritten digits, 1797 images 1x8x8, 10 classes",
    "breast-cancer": "breast cancer Wisconsin, 569 rows, 30 numeric columns, 2 classes",
    "wine": "wine cultivars, 178 rows, 13 numeric columns, 3 classes",
    "iris": "iris flowers, 150 rows, 4 numeric columns, 3 classes",
    "diabetes": "disease progression, 442 rows, 10 numeric columns, regression",
    "mnist1d": "MNIST-1D, generated: 4000 + 1000 test sequences 1x40, 10 classes",
    "compas": "COMPAS, 6172 arrests, 5 columns, 2 classes; race, sex and age as groups",
    "fashion-mnist": "Fashion-MNIST, 60000 + 10000 test images 1x28x28, 10 classes",
    "fashion-mnist-14": "Fashion-MNIST averaged over 2x2 pixels: images 1x14x14",
}
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_VARIABLE = "EQUIPOISE_FASHION_MNIST"
FASHION_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Available(NamedTuple):
    """What a data set is, and whether it can be loaded here."""

    description: str
    installed: bool


def available() -> dict[str, Available]:
    """Every name that ``load`` knows, with a one-line description and whether it can be loaded on this machine."""
    files = [idx.find(_fashion_folder(None), stem) for stem in FASHION_FILES]
    absent = {"compas": compas.find() is None, "fashion-mnist": not all(files), "fashion-mnist-14": not all(files)}
    return {name: Available(text, not absent.get(name, False)) for name, text in DESCRIPTIONS.items()}


def load(name: str, folder: str | os.PathLike[str] | None = None) -> RawData:
    """Load a data set by name, into memory of its own: callers may write to it.

    name: one of ``available()``.
    folder: where the four IDX files of Fashion-MNIST lie (plain or ``.gz``); by default the environment variable
        EQUIPOISE_FASHION_MNIST, else the folder of the Debian package dataset-fashion-mnist.

    Images are scaled to [0, 1]; tables are left to ``split``, which fits the preprocessing on training rows only.
    Raises ``ArgumentError`` for an unknown name, ``MissingDependencyError`` where files are missing (nothing is ever
    downloaded), ``DataError`` where they are damaged.
    """
    check_choice("dataset", name, tuple(DESCRIPTIONS))
    if name.startswith("fashion"):
        return _fashion(name, _fashion_folder(folder))
    if folder is not None:
        refuse("folder", str(folder), f"be left out for {name!r}, which has no files of its own")
    if name == "compas":
        return compas.compas()
    return _generated(name).copy()


@cache
def _generated(name: str) -> RawData:
    from sklearn import datasets

    if name == "mnist1d":
        return mnist1d()
    if name == "digits":
        bunch = datasets.load_digits()
        inputs = torch.from_numpy(bunch.images / 16).float().unsqueeze(1)
        return RawData(name, "image", inputs, torch.from_numpy(bunch.target).long(), tuple(map(str, range(10))))
    if name == "diabetes":
        # scikit-learn's scaled columns have seen every row, those of the test set included.
        bunch = datasets.load_diabetes(as_frame=True, scaled=False)
        return RawData(name, "table", bunch.data, torch.tensor(bunch.target.to_numpy(), dtype=torch.float32))
    loaders: dict[str, Callable[..., Any]] = {
        "breast-cancer": datasets.load_breast_cancer,
        "wine": datasets.load_wine,
        "iris": datasets.load_iris,
    }
    bunch = loaders[name](as_frame=True)
    return RawData(
        name,
        "table",
        bunch.data,
        torch.tensor(bunch.target.to_numpy(), dtype=torch.int64),
        tuple(map(str, bunch.target_names)),
    )


def _fashion_folder(folder: str | os.PathLike[str] | None) -> Path:
    return Path(folder or os.environ.get(FASHION_VARIABLE) or FASHION_FOLDER)


def _fashion(name: str, folder: Path) -> RawData:
    pooled = name.endswith("-14")
    train_images, train_labels, test_images, test_labels = _fashion_arrays(folder.resolve(), pooled)

    def part(images: np.ndarray, labels: np.ndarray, test: RawData | None = None) -> RawData:
        inputs = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / (4 * 255 if pooled else 255)
        return RawData(name, "image", inputs, torch.from_numpy(labels.astype(np.int64)), FASHION_CLASSES, test=test)

    return part(train_images, train_labels, part(test_images, test_labels))


@lru_cache(maxsize=2)
def _fashion_arrays(folder: Path, pooled: bool) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels: as integers, a quarter of the floats' memory."""
    files = [idx.find(folder, stem) for stem in FASHION_FILES]
    missing = [stem for stem, path in zip(FASHION_FILES, files, strict=True) if path is None]
    if missing:
        raise MissingDependencyError(
            f"fashion-mnist: {', '.join(missing)} (plain or .gz) not found in {folder}. "
            "Install the Debian package dataset-fashion-mnist (apt install dataset-fashion-mnist), or name a folder that "
            f"holds the four IDX files: folder=... in Python, or the environment variable {FASHION_VARIABLE}"
        )
    arrays = [idx.read_idx(path) for path in files if path is not None]
    for images, labels in (arrays[:2], arrays[2:]):
        good = images.ndim == 3 and images.shape[1:] == (28, 28) and labels.shape == images.shape[:1]
        if not good or labels.size == 0 or labels.max() >= len(FASHION_CLASSES):
            raise DataError(
                f"{folder}: must hold images 28x28 and as many labels in 0..9, not {images.shape} and {labels.shape}"
            )
    if pooled:
        arrays[0], arrays[2] = (_sum_2x2(arrays[i]) for i in (0, 2))
    return tuple(arrays)


def _sum_2x2(images: np.ndarray) -> np.ndarray:
    wide = images.astype(np.uint16)
    return wide[:, ::2, ::2] + wide[:, 1::2, ::2] + wide[:, ::2, 1::2] + wide[:, 1::2, 1::2]
