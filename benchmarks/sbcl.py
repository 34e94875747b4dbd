"""What SBCL costs: its loss beside pytorch-metric-learning, balanced k-means beside the loop over pairs, a training run.

    python benchmarks/sbcl.py [--repeats 15] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- `sbcl_loss`, forward and backward, takes at most as long as `SupConLoss` of pytorch-metric-learning, also with its second
  term, which that loss does not have; where the two coincide (one subclass a class, weight 0) loss and gradient are equal.
- With one subclass an example it takes at most as long as `NTXentLoss`, to the same loss and gradient.
- Balanced assignment is at least 1.2 times as fast as the loop over sorted pairs for 500 points in 50 clusters, and 4 times
  for 5000 points in 100 and in 500, to the same clusters.

A run with SBCL beside cross-entropy and SupCon is shown without a target: two views cost twice one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor
from torch.nn import functional as F

import equipoise
from equipoise.data import load
from equipoise.data.augment import Jitter
from equipoise.imbalance.sbcl import SBCL, balanced_kmeans, sbcl_loss
from equipoise.models.reference import MLP
from equipoise.training import Method

PEER = 1.0


# -- the loss ---------------------------------------------------------------------------------------------------------
def both(loss: Callable[[Tensor], Tensor], features: Tensor) -> Callable[[], Tensor]:
    """The loss and its gradient."""

    def work() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(features), features)
        return gradient

    return work


def losses(bench: Bench, size: int, width: int, *, simclr: bool = False) -> None:
    """Two views of ``size`` examples of ten classes, each of eight subclasses; the peers take them view-major."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, 2, width, generator=generator, requires_grad=True)
    labels = torch.arange(size) if simclr else torch.randint(10, (size,), generator=generator)
    subclasses = 8 * labels + torch.randint(8, (size,), generator=generator)
    tau = 0.05 + 0.1 * torch.rand(10, generator=generator)
    peer = NTXentLoss(0.1) if simclr else SupConLoss(0.1)
    theirs = lambda f: peer(f.transpose(0, 1).flatten(0, 1), labels.repeat(2))  # noqa: E731
    unit = lambda f: F.normalize(f, dim=2)  # as the peers do  # noqa: E731
    ours = lambda f: sbcl_loss(unit(f), labels, labels, weight=0.0)  # noqa: E731
    name = f"pytorch-metric-learning {type(peer).__name__}"
    works = {name: both(theirs, features), "sbcl_loss, weight 0": both(ours, features)}
    if not simclr:
        full = lambda f: sbcl_loss(unit(f), labels, subclasses, class_temperature=tau)  # noqa: E731
        works["sbcl_loss, subclasses and temperatures"] = both(full, features)
    title = f"loss and gradient, B = {size}, V = 2, D = {width}"
    bench.table(title, works, dict.fromkeys(list(works)[1:], PEER), repeats=3 if simclr else None)
    gradients = [works[name](), works["sbcl_loss, weight 0"]()]
    same = torch.allclose(ours(features), theirs(features), rtol=1e-5) and torch.allclose(*gradients, atol=1e-6)
    bench.require("the same loss and gradient, to 1e-5", same)


# -- balanced clusters ------------------------------------------------------------------------------------------------
def loop_over_pairs(x: Tensor, centroids: Tensor) -> Tensor:
    """One assignment of balanced k-means, a pair of a point and a centroid at a time."""
    clusters, n = len(centroids), len(x)
    similarity = (x @ F.normalize(centroids, dim=1).T).T
    labels = [-1] * n
    for room in (n // clusters, 1):
        taken = [0] * clusters
        for pair in similarity.flatten().argsort(descending=True, stable=True).tolist():
            k, i = divmod(pair, n)
            if labels[i] < 0 and taken[k] < room:
                labels[i] = k
                taken[k] += 1
        if min(labels) >= 0:
            break
    return torch.tensor(labels)


def clusters(bench: Bench, n: int, count: int, target: float) -> None:
    """Directions around a common one, as a class's features are; one iteration from given centroids."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.ones(64) / 8 + torch.randn(n, 64, generator=generator) / 16, dim=1)
    centroids = x[torch.randperm(n, generator=generator)[:count]]
    works: dict[str, Callable[[], object]] = {
        "loop over sorted pairs": lambda: loop_over_pairs(x, centroids),
        "balanced_kmeans, one iteration": lambda: balanced_kmeans(x, count, init=centroids, max_iter=1),
    }
    bench.table(f"balanced clusters, n = {n}, K = {count}", works, 1 / target, repeats=5)
    same = torch.equal(loop_over_pairs(x, centroids), balanced_kmeans(x, count, init=centroids, max_iter=1).labels)
    bench.require("the same clusters", same)


# -- a run ------------------------------------------------------------------------------------------------------------
def runs(bench: Bench) -> None:
    """Ten epochs on digits, with everything a run does: clusters twice, and the classifier in the end."""
    digits = load("digits")
    inputs, labels = torch.as_tensor(digits.inputs).flatten(1), torch.as_tensor(digits.targets)

    def training(*methods: Method) -> Callable[[], object]:
        def work() -> object:
            torch.manual_seed(0)
            model = MLP((64,), 10)
            return equipoise.fit(model, (inputs, labels), epochs=10, augment=Jitter(noise=0.1), methods=methods)

        return work

    works = {
        "cross-entropy": training(),
        "supcon (weight 0, warm-up to the end)": training(SBCL(weight=0.0, warm_up=10)),
        "sbcl (subclasses found twice)": training(SBCL(warm_up=4, step=3)),
    }
    bench.table("ten epochs on digits, MLP 64-256-256-10", works, repeats=3)


def main() -> int:
    _, bench = parse(__doc__, 15)
    losses(bench, 128, 64)
    losses(bench, 512, 128)
    losses(bench, 64, 64, simclr=True)
    clusters(bench, 500, 50, 1.2)
    clusters(bench, 5000, 100, 4.0)
    clusters(bench, 5000, 500, 4.0)
    runs(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
