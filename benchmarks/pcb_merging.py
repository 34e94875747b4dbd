"""What merging costs: beside the recipe with full sorts, and in memory as models grow.

    python benchmarks/pcb_merging.py [--models 8] [--parameters 22000000] [--threads 1]

Time: `pcb_merge` on random task vectors, against the same steps written with whole matrices, its order statistics by sorting (as
the released code finds them) and by `torch.kthvalue`. Each runs once in a process of its own, which also gives its peak memory
beyond the task vectors. Targets: no slower than the faster of the two, at most half the time with sorts, and less memory.

Files: `merge_files` of four models and a base, in float32 tensors of 4 MiB, by every method, each in a process of its own. Target:
the memory beyond that of the imported library stays under 150 MiB as the files grow by a factor of four, to 960 MiB. Two equal runs
differ by up to 50 MiB, by what the allocator keeps.

Memory is the high-water mark that Linux keeps of a process (VmHWM).

Exit code 1 if a target is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import parse, parser
from safetensors.torch import save_file
from torch import Tensor

RATIO, CLIP = 0.1, 1e-4
PEAK = """
import json, re, sys, time, torch
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""
CHILD = (
    PEAK
    + """
sys.path.insert(0, {folder!r})
torch.set_num_threads({threads})
import pcb_merging as bench
work = bench.WORKS[{name!r}]
g = torch.Generator().manual_seed(0)
work(1e-3 * torch.randn({n}, 1000, generator=g))  # loads what is loaded on first use
tau = torch.empty({n}, {d}).normal_(0, 1e-3, generator=g)
before, start = peak(), time.{clock}()
merged = work(tau)
print(json.dumps([time.{clock}() - start, peak() - before, merged[:100_000].double().sum().item(), len(merged)]))
"""
)
FILES = (
    PEAK
    + """
torch.set_num_threads({threads})
from equipoise import catalogue
from equipoise.merging.files import merge_files
plan = catalogue.find("method", {slug!r}).load()(**{settings!r}).plan()
before, start = peak(), time.perf_counter()
merge_files(plan, *{paths!r}, {out!r})
print(json.dumps([peak() - before, time.perf_counter() - start]))
"""
)


# -- the recipe with whole matrices -----------------------------------------------------------------------------------
def ours(tau: Tensor) -> Tensor:
    from equipoise.merging.pcb_merging import pcb_merge

    return pcb_merge(tau, ratio=RATIO, clip=CLIP).merged


def with_sorts(tau: Tensor) -> Tensor:
    return recipe(tau, lambda rows, ranks: torch.sort(rows, 1).values[:, ranks])


def with_kthvalue(tau: Tensor) -> Tensor:
    return recipe(tau, lambda rows, ranks: torch.stack([rows.kthvalue(rank + 1, 1).values for rank in ranks], 1))


def recipe(tau: Tensor, smallest: object) -> Tensor:
    n, d = tau.shape
    magnitudes = tau.abs()
    ends = smallest(magnitudes, [int(d * CLIP), int(d * (1 - CLIP) - 1)])  # type: ignore[operator]
    clamped = magnitudes.clamp(ends[:, :1], ends[:, 1:])
    score = torch.exp(n * minmax(clamped) ** 2) * torch.tanh(tau * tau.sum(0))
    threshold = smallest(score, [int(d * (1 - RATIO))])  # type: ignore[operator]
    scale = minmax(score.maximum(threshold))
    return (scale * tau.sign() * clamped).sum(0) / scale.sum(0).clamp(min=1e-12)


def minmax(rows: Tensor) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / (high - low)


WORKS = {"whole matrices, sorts": with_sorts, "whole matrices, kthvalue": with_kthvalue, "pcb_merge": ours}


# -- files ------------------------------------------------------------------------------------------------------------
METHODS: dict[str, dict[str, object]] = {
    "weight-averaging": {},
    "task-arithmetic": {},
    "dare": {"elect_sign": True},
    "ties": {},
    "pcb-merging": {},
}
MODELS, ENTRIES, TENSORS = 4, 1 << 20, (12, 48)


def write(folder: Path, tensors: int) -> tuple[str, list[str]]:
    """A base and models, of so many tensors."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    paths = []
    for model in range(1 + MODELS):
        path = folder / f"model-{model}.safetensors"
        save_file({f"layer.{i:03d}": torch.randn(1024, ENTRIES // 1024, generator=g) for i in range(tensors)}, path)
        paths.append(str(path))
    return paths[0], paths[1:]


def child(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> int:
    options = parser(__doc__, repeats=1)
    options.add_argument("--models", type=int, default=8, help="number of task vectors")
    options.add_argument("--parameters", type=int, default=22_000_000, help="entries of each")
    chosen, bench = parse(options)
    size = {"n": chosen.models, "d": chosen.parameters, "threads": chosen.threads}
    size["clock"] = "process_time" if chosen.clock == "cpu" else "perf_counter"
    here = str(Path(__file__).resolve().parent)
    runs = {
        name: [child(CHILD.format(name=name, folder=here, **size)) for _ in range(chosen.repeats)] for name in WORKS
    }
    title = f"{chosen.models} task vectors of {chosen.parameters / 1e6:g} M entries"
    seconds = {name: [run[0] for run in found] for name, found in runs.items()}
    bench.table(title, seconds, 1.0, peer=list(WORKS)[:2])
    bench.table("the same", {name: seconds[name] for name in ("whole matrices, sorts", "pcb_merge")}, 0.5)
    print()
    peaks = {name: max(run[1] for run in found) for name, found in runs.items()}
    for name, peak in peaks.items():
        print(f"{name}: {peak:.0f} MiB beyond the task vectors' {chosen.models * chosen.parameters / 2**18:.0f} MiB")
    bench.require("least memory", peaks["pcb_merge"] == min(peaks.values()))
    sums = {name: found[0][2] for name, found in runs.items()}
    worst = max(abs(value - sums["pcb_merge"]) for value in sums.values())
    bench.require("all three give the same", worst < 1e-4 * max(1.0, abs(sums["pcb_merge"])))

    with tempfile.TemporaryDirectory() as folder:
        models = {tensors: write(Path(folder) / str(tensors), tensors) for tensors in TENSORS}
        print(f"\n{'a base and 4 models in files':30} {'files':>10} {'peak':>10} {'time':>9}")
        for slug, settings in METHODS.items():
            peaks_of = []
            for tensors in TENSORS:
                out = str(Path(folder) / f"{slug}-{tensors}")
                code = FILES.format(
                    slug=slug, settings=settings, paths=models[tensors], out=out, threads=chosen.threads
                )
                peak, spent = child(code)
                peaks_of.append(peak)
                total = (1 + MODELS) * tensors * ENTRIES * 4 / 2**20
                print(f"{slug:30} {total:6.0f} MiB {peak:6.0f} MiB {spent:7.1f} s")
            bench.require(f"{slug}: under 150 MiB", max(peaks_of) < 150)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
