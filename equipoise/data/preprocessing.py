"""Typed preprocessing of tables, fitted on training rows only."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equipoise.data.columns import as_text, is_number

MAX_CATEGORIES = 100


class TablePreprocessor:
    """Turns the columns of a table into one float32 row per example.

    Numbers: a missing value becomes the median, then the column is standardised. All else (text, booleans, categories): a
    missing value becomes the most frequent one, then the column is one-hot encoded. A category that the training rows do not
    have is ignored (all zeros); of more than 100 categories the rarest share a column. Medians, means and categories are
    those of the rows given to ``fit``.
    """

    def fit(self, frame: pd.DataFrame) -> TablePreprocessor:
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
        categories = make_pipeline(
            SimpleImputer(strategy="most_frequent", keep_empty_features=True),
            OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=MAX_CATEGORIES, sparse_output=False),
        )
        numeric = [str(name) for name in frame if is_number(frame[name])]
        others = [str(name) for name in frame if not is_number(frame[name])]
        self._columns = (numeric, others)
        self._transformer = ColumnTransformer([("numbers", numbers, numeric), ("categories", categories, others)])
        self._transformer.fit(self._typed(frame))
        return self

    def transform(self, frame: pd.DataFrame) -> Tensor:
        """Float32 (N, features)."""
        rows = np.ascontiguousarray(self._transformer.transform(self._typed(frame)), dtype=np.float32)
        return torch.from_numpy(rows)

    def _typed(self, frame: pd.DataFrame) -> pd.DataFrame:
        numeric, others = self._columns
        columns: dict[str, pd.Series] = {name: frame[name].astype("float64") for name in numeric}
        for name in others:
            text = as_text(frame[name])
            columns[name] = text.where(text.notna(), np.nan)
        return pd.DataFrame(columns)
