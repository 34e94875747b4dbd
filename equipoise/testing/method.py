"""``check_method``: everything that a method must satisfy, on a problem so small that it takes about a second.

Subclass ``Method``, then put this into a test, or at the end of a notebook::

    from equipoise.testing import check_method

    print(check_method(MyMethod))
    check_method(MyMethod, settings={"strength": 2.0}, ddp=True)

The first check that fails raises ``ConformanceError``, which says what was seen and what to do. ``METHOD_CHECKS`` lists the
checks in their order. Needs no test framework.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from equipoise.errors import ArgumentError
from equipoise.testing import behaviour, declaration
from equipoise.testing.compare import difference, snapshot
from equipoise.testing.distributed import DDP_CHECKS, check_methods_ddp
from equipoise.testing.problem import TinyProblem, classification
from equipoise.testing.report import ConformanceError, Failed, Report, Skipped, check_names
from equipoise.testing.subject import Subject
from equipoise.training import Method

_CHECKS: dict[str, Callable[[Subject], None]] = {
    "name": declaration.check_name,
    "summary": declaration.check_summary,
    "paper": declaration.check_paper,
    "hooks": declaration.check_hooks,
    "settings": declaration.check_settings,
    "space": declaration.check_space,
    "errors": declaration.check_errors,
    "trains": behaviour.check_trains,
    "global-state": behaviour.check_global_state,
    "determinism": behaviour.check_determinism,
    "float64": behaviour.check_float64,
    "random-state": behaviour.check_random_state,
    "data-order": behaviour.check_data_order,
    "batch-unchanged": behaviour.check_batch_unchanged,
    "modes": behaviour.check_modes,
    "neutral": behaviour.check_neutral,
    "evaluation": behaviour.check_evaluation,
    "state": behaviour.check_state,
    "resume": behaviour.check_resume,
    "interleaved": behaviour.check_interleaved,
    "permuted-rows": behaviour.check_permuted_rows,
    "last-batch": behaviour.check_last_batch,
    "bf16": behaviour.check_bf16,
    "accumulation": behaviour.check_accumulation,
    "dict-inputs": behaviour.check_dict_inputs,
    "missing-data": behaviour.check_missing_data,
    "missing-index": behaviour.check_missing_index,
    "conflict": behaviour.check_conflict,
    "compile": behaviour.check_compile,
}
METHOD_CHECKS: dict[str, str] = {
    **{name: (inspect.getdoc(check) or "").split("\n\n")[0] for name, check in _CHECKS.items()},
    **DDP_CHECKS,
}


def check_method(
    method: type[Method],
    *,
    settings: Mapping[str, Any] | None = None,
    problem: TinyProblem | None = None,
    ddp: bool = False,
    compile: bool = False,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check a method against the contract of ``equipoise.Method``; return the report of what passed and was skipped.

    method: the class, not an object.
    settings: constructor arguments under which it is checked, for instance a small network's sizes; by default none.
    problem: what it is trained on; by default ``classification()``. ``regression()`` is there too, or make a ``TinyProblem``.
    ddp: also train in two processes and compare with one; takes a few seconds. For many methods use ``check_methods_ddp``.
    compile: also train a model compiled by ``torch.compile``.
    skip: the reason by name of the check that does not apply to the method's idea, for instance
        ``{"accumulation": "the loss ranks the examples of a batch"}``. Reasons stand in the report.
    only: names of the checks to run, to look at one more closely.

    Raises ``ConformanceError`` at the first check that fails, ``ArgumentError`` where a check does not exist.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise ArgumentError(f"method = {method!r}: must be a subclass of equipoise.Method (the class, not an object)")
    skips = dict(skip or {})
    check_names(skips, only, METHOD_CHECKS)
    problem = classification() if problem is None else problem
    if difference(*(snapshot(dict(problem.network().state_dict())) for _ in range(2))):
        raise ArgumentError(
            "problem.network gives other initial weights at every call: seed them, as TinyNetwork(seed=0) does, or load a copy"
        )
    subject = Subject(method, dict(settings or {}), problem)
    report = Report(subject.label)
    begin = time.perf_counter()
    for name, check in _CHECKS.items():
        if only is not None and name not in only:
            continue
        if name in skips:
            report.skipped[name] = skips[name]
        elif name == "compile" and not compile and only is None:
            report.skipped[name] = "not asked for (compile=True)"
        else:
            run_check(report, name, lambda check=check: check(subject))  # type: ignore[misc]
    if ddp or (only is not None and any(name in only for name in DDP_CHECKS)):
        wanted = {name: reason for name, reason in skips.items() if name in DDP_CHECKS}
        (other,) = check_methods_ddp([(method, subject.settings, wanted)], problem=subject.problem)
        report.passed += other.passed
        report.skipped |= other.skipped
    elif only is None:
        report.skipped |= dict.fromkeys(DDP_CHECKS, "not asked for (ddp=True)")
    report.seconds = time.perf_counter() - begin
    return report


def run_check(report: Report, name: str, check: Callable[[], None]) -> None:
    """Run one check and enter its outcome; whatever a check raises becomes a ``ConformanceError`` with its name."""
    try:
        check()
    except Skipped as reason:
        report.skipped[name] = str(reason)
    except Failed as failed:
        raise ConformanceError(report.subject, name, failed.seen, failed.remedy) from failed.__cause__
    except Exception as error:  # the subject's own code may raise anything
        text = f"it raises {type(error).__name__}: {error}"
        raise ConformanceError(report.subject, name, text, "The traceback above shows where") from error
    else:
        report.passed.append(name)
