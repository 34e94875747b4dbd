"""What federated rounds cost: rounds a second in one process, a client's training, local steps, and the server's mean.

    python benchmarks/fedspeed.py [--repeats 15] [--threads 1] [--clock cpu] [--clients 20] [--parameters 1000000]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of the
fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- Ten clients on digits, one local epoch of batches of 32, through Flower's apps and messages: at least 5 rounds a second.
- A client's epoch of FedAvg takes at most 1.5 of the same epoch written as a loop with `torch.optim.SGD` and clipping;
  FedSpeed's at most 2.4 of FedAvg's, which has half of the gradients.
- `fedspeed_step` without its gradients is not slower than the same arithmetic parameter by parameter (a net of 62 tensors).
- `weighted_mean`, from the messages on (read, checked for NaN, averaged), is not slower than Flower's own `aggregate_arrayrecords`,
  which FedAvg uses and which checks nothing. `--clients 50 --parameters 10000000` is a size that needs 6 GB of memory.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from harness import Bench, parse, parser
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import load, split
from equipoise.federated import partition
from equipoise.federated.algorithm import Client, FederatedMethod, LocalTraining
from equipoise.federated.fedspeed import FedAvg, FedSpeed, fedspeed_step
from equipoise.federated.params import Params, is_finite, state_of, weighted_mean
from equipoise.federated.simulation import simulate
from equipoise.integrations.flower import decode, encode
from equipoise.training import Examples

ROUNDS, LOOP, SPEED, STEP, MEAN = 5.0, 1.5, 2.4, 1.0, 1.0


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> list[Examples]:
    train = split(load("digits"), 0, standardise=True).train
    rows = partition.dirichlet(train.targets, 10, 0.5, torch.Generator().manual_seed(0), least=10)
    return [train.subset(own) for own in rows]


def rounds(bench: Bench, count: int = 10) -> None:
    clients, local = digits(), LocalTraining(batch_size=32)
    print(f"\n{'10 clients on digits, rounds a second':56} {'fastest':>12} {'median':>8}")
    for method in (FedAvg(), FedSpeed()):
        rates = []
        for _ in range(4):
            start = bench.clock()
            simulate(method, net, clients, count, local=local)
            rates.append(count / (bench.clock() - start))
        rates.sort()
        print(f"{method.name:56} {rates[-1]:12.1f} {rates[1]:8.1f}")
        if method.name == "fedavg":
            bench.require(f"at least {ROUNDS:g} rounds a second", rates[-1] >= ROUNDS)


def epochs(bench: Bench) -> None:
    data, local = digits()[0], LocalTraining(batch_size=16)
    model = net()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def ours(method: FederatedMethod) -> Callable[[], object]:
        from equipoise.federated.algorithm import Sent

        params, buffers = state_of(model)
        return lambda: method.client_update(Client(0, model, data, local=local), Sent(params, buffers, 1))

    def loop() -> None:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        for rows in torch.randperm(len(data)).split(16):
            batch = data.take(rows)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()

    works = {"a loop with torch.optim.SGD": loop, "FedAvg": ours(FedAvg()), "FedSpeed": ours(FedSpeed())}
    seconds = bench.measure(works)
    bench.table("a client's epoch of digits, batches of 16", {k: seconds[k] for k in list(works)[:2]}, LOOP)
    bench.table("the same", {k: seconds[k] for k in list(works)[1:]}, SPEED)


def steps(bench: Bench) -> None:
    """A net of 62 tensors, as ResNet-18 has, of a tenth of its size."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 64, 3, 3)] * 20 + [(64,)] * 41 + [(10, 64)]

    def draw() -> Params:
        return {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(sizes)}

    w, x, h, g = draw(), draw(), draw(), draw()
    settings = {"lr": 0.1, "prox": 0.1, "rho": 0.1, "weight_decay": 1e-3}

    def by_parameter() -> Params:
        length = torch.sqrt(sum((t**2).sum() for t in g.values())) + 1e-7  # type: ignore[call-overload]
        ascended = {name: t + settings["rho"] * g[name] / length for name, t in w.items()}
        del ascended
        q = {name: g[name] + settings["prox"] * (t - x[name] + h[name]) for name, t in w.items()}
        size = torch.sqrt(sum((t**2).sum() for t in q.values()))  # type: ignore[call-overload]
        scale = (10.0 / (size + 1e-6)).clamp(max=1.0)
        return {name: t - settings["lr"] * (scale * q[name] + settings["weight_decay"] * t) for name, t in w.items()}

    def ours() -> Params:
        return fedspeed_step(w, lambda params: g, anchor=x, dual=h, clip_norm=10.0, **settings)

    bench.table(
        "a local step without its gradients, 62 tensors",
        {"parameter by parameter": by_parameter, "fedspeed_step": ours},
        STEP,
    )
    same = all(torch.allclose(ours()[name], t, atol=1e-5) for name, t in by_parameter().items())
    bench.require("the same numbers, to 1e-5", same)


def means(bench: Bench, clients: int, parameters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [parameters // 2, parameters // 4, parameters - parameters // 2 - parameters // 4]
    contents = []
    for number in range(clients):
        state: dict[str, Tensor] = {f"w{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
        records = {"arrays": encode(state), "metrics": MetricRecord({"num-examples": 10 + number})}
        contents.append(RecordDict(records))  # type: ignore[arg-type]
    weights = [10.0 + number for number in range(clients)]

    def flowers() -> ArrayRecord:
        return aggregate_arrayrecords(contents, "num-examples")

    def ours() -> Params:
        found = [decode(content.array_records["arrays"], copy=False) for content in contents]
        assert all(map(is_finite, found))
        return weighted_mean(found, weights)

    title = f"mean of {clients} clients x {parameters:,} parameters"
    bench.table(title, {"Flower, aggregate_arrayrecords": flowers, "read, check, weighted_mean": ours}, MEAN, repeats=5)
    mine, theirs = ours(), flowers().to_torch_state_dict()
    bench.require("the same mean, to 1e-5", all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in theirs))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=20)
    options.add_argument("--parameters", type=int, default=1_000_000)
    chosen, bench = parse(options)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    start = time.perf_counter()
    rounds(bench)
    epochs(bench)
    steps(bench)
    means(bench, chosen.clients, chosen.parameters)
    print(f"\n{time.perf_counter() - start:.0f} s")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
