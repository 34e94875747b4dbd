"""Adapters that take over the principal part of their weight: what PiSSA's and SORSA's layers share.

Of ``W = U S V^T`` the part of the ``r`` largest singular values becomes the adapter, in factors that train; ``weight`` holds
what is left, frozen. Since the adapter begins as a part of ``W``, what it adds to ``W`` is the difference of its factors now
and at the start: LoRA of rank 2r over the original weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError
from equipoise.finetuning.adapters import Adapter, scaling_of
from equipoise.training.losses import precise


def principal_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top ``rank`` singular vectors and values of a weight (out, in): U (out, r), S (r,), V^T (r, in), in float32 at least.

    The signs of a pair of vectors are arbitrary. Raises ``ArgumentError`` for a weight that holds NaN or infinite values.
    """
    weight = precise(weight.detach())
    if not bool(torch.isfinite(weight).all()):
        raise ArgumentError("base.weight: holds NaN or infinite values, and has no singular values. Load it again")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


class PrincipalAdapter(Adapter):
    """Base of these adapters. A subclass sets its factors and then calls ``leave_residual``; it gives ``forward`` and ``factors``.

    alpha: > 0; the adapter is scaled by ``scaling = alpha / rank``, 1 where alpha is None.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None) -> None:
        super().__init__(base, rank)
        self.scaling = scaling_of(rank, alpha)

    def factors(self, *, initial: bool = False) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), in float32 at least, with ``weight + B @ A`` the merged weight, or with the original one."""
        raise NotImplementedError

    def leave_residual(self) -> None:
        """Put a new ``weight`` in the place of the layer's own: what is left of it beside the factors, which have just begun."""
        original = self.weight
        self.weight = nn.Parameter(torch.empty_like(original), requires_grad=False)
        self._set_residual(original, *self.factors())

    def merged_weight(self) -> Tensor:
        return self._plus(*self.factors())

    def original_weight(self) -> Tensor:
        return self._plus(*self.factors(initial=True)).detach()

    def rebase(self, original: Tensor) -> None:
        self._set_residual(original, *self.factors(initial=True))

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        (a, b), (a0, b0) = self.factors(), self.factors(initial=True)
        return torch.cat([a, a0]), torch.cat([b, -b0], 1)

    def _plus(self, a: Tensor, b: Tensor) -> Tensor:
        return (precise(self.weight) + b @ a).to(self.weight.dtype)

    @torch.no_grad()
    def _set_residual(self, original: Tensor, a: Tensor, b: Tensor) -> None:
        # Of the factors as they are stored, so that their rounding is made good.
        self.weight.copy_(precise(original) - b @ a)
