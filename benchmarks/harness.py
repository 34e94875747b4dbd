"""How the benchmarks measure: everything of a table in one process, in turn, after a warm-up, in an order that alternates.

Ratios are those of the fastest and of the median measurement; a target is missed only if both miss it. Scripts import this module
from their own folder: ``python benchmarks/<name>.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from threadpoolctl import threadpool_limits

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHORTEST = 3e-3  # seconds of one measurement: what is faster is repeated inside it
Work = Callable[[], object]


class Bench:
    """Measures, prints and remembers whether a target was missed."""

    def __init__(self, repeats: int = 15, clock: str = "wall", shortest: float = SHORTEST) -> None:
        self.repeats, self.clock, self.shortest, self.missed = repeats, CLOCKS[clock], shortest, False

    def measure(self, works: Mapping[str, Work], repeats: int | None = None) -> dict[str, list[float]]:
        """Seconds of each call, ``repeats`` times in turn."""
        calls = {}
        for name, work in works.items():
            work()
            start = self.clock()
            work()
            calls[name] = max(1, round(self.shortest / max(self.clock() - start, 1e-9)))
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(repeats or self.repeats):
            for name in works if repeat % 2 else reversed(works):
                start = self.clock()
                for _ in range(calls[name]):
                    works[name]()
                seconds[name].append((self.clock() - start) / calls[name])
        return seconds

    def table(
        self,
        title: str,
        works: Mapping[str, Work] | Mapping[str, list[float]],
        at_most: float | Mapping[str, float] | None = None,
        *,
        at_least: Mapping[str, float] | None = None,
        peer: str | Sequence[str] | None = None,
        repeats: int | None = None,
    ) -> None:
        """Measure ``works`` (or take their seconds) and print each over the peer's.

        at_most: targets of these ratios by name; one number is the last work's. at_least: targets of the inverse, the peer's time
        over each, which is then shown. peer: a name, by default the first; of several, the fastest.
        """
        seconds = {
            name: value if isinstance(value, list) else None for name, value in works.items()
        }  # a table may be printed of what was measured elsewhere
        if None in seconds.values():
            seconds = self.measure(works, repeats)  # type: ignore[arg-type, assignment]
        known: dict[str, list[float]] = seconds  # type: ignore[assignment]
        names = [peer] if isinstance(peer, str) else list(peer or [next(iter(known))])
        base = known[min(names, key=lambda name: min(known[name]))]
        targets = {list(known)[-1]: at_most} if isinstance(at_most, int | float) else dict(at_most or {})
        print(f"\n{title:56} {'fastest':>12} {'ratio':>8} {'median':>8} {'target':>9}")
        for name, measured in known.items():
            pair = (min(measured) / min(base), statistics.median(measured) / statistics.median(base))
            target, good = "", True
            if at_least is not None:
                pair = (1 / pair[0], 1 / pair[1])
                if name in at_least:
                    target, good = f">= {at_least[name]:g}", max(pair) >= at_least[name]
            elif name in targets:
                target, good = f"<= {targets[name]:.2f}", min(pair) <= targets[name]
            print(
                f"{name:56} {_time(min(measured)):>12} {pair[0]:8.3f} {pair[1]:8.3f} {target:>9}{'' if good else '  MISSED'}"
            )
            self.missed |= not good

    def require(self, text: str, good: bool) -> None:
        """Print a fact that must hold."""
        print(f"{text}: {'yes' if good else 'NO, MISSED'}")
        self.missed |= not good

    def finish(self) -> int:
        """Say whether all targets were met; the exit code, 1 if one was missed."""
        print("\nA target is MISSED." if self.missed else "\nAll targets met.")
        return int(self.missed)


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.3f} ms"


def parser(description: str | None, repeats: int = 15) -> argparse.ArgumentParser:
    """The options that every script has; it may add its own."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=int, default=repeats, help="measurements of each kind")
    found.add_argument("--threads", type=int, default=1, help="threads of torch, numpy and scipy")
    found.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy machine")
    return found


def parse(options: argparse.ArgumentParser | str | None, repeats: int = 15) -> tuple[argparse.Namespace, Bench]:
    """Read the command line (a script's docstring, or the ``parser`` it made) and set the threads of torch, numpy and scipy."""
    if not isinstance(options, argparse.ArgumentParser):
        options = parser(options, repeats)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    threadpool_limits(chosen.threads)
    return chosen, Bench(chosen.repeats, chosen.clock)
