"""FedSpeed: local steps that stay near the global model without its bias, for skewed clients and long rounds; and its baselines.

Clients whose data differ drift apart in a round; their mean is not the minimum that they share. A pull to the round's global
model x (FedProx) shortens the drift but moves the fixed point. FedSpeed adds what the pull gets wrong, learned by each client
as the sum h_i of its own drifts, and takes the gradient at a point ascended by rho (as SAM does), which favours flat minima:

    g1 = grad F_i(w),  g2 = grad F_i(w + rho g1 / (||g1|| + 1e-7)),  both on the same minibatch
    q  = (1 - alpha) g1 + alpha g2 + prox (w - x + h_i)
    w <- w - lr (clip(q) + weight_decay w)                                  K local steps from w = x
    h_i <- h_i + (w - x)                                                    kept by the client
    x <- mean over the drawn clients of w  +  (1/m) sum over all m clients of h_i

The server needs only the sum of the h_i, to which it adds the drifts that arrive; nothing more than with FedAvg is sent. At a
common minimum every pull is cancelled, ``h_i = -grad F_i / prox``. FedAvg, FedProx, SCAFFOLD and FedSAM, defined below, are
its baselines.

## When to use
Few rounds, many local steps, skewed labels, few clients drawn in a round. Clients come back, so that their h_i mean something.

## When not
Clients that are seen once (h_i stays 0, which leaves FedProx with a SAM gradient). Clients that lose what they keep: the
server's sum still holds it. Clients that are nearly alike: there is no drift to correct, and a step still takes two gradients.

## Cost
Two gradients a step (FedSAM too; FedAvg, FedProx and SCAFFOLD one), one vector of the model's size on each client and one on the
server. SCAFFOLD sends one more such vector to each client; what it needs back, the server computes from the update.

## In a distributed run
Clients are what is distributed. One seed gives the same numbers in one process, on Ray and on SuperNodes (see
``equipoise.integrations.flower``). A client works on one device.

## Source
Yan Sun, Li Shen, Tiansheng Huang, Liang Ding and Dacheng Tao: FedSpeed: Larger Local Interval, Less Communication Round, and Higher
Generalization Accuracy. ICLR 2023, arXiv:2302.10429. As in the authors' code, the server's sum runs over all clients
(``correction="all"``); with all of them drawn, the paper's mean over the drawn ones ("active") is the same. The whole of q is
clipped, where the code leaves a part of the pull out. FedAvg: McMahan et al., AISTATS 2017. FedProx: Li et al., MLSys 2020.
SCAFFOLD: Karimireddy et al., ICML 2020. FedSAM: Qu et al., ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from equipoise.errors import ArgumentError, check_choice, check_range, refuse
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update
from equipoise.federated.params import GradFn, Params, add_, descend, minus, norm, plus, times, weighted_mean, zeros
from equipoise.training.method import Paper
from equipoise.training.space import Choice, LogUniform, Space


# -- directions: what takes the gradient's place in a local step ------------------------------------------------------
def sam_gradient(params: Params, grad_fn: GradFn, *, rho: float, alpha: float = 1.0, eps: float = 1e-7) -> Params:
    """``(1 - alpha) g1 + alpha g2``: g1 the gradient at ``params``, g2 at ``params + rho g1 / (||g1|| + eps)``.

    The norm is over all parameters jointly. rho = 0 or alpha = 0 is one gradient. Raises ``ArgumentError``: rho < 0, alpha outside
    [0, 1].
    """
    check_range("rho", rho, 0)
    check_range("alpha", alpha, 0, 1)
    first = grad_fn(params)
    if rho == 0 or alpha == 0:
        return first
    ascent = torch._foreach_mul(list(first.values()), rho / (norm(first) + eps))
    second = grad_fn(plus(params, dict(zip(first, ascent, strict=True))))
    return second if alpha == 1 else plus(times(first, 1 - alpha), second, alpha)


def fedspeed_direction(
    params: Params,
    grad_fn: GradFn,
    *,
    anchor: Params,
    dual: Params,
    prox: float = 0.1,
    rho: float = 0.1,
    alpha: float = 1.0,
) -> Params:
    """``sam_gradient + prox (w - anchor + dual)``. Raises ``ArgumentError``: prox < 0, and as ``sam_gradient``."""
    check_range("prox", prox, 0)
    gradient = sam_gradient(params, grad_fn, rho=rho, alpha=alpha)
    return plus(gradient, add_(minus(params, anchor), dual), prox) if prox else gradient


def fedprox_direction(params: Params, grad_fn: GradFn, *, anchor: Params, mu: float) -> Params:
    """``grad F_i(w) + mu (w - anchor)``. Raises ``ArgumentError``: mu < 0."""
    check_range("mu", mu, 0)
    return plus(grad_fn(params), minus(params, anchor), mu) if mu else grad_fn(params)


def scaffold_direction(params: Params, grad_fn: GradFn, *, client_control: Params, server_control: Params) -> Params:
    """``grad F_i(w) - c_i + c``."""
    return add_(minus(grad_fn(params), client_control), server_control)


# -- one local step ---------------------------------------------------------------------------------------------------
def fedspeed_step(
    params: Params,
    grad_fn: GradFn,
    *,
    anchor: Params,
    dual: Params,
    lr: float,
    prox: float = 0.1,
    rho: float = 0.1,
    alpha: float = 1.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Params:
    """One local step of FedSpeed from the client's ``params``: anchor is the round's global model, dual the client's h_i."""
    direction = fedspeed_direction(params, grad_fn, anchor=anchor, dual=dual, prox=prox, rho=rho, alpha=alpha)
    return descend(params, direction, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm)


def fedavg_step(
    params: Params, grad_fn: GradFn, *, lr: float, weight_decay: float = 0.0, clip_norm: float | None = None
) -> Params:
    """One step of SGD: ``w - lr (clip(grad F_i(w)) + weight_decay w)``."""
    return descend(params, grad_fn(params), lr=lr, weight_decay=weight_decay, clip_norm=clip_norm)


def fedprox_step(
    params: Params,
    grad_fn: GradFn,
    *,
    anchor: Params,
    lr: float,
    mu: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Params:
    """One local step of FedProx."""
    direction = fedprox_direction(params, grad_fn, anchor=anchor, mu=mu)
    return descend(params, direction, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm)


def fedsam_step(
    params: Params,
    grad_fn: GradFn,
    *,
    lr: float,
    rho: float = 0.1,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Params:
    """One local step of FedSAM."""
    return descend(
        params, sam_gradient(params, grad_fn, rho=rho), lr=lr, weight_decay=weight_decay, clip_norm=clip_norm
    )


def scaffold_step(
    params: Params,
    grad_fn: GradFn,
    *,
    client_control: Params,
    server_control: Params,
    lr: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Params:
    """One local step of SCAFFOLD."""
    direction = scaffold_direction(params, grad_fn, client_control=client_control, server_control=server_control)
    return descend(params, direction, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm)


# -- after the local steps, and on the server -------------------------------------------------------------------------
def fedspeed_dual(dual: Params, local: Params, anchor: Params) -> Params:
    """``h_i + (w - anchor)``: what a client keeps after a round that took it from ``anchor`` to ``local``."""
    return plus(dual, minus(local, anchor))


def fedspeed_aggregate(locals_: Sequence[Params], dual_mean: Params, weights: Sequence[float] | None = None) -> Params:
    """Mean of the drawn clients' parameters, plus ``dual_mean``, the mean of h_i over all. Raises as ``fedavg_aggregate``."""
    return plus(fedavg_aggregate(locals_, weights), dual_mean)


def fedavg_aggregate(locals_: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """``sum_i a_i w_i``, the weights a_i normalised, by default equal. Raises ``ArgumentError``: no updates, weights negative or
    with the sum 0, names or shapes that differ."""
    return weighted_mean(locals_, weights)


def scaffold_control(
    client_control: Params, server_control: Params, local: Params, anchor: Params, *, num_steps: int, lr: float
) -> Params:
    """``c_i - c + (anchor - local) / (num_steps lr)``, the client's next control. ``lr`` is that of the round.

    Raises ``ArgumentError``: num_steps < 1, lr <= 0.
    """
    if num_steps < 1:
        refuse("num_steps", num_steps, "be an integer >= 1")
    check_range("lr", lr, 0, open_low=True)
    return plus(minus(client_control, server_control), minus(anchor, local), 1 / (num_steps * lr))


# -- methods ----------------------------------------------------------------------------------------------------------
class FedSpeed(FederatedMethod):
    """Local steps with a proximal pull, its correction kept by each client, and a SAM gradient.

    prox: strength of the pull, >= 0 (the paper's 1 / lambda). rho: ascent radius >= 0; 0 is a plain gradient. alpha: weight of the
    ascended gradient, in [0, 1]. correction: "all" adds the mean of h_i over all clients on the server; "active" lets the drawn
    clients send ``w + h_i``, whose mean over few of them varies more. clip_norm: of the step's direction, in place of
    ``LocalTraining.clip_norm``; None leaves that. Drawn clients count alike, whatever their size: the h_i balance equal terms.
    With rho = 0 and prox = 0 it is FedAvg with equal weights.
    """

    name: ClassVar[str] = "fedspeed"
    paper: ClassVar[Paper | None] = Paper(
        "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
        "Yan Sun, Li Shen, Tiansheng Huang, Liang Ding, Dacheng Tao",
        "ICLR 2023",
        "https://arxiv.org/abs/2302.10429",
    )
    space: ClassVar[Space] = {"prox": LogUniform(0.01, 1.0), "rho": LogUniform(0.01, 0.3)}
    neutral: ClassVar[dict[str, Any] | None] = {"prox": 0.0, "rho": 0.0}
    weighted = False

    def __init__(
        self,
        prox: float = 0.1,
        rho: float = 0.1,
        alpha: float = 1.0,
        correction: str = "all",
        clip_norm: float | None = 10.0,
    ) -> None:
        check_range("prox", prox, 0)
        check_range("rho", rho, 0)
        check_range("alpha", alpha, 0, 1)
        check_choice("correction", correction, ("all", "active"))
        if clip_norm is not None:
            check_range("clip_norm", clip_norm, 0, open_low=True)
        self.prox, self.rho, self.alpha, self.correction, self.clip_norm = prox, rho, alpha, correction, clip_norm

    def client_update(self, client: Client, sent: Sent) -> Update:
        dual = client.state.get("fedspeed-dual") or zeros(sent.params)

        def direction(params: Params, grad_fn: GradFn) -> Params:
            return fedspeed_direction(
                params, grad_fn, anchor=sent.params, dual=dual, prox=self.prox, rho=self.rho, alpha=self.alpha
            )

        local = client.train(direction, clip_norm=self.clip_norm)
        if not self.prox:  # no pull, nothing to correct
            return client.update(local)
        client.state["fedspeed-dual"] = dual = fedspeed_dual(dual, local, sent.params)
        return client.update(plus(local, dual) if self.correction == "active" else local)

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        locals_ = [update.params for update in updates]
        server.buffers = self.mean_buffers(updates)
        if self.correction == "active" or not self.prox:
            server.params = fedavg_aggregate(locals_)
            return
        total = server.state.get("fedspeed-dual-sum") or zeros(server.params)
        for local in locals_:
            total = fedspeed_dual(total, local, server.params)
        server.state["fedspeed-dual-sum"] = total
        server.params = fedspeed_aggregate(locals_, times(total, 1 / server.num_clients))


class FedAvg(FederatedMethod):
    """Federated averaging: clients run SGD, the server takes the mean of their parameters.

    weighted: weigh clients by their numbers of examples, or all alike.
    """

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[Paper | None] = Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        "H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Aguera y Arcas",
        "AISTATS 2017",
        "https://arxiv.org/abs/1602.05629",
    )
    space: ClassVar[Space] = {"weighted": Choice((True, False))}
    neutral: ClassVar[dict[str, Any] | None] = {"weighted": True}

    def __init__(self, weighted: bool = True) -> None:
        self.weighted = weighted


class FedProx(FedAvg):
    """FedAvg with a pull to the round's global model in every local step.

    mu: strength of the pull, >= 0; 0 is FedAvg. weighted: as in FedAvg.
    """

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[Paper | None] = Paper(
        "Federated Optimization in Heterogeneous Networks",
        "Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith",
        "MLSys 2020",
        "https://arxiv.org/abs/1812.06127",
    )
    space: ClassVar[Space] = {"mu": LogUniform(0.001, 1.0), "weighted": Choice((True, False))}
    neutral: ClassVar[dict[str, Any] | None] = {"mu": 0.0}

    def __init__(self, mu: float = 0.1, weighted: bool = True) -> None:
        check_range("mu", mu, 0)
        super().__init__(weighted)
        self.mu = mu

    def client_update(self, client: Client, sent: Sent) -> Update:
        return client.update(
            client.train(lambda w, grad_fn: fedprox_direction(w, grad_fn, anchor=sent.params, mu=self.mu))
        )


class FedSAM(FedAvg):
    """FedAvg with the gradient of every local step taken at a point ascended by ``rho``: twice the gradients.

    rho: ascent radius, >= 0; 0 is FedAvg. weighted: as in FedAvg.
    """

    name: ClassVar[str] = "fedsam"
    paper: ClassVar[Paper | None] = Paper(
        "Generalized Federated Learning via Sharpness Aware Minimization",
        "Zhe Qu, Xingyu Li, Rui Duan, Yao Liu, Bo Tang, Zhuo Lu",
        "ICML 2022",
        "https://arxiv.org/abs/2206.02618",
    )
    space: ClassVar[Space] = {"rho": LogUniform(0.01, 0.3), "weighted": Choice((True, False))}
    neutral: ClassVar[dict[str, Any] | None] = {"rho": 0.0}

    def __init__(self, rho: float = 0.1, weighted: bool = True) -> None:
        check_range("rho", rho, 0)
        super().__init__(weighted)
        self.rho = rho

    def client_update(self, client: Client, sent: Sent) -> Update:
        return client.update(client.train(lambda w, grad_fn: sam_gradient(w, grad_fn, rho=self.rho)))


class SCAFFOLD(FederatedMethod):
    """Local gradients corrected by control variates: a client's own, and the mean of all clients'.

    The server sends its control c along; a client keeps its own c_i and sends nothing more than its parameters and its number of
    steps K: the change of its control is ``(x - w) / (K lr) - c``, which the server computes. No setting makes it FedAvg; with one
    client it is, since both controls are then equal. Needs SGD without momentum. Drawn clients count alike.
    """

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[Paper | None] = Paper(
        "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        "Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich, Ananda Theertha Suresh",
        "ICML 2020",
        "https://arxiv.org/abs/1910.06378",
    )
    weighted = False

    def prepare(self, server: Server) -> None:  # type: ignore[override]
        if server.local.momentum:
            raise ArgumentError(
                f"momentum = {server.local.momentum}: SCAFFOLD reads a client's mean gradient off its drift. Use momentum = 0"
            )
        server.extras["scaffold-control"] = zeros(server.params)

    def client_update(self, client: Client, sent: Sent) -> Update:
        ours = sent.extras["scaffold-control"]
        own = client.state.get("scaffold-control") or zeros(sent.params)

        def direction(params: Params, grad_fn: GradFn) -> Params:
            return scaffold_direction(params, grad_fn, client_control=own, server_control=ours)

        local = client.train(direction)
        steps = {"num_steps": client.num_steps, "lr": client.local.lr}
        client.state["scaffold-control"] = scaffold_control(own, ours, local, sent.params, **steps)  # type: ignore[arg-type]
        return client.update(local)

    def aggregate(self, server: Server, updates: list[Update]) -> None:
        control, lr = server.extras["scaffold-control"], server.local.at(server.round).lr
        nothing, total = zeros(control), zeros(control)
        for update in updates:
            change = scaffold_control(nothing, control, update.params, server.params, num_steps=update.num_steps, lr=lr)
            add_(total, change)
        server.extras["scaffold-control"] = plus(control, total, 1 / server.num_clients)
        super().aggregate(server, updates)
