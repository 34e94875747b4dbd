"""What a check says: ``ConformanceError`` where it fails, and a ``Report`` of what passed and what was left out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from equipoise.errors import ArgumentError, suggestion


class ConformanceError(AssertionError):
    """A method, loss, regularizer or layer breaks the contract.

    Attributes: ``subject`` (its name), ``check`` (the check that failed), ``seen`` (what happened), ``remedy`` (what to do).
    """

    def __init__(self, subject: str, check: str, seen: str, remedy: str) -> None:
        super().__init__(f"{subject} fails the check {check!r}: {seen}. {remedy}")
        self.subject, self.check, self.seen, self.remedy = subject, check, seen, remedy


class Failed(Exception):
    """Raised inside a check: what was seen, and the remedy. ``Report.run`` adds the names."""

    def __init__(self, seen: str, remedy: str) -> None:
        super().__init__(seen, remedy)
        self.seen, self.remedy = seen, remedy


class Skipped(Exception):
    """Raised inside a check that does not apply; holds the reason."""


def fail(seen: str, remedy: str) -> NoReturn:
    """End the present check as failed."""
    raise Failed(seen, remedy)


def skip(reason: str) -> NoReturn:
    """End the present check as not applicable."""
    raise Skipped(reason)


@dataclass
class Report:
    """The checks of one subject that passed, and those that were skipped with the reason; ``print`` it.

    subject: the method's slug, or the name of the loss, regularizer or layer.
    passed: names of the checks, in the order in which they ran.
    skipped: reason by name of the check.
    seconds: time that the checks took.
    """

    subject: str
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.passed)} checks passed, {len(self.skipped)} skipped, {self.seconds:.1f} s"]
        if self.passed:
            wrap = textwrap.TextWrapper(
                100, initial_indent="  passed: ", subsequent_indent="    ", break_on_hyphens=False
            )
            lines.append(wrap.fill(", ".join(self.passed)))
        for reason in dict.fromkeys(self.skipped.values()):
            names = ", ".join(name for name, why in self.skipped.items() if why == reason)
            lines.append(f"  skipped: {names} ({reason})")
        return "\n".join(lines)


def check_names(skips: Mapping[str, str], only: Iterable[str] | None, known: Iterable[str]) -> None:
    """Refuse names of checks that do not exist, and skips without a reason."""
    names = list(known)
    for argument, given in (("skip", list(skips)), ("only", list(only or ()))):
        for name in given:
            if name not in names:
                hint = suggestion(name, names) or f"The checks are {', '.join(names)}"
                raise ArgumentError(f"{argument} = {name!r}: there is no such check. {hint}")
    for name, reason in skips.items():
        if not (isinstance(reason, str) and reason.strip()):
            raise ArgumentError(f"skip[{name!r}] = {reason!r}: must be the reason why the check does not apply")
