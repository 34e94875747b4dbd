"""Backdoor adjustment: fine-tune several differently pre-trained models on a long tail, and average them.

Two biases meet when a pre-trained model is fine-tuned on a long tail. The *data imbalance*, many examples of few classes,
is known and can be taken out by logit adjustment. The *parameter imbalance*, poor features of classes that were rare in the
unknown pre-training data, cannot: the features lack what was not learned. Which features a model happens to lack is treated
as a confounder and averaged over: models of different pre-trainings lack different ones.

C classes with n_c training examples and shares `pi_c`; M pre-trained backbones, each frozen, with an adapter and a head of its
own that give logits `f_b(x)`, b = 1 .. M:

    training (each alone)    loss_b  =  - log softmax(f_b(x) + tau log pi)_y
    head                     f_b(x)_c  =  s <z, w_c> / (|z| |w_c|),      z = adapter_b(backbone_b(x)),   s = 25
    prediction, "logits"     sum_b w_b f_b(x)                            w_b = 1 / M
    prediction, "probs"      log sum_b w_b softmax(f_b(x))               P(Y | do(X)) = sum_b P(Y | X, b) P(b)

The two rules differ where models that disagree are unequally sure. Predictions take the logits without `log pi`.

How skewed the pre-training was can be estimated from the logits `f0` of the pre-trained model on labelled data,

    q  =  argmin over the simplex of  sum_i v_i CE(f0(x_i) - log q, y_i)

with weights `v_i` under which the classes count alike: convex in `log q`.

## When to use
Long-tailed classification with frozen or lightly tuned pre-trained backbones, where several of different pre-trainings can be
had (CLIP, OpenCLIP, MetaCLIP, DINO, ...) and M forward passes at prediction can be paid for.

## When not
With one backbone it is logit adjustment. With several runs of one pre-training it is an ensemble of equals: mathematically the
method is an equal-weight ensemble of logit-adjusted models, and what it claims is that the *diversity of the pre-training*
helps. So hold it against the best single model and an ensemble of one pre-training (`same-pretraining-ensemble`), not only
against one model. Where the test data are as skewed as the training data and plain accuracy counts, do not adjust logits.
Averaged logits are ruled by the model with the largest scale: average heads of free scale in "probs".

## Cost
M fine-tunings and M forward passes at prediction, the least possible. Training runs each frozen backbone once over the data
and keeps the features (M n D numbers) as long as nothing can change the inputs: with `augment`, other methods in the run, or a
data set that is not in memory, the backbones run in every step. The prior's estimate: O(n C^2 + C^3) for each of about five
Newton steps, O(n C) for each product with the Hessian above 1,000 classes.

## In a distributed run
The loss is a mean over examples and the class counts are those of the whole training set: 2 processes equal 1. Every process
passes over the whole training set once in `prepare`.

## Source
Chen, Qin, Li, Chen, Su: Rethinking the Bias of Foundation Model under Long-tailed Distribution. ICML 2025, arXiv:2501.15955;
averaged logits, scale and frozen backbones as in the authors' code. Logit adjustment: Menon et al., ICLR 2021,
arXiv:2007.07314, eq. 10. The prior's estimate: Zhu et al., Generalized Logit Adjustment, NeurIPS 2023, arXiv:2310.08106.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import (
    ArgumentError,
    DataError,
    MethodConflictError,
    check_choice,
    check_integer,
    check_range,
    refuse,
)
from equipoise.imbalance.shared import check_class_counts, class_counts_of
from equipoise.training.batch import Batch, Examples, Loader, Output
from equipoise.training.losses import REDUCTIONS, check_labels, check_logits, precise
from equipoise.training.method import Method, Paper
from equipoise.training.metrics import balanced_accuracy
from equipoise.training.run import Run
from equipoise.training.space import Choice, Space, Uniform

SPACES = ("logits", "probs")
DENSE = 1000  # classes up to which Newton's equations are solved directly


# -- the functional core ----------------------------------------------------------------------------------------------
def logit_adjusted_cross_entropy(
    logits: Tensor, targets: Tensor, log_prior: Tensor, tau: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """``-log softmax(z + tau log pi)_y`` per example, reduced: "none" (N,), "sum" or "mean".

    logits: (N, C). targets: (N,) integer classes. log_prior: (C,), the classes' log shares up to a constant. tau: >= 0; 0 is
    cross-entropy, 1 aims at the balanced error. Half precision is computed in float32. Source: Menon et al., eq. 10.
    """
    check_range("tau", tau, 0, math.inf, open_high=True)
    check_choice("reduction", reduction, REDUCTIONS)
    check_logits(logits, len(log_prior))
    check_labels(targets, len(logits), len(log_prior))
    logits = precise(logits)
    return F.cross_entropy(logits + tau * log_prior.to(logits), targets.long(), reduction=reduction)


def cosine_logits(features: Tensor, weight: Tensor, scale: float = 25.0) -> Tensor:
    """``scale <x, w_c> / (|x| |w_c|)``, (..., N, C), in [-scale, scale]; float32 for half precision, also under autocast.

    features: (..., N, D). weight: (..., C, D). Leading axes are broadcast: (M, N, D) and (M, C, D) are M models in one call.
    A row of zeros has no direction: its logits are 0 and it receives no gradient.
    """
    with torch.autocast(features.device.type, enabled=False):
        return scale * (_directions(features) @ _directions(weight).mT)


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1 (zeros stay zeros)."""
    rows = precise(rows)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.masked_fill(length == 0, torch.inf)


def backdoor_adjust(
    logits: Tensor | Sequence[Tensor], *, weights: Sequence[float] | None = None, space: str = "logits"
) -> Tensor:
    """The prediction averaged over models, (N, C): logits for "logits", log-probabilities for "probs".

    logits: (M, N, C), or M tensors (N, C). weights: M numbers >= 0, normalised to sum 1; None is 1/M each.
    space: "logits" averages logits (the authors' code), "probs" the softmaxes (the formula of P(Y | do(X))).

    >>> sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.5]])
    >>> [backdoor_adjust([sure, unsure, unsure], space=space).argmax().item() for space in ("logits", "probs")]
    [0, 1]
    """
    check_choice("space", space, SPACES)
    if not isinstance(logits, Tensor):
        shapes = [tuple(z.shape) for z in logits]
        if not shapes or len(set(shapes)) > 1:
            refuse("logits", shapes, "hold at least one tensor (N, C), all of one shape")
        logits = torch.stack(list(logits))
    if logits.ndim != 3 or not logits.is_floating_point() or not len(logits):
        raise ArgumentError(
            f"logits = {logits.dtype} {tuple(logits.shape)}: must be floating point of shape (M, N, C) with M >= 1"
        )
    logits = precise(logits)
    shares = _shares(weights, len(logits))
    if space == "logits":
        return logits.mean(0) if shares is None else torch.einsum("m,mnc->nc", shares.to(logits), logits)
    log_p = F.log_softmax(logits, -1)
    if shares is None:
        return log_p.logsumexp(0) - math.log(len(logits))
    return (log_p + shares.log().to(logits)[:, None, None]).logsumexp(0)


def _shares(weights: Sequence[float] | None, count: int) -> Tensor | None:
    """The models' weights, scaled to sum 1, (M,) float64; None for equal ones."""
    if weights is None:
        return None
    shares = torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (count,) or not bool((torch.isfinite(shares) & (shares >= 0)).all()) or shares.sum() == 0:
        refuse("weights", weights, f"be {count} finite numbers >= 0, one a model, that are not all 0")
    return shares / shares.sum()


# -- how skewed the pre-training was ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PriorEstimate:
    """prior: (C,) float64, sums to 1. loss: the objective there, in nats. iterations: steps taken. converged: whether the
    largest derivative by ``log q`` came down to ``tol``."""

    prior: Tensor
    loss: float
    iterations: int
    converged: bool


@torch.no_grad()
def estimate_label_prior(
    logits: Tensor, targets: Tensor, *, class_balanced: bool = True, max_iter: int = 100, tol: float = 1e-10
) -> PriorEstimate:
    """The label prior q that a pre-trained model's logits carry: ``argmin sum_i v_i CE(f0(x_i) - log q, y_i)``.

    logits: (N, C), the model's before fine-tuning. targets: (N,) integer classes, each at least once.
    class_balanced: ``v_i = 1 / (C n_{y_i})``, so that the classes count alike; False: 1 / N. The counts are those of ``targets``.
    max_iter: >= 0. tol: > 0, of the largest ``|sum_i v_i (softmax(f0_i - log q)_c - [y_i = c])|``, which vanishes at q.

    Each step is Newton's, or, where that would not lower the objective as much, ``b <- b + log(mean prediction) - log(share)``,
    which never raises it (it is Sinkhorn's scaling of exp(f0) to the labels' shares). Computed in float64.
    """
    check_logits(logits)
    check_labels(targets, *logits.shape)
    check_integer("max_iter", max_iter, 0)
    check_range("tol", tol, 0, open_low=True)
    if not bool(torch.isfinite(logits).all()):
        raise ArgumentError("logits = NaN or infinite values: must be finite")
    z, y = logits.double(), targets.long()
    classes = z.shape[1]
    counts = torch.bincount(y, minlength=classes)
    if bool((counts == 0).any()):
        absent = (counts == 0).nonzero().flatten().tolist()
        raise DataError(
            f"targets hold no example of class {', '.join(map(str, absent))}: its prior cannot be estimated"
        )
    share = torch.full_like(z[0], 1 / classes) if class_balanced else counts / counts.sum(dtype=torch.float64)
    log_v = (share / counts).log()[y]

    def at(b: Tensor) -> tuple[float, Tensor]:
        log_p = F.log_softmax(z - b, 1)
        return -float(log_v.exp() @ log_p.gather(1, y[:, None])[:, 0]), log_p

    b, iterations = torch.zeros_like(share), 0
    loss, log_p = at(b)
    while True:
        log_mean = (log_p + log_v[:, None]).logsumexp(0)
        gradient = share - log_mean.exp()
        converged = float(gradient.abs().max()) <= tol
        if converged or iterations == max_iter:
            return PriorEstimate((b - b.logsumexp(0)).exp(), loss, iterations, converged)
        options = [b - _newton(gradient, log_p.exp(), log_v.exp(), log_mean.exp()), b + log_mean - share.log()]
        steps = [(*at(option), option) for option in options if bool(torch.isfinite(option).all())]
        loss, log_p, b = min(steps, key=lambda step: step[0])
        iterations += 1


def _newton(gradient: Tensor, p: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    """``H^-1 gradient`` for ``H = diag(mean) - p^T diag(v) p``, which is singular along (1, .., 1) alone."""
    classes = len(gradient)
    if classes <= DENSE:
        hessian = mean.diag() - p.T @ (v[:, None] * p) + 1 / classes
        return torch.linalg.solve_ex(hessian, gradient).result
    # Conjugate gradients, preconditioned by the diagonal; the gradient has no part along (1, .., 1).
    scale = 1 / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    step, residual = torch.zeros_like(gradient), gradient.clone()
    direction = scale * residual
    energy = residual @ direction
    for _ in range(100):
        turned = mean * direction - p.T @ (v * (p @ direction))
        length = energy / (direction @ turned)
        step, residual = step + length * direction, residual - length * turned
        scaled = scale * residual
        before, energy = energy, residual @ scaled
        if not bool(energy > 1e-10 * (gradient @ (scale * gradient))):
            break
        direction = scaled + energy / before * direction
    return step


# -- groups of classes ------------------------------------------------------------------------------------------------
def imbalance_groups(counts: Tensor, *, many: int = 100, few: int = 20) -> Tensor:
    """The group of each class by its number of training examples, (C,) int64: 0 many (> many), 2 few (< few), 1 between.

    counts: (C,), >= 0. many >= few.
    """
    if counts.ndim != 1 or not bool((counts >= 0).all()):
        refuse("counts", counts.tolist(), "be numbers >= 0 of shape (C,)")
    if not many >= few:
        refuse("many, few", (many, few), "satisfy many >= few")
    return 1 - (counts > many).long() + (counts < few).long()


def prior_groups(prior: Tensor) -> Tensor:
    """The third in which each class lies by its (estimated) pre-training prior, (C,) int64: 0 the largest, 2 the smallest."""
    return prior.argsort(descending=True, stable=True).argsort() * 3 // len(prior)


def group_recall(predictions: Tensor, targets: Tensor, data_groups: Tensor, parameter_groups: Tensor) -> Tensor:
    """Mean recall of the classes in each crossing of two groupings, (3, 3) float64; NaN where there is none.

    predictions, targets: (N,) integer classes. data_groups: (C,) in {0, 1, 2}, the rows (``imbalance_groups``).
    parameter_groups: (C,), the columns (``prior_groups``). A class that ``targets`` do not hold is left out.
    """
    classes = len(data_groups)
    for name, groups in (("data_groups", data_groups), ("parameter_groups", parameter_groups)):
        if groups.shape != (classes,) or groups.is_floating_point() or not bool(((groups >= 0) & (groups < 3)).all()):
            refuse(name, groups.tolist(), f"be integers in {{0, 1, 2}} of shape ({classes},)")
    check_labels(targets, len(targets), classes)
    if predictions.is_floating_point() or predictions.shape != targets.shape:
        raise ArgumentError(
            f"predictions = {predictions.dtype} {tuple(predictions.shape)}: must be integer classes of shape "
            f"{tuple(targets.shape)}. Take logits.argmax(1)"
        )
    counts = torch.bincount(targets, minlength=classes)
    right = torch.bincount(targets[predictions == targets], minlength=classes)
    present = counts > 0
    cell = (3 * data_groups + parameter_groups)[present]
    recall = right[present].double() / counts[present]
    sums = torch.bincount(cell, weights=recall, minlength=9)
    return (sums / torch.bincount(cell, minlength=9)).reshape(3, 3)


# -- the modules ------------------------------------------------------------------------------------------------------
class LogitAdjustedLoss(nn.Module):
    """``logit_adjusted_cross_entropy`` as a module, for training only: predict from the logits as they are.

    >>> loss = LogitAdjustedLoss(torch.tensor([80, 15, 5]))
    >>> round(loss(torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([1])).item(), 5)
    1.11067

    class_counts: (C,), numbers of training examples of each class, all > 0 (or anything proportional). tau: >= 0.
    reduction: "none", "sum" or "mean". Raises ``ArgumentError`` (a ``ValueError``) for anything else. Buffer: ``log_prior`` (C,).
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor, *, tau: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_class_counts(class_counts)
        check_range("tau", tau, 0, math.inf, open_high=True)
        check_choice("reduction", reduction, REDUCTIONS)
        self.tau, self.reduction = tau, reduction
        dtype = torch.promote_types(class_counts.dtype, torch.get_default_dtype())
        self.register_buffer("log_prior", F.log_softmax(class_counts.double().log(), 0).to(dtype))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(logits, targets, self.log_prior, self.tau, self.reduction)

    def extra_repr(self) -> str:
        return f"{len(self.log_prior)}, tau={self.tau}, reduction={self.reduction!r}"


class CosineClassifier(nn.Module):
    """``cosine_logits`` with a learned weight (C, D) and no bias: features (..., N, D) -> (..., N, C).

    in_features, num_classes: >= 1. scale: > 0. The weight's rows start in random directions.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 25.0) -> None:
        super().__init__()
        check_integer("in_features", in_features, 1)
        check_integer("num_classes", num_classes, 1)
        check_range("scale", scale, 0, math.inf, open_low=True, open_high=True)
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, in_features)))

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.weight, self.scale)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, scale={self.scale}"


class FrozenBackbone(nn.Module):
    """A pre-trained model that maps inputs to features (N, D): without gradients, and in evaluation mode whatever is asked.

    Freezes the parameters of the ``model`` that it is given.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> FrozenBackbone:
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.model(*args, **kwargs)
        if not isinstance(features, Tensor) or features.ndim != 2:
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ArgumentError(
                f"backbone output = {given}: must be features (N, D). Wrap the model so that it returns pooled features"
            )
        return features


class AdaptedClassifier(nn.Module):
    """A frozen backbone, a residual bottleneck ``x + up(relu(down(x)))`` that starts as the identity, and a cosine head.

    backbone: maps inputs to features (N, num_features). adapter: width of the bottleneck; 0 for none. scale: the head's.
    Follows timm's convention: ``forward_features``, ``forward_head``, ``get_classifier``.
    """

    def __init__(
        self, backbone: nn.Module, num_features: int, num_classes: int, *, adapter: int = 16, scale: float = 25.0
    ) -> None:
        super().__init__()
        check_integer("adapter", adapter, 0)
        self.backbone = backbone if isinstance(backbone, FrozenBackbone) else FrozenBackbone(backbone)
        self.adapter: nn.Module | None = None
        if adapter:
            self.adapter = nn.Sequential(nn.Linear(num_features, adapter), nn.ReLU(), nn.Linear(adapter, num_features))
            for parameter in self.adapter[2].parameters():
                nn.init.zeros_(parameter)
        self.head = CosineClassifier(num_features, num_classes, scale=scale)

    def adapt(self, features: Tensor) -> Tensor:
        """The backbone's features (N, D), adapted."""
        return features if self.adapter is None else features + self.adapter(features)

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapt(self.backbone(*args, **kwargs))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.head(self.forward_features(*args, **kwargs))

    @torch.no_grad()
    def start_from(self, features: Tensor, targets: Tensor) -> AdaptedClassifier:
        """Turn the head's weights to the class means of the backbone's features (N, D), at length 1; return the model."""
        classes = len(self.head.weight)
        counts = torch.bincount(targets, minlength=classes)
        by_class = features[targets.argsort(stable=True)]
        means = _directions(torch.segment_reduce(by_class, "mean", lengths=counts))
        bad = (~torch.isfinite(means) | (means == 0).all(1, keepdim=True)).any(1).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"features: the mean over class {', '.join(map(str, bad))} is zero or not finite, so that its cosine head has no "
                "direction to start from. Check the backbone's output, and that every class has an example"
            )
        self.head.weight.copy_(means)
        return self


class BackdoorAdjustment(nn.Module):
    """Models whose predictions are averaged by ``backdoor_adjust``: inputs -> (N, C).

    models: at least one; each maps the inputs to logits (N, C). weights, space: see ``backdoor_adjust``.
    """

    def __init__(
        self, models: Sequence[nn.Module], *, weights: Sequence[float] | None = None, space: str = "logits"
    ) -> None:
        super().__init__()
        check_choice("space", space, SPACES)
        if not len(models):
            refuse("models", models, "hold at least one model")
        _shares(weights, len(models))
        self.models, self.weights, self.space = nn.ModuleList(models), weights, space

    def adjust(self, logits: Sequence[Tensor]) -> Tensor:
        """The prediction from the logits of each model."""
        return backdoor_adjust(logits, weights=self.weights, space=self.space)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adjust([model(*args, **kwargs) for model in self.models])

    def extra_repr(self) -> str:
        return f"weights={self.weights}, space={self.space!r}"


def without_head(model: nn.Module, head: nn.Module) -> nn.Module:
    """The model with the identity in the place of its module ``head``, so that it gives features. Changes the model."""
    path = next(name for name, module in model.named_modules() if module is head)
    if not path:
        return nn.Identity()
    model.set_submodule(path, nn.Identity())
    return model


def adapted(
    backbone: nn.Module, features: Tensor, targets: Tensor, num_classes: int, *, seed: int, adapter: int = 16
) -> AdaptedClassifier:
    """An ``AdaptedClassifier`` that starts from the class means of the backbone's ``features`` (N, D) of the training data.

    The adapter's initial weights follow from ``seed``; torch's global generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AdaptedClassifier(backbone, features.shape[1], num_classes, adapter=adapter)
    return model.to(features).start_from(features, targets)


# -- the methods ------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class MembersOutput(Output):
    """The averaged ``prediction`` (N, C), and the ``members`` (M, N, C), the logits of each model."""

    members: Tensor | None = None


class _Joint(nn.Module):
    """The models of a ``BackdoorAdjustment`` in training: gives their logits too, and can start from features kept of each.

    ``cached_rows`` (N,), in place of the inputs, are positions in the tables ``kept`` (n, D_b) of the backbones' features.
    """

    def __init__(self, adjusted: BackdoorAdjustment, kept: list[Tensor]) -> None:
        super().__init__()
        self.adjusted, self.kept = adjusted, kept

    def forward(self, *args: Any, cached_rows: Tensor | None = None, **kwargs: Any) -> MembersOutput:
        models: Any = self.adjusted.models
        if cached_rows is None:
            logits = [model(*args, **kwargs) for model in models]
        else:
            logits = [
                model.head(model.adapt(rows.index_select(0, cached_rows)))
                for model, rows in zip(models, self.kept, strict=True)
            ]
        return MembersOutput(self.adjusted.adjust(logits), members=torch.stack(logits))


class BackdoorAdjustmentMethod(Method):
    """Fine-tune several differently pre-trained backbones with logit adjustment, and average their predictions.

    backbones: modules that map inputs to features (N, D_b). Without them those of the run's model, where it has an attribute
        ``backbones``; else the run's model without its head, which is then the only one.
    adapter: width of each model's residual bottleneck; 0 trains the heads alone.
    tau: weight of the log prior in training, >= 0. space: how predictions are averaged, "logits" or "probs".

    In ``prepare`` the run's model is replaced: each backbone is frozen (its parameters are no longer trained, nor touched by
    weight decay; BatchNorm and dropout stay in evaluation mode) and gets an adapter and a cosine head that starts from the class
    means of its features. Every model is trained as if alone: the loss is the mean of theirs, its gradients their own, so that
    learning rate and weight decay mean the same for any number of backbones (a ``clip_norm`` sees them all at once). ``finish``
    hands over a ``BackdoorAdjustment``.

    Has no neutral setting: frozen backbones with cosine heads are another model than the run's. Replaces the task's loss; needs
    single-label classification with every class in the training set, and an optimizer given as a function.
    """

    name = "backdoor-adjustment"
    paper: ClassVar[Paper | None] = Paper(
        "Rethinking the Bias of Foundation Model under Long-tailed Distribution",
        "Chen, Qin, Li, Chen, Su",
        "ICML 2025",
        "https://arxiv.org/abs/2501.15955",
    )
    # An argument has this name too: the class's is what may be tuned, an object's is how it averages.
    space: ClassVar[Space] = {"tau": Uniform(0.25, 2.5), "space": Choice(SPACES)}

    criterion: LogitAdjustedLoss
    joint: _Joint

    def __init__(
        self, backbones: Sequence[nn.Module] = (), adapter: int = 16, tau: float = 1.0, space: str = "logits"
    ) -> None:
        check_integer("adapter", adapter, 0)
        check_range("tau", tau, 0, math.inf, open_high=True)
        check_choice("space", space, SPACES)
        if isinstance(backbones, nn.Module) or not all(isinstance(b, nn.Module) for b in backbones):
            raise ArgumentError("backbones: must be a sequence of torch.nn.Module. Write backbones=[model, other]")
        self.backbones, self.adapter, self.tau = backbones, adapter, tau
        self.space = space  # type: ignore[assignment, misc]

    def choose_backbones(self, run: Run) -> Sequence[nn.Module]:
        """The backbones to fine-tune."""
        return self.backbones or getattr(run.model, "backbones", ()) or (without_head(run.model, run.head()),)

    def prepare(self, run: Run) -> None:
        if needy := [method.name for method in run.methods if method.needs_features]:
            raise MethodConflictError(
                f"{needy[0]} works on the features of one model, and {self.name} trains several; train them in separate runs"
            )
        counts = class_counts_of(run, self.name)
        self.criterion = LogitAdjustedLoss(counts, tau=self.tau).to(run.device)
        assert run.data is not None  # what the counts are of
        models, kept = [], []
        for number, backbone in enumerate(self.choose_backbones(run)):
            frozen = backbone if isinstance(backbone, FrozenBackbone) else FrozenBackbone(backbone)
            loader = Loader(run.data, run.loader.batch_size if run.loader else 128, device=run.device)
            features, targets = run.predict(loader, frozen.to(run.device))
            # Of the run and not of the method, so that all arms of a trial start from the same adapters.
            seed = run.seed + 1_000_003 * number
            model = adapted(frozen, features, targets, len(counts), seed=seed, adapter=self.adapter)
            models.append(model)
            kept.append(features)
        # What is kept must be what the backbones would see in every epoch.
        fixed = run.augment is None and isinstance(run.data, Examples) and len(run.methods) == 1
        adjusted = BackdoorAdjustment(models, space=self.space)  # type: ignore[arg-type]
        self.joint = _Joint(adjusted, kept if fixed else [])
        run.model, run.inference_model = self.joint, self.joint.adjusted

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        if not self.joint.kept or batch.index is None:
            return batch
        return replace(batch, inputs={"cached_rows": batch.index})

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert isinstance(output, MembersOutput) and output.members is not None
        losses = torch.stack([self.criterion(logits, batch.targets) for logits in output.members])
        total = losses.sum()
        # The value of the mean, the gradient of the sum: that of every model alone.
        return total - (total - losses.mean()).detach()

    def finish(self, run: Run) -> None:
        run.model = run.inference_model = self.joint.adjusted
        self.joint.kept = []


class SamePretrainingEnsemble(BackdoorAdjustmentMethod):
    """The control for backdoor adjustment: as many logit-adjusted models, but of one pre-training, averaged.

    members: number of models, >= 1. They share the first backbone and differ in their adapters' initial weights; where no
    ``backbones`` are given and the run's model has an attribute ``replicas``, backbones from several runs of one pre-training,
    these are used in turn. All else as for ``BackdoorAdjustmentMethod``; it has no neutral setting for the same reason.
    """

    name = "same-pretraining-ensemble"
    paper = None

    def __init__(
        self,
        backbones: Sequence[nn.Module] = (),
        adapter: int = 16,
        tau: float = 1.0,
        space: str = "logits",
        members: int = 3,
    ) -> None:
        super().__init__(backbones, adapter, tau, space)
        check_integer("members", members, 1)
        self.members = members

    def choose_backbones(self, run: Run) -> Sequence[nn.Module]:
        same = self.backbones[:1] or getattr(run.model, "replicas", ()) or super().choose_backbones(run)[:1]
        return [same[member % len(same)] for member in range(self.members)]


class CrossEntropyEnsemble(BackdoorAdjustmentMethod):
    """The control for the logit adjustment: the same models of several pre-trainings, fine-tuned with cross-entropy.

    Backdoor adjustment with tau = 0, under which it is an ensemble for test data as skewed as the training data. Arguments as
    there. Has no neutral setting for the same reason.
    """

    name = "cross-entropy-ensemble"
    paper = None
    space: ClassVar[Space] = {"space": Choice(SPACES)}

    def __init__(self, backbones: Sequence[nn.Module] = (), adapter: int = 16, space: str = "logits") -> None:
        super().__init__(backbones, adapter, 0.0, space)


class BestPretraining(BackdoorAdjustmentMethod):
    """The control for the averaging: fine-tune on every pre-training, and keep the model that is best on validation data.

    Chosen after each epoch by balanced accuracy; costs M fine-tunings and one forward pass at prediction. Arguments as for
    ``BackdoorAdjustmentMethod``. Needs validation data. Has no neutral setting for the same reason.
    """

    name = "best-pretraining"
    paper = None
    space: ClassVar[Space] = {"tau": Uniform(0.25, 2.5)}

    def __init__(self, backbones: Sequence[nn.Module] = (), adapter: int = 16, tau: float = 1.0) -> None:
        super().__init__(backbones, adapter, tau)

    def prepare(self, run: Run) -> None:
        if run.validation is None:
            refuse("validation", None, f"be given: {self.name} chooses the best model on it")
        super().prepare(run)

    def epoch_end(self, run: Run) -> None:
        scores = [balanced_accuracy(*run.predict(run.validation, model)) for model in self.joint.adjusted.models]
        run.inference_model = self.joint.adjusted.models[scores.index(max(scores))]

    def finish(self, run: Run) -> None:
        super().finish(run)
        self.epoch_end(run)  # a resumed run may have no epoch left
        run.model = run.inference_model
