"""Defences of an update against being turned back into data: clipping, noise, sparsification, and larger batches.

What a client sends is its local step over the learning rate, a list of tensors that for one step is the batch's gradient g. A
defence changes it before it leaves the client:

    clipping         g min(1, C / ||g||)                  over all tensors jointly: changes the size alone
    noise            g_i + sigma rms(g_i) N(0, I)         for each tensor
    sparsification   of each tensor the ``keep`` largest in magnitude, 0 elsewhere
    larger batches   the gradient of more examples at once

Which of them lowers what an attack recovers, and at what price, ``equipoise compare privacy-audit`` measures on a model and data of
your own. None of them is a proof: a guarantee needs noise calibrated to a clipping bound, with an accountant of the privacy spent
(differential privacy), and an aggregation that shows the server no single client's update.

## When to use
Federated training whose updates somebody could read.

## When not
As a promise. Sigma is relative to the gradient, so that the noise gives no differential privacy.

## Cost
One pass over an update; sparsification selects in each tensor. Larger batches cost as many more forward and backward rows.

## In a distributed run
Each client defends what it sends; nothing is exchanged for it.

## Source
Folklore; as in the audits of Geiping et al.: Inverting Gradients, NeurIPS 2020, arXiv:2003.14053, and Zhu et al.: Deep Leakage from
Gradients, NeurIPS 2019, arXiv:1906.08935.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, check_integer, check_range
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Update
from equipoise.federated.params import minus, plus
from equipoise.training.losses import precise
from equipoise.training.space import Choice, LogUniform, Space


# -- on tensors -------------------------------------------------------------------------------------------------------
def clip_gradients(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """``g min(1, max_norm / ||g||)``, the 2-norm of all tensors jointly. Raises ``ArgumentError``: max_norm <= 0."""
    check_range("max_norm", max_norm, 0, open_low=True)
    tensors = _listed(grads)
    # Not by torch._foreach operations, which have no second derivative.
    norm = torch.linalg.vector_norm(torch.cat([precise(grad).reshape(-1) for grad in tensors]))
    factor = max_norm / norm.clamp_min(max_norm)
    return [grad * factor.to(grad.dtype) for grad in tensors]


def sparsify_gradients(grads: Sequence[Tensor], keep: float) -> list[Tensor]:
    """Each tensor's ``ceil(keep * size)`` largest entries in magnitude, 0 elsewhere. Differentiable in what is kept.

    keep: a share in (0, 1]. Of equals, those that ``topk`` takes. Raises ``ArgumentError`` for another.
    """
    check_range("keep", keep, 0, 1, open_low=True)
    found = []
    for grad in _listed(grads):
        flat = grad.reshape(-1)
        kept = flat.detach().abs().topk(min(flat.numel(), math.ceil(keep * flat.numel())), sorted=False).indices
        found.append(torch.zeros_like(flat).scatter(0, kept, flat.gather(0, kept)).view_as(grad))
    return found


def noise_gradients(grads: Sequence[Tensor], sigma: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Each tensor plus Gaussian noise of ``sigma`` times the tensor's root mean square. Raises ``ArgumentError``: sigma < 0."""
    check_range("sigma", sigma, 0)
    tensors = _listed(grads)
    device = tensors[0].device if generator is None else generator.device
    noise = [torch.randn(g.shape, generator=generator, device=device, dtype=torch.float32) for g in tensors]
    scale = [sigma * g.norm() / max(1, g.numel()) ** 0.5 for g in tensors]
    return [g + s * n.to(g) for g, s, n in zip(tensors, scale, noise, strict=True)]


def _listed(grads: Sequence[Tensor]) -> list[Tensor]:
    if not len(grads):
        raise ArgumentError("grads = []: must hold at least one tensor")
    return list(grads)


# -- methods ----------------------------------------------------------------------------------------------------------
class Defence(FederatedMethod):
    """Base of the defences: a client trains as in FedAvg, and what it sends is ``sent - lr * defend((sent - local) / lr)``.

    ``random``: whether the defence draws numbers, which an attacker cannot repeat; one that does not is known to the attacker.
    ``larger``: how many times as large as else the batches are.
    """

    random: ClassVar[bool] = False
    larger: int = 1

    def defend(self, grads: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """What is sent in the place of the gradients ``grads``, one tensor for each parameter."""
        return list(grads)

    def client_update(self, client: Client, sent: Sent) -> Update:
        lr = client.local.lr
        step = minus(sent.params, client.train())
        defended = self.defend([tensor / lr for tensor in step.values()], client.generator)
        return client.update(plus(sent.params, dict(zip(step, defended, strict=True)), -lr))


class Undefended(Defence):
    """Clients send what they computed: federated averaging, the baseline of the defences."""

    name = "undefended"
    neutral: ClassVar[dict[str, Any] | None] = {}


class ClippedUpdates(Defence):
    """Clients clip what they send to a largest norm.

    max_norm: > 0, of the local step over the learning rate, over all parameters jointly.
    """

    name = "clipped-updates"
    space: ClassVar[Space] = {"max_norm": LogUniform(0.05, 5.0)}
    neutral: ClassVar[dict[str, Any] | None] = {"max_norm": 1e30}

    def __init__(self, max_norm: float = 1.0) -> None:
        check_range("max_norm", max_norm, 0, open_low=True)
        self.max_norm = max_norm

    def defend(self, grads: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        return clip_gradients(grads, self.max_norm)


class NoisyUpdates(Defence):
    """Clients add Gaussian noise to what they send.

    sigma: standard deviation >= 0, in units of each tensor's root mean square; 0 is the baseline. No differential privacy: see
        above.
    """

    name = "noisy-updates"
    random: ClassVar[bool] = True
    space: ClassVar[Space] = {"sigma": LogUniform(0.1, 10.0)}
    neutral: ClassVar[dict[str, Any] | None] = {"sigma": 0.0}

    def __init__(self, sigma: float = 1.0) -> None:
        check_range("sigma", sigma, 0)
        self.sigma = sigma

    def defend(self, grads: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        return noise_gradients(grads, self.sigma, generator)


class SparseUpdates(Defence):
    """Clients send the largest entries of each tensor alone.

    keep: their share, in (0, 1]; 1 is the baseline.
    """

    name = "sparse-updates"
    space: ClassVar[Space] = {"keep": LogUniform(0.005, 0.5)}
    neutral: ClassVar[dict[str, Any] | None] = {"keep": 1.0}

    def __init__(self, keep: float = 0.1) -> None:
        check_range("keep", keep, 0, 1, open_low=True)
        self.keep = keep

    def defend(self, grads: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        return sparsify_gradients(grads, self.keep)


class LargerBatches(Defence):
    """Clients compute each step on a batch ``times`` as large, in which one example has less weight.

    times: an integer >= 1; 1 is the baseline. A client with fewer examples takes all of them.
    """

    name = "larger-batches"
    space: ClassVar[Space] = {"times": Choice((2, 4, 8, 16), ordered=True)}
    neutral: ClassVar[dict[str, Any] | None] = {"times": 1}

    def __init__(self, times: int = 4) -> None:
        check_integer("times", times, 1)
        self.times = self.larger = times

    def client_update(self, client: Client, sent: Sent) -> Update:
        client.local = replace(client.local, batch_size=client.local.batch_size * self.times)
        return client.update(client.train())
