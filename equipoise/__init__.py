"""Equipoise: training methods implemented right once, and compared fairly.

    import equipoise
    from equipoise.noisy_labels import ELR

    run = equipoise.fit(model, (inputs, labels), epochs=40, methods=[ELR(lam=3.0)])

Names are imported on first use, so that ``import equipoise`` and the command line's help stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.catalogue import methods, tasks
    from equipoise.comparison import Arm, Claim, Comparison, compare
    from equipoise.training import Batch, Examples, Method, Output, Paper, Run, Task, fit, indexed, start

__version__ = "0.1.0"
_WHERE = {
    "equipoise.catalogue": ("methods", "tasks"),
    "equipoise.comparison": ("Arm", "Claim", "Comparison", "compare"),
    "equipoise.training": ("Batch", "Examples", "Method", "Output", "Paper", "Run", "Task", "fit", "indexed", "start"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Arm",
    "Batch",
    "Claim",
    "Comparison",
    "Examples",
    "Method",
    "Output",
    "Paper",
    "Run",
    "Task",
    "compare",
    "fit",
    "indexed",
    "methods",
    "start",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
