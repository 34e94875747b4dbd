"""What methods with two networks share: a second network with weights of its own, and the mean of both for prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError
from equipoise.training.batch import Output


class LogitAverage(nn.Module):
    """Several networks as one: predicts the mean of their logits, ``(z_1 + ... + z_K) / K``.

    networks: the modules, held by reference (training them further changes this module). Each may return whatever
    ``Output.of`` reads; keyword arguments (dict inputs) are handed to all of them. Returns a tensor shaped as their predictions.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        if not len(self.networks):
            raise ArgumentError("networks = []: must hold at least one module")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([Output.of(network(*args, **kwargs)).prediction for network in self.networks]).mean(0)


def make_peer(model: nn.Module, generator: torch.Generator, *, peer: nn.Module | None = None) -> nn.Module:
    """A second network like ``model``, with fresh weights drawn independently of it.

    Copies ``model`` and calls ``reset_parameters`` of its modules, children before parents, under a seed drawn from
    ``generator``; torch's global generators are left as they were. So the weights follow the layers' own initialisation:
    what ``model`` did to them afterwards (custom or pretrained weights) is not repeated, except that frozen parameters keep
    their values. Where that is not wanted, hand over a ready ``peer`` (for a pretrained model for instance a deep copy of it);
    it is returned as it is.

    Raises ``ArgumentError`` naming the first trainable parameter that no ``reset_parameters`` initialises, or if ``peer`` shares
    parameters with ``model``.
    """
    if peer is not None:
        shared = {id(p) for p in model.parameters()} & {id(p) for p in peer.parameters()}
        if shared:
            raise ArgumentError(
                f"peer = {type(peer).__name__}: must be a network of its own, but shares {len(shared)} parameters with the model. "
                "Pass copy.deepcopy(model) or a second instance"
            )
        return peer
    peer = copy.deepcopy(model)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    trainable = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    dtypes = {name: p.dtype for name, p in trainable.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        # NaN marks what no module initialises, also where a reset_parameters exists but reaches only some parameters.
        for parameter in trainable.values():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()  # the same draws for a model of any precision
            parameter.fill_(math.nan)
        for module in reversed(list(peer.modules())):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset) and all(p.requires_grad for p in module.parameters()):
                reset()
    for name, parameter in trainable.items():
        parameter.data = parameter.data.to(dtypes[name])
        if parameter.isnan().any():
            owner = peer.get_submodule(name.rpartition(".")[0])
            raise ArgumentError(
                f"model parameter {name!r} of {type(owner).__name__}: cannot be initialised afresh for the second network. "
                "Give that module a reset_parameters() method, or pass a ready second network: peer=..."
            )
    return peer
