"""The conformance kit: checks for methods and parts, ours and everyone's. Needs no test framework.

from equipoise.testing import check_method

print(check_method(MyMethod))
"""

from equipoise.testing.distributed import check_methods_ddp, spawn
from equipoise.testing.method import METHOD_CHECKS, check_method
from equipoise.testing.parts import (
    LAYER_CHECKS,
    LOSS_CHECKS,
    REGULARIZER_CHECKS,
    check_layer,
    check_loss,
    check_regularizer,
)
from equipoise.testing.problem import (
    KeywordNetwork,
    TinyModalities,
    TinyNetwork,
    TinyProblem,
    classification,
    multimodal,
    regression,
)
from equipoise.testing.report import ConformanceError, Report

__all__ = [
    "LAYER_CHECKS",
    "LOSS_CHECKS",
    "METHOD_CHECKS",
    "REGULARIZER_CHECKS",
    "ConformanceError",
    "KeywordNetwork",
    "Report",
    "TinyModalities",
    "TinyNetwork",
    "TinyProblem",
    "check_layer",
    "check_loss",
    "check_method",
    "check_methods_ddp",
    "check_regularizer",
    "classification",
    "multimodal",
    "regression",
    "spawn",
]
