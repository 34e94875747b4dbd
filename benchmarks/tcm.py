"""What TCM and OPIS cost: the loss beside pytorch-metric-learning, OPIS beside the loop over thresholds and classes, a step.

    python benchmarks/tcm.py [--repeats 9] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- `tcm_loss`, forward and backward, takes at most as long as `ThresholdConsistentMarginLoss` of pytorch-metric-learning, to the
  same loss and gradient.
- `opis` is at least 10 times as fast as a loop over thresholds and classes with boolean tensors over all pairs, to the same
  score.

A training step of the retrieval task, whose network is as small as the product of embeddings that TCM adds, is shown without a
target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss
from torch import Tensor

import equipoise
from equipoise.retrieval import TCM, NormalisedSoftmax, Retrieval, opis, tcm_loss
from equipoise.training import Method
from equipoise.training.fit import Run

PEER, NAIVE = 1.0, 0.1


# -- the loss ---------------------------------------------------------------------------------------------------------
def drawn(classes: int, per_class: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """Embeddings of which some pairs are hard, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = torch.randn(classes, width, generator=generator) + 0.7 * torch.randn(1, width, generator=generator)
    return centres[labels] + 0.5 * torch.randn(len(labels), width, generator=generator), labels


def losses(bench: Bench, classes: int, per_class: int) -> None:
    """Forward and backward of both."""
    embeddings, labels = drawn(classes, per_class)
    embeddings.requires_grad_()
    peer = ThresholdConsistentMarginLoss()

    def both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def work() -> tuple[Tensor, Tensor]:
            value = loss(embeddings, labels)
            return value.detach(), torch.autograd.grad(value, embeddings)[0]

        return work

    theirs, ours = "ThresholdConsistentMarginLoss", "tcm_loss"
    works = {theirs: both(peer), ours: both(tcm_loss)}
    bench.table(f"the loss, {classes} classes x {per_class}, D = 64", works, PEER)
    (value, slope), (peer_value, peer_slope) = works[ours](), works[theirs]()
    same = torch.allclose(value, peer_value, rtol=1e-4) and torch.allclose(slope, peer_slope, atol=1e-5)
    bench.require(f"the same loss ({value:.5f}) and gradient, to rounding", same and float(value) > 0)


# -- OPIS -------------------------------------------------------------------------------------------------------------
def naive_opis(embeddings: Tensor, labels: Tensor, low: float, high: float, count: int = 101) -> float:
    """The definition as it reads: for each threshold and class, boolean tensors over all pairs."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    distances = (2 - 2 * unit @ unit.T).clamp(min=0).sqrt()
    apart = ~torch.eye(len(labels), dtype=torch.bool)
    thresholds = torch.linspace(low, high, count, dtype=torch.float64)
    utility = torch.zeros(int(labels.max()) + 1, count, dtype=torch.float64)
    for g, d in enumerate(thresholds):
        accepted = distances <= d
        for i in range(len(utility)):
            member = labels == i
            positive = member[:, None] & member & apart
            negative = member[:, None] & ~member
            psi = (accepted & positive).sum() / positive.sum()
            phi = (~accepted & negative).sum() / negative.sum()
            utility[i, g] = 2 * phi * psi / (phi + psi) if phi + psi > 0 else 0.0
    return float(torch.trapezoid((utility - utility.mean(0)) ** 2, thresholds).mean() / (high - low))


def metric(bench: Bench, classes: int, per_class: int) -> None:
    """OPIS with its own range, quantiles included, against the naive form, to which the range is given."""
    embeddings, labels = drawn(classes, per_class)
    found = opis(embeddings, labels)
    naive, ours = "loop over thresholds and classes (range given)", "opis"
    works: dict[str, Callable[[], object]] = {
        naive: lambda: naive_opis(embeddings, labels, *found.calibration_range),
        ours: lambda: opis(embeddings, labels),
    }
    bench.table(f"OPIS, {classes} classes x {per_class}, 101 thresholds", works, NAIVE)
    slow = naive_opis(embeddings, labels, *found.calibration_range)
    bench.require(f"the same score ({found.opis:.6f}), to 1e-7", abs(slow - found.opis) < 1e-7)


# -- a training step --------------------------------------------------------------------------------------------------
def steps(bench: Bench) -> None:
    """A step of the task's training (MLP 64-256-64, 30 classes x 4), the mean over an epoch."""
    task = Retrieval(dataset="open-world")
    config = {"lr": 1e-3, "weight_decay": 0.0, "scale": 16.0}
    problem = task.problem(0)

    def trainer(method: Method) -> Callable[[], None]:
        options = task.fit_options(problem, config)
        optimizer = options.pop("optimizer")
        run: Run = equipoise.start(
            task.build_model(problem, 0), optimizer, methods=[method], data=problem.train, epochs=10_000, **options
        )

        def epoch() -> None:
            for batch in run.batches():
                run.backward(run.training_loss(batch))
                run.step()
            run.end_epoch()

        return epoch

    works = {"normalised-softmax": trainer(NormalisedSoftmax()), "tcm": trainer(TCM())}
    bench.table("an epoch of 18 training steps", works)


def main() -> int:
    _, bench = parse(__doc__, 9)
    for classes, per_class in ((8, 4), (30, 4), (64, 4)):
        losses(bench, classes, per_class)
    metric(bench, 10, 20)
    steps(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
