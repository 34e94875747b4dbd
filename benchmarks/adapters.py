"""What low-rank adapters cost, beside peft's LoRA of the same rank: a training step, and a forward pass once merged.

    python benchmarks/adapters.py [--repeats 25] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of the
fastest and of the median measurement over peft's; a target is missed if both miss it. The model is a stack of four linear layers
with GELU, every layer adapted with rank 8; a training step is forward, backward and AdamW. Small layers show what a call costs,
large ones what the arithmetic does. peft's PiSSA and DoRA are there for comparison. Targets, exit code 1 if one is missed:

- A step of LoRA and PiSSA takes at most 1.05 of peft's LoRA. SORSA, which trains a third tensor of each layer, meets the same from
  256 x 256 on, and ALLoRA, which computes its learning rates in the backward pass, from 1024 x 1024 on: in smaller layers the time
  to start an operation counts, and they have more of them.
- Every adapter, merged: a forward pass takes at most 1.05 of peft's merged LoRA, and gives the outputs of the adapters.

GradNormLoRP's adapter, like DoRA, also computes the norm of every row, and MoSA's draws experts: their steps have no target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import peft
import torch
from harness import Bench, parse
from torch import nn

from equipoise.finetuning.adapters import LoRALinear, attach, merge_adapters
from equipoise.finetuning.allora import ALLoRALinear
from equipoise.finetuning.ba_lora import PiSSALinear
from equipoise.finetuning.gradnormlorp import GradNormLoRPLinear
from equipoise.finetuning.mosa import MoSALoRALinear
from equipoise.finetuning.sorsa import SORSALinear

RANK, RATIO = 8, 1.05
KINDS = (LoRALinear, PiSSALinear, SORSALinear, ALLoRALinear, GradNormLoRPLinear, MoSALoRALinear)
SMALLEST = {
    "LoRALinear": 0,
    "PiSSALinear": 0,
    "SORSALinear": 256,
    "ALLoRALinear": 1024,
}  # layers for which a step has the target
PEERS = {"peft LoRA": {}, "peft PiSSA": {"init_lora_weights": "pissa"}, "peft DoRA": {"use_dora": True}}


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())))


def models(width: int) -> dict[str, nn.Module]:
    """An adapted model of each kind, by its name; peft's first."""
    found: dict[str, nn.Module] = {}
    for name, options in PEERS.items():
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0", "2", "4", "6"], **options)
        found[name] = peft.inject_adapter_in_model(config, network(width))
    for kind in KINDS:
        found[kind.__name__] = attach(network(width), None, lambda layer, kind=kind: kind(layer, RANK))
    return found


def merge_peft(model: nn.Module) -> nn.Module:
    for key, module in model.named_children():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            setattr(model, key, module.get_base_layer())
    return model


def steps(width: int, x: torch.Tensor) -> dict[str, Callable[[], None]]:
    def step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def work() -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    return {name: step(model.train()) for name, model in models(width).items()}


def forwards(bench: Bench, width: int, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    works: dict[str, Callable[[], torch.Tensor]] = {}
    for name, model in models(width).items():
        model.eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            expected = model(x)
            plain = merge_adapters(model) if name not in PEERS else merge_peft(model)
            if (plain(x) - expected).abs().max() > 1e-4:
                bench.require(f"{name}, merged, gives the outputs of the adapters", False)
        works[name] = torch.no_grad()(lambda plain=plain: plain(x))
    return works


def main() -> int:
    _, bench = parse(__doc__, repeats=25)
    for width, rows in ((64, 32), (256, 256), (1024, 256)):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
        title = f"{width} x {width}, {rows} rows"
        bench.table(
            f"training step, {title}",
            steps(width, x),
            {name: RATIO for name, least in SMALLEST.items() if width >= least},
        )
        bench.table(f"merged forward, {title}", forwards(bench, width, x), {kind.__name__: RATIO for kind in KINDS})
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
