"""Per-example tables."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import ArgumentError
from equipoise.training.table import check_index, write_rows


def test_rows_are_written_and_the_last_of_a_repeated_position_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        table = torch.zeros(6, 2)
        wanted = torch.zeros(6, 2)
        index = torch.randint(6, (5,), generator=generator)
        rows = torch.rand(5, 2, generator=generator)
        for position, row in zip(index, rows, strict=True):
            wanted[position] = row
        kept = write_rows(table, index, rows)
        assert torch.equal(table, wanted) and torch.equal(kept, table[index])


def test_any_shape_any_type_no_graph() -> None:
    table = torch.zeros(4)
    rows = torch.ones(2, dtype=torch.float64, requires_grad=True)
    kept = write_rows(table, torch.tensor([3, 0]), rows)
    assert table.tolist() == [1, 0, 0, 1] and not table.requires_grad
    assert kept.dtype == table.dtype and not kept.requires_grad
    deep = torch.zeros(4, 2, 3, dtype=torch.bfloat16)
    write_rows(deep, torch.tensor([1, 1]), torch.stack([torch.ones(2, 3), torch.full((2, 3), 2.0)]))
    assert deep[1].eq(2).all() and deep.sum() == 12
    write_rows(deep, torch.empty(0, dtype=torch.int64), torch.empty(0, 2, 3))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 5]), r"values in \[0, 5\]: must lie in \[0, 5\), the size of the table"),
        (torch.tensor([-1, 2]), r"values in \[-1, 2\]"),
        (torch.tensor([0]), r"index = torch.int64 \(1,\): must be int64 of shape \(2,\)"),
        (torch.tensor([0.0, 1.0]), r"index = torch.float32"),
        (torch.tensor([[0, 1]]), r"\(1, 2\)"),
        ([0, 1], "index = list"),
        (None, "index = NoneType"),
    ],
)
def test_check_index_says_what_it_got(index: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check_index(index, 5, 2)


def test_check_index_accepts_the_edges() -> None:
    check_index(torch.tensor([0, 4]), 5, 2)
    check_index(torch.empty(0, dtype=torch.int64), 5, 0)
