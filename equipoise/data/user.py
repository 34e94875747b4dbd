"""The user's own data: a CSV, TSV, Parquet or NPZ file, or a folder of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from equipoise.data import labels as label_column
from equipoise.data.columns import clean
from equipoise.data.files import TABLES, Found, read_folder, read_npz, read_table
from equipoise.data.raw import RawData
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer, suggestion

StrPath = str | os.PathLike[str]


def read(
    path: StrPath,
    target: str | None = None,
    group: str | Sequence[str] = (),
    test: StrPath | None = None,
    *,
    kind: str = "auto",
    image_size: int | tuple[int, int] | None = None,
) -> RawData:
    """Read a file or folder, and refuse data that cannot be trained on.

    path: ``.csv``, ``.csv.gz``, ``.tsv``, ``.parquet``; ``.npz`` with arrays X and y; or a folder with one subfolder of
        images for each class.
    target: column (or array) of the labels; by default the one called target, label or y.
    group: columns that describe the examples and become ``groups``; they are no inputs.
    test: file or folder of the same form to test on; without it ``split`` sets a part of the data aside.
    kind: "classification", "regression" or "auto": strings, booleans, integers and a few whole numbers are classes, other
        numbers are values.
    image_size: (height, width) or one number to resize the images of a folder to.

    Raises ``ArgumentError`` for names that do not exist, ``DataError`` for missing labels, one class, fewer than 10 examples,
    classes too small to appear in every split, text in a numeric column, infinite inputs, NaN in arrays, damaged files.
    Missing values of a table are no error: ``split`` fills them in.
    """
    check_choice("kind", kind, label_column.KINDS)
    group = (group,) if isinstance(group, str) else tuple(group)
    if target is not None and target in group:
        raise ArgumentError(f"group = {group!r}: must not hold the target {target!r}")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in size or ():
        check_integer("image_size", side, 1)
    paths = tuple(_existing(Path(p)) for p in ((path,) if test is None else (path, test)))
    return _read(paths, target, group, kind, size, tuple(_stamp(p) for p in paths)).copy()


def fingerprint(path: StrPath) -> str:
    """SHA-256, in hexadecimal, of a file's content, or of all names and contents in a folder (hidden files left out)."""
    root = _existing(Path(path))
    if root.is_file():
        return _sha256(root).hexdigest()
    total = hashlib.sha256()
    for file in _files(root):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + _sha256(file).digest())
    return total.hexdigest()


@lru_cache(maxsize=2)
def _read(
    paths: tuple[Path, ...],
    target: str | None,
    group: tuple[str, ...],
    kind: str,
    size: tuple[int, int] | None,
    stamps: tuple[str, ...],
) -> RawData:
    """Read once per process, however many seeds a trial has; ``stamps`` tell when a file has changed."""
    path, where = paths[0], str(paths[0])
    found = _find(path, target, group, size)
    targets, names = label_column.encode(found.labels, kind, where)
    least = 3 if len(paths) == 1 else 2
    label_column.check(targets, names, str(found.labels.name), where, least)
    inputs = found.inputs if isinstance(found.inputs, Tensor) else clean(found.inputs, where)
    test = None
    if len(paths) > 1:
        images = inputs if isinstance(inputs, Tensor) else None
        other = _find(paths[1], str(found.labels.name) if path.is_file() else None, group, size, images)
        test = _test(other, RawData(path.name, found.kind, inputs, targets, names), str(paths[1]))
    return RawData(path.name, found.kind, inputs, targets, names, found.groups, test)


def _test(found: Found, train: RawData, where: str) -> RawData:
    if found.kind != train.kind:
        raise DataError(
            f"{where}: is of the kind {found.kind!r}, but the training data are of the kind {train.kind!r}. Give the same form"
        )
    if not len(found.labels):
        raise DataError(f"{where}: has no examples to test on")
    targets = label_column.encode_test(found.labels, train.class_names, where)
    if isinstance(found.inputs, Tensor) and isinstance(train.inputs, Tensor):
        if found.inputs.shape[1:] != train.inputs.shape[1:]:
            shapes = tuple(found.inputs.shape[1:]), tuple(train.inputs.shape[1:])
            raise DataError(f"{where}: an input has the shape {shapes[0]}, but {shapes[1]} in the training data")
        return RawData(train.name, train.kind, found.inputs, targets, train.class_names, found.groups)
    assert not isinstance(found.inputs, Tensor) and not isinstance(train.inputs, Tensor)  # both are tables
    inputs = clean(found.inputs, where, train.inputs)
    return RawData(train.name, train.kind, inputs, targets, train.class_names, found.groups)


def _find(
    path: Path, target: str | None, group: tuple[str, ...], size: tuple[int, int] | None, like: Tensor | None = None
) -> Found:
    if path.is_dir():
        if target is not None or group:
            raise ArgumentError(
                f"target = {target!r}, group = {group!r}: must be left out for a folder; its subfolders are the classes"
            )
        return read_folder(path, size, like)
    if size is not None:
        raise ArgumentError(f"image_size = {size!r}: must be left out for a file; it resizes the images of a folder")
    if path.suffix == ".npz":
        return read_npz(path, target, group)
    if path.name.endswith(TABLES):
        return read_table(path, target, group)
    raise DataError(
        f"{path}: unknown form: must be {', '.join(TABLES)}, .npz or a folder with a subfolder for each class"
    )


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    near = suggestion(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise DataError(f"{path}: no such file or folder (relative paths start at {Path.cwd()}). {near}".rstrip())


def _files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file


def _stamp(path: Path) -> str:
    """Changes when a file is changed, added, removed or renamed."""
    files = [path] if path.is_file() else _files(path)
    seen = [(str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _sha256(file: Path) -> hashlib._Hash:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")
