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

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
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

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHORTEST = 3e-3  # seconds of one measurement: what is faster is repeated inside it
STEP, COEFFICIENTS, SCORES = 1.10, 1.0, 0.1
HEAD = {10: 1.0, 100: 0.75}  # by number of classes


class Bench:
    """Measures, prints and remembers whether a target was missed."""

    def __init__(self, repeats: int, clock: Callable[[], float]) -> None:
        self.repeats, self.clock, self.missed = repeats, clock, False

    def compare(self, title: str, works: Mapping[str, Callable[[], object]], at_most: Mapping[str, float]) -> None:
        """Time the works in turn, and print each over the first of them."""
        calls = {}
        for name, work in works.items():
            work()
            start = self.clock()
            work()
            calls[name] = max(1, round(SHORTEST / max(self.clock() - start, 1e-9)))
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(self.repeats):
            for name in works if repeat % 2 else reversed(works):
                start = self.clock()
                for _ in range(calls[name]):
                    works[name]()
                seconds[name].append((self.clock() - start) / calls[name])
        print(f"\n{title:52} {'fastest':>11} {'ratio':>7} {'median':>7} {'target':>8}")
        base = seconds[next(iter(works))]
        for name, measured in seconds.items():
            ratios = min(measured) / min(base), statistics.median(measured) / statistics.median(base)
            target = at_most.get(name, math.inf)
            shown = f"<= {target:.2f}" if name in at_most else ""
            missed = min(ratios) > target
            print(
                f"{name:52} {1e6 * min(measured):8.1f} us {ratios[0]:7.2f} {ratios[1]:7.2f} {shown:>8}{'  MISSED' * missed}"
            )
            self.missed |= missed

    def require(self, text: str, good: bool) -> None:
        """Print a fact that must hold."""
        print(f"{text}: {'yes' if good else 'NO, MISSED'}")
        self.missed |= not good


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
    bench.compare(title, works, {} if target is None else {"arl": target})


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
    bench.compare(
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
    bench.compare(
        f"coefficients of ARL, {title}",
        {
            "loop over modalities and classes": lambda: loop_over_modalities(logits),
            "arl_coefficients": lambda: arl_coefficients(logits),
        },
        {"arl_coefficients": COEFFICIENTS},
    )
    ours, theirs = arl_coefficients(logits).weights, torch.tensor(loop_over_modalities(logits))
    bench.require("the same weights, to 1e-5", torch.allclose(ours, theirs, atol=1e-5))
    bench.compare(
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="measurements of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy machine"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.repeats, CLOCKS[chosen.clock])
    half, digits = (1, 28, 14), (1, 8, 4)
    shapes = {"left": half, "right": half}
    steps(bench, "a step: CNN encoders, batch 64", half, lambda: make_net(shapes, 10, encoder="cnn", features=64), STEP)
    shapes = {"left": digits, "right": digits}
    steps(bench, "a step: MLP encoders 32-128-32, batch 64", digits, lambda: make_net(shapes, 10), None)
    heads(bench, 64, 64, 10)
    heads(bench, 64, 512, 100)
    statistics_of_a_batch(bench, 64, 10)
    print("\nA target is MISSED." if bench.missed else "\nAll targets met.")
    return int(bench.missed)


if __name__ == "__main__":
    sys.exit(main())
