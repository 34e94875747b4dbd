"""Partitions against their definitions: every row once, the shares that are drawn, and what cannot be dealt out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equipoise.data.corruptions import long_tail
from equipoise.errors import ArgumentError
from equipoise.federated.partition import by_column, class_shares, dirichlet, iid, long_tailed, shards

LABELS = torch.randint(0, 10, (1500,), generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(parts: list[Tensor], rows: Tensor) -> bool:
    return torch.equal(torch.cat(parts).sort().values, rows) and all(torch.equal(p, p.sort().values) for p in parts)


PARTITIONS: dict[str, Callable[[torch.Generator], list[Tensor]]] = {
    "iid": lambda g: iid(1500, 12, g),
    "dirichlet": lambda g: dirichlet(LABELS, 12, 0.3, g, least=3),
    "shards": lambda g: shards(LABELS, 12, 2, g),
    "long tail": lambda g: long_tailed(LABELS, 12, 0.5, 20.0, g),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_row_goes_to_one_client_and_follows_from_the_seed(name: str) -> None:
    make = PARTITIONS[name]
    parts = make(generator())
    rows = torch.arange(1500) if name != "long tail" else long_tail(LABELS, 20.0, generator())
    assert len(parts) == 12 and everything(parts, rows)
    assert all(p.dtype == torch.int64 and len(p) for p in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, make(generator()), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parts, make(generator(1)), strict=True))


def test_iid_sizes_and_shares() -> None:
    parts = iid(1500, 7, generator())
    assert {len(p) for p in parts} == {214, 215}
    shares = class_shares(LABELS, parts, 10)
    assert (shares - shares.mean(0)).abs().max() < 0.08


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """p ~ Dirichlet(alpha) over m clients: mean 1/m, variance (1/m)(1 - 1/m) / (alpha m + 1)."""
    labels = torch.zeros(20_000, dtype=torch.int64)
    for alpha, clients in ((0.5, 5), (5.0, 4)):
        shares = torch.stack(
            [
                torch.tensor([len(p) / 20_000 for p in dirichlet(labels, clients, alpha, generator(seed), least=1)])
                for seed in range(300)
            ]
        )
        mean = 1 / clients
        assert shares.mean(0) == pytest.approx(torch.full((clients,), mean), abs=0.06)
        variance = mean * (1 - mean) / (alpha * clients + 1)
        assert float(shares.var()) == pytest.approx(variance, rel=0.2)


def test_dirichlet_is_more_skewed_for_smaller_alpha() -> None:
    def classes(alpha: float) -> float:
        shares = class_shares(LABELS, dirichlet(LABELS, 20, alpha, generator()), 10)
        return float((shares > 0.05).sum(1).double().mean())

    found = [classes(alpha) for alpha in (0.05, 0.3, 1.0, 100.0)]
    assert found == sorted(found) and found[0] < 3 and found[-1] > 9


def test_dirichlet_cuts_each_class_by_its_shares() -> None:
    """Each class's counts are cut at floors of cumulative shares: they add up to the class."""
    parts = dirichlet(LABELS, 8, 0.5, generator())
    counts = torch.stack([torch.bincount(LABELS[p], minlength=10) for p in parts])
    assert torch.equal(counts.sum(0), torch.bincount(LABELS, minlength=10))


def test_tiny_alpha_does_not_make_nan() -> None:
    parts = dirichlet(LABELS, 5, 1e-3, generator(), least=1)
    assert everything(parts, torch.arange(1500))


def test_shards_hold_few_classes() -> None:
    labels = torch.arange(10).repeat_interleave(100)
    parts = shards(labels, 20, 2, generator())
    assert all(len(p) == 50 and len(labels[p].unique()) <= 2 for p in parts)
    assert everything(parts, torch.arange(1000))


def test_long_tail_is_that_of_the_corruption() -> None:
    parts = long_tailed(LABELS, 6, 0.5, 50.0, generator(3))
    counts = torch.bincount(LABELS[torch.cat(parts)], minlength=10)
    assert int(counts[0]) == int(torch.bincount(LABELS)[0]) or int(counts[0]) >= int(counts[1])
    largest = int(torch.bincount(LABELS).max())
    assert counts.tolist()[-1] == int(largest / 50 + 1e-6)
    assert torch.equal(torch.cat(parts).sort().values, long_tail(LABELS, 50.0, generator(3)))


def test_by_column() -> None:
    names, parts = by_column(["north", "south", "north", "east"])
    assert names == ["east", "north", "south"]
    assert [p.tolist() for p in parts] == [[3], [0, 2], [1]]
    names, parts = by_column(torch.tensor([2, 0, 2]))
    assert names == ["0", "2"] and [p.tolist() for p in parts] == [[1], [0, 2]]


def test_class_shares() -> None:
    shares = class_shares(torch.tensor([0, 0, 1, 2]), [torch.tensor([0, 1, 2]), torch.tensor([3])], 3)
    assert shares.tolist() == [pytest.approx([2 / 3, 1 / 3, 0]), [0, 0, 1]]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dirichlet(LABELS, 10, 0.0, generator()), "alpha = 0.0"),
        (lambda: dirichlet(LABELS, 10, -1.0, generator()), "alpha = -1.0"),
        (lambda: dirichlet(LABELS, 0, 0.1, generator()), "clients = 0"),
        (lambda: dirichlet(LABELS[:5], 10, 0.1, generator()), "5 rows cannot give each of them 1"),
        (lambda: dirichlet(LABELS, 100, 0.01, generator(), least=10), "Raise alpha, or take fewer clients"),
        (lambda: dirichlet(torch.rand(10), 2, 0.1, generator()), "labels"),
        (lambda: dirichlet(torch.tensor([-1, 2]), 2, 0.1, generator()), "labels"),
        (lambda: shards(LABELS, 1000, 2, generator()), "cannot give each of them"),
        (lambda: shards(LABELS, 10, 0, generator()), "per_client = 0"),
        (lambda: iid(3, 4, generator()), "cannot give each of them"),
        (lambda: long_tailed(LABELS, 5, 0.5, 0.5, generator()), "ratio"),
        (lambda: by_column([]), "values"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        call()
