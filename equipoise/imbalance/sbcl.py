"""SBCL: subclass-balancing contrastive learning.

On a long tail, supervised contrastive learning gives the large classes most of the room, and pulls all of a class together as
if it were one thing. SBCL splits every large class into clusters about as large as a small class, found in the features that
are being learned and found anew every few epochs: it pulls together examples of one subclass, and, more weakly, those of one
class from different subclasses. A linear classifier is then fitted to the frozen features, all classes counting alike.

Each of B examples has V random views; z is a view's normalised projection, y its class, s its subclass. For view i, A holds
all other views, own the other views of the same example, S those of its subclass (own among them), Y those of its class:

    l1_i  =  - mean over p in S of [ z_i.z_p / tau    - log sum over a in A of exp(z_i.z_a / tau) ]
    l2_i  =  - mean over p in P of [ z_i.z_p / tau_y  - log sum over a in D of exp(z_i.z_a / tau_y) ]
             P = (Y without S) and own,   D = (A without S) and own
    loss  =  mean over all views of ( c l1_i + weight l2_i ),     c = 1, or tau / base_temperature

A class of n_c examples is split into `K_c = max(1, n_c // max(smallest class, min_size))` subclasses. With one subclass a class
and weight 0 this is SupCon; with one subclass an example and weight 0 it is SimCLR. tau_y is larger for a class that is spread
out: `tau phi_c / mean(phi)`, where `phi_c = mean |z - mean of class c| / log(n_c + alpha)` is clipped to its 20th and 80th
percentile over the classes; a class that is not split keeps tau.

Stages of a run: `warm_up` epochs of SupCon; then the loss above, with subclasses and temperatures found anew every `step`
epochs from the unchanged training inputs; in the end the classifier, written into the model's own head. Until then the head
is not trained, so that accuracies measured during training mean nothing.

## When to use
Single-label classification in which few classes hold most examples, the large ones have visible inner structure (a coarse
class of several kinds of things), and inputs have natural random views. Recall of the smallest classes is what gains.

## When not
Without a good augmentation: the two views carry the whole idea. Where logit adjustment with cross-entropy, which costs
nothing, is already good enough: try that first, and SupCon (`weight=0` and `warm_up` as long as the training) second. Large
classes of one kind, which have nothing to be split into. Where calibrated probabilities for the skewed distribution count:
the classifier is fitted as if classes were equally frequent.

## Cost
Two views double a training step. The loss takes O((V B)^2 D), as SupCon does, with two similarity matrices of (V B)^2 numbers
instead of one. Every `step` epochs one pass over the training set without gradient, and clustering: O(n_c K_c D) an iteration
for a class. At the end one more pass, and a convex problem of F x C numbers.

## In a distributed run
Views of all processes are contrasted with each other: the loss is that of the global batch. Every process clusters, and takes
over the result of the first. 2 processes equal 1, but for the random views.

## Source
Hou, Zhang, Wang, Zhou: Subclass-balancing Contrastive Learning for Long-tailed Recognition. ICCV 2023, arXiv:2306.15925; the own
views in P and D, the linear form of tau_y and the clipping as in the authors' code; balanced clustering as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.imbalance.shared import class_counts_of
from equipoise.training.batch import Batch, Output
from equipoise.training.features import FeatureTap
from equipoise.training.gather import gather_rows
from equipoise.training.losses import check_labels, precise, reduce
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform
from equipoise.training.table import table_shape

CLUSTER = ("balanced", "kmeans")
FORMS = ("linear", "exp")


# -- the functional core: the loss ------------------------------------------------------------------------------------
def sbcl_loss(
    features: Tensor,
    labels: Tensor,
    subclasses: Tensor,
    *,
    temperature: float = 0.1,
    class_temperature: Tensor | None = None,
    weight: float = 0.2,
    base_temperature: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``c l1 + weight l2`` of each example (the mean over its views), reduced: "none" (B,), "sum" or "mean".

    features: (B, V, D), B and V >= 2, normalised by the caller. labels: (B,) integer classes. subclasses: (B,) integers;
    examples of one subclass are of one class. temperature: > 0, tau. class_temperature: (C,) > 0, tau_y by label; None is
    ``temperature`` for all. weight: >= 0; 0 leaves l2 out. base_temperature: > 0, then c = tau / base_temperature; None is c = 1.

    Half precision is computed in float32, also under autocast. Values of labels, subclasses and class_temperature are checked
    on the CPU only, where that waits for no device. Raises ``ArgumentError`` (a ``ValueError``).
    """
    _check_settings(temperature, weight, base_temperature)
    _check_batch(features, labels, subclasses, class_temperature)
    same_class, same_subclass = (ids[:, None] == ids for ids in (labels, subclasses))
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    with torch.autocast(features.device.type, enabled=False):
        views = precise(features).transpose(0, 1)  # view-major: anchor v * B + i is view v of example i
        anchors = views.flatten(0, 1)
        similarity = (anchors / temperature) @ anchors.T
        similarity = similarity.fill_diagonal_(-torch.inf)  # an anchor is not its own candidate
        losses = _contrast(views, similarity, temperature, same_subclass, None)
        if base_temperature is not None:
            losses = losses * (temperature / base_temperature)
        if weight > 0:
            tau: float | Tensor = temperature
            if class_temperature is not None:
                tau = class_temperature.detach().to(views)[labels]
                similarity = similarity * (temperature / tau).repeat(len(views))[:, None]
            across = _contrast(views, similarity, tau, (same_class & ~same_subclass) | own, ~same_subclass | own)
            losses = losses + weight * across
    return reduce(losses.mean(0), reduction)


def _contrast(
    views: Tensor, similarity: Tensor, temperature: float | Tensor, positives: Tensor, candidates: Tensor | None
) -> Tensor:
    """Minus the mean over positives p of ``z_i.z_p / t - log sum over candidates a of exp(z_i.z_a / t)``, (V, B).

    views: (V, B, D). similarity: (V B, V B), divided by t, -inf on the diagonal. positives, candidates: (B, B), which
    examples' views count; the diagonal, True, stands for the other views of the same example. None: all are candidates.
    """
    count, size, _ = views.shape
    blocks = similarity.view(count, size, count, size)
    if candidates is not None:
        blocks = blocks.masked_fill(~candidates[:, None, :], -torch.inf)
    log_sum = blocks.flatten(2).logsumexp(2)
    # The sum over positives of z_i.z_p is z_i times their sum, less z_i.z_i: no second pass over the matrix.
    total = positives.to(views) @ views.sum(0)
    pull = (views * (total - views)).sum(2) / (count * positives.sum(1) - 1)
    return log_sum - pull / temperature


def _check_settings(temperature: float, weight: float, base_temperature: float | None) -> None:
    _check_temperature("temperature", temperature)
    check_range("weight", weight, 0, math.inf, open_high=True)
    if base_temperature is not None:
        _check_temperature("base_temperature", base_temperature)


def _check_temperature(name: str, value: float) -> None:
    check_range(name, value, 0, math.inf, open_low=True, open_high=True)


def _check_batch(features: Tensor, labels: Tensor, subclasses: Tensor, class_temperature: Tensor | None) -> None:
    shape = tuple(features.shape)
    if features.ndim != 3 or not features.is_floating_point():
        raise ArgumentError(f"features = {features.dtype} {shape}: must be floating point of shape (B, V, D)")
    if shape[0] < 2 or shape[1] < 2:
        raise ArgumentError(f"features = {shape}: must hold at least 2 examples and 2 views of each, (B, V, D)")
    _check_ids("labels", labels, shape[0])
    _check_ids("subclasses", subclasses, shape[0])
    if class_temperature is not None and class_temperature.ndim != 1:
        refuse("class_temperature", tuple(class_temperature.shape), "have the shape (C,), one number a class")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    mixed = (subclasses[:, None] == subclasses) & (labels[:, None] != labels)
    if bool(mixed.any()):
        i, j = mixed.nonzero()[0].tolist()
        raise ArgumentError(
            f"subclasses = {int(subclasses[i])} for examples of the classes {int(labels[i])} and {int(labels[j])}: must belong to "
            "one class. Number the subclasses of all classes without overlap, as assign_subclasses does"
        )
    if class_temperature is not None:
        _check_classes(labels, len(class_temperature))
        if not bool((class_temperature > 0).all()):
            refuse("class_temperature", class_temperature.min().item(), "be positive for every class")


def _check_ids(name: str, ids: Tensor, count: int) -> None:
    if ids.shape != (count,) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArgumentError(f"{name} = {ids.dtype} {tuple(ids.shape)}: must be integers of shape ({count},)")


def _check_classes(labels: Tensor, num_classes: int) -> None:
    low, high = map(int, labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ArgumentError(f"labels = values in [{low}, {high}]: must lie in [0, {num_classes})")


# -- the functional core: clusters ------------------------------------------------------------------------------------
def num_subclasses(class_counts: Tensor, min_size: int = 10) -> Tensor:
    """``max(1, n_c // max(smallest n, min_size))`` subclasses for a class of n_c examples, (C,) int64.

    class_counts: (C,) integers >= 1. min_size: >= 1.
    """
    check_integer("min_size", min_size, 1)
    counts = torch.as_tensor(class_counts).long()
    if counts.ndim != 1 or not len(counts) or int(counts.min()) < 1:
        refuse("class_counts", counts.tolist(), "hold the number of examples of each class, at least 1")
    return (counts // counts.min().clamp(min=min_size)).clamp(min=1)


@dataclass(frozen=True)
class BalancedKMeansResult:
    """Clusters: ``labels`` (n,) int64, ``centroids`` (K, D), the number of ``iterations``, and whether they ``converged``."""

    labels: Tensor
    centroids: Tensor
    iterations: int
    converged: bool


def balanced_kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    max_iter: int = 50,
    tol: float = 1e-3,
    normalize_rows: bool = False,
    generator: torch.Generator | None = None,
) -> BalancedKMeansResult:
    """Cosine k-means with clusters whose sizes differ by at most 1.

    The pairs of a point and a centroid are taken in order of falling similarity; a pair is accepted if its point is free and
    its cluster holds fewer than ``n // K`` points. The ``n % K`` points that remain follow by the same rule, at most one to a
    cluster. A centroid becomes the mean of its points, until the sum over centroids of how far they moved, squared, is
    below ``tol``.

    x: (n, D), rows finite and not 0. n_clusters: K, in [1, n]. init: "k-means++" or the centroids (K, D). max_iter: >= 1.
    tol: >= 0. normalize_rows: divide each centroid's similarities by their sum first, as the authors' code does (which turns
    their order round where the sum is negative). generator: for k-means++; None is torch's own.
    """
    check_integer("max_iter", max_iter, 1)
    check_range("tol", tol, 0)
    unit, centroids = _start(x, n_clusters, init, generator)

    def assign(similarity: Tensor) -> Tensor:
        if normalize_rows:
            total = similarity.sum(0)
            similarity = similarity / torch.where(total == 0, 1, total)
        return _balanced_assignment(similarity)

    return _lloyd(precise(x.detach()), unit, centroids, assign, max_iter, tol, generator)


def cosine_kmeans(
    x: Tensor, n_clusters: int, *, max_iter: int = 35, tol: float = 1e-3, generator: torch.Generator | None = None
) -> BalancedKMeansResult:
    """Cosine k-means without a bound on the sizes; a cluster without a point starts again at a random one.

    Arguments as for ``balanced_kmeans``.
    """
    unit, centroids = _start(x, n_clusters, "k-means++", generator)
    nearest = lambda similarity: similarity.max(1).indices  # noqa: E731
    return _lloyd(precise(x.detach()), unit, centroids, nearest, max_iter, tol, generator)


def _start(x: Tensor, n_clusters: int, init: str | Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The points, normalised, and the first centroids."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ArgumentError(f"x = {x.dtype} {tuple(x.shape)}: must be floating point of shape (n, D)")
    check_integer("n_clusters", n_clusters, 1, len(x))
    points = precise(x.detach())
    norms = points.norm(dim=1)
    bad = (~(torch.isfinite(norms) & (norms > 0))).nonzero().flatten().tolist()
    if bad:
        raise ArgumentError(
            f"x[{bad[0]}] has the norm {norms[bad[0]].item()}: must be finite and positive, since clusters are found by direction"
        )
    unit = F.normalize(points, dim=1)
    if isinstance(init, Tensor):
        if init.shape != (n_clusters, x.shape[1]):
            refuse("init", tuple(init.shape), f"have the shape ({n_clusters}, {x.shape[1]})")
        return unit, init.detach().to(points)
    check_choice("init", init, ("k-means++",))
    return unit, points[_spread(unit, n_clusters, generator)]


def _spread(unit: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: positions (count,), each drawn with probability ~ 1 - cosine to the nearest one before."""
    device = None if generator is None else generator.device
    draws = torch.rand(count, generator=generator, device=device, dtype=torch.float64).to(unit.device)
    distance = torch.full((len(unit),), 2.0, dtype=torch.float64, device=unit.device)  # the largest there is
    chosen = []
    for draw in draws:
        mass = distance.cumsum(0)
        pick = torch.searchsorted(mass, draw * mass[-1], right=True).clamp(max=len(unit) - 1)
        distance = torch.minimum(distance, (1 - unit @ unit[pick]).clamp(min=0).double())
        chosen.append(pick)
    return torch.stack(chosen)


def _lloyd(
    points: Tensor,
    unit: Tensor,
    centroids: Tensor,
    assign: Callable[[Tensor], Tensor],
    max_iter: int,
    tol: float,
    generator: torch.Generator | None,
) -> BalancedKMeansResult:
    """Assign points to centroids by their cosines (n, K), move centroids to the mean of their points, and again."""
    iteration, shift = 0, math.inf
    while iteration < max_iter and not shift < tol:
        iteration += 1
        labels = assign(unit @ F.normalize(centroids, dim=1).T)
        sizes = torch.bincount(labels, minlength=len(centroids))
        moved = torch.zeros_like(centroids).index_add_(0, labels, points) / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            device = None if generator is None else generator.device
            moved[empty] = points[torch.randint(len(points), (len(empty),), generator=generator, device=device)]
        shift = (moved - centroids).norm(dim=1).sum().item() ** 2
        centroids = moved
    return BalancedKMeansResult(labels, centroids, iteration, shift < tol)


def _balanced_assignment(similarity: Tensor) -> Tensor:
    """The cluster (n,) of each point, from similarities (n, K), greedily; sizes differ by at most 1."""
    n, clusters = similarity.shape
    labels = _greedy(similarity, n // clusters)
    left = (labels < 0).nonzero().flatten()
    if len(left):
        labels[left] = _greedy(similarity[left], 1)
    return labels


def _greedy(similarity: Tensor, capacity: int) -> Tensor:
    """Accept pairs in order of falling similarity while the point is free and its cluster not full: (n,) int64, -1 for none.

    The result is the one matching in which no point and cluster would both rather have each other. So instead of going
    through n K pairs, all free points apply at once to the best cluster that would take them, every cluster keeps its
    ``capacity`` best, and those sent away apply again: a few rounds. Of equals, a cluster takes the first point, and a point
    the first cluster.
    """
    n, clusters = similarity.shape
    labels = torch.full((n,), -1, device=similarity.device)
    # The last that a full cluster keeps: its similarity and its position.
    least = torch.full_like(similarity[0], -torch.inf)
    last = torch.full_like(least, n, dtype=torch.int64)
    free = torch.arange(n, device=similarity.device)
    while len(free):
        wish = similarity[free]
        refused = (wish < least) | ((wish == least) & (free[:, None] > last))
        best, choice = wish.masked_fill_(refused, -torch.inf).max(1)
        free, choice = free[best > -torch.inf], choice[best > -torch.inf]
        labels[free] = choice
        asked = torch.zeros(clusters + 1, dtype=torch.bool, device=labels.device)  # one more, for label -1
        asked[choice] = True
        rows = asked[labels].nonzero().flatten()
        rows = rows[similarity[rows, labels[rows]].argsort(descending=True, stable=True)]
        rows = rows[labels[rows].argsort(stable=True)]
        cluster = labels[rows]
        sizes = torch.bincount(cluster, minlength=clusters)
        place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[cluster]
        full = place == capacity - 1
        least[cluster[full]], last[cluster[full]] = similarity[rows[full], cluster[full]], rows[full]
        free = rows[place >= capacity]
        labels[free] = -1
    return labels


def class_temperatures(
    features: Tensor,
    labels: Tensor,
    n_subclasses: Tensor,
    *,
    temperature: float = 0.1,
    alpha: float = 10.0,
    form: str = "linear",
) -> Tensor:
    """tau_c of each class, (C,): larger for a class that is spread out.

    features: (n, D). labels: (n,) in [0, C), every class with an example. n_subclasses: (C,); where it is 1, or all examples of
    the class coincide, the class gets ``temperature``. temperature: > 0. alpha: >= 0. form: "linear" for
    ``temperature * r``, "exp" for ``temperature * exp(r)``, where r is the spread over its mean.
    """
    _check_temperature("temperature", temperature)
    check_range("alpha", alpha, 0, math.inf, open_high=True)
    check_choice("form", form, FORMS)
    counts = _check_set(features, labels, len(n_subclasses))
    z = precise(features.detach())
    mean = z.new_zeros(len(counts), z.shape[1]).index_add_(0, labels, z) / counts[:, None]
    distance = z.new_zeros(len(counts)).index_add_(0, labels, (z - mean[labels]).norm(dim=1))
    spread = distance / (counts * torch.log(counts + alpha))
    low, high = torch.quantile(spread, spread.new_tensor([0.2, 0.8]))
    spread = spread.clamp(low, high)
    relative = spread / spread.mean()
    scaled = temperature * (relative.exp() if form == "exp" else relative)
    return torch.where((n_subclasses > 1) & (spread > 0), scaled, temperature)


@dataclass(frozen=True)
class SubclassAssignment:
    """``subclass`` (n,) int64, numbered through all classes; ``n_subclasses`` (C,) int64; ``temperature`` (C,)."""

    subclass: Tensor
    n_subclasses: Tensor
    temperature: Tensor


def assign_subclasses(
    features: Tensor,
    labels: Tensor,
    *,
    min_size: int = 10,
    temperature: float = 0.1,
    alpha: float = 10.0,
    cluster: str = "balanced",
    generator: torch.Generator | None = None,
) -> SubclassAssignment:
    """Split every class into subclasses of about the size of the smallest, and find the classes' temperatures.

    features: (n, D), normalised projections of the whole training set. labels: (n,) in [0, C), every class with an example.
    min_size: of a subclass, >= 1. cluster: "balanced" (``balanced_kmeans``) or "kmeans" (``cosine_kmeans``, faster; sizes
    differ). temperature, alpha: see ``class_temperatures``. generator: for the first centroids; None is torch's own.
    """
    check_choice("cluster", cluster, CLUSTER)
    counts = _check_set(features, labels)
    k = num_subclasses(counts, min_size)
    kmeans = balanced_kmeans if cluster == "balanced" else cosine_kmeans
    subclass = (k.cumsum(0) - k)[labels]
    by_class = labels.argsort(stable=True).split(counts.tolist())
    for clusters, rows in zip(k.tolist(), by_class, strict=True):
        if clusters > 1:
            subclass[rows] += kmeans(features[rows], clusters, generator=generator).labels
    return SubclassAssignment(
        subclass, k, class_temperatures(features, labels, k, temperature=temperature, alpha=alpha)
    )


def _check_set(features: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Refuse features that are not (n, D) and labels that are not classes (n,), all present; return their counts (C,)."""
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ArgumentError(
            f"features = {features.dtype} {tuple(features.shape)}: must be floating point (n, D), n > 0"
        )
    _check_ids("labels", labels, len(features))
    _check_classes(labels, int(labels.max()) + 1 if num_classes is None else num_classes)
    counts = torch.bincount(labels, minlength=num_classes or 0)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        raise ArgumentError(
            f"labels hold no example of class {', '.join(map(str, absent))}: every one of the {len(counts)} classes needs one. "
            "Number the classes without gaps"
        )
    return counts


def balanced_classifier(features: Tensor, labels: Tensor, *, decay: float = 0.01, bias: bool = True) -> nn.Linear:
    """Multinomial logistic regression in which all classes count alike, on standardised features.

    Minimises ``mean over classes of the mean cross-entropy of their examples + decay / 2 |W|^2``, where W weighs features
    divided by their standard deviation and, with ``bias``, centred; what is returned takes the features as they are.

    features: (n, F). labels: (n,) in [0, C), every class with an example. decay: >= 0. Returns ``nn.Linear(F, C)``.
    """
    check_range("decay", decay, 0, math.inf, open_high=True)
    counts = _check_set(features, labels)
    x = features.detach().double()
    sd = x.std(0, correction=0)
    sd = torch.where(sd > 0, sd, 1)
    centre = x.mean(0) if bias else torch.zeros_like(sd)
    x = (x - centre) / sd
    share = 1 / (len(counts) * counts.double())[labels]
    weight = x.new_zeros(len(counts), x.shape[1], requires_grad=True)
    offset = x.new_zeros(len(counts), requires_grad=bias)
    solver = torch.optim.LBFGS(
        [weight, offset] if bias else [weight], max_iter=500, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        losses = F.cross_entropy(x @ weight.T + offset, labels, reduction="none")
        loss = (share * losses).sum() + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    fitted = nn.utils.skip_init(nn.Linear, x.shape[1], len(counts), bias=bias, device=x.device, dtype=features.dtype)
    with torch.no_grad():
        fitted.weight.copy_(weight / sd)
        if bias:
            fitted.bias.copy_(offset - (weight / sd) @ centre)
    return fitted


# -- the module -------------------------------------------------------------------------------------------------------
class SBCLLoss(nn.Module):
    """``sbcl_loss`` as a module; in a distributed run over the batches of all processes.

    temperature: > 0. weight: >= 0. base_temperature: > 0 or None. Raises ``ArgumentError`` (a ``ValueError``).
    """

    def __init__(self, *, temperature: float = 0.1, weight: float = 0.2, base_temperature: float | None = None) -> None:
        super().__init__()
        _check_settings(temperature, weight, base_temperature)
        self.temperature, self.weight, self.base_temperature = temperature, weight, base_temperature

    def forward(
        self, features: Tensor, labels: Tensor, subclasses: Tensor, class_temperature: Tensor | None = None
    ) -> Tensor:
        """features: (B, V, D), normalised by the caller. labels, subclasses: (B,). class_temperature: (C,) or None."""
        features, labels, subclasses = gather_rows(features, labels, subclasses)
        return sbcl_loss(
            features,
            labels,
            subclasses,
            temperature=self.temperature,
            class_temperature=class_temperature,
            weight=self.weight,
            base_temperature=self.base_temperature,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weight={self.weight}, base_temperature={self.base_temperature}"


# -- the method -------------------------------------------------------------------------------------------------------
class Subclasses(nn.Module):
    """Buffers ``subclass`` (n,) by position in the training set, and ``temperature`` (C,)."""

    subclass: Tensor
    temperature: Tensor

    def __init__(self, num_examples: int, num_classes: int, temperature: float) -> None:
        super().__init__()
        self.register_buffer("subclass", torch.zeros(num_examples, dtype=torch.int64))
        self.register_buffer("temperature", torch.full((num_classes,), temperature))


class Encoder(nn.Module):
    """A model that gives what enters its head."""

    def __init__(self, model: nn.Module, tap: FeatureTap) -> None:
        super().__init__()
        self.model, self.tap = model, tap

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self.model(*args, **kwargs)
        return self.tap.take()


class SBCL(Method):
    """Contrast views by class and by subclasses found in the features, then fit a class-balanced classifier.

    temperature: tau, > 0. weight: of the classes' term, >= 0. min_size: smallest subclass, >= 1. step: epochs from one clustering
    to the next, >= 1. warm_up: epochs of SupCon before the first, >= 1; with as many as the training has, and ``weight=0``,
    the whole of it is SupCon. cluster: "balanced" or "kmeans". projection: outputs of the projection head, >= 1.
    decay: of the classifier that is fitted in the end, >= 0 (see ``balanced_classifier``).

    Replaces the task's loss; needs a run with ``augment``, single-label classification with every class present, and a model
    whose head is an ``nn.Linear``, which is frozen until it receives the classifier. There is no neutral setting: another loss
    trains the features, and the head is not trained with them, whatever the strengths.
    """

    name = "sbcl"
    paper = Paper(
        "Subclass-balancing Contrastive Learning for Long-tailed Recognition",
        "Hou, Zhang, Wang, Zhou",
        "ICCV 2023",
        "https://arxiv.org/abs/2306.15925",
    )
    space: ClassVar[Space] = {
        "temperature": LogUniform(0.05, 0.5),
        "weight": Uniform(0.05, 0.5),
        "decay": LogUniform(1e-3, 0.3),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = None
    views = 2

    def __init__(
        self,
        temperature: float = 0.1,
        weight: float = 0.2,
        min_size: int = 10,
        step: int = 10,
        warm_up: int = 10,
        cluster: str = "balanced",
        projection: int = 128,
        decay: float = 0.01,
    ) -> None:
        _check_settings(temperature, weight, None)
        for name, value in (("min_size", min_size), ("step", step), ("warm_up", warm_up), ("projection", projection)):
            check_integer(name, value, 1)
        check_choice("cluster", cluster, CLUSTER)
        check_range("decay", decay, 0, math.inf, open_high=True)
        self.temperature, self.weight, self.min_size, self.step = temperature, weight, min_size, step
        self.warm_up, self.cluster, self.projection, self.decay = warm_up, cluster, projection, decay

    def prepare(self, run: Run) -> None:
        if run.augment is None:
            refuse(
                "augment",
                None,
                "make random views of a batch, two of which SBCL holds against each other",
                "Give augment=..., for instance equipoise.data.augment.Jitter(noise=0.1)",
            )
        n, classes = table_shape(run, "SBCL")
        class_counts_of(run, "SBCL")  # refuses a class without an example
        head = run.head()
        if not isinstance(head, nn.Linear):
            raise ArgumentError(
                f"head = {type(head).__name__}: SBCL fits a linear classifier and needs an nn.Linear to put it into. "
                "Name it: head='path.to.layer'"
            )
        self._trainable = [p.requires_grad for p in head.parameters()]
        head.requires_grad_(False)
        self._tap = FeatureTap(head)
        self._generator = run.new_generator(self)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
            width = head.in_features
            network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.projection))
        self._projection = run.register(self, "projection", network.to(head.weight.dtype), optimize=True)
        self._table = run.register(self, "table", Subclasses(n, classes, self.temperature))
        self._subclass_loss = SBCLLoss(temperature=self.temperature, weight=self.weight)
        self._supcon = SBCLLoss(temperature=self.temperature, weight=0.0)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        count = len(batch) // batch.views
        remedy = "SBCL needs single-label classification with unmixed examples; leave out the method that mixes them"
        check_labels(batch.targets, len(batch), len(self._table.temperature), remedy)
        labels, index = batch.targets[:count], batch.positions("SBCL")[:count]
        features = self._tap.take()
        assert features is not None  # the run has just called the model, whose head is tapped
        if features.ndim != 2:
            raise ArgumentError(
                f"the head's inputs have shape {tuple(features.shape)}: SBCL needs features (N, D). Pool them before the head"
            )
        z = F.normalize(run.forward(features, self._projection).prediction, dim=1)
        z = z.unflatten(0, (batch.views, count)).transpose(0, 1)
        if count == 1 and run.accelerator.num_processes == 1:
            return 0.0 * z.sum()  # nothing to hold against: every term is log 1
        if run.epoch < self.warm_up:
            return self._supcon(z, labels, labels)
        return self._subclass_loss(z, labels, self._table.subclass[index], self._table.temperature)

    def epoch_end(self, run: Run) -> None:
        begins = run.epoch + 1
        if begins < self.warm_up or (begins - self.warm_up) % self.step or begins == run.total_epochs:
            return
        features, labels = self._features(run)
        found = assign_subclasses(
            F.normalize(run.predict((features, labels), self._projection)[0], dim=1),
            labels,
            min_size=self.min_size,
            temperature=self.temperature,
            cluster=self.cluster,
            generator=self._generator,
        )
        self._table.subclass.copy_(_of_first_process(found.subclass))
        self._table.temperature.copy_(_of_first_process(found.temperature))

    def finish(self, run: Run) -> None:
        head = run.head()
        assert isinstance(head, nn.Linear)  # prepare saw to it
        fitted = balanced_classifier(*self._features(run), decay=self.decay, bias=head.bias is not None)
        self._tap.remove()
        with torch.no_grad():
            for mine, theirs in zip(head.parameters(), fitted.parameters(), strict=True):
                values = _of_first_process(theirs.detach())
                # A binary model with one logit: class 1 against class 0.
                mine.copy_(values[1:] - values[:1] if len(mine) == 1 else values)
        for parameter, trainable in zip(head.parameters(), self._trainable, strict=True):
            parameter.requires_grad_(trainable)

    def _features(self, run: Run) -> tuple[Tensor, Tensor]:
        """What enters the head (n, F), and the labels (n,), of the unchanged training set in its own order."""
        assert run.data is not None  # class_counts_of saw to it
        return run.predict(run.data, Encoder(run.model, self._tap))


def _of_first_process(values: Tensor) -> Tensor:
    """The first process' values on all: rounding may differ between devices, and a cluster with it."""
    from accelerate.utils import broadcast

    shared: Tensor = broadcast(values)
    return shared
