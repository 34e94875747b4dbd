"""Distance covariance: predictions that are independent of several protected attributes at once.

A model that never sees sex, race or age still learns them from what they left in its inputs, and predicts differently for the
groups. Penalties for one attribute at a time can be met while the intersections (young women, old men) are treated worse than
ever. The regulariser here measures any dependence between the predictions and all attributes together, of whatever type, and
is zero in the population only under independence (demographic parity for every subgroup).

For a variable x of n examples let `a_ij = ||x_i - x_j||`, and let its U-centred matrix be, off a zero diagonal,

    U_ij  =  sum_k a_ik / (n-2)  +  sum_k a_kj / (n-2)  -  a_ij  -  sum_kl a_kl / ((n-1)(n-2))

For predictions `yh` and encoded attributes `s_1 .. s_d`, all unbiased estimates of squared dependences,

    dCov^2(x, y)           =  sum_ij U^x_ij U^y_ij / (n(n-3))
    CCdCov(yh; s_1..s_d)   =  dCov^2(yh, [s_1, ..., s_d])                                   attributes side by side
    JdCov(yh, s_1..s_d)    =  sum_ij prod_m (U^m_ij + c) / (n(n-3))  -  n c^(d+1) / (n-3)   over yh and the attributes
    sum                    =  sum_m dCov^2(yh, s_m)                                         misses the intersections

    loss                   =  the task's loss  +  lam * measure(yh; s_1..s_d)

on each minibatch, yh on the output scale: probabilities, rates or values, not logits. JdCov also holds the dependence among the
attributes, which the model cannot change. For one attribute all of them are dCov^2. The gradient flows through yh only.

## When to use
Demographic parity in classification and regression, with several protected attributes, continuous ones among them, and with
intersections that matter. The measure is a term of the loss, so that it fits any network, batch by batch.

## When not
Where the outcome itself should be predicted equally well in each group (equalised odds, calibration): independence is another
aim, and it costs accuracy wherever the attributes and the outcome are related. With batches below about 64 examples, whose
estimates are noisy. The weight has to be chosen by what a point of fairness is worth: there is no value that is right. For one
binary attribute reweighing and threshold shifts are simpler.

## Cost
Two scalar variables: O(n log n) time, O(n) memory. All else: O(n^2 (p + k)) time, and the memory of one block (1 MiB on a
CPU; distances of up to 1448 examples are kept for a second pass). The attributes' distances take no gradient, and value and
gradient come from one pass. Nothing at inference.

## In a distributed run
`DistanceCovarianceLoss` gathers predictions and attributes of all processes: the measure is that of the global batch, and 2
processes equal 1.

## Source
Lee, Antonio, Avanzi, Marchi, Zhou: Machine Learning with Multitype Protected Attributes: Intersectional Fairness through
Regularisation. arXiv:2509.08163, 2025. JdCov: Chakraborty, Zhang: Distance Metrics for Measuring Joint Dependence with
Application to Causal Inference. JASA 2019, whose sign of U is used: minus that of Szekely and Rizzo, which for two variables
cancels. The O(n log n) form after Huo, Szekely: Fast Computing for Distance Covariance. Technometrics 2016, arXiv:1410.1503.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range
from equipoise.fairness.metrics import jensen_shannon_divergence, ranked_probability_score, unfairness
from equipoise.fairness.outputs import SCALES, check_protected, on_output_scale, protected_of
from equipoise.fairness.pairs import measure
from equipoise.fairness.protected import ProtectedEncoder
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space

__all__ = [
    "CCdCov",
    "DCov",
    "DistanceCovarianceLoss",
    "JdCov",
    "PermutationTest",
    "ProtectedEncoder",
    "ccdcov",
    "distance_correlation",
    "distance_covariance",
    "independence_test",
    "jdcov",
    "jensen_shannon_divergence",
    "ranked_probability_score",
    "u_centered",
    "unfairness",
]

KINDS = ("ccdcov", "jdcov", "sum")


# -- the functional core ----------------------------------------------------------------------------------------------
def u_centered(x: Tensor) -> Tensor:
    """The U-centred matrix (n, n) of the distances of x (n,) or (n, p): symmetric, rows and diagonal zero.

    The sign is that of Chakraborty and Zhang, distances enter negatively. Raises ``ArgumentError`` (a ``ValueError``) for n < 4.
    """
    (columns,) = _columns(x=x)
    n = len(columns)
    if columns.shape[1] == 1:
        a = (columns - columns.T).abs()
    else:
        a = torch.cdist(columns, columns, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode loses digits
    r = a.sum(1) / (n - 2)
    u = r[:, None] + r - a - r.sum() / (n - 1)
    return u.masked_fill(torch.eye(n, dtype=torch.bool, device=u.device), 0)


def distance_covariance(x: Tensor, y: Tensor) -> Tensor:
    """The squared distance covariance of x and y, each (n,) or (n, p), unbiased: a scalar, which may be negative.

    ``sum_ij U^x_ij U^y_ij / (n(n - 3))``; zero in expectation under independence. Differentiable in both. n >= 4. Integers and
    half precision are computed in float32.
    """
    return measure(None, *_columns(x=x, y=y))


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """``dCov^2(x, y) / sqrt(dCov^2(x, x) dCov^2(y, y))``, at most 1: a scalar, which may be negative; 0 for a constant."""
    x, y = _columns(x=x, y=y)
    product = distance_covariance(x, x).clamp(min=0) * distance_covariance(y, y).clamp(min=0)
    varies = product > 0
    return torch.where(varies, distance_covariance(x, y) / torch.where(varies, product, 1).sqrt(), 0)


def jdcov(*xs: Tensor, c: float = 1.0) -> Tensor:
    """The squared joint distance covariance of two or more variables, each (n,) or (n, p), unbiased: a scalar.

    ``sum_ij prod_m (U^m_ij + c) / (n(n - 3)) - n c^d / (n - 3)`` over all i, j, for d variables. c > 0 weighs the dependence of
    few variables against that of many; for two, every c gives ``dCov^2``. Differentiable in all.
    """
    check_range("c", c, 0, open_low=True)
    if len(xs) < 2:
        raise ArgumentError(f"xs = {len(xs)} variables: must be at least 2")
    return measure(float(c), *_columns(**{f"xs[{i}]": x for i, x in enumerate(xs)}))


def ccdcov(prediction: Tensor, *protected: Tensor) -> Tensor:
    """``dCov^2`` of the prediction, (n,) or (n, k), and all protected attributes side by side: a scalar, unbiased.

    protected: at least one, each (n,) or (n, p), encoded (see ``ProtectedEncoder``), since a column of large numbers drowns the
    others; their gradient is not taken.
    """
    prediction, *columns = _columns(prediction=prediction, **_named(protected))
    return measure(None, prediction, torch.cat(columns, 1).detach())


def _marginal_sum(prediction: Tensor, *protected: Tensor) -> Tensor:
    """``sum_m dCov^2(prediction, s_m)``."""
    prediction, *columns = _columns(prediction=prediction, **_named(protected))
    return measure(None, prediction, *(column.detach() for column in columns))


def _named(protected: Sequence[Tensor]) -> dict[str, Tensor]:
    if not protected:
        raise ArgumentError("protected = (): must hold at least one attribute")
    return {f"protected[{i}]": s for i, s in enumerate(protected)}


def _columns(**variables: Tensor) -> list[Tensor]:
    """Every variable as (n, p) in a common floating type of at least float32, or an error that names the wrong one."""
    first, n = next((name, len(x) if x.ndim else 0) for name, x in variables.items())
    for name, x in variables.items():
        if x.ndim not in (1, 2) or 0 in x.shape[1:] or x.is_complex():
            raise ArgumentError(f"{name} = {x.dtype} {tuple(x.shape)}: must be real, of shape (n,) or (n, p)")
        if len(x) != n:
            raise ArgumentError(f"{name} has {len(x)} rows but {first} has {n}: must be the same examples")
    if n < 4:
        raise ArgumentError(f"{first} = {n} examples: must be at least 4, fewer give no unbiased estimate")
    double = any(x.dtype == torch.float64 for x in variables.values())
    dtype = torch.float64 if double else torch.float32
    return [x.to(dtype).reshape(n, -1) for x in variables.values()]


# -- a test of independence -------------------------------------------------------------------------------------------
class PermutationTest(NamedTuple):
    """The statistic, the 95 % quantile of its permutation distribution, and the p-value ``(1 + #{>=}) / (permutations + 1)``."""

    statistic: float
    critical_95: float
    p_value: float


def independence_test(
    *xs: Tensor, statistic: str = "jdcov", n_permutations: int = 100, generator: torch.Generator | None = None
) -> PermutationTest:
    """Whether variables, each (n,) or (n, p), are independent: a permutation test.

    statistic: "jdcov" (mutual independence of all), or "ccdcov" (of the first and the others taken together), or "sum". Every
        variable is permuted, for "ccdcov" the others as one.
    """
    check_choice("statistic", statistic, KINDS)
    check_integer("n_permutations", n_permutations, 1)
    if len(xs) < 2:
        raise ArgumentError(f"xs = {len(xs)} variables: must be at least 2")
    variables = _columns(**{f"xs[{i}]": x.detach() for i, x in enumerate(xs)})
    if statistic == "ccdcov":
        variables = [variables[0], torch.cat(variables[1:], 1)]
    compute = _MEASURES[statistic]
    n, device = len(variables[0]), variables[0].device

    def permuted() -> Tensor:
        return compute(*(x[torch.randperm(n, generator=generator).to(device)] for x in variables))

    seen = compute(*variables)
    null = torch.stack([permuted() for _ in range(n_permutations)])
    p = (1 + int((null >= seen).sum())) / (n_permutations + 1)
    return PermutationTest(float(seen), float(null.quantile(0.95)), p)


_MEASURES: dict[str, Callable[..., Tensor]] = {"ccdcov": ccdcov, "jdcov": jdcov, "sum": _marginal_sum}


# -- the module -------------------------------------------------------------------------------------------------------
class DistanceCovarianceLoss(nn.Module):
    """The dependence of predictions and protected attributes, to add to a loss, for any training loop.

    >>> dependence = DistanceCovarianceLoss()
    >>> sex, age = torch.tensor([0.0, 1, 1, 0, 1]), torch.tensor([0.1, 0.9, 0.4, 0.5, 0.0])
    >>> dependence(torch.full((5,), 0.3), [sex, age]).item()
    0.0

    kind: "ccdcov", "jdcov" or "sum" (see the formulas above). c: the constant of "jdcov", > 0.
    """

    def __init__(self, kind: str = "ccdcov", c: float = 1.0) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_range("c", c, 0, open_low=True)
        self.kind, self.c = kind, c

    def forward(self, prediction: Tensor, protected: Tensor | Sequence[Tensor]) -> Tensor:
        """The measure, a scalar; 0 for fewer than 4 examples, of which there is no estimate (a last batch).

        prediction: (N,) or (N, k), on the output scale: probabilities, rates, values. protected: one encoded attribute or
        several, each (N,) or (N, p); their gradient is not taken. Rows of all processes are gathered.
        """
        attributes = [protected] if isinstance(protected, Tensor) else list(protected)
        if not attributes:
            raise ArgumentError("protected = []: must hold at least one attribute")
        prediction, *attributes = gather_rows(precise(prediction), *attributes)
        if len(prediction) < 4:
            return prediction.sum() * 0
        extra = {"c": self.c} if self.kind == "jdcov" else {}
        return _MEASURES[self.kind](prediction, *(s.detach() for s in attributes), **extra)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}" + (f", c={self.c}" if self.kind == "jdcov" else "")


# -- the methods ------------------------------------------------------------------------------------------------------
class _Penalty(Method):
    """Adds ``lam`` times a measure of the dependence between the predictions and the batch's protected attributes."""

    space: ClassVar[Space] = {"lam": LogUniform(2.0, 300.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"lam": 0.0}

    criterion: DistanceCovarianceLoss

    def __init__(self, lam: float, scale: str, criterion: DistanceCovarianceLoss) -> None:
        check_range("lam", lam, 0)
        check_choice("scale", scale, SCALES)
        self.lam, self.scale, self.criterion = lam, scale, criterion

    def prepare(self, run: Run) -> None:
        check_protected(run, self.name)

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        if self.lam == 0:
            return output.prediction.new_zeros(())
        prediction = on_output_scale(output.prediction, batch.targets, self.scale, run.task_loss)
        attributes = protected_of(batch, self.name)
        # Two views of one example are no two examples: each view of the batch is a sample by itself.
        views = zip(prediction.chunk(batch.views), *(s.chunk(batch.views) for s in attributes), strict=True)
        return self.lam * torch.stack([self.criterion(p, s) for p, *s in views]).mean()


class CCdCov(_Penalty):
    """Make predictions independent of all protected attributes together (distance covariance).

    lam: weight of the penalty, >= 0; 0 is the baseline. scale: how predictions come from the model's output: "auto" (sigmoid of
    one logit, softmax of several, exp under a Poisson loss, values as they are), "sigmoid", "softmax", "exp" or "identity".
    The attributes are the batch's extras whose names begin with ``protected``, each (N,) or (N, p), encoded.
    """

    name = "distance-covariance"
    paper = Paper(
        "Machine Learning with Multitype Protected Attributes: Intersectional Fairness through Regularisation",
        "Lee, Antonio, Avanzi, Marchi, Zhou",
        "preprint 2025",
        "https://arxiv.org/abs/2509.08163",
    )

    def __init__(self, lam: float = 20.0, *, scale: str = "auto") -> None:
        super().__init__(lam, scale, DistanceCovarianceLoss("ccdcov"))


class JdCov(_Penalty):
    """As distance-covariance, by the joint measure that also counts the higher-order terms (JdCov).

    c: its constant, > 0. lam, scale: as for distance-covariance.
    """

    name = "jdcov"
    paper = Paper(
        "Machine Learning with Multitype Protected Attributes: Intersectional Fairness through Regularisation",
        "Lee, Antonio, Avanzi, Marchi, Zhou",
        "preprint 2025",
        "https://arxiv.org/abs/2509.08163",
    )

    def __init__(self, lam: float = 20.0, c: float = 1.0, *, scale: str = "auto") -> None:
        super().__init__(lam, scale, DistanceCovarianceLoss("jdcov", c))
        self.c = c


class DCov(_Penalty):
    """Make predictions independent of one protected attribute, or of each of several by itself (marginal sum).

    With several attributes dependence on their intersections remains. lam, scale: as for distance-covariance.
    """

    name = "dcov"
    paper = Paper(
        "Machine Learning with Multitype Protected Attributes: Intersectional Fairness through Regularisation",
        "Lee, Antonio, Avanzi, Marchi, Zhou",
        "preprint 2025",
        "https://arxiv.org/abs/2509.08163",
    )

    def __init__(self, lam: float = 20.0, *, scale: str = "auto") -> None:
        super().__init__(lam, scale, DistanceCovarianceLoss("sum"))
