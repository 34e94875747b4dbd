"""FedLoGe: a long tail over clients that are skewed differently; one shared backbone, a generic model, and a personal one for each.

The backbone is trained against a fixed classifier whose directions are as far apart as can be and whose rows are sparse (SSE-C), so
that no class's frequency bends it. Beside it, on detached features, a global head g (averaged) and each client's own head k (never
sent) learn what the fixed one cannot: their rows' norms are the frequencies of the classes, those of all data and those of the
client. After training they realign without data (GLA-FR):

    M   = sqrt(C / (C - 1)) P (I - 1 1^T / C),    P (D, C) orthonormal        simplex: all cosines are -1 / (C - 1)
    W   = kept entries of M, moved by Adam:  sum_c (|W_c| - norm)^2 - mean_c arccos(largest cosine of W_c with another column)
    step on one minibatch, z = f(x):  f by CE(W^T z),  g by CE(g(z.detach())),  k by CE(k(z.detach()))
    generic    f with W,  or with the rows w_c tau / |w_c| of g
    personal   argmax over the client's classes of  [|w^k_c| w^g_c z + b^g_c]  +  [w^k_c z + b^k_c]

## When to use
A long tail of classes over all clients, and clients that hold few classes each and come back: they are served by what they keep.

## When not
Clients that are met once have no head of their own, and get the global one among their classes. More classes than features: the
simplex does not exist. Short trainings with rows of norm 0.1, which give the backbone small gradients: raise ``norm`` to 3.

## Cost
Two linear heads on detached features a step, and one head kept on each client. The fixed classifier once: ``etf_steps`` steps on a
matrix (D, C), about a second for 64 x 10 and 20 for 512 x 100, in each process; 1000 steps mostly do. It is made alike on both
sides from the seed, and never sent.

## In a distributed run
Each client's head is in its state (``fedloge-head``; in Flower ``context.state``). Any mean of the parameters averages backbone and
global head.

## Source
Zikai Xiao, Zihan Chen, Liyinglan Liu, Yang Feng, Jian Wu, Wanlu Liu, Joey Tianyi Zhou, Howard Hao Yang and Zuozhu Liu: FedLoGe:
Joint Local and Generic Federated Learning under Long-tailed Data. ICLR 2024, arXiv:2401.08977. Unlike the authors' code, the fixed
classifier has no bias, absent classes get -inf, and which are absent is read from a client's training labels. A ``norm`` above 0.1
scales here what was optimised at 0.1, since growing the rows would leave few steps for the angles.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range, refuse
from equipoise.federated.algorithm import Client, FederatedMethod, Sent, Server, Update
from equipoise.federated.params import Params, descend, zeros
from equipoise.training.assemble import derived_seed
from equipoise.training.batch import Loader
from equipoise.training.features import find_head
from equipoise.training.method import Paper
from equipoise.training.metrics import accuracy
from equipoise.training.space import Choice, LogUniform, Space

HEAD = "fedloge-head"
NORM = 0.1  # of the rows as they are optimised, at most
REDRAWS = 10  # of the sparse entries, until each class keeps one
Head = tuple[Tensor, Tensor]  # weight (C, D), bias (C,)


# -- the fixed classifier ---------------------------------------------------------------------------------------------
def simplex_etf(
    num_classes: int, feat_dim: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A simplex equiangular tight frame (D, C) in a random rotation: columns of norm 1, all cosines -1 / (C - 1).

    Computed in float64. Raises ``ArgumentError``: num_classes < 2, feat_dim < num_classes.
    """
    check_integer("num_classes", num_classes, 2)
    if feat_dim < num_classes:
        refuse("feat_dim", feat_dim, f"be at least the number of classes, {num_classes}", "Widen the last hidden layer")
    device = torch.device("cpu") if generator is None else generator.device
    drawn = torch.rand(feat_dim, num_classes, generator=generator, dtype=torch.float64, device=device)
    basis = torch.linalg.qr(drawn).Q
    return (math.sqrt(num_classes / (num_classes - 1)) * (basis - basis.mean(1, keepdim=True))).to(dtype)


def sparsify(etf: Tensor, sparsity: float = 0.6, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """``int(sparsity D C)`` entries of the matrix (D, C), drawn without replacement, become 0.

    Returns the matrix, and the mask (D, C) bool of the entries that are kept. Drawn anew, up to 10 times, until each column keeps
    one. Raises ``ArgumentError``: sparsity outside [0, 1), or a column that is left empty.
    """
    check_range("sparsity", sparsity, 0, 1, open_high=True)
    _check_matrix("etf", etf)
    dropped = int(sparsity * etf.numel())
    device = torch.device("cpu") if generator is None else generator.device
    for _ in range(1 + REDRAWS):
        order = torch.randperm(etf.numel(), generator=generator, device=device).to(etf.device)
        mask = torch.ones(etf.numel(), dtype=torch.bool, device=etf.device)
        mask[order[:dropped]] = False
        mask = mask.view(etf.shape)
        if mask.any(0).all():
            return etf * mask, mask
    raise ArgumentError(
        f"sparsity = {sparsity}: leaves a column of {tuple(etf.shape)} without an entry. Lower it, or widen the features"
    )


def optimize_sparse_etf(
    weight: Tensor, mask: Tensor, *, steps: int = 10_000, lr: float = 1e-4, norm: float = 0.1
) -> Tensor:
    """Move the kept entries of (D, C) by Adam towards columns of one norm whose nearest neighbour is far away.

    The loss is ``sum_c (|W_c| - norm)^2 - mean_c arccos(clamp(max_c' cos(W_c, W_c'), -0.99999, 0.99999))``; of equally near
    neighbours one counts. Dropped entries stay exactly 0. Computed in float64, on the CPU. Raises ``ArgumentError``: shapes that
    differ, a column without a kept entry, settings out of range.
    """
    check_integer("steps", steps, 0)
    check_range("lr", lr, 0, open_low=True)
    check_range("norm", norm, 0, open_low=True)
    _check_matrix("weight", weight)
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        refuse("mask", f"{mask.dtype} {tuple(mask.shape)}", f"be bool of the shape {tuple(weight.shape)}, as weight")
    w, kept = weight.detach().double().cpu(), mask.double().cpu()
    w = w * kept
    if not bool((w != 0).any(0).all()):
        raise ArgumentError(
            "weight: a column has no kept entry other than 0. Draw the mask anew, or lower the sparsity"
        )
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, steps + 1):
        gradient = _etf_gradient(w, norm).mul_(kept)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        w.addcdiv_(first, second.sqrt().add_(1e-8 * math.sqrt(1 - 0.999**step)), value=-rate)
    return w.to(weight)


def _etf_gradient(w: Tensor, norm: float) -> Tensor:
    """The gradient of the loss of ``optimize_sparse_etf``, written out: a third of the time of autograd's."""
    lengths = torch.linalg.vector_norm(w, dim=0)
    unit = w / lengths
    cosines = unit.T @ unit
    nearest, neighbour = cosines.fill_diagonal_(-1.0).max(1, keepdim=True)
    slope = torch.where(nearest.abs() <= 0.99999, (1 - nearest.square()).clamp(min=1e-12).rsqrt(), 0.0) / w.shape[1]
    pairs = torch.zeros_like(cosines).scatter_(1, neighbour, slope)
    pull = unit @ (pairs + pairs.T)
    pull = (pull - unit * (unit * pull).sum(0)) / lengths
    return pull.addcmul_(unit, 2 * (lengths - norm))


class SSEClassifier(nn.Module):
    """The fixed classifier (N, D) -> (N, C): a sparse simplex, optimised once, without bias and without trainable parameters.

    Buffers ``weight`` (C, D) and ``mask`` (C, D), the kept entries. sparsity, norm, steps, lr: see ``sparsify`` and
    ``optimize_sparse_etf``. Raises ``ArgumentError`` as they do.
    """

    weight: Tensor
    mask: Tensor

    def __init__(
        self,
        feat_dim: int,
        num_classes: int,
        *,
        sparsity: float = 0.6,
        norm: float = 0.1,
        steps: int = 10_000,
        lr: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        etf = simplex_etf(num_classes, feat_dim, generator=generator)
        sparse, mask = sparsify(etf, sparsity, generator=generator)
        made = optimize_sparse_etf(sparse, mask, steps=steps, lr=lr, norm=norm)
        self.register_buffer("weight", made.T.contiguous())
        self.register_buffer("mask", mask.T.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


# -- realignment ------------------------------------------------------------------------------------------------------
def global_realign(weight: Tensor, tau: float = 1.7) -> Tensor:
    """Rows of (C, D) brought to the norm ``tau``, ``w_c tau / |w_c|``; rows of zeros stay. Raises ``ArgumentError``: tau <= 0."""
    check_range("tau", tau, 0, open_low=True)
    _check_matrix("weight", weight)
    lengths = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return torch.where(lengths > 0, weight * (tau / torch.where(lengths > 0, lengths, 1.0)), weight)


def local_realign(global_weight: Tensor, local_weight: Tensor) -> Tensor:
    """Rows of the global head (C, D), as they are, times the norms of the local one's rows.

    Raises ``ArgumentError`` for shapes that differ.
    """
    _check_matrix("global_weight", global_weight)
    if local_weight.shape != global_weight.shape:
        refuse(
            "local_weight", tuple(local_weight.shape), f"have the shape {tuple(global_weight.shape)} of global_weight"
        )
    return global_weight * torch.linalg.vector_norm(local_weight, dim=1, keepdim=True)


def local_logits(features: Tensor, global_head: Head, local_head: Head, present: Tensor | None = None) -> Tensor:
    """A client's logits (N, C): the global head, realigned by ``local_realign``, plus the client's own.

    features: (N, D). global_head, local_head: (weight (C, D), bias (C,)) as trained. present: (C,) bool, the classes of the
    client's training data; all others get -inf. Raises ``ArgumentError``: shapes that differ, ``present`` without a class.
    """
    weight, bias = global_head
    own, own_bias = local_head
    for name, given in (("global_head", bias), ("local_head", own_bias)):
        if given.shape != weight.shape[:1]:
            refuse(f"{name} bias", tuple(given.shape), f"have the shape {tuple(weight.shape[:1])}")
    if features.ndim != 2 or features.shape[1] != weight.shape[1]:
        refuse("features", tuple(features.shape), f"have the shape (N, {weight.shape[1]})")
    return _among(F.linear(features, local_realign(weight, own) + own, bias + own_bias), present)


def _among(logits: Tensor, present: Tensor | None) -> Tensor:
    if present is None:
        return logits
    if present.shape != logits.shape[1:] or present.dtype != torch.bool or not bool(present.any()):
        shown = f"{present.dtype} {tuple(present.shape)}, {int(present.sum())} present"
        refuse("present", shown, f"be bool of the shape {tuple(logits.shape[1:])} with at least one class")
    return logits.masked_fill(~present, -torch.inf)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.ndim != 2 or not matrix.is_floating_point():
        refuse(name, f"{matrix.dtype} {tuple(matrix.shape)}", "be a floating-point matrix")


# -- the method -------------------------------------------------------------------------------------------------------
class LoGeHead(nn.Module):
    """What takes a classifier's place: the fixed one, ``sse``, and the global head, ``auxiliary``, the model's own classifier.

    forward(z) gives the logits of ``sse``, or of the realigned global head if ``tau`` is set; ``features`` is the last z, detached.
    """

    def __init__(self, sse: SSEClassifier, auxiliary: nn.Linear, tau: float | None = None) -> None:
        super().__init__()
        self.sse, self.auxiliary, self.tau = sse, auxiliary, tau
        self.features: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.tau is not None:
            return F.linear(z, global_realign(self.auxiliary.weight, self.tau), self.auxiliary.bias)
        self.features = z.detach()
        return self.sse(z)

    def keep(self, persistent: bool) -> None:
        """Whether ``state_dict`` holds the fixed classifier. It does not while clients train: it is never sent."""
        for name, buffer in list(self.sse.named_buffers()):
            self.sse.register_buffer(name, buffer, persistent=persistent)


class FedLoGe(FederatedMethod):
    """A backbone trained against a fixed sparse simplex, with a global head and one private head for each client.

    sparsity: share of the fixed classifier's entries that are 0, in [0, 1). norm: of its rows, > 0. etf_steps: length of its
    optimisation, with Adam at the rate 1 / etf_steps. tau: norm of the realigned global head's rows, > 0. classifier: name of the
    last linear layer, by default the model's head.

    The model predicts by the fixed classifier. ``server.results["realigned"]`` is a copy that predicts by the realigned global
    head, and ``personal_logits`` what a client predicts for itself, on which ``evaluate`` runs. A client's head starts as the
    global one is when the client is first drawn.
    """

    name: ClassVar[str] = "fedloge"
    paper: ClassVar[Paper | None] = Paper(
        "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data",
        "Zikai Xiao, Zihan Chen, Liyinglan Liu, Yang Feng, Jian Wu, Wanlu Liu, Joey Tianyi Zhou, Howard Hao Yang, Zuozhu Liu",
        "ICLR 2024",
        "https://arxiv.org/abs/2401.08977",
    )
    space: ClassVar[Space] = {"sparsity": Choice((0.3, 0.6, 0.8)), "norm": LogUniform(0.1, 5.0)}

    def __init__(
        self,
        sparsity: float = 0.6,
        norm: float = 0.1,
        etf_steps: int = 10_000,
        tau: float = 1.7,
        classifier: str | None = None,
    ) -> None:
        check_range("sparsity", sparsity, 0, 1, open_high=True)
        check_range("norm", norm, 0, open_low=True)
        check_integer("etf_steps", etf_steps, 0)
        check_range("tau", tau, 0, open_low=True)
        self.sparsity, self.norm, self.etf_steps, self.tau, self.classifier = sparsity, norm, etf_steps, tau, classifier

    # -- the model ----------------------------------------------------------------------------------------------------
    def configure_model(self, model: nn.Module, seed: int) -> nn.Module:
        head = find_head(model, self.classifier)
        if not isinstance(head, nn.Linear):
            refuse("classifier", self.classifier, f"name a linear layer; found {type(head).__name__}")
        if head.bias is None:
            head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
        sse = _classifier(head.in_features, head.out_features, self.sparsity, self.norm, self.etf_steps, seed)
        made = LoGeHead(copy.deepcopy(sse).to(head.weight), head)
        made.keep(False)
        name = next(name for name, module in model.named_modules() if module is head)
        if not name:
            raise ArgumentError("model is one linear layer: FedLoGe needs features before it")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        return model

    # -- training -----------------------------------------------------------------------------------------------------
    def client_update(self, client: Client, sent: Sent) -> Update:
        head, prefix = _head(client.model)
        params, local = client.params, client.local
        names = {key: f"{prefix}auxiliary.{key}" for key in ("weight", "bias")}
        shared = {key: params[name] for key, name in names.items()}
        backbone = {name: tensor for name, tensor in params.items() if name not in names.values()}
        groups = [backbone, shared, client.state.get(HEAD) or dict(shared)]
        velocities = [zeros(group) for group in groups]
        parameters = dict(client.model.named_parameters())
        leaves = [parameters[name] for name in (*backbone, *names.values())]
        seen = torch.zeros((), device=client.device)
        for batch in client.batches():
            client.set(self._whole(groups, names))
            own = {key: tensor.detach().requires_grad_() for key, tensor in groups[2].items()}
            loss = client.batch_loss(batch)
            assert head.features is not None  # the model has called its head
            # Detached features separate the three losses: one pass backwards gives each group the gradient of its own.
            beside = [head.auxiliary(head.features), F.linear(head.features, own["weight"], own["bias"])]
            total = loss + sum(client.loss(logits, batch.targets) for logits in beside)
            found = torch.autograd.grad(total, [*leaves, *own.values()], allow_unused=True, materialize_grads=True)
            parts = (found[: len(backbone)], found[len(backbone) : len(leaves)], found[len(leaves) :])
            directions = [dict(zip(group, part, strict=True)) for group, part in zip(groups, parts, strict=True)]
            groups = [
                descend(
                    group,
                    direction,
                    lr=local.lr,
                    weight_decay=local.weight_decay,
                    clip_norm=local.clip_norm,
                    momentum=local.momentum,
                    velocity=velocity,
                )
                for group, direction, velocity in zip(groups, directions, velocities, strict=True)
            ]
            seen += loss.detach()
            client.num_steps += 1
        if not client.num_steps:
            raise ArgumentError(
                f"client {client.number}: none of its batches has least_batch = {local.least_batch} examples, of {len(client)}"
            )
        head.features = None
        client.state[HEAD] = groups[2]
        trained = self._whole(groups, names)
        client.set(trained)
        return client.update(trained, metrics={"loss": float(seen) / client.num_steps})

    @staticmethod
    def _whole(groups: list[Params], names: dict[str, str]) -> Params:
        """Backbone and global head under the model's own names."""
        return {**groups[0], **{name: groups[1][key] for key, name in names.items()}}

    # -- prediction ---------------------------------------------------------------------------------------------------
    def personal_logits(self, client: Client, data: Any) -> tuple[Tensor, Tensor]:
        """Logits (N, C) of a client's own model for a data set, and its targets; classes the client never trained on get -inf.

        A client that was never drawn has no head of its own, and uses the global one.
        """
        head, _ = _head(client.model)
        kept: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
        try:
            _, targets = client.predict(data)
        finally:
            handle.remove()
        weight, bias = head.auxiliary.weight.detach(), head.auxiliary.bias.detach()
        features, present = torch.cat(kept), present_classes(client, len(bias))
        own = client.state.get(HEAD)
        if own is None:
            return _among(F.linear(features, weight, bias), present), targets
        return local_logits(features, (weight, bias), (own["weight"], own["bias"]), present), targets

    def evaluate(self, client: Client, sent: Sent) -> dict[str, float]:
        """Accuracy of the client's own model, and ``generic-accuracy``, that of the shared one."""
        if client.test is None:
            return {}
        generic, _ = client.predict(client.test)
        personal, targets = self.personal_logits(client, client.test)
        numbers = {"accuracy": accuracy(personal, targets), "generic-accuracy": accuracy(generic, targets)}
        return {**numbers, "num-test": float(len(targets))}

    def finish(self, server: Server) -> None:  # type: ignore[override]
        model = server.load()
        _head(model)[0].keep(True)
        realigned = copy.deepcopy(model)
        _head(realigned)[0].tau = self.tau
        server.results["realigned"] = realigned


@lru_cache(maxsize=32)
def _classifier(width: int, classes: int, sparsity: float, norm: float, steps: int, seed: int) -> SSEClassifier:
    """The fixed classifier of a seed, made once in a process."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "fedloge"))
    settings = {"sparsity": sparsity, "norm": min(norm, NORM), "steps": steps, "lr": 1 / max(1, steps)}
    made = SSEClassifier(width, classes, generator=generator, **settings)  # type: ignore[arg-type]
    if norm > NORM:
        made.weight.mul_(norm / torch.linalg.vector_norm(made.weight, dim=1).mean())
    return made


def _head(model: nn.Module) -> tuple[LoGeHead, str]:
    """FedLoGe's head in a model, and the prefix of its parameters' names."""
    return next((module, f"{name}.") for name, module in model.named_modules() if isinstance(module, LoGeHead))


def present_classes(client: Client, num_classes: int) -> Tensor:
    """Which classes a client's training data hold: (C,) bool."""
    targets = getattr(client.data, "targets", None)
    if not isinstance(targets, Tensor):
        targets = torch.cat([batch.targets for batch in Loader(client.data, 1024)])
    return torch.bincount(targets.to(client.device), minlength=num_classes).bool()
