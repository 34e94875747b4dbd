"""Numbers in 8 bit, for the moments of Adam: a sign and a logarithm, block by block.

Adam divides a mean of gradients by the root of a mean of squares, and both span orders of magnitude within one matrix. Evenly
spaced levels turn what is small into 0, and a root that is 0 makes an update as large as `1 / eps`. So each block of 256
numbers keeps its largest absolute value `a` in float32, and each number the level nearest to it on a logarithmic scale:

    |x|  ~  a 2^{-(L - c) / k}          code c = 1 .. L;  c = 0 only where x = 0, or, with a sign, below the smallest level

int8 with a sign: `L = 127, k = 8` levels an octave, so that the error is at most `2^{1/16} - 1 = 4.4 %` of the number, down to
`a / 55,000`. uint8 without one: `L = 255, k = 16`, at most 2.2 %, down to `a / 60,000`; what is smaller than that but not 0
becomes the smallest level, so that a divisor is never 0.

A mean whose decay is 0.999 moves by less than one level a step, and rounding to the nearest would hold it where it is. `offset`
moves the rounding up and down from step to step (`dither(step)`), which lets such a mean follow on average; the error is then
below one whole level, 9 % and 4.4 %.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_range

BLOCK = 256
LEVELS = {torch.int8: (127, 8), torch.uint8: (255, 16)}  # the largest code, and how many an octave has
GOLDEN = (5**0.5 - 1) / 2


def quantize(values: Tensor, *, signed: bool, offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Codes (the shape of ``values``; int8 with a sign, else uint8) and the largest absolute value of each block, float32.

    values: floating point, finite, any shape; blocks of 256 follow the order in memory. Without a sign they must not be
    negative. offset: of the rounding, in [0, 1); 0.5 is the nearest level.
    """
    check_range("offset", offset, 0, 1, open_high=True)
    if not values.is_floating_point():
        raise ArgumentError(f"values = {values.dtype}: must be floating point")
    dtype = torch.int8 if signed else torch.uint8
    largest, octave = LEVELS[dtype]
    rows = _blocks(values.float())
    scale = rows.abs().amax(1)
    below = torch.log2(rows.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None])  # in octaves, -inf for 0
    codes = torch.floor(largest + octave * below + offset).clamp_(0 if signed else 1, largest)
    codes = torch.where(rows == 0, 0, codes)
    codes = torch.copysign(codes, rows) if signed else codes
    return codes.flatten()[: values.numel()].reshape(values.shape).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers, float32, in the shape of ``codes``, from what ``quantize`` returned."""
    if codes.dtype not in LEVELS:
        raise ArgumentError(f"codes = {codes.dtype}: must be int8 or uint8")
    largest, octave = LEVELS[codes.dtype]
    rows = _blocks(codes.float())
    values = torch.exp2((rows.abs() - largest) / octave) * scale[:, None]
    values = torch.where(rows == 0, 0, torch.copysign(values, rows))
    return values.flatten()[: codes.numel()].reshape(codes.shape)


def dither(step: int) -> float:
    """An offset in [0, 1) for this step; those of successive steps cover the interval evenly."""
    return (step + 1) * GOLDEN % 1.0


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    return F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
