"""Two processes against one: toys, the library's own methods, and training itself. One start for each group."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from kit_library import METHODS, PROBLEMS, available, case_of, missing
from kit_toys import BatchMean, FailsInOne, LocalTable, Memory

from equipoise.errors import ArgumentError
from equipoise.testing import ConformanceError, Report, check_method, check_methods_ddp, classification, spawn
from equipoise.testing.compare import difference
from equipoise.testing.distributed import DDP_CHECKS, ddp_outcomes
from equipoise.testing.subject import Subject
from equipoise.testing.watch import Interrupted, Spy

torch.set_num_threads(1)
pytestmark = pytest.mark.distributed
OWN = {"ddp-equals-one": "each process compares with the mean of its share"}


@pytest.fixture(scope="module")
def outcomes() -> dict[Any, Report | ConformanceError]:
    # The last one ends the processes.
    keys = ["memory", "local", "mean", "declared", "fails"]
    toys = [Memory, LocalTable, BatchMean, (BatchMean, {}, OWN), FailsInOne]
    return dict(zip(keys, ddp_outcomes(toys), strict=True))


@pytest.fixture(scope="module")
def of_library() -> dict[str, Report | ConformanceError]:
    """One start for the methods of each problem."""
    found: dict[str, Report | ConformanceError] = {}
    for name, problem in PROBLEMS.items():
        slugs = [slug for slug in available() if case_of(slug).problem == name]
        entries = [
            (METHODS[slug], case.settings, {k: v for k, v in case.skip.items() if k in DDP_CHECKS})
            for slug in slugs
            for case in [case_of(slug)]
        ]
        found |= dict(zip(slugs, ddp_outcomes(entries, problem=problem), strict=True))
    return found


@pytest.mark.parametrize("slug", METHODS)
def test_library_methods(of_library, slug):
    if (package := missing(slug)) is not None:
        pytest.skip(f"{package} is not installed")
    if isinstance(of_library[slug], ConformanceError):
        raise of_library[slug]


def test_a_correct_method_passes(outcomes):
    assert outcomes["memory"].passed == list(DDP_CHECKS)


def test_a_table_that_is_not_synchronised_is_found(outcomes):
    assert outcomes["local"].check == "ddp-ranks"
    assert "table" in outcomes["local"].seen and "write_rows" in outcomes["local"].remedy


def test_a_statistic_of_the_shard_is_found_unless_declared(outcomes):
    assert outcomes["mean"].check == "ddp-equals-one"
    assert outcomes["declared"].passed == ["ddp-trains", "ddp-ranks"]
    assert outcomes["declared"].skipped == OWN


def test_an_error_in_one_process_is_reported(outcomes):
    assert outcomes["fails"].check == "ddp-trains"
    assert "the second process has had enough" in str(outcomes["fails"])


def test_check_method_asks_for_two_processes(monkeypatch):
    asked = []

    def stand_in(methods, *, problem):
        asked.append((methods, len(problem.examples)))
        return [Report("toy", ["ddp-trains", "ddp-ranks"], OWN)]

    monkeypatch.setattr("equipoise.testing.method.check_methods_ddp", stand_in)
    report = check_method(BatchMean, ddp=True, settings={"strength": 2.0}, skip={**OWN, "accumulation": "as there"})
    assert asked == [([(BatchMean, {"strength": 2.0}, OWN)], 37)]
    assert report.passed[-1] == "ddp-ranks" and report.skipped["ddp-equals-one"] == OWN["ddp-equals-one"]


def test_skips_are_checked_before_anything_starts():
    with pytest.raises(ArgumentError, match="Did you mean 'ddp-ranks'"):
        check_methods_ddp([(Memory, {}, {"ddp-rank": "why"})])


def _train(**options: Any) -> dict[str, Any]:
    # 23 examples in batches of 7: shards of 4 and 3, and a last one of 1 and 1.
    run, spy = Subject(Memory, {}, classification(23).double()).train(batch_size=7, **options)
    return {"model": spy.model, "methods": spy.methods, "history": run.history}


def _trainings(folder: str) -> Any:
    yield _train()
    yield _train(accumulation=3)
    yield _train(clip_norm=0.1)
    spy = Spy()
    spy.stop_at = 7
    options = classification(23).options(batch_size=7, checkpoint=folder, checkpoint_every=6)
    try:
        classification(23).double().train(
            [spy, Memory()], **options | {"validation": classification(23).double().validation}
        )
    except Interrupted:
        yield _train(checkpoint=folder, checkpoint_every=6, resume=True)


def test_training_itself_in_two_processes():
    """Uneven shards, accumulation, clipping and resuming give what one process gives."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = spawn(lambda: _trainings(folder))
    plain, clipped = _train(), _train(clip_norm=0.1)
    assert [r.get("trace") for r in (*first, *second)] == [None] * 8
    for one, two in zip(first, second, strict=True):
        assert difference(one, two) is None
    for result, wanted in zip(first, (plain, plain, clipped, plain), strict=True):
        assert difference(result, wanted, 1e-6) is None
    assert difference(first[3], first[0]) is None  # resumed: bit for bit


def test_spawn_returns_what_was_yielded_before_the_time_was_up():
    def function() -> Any:
        import time

        yield torch.ones(2)
        time.sleep(60)

    results = spawn(function, processes=1, timeout=0.5)
    assert len(results) == 1 and torch.equal(results[0][0], torch.ones(2))
