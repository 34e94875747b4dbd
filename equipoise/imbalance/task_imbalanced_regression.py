"""The imbalanced-regression task: values of which most lie in one part of their range.

By default: how far was a handwritten digit turned? Training angles have the density exp(-angle / skew) on [0, 90] degrees,
so that large angles are rare; validation and test angles are spread evenly, as in the benchmarks of this field, and their
digits do not occur in training. Data of your own keep the distribution they have, in all three splits alike: of neighbours
in the order of labels each split gets its share.

Errors are told by how frequent such labels are in training. Bins of labels have the width ``bin_width`` and are counted from 0;
bin b holds the share f_b of the training examples (of all examples that are split, for data of your own; by the law of the
angles for rotated-digits). The average bin holds 1 / B, where B = range of the labels / bin_width:

    many      f_b > many / B
    few       f_b < few / B, also where no label is known
    medium    the rest

The metric is ``balanced_mae``: the mean over bins of the mean absolute error in the bin. Plain MAE would on skewed test data
reward a model for giving up rare values; the MAE of the few alone would reward one that gives up the rest. On evenly spread
test data it is the plain MAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import RawData, fingerprint, load, read, split
from equipoise.data.augment import Jitter
from equipoise.errors import ArgumentError, DataError, check_choice, check_integer, check_range, refuse
from equipoise.imbalance.regression_baselines import MAX_BINS, label_bins, weighted_l1_loss
from equipoise.training import Examples, LogUniform, Method, Problem, SupervisedTask
from equipoise.training.features import find_head
from equipoise.training.space import Space
from equipoise.training.task import TradeOff, cached_problem

ROTATED, LARGEST_ANGLE = "rotated-digits", 90.0
SPLITS, REGIONS = ("validation", "test"), ("many", "medium", "few")
METRICS = ("balanced_mae", "mae", "gm", *(f"{region}_{name}" for region in REGIONS for name in ("mae", "gm")))
FEW_TO_TEST = 20  # examples of a region, below which a remark says so
SMALLEST_ERROR = 1e-10  # in the geometric mean, which an error of 0 would make 0


@dataclass(frozen=True)
class ImbalancedRegression(SupervisedTask):
    """Regression of values most of which lie in one part of their range; errors count evenly over the range.

    dataset: "rotated-digits", or an embedded data set with values as targets ("diabetes").
    skew: of rotated-digits: training angles have the density exp(-angle / skew) on [0, 90] degrees, > 0.
    train_examples: draws of rotated-digits (by default 1200), or how many training examples of other data to use.
    bin_width: of labels, in their unit; by default a twentieth of their range. Also the bin of ``lds`` and ``fds`` and ConR's
        window. ConR's pushing is one over the range of the labels. An arm's own setting goes before.
    many, few: bins with more than ``many`` times the average share of training examples are the many, with less than
        ``few`` times the few; few < many.
    metric: "balanced_mae", "mae", "gm" (geometric mean of the absolute errors), or one of a region: "few_mae", "few_gm", ...
    noise: standard deviation of the Gaussian noise of a random view of the inputs; by default 0.05 for rotated-digits, else 0,
        which means no views: methods that ask for two then get the plain examples once.
    model: "mlp", "cnn", "linear", or "package.module:factory"; its output is multiplied by the standard deviation of the training
        labels and their median is added, so that labels, errors and settings stay in the label's unit.
    epochs, batch_size: length and batch of a training run, with Adam and a cosine schedule.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    data, target, test_data: your own file, its target column, and a file to test on.
    """

    name: ClassVar[str] = "imbalanced-regression"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    baseline: ClassVar[str] = "l1"
    methods: ClassVar[tuple[str, ...]] = ("conr", "lds", "fds", "balanced-mse", "mse")
    draws: ClassVar[tuple[int, int]] = (300, 600)  # of rotated-digits, for validation and test
    trade_off: ClassVar[TradeOff | None] = TradeOff("many_mae", "few_mae", x_higher=False, y_higher=False)

    metric: str = "balanced_mae"  # type: ignore[misc]
    dataset: str = ROTATED
    skew: float = 12.0
    train_examples: int | None = None
    bin_width: float | None = None
    many: float = 1.0
    few: float = 0.5
    noise: float | None = None
    epochs: int = 25
    validation: float = 0.2
    test: float = 0.2
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, METRICS)
        check_range("skew", self.skew, 0, open_low=True)
        if self.train_examples is not None:
            check_integer("train_examples", self.train_examples, 2)
        if self.bin_width is not None:
            check_range("bin_width", self.bin_width, 0, open_low=True)
        if self.noise is not None:
            check_range("noise", self.noise, 0)
        check_range("many", self.many, 0, open_low=True)
        check_range("few", self.few, 0, self.many, open_low=True, open_high=True)
        check_range("validation", self.validation, 0, 1, open_low=True, open_high=True)
        check_range("test", self.test, 0, 1, open_low=True, open_high=True)
        if self.data is None and (self.target is not None or self.test_data is not None):
            raise ArgumentError("target, test_data describe a file of your own: give data='file.csv' as well")

    # -- the data -----------------------------------------------------------------------------------------------------
    @property
    def resampled(self) -> bool:
        return self._rotated or self._raw().test is None

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        return {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}

    def check(self) -> list[str]:
        super().check()
        counts = cached_problem(self, 0).extra["regions"]["test"].bincount(minlength=len(REGIONS)).tolist()
        return [
            f"The region {name!r} of labels has {count} test examples (seed 0): its errors say little."
            for name, count in zip(REGIONS, counts, strict=True)
            if count < FEW_TO_TEST
        ]

    def problem(self, seed: int) -> Problem:
        parts = self._rotated_digits(seed) if self._rotated else self._split(seed)
        regions = {name: self._regions(part.targets) for name, part in zip(SPLITS, parts[1:], strict=True)}
        for name, region in regions.items():
            self._refuse_small(region, name, 1)
        shape = tuple(parts[0].take(torch.arange(1)).inputs.shape[1:])  # type: ignore[union-attr]
        return Problem(*parts, input_shape=shape, num_outputs=1, extra={"regions": regions, "width": self.width})

    @property
    def _rotated(self) -> bool:
        return self.data is None and self.dataset == ROTATED

    def _raw(self) -> RawData:
        if self.data is not None:
            return read(self.data, self.target, test=self.test_data, kind="regression")
        raw = load(self.dataset)
        if raw.class_names is not None:
            raise ArgumentError(
                f"dataset = {self.dataset!r}: has classes; imbalanced-regression needs values: {ROTATED!r} or 'diabetes'"
            )
        return raw

    @property
    def label_range(self) -> float:
        """Largest minus smallest label, those of a test file left out."""
        if self._rotated:
            return LARGEST_ANGLE
        labels = self._raw().targets
        return float(labels.max() - labels.min())

    @property
    def width(self) -> float:
        """``bin_width``, or its default."""
        if self.bin_width is None:
            return self.label_range / 20
        if self.label_range / self.bin_width > MAX_BINS:
            refuse("bin_width", self.bin_width, f"be at least {self.label_range / MAX_BINS:.3g}, for {MAX_BINS} bins")
        return self.bin_width

    def _regions(self, labels: Tensor) -> Tensor:
        """Positions in ``REGIONS`` of labels (N,), int64."""
        width = self.width
        if self._rotated:
            edges = (torch.arange(math.ceil(LARGEST_ANGLE / width) + 1) * width).clamp(max=LARGEST_ANGLE)
            first, share = 0, (torch.expm1(-edges / self.skew) / math.expm1(-LARGEST_ANGLE / self.skew)).diff()
        else:
            bins = label_bins(self._raw().targets, width)
            first = int(bins.min())
            share = torch.bincount(bins - first) / len(bins)
        place = label_bins(labels, width) - first
        share = torch.where((place >= 0) & (place < len(share)), share[place.clamp(0, len(share) - 1)], 0)
        average = width / self.label_range
        return 1 + (share < self.few * average).long() - (share > self.many * average).long()

    def _refuse_small(self, region: Tensor, where: str, least: int) -> None:
        """Refuse ``many`` and ``few`` that leave a region with fewer than ``least`` examples."""
        for name, count in zip(REGIONS, region.bincount(minlength=len(REGIONS)).tolist(), strict=True):
            if count < least:
                raise DataError(
                    f"many, few = {self.many:g}, {self.few:g}: the region {name!r} holds {count} {where} examples, and needs "
                    f"{least}, with bins of width {self.width:g}. Change many, few or bin_width, or give more examples; labels "
                    "that are spread evenly are not for this task"
                )

    def _split(self, seed: int) -> tuple[Examples, Examples, Examples]:
        """Splits in which labels are spread alike: of neighbours in the order of labels each set gets its share."""
        raw = self._raw()
        tested = raw if raw.test is None else raw.test
        smallest = min(self.validation, self.test) if raw.test is None else self.validation
        region = self._regions(raw.targets)
        self._refuse_small(region, "of all", math.ceil(2 / smallest))
        # Strata of at least ten neighbours, none of them across regions: then every split has some of every region.
        train = self.train_examples or len(raw) * (1 - self.validation - (self.test if raw.test is None else 0))
        size = max(10, math.ceil(3 * len(raw) / max(train, 1)))
        order = raw.targets.argsort(stable=True)
        order = order[region[order].argsort(stable=True)]
        counts = region.bincount(minlength=len(REGIONS))
        strata = (counts // size).clamp(min=1)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(raw)) - (counts.cumsum(0) - counts)[region[order]]
        stratum = (strata.cumsum(0) - strata)[region] + rank * strata[region] // counts[region]
        parts = split(
            replace(raw, targets=stratum, class_names=tuple(map(str, range(int(strata.sum()))))),
            seed,
            validation=self.validation,
            test=self.test,
            train_examples=self.train_examples,
        )
        return (
            Examples(parts.train.inputs, raw.targets[parts.train_rows]),
            Examples(parts.validation.inputs, raw.targets[parts.validation_rows]),
            Examples(parts.test.inputs, tested.targets[parts.test_rows]),
        )

    def _rotated_digits(self, seed: int) -> tuple[Examples, Examples, Examples]:
        digits = split(load("digits"), seed, validation=self.validation, test=self.test)
        generator = torch.Generator().manual_seed(seed)

        def turned(images: Any, count: int, skewed: bool) -> Examples:
            chosen = torch.randint(len(images), (count,), generator=generator)
            u = torch.rand(count, generator=generator, dtype=torch.float64)
            # Inverse transform sampling of the truncated exponential law.
            skew_angle = -self.skew * torch.log1p(u * math.expm1(-LARGEST_ANGLE / self.skew))
            angle = (skew_angle if skewed else LARGEST_ANGLE * u).float()
            return Examples(rotate(images[chosen], angle), angle)

        return (
            turned(digits.train.inputs, self.train_examples or 1200, True),
            turned(digits.validation.inputs, self.draws[0], False),
            turned(digits.test.inputs, self.draws[1], False),
        )

    # -- training -----------------------------------------------------------------------------------------------------
    def space(self) -> Space:
        return {**super().space(), "lr": LogUniform(3e-4, 3e-2), "weight_decay": LogUniform(1e-6, 1e-2)}

    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return weighted_l1_loss

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        labels = problem.train.targets
        return ScaledOutput(super().build_model(problem, seed), float(labels.median()), float(labels.std()))

    def build_method(self, method: type[Method], config: Mapping[str, Any]) -> Method:
        units = {"conr.window": self.width, "conr.pushing": 1 / self.label_range}
        units |= {f"{name}.bin_width": self.width for name in ("lds", "fds")}
        return super().build_method(method, {**units, **config})

    def fit_options(self, problem: Problem, config: Mapping[str, Any]) -> dict[str, Any]:
        noise = self.noise if self.noise is not None else 0.05 * self._rotated
        return {
            "optimizer": partial(torch.optim.Adam, lr=config["lr"], weight_decay=config["weight_decay"], fused=True),
            "augment": Jitter(noise=noise) if noise else None,
        }

    # -- metrics ------------------------------------------------------------------------------------------------------
    def measure(self, problem: Problem, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """For validation and test: ``balanced_mae``, and ``mae`` and ``gm`` of all and of each region."""
        found = {}
        for name in SPLITS:
            prediction, targets = predictions[name]
            region = problem.extra["regions"][name]
            error = (prediction.reshape(-1).double() - targets).abs()
            found[f"{name}_balanced_mae"] = balanced_mae(error, targets, problem.extra["width"])
            for prefix, part in {"": error, **{f"{r}_": error[region == i] for i, r in enumerate(REGIONS)}}.items():
                found[f"{name}_{prefix}mae"] = part.mean().item()
                found[f"{name}_{prefix}gm"] = part.clamp(min=SMALLEST_ERROR).log().mean().exp().item()
        return found

    def learned(self, problem: Problem, metrics: Mapping[str, float]) -> bool:
        """Whether a run is better, by the task's metric on validation data, than predicting the training median."""
        median = problem.train.targets.median()
        parts = {name: getattr(problem, name).targets for name in SPLITS}
        constant = self.measure(problem, {name: (median.expand(len(t)), t) for name, t in parts.items()})
        return metrics[f"validation_{self.metric}"] < constant[f"validation_{self.metric}"]


# -- parts ------------------------------------------------------------------------------------------------------------
class ScaledOutput(nn.Module):
    """``location + scale * model(x)``: a model of ordinary size for labels in their own unit."""

    location: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, location: float, scale: float) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("location", torch.tensor(location))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.location + self.scale * self.model(*inputs, **named)

    def get_classifier(self) -> nn.Module:
        return find_head(self.model)


def balanced_mae(error: Tensor, targets: Tensor, bin_width: float) -> float:
    """Mean over the bins of labels that occur of the mean absolute ``error`` (N,) there (Ren et al., CVPR 2022)."""
    _, place = label_bins(targets, bin_width).unique(return_inverse=True)
    return (torch.bincount(place, weights=error) / torch.bincount(place)).mean().item()


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Images (N, C, H, W), turned anticlockwise by ``angle`` (N,) degrees about their centres; what turns in is 0."""
    radians = angle.deg2rad()
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
