"""What distance covariance costs: beside dcor, beside the definition written with whole matrices, and in memory.

    python benchmarks/distance_covariance.py [--repeats 15] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- `distance_covariance` of two scalar variables, in float64, takes at most as long as the faster of the two O(n log n) forms of
  dcor's `u_distance_covariance_sqr` for 10,000 examples and more. For fewer dcor's compiled code is faster, since ours has the
  fixed cost of a hundred calls to torch, and the ratio is shown without a target: measured 4 at 64 and 256 examples, 1.2 at
  2000. dcor gives the value, ours the value and what its gradient needs.
- With six attribute columns side by side (CCdCov) it takes at most as long as dcor from 256 examples on.
- The values are dcor's, to 1e-10.
- Loss and gradient of CCdCov and JdCov take at most 0.6 of what the definition takes for 1000 examples, and are not slower for
  256: written with whole matrices and automatic derivatives, where the attributes carry no gradient either. Both give the same
  value and gradient.
- CCdCov of 20,000 examples with its gradient adds less than 100 MiB to the process's memory (one matrix of all pairs would take
  1526 MiB), and the scalar form of 100,000 less than 100 MiB.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import dcor
import torch
from harness import Bench, parse
from torch import Tensor

from equipoise.fairness.distance_covariance import ccdcov, distance_covariance, jdcov, u_centered

PEER, DEFINITION, MEMORY = 1.0, {256: 1.0, 1000: 0.6}, 100.0


def data(n: int) -> tuple[Tensor, list[Tensor]]:
    """A prediction that depends on a binary, a categorical (4) and a continuous attribute, all float64."""
    g = torch.Generator().manual_seed(0)
    sex = torch.randint(0, 2, (n,), generator=g).double()
    race = torch.nn.functional.one_hot(torch.randint(0, 4, (n,), generator=g), 4).double()
    age = torch.rand(n, generator=g, dtype=torch.float64)
    return torch.sigmoid(sex - age + torch.randn(n, generator=g, dtype=torch.float64)), [sex, race, age]


# -- the peer ---------------------------------------------------------------------------------------------------------
def scalars(bench: Bench, n: int) -> None:
    prediction, (_, _, age) = data(n)
    p, s = prediction.numpy(), age.numpy()
    works: dict[str, Callable[[], object]] = {
        "dcor, merge sort": lambda: dcor.u_distance_covariance_sqr(p, s, method="mergesort"),
        "dcor, AVL tree": lambda: dcor.u_distance_covariance_sqr(p, s, method="avl"),
        "distance_covariance": lambda: distance_covariance(prediction, age),
    }
    bench.table(f"two scalar variables, n = {n}", works, PEER if n >= 10_000 else None, peer=list(works)[:-1])
    theirs = dcor.u_distance_covariance_sqr(p, s, method="mergesort")
    bench.require("dcor's value, to 1e-10", abs(float(distance_covariance(prediction, age)) - theirs) < 1e-10)


def blocks(bench: Bench, n: int) -> None:
    prediction, attributes = data(n)
    joint = torch.cat([s.reshape(n, -1) for s in attributes], 1)
    p, s = prediction.numpy(), joint.numpy()
    works: dict[str, Callable[[], object]] = {
        "dcor": lambda: dcor.u_distance_covariance_sqr(p, s),
        "ccdcov": lambda: ccdcov(prediction, *attributes),
    }
    bench.table(f"a scalar and six columns, n = {n}", works, PEER)
    theirs = dcor.u_distance_covariance_sqr(p, s)
    bench.require("dcor's value, to 1e-10", abs(float(ccdcov(prediction, *attributes)) - theirs) < 1e-10)


# -- the definition ---------------------------------------------------------------------------------------------------
def definition(prediction: Tensor, *attributes: Tensor) -> Tensor:
    n = len(prediction)
    with torch.no_grad():
        u = u_centered(torch.cat([s.reshape(n, -1) for s in attributes], 1))
    return (u_centered(prediction) * u).sum() / (n * (n - 3))


def joint_definition(prediction: Tensor, *attributes: Tensor) -> Tensor:
    n, count = len(prediction), len(attributes) + 1
    with torch.no_grad():
        product = torch.stack([u_centered(s) + 1 for s in attributes]).prod(0)
    return ((u_centered(prediction) + 1) * product).sum() / (n * (n - 3)) - n * 1.0**count / (n - 3)


def gradients(bench: Bench, n: int, outputs: int) -> None:
    prediction, attributes = data(n)
    if outputs > 1:
        prediction = torch.stack([prediction * (1 + i) for i in range(outputs)], 1).softmax(1)
    leaf = prediction.float().requires_grad_()
    single = [s.float() for s in attributes]

    def both(measure: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            (gradient,) = torch.autograd.grad(measure(leaf, *single), leaf)
            return gradient

        return work

    for name, ours, theirs in (("ccdcov", ccdcov, definition), ("jdcov", jdcov, joint_definition)):
        works = {"the definition": both(theirs), name: both(ours)}
        bench.table(f"{name} and gradient, n = {n}, outputs {outputs}", works, DEFINITION[n])
        same = torch.allclose(ours(leaf, *single), theirs(leaf, *single), atol=1e-6)
        same &= torch.allclose(works[name](), works["the definition"](), atol=1e-7)
        bench.require("the same value and gradient", same)


# -- memory -----------------------------------------------------------------------------------------------------------
CHILD = """
import resource, torch
from equipoise.fairness import ccdcov
torch.set_num_threads(1)
def work(n):
    p = torch.rand(n).requires_grad_()
    attributes = [torch.rand(n)] if {columns} == 1 else [torch.rand(n), torch.rand(n, {columns} - 1)]
    ccdcov(p, *attributes).backward()
work(1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work({n})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory(bench: Bench, n: int, columns: int) -> None:
    """Growth of a process's largest resident memory."""
    child = [sys.executable, "-c", CHILD.format(n=n, columns=columns)]
    start = time.perf_counter()
    grown = float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    text = (
        f"{n} examples, {columns} columns: {grown:.0f} MiB more ({time.perf_counter() - start:.0f} s), < {MEMORY:.0f}"
    )
    bench.require(text, grown < MEMORY)


def main() -> int:
    _, bench = parse(__doc__, 15)
    for n in (64, 256, 1000, 2000, 10_000, 100_000):
        scalars(bench, n)
    for n in (64, 256, 1000, 3000):
        blocks(bench, n)
    for n, outputs in ((256, 1), (1000, 1), (1000, 3)):
        gradients(bench, n, outputs)
    print()
    memory(bench, 20_000, 6)
    memory(bench, 100_000, 1)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
