"""The forms in which users keep their data: tables, NPZ archives, folders of images. Nothing is ever unpickled."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equipoise.data.columns import rows
from equipoise.errors import ArgumentError, DataError, suggestion

logger = logging.getLogger(__name__)

TABLES = (".csv", ".csv.gz", ".tsv", ".parquet", ".pq")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TARGETS = ("target", "targets", "label", "labels", "y")
INPUTS = ("X", "x", "inputs")
GREY_MODES = ("1", "L", "LA")


@dataclass(frozen=True)
class Found:
    """What a file holds: inputs (N, ...) or a DataFrame, a named column of N labels, and group columns."""

    kind: str
    inputs: Tensor | pd.DataFrame
    labels: pd.Series
    groups: pd.DataFrame | None = None


def read_table(path: Path, target: str | None, group: tuple[str, ...]) -> Found:
    """A CSV, TSV or Parquet file. Without ``target``: the column called target, label or y."""
    try:
        if path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", low_memory=False)
    except (
        ValueError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:  # pandas' and Arrow's errors of parsing are ValueErrors
        raise DataError(f"{path}: cannot be read as a table ({str(error).strip()})") from error
    frame = frame.reset_index(drop=True)
    names = [str(name) for name in frame.columns]
    frame.columns = pd.Index(names)
    if len(set(names)) < len(names):
        raise DataError(f"{path}: has two columns of the same name. Rename one; the columns are {', '.join(names)}")
    if len(names) == 1:
        raise DataError(f"{path}: has one column only, {names[0]!r}. Is it separated by commas?")
    first = names[0]
    if first.startswith("Unnamed: ") and frame[first].equals(pd.Series(range(len(frame)))):
        # Saved row numbers would tell the class of any file that is sorted by class.
        logger.warning("%s: the first column, without a name, numbers the rows; it is left out", path)
        frame = frame.drop(columns=first)
        names = names[1:]
    label = _choose("target", target, TARGETS, names, f"{path}: columns")
    for name in group:
        _choose("group", name, (), [column for column in names if column != label], f"{path}: other columns")
    inputs = frame.drop(columns=[label, *group])
    return Found("table", inputs, frame[label], frame[list(group)] if group else None)


def read_npz(path: Path, target: str | None, group: tuple[str, ...]) -> Found:
    """An NPZ archive with inputs in X, x or inputs, and labels in y, targets or labels (or the array named ``target``).

    Inputs (N,) and (N, S) are a table; (N, H, W), (N, C, H, W) and (N, H, W, C) are images. uint8 images are divided by 255.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds Python objects" if "pickle" in str(error).lower() else str(error)
        raise DataError(
            f"{path}: cannot be read ({reason}). Save plain arrays: numpy.savez(path, X=..., y=...)"
        ) from error
    inputs = np.atleast_1d(arrays[_choose("inputs", None, INPUTS, list(arrays), f"{path}: arrays")])
    label = _choose("target", target, TARGETS, list(arrays), f"{path}: arrays")
    for name in (label, *group):
        _choose("group", name, (), list(arrays), f"{path}: arrays")
        if arrays[name].ndim != 1 or len(arrays[name]) != len(inputs):
            raise DataError(
                f"{path}: {name!r} has the shape {arrays[name].shape}: must be ({len(inputs)},), one value for "
                "each row of the inputs. Turn one-hot labels into numbers with argmax(1)"
            )
    groups = pd.DataFrame({name: arrays[name] for name in group}) if group else None
    labels = pd.Series(arrays[label], name=label)
    if inputs.dtype.kind not in "fiub":
        raise DataError(f"{path}: inputs are {inputs.dtype}: must be numbers")
    finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
    if not finite.all():
        raise DataError(f"{path}: inputs are NaN or infinite in {rows(~finite)}. Correct or remove these rows")
    if inputs.ndim < 3:
        return Found("table", pd.DataFrame(inputs).rename(columns=str).astype("float64"), labels, groups)
    return Found("image", _channels_first(inputs, path), labels, groups)


def read_folder(path: Path, image_size: tuple[int, int] | None, like: Tensor | None = None) -> Found:
    """Images (N, C, H, W) in [0, 1], one subfolder for each class: grey if all are, else all in RGB.

    image_size: (height, width) to resize to; without it, images of different sizes are refused. ``like``: images whose
    channels and size these must have.
    """
    classes = [folder for folder in _visible(path) if folder.is_dir()]
    files = {c.name: [f for f in sorted(c.rglob("*")) if f.is_file() and f.suffix.lower() in IMAGES] for c in classes}
    if not files:
        raise DataError(f"{path}: has no subfolders: must hold one folder of images for each class")
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise DataError(f"{path}: folder {empty[0]!r} holds no images ({', '.join(IMAGES)}). Add images, or remove it")
    inputs = read_images([file for found in files.values() for file in found], image_size, like)
    return Found(
        "image", inputs, pd.Series([n for n, found in files.items() for _ in found], name="folder", dtype=object)
    )


def read_images(files: Sequence[Path], image_size: tuple[int, int] | None, like: Tensor | None = None) -> Tensor:
    """The images of ``files`` in their order, (N, C, H, W) in [0, 1]; ``image_size`` and ``like`` as for ``read_folder``."""
    wanted = None if like is None else ("L" if like.shape[1] == 1 else "RGB")
    pictures = [(file, *_picture(file, image_size, wanted)) for file in files]
    first, size = pictures[0][0], pictures[0][1].shape[:2] if like is None else tuple(like.shape[2:])
    for file, picture, _ in pictures:
        if picture.shape[:2] != size:
            there = "the training images are" if like is not None else f"{first} is"
            raise DataError(
                f"{file} is {picture.shape[0]}x{picture.shape[1]} pixels, but {there} {size[0]}x{size[1]}. "
                "Resize them, or give image_size=(height, width)"
            )
    grey = all(grey for _, _, grey in pictures)
    # The three channels of a grey picture are equal.
    stacked = np.stack([picture[:, :, :1] if grey else picture for _, picture, _ in pictures])
    return torch.from_numpy(stacked.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def _picture(file: Path, image_size: tuple[int, int] | None, mode: str | None) -> tuple[np.ndarray, bool]:
    """Pixels (H, W, 3) uint8, and whether they are grey: as in the file, or as ``mode`` ("L", "RGB") says."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file}: has {image.mode} pixels: must have 8 bits a channel. Convert it")
            mode = mode or ("L" if image.mode in GREY_MODES else "RGB")
            picture = image.convert(mode).convert("RGB")
            if image_size is not None:
                picture = picture.resize(image_size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(picture), mode == "L"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error}). Repair or remove it") from error


def _channels_first(inputs: np.ndarray, path: Path) -> Tensor:
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    elif inputs.ndim == 4 and inputs.shape[1] > 4 and inputs.shape[3] <= 4:
        inputs = inputs.transpose(0, 3, 1, 2)
    if inputs.ndim != 4:
        raise DataError(f"{path}: inputs have {inputs.ndim} dimensions: must have 1 to 4, examples first")
    scale = 255 if inputs.dtype == np.uint8 else 1
    return torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32)) / scale


def _choose(argument: str, value: str | None, defaults: tuple[str, ...], names: list[str], what: str) -> str:
    """``value`` if it is one of the names; without a value the first default that is."""
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if value is None:
        found = next((name for name in defaults if name in names), None)
        if found is None:
            raise ArgumentError(
                f"{argument} = None: name it, as none is called {', '.join(defaults)}. {what} are {listed}"
            )
        return found
    if value not in names:
        raise ArgumentError(f"{argument} = {value!r}: not found. {suggestion(value, names)} {what} are {listed}")
    return value


def _visible(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if not child.name.startswith("."))
