"""What FedLoGe costs: a client's step beside one of FedAvg, the fixed classifier beside autograd and torch's Adam.

    python benchmarks/fedloge.py [--repeats 9] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. No package implements FedLoGe, so that the peers are
FedAvg and what the published code does, written out. Targets, exit code 1 if one is missed:

- A client's 20 steps take at most 1.15 of FedAvg's for a small convolutional network (images 1x28x28, batch 64). For an MLP
  784-128-64-10 at batch 16, whose step is the time to start its operations, at most 1.5.
- `optimize_sparse_etf` takes at most 0.75 of the time of the same steps by autograd and `torch.optim.Adam`. Both give one matrix.
- `local_logits` takes at most 0.5 of the time of a loop over clients' classes that realigns, adds and masks one class at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.federated.algorithm import Client, FederatedMethod, LocalTraining, Sent
from equipoise.federated.fedloge import FedLoGe, local_logits, optimize_sparse_etf, simplex_etf, sparsify
from equipoise.federated.fedspeed import FedAvg
from equipoise.federated.params import state_of
from equipoise.models.reference import MLP, ConvNet
from equipoise.training import Examples


# -- a client's steps -------------------------------------------------------------------------------------------------
def steps(bench: Bench, title: str, make: Callable[[], nn.Module], batch: int, target: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 20 * batch
    images = torch.randn(rows, 1, 28, 28, generator=generator)
    data = Examples(images, torch.randint(10, (rows,), generator=generator), num_classes=10)
    local = LocalTraining(lr=1e-4, momentum=0.5, batch_size=batch)

    def work(method: FederatedMethod) -> Callable[[], object]:
        torch.manual_seed(0)
        model = method.configure_model(make(), 0)
        params, buffers = state_of(model)
        state: dict[str, dict[str, Tensor]] = {}

        def train() -> object:
            client = Client(0, model, data, state=state, local=local)
            client.set(params)
            return method.client_update(client, Sent(params, buffers))

        return train

    bench.table(title, {"fedavg": work(FedAvg()), "fedloge": work(FedLoGe(etf_steps=10))}, target)


# -- the fixed classifier ---------------------------------------------------------------------------------------------
def by_autograd(sparse: Tensor, mask: Tensor, count: int, lr: float, norm: float) -> Tensor:
    """The same optimisation as the published code writes it."""
    w = sparse.double().clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)
    eye = torch.eye(w.shape[1], dtype=torch.bool)
    for _ in range(count):
        lengths = w.norm(dim=0)
        unit = F.normalize(w, dim=0)
        cosines = (unit.T @ unit).masked_fill(eye, -1.0)
        angle = torch.arccos(cosines.max(1).values.clamp(-0.99999, 0.99999))
        adam.zero_grad()
        (((lengths - norm) ** 2).sum() - angle.mean()).backward()
        assert w.grad is not None
        w.grad *= mask
        adam.step()
    return w.detach()


def classifier(bench: Bench, width: int, classes: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sparse, mask = sparsify(simplex_etf(classes, width, generator=generator, dtype=torch.float64), generator=generator)
    works = {
        "autograd and torch.optim.Adam": lambda: by_autograd(sparse, mask, count, 1e-3, 0.1),
        "optimize_sparse_etf": lambda: optimize_sparse_etf(sparse, mask, steps=count, lr=1e-3),
    }
    bench.table(f"{count} steps of the fixed classifier, {width} x {classes}", works, 0.75)
    same = torch.allclose(works["optimize_sparse_etf"](), works["autograd and torch.optim.Adam"](), atol=1e-6)
    bench.require("the same matrix, to 1e-6", same)


# -- personal predictions ---------------------------------------------------------------------------------------------
def by_class(z: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], present: Tensor) -> Tensor:
    columns = []
    for c in range(len(present)):
        if present[c]:
            realigned = shared[0][c] * own[0][c].norm()
            columns.append((z @ realigned + shared[1][c]) + (z @ own[0][c] + own[1][c]))
        else:
            columns.append(torch.full((len(z),), -torch.inf))
    return torch.stack(columns, 1)


def predictions(bench: Bench, rows: int, width: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, width, generator=generator)
    heads = [
        (torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator)) for _ in "ab"
    ]
    present = torch.rand(classes, generator=generator) < 0.5
    works = {
        "class by class": lambda: by_class(z, heads[0], heads[1], present),
        "local_logits": lambda: local_logits(z, heads[0], heads[1], present),
    }
    bench.table(f"personal logits, {rows} x {width}, C = {classes}", works, 0.5)
    same = torch.allclose(works["class by class"](), works["local_logits"](), rtol=1e-4, atol=1e-3)
    bench.require("the same logits, to 1e-3", same)


def main() -> int:
    _, bench = parse(__doc__, 9)
    steps(bench, "a client, CNN of width 8, batch 64, 20 steps", lambda: ConvNet((1, 28, 28), 10, 8), 64, 1.15)
    mlp = lambda: MLP((1, 28, 28), 10, (128, 64), head_bias=True)  # noqa: E731
    steps(bench, "a client, MLP 784-128-64-10, batch 16, 20 steps", mlp, 16, 1.5)
    classifier(bench, 64, 10, 200)
    classifier(bench, 256, 50, 100)
    predictions(bench, 1000, 64, 10)
    predictions(bench, 1000, 256, 100)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
