"""What BA-LoRA costs: beside peft's PiSSA, a second copy of the model as teacher, and the losses written with full decompositions.

    python benchmarks/ba_lora.py [--repeats 15] [--threads 1] [--clock cpu]

Targets, exit code 1 if one is missed by both the fastest and the median measurement:

- Making a PiSSA layer takes at most 1.05 of what peft's `init_lora_weights="pissa"` takes, and gives the same residual.
- A training step and a forward pass of a model with PiSSA layers take at most 1.05 of peft's, and the merged forward at most 1.05
  of the plain model's.
- A BA-LoRA step takes at most 1.15 of one with a second copy of the pretrained model as teacher and the losses written plainly:
  what is saved in memory costs the low-rank path in the teacher's pass. Beside it the step of PiSSA alone is shown.
- The penalty on logits (64, 10) with its gradient takes at most 1.40 of the plain losses (checks of the input and guards against
  NaN cost 0.1 ms); at most 1.15 on (256, 100), and on (256, 32000) at most 0.40.
  The top singular values there, by a random projection, take at most what `torch.svd_lowrank` takes with its gradient.
- The teacher needs no copy: the factors that the layers started from are at most an eighth of the weights at rank 32 and width 512.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.finetuning.ba_lora import BALoRALoss, PiSSALinear, apply_pissa, merge_adapters, svd_loss, teacher_mode

WIDTH, RANK, BATCH = 512, 32, 64


def network(width: int = WIDTH, outputs: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


def by_peft(model: nn.Module, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa", target_modules=["0", "2"])
    return get_peft_model(model, config)


def steps(model: nn.Module, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], None]:
    """One AdamW step after another."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(inputs)).backward()
        optimizer.step()

    return step


# -- the losses, written plainly --------------------------------------------------------------------------------------
def plain_understanding(z: Tensor, teacher: Tensor, temperature: float = 2.0, k: int = 5) -> Tensor:
    kl = F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean")
    covariance = torch.cov(z.T)
    off = covariance - torch.diag(torch.diagonal(covariance))
    sigma = torch.linalg.svd(z, full_matrices=False).S
    spectrum = -sigma[:k].sum() / sigma.sum()
    return 0.15 * temperature**2 * kl + 0.03 * off.pow(2).sum() / z.shape[1] + 0.03 * spectrum


def plain_generation(z: Tensor, teacher: Tensor, temperature: float = 2.0, k: int = 10, top: int = 20) -> Tensor:
    kl = F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean")
    p = F.softmax(z.topk(top, 1).values, 1)
    sigma = torch.linalg.svd(z, full_matrices=False).S
    entropy = (p * torch.log(p + 1e-12)).sum(1).mean()
    return 0.025 * temperature**2 * kl + 0.005 * entropy - 0.005 * sigma[:k].sum() / z.norm()


def beginning(bench: Bench) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    holder = nn.Sequential(nn.Identity(), linear)
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", target_modules=["1"])

    works = {
        "peft, init_lora_weights='pissa'": lambda: get_peft_model(copy.deepcopy(holder), config),
        "PiSSALinear": lambda: PiSSALinear(copy.deepcopy(linear), RANK),
    }
    bench.table(f"making a layer {WIDTH} -> {WIDTH}, rank {RANK}", works, 1.05)
    theirs = get_peft_model(copy.deepcopy(holder), config).base_model.model[1].base_layer.weight
    same = torch.allclose(PiSSALinear(linear, RANK).weight, theirs, atol=1e-5)
    bench.require("the same residual, to 1e-5", same)


def training(bench: Bench, inputs: Tensor, labels: Tensor) -> None:
    base = network()
    ours, theirs = apply_pissa(copy.deepcopy(base), RANK, target=["0", "2"]), by_peft(copy.deepcopy(base), RANK)

    def task(z: Tensor) -> Tensor:
        return F.cross_entropy(z, labels)

    works = {"peft, PiSSA": steps(theirs, task, inputs), "PiSSALinear": steps(ours, task, inputs)}
    bench.table(f"a step: 2 layers {WIDTH} -> {WIDTH}, rank {RANK}, batch {BATCH}", works, 1.05)
    with torch.no_grad():
        bench.table(
            "a forward pass", {"peft, PiSSA": lambda: theirs(inputs), "PiSSALinear": lambda: ours(inputs)}, 1.05
        )
        merged = merge_adapters(copy.deepcopy(ours))
        bench.table(
            "a forward pass, merged", {"the plain model": lambda: base(inputs), "ours": lambda: merged(inputs)}, 1.05
        )


def penalised(bench: Bench, inputs: Tensor, labels: Tensor) -> None:
    base = network()
    alone, naive, ours = (apply_pissa(copy.deepcopy(base), RANK, target=["0", "2"]) for _ in range(3))
    penalty = BALoRALoss()

    def with_copy(z: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = base(inputs)
        return F.cross_entropy(z, labels) + plain_understanding(z, teacher)

    def with_factors(z: Tensor) -> Tensor:
        with torch.no_grad(), teacher_mode(ours):
            teacher = ours(inputs)
        return F.cross_entropy(z, labels) + penalty(z, teacher)

    works = {
        "PiSSA with a second model and plain losses": steps(naive, with_copy, inputs),
        "PiSSA alone": steps(alone, lambda z: F.cross_entropy(z, labels), inputs),
        "BA-LoRA": steps(ours, with_factors, inputs),
    }
    bench.table(f"a step with penalties: 2 layers {WIDTH} -> {WIDTH}, batch {BATCH}", works, 1.15)
    with torch.no_grad(), teacher_mode(ours):
        bench.require(
            "the teacher is the pretrained model, to 1e-4", torch.allclose(ours(inputs), base(inputs), atol=1e-4)
        )
    factors = sum(b.numel() for name, b in ours.named_buffers() if "init" in name)
    weights = sum(ours[i].weight.numel() for i in (0, 2))
    bench.require(
        f"its factors are {factors} numbers, of {weights} of a copy: at most an eighth", factors <= weights / 8
    )


def penalties(bench: Bench) -> None:
    generator = torch.Generator().manual_seed(0)
    for task, shape, plain, target in (
        ("nlu", (64, 10), plain_understanding, 1.4),
        ("nlu", (256, 100), plain_understanding, 1.15),
        ("nlg", (256, 32_000), plain_generation, 0.4),
    ):
        z = torch.randn(shape, generator=generator).requires_grad_()
        teacher = torch.randn(shape, generator=generator)
        loss = BALoRALoss(task=task)

        def both(measure: Callable[[], Tensor], z: Tensor = z) -> Callable[[], Tensor]:
            return lambda: torch.autograd.grad(measure(), z)[0]

        works = {
            "the plain losses": both(lambda plain=plain, z=z, t=teacher: plain(z, t)),
            "BALoRALoss": both(lambda loss=loss, z=z, t=teacher: loss(z, t)),
        }
        bench.table(
            f"penalty and gradient, {task}, logits {shape}", works, target, repeats=None if task == "nlu" else 3
        )
        if task == "nlu":
            same = torch.allclose(works["the plain losses"](), works["BALoRALoss"](), atol=1e-7)
            bench.require("the same gradient, to 1e-7", same)
    z = (torch.randn(256, 12, generator=generator) @ torch.randn(12, 32_000, generator=generator)).requires_grad_()

    def lowrank() -> Tensor:
        return -torch.svd_lowrank(z, q=15, niter=2)[1][:10].sum() / z.norm()

    works = {
        "torch.svd_lowrank": lambda: torch.autograd.grad(lowrank(), z),
        "svd_loss": lambda: torch.autograd.grad(svd_loss(z, 10), z),
    }
    bench.table("top 10 singular values and gradient, logits (256, 32000)", works, 1.0, repeats=5)
    exact = svd_loss(z, 10, norm="fro", randomized=False).item()
    bench.require("near the exact value, to 1 %", abs(svd_loss(z, 10).item() / exact - 1) < 0.01)


def main() -> int:
    _, bench = parse(__doc__)
    inputs = torch.randn(BATCH, WIDTH)
    labels = torch.arange(BATCH) % 10
    beginning(bench)
    training(bench, inputs, labels)
    penalised(bench, inputs, labels)
    penalties(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
