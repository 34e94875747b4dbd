"""FedTiny: federated training of a network with 1 to 5 % of its weights, on devices that can hold no dense one and share no data.

Which weights matter is not known before training, and only the clients' data can tell. The server keeps a mask m of a fixed number
of weights, trains inside it, and moves it: clients send the few largest gradients of weights that are not there, and the weakest
weights make room for them, one block of layers at a time (progressive pruning):

    client    w <- w - lr (m . grad F_i(w))  from  w = W . m;   then, for a scheduled layer, the k largest |grad F_i(w)| outside m
    server    W <- mean of the w,   G = sum_i (n_i / n) scatter(what client i sent)
              m: the k smallest |W| leave, the k largest |G| outside m enter, at 0
    k         int(alpha / 2 (1 + cos(pi t / t_stop)) a),  a weights of the layer in m;   0 from round t_stop on

Each layer's share of the weights is fixed before (Erdos-Renyi kernel: a narrow layer keeps more). With several candidates for the
first mask, the server asks for their BatchNorm statistics on the clients' data, averages these, asks for the loss of each candidate
under them, and starts from the best (adaptive BN selection). ``magnitude-mask`` and ``random-mask`` train in a mask that stays.

## When to use
Densities of a few per cent or less, clients with little memory and slow uplinks, and enough rounds for the mask to settle before
``t_stop``.

## When not
Densities of 10 % or more, where a fixed mask of the largest weights does as well. A model whose biases and normalisation alone
fill the budget. Several candidates need BatchNorm layers, and cost a round of messages each, twice.

## Cost
A client holds the weights in the mask, their gradients, and once every ``interval`` rounds the gradient of one block; it uploads 12
bytes for each of k weights of that block. Messages carry the weights in the mask alone, and the mask as one bit a weight, or as
positions if these are fewer bytes. In memory weights are dense tensors with zeros here: what a sparse format saves there is counted
by the task ``federated-tiny``, not measured.

## In a distributed run
The mask is the server's, sent with each round and kept in its checkpoint; it changes on the server only. An upload that does not
fit the layer is named in the log and left out of the sum.

## Source
Hong Huang, Lan Zhang, Chaoyue Sun, Ruogu Fang, Xiaoyong Yuan and Dapeng Wu: Distributed Pruning Towards Tiny Neural Networks in
Federated Learning. ICDCS 2023, arXiv:2212.01977. Layers' shares: Evci et al., Rigging the Lottery, ICML 2020. The authors' library
removes weights first and lets them come back at once with their old values (``grow_prune(..., allow_regrow=True)``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse, suggestion
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update
from equipoise.federated.params import GradFn, Params, check_same, normalised
from equipoise.training.batch import Batch, Loader
from equipoise.training.losses import precise
from equipoise.training.method import Paper
from equipoise.training.space import Choice, Space, Uniform

logger = logging.getLogger("equipoise.federated")

DISTRIBUTIONS = ("erk", "uniform")
MASK, TOPK, BN = "mask", "topk", "bn"  # names of what is sent beside the weights
MEAN, VARIANCE = "running_mean", "running_var"
STATISTICS, LOSS = "bn_statistics", "dev_loss"  # queries, and the name of what the second answers
Statistics = dict[str, tuple[Tensor, Tensor]]  # of each BatchNorm layer: mean, unbiased variance
Masks = dict[str, Tensor]


# -- how many weights each layer keeps --------------------------------------------------------------------------------
def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Densities in (0, 1] of layers of these shapes, in proportion to ``sum(shape) / numel`` (Erdos-Renyi kernel).

    The factor is such that ``int(numel density)`` weights remain over all layers; layers that would exceed 1 are 1, and the factor
    is found again. Raises ``ArgumentError``: density outside (0, 1], no layer.
    """
    check_range("density", density, 0, 1, open_low=True)
    if not shapes:
        refuse("shapes", shapes, "hold at least one layer")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    free = dict(raw) if density < 1 else {}
    scale = 0.0
    while free:
        kept = sum(int(sizes[name] * density) for name in free)
        kept -= sum(int(sizes[name] * (1 - density)) for name in raw if name not in free)
        scale = kept / sum(raw[name] * sizes[name] for name in free)
        largest = max(free.values())
        if largest * scale <= 1:
            break
        free = {name: value for name, value in free.items() if value != largest}
    return {name: scale * raw[name] if name in free else 1.0 for name in shapes}


def layer_densities(shapes: Mapping[str, Sequence[int]], density: float, distribution: str = "erk") -> dict[str, float]:
    """``erk_densities``, or with "uniform" the same density for each layer."""
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if distribution == "erk":
        return erk_densities(shapes, density)
    check_range("density", density, 0, 1, open_low=True)
    return dict.fromkeys(shapes, density)


def _kept(numel: int, density: float) -> int:
    check_range("density", density, 0, 1, open_low=True)
    return int(numel * density) or refuse("density", density, f"leave a layer of {numel} weights at least one")


def magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """True at the ``int(numel density)`` largest ``|weight|``, of equal ones the first. Raises ``ArgumentError`` if that is 0."""
    count = _kept(weight.numel(), density)
    return _at(largest(precise(weight.detach()).abs().reshape(-1), count), weight)


def random_mask(weight: Tensor, density: float, *, generator: torch.Generator | None = None) -> Tensor:
    """True at ``int(numel density)`` places, drawn without replacement. Raises ``ArgumentError`` if that is 0."""
    count = _kept(weight.numel(), density)
    return _at(torch.randperm(weight.numel(), generator=generator)[:count], weight)


def _at(places: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[places.to(like.device)] = True
    return mask.view(like.shape)


def largest(scores: Tensor, k: int) -> Tensor:
    """Places (k,) of the largest of scores (n,), in falling order; of equal ones the first. Raises ``ArgumentError`` for NaN.

    ``topk`` finds the k-th value; which of equal ones it would return depends on the device, so they are taken by place.
    """
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    least = scores.topk(k).values
    if least.isnan().any():
        raise ArgumentError("scores hold NaN: the weights or gradients are not finite")
    above = (scores > least[-1]).nonzero().squeeze(1)
    tied = (scores == least[-1]).nonzero().squeeze(1)[: k - len(above)]
    found = torch.cat([above, tied])
    return found[scores[found].argsort(descending=True, stable=True)]


def candidate_masks(
    weights: Mapping[str, Tensor],
    density: float,
    *,
    num: int,
    noise: float = 0.5,
    generator: torch.Generator | None = None,
    distribution: str = "erk",
) -> list[Masks]:
    """``num`` magnitude masks whose layers have different densities; the first has those of ``layer_densities``.

    Each other one multiplies these by numbers uniform in [1 - noise, 1 + noise], and scales the products so that the total is
    ``density`` again, layers that would exceed 1 being 1. density: of all ``weights`` together; a mask comes within two weights a
    layer of it. Raises ``ArgumentError``: num < 1, noise outside [0, 1), a layer that is left without a weight.
    """
    check_integer("num", num, 1)
    check_range("noise", noise, 0, 1, open_high=True)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    base = layer_densities({name: weight.shape for name, weight in weights.items()}, density, distribution)
    found = [base]
    for _ in range(num - 1):
        factors = (1 + noise * (2 * torch.rand(len(base), generator=generator, dtype=torch.float64) - 1)).tolist()
        noisy = {name: base[name] * factor for name, factor in zip(base, factors, strict=True)}
        found.append(_rescaled(noisy, sizes, density))
    for each in found:
        _check_layers(sizes, each, density)
    return [{name: magnitude_mask(weights[name], each[name]) for name in weights} for each in found]


def _check_layers(sizes: Mapping[str, int], densities: Mapping[str, float], density: float) -> None:
    for name, size in sizes.items():
        if int(size * densities[name]) < 1:
            refuse("density", density, f"leave {name!r}, of {size} weights, at least one of them", "Raise it")


def _rescaled(densities: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """``min(s d_l, 1)`` with the s at which the whole has the density."""
    free, scale = dict(densities) if density < 1 else {}, 1.0
    while free:
        dense = sum(size for name, size in sizes.items() if name not in free)
        scale = (density * sum(sizes.values()) - dense) / sum(free[name] * sizes[name] for name in free)
        over = [name for name, value in free.items() if value * scale > 1]
        if not over:
            break
        free = {name: value for name, value in free.items() if name not in over}
    return {name: densities[name] * scale if name in free else 1.0 for name in densities}


# -- BatchNorm statistics of a candidate ------------------------------------------------------------------------------
def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def collect_bn_statistics(model: nn.Module, batches: Iterable[Any]) -> Statistics:
    """Mean and unbiased variance of what enters each BatchNorm layer, by the module's name: averages over the batches.

    All other layers are in evaluation mode, the weights do not move, and buffers and modes are as before when it returns. A batch
    is a tensor, or a dict of keyword arguments. Raises ``ArgumentError``: no batch, or a model without BatchNorm layers that keep
    statistics.
    """
    norms = _norms(model)
    if not norms:
        raise ArgumentError("model has no BatchNorm layer that keeps running statistics: there is nothing to collect")
    training = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in norms.values()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        for module in norms.values():
            module.train()
            module.momentum = None  # the plain average over batches
            module.reset_running_stats()
        count = 0
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
            count += 1
        if not count:
            raise ArgumentError("batches = []: must hold at least one batch")
        found = {}
        for name, module in norms.items():
            assert module.running_mean is not None and module.running_var is not None
            found[name] = (module.running_mean.clone(), module.running_var.clone())
    finally:
        for each, mode in training.items():
            each.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return found


def aggregate_bn_statistics(
    stats: Sequence[Statistics], counts: Sequence[float], *, total_variance: bool = False
) -> Statistics:
    """Means of the clients' means and of their variances, weighted by ``counts``.

    total_variance: add the variance of the clients' means, so that the result is that of all examples together. Raises
    ``ArgumentError``: no client, counts that are negative or sum to 0, layers that differ.
    """
    shares = normalised(counts, len(stats), "counts")
    groups = [{f"{name}/{i}": pair[i] for name, pair in each.items() for i in (0, 1)} for each in stats]
    for number, group in enumerate(groups[1:], 1):
        check_same(group, groups[0], f"stats[{number}]")
    found = {}
    for name in stats[0]:
        means, variances = (torch.stack([each[name][i] for each in stats]) for i in (0, 1))
        weights = torch.tensor(shares, dtype=means.dtype, device=means.device)
        mean, variance = weights @ means, weights @ variances
        if total_variance:
            variance = variance + weights @ (means - mean).square()
        found[name] = (mean, variance)
    return found


@torch.no_grad()
def load_bn_statistics(model: nn.Module, stats: Statistics) -> None:
    """Put means and variances into the BatchNorm layers of these names. Raises ``ArgumentError``: names or shapes that differ."""
    norms = _norms(model)
    for name, (mean, variance) in stats.items():
        if name not in norms:
            refuse("stats", name, "name a BatchNorm layer that keeps running statistics", suggestion(name, list(norms)))
        buffers = {"mean": norms[name].running_mean, "variance": norms[name].running_var}
        check_same({"mean": mean, "variance": variance}, buffers, name)  # type: ignore[arg-type]
        for key, value in (("mean", mean), ("variance", variance)):
            buffers[key].copy_(value)  # type: ignore[union-attr]


# -- progressive pruning ----------------------------------------------------------------------------------------------
def adjust_count(num_active: int, t: int, t_stop: int, *, alpha: float = 0.3) -> int:
    """How many of a layer's ``num_active`` weights change in round t = 0, 1, ...: ``int(alpha / 2 (1 + cos(pi t / t_stop)) a)``.

    0 from ``t_stop`` on. Raises ``ArgumentError``: num_active < 0, t < 0, t_stop < 1, alpha outside (0, 1].
    """
    check_integer("num_active", num_active, 0)
    check_integer("t", t, 0)
    check_integer("t_stop", t_stop, 1)
    check_range("alpha", alpha, 0, 1, open_low=True)
    return 0 if t >= t_stop else int(alpha / 2 * (1 + math.cos(math.pi * t / t_stop)) * num_active)


def topk_gradients(grad: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest ``|grad|`` outside the mask: flat places (k,) int64 and values (k,), in falling order of size.

    Of equal ones the first; k is at most the number of places outside. Raises ``ArgumentError``: k < 0, shapes that differ, NaN.
    """
    check_integer("k", k, 0)
    _check_mask(mask, grad, "grad")
    flat, inside = grad.detach().reshape(-1), mask.reshape(-1)
    k = min(k, mask.numel() - int(mask.sum()))
    places = largest(precise(flat).abs().masked_fill(inside, -1.0), k)
    return places, flat[places]


def merge_topk(uploads: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], numel: int) -> Tensor:
    """``sum_i a_i scatter(places_i, values_i)`` (numel,), the weights a_i normalised.

    Raises ``ArgumentError``: no upload, weights negative or with the sum 0, places that are no integers in [0, numel), as many
    values as places not given.
    """
    check_integer("numel", numel, 1)
    shares = normalised(weights, len(uploads))
    for places, values in uploads:
        if fault := _unfit(places, values, numel):
            raise ArgumentError(f"uploads hold {fault}")
    places = torch.cat([places.long() for places, _ in uploads])
    values = torch.cat([share * precise(values) for share, (_, values) in zip(shares, uploads, strict=True)])
    return values.new_zeros(numel).index_add_(0, places, values)


def _unfit(places: Any, values: Any, numel: int) -> str:
    """What is wrong with an upload for a layer of ``numel`` weights; "" if nothing is."""
    if not isinstance(places, Tensor) or not isinstance(values, Tensor):
        return "nothing for a scheduled layer"
    if places.ndim != 1 or places.shape != values.shape or not values.is_floating_point():
        return (
            f"places {tuple(places.shape)} and values {values.dtype} {tuple(values.shape)}: must be (k,) and (k,) real"
        )
    if places.is_floating_point() or places.dtype == torch.bool:
        return f"places of type {places.dtype}: must be integers"
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < numel:
        return f"places from {int(places.min())} to {int(places.max())}: must be in [0, {numel - 1}]"
    return ""


def grow_prune(
    weight: Tensor, mask: Tensor, grad: Tensor, k: int, *, allow_regrow: bool = False
) -> tuple[Tensor, Tensor]:
    """Replace the k smallest ``|weight|`` inside the mask by the k largest ``|grad|`` outside it: the new weight and mask.

    grad: (numel,) or of the weight's shape. k is at most the number of places inside, and outside. What enters is 0, what leaves
    becomes 0; of equal ones the first. allow_regrow: what leaves may enter again at once, and then keeps its value. The number of
    places inside stays. Raises ``ArgumentError``: k < 0, shapes that differ, NaN.
    """
    check_integer("k", k, 0)
    _check_mask(mask, weight, "weight")
    if grad.numel() != weight.numel():
        refuse("grad", tuple(grad.shape), f"have {weight.numel()} numbers, as weight")
    inside, flat = mask.reshape(-1), weight.detach().reshape(-1)
    active = int(inside.sum())
    k = min(k, active, inside.numel() - active)
    size, slope = precise(flat).abs(), precise(grad.detach().reshape(-1)).abs()
    leave = largest((-size).masked_fill(~inside, -torch.inf), k)
    new = inside.clone()
    new[leave] = False
    taken = new if allow_regrow else inside
    new[largest(slope.masked_fill(taken, -1.0), k)] = True
    return flat.masked_fill(~(inside & new), 0.0).view(weight.shape), new.view(mask.shape)


def _check_mask(mask: Tensor, like: Tensor, name: str) -> None:
    if mask.dtype != torch.bool or mask.shape != like.shape:
        refuse("mask", f"{mask.dtype} {tuple(mask.shape)}", f"be bool of the shape {tuple(like.shape)}, as {name}")


# -- a mask as it is sent ---------------------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """The smaller of one bit a place (uint8), and the places that are True (int32). ``unpack_mask`` is the inverse."""
    flat = mask.detach().cpu().reshape(-1)
    if 4 * int(flat.sum()) < math.ceil(flat.numel() / 8):
        return flat.nonzero().squeeze(1).int()
    return torch.from_numpy(np.packbits(flat.numpy()))


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The mask of the shape of ``like``, on its device."""
    if packed.dtype == torch.int32:
        return _at(packed.long(), like)
    bits = np.unpackbits(packed.cpu().numpy(), count=like.numel())
    return torch.from_numpy(bits.astype(bool)).view(like.shape).to(like.device)


# -- methods ----------------------------------------------------------------------------------------------------------
class MaskedTraining(FederatedMethod):
    """Federated averaging of the weights inside a mask that the server sends; all others are 0 at every step.

    density: share of all parameters that are kept, in (0, 1]. Biases, normalisation and all else that is no weight of a linear or
    convolutional layer is kept, and counts. distribution: how layers share what is left for weights, "erk" or "uniform".
    """

    def __init__(self, density: float = 0.05, distribution: str = "erk") -> None:
        check_range("density", density, 0, 1, open_low=True)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        self.density, self.distribution = density, distribution

    def first_masks(self, server: Server, weights: Params, density: float) -> Masks:
        """The masks to start from; ``density`` is that of ``weights``."""
        raise NotImplementedError

    def prepare(self, server: Server) -> None:  # type: ignore[override]
        names = prunable(server.model, server.params)
        weights = {name: server.params[name] for name in names}
        masks = self.first_masks(server, weights, weights_density(server.params, names, self.density))
        server.params = masked(server.params, masks)
        self.publish(server, masks)

    def publish(self, server: Server, masks: Masks) -> None:
        """Send these masks from now on."""
        server.extras[MASK] = {name: pack_mask(mask) for name, mask in masks.items()}

    def client_update(self, client: Client, sent: Sent) -> Update:
        masks = unpacked(sent.extras, sent.params)
        return client.update(self.train(client, masks))

    def train(self, client: Client, masks: Masks) -> Params:
        """Masked local training. A weight outside starts at 0 with no gradient, so momentum and weight decay cannot move it."""

        params = client.params
        factors = {name: mask.to(params[name].dtype) for name, mask in masks.items()}

        def direction(params: Params, grad_fn: GradFn) -> Params:
            return masked(grad_fn(params), factors)

        client.set(masked(params, factors))
        return client.train(direction)

    def pack(self, params: Params, extras: Mapping[str, Params]) -> Params:
        """Of pruned layers the weights in the mask alone, (k,), in the order of their places."""
        masks = unpacked(extras, params)
        return {name: tensor[masks[name]] if name in masks else tensor for name, tensor in params.items()}

    def unpack(self, packed: Params, extras: Mapping[str, Params], like: Params) -> Params:
        found = dict(packed)
        for name, mask in unpacked(extras, like).items():
            values, count = packed.get(name), int(mask.sum())
            if values is None or values.shape != (count,):
                shown = "nothing" if values is None else tuple(values.shape)
                raise ArgumentError(f"{name!r} arrived as {shown}: must be ({count},), the weights in its mask")
            found[name] = values.new_zeros(mask.shape).masked_scatter_(mask.to(values.device), values)
        return found

    def finish(self, server: Server) -> None:  # type: ignore[override]
        server.results["masks"] = unpacked(server.extras, server.params)


def prunable(model: nn.Module, params: Params) -> list[str]:
    """Names of the weights of linear and convolutional layers among ``params``, in the model's order.

    Raises ``ArgumentError`` if there is none.
    """
    found = [
        name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd) and (name := f"{prefix}.weight".lstrip(".")) in params
    ]
    if not found:
        raise ArgumentError("model has no linear or convolutional layer: there is nothing to prune")
    return found


def weights_density(params: Params, names: Sequence[str], density: float) -> float:
    """The density of the ``names`` at which all of ``params`` have ``density``: the others are kept.

    Raises ``ArgumentError`` if nothing is left for weights.
    """
    total = sum(tensor.numel() for tensor in params.values())
    weights = sum(params[name].numel() for name in names)
    budget = int(density * total) - (total - weights)
    if budget <= 0:
        least = (total - weights + len(names)) / total
        refuse(
            "density",
            density,
            f"exceed {least:.4g}: of {total} parameters {total - weights} are biases, normalisation and the like, and are kept",
        )
    return budget / weights


def masked(params: Params, masks: Masks) -> Params:
    """``params`` with zeros outside the masks."""
    names = list(masks)
    found = torch._foreach_mul([params[name] for name in names], [masks[name].to(params[name].dtype) for name in names])
    return {**params, **dict(zip(names, found, strict=True))}


def unpacked(extras: Mapping[str, Params], params: Params) -> Masks:
    """The masks among what is sent; none before the server has chosen them."""
    masks = extras.get(MASK, {})
    if strange := sorted(masks.keys() - params.keys()):
        raise ArgumentError(
            f"mask of {strange[0]!r}: the model has no such parameter. Both sides must build the same model"
        )
    return {name: unpack_mask(packed, params[name]) for name, packed in masks.items()}


class MagnitudeMask(MaskedTraining):
    """Federated training inside the mask of the largest initial weights of each layer, which stays as it is.

    density, distribution: as in ``MaskedTraining``. With density 1 it is FedAvg.
    """

    name: ClassVar[str] = "magnitude-mask"
    space: ClassVar[Space] = {"distribution": Choice(DISTRIBUTIONS)}
    neutral: ClassVar[dict[str, Any] | None] = {"density": 1.0}

    def first_masks(self, server: Server, weights: Params, density: float) -> Masks:
        return candidate_masks(weights, density, num=1, distribution=self.distribution)[0]


class RandomMask(MaskedTraining):
    """Federated training inside a random mask, which stays as it is.

    density, distribution: as in ``MaskedTraining``. With density 1 it is FedAvg.
    """

    name: ClassVar[str] = "random-mask"
    space: ClassVar[Space] = {"distribution": Choice(DISTRIBUTIONS)}
    neutral: ClassVar[dict[str, Any] | None] = {"density": 1.0}

    def first_masks(self, server: Server, weights: Params, density: float) -> Masks:
        generator = server.generator("random-mask")
        densities = layer_densities({n: w.shape for n, w in weights.items()}, density, self.distribution)
        _check_layers({name: weight.numel() for name, weight in weights.items()}, densities, density)
        return {name: random_mask(weights[name], densities[name], generator=generator) for name in weights}


class FedTiny(MaskedTraining):
    """Federated training inside a mask that follows the clients' gradients, and is chosen by their BatchNorm statistics.

    density, distribution: as in ``MaskedTraining``; with density 1 it is FedAvg. num_candidates, noise: masks among which clients
    choose before training, and how far their layers' densities lie apart, in [0, 1); 1 for no choice. alpha: share of a layer's
    weights that are replaced at first, in (0, 1]. interval, t_stop: rounds 0, interval, 2 interval, ... < t_stop adjust a block.
    blocks: lists of parameters' names, adjusted in turn; by default one layer each, from the last to the first. dev_size: rows of a
    client that judge candidates, and those of the batch whose gradients are sent.

    ``server.results`` holds ``masks``, and with several candidates ``dev_losses`` and ``candidate``, the chosen one's number.
    """

    name: ClassVar[str] = "fedtiny"
    paper: ClassVar[Paper | None] = Paper(
        "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
        "Hong Huang, Lan Zhang, Chaoyue Sun, Ruogu Fang, Xiaoyong Yuan, Dapeng Wu",
        "ICDCS 2023",
        "https://arxiv.org/abs/2212.01977",
    )
    space: ClassVar[Space] = {"alpha": Uniform(0.1, 0.6), "distribution": Choice(DISTRIBUTIONS)}
    neutral: ClassVar[dict[str, Any] | None] = {"density": 1.0}

    def __init__(
        self,
        density: float = 0.05,
        num_candidates: int = 1,
        noise: float = 0.5,
        alpha: float = 0.3,
        interval: int = 10,
        t_stop: int = 100,
        blocks: Sequence[Sequence[str]] | None = None,
        dev_size: int = 64,
        distribution: str = "erk",
    ) -> None:
        super().__init__(density, distribution)
        for name, value in (("num_candidates", num_candidates), ("interval", interval), ("t_stop", t_stop)):
            check_integer(name, value, 1)
        check_range("noise", noise, 0, 1, open_high=True)
        check_range("alpha", alpha, 0, 1, open_low=True)
        check_integer("dev_size", dev_size, 2)
        if blocks is not None and not all(blocks):
            refuse("blocks", blocks, "hold at least one name in each block")
        self.num_candidates, self.noise, self.alpha = num_candidates, noise, alpha
        self.interval, self.t_stop, self.dev_size = interval, t_stop, dev_size
        self.blocks = None if blocks is None else [list(block) for block in blocks]

    # -- before training: which candidate -----------------------------------------------------------------------------
    def first_masks(self, server: Server, weights: Params, density: float) -> Masks:
        if unknown := [name for block in self.blocks or [] for name in block if name not in weights]:
            hint = suggestion(unknown[0], list(weights)) or f"Prunable are {', '.join(weights)}"
            refuse("blocks", unknown[0], "name weights of linear or convolutional layers", hint)
        if self.num_candidates > 1 and not _norms(server.model):
            refuse(
                "num_candidates",
                self.num_candidates,
                "be 1 for a model without BatchNorm layers",
                "Nothing tells them apart",
            )
        candidates = candidate_masks(
            weights,
            density,
            num=self.num_candidates,
            noise=self.noise,
            generator=server.generator("fedtiny-candidates"),
            distribution=self.distribution,
        )
        return candidates[0] if len(candidates) == 1 else self.select(server, candidates)

    def select(self, server: Server, candidates: Sequence[Masks]) -> Masks:
        """The candidate with the least loss on the clients' data under the statistics of all clients, which the server then has."""
        dense, initial = server.params, server.buffers
        losses, buffers = [], []
        for masks in candidates:
            server.params, server.buffers = masked(dense, masks), initial  # nothing of the last one's is left
            self.publish(server, masks)
            server.buffers = {**initial, **self._statistics(server)}
            losses.append(self._loss(server))
            buffers.append(server.buffers)
        best = min(range(len(losses)), key=losses.__getitem__)
        server.params, server.buffers = dense, buffers[best]
        server.results |= {"dev_losses": losses, "candidate": best}
        return candidates[best]

    @staticmethod
    def _statistics(server: Server) -> Params:
        """BatchNorm buffers of the current candidate: the clients' statistics, averaged."""
        assert server.ask is not None  # the engine sets it
        norms = _norms(server.model)
        like = _named(
            {name: (server.buffers[f"{name}.{MEAN}"], server.buffers[f"{name}.{VARIANCE}"]) for name in norms}
        )
        stats, counts = [], []
        for answer in server.ask(STATISTICS):
            try:
                check_same(answer.extras.get(BN, {}), like, f"statistics of client {answer.client}")
            except ArgumentError as error:
                logger.warning("client %d is left out of the selection: %s", answer.client, error)
                continue
            found = answer.extras[BN]
            stats.append({name: (found[f"{name}.{MEAN}"], found[f"{name}.{VARIANCE}"]) for name in norms})
            counts.append(answer.num_examples)
        if not stats:
            raise ArgumentError(
                "num_candidates: no client gave BatchNorm statistics. Set it to 1, or see the log for why"
            )
        found = _named(aggregate_bn_statistics(stats, counts))
        return {name: tensor.to(server.buffers[name]) for name, tensor in found.items()}

    @staticmethod
    def _loss(server: Server) -> float:
        assert server.ask is not None  # the engine sets it
        found = [
            (float(answer.metrics[LOSS]), answer.num_examples)
            for answer in server.ask(LOSS)
            if math.isfinite(float(answer.metrics.get(LOSS, math.nan)))
        ]
        return sum(loss * n for loss, n in found) / sum(n for _, n in found) if found else math.inf

    def answer(self, client: Client, sent: Sent) -> Update | None:
        if sent.query not in (STATISTICS, LOSS):
            return None
        batches = list(self._dev(client))
        rows = sum(map(len, batches))
        if sent.query == STATISTICS:
            stats = collect_bn_statistics(client.model, (batch.inputs for batch in batches))
            return Update({}, rows, extras={BN: _named(stats)})
        client.model.eval()
        with torch.no_grad():
            total = sum(
                len(batch) * float(client.loss(client.output(batch).prediction, batch.targets)) for batch in batches
            )
        return Update({}, rows, metrics={LOSS: total / rows})

    def _dev(self, client: Client) -> Iterable[Batch]:
        """Random rows of the client, the same for each query of a round, in batches that are as large as in training, or nearly."""
        order = torch.randperm(len(client), generator=client.generator)[: self.dev_size]
        parts = max(1, len(order) // client.local.batch_size)  # no batch of a few rows: its variance says little
        for rows in order.tensor_split(parts):
            yield from Loader(client.data, len(rows), device=client.device).batches(rows)

    # -- training: which weights --------------------------------------------------------------------------------------
    def due(self, round: int, masks: Masks) -> dict[str, int]:
        """The layers that are adjusted at the end of a round (1 is the first), and how many weights of each."""
        t = round - 1
        if t % self.interval or t >= self.t_stop:
            return {}
        blocks = self.blocks or [[name] for name in reversed(masks)]
        found = {}
        for name in blocks[t // self.interval % len(blocks)]:
            active, size = int(masks[name].sum()), masks[name].numel()
            found[name] = min(adjust_count(active, t, self.t_stop, alpha=self.alpha), size - active)
        return {name: k for name, k in found.items() if k}

    def client_update(self, client: Client, sent: Sent) -> Update:
        masks = unpacked(sent.extras, sent.params)
        trained = self.train(client, masks)
        due = self.due(sent.round, masks)
        return client.update(trained, extras={TOPK: self._upload(client, masks, due)} if due else None)

    def _upload(self, client: Client, masks: Masks, due: dict[str, int]) -> Params:
        """The largest gradients outside the masks on one batch. Backward stops at the layers that are due."""
        order = torch.randperm(len(client), generator=client.generator)[: self.dev_size]
        (batch,) = Loader(client.data, len(order), device=client.device).batches(order)
        parameters = dict(client.model.named_parameters())
        buffers = [(buffer, buffer.clone()) for buffer in client.model.buffers()]
        grads = torch.autograd.grad(
            client.batch_loss(batch), [parameters[name] for name in due], allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        found = {}
        for (name, k), grad in zip(due.items(), grads, strict=True):
            found[f"{name}.indices"], found[f"{name}.values"] = topk_gradients(grad, masks[name], k)
        return found

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        super().aggregate(server, updates)
        masks = unpacked(server.extras, server.params)
        for name, k in self.due(server.round, masks).items():
            numel, usable = masks[name].numel(), []
            for update in updates:
                sent = update.extras.get(TOPK, {})
                places, values = sent.get(f"{name}.indices"), sent.get(f"{name}.values")
                fault = _unfit(places, values, numel)
                if not fault and len(places) > k:  # type: ignore[arg-type]
                    fault = f"{len(places)} gradients where {k} are due"  # type: ignore[arg-type]
                if fault:
                    text = "round %d: the gradients of client %d are left out: it sent %s"
                    logger.warning(text, server.round, update.client, fault)
                else:
                    usable.append(((places, values), update.num_examples))
            if usable:
                grad = merge_topk([upload for upload, _ in usable], [n for _, n in usable], numel)  # type: ignore[misc]
                weight = server.params[name]
                weight, masks[name] = grow_prune(weight, masks[name], grad.to(weight.device), k)
                server.params = {**server.params, name: weight}
        self.publish(server, masks)


def _named(stats: Statistics) -> Params:
    """Statistics under the names that the model gives these buffers."""
    return {
        f"{name}.{key}": value
        for name, pair in stats.items()
        for key, value in zip((MEAN, VARIANCE), pair, strict=True)
    }
