"""What MoSA costs: beside the same adapter trained whole, and beside the form that keeps a copy of the weights for each expert.

    python benchmarks/mosa.py [--repeats 15] [--threads 1] [--clock cpu]

The peer package `adapters` does not import beside current transformers; its bottleneck adapter (a linear layer, a non-linearity,
a linear layer) is written here. Targets, exit code 1 if one is missed:

- A training step of `MoSAAdapter` alone (E = 4, one pass) takes at most 1.15 of that of the same adapter trained whole, and
  1.05 of that of the form with E copies of each split weight, masked, whose optimizer visits one copy in a step.
- A step of a transformer with MoSA's two passes takes at most 1.1 of the same with whole adapters and two passes.
- Weights, gradients and Adam's state take at most 1.2 of the whole adapter's bytes (biases are E-fold, the map is a byte an
  entry), and less than half of the form with E copies.
- Merged, the adapter is the whole one: the same modules, at most 1.05 of its time; and it gives what the copies' mean gives.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.finetuning.model import RowTransformer
from equipoise.finetuning.mosa import MoSA, MoSAAdapter, SplitLinear

EXPERTS, STEP, PEER, PASSES, MEMORY, COPIES, MERGED = 4, 1.15, 1.05, 1.1, 1.2, 0.5, 1.05


class Copies(nn.Module):
    """The adapter with a copy of the up projection for each expert, of which a mask leaves its entries."""

    def __init__(self, source: MoSAAdapter) -> None:
        super().__init__()
        assert isinstance(source.up, SplitLinear)
        self.norm, self.down, self.activation = (
            copy.deepcopy(part) for part in (source.norm, source.down, source.activation)
        )
        self.scale = source.scale
        masks = torch.stack([source.up.owner == e for e in range(EXPERTS)]).float()
        self.register_buffer("masks", masks)
        self.up = nn.ParameterList(nn.Parameter(source.up.weight.detach() * mask) for mask in masks)
        self.bias = nn.ParameterList(nn.Parameter(b.detach().clone()) for b in source.up.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.down(self.norm(x)))
        if not self.training:
            return self.scale * F.linear(h, torch.stack(list(self.up)).mean(0), torch.stack(list(self.bias)).mean(0))
        e = int(torch.randint(EXPERTS, ()))
        return self.scale * F.linear(h, self.up[e] * self.masks[e], self.bias[e])


def step(module: nn.Module, x: Tensor, loss: Callable[[], Tensor] | None = None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    def work() -> None:
        optimizer.zero_grad()
        (module(x).square().mean() if loss is None else loss()).backward()
        optimizer.step()

    return work


def held(module: nn.Module, x: Tensor) -> int:
    """Bytes of weights, buffers, gradients and Adam's two averages."""
    step(module, x)()
    size = lambda t: t.numel() * t.element_size()  # noqa: E731
    return sum(4 * size(p) for p in module.parameters()) + sum(size(b) for b in module.buffers())


def one_adapter(bench: Bench, dim: int, rows: int, bottleneck: int = 64) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"bottleneck": bottleneck, "scale": 0.5, "dropout": 0.0}
    split = MoSAAdapter(dim, **sizes, num_experts=EXPERTS, generator=generator)
    nn.init.normal_(split.up.weight, std=0.1, generator=generator)
    whole, copies = split.merge(), Copies(split)
    x = torch.randn(rows, dim, generator=generator)
    title = f"{dim} to {bottleneck}, {rows} rows"
    with torch.no_grad():
        one, two, three = (module.eval()(x) for module in (split, whole, copies))
    bench.require("evaluation gives what the copies' mean gives, to 1e-5", torch.allclose(one, three, atol=1e-5))
    bench.require("merging changes nothing, to 1e-6", torch.allclose(one, two, atol=1e-6))
    merged = split.merge()
    bench.require("merged, the modules are the whole adapter's", str(merged) == str(whole))

    def inference(module: nn.Module) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with torch.no_grad():
                return module(x)

        return work

    bench.table(f"merged, {title}", {"whole": inference(whole), "MoSA": inference(merged)}, MERGED)
    for module in (split, whole, copies):
        module.train()
    seconds = bench.measure({"whole": step(whole, x), "E copies": step(copies, x), "MoSA": step(split, x)})
    bench.table(f"a training step, {title}", seconds, STEP)
    bench.table(f"a training step, {title}", {k: seconds[k] for k in ("E copies", "MoSA")}, PEER)
    dense, many, ours = (held(module, x) for module in (whole, copies, split))
    text = f"{ours} bytes held, {ours / dense:.2f} of the whole adapter's and {ours / many:.2f} of the copies'"
    bench.require(f"{text}, at most {MEMORY} and {COPIES}", ours / dense <= MEMORY and ours / many <= COPIES)


def a_model(bench: Bench) -> None:
    works = {}
    x, y = torch.rand(32, 1, 28, 28), torch.arange(32) % 10
    for name, experts, weight in (("whole, one pass", 1, 0.0), ("whole, two passes", 1, 1.0), ("MoSA", EXPERTS, 1.0)):
        run = equipoise.start(
            RowTransformer((1, 28, 28), 10),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            methods=[MoSA(bottleneck=16, num_experts=experts, reg_weight=weight)],
        )

        def work(run: equipoise.Run = run) -> None:
            run.backward(run.training_loss((x, y)))
            run.step()

        works[name] = work
    bench.table("a step of a transformer, batch 32", works, PASSES, peer="whole, two passes")


def main() -> int:
    _, bench = parse(__doc__)
    torch.manual_seed(0)
    one_adapter(bench, 768, 256)
    one_adapter(bench, 768, 2048)
    a_model(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
