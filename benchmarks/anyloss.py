"""What AnyLoss costs, against the loss that it replaces and against what people write by hand.

    python benchmarks/anyloss.py

Every work is measured in turn with the others, so that whatever else the machine does hits them alike, and given as the
fastest and the median of all repeats. A target counts as missed, and the exit code is 1, if both miss it.

- Forward and backward of `AnyLoss`, checks of its arguments included, take at most 1.05 times a soft F1 written from the
  formula in plain torch operations (the peer: there is no package with this loss), at 256 to 1,000,000 examples, to the
  same number.
- The cost is linear: 10 times the examples take at most 15 times the time, from 100,000 on.
- A training step with `AnyLossMethod` takes at most 1.25 times that of binary cross-entropy (an MLP, batches of 256).
- Where LibAUC is installed, a loss and its gradient are not slower than its APLoss (`soap`), which ranks pairs.

Binary cross-entropy is one fused kernel and is shown beside them without a target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor

import equipoise
from equipoise.imbalance.anyloss import METRICS, AnyLoss, AnyLossMethod
from equipoise.imbalance.soap import installed
from equipoise.imbalance.task_rare_event import binary_cross_entropy
from equipoise.models.reference import MLP
from equipoise.training import Method

PEER, STEP, LINEAR = 1.05, 1.25, 15.0


def soft_f1(logits: Tensor, targets: Tensor, steepness: float = 73.0) -> Tensor:
    """AnyLoss for F1 as it is written by hand, from its formula."""
    targets = targets.float()
    predicted = 1 / (1 + torch.exp(-steepness * (torch.sigmoid(logits) - 0.5)))
    tp = (targets * predicted).sum()
    fp = ((1 - targets) * predicted).sum()
    fn = (targets * (1 - predicted)).sum()
    return 1 - 2 * tp / (2 * tp + fn + fp + 1e-12)


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, generator=generator), (torch.rand(rows, generator=generator) < 0.05).long()


def both(loss: Callable[[Tensor, Tensor], Tensor], rows: int) -> Callable[[], Tensor]:
    """Forward and backward of a loss; returns the loss."""
    logits, labels = drawn(rows)
    logits.requires_grad_()

    def work() -> Tensor:
        logits.grad = None
        value = loss(logits, labels)
        value.backward()
        return value

    return work


def losses(bench: Bench, rows: int) -> None:
    others = {f"AnyLoss, {metric}": both(AnyLoss(metric), rows) for metric in METRICS if metric != "f1"}
    peer, ours = "soft F1 by hand", "AnyLoss, f1"
    works = {
        peer: both(soft_f1, rows),
        ours: both(AnyLoss(), rows),
        "binary cross-entropy": both(binary_cross_entropy, rows),
    }
    if rows <= 4096:
        works |= others
    bench.table(f"loss and gradient, N = {rows}", works, {ours: PEER}, peer=peer)
    bench.require("the same loss, to 1e-6", abs(works[peer]().item() - works[ours]().item()) < 1e-6)


def growth(bench: Bench, rows: int = 100_000) -> None:
    works = {f"AnyLoss, N = {n}": both(AnyLoss(), n) for n in (rows, 10 * rows)}
    first, second = works
    bench.table("ten times the examples", works, {second: LINEAR}, peer=first)


def steps(bench: Bench) -> None:
    """An epoch of training through ``equipoise.start`` in batches of 256."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(2048, 64, generator=generator), drawn(2048)[1]

    def trainer(methods: list[Method]) -> Callable[[], None]:
        torch.manual_seed(0)
        run = equipoise.start(
            MLP((64,), 1),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            methods=methods,
            data=equipoise.Examples(inputs, labels, num_classes=2),
            loss=binary_cross_entropy,
            batch_size=256,
            epochs=10_000,
        )

        def epoch() -> None:
            for batch in run.batches():
                run.backward(run.training_loss(batch))
                run.step()
            run.end_epoch()

        return epoch

    works = {"binary cross-entropy": trainer([]), "anyloss": trainer([AnyLossMethod()])}
    bench.table("an epoch: MLP 64-256-256-1, 8 batches of 256", works, {"anyloss": STEP})


def ranking(bench: Bench, rows: int = 1024) -> None:
    if not installed():
        print("\npeer, not timed: LibAUC's APLoss (not installed: pip install --no-deps libauc)")
        return
    from libauc.losses.auc import APLoss

    part = APLoss(rows, device=torch.device("cpu"))
    index = torch.arange(rows)
    works = {
        "LibAUC's APLoss": both(lambda z, y: part(z, y, index), rows),
        "AnyLoss, f1": both(AnyLoss(), rows),
    }
    bench.table(f"a surrogate of AUPRC, N = {rows}", works, {"AnyLoss, f1": PEER}, peer="LibAUC's APLoss")


def main() -> int:
    _, bench = parse(__doc__, 25)
    for rows in (256, 4096, 65_536, 1_000_000):
        losses(bench, rows)
    growth(bench)
    steps(bench)
    ranking(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
