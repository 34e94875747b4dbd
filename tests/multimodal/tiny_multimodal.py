"""The kit's tiny problem for methods of several modalities: two inputs by name, an encoder each, fused and unimodal logits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from equipoise.testing import TinyProblem
from equipoise.training import Examples, Output


class TinyModalities(nn.Module):
    """Inputs ``left`` (N, 4) and ``right`` (N, 3), an encoder for each in ``encoders``, and a linear head on both features.

    Returns an ``Output`` with fused and unimodal logits (N, outputs). ``norm=True`` puts a BatchNorm into each encoder. The initial
    weights depend on ``seed`` alone; torch's global generator is left as it was.
    """

    def __init__(self, hidden: int = 5, outputs: int = 3, *, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders = nn.ModuleDict(
                {
                    name: nn.Sequential(
                        nn.Linear(width, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()
                    )
                    for name, width in (("left", 4), ("right", 3))
                }
            )
            self.head = nn.Linear(2 * hidden, outputs)

    def forward(self, *, left: Tensor, right: Tensor) -> Output:
        features = [self.encoders["left"](left), self.encoders["right"](right)]
        weights = self.head.weight.chunk(2, dim=1)
        unimodal = [nn.functional.linear(x, w, self.head.bias) for x, w in zip(features, weights, strict=True)]
        fused = self.head(torch.cat(features, 1))
        return Output(fused, fused=fused, unimodal=unimodal)


def multimodal(count: int = 37, *, classes: int = 3, seed: int = 0) -> TinyProblem:
    """Noisy clusters seen through ``left`` (count, 4), clearly, and ``right`` (count, 3), dimly; every fifth label is wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = {
        "left": torch.randn(classes, 4, generator=generator),
        "right": torch.randn(classes, 3, generator=generator),
    }

    def draw(number: int) -> Examples:
        labels = torch.arange(number) % classes
        inputs = {
            name: strength * centre[labels] + torch.randn(number, centre.shape[1], generator=generator)
            for (name, centre), strength in zip(centres.items(), (2.0, 0.7), strict=True)
        }
        labels = torch.where(torch.arange(number) % 5 == 4, (labels + 1) % classes, labels)
        return Examples(inputs, labels, num_classes=classes)

    make = partial(TinyModalities, outputs=classes)
    return TinyProblem(draw(count), draw(11), make, partial(make, norm=True))
