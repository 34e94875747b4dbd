"""What ConR costs: the loss beside its relative in pytorch-metric-learning and a loop over anchors, and a whole training step.

    python benchmarks/conr.py [--repeats 25] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- `conr_loss`, forward and backward, takes at most as long as `SupConLoss` of pytorch-metric-learning on as many embeddings,
  and gives its value where the two coincide (no pushing, all other pairs negatives). ConR does more: distances of labels and
  predictions, two masks, weights.
- It is at least 10 times as fast as a Python loop over anchors, to the same value.

A training step with ConR costs what two views of each example cost, plus the pairwise part: shown, without a target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor

import equipoise
from equipoise.data.augment import Jitter
from equipoise.imbalance.conr import ConR, conr_loss
from equipoise.imbalance.regression_baselines import weighted_l1_loss
from equipoise.models.reference import MLP
from equipoise.training import Method

PEER, LOOP = 1.0, 10.0


def both(loss: Callable[[Tensor], Tensor], features: Tensor) -> Callable[[], Tensor]:
    """The loss and its gradient."""

    def work() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(features), features)
        return gradient

    return work


def peers(bench: Bench, count: int, width: int) -> None:
    """Labels 0, 10, 20, ... with a window of 1 are classes; equal predictions make all other pairs negatives."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator, requires_grad=True)
    classes = torch.arange(count) % (count // 8)
    labels, guesses = 10.0 * classes, torch.zeros(count)
    supcon = SupConLoss(temperature=0.1)
    ours = lambda f: conr_loss(f, labels, guesses, window=1.0, temperature=0.1, pushing=0.0)  # noqa: E731
    theirs = lambda f: supcon(f, classes)  # noqa: E731
    title = f"loss and gradient, M = {count}, D = {width}"
    works = {"pytorch-metric-learning SupConLoss": both(theirs, features), "conr_loss": both(ours, features)}
    bench.table(title, works, PEER, peer="pytorch-metric-learning SupConLoss")
    gradients = [work() for work in works.values()]
    same = torch.allclose(ours(features), theirs(features), rtol=1e-5) and torch.allclose(*gradients, atol=1e-6)
    bench.require("the same loss and gradient, to 1e-5", same)


def loop_over_anchors(features: Tensor, labels: Tensor, guesses: Tensor) -> Tensor:
    """The definition written for one anchor at a time."""
    z = torch.nn.functional.normalize(features, dim=1)
    total = features.new_zeros(())
    for j in range(len(z)):
        gap = (labels - labels[j]).abs()
        others = torch.arange(len(z)) != j
        positive = (gap <= 5) & others
        negative = (gap > 5) & ((guesses - guesses[j]).abs() <= 5)
        if not positive.any() or not negative.any():
            continue
        s = z @ z[j] / 0.2
        pushed = s[negative] + 0.01 * gap[negative]
        total = total + torch.logsumexp(torch.cat([s[positive], pushed]), 0) - s[positive].mean()
    return total / len(z)


def loops(bench: Bench, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator, requires_grad=True)
    labels = 90 * torch.rand(count, generator=generator)
    guesses = labels + 10 * torch.randn(count, generator=generator)
    ours = lambda f: conr_loss(f, labels, guesses, window=5.0, temperature=0.2, pushing=0.01)  # noqa: E731
    naive = lambda f: loop_over_anchors(f, labels, guesses)  # noqa: E731
    works = {"Python loop over anchors": both(naive, features), "conr_loss": both(ours, features)}
    title = f"loss and gradient, M = {count}, D = {width}"
    bench.table(title, works, 1 / LOOP, peer="Python loop over anchors", repeats=5)
    bench.require("the same loss, to 1e-5", torch.allclose(ours(features), naive(features), rtol=1e-5))


def steps(bench: Bench) -> None:
    """A step through ``equipoise.start``, the mean over an epoch."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.rand(1280, 1, 8, 8, generator=generator), 90 * torch.rand(1280, generator=generator)

    def trainer(methods: list[Method], views: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        run = equipoise.start(
            MLP((1, 8, 8), 1, (256, 64)),
            lambda p: torch.optim.Adam(p, lr=1e-3),
            methods=methods,
            data=(inputs, labels),
            batch_size=64,
            epochs=1_000,
            loss=weighted_l1_loss,
            augment=Jitter(noise=0.05) if views else None,
        )

        def epoch() -> None:
            for batch in run.batches():
                run.backward(run.training_loss(batch))
                run.step()
            run.end_epoch()

        return epoch

    settings = {"window": 5.0, "temperature": 0.2}
    works = {
        "L1": trainer([], True),
        "ConR without views": trainer([ConR(**settings)], False),
        "two views without contrast (beta 1e-12)": trainer([ConR(1e-12, **settings)], True),
        "ConR with two views": trainer([ConR(**settings)], True),
    }
    bench.table("an epoch of 20 steps of 64: MLP 64-256-64-1", works, peer="L1", repeats=10)


def main() -> int:
    _, bench = parse(__doc__, 25)
    for count, width in ((128, 64), (256, 128), (1024, 128)):
        peers(bench, count, width)
    loops(bench, 256, 64)
    steps(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
