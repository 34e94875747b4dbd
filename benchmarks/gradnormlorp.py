"""What GradNormLoRP costs: bytes of the optimizer's state against the formula, in 32 and 8 bit, and the time of a step.

    python benchmarks/gradnormlorp.py [--repeats 15] [--threads 1] [--clock cpu] [--galore FOLDER]

Peers: torch.optim.AdamW, and AdamW of galore-torch (the same projection without the normalisation) where it is installed, or in
the folder that `pip install --no-deps --target FOLDER galore-torch` made; without it its rows are left out. Targets, exit code 1
if one is missed:

- of a matrix (m, n) at rank r the state takes 4 (2 max(m, n) r + min(m, n) r + 4 m) bytes; in 8 bit 2 max(m, n) r bytes and
  4 for each block of 256 of them, and 4 (min(m, n) r + 4 m): exactly;
- in 8 bit, at rank 512 of a matrix 4096 x 4096, it is at least 89.5 % smaller than AdamW's in float32;
- the update between two choices of the basis takes at most 2.5 times that of galore-torch: the normalisation reads and writes the
  whole matrix a few times more. Against AdamW, which has no product of matrices, there is no target.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from harness import Bench, parse, parser
from torch import nn

from equipoise.finetuning.gradnormlorp import GradNormLoRPAdamW, choose_bases
from equipoise.finetuning.state import optimizer_state_bytes

GAP = 10**9  # the basis is chosen in the first step, which the warm-up takes
GALORE, LESS = 2.5, 0.895


def galore(folder: str | None) -> Any:
    """galore-torch's AdamW, without its 8-bit one, which needs bitsandbytes; None where it is missing."""
    paths = (
        [folder + "/galore_torch"]
        if folder
        else list(getattr(find_spec("galore_torch"), "submodule_search_locations", []))
    )
    if not paths:
        print("galore-torch is missing: its rows are left out")
        return None
    package = types.ModuleType("galore_torch")
    package.__path__ = paths  # type: ignore[attr-defined]
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def formula(m: int, n: int, r: int, bits: int) -> int:
    large, small = max(m, n) * r, min(m, n) * r
    moments = 2 * large * 4 if bits == 32 else 2 * (large + 4 * ceil(large / 256))
    return moments + 4 * (small + 4 * m)


def stepping(make: Callable[[nn.Parameter], torch.optim.Optimizer], m: int, n: int) -> tuple[Any, Callable[[], None]]:
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(m, n, generator=g))
    p.grad = torch.randn(m, n, generator=g)
    optimizer = make(p)
    return optimizer, lambda: optimizer.step()  # type: ignore[return-value]


def ours(rank: int, bits: int) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
    return lambda p: GradNormLoRPAdamW([p], rank=rank, update_gap=GAP, state_bits=bits)


def state(bench: Bench) -> None:
    print(f"\n{'state of a matrix, MiB':24} {'rank':>5} {'AdamW':>8} {'32 bit':>8} {'8 bit':>8}   of AdamW's")
    for m, n, r in ((1024, 1024, 32), (1024, 256, 64), (256, 1024, 64), (768, 768, 8)):
        found = {}
        for bits in (32, 8):
            optimizer, step = stepping(ours(r, bits), m, n)
            step()
            found[bits] = optimizer_state_bytes(optimizer)
        print_row(f"{m} x {n}, measured", m, n, r, found)
        bench.require("as the formula says", all(found[bits] == formula(m, n, r, bits) for bits in found))
    for r in (128, 512, 1024):
        found = {bits: formula(4096, 4096, r, bits) for bits in (32, 8)}
        print_row("4096 x 4096, formula", 4096, 4096, r, found)
        if r == 512:
            bench.require(
                f"8 bit: at least {LESS:.1%} less than AdamW's in float32", found[8] <= (1 - LESS) * 8 * 4096**2
            )
    print("AdamW's moments in bfloat16 would take half of its column.")


def print_row(name: str, m: int, n: int, r: int, found: dict[int, int]) -> None:
    adam = 8 * m * n
    shares = ", ".join(f"{100 * found[bits] / adam:.1f} %" for bits in (32, 8))
    sizes = " ".join(f"{value / 2**20:8.2f}" for value in (adam, found[32], found[8]))
    print(f"{name:24} {r:5} {sizes}   {shares}")


def times(bench: Bench, theirs: Any, m: int, n: int, r: int) -> None:
    works: dict[str, Callable[[], object]] = {
        "torch AdamW": stepping(lambda p: torch.optim.AdamW([p]), m, n)[1],
        "GradNormLoRP, 8 bit": stepping(ours(r, 8), m, n)[1],
    }
    peer = "torch AdamW"
    if theirs is not None:
        group = {"rank": r, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
        make = lambda p: theirs([{"params": [p], **group}], no_deprecation_warning=True)  # noqa: E731
        works[peer := "galore-torch"] = stepping(make, m, n)[1]
    works["GradNormLoRP"] = stepping(ours(r, 32), m, n)[1]
    bench.table(f"an update, {m} x {n}, rank {r}", works, GALORE if theirs is not None else None, peer=peer)


def basis(bench: Bench, m: int, n: int, r: int) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    works = {
        "torch.linalg.svd": lambda: torch.linalg.svd(x, full_matrices=False),
        "choose_bases": lambda: choose_bases(x, r, "std"),
    }
    bench.table(f"a new basis (every 200 steps), {m} x {n}, rank {r}", works, repeats=3)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--galore", help="folder with galore_torch in it")
    chosen, bench = parse(options)
    theirs = galore(chosen.galore)
    state(bench)
    for m, n, r in ((768, 768, 8), (1024, 1024, 128), (1024, 4096, 128)):
        times(bench, theirs, m, n, r)
    basis(bench, 768, 768, 8)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
