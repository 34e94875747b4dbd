"""GradNormLoRP: normalise a matrix's rows, project the gradient of their directions to low rank, and only then run Adam.

Adam keeps two numbers for every weight, often more memory than the model. The gradient of a large matrix is nearly of low rank,
so GradNormLoRP projects it to rank `r` before Adam sees it; and since a projection loses least of a gradient that is well
conditioned, it first splits each row into a magnitude and a direction (weight normalisation).

A weight `W` (m, n) is `g v / ||v||` row by row, `u = v / ||v||`. With its gradient `G`

    grad_g = sum over columns of G u        grad_v = (g / ||v||) (G - grad_g u)       tangential to the row
    low = grad_v Q^T  ("right", m >= n)  or  P^T grad_v  ("left")
    v  <-  v - a_t scale back(d(low))       g  <-  g - a_t d(grad_g)
    W  <-  g v / ||v||

where `d` is Adam's direction, `a_t` its step size, `back(L)` is `L Q` or `P L`, and `Q` (r, n) or `P` (m, r) holds the first
singular vectors of `grad_v`, chosen anew every `update_gap` steps; moments are kept when the basis changes. `v` need not be
stored: it is `W ||v|| / g`. With `variant="official"` the step is that of the authors' code, in which the magnitude starts at
`||v||` in every step, so that its update is lost, and `grad_v = G`.

The second form is a layer: `W' = m (W0 + s B A) / ||W0 + s B A||` with `W0` frozen, in the shape of DoRA, of which only `m`, `A`
and `B` train.

## When to use
Training or fine-tuning all of a model where Adam's moments do not fit into memory (the optimizer form). For an adapter to hand
on, the layer form, which peft loads as DoRA.

## When not
Where memory is enough: full AdamW is ahead of it. Small matrices, or a rank near their smaller side, save nothing. Where weights
are sharded over processes (FSDP), since each would choose another basis. Weight decay shrinks the row norms only: the norm of
`v` does not show in `W`.

## Cost
Of a weight (m, n) at rank r the optimizer keeps `2 max(m, n) r + min(m, n) r + 4 m` numbers against Adam's `2 m n`: 5 % of it for
4096 x 4096 at rank 128, 38 % at rank 1024. `state_bits=8` keeps the projected moments (the first term) in 8 bit. Each step has a
product of m n r and a few passes over the matrix, and every `update_gap` steps a singular value decomposition.

## In a distributed run
Gradients are averaged before the step, so all processes choose the same basis.

## Source
Huang, Shen, Zhu, Rudinac, Kanoulas: Gradient Weight-normalized Low-rank Projection for Efficient LLM Training. AAAI 2025,
arXiv:2412.19616. Order of the steps and Adam as in the authors' LowRankWeightNormAdamW; the exact gradient of the normalised
weight (`variant="paper"`), the sign of basis vectors, the state without a copy of `v` and the moments in 8 bit are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.finetuning.adapters import Adapter, Target, attach, find_targets, lora_parameters, scaling_of
from equipoise.finetuning.adapters import export_peft as export_peft
from equipoise.finetuning.adapters import merge_adapters as merge_adapters
from equipoise.finetuning.eight_bit import dequantize, dither, quantize
from equipoise.finetuning.state import ExactOptimizer
from equipoise.finetuning.state import optimizer_state_numel as optimizer_state_numel
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space

SIDES, VARIANTS, MODES, BITS = (
    ("std", "left", "right", "both"),
    ("paper", "official"),
    ("optimizer", "adapter"),
    (32, 8),
)
TINY_NORM, TINY_MAGNITUDE = 1e-12, 1e-8


# -- the functional core ----------------------------------------------------------------------------------------------
def row_norm(weight: Tensor) -> Tensor:
    """The norm of each row of (m, n), as (m, 1)."""
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def weight_norm_gradients(
    gradient: Tensor, direction: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``magnitude`` (m, 1) and of ``v`` (m, n), where the weight is ``magnitude * v / norm``.

    gradient: of the weight, (m, n). direction: ``v / norm``. norm: of the rows of ``v``, (m, 1).
    """
    of_magnitude = (gradient * direction).sum(1, keepdim=True)
    return of_magnitude, torch.addcmul(gradient, of_magnitude, direction, value=-1).mul_(magnitude / norm)


def choose_bases(gradient: Tensor, rank: int, side: str) -> tuple[Tensor | None, Tensor | None]:
    """The first singular vectors of (m, n): left (m, r) and right (r, n), None where ``side`` has no use for them.

    Of each vector the entry of largest absolute value is positive. Half precision is computed in float32. ``rank`` is capped
    at min(m, n).
    """
    m, n = gradient.shape
    u, _, vh = torch.linalg.svd(precise(gradient), full_matrices=False)
    side = ("right" if m >= n else "left") if side == "std" else side
    left = _positive(u[:, :rank].mT).mT if side in ("left", "both") else None
    right = _positive(vh[:rank]) if side in ("right", "both") else None
    # In one layout, as a checkpoint has them: products of other layouts round otherwise.
    return tuple(None if basis is None else basis.contiguous() for basis in (left, right))  # type: ignore[return-value]


def _positive(rows: Tensor) -> Tensor:
    """Rows, each with the sign that makes its entry of largest absolute value positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def to_low(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left^T X right^T``, without the side that is None."""
    low = gradient if left is None else left.mT @ gradient
    return low if right is None else low @ right.mT


def from_low(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left L right``, without the side that is None: (m, n)."""
    full = low if left is None else left @ low
    return full if right is None else full @ right


class GradientProjector:
    """Projects gradients of one matrix to rank ``rank`` and back; the basis is that of a gradient ``update_gap`` steps apart.

    >>> projector = GradientProjector(1)
    >>> projector.project(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), step=0)
    tensor([[3.],
            [0.],
            [0.]])

    rank: >= 1, capped at the matrix's smaller side. scale: factor on the way back, > 0. side: "right" (low is (m, r)), "left"
    ((r, n)), "both" ((r, r)), or "std": "right" where m >= n. Raises ``ArgumentError`` (a ``ValueError``) for anything else.
    """

    def __init__(self, rank: int, *, update_gap: int = 200, scale: float = 1.0, side: str = "std") -> None:
        _check_projection(rank, update_gap, scale, side)
        self.rank, self.update_gap, self.scale, self.side = rank, update_gap, scale, side
        self.left: Tensor | None = None
        self.right: Tensor | None = None

    @torch.no_grad()
    def project(self, grad: Tensor, step: int) -> Tensor:
        """The projected gradient; at steps that ``update_gap`` divides, counted from 0, the basis is chosen anew first."""
        _check_matrix(grad)
        if step % self.update_gap == 0 or (self.left is None and self.right is None):
            self.left, self.right = choose_bases(grad, self.rank, self.side)
        return to_low(grad.to(self._dtype()), self.left, self.right)

    @torch.no_grad()
    def project_back(self, low: Tensor) -> Tensor:
        """``scale`` times the matrix (m, n) that ``low`` stands for."""
        if self.left is None and self.right is None:
            raise ArgumentError("low: there is no basis yet. Call project first")
        return self.scale * from_low(low.to(self._dtype()), self.left, self.right)

    def state_dict(self) -> dict[str, Tensor | None]:
        """The basis."""
        return {"left": self.left, "right": self.right}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue with the basis that ``state_dict`` returned."""
        self.left, self.right = (None if state[k] is None else state[k].clone() for k in ("left", "right"))  # type: ignore[union-attr]

    def _dtype(self) -> torch.dtype:
        basis = self.right if self.left is None else self.left
        return basis.dtype  # type: ignore[union-attr]


def _check_projection(rank: int, update_gap: int, scale: float, side: str) -> None:
    check_integer("rank", rank, 1)
    check_integer("update_gap", update_gap, 1)
    check_range("scale", scale, 0, open_low=True)
    check_choice("side", side, SIDES)


def _check_matrix(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ArgumentError(f"gradient = {tensor.layout}: must be dense. Use Embedding(sparse=False)")
    if tensor.ndim != 2:
        raise ArgumentError(f"gradient = shape {tuple(tensor.shape)}: must be a matrix")


# -- the optimizer ----------------------------------------------------------------------------------------------------
class GradNormLoRPAdamW(ExactOptimizer):
    """AdamW on the magnitudes and the projected directions of the rows of matrices.

    >>> layer = torch.nn.Linear(6, 8)
    >>> groups = [{"params": [layer.weight], "rank": 2}, {"params": [layer.bias]}]
    >>> optimizer = GradNormLoRPAdamW(groups, lr=1e-2)

    params: tensors or groups. A group with ``rank`` holds matrices only; one without is plain AdamW. Groups may set all else
    too. lr, eps, weight_decay: >= 0; eps is added before the bias correction, and the decay follows the update, as in Hugging
    Face's AdamW. rank, update_gap, scale, side: see ``GradientProjector``. variant: "paper" or "official" (the module's
    docstring has the difference). state_bits: 32, or 8 for the projected moments (see ``eight_bit``).

    A row of zeros has no direction and stays zero. State of a matrix (m, n): 2 low-rank moments, the basis, and magnitude, norm
    and the magnitude's two moments, (m, 1) each, in float32 at least. Raises ``ArgumentError`` (a ``ValueError``) for values
    outside their ranges and for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_gap: int = 200,
        scale: float = 1.0,
        side: str = "std",
        variant: str = "paper",
        state_bits: int = 32,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
            "side": side,
            "variant": variant,
            "state_bits": state_bits,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            check_range(name, group[name], 0)
        for i, beta in enumerate(group["betas"]):
            check_range(f"betas[{i}]", beta, 0, 1, open_high=True)
        _check_projection(
            1 if group["rank"] is None else group["rank"], group["update_gap"], group["scale"], group["side"]
        )
        check_choice("variant", group["variant"], VARIANTS)
        check_choice("state_bits", group["state_bits"], BITS)
        other = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
        if group["rank"] is not None and other:
            raise ArgumentError(
                f"rank = {group['rank']}: the group holds a parameter of shape {other[0]}: must hold matrices only. "
                "Put the rest into a group without rank"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a parameter without a gradient is passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._plain if group["rank"] is None else self._ranked
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout != torch.strided:
                        _check_matrix(p.grad)
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    update(p, precise(p.grad), state, group)
        return loss

    def _plain(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        moved = precise(p).clone().sub_(_adam(state, "exp_avg", gradient, group, 32), alpha=_step_size(state, group))
        p.copy_(moved.mul_(1 - group["lr"] * group["weight_decay"]))

    def _ranked(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        weight = precise(p)
        if state["step"] == 1:
            norm = row_norm(weight)
            state |= {"magnitude": norm, "norm": norm.clamp(min=TINY_NORM)}
        norm, magnitude = state["norm"], state["magnitude"]
        direction = weight / torch.copysign(magnitude.abs().clamp(min=TINY_MAGNITUDE), magnitude)  # v / ||v||
        of_magnitude, of_v = weight_norm_gradients(gradient, direction, magnitude, norm)
        if group["variant"] == "official":
            magnitude, of_v = torch.where(magnitude == 0, magnitude, norm), gradient  # a row of zeros stays one
        if (state["step"] - 1) % group["update_gap"] == 0:
            for name, basis in zip(("left", "right"), choose_bases(of_v, group["rank"], group["side"]), strict=True):
                if basis is not None:
                    state[name] = basis
        left, right = state.get("left"), state.get("right")
        low = _adam(state, "exp_avg", to_low(of_v, left, right), group, group["state_bits"])
        size, keep = _step_size(state, group), 1 - group["lr"] * group["weight_decay"]
        v = direction.mul_(norm).sub_(from_low(low, left, right), alpha=size * group["scale"]).mul_(keep)
        magnitude = (magnitude - size * _adam(state, "magnitude_avg", of_magnitude, group, 32)).mul_(keep)
        norm = row_norm(v).clamp_(min=TINY_NORM)
        p.copy_(v.mul_(magnitude / norm))
        state |= {"magnitude": magnitude, "norm": norm}


def _adam(state: dict[str, Any], name: str, gradient: Tensor, group: dict[str, Any], bits: int) -> Tensor:
    """Adam's direction ``m / (sqrt(s) + eps)`` after both moments took in the gradient; the moments are in ``state``."""
    beta1, beta2 = group["betas"]
    first, second = (_read(state, key, gradient) for key in (name, f"{name}_sq"))
    if bits == 8:
        second.square_()  # the root is kept, which spans half the orders of magnitude
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if bits == 32:
        state |= {name: first, f"{name}_sq": second}
    else:
        offset = dither(state["step"])
        for key, values, signed in ((name, first, True), (f"{name}_sq", second.sqrt(), False)):
            state[key], state[f"{key}_scale"] = quantize(values, signed=signed, offset=offset)
    return first / (second.sqrt() + group["eps"])


def _read(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    if key not in state:
        return torch.zeros_like(like)
    scale = state.get(f"{key}_scale")
    kept: Tensor = state[key] if scale is None else dequantize(state[key], scale).to(like.dtype)
    return kept


def _step_size(state: dict[str, Any], group: dict[str, Any]) -> float:
    beta1, beta2 = group["betas"]
    size: float = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    return size


# -- the layer --------------------------------------------------------------------------------------------------------
class GradNormLoRPLinear(Adapter):
    """A layer with the weight ``magnitude * (W0 + s B A) / ||W0 + s B A||``, row by row, of which W0 and the bias are frozen.

    base: the layer. rank: in [1, min(out, in)]. alpha: > 0, ``s = alpha / rank``; None for s = 1. detach_norm: whether the
    gradient passes by the norm, as in DoRA. generator: draws A, uniform in +-1/sqrt(in); B is zero and the magnitude the norm of
    W0's rows, so that at first the layer computes what ``base`` does. Parameters ``lora_A`` (r, in), ``lora_B`` (out, r),
    ``magnitude`` (out,).
    """

    peft_config: ClassVar[dict[str, Any]] = {"use_dora": True}

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        detach_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank)
        self.scaling, self.detach_norm = scaling_of(rank, alpha), detach_norm
        self.lora_A, self.lora_B = lora_parameters(self.weight, rank, generator)
        self.magnitude = nn.Parameter(row_norm(precise(self.weight.detach())).squeeze(1).to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        y = y * (self.magnitude / self._norm()).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _norm(self) -> Tensor:
        """The norm of each row of ``W0 + s B A``, (out,), without forming it."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight, a, b = precise(self.weight), precise(self.lora_A), precise(self.lora_B)
            square = (row_norm(weight).squeeze(1)).square()
            square = square + 2 * self.scaling * (F.linear(weight, a) * b).sum(1)
            square = square + self.scaling**2 * (F.linear(b, a @ a.mT) * b).sum(1)
            norm = square.clamp(min=TINY_NORM**2).sqrt()
        return norm.detach() if self.detach_norm else norm

    def merged_weight(self) -> Tensor:
        v = precise(self.weight) + self.scaling * precise(self.lora_B) @ precise(self.lora_A)
        merged: Tensor = precise(self.magnitude)[:, None] * v / row_norm(v).clamp(min=TINY_NORM)
        return merged.to(self.weight.dtype)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A and B of rank min(out, in): new magnitudes change a weight by a matrix of full rank. peft has ``peft_tensors``."""
        change = self.merged_weight() - self.weight
        if self.out_features < self.in_features:
            return change, torch.eye(self.out_features).to(change)
        return torch.eye(self.in_features).to(change), change

    def peft_tensors(self) -> dict[str, Tensor]:
        """The tensors of a DoRA layer with scaling 1."""
        return {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.scaling * self.lora_B,
            "lora_magnitude_vector": self.magnitude,
        }


def apply_gradnormlorp(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    target: Target = nn.Linear,
    detach_norm: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put a ``GradNormLoRPLinear`` in the place of every target layer (see ``find_targets``), freeze the rest; return the model."""

    def make(layer: nn.Linear) -> GradNormLoRPLinear:
        return GradNormLoRPLinear(layer, rank, alpha=alpha, detach_norm=detach_norm, generator=generator)

    return attach(model, target, make)


# -- the method -------------------------------------------------------------------------------------------------------
class GradNormLoRP(Method):
    """Train matrices by their rows' magnitudes and low-rank projected directions, with a fraction of Adam's memory.

    rank: >= 1, a budget that is not tuned. mode: "optimizer" replaces the run's optimizer by ``GradNormLoRPAdamW`` with its
    learning rate and weight decay; all parameters train, the targets' weights at this rank. "adapter" trains
    ``GradNormLoRPLinear`` layers alone, with the run's optimizer, and merges them at the end. update_gap, scale, side,
    state_bits: of the optimizer, in its mode only. target: the linear layers, as in ``find_targets``; None for all.

    There is no neutral setting: at full rank too the rows' magnitudes and directions train in the place of the weights.
    """

    name = "gradnormlorp"
    paper = Paper(
        "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training",
        "Huang, Shen, Zhu, Rudinac, Kanoulas",
        "AAAI 2025",
        "https://arxiv.org/abs/2412.19616",
    )
    space: ClassVar[Space] = {"scale": LogUniform(0.25, 4.0)}

    def __init__(
        self,
        *,
        rank: int = 8,
        mode: str = "optimizer",
        update_gap: int = 200,
        scale: float = 1.0,
        side: str = "std",
        target: Target = None,
        state_bits: int = 32,
    ) -> None:
        _check_projection(rank, update_gap, scale, side)
        check_choice("mode", mode, MODES)
        check_choice("state_bits", state_bits, BITS)
        self.rank, self.mode, self.target = rank, mode, target
        self.update_gap, self.scale, self.side, self.state_bits = update_gap, scale, side, state_bits

    def prepare(self, run: Run) -> None:
        if self.mode == "adapter":
            generator = run.new_generator(self)
            run.model = apply_gradnormlorp(run.model, self.rank, target=self.target, generator=generator)

    def configure_optimizer(self, run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.mode == "adapter":
            return optimizer
        ranked = _target_weights(run.model, self.target)
        groups = []
        for group in optimizer.param_groups:
            common = {"lr": group["lr"], "weight_decay": group.get("weight_decay", 0.0)}
            low = [p for p in group["params"] if id(p) in ranked]
            rest = [p for p in group["params"] if id(p) not in ranked]
            groups += [{"params": low, "rank": self.rank, **common}] if low else []
            groups += [{"params": rest, **common}] if rest else []
        options: dict[str, Any] = {"scale": self.scale, "side": self.side, "state_bits": self.state_bits}
        return GradNormLoRPAdamW(groups, update_gap=self.update_gap, **options)

    def finish(self, run: Run) -> None:
        if self.mode == "adapter":
            run.model = merge_adapters(run.model)


def _target_weights(model: nn.Module, target: Target) -> set[int]:
    """The weights to project. All linear layers' where ``target`` is None: nothing is replaced, so tied ones may be too."""
    if target is not None:
        return {id(layer.weight) for layer in find_targets(model, target).values()}
    found = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    if not found:
        refuse("target", None, "find an nn.Linear in the model: it has none", "Give the run a model with linear layers")
    return found


__all__ = [
    "GradNormLoRP",
    "GradNormLoRPAdamW",
    "GradNormLoRPLinear",
    "GradientProjector",
    "apply_gradnormlorp",
    "choose_bases",
    "export_peft",
    "from_low",
    "merge_adapters",
    "optimizer_state_numel",
    "row_norm",
    "to_low",
    "weight_norm_gradients",
]
