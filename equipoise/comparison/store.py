"""The store: every run of a comparison is a row of one SQLite file, and a finished row never runs again.

A row is ``pending``, ``running`` (claimed by one process), ``done`` or ``failed``. ``claim`` is atomic, so that two processes
on one store never run the same row; a row whose process has died can be claimed again. The file is opened with a rollback
journal and full synchronisation: whatever moment a process is killed or the power fails, the rows written before are there.

SQLite's locks need a file system that honours them. Processes on other machines can share a store on such a file system;
their deaths are noticed by a heartbeat that is too old, so their clocks must agree to within a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import ArgumentError, StoreError, check_choice, check_integer

if TYPE_CHECKING:
    from pandas import DataFrame

VERSION = 1  # of the tables below; raise it when they change, and add the steps from the one before to ``_open``
APPLICATION = 0x45515053  # "EQPS" in the file's header: tells our stores from other programs' databases
STALE = 120.0  # seconds without a heartbeat after which a row of another machine can be claimed again
BUSY = 30.0  # seconds to wait for another process's write

STATUSES = ("pending", "running", "done", "failed")
IDENTITY = ("task", "settings", "arm", "method", "kind", "config", "seed")
JSON_COLUMNS = ("settings", "config", "metrics", "curve", "cost", "versions")
TABLES = (
    """
    CREATE TABLE runs (
        key TEXT PRIMARY KEY,
        task TEXT NOT NULL, settings TEXT NOT NULL, arm TEXT NOT NULL, method TEXT NOT NULL,
        kind TEXT NOT NULL, config TEXT NOT NULL, seed INTEGER NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'done', 'failed')),
        owner TEXT, heartbeat REAL,
        metrics TEXT, curve TEXT, cost TEXT, versions TEXT, seconds REAL, error TEXT,
        created REAL NOT NULL, finished REAL
    )
    """,
    "CREATE TABLE comparisons (id INTEGER PRIMARY KEY, created REAL NOT NULL, plan TEXT NOT NULL, command TEXT NOT NULL)",
)


@dataclass(frozen=True)
class Row:
    """One run. ``owner``: host:pid:start:number of the store object that runs it. Times in seconds since the epoch."""

    key: str
    task: str
    settings: dict[str, Any]
    arm: str
    method: str
    kind: str
    config: dict[str, Any]
    seed: int
    status: str
    owner: str | None
    heartbeat: float | None
    metrics: dict[str, Any] | None
    curve: list[Any] | None
    cost: dict[str, Any] | None
    versions: dict[str, Any] | None
    seconds: float | None
    error: str | None
    created: float
    finished: float | None


COLUMNS = tuple(Row.__dataclass_fields__)


class Store:
    """The runs and plans in the SQLite file ``path``, which is made with its folders if it does not exist.

    Use it as a context manager: closing gives back the rows that were claimed and not finished. Its methods may be called
    from several threads. A process that was forked must open a store of its own.

    Raises ``StoreError``, here and in every method, if the file cannot be opened, read or written, is damaged, is no store,
    or comes from a newer version. A change that fails is undone as a whole; what was written before stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.owner = f"{_process()}:{next(_numbers)}"
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._versions: dict[str, str] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_folder = self.path.is_dir()
        except OSError as error:
            raise self._error(
                f"its folder cannot be made or entered ({error.strerror}). Choose another with --out"
            ) from error
        if is_folder:
            raise self._error("is a folder. Give the path of a file")
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise
        _open_owners.add(self.owner)

    def _open(self) -> None:
        with self._explained():
            new = not self._tables()
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("PRAGMA synchronous = FULL")
        if new:
            with self._transaction() as db:
                if not self._tables():  # another process may have been faster
                    for statement in TABLES:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {VERSION}")
        with self._explained():
            application, version = self._pragma("application_id"), self._pragma("user_version")
            if application != APPLICATION:
                raise self._error("is an SQLite file of another program. Choose another folder with --out")
            if version > VERSION:
                raise self._error(
                    f"was written by a newer Equipoise (store version {version}, this one reads {VERSION}). "
                    "Upgrade equipoise, or choose another folder with --out"
                )
            found = self._pragma("quick_check(1)")
            if found != "ok":
                raise self._error(f"{DAMAGED} ({found})")

    # -- runs ---------------------------------------------------------------------------------------------------------
    def add(self, identity: Mapping[str, Any], *, versions: Mapping[str, Any] | None = None) -> str:
        """Make sure that a run has a row, and return its key. See ``add_many``."""
        return self.add_many([identity], versions=versions)[0]

    def add_many(
        self, identities: Iterable[Mapping[str, Any]], *, versions: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Make sure that runs have rows, in one step, and return their keys. Rows that exist are left as they are.

        An identity holds ``task``, ``arm``, ``kind`` and ``method`` (strings; ``method`` may be missing), ``settings`` and
        ``config`` (what JSON can hold; tuples become lists) and ``seed`` (int >= 0). Equal identities have equal keys.
        versions: what results depend on; written to the rows that this store claims.
        """
        records, keys = {}, []
        for identity in identities:
            record = _identity(identity)
            keys.append(_key(record))
            records[keys[-1]] = record
        if versions is not None:
            self._versions |= dict.fromkeys(records, to_json(versions))
        known = self._known(keys)
        missing = [key for key in records if key not in known]
        if missing:
            names = ("key", *IDENTITY, "status", "versions", "created")
            values = []
            for key in missing:
                r = records[key]
                texts = [to_json(r[name]) if name in JSON_COLUMNS else r[name] for name in IDENTITY]
                values.append((key, *texts, "pending", self._versions.get(key), time.time()))
            marks = ", ".join("?" * len(names))
            with self._transaction() as db:
                db.executemany(f"INSERT OR IGNORE INTO runs ({', '.join(names)}) VALUES ({marks})", values)
        return keys

    def claim(self, key: str) -> bool:
        """Mark a row as running here; False if it is finished, or is running in a process that lives."""
        with self._transaction() as db:
            row = db.execute("SELECT status, owner, heartbeat FROM runs WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise self._missing([key])
            status, owner, heartbeat = row
            if status in ("done", "failed") or (status == "running" and _alive(owner, heartbeat)):
                return False
            db.execute(
                "UPDATE runs SET status = 'running', owner = ?, heartbeat = ?, versions = coalesce(?, versions) WHERE key = ?",
                (self.owner, time.time(), self._versions.get(key), key),
            )
        return True

    def heartbeat(self, keys: Sequence[str] | None = None) -> None:
        """Say that the rows claimed here are still being run; all of them, or those given. At least every minute."""
        self._change("heartbeat = ?", [time.time()], "status = 'running' AND owner = ?", [self.owner], keys)

    def finish(
        self,
        key: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        curve: Sequence[Any] | None = None,
        cost: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Write a run's results. A row that is done already keeps what it has."""
        results = [None if part is None else to_json(part) for part in (metrics, curve, cost)]
        changed = self._change(
            "status = 'done', owner = NULL, heartbeat = NULL, error = NULL, "
            "metrics = ?, curve = ?, cost = ?, seconds = ?, finished = ?",
            [*results, seconds, time.time()],
            "status <> 'done'",
            [],
            [key],
        )
        if not changed:
            self.row(key)  # no such row is an error; a row that is done is not

    def fail(self, key: str, error: str, *, seconds: float | None = None) -> None:
        """Write that a run failed, and why. Nothing changes if another process has taken the row over or finished it."""
        text = error.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold bytes that are not text
        changed = self._change(
            "status = 'failed', owner = NULL, heartbeat = NULL, error = ?, seconds = ?, finished = ?",
            [text, seconds, time.time()],
            "(status = 'pending' OR (status = 'running' AND owner = ?))",
            [self.owner],
            [key],
        )
        if not changed:
            self.row(key)

    def release(self, keys: Sequence[str] | None = None) -> None:
        """Give back rows that were claimed here and not finished: all of them, or those given."""
        with self._explained():
            mine = "SELECT 1 FROM runs WHERE status = 'running' AND owner = ? LIMIT 1"
            if self._db.execute(mine, (self.owner,)).fetchone() is None:
                return
        changes = "status = 'pending', owner = NULL, heartbeat = NULL"
        self._change(changes, [], "status = 'running' AND owner = ?", [self.owner], keys)

    def retry_failed(self, keys: Sequence[str] | None = None) -> int:
        """Make failed rows pending again, all of them or those given; return how many."""
        changes = "status = 'pending', error = NULL, seconds = NULL, finished = NULL"
        return self._change(changes, [], "status = 'failed'", [], keys)

    # -- reading ------------------------------------------------------------------------------------------------------
    def row(self, key: str) -> Row:
        """The row of a key."""
        return self.rows(keys=[key])[0]

    def rows(
        self,
        *,
        keys: Sequence[str] | None = None,
        task: str | None = None,
        arm: str | None = None,
        kind: str | None = None,
        status: str | None = None,
    ) -> list[Row]:
        """Rows in the order they were added, or of ``keys``, narrowed by what else is given. An unknown key is refused."""
        if status is not None:
            check_choice("status", status, STATUSES)
        wanted = {"task": task, "arm": arm, "kind": kind, "status": status}
        given = {name: value for name, value in wanted.items() if value is not None}
        where, values = [f"{name} = ?" for name in given], list(given.values())
        if keys is not None:
            known = self._known(keys)
            if len(known) < len(set(keys)):
                raise self._missing([key for key in keys if key not in known])
            where.append("key IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(list(keys)))
        query = f"SELECT {', '.join(COLUMNS)} FROM runs" + (f" WHERE {' AND '.join(where)}" if where else "")
        with self._explained():
            found = self._db.execute(query + " ORDER BY rowid", values).fetchall()
        rows = [self._row(record) for record in found]
        if keys is not None:
            position = {key: i for i, key in enumerate(keys)}
            rows.sort(key=lambda row: position[row.key])
        return rows

    def frame(self) -> DataFrame:
        """All rows as a table without their curves; nested values have columns such as ``config.lr``."""
        import pandas as pd

        records = [{name: value for name, value in asdict(row).items() if name != "curve"} for row in self.rows()]
        if not records:
            return pd.DataFrame(columns=[name for name in COLUMNS if name != "curve"])
        return pd.json_normalize(records)

    def counts(self) -> dict[str, int]:
        """Number of rows of each status."""
        with self._explained():
            found = dict(self._db.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in STATUSES}

    # -- plans --------------------------------------------------------------------------------------------------------
    def save_plan(self, plan: Mapping[str, Any], *, command: str = "") -> int:
        """Keep what is needed to make a comparison's report again; return its number. The latest is not kept twice."""
        text = to_json(plan)
        latest = "SELECT id FROM comparisons WHERE id = (SELECT max(id) FROM comparisons) AND plan = ? AND command = ?"
        with self._explained():
            found = self._db.execute(latest, (text, command)).fetchone()
        if found is None:
            with self._transaction() as db:
                insert = "INSERT INTO comparisons (created, plan, command) VALUES (?, ?, ?) RETURNING id"
                found = db.execute(insert, (time.time(), text, command)).fetchone()
        return int(found[0])

    def load_plan(self, number: int) -> dict[str, Any]:
        """The plan of that number."""
        return self._plan("WHERE id = ?", (number,)) or self._no_plan(number)

    def latest_plan(self) -> dict[str, Any] | None:
        """The plan saved last; None if there is none."""
        return self._plan("ORDER BY id DESC LIMIT 1", ())

    # -- opening and closing ------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Give back unfinished rows and close the file. Closing twice does nothing."""
        if self.owner not in _open_owners or self._pid != os.getpid():
            return
        # A row that cannot be given back (full disk) is free anyway once its owner is closed.
        with contextlib.suppress(StoreError):
            self.release()
        with self._lock:
            _open_owners.discard(self.owner)
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Hold the lock; turn SQLite's errors into ones that say what to do."""
        if self._pid != os.getpid():
            raise self._error("was opened before this process was forked. Open it anew in each process")
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._error(_remedy(error)) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, with the write lock taken at the start, so that what is read stays true until it is changed."""
        with self._explained():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _change(
        self, changes: str, new: Sequence[Any], where: str, values: Sequence[Any], keys: Sequence[str] | None
    ) -> int:
        """Update the rows that meet a condition, all or of ``keys``; return how many."""
        if keys is not None:
            if not keys:
                return 0
            where += " AND key IN (SELECT value FROM json_each(?))"
            values = [*values, json.dumps(list(keys))]
        with self._transaction() as db:
            return db.execute(f"UPDATE runs SET {changes} WHERE {where}", [*new, *values]).rowcount

    def _known(self, keys: Sequence[str]) -> set[str]:
        with self._explained():
            query = "SELECT key FROM runs WHERE key IN (SELECT value FROM json_each(?))"
            return {key for (key,) in self._db.execute(query, (json.dumps(list(keys)),))}

    def _row(self, record: tuple[Any, ...]) -> Row:
        values = dict(zip(COLUMNS, record, strict=True))
        for name in JSON_COLUMNS:
            if values[name] is not None:
                values[name] = self._parse(values[name])
        return Row(**values)

    def _plan(self, which: str, values: tuple[int, ...]) -> dict[str, Any] | None:
        with self._explained():
            found = self._db.execute(f"SELECT plan FROM comparisons {which}", values).fetchone()
        return None if found is None else self._parse(found[0])

    def _parse(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (TypeError, ValueError) as error:
            raise self._error(f"{DAMAGED} ({error})") from error

    def _tables(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

    def _pragma(self, name: str) -> Any:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def _error(self, text: str) -> StoreError:
        return StoreError(f"store = {str(self.path)!r}: {text}")

    def _missing(self, keys: Sequence[str]) -> StoreError:
        return self._error(f"holds no run with the key {keys[0]!r}. Add runs before they are claimed or read")

    def _no_plan(self, number: int) -> dict[str, Any]:
        raise self._error(f"holds no comparison with the number {number}")


def to_json(value: Any) -> str:
    """JSON in ASCII without spaces; numpy and torch scalars and arrays become numbers and lists.

    Floats keep every bit. NaN and the infinities are written ``NaN``, ``Infinity`` and ``-Infinity``, as Python's json
    reads them; every NaN comes back as the standard one. Raises ``ArgumentError`` for what JSON cannot hold.
    """
    return _dumps(value, sort_keys=False)


def _dumps(value: Any, *, sort_keys: bool) -> str:
    try:
        return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a value of the store cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        return value.tolist()
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def _identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    record = {"method": "", **identity}
    if set(record) != set(IDENTITY):
        raise ArgumentError(f"identity = {sorted(identity)}: must hold {', '.join(IDENTITY)} and nothing else")
    for name in ("task", "arm", "kind", "method"):
        if not isinstance(record[name], str):
            raise ArgumentError(f"{name} = {record[name]!r}: must be a string")
    check_integer("seed", record["seed"], 0, 2**63 - 1)
    return record


def _key(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumps(record, sort_keys=True).encode("ascii")).hexdigest()


# -- whose rows ---------------------------------------------------------------------------------------------------------
_numbers = itertools.count()
_open_owners: set[str] = set()


def _process() -> str:
    """host:pid:start of this process, which no other process, dead or alive, has."""
    return f"{_host()}:{os.getpid()}:{_start(os.getpid())}"


@lru_cache(maxsize=1)
def _host() -> str:
    """The host's name, and what tells containers and boots of that name apart: process numbers mean nothing across them."""
    marks = []
    with contextlib.suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        marks.append(os.readlink("/proc/self/ns/pid"))
    return f"{socket.gethostname()}-{hashlib.sha256(''.join(marks).encode()).hexdigest()[:8]}"


def _start(pid: int) -> str | None:
    """When a process started, in the machine's own units; None if there is no such process, "" if it cannot be told."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie has died and waits for its parent
    try:
        psutil: Any = import_module("psutil")
    except ImportError:
        return ""
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return ""


def _alive(owner: str | None, heartbeat: float | None) -> bool:
    """Whether the store object that claimed a row can still finish it."""
    host, pid, start, _ = (owner or ":0::").rsplit(":", 3)
    if host == _host():
        if int(pid) == os.getpid() and start == (_start(os.getpid()) or ""):
            return owner in _open_owners
        now = _start(int(pid))
        if now is None:
            return False
        if now and start:
            return now == start
    return heartbeat is not None and time.time() - heartbeat < STALE


# -- what to do about it --------------------------------------------------------------------------------------------------
DAMAGED = (
    "is damaged, or is no store. Nothing was changed. Move it away or choose another folder with --out; "
    "`sqlite3 FILE .recover` may save rows"
)
REMEDIES = {
    sqlite3.SQLITE_FULL: "the disk is full. Free some space and run the same command again: finished runs are kept",
    sqlite3.SQLITE_IOERR: (
        "the disk could not be read or written (full, over quota, failing or disconnected?). "
        "Repair that and run the same command again: finished runs are kept"
    ),
    sqlite3.SQLITE_BUSY: f"another process kept it locked for {BUSY:.0f} s. Let that process finish, or end it, and run again",
    sqlite3.SQLITE_READONLY: "cannot be written. Get permission to write to the file and its folder, or choose another with --out",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened. Get permission to write to the file and its folder, or choose another with --out",
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_CORRUPT: DAMAGED,
}
REMEDIES[sqlite3.SQLITE_PERM] = REMEDIES[sqlite3.SQLITE_AUTH] = REMEDIES[sqlite3.SQLITE_CANTOPEN]
REMEDIES[sqlite3.SQLITE_LOCKED] = REMEDIES[sqlite3.SQLITE_BUSY]


def _remedy(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_READONLY_DBMOVED:
        return "was moved or deleted while in use. Put it back, or run the same command again to start anew"
    if isinstance(error, sqlite3.ProgrammingError):
        return f"cannot be used any more ({error}). Open it again"
    if "decode to UTF-8" in str(error):
        return f"{DAMAGED} ({error})"
    # Extended codes keep the general one in their lowest byte.
    return REMEDIES.get((code or 0) & 0xFF, "cannot be used. See SQLite's message") + f" ({error})"
