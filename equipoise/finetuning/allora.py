"""ALLoRA: low-rank adapters whose rows learn fast while they are near zero.

LoRA starts from an update of zero and leaves it slowly: for a while only B has a gradient, and a small one. In a run of a hundred
steps that is much of the run, and dropout is too noisy a remedy for overfitting in so short a time. ALLoRA does without dropout
and without LoRA's scaling factor. It multiplies the gradient that reaches the adapter, output by output, by a factor that is
large while that row of the update is near zero and shrinks as the row grows. One constant, `eta`, is left.

For a frozen weight `W0` (out, in) and factors A (r, in), B (out, r), with `n_i` the 2-norm of row i of `B A` and `D = dL/dy`,

    y       =  x W0^T + (x A^T) B^T + bias
    s_i     =  1 / sqrt(n_i + 1 / eta^2)             s = eta where B = 0, about n^(-1/2) for large n; constant, no gradient
    grad x  =  D (W0 + B A)                          not scaled: the layers below see what LoRA would send them
    grad B  =  (D s)^T (x A^T)
    grad A  =  B^T (D s)^T x

The norms come without the dense product: `n_i^2 = sum_j ((B (A A^T)) * B)_ij`. Only the gradient changes: the loss, its value
and its Hessian do not, and there is no loss whose gradient this is.

## When to use
Short adaptations by SGD, where LoRA with its usual `alpha` and dropout has not left its start when the run ends: one setting
less to choose. Merged, the layers are plain `nn.Linear` again, and the adapter is a plain LoRA file for peft.

## When not
With Adam or AdamW, which divide each coordinate by its gradient's running size: a factor that varies slowly over rows cancels, and
LoRA is better (on rotated Fashion-MNIST by 3 points; by SGD ALLoRA was, by 2). With methods that need second derivatives, which
raise an error. Clipping acts on the scaled gradient, so that its threshold must be chosen anew.

## Cost
LoRA without dropout (no mask is kept), and `O(r^2 (in + out))` for the norms of each layer and step.

## In a distributed run
The factors are equal on all processes because A and B are, and a factor commutes with the average: 2 processes equal 1.

## Source
Huang, Balestriero: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws. 2024, arXiv:2410.09692. No default of `eta` is known
from it: 2 is LoRA's usual `alpha / r`, to which it is equal in the first step of B's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range
from equipoise.finetuning.adapters import Adapter, Target, attach, lora_parameters
from equipoise.finetuning.adapters import export_peft as export_peft
from equipoise.finetuning.adapters import merge_adapters as merge_adapters
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space

FLOOR = 1e-12  # under the root, where 1 / eta^2 is zero


# -- the functional core ----------------------------------------------------------------------------------------------
@torch.no_grad()
def allora_scale(A: Tensor, B: Tensor, eta: float) -> Tensor:
    """``1 / sqrt(n_i + 1 / eta^2)`` for the row norms n of ``B @ A``: (out,), in float32 at least.

    A: (r, in). B: (out, r). eta: > 0, the factor of a row that is zero; with ``inf`` a row of norm below 1e-12 has 1e6.
    """
    _check(A, B, eta)
    with torch.autocast(A.device.type, enabled=False):
        a, b = precise(A), precise(B)
        norm = ((b @ (a @ a.T)) * b).sum(1).clamp_(min=0).sqrt_()
    offset = (1 / eta) ** 2
    return (norm + offset if offset else norm.clamp_(min=FLOOR)).rsqrt_()


def allora_linear(x: Tensor, A: Tensor, B: Tensor, eta: float) -> Tensor:
    """``(x A^T) B^T``: (..., in) -> (..., out), whose backward pass scales the gradients of A and B, and not that of x.

    The factors are those of A and B in this forward pass. A second derivative raises ``RuntimeError``.
    """
    _check(A, B, eta)
    return _linear(x, A, B, eta, None, None)


def _linear(x: Tensor, a: Tensor, b: Tensor, eta: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``allora_linear``, and the frozen layer's product where there is a ``weight``: in one piece, which saves sums of outputs."""
    if x.ndim == 0 or x.shape[-1] != a.shape[1]:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: must be (..., {a.shape[1]}), as A is {tuple(a.shape)}")
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        y = F.linear(F.linear(x, a), b)
        return y if weight is None else F.linear(x, weight, bias) + y
    if any(t is not None and t.requires_grad for t in (weight, bias)):  # someone thawed them
        return F.linear(x, cast(Tensor, weight), bias) + _linear(x, a, b, eta, None, None)
    scale = allora_scale(a, b, eta)  # from A and B as they are, before autocast rounds them
    tensors = (x.reshape(-1, x.shape[-1]), a, b, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = tuple(t if t is None else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    return cast(Tensor, _ScaledGradient.apply(scale, *tensors)).reshape(*x.shape[:-1], b.shape[0])


class _ScaledGradient(torch.autograd.Function):
    """The product of x (N, in) with the factors, and the weight if any; scales the rows of B's and A's gradient."""

    @staticmethod
    def forward(
        ctx: Any, scale: Tensor, x: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        h = F.linear(x, a)
        ctx.save_for_backward(scale, x, a, b, h, weight)
        if weight is None:
            return F.linear(h, b)
        return F.linear(x, weight, bias).addmm_(h, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        scale, x, a, b, h, weight = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        # The factor belongs to rows of B, so that it can be applied to (out, r) numbers and not to those of every example.
        plain, scaled = (delta @ torch.cat([b, (scale[:, None] * b).to(b)], 1)).chunk(2, 1)
        grad_x = grad_a = grad_b = None
        if needs_x:
            grad_x = plain @ a if weight is None else (delta @ weight).addmm_(plain, a)
        if needs_a:
            grad_a = scaled.T @ x
        if needs_b:
            grad_b = (scale[:, None] * (delta.T @ h)).to(b)
        return None, grad_x, grad_a, grad_b, None, None


def _check(A: Tensor, B: Tensor, eta: float) -> None:
    check_range("eta", eta, 0, open_low=True)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ArgumentError(f"A, B = {tuple(A.shape)}, {tuple(B.shape)}: must be (r, in) and (out, r)")


# -- the module -------------------------------------------------------------------------------------------------------
class ALLoRALinear(Adapter):
    """A frozen linear layer and a low-rank update of it with ALLoRA's gradient.

    >>> layer = ALLoRALinear(nn.Linear(16, 8), rank=2)
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']

    base: the layer (in -> out), whose weight and bias are kept, frozen. rank: in [1, min(out, in)]. eta: > 0, ``inf`` allowed.
    generator: on the CPU, for A. The forward pass is the same in training and evaluation.
    """

    def __init__(
        self, base: nn.Linear, rank: int, *, eta: float = 2.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, rank)
        check_range("eta", eta, 0, open_low=True)
        self.eta = eta
        self.lora_A, self.lora_B = lora_parameters(self.weight, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.lora_A, self.lora_B, self.eta, self.weight, self.bias)

    def merged_weight(self) -> Tensor:
        return self.weight + self.lora_B @ self.lora_A

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eta={self.eta}"


def apply_allora(
    model: nn.Module,
    rank: int,
    *,
    eta: float = 2.0,
    target: Target = nn.Linear,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put an ``ALLoRALinear`` in the place of every target layer, freeze all else, and return the model, changed in place.

    target: which layers, in the sense of ``equipoise.finetuning.adapters.find_targets``: by default every ``nn.Linear``.
    """
    return attach(model, target, lambda layer: ALLoRALinear(layer, rank, eta=eta, generator=generator))


# -- the method -------------------------------------------------------------------------------------------------------
class ALLoRA(Method):
    """Low-rank adapters with a faster start, in which each row's gradient is scaled by how far the row has come.

    rank: of the update, >= 1 and at most each layer's smaller dimension; a budget, not tuned. eta: the largest factor, > 0.
    target: the layers (see ``apply_allora``); None means every ``nn.Linear``, the head too. Everything else is frozen, and after
    training the layers are plain again. There is no neutral setting: without the update nothing would train.
    """

    name = "allora"
    paper = Paper(
        "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        "Huang, Balestriero",
        "arXiv 2024",
        "https://arxiv.org/abs/2410.09692",
    )
    space: ClassVar[Space] = {"eta": LogUniform(1.0, 10.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, *, rank: int = 8, eta: float = 2.0, target: Target = None) -> None:
        check_integer("rank", rank, 1)
        check_range("eta", eta, 0, open_low=True)
        self.rank, self.eta, self.target = rank, eta, target

    def prepare(self, run: Run) -> None:
        generator = run.new_generator(self)
        run.model = apply_allora(run.model, self.rank, eta=self.eta, target=self.target, generator=generator)

    def finish(self, run: Run) -> None:
        run.model = merge_adapters(run.model)
