"""ConR: a contrastive regularizer for regression with rare labels.

Where most labels lie in one part of their range, features of rare labels collapse into those of frequent ones, and so do their
predictions. ConR pulls together the features of examples whose labels are close and pushes apart those of pairs that the model
confuses at present: labels apart, predictions close. It pushes harder the further the labels are apart and the rarer the
anchor's label is.

For M examples with unit features `z`, labels `y`, predictions `p` (constants here) and weights `w` of the anchors, similarity
`s_ji = z_j . z_i / temperature`,

    K+(j)  =  { i != j : |y_j - y_i| <= window }                                  positives
    K-(j)  =  { q : |y_j - y_q| > window  and  |p_j - p_q| <= window }            negatives: confused with the anchor
    S_jq   =  w_j exp(pushing |y_j - y_q|)
    l_j    =  - mean over i in K+(j) of  s_ji - log( sum_{a in K+} exp(s_ja) + sum_{q in K-} S_jq exp(s_jq) )
    R      =  (1 / M) sum_j w_j l_j,      l_j = 0 where K+(j) or K-(j) is empty

and training minimises the regression loss plus `beta R`. R shrinks to 0 as confusions vanish, since it is a mean over all M
anchors. Gradients flow through the features alone.

## When to use
Deep regression with a skewed label distribution, where representations matter: features come out ordered by label. It adds to
any regression loss and to LDS, FDS or Balanced MSE. Best with two random views of each example (`augment`), which give every
anchor a positive, and a head whose inputs may be negative: after a ReLU no two features point in opposite directions, and it
takes a larger `beta` to order them.

## When not
Do not count on a smaller error at small scale: on rotated digits and scikit-learn's diabetes data no gain over L1 was seen beyond
the noise of the seeds, while LDS alone, at no cost, made the errors of rare angles smaller than ConR did. Small batches of widely
spread labels have no positives, and the term does nothing. `window` and `pushing` are in units of the label: after rescaling
labels, rescale them too, or the method is silently off.

## Cost
Pairwise work O(M^2 (D + L)) and a few (M, M) tensors, little up to a few hundred rows. With two views the model's forward and
backward pass doubles. Inference is unchanged.

## In a distributed run
`ConRLoss` gathers the rows of all processes: 2 processes equal 1. `conr_loss` sees only what it is given.

## Source
Keramati, Meng, Evans: ConR: Contrastive Regularizer for Deep Imbalanced Regression. ICLR 2024, arXiv:2309.06651. The authors'
code sets other pairs to 0 before it exponentiates, so that each of them adds 1 to the denominator: `denominator="official"`; for
depth estimation it pushes by `w_j pushing |y_j - y_q|`: `form="linear"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_choice, check_range, refuse
from equipoise.imbalance.regression_baselines import LabelDensity, training_labels
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import precise, reduce
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space

FORMS = ("exp", "linear")
DENOMINATORS = ("paper", "official")
POWERS = {"inverse": 1.0, "sqrt-inverse": 0.5}  # of the label density


# -- the functional core ----------------------------------------------------------------------------------------------
def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    window: float = 1.0,
    temperature: float = 0.07,
    pushing: float = 0.01,
    weights: Tensor | None = None,
    form: str = "exp",
    denominator: str = "paper",
    reduction: str = "mean",
) -> Tensor:
    """The regularizer R, >= 0; with ``reduction="none"`` its terms ``w_j l_j`` (M,).

    features: (M, ...), flattened to (M, D); a row of zeros stays one. targets, predictions: (M,), (M, 1) or (M, L), values;
    distances between vectors are Euclidean. weights: (M,) or (M, 1), >= 0, by default 1. window: >= 0 and pushing: >= 0, in
    units of the label (pushing: per unit). temperature: > 0. form: "exp", or "linear" for ``S = w pushing |y_j - y_q|``.
    denominator: "paper", or "official", which adds ``M - |K+(j)|``.

    Only features get a gradient. Without an active anchor the result is 0, and so is the gradient. Half precision is computed in
    float32, sums of exponentials as logarithms. Raises ``ArgumentError`` (a ``ValueError``) for settings out of range, fewer
    than 2 examples, shapes that disagree, and on the CPU for NaN labels and negative weights.
    """
    _check_settings(window, temperature, pushing, form, denominator)
    targets, predictions, weights = _check_rows(features, targets, predictions, weights)
    count = len(features)
    with torch.no_grad():
        gaps = _distances(targets)
        close = gaps <= window
        positive = close & ~torch.eye(count, dtype=torch.bool, device=close.device)
        negative = ~close & (_distances(predictions) <= window)
        active = positive.any(1) & negative.any(1)
        log_push = (pushing * gaps if form == "exp" else (pushing * gaps).log()) + weights.log()[:, None]
        bias = torch.where(negative, log_push, -torch.inf).masked_fill_(positive, 0)
        bias.masked_fill_(~active[:, None], 0)  # a row of -inf has no gradient
        positives = positive.sum(1)

    with torch.autocast(features.device.type, enabled=False):
        z = _unit_rows(precise(features).flatten(1))
        similarity = z @ z.T / temperature
        log_denominator = torch.logsumexp(similarity + bias.to(z.dtype), 1)
        if denominator == "official":
            log_denominator = torch.logaddexp(log_denominator, (count - positives).to(z.dtype).log())
        attraction = (similarity * positive).sum(1) / positives.clamp(min=1)
        return reduce(torch.where(active, weights.to(z.dtype) * (log_denominator - attraction), 0), reduction)


def _distances(values: Tensor) -> Tensor:
    """Euclidean distances (M, M) between the rows of (M, L), exactly 0 between equal rows."""
    if values.shape[1] == 1:
        return (values - values.T).abs()
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")


def _unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays as it is, with an ordinary gradient."""
    norm = features.norm(dim=1, keepdim=True)
    return features / torch.where(norm > 0, norm, 1)


def _check_settings(window: float, temperature: float, pushing: float, form: str, denominator: str) -> None:
    check_range("window", window, 0)
    check_range("temperature", temperature, 0, open_low=True)
    check_range("pushing", pushing, 0)
    check_choice("form", form, FORMS)
    check_choice("denominator", denominator, DENOMINATORS)


def _check_rows(
    features: Tensor, targets: Tensor, predictions: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (M, L), predictions (M, L) and weights (M,) as constants in at least float32."""
    count = len(features) if features.ndim else 0
    if features.ndim < 2 or count < 2 or not features.is_floating_point():
        raise ArgumentError(
            f"features = {features.dtype} {tuple(features.shape)}: must be floating point (M, ...) with M >= 2, since examples are "
            "compared with each other. Leave out a batch of one"
        )
    values = {}
    for name, given in (("targets", targets), ("predictions", predictions)):
        if given.ndim not in (1, 2) or len(given) != count:
            raise ArgumentError(
                f"{name} has shape {tuple(given.shape)}: must be ({count},) or ({count}, L), as features"
            )
        wide = given.dtype if given.is_floating_point() else features.dtype
        values[name] = given.detach().reshape(count, -1).to(torch.promote_types(wide, torch.float32))
    if values["targets"].shape != values["predictions"].shape:
        raise ArgumentError(
            f"predictions has shape {tuple(predictions.shape)}: must hold as many values per example as targets, "
            f"{tuple(targets.shape)}. ConR is for regression"
        )
    weights = targets.new_ones(count, dtype=values["targets"].dtype) if weights is None else precise(weights.detach())
    if weights.shape not in ((count,), (count, 1)):
        raise ArgumentError(f"weights has shape {tuple(weights.shape)}: must be ({count},), one for each example")
    weights = weights.reshape(count)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        if not bool(values["targets"].isfinite().all()):
            raise ArgumentError("targets holds NaN or infinite values: remove these examples, or fill in their labels")
        if not bool((weights >= 0).all()):
            raise ArgumentError(f"weights = values down to {weights.min().item():g}: must be >= 0")
    return values["targets"], values["predictions"], weights


# -- the module -------------------------------------------------------------------------------------------------------
class ConRLoss(nn.Module):
    """``conr_loss`` as a module without state; in a distributed run it takes the rows of all processes.

    >>> loss = ConRLoss(window=5.0, temperature=0.2)
    >>> loss(torch.eye(3), torch.tensor([10.0, 12.0, 60.0]), torch.tensor([20.0, 22.0, 24.0])) > 0
    tensor(True)

    window: >= 0 and pushing: >= 0, in units of the label. temperature: > 0. form: "exp" or "linear". denominator: "paper" or
    "official". See ``conr_loss``. Add ``beta`` times the result to the regression loss, in training only.
    """

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.07,
        pushing: float = 0.01,
        form: str = "exp",
        denominator: str = "paper",
    ) -> None:
        super().__init__()
        _check_settings(window, temperature, pushing, form, denominator)
        self.window, self.temperature, self.pushing = window, temperature, pushing
        self.form, self.denominator = form, denominator

    def forward(self, features: Tensor, targets: Tensor, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        """The scalar R of features (M, ...), targets and predictions (M,), (M, 1) or (M, L), weights (M,) or (M, 1)."""
        features, targets, predictions = gather_rows(features, targets, predictions.detach())
        return conr_loss(
            features,
            targets,
            predictions,
            window=self.window,
            temperature=self.temperature,
            pushing=self.pushing,
            weights=None if weights is None else gather_rows(weights),
            form=self.form,
            denominator=self.denominator,
        )

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, temperature={self.temperature}, pushing={self.pushing}, form={self.form!r}, "
            f"denominator={self.denominator!r}"
        )


# -- the method -------------------------------------------------------------------------------------------------------
class ConR(Method):
    """Pull features of close labels together, push apart those of labels that the model confuses.

    beta: >= 0, strength; at 0 training is that without ConR. window: >= 0, in units of the label: labels (and predictions)
    within it count as close; also the width of the bins for ``weights``. temperature: > 0. pushing: >= 0, of the order of one
    over the range of the labels. weights: of the anchors: None, or "inverse" or "sqrt-inverse" of the smoothed label density (as
    LDS), with mean 1 over the training set.

    Adds a penalty to any regression loss. It compares the inputs of the model's head. In a run with ``augment`` it asks for two
    views of each example; the loss of the task is then taken on both. A batch of one example has no pairs and no penalty.
    The space leaves ``window`` and ``pushing`` out, whose range depends on the unit of the label: the task sets them.
    """

    name = "conr"
    paper = Paper(
        "ConR: Contrastive Regularizer for Deep Imbalanced Regression",
        "Keramati, Meng, Evans",
        "ICLR 2024",
        "https://arxiv.org/abs/2309.06651",
    )
    space: ClassVar[Space] = {
        "beta": LogUniform(0.1, 4.0),
        "temperature": LogUniform(0.07, 0.5),
        "weights": Choice((None, "sqrt-inverse")),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = {"beta": 0.0}
    needs_features = True

    def __init__(
        self,
        beta: float = 4.0,
        window: float = 1.0,
        temperature: float = 0.07,
        pushing: float = 0.01,
        weights: str | None = None,
    ) -> None:
        check_range("beta", beta, 0)
        check_choice("weights", weights, (None, *POWERS))
        if weights is not None and window == 0:
            refuse("window", window, "be > 0 where weights are given: it is the width of the bins of labels")
        self.beta, self.window, self.temperature, self.pushing, self.weights = (
            beta,
            window,
            temperature,
            pushing,
            weights,
        )
        self.criterion = ConRLoss(window=window, temperature=temperature, pushing=pushing)
        self.density: LabelDensity | None = None

    @property
    def views(self) -> int:  # type: ignore[override]
        """Two random views of each example; one at ``beta`` 0."""
        return 2 if self.beta else 1

    def prepare(self, run: Run) -> None:
        if self.weights is not None:
            labels = training_labels(run, "ConR with weights")
            density = LabelDensity(labels, self.window, power=POWERS[self.weights])
            self.density = run.register(self, "density", density)

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        if self.beta == 0 or len(batch) * run.accelerator.num_processes < 2:
            return output.prediction.new_zeros(())
        assert output.features is not None  # needs_features
        weights = None if self.density is None else self.density(batch.targets)
        return self.beta * self.criterion(output.features, batch.targets, output.prediction, weights)
