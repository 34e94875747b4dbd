"""Where runs are carried out: this process, local workers (joblib), or a Ray cluster.

Every run computes with the same number of threads wherever it is, so that its result has the same bits.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, MissingDependencyError

if TYPE_CHECKING:
    from equipoise.training import Method, Task

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Job:
    """One row of work, ready to be sent to a worker."""

    key: str
    kind: str
    task: Task
    method: type[Method]
    config: dict[str, Any]
    seed: int
    threads: int


@dataclass
class Outcome:
    """What came of a job; ``error`` is None if it succeeded."""

    key: str
    metrics: dict[str, Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


def execute(job: Job) -> Outcome:
    """Carry out one job. An error of the run is part of the outcome, not raised."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    start = time.perf_counter()
    outcome = Outcome(job.key)
    try:
        if job.kind == "cost":
            cost = job.task.cost(job.method, job.config, job.seed)
            outcome.cost = {} if cost is None else asdict(cost)
        elif job.kind == "time":
            seconds = job.task.step_seconds(job.method, job.config, job.seed)
            outcome.cost = {} if seconds is None else {"step_seconds": seconds}
        else:
            result = job.task.run(job.method, job.config, job.seed)
            outcome.metrics = {
                "metrics": result.metrics,
                "counted": result.counted,
                "sizes": result.sizes,
                "trained": result.trained,
            }
            outcome.curve = result.curve
    except EquipoiseError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    except Exception as error:  # a user's model or a plugin may raise anything; the row keeps the whole story
        outcome.error = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
    finally:
        torch.set_num_threads(threads)
    outcome.seconds = time.perf_counter() - start
    return outcome


def carry_out(
    jobs: Iterable[Job], workers: int, engine: str = "local", address: str | None = None
) -> Iterator[Outcome]:
    """Yield outcomes as they come. ``jobs`` is consumed lazily: a job is drawn when a worker is free to start it."""
    if engine == "local" and workers == 1:
        yield from map(execute, jobs)
        return
    yield from (_local if engine == "local" else _ray)(jobs, workers, address)


def _local(jobs: Iterable[Job], workers: int, _: str | None) -> Iterator[Outcome]:
    import joblib
    from joblib.externals.loky import get_reusable_executor

    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch=workers, batch_size=1)
        try:
            yield from parallel(joblib.delayed(_execute_for)(os.getpid(), job) for job in jobs)
        except BaseException:
            get_reusable_executor().shutdown(wait=False, kill_workers=True)
            raise


def _execute_for(parent: int, job: Job) -> Outcome:
    """``execute`` in a worker that ends with its parent: a parent that was killed could not end it."""
    name = f"ends with {parent}"
    if os.getppid() == parent and all(thread.name != name for thread in threading.enumerate()):
        threading.Thread(target=_end_with, args=(parent,), name=name, daemon=True).start()
    return execute(job)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _ray(jobs: Iterable[Job], workers: int, address: str | None) -> Iterator[Outcome]:
    """Through Ray's own tasks: joblib's Ray backend returns results only when all are there, and a killed run would lose them."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("engine = 'ray': Ray is not installed; install equipoise[ray]") from error
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    remote = ray.remote(num_cpus=1)(execute)
    source = iter(jobs)
    running = [remote.remote(job) for job in itertools.islice(source, workers)]
    try:
        while running:
            (ready,), running = ray.wait(running, num_returns=1)
            yield ray.get(ready)
            running += [remote.remote(job) for job in itertools.islice(source, 1)]
    finally:
        if started:
            ray.shutdown()
