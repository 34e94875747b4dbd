"""The IDX format of MNIST-like sets: a big-endian header, then unsigned bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from equipoise.errors import DataError

UNSIGNED_BYTE = 8


def find(folder: Path, stem: str) -> Path | None:
    """The file ``stem`` or ``stem.gz`` in a folder; None if neither is there."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Read an array of uint8. Raises ``DataError`` where the file is damaged, cut short, or of another type."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Install it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: is no IDX file of unsigned bytes. Install it again, or name another folder")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: holds {body.size} bytes of data but its header promises {shape}. Install it again")
    return body.reshape(shape)  # read-only, because it lies in a bytes object
