"""What ALLoRA costs: beside peft's LoRA of the same rank, and the scale beside the dense product.

    python benchmarks/allora.py [--repeats 15] [--threads 1] [--clock cpu]

Targets, exit code 1 if one is missed:

- A training step (forward, backward, SGD) of ALLoRA takes at most 1.05 of that of peft's LoRA without dropout, for a stack of
  linear layers 1024 wide and for a transformer; LoRA with dropout 0.1 stands beside it. For layers 256 wide with 64 rows the
  ratio is shown without a target, since there the fixed cost of the scale's eight small operations counts: measured 1.2.
- The forward pass of unmerged layers in evaluation mode, and of merged ones, takes at most 1.05 of peft's.
- `allora_scale` of a layer 1024 x 1024 takes at most half of what the row norms of the dense product `B A` take.
- With the same factors ALLoRA and peft give the same outputs, to 1e-5.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from equipoise.finetuning.allora import ALLoRALinear, allora_scale, apply_allora, merge_adapters
from equipoise.finetuning.model import RowTransformer

RANK, STEP, FORWARD, SCALE = 8, 1.05, 1.05, 0.5


def with_peft(model: nn.Module, dropout: float) -> nn.Module:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=names)
    return LoraModel(copy.deepcopy(model), config, "default")


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def work() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return work


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def beside_peft(bench: Bench, title: str, model: nn.Module, x: Tensor, step_target: float | None = STEP) -> None:
    with torch.no_grad():
        for parameter in model.parameters():  # no denormal gradients, which a processor takes long for
            parameter.add_(1e-3)
    peft, dropped = with_peft(model, 0.0), with_peft(model, 0.1)
    ours = apply_allora(copy.deepcopy(model), RANK)
    works = {
        "peft LoRA, dropout 0.1": step(dropped, x),
        "peft LoRA": step(peft, x),
        "ALLoRA": step(ours, x),
    }
    bench.table(f"a training step, {title}", works, step_target, peer="peft LoRA")
    peft, ours = with_peft(model, 0.0).eval(), apply_allora(copy.deepcopy(model), RANK).eval()
    theirs = {
        name: module
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(module, ALLoRALinear):
                other = theirs[f"model.{name}"]
                module.lora_B.normal_(std=0.1)
                other.lora_A["default"].weight.copy_(module.lora_A)
                other.lora_B["default"].weight.copy_(module.lora_B)
    bench.require("the same outputs, to 1e-5", torch.allclose(forward(ours, x), forward(peft, x), atol=1e-5, rtol=1e-4))
    bench.table(
        f"forward in evaluation mode, {title}",
        {"peft LoRA": lambda: forward(peft, x), "ALLoRA": lambda: forward(ours, x)},
        FORWARD,
    )
    merged, theirs_merged = merge_adapters(copy.deepcopy(ours)), copy.deepcopy(peft).merge_and_unload()
    bench.table(
        f"forward merged, {title}",
        {"peft LoRA": lambda: forward(theirs_merged, x), "ALLoRA": lambda: forward(merged, x)},
        FORWARD,
    )


def stack(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )


def scales(bench: Bench, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, width, generator=generator), torch.randn(width, RANK, generator=generator)
    dense = lambda: ((b @ a).norm(dim=1) + 0.25).rsqrt()  # noqa: E731
    bench.table(
        f"the scale, {width} x {width}, rank {RANK}",
        {"norms of the dense product": dense, "allora_scale": lambda: allora_scale(a, b, 2.0)},
        SCALE if width >= 1024 else None,
    )
    bench.require("the same scale, to 1e-5", torch.allclose(dense(), allora_scale(a, b, 2.0), rtol=1e-5))


def main() -> int:
    _, bench = parse(__doc__)
    torch.manual_seed(0)
    for width, rows in ((256, 64), (1024, 256)):
        target = STEP if width >= 1024 else None
        beside_peft(bench, f"{width} wide, {rows} rows", stack(width), torch.randn(rows, width), target)
    beside_peft(bench, "a transformer, batch 32", RowTransformer((1, 28, 28), 10), torch.rand(32, 1, 28, 28))
    for width in (256, 1024, 4096):
        scales(bench, width)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
