"""What a practitioner tries for skewed values: L1, squared error, LDS, FDS, Balanced MSE.

A new method must beat these, tuned as carefully as itself. For predictions `p`, labels `y`, features `z` in front of the head, and
bins `b` of labels with `c_b` training examples, a kernel `k` over neighbouring bins (Gaussian, 5 bins wide, `sigma` in bins):

    L1              |p - y|                       predicts the conditional median
    MSE             (p - y)^2                     predicts the conditional mean
    LDS             w_b |p - y|,   w_b ~ (sum_b' k(b, b') c_b')^(-power), mean 1 over the training set
    FDS             z  ->  sqrt(V~_b / V_b) (z - m_b) + m~_b    in training; m_b, V_b: mean and variance of the features of bin b,
                    m~, V~: the same smoothed over bins by k
    Balanced MSE    - 2 s^2 log( exp(-(p_i - y_i)^2 / 2 s^2) / sum_j exp(-(p_i - y_j)^2 / 2 s^2) ),   j over the batch

LDS weighs rare labels up by the inverse of a density that counts neighbouring labels too, since their examples are informative
about each other. FDS moves the feature statistics of a rare label's bin towards those of its neighbours. Balanced MSE is
the likelihood of a regressor that would be right for evenly spread labels: the sum over the batch's labels takes out how
often a label occurs.

## When to use
Always, before anything else. L1 for outliers and a test set as skewed as the training set; LDS where rare values matter and
labels are many; Balanced MSE where errors should be even over the range of labels and noise is about equally large everywhere.

## When not
LDS with `power` 1 and a few very rare labels: their examples are fitted by heart, at the cost of all others. FDS with fewer than a
handful of examples per bin, or features of a few dimensions: its statistics are then noise. Balanced MSE with small batches (its
sum stands for the label distribution), or where frequent labels matter most: it trades their error for that of rare ones.

## Cost
L1, MSE, LDS: nothing. FDS: tables of bins x features and elementwise work on features. Balanced MSE: O(M^2) on the batch.

## In a distributed run
Balanced MSE and the statistics of FDS take the rows of all processes: 2 processes equal 1.

## Source
LDS, FDS: Yang, Zha, Chen, Wang, Katabi: Delving into Deep Imbalanced Regression. ICML 2021, arXiv:2102.09554. Balanced MSE, in
its "batch-based Monte-Carlo" form: Ren, Zhang, Yu, Liu: Balanced MSE for Imbalanced Visual Regression. CVPR 2022,
arXiv:2203.16427. FDS collects its statistics during the epoch instead of in a pass after it; bins without an example take
no part in smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import REDUCTIONS, precise, reduce
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space, Uniform

MAX_BINS = 10_000
RATIO_LIMITS = (0.1, 10.0)  # of the ratio of variances in FDS, as in the authors' code


# -- the functional core ----------------------------------------------------------------------------------------------
def weighted_l1_loss(
    prediction: Tensor, targets: Tensor, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """``w_i |p_i - y_i|`` per example (the mean over its values), reduced: "none" (N,), "sum" or "mean".

    prediction, targets: (N,), (N, 1) or (N, L). weights: (N,), constants, by default 1. Half precision is computed in float32.
    """
    prediction, targets = check_values(prediction, targets)
    error = (prediction - targets).abs().mean(1)
    if weights is not None:
        if weights.shape != error.shape:
            raise ArgumentError(f"weights has shape {tuple(weights.shape)}: must be {tuple(error.shape)}")
        error = weights.to(error.dtype) * error
    return reduce(error, reduction)


def balanced_mse_loss(
    prediction: Tensor, targets: Tensor, noise: float | Tensor = 1.0, reduction: str = "mean"
) -> Tensor:
    """Balanced MSE per example against the labels of the batch, reduced: "none" (N,), "sum" or "mean". >= 0.

    prediction, targets: (N,), (N, 1) or (N, L). noise: the standard deviation s > 0 of the predictions' error, in units of the
    label; a scalar tensor gets a gradient, through the likelihood and not through the factor ``2 s^2``. In float32 at least.
    """
    prediction, targets = check_values(prediction, targets)
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(noise, Tensor):
        check_range("noise", noise, 0, open_low=True)
        noise = prediction.new_tensor(noise)
    width = 2 * noise.to(prediction.dtype).square()
    squares = (prediction[:, None] - targets).square().sum(2)
    own = torch.arange(len(targets), device=targets.device)
    return F.cross_entropy(-squares / width, own, reduction=reduction) * width.detach()


def smoothing_kernel(size: int = 5, sigma: float = 2.0) -> Tensor:
    """A Gaussian over ``size`` (odd) neighbouring bins, of standard deviation ``sigma`` > 0 bins, sum 1: (size,) float64."""
    check_integer("kernel_size", size, 1)
    if size % 2 == 0:
        refuse("kernel_size", size, "be odd: a bin and as many neighbours on both sides")
    check_range("sigma", sigma, 0, open_low=True)
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    return (-(offset / sigma).square() / 2).softmax(0)


def smooth(rows: Tensor, kernel: Tensor) -> Tensor:
    """``sum_b' k(b, b') rows_b'`` for every bin b: (B, D) -> (B, D); what lies beyond the first and last bin is 0."""
    weight = kernel.to(rows)[None, None]
    return F.conv1d(rows.T[:, None], weight, padding=len(kernel) // 2)[:, 0].T


def calibration(mean: Tensor, variance: Tensor, seen: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (B, D) of each bin with which features get the statistics of the bin's neighbourhood (FDS).

    mean, variance: (B, D) of the features of each bin. seen: (B,) bool, bins that have any; the others weigh nothing in a
    neighbourhood and keep scale 1 and offset 0. The ratio of variances is kept in [0.1, 10]; where a variance is 0 it is 1.
    """
    weight = seen[:, None].to(mean.dtype)
    share = smooth(weight, kernel).clamp(min=torch.finfo(mean.dtype).tiny)
    near_mean, near_variance = (smooth(weight * values, kernel) / share for values in (mean, variance))
    varies = variance > 0
    ratio = torch.where(varies, near_variance / torch.where(varies, variance, 1), 1).clamp(*RATIO_LIMITS)
    scale = torch.where(seen[:, None], ratio.sqrt(), 1)
    return scale, torch.where(seen[:, None], near_mean - scale * mean, 0)


def label_bins(labels: Tensor, bin_width: float) -> Tensor:
    """``floor(y / bin_width)``: (N,) or (N, 1) -> (N,) int64. With whole labels and ``bin_width=1`` every label is a bin."""
    if labels.ndim not in (1, 2) or labels.numel() != len(labels):
        raise ArgumentError(f"targets has shape {tuple(labels.shape)}: must be (N,) or (N, 1), one value per example")
    labels = labels if labels.is_floating_point() else labels.double()
    return (precise(labels.reshape(-1)) / bin_width).floor().to(torch.int64)


def check_values(prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and targets as (N, L) of the prediction's precision; refuses shapes that do not hold the same values."""
    rows = len(targets) if targets.ndim else 0
    fits = prediction.ndim in (1, 2) and targets.ndim in (1, 2) and len(prediction) == rows
    if not fits or prediction.numel() != targets.numel() or not prediction.is_floating_point():
        raise ArgumentError(
            f"prediction = {prediction.dtype} {tuple(prediction.shape)}, targets = {tuple(targets.shape)}: must be values of the "
            "same examples, (N,), (N, 1) or (N, L). A regression model has one output per value"
        )
    prediction = precise(prediction).reshape(rows, -1)
    return prediction, targets.reshape(rows, -1).to(prediction.dtype)


# -- the modules ------------------------------------------------------------------------------------------------------
class LabelDensity(nn.Module):
    """Weights of labels by the inverse of their smoothed density in the training set (LDS).

    >>> LabelDensity(torch.tensor([1.0, 1.0, 1.0, 3.0]), 1.0, kernel_size=1)(torch.tensor([1.0, 3.0]))
    tensor([0.6667, 2.0000])

    labels: (n,) or (n, 1), all labels of the training set, finite. bin_width: > 0, in units of the label; at most 10,000 bins.
    power: >= 0; 1 is the inverse density, 0.5 its square root, 0 gives 1 for all. kernel_size: odd, sigma: > 0, in bins.

    Called with labels (N,) or (N, 1) it gives (N,) weights, whose mean over the training set is 1. A bin far from all training
    labels has the weight of the rarest of them, labels beyond the range that of the nearest bin. Buffers: ``first`` (number of
    the first bin), ``weights`` (B,).
    """

    first: Tensor
    weights: Tensor

    def __init__(
        self, labels: Tensor, bin_width: float, *, power: float = 1.0, kernel_size: int = 5, sigma: float = 2.0
    ) -> None:
        super().__init__()
        check_range("power", power, 0)
        first, bins, count = _bins_of(labels, bin_width)
        counts = torch.bincount(bins, minlength=count).double()
        density = smooth(counts[:, None], smoothing_kernel(kernel_size, sigma))[:, 0]
        weights = density.clamp(min=density[counts > 0].min()) ** -power
        self.bin_width = bin_width
        self.register_buffer("first", first)
        self.register_buffer("weights", (weights / weights[bins].mean()).float())

    def forward(self, labels: Tensor) -> Tensor:
        bins = label_bins(labels, self.bin_width) - self.first
        return self.weights[bins.clamp(0, len(self.weights) - 1)]


class FeatureSmoothing(nn.Module):
    """FDS: shifts and scales features so that the statistics of their label's bin become those of the neighbourhood.

    labels: (n,) or (n, 1), all labels of the training set: they fix the bins. bin_width: > 0, in units of the label.
    num_features: D. kernel_size: odd, sigma: > 0, in bins. momentum: in [0, 1), share that earlier epochs keep in the statistics.

    Called with features (N, D) and labels in training mode it remembers them for the statistics of this epoch and, while
    ``enabled``, returns them calibrated by the statistics of the epochs before; in evaluation mode it returns them as they
    are. Call ``end_epoch`` after each epoch. Gradients flow through the features, statistics are constants.

    Buffers: ``first``, number of the first bin; ``mean``, ``variance`` (B, D), ``seen`` (B,) bool of the epochs so far; ``scale``,
    ``offset`` (B, D), ``calibration`` of these; ``count`` (B,), ``epoch_mean``, ``epoch_squares`` (B, D) of this epoch, the latter
    the sum of squared deviations.
    """

    first: Tensor
    seen: Tensor
    mean: Tensor
    variance: Tensor
    scale: Tensor
    offset: Tensor
    count: Tensor
    epoch_mean: Tensor
    epoch_squares: Tensor

    def __init__(
        self,
        labels: Tensor,
        bin_width: float,
        num_features: int,
        *,
        kernel_size: int = 5,
        sigma: float = 2.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_integer("num_features", num_features, 1)
        check_range("momentum", momentum, 0, 1, open_high=True)
        first, _, bins = _bins_of(labels, bin_width)
        self.bin_width, self.momentum, self.enabled = bin_width, momentum, True
        self.kernel = smoothing_kernel(kernel_size, sigma)
        self.register_buffer("first", first)
        self.register_buffer("seen", torch.zeros(bins, dtype=torch.bool))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(bins, num_features))
        for name in ("mean", "variance", "offset", "epoch_mean", "epoch_squares"):
            self.register_buffer(name, torch.zeros(bins, num_features))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if not self.training:
            return features
        if features.ndim != 2 or features.shape[1] != self.mean.shape[1] or len(features) != len(labels):
            raise ArgumentError(
                f"features has shape {tuple(features.shape)} for {len(labels)} labels: must be "
                f"({len(labels)}, {self.mean.shape[1]}). Pool features before the head"
            )
        bins = (label_bins(labels, self.bin_width) - self.first).clamp(0, len(self.seen) - 1)
        self._remember(*gather_rows(features.detach(), bins))
        if not self.enabled:
            return features
        return (features * self.scale[bins] + self.offset[bins]).to(features.dtype)

    @torch.no_grad()
    def _remember(self, features: Tensor, bins: Tensor) -> None:
        """Merge the batch's counts, means and squared deviations by bin into the epoch's."""
        features = features.to(self.mean.dtype)
        count = torch.bincount(bins, minlength=len(self.count))
        mean = torch.zeros_like(self.mean).index_add_(0, bins, features) / count.clamp(min=1)[:, None]
        squares = torch.zeros_like(self.mean).index_add_(0, bins, (features - mean[bins]).square())
        share = (count / (self.count + count).clamp(min=1))[:, None].to(mean.dtype)
        gap = mean - self.epoch_mean
        self.epoch_squares += squares + gap.square() * share * self.count[:, None]
        self.epoch_mean += gap * share
        self.count += count

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Let the statistics of this epoch join those of the epochs before, and begin a new one."""
        met = (self.count > 0)[:, None]
        keep = torch.where(self.seen[:, None], self.momentum, 0.0).to(self.mean.dtype)
        variance = self.epoch_squares / (self.count - 1).clamp(min=1)[:, None]
        for old, new in ((self.mean, self.epoch_mean), (self.variance, variance)):
            old.copy_(torch.where(met, keep * old + (1 - keep) * new, old))
        self.seen |= met[:, 0]
        scale, offset = calibration(self.mean, self.variance, self.seen, self.kernel)
        self.scale.copy_(scale)
        self.offset.copy_(offset)
        for buffer in (self.count, self.epoch_mean, self.epoch_squares):
            buffer.zero_()


class BalancedMSELoss(nn.Module):
    """``balanced_mse_loss`` whose noise may be learned; in a distributed run it takes the rows of all processes.

    noise: standard deviation > 0, in units of the label, at the start. learn: whether it is a parameter (``log_noise``, its
    logarithm), for the optimizer; give it no weight decay.
    """

    log_noise: Tensor

    def __init__(self, noise: float = 1.0, *, learn: bool = True) -> None:
        super().__init__()
        check_range("noise", noise, 0, open_low=True)
        log_noise = torch.tensor(float(noise)).log()
        if learn:
            self.log_noise = nn.Parameter(log_noise)
        else:
            self.register_buffer("log_noise", log_noise)

    def forward(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch of prediction and targets (N,), (N, 1) or (N, L)."""
        prediction, targets = gather_rows(prediction, targets)
        return balanced_mse_loss(prediction, targets, self.log_noise.exp())


def training_labels(run: Run, method: str) -> Tensor:
    """All labels of the training set, (n,) float, for a ``method`` that needs their distribution."""
    targets = getattr(run.data, "targets", getattr(getattr(run.data, "dataset", None), "targets", None))
    if targets is None:
        raise ArgumentError(
            f"data = without targets: {method} needs the labels of the whole training set. Give data=...: equipoise.Examples, a "
            "pair of tensors, or a Dataset with .targets"
        )
    targets = torch.as_tensor(targets)
    if targets.numel() != len(targets) or not targets.is_floating_point():
        raise ArgumentError(
            f"targets = {targets.dtype} {tuple(targets.shape)}: must be floating point (n,) or (n, 1), one value per example. "
            f"{method} is for regression of one value"
        )
    return precise(targets.reshape(-1))


def _bins_of(labels: Tensor, bin_width: float) -> tuple[Tensor, Tensor, int]:
    """Number of the first bin, the bins of the labels counted from it, and the number of bins."""
    check_range("bin_width", bin_width, 0, open_low=True)
    if not len(labels) or not bool(labels.isfinite().all()):
        raise ArgumentError(
            "targets holds no label, or NaN or infinite ones: remove these examples, or fill in their labels"
        )
    span = float((labels.max() - labels.min()) / bin_width)
    if span > MAX_BINS - 2:
        refuse(
            "bin_width",
            bin_width,
            f"be at least {span * bin_width / (MAX_BINS - 2):.3g}: it gives {span:.0f} bins of labels",
        )
    bins = label_bins(labels, bin_width)
    first = bins.min()
    return first, bins - first, int(bins.max() - first) + 1


# -- the methods ------------------------------------------------------------------------------------------------------
class L1(Method):
    """The mean absolute error: the baseline.

    Replaces the task's loss and has no settings; a prediction that is right in the median.
    """

    name = "l1"
    neutral: ClassVar[Mapping[str, Any] | None] = {}

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return weighted_l1_loss(output.prediction, batch.targets)


class MSE(Method):
    """The mean squared error: large errors count more, so that rare labels far from the others weigh more.

    Replaces the task's loss and has no settings, hence none at which it equals L1.
    """

    name = "mse"

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return F.mse_loss(*check_values(output.prediction, batch.targets))


class LDS(Method):
    """L1 with weights of the inverse label density, smoothed over neighbouring labels.

    power: >= 0; weights are density^-power: 1 the inverse, 0.5 its square root, 0 plain L1. bin_width: > 0, in units of the label:
    the task sets it. kernel_size: odd, sigma: > 0, in bins. Replaces the task's loss; needs labels of one value.
    """

    name = "lds"
    paper = Paper(
        "Delving into Deep Imbalanced Regression",
        "Yang, Zha, Chen, Wang, Katabi",
        "ICML 2021",
        "https://arxiv.org/abs/2102.09554",
    )
    space: ClassVar[Space] = {"power": Uniform(0.25, 1.0), "sigma": LogUniform(0.5, 4.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"power": 0.0}

    def __init__(self, power: float = 0.5, bin_width: float = 1.0, kernel_size: int = 5, sigma: float = 2.0) -> None:
        check_range("power", power, 0)
        check_range("bin_width", bin_width, 0, open_low=True)
        smoothing_kernel(kernel_size, sigma)
        self.power, self.bin_width, self.kernel_size, self.sigma = power, bin_width, kernel_size, sigma

    def prepare(self, run: Run) -> None:
        density = LabelDensity(
            training_labels(run, "LDS"),
            self.bin_width,
            power=self.power,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
        )
        self.density: LabelDensity = run.register(self, "density", density)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return weighted_l1_loss(output.prediction, batch.targets, self.density(batch.targets))


class FDS(Method):
    """Calibrate features in training so that the statistics of rare labels' bins follow those of their neighbours.

    start: first epoch (0-based) with calibration, >= 1; never reached, training is plain. bin_width: > 0, in units of the
    label: the task sets it. kernel_size: odd, sigma: > 0, in bins. momentum: in [0, 1). Keeps the task's loss; the model's head
    must be an ``nn.Linear`` on features (N, D). Predictions in evaluation mode use features as they are.
    """

    name = "fds"
    paper = Paper(
        "Delving into Deep Imbalanced Regression",
        "Yang, Zha, Chen, Wang, Katabi",
        "ICML 2021",
        "https://arxiv.org/abs/2102.09554",
    )
    space: ClassVar[Space] = {"sigma": LogUniform(0.5, 4.0), "momentum": Uniform(0.5, 0.95)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"start": 10**9}

    def __init__(
        self,
        start: int = 1,
        bin_width: float = 1.0,
        kernel_size: int = 5,
        sigma: float = 2.0,
        momentum: float = 0.9,
    ) -> None:
        check_integer("start", start, 1)
        check_range("bin_width", bin_width, 0, open_low=True)
        check_range("momentum", momentum, 0, 1, open_high=True)
        smoothing_kernel(kernel_size, sigma)
        self.start, self.bin_width, self.momentum = start, bin_width, momentum
        self.kernel_size, self.sigma = kernel_size, sigma

    def prepare(self, run: Run) -> None:
        head = run.head()
        if not isinstance(head, nn.Linear):
            raise ArgumentError(
                f"head = {type(head).__name__}: FDS needs an nn.Linear that makes the predictions. Name it: head='path.to.layer'"
            )
        smoothing = FeatureSmoothing(
            training_labels(run, "FDS"),
            self.bin_width,
            head.in_features,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
            momentum=self.momentum,
        )
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        self.smoothing: FeatureSmoothing = run.register(self, "smoothing", smoothing.to(wide))
        self._labels: Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._before_head)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        self.smoothing.enabled = run.epoch >= self.start
        self._labels = batch.targets
        return batch

    def _before_head(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Labels are taken once: they belong to the next training pass, not to others that a method may add.
        if self._labels is None or not module.training:
            return None
        labels, self._labels = self._labels, None
        return (self.smoothing(args[0], labels), *args[1:])

    def epoch_end(self, run: Run) -> None:
        self.smoothing.end_epoch()

    def finish(self, run: Run) -> None:
        self._handle.remove()


class BalancedMSE(Method):
    """Squared error against the batch's label distribution, so that rare labels are predicted as readily as frequent ones.

    noise: at the start, as a share of the standard deviation of the training labels, > 0. learn: whether it is learned, with
    the run's learning rate and without weight decay. Replaces the task's loss. No setting equals L1: the loss is a likelihood of
    squared errors.
    """

    name = "balanced-mse"
    paper = Paper(
        "Balanced MSE for Imbalanced Visual Regression",
        "Ren, Zhang, Yu, Liu",
        "CVPR 2022",
        "https://arxiv.org/abs/2203.16427",
    )
    space: ClassVar[Space] = {"noise": LogUniform(0.03, 1.0), "learn": Choice((True, False))}

    def __init__(self, noise: float = 0.3, learn: bool = True) -> None:
        check_range("noise", noise, 0, open_low=True)
        check_choice("learn", learn, (True, False))
        self.noise, self.learn = noise, learn

    def prepare(self, run: Run) -> None:
        labels = training_labels(run, "Balanced MSE")
        spread = float(labels.std(correction=0))
        if spread == 0:
            raise ArgumentError(f"targets = {labels[0].item():g} in every example: there is nothing to predict")
        self.criterion: BalancedMSELoss = run.register(
            self, "criterion", BalancedMSELoss(self.noise * spread, learn=self.learn)
        )

    def configure_optimizer(self, run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.learn:
            optimizer.add_param_group({"params": [self.criterion.log_noise], "weight_decay": 0.0})
        return optimizer

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return self.criterion(output.prediction, batch.targets)

    def after_backward(self, run: Run) -> None:
        noise = self.criterion.log_noise
        if noise.grad is not None and run.accelerator.num_processes > 1:
            noise.grad = run.accelerator.reduce(noise.grad, "mean")
