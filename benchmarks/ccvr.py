"""What CCVR's statistics, virtual features and calibration cost, beside numpy, scikit-learn and loops over examples.

    python benchmarks/ccvr.py [--repeats 9] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- `class_statistics` is not slower than `numpy.mean` and `numpy.cov` for each class, and at least 10 times as fast as a loop over
  examples that sums outer products (6000 x 64 features, 10 classes); level with numpy, at most 1.1, for 5000 x 512, where both
  wait for the same matrix products. Both give the same numbers.
- Statistics of 10 clients, aggregated, are not slower than `QuadraticDiscriminantAnalysis.fit` on the pooled features, which finds
  the same means and covariances by a singular value decomposition of each class.
- `sample_virtual` is not slower than `numpy.random.multivariate_normal` for each class.
- The closed-form classifiers of the aggregated statistics predict what scikit-learn's LDA and QDA do that were fitted on the pooled
  features. Their accuracy stands beside that of the calibrated linear layer.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from harness import Bench, parse
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from torch import Tensor, nn

from equipoise.federated.ccvr import (
    ClassStatistics,
    aggregate_statistics,
    calibrate_classifier,
    class_statistics,
    sample_virtual,
)

CLIENTS = 10


def data(rows: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes with a mean and a covariance of their own each."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    means = torch.randn(classes, width, generator=generator)
    mixing = 0.3 * torch.randn(classes, width, width, generator=generator) / width**0.5 + torch.eye(width)
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 2))
    return means[targets] * 0.5 + torch.einsum("nd,nde->ne", noise, mixing[targets]), targets


def loop_over_examples(features: Tensor, targets: Tensor, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of each class, one outer product at a time."""
    found = []
    for c in range(classes):
        rows = features[targets == c].double()
        mean = rows.mean(0)
        scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for row in rows:
            scatter += torch.outer(row - mean, row - mean)
        found.append((mean, scatter / (len(rows) - 1)))
    return found


def by_numpy(features: np.ndarray, targets: np.ndarray, classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    groups = [features[targets == c] for c in range(classes)]
    return [(rows.mean(0, dtype=np.float64), np.cov(rows, rowvar=False)) for rows in groups]


def parts(features: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows of clients, skewed: sorted by class but for a third of them."""
    key = targets.double() + 3 * torch.rand(len(targets), generator=torch.Generator().manual_seed(3)).double()
    order = key.argsort()
    return [(features[rows], targets[rows]) for rows in order.tensor_split(CLIENTS)]


# -- statistics -------------------------------------------------------------------------------------------------------
def statistics_of_features(bench: Bench, rows: int, width: int, classes: int, loop: bool) -> None:
    features, targets = data(rows, width, classes)
    given, labels = features.numpy(), targets.numpy()
    title = f"statistics, {rows} x {width}, C = {classes}"
    works = {
        "numpy.mean and numpy.cov, class by class": lambda: by_numpy(given, labels, classes),
        "class_statistics": lambda: class_statistics(features, targets, classes),
    }
    bench.table(title, works, 1.0 if width < 512 else 1.1)
    ours, theirs = class_statistics(features, targets, classes), by_numpy(given, labels, classes)
    same = all(
        np.allclose(ours.mean[c], mean, atol=1e-9) and np.allclose(ours.cov[c], cov, atol=1e-9)
        for c, (mean, cov) in enumerate(theirs)
    )
    bench.require("the same numbers, to 1e-9", same)
    if loop:
        works = {
            "a loop over examples": lambda: loop_over_examples(features, targets, classes),
            "class_statistics": lambda: class_statistics(features, targets, classes),
        }
        bench.table(title, works, 0.1, repeats=3)


def clients(bench: Bench, rows: int, width: int, classes: int) -> None:
    features, targets = data(rows, width, classes)
    given = parts(features, targets)
    double, labels = features.double().numpy(), targets.numpy()

    def ours() -> ClassStatistics:
        return aggregate_statistics([class_statistics(z, y, classes) for z, y in given])

    works = {
        "QuadraticDiscriminantAnalysis.fit, pooled": lambda: QuadraticDiscriminantAnalysis().fit(double, labels),
        f"class_statistics of {CLIENTS} clients, aggregated": ours,
    }
    bench.table(f"{CLIENTS} clients, {rows} x {width}, C = {classes}", works, 1.0)


# -- virtual features -------------------------------------------------------------------------------------------------
def virtual(bench: Bench, width: int, classes: int, count: int) -> None:
    stats = class_statistics(*data(40 * width, width, classes), classes)
    mean, cov, rng = stats.mean.numpy(), stats.cov.numpy(), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    legacy = np.random.RandomState(0)
    works = {
        "numpy.random.multivariate_normal, class by class": lambda: [
            legacy.multivariate_normal(mean[c], cov[c], count) for c in range(classes)
        ],
        "Generator.multivariate_normal (eigh), class by class": lambda: [
            rng.multivariate_normal(mean[c], cov[c], count, method="eigh") for c in range(classes)
        ],
        "sample_virtual": lambda: sample_virtual(stats, count, generator=generator),
    }
    bench.table(f"virtual features, D = {width}, C = {classes}, {count} each", works, 1.0)


# -- what the statistics are worth ------------------------------------------------------------------------------------
def closed_form(stats: ClassStatistics, x: np.ndarray, linear: bool) -> np.ndarray:
    """Predictions of Gaussian classes with the statistics' own covariances, or with their pooled one."""
    count, mean = stats.count.numpy(), stats.mean.numpy()
    cov = stats.cov.numpy()
    if linear:  # scikit-learn divides by N, and so does the pooled scatter here
        cov = np.repeat((cov * (count - 1)[:, None, None]).sum(0, keepdims=True) / count.sum(), len(count), 0)
    apart = x[:, None] - mean
    distance = np.einsum("ncd,cde,nce->nc", apart, np.linalg.inv(cov), apart)
    score = np.log(count / count.sum()) - 0.5 * (distance + np.linalg.slogdet(cov)[1])
    found: np.ndarray = score.argmax(1)
    return found


def worth(bench: Bench, rows: int, width: int, classes: int) -> None:
    features, targets = data(2 * rows, width, classes)
    train, test = features[:rows], features[rows:].double().numpy()
    labels, wanted = targets[:rows], targets[rows:].numpy()
    stats = aggregate_statistics([class_statistics(z, y, classes) for z, y in parts(train, labels)])
    peers = {
        "LDA": (LinearDiscriminantAnalysis(solver="lsqr"), True),
        "QDA": (QuadraticDiscriminantAnalysis(), False),
    }
    for name, (peer, linear) in peers.items():
        theirs = peer.fit(train.double().numpy(), labels.numpy()).predict(test)
        mine = closed_form(stats, test, linear)
        bench.require(f"{name} of the statistics predicts as scikit-learn's", float((mine == theirs).mean()) > 0.999)
        print(f"    accuracy {float((theirs == wanted).mean()):.4f}")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, classes)
    calibrate_classifier(head, *sample_virtual(stats, 500, generator=generator), generator=generator)
    with torch.no_grad():
        predicted = head(features[rows:]).argmax(1).numpy()
    print(
        f"    accuracy of a linear layer calibrated on 500 virtual features of each class {(predicted == wanted).mean():.4f}"
    )


def main() -> int:
    _, bench = parse(__doc__, 9)
    statistics_of_features(bench, 6000, 64, 10, loop=True)
    statistics_of_features(bench, 5000, 512, 10, loop=False)
    clients(bench, 6000, 64, 10)
    virtual(bench, 64, 10, 500)
    virtual(bench, 256, 10, 500)
    worth(bench, 6000, 32, 10)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
