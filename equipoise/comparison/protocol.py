"""The fair protocol: tune every arm equally, run paired seeds, measure cost, and hold dear arms against equal compute.

1. Every arm draws the same number of configurations, quasi-randomly and with one seed, from its space; validation data choose.
2. Final runs use common random numbers: seed s fixes split, corruption, initialisation and batch order for every arm.
3. Each arm's training is measured once under counters, and short trainings of all arms are timed in turn.
4. An arm that costs more than 1.5 times the baseline's FLOPs also meets a baseline that was given as much compute.

Every run is a row of the store: a comparison that was stopped continues where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise import __version__, catalogue
from equipoise.comparison.engine import ENGINES, Job, Outcome, carry_out
from equipoise.comparison.store import Store
from equipoise.errors import ArgumentError, StoreError, check_choice, check_integer, suggestion

if TYPE_CHECKING:
    from equipoise.comparison.result import Comparison
    from equipoise.training import Method, Task
    from equipoise.training.space import Space

TUNING_SEED = 100_000  # tuning never meets the splits of the final seeds 0, 1, 2, ...
DEAR = 1.5  # an arm that costs more FLOPs than this multiple of the baseline's also meets a compute-matched baseline
TIMING_ROUNDS = 5


@dataclass(frozen=True)
class Arm:
    """One entry of a trial.

    method: a method's class or slug. name: how the report calls it, by default the slug.
    config: a complete configuration to use as it is; the arm is then not tuned.
    candidates: complete configurations to choose from on validation data, in the place of draws from the space (a grid).
    fixed: settings to hold while the others are tuned, under the keys of configurations (``"lr"``, ``"elr.lam"``).
    matched_ratio: this is the baseline, given so many times its compute (set by the protocol).
    """

    method: type[Method] | str
    name: str = ""
    config: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    matched_ratio: float | None = None
    candidates: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            object.__setattr__(self, "method", catalogue.find("method", self.method).load())
        from equipoise.training import Method

        if not (isinstance(self.method, type) and issubclass(self.method, Method)):
            given = self.method.__name__ if isinstance(self.method, type) else repr(self.method)
            raise ArgumentError(
                f"method = {given}: must be the slug or the class of a method, which is built for each configuration"
            )
        if not self.name:
            object.__setattr__(self, "name", self.cls.name)

    @property
    def cls(self) -> type[Method]:
        """The method's class."""
        assert not isinstance(self.method, str)  # resolved in __post_init__
        return self.method

    def space(self, task: Task) -> Space:
        """All that is tuned for this arm: the task's space, the method's own, and the use of extra compute."""
        space = dict(task.space())
        space |= {f"{self.cls.name}.{name}": dimension for name, dimension in self.cls.space.items()}
        if self.matched_ratio is not None:
            space |= task.matched_space(self.matched_ratio) or {}
        return {name: dimension for name, dimension in space.items() if name not in self.fixed}

    def constants(self) -> dict[str, Any]:
        """What every configuration of this arm holds."""
        return {**self.fixed, **({} if self.matched_ratio is None else {"compute_ratio": self.matched_ratio})}


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: rows finished and rows known, and what it does now."""

    done: int
    total: int
    text: str


def draw(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` configurations from ``space``, quasi-randomly (scrambled Halton). Equal leading dimensions give equal values."""
    if not space:
        return [{}]
    from scipy.stats import qmc

    points = qmc.Halton(d=len(space), scramble=True, rng=seed).random(count)
    return [{name: space[name].at(float(u)) for name, u in zip(space, row, strict=True)} for row in points]


def _task(task: Task | str, settings: Mapping[str, Any] | None) -> Task:
    if isinstance(task, str):
        made: Task = catalogue.find("task", task).load().make(**(settings or {}))
        return made
    if settings:
        raise ArgumentError(
            f"settings = {dict(settings)!r}: are for a task given by its slug; set them on the task itself"
        )
    return task


def compare(
    task: Task | str,
    methods: Sequence[type[Method] | str | Arm] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    seeds: int = 5,
    configs: int = 8,
    tuning_seeds: int = 1,
    jobs: int = 1,
    threads: int = 1,
    engine: str = "local",
    address: str | None = None,
    out: str | Path | None = None,
    measure_time: bool = True,
    retry_failed: bool = False,
    progress: Callable[[Progress], None] | None = None,
    command: str | None = None,
) -> Comparison:
    """Hold methods against a tuned baseline and return the ``Comparison``.

    task: a ``Task``, or a slug with ``settings``. methods: slugs, classes or ``Arm`` objects; by default the task's.
    The task's baseline always takes part. seeds: final runs of each arm, >= 2. configs: configurations tried for each
    arm, >= 1, each on ``tuning_seeds`` splits. jobs: runs at a time. threads: CPU threads of each run.
    engine: "local", or "ray" with the ``address`` of a cluster (a local one is started without).
    out: folder of the store, the report and the tables, by default ``equipoise-results/<task>``.
    retry_failed: run rows again that failed before. Raises ``EquipoiseError`` before any run if something is wrong.
    """
    check_integer("seeds", seeds, 2)
    check_integer("configs", configs, 1)
    check_integer("tuning_seeds", tuning_seeds, 1)
    check_integer("jobs", jobs, 1)
    check_integer("threads", threads, 1)
    check_choice("engine", engine, ENGINES)
    if address is not None and engine != "ray":
        raise ArgumentError(f"address = {address!r}: is for engine='ray' only")
    problem = _task(task, settings)
    arms = _arms(problem, methods)
    remarks = problem.check()
    folder = Path(out) if out is not None else Path("equipoise-results") / problem.name
    with Store(folder / "store.sqlite") as store:
        rounds = TIMING_ROUNDS if measure_time else 0
        trial = _Trial(problem, store, seeds, configs, tuning_seeds, threads, rounds, progress or (lambda _: None))
        if retry_failed:
            store.retry_failed()
        run = _Runner(trial, jobs, engine, address)
        run.go(arms)
        plan = {
            "task": problem.name,
            "summary": (type(problem).__doc__ or "").split("\n")[0],
            "settings": problem.settings(),
            "fingerprint": problem.fingerprint(),
            "metric": problem.metric,
            "higher_is_better": problem.higher_is_better,
            "percent": problem.percent,
            "resampled": problem.resampled,
            "trade_off": asdict(problem.trade_off) if problem.trade_off is not None else None,
            "seeds": list(range(seeds)),
            "configs": configs,
            "tuning_seeds": tuning_seeds,
            "threads": threads,
            "remarks": remarks,
            "sanity": _sanity(problem, seeds),
            "versions": versions(),
            "command": command or "",
            "arms": [{**trial.describe(arm), "control": run.controls.get(arm.name)} for arm in run.arms],
        }
        store.save_plan(plan, command=command or "")
    from equipoise.comparison.result import Comparison

    return Comparison.load(folder)


def _sanity(task: Task, seeds: int) -> list[list[Any]]:
    """The task's checks of every final seed: of each check the first that failed, else the first."""
    found: dict[str, list[Any]] = {}
    for seed in range(seeds):
        for name, passed, text in task.sanity(seed):
            if name not in found or (found[name][1] and not passed):
                found[name] = [name, passed, text]
    return list(found.values())


def versions() -> dict[str, str]:
    """Versions of what results depend on, and the machine's kind."""
    import numpy
    import torch

    found = {"equipoise": __version__, "python": platform.python_version()}
    found |= {"torch": str(torch.__version__), "numpy": numpy.__version__}
    found["machine"] = f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return found


@lru_cache
def source_digest(cls: Any) -> str:
    """Digest of the source of a class that is not ours, so that results of code that was edited are not taken for its own.

    Of its whole module, where its helpers are; of the class alone in a script, which also says how the trial is run. ""
    for our own classes, which have a version, and where there is no source.
    """
    if cls.__module__.split(".")[0] == "equipoise":
        return ""
    try:
        text = inspect.getsource(cls if cls.__module__ == "__main__" else sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _arms(task: Task, methods: Sequence[type[Method] | str | Arm] | None) -> list[Arm]:
    if not task.baseline:
        raise ArgumentError(f"{task.name} names no baseline: set the class attribute baseline to a method's slug")
    if isinstance(methods, str):
        raise ArgumentError(f"methods = {methods!r}: must be a list. Write methods=[{methods!r}]")
    given = [m if isinstance(m, Arm) else Arm(m) for m in (task.entrants() if methods is None else methods)]
    if not any(arm.name == task.baseline for arm in given):
        given.insert(0, Arm(task.baseline))
    given.sort(key=lambda arm: arm.name != task.baseline)
    names = [arm.name for arm in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(
            f"methods = {names}: holds {', '.join(twice)} more than once; give each arm a name of its own"
        )
    if len(given) < 2:
        raise ArgumentError(f"methods = {names}: must hold at least one method beside the baseline")
    for arm in given:
        _check_settings(task, arm)
    return given


def _check_settings(task: Task, arm: Arm) -> None:
    """Refuse settings of an arm that neither the task nor the method knows, or that the method refuses."""
    known = [*task.space(), *(f"{arm.cls.name}.{name}" for name in inspect.signature(arm.cls).parameters)]
    for config in arm.candidates or (arm.fixed if arm.config is None else arm.config,):
        for key in config:
            if key not in known:
                raise ArgumentError(
                    f"{key} = {config[key]!r} of arm {arm.name!r}: is no setting of {task.name} or {arm.cls.name}. "
                    f"{suggestion(key, known)} Known: {', '.join(known)}"
                )
        task.build_method(arm.cls, config)


class _Trial:
    """What is to be run, in terms of rows of the store."""

    def __init__(
        self,
        task: Task,
        store: Store,
        seeds: int,
        configs: int,
        tuning_seeds: int,
        threads: int,
        timing_rounds: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.task, self.store, self.threads, self.progress = task, store, threads, progress
        self.seeds = list(range(seeds))
        self.tuning_seeds = [TUNING_SEED + i for i in range(tuning_seeds)]
        self.configs, self.timing_rounds = configs, timing_rounds
        self.settings = {**task.fingerprint(), "threads": threads}
        if source := source_digest(type(task)):  # type: ignore[arg-type]
            self.settings["task_source"] = source
        self.jobs: dict[str, Job] = {}
        self.versions = versions()

    def add(self, arm: Arm, kind: str, config: Mapping[str, Any], seed: int) -> str:
        """Put a row into the store (nothing happens if it is there) and return its key."""
        method, source = f"{arm.cls.__module__}:{arm.cls.__qualname__}", source_digest(arm.cls)  # type: ignore[arg-type]
        identity = {
            "task": self.task.name,
            "settings": self.settings,
            "arm": arm.name,
            "method": f"{method}@{source}" if source else method,
            "kind": kind,
            "config": dict(config),
            "seed": seed,
        }
        key = self.store.add(identity, versions=self.versions)
        self.jobs[key] = Job(key, kind, self.task, arm.cls, dict(config), seed, self.threads)
        return key

    def candidates(self, arm: Arm) -> list[dict[str, Any]]:
        if arm.config is not None:
            return [dict(arm.config)]
        if arm.candidates:
            return [dict(candidate) for candidate in arm.candidates]
        return [{**config, **arm.constants()} for config in draw(arm.space(self.task), self.configs)]

    def tuning(self, arm: Arm) -> list[tuple[dict[str, Any], list[str]]]:
        """Configurations and the keys of their tuning rows; none for an arm that is not tuned."""
        if arm.config is not None:
            return []
        return [(c, [self.add(arm, "tune", c, seed) for seed in self.tuning_seeds]) for c in self.candidates(arm)]

    def scores(self, arm: Arm) -> list[dict[str, Any]]:
        """What tuning found: configuration, mean validation score (None if a run failed), status."""
        found = []
        for config, keys in self.tuning(arm):
            rows = [self.store.row(key) for key in keys]
            good = [row for row in rows if row.status == "done"]
            values = [
                m["metrics"][m["counted"]][f"validation_{self.task.metric}"] for row in good if (m := row.metrics)
            ]
            score = sum(values) / len(values) if len(values) == len(rows) and all(map(math.isfinite, values)) else None
            status = (
                "done"
                if score is not None
                else next((row.error or "" for row in rows if row.status == "failed"), "failed")
            )
            found.append({"config": config, "score": score, "status": status.split("\n")[0]})
        return found

    def best(self, arm: Arm) -> dict[str, Any] | None:
        """The configuration with the best validation score; the first of equals; None if every one failed."""
        if arm.config is not None:
            return dict(arm.config)
        sign = 1 if self.task.higher_is_better else -1
        scored = [entry for entry in self.scores(arm) if entry["score"] is not None]
        return max(scored, key=lambda entry: sign * entry["score"])["config"] if scored else None

    def describe(self, arm: Arm) -> dict[str, Any]:
        """The arm as the plan keeps it, with the keys of its rows."""
        best = self.best(arm)
        space = {} if arm.config is not None or arm.candidates else arm.space(self.task)
        rows: dict[str, list[str]] = {
            "tune": [key for _, keys in self.tuning(arm) for key in keys],
            "final": [],
            "cost": [],
            "time": [],
        }
        if best is not None:
            rows["final"] = [self.add(arm, "final", best, seed) for seed in self.seeds]
            rows["cost"] = [self.add(arm, "cost", best, 0)]
            rows["time"] = [self.add(arm, "time", best, i) for i in range(self.timing_rounds)]
        return {
            "name": arm.name,
            "method": arm.cls.name,
            "class": f"{arm.cls.__module__}:{arm.cls.__qualname__}",
            "baseline": arm.name == self.task.baseline,
            "matched_ratio": arm.matched_ratio,
            "space": {name: str(dimension) for name, dimension in space.items()},
            "edges": [n for n, dimension in space.items() if best is not None and dimension.on_edge(best[n])],
            "config": best,
            "tuning": self.scores(arm),
            "rows": rows,
        }


class _Runner:
    """Carries out a trial: claims rows, has them run, and writes down what came of them."""

    def __init__(self, trial: _Trial, jobs: int, engine: str, address: str | None) -> None:
        self.trial, self.store = trial, trial.store
        self.jobs, self.engine, self.address = jobs, engine, address
        self.arms: list[Arm] = []
        self.controls: dict[str, str] = {}  # a dear arm's name, and its compute-matched baseline's
        self.total = self.done = 0

    def go(self, arms: list[Arm]) -> None:
        self.arms = list(arms)
        self.total = sum(map(self._rows_of, arms))
        beat = threading.Event()
        keeper = threading.Thread(target=self._heartbeat, args=(beat,), daemon=True)
        keeper.start()
        try:
            self._tune_and_run(arms)
            matched = self._matched_arms(arms)
            if matched:
                self.arms += matched
                self.total += sum(map(self._rows_of, matched))
                self._tune_and_run(matched)
            self._time()
        finally:
            beat.set()
            keeper.join()

    def _rows_of(self, arm: Arm) -> int:
        trial = self.trial
        tuning = 0 if arm.config is not None else (len(arm.candidates) or trial.configs) * len(trial.tuning_seeds)
        return tuning + len(trial.seeds) + 1 + trial.timing_rounds

    def _tune_and_run(self, arms: list[Arm]) -> None:
        trial = self.trial
        self._work([key for arm in arms for _, keys in trial.tuning(arm) for key in keys], "tuning")
        keys = []
        for arm in arms:
            best = trial.best(arm)
            if best is not None:
                keys += [
                    trial.add(arm, "cost", best, 0),
                    *(trial.add(arm, "final", best, seed) for seed in trial.seeds),
                ]
        self._work(keys, "final runs")

    def _flops(self, arm: Arm) -> float | None:
        best = self.trial.best(arm)
        if best is None:
            return None
        row = self.store.row(self.trial.add(arm, "cost", best, 0))
        flops = (row.cost or {}).get("flops") if row.status == "done" else None
        return float(flops) if flops else None

    def _matched_arms(self, arms: list[Arm]) -> list[Arm]:
        """One compute-matched baseline for each distinct multiple of the baseline's compute."""
        baseline = next(arm for arm in arms if arm.name == self.trial.task.baseline)
        base = self._flops(baseline)
        if base is None:
            return []
        found: dict[float, Arm] = {}
        for arm in arms:
            flops = self._flops(arm)
            # Rounded up, so that the control never has less compute than the arm.
            ratio = math.ceil(flops / base * 10 - 1e-6) / 10 if flops is not None else 1.0
            if ratio > DEAR and self.trial.task.matched_space(ratio) is not None:
                more = {"compute": "ensemble", "compute_ratio": ratio}
                config = None if baseline.config is None else {**baseline.config, **more}
                grid = tuple({**candidate, **more} for candidate in baseline.candidates)
                name = f"{ratio:g}x {baseline.name}"
                self.controls[arm.name] = name
                found[ratio] = Arm(baseline.cls, name, config, baseline.fixed, ratio, grid)
        return list(found.values())

    def _time(self) -> None:
        """Short trainings of all arms in turn, so that whatever else the machine does hits every arm alike."""
        ready = [(arm, best) for arm in self.arms if (best := self.trial.best(arm)) is not None]
        keys = [self.trial.add(arm, "time", best, i) for i in range(self.trial.timing_rounds) for arm, best in ready]
        self._work(keys, "timing", workers=1)

    def _work(self, keys: Sequence[str], text: str, workers: int | None = None) -> None:
        """Have every row finished, by this process or by another one that works on the same store."""
        waiting = list(dict.fromkeys(keys))
        finished = {key for key in waiting if self.store.row(key).status in ("done", "failed")}
        self._report(len(finished), text)
        waiting = [key for key in waiting if key not in finished]
        while waiting:
            for outcome in carry_out(
                self._claim(waiting),
                workers or min(self.jobs, len(waiting)),
                self.engine if not workers else "local",
                self.address,
            ):
                self._write(outcome)
                self._report(1, text)
            before = len(waiting)
            waiting = [key for key in waiting if self.store.row(key).status not in ("done", "failed")]
            if waiting:
                time.sleep(0.3)  # another process has claimed them: wait for it, or take over when it has died
                self._report(0, f"{text} (waiting for another process)" if len(waiting) == before else text)

    def _claim(self, keys: Sequence[str]) -> Iterator[Job]:
        for key in keys:
            if self.store.claim(key):
                yield self.trial.jobs[key]

    def _write(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.store.fail(outcome.key, outcome.error, seconds=outcome.seconds)
        else:
            self.store.finish(
                outcome.key, metrics=outcome.metrics, curve=outcome.curve, cost=outcome.cost, seconds=outcome.seconds
            )

    def _report(self, more: int, text: str) -> None:
        self.done += more
        self.trial.progress(Progress(min(self.done, self.total), self.total, text))

    def _heartbeat(self, stop: threading.Event) -> None:
        while not stop.wait(20):
            with contextlib.suppress(
                StoreError
            ):  # one missed beat does no harm; a store that is gone stops the runs themselves
                self.store.heartbeat()


def command_line() -> str:
    """The command that repeats this process's comparison."""
    import shlex

    return shlex.join(["equipoise", *sys.argv[1:]])
