"""What SaRA costs: bytes of gradient and optimizer state against the formula, memory of a process, and step time.

    python benchmarks/sara.py [--repeats 15] [--threads 1] [--clock cpu]

A tenth of the entries of eight linear layers trains; the peer is torch.optim.AdamW on all of them. Targets, exit code 1 if one is
missed:

- sparse: gradient 4, AdamW's moments 8, values 4, index 4 and one flag, bytes for each chosen entry, and nothing else beside the
  weights themselves: exactly;
- dense: as AdamW, 2 bytes of masks for each entry and 4 for each chosen one: exactly;
- the largest resident memory of a process that trains grows by at most 0.7 of what it grows by with AdamW. The formula alone says
  0.1, but a forward pass with chosen entries makes a copy of each weight, which lives until the backward pass;
- a training step (forward, backward, update) of the sparse form takes at most as long as AdamW's. The dense form has no target.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import nn

from equipoise.finetuning.sara import SaRAAdamW, below_threshold_mask, sparse_entries, sparse_parametrize
from equipoise.finetuning.state import optimizer_state_bytes

WIDTH, LAYERS, SHARE, BATCH = 512, 8, 0.1, 32
RESIDENT, STEP = 0.7, 1.0


def network(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def trained(kind: str, width: int, layers: int = LAYERS) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """The model, its optimizer, and one training step."""
    model = network(width, layers)
    threshold = SHARE / width**0.5  # weights are uniform in +-1/sqrt(width)
    if kind == "sparse":
        for module in list(model):
            sparse_parametrize(module, "weight", below_threshold_mask(module.weight, threshold))
    if kind == "dense":
        optimizer: torch.optim.Optimizer = SaRAAdamW(model.parameters(), 1e-3, threshold=threshold)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(BATCH, width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return model, optimizer, step


def of(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def bytes_of(bench: Bench) -> None:
    entries = LAYERS * WIDTH**2
    print(f"\n{LAYERS} layers of {WIDTH} x {WIDTH}: {entries} entries, {SHARE:.0%} train. Bytes of an entry, measured")
    print(f"{'':10} {'gradient':>9} {'state':>9} {'leaves':>9} {'index':>9} {'sum':>9} {'formula':>9}")
    for kind in ("AdamW", "dense", "sparse"):
        model, optimizer, step = trained(kind, WIDTH)
        chosen = sum(
            int(below_threshold_mask(p, SHARE / WIDTH**0.5).sum()) for p in network(WIDTH, LAYERS).parameters()
        )
        step()
        gradient = of([p.grad for p in model.parameters() if p.grad is not None])
        state = optimizer_state_bytes(optimizer)
        # A dense model's leaves are its weights, which a sparse one has as its base.
        leaves = of(list(model.parameters())) if kind == "sparse" else 0
        found = [entry for _, _, entry in sparse_entries(model).values()]
        index = of([tensor for entry in found for tensor in (entry.index, entry.trains)])
        total = gradient + state + leaves + index
        formula = {"AdamW": 12 * entries, "dense": 14 * entries + 4 * chosen, "sparse": 21 * chosen}[kind]
        columns = " ".join(f"{value / entries:9.3f}" for value in (gradient, state, leaves, index, total, formula))
        print(f"{kind:10} {columns}")
        bench.require(f"{kind}: {total} bytes, as the formula", total == formula)


CHILD = """
import resource, sys
sys.path.insert(0, {folder!r})
import torch
from sara import trained
torch.set_num_threads(1)
trained("AdamW", 64)[2]()
trained("sparse", 64)[2]()
model, optimizer, step = trained({kind!r}, {width})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(); step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def resident(bench: Bench, width: int) -> None:
    grown = {}
    for kind in ("AdamW", "dense", "sparse"):
        code = CHILD.format(folder=sys.path[0], kind=kind, width=width)
        child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        grown[kind] = float(child.stdout)
    weights = LAYERS * width**2 * 4 / 2**20
    text = ", ".join(f"{kind} {mib:.0f}" for kind, mib in grown.items())
    print(f"\nLargest resident memory while training weights of {weights:.0f} MiB grows by (MiB): {text}")
    ratio = grown["sparse"] / grown["AdamW"]
    bench.require(f"sparse over AdamW {ratio:.2f}, <= {RESIDENT}", ratio <= RESIDENT)


def main() -> int:
    _, bench = parse(__doc__)
    bytes_of(bench)
    resident(bench, 2048)
    for width in (WIDTH, 1024):
        works = {kind: trained(kind, width)[2] for kind in ("AdamW", "dense", "sparse")}
        bench.table(f"a training step, {LAYERS} layers of {width}, batch {BATCH}", works, STEP)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
