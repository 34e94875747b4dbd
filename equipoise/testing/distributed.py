"""The same run in two processes: ``spawn`` starts them, ``check_methods_ddp`` compares what they train with one process.

Plain processes with gloo on the CPU, found by their environment as under ``torchrun``; methods, problems and functions reach
them by value, so that classes of a script, a notebook or a test may take part. All methods share one start.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import EquipoiseError
from equipoise.testing.compare import difference
from equipoise.testing.problem import TinyProblem, classification
from equipoise.testing.report import ConformanceError, Report, check_names
from equipoise.testing.subject import TOLERANCE, Subject
from equipoise.training import Method

DDP_CHECKS = {
    "ddp-trains": "Two processes train without an error.",
    "ddp-ranks": "Both processes end with the same weights, buffers and state of the method.",
    "ddp-equals-one": "Two processes end with the weights, the state and the losses of one process on the same global batches.",
}
START_TIMEOUT = 120  # seconds for the imports of new processes, on a busy machine
Entry = type[Method] | tuple[Any, ...]


def check_methods_ddp(
    methods: Sequence[Entry], *, problem: TinyProblem | None = None, processes: int = 2, timeout: float = 120
) -> list[Report]:
    """Train methods in two processes and in one, on the same global batches, and compare weights and per-example state.

    methods: classes, ``(class, settings)``, or ``(class, settings, skip)`` where ``skip`` gives, by name of the check, the
        reason why it does not apply: ``{"ddp-equals-one": "each process draws its own noise"}``.
    problem: by default ``classification()``; trained in float64, whose shards are uneven on purpose.
    processes: how many to start, once for all methods. timeout: seconds until a hang is reported.

    Returns a report for each method. Raises ``ConformanceError`` for the first that fails.
    """
    outcomes = ddp_outcomes(methods, problem=problem, processes=processes, timeout=timeout)
    for outcome in outcomes:
        if isinstance(outcome, ConformanceError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Report)]


def ddp_outcomes(
    methods: Sequence[Entry], *, problem: TinyProblem | None = None, processes: int = 2, timeout: float = 120
) -> list[Report | ConformanceError]:
    """As ``check_methods_ddp``, with the error of a method that fails in the place of its report.

    A method that stops with an error ends the processes: those behind it are not reached, and fail too.
    """
    base = (classification() if problem is None else problem).double()
    # No last batch smaller than the number of processes: it cannot be shared out, and the loader leaves it out.
    rest = len(base.examples) % base.batch_size
    base = base.first(len(base.examples) - (rest if rest < processes else 0))
    entries = [entry if isinstance(entry, tuple) else (entry, {}) for entry in methods]
    subjects = [Subject(entry[0], dict(entry[1] or {}), base) for entry in entries]
    skips: list[Mapping[str, str]] = [entry[2] if len(entry) > 2 else {} for entry in entries]
    for skip in skips:
        check_names(skip, None, DDP_CHECKS)
    begin = time.perf_counter()
    results = spawn(lambda: (_trained(subject) for subject in subjects), processes=processes, timeout=timeout)
    outcomes: list[Report | ConformanceError] = []
    for i, subject in enumerate(subjects):
        ranks = [rank[i] if i < len(rank) else None for rank in results]
        try:
            report = _compare(subject, ranks, skips[i])
        except ConformanceError as error:
            outcomes.append(error)
        else:
            report.seconds = (time.perf_counter() - begin) / len(subjects)
            outcomes.append(report)
    return outcomes


def _trained(subject: Subject) -> dict[str, Any]:
    run, spy = subject.train()
    losses = [record["train_loss"] for record in run.history]
    return {"model": spy.model, "methods": spy.methods, "losses": losses}


def _compare(subject: Subject, ranks: list[Any], skips: Mapping[str, str]) -> Report:
    report = Report(subject.label)

    def failed(check: str, seen: str, remedy: str) -> None:
        raise ConformanceError(subject.label, check, seen, remedy)

    errors = [(i, r["error"], r["trace"]) for i, r in enumerate(ranks) if r is not None and "error" in r]
    if errors:
        # Where one process fails, the others lose their connection to it; the first cause is more telling.
        rank, error, trace = min(errors, key=lambda e: "Connection" in e[1] or "peer" in e[1])
        failed("ddp-trains", f"process {rank} stops with {error}", f"Trace:\n{trace}")
    if any(r is None for r in ranks):
        failed(
            "ddp-trains",
            "not every process finished: one waited for the others until the time was up, or an earlier method ended it",
            "Every process must take part in every collective operation, the same number of times, also for uneven shards",
        )
    report.passed.append("ddp-trains")

    def check(name: str, text: str | None, seen: str, remedy: str) -> None:
        if name in skips:
            report.skipped[name] = skips[name]
        elif text:
            failed(name, f"{seen}: {text}", remedy)
        else:
            report.passed.append(name)

    text = next((t for other in ranks[1:] if (t := difference(ranks[0], other, TOLERANCE))), None)
    check(
        "ddp-ranks",
        text,
        "the processes end with different states",
        "Write per-example rows by equipoise.training.table.write_rows, draw from run.new_generator(self), and register networks "
        "that train by run.register(..., optimize=True)",
    )
    text = None if "ddp-equals-one" in skips else difference(_trained(subject), ranks[0], TOLERANCE)
    check(
        "ddp-equals-one",
        text,
        f"{len(ranks)} processes and one process end with different states",
        "Each process sees its share of the global batch: statistics of a batch must be gathered. Where this is the method's "
        "nature, skip the check with the reason",
    )
    return report


def spawn(function: Callable[[], Iterable[Any]], *, processes: int = 2, timeout: float = 120) -> list[list[Any]]:
    """Run ``function`` in new processes that form a gloo group, and return what it yields, in a list for each process.

    function: without arguments; sent by value. It yields tensors, numbers, strings, and lists and dicts of these.
    An exception ends its process, and stands in the list as ``{"error": ..., "trace": ...}``. Processes that are not done
    ``timeout`` seconds after all have started are killed; what they had yielded is returned.
    """
    from joblib import wrap_non_picklable_objects

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "function").write_bytes(pickle.dumps(wrap_non_picklable_objects(function, keep_wrapper=False)))
        port = _free_port()
        children = []
        try:
            for rank in range(processes):
                with (folder / f"log-{rank}").open("wb") as log:
                    command = [sys.executable, "-c", f"from equipoise.testing.distributed import work; work({name!r})"]
                    environment = _environment(rank, processes, port)
                    children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            deadline = time.monotonic() + START_TIMEOUT
            started = False
            while any(child.poll() is None for child in children) and time.monotonic() < deadline:
                if not started and all((folder / f"started-{rank}").exists() for rank in range(processes)):
                    started, deadline = True, time.monotonic() + timeout
                time.sleep(0.02)
        finally:
            for child in children:
                child.kill()
                child.wait()
        results = []
        for rank in range(processes):
            files = sorted(folder.glob(f"result-{rank}-*.pt"))
            results.append([torch.load(path, weights_only=True) for path in files])
        if not (folder / "started-0").exists():
            log_text = (folder / "log-0").read_text(errors="replace").strip()
            raise EquipoiseError(f"processes = {processes}: could not be started. {log_text[-2000:]}")
        return results


def work(name: str) -> None:
    """What a process of ``spawn`` does."""
    torch.set_num_threads(1)
    folder, rank = Path(name), int(os.environ["RANK"])
    function = pickle.loads((folder / "function").read_bytes())
    (folder / f"started-{rank}").touch()
    count = 0

    def put(result: Any) -> None:
        nonlocal count
        # Under its final name only when it is complete.
        torch.save(result, folder / f"part-{rank}")
        os.replace(folder / f"part-{rank}", folder / f"result-{rank}-{count:06d}.pt")
        count += 1

    try:
        for result in function():
            put(result)
    except BaseException as error:
        put({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
        sys.stdout.flush()
        os._exit(1)  # at once, so that the other processes lose the connection instead of waiting
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    # Without it gloo asks for the address of the host's name, which in containers often leads nowhere.
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    return environment | ({"GLOO_SOCKET_IFNAME": loopback.pop()} if loopback else {})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
