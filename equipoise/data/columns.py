"""What the readers of tables share: types of columns, one spelling for each value, and messages that name rows."""

from __future__ import annotations

from decimal import Decimal
from numbers import Number

import numpy as np
import pandas as pd

from equipoise.errors import DataError


def is_number(column: pd.Series) -> bool:
    """Whether a column holds numbers to compute with; booleans are categories."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def as_text(column: pd.Series) -> pd.Series:
    """Every value as a string (object dtype), None where it is missing; 1, 1.0 and "1" are spelt alike."""
    present = column.notna().to_numpy()
    try:
        codes, values = pd.factorize(column.astype(object).where(present, None))
    except TypeError as error:
        raise DataError(
            f"column {column.name!r}: holds lists or other compound values: must be numbers or text"
        ) from error
    texts = np.array([*map(_text, values), None], dtype=object)  # code -1 (missing) picks the last
    return pd.Series(texts[codes], index=column.index, name=column.name, dtype=object)


def _text(value: object) -> str:
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    return str(value)


def rows(mask: pd.Series | np.ndarray) -> str:
    """``data row 3`` or ``data rows 3, 7, 9 and 12 more``: where a mask is true, counted from 1, a header left out."""
    found = np.flatnonzero(np.asarray(mask)) + 1
    if len(found) == 1:
        return f"data row {found[0]}"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"data rows {', '.join(map(str, found[:5]))}{more}"


def stray_text(column: pd.Series) -> np.ndarray:
    """Mask of values that are no numbers in a column of text, most of which is numbers; all False for any other column."""
    if is_number(column) or isinstance(column.dtype, pd.CategoricalDtype):
        return np.zeros(len(column), dtype=bool)
    present = column.notna().to_numpy()
    text = column.astype(object).map(lambda value: isinstance(value, str)).to_numpy(dtype=bool)
    numeric = pd.to_numeric(column.astype(object).where(text, None), errors="coerce").notna().to_numpy()
    stray = present & ~numeric
    return stray if 2 * numeric.sum() > present.sum() else np.zeros_like(stray)


def clean(frame: pd.DataFrame, where: str, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """Input columns as float64 numbers or as text (see ``as_text``), or a ``DataError`` that names column, row and value.

    ``like``: a cleaned frame whose columns and types these must be (the training data, for a test file).
    """
    if like is not None:
        absent = [name for name in like if name not in frame]
        if absent:
            raise DataError(f"{where}: has no column {absent[0]!r}, which the training data have. Add it")
        frame = frame[list(like)]
    if not len(frame.columns):
        raise DataError(f"{where}: has no input columns beside target and groups. Add the columns to predict from")
    typed = {name: _clean(frame[name], where, None if like is None else is_number(like[name])) for name in frame}
    return pd.DataFrame(typed).reset_index(drop=True)


def _clean(column: pd.Series, where: str, number: bool | None) -> pd.Series:
    """One column; ``number`` says what it must be, None that it may be either."""
    at = f"{where}: column {column.name!r}"
    if column.dtype.kind in "mMc":
        raise DataError(
            f"{at} holds {column.dtype}: must be numbers or text. Turn it into numbers, such as days since a date"
        )
    present = column.dropna()
    if column.dtype == object:
        odd = present.map(lambda value: not isinstance(value, str | Number | Decimal | np.generic)).to_numpy(dtype=bool)
        if odd.any():
            value = present[odd].iloc[0]
            raise DataError(
                f"{at} holds {type(value).__name__} values: must be numbers or text. Remove or convert the column"
            )
        if len(present) and present.map(lambda value: isinstance(value, Decimal)).all():
            column = column.astype("float64")
    if number is False:
        return as_text(column)
    stray = stray_text(column)
    if number and not is_number(column):
        numeric = pd.to_numeric(column.astype(object), errors="coerce")
        stray = (column.notna() & numeric.isna()).to_numpy()
        column = column if stray.any() else numeric
    if stray.any():
        value = column[stray].iloc[0]
        raise DataError(
            f"{at} is numeric but for {value!r} in {rows(stray)}: must be numbers throughout. Correct the value, leave it "
            "empty if it is missing, or put a letter before every value if the column holds codes and not numbers"
        )
    if not is_number(column):
        return as_text(column)
    column = column.astype("float64")
    infinite = np.isinf(column.to_numpy())
    if infinite.any():
        raise DataError(f"{at} is infinite in {rows(infinite)}: must be finite. Correct the value, or leave it empty")
    return column
