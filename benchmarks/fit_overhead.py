"""What ``equipoise.fit`` costs beside a loop written by hand: same task, same process, interleaved, same weights bit for bit.

    python benchmarks/fit_overhead.py [--repeats 25] [--threads 1] [--clock cpu]

Each problem is trained in turn by ``fit`` without a method and by the plain PyTorch loop below: no checks, no history, batches
cut from tensors in memory (no ``DataLoader``, which would be slower). Their order alternates. The printed ratios are fit / loop,
of the fastest and of the median training. Other work on the machine moves the one or the other by a few hundredths, a real
cost moves both: exits with 1 if both are above the target, or if a weight differs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler

import equipoise

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Problem:
    """One comparison: data in memory, a model, and how long it trains."""

    name: str
    inputs: Tensor
    labels: Tensor
    make: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    target: float
    accumulation: int = 1

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def schedule(chosen: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(chosen, T_max=total_steps)


def by_fit(problem: Problem) -> nn.Module:
    return equipoise.fit(
        problem.model(),
        (problem.inputs, problem.labels),
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        optimizer=optimizer,
        scheduler=schedule,
        accumulation=problem.accumulation,
    ).model


def by_hand(problem: Problem) -> nn.Module:
    model, inputs, labels = problem.model(), problem.inputs, problem.labels
    chosen = optimizer(model.parameters())
    rate = schedule(chosen, problem.epochs * math.ceil(len(labels) / problem.batch_size))
    sampler = RandomSampler(range(len(labels)), generator=torch.Generator().manual_seed(0))
    model.train()
    for _ in range(problem.epochs):
        for rows in torch.tensor(list(sampler)).split(problem.batch_size):
            chosen.zero_grad()
            if problem.accumulation == 1:
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            else:
                x, y = inputs[rows], labels[rows]
                cuts = [number * len(y) // problem.accumulation for number in range(problem.accumulation + 1)]
                for start, end in pairwise(cuts):
                    loss = F.cross_entropy(model(x[start:end]), y[start:end])
                    (loss * ((end - start) / len(y))).backward()
            chosen.step()
            rate.step()
    return model


def compare(problem: Problem, repeats: int, clock: Callable[[], float]) -> tuple[list[float], list[float], bool]:
    """Seconds of each training by fit and by hand, after one of each to warm up; and whether the weights are equal."""
    seconds: dict[Callable[[Problem], nn.Module], list[float]] = {by_fit: [], by_hand: []}
    models = [train(problem) for train in (by_fit, by_hand)]
    equal = all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    for repeat in range(repeats):
        for train in (by_fit, by_hand) if repeat % 2 else (by_hand, by_fit):
            start = clock()
            train(problem)
            seconds[train].append(clock() - start)
    return seconds[by_fit], seconds[by_hand], equal


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def mlp(width: int, hidden: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def problems() -> Iterator[Problem]:
    from equipoise.data import load
    from equipoise.errors import EquipoiseError

    try:
        fashion = load("fashion-mnist")
    except EquipoiseError as error:
        print(f"CNN on Fashion-MNIST skipped: {error}")
    else:
        images, labels = torch.as_tensor(fashion.inputs)[:1536], torch.as_tensor(fashion.targets)[:1536]
        yield Problem("CNN on Fashion-MNIST, 1,536 images", images.view(-1, 1, 28, 28), labels, cnn, 1, 64, 1.03)
    digits = load("digits")
    pixels, labels = torch.as_tensor(digits.inputs).flatten(1), torch.as_tensor(digits.targets)
    yield Problem("MLP on digits, batch 128", pixels, labels, mlp(64, 128), 10, 128, 1.10)
    yield Problem("the same in 4 micro-batches", pixels, labels, mlp(64, 128), 5, 128, 1.15, accumulation=4)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 64, generator=generator)
    labels = torch.randint(10, (20_000,), generator=generator)
    yield Problem("MLP, 20,000 examples, batch 128", inputs, labels, mlp(64, 128), 1, 128, 1.10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="trainings of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy machine"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{'problem':36} {'loop':>9} {'fit':>9} {'fastest':>8} {'median':>8} {'target':>7}  weights")
    failed = False
    for problem in problems():
        fit, loop, equal = compare(problem, chosen.repeats, CLOCKS[chosen.clock])
        ratio, median = min(fit) / min(loop), statistics.median(fit) / statistics.median(loop)
        good = equal and min(ratio, median) <= problem.target
        failed |= not good
        times = f"{1e3 * min(loop):6.1f} ms {1e3 * min(fit):6.1f} ms"
        weights = "equal" if equal else "DIFFER"
        print(
            f"{problem.name:36} {times} {ratio:8.3f} {median:8.3f} {problem.target:7.2f}  {weights}{'' if good else '  FAILED'}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
