"""What to hold multimodal methods against: joint training, the best single modality, and unimodal losses without modulation.

A new method must beat these, tuned as carefully as itself. For fused logits `s` and unimodal logits `u_m` of modalities `m`,

    joint         CE(s, y)
    unimodal      sum_m CE(u_m, y), then the one modality that is best on validation data
    aux           CE(s, y) + gamma sum_m CE(u_m, y)
    aux-scaled    the same, and every encoder's gradient times a constant factor

`aux` and `aux-scaled` are ARL without its factors, in every other respect ARL's own code: what ARL gains over them is owed to
the asymmetric factors, what they gain over `joint` to the unimodal losses.

## When to use
Always. `joint` is the baseline; `unimodal` tells whether the other modalities are worth having; `aux` is the cheapest remedy for
under-trained encoders.

## When not
`unimodal` needs validation data to choose by.

## Cost
That of joint training and of the unimodal logits.

## In a distributed run
2 processes equal 1.

## Source
Folklore. With factor 1.5 `aux-scaled` is what the published script of ARL trains: Wei, Luo, Luo: Improving Multimodal Learning via
Imbalanced Learning. ICCV 2025, arXiv:2507.10203.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import check_range, refuse
from equipoise.multimodal.arl import ARL, encoders_of, unimodal_of
from equipoise.multimodal.model import AllLogits, OneModality
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import precise
from equipoise.training.method import Method
from equipoise.training.run import Run
from equipoise.training.space import Space, Uniform


class Joint(Method):
    """Cross-entropy of the fused prediction and nothing else: the baseline.

    Has no hooks and no settings; the loss is the task's.
    """

    name = "joint"
    neutral: ClassVar[Mapping[str, Any] | None] = {}


class Unimodal(Method):
    """Train every modality by itself, and predict with the one that is best on validation data.

    Has no settings, and none that equals joint training: the fused logits are not trained. The modality is chosen after each epoch
    by accuracy; prediction (``run.inference_model``) uses its unimodal logits. Needs a model with ``encoders`` and ``unimodal``
    logits (``MultimodalNet``), classification and validation data. With a concatenation head the modalities share the bias.
    """

    name = "unimodal"

    def prepare(self, run: Run) -> None:
        if run.validation is None:
            refuse("validation", None, "be given, to choose the modality by", "Give validation=(inputs, targets)")
        self._count = len(encoders_of(run.model))
        self._chosen = OneModality(run.model)
        run.inference_model = self._chosen

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        _, unimodal = unimodal_of(output, self._count)
        return torch.stack([F.cross_entropy(precise(u), batch.targets) for u in unimodal]).sum()

    def epoch_end(self, run: Run) -> None:
        logits, targets = run.predict(run.validation, AllLogits(run.model))
        right = logits[:, 1:].argmax(2) == targets[:, None]
        self._chosen.modality = int(right.float().mean(0).argmax())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "modality": self._chosen.modality}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._chosen.modality = state["modality"]


class Aux(ARL):
    """Joint training with a loss on each modality's own prediction: ARL without its gradient factors.

    gamma, start_epoch, clip: as for ``ARL``.
    """

    name = "aux"
    paper = None
    space: ClassVar[Space] = {"gamma": Uniform(0.5, 5.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0, "clip": math.inf}

    def __init__(self, gamma: float = 4.0, start_epoch: int = 5, clip: float = 40.0) -> None:
        super().__init__(gamma=gamma, start_epoch=start_epoch, clip=clip)

    def modulate(self, unimodal: Sequence[Tensor], started: bool) -> None:
        """The encoders' weights stay zero."""


class AuxScaled(ARL):
    """``aux`` with every encoder's gradient multiplied by the same constant: ARL with equal factors.

    gamma, start_epoch, clip: as for ``ARL``. factor: > 0, in force when ARL's factors are.
    """

    name = "aux-scaled"
    paper = None
    space: ClassVar[Space] = {"gamma": Uniform(0.5, 5.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0, "factor": 1.0, "clip": math.inf}

    def __init__(self, gamma: float = 4.0, factor: float = 1.5, start_epoch: int = 5, clip: float = 40.0) -> None:
        super().__init__(gamma=gamma, start_epoch=start_epoch, clip=clip)
        check_range("factor", factor, 0, open_low=True)
        self.factor = factor

    def modulate(self, unimodal: Sequence[Tensor], started: bool) -> None:
        """Every encoder has the weight ``factor - 1``."""
        if started:
            self.modulation.weights.data.fill_(self.factor - 1)
