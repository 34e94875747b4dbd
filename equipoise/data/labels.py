"""A column of labels as classes or values, and everything that makes labels impossible to train on."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equipoise.data.columns import as_text, is_number, rows, stray_text
from equipoise.errors import DataError

KINDS = ("auto", "classification", "regression")
FEW = 20
LEAST_EXAMPLES = 10


def encode(labels: pd.Series, kind: str, where: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Targets and class names: int64 (N,) numbered in the order of the names, or float32 (N,) and None.

    kind: "classification", "regression" or "auto": strings, booleans and integers are classes; so are at most 20 different
    whole numbers stored as floating point (integers are, where a file had gaps once); other numbers are values.
    """
    _refuse_missing(labels, where)
    if kind == "auto":
        kind = "regression" if _continuous(labels) else "classification"
    if kind == "regression":
        return _values(labels, where), None
    stray = stray_text(labels)
    if stray.any() and labels[~stray].nunique() > FEW:
        _refuse_text(labels, stray, where)
    texts = as_text(labels)
    names = texts.drop_duplicates().tolist()
    names.sort(key=lambda text: (float(text), text) if is_number(labels) else text)
    return _positions(texts, names), tuple(names)


def encode_test(labels: pd.Series, names: tuple[str, ...] | None, where: str) -> Tensor:
    """The targets of a test file, numbered as in the training data; a class that those lack is refused."""
    _refuse_missing(labels, where)
    if names is None:
        return _values(labels, where)
    texts = as_text(labels)
    unknown = ~texts.isin(names).to_numpy()
    if unknown.any():
        raise DataError(
            f"{where}: {labels.name!r} is {texts[unknown].iloc[0]!r} in {rows(unknown)}, a class that the training data lack. "
            f"Their classes are {_some(names)}"
        )
    return _positions(texts, list(names))


def check(targets: Tensor, names: tuple[str, ...] | None, label: str, where: str, least: int) -> None:
    """Refuse too few examples, a target that never varies, and classes with fewer than ``least`` examples."""
    if len(targets) < LEAST_EXAMPLES:
        raise DataError(f"{where}: has {len(targets)} examples: at least {LEAST_EXAMPLES} are needed. Add examples")
    if names is None:
        if bool((targets == targets[0]).all()):
            raise DataError(f"{where}: {label!r} is {targets[0].item():g} in every row: there is nothing to predict")
        return
    if len(names) < 2:
        raise DataError(
            f"{where}: {label!r} has one class only, {names[0]!r}: at least 2 are needed. Is it the right target?"
        )
    counts = torch.bincount(targets, minlength=len(names))
    small = (counts < least).nonzero().flatten().tolist()
    if small:
        parts = "train, validation and test" if least > 2 else "train and validation"
        quantity = " If the target is a quantity, read it with kind='regression'" if _all_numbers(names) else ""
        shown = _some([f"{names[c]!r} ({int(counts[c])})" for c in small])
        raise DataError(
            f"{where}: {len(small)} of {len(names)} classes of {label!r} have fewer than {least} examples, too few to appear in "
            f"{parts}: {shown}. Add examples, merge these classes or remove them.{quantity}"
        )


def _continuous(labels: pd.Series) -> bool:
    if not is_number(labels) or pd.api.types.is_integer_dtype(labels):
        return False
    values = labels.to_numpy(dtype=np.float64)
    return not bool((values == np.round(values)).all()) or labels.nunique() > FEW


def _values(labels: pd.Series, where: str) -> Tensor:
    numeric = pd.to_numeric(labels.astype(object), errors="coerce")
    if numeric.isna().any():
        _refuse_text(labels, numeric.isna().to_numpy(), where)
    infinite = np.isinf(numeric.to_numpy(dtype=np.float64))
    if infinite.any():
        raise DataError(f"{where}: {labels.name!r} is infinite in {rows(infinite)}. Correct or remove these rows")
    return torch.tensor(numeric.to_numpy(dtype=np.float64), dtype=torch.float32)


def _refuse_missing(labels: pd.Series, where: str) -> None:
    missing = labels.isna().to_numpy() | (as_text(labels).str.strip() == "").to_numpy(dtype=bool)
    if missing.any():
        raise DataError(
            f"{where}: {labels.name!r} is missing in {rows(missing)}: every example needs a label. Fill in or remove these rows"
        )


def _refuse_text(labels: pd.Series, stray: np.ndarray, where: str) -> None:
    value = labels[stray].iloc[0]
    raise DataError(
        f"{where}: {labels.name!r} is {value!r} in {rows(stray)}: must be a number as in the other rows. "
        "Correct or remove these rows"
    )


def _positions(texts: pd.Series, names: list[str]) -> Tensor:
    return torch.tensor(texts.map({name: i for i, name in enumerate(names)}).to_numpy(dtype=np.int64))


def _all_numbers(names: tuple[str, ...]) -> bool:
    return bool(pd.to_numeric(pd.Series(names), errors="coerce").notna().all())


def _some(values: tuple[str, ...] | list[str]) -> str:
    return ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
