"""GIFD: how much of a client's data can be recovered from the update that it sends? A measuring instrument for one's own set-up.

A gradient is a function of the batch it was computed on, and a small batch can often be read back from it. GIFD searches images
that reproduce an update, in the feature spaces of a public generative model, one stage after the other. Here it audits: on your
own model, and on updates simulated from data whose truth you hold, it says in dB how close the recovered images come, so that a
defence can be chosen by evidence. It attacks nobody, and changes nothing in training.

## Defences first
1. Show no single update: secure aggregation, or a server that you run yourself.
2. Larger batches and more local steps before sending: each example has less weight in what is sent.
3. Noise calibrated to a clipping bound, with a privacy accountant (differential privacy): the only one that gives a guarantee.
4. Sparsification and noise relative to the gradient: cheap, and no guarantee. Clipping alone hides nothing from an attack that
   compares directions.
5. No first linear layer with a bias on raw inputs: with a batch of one it gives the input away by a division (``exact_leak``).

``equipoise compare privacy-audit`` measures 2 to 4 on your model.

## The formula
For weights theta, loss l, an update `g*` of one tensor for each parameter, and a generator of stages `s_0 .. s_{L-1}`:

    g(x)      =  grad_theta l(F_theta(x), y)                     a deterministic defence, known to the auditor, is applied to it
    D         =  1 - <g, g*> / (||g|| ||g*||)                    over all tensors jointly; or l2, l1: sums over the tensors' number
    J(x)      =  D + tv TV(x) + image_norm ||x||_2 / (H W)
    stage k   :  minimise J(s_{L-1}(... s_k(h))) over h by Adam, from h = z (k = 0) or from stage k-1's result (k > 0)
                 k = 0: every z_b keeps its norm;  k > 0: h stays in an l1 ball of radius R_k around its start
    result    =  the stage whose clamped image has the least D

Inversion in the latent space alone is K = 1; in pixel space Adam works on x.

## When to use
Before a federation starts: on a model and batch size that you intend to use, with each defence that you consider. Pass true labels,
and as prior a generator trained on public data of the same kind.

## When not
As a proof of safety: an attack that fails here says that these attacks, with this many steps, failed. Models with ReLU have almost
everywhere no second derivative, and the search is then worse than it need be. BatchNorm must be in evaluation mode in the update's
computation too: the audit computes it so.

## Cost
Sum of steps times (the tail of the generator forward and backward + about three passes of the model), for every restart and
defence; the l1 projection is one sort of each example's features a step. Training costs nothing.

## In a distributed run
As a method it runs on the one client that is named, on its own data; numbers alone are sent.

## Source
Hao Fang, Bin Chen, Xuan Wang, Zhi Wang, Shu-Tao Xia: GIFD: A Generative Gradient Inversion Method with Feature Domain
Optimization. ICCV 2023, arXiv:2308.04699. Two slips of the published code are not followed: of several restarts it returns the last
one's image, and it scores the image of the step before the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, NonFiniteError, check_choice, check_integer, check_range, refuse
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update
from equipoise.federated.defences import (
    ClippedUpdates,
    Defence,
    LargerBatches,
    NoisyUpdates,
    SparseUpdates,
    clip_gradients,
    noise_gradients,
    sparsify_gradients,
)
from equipoise.federated.params import Params, check_same
from equipoise.training.losses import precise
from equipoise.training.method import Paper
from equipoise.training.space import Space

__all__ = [
    "GIFD",
    "AuditRow",
    "ClippedUpdates",
    "GIFDResult",
    "LargerBatches",
    "LeakageAudit",
    "NoisyUpdates",
    "Recovery",
    "SparseUpdates",
    "batch_gradients",
    "clip_gradients",
    "exact_leak",
    "gifd",
    "gradient_matching_loss",
    "infer_labels",
    "invert_pixels",
    "match_images",
    "noise_gradients",
    "project_l1_ball",
    "psnr",
    "ramp_lr",
    "sparsify_gradients",
    "ssim",
    "total_variation",
    "update_gradients",
]

METRICS = ("cosine", "l2", "l1")
Metric = Literal["cosine", "l2", "l1"]
LossFn = Callable[[Tensor, Tensor], Tensor]
Gradients = Callable[[Sequence[Tensor]], Sequence[Tensor]]


# -- the parts of the search ------------------------------------------------------------------------------------------
def gradient_matching_loss(grads: Sequence[Tensor], target: Sequence[Tensor], *, metric: Metric = "cosine") -> Tensor:
    """The distance D of two lists of n gradients, all tensors jointly: a scalar, differentiable in ``grads``.

    metric: "cosine" (``1 - <g, t> / (||g|| ||t||)``, in [0, 2]), "l2" (``sum_i ||g_i - t_i||^2 / n``) or "l1" (of the 1-norms).
    Raises ``ArgumentError``: lists that do not fit, an unknown metric, a target of zeros with "cosine".
    """
    _check_target(target, grads, "grads", metric)
    return _Distance(target, metric)(grads)


class _Distance:
    """D to one target, whose part of the work is done once."""

    def __init__(self, target: Sequence[Tensor], metric: Metric) -> None:
        self.metric, self.count = metric, len(target)
        self.target = _flat(target).detach()
        if metric == "cosine":
            self.target = F.normalize(_scaled(self.target), dim=0)

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        flat = _flat(grads)
        if self.metric == "cosine":
            flat = _scaled(flat)
            tiny = torch.finfo(flat.dtype).tiny
            return 1 - torch.dot(flat, self.target) / torch.dot(flat, flat).clamp_min(tiny).sqrt()
        difference = flat - self.target
        return (difference.square() if self.metric == "l2" else difference.abs()).sum() / self.count


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([precise(tensor).reshape(-1) for tensor in tensors])


def _scaled(flat: Tensor) -> Tensor:
    """Over its largest magnitude, so that no square over- or underflows."""
    largest = flat.detach().abs().amax()
    return flat / torch.where(largest > 0, largest, 1)


def project_l1_ball(x: Tensor, radius: float) -> Tensor:
    """The nearest point to each example of x (B, ...) whose 1-norm is at most ``radius`` > 0: soft thresholding, by one sort."""
    check_range("radius", radius, 0, open_low=True)
    flat = precise(x).flatten(1)
    size = flat.abs()
    sums, ordered = size.sum(1, keepdim=True), size.sort(1, descending=True).values
    counts = torch.arange(1, flat.shape[1] + 1, device=x.device, dtype=flat.dtype)
    excess = ordered.cumsum(1, dtype=torch.float64) - radius
    kept = (ordered * counts > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, kept - 1) / kept).to(flat.dtype)
    projected = flat.sign() * (size - threshold).clamp_min(0)
    return torch.where(sums <= radius, flat, projected).view(x.shape).to(x.dtype)


def ramp_lr(t: float, lr: float, *, rampup: float = 0.05, rampdown: float = 0.75) -> float:
    """The rate at the share t in [0, 1] of steps: linear up over ``rampup``, half a cosine down over ``rampdown``, in (0, 1]."""
    check_range("t", t, 0, 1)
    check_range("rampup", rampup, 0, 1, open_low=True)
    check_range("rampdown", rampdown, 0, 1, open_low=True)
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / rampdown))
    return lr * down * min(1.0, t / rampup)


def infer_labels(weight_grad: Tensor, num: int) -> Tensor:
    """The ``num`` classes of a batch with distinct labels, ascending (num,), from the last layer's weight gradient (C, D).

    Its row sums are negative for the classes that are present, where the last features are not (ReLU): those with the least sums.
    Repeated labels cannot be seen. Raises ``ArgumentError``: num < 1, num > C.
    """
    if weight_grad.ndim != 2:
        refuse("weight_grad", tuple(weight_grad.shape), "have the shape (C, D)")
    check_integer("num", num, 1, len(weight_grad))
    return precise(weight_grad).sum(1).argsort(stable=True)[:num].sort().values


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones, over a batch (B, C, H, W): a scalar."""
    _check_images("x", x)
    across, down = x.diff(dim=3), x.diff(dim=2)
    return sum((d.abs().mean() for d in (across, down) if d.numel()), x.new_zeros(()))


def psnr(x: Tensor, ref: Tensor, *, data_range: float = 1.0) -> Tensor:
    """``10 log10(data_range^2 / mse)`` of each image, (B,), in dB; infinite for identical ones. x, ref: (B, ...)."""
    _check_pair(x, ref, data_range)
    error = (precise(x) - precise(ref)).flatten(1).square().mean(1)
    return 10 * (data_range**2 / error).log10()


def ssim(x: Tensor, ref: Tensor, *, data_range: float = 1.0, window: int = 7) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each image, (B,), 1 for identical ones. x, ref: (B, C, H, W).

    Means, variances and covariance (unbiased) over all square windows inside the image of ``window`` pixels a side, or of the
    largest odd number that fits; K1 = 0.01, K2 = 0.03.
    """
    _check_images("x", x)
    _check_pair(x, ref, data_range)
    check_integer("window", window, 1)
    side = min(window, *x.shape[2:])
    side -= 1 - side % 2
    a, b = precise(x), precise(ref)
    mean = lambda image: F.avg_pool2d(image, side, stride=1)  # noqa: E731
    unbiased = side**2 / max(1, side**2 - 1)
    ma, mb = mean(a), mean(b)
    va, vb, cov = (unbiased * (mean(p * q) - mean(p) * mean(q)) for p, q in ((a, a), (b, b), (a, b)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return found.flatten(1).mean(1)


def match_images(images: Tensor, truth: Tensor, labels: Tensor | None = None) -> Tensor:
    """``images`` (B, ...) in the order of ``truth`` (B, ...) that has the least squared error; with labels (B,), within each class.

    The order of a batch leaves no trace in its gradient.
    """
    from scipy.optimize import linear_sum_assignment

    if images.shape != truth.shape:
        refuse("images", tuple(images.shape), f"have the shape of truth, {tuple(truth.shape)}")
    cost = torch.cdist(images.flatten(1).double(), truth.flatten(1).double()).square()
    cost = cost.nan_to_num(nan=1e30, posinf=1e30)
    if labels is not None:
        cost = cost + (labels[:, None] != labels) * (1 + cost.sum())
    rows, columns = linear_sum_assignment(cost.T.cpu().numpy())
    assert (rows == range(len(rows))).all()
    return images[torch.as_tensor(columns, device=images.device)]


def batch_gradients(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, loss_fn: LossFn = F.cross_entropy
) -> list[Tensor]:
    """What one step on a batch sends: the gradient of the mean loss for each of ``model.parameters()``, in evaluation mode."""
    with _prepared(model) as parameters:
        return [grad.detach() for grad in _gradients(model, parameters, inputs, labels, loss_fn, create_graph=False)]


def update_gradients(model: nn.Module, sent: Params, local: Params, lr: float) -> list[Tensor]:
    """``(sent - local) / lr`` in the order of ``model.parameters()``: the gradient, after one plain step of SGD at ``lr``."""
    check_range("lr", lr, 0, open_low=True)
    names = [name for name, _ in model.named_parameters()]
    for given, name in ((sent, "sent"), (local, "local")):
        check_same({key: given[key] for key in names if key in given}, dict(model.named_parameters()), name)
    difference = torch._foreach_sub([sent[name] for name in names], [local[name] for name in names])
    return list(torch._foreach_div(list(difference), lr))


def exact_leak(model: nn.Module, target: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """What a first linear layer with bias gives away without a search: ``dl/dW[i] / dl/db[i]`` of every unit, (units, *shape).

    With a batch of one each row is the input; in a larger one a mean of inputs, in which a unit that a single example drives (ReLU)
    shows that example. shape: of one input. Largest bias gradient first. Empty where the model does not begin with such a layer.
    """
    first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    empty = torch.zeros(0, *shape)
    if not isinstance(first, nn.Linear) or first.bias is None or first.in_features != math.prod(shape):
        return empty
    position = {id(p): i for i, p in enumerate(model.parameters())}
    weight, bias = precise(target[position[id(first.weight)]]), precise(target[position[id(first.bias)]])
    order = bias.abs().argsort(descending=True)
    order = order[bias[order] != 0]
    return (weight[order] / bias[order, None]).reshape(-1, *shape)


# -- the search -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GIFDResult:
    """What a search found.

    images: (B, C, H, W), of the stage with the least score, ``score``; stage: its number, from 0. stage_images, stage_scores (K,):
    of every stage. A score is D of the clamped images, without regularisers.
    """

    images: Tensor
    stage: int
    score: float
    stage_images: tuple[Tensor, ...]
    stage_scores: Tensor


def gifd(
    model: nn.Module,
    target: Sequence[Tensor],
    labels: Tensor,
    stages: Sequence[nn.Module],
    z0: Tensor,
    *,
    steps: Sequence[int],
    lr: float | Sequence[float] = 0.1,
    radius: Sequence[float | None] | None = None,
    loss_fn: LossFn = F.cross_entropy,
    metric: Metric = "cosine",
    tv: float = 1e-4,
    image_norm: float = 1e-6,
    defense: Gradients | None = None,
    clamp: tuple[float, float] = (0.0, 1.0),
) -> GIFDResult:
    """Search images that give the gradients ``target``, in the latent space of a generator and then in its stages' features.

    model: audited; as it is, in evaluation mode. target: one tensor for each of ``model.parameters()``, in their order.
    labels: (B,) int64. stages: the generator's; the last gives images (B, C, H, W) as the model takes them. z0: (B, ...).
    steps: Adam's steps in each of the first K stages, each >= 1. lr: of all, or of each stage; see ``ramp_lr``.
    radius: of each stage's l1 ball, > 0 or None; the first is not used, where examples of z keep their norm.
    tv, image_norm: weights >= 0 of the regularisers. defense: a deterministic one, applied to the gradients of candidates.
    clamp: range of valid inputs, as the model takes them. Raises ``ArgumentError``; ``NonFiniteError`` if every score is NaN.
    """
    count = len(steps)
    if not 1 <= count <= len(stages):
        refuse("steps", list(steps), f"hold from 1 to {len(stages)} numbers, at most one for each stage")
    for value in steps:
        check_integer("steps", value, 1)
    rates = [float(lr)] * count if isinstance(lr, int | float) else list(lr)
    radii = [None] * count if radius is None else list(radius)
    for name, values in (("lr", rates), ("radius", radii)):
        if len(values) != count:
            refuse(name, values, f"hold {count} numbers, one for each entry of steps")
    for size in radii:
        if size is not None:
            check_range("radius", size, 0, open_low=True)
    if z0.ndim < 1 or len(z0) != len(labels):
        refuse("z0", tuple(z0.shape), f"have {len(labels)} examples, as labels have")
    _check_weights(clamp, tv=tv, image_norm=image_norm, lr=rates)
    with _prepared(model, stages) as parameters:
        objective = _Objective(model, parameters, target, labels, loss_fn, metric, tv, image_norm, defense)
        h, images, scores = z0.detach(), [], []
        for k in range(count):
            render = _chain(stages[k:])
            start, limit = h, radii[k]
            inside = None if limit is None else _ball(start, limit)
            h = _search(start, render, objective, steps[k], rates[k], _sphere(start) if k == 0 else inside)
            with torch.no_grad():
                images.append(render(h).clamp(*clamp))
                following = stages[k](h) if k + 1 < count else h
            scores.append(objective.score(images[-1]))
            h = following.detach()
    return _least(images, scores)


def invert_pixels(
    model: nn.Module,
    target: Sequence[Tensor],
    labels: Tensor,
    shape: Sequence[int],
    *,
    steps: int,
    lr: float = 0.1,
    tv: float = 1e-4,
    clamp: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    loss_fn: LossFn = F.cross_entropy,
    metric: Metric = "cosine",
    defense: Gradients | None = None,
) -> GIFDResult:
    """The same search without a generator: Adam on images of ``shape`` (B, C, H, W), clamped after each step, from uniform noise.

    lr follows ``ramp_lr``, in units of the range's length. Other arguments: see ``gifd``.
    """
    check_integer("steps", steps, 1)
    if len(shape) != 4 or shape[0] != len(labels):
        refuse("shape", tuple(shape), f"be (B, C, H, W) with B = {len(labels)}, as labels have")
    _check_weights(clamp, tv=tv, lr=[lr])
    low, high = clamp
    like = next(model.parameters())
    device = like.device if generator is None else generator.device
    noise = torch.rand(tuple(shape), generator=generator, device=device).to(like)
    with _prepared(model) as parameters:
        objective = _Objective(model, parameters, target, labels, loss_fn, metric, tv, 0.0, defense)
        start = low + (high - low) * noise
        identity = lambda x: x  # noqa: E731
        x = _search(start, identity, objective, steps, lr * (high - low), lambda v: v.clamp_(low, high))
        return _least([x], [objective.score(x)])


class _Objective:
    """J and D of candidate images."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        target: Sequence[Tensor],
        labels: Tensor,
        loss_fn: LossFn,
        metric: Metric,
        tv: float,
        image_norm: float,
        defense: Gradients | None,
    ) -> None:
        _check_target(target, parameters, "model.parameters()", metric)
        device = parameters[0].device
        self.model, self.parameters, self.labels = model, parameters, labels.to(device)
        self.distance_to = _Distance([t.to(device) for t in target], metric)
        self.loss_fn, self.tv, self.image_norm, self.defense = loss_fn, tv, image_norm, defense

    def distance(self, images: Tensor, create_graph: bool = True) -> Tensor:
        grads: Sequence[Tensor] = _gradients(
            self.model, self.parameters, images, self.labels, self.loss_fn, create_graph=create_graph
        )
        return self.distance_to(grads if self.defense is None else self.defense(grads))

    def __call__(self, images: Tensor) -> Tensor:
        total = self.distance(images)
        if self.tv:
            total = total + self.tv * total_variation(images)
        if self.image_norm:
            total = total + self.image_norm * torch.linalg.vector_norm(images) / math.prod(images.shape[2:])
        return total

    def score(self, images: Tensor) -> Tensor:
        return self.distance(images, create_graph=False).detach()


def _search(
    start: Tensor,
    render: Callable[[Tensor], Tensor],
    objective: _Objective,
    steps: int,
    lr: float,
    project: Callable[[Tensor], object] | None,
) -> Tensor:
    """Minimise ``objective(render(v))`` by Adam from ``start``; ``project`` changes v in place after each step."""
    v = start.clone().requires_grad_()
    adam = torch.optim.Adam([v], lr=lr)
    for step in range(steps):
        adam.param_groups[0]["lr"] = ramp_lr(step / steps, lr)
        (v.grad,) = torch.autograd.grad(objective(render(v)), [v])
        adam.step()
        if project is not None:
            with torch.no_grad():
                project(v)
    return v.detach()


def _sphere(start: Tensor) -> Callable[[Tensor], object]:
    """Bring every example back to the norm that it had at the start."""
    norms = lambda v: torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.ndim - 1))  # noqa: E731
    before = norms(start)

    def project(v: Tensor) -> None:
        now = norms(v)
        v.mul_(torch.where(now > 0, before / now, 1))

    return project


def _ball(start: Tensor, radius: float) -> Callable[[Tensor], object]:
    return lambda v: v.copy_(start + project_l1_ball(v - start, radius))


def _chain(stages: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    def render(h: Tensor) -> Tensor:
        for stage in stages:
            h = stage(h)
        return h

    return render


def _least(images: list[Tensor], scores: list[Tensor]) -> GIFDResult:
    found = torch.stack(scores)
    comparable = found.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    stage = int(comparable.argmin())
    if not math.isfinite(comparable[stage]):
        raise NonFiniteError("the gradients of every stage's images are NaN or infinite: lower lr, or check the update")
    return GIFDResult(images[stage], stage, float(found[stage]), tuple(images), found)


def _gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    images: Tensor,
    labels: Tensor,
    loss_fn: LossFn,
    *,
    create_graph: bool,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        loss = loss_fn(model(images), labels)
        return torch.autograd.grad(
            loss, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )


@contextmanager
def _prepared(model: nn.Module, stages: Sequence[nn.Module] = ()) -> Iterator[list[nn.Parameter]]:
    """Model and generator in evaluation mode, the former's parameters with gradients, the latter's without; restored after."""
    parameters = list(model.parameters())
    if not parameters:
        raise ArgumentError("model has no parameters: there is no update to audit")
    frozen = list(itertools.chain.from_iterable(stage.parameters() for stage in stages))
    modes = [(m, m.training) for part in (model, *stages) for m in part.modules()]
    asked = [(p, p.requires_grad) for p in (*parameters, *frozen)]
    try:
        for part in (model, *stages):
            part.eval()
        for p in frozen:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield parameters
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in asked:
            p.requires_grad_(flag)


# -- the audit --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recovery:
    """How well an attack recovered a batch: ``mean`` and ``max`` of the images' PSNR in dB, their mean ``ssim``, the images in the
    order of the truth, and the attack's own ``score`` (NaN where it has none)."""

    mean: float
    max: float
    ssim: float
    images: Tensor
    score: float = math.nan


@dataclass(frozen=True)
class AuditRow:
    """What was recovered under one defence: without a search (``exact``), in pixel space, in latent space, and by GIFD.

    exact is None where the model does not begin with a linear layer with bias; latent and gifd are, without a generator.
    """

    exact: Recovery | None
    pixel: Recovery
    latent: Recovery | None = None
    gifd: Recovery | None = None

    @property
    def attacks(self) -> dict[str, Recovery]:
        """Those that were made, by name; the exact leak first."""
        names = ("exact", "pixel", "latent", "gifd")
        return {name: found for name in names if (found := getattr(self, name)) is not None}

    @property
    def worst(self) -> tuple[str, Recovery]:
        """The attack that recovered most, by the mean PSNR."""
        return max(self.attacks.items(), key=lambda item: item[1].mean)

    def __str__(self) -> str:
        return ", ".join(f"{name} {r.mean:.1f} dB (best image {r.max:.1f})" for name, r in self.attacks.items())


class LeakageAudit:
    """Attacks simulated updates of a model of your own, with and without defences, and says how close the images come.

    >>> audit = LeakageAudit(decoder, lambda count, draw: torch.randn(count, 8, generator=draw), steps=[150] * 4)  # doctest: +SKIP
    >>> rows = audit.audit(model, (images, labels), defenses=[NoisyUpdates(0.5), SparseUpdates(0.1)])  # doctest: +SKIP
    >>> print(rows["none"])  # doctest: +SKIP

    stages: of a generator trained on public data; () for pixel inversion alone. z_sampler: ``(count, generator) -> z``.
    steps, lr, radius, metric, tv, image_norm, loss_fn, clamp: see ``gifd``. The other searches have as many steps in all.
    restarts: searches of each kind from different starts, >= 1; the one with the least score counts. seed: of starts and noise.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module] = (),
        z_sampler: Callable[[int, torch.Generator], Tensor] | None = None,
        *,
        steps: Sequence[int] = (150, 150, 150),
        lr: float | Sequence[float] = 0.1,
        radius: Sequence[float | None] | None = None,
        metric: Metric = "cosine",
        tv: float = 1e-4,
        image_norm: float = 1e-6,
        loss_fn: LossFn = F.cross_entropy,
        clamp: tuple[float, float] = (0.0, 1.0),
        restarts: int = 4,
        seed: int = 0,
    ) -> None:
        check_integer("restarts", restarts, 1)
        check_choice("metric", metric, METRICS)
        if stages and z_sampler is None:
            raise ArgumentError("z_sampler = None: a generator needs one, (count, generator) -> z")
        if not steps or (stages and len(steps) > len(stages)):
            refuse("steps", list(steps), f"hold from 1 to {len(stages) or 'any number of'} numbers")
        for value in steps:
            check_integer("steps", value, 1)
        self.stages, self.z_sampler, self.steps, self.radius = list(stages), z_sampler, list(steps), radius
        self.lr, self.restarts, self.seed = lr, restarts, seed
        self.common: dict[str, Any] = {"metric": metric, "tv": tv, "loss_fn": loss_fn, "clamp": clamp}
        self.image_norm = image_norm

    def audit(
        self,
        model: nn.Module,
        batch: Any,
        *,
        defenses: Sequence[Defence | Gradients] | Mapping[str, Defence | Gradients] = (),
    ) -> dict[str, AuditRow]:
        """A row for "none" and for each defence, by its name.

        batch: (images (B, C, H, W), labels (B,)), or a ``Batch``: the truth, of which the attacks know the labels alone.
        defenses: ``Defence`` methods, or functions of a list of gradients, which are taken to be deterministic and known to the
        attacker. Keys of a mapping are the names.
        """
        images, labels = (batch.inputs, batch.targets) if hasattr(batch, "inputs") else batch
        _check_images("batch", images)
        grads = batch_gradients(model, images, labels, loss_fn=self.common["loss_fn"])
        named = dict(defenses) if isinstance(defenses, Mapping) else {_name(d): d for d in defenses}
        for name, defence in named.items():
            if getattr(defence, "larger", 1) > 1:
                raise ArgumentError(
                    f"defenses holds {name}: changes the batch, not its update. Audit a larger batch instead"
                )
        return {
            name: self._row(model, grads, images, labels, defence) for name, defence in {"none": None, **named}.items()
        }

    def attack(self, model: nn.Module, images: Tensor, labels: Tensor, defence: Defence | Gradients | None) -> AuditRow:
        """The row of one defence alone, or of none."""
        grads = batch_gradients(model, images, labels, loss_fn=self.common["loss_fn"])
        return self._row(model, grads, images, labels, defence)

    def _row(
        self, model: nn.Module, grads: list[Tensor], images: Tensor, labels: Tensor, defence: Defence | Gradients | None
    ) -> AuditRow:
        draw = torch.Generator().manual_seed(self.seed)
        known: Gradients | None
        if isinstance(defence, Defence):
            target: Sequence[Tensor] = defence.defend(grads, draw)
            known = None if defence.random else defence.defend
        else:
            known = defence
            target = grads if known is None else known(grads)
        target = [tensor.detach() for tensor in target]
        low, high = self.common["clamp"]

        def recovery(found: Tensor, score: float = math.nan) -> Recovery:
            quality = psnr(found, images, data_range=high - low)
            similar = ssim(found, images, data_range=high - low)
            return Recovery(float(quality.mean()), float(quality.max()), float(similar.mean()), found, score)

        def best(search: Callable[[], GIFDResult]) -> Recovery:
            found = min((search() for _ in range(self.restarts)), key=lambda result: result.score)
            return recovery(match_images(found.images, images, labels), found.score)

        settings = {**self.common, "defense": known}
        pixel = best(
            lambda: invert_pixels(
                model,
                target,
                labels,
                images.shape,
                steps=sum(self.steps),
                lr=self.lr if isinstance(self.lr, int | float) else self.lr[0],
                generator=draw,
                **settings,
            )
        )
        leaked = exact_leak(model, target, images.shape[1:])
        exact = None
        if len(leaked):
            # The truth chooses among the units: an upper bound of what they give away.
            nearest = torch.cdist(images.flatten(1).to(leaked), leaked.flatten(1)).argmin(1)
            exact = recovery(leaked[nearest].clamp(low, high).to(images.dtype))
        if not self.stages:
            return AuditRow(exact, pixel)

        def generative(steps: list[int], rates: float | Sequence[float], radius: Any) -> Recovery:
            def search() -> GIFDResult:
                z = self.z_sampler(len(labels), draw).to(images)  # type: ignore[misc]
                options = {**settings, "image_norm": self.image_norm, "lr": rates, "radius": radius}
                return gifd(model, target, labels, self.stages, z, steps=steps, **options)

            return best(search)

        first = self.lr if isinstance(self.lr, int | float) else self.lr[0]
        return AuditRow(
            exact, pixel, generative([sum(self.steps)], first, None), generative(self.steps, self.lr, self.radius)
        )

    def __repr__(self) -> str:
        return (
            f"LeakageAudit({len(self.stages)} stages, steps={self.steps}, restarts={self.restarts}, seed={self.seed})"
        )


def _name(defence: Any) -> str:
    return str(getattr(defence, "name", "") or getattr(defence, "__name__", type(defence).__name__))


# -- the method -------------------------------------------------------------------------------------------------------
QUERY = "leakage-audit"
MOST = 100.0  # dB in reports: an exact leak is infinite, which is no number to send or to average


class GIFD(FederatedMethod):
    """Audit one client's update after training: how much of a batch its gradient gives away. Changes nothing in training.

    audit: what to attack with; by default pixel inversion alone, without a generator. client: number of the client that agreed to
        it, whose own app must hold this method. batch_size: of the step that is audited. defences: ``Defence`` methods to audit.

    After the last round the client computes the gradient of one batch of its own at the final parameters, attacks it there, and
    sends the figures alone: ``server.results["leakage"]`` has the mean PSNR in dB (at most 100) by ``"<defence>/<attack>"``.
    """

    name = "gifd"
    paper = Paper(
        "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization",
        "Fang, Chen, Wang, Wang, Xia",
        "ICCV 2023",
        "https://arxiv.org/abs/2308.04699",
    )
    space: ClassVar[Space] = {}
    neutral: ClassVar[dict[str, Any] | None] = {}

    def __init__(
        self,
        audit: LeakageAudit | None = None,
        *,
        client: int = 0,
        batch_size: int = 4,
        defences: Sequence[Defence] = (),
    ) -> None:
        check_integer("client", client, 0)
        check_integer("batch_size", batch_size, 1)
        self.audit = LeakageAudit(restarts=1) if audit is None else audit
        self.client, self.batch_size, self.defences = client, batch_size, tuple(defences)

    def answer(self, client: Client, sent: Sent) -> Update | None:
        if sent.query != QUERY:
            return None
        batch = next(client.batches(1, self.batch_size), None)
        if batch is None:
            refuse(
                "batch_size", self.batch_size, f"be at least {client.local.least_batch}, the smallest batch that trains"
            )
        rows = self.audit.audit(client.model, batch, defenses=self.defences)
        metrics = {
            f"{name}/{attack}": min(MOST, found.mean)
            for name, row in rows.items()
            for attack, found in row.attacks.items()
        }
        return Update({}, len(client), metrics=metrics, client=client.number)

    def finish(self, server: Server) -> None:  # type: ignore[override]
        if server.ask is None:
            raise ArgumentError("server.ask = None: there are no clients to audit")
        if self.client not in server.clients:
            refuse("client", self.client, f"be one of {sorted(server.clients)}")
        server.results["leakage"] = {
            name: value
            for update in server.ask(QUERY, clients=[self.client])
            for name, value in update.metrics.items()
            if "/" in name
        }


# -- checks -----------------------------------------------------------------------------------------------------------
def _check_target(target: Sequence[Tensor], like: Sequence[Tensor], name: str, metric: Metric) -> None:
    check_choice("metric", metric, METRICS)
    if len(target) != len(like):
        raise ArgumentError(f"target has {len(target)} tensors: must have {len(like)}, one for each of {name}")
    for i, (given, wanted) in enumerate(zip(target, like, strict=True)):
        if given.shape != wanted.shape:
            refuse(f"target[{i}].shape", tuple(given.shape), f"be {tuple(wanted.shape)}, as in {name}")
    if metric == "cosine" and not any(bool(tensor.any()) for tensor in target):
        raise ArgumentError("target is zero: it has no direction to compare. Use metric='l2', or another update")


def _check_weights(clamp: tuple[float, float], *, lr: Sequence[float], **weights: float) -> None:
    if len(clamp) != 2 or not clamp[0] < clamp[1]:
        refuse("clamp", clamp, "be (low, high) with low < high")
    for name, value in weights.items():
        check_range(name, value, 0)
    for value in lr:
        check_range("lr", value, 0, open_low=True)


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim != 4 or not x.numel():
        refuse(f"{name}.shape", tuple(x.shape), "be (B, C, H, W), without an empty axis")


def _check_pair(x: Tensor, ref: Tensor, data_range: float) -> None:
    if x.shape != ref.shape or x.ndim < 2:
        refuse("x.shape", tuple(x.shape), f"be (B, ...) and that of ref, {tuple(ref.shape)}")
    check_range("data_range", data_range, 0, open_low=True)
