"""What robust aggregation costs the server, beside Flower's own strategies, ByzFL's functions, and the code of the flag
aggregator's authors.

    python benchmarks/flag_aggregator.py [--clients 50] [--millions 2] [--authors DIR] [--repeats 2] [--threads 1] [--clock cpu]

A row of the aggregations is a whole one: from the clients' messages, as Flower's, to the next parameters. Both sides read the same
messages; f = 11 of 50 clients may be Byzantine (the most that Bulyan tolerates). Everything is measured in one process, in turn.
Ratios are those of the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if missed:

- Mean, median, trimmed mean, Krum, Multi-Krum and Bulyan are not slower than Flower's strategy of that name, and all but Bulyan
  give the same numbers (to 1e-5): Flower's selects once, by Multi-Krum. It is measured on a twentieth of the parameters.
- The flag aggregator takes at most half of the time of the same step by the SVD of the D x p columns (50 x 0.2 million), with the
  same result.
- The functions on stacked updates are not slower than those of ByzFL (``pip install --no-deps byzfl``), where that is installed.
  Its Krum sums other distances, and its geometric median does three iterations: ours is held to as many.

The flag aggregator and the geometric median have no peer in Flower: they are shown beside its plain mean. 50 clients of 10 million
parameters are 2 GB of messages, and take about 7 GB. DIR is a checkout of github.com/hamidralmasi/FlagAggregator, which has no
licence and is no part of this project: its flag aggregator, Multi-Krum, median and trimmed mean are then shown beside ours. Its
Bulyan does not run (a name is not defined).
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from harness import Bench, parse, parser
from torch import Tensor, nn

from equipoise.federated.algorithm import FederatedMethod, Server, Update
from equipoise.federated.fedspeed import FedAvg
from equipoise.federated.flag_aggregator import (
    Bulyan,
    CoordinateMedian,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MultiKrum,
    TrimmedMean,
    coordinate_median,
    flag_aggregate,
    geometric_median,
    krum,
    mean,
    multi_krum,
    trimmed_mean,
)
from equipoise.integrations.flower import decode

try:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy as flower
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    sys.exit("needs Flower: pip install 'equipoise[federated]'")

SVD = 0.5


# -- whole aggregations from messages ---------------------------------------------------------------------------------
def messages(arrays: list[Array]) -> list[Message]:
    """One reply of each client; the records are new, since some strategies empty them, and the arrays are not copied."""
    metrics = {"num-examples": 10}
    contents = [RecordDict({"arrays": ArrayRecord({"w": a}), "metrics": MetricRecord(metrics)}) for a in arrays]
    return [Message(content, node, "train") for node, content in enumerate(contents, 1)]


def theirs(strategy: flower.FedAvg, arrays: list[Array]) -> Callable[[], Tensor]:
    def work() -> Tensor:
        found, _ = strategy.aggregate_train(1, messages(arrays))
        assert found is not None
        return decode(found)["w"]

    return work


def ours(method: FederatedMethod, arrays: list[Array], size: int) -> Callable[[], Tensor]:
    server = Server(nn.Module(), {"w": torch.zeros(size)}, {}, clients=dict.fromkeys(range(len(arrays)), 10))

    def work() -> Tensor:
        start = server.params
        updates = [Update(decode(m.content["arrays"], copy=False), 10, 1) for m in messages(arrays)]  # type: ignore[arg-type]
        method.aggregate(server, updates)
        found, server.params = server.params["w"], start
        return found

    return work


def aggregations(bench: Bench, clients: int, size: int) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    draw = np.random.default_rng(0)
    arrays = [Array(0.1 * draw.standard_normal(size, dtype=np.float32)) for _ in range(clients)]
    f = (clients - 3) // 4
    m = clients - f - 2
    byzantine = {"num_malicious_nodes": f}
    pairs: dict[str, tuple[flower.FedAvg | None, FederatedMethod]] = {
        "mean": (flower.FedAvg(), FedAvg()),
        "median": (flower.FedMedian(), CoordinateMedian(f)),
        "trimmed mean": (flower.FedTrimmedAvg(beta=(f + 0.5) / clients), TrimmedMean(f)),
        "krum": (flower.Krum(**byzantine), Krum(f)),
        "multi-krum": (flower.MultiKrum(**byzantine, num_nodes_to_select=m), MultiKrum(f)),
        "bulyan": (flower.Bulyan(**byzantine), Bulyan(f)),
        "geometric median": (None, GeometricMedian(f)),
        "flag aggregator": (None, FlagAggregator(f)),
    }
    plain: list[float] = []
    few = [Array(array.numpy()[: size // 20]) for array in arrays]
    for name, (strategy, method) in pairs.items():
        data, width = (few, size // 20) if name == "bulyan" else (arrays, size)
        works = {} if strategy is None else {"Flower": theirs(strategy, data)}
        works["ours"] = ours(method, data, width)
        seconds, results = in_turn(bench, works)
        plain = plain or seconds["Flower"]
        title = f"{name}: {clients} x {width / 1e6:g} million, f = {f}"
        if strategy is None:
            bench.table(title, {"Flower's mean": plain, "ours": seconds["ours"]})
            continue
        bench.table(title, seconds, 1.0)
        if name != "bulyan":
            same = torch.allclose(results["ours"].double(), results["Flower"].double(), atol=1e-5)
            bench.require("the same numbers, to 1e-5", same)


def in_turn(bench: Bench, works: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of each call, in turn and without a warm-up of its own: a call takes seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    results: dict[str, Tensor] = {}
    for repeat in range(bench.repeats):
        for name in works if repeat % 2 else reversed(works):
            results.pop(name, None)
            start = bench.clock()
            results[name] = works[name]()
            seconds[name].append(bench.clock() - start)
    return seconds, results


# -- singular vectors -------------------------------------------------------------------------------------------------
def by_svd(grads: Tensor, r: int) -> Tensor:
    """The flag mean and one step, each by the SVD of its D x p columns, as published scripts do."""
    units = grads / grads.norm(dim=1, keepdim=True)
    basis = torch.linalg.svd(units.T, full_matrices=False).U[:, :r]
    ratios = (units @ basis).square().sum(1)
    columns = ((1 - ratios).abs() + 1e-7).pow(-0.25)[:, None] * units
    basis = torch.linalg.svd(columns.T, full_matrices=False).U[:, :r]
    return basis @ (basis.T @ units.sum(0)) / r


def singular_vectors(bench: Bench, clients: int, size: int = 200_000) -> None:
    common, own = torch.randn(6, size), torch.randn(clients, size)
    grads, r = torch.randn(clients, 6) @ common + 0.5 * own, (clients + 2) // 2
    works = {
        "SVD of D x p": lambda: by_svd(grads, r),
        "flag_aggregate": lambda: flag_aggregate(grads, r, return_subspace=False).aggregate,
    }
    bench.table(f"flag aggregator, one step: {clients} x {size / 1e6:g} million", works, SVD, repeats=3)
    exact, found = by_svd(grads.double(), r), flag_aggregate(grads, r).aggregate.double()
    bench.require(
        "the SVD's result in float64, to 1e-4 of its norm", bool((found - exact).norm() <= 1e-4 * exact.norm())
    )


# -- functions on stacked updates -------------------------------------------------------------------------------------
def package(name: str, folder: Path, **contents: Any) -> None:
    """A package of this folder, without running its own ``__init__`` (which needs more than is used here)."""
    made = ModuleType(name)
    made.__path__ = [str(folder)]
    vars(made).update(contents)
    sys.modules[name] = made


def functions(bench: Bench, clients: int, size: int, authors: Path | None) -> None:
    grads = 0.1 * torch.randn(clients, size)
    rows, f = list(grads), (clients - 3) // 4
    m, r = clients - f - 2, (clients + 2) // 2
    ours: dict[str, Callable[[], Tensor]] = {
        "mean": lambda: mean(grads),
        "median": lambda: coordinate_median(grads),
        "trimmed mean": lambda: trimmed_mean(grads, f),
        "krum": lambda: krum(grads, f),
        "multi-krum": lambda: multi_krum(grads, f, m),
        "geometric median, 3 iterations": lambda: geometric_median(grads, max_iter=3, tol=0.0).aggregate,
        "flag aggregator": lambda: flag_aggregate(grads, r, return_subspace=False).aggregate,
    }
    peers: dict[str, dict[str, Callable[[], Tensor]]] = {name: {} for name in ours}
    if (found := find_spec("byzfl")) is not None and found.submodule_search_locations:
        folder = Path(next(iter(found.submodule_search_locations)))
        for name in ("byzfl", "byzfl.aggregators"):
            package(name, folder / name.partition(".")[2])
        byzfl: Any = importlib.import_module("byzfl.aggregators.aggregators")
        made = {
            "mean": byzfl.Average(),
            "median": byzfl.Median(),
            "trimmed mean": byzfl.TrMean(f),
            "krum": byzfl.Krum(f),
            "multi-krum": byzfl.MultiKrum(f),
            "geometric median, 3 iterations": byzfl.GeometricMedian(T=3),
        }
        for name, rule in made.items():
            peers[name]["ByzFL"] = lambda rule=rule: rule(grads)
    else:
        print("\nByzFL is not installed: pip install --no-deps byzfl")
    if authors is not None:
        package("tools", authors, pairwise=lambda given: itertools.combinations(given, 2), warning=print)
        package("aggregators", authors / "aggregators", register=lambda *_: None)
        theirs: Any = {n: importlib.import_module(f"aggregators.{n}") for n in ("krum", "median", "trmean")}
        flag: Any = importlib.import_module("aggregators.center_algorithms_torch")
        start = torch.linalg.qr(torch.randn(size, r)).Q

        def published() -> Tensor:
            columns = [row.div(row.norm())[:, None] for row in rows]
            basis = flag.irls_flag(columns, r, 1, "sine", opt_err="sine", init=start)[0]
            return torch.stack([basis @ (basis.T @ column) for column in columns]).sum(0).div(r)

        same = flag_aggregate(grads, r, init=start, return_subspace=False).aggregate
        close = bool((published() - same[:, None]).norm() <= 1e-3 * same.norm())
        bench.require("\nfrom the same start the authors' result, to 1e-3 of its norm", close)
        peers["median"]["authors"] = lambda: theirs["median"].aggregate(rows)
        peers["trimmed mean"]["authors"] = lambda: theirs["trmean"].aggr_trmean(rows, f)
        peers["multi-krum"]["authors"] = lambda: theirs["krum"].aggregate(rows, f)
        peers["flag aggregator"]["authors"] = published
    for name, others in peers.items():
        if others:
            seconds, _ = in_turn(bench, {**others, "ours": ours[name]})
            bench.table(f"{name}: {clients} x {size / 1e6:g} million, f = {f}", seconds, 1.0)


def main() -> int:
    options = parser(__doc__, 2)
    options.add_argument("--authors", type=Path, help="a checkout of github.com/hamidralmasi/FlagAggregator")
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--millions", type=float, default=2.0, help="parameters of a client's model")
    chosen, bench = parse(options)
    start = time.perf_counter()
    torch.manual_seed(0)
    singular_vectors(bench, chosen.clients)
    functions(bench, chosen.clients, round(chosen.millions * 1e5), chosen.authors)
    aggregations(bench, chosen.clients, round(chosen.millions * 1e6))
    print(f"\n{time.perf_counter() - start:.0f} s in all.")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
