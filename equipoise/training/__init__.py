"""Training: methods, their hooks, and the loop they plug into."""

from equipoise.training.batch import Batch, Examples, Loader, Output, indexed
from equipoise.training.fit import fit
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run, start
from equipoise.training.space import Choice, Integer, LogUniform, Uniform
from equipoise.training.task import Problem, RunResult, SupervisedTask, Task, TradeOff

__all__ = [
    "Batch",
    "Choice",
    "Examples",
    "Integer",
    "Loader",
    "LogUniform",
    "Method",
    "Output",
    "Paper",
    "Problem",
    "Run",
    "RunResult",
    "SupervisedTask",
    "Task",
    "TradeOff",
    "Uniform",
    "fit",
    "indexed",
    "start",
]
