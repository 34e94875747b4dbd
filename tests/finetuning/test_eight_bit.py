"""Numbers in 8 bit: the error's bounds, a loop in plain Python, and a slow mean that rounding to the nearest would hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.errors import ArgumentError
from equipoise.finetuning.eight_bit import BLOCK, dequantize, dither, quantize

torch.set_num_threads(1)
RANGE = {True: 126 / 8, False: 254 / 16}  # octaves


def spread(count: int, octaves: float, seed: int = 0) -> Tensor:
    """Numbers of both signs, evenly spread in logarithm below 3."""
    g = torch.Generator().manual_seed(seed)
    sizes = 3 * torch.exp2(-octaves * torch.rand(count, generator=g))
    return sizes * torch.where(torch.rand(count, generator=g) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize(("signed", "nearest"), [(True, 2 ** (1 / 16) - 1), (False, 2 ** (1 / 32) - 1)])
def test_the_error_is_bounded_over_fifteen_octaves(signed: bool, nearest: float) -> None:
    x = spread(5000, RANGE[signed] - 0.01)
    x = x if signed else x.abs()
    for offset, bound in ((0.5, nearest), (0.0, (1 + nearest) ** 2 - 1), (0.99, (1 + nearest) ** 2 - 1)):
        codes, scale = quantize(x, signed=signed, offset=offset)
        assert codes.dtype == (torch.int8 if signed else torch.uint8) and codes.shape == x.shape
        assert scale.shape == (math.ceil(5000 / BLOCK),) and scale.dtype == torch.float32
        back = dequantize(codes, scale)
        assert torch.equal(back.sign(), x.sign())
        assert ((back - x) / x).abs().max() <= bound + 1e-5
    codes, scale = quantize(x, signed=signed)
    largest = torch.nn.functional.pad(x.abs(), (0, -5000 % BLOCK)).view(-1, BLOCK).amax(1)
    assert torch.equal(scale, largest)


@pytest.mark.parametrize("signed", [True, False])
def test_against_a_plain_loop(signed: bool) -> None:
    x = spread(300, 20)
    x = x if signed else x.abs()
    x[7] = 0.0
    codes, scale = quantize(x, signed=signed, offset=0.25)
    back, (levels, octave) = dequantize(codes, scale), ((127, 8) if signed else (255, 16))
    for i, value in enumerate(x.tolist()):
        a = max(abs(v) for v in x.tolist()[i // 256 * 256 : (i // 256 + 1) * 256])
        code = 0
        if value:
            code = math.floor(levels + octave * math.log2(abs(value) / a) + 0.25)
            code = min(levels, max(code, 0 if signed else 1))
        # Where float32 and float64 round to two sides of a level the codes are neighbours.
        assert abs(abs(int(codes[i])) - code) <= 1
        code = abs(int(codes[i]))
        assert float(back[i]) == pytest.approx(
            math.copysign(a * 2 ** (-(levels - code) / octave), value) if code else 0
        )


def test_a_divisor_is_never_zero_and_a_zero_stays_one() -> None:
    x = torch.tensor([1.0, 1e-30, 0.0])
    codes, scale = quantize(x, signed=False)
    assert codes.tolist() == [255, 1, 0]
    back = dequantize(codes, scale)
    assert back[2] == 0 and back[1] == pytest.approx(2 ** -(254 / 16))
    codes, scale = quantize(torch.tensor([-1.0, 1e-30]), signed=True)
    assert codes.tolist() == [-127, 0]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 128), (7, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_shape_and_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in (torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype).mul(-1e-38)):
        codes, scale = quantize(x, signed=True)
        back = dequantize(codes, scale)
        assert back.shape == x.shape and back.dtype == torch.float32
        torch.testing.assert_close(back, x.float())


def test_blocks_do_not_disturb_each_other() -> None:
    x = torch.cat([1e6 * spread(BLOCK, 5), 1e-6 * spread(BLOCK, 5, seed=1)])
    back = dequantize(*quantize(x, signed=True))
    assert ((back - x) / x).abs().max() < 0.045


def test_bytes_are_one_a_number_and_four_a_block() -> None:
    codes, scale = quantize(torch.rand(4096, 8), signed=False)
    assert codes.numel() * codes.element_size() + scale.numel() * scale.element_size() == 4096 * 8 * (1 + 4 / 256)


def test_dither_covers_the_interval_evenly() -> None:
    offsets = sorted(dither(step) for step in range(1000))
    assert max(abs(o - (i + 0.5) / 1000) for i, o in enumerate(offsets)) < 0.005


@pytest.mark.parametrize("change", [0.2, 5.0])
def test_a_slow_mean_follows_with_dither_alone(change: float) -> None:
    """Squares whose size changes, for every other number, after 1000 of 3500 steps; the mean's decay is 0.999."""
    found = {}
    for dithered in (True, False):
        g = torch.Generator().manual_seed(1)
        size = torch.exp(torch.randn(BLOCK, generator=g))
        exact, later = torch.zeros(BLOCK), torch.where(torch.arange(BLOCK) % 2 == 0, change, 1.0)
        codes, scale = quantize(exact, signed=False)
        for step in range(3500):
            square = (torch.randn(BLOCK, generator=g) * size * (1 if step < 1000 else later)).square()
            exact = 0.999 * exact + 0.001 * square
            kept = 0.999 * dequantize(codes, scale).square() + 0.001 * square
            codes, scale = quantize(kept.sqrt(), signed=False, offset=dither(step) if dithered else 0.5)
        found[dithered] = (dequantize(codes, scale) / exact.sqrt()).log()
    assert abs(found[True].mean()) < 0.06 and found[True].abs().max() < 0.4
    assert found[False].abs().max() > 0.6  # what happens without


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"offset = 1.0: must be a number in \[0, 1\)"):
        quantize(torch.ones(3), signed=True, offset=1.0)
    with pytest.raises(ArgumentError, match=r"values = torch.int64: must be floating point"):
        quantize(torch.ones(3, dtype=torch.int64), signed=True)
    with pytest.raises(ArgumentError, match=r"codes = torch.float32: must be int8 or uint8"):
        dequantize(torch.ones(3), torch.ones(1))
