"""What low-rank layers save, and what PELA's intermediate stage costs.

    python benchmarks/pela.py [--repeats 15] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of the
fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- A `LowRankLinear` of ratio rho = 2 and 3 takes at most 1.5 / rho of the time of the `nn.Linear` that it replaces, for 768 -> 3072
  features and 512 rows; at 6 and 12 at most 0.35, since what is left is mostly writing the output. For 256 -> 256 and 64 rows
  it is not slower than `nn.Linear` at any ratio from 2. Its multiplications fall by rho (counted).
- The weight perturbation term with its gradient takes at most 0.6 of the same term written with the whole error and automatic
  derivatives; both give the same value and gradient.
- A step of the intermediate stage (features and perturbation) of a perceptron of three layers 768 takes at most as long as one with
  the same terms in the plain form; beside it stands the step on the task's loss alone, shown without a target.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from equipoise.finetuning.pela import FeatureTap, LowRankLinear, PELALoss, compress, pela_rank, weight_perturbation_loss

DENSE_SHARE = {2.0: 0.75, 3.0: 0.5, 6.0: 0.35, 12.0: 0.35}
PLAIN_SHARE = 0.6


def layers(bench: Bench, wide: int, high: int, rows: int, ratios: dict[float, float]) -> None:
    """A layer at several ratios, forward and backward; ratios: with the target of each."""
    torch.manual_seed(0)
    x = torch.randn(rows, wide)
    dense = nn.Linear(wide, high)
    small = {ratio: LowRankLinear.from_linear(dense, pela_rank(wide, high, ratio)) for ratio in ratios}

    def forward(layer: nn.Module) -> Callable[[], object]:
        def work() -> object:
            with torch.no_grad():
                return layer(x)

        return work

    works = {"nn.Linear": forward(dense), **{f"ratio {ratio:g}": forward(layer) for ratio, layer in small.items()}}
    bench.table(
        f"forward, {rows} rows, {wide} -> {high}", works, {f"ratio {ratio:g}": most for ratio, most in ratios.items()}
    )
    for ratio, layer in small.items():
        bench.require(f"at most 1/{ratio:g} of the multiplications", flops(layer, x) <= flops(dense, x) / ratio)


def flops(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops())


def plain_perturbation(student: nn.Module, teacher: nn.Module, eps: float = 1e-3) -> Tensor:
    """``L_WP`` as its formula reads."""
    terms = []
    for name, layer in student.named_modules():
        if isinstance(layer, LowRankLinear):
            error = layer[1].weight @ layer[0].weight - teacher.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
            terms.append((error.abs().max() - eps).square())
    return torch.stack(terms).mean()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(768, 768), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(768, 9))


def terms(bench: Bench, ratio: float) -> None:
    teacher = network()
    student = compress(teacher, ratio)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1e-3 * torch.randn_like(p))

    def gradient(loss: Callable[..., Tensor]) -> Callable[[], list[Tensor | None]]:
        def work() -> list[Tensor | None]:
            student.zero_grad()
            loss(student, teacher).backward()
            return [p.grad for p in student.parameters()]

        return work

    works = {
        "the formula": gradient(plain_perturbation),
        "weight_perturbation_loss": gradient(weight_perturbation_loss),
    }
    bench.table(f"L_WP and gradient, three layers 768 -> 768, ratio {ratio:g}", works, PLAIN_SHARE)
    grads = [[None if g is None else g.clone() for g in work()] for work in works.values()]
    same = all((a is None) == (b is None) for a, b in zip(*grads, strict=True))
    same &= all(torch.allclose(a, b) for a, b in zip(*grads, strict=True) if a is not None and b is not None)
    same &= torch.allclose(plain_perturbation(student, teacher), weight_perturbation_loss(student, teacher))
    bench.require("the same value and gradient", same)


def steps(bench: Bench, ratio: float, rows: int) -> None:
    """One optimizer step of the student: on the task alone, and with the terms."""
    teacher = network().eval().requires_grad_(False)
    names = ["0", "2", "4"]
    x, labels = torch.randn(rows, 768), torch.randint(0, 9, (rows,))

    def step(perturbation: Callable[..., Tensor] | None, features: bool = True) -> Callable[[], object]:
        student = compress(copy.deepcopy(teacher), ratio).requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        matching = PELALoss(gamma=0.0)

        def work() -> object:
            with FeatureTap(student, names) as ours:
                logits = student(x)
            loss = F.cross_entropy(logits, labels)
            if features:
                with torch.no_grad(), FeatureTap(teacher, names) as theirs:
                    teacher(x)
                loss = loss + matching(ours, theirs, logits, logits, student, teacher)
            if perturbation is not None:
                loss = loss + perturbation(student, teacher)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return work

    works = {
        "features, and L_WP as its formula": step(plain_perturbation),
        "the task's loss alone": step(None, features=False),
        "with features": step(None),
        "with features and L_WP": step(weight_perturbation_loss),
    }
    bench.table(f"a step, {rows} rows, ratio {ratio:g}", works, 1.0)


def main() -> int:
    _, bench = parse(__doc__)
    layers(bench, 768, 3072, 512, DENSE_SHARE)
    layers(bench, 256, 256, 64, {2.0: 1.0, 12.0: 1.0})
    for ratio in (2.0, 12.0):
        terms(bench, ratio)
        steps(bench, ratio, 64)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
