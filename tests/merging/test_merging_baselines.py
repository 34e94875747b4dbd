"""The merging baselines by hand, against loops, and as methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError
from equipoise.merging import selection
from equipoise.merging.baselines import (
    DARE,
    TIES,
    GreedySoup,
    TaskArithmetic,
    WeightAveraging,
    dare_merge,
    greedy_soup,
    task_arithmetic,
    ties_merge,
    weight_averaging,
)
from equipoise.testing import TinyNetwork, classification


def vectors(n: int = 3, d: int = 500) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_averaging_and_arithmetic_by_hand() -> None:
    tau = torch.tensor([[1.0, -2, 3], [3, 2, -1]])
    assert weight_averaging(tau).tolist() == [2, 0, 1]
    assert task_arithmetic(tau).tolist() == pytest.approx([1.6, 0, 0.8])
    assert torch.equal(task_arithmetic(tau, 0.5), weight_averaging(tau))


def test_ties_by_hand() -> None:
    tau = torch.tensor([[4.0, 1, -3, 2], [2, -3, 1, -4]])
    # The two largest of each: [4, 0, -3, 0] and [0, -3, 0, -4].
    assert ties_merge(tau, ratio=0.5).tolist() == [4, -3, -3, -4]
    # Of all, the signs of the sums are +, -, -, -.
    assert ties_merge(tau, ratio=1.0).tolist() == [3, -3, -3, -4]
    assert ties_merge(tau, ratio=1.0, coefficient=0.5).tolist() == [1.5, -1.5, -1.5, -2]
    assert ties_merge(torch.tensor([[1.0, 2], [-1, 2]]), ratio=1.0).tolist() == [0, 2]  # a tie elects no sign


def test_ties_is_the_loop() -> None:
    tau, ratio = vectors(4), 0.2
    d = tau.shape[1]
    kept = []
    for row in tau.tolist():
        threshold = sorted(map(abs, row))[int(d * (1 - ratio))]
        kept.append([x if abs(x) >= threshold else 0.0 for x in row])
        assert sum(x != 0 for x in kept[-1]) == d - int(d * (1 - ratio))
    expected = []
    for column in zip(*kept, strict=True):
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agreeing = [x for x in column if x * sign > 0]
        expected.append(sum(agreeing) / max(len(agreeing), 1))
    torch.testing.assert_close(ties_merge(tau, ratio=ratio), torch.tensor(expected))


def test_dare_keeps_the_expectation_and_everything_at_density_one() -> None:
    tau = vectors()
    torch.testing.assert_close(dare_merge(tau, density=1.0), tau.mean(0))
    torch.testing.assert_close(dare_merge(tau, density=1.0, elect_sign=True), ties_merge(tau, ratio=1.0))
    many = torch.stack([dare_merge(tau, density=0.4, seed=seed) for seed in range(400)])
    torch.testing.assert_close(many.mean(0), tau.mean(0), atol=0.25, rtol=0)
    one = dare_merge(tau[:1], density=0.4)
    assert (one != 0).float().mean().item() == pytest.approx(0.4, abs=0.06)
    torch.testing.assert_close(one[one != 0], tau[0][one != 0] / 0.4)


def test_dare_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = vectors()
    first = dare_merge(tau, seed=1)
    assert not torch.equal(first, dare_merge(tau, seed=2))
    monkeypatch.setattr(selection, "BLOCK", 17)
    assert torch.equal(first, dare_merge(tau, seed=1))
    assert torch.equal(dare_merge(tau.double(), seed=1) != 0, first != 0)


def test_the_greedy_soup_leaves_out_what_makes_it_worse() -> None:
    tau = torch.tensor([[1.0, 0], [0, 9], [1.2, 0.2], [0.8, 0]])
    goal = torch.tensor([1.0, 0])
    seen = []

    def evaluate(merged: Tensor) -> float:
        seen.append(merged)
        return -float((merged - goal).norm())

    merged, rows = greedy_soup(tau, evaluate)
    assert rows == (0,) and merged.tolist() == [1, 0] and len(seen) == 4 + 3
    merged, rows = greedy_soup(tau[1:], evaluate)
    assert rows == (2, 1) and merged.tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("merge", [weight_averaging, task_arithmetic, ties_merge, dare_merge])
def test_dtypes_stay_and_bad_vectors_are_refused(merge: Any) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert merge(vectors().to(dtype)).dtype == dtype
    assert not merge(vectors().requires_grad_()).requires_grad
    with pytest.raises(ArgumentError, match=r"task_vectors\[1\]"):
        merge(torch.tensor([[1.0, 2], [math.nan, 2]]))
    with pytest.raises(ArgumentError, match="at least 1 model"):
        merge(torch.zeros(0, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tau: ties_merge(tau, ratio=0.0), "ratio"),
        (lambda tau: ties_merge(tau, coefficient=math.nan), "coefficient"),
        (lambda tau: task_arithmetic(tau, math.inf), "coefficient"),
        (lambda tau: dare_merge(tau, density=0.0), "density"),
        (lambda tau: dare_merge(tau, density=1.5), "density"),
        (lambda tau: dare_merge(tau, coefficient=math.inf), "coefficient"),
        (lambda tau: dare_merge(tau, seed=-1), "seed"),
        (lambda tau: DARE(elect_sign="yes"), "elect_sign"),  # type: ignore[arg-type]
        (lambda tau: TIES(ratio=2.0), "ratio"),
        (lambda tau: TaskArithmetic(coefficient=math.nan), "coefficient"),
    ],
)
def test_bad_arguments_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(vectors())


# -- methods ----------------------------------------------------------------------------------------------------------
def finished(method: equipoise.Method, sources: list[dict[str, Tensor]], **attributes: Any) -> dict[str, Tensor]:
    model = TinyNetwork(seed=9)
    run = equipoise.start(model, torch.optim.SGD(model.parameters(), lr=0.1), methods=[method], seed=5)
    run.merge_sources = sources  # type: ignore[attr-defined]
    for name, value in attributes.items():
        setattr(run, name, value)
    return run.finish().state_dict()


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (WeightAveraging(), weight_averaging),
        (TaskArithmetic(coefficient=0.3), lambda tau: task_arithmetic(tau, 0.3)),
        (TIES(ratio=0.4, coefficient=1.5), lambda tau: ties_merge(tau, ratio=0.4, coefficient=1.5)),
        (DARE(density=0.3), lambda tau: dare_merge(tau, density=0.3, seed=5)),
        (DARE(elect_sign=True), lambda tau: dare_merge(tau, elect_sign=True, seed=5)),
    ],
)
def test_methods_are_their_functions(method: equipoise.Method, function: Any) -> None:
    base = TinyNetwork(seed=9).state_dict()
    sources = [TinyNetwork(seed=seed).state_dict() for seed in range(3)]
    expected = flat(base) + function(torch.stack([flat(source) - flat(base) for source in sources]))
    assert torch.equal(flat(finished(method, sources)), expected)


def test_the_greedy_soup_takes_the_score_of_the_run() -> None:
    base = TinyNetwork(seed=9).state_dict()
    sources = [{**base, "head.bias": torch.full((3,), value)} for value in (1.0, 5.0, -0.6)]

    def score(model: nn.Module) -> float:
        return -abs(float(model.head.bias.detach().mean()) - 0.1)  # type: ignore[operator, union-attr]

    method = GreedySoup()
    found = finished(method, sources, merge_score=score)
    assert method.chosen == (2, 0)
    torch.testing.assert_close(found["head.bias"], torch.full((3,), 0.2))
    with pytest.raises(ArgumentError, match="merge_score"):
        finished(GreedySoup(), sources)


def test_the_greedy_soup_takes_the_validation_loss_otherwise() -> None:
    problem = classification()
    method = GreedySoup()
    bad = {name: 100 * tensor for name, tensor in problem.network().state_dict().items()}
    problem.train([method], on_epoch_end=lambda run: setattr(run, "merge_sources", [bad]))
    assert method.chosen == (1,)
