"""Random views of inputs, for ``fit(..., augment=...)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range
from equipoise.training.batch import Inputs, map_inputs


@dataclass(frozen=True)
class Jitter:
    """Shifts each image by whole pixels and adds Gaussian noise.

    shift: each example moves by a number of pixels drawn uniformly from {-shift, ..., shift}, along both axes of images
        (N, C, H, W) or the axis of sequences (N, C, L); what moves in is 0. 0 for tables. noise: standard deviation, >= 0.

    >>> Jitter(shift=1, noise=0.1)(torch.zeros(2, 1, 8, 8), torch.Generator()).shape
    torch.Size([2, 1, 8, 8])
    """

    shift: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_integer("shift", self.shift, 0)
        check_range("noise", self.noise, 0)

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        return map_inputs(lambda t: self._view(t, generator), inputs)

    def _view(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if not inputs.is_floating_point():
            return inputs
        if self.shift:
            inputs = _shifted(inputs, self.shift, generator)
        if self.noise:
            drawn = torch.randn(inputs.shape, generator=generator, device=generator.device)
            inputs = inputs + self.noise * drawn.to(inputs)
        return inputs


def _shifted(inputs: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    if inputs.ndim not in (3, 4):
        raise ArgumentError(
            f"shift = {shift}: needs images (N, C, H, W) or sequences (N, C, L), but the inputs have shape "
            f"{tuple(inputs.shape)}. Use shift=0"
        )
    rows = torch.arange(len(inputs), device=inputs.device)
    for axis in range(2, inputs.ndim):
        size = inputs.shape[axis]
        offset = torch.randint(0, 2 * shift + 1, (len(inputs),), generator=generator, device=generator.device)
        place = torch.arange(size, device=inputs.device) + offset.to(inputs.device)[:, None]  # (N, size), in the padded
        padding = [0] * (2 * (inputs.ndim - 1 - axis)) + [shift, shift]
        # Advanced indexing puts rows and places first: (N, size, ...); the axis goes back to where it was.
        inputs = F.pad(inputs, padding).movedim(axis, 1)[rows[:, None], place].movedim(1, axis)
    return inputs.contiguous()
