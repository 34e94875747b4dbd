"""Comparison: the fair protocol, its statistics, its store and its report. Imports on first use, to keep the command line fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.comparison.claims import Claim
    from equipoise.comparison.protocol import Arm, compare
    from equipoise.comparison.result import ArmResult, Comparison

_MODULE_OF = {
    "Arm": "protocol",
    "ArmResult": "result",
    "Claim": "claims",
    "Comparison": "result",
    "compare": "protocol",
}
__all__ = ["Arm", "ArmResult", "Claim", "Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equipoise.comparison' has no attribute {name!r}")
    return getattr(import_module(f"equipoise.comparison.{_MODULE_OF[name]}"), name)
