"""The commands: compare, tasks, methods, show, reproduce, report, merge. Torch is imported only by those that train."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise import __version__, catalogue
from equipoise.cli.merge import merge
from equipoise.errors import ArgumentError, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable

    from equipoise.comparison.protocol import Progress

app = typer.Typer(
    name="equipoise",
    help="Which training method beats a tuned baseline on your data, by how much, and at what cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OPTIONS = (
    "methods",
    "seeds",
    "configs",
    "tuning-seeds",
    "jobs",
    "threads",
    "engine",
    "address",
    "out",
    "json",
    "timing",
    "retry-failed",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"equipoise {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Which training method beats a tuned baseline on your data, by how much, and at what cost?"""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="Name of a task (see `equipoise tasks`).")],
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; by default the task's.")] = None,
    seeds: Annotated[int, typer.Option(help="Final runs of each arm, at least 2.")] = 5,
    configs: Annotated[int, typer.Option(help="Configurations tried for each arm, the baseline included.")] = 8,
    tuning_seeds: Annotated[int, typer.Option(help="Splits on which each configuration is tried.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each run; results depend on it in the last bits.")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; without it a local one is started.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the store and the report; by default equipoise-results/TASK.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    timing: Annotated[bool, typer.Option(help="Measure the step-time ratio.")] = True,
    retry_failed: Annotated[bool, typer.Option(help="Run rows again that failed before.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Hold methods against a tuned baseline on a task.

    Every setting of the task is an option too: `equipoise compare noisy-labels --dataset digits --noise pair --rate 0.3`.
    """
    settings = _settings(context.args)
    entry = catalogue.find("task", task)
    _refuse_misspelt(settings, entry)
    for name in (methods or "").split(","):
        if name:
            catalogue.find("method", name)
    from equipoise.comparison.protocol import command_line, compare
    from equipoise.comparison.report import print_report, write_all

    command = command_line()
    try:
        with _ctrl_c() as look, _progress(quiet or as_json) as watch:

            def seen(progress: Progress) -> None:
                look()
                if watch is not None:
                    watch(progress)

            found = compare(
                entry.load().make(**settings),
                [name for name in methods.split(",") if name] if methods is not None else None,
                seeds=seeds,
                configs=configs,
                tuning_seeds=tuning_seeds,
                jobs=jobs,
                threads=threads,
                engine=engine,
                address=address,
                out=out,
                measure_time=timing,
                retry_failed=retry_failed,
                progress=seen,
                command=command,
            )
    except KeyboardInterrupt:
        print(f"\nStopped. Every finished run is kept; continue with:\n  {command}", file=sys.stderr)
        raise typer.Exit(130) from None
    write_all(found, found.report.parent)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_report(found)
    if found.failed:
        causes = [arm.sentence for arm in found.arms if arm.failed]
        print(f"error: {found.failed} final runs or arms failed ({causes[0]}); see {found.report}", file=sys.stderr)
        raise typer.Exit(1)


app.command()(merge)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison (its --out).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Write the report and the tables of a finished comparison again."""
    from equipoise.comparison.report import print_report, write_all
    from equipoise.comparison.result import Comparison

    found = Comparison.load(folder)
    write_all(found, folder)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_report(found)


@app.command()
def tasks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the tasks."""
    _list("task", as_json)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods."""
    _list("method", as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a method or task.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a method or task is, when to use it, what it costs, and what the evidence is."""
    from equipoise.cli.show import show_method, show_task

    key = name.lower().replace("_", "-")
    if key in catalogue.tasks():
        show_task(catalogue.tasks()[key], as_json)
    elif key in catalogue.methods():
        show_method(catalogue.methods()[key], as_json)
    else:
        hint = suggestion(key, [*catalogue.methods(), *catalogue.tasks()])
        raise ArgumentError(f"name = {name!r}: there is no such method or task. {hint or 'Run `equipoise methods`'}")


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Claims, or papers (all their claims).")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every claim.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the stores.")] = Path("equipoise-results/claims"),
    evidence: Annotated[
        Path | None, typer.Option(help="Folder for the evidence; by default the one beside the package.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check papers' claims and write the evidence. Without a name: list the claims."""
    from equipoise.comparison.claims import claims, evidence_folder, select, write

    if not names and not everything:
        if as_json:
            known = claims().values()
            keys = ("slug", "number", "claim", "source", "expected")
            print(json.dumps([{"id": c.id} | {key: getattr(c, key) for key in keys} for c in known], indent=2))
            return
        for key, claim in sorted(claims().items()):
            typer.echo(f"{key:32s} {claim.claim}")
        return
    if names and everything:
        raise ArgumentError(f"names = {names}: --all runs every claim; give either")
    documents = []
    for claim in claims().values() if everything else select(names or []):
        with _progress(as_json, claim.id) as watch:
            document = claim.run(out / claim.slug, jobs=jobs, progress=watch)
        path = write(document, claim, evidence or evidence_folder())
        documents.append(document)
        if not as_json:
            m = document["measured"]
            interval = f"{m['effect']:+.4g} [{m['low']:+.4g}, {m['high']:+.4g}] {m['unit']} (n = {m['n']})"
            typer.echo(
                f"{claim.id}: {document['verdict']}\n  expected {claim.expected}\n  measured {interval}\n  {path}"
            )
    if as_json:
        print(json.dumps(documents, indent=2))


def _settings(words: list[str]) -> dict[str, str]:
    """Read ``--name value``, ``--name=value`` and ``--set name=value``."""
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ArgumentError(f"{word!r}: is no option; settings are given as --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ArgumentError(f"--{name}: needs a value, as in --{name} VALUE. {suggestion(name, OPTIONS)}")
            value = rest.pop(0)
        if name == "set":
            name, equals, value = value.partition("=")
            if not equals:
                raise ArgumentError(f"--set {name}: must be --set name=value")
        found[name.replace("-", "_")] = value
    return found


def _refuse_misspelt(settings: dict[str, str], entry: catalogue.Entry) -> None:
    """A misspelt option of the command would be taken for a setting of the task: suggest among both."""
    from dataclasses import fields

    known = [f.name for f in fields(entry.load())]
    for name in settings:
        if name not in known:
            hint = suggestion(name, [*OPTIONS, *(k.replace("_", "-") for k in known)])
            listed = ", ".join(k.replace("_", "-") for k in known)
            raise ArgumentError(
                f"--{name.replace('_', '-')}: {entry.slug} has no such setting. {hint} Its settings are {listed}"
            )


def _list(kind: str, as_json: bool) -> None:
    entries = (catalogue.methods() if kind == "method" else catalogue.tasks()).values()
    if as_json:
        keys = ("slug", "family", "module", "summary", "paper")
        print(json.dumps([{key: getattr(entry, key) for key in keys} for entry in entries], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (kind, "family", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for entry in entries:
        table.add_row(entry.slug, entry.family.replace("_", " "), entry.summary)
    Console().print(table)


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Ctrl-C that cannot get lost: where Python drops the exception (in a destructor or a callback), the next look raises it."""
    pressed = threading.Event()

    def note(*_: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def look() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if ours else None
    if before is not signal.default_int_handler:  # ignored, or somebody else's: let it be
        yield look
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(quiet: bool, name: str = "") -> Iterator[Callable[[Progress], None] | None]:
    """A bar with the time left, on the error stream."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs,")]
    columns += [TimeElapsedColumn(), TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left")]
    with Bar(*columns, console=console, speed_estimate_period=600, transient=True) as bar:
        row = bar.add_task(name or "starting", total=None)

        def watch(event: Progress) -> None:
            text = f"{name}: {event.text}" if name else event.text
            bar.update(row, completed=event.done, total=event.total, description=text)

        yield watch
