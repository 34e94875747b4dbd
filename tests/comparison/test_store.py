"""The store: exact round trips, one owner a row, and nothing lost to kills, full disks, damage or other versions."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.comparison import store as module
from equipoise.comparison.store import COLUMNS, Store, to_json
from equipoise.errors import ArgumentError, StoreError

ROOT = Path(__file__).parents[2]


def identity(seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "task": "toy",
        "settings": {"rate": 0.4, "noise": "symmetric"},
        "arm": "elr",
        "method": "package:ELR",
        "kind": "final",
        "config": {"lr": 0.1, "elr.lam": 3.0},
        "seed": seed,
        **changes,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


def bits(value: Any) -> Any:
    """The value with every float replaced by its 64 bits."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list) else value


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs ``code``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# -- rows -----------------------------------------------------------------------------------------------------------------
def test_a_row_from_pending_to_done(store: Store) -> None:
    key = store.add(identity(), versions={"torch": "2.6"})
    row = store.row(key)
    assert (row.task, row.arm, row.method, row.kind, row.seed) == ("toy", "elr", "package:ELR", "final", 0)
    assert row.settings == identity()["settings"] and row.config == identity()["config"]
    assert (row.status, row.owner, row.metrics, row.curve, row.cost, row.error) == ("pending", *[None] * 5)

    assert store.claim(key)
    row = store.row(key)
    assert row.status == "running" and row.owner == store.owner and str(os.getpid()) in store.owner
    assert row.heartbeat == pytest.approx(time.time(), abs=5)

    store.finish(key, metrics={"last": {"test_accuracy": 0.9}}, curve=[{"epoch": 1}], cost={"flops": 10}, seconds=2.5)
    row = store.row(key)
    assert row.status == "done" and row.owner is None and row.heartbeat is None
    assert (row.metrics, row.curve, row.cost) == ({"last": {"test_accuracy": 0.9}}, [{"epoch": 1}], {"flops": 10})
    assert row.seconds == 2.5 and row.versions == {"torch": "2.6"}
    assert row.finished is not None and row.finished >= row.created
    assert not store.claim(key)  # a finished run never runs twice


def test_add_is_idempotent_and_keys_depend_on_content_only(store: Store) -> None:
    key = store.add(identity())
    store.claim(key)
    store.finish(key, metrics={"a": 1.0})
    again = {name: identity()[name] for name in reversed(identity())}
    again["config"] = {"elr.lam": 3.0, "lr": 0.1}
    assert store.add(again) == key
    assert store.row(key).status == "done"
    assert store.add(identity(config={"lr": np.float64(0.1), "elr.lam": np.float32(3.0)})) == key
    assert store.add(identity(config={"layers": (1, 2)})) == store.add(identity(config={"layers": [1, 2]}))

    others = [identity(1), *({**identity(), name: "x"} for name in ("task", "arm", "method", "kind"))]
    others += [identity(settings={}), identity(config={"lr": math.nextafter(0.1, 1), "elr.lam": 3.0})]
    keys = store.add_many([*others, identity(), identity()])
    assert keys[-1] == keys[-2] == key
    assert len(set(keys)) == len(others) + 1 == sum(store.counts().values()) - 1
    assert store.add_many([]) == []


def test_keys_are_the_same_in_every_process(store: Store) -> None:
    # A change of the key's definition would orphan the rows of every store there is.
    assert store.add(identity()) == "9af5856fab7cab90a25a02c56a2cce21d3e458e54c801f76f7fdbdb644066d50"


def test_claims_record_the_versions_that_run(path: Path) -> None:
    with Store(path) as first:
        key = first.add(identity(), versions={"torch": "2.6"})
    with Store(path) as second:
        second.add(identity(), versions={"torch": "2.13"})
        assert second.row(key).versions == {"torch": "2.6"}
        second.claim(key)
        assert second.row(key).versions == {"torch": "2.13"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1.0}, "seed = 1.0"),
        ({"seed": True}, "seed = True"),
        ({"arm": None}, "arm = None"),
        ({"color": "red"}, "nothing else"),
        ({"config": {"loss": object()}}, "cannot be written as JSON"),
    ],
)
def test_refuses_identities_that_are_none(store: Store, broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        store.add(identity(**broken))
    assert sum(store.counts().values()) == 0


def test_unknown_keys_are_refused(store: Store) -> None:
    key = store.add(identity())
    actions: list[Callable[[], Any]] = [
        lambda: store.row("nothing"),
        lambda: store.rows(keys=[key, "nothing"]),
        lambda: store.claim("nothing"),
        lambda: store.finish("nothing"),
        lambda: store.fail("nothing", "why"),
    ]
    for action in actions:
        with pytest.raises(StoreError, match="no run with the key 'nothing'"):
            action()


def test_failures_stay_until_they_are_retried(store: Store) -> None:
    keys = [store.add(identity(seed)) for seed in range(3)]
    for key in keys[:2]:
        store.claim(key)
        store.fail(key, "NonFiniteError: step 3 \udcff", seconds=1.0)
    assert "step 3" in (store.row(keys[0]).error or "") and not store.claim(keys[0])
    assert store.counts() == {"pending": 1, "running": 0, "done": 0, "failed": 2}
    assert store.retry_failed([keys[0]]) == 1 and store.retry_failed() == 1 and store.retry_failed() == 0
    assert store.row(keys[0]).error is None and store.claim(keys[0])


def test_results_are_never_overwritten(path: Path, store: Store) -> None:
    key = store.add(identity())
    store.claim(key)
    store.finish(key, metrics={"a": 1.0})
    store.finish(key, metrics={"a": 2.0})
    store.fail(key, "late")
    assert store.row(key).metrics == {"a": 1.0} and store.row(key).status == "done"
    other = store.add(identity(1))
    with Store(path) as elsewhere:
        elsewhere.claim(other)
        store.fail(other, "not mine")
        assert elsewhere.row(other).status == "running"
        store.finish(other, metrics={"a": 3.0})  # a true result counts, whoever brings it
    assert store.row(other).metrics == {"a": 3.0}


def test_filters_frame_and_order(store: Store) -> None:
    assert list(store.frame().columns) == [name for name in COLUMNS if name != "curve"] and store.frame().empty
    keys = [
        store.add(identity(seed, arm=arm, kind=kind)) for seed in (1, 0) for arm in "ab" for kind in ("tune", "final")
    ]
    store.finish(keys[0], metrics={"last": {"test_accuracy": 0.5}}, curve=[1])
    assert [row.key for row in store.rows()] == keys
    assert [row.key for row in store.rows(keys=keys[::-1])] == keys[::-1]
    assert [row.key for row in store.rows(arm="a", kind="final")] == [keys[1], keys[5]]
    assert [row.key for row in store.rows(keys=keys[:2], status="done", task="toy")] == [keys[0]]
    assert store.rows(keys=[]) == []
    with pytest.raises(ArgumentError, match="status"):
        store.rows(status="finished")
    frame = store.frame()
    assert len(frame) == 8 and "curve" not in frame
    assert frame["config.elr.lam"].tolist() == [3.0] * 8 and frame["metrics.last.test_accuracy"].notna().sum() == 1


# -- round trips ------------------------------------------------------------------------------------------------------------
def test_floats_keep_every_bit(path: Path, store: Store) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**63, 2000, dtype=np.int64).view(
        np.float64
    )  # any bits: denormals and huge ones included
    numbers = [
        *patterns[np.isfinite(patterns)].tolist(),
        -0.0,
        5e-324,
        1.7976931348623157e308,
        0.1,
        math.nan,
        math.inf,
        -math.inf,
    ]
    key = store.add(identity(config={"numbers": numbers}))
    store.finish(key, metrics={"numbers": numbers}, curve=[{"loss": x} for x in numbers], cost={"x": numbers})
    with Store(path) as again:
        row = again.row(key)
        assert again.add(identity(config={"numbers": numbers})) == key
    assert row.metrics is not None and row.cost is not None
    for back in (row.config["numbers"], row.metrics["numbers"], row.cost["x"], [x["loss"] for x in row.curve or []]):
        assert bits(back) == bits(numbers)


def test_any_nan_comes_back_as_the_standard_one() -> None:
    negative = struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000001))[0]
    assert bits(json.loads(to_json([negative]))) == bits([math.nan])


def test_scalars_arrays_and_odd_text(store: Store) -> None:
    torch = pytest.importorskip("torch")
    metrics = {
        "f32": np.float32(0.1),
        "i": np.int64(3),
        "b": np.bool_(True),
        "t": torch.tensor(0.5),
        "a": np.arange(2),
        "s": "ü\udcff\0",
    }
    key = store.add(identity())
    store.finish(key, metrics=metrics)
    expected = {"f32": float(np.float32(0.1)), "i": 3, "b": True, "t": 0.5, "a": [0, 1], "s": "ü\udcff\0"}
    assert store.row(key).metrics == expected
    assert list(store.row(key).metrics or {}) == list(metrics)  # the order is kept


def test_plans(path: Path, store: Store) -> None:
    assert store.latest_plan() is None
    first = store.save_plan({"arms": ["b", "a"], "rate": 0.1}, command="equipoise compare toy")
    second = store.save_plan({"arms": []})
    assert second != first and store.save_plan({"arms": []}) == second
    with Store(path) as again:
        assert again.latest_plan() == {"arms": []}
        assert again.load_plan(first) == {"arms": ["b", "a"], "rate": 0.1}
        with pytest.raises(StoreError, match="no comparison with the number 9"):
            again.load_plan(9)


# -- whose rows -------------------------------------------------------------------------------------------------------------
HAMMER = """
import sys, time
from equipoise.comparison.store import Store
path, order = sys.argv[1], int(sys.argv[2])
with Store(path) as store:
    keys = [row.key for row in store.rows()][::order]
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    for i, key in enumerate(keys):
        while time.time() < start + 0.003 * i:  # both try for the same row at the same instant
            pass
        if store.claim(key):
            print(key, flush=True)
    print("end", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("order", [1, -1])
def test_two_processes_never_claim_the_same_row(path: Path, store: Store, order: int) -> None:
    keys = store.add_many([identity(seed) for seed in range(200)])
    processes = [child(HAMMER, path, 1), child(HAMMER, path, order)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start = time.time() + 0.02
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    won = [[line.strip() for line in takewhile(lambda line: line != "end\n", p.stdout or ())] for p in processes]
    assert sorted(won[0] + won[1]) == sorted(keys)
    assert store.counts()["running"] == 200 and not store.claim(keys[0])
    for process in processes:
        process.communicate("stop\n")
    assert store.counts()["pending"] == 200  # closing gave the rows back


FINISHER = """
import sys
from equipoise.comparison.store import Store
assert not {"torch", "numpy", "pandas"} & set(sys.modules), "opening a store must stay light"
print("ready", flush=True)
with Store(sys.argv[1]) as store:
    for row in store.rows():
        if store.claim(row.key):
            curve = [{"loss": row.seed / (epoch + 3)} for epoch in range(100)]
            store.finish(row.key, metrics={"score": row.seed / 7}, curve=curve, seconds=1.0)
            print("finished", flush=True)
"""


def test_killed_at_random_moments(path: Path) -> None:
    rows = 200
    with Store(path) as store:
        store.add_many([identity(seed) for seed in range(rows)])
    rng = random.Random(0)
    done = 0
    for _ in range(20):
        process = child(FINISHER, path)
        assert process.stdout is not None
        for _ in range(rng.randrange(6)):
            assert process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.004))  # a row takes about as long: anywhere in a claim or a finish
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Store(path) as store:  # rolls back what was half written
            counts = store.counts()
            assert counts["done"] >= done and counts["running"] <= 1 and sum(counts.values()) == rows
            done = counts["done"]
            for row in store.rows(status="running"):
                assert store.claim(row.key)  # its owner is dead
    assert 0 < done < rows
    process = child(FINISHER, path)
    process.communicate()
    assert process.returncode == 0
    with Store(path) as store:
        for row in store.rows():
            assert row.status == "done"
            assert row.metrics == {"score": row.seed / 7}
            assert row.curve == [{"loss": row.seed / (epoch + 3)} for epoch in range(100)]


def test_rows_of_the_dead_can_be_claimed(path: Path, store: Store) -> None:
    key, stranger = store.add(identity()), store.add(identity(1))
    with Store(path) as other:
        assert other.claim(key)
        assert not store.claim(key)  # alive, although in this very process
    assert store.row(key).status == "pending" and store.claim(key)
    store.release([key])

    def pretend(owner: str, heartbeat: float) -> None:
        with sqlite3.connect(path) as db:
            db.execute(
                "UPDATE runs SET status = 'running', owner = ?, heartbeat = ? WHERE key = ?",
                (owner, heartbeat, stranger),
            )
        db.close()

    host, pid, start, _ = store.owner.rsplit(":", 3)
    now, old = time.time(), time.time() - module.STALE - 1
    alive = subprocess.Popen(["sleep", "60"])
    try:
        pretend(f"{host}:{alive.pid}:{module._start(alive.pid)}:0", old)
        assert not store.claim(stranger)  # on this machine a stopped process keeps its rows, however old the heartbeat
        pretend(f"{host}:{alive.pid}:1:0", now)
        assert store.claim(stranger)  # another process has been given the number since
        pretend(f"elsewhere:{alive.pid}:{module._start(alive.pid)}:0", now)
        assert not store.claim(stranger)
        pretend(f"elsewhere:{alive.pid}:{module._start(alive.pid)}:0", old)
        assert store.claim(stranger)
    finally:
        alive.kill()
        mark = f"{host}:{alive.pid}:{module._start(alive.pid)}:0"
        pretend(mark, now)
        assert store.claim(stranger)  # a zombie does not come back
        alive.wait()
    assert module._start(alive.pid) is None
    pretend(f"{host}:{pid}:{start}:999999", now)
    assert store.claim(stranger)  # a store object of this process that is closed


def test_liveness_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if str(self) == "/proc/self/stat" else real(self))
    assert module._start(os.getpid()) == str(psutil.Process().create_time())
    process = subprocess.Popen(["true"])
    process.wait()
    assert module._start(process.pid) is None
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert module._start(os.getpid()) == ""
    mark = f"{module._host()}:{process.pid}::0"  # with nothing to ask, the heartbeat tells
    assert module._alive(mark, time.time()) and not module._alive(mark, time.time() - module.STALE - 1)


def test_heartbeat_and_release_touch_own_rows_only(path: Path, store: Store) -> None:
    keys = store.add_many([identity(seed) for seed in range(3)])
    with Store(path) as other:
        assert store.claim(keys[0]) and store.claim(keys[1]) and other.claim(keys[2])
        before = [row.heartbeat or 0.0 for row in store.rows()]
        time.sleep(0.01)
        store.heartbeat([keys[0], keys[2]])
        after = [row.heartbeat or 0.0 for row in store.rows()]
        assert after[0] > before[0] and after[1:] == before[1:]
        store.heartbeat()
        assert (store.row(keys[1]).heartbeat or 0.0) > before[1]
        store.release([keys[0], keys[2]])
        assert [row.status for row in store.rows()] == ["pending", "running", "running"]
        store.release([])
        store.release()
        assert [row.status for row in store.rows()] == ["pending", "pending", "running"]


def test_threads_share_a_store(path: Path, store: Store) -> None:
    keys = store.add_many([identity(seed) for seed in range(60)])
    won: list[str] = []

    def work() -> None:
        for key in keys:
            if store.row(key).status == "pending" and store.claim(key):
                won.append(key)
                store.heartbeat([key])
                store.finish(key, metrics={"key": key})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(keys) and store.counts()["done"] == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_must_open_its_own(store: Store) -> None:
    key = store.add(identity())
    store.claim(key)

    def forked() -> None:
        with pytest.raises(StoreError, match="Open it anew"):
            store.row(key)
        store.close()  # must not give back the parent's rows

    assert in_fork(forked) == 0
    assert store.row(key).status == "running"


def in_fork(action: Callable[[], None]) -> int:
    """Exit status of ``action`` in a forked process: 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_closed_store_says_so(path: Path) -> None:
    store = Store(path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="Open it again"):
        store.counts()


# -- what can go wrong --------------------------------------------------------------------------------------------------------
def test_makes_parents_and_is_durable(tmp_path: Path) -> None:
    with Store(tmp_path / "a" / "b" / "store.sqlite") as store:
        assert store.path.exists()
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store._db.execute("PRAGMA busy_timeout").fetchone() == (30_000,)
    with Store(str(tmp_path / "a" / "b" / "store.sqlite")) as store:
        assert sum(store.counts().values()) == 0


def test_places_that_cannot_hold_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"folder cannot be made.*--out"):
        Store(tmp_path / "file" / "store.sqlite")


def test_folders_and_files_without_permission() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with Store(folder / "store.sqlite") as store:
            key = store.add(identity())
        (folder / "store.sqlite").chmod(0o444)
        folder.chmod(0o555)

        def stranger() -> None:
            if os.geteuid() == 0:  # whom no permission stops
                os.setuid(65534)
            with pytest.raises(StoreError, match=r"cannot be opened.*permission.*--out"):
                Store(folder / "new.sqlite")
            with pytest.raises(StoreError, match="folder cannot be made"):
                Store(folder / "below" / "new.sqlite")
            with Store(folder / "store.sqlite") as store:  # a report can still be made
                assert store.row(key).status == "pending"
                with pytest.raises(StoreError, match=r"cannot be written.*permission"):
                    store.claim(key)

        assert in_fork(stranger) == 0
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def fill(store: Store) -> int:
    """Write rows until the disk is full; return how many were finished."""
    for seed in range(10_000):
        key = store.add(identity(seed))
        store.claim(key)
        try:
            store.finish(key, metrics={"seed": seed}, curve=[0.5] * 2000)
        except StoreError as error:
            if "disk" in str(error) and "finished runs are kept" in str(error):
                return seed
            raise
    raise AssertionError("the disk was never full")


def check_after_full_disk(path: Path, finished: int) -> None:
    with Store(path) as store:
        rows = store.rows(status="done")
        assert [row.metrics for row in rows] == [{"seed": seed} for seed in range(finished)]
        assert store.counts()["pending"] == 1  # the row that found no room was given back
        key = store.rows(status="pending")[0].key
        assert store.claim(key)
        store.finish(key, metrics={"seed": finished})


def test_full_disk(path: Path) -> None:
    with Store(path) as store:
        store._db.execute("PRAGMA max_page_count = 60")
        finished = fill(store)
        assert finished > 5
        assert store.counts()["done"] == finished
        with pytest.raises(StoreError, match="the disk is full"):
            store.save_plan({"long": "x" * 50_000})
        assert store.latest_plan() is None
    check_after_full_disk(path, finished)


def test_write_errors_of_the_system(path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (300_000, 300_000)
        )  # writes beyond it fail, as on a disk that is full
        with Store(path) as store:
            assert fill(store) > 5

    assert in_fork(limited) == 0
    with Store(path) as store:
        finished = store.counts()["done"]
    check_after_full_disk(path, finished)


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be one" * 50, b"SQLite format 3\0" + b"\xff" * 2000]
)
def test_files_that_are_no_store(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"damaged, or is no store.*Move it away"):
        Store(path)
    assert path.read_bytes() == content


def test_other_programs_databases_are_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.commit()
    db.close()
    content = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        Store(path)
    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()  # what a process leaves that is killed before its first write
    with Store(path) as store:
        store.add(identity())


def filled(path: Path) -> bytes:
    with Store(path) as store:
        keys = store.add_many([identity(seed) for seed in range(100)])
        for key in keys[:10]:
            store.finish(key, metrics={"a": 1}, curve=[1.0] * 3000)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.99])
def test_truncated_files(path: Path, share: float) -> None:
    content = filled(path)
    damaged = content[: int(len(content) * share)]
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="damaged"):
        Store(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("junk", [b"\0", b"\xff"])
def test_damaged_pages_are_noticed(path: Path, junk: bytes) -> None:
    content = filled(path)
    size = 4096
    assert len(content) % size == 0
    for page in range(len(content) // size):
        damaged = content[: page * size] + junk * size + content[(page + 1) * size :]
        path.write_bytes(damaged)
        with pytest.raises(StoreError), Store(path) as store:
            store.rows()


def test_damaged_json_is_noticed(path: Path) -> None:
    with Store(path) as store:
        key = store.add(identity())
        store.finish(key, metrics={"a": 1})
        for broken in ('{"a": ', b"\xff\xfe"):
            store._db.execute("UPDATE runs SET metrics = CAST(? AS TEXT)", (broken,))
            with pytest.raises(StoreError, match="damaged"):
                store.row(key)


def test_stores_of_newer_versions_are_refused(path: Path) -> None:
    filled(path)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {module.VERSION + 1}")
    db.close()
    content = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer Equipoise.*Upgrade"):
        Store(path)
    assert path.read_bytes() == content


def test_a_locked_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY", 0.1)
    with Store(path) as store:
        key = store.add(identity())
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process kept it locked"):
            store.claim(key)
        assert store.row(key).status == "pending"  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert store.claim(key)


def test_a_store_deleted_under_way(path: Path) -> None:
    with Store(path) as store:
        store.add(identity())
        path.unlink()
        with pytest.raises(StoreError, match="moved or deleted"):
            store.add(identity(1))


def test_two_processes_open_a_new_store_at_once(path: Path) -> None:
    code = "import sys; from equipoise.comparison.store import Store\nwith Store(sys.argv[1]) as s: print(s.counts()['done'])"
    processes = [child(code, path) for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["0\n"] * 4
