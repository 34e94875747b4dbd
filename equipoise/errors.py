"""The errors a user can cause. Each message names the argument, its value and the remedy."""

from __future__ import annotations

from typing import NoReturn


class EquipoiseError(Exception):
    """Base of every error that Equipoise raises on purpose."""


class ArgumentError(EquipoiseError, ValueError):
    """An argument or setting has a value outside its range, or a name that does not exist."""


class DataError(EquipoiseError, ValueError):
    """The data cannot be trained on: missing labels, one class, text in a numeric column, NaN, ..."""


class MethodConflictError(EquipoiseError):
    """Two methods of one run claim a hook that only one may have."""


class NonFiniteError(EquipoiseError, ArithmeticError):
    """A loss term or the gradient became NaN or infinite; says at which step and in which term."""


class CheckpointError(EquipoiseError):
    """A checkpoint is missing, damaged or does not belong to this run."""


class StoreError(EquipoiseError):
    """The comparison's store cannot be opened, read or written."""


class MissingDependencyError(EquipoiseError, ImportError):
    """An optional package is needed; says which extra installs it."""


def refuse(argument: str, value: object, must: str, remedy: str = "") -> NoReturn:
    """Raise the one kind of message used everywhere: ``argument = value: must ...; remedy``."""
    raise ArgumentError(f"{argument} = {value!r}: must {must}" + (f". {remedy}" if remedy else ""))


def check_range(
    argument: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse a number outside an interval (closed unless said), NaN, or something that is no number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = (
        number
        and value == value
        and (low is None or (value > low if open_low else value >= low))
        and (high is None or (value < high if open_high else value <= high))
    )
    if not ok:
        left = "(-inf" if low is None else ("(" if open_low else "[") + f"{low:g}"
        right = "inf)" if high is None else f"{high:g}" + (")" if open_high else "]")
        refuse(argument, value, f"be a number in {left}, {right}")


def check_integer(argument: str, value: int, low: int | None = None, high: int | None = None) -> None:
    """Refuse anything but an integer in the closed interval [low, high]."""
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not (ok and (low is None or value >= low) and (high is None or value <= high)):
        bounds = f" >= {low}" if high is None else f" in [{low}, {high}]"
        refuse(argument, value, "be an integer" + (bounds if low is not None or high is not None else ""))


def check_choice(argument: str, value: object, choices: tuple[object, ...] | list[object] | list[str]) -> None:
    """Refuse a value that is not one of ``choices``; a string gets a suggestion."""
    if value not in choices:
        refuse(argument, value, f"be one of {', '.join(map(repr, choices))}", suggestion(value, choices))


def suggestion(value: object, choices: tuple[object, ...] | list[object] | list[str]) -> str:
    """``Did you mean 'elr'?`` for a near miss, else an empty string."""
    import difflib

    names = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(str(value).lower().replace("_", "-"), names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""
