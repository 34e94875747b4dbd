"""How much faster a comparison is with two runs at a time: `--jobs 2` beside `--jobs 1`, and whether the results are the same.

    python benchmarks/jobs.py [--epochs 35] [--configs 5] [--seeds 5]

The same trial on digits with noisy labels (cross-entropy, ELR, PS-KD; tuning, then final runs) is carried out into two new
stores, one run at a time in this process, and two at a time in worker processes. Targets:

- every metric, every learning curve and what tuning found are equal bit for bit: exit code 1 if not, on any machine;
- two runs at a time take at most 1/1.7 of the time: exit code 1 if not, where the machine can do two things at once.

What is counted: the whole of `equipoise.compare`, from its call to its result, with the store on disk. What is not: the start of
the worker processes, since joblib keeps them for five minutes and the first comparison of a session pays it once (it is timed
and printed, by a trial of two runs before); and the timing rows of a trial (`--no-timing` here), which run one at a time whatever
`--jobs` says, so that they do not disturb each other.

Whether the machine can do two things at once is measured too, before and after: a fixed piece of training in both workers at the
same time, beside the same in one. On two idle cores that gives 2; on two hardware threads of one core, or beside other work,
less, and no scheduling can then give more. The target is judged where it gives at least 1.9, and elsewhere only printed. The column
"in runs" is the share of the workers' time that went into runs: what is missing from 100 % is what the comparison itself costs,
waiting for the last run of a phase included, on a busy machine too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import nn
from torch.nn import functional as F

import equipoise

TARGET, IDLE = 1.7, 1.9
METHODS = ("cross-entropy", "elr", "ps-kd")
JOBS = 2


def trial(folder: Path, jobs: int, epochs: int, configs: int, seeds: int) -> tuple[equipoise.Comparison, float]:
    """The comparison and the seconds it took."""
    start = time.perf_counter()
    found = equipoise.compare(
        "noisy-labels",
        METHODS,
        settings={"epochs": epochs},
        configs=configs,
        seeds=seeds,
        jobs=jobs,
        measure_time=False,
        out=folder,
    )
    return found, time.perf_counter() - start


def results(found: equipoise.Comparison) -> dict[str, Any]:
    """All that a trial finds and that must not depend on where its runs were: as text, so that equal means every bit."""
    runs = found.runs().query("kind in ('tune', 'final')")
    measured = [name for name in runs if name.startswith(("config.", "last.", "best."))]
    runs = runs[["arm", "kind", "seed", "status", *measured]].sort_values(["arm", "kind", "seed", *measured])
    return {
        "runs": runs.map(repr).to_numpy().tolist(),
        "curves": found.curves().map(repr).to_numpy().tolist(),
        "arms": [repr((arm.name, arm.values, arm.config, arm.tuning, arm.low, arm.high, arm.p)) for arm in found.arms],
    }


def work(steps: int = 1_500) -> float:
    """Seconds of a fixed piece of training."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        inputs, labels = torch.randn(64, 64), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return time.perf_counter() - start


def capacity(rounds: int = 3) -> float:
    """How many times as much gets done by two workers at once as by one: the median of a few rounds."""
    ratios = []
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=JOBS, batch_size=1, pre_dispatch=JOBS)
        for _ in range(rounds):
            (alone,) = parallel([joblib.delayed(work)()])
            together = parallel([joblib.delayed(work)() for _ in range(JOBS)])
            ratios.append(sum(alone / seconds for seconds in together))
    return sorted(ratios)[rounds // 2]


def idle(seconds: float = 1.0) -> str:
    """Share of the processors' time that nobody used, just now, and the load average; where the system tells."""
    load = f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "load average unknown"
    stat = Path("/proc/stat")
    if not stat.exists():
        return load

    def ticks() -> tuple[int, int]:
        numbers = [int(text) for text in stat.read_text().split("\n")[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)

    before = ticks()
    time.sleep(seconds)
    after = ticks()
    share = (after[0] - before[0]) / max(after[1] - before[1], 1)
    return f"{100 * share:.0f} % of {os.cpu_count()} processors idle, {load}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=35, help="length of a run")
    parser.add_argument("--configs", type=int, default=5, help="configurations of each arm")
    parser.add_argument("--seeds", type=int, default=5, help="final runs of each arm")
    chosen = parser.parse_args()
    sizes = (chosen.epochs, chosen.configs, chosen.seeds)
    print(f"before: {idle()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, alone = trial(folder / "first-alone", 1, 1, 1, 2)  # also loads the data and the code into this process
        _, cold = trial(folder / "first", JOBS, 1, 1, 2)
        print(f"start of {JOBS} workers, not counted below: {max(cold - alone, 0.0):.1f} s")
        capacities = [capacity()]
        one, seconds_one = trial(folder / "one", 1, *sizes)
        two, seconds_two = trial(folder / "two", JOBS, *sizes)
        capacities.append(capacity())
        rows = len(one.runs())
        in_runs = one.runs()["seconds"].sum() / seconds_one, two.runs()["seconds"].sum() / seconds_two / JOBS
        equal = results(one) == results(two)
        failed = one.failed + two.failed
    print(f"after:  {idle()}")

    ratio, possible = seconds_one / seconds_two, min(capacities)
    print(f"\n{'':24} {'seconds':>9} {'rows/s':>8} {'in runs':>8} {'ratio':>7} {'target':>8}")
    for name, seconds, share, end in (
        (f"--jobs 1, {rows} rows", seconds_one, in_runs[0], f"{1:7.2f}"),
        (f"--jobs {JOBS}", seconds_two, in_runs[1], f"{ratio:7.2f} {f'>= {TARGET}':>8}"),
    ):
        print(f"{name:24} {seconds:9.1f} {rows / seconds:8.2f} {100 * share:6.1f} % {end}")
    print(f"what the machine can do: {capacities[0]:.2f} before, {capacities[1]:.2f} after")
    print(f"results equal bit for bit: {'yes' if equal else 'NO, MISSED'}; failed runs: {failed}")
    slow = ratio < TARGET
    if slow and possible < IDLE:
        print(f"{ratio:.2f} of {possible:.2f} possible: the target is NOT JUDGED, the machine is busy or has one core")
    elif slow:
        print("The target is MISSED.")
    return int(not equal or failed > 0 or (slow and possible >= IDLE))


if __name__ == "__main__":
    sys.exit(main())
