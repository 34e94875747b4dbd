"""What ARL costs: a training step beside one of joint training, the heads' unimodal logits, the batch's coefficients.

    python benchmarks/arl.py [--repeats 25] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it. No package implements ARL, so that the peers are
joint training and what the published scripts do, written out. Targets, exit code 1 if one is missed:

- A training step with ARL takes at most 1.10 of one of joint training for small convolutional encoders (two halves 1x28x14 of
  an image, batch 64). For the digits' MLP, whose step is the time to start its operations, it has no target.
- `ConcatFusion` gives fused and unimodal logits, forward and backward, in at most 0.75 of the time of three calls of the linear
  layer with zero-filled copies (2 x 512 features, 100 classes; never slower for 2 x 64 and 10), and the same logits.
- `arl_coefficients` is not slower than a loop over modalities and classes that reads every number out, `modality_scores` of
  OGM-GE at least 10 times as fast as a loop over examples. Both give the same numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.multimodal import (
    ARL,
    OGMGE,
    Aux,
    ConcatFusion,
    arl_coefficients,
    make_net,
    modality_scores,
)
from equipoise.training import Method

STEP, COEFFICIENTS, SCORES = 1.10, 1.0, 0.1
HEAD = {10: 1.0, 100: 0.75}  # by number of classes


# -- whole training steps ---------------------------------------------------------------------------------------------
def steps(bench: Bench, title: str, shape: tuple[int, ...], net: Callable[[], nn.Module], target: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(64, *shape, generator=generator) for name in ("left", "right")}
    data = equipoise.Examples(inputs, torch.randint(10, (64,), generator=generator), num_classes=10)

    def step(*methods: Method) -> Callable[[], None]:
        optimizer = lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4)  # noqa: E731
        run = equipoise.start(net(), optimizer, methods=methods, data=data)
        batch = data.take(torch.arange(64))

        def work() -> None:
            run.backward(run.training_loss(batch))
            run.step()

        return work

    works = {
        "joint training": step(),
        "aux": step(Aux()),
        "arl": step(ARL(start_epoch=-1)),
        "ogm-ge": step(OGMGE()),
    }
    bench.table(title, works, {} if target is None else {"arl": target})


# -- the concatenation head -------------------------------------------------------------------------------------------
def heads(bench: Bench, rows: int, width: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(rows, width, generator=generator).requires_grad_() for _ in range(2)]
    head = ConcatFusion([width, width], classes)

    def naive() -> tuple[Tensor, list[Tensor]]:
        x, y = features
        fused = head.fc(torch.cat([x, y], 1))
        return fused, [
            head.fc(torch.cat([x, torch.zeros_like(y)], 1)),
            head.fc(torch.cat([torch.zeros_like(x), y], 1)),
        ]

    def joint() -> tuple[Tensor, list[Tensor]]:
        return head.fc(torch.cat(features, 1)), []

    def both(forward: Callable[[], tuple[Tensor, list[Tensor]]]) -> Callable[[], None]:
        def work() -> None:
            fused, unimodal = forward()
            (fused.sum() + sum(u.sum() for u in unimodal)).backward()

        return work

    works = {
        "three calls of the linear layer, zero-filled": both(naive),
        "ConcatFusion": both(lambda: head(features)),
        "the fused logits alone": both(joint),
    }
    bench.table(
        f"concat head, {rows} rows, 2 x {width} features, C = {classes}", works, {"ConcatFusion": HEAD[classes]}
    )
    ours, theirs = head(features), naive()
    pairs = zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True)
    bench.require("the same logits, to 1e-5", all(torch.allclose(a, b, atol=1e-5) for a, b in pairs))


# -- statistics of a batch --------------------------------------------------------------------------------------------
@torch.no_grad()
def loop_over_modalities(logits: list[Tensor], temperature: float = 8.0, floor: float = 0.3) -> list[float]:
    """ARL's weights of two modalities, every number read out."""
    entropy, dependence = [], []
    for u in logits:
        p = F.softmax(u, 1)
        entropy.append(-(p * torch.log(p + 1e-16)).sum(1).mean().item())
        dependence.append(sum(u[:, c].abs().mean().item() for c in range(u.shape[1])))
    share = [max(h / sum(entropy), floor) for h in entropy]
    target = [(1 / h) / sum(1 / k for k in share) for h in share]
    current = [c / sum(dependence) for c in dependence]
    powers = [math.exp(temperature * target[m] * current[1 - m]) for m in range(2)]
    return [p / sum(powers) for p in powers]


@torch.no_grad()
def loop_over_examples(logits: list[Tensor], labels: Tensor) -> list[float]:
    """OGM-GE's scores, one example at a time."""
    return [float(sum(F.softmax(u, 1)[i][labels[i]] for i in range(len(u)))) for u in logits]


def statistics_of_a_batch(bench: Bench, rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=generator) for _ in range(2)]
    labels = torch.randint(classes, (rows,), generator=generator)
    fused = logits[0] + logits[1]
    title = f"{rows} rows, C = {classes}"
    bench.table(
        f"coefficients of ARL, {title}",
        {
            "loop over modalities and classes": lambda: loop_over_modalities(logits),
            "arl_coefficients": lambda: arl_coefficients(logits),
        },
        {"arl_coefficients": COEFFICIENTS},
    )
    ours, theirs = arl_coefficients(logits).weights, torch.tensor(loop_over_modalities(logits))
    bench.require("the same weights, to 1e-5", torch.allclose(ours, theirs, atol=1e-5))
    bench.table(
        f"scores of OGM-GE, {title}",
        {
            "loop over examples": lambda: loop_over_examples(logits, labels),
            "modality_scores": lambda: modality_scores(fused, logits, labels),
        },
        {"modality_scores": SCORES},
    )
    scores = torch.tensor(loop_over_examples(logits, labels))
    bench.require("the same scores, to 1e-3", torch.allclose(modality_scores(fused, logits, labels), scores, atol=1e-3))


def main() -> int:
    _, bench = parse(__doc__, 25)
    half, digits = (1, 28, 14), (1, 8, 4)
    shapes = {"left": half, "right": half}
    steps(bench, "a step: CNN encoders, batch 64", half, lambda: make_net(shapes, 10, encoder="cnn", features=64), STEP)
    shapes = {"left": digits, "right": digits}
    steps(bench, "a step: MLP encoders 32-128-32, batch 64", digits, lambda: make_net(shapes, 10), None)
    heads(bench, 64, 64, 10)
    heads(bench, 64, 512, 100)
    statistics_of_a_batch(bench, 64, 10)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
