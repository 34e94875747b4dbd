"""Protected attributes of any type as numbers: what the measures of dependence and the gaps between groups work with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equipoise.data.columns import as_text, is_number, rows
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer

KINDS = ("continuous", "binary", "categorical")
MANY = 10  # a numeric column with more values than these is continuous


def detect_kind(column: pd.Series) -> str:
    """What a column probably is: "binary" (two values), "continuous" (numbers, more than 10 values) or "categorical"."""
    values = column.nunique()
    if values == 2:
        return "binary"
    return "continuous" if is_number(column) and values > MANY else "categorical"


class ProtectedEncoder:
    """Encodes protected attributes so that none outweighs the others; fitted on training data.

    continuous: to [0, 1] by the smallest and largest training value (values beyond them lie outside). binary: to {0, 1}, in the
    order of the values. categorical: one column for each category, none dropped.

    >>> encoder = ProtectedEncoder().fit({"sex": ["f", "m", "m"], "age": [20, 60, 30]}, ["binary", "continuous"])
    >>> [column.tolist() for column in encoder.transform({"sex": ["m", "f"], "age": [40, 20]})]
    [[1.0, 0.0], [0.5, 0.0]]

    After ``fit``: ``names``, ``kinds`` (both in order), ``values`` (the training values of those that are not continuous).
    """

    names: list[str]
    kinds: list[str]
    values: dict[str, list[str]]

    def fit(self, columns: Any, kinds: Mapping[str, str] | Sequence[str] | None = None) -> ProtectedEncoder:
        """Learn ranges and categories.

        columns: a DataFrame, a mapping from names to columns (N,), or a sequence of columns. kinds: of each column, by name or in
        order, "continuous", "binary" or "categorical"; None detects them. Raises ``DataError`` for missing values, a constant
        attribute, or one that its kind does not fit.
        """
        frame = _frame(columns)
        self.names = [str(name) for name in frame]
        self.kinds = self._kinds(frame, kinds)
        self.values, self._range = {}, {}
        for name, kind in zip(self.names, self.kinds, strict=True):
            column = frame[name]
            _refuse_missing(column)
            if column.nunique() < 2:
                value = as_text(column).iloc[0]
                raise DataError(
                    f"protected attribute {name!r} is {value!r} in all {len(column)} rows: a constant has no groups to compare. "
                    "Leave it out"
                )
            if kind == "continuous":
                numbers = _numbers(column)
                self._range[name] = (float(numbers.min()), float(numbers.max()), np.sort(numbers))
                continue
            texts = as_text(column).drop_duplicates().tolist()
            self.values[name] = sorted(texts, key=lambda t: (float(t), t) if is_number(column) else t)
            if kind == "binary" and len(texts) != 2:
                raise DataError(
                    f"protected attribute {name!r} has {len(texts)} values: a binary one has 2. Call it categorical"
                )
        return self

    def transform(self, columns: Any) -> list[Tensor]:
        """One float32 tensor for each attribute: (N,), or (N, categories) for a categorical one.

        A category that the training data lack becomes a row of zeros, with a warning.
        """
        frame = self._same(columns)
        encoded = []
        for name, kind in zip(self.names, self.kinds, strict=True):
            if kind == "continuous":
                low, high, _ = self._range[name]
                encoded.append(torch.tensor((_numbers(frame[name]) - low) / (high - low), dtype=torch.float32))
                continue
            codes = self._codes(frame[name], kind)
            hot = torch.nn.functional.one_hot(codes, len(self.values[name]) + 1)[:, :-1].float()
            encoded.append(hot[:, 1] if kind == "binary" else hot)
        return encoded

    def groups(self, columns: Any, bins: int = 2) -> dict[str, Tensor]:
        """The group of each example by each attribute, (N,) int64: its category, or the bin of a continuous value.

        bins: continuous attributes are cut at this many quantiles of the training values, >= 2. A new category has its own code.
        """
        check_integer("bins", bins, 2)
        frame = self._same(columns)
        found = {}
        for name, kind in zip(self.names, self.kinds, strict=True):
            if kind == "continuous":
                edges = np.quantile(self._range[name][2], np.arange(1, bins) / bins)
                found[name] = torch.from_numpy(
                    np.searchsorted(edges, _numbers(frame[name]), side="right").astype(np.int64)
                )
            else:
                found[name] = self._codes(frame[name], kind)
        return found

    def _codes(self, column: pd.Series, kind: str) -> Tensor:
        """Positions in the training values; their number for a value that is new."""
        known = {value: i for i, value in enumerate(self.values[str(column.name)])}
        texts = as_text(column)
        codes = texts.map(known).fillna(len(known)).to_numpy(dtype=np.int64)
        if (new := codes == len(known)).any():
            text = f"protected attribute {column.name!r} is {texts[new].iloc[0]!r} in {rows(new)}, which the training data lack"
            if kind == "binary":
                raise DataError(f"{text}. Correct these rows, or call the attribute categorical")
            warnings.warn(f"{text}: encoded as zeros", stacklevel=3)
        return torch.tensor(codes)

    def _kinds(self, frame: pd.DataFrame, kinds: Mapping[str, str] | Sequence[str] | None) -> list[str]:
        if kinds is None:
            return [detect_kind(frame[name]) for name in self.names]
        given = [kinds.get(name) for name in self.names] if isinstance(kinds, Mapping) else list(kinds)
        if len(given) != len(self.names):
            raise ArgumentError(f"kinds = {given}: must name one kind for each of {', '.join(self.names)}")
        for kind in given:
            check_choice("kinds", kind, KINDS)
        return [str(kind) for kind in given]

    def _same(self, columns: Any) -> pd.DataFrame:
        if not hasattr(self, "names"):
            raise ArgumentError("ProtectedEncoder is not fitted: call fit(columns, kinds) first")
        frame = _frame(columns)
        absent = [name for name in self.names if name not in frame]
        if absent:
            raise DataError(
                f"protected attribute {absent[0]!r} is missing; given are {', '.join(map(str, frame)) or 'none'}. Add it"
            )
        for name in self.names:
            _refuse_missing(frame[name])
        return frame


def intersections(groups: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> list[Tensor]:
    """The cell of each example, by all attributes together: one (N,) int64 for each mapping, with the same codes in all."""
    stacked = [torch.stack(list(part.values()), 1) for part in (groups, *others)]
    _, codes = torch.cat(stacked).unique(dim=0, return_inverse=True)
    return list(codes.split([len(part) for part in stacked]))


def _frame(columns: Any) -> pd.DataFrame:
    """Columns as a DataFrame with text names."""
    if not isinstance(columns, pd.DataFrame):
        named = columns if isinstance(columns, Mapping) else dict(enumerate(columns))
        arrays = {str(k): v.cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in named.items()}
        lengths = {len(v) for v in arrays.values() if v.ndim == 1}
        if len(lengths) != 1 or any(v.ndim != 1 for v in arrays.values()):
            shapes = {name: v.shape for name, v in arrays.items()}
            raise ArgumentError(f"columns have shapes {shapes}: must all be (N,), one value for each example")
        return pd.DataFrame(arrays)
    return columns.rename(columns=str).reset_index(drop=True)


def _numbers(column: pd.Series) -> np.ndarray:
    values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    if not (finite := np.isfinite(values)).all():
        value = as_text(column)[~finite].iloc[0]
        raise DataError(
            f"protected attribute {column.name!r} is {value!r} in {rows(~finite)}: a continuous one is a finite number. "
            "Correct these rows, or call it categorical"
        )
    return values


def _refuse_missing(column: pd.Series) -> None:
    if not len(column):
        raise DataError(f"protected attribute {column.name!r} has no rows")
    if (missing := column.isna().to_numpy()).any():
        raise DataError(
            f"protected attribute {column.name!r} is missing in {rows(missing)}: fill it in (a category of its own, for instance), "
            "or remove these rows"
        )
