"""Order statistics by counting digits against a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equipoise.merging import selection
from equipoise.merging.selection import columns, kth_smallest


def draw(dtype: torch.dtype, d: int = 5_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, d, generator=generator, dtype=torch.float64)
    numbers[1] = numbers[1].exp() * 1e-30  # many powers of two
    numbers[2] = (numbers[2] * 2).round()  # ties, zeros of both signs
    numbers[3] = 7.0
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_what_a_sort_gives(dtype: torch.dtype) -> None:
    numbers = draw(dtype)
    ranks = [0, 1, 17, 17, 2_499, 2_500, 4_998, 4_999]
    assert torch.equal(kth_smallest(columns(numbers), ranks), numbers.sort(1).values[:, ranks])


def test_it_gives_what_kthvalue_gives() -> None:
    numbers = draw(torch.float32)
    assert torch.equal(kth_smallest(columns(numbers), [499])[:, 0], numbers.kthvalue(500, 1).values)


def test_blocks_of_any_width_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = draw(torch.float32, 1_001)
    whole = kth_smallest(columns(numbers), [3, 500])
    monkeypatch.setattr(selection, "BLOCK", 7)
    assert torch.equal(kth_smallest(columns(numbers), [3, 500]), whole)


def test_largest_and_smallest_numbers() -> None:
    ends = torch.tensor([[torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45, -1e-45, 0.0]])
    assert torch.equal(kth_smallest(columns(ends), range(5)), ends.sort(1).values)


def test_half_precision_is_read_as_float32() -> None:
    numbers = draw(torch.bfloat16, 300)
    found = kth_smallest(columns(numbers), [100])
    assert found.dtype == torch.float32
    assert torch.equal(found, numbers.float().sort(1).values[:, 100:101])
