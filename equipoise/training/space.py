"""Search spaces: what may be tuned, and over which range. Free of torch, so that listing methods is fast.

A dimension maps a number ``u`` in [0, 1), drawn quasi-randomly by the protocol, to a value; and says whether a value lies
on its edge (a best configuration on the edge means that the space may be too small).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from equipoise.errors import refuse


@dataclass(frozen=True)
class Uniform:
    """A real number in [low, high], uniform."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            refuse("low, high", (self.low, self.high), "satisfy low < high")

    def at(self, u: float) -> float:
        return self.low + u * (self.high - self.low)

    def on_edge(self, value: float) -> bool:
        margin = 0.02 * (self.high - self.low)
        return value <= self.low + margin or value >= self.high - margin

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class LogUniform:
    """A positive real number in [low, high], uniform on the log scale."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            refuse("low, high", (self.low, self.high), "satisfy 0 < low < high")

    def at(self, u: float) -> float:
        # Rounding must not leave the interval: a method may refuse what lies outside.
        return min(self.high, max(self.low, math.exp(math.log(self.low) + u * math.log(self.high / self.low))))

    def on_edge(self, value: float) -> bool:
        margin = 0.02 * math.log(self.high / self.low)
        position = math.log(value)
        return position <= math.log(self.low) + margin or position >= math.log(self.high) - margin

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}] (log)"


@dataclass(frozen=True)
class Integer:
    """An integer in [low, high], both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low < self.high:
            refuse("low, high", (self.low, self.high), "satisfy low < high")

    def at(self, u: float) -> int:
        return min(self.high, self.low + int(u * (self.high - self.low + 1)))

    def on_edge(self, value: int) -> bool:
        return value in (self.low, self.high)

    def __str__(self) -> str:
        return f"{{{self.low}..{self.high}}}"


@dataclass(frozen=True)
class Choice:
    """One of a few values. ``ordered`` says that they lie on a scale, so that the first and last are edges."""

    values: tuple[Any, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            refuse("values", self.values, "hold at least one value")

    def at(self, u: float) -> Any:
        return self.values[min(len(self.values) - 1, int(u * len(self.values)))]

    def on_edge(self, value: Any) -> bool:
        return self.ordered and len(self.values) > 2 and value in (self.values[0], self.values[-1])

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.values)) + "}"


Dimension = Uniform | LogUniform | Integer | Choice
Space = Mapping[str, Dimension]
