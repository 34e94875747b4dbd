"""Search spaces."""

from __future__ import annotations

import math

import numpy as np
import pytest

from equipoise.errors import ArgumentError
from equipoise.training import Choice, Integer, LogUniform, Uniform

GRID = np.linspace(0, 1, 2001)[:-1]


def test_uniform() -> None:
    space = Uniform(-1, 3)
    assert space.at(0) == -1 and space.at(0.5) == 1 and space.at(0.999) < 3
    assert space.on_edge(-1) and space.on_edge(2.95) and not space.on_edge(0)
    assert str(space) == "[-1, 3]"


def test_log_uniform_never_leaves_its_interval() -> None:
    for low, high in ((0.005, 0.5), (1e-6, 1e-2), (0.1, 1.0), (0.3, 0.9)):
        space = LogUniform(low, high)
        values = [space.at(float(u)) for u in (*GRID, math.nextafter(1, 0))]
        assert min(values) >= low and max(values) <= high
        assert values == sorted(values)
        assert space.at(0.5) == pytest.approx(math.sqrt(low * high))
    assert space.on_edge(low) and space.on_edge(high * 0.99) and not space.on_edge(math.sqrt(low * high))


def test_integer_is_uniform_and_holds_both_ends() -> None:
    space = Integer(2, 5)
    counts = np.bincount([space.at(float(u)) for u in GRID], minlength=6)
    assert counts.tolist() == [0, 0, 500, 500, 500, 500]
    assert space.at(1.0) == 5
    assert [space.on_edge(v) for v in (2, 3, 5)] == [True, False, True]
    assert str(space) == "{2..5}"


def test_choice() -> None:
    space = Choice(("a", "b", "c"), ordered=True)
    assert [space.at(u) for u in (0, 0.34, 0.67, 0.9999, 1.0)] == ["a", "b", "c", "c", "c"]
    assert [space.on_edge(v) for v in "abc"] == [True, False, True]
    assert not Choice(("a", "b", "c")).on_edge("a") and not Choice((1, 2), ordered=True).on_edge(1)
    assert str(Choice([1, None])) == "{1, None}"
    assert hash(Choice([1, 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(1, 1),
        lambda: Uniform(math.nan, 1),
        lambda: LogUniform(0, 1),
        lambda: LogUniform(2, 1),
        lambda: Integer(3, 3),
        lambda: Choice(()),
    ],
)
def test_empty_intervals_are_refused(make: object) -> None:
    with pytest.raises(ArgumentError):
        make()
