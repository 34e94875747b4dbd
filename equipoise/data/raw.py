"""``RawData``: a data set before it is split and preprocessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from equipoise.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RawData:
    """N examples as they were found.

    name: what reports call the data.
    kind: "image" (C, H, W), "sequence" (C, L) or "table".
    inputs: float32 tensor (N, ...), or for a table a DataFrame of N rows, not yet imputed, scaled or encoded.
    targets: int64 classes (N,) for classification, float32 values (N,) for regression.
    class_names: the name of each class; None for regression.
    groups: DataFrame of N rows whose columns describe the examples (a sensitive attribute, a domain) and are no inputs.
    test: the data's own test set, of the same kind and with the same classes; None where a split must set one apart.
    """

    name: str
    kind: str
    inputs: Tensor | pd.DataFrame
    targets: Tensor
    class_names: tuple[str, ...] | None = None
    groups: pd.DataFrame | None = None
    test: RawData | None = None

    def __post_init__(self) -> None:
        rows = {"inputs": self.inputs, "groups": self.groups}
        for part, value in rows.items():
            if value is not None and len(value) != len(self.targets):
                raise DataError(f"{self.name}: {part} has {len(value)} rows but targets has {len(self.targets)}")
        if (self.class_names is None) != self.targets.is_floating_point():
            raise DataError(
                f"{self.name}: targets = {self.targets.dtype}: must be int64 with class_names, or float32 without them"
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for regression."""
        return None if self.class_names is None else len(self.class_names)

    def copy(self) -> RawData:
        """The same data in memory of its own."""
        return replace(
            self,
            inputs=self.inputs.clone() if isinstance(self.inputs, Tensor) else self.inputs.copy(),
            targets=self.targets.clone(),
            groups=None if self.groups is None else self.groups.copy(),
            test=None if self.test is None else self.test.copy(),
        )
