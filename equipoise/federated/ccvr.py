"""CCVR: after federated training, retrain the last layer on virtual features drawn from each class's Gaussian.

Clients whose classes differ disagree most in the last layer. Each client sends, once, how many examples of each class it has and
their features' mean and covariance; put together they are those of all data, as if pooled. The server draws features from one
Gaussian per class, equally many of each, and retrains the classifier on them. With N_kc, mu_kc and S_kc (unbiased) of client k:

    N_c  = sum_k N_kc,    mu_c = sum_k N_kc mu_kc / N_c
    S_c  = [sum_k (N_kc - 1) S_kc + sum_k N_kc (mu_kc - mu_c)(mu_kc - mu_c)^T] / (N_c - 1)
    z    = mu_c + U sqrt(max(s, 0)) e,    S_c = U diag(s) U^T,    e standard normal

Nothing in training changes, so that it combines with any other federated method: ``[FedProx(), CCVR()]``.

## When to use
Skewed labels and a trained federated classifier whose last layer is linear: the more skew, the more there is to gain. Nothing has
to be trained again.

## When not
Nearly equal clients, where the classifier is at its ceiling already. Features whose mean and covariance must not leave the clients:
they say more of the data than parameters do, and of a class with one example the mean is that example's features. Classes
that no client has two examples of get no virtual features, and calibration pushes them down.

## Cost
One forward pass over all data, once. Upload D (D + 1) / 2 + D + 1 numbers of 8 bytes for each class that a client has (D features):
10 MB for D = 512 and 10 classes, more than many models. On the server C eigendecompositions of D x D, and the training of a layer.

## In a distributed run
The statistics are a query after the last round (``server.ask``; in Flower a message of type ``query``), which every client
answers, not only those drawn last. A client that does not answer, or whose answer does not fit, is left out.

## Source
Mi Luo, Fei Chen, Dapeng Hu, Yifan Zhang, Jian Liang and Jiashi Feng: No Fear of Heterogeneity: Classifier Calibration for Federated
Learning with Non-IID Data. NeurIPS 2021, arXiv:2106.05001. The covariance is written about the mean, where the paper subtracts
mu mu^T and loses digits for features far from the origin; both are the same number. The number of virtual features and the
training of the classifier are this library's; re-implementations differ among themselves.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range, refuse
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update
from equipoise.federated.params import Params, is_finite
from equipoise.training.features import find_head
from equipoise.training.method import Paper
from equipoise.training.space import Choice, LogUniform, Space

logger = logging.getLogger("equipoise.federated")
QUERY = "class_statistics"


# -- statistics -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClassStatistics:
    """For each of C classes the number of examples, and their features' mean and unbiased covariance.

    count: (C,) int64. mean: (C, D), 0 for a class without examples. cov: (C, D, D), 0 for one with fewer than two.
    """

    count: Tensor
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        classes, width = self.mean.shape if self.mean.ndim == 2 else (-1, -1)
        shapes = tuple(self.count.shape), tuple(self.mean.shape), tuple(self.cov.shape)
        if shapes != ((classes,), (classes, width), (classes, width, width)):
            refuse("count, mean, cov", shapes, "have the shapes (C,), (C, D), (C, D, D)")


@torch.no_grad()
def class_statistics(
    features: Tensor, targets: Tensor, num_classes: int, *, dtype: torch.dtype = torch.float64
) -> ClassStatistics:
    """Statistics of features (N, D) with classes targets (N,), in two passes and O(N D^2).

    Raises ``ArgumentError``: features not finite or not (N, D), targets not integers in [0, num_classes).
    """
    check_integer("num_classes", num_classes, 1)
    _check_features(features, targets, num_classes)
    count = torch.bincount(targets, minlength=num_classes)
    mean = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
    cov = mean.new_zeros(num_classes, features.shape[1], features.shape[1])
    sizes = count.tolist()
    # One product for each class with examples: their sizes differ, and padding would cost more than the calls do.
    for c, places in enumerate(targets.argsort(stable=True).split(sizes)):
        if sizes[c]:
            rows = features.index_select(0, places).to(dtype)  # a copy
            torch.mean(rows, 0, out=mean[c])
            _square(rows.sub_(mean[c]), cov[c]).div_(max(1, sizes[c] - 1))
    return ClassStatistics(count, mean, cov)


def _square(rows: Tensor, out: Tensor) -> Tensor:
    """``rows^T rows``; on the CPU by numpy, which computes one half of what is symmetric."""
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        np.matmul(rows.numpy().T, rows.numpy(), out=out.numpy())
        return out
    return torch.mm(rows.T, rows, out=out)


def aggregate_statistics(stats: Iterable[ClassStatistics]) -> ClassStatistics:
    """The statistics of all clients' data together, by running sums: exactly those of the pooled features.

    A generator is read once, and one client's statistics are held at a time. Raises ``ArgumentError``: no statistics, or differing
    C or D.
    """
    first = next(given := iter(stats), None)
    if first is None:
        raise ArgumentError("stats = []: must hold the statistics of at least one client")
    count, mean, scatter = torch.zeros_like(first.count), torch.zeros_like(first.mean), torch.zeros_like(first.cov)
    for number, each in enumerate(itertools.chain([first], given)):
        if each.mean.shape != first.mean.shape:
            refuse(
                f"stats[{number}]", tuple(each.mean.shape), f"be of (C, D) = {tuple(first.mean.shape)}, as the first"
            )
        total = count + each.count
        share = each.count / total.clamp(min=1).to(mean.dtype)
        apart = each.mean - mean
        between = (share * count).unsqueeze(1) * apart
        within = (each.count - 1).clamp(min=0).view(-1, 1, 1)
        scatter = torch.baddbmm(torch.addcmul(scatter, each.cov, within), between.unsqueeze(2), apart.unsqueeze(1))
        mean = mean + share.unsqueeze(1) * apart
        count = total
    return ClassStatistics(count, mean, scatter / (count - 1).clamp(min=1).view(-1, 1, 1))


def tukey_transform(x: Tensor, beta: float = 0.5) -> Tensor:
    """Tukey's ladder of powers after a ReLU, ``max(x, 0) ** beta``; its logarithm for beta = 0 (-inf where x <= 0).

    beta = 1 leaves the ReLU. The gradient where x <= 0 is 0. Raises ``ArgumentError``: beta < 0.
    """
    check_range("beta", beta, 0)
    positive = x > 0
    safe = torch.where(positive, x, 1.0)
    return torch.where(positive, safe.pow(beta), 0.0) if beta else torch.where(positive, safe.log(), -torch.inf)


# -- calibration ------------------------------------------------------------------------------------------------------
def sample_virtual(
    stats: ClassStatistics,
    num_per_class: int | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Features (M, D) drawn from each class's Gaussian, and their classes (M,), in the order of the classes.

    num_per_class: M_c >= 1 for every class, or one number >= 0 for each. Classes with fewer than two examples, or of which none are
    asked for, are left out. Covariances may be singular. Raises ``ArgumentError``: num_per_class out of range or of another
    length than C, no class with two examples.
    """
    classes = len(stats.count)
    if isinstance(num_per_class, int):
        check_integer("num_per_class", num_per_class, 1)
        wanted = torch.full((classes,), num_per_class)
    else:
        given = list(num_per_class)
        if len(given) != classes or not all(isinstance(m, int) and m >= 0 for m in given):
            refuse("num_per_class", given, f"be an integer >= 1, or {classes} integers >= 0")
        wanted = torch.tensor(given)
    device = stats.mean.device
    wanted = torch.where(stats.count >= 2, wanted.to(device), 0)
    known = wanted.nonzero().squeeze(1)
    if not len(known):
        raise ArgumentError(
            f"stats.count = {stats.count.tolist()}, num_per_class = {num_per_class}: no class with at least 2 examples is asked for"
        )
    variance, axes = torch.linalg.eigh(stats.cov[known].double())
    # What rounding makes of a variance of 0 would leave the span of the examples.
    noise = variance[:, -1:].clamp(min=0) * variance.shape[1] * torch.finfo(torch.float64).eps
    spread = axes * torch.where(variance > noise, variance, 0.0).sqrt().unsqueeze(1)
    most = int(wanted.max())
    where = torch.device("cpu") if generator is None else generator.device
    normal = torch.randn(len(known), most, axes.shape[1], generator=generator, dtype=torch.float64, device=where)
    drawn = torch.baddbmm(stats.mean[known].double().unsqueeze(1), normal.to(device), spread.mT)
    asked = torch.arange(most, device=device) < wanted[known].unsqueeze(1)
    return drawn[asked].to(dtype), known.repeat_interleave(wanted[known])


def calibrate_classifier(
    classifier: nn.Module,
    features: Tensor,
    targets: Tensor,
    *,
    lr: float = 0.01,
    epochs: int = 10,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Train a classifier on features (M, D) of classes targets (M,) by SGD on cross-entropy, in place; returns it.

    Each epoch is in a new order, with its last, smaller batch. Raises ``ArgumentError``: settings out of range, features not finite
    or not (M, D), targets out of the classifier's range.
    """
    check_range("lr", lr, 0, open_low=True)
    check_integer("epochs", epochs, 0)
    check_integer("batch_size", batch_size, 1)
    check_range("momentum", momentum, 0, 1, open_high=True)
    check_range("weight_decay", weight_decay, 0)
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    if not parameters:
        raise ArgumentError("classifier has no parameter that requires a gradient: there is nothing to calibrate")
    with torch.no_grad():
        _check_features(features, targets, classifier(features[:1].to(parameters[0])).shape[-1])
    z, y = features.detach().to(parameters[0]), targets.to(parameters[0].device)
    sgd = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    where = torch.device("cpu") if generator is None else generator.device
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator, device=where).to(y.device)
        for rows in order.split(batch_size):
            loss = F.cross_entropy(classifier(z[rows]).float(), y[rows])
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            sgd.step()
    sgd.zero_grad()
    return classifier


def _check_features(features: Tensor, targets: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1] or targets.is_floating_point():
        shapes = tuple(features.shape), tuple(targets.shape)
        refuse("features, targets", shapes, "be (N, D) numbers and (N,) integer classes")
    if not is_finite({"features": features}):
        raise ArgumentError(
            "features hold NaN or infinite numbers: must be finite (the logarithm of a feature of 0 is not)"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        refuse("targets", [int(targets.min()), int(targets.max())], f"lie in [0, {num_classes - 1}]")


# -- what is sent -----------------------------------------------------------------------------------------------------
def pack(stats: ClassStatistics) -> Params:
    """The classes with examples, and of their symmetric covariances the upper triangles: what a client sends."""
    known = stats.count.nonzero().squeeze(1)
    rows, columns = torch.triu_indices(*stats.cov.shape[1:], device=stats.cov.device)
    cov = stats.cov[known][:, rows, columns]
    return {"classes": known, "count": stats.count[known], "mean": stats.mean[known], "cov": cov}


def unpack(sent: Params, num_classes: int, width: int) -> ClassStatistics:
    """The inverse of ``pack``. Raises ``ArgumentError`` for what it cannot have made."""
    rows, columns = torch.triu_indices(width, width)
    classes = sent.get("classes", torch.empty(0))
    shapes: dict[str, tuple[int, ...]] = {"classes": (len(classes),), "count": (len(classes),)}
    shapes |= {"mean": (len(classes), width), "cov": (len(classes), len(rows))}
    found = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    if found != shapes:
        refuse("class statistics", found, f"have the shapes {shapes}")
    whole = not classes.is_floating_point() and not sent["count"].is_floating_point()
    if not whole or not bool(((classes >= 0) & (classes < num_classes) & (sent["count"] >= 1)).all()):
        refuse("class statistics", classes.tolist(), f"be of classes in [0, {num_classes - 1}] with examples")
    count = torch.zeros(num_classes, dtype=torch.int64).index_copy_(0, classes.long(), sent["count"].long())
    mean = torch.zeros(num_classes, width, dtype=torch.float64).index_copy_(0, classes.long(), sent["mean"].double())
    cov = torch.zeros(num_classes, width, width, dtype=torch.float64)
    cov[classes.long().unsqueeze(1), rows, columns] = sent["cov"].double()
    cov[classes.long().unsqueeze(1), columns, rows] = sent["cov"].double()
    return ClassStatistics(count, mean, cov)


def _answered(updates: Iterable[Update], classes: int, width: int) -> Iterator[ClassStatistics]:
    """What clients sent, one after the other; what does not fit is named and left out."""
    for update in updates:
        try:
            yield unpack(update.extras.get(QUERY, {}), classes, width)
        except ArgumentError as error:
            logger.warning("client %d is left out of the calibration: %s", update.client, error)


# -- the method -------------------------------------------------------------------------------------------------------
class CCVR(FederatedMethod):
    """Retrains the last layer on the server, after federated training, on features drawn from each class's Gaussian.

    num_per_class: virtual features of each class, >= 1. lr, epochs, batch_size, momentum, weight_decay: of the retraining, by SGD.
    tukey: exponent >= 0 of ``tukey_transform``, applied to what enters the classifier from then on, in inference too; a fresh
    classifier is trained on it. None for no transform. classifier: name of the last linear layer, by default the model's head.
    With epochs = 0 nothing is asked or changed. ``server.results["class_statistics"]`` holds the aggregated statistics.
    """

    name: ClassVar[str] = "ccvr"
    paper: ClassVar[Paper | None] = Paper(
        "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
        "Mi Luo, Fei Chen, Dapeng Hu, Yifan Zhang, Jian Liang, Jiashi Feng",
        "NeurIPS 2021",
        "https://arxiv.org/abs/2106.05001",
    )
    space: ClassVar[Space] = {"lr": LogUniform(0.001, 0.1), "num_per_class": Choice((100, 500, 1000))}
    neutral: ClassVar[dict[str, Any] | None] = {"epochs": 0}

    def __init__(
        self,
        num_per_class: int = 500,
        lr: float = 0.01,
        epochs: int = 10,
        batch_size: int = 64,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        tukey: float | None = None,
        classifier: str | None = None,
    ) -> None:
        check_integer("num_per_class", num_per_class, 1)
        check_range("lr", lr, 0, open_low=True)
        check_integer("epochs", epochs, 0)
        check_integer("batch_size", batch_size, 1)
        check_range("momentum", momentum, 0, 1, open_high=True)
        check_range("weight_decay", weight_decay, 0)
        if tukey is not None:
            check_range("tukey", tukey, 0)
        self.num_per_class, self.lr, self.epochs, self.batch_size = num_per_class, lr, epochs, batch_size
        self.momentum, self.weight_decay, self.tukey, self.classifier = momentum, weight_decay, tukey, classifier

    def configure_model(self, model: nn.Module, seed: int) -> nn.Module:
        head = self._head(model)
        if self.tukey is not None:
            head.register_buffer("transformed", torch.tensor(False))
            head.register_forward_pre_hook(_Transform(self.tukey))
        return model

    def answer(self, client: Client, sent: Sent) -> Update | None:
        if sent.query != QUERY:
            return None
        head, kept = self._head(client.model), []
        # First among the head's hooks: the features as they come, before a transform.
        handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()), prepend=True)
        try:
            _, targets = client.predict(client.data)
        finally:
            handle.remove()
        features = torch.cat(kept)
        if self.tukey is not None:
            features = tukey_transform(features, self.tukey)
        stats = class_statistics(features, targets, head.out_features)
        return Update({}, len(client), extras={QUERY: pack(stats)})

    def finish(self, server: Server) -> None:  # type: ignore[override]
        if not self.epochs:
            return
        if server.ask is None:
            raise ArgumentError("server.ask = None: CCVR asks the clients for statistics after training")
        model = server.load()
        head = self._head(model)
        name = next(name for name, module in model.named_modules() if module is head)
        classes, width = head.out_features, head.in_features
        server.extra_bytes = max(server.extra_bytes, 4 * classes * (width + 1) * (width + 4))
        server.results[QUERY] = total = aggregate_statistics(_answered(server.ask(QUERY), classes, width))
        generator = server.generator("ccvr")
        features, targets = sample_virtual(total, self.num_per_class, generator=generator)
        if self.tukey is not None:
            bound = width**-0.5
            with torch.no_grad():
                for parameter in head.parameters():
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_(bound * (2 * drawn - 1))
        training = {key: getattr(self, key) for key in ("lr", "epochs", "batch_size", "momentum", "weight_decay")}
        calibrate_classifier(head, features, targets, generator=generator, **training)
        if self.tukey is not None:
            server.buffers = {**server.buffers, f"{name}.transformed": torch.tensor(True)}
        new = {f"{name}.{key}": parameter.detach().clone() for key, parameter in head.named_parameters()}
        server.params = {**server.params, **{key: new[key] for key in new if key in server.params}}

    def _head(self, model: nn.Module) -> nn.Linear:
        head = find_head(model, self.classifier)
        if not isinstance(head, nn.Linear) or not head.weight.requires_grad:
            refuse("classifier", self.classifier, "name a linear layer that is trained; found " + type(head).__name__)
        return head


@dataclass(frozen=True)
class _Transform:
    """What enters a layer, transformed once its buffer says so."""

    beta: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        found = torch.where(module.transformed, tukey_transform(args[0], self.beta), args[0])  # type: ignore[arg-type]
        return (found, *args[1:])
