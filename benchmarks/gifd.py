"""What a step of GIFD's search costs: the tail of the generator alone, beside one that runs the whole generator every step.

    python benchmarks/gifd.py [--repeats 15] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. Targets, exit code 1 if one is missed:

- 20 steps at the last stage of a generator of four convolutional stages (32x32, batch 4) and an audited network of convolutions
  take at most 0.95 of the time of a search that runs the frozen head stages in every step too, and reads each step's loss out.
  For the digits' perceptrons, whose step is the time to start its operations, never longer. Both find the same images.
- The l1 projection of 64 x 512 features takes at most 0.5 of the time of a loop over examples with the same sort.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.federated.gifd import batch_gradients, gifd, project_l1_ball, ramp_lr, total_variation

TAIL = {"perceptrons": 1.0, "convolutions": 0.95}
PROJECTION = 0.5


def perceptrons() -> tuple[nn.Module, list[nn.Module], Tensor]:
    """Those of the audit of digits."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    stages: list[nn.Module] = [
        nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))),
    ]
    return model, stages, torch.randn(4, 8)


def convolutions() -> tuple[nn.Module, list[nn.Module], Tensor]:
    """A generator that doubles the side in each stage, 4 to 32, and a small network."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.Sigmoid(), nn.Conv2d(16, 16, 3, stride=2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )  # fmt: skip
    up = lambda a, b: nn.Sequential(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(0.2))  # noqa: E731
    stages: list[nn.Module] = [
        nn.Sequential(nn.Linear(32, 128 * 16), nn.LeakyReLU(0.2), nn.Unflatten(1, (128, 4, 4))),
        up(128, 64),
        up(64, 32),
        nn.Sequential(nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1), nn.Sigmoid()),
    ]
    return model, stages, torch.randn(4, 32)


def whole_generator(
    model: nn.Module, target: list[Tensor], labels: Tensor, stages: list[nn.Module], z: Tensor, steps: int
) -> Tensor:
    """The search at the last stage as an offset to its features, with the head run in every step."""
    parameters = list(model.parameters())
    head, tail = nn.Sequential(*stages[:-1]).requires_grad_(False), stages[-1].requires_grad_(False)
    offset = torch.zeros_like(head(z)).requires_grad_()
    adam = torch.optim.Adam([offset], lr=0.1)
    losses = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = ramp_lr(step / steps, 0.1)
        x = tail(head(z) + offset)
        grads = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters, create_graph=True)
        dot = sum((g * t).sum() for g, t in zip(grads, target, strict=True))
        norms = [torch.stack([g.square().sum() for g in part]).sum().sqrt() for part in (grads, target)]
        loss = 1 - dot / (norms[0] * norms[1])
        loss = loss + 1e-4 * total_variation(x) + 1e-6 * x.norm() / x[0, 0].numel()
        (offset.grad,) = torch.autograd.grad(loss, [offset])
        losses.append(loss.item())
        adam.step()
    return tail(head(z) + offset).detach().clamp(0, 1)


def last_stage(
    model: nn.Module, target: list[Tensor], labels: Tensor, tail: nn.Module, features: Tensor, steps: int
) -> Tensor:
    """What ``gifd`` does at a stage after the first."""
    first = nn.Identity()  # one step at the rate 0: keeps the features, and makes the tail the second stage
    return gifd(model, target, labels, [first, tail], features, steps=[1, steps]).stage_images[1]


def searches(
    bench: Bench, name: str, make: Callable[[], tuple[nn.Module, list[nn.Module], Tensor]], steps: int
) -> None:
    torch.manual_seed(0)
    model, stages, z = make()
    labels = torch.tensor([1, 4, 7, 2])
    with torch.no_grad():
        truth, features = nn.Sequential(*stages)(z), nn.Sequential(*stages[:-1])(z + 0.5)
    target = batch_gradients(model, truth, labels)
    naive = lambda: whole_generator(model, target, labels, stages, z + 0.5, steps)  # noqa: E731
    # GIFD at its last stage: the same features to start from, and no ball.
    ours = lambda: last_stage(model, target, labels, stages[-1], features, steps)  # noqa: E731
    bench.table(
        f"{steps} steps at the last stage, {name}", {"whole generator, loss read out": naive, "gifd": ours}, TAIL[name]
    )
    # A few steps in float64: Adam turns rounding noise into steps.
    for part in (model, *stages):
        part.double()
    target, z, features, steps = [t.double() for t in target], z.double(), features.double(), 5
    bench.require("the same images after 5 steps, to 1e-6", torch.allclose(naive(), ours(), atol=1e-6))


def projections(bench: Bench) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def loop() -> Tensor:
        found = torch.empty_like(x)
        for i, row in enumerate(x):
            size = row.abs()
            ordered = size.sort(descending=True).values
            mean = (ordered.cumsum(0) - 100) / torch.arange(1, len(row) + 1)
            kept = int((ordered > mean).nonzero()[-1])
            found[i] = row.sign() * (size - mean[kept].clamp_min(0)).clamp_min(0)
        return found

    ours = lambda: project_l1_ball(x, 100.0)  # noqa: E731
    bench.table("l1 ball, 64 x 512 features", {"loop over examples": loop, "project_l1_ball": ours}, PROJECTION)
    bench.require("the same projection, to 1e-4", torch.allclose(loop(), ours(), atol=1e-4))


def main() -> int:
    _, bench = parse(__doc__, 15)
    searches(bench, "perceptrons", perceptrons, 20)
    searches(bench, "convolutions", convolutions, 20)
    projections(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
