"""FedTiny's adjustment: the largest gradients against sorting the layer, what is uploaded, and the gradient of one block.

The peer of the selection is what implementations of sparse training do: sort all gradients of the layer. Bytes are those of
Flower's records. Memory is the largest sum of live tensors while gradients are found, without the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.federated.fedtiny import adjust_count, grow_prune, magnitude_mask, merge_topk, topk_gradients
from equipoise.training.cost import PeakMemory

DENSITY = 0.01
SELECTION = 0.6  # of the time of a stable sort
MOVE = 0.7
LEAST_SAVING = 100.0  # dense gradient over upload, in bytes
BLOCK = 0.5  # of the memory of the whole gradient


def sorted_gradients(grad: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The peer: all gradients of the layer sorted, stably."""
    flat = grad.reshape(-1)
    order = flat.abs().masked_fill(mask.reshape(-1), -1.0).argsort(descending=True, stable=True)[:k]
    return order, flat[order]


def sorted_move(weight: Tensor, mask: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The peer: weights and gradients sorted, stably."""
    inside = mask.reshape(-1)
    leave = weight.reshape(-1).abs().masked_fill(~inside, torch.inf).argsort(stable=True)[:k]
    enter = grad.abs().masked_fill(inside, -1.0).argsort(descending=True, stable=True)[:k]
    new = inside.clone()
    new[leave], new[enter] = False, True
    return (weight.reshape(-1) * (inside & new)).view_as(weight), new.view_as(mask)


def layer(bench: Bench, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = magnitude_mask(weight, DENSITY)
    k = adjust_count(int(mask.sum()), 0, 100)
    size = f"{weight.numel():,} weights, k = {k}"
    works: dict[str, Callable[[], object]] = {
        "a stable sort of the layer": lambda: sorted_gradients(grad, mask, k),
        "topk_gradients": lambda: topk_gradients(grad, mask, k),
    }
    bench.table(f"a client's largest gradients, {size}", works, SELECTION)
    ours, theirs = topk_gradients(grad, mask, k), sorted_gradients(grad, mask, k)
    bench.require("the same places and values", all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)))

    uploads = [topk_gradients(torch.randn(shape, generator=generator), mask, k) for _ in range(10)]
    merged = merge_topk(uploads, [1.0] * 10, weight.numel())
    works = {
        "stable sorts of weights and gradients": lambda: sorted_move(weight * mask, mask, merged, k),
        "grow_prune": lambda: grow_prune(weight * mask, mask, merged, k),
    }
    bench.table(f"the server's move of the mask, {size}", works, MOVE)
    pairs = zip(grow_prune(weight * mask, mask, merged, k), sorted_move(weight * mask, mask, merged, k), strict=True)
    bench.require("the same mask and weights", all(torch.equal(a, b) for a, b in pairs))

    from flwr.app import RecordDict

    from equipoise.integrations.flower import encode, nbytes

    dense, sparse = (
        nbytes(RecordDict({"arrays": encode(params)}))
        for params in ({"grad": grad}, {"indices": ours[0], "values": ours[1]})
    )
    print(
        f"\nupload of one client, {size}: dense {dense:,} bytes, largest gradients {sparse:,}, ratio {dense / sparse:.0f}"
    )
    bench.require(f"at least {LEAST_SAVING:g} times less", dense >= LEAST_SAVING * sparse)


def memory(bench: Bench, width: int, depth: int, rows: int) -> None:
    model = nn.Sequential(
        *(part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())), nn.Linear(width, 10)
    )
    inputs, targets = torch.randn(rows, width), torch.zeros(rows, dtype=torch.int64)
    every = list(model.parameters())
    held = sum(4 * parameter.numel() for parameter in every if parameter.ndim == 2)  # seen through their transposes

    def peak(parameters: list[nn.Parameter]) -> int:
        with PeakMemory() as seen:
            torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)
        return seen.peak - held

    weights = [parameter for parameter in every if parameter.ndim == 2]
    whole, largest = peak(every), max(peak([weight]) for weight in weights)
    print(
        f"\nmemory for gradients, {depth} layers of {width}, batch {rows}: all {whole:,} bytes, largest block {largest:,}"
    )
    bench.require(f"one block needs at most {BLOCK:g} of it", largest <= BLOCK * whole)


def main() -> int:
    _, bench = parse(__doc__, 9)
    layer(bench, (512, 512, 3, 3))
    layer(bench, (96, 784))
    memory(bench, 512, 6, 64)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
