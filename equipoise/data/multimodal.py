"""Data of several modalities: two views of embedded images, or the user's groups of columns and folder of images.

A multimodal data set is a dict of ``RawData`` by the name of the modality, which share their targets row by row. ``split`` of
each with one seed gives the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equipoise.data.columns import as_text, rows
from equipoise.data.files import read_images
from equipoise.data.raw import RawData
from equipoise.data.user import _existing, _stamp, read
from equipoise.errors import ArgumentError, DataError, check_integer, suggestion

StrPath = str | os.PathLike[str]
Modalities = dict[str, RawData]
IMAGE = "image"


# -- views of embedded images -----------------------------------------------------------------------------------------
def halves(raw: RawData) -> Modalities:
    """The left and the right half of images (N, C, H, W), the left one narrower if W is odd."""
    images = _images(raw, "halves")
    middle = images.shape[3] // 2
    return _views(raw, left=lambda x: x[..., :middle], right=lambda x: x[..., middle:])


def fourier(raw: RawData) -> Modalities:
    """Images, and the logarithm of one plus the magnitudes of their discrete Fourier transform (no phases)."""
    _images(raw, "fourier")
    return _views(raw, pixels=lambda x: x, spectrum=lambda x: torch.fft.rfft2(x, norm="ortho").abs().log1p())


VIEWS = {"halves": halves, "fourier": fourier}


def _images(raw: RawData, view: str) -> Tensor:
    if raw.kind != "image" or not isinstance(raw.inputs, Tensor):
        raise ArgumentError(f"views = {view!r}: must be views of images, but {raw.name} is of the kind {raw.kind!r}")
    return raw.inputs


def _views(raw: RawData, **views: Callable[[Any], Tensor]) -> Modalities:
    def view(data: RawData, function: Callable[[Any], Tensor]) -> RawData:
        test = None if data.test is None else view(data.test, function)
        return replace(data, inputs=function(data.inputs).contiguous(), test=test)

    return {name: view(raw, function) for name, function in views.items()}


# -- the user's own ---------------------------------------------------------------------------------------------------
def read_modalities(
    path: StrPath,
    target: str | None = None,
    modalities: str | None = None,
    *,
    images: StrPath | None = None,
    image_column: str | None = None,
    image_size: int | None = None,
    test: StrPath | None = None,
) -> tuple[Modalities, tuple[str, ...]]:
    """Read a table whose columns belong to modalities, and images that one of its columns names.

    path, target, test: as for ``read``; the table needs named columns.
    modalities: ``"a=col1,col2;b=x*"``: modality a has the columns col1 and col2, modality b those that begin with x. A name
        alone stands for the columns that begin with it and an underscore: ``"audio;video"`` is
        ``"audio=audio_*;video=video_*"``. Without it, beside images, all columns are the modality "table".
    images, image_column: a folder, and the column that holds the name of each row's file in it; the modality "image".
    image_size: side to resize the images to; without it, images of different sizes are refused.

    Returns the modalities, and the columns that belong to none. Raises ``ArgumentError`` for names that do not exist and for
    columns named twice, ``DataError`` for rows in which a modality is missing (all of its columns are empty, or its file is not
    there), and what ``read`` raises.
    """
    if (images is None) != (image_column is None):
        raise ArgumentError(
            f"images = {images!r}, image_column = {image_column!r}: must be given together, the folder and the column of the table"
        )
    if images is None and image_size is not None:
        raise ArgumentError(f"image_size = {image_size}: must be left out without images")
    if image_size is not None:
        check_integer("image_size", image_size, 1)
    raw = read(path, target, group=image_column or (), test=test)
    if isinstance(raw.inputs, Tensor):
        raise DataError(f"{path}: must be a table with named columns; images belong to it by images=folder")
    columns = [str(name) for name in raw.inputs]
    if modalities is not None:
        groups = columns_of(modalities, columns)
    elif images is not None:
        groups = {"table": columns}
    else:
        raise ArgumentError(
            f"modalities = None: must say which columns belong together, as in 'a=col1,col2;b=x*'. Columns are {_some(columns)}"
        )
    names = [*groups, *([IMAGE] if images is not None else [])]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ArgumentError(f"modalities = {modalities!r}: must name at least 2 modalities, all different, not {names}")
    found = {name: _columns(raw, chosen, name, path, test) for name, chosen in groups.items()}
    if images is not None and image_column is not None:
        found[IMAGE] = _pictures(raw, _existing(Path(images)), image_column, image_size, path, test)
    used = {column for chosen in groups.values() for column in chosen}
    return found, tuple(column for column in columns if column not in used)


def columns_of(text: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns of each modality that ``text`` names (see ``read_modalities``)."""
    groups: dict[str, list[str]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, entries = (piece.strip() for piece in part.partition("="))
        wanted = [entry.strip() for entry in entries.split(",") if entry.strip()] if equals else [f"{name}_*"]
        if not name or not wanted or name in groups:
            raise ArgumentError(f"modalities = {text!r}: {part!r} must be name=column,column with a name of its own")
        groups[name] = []
        for entry in wanted:
            chosen = [entry] if entry in columns else [c for c in columns if "*" in entry and fnmatchcase(c, entry)]
            if not chosen:
                hint = f" {suggestion(entry, list(columns))}".rstrip()
                raise ArgumentError(
                    f"modalities = {text!r}: modality {name!r} is missing, there is no column {entry!r}.{hint} "
                    f"Columns are {_some(columns)}"
                )
            groups[name] += chosen
    listed = [column for chosen in groups.values() for column in chosen]
    twice = sorted({column for column in listed if listed.count(column) > 1})
    if twice:
        raise ArgumentError(
            f"modalities = {text!r}: column {twice[0]!r} is in it twice. Give each column to one modality"
        )
    return groups


def _columns(raw: RawData, columns: list[str], name: str, path: StrPath, test: StrPath | None) -> RawData:
    assert isinstance(raw.inputs, pd.DataFrame)  # read_modalities refuses tensors
    inputs = raw.inputs[columns]
    _refuse_missing(inputs.isna().all(axis=1).to_numpy(), name, path, f"all of {_some(columns)} are empty")
    tested = None if raw.test is None or test is None else _columns(raw.test, columns, name, test, None)
    return RawData(raw.name, "table", inputs, raw.targets, raw.class_names, test=tested)


def _pictures(
    raw: RawData,
    folder: Path,
    column: str,
    size: int | None,
    path: StrPath,
    test: StrPath | None,
    like: Tensor | None = None,
) -> RawData:
    assert raw.groups is not None  # the image column is read as one
    names = as_text(raw.groups[column])
    _refuse_missing(names.isna().to_numpy(), IMAGE, path, f"column {column!r} is empty")
    files = [folder / name for name in names]
    absent = np.array([not file.is_file() for file in files])
    first = names[absent].iloc[0] if absent.any() else ""
    _refuse_missing(absent, IMAGE, path, f"{folder} has no file {first!r}")
    inputs = _read(tuple(files), size, None if like is None else tuple(like.shape[1:]), _stamp(folder))
    tested = None if raw.test is None or test is None else _pictures(raw.test, folder, column, size, test, None, inputs)
    return RawData(raw.name, "image", inputs, raw.targets, raw.class_names, test=tested)


@lru_cache(maxsize=2)
def _read(files: tuple[Path, ...], size: int | None, like: tuple[int, ...] | None, stamp: str) -> Tensor:
    """Read once per process, however many seeds a trial has; ``stamp`` tells when a file has changed."""
    return read_images(files, None if size is None else (size, size), None if like is None else torch.empty(0, *like))


def _refuse_missing(mask: np.ndarray, name: str, path: StrPath, why: str) -> None:
    if mask.any():
        raise DataError(
            f"{path}: modality {name!r} is missing in {rows(mask)}: {why}. Every example needs every modality: fill in or remove "
            "these rows"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
