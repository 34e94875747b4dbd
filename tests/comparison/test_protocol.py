"""The protocol on a task without training, where thousands of runs cost nothing, and on short real trainings."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import Broken, Dear, Good, Toy

from equipoise.comparison import Arm, Comparison, compare
from equipoise.comparison.protocol import draw
from equipoise.comparison.store import Store
from equipoise.errors import ArgumentError, StoreError
from equipoise.training import Choice, LogUniform, Uniform

FORK = multiprocessing.get_context("fork")


def figures(found: Comparison) -> str:
    """All results that must not depend on how they were computed (times do)."""
    document = found.to_json()
    for arm in document["arms"]:
        arm.pop("step_time_ratio")
    document.pop("store")
    document.pop("report")
    return json.dumps(document, sort_keys=True)


def test_finds_the_better_arm_and_says_so(tmp_path: Path) -> None:
    found = compare(Toy(), [Good], seeds=5, configs=4, out=tmp_path)
    baseline, good = found.arms
    assert baseline.baseline
    assert baseline.verdict is None
    assert good.verdict == "better"
    assert good.low is not None and good.high is not None and good.low < 0.05 < good.high
    assert good.difference == pytest.approx(sum(good.differences) / 5)
    assert good.flops_ratio == 1.0
    assert found.correction == 0.0
    assert found.failed == 0
    assert set(found.runs().kind) == {"tune", "final", "cost", "time"}
    assert len(found.runs()) == 2 * (4 + 5 + 1 + 5)
    assert len(found.summary()) == 2
    assert len(found.curves()) == 10


def test_every_arm_is_tuned_alike_on_validation_data(tmp_path: Path) -> None:
    found = compare(Toy(), [Good, Dear], seeds=2, configs=6, out=tmp_path, measure_time=False)
    tried = {arm.name: [entry["config"]["lr"] for entry in arm.tuning] for arm in found.arms}
    assert tried["cross-entropy"] == tried["good"] == tried["dear"]
    for arm in found.arms:
        best = max(arm.tuning, key=lambda entry: entry["score"])
        assert arm.config == best["config"]
    runs = found.runs()
    assert set(runs[runs.kind == "tune"].seed).isdisjoint(runs[runs.kind == "final"].seed)


def test_candidates_are_a_grid_of_which_validation_data_choose(tmp_path: Path) -> None:
    grid = tuple({"lr": lr, "good.strength": 1.0} for lr in (0.9, 0.1, 0.011))
    found = compare(Toy(), [Arm(Good, candidates=grid)], seeds=2, configs=5, out=tmp_path, measure_time=False)
    good = found.arm("good")
    assert [entry["config"] for entry in good.tuning] == list(grid) and good.config == grid[1]
    assert good.edges == [] and len(found.arm("cross-entropy").tuning) == 5
    with pytest.raises(ArgumentError, match="is no setting of toy or good"):
        compare(Toy(), [Arm(Good, candidates=({"lr": 0.1}, {"rate": 0.1}))], out=tmp_path)


def test_an_edge_of_the_space_is_reported(tmp_path: Path) -> None:
    found = compare(Toy(), [Arm(Good, fixed={"lr": 0.1})], seeds=2, configs=3, out=tmp_path, measure_time=False)
    good = found.arm("good")
    assert "lr" in good.config and good.config["lr"] == 0.1
    assert good.edges == ([] if good.config["good.strength"] == 1.0 else ["good.strength"])


def test_a_dear_arm_meets_a_baseline_with_as_much_compute(tmp_path: Path) -> None:
    found = compare(Toy(), [Dear], seeds=5, configs=4, out=tmp_path)
    dear = found.arm("dear")
    assert dear.flops_ratio == 3.0
    assert dear.step_time_ratio == pytest.approx(3.0)
    assert dear.verdict == "better"
    assert dear.matched is not None
    assert dear.matched["name"] == "3x cross-entropy"
    assert dear.matched["verdict"] == "worse"
    assert found.arm("3x cross-entropy").config["compute"] == "ensemble"


def test_a_broken_arm_does_not_stop_the_others(tmp_path: Path) -> None:
    found = compare(Toy(), [Broken, Good], seeds=2, configs=2, out=tmp_path, measure_time=False)
    broken = found.arm("broken")
    assert broken.mean is None and broken.verdict is None and broken.failed == 1
    assert "step 3: the task's loss is nan" in broken.sentence
    assert found.arm("good").mean is not None
    json.dumps(found.to_json(), allow_nan=False)


def test_a_finished_row_never_runs_twice(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = compare(Toy(log=str(log)), [Good], seeds=3, configs=3, out=tmp_path / "a")
    count = len(log.read_text().splitlines())
    again = compare(Toy(log=str(log)), [Good], seeds=3, configs=3, out=tmp_path / "a")
    assert len(log.read_text().splitlines()) == count
    assert figures(first) == figures(again)
    more = compare(Toy(log=str(log)), [Good], seeds=5, configs=3, out=tmp_path / "a")
    assert len(log.read_text().splitlines()) == count + 2 * 2
    assert more.arm("good").values[:3] == first.arm("good").values


def test_a_method_that_was_edited_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(Toy(), [Good], seeds=2, configs=1, out=tmp_path, measure_time=False)
    monkeypatch.setattr("equipoise.comparison.protocol.source_digest", lambda cls: "edited" if cls is Good else "")
    again = compare(Toy(), [Good], seeds=2, configs=1, out=tmp_path, measure_time=False)
    with Store(first.store) as store:
        assert len(store.rows(arm="good")) == 2 * (1 + 2 + 1)
    assert figures(first) == figures(again)


def test_source_tells_versions_of_a_users_method_apart() -> None:
    from equipoise.comparison.protocol import source_digest
    from equipoise.noisy_labels import ELR

    assert len(source_digest(Good)) == 16
    assert source_digest(ELR) == ""  # ours: the version tells


def test_old_rows_under_a_new_version_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(Toy(), [Good], seeds=2, configs=1, out=tmp_path, measure_time=False)
    monkeypatch.setattr("equipoise.comparison.protocol.versions", lambda: {"equipoise": "99"})
    again = compare(Toy(), [Good], seeds=2, configs=1, out=tmp_path, measure_time=False)
    assert any("different versions" in warning for warning in again.warnings)


def _child(out: Path, log: Path) -> None:
    compare(Toy(log=str(log), pause=0.002), [Good, Dear], seeds=3, configs=4, out=out)


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    undisturbed = compare(
        Toy(log=str(tmp_path / "log"), pause=0.002), [Good, Dear], seeds=3, configs=4, out=tmp_path / "whole"
    )
    generator = random.Random(0)
    finished = 0
    for _ in range(20):
        child = FORK.Process(target=_child, args=(tmp_path / "killed", tmp_path / "log"))
        child.start()
        child.join(timeout=generator.uniform(0.01, 0.25))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        else:
            finished += 1
        child.join()
    assert finished < 20
    resumed = compare(
        Toy(log=str(tmp_path / "log"), pause=0.002), [Good, Dear], seeds=3, configs=4, out=tmp_path / "killed"
    )
    assert figures(resumed) == figures(undisturbed)


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = [FORK.Process(target=_child, args=(tmp_path / "shared", log)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)), "a row ran twice"
    alone = compare(
        Toy(log=str(tmp_path / "other"), pause=0.002), [Good, Dear], seeds=3, configs=4, out=tmp_path / "alone"
    )
    together = Comparison.load(tmp_path / "shared")
    assert [arm.values for arm in together.arms] == [arm.values for arm in alone.arms]


def _real(out: Path, **options: Any) -> Comparison:
    settings = {"epochs": 2, "train_examples": 200}
    return compare(
        "noisy-labels", ["elr"], settings=settings, seeds=2, configs=2, out=out, measure_time=False, **options
    )


@pytest.mark.slow
def test_jobs_give_the_same_bits(tmp_path: Path) -> None:
    assert figures(_real(tmp_path / "one")) == figures(_real(tmp_path / "two", jobs=2))


@pytest.mark.slow
def test_no_more_workers_than_rows(tmp_path: Path) -> None:
    found = compare(Toy(), [Good], seeds=2, configs=1, jobs=10**13, out=tmp_path, measure_time=False)
    assert found.failed == 0


def _trial_with_workers(out: Path) -> None:
    os.setsid()
    compare(Toy(pause=0.3), [Good], seeds=9, configs=9, out=out, jobs=2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_trial_with_workers, args=(tmp_path,))
    child.start()

    def members() -> list[str]:
        """Living processes of the child's session."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                found += [path.parent.name] if fields[3] == str(child.pid) and fields[0] not in "ZX" else []
        return found

    def until(reached: Callable[[], bool]) -> bool:
        end = time.monotonic() + 30
        while not reached() and time.monotonic() < end:
            time.sleep(0.2)
        return reached()

    def some_done() -> bool:
        with contextlib.suppress(StoreError), Store(tmp_path / "store.sqlite") as store:
            return store.counts()["done"] > 2
        return False

    assert until(some_done)
    child.kill()
    child.join()
    assert until(lambda: not members())


@pytest.mark.slow
def test_ray_gives_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert figures(_real(tmp_path / "one")) == figures(_real(tmp_path / "ray", jobs=2, engine="ray"))


def test_draws_are_quasi_random_and_shared() -> None:
    space = {"a": Uniform(0.0, 1.0), "b": LogUniform(0.01, 1.0)}
    small, large = draw(space, 8), draw({**space, "c": Choice((1, 2))}, 8)
    assert [(c["a"], c["b"]) for c in small] == [(c["a"], c["b"]) for c in large]
    assert sorted(int(c["a"] * 8) for c in draw({"a": Uniform(0.0, 1.0)}, 8)) == list(range(8))
    assert draw(space, 8)[:4] == draw(space, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 1}, "seeds = 1"),
        ({"configs": 0}, "configs = 0"),
        ({"jobs": 0}, "jobs = 0"),
        ({"engine": "rya"}, "Did you mean 'ray'"),
        ({"settings": {"rate": 0.4}}, "settings"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(Toy(), [Good], out=tmp_path, **options)
    assert not list(tmp_path.iterdir()), "refused before anything is written"


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'noisy-labels'"):
        compare("noisy-label", out=tmp_path)
    with pytest.raises(ArgumentError, match="Did you mean 'elr'"):
        compare("noisy-labels", ["elrr"], out=tmp_path)
    with pytest.raises(ArgumentError, match="Did you mean 'dataset'"):
        compare("noisy-labels", settings={"dateset": "digits"}, out=tmp_path)
    with pytest.raises(ArgumentError, match="more than once"):
        compare(Toy(), [Good, Good], out=tmp_path)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("elr", r"methods = 'elr': must be a list. Write methods=\['elr'\]"),
        ([Good()], "method = .*Good.*: must be the slug or the class of a method"),
        ([int], "method = int: must be the slug or the class of a method"),
    ],
)
def test_what_is_no_method(tmp_path: Path, methods: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(Toy(), methods, out=tmp_path)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no store\.sqlite"):
        Comparison.load(tmp_path)
    Store(tmp_path / "store.sqlite").close()
    with pytest.raises(StoreError, match="has not finished"):
        Comparison.load(tmp_path)


def test_a_method_of_another_package_takes_part(tmp_path: Path) -> None:
    start = time.perf_counter()
    found = compare(Toy(), [Arm(Good, name="good again"), Good], seeds=2, configs=2, out=tmp_path, measure_time=False)
    assert found.arm("good again").values == found.arm("good").values
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (Arm(Good, fixed={"good.strenght": 1.0}), "Did you mean 'good.strength'"),
        (Arm(Good, fixed={"learning_rate": 1.0}), "is no setting of toy or good"),
        (Arm(Good, config={"lr": 0.1, "dear.strength": 1.0}), "is no setting of toy or good"),
    ],
)
def test_settings_that_do_not_exist_are_refused_before_any_run(tmp_path: Path, arm: Arm, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(Toy(), [arm], out=tmp_path)
    assert not list(tmp_path.iterdir())
