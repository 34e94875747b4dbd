"""What robust aggregation costs the server, beside Flower's own strategies; and the flag aggregator beside singular vectors by SVD.

    python benchmarks/flag_aggregator.py [--clients 50] [--millions 2] [--repeats 2] [--threads 1] [--clock cpu]

A row of the aggregations is a whole one: from the clients' messages, as Flower's, to the next parameters. Both sides read the same
messages; f = 11 of 50 clients may be Byzantine (the most that Bulyan tolerates). Everything is measured in one process, in turn.
Ratios are those of the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if missed:

- Mean, median, trimmed mean, Krum, Multi-Krum and Bulyan are not slower than Flower's strategy of that name, and all but Bulyan
  give the same numbers (to 1e-5): Flower's selects once, by Multi-Krum. It is measured on a twentieth of the parameters.
- The flag aggregator takes at most half of the time of the same step by the SVD of the D x p columns (50 x 0.2 million), with the
  same result.

The flag aggregator and the geometric median have no peer in Flower: they are shown beside its plain mean. 50 clients of 10 million
parameters are 2 GB of messages, and take about 10 GB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

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
    flag_aggregate,
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
        updates = [Update(decode(m.content["arrays"]), 10, 1) for m in messages(arrays)]  # type: ignore[arg-type]
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


def main() -> int:
    options = parser(__doc__, 2)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--millions", type=float, default=2.0, help="parameters of a client's model")
    chosen, bench = parse(options)
    start = time.perf_counter()
    torch.manual_seed(0)
    singular_vectors(bench, chosen.clients)
    aggregations(bench, chosen.clients, round(chosen.millions * 1e6))
    print(f"\n{time.perf_counter() - start:.0f} s in all.")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
