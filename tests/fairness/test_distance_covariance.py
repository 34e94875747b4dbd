"""Distance covariance against the paper's formulas, hand-computed numbers and loops in plain Python."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError, DataError
from equipoise.fairness import pairs
from equipoise.fairness.distance_covariance import (
    CCdCov,
    DCov,
    DistanceCovarianceLoss,
    JdCov,
    ccdcov,
    distance_correlation,
    distance_covariance,
    independence_test,
    jdcov,
    u_centered,
)
from equipoise.testing import TinyNetwork, check_method, check_regularizer, spawn
from equipoise.training import Examples, Method

X, Y, Z = (torch.tensor(v, dtype=torch.float64) for v in ([0, 1, 2, 4, 7], [0, 0, 1, 1, 0], [1, 0, 1, 0, 1]))


def draw(n: int, seed: int = 0, *, k: int = 1) -> tuple[Tensor, list[Tensor]]:
    """A prediction (n,) or (n, k), and a binary, a categorical and a continuous attribute, in float64."""
    g = torch.Generator().manual_seed(seed)
    prediction = torch.rand((n,) if k == 1 else (n, k), generator=g, dtype=torch.float64)
    one_hot = F.one_hot(torch.randint(0, 3, (n,), generator=g), 3).double()
    binary = torch.randint(0, 2, (n,), generator=g).double()
    return prediction, [binary, one_hot, torch.rand(n, generator=g, dtype=torch.float64)]


def gradient(measure: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (result,) = torch.autograd.grad(measure(leaf), leaf)
    return result


# -- a slow reference -------------------------------------------------------------------------------------------------
def rows_of(x: Tensor) -> list[list[float]]:
    return [[float(v) for v in row] for row in x.reshape(len(x), -1)]


def slow_u(x: Tensor) -> list[list[float]]:
    points, n = rows_of(x), len(x)
    a = [[math.dist(p, q) for q in points] for p in points]
    total = sum(map(sum, a))
    u = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                rows = sum(a[i]) / (n - 2) + sum(a[k][j] for k in range(n)) / (n - 2)
                u[i][j] = rows - a[i][j] - total / ((n - 1) * (n - 2))
    return u


def slow_jdcov(*xs: Tensor, c: float = 1.0) -> float:
    n, total = len(xs[0]), 0.0
    us = [slow_u(x) for x in xs]
    for i in range(n):
        for j in range(n):
            total += math.prod(u[i][j] + c for u in us)
    return total / (n * (n - 3)) - n * c ** len(xs) / (n - 3)


def slow_dcov(x: Tensor, y: Tensor) -> float:
    u, v, n = slow_u(x), slow_u(y), len(x)
    return sum(u[i][j] * v[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))


def vectorised(c: float | None, *xs: Tensor) -> Tensor:
    """The definitions with whole matrices and automatic derivatives: for c None the marginal sum."""
    n, us = len(xs[0]), [u_centered(x) for x in xs]
    if c is None:
        return sum((us[0] * u).sum() for u in us[1:]) / (n * (n - 3))
    return torch.stack([u + c for u in us]).prod(0).sum() / (n * (n - 3)) - n * c ** len(xs) / (n - 3)


# -- the card's numbers -----------------------------------------------------------------------------------------------
def test_oracle_1_by_hand() -> None:
    close = lambda v: pytest.approx(v, abs=1e-6)  # noqa: E731
    assert distance_covariance(X, Y).item() == close(-0.133333)
    assert distance_covariance(X, X).item() == close(2.533333)
    assert distance_correlation(X, Y).item() == close(-0.132453)
    assert jdcov(X, Y).item() == close(-0.133333)
    assert jdcov(X, Y, Z).item() == close(-0.577778)
    assert ccdcov(X, Y, Z).item() == close(-0.338071)
    assert u_centered(X)[0].tolist() == close([0, 1.666667, 0.333333, -1, -1])


@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])
def test_oracle_2_one_attribute_and_symmetry(c: float) -> None:
    p, (s, t, u) = draw(13)
    torch.testing.assert_close(jdcov(p, t, c=c), distance_covariance(p, t), rtol=0, atol=1e-13)
    torch.testing.assert_close(ccdcov(p, t), distance_covariance(p, t))
    for order in itertools.permutations([p, s, t, u]):
        torch.testing.assert_close(jdcov(*order, c=c), jdcov(p, s, t, u, c=c), rtol=0, atol=1e-12)


def test_oracle_3_constant_shift_scale_rotation() -> None:
    p, (s, t, u) = draw(20)
    for value in (0.0, 0.1, 0.7):
        same = torch.full((20,), value, dtype=torch.float64)
        for measure in (lambda v: ccdcov(v, s, t, u), lambda v: jdcov(v, s), lambda v: distance_covariance(t, v)):
            assert measure(same).item() == pytest.approx(0, abs=1e-13)
            assert gradient(measure, same).abs().max() == 0
        assert ccdcov(same, s, t, u).item() == 0 and distance_correlation(same, s).item() == 0
        # JdCov keeps the dependence among the attributes, which no prediction changes.
        torch.testing.assert_close(jdcov(same, s, t, c=0.5), 0.5 * distance_covariance(s, t))
        assert gradient(lambda v: jdcov(v, s, t), same).abs().max() == 0
        two = torch.stack([same, 1 - same], 1)
        assert gradient(lambda v: ccdcov(v, s, t, u), two).abs().max() == 0
    torch.testing.assert_close(distance_covariance(p + 3, s), distance_covariance(p, s))
    torch.testing.assert_close(distance_covariance(-2.5 * p, s), 2.5 * distance_covariance(p, s))
    rotation, _ = torch.linalg.qr(draw(3, seed=1, k=3)[0])
    torch.testing.assert_close(ccdcov(p, t @ rotation), ccdcov(p, t))
    torch.testing.assert_close(jdcov(p, s, t @ rotation), jdcov(p, s, t))


def test_oracle_4_the_biased_version_of_two_binary_variables() -> None:
    """A V-statistic written by hand from the definition equals four times the squared covariance."""
    _, (x, _, _) = draw(17)
    y = (x + draw(17, seed=3)[1][0]).clamp(max=1)

    def centred(v: Tensor) -> Tensor:
        a = (v[:, None] - v).abs()
        return a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()

    covariance = (x * y).mean() - x.mean() * y.mean()
    torch.testing.assert_close((centred(x) * centred(y)).mean(), 4 * covariance**2)


def test_oracle_5_one_hot_of_a_binary_attribute() -> None:
    p, (s, _, _) = draw(15)
    one_hot = torch.stack([1 - s, s], 1)
    torch.testing.assert_close(distance_covariance(p, one_hot), 2**0.5 * distance_covariance(p, s))


def test_oracle_6_unbiased_under_independence() -> None:
    values = [distance_covariance(X, Y[list(order)]) for order in itertools.permutations(range(5))]
    assert len(values) == 120 and abs(torch.stack(values).mean().item()) < 1e-12


def test_oracle_7_gerrymandering_is_seen_by_the_joint_measures_only() -> None:
    cells = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).double()
    for n in (40, 400):
        s1, s2 = cells.repeat(n // 4, 1).unbind(1)
        prediction = (s1 != s2).double()
        for s in (s1, s2):
            assert abs(distance_covariance(prediction, s).item()) < 1.1 / n
        assert ccdcov(prediction, s1, s2).item() > 0.05
        assert jdcov(prediction, s1, s2).item() > 0.1
    assert DistanceCovarianceLoss("sum")(prediction, [s1, s2]).item() < 0.006


@pytest.mark.parametrize("n", [6, 31])
def test_oracle_8_linear_in_the_distances_of_the_prediction(n: int) -> None:
    p, (_, t, _) = draw(n)
    difference, u = p[:, None] - p, u_centered(t)
    linear = -(difference.abs() * u).sum() / (n * (n - 3))
    assert abs(distance_covariance(p, t).item() - linear.item()) < 1e-12
    expected = -2 / (n * (n - 3)) * (difference.sign() * u).sum(1)
    torch.testing.assert_close(gradient(lambda v: distance_covariance(v, t), p), expected, rtol=0, atol=1e-12)


# -- against the definitions ------------------------------------------------------------------------------------------
def test_against_plain_loops() -> None:
    p, (s, t, u) = draw(9)
    torch.testing.assert_close(u_centered(t), torch.tensor(slow_u(t), dtype=torch.float64))
    assert distance_covariance(p, t).item() == pytest.approx(slow_dcov(p, t), abs=1e-13)
    assert ccdcov(p, s, t, u).item() == pytest.approx(
        slow_dcov(p, torch.cat([s[:, None], t, u[:, None]], 1)), abs=1e-13
    )
    for c in (0.5, 1.0):
        assert jdcov(p, s, t, u, c=c).item() == pytest.approx(slow_jdcov(p, s, t, u, c=c), abs=1e-12)
    total = sum(slow_dcov(p, x) for x in (s, t, u))
    assert DistanceCovarianceLoss("sum")(p, [s, t, u]).item() == pytest.approx(total, abs=1e-13)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n", [4, 5, 70, 300])
@pytest.mark.parametrize("c", [None, 1.0, 0.4])
def test_values_and_gradients_are_those_of_the_definition(n: int, k: int, c: float | None, monkeypatch: Any) -> None:
    """In one block and in many, whose last one is short."""
    p, attributes = draw(n, k=k)
    expected = gradient(lambda v: vectorised(c, v, *attributes), p)
    columns = [x.reshape(n, -1) for x in attributes]
    for pairs_of_a_block in (1 << 18, 7 * n * 4):
        monkeypatch.setitem(pairs.PAIRS, "cpu", pairs_of_a_block)
        monkeypatch.setattr(pairs, "KEPT", pairs_of_a_block)
        value, got = pairs.value_and_gradient(p.reshape(n, -1), columns, c)
        torch.testing.assert_close(value, vectorised(c, p, *attributes), rtol=0, atol=1e-12)
        torch.testing.assert_close(got.reshape(p.shape), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [4, 5, 32, 33, 100, 257, 1000])
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_sorting_gives_what_all_pairs_give(n: int, digits: int, monkeypatch: Any) -> None:
    """With many equal values, with some, and with none."""
    g = torch.Generator().manual_seed(n + digits)
    x, y = (torch.randn(n, 1, generator=g, dtype=torch.float64).round(decimals=digits) for _ in range(2))
    monkeypatch.setattr(pairs, "SORT_FROM", 10**9)
    value, slope = pairs.value_and_gradient(y, [x], None)
    monkeypatch.setattr(pairs, "SORT_FROM", 1)
    got, got_slope = pairs.value_and_gradient(y, [x], None)
    torch.testing.assert_close(got, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_slope, slope, rtol=0, atol=1e-12)
    both = pairs.value_and_gradient(y, [x, torch.cat([x, y], 1), y], None)  # sorted and pairwise terms in one sum
    monkeypatch.setattr(pairs, "SORT_FROM", 10**9)
    torch.testing.assert_close(both, pairs.value_and_gradient(y, [x, torch.cat([x, y], 1), y], None))


def test_sorting_takes_no_matrix_of_all_pairs() -> None:
    n = 60_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    y = (x.abs() + torch.randn(n, generator=g)).requires_grad_()
    value = distance_covariance(y, x)  # the matrix would take 14 GB
    value.backward()
    assert value.item() > 0.03 and torch.isfinite(y.grad).all() and abs(y.grad.sum().item()) < 1e-4


def test_rows_and_columns_of_u_sum_to_zero() -> None:
    _, (s, t, u) = draw(23)
    for x in (s, t, u, torch.cat([t, u[:, None]], 1)):
        matrix = u_centered(x)
        assert matrix.sum(0).abs().max() < 1e-12 and matrix.diagonal().abs().max() == 0
        torch.testing.assert_close(matrix, matrix.T)
        n = len(x)
        torch.testing.assert_close((matrix * matrix).sum() / (n * (n - 3)), distance_covariance(x, x))


def test_rows_may_be_permuted() -> None:
    p, attributes = draw(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for measure in (ccdcov, jdcov):
        torch.testing.assert_close(measure(p[order], *(s[order] for s in attributes)), measure(p, *attributes))


def test_correlation_is_one_for_a_line_and_about_zero_for_independent_variables() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 400, generator=g, dtype=torch.float64)
    assert distance_correlation(x, 2 - 3 * x).item() == pytest.approx(1)
    assert abs(distance_correlation(x, y).item()) < 0.01
    assert distance_correlation(x, x.square()).item() > 0.15  # of which Pearson's correlation knows nothing


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.rand(7, 2, generator=g, dtype=torch.float64, requires_grad=True)
    z = torch.rand(7, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(u_centered, (x,))
    assert torch.autograd.gradcheck(distance_covariance, (x, y))
    assert torch.autograd.gradcheck(distance_covariance, (y, x))
    assert torch.autograd.gradcheck(distance_correlation, (x, y))
    assert torch.autograd.gradcheck(lambda a, b, c: jdcov(a, b, c, c=0.7), (x, y, z))
    assert torch.autograd.gradcheck(lambda a: ccdcov(a, y, z), (x,))
    assert torch.autograd.gradcheck(lambda a: distance_covariance(a, a), (x,))


def test_gradcheck_of_the_sorted_form(monkeypatch: Any) -> None:
    monkeypatch.setattr(pairs, "SORT_FROM", 1)
    x, y = draw(9)[0].requires_grad_(), draw(9, seed=1)[0].requires_grad_()
    assert torch.autograd.gradcheck(distance_covariance, (x, y))


def test_second_derivatives() -> None:
    """Of a scalar prediction they are zero, so that those of the network are right; of a vector they are refused."""
    p, (s, t, _) = draw(8)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    measure = lambda v: ccdcov(torch.sigmoid(v * p), s, t)  # noqa: E731
    assert torch.autograd.gradgradcheck(measure, (w,))
    q = draw(8, k=2)[0].requires_grad_()
    with pytest.raises(ArgumentError, match="create_graph = True: the measure has second derivatives for scalar"):
        torch.autograd.grad(ccdcov(q, s).square(), q, create_graph=True)


def test_attributes_carry_no_gradient() -> None:
    p, attributes = draw(12)
    for s in (p, *attributes):
        s.requires_grad_()
    for kind in ("ccdcov", "jdcov", "sum"):
        value = DistanceCovarianceLoss(kind)(p, attributes)
        found = torch.autograd.grad(value, [p, *attributes], allow_unused=True)
        assert found[0] is not None and found[1:] == (None, None, None)


def test_close_points_keep_their_digits() -> None:
    """Predictions that almost agree (a saturated softmax): differences are taken before lengths and means, not after."""
    g = torch.Generator().manual_seed(0)
    probabilities = (10 * torch.randn(200, 3, generator=g)).softmax(1)
    sex = torch.randint(0, 2, (200,), generator=g).float()
    single = gradient(lambda v: ccdcov(v, sex), probabilities)
    exact = gradient(lambda v: ccdcov(v, sex), probabilities.double())
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, attributes = draw(300)
    low, s = p.to(dtype), [a.to(dtype) for a in attributes]
    for measure in (ccdcov, jdcov):
        value = measure(low, *s)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, measure(low.float(), *(a.float() for a in s)))
    large = 60_000 * torch.randint(0, 2, (300,), generator=torch.Generator().manual_seed(0)).to(torch.float16)
    assert torch.isfinite(ccdcov(large, attributes[0].half()))


def test_integers_and_booleans_are_variables_too() -> None:
    assert distance_covariance(X.long(), Y.bool()).item() == pytest.approx(-0.133333, abs=1e-6)
    assert distance_covariance(X, Y.int()).dtype == torch.float64
    assert ccdcov(X.float(), Y.long(), Z.long()).item() == pytest.approx(-0.338071, abs=1e-6)


@pytest.mark.parametrize("kind", ["ccdcov", "jdcov", "sum"])
def test_compiles_without_a_break(kind: str, monkeypatch: Any) -> None:
    """In two blocks, and the scalar attributes of the sum by sorting."""
    monkeypatch.setattr(pairs, "SORT_FROM", 1)
    monkeypatch.setitem(pairs.PAIRS, "cpu", 40 * 25 * 5)
    p, attributes = draw(40)
    part = DistanceCovarianceLoss(kind)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    leaf = p.clone().requires_grad_()
    value = compiled(leaf, attributes)
    value.backward()
    torch.testing.assert_close(value.detach(), part(p, attributes))
    torch.testing.assert_close(leaf.grad, gradient(lambda v: part(v, attributes), p))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: u_centered(torch.zeros(3)), "x = 3 examples: must be at least 4"),
        (lambda: distance_covariance(torch.zeros(3), torch.zeros(3)), "x = 3 examples: must be at least 4"),
        (lambda: ccdcov(torch.zeros(1), torch.zeros(1)), "prediction = 1 examples: must be at least 4"),
        (lambda: distance_covariance(torch.zeros(5), torch.zeros(6)), "y has 6 rows but x has 5: must be the same"),
        (lambda: jdcov(torch.zeros(5), torch.zeros(5), torch.zeros(4, 2)), r"xs\[2\] has 4 rows but xs\[0\] has 5"),
        (lambda: u_centered(torch.zeros(5, 2, 2)), r"x = torch.float32 \(5, 2, 2\): must be real, of shape \(n,\) or"),
        (lambda: u_centered(torch.zeros(())), r"x = torch.float32 \(\): must be real"),
        (lambda: u_centered(torch.zeros(5, 0)), r"x = torch.float32 \(5, 0\)"),
        (lambda: jdcov(torch.zeros(5)), "xs = 1 variables: must be at least 2"),
        (lambda: jdcov(X, Y, c=0.0), r"c = 0.0: must be a number in \(0, inf\)"),
        (lambda: jdcov(X, Y, c=-1.0), "c = -1.0"),
        (lambda: ccdcov(X), r"protected = \(\): must hold at least one attribute"),
        (lambda: DistanceCovarianceLoss("joint"), "kind = 'joint': must be one of 'ccdcov', 'jdcov', 'sum'"),
        (lambda: DistanceCovarianceLoss("jdcov", c=0), "c = 0"),
        (lambda: DistanceCovarianceLoss()(X, []), r"protected = \[\]: must hold at least one attribute"),
        (lambda: independence_test(X), "xs = 1 variables"),
        (lambda: independence_test(X, Y, statistic="dcov"), "statistic = 'dcov'"),
        (lambda: independence_test(X, Y, n_permutations=0), "n_permutations = 0"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


# -- the test of independence -----------------------------------------------------------------------------------------
def test_the_permutation_test_finds_what_marginals_hide() -> None:
    g = torch.Generator().manual_seed(0)
    s1, s2 = torch.randint(0, 2, (2, 120), generator=g).double()
    prediction = (s1 != s2).double() + 0.5 * torch.randn(120, generator=g, dtype=torch.float64)
    options: dict[str, Any] = {"n_permutations": 99}
    for statistic in ("ccdcov", "jdcov"):
        found = independence_test(prediction, s1, s2, statistic=statistic, generator=g, **options)
        assert found.p_value == pytest.approx(0.01) and found.statistic > found.critical_95
    assert independence_test(prediction, s1, s2, statistic="sum", generator=g, **options).p_value > 0.05


def test_the_permutation_test_keeps_its_level() -> None:
    g = torch.Generator().manual_seed(1)
    trials = (independence_test(*torch.randn(3, 12, generator=g), n_permutations=9, generator=g) for _ in range(120))
    p = [trial.p_value for trial in trials]
    rejected = sum(value <= 0.2 for value in p)
    assert min(p) >= 0.1 and 11 <= rejected <= 37  # 24 expected, within three standard errors


def test_the_permutation_test_follows_its_generator() -> None:
    p, (s, t, _) = draw(30)
    one, two = (independence_test(p, s, t, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == two and one.statistic == pytest.approx(jdcov(p, s, t).item())
    assert 1 / 101 <= one.p_value <= 1


# -- the module -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ccdcov", "jdcov", "sum"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_module_is_a_regularizer(kind: str, k: int) -> None:
    def arguments(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn((8, k) if k > 1 else (8,), generator=g), torch.randn(8, 2, generator=g)

    check_regularizer(DistanceCovarianceLoss(kind), arguments)


def test_the_module_takes_one_attribute_or_several_and_small_batches() -> None:
    p, (s, t, _) = draw(10)
    assert DistanceCovarianceLoss()(p, t).item() == ccdcov(p, t).item()
    assert DistanceCovarianceLoss()(p, (s, t)).item() == ccdcov(p, s, t).item()
    assert DistanceCovarianceLoss("jdcov", c=2.0)(p, [s, t]).item() == jdcov(p, s, t, c=2.0).item()
    for n in (1, 2, 3):
        part = p[:n].clone().requires_grad_()
        value = DistanceCovarianceLoss("jdcov")(part, [s[:n], t[:n]])
        value.backward()
        assert value.item() == 0 and part.grad.abs().max() == 0
    assert repr(DistanceCovarianceLoss("jdcov", c=2.0)) == "DistanceCovarianceLoss(kind='jdcov', c=2.0)"


def _shares() -> Any:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    prediction, attributes = draw(11)
    rows = slice(0, 6) if rank == 0 else slice(6, 11)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1).double())
    for kind in ("ccdcov", "jdcov"):
        model.zero_grad()
        output = torch.sigmoid(model(prediction[rows, None]))[:, 0]
        loss = DistanceCovarianceLoss(kind)(output, [s[rows] for s in attributes])
        loss.backward()
        yield {"loss": loss.detach(), "gradient": [p.grad.clone() for p in model.parameters()]}


@pytest.mark.distributed
def test_two_processes_measure_the_global_batch() -> None:
    prediction, attributes = draw(11)
    torch.manual_seed(0)
    model = nn.Linear(1, 1).double()
    for number, results in enumerate(zip(*spawn(_shares), strict=True)):
        model.zero_grad()
        loss = DistanceCovarianceLoss(("ccdcov", "jdcov")[number])(
            torch.sigmoid(model(prediction[:, None]))[:, 0], attributes
        )
        loss.backward()
        for result in results:
            torch.testing.assert_close(result["loss"], loss.detach())
            torch.testing.assert_close(result["gradient"], [p.grad for p in model.parameters()])


# -- the methods in a run ---------------------------------------------------------------------------------------------
def examples(n: int = 37, classes: int = 3, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    sex, age = torch.randint(0, 2, (n,), generator=g), torch.rand(n, generator=g)
    inputs = torch.randn(n, 6, generator=g) + sex[:, None]
    targets = (inputs[:, 0] + age > 0.8).long() if classes == 2 else torch.randint(0, classes, (n,), generator=g)
    region = F.one_hot(torch.randint(0, 3, (n,), generator=g), 3).float()
    extras = {"protected_sex": sex.float(), "protected_region": region, "protected_age": age, "group": 2 * sex}
    return Examples(inputs, targets, num_classes=classes, **extras)


def network() -> nn.Module:
    return TinyNetwork(6, outputs=3)


@pytest.mark.parametrize("method", [CCdCov, JdCov, DCov])
def test_conformance(method: type[Method]) -> None:
    check_method(method, skip={"accumulation": "the measure of a batch is no mean over its micro-batches"})


@pytest.mark.parametrize(
    ("method", "measure"),
    [
        (CCdCov(7.0), ccdcov),
        (JdCov(7.0, c=2.0), lambda p, *s: jdcov(p, *s, c=2.0)),
        (DCov(7.0), lambda p, *s: sum(distance_covariance(p, x) for x in s)),
    ],
)
def test_the_penalty_is_lam_times_the_measure_of_probabilities(method: Method, measure: Any) -> None:
    data = examples()
    run = equipoise.start(network(), methods=[method], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=data)
    batch = data.take(torch.arange(20))
    attributes = [batch.extras[f"protected_{name}"] for name in ("age", "region", "sex")]
    logits = run.model(batch.inputs)
    expected = F.cross_entropy(logits, batch.targets) + 7.0 * measure(logits.softmax(1), *attributes)
    torch.testing.assert_close(run.training_loss(batch), expected)


def scaled(output: Tensor, targets: Tensor, loss: Any, scale: str = "auto", **extras: Tensor) -> Tensor:
    """The prediction that the penalty measures."""
    seen = []
    method = CCdCov(1.0, scale=scale)
    method.criterion.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model = nn.Linear(1, 1)
    run = equipoise.start(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss=loss, methods=[])
    batch = equipoise.Batch(output, targets, extras={"protected": torch.arange(float(len(output))), **extras})
    method.penalty(run, batch, equipoise.training.Output(output))
    return seen[0]


def test_predictions_are_taken_on_the_output_scale() -> None:
    z1, z3, classes = torch.randn(6, 1), torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    values, ce = torch.randn(6, 1), F.cross_entropy
    own = lambda output, targets: output.sum()  # noqa: E731
    assert torch.equal(scaled(z1, classes, own), z1.sigmoid())
    assert torch.equal(scaled(z1[:, 0], classes.float(), F.binary_cross_entropy_with_logits), z1[:, 0].sigmoid())
    assert torch.equal(scaled(z1, classes[:, None].float(), nn.BCEWithLogitsLoss()), z1.sigmoid())
    assert torch.equal(scaled(z3, classes, None), z3.softmax(1))
    assert torch.equal(scaled(z3, z3.softmax(1), ce), z3.softmax(1))
    assert torch.equal(scaled(z1, values, F.mse_loss), z1)
    assert torch.equal(scaled(z1, values, own), z1)
    assert torch.equal(scaled(z1, classes[:, None], F.poisson_nll_loss), z1.exp())
    assert torch.equal(scaled(z1, values, nn.PoissonNLLLoss()), z1.exp())
    assert torch.equal(scaled(z1, values, nn.PoissonNLLLoss(log_input=False)), z1)
    assert torch.equal(scaled(z1, values, own, "exp"), z1.exp())
    assert torch.equal(scaled(z1, values, own, "sigmoid"), z1.sigmoid())
    assert scaled(z3.bfloat16(), classes, None).dtype == torch.float32


def test_each_view_of_a_batch_is_a_sample_by_itself() -> None:
    data = examples(16)
    batch = data.take(torch.arange(8))
    twice = equipoise.Batch(
        torch.cat([batch.inputs, batch.inputs + 1]),
        batch.targets.repeat(2),
        extras={name: torch.cat([s, s]) for name, s in batch.extras.items()},
        views=2,
    )
    run = equipoise.start(network(), methods=[CCdCov(5.0)], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=data)
    attributes = [batch.extras[f"protected_{name}"] for name in ("age", "region", "sex")]
    outputs = run.model(twice.inputs)
    parts = [ccdcov(part.softmax(1), *attributes) for part in outputs.chunk(2)]
    got = run.methods[0].penalty(run, twice, equipoise.training.Output(outputs))
    torch.testing.assert_close(got, 5.0 * (parts[0] + parts[1]) / 2)


def test_training_with_it_lowers_the_dependence() -> None:
    data = examples(256, classes=2)

    def dependence(*methods: Method) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        run = equipoise.fit(model, data, epochs=12, batch_size=64, methods=methods)
        logits, _ = run.predict(data)
        return ccdcov(logits.softmax(1), *(s for name, s in data.extras.items() if name.startswith("protected"))).item()

    free = dependence()
    assert dependence(CCdCov(50.0)) < 0.3 * free
    assert dependence(JdCov(50.0)) < 0.3 * free


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CCdCov(-1.0), r"lam = -1.0: must be a number in \[0, inf\)"),
        (lambda: JdCov(lam=float("nan")), "lam = nan"),
        (lambda: JdCov(c=0.0), r"c = 0.0: must be a number in \(0, inf\)"),
        (lambda: DCov(scale="logit"), "scale = 'logit': must be one of 'auto', 'sigmoid'"),
    ],
)
def test_settings_are_checked(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_data_without_protected_attributes_is_refused_before_training() -> None:
    data = examples()
    plain = Examples(data.inputs, data.targets, num_classes=3, group=data.extras["group"])
    with pytest.raises(ArgumentError, match=r"batch.extras = \['group'\]: distance-covariance needs the protected"):
        equipoise.fit(network(), plain, epochs=1, methods=[CCdCov()])
    constant = Examples(data.inputs, data.targets, num_classes=3, protected_sex=torch.ones(37))
    with pytest.raises(DataError, match="protected_sex is the same in all 37 training examples: a constant"):
        equipoise.fit(network(), constant, epochs=1, methods=[JdCov()])
    run = equipoise.start(network(), methods=[DCov()], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ArgumentError, match=r"batch.extras = \[\]: dcov needs the protected attributes, as extras"):
        run.training_loss((data.inputs, data.targets))
