"""ARL: asymmetric representation learning, for models with several modalities.

A model that is trained jointly on several modalities learns from the strongest and leaves the other encoders under-trained.
Most remedies balance the encoders' gradients. ARL argues that the model should lean on each modality in inverse proportion to
the variance of its prediction, re-weights each encoder's gradient to move there, and trains every modality to predict by
itself through the same fusion head.

For modalities `m = 1 .. M` with features `x_m`, fused logits `s` and unimodal logits `u_m` of the same head,

    loss        =  CE(s, y) + gamma sum_m CE(u_m, y)
    H_m, C_m    =  batch mean of the entropy of softmax(u_m), batch mean of sum(|u_m|)          variance and dependence
    h_m         =  max(H_m / sum_k H_k, floor),    a_m = (1 / h_m) / sum_k (1 / h_k)            target share
    c_m         =  C_m / sum_k C_k                                                              current share
    w           =  softmax(T q),    q_m = a_m M^(M-2) prod_{k != m} c_k                         constant, no gradient

and the gradient that reaches encoder m is multiplied by `1 + w_m`; the head's own gradient is not. The scores `q` are equal if
and only if the dependence `c` is already proportional to the target `a`. Up to epoch `start_epoch` there is no factor, and
gamma is 1. The target comes from theory: of unbiased independent predictions with variances `v_m`, the weighted mean with
weights proportional to `1 / v_m` has the least variance, `1 / sum(1 / v_m)`. Prediction uses `s` alone.

## When to use
Classification with two or more encoders and a late fusion, where one modality dominates and the others matter: because each
should work when the strong one is missing or bad, or because the fused model falls short of what its encoders could give. Hold
it against `aux`, which has the unimodal losses only: most of the gain is theirs.

## When not
Where only the fused prediction counts and one modality is nearly sufficient: the unimodal losses then take capacity from it.
Early fusion, where modalities meet inside one encoder. Regression: the variance is estimated by an entropy. With a learning
rate tuned for joint training: the effective step grows by up to `(1 + M gamma)(1 + w)`; tune it again, downwards.

## Cost
The unimodal logits, M products of B x D x C, which the concatenation head has already. Beside them O(B C) work on logits, no
parameter, no extra pass. Inference is unchanged.

## In a distributed run
Entropies and dependences are averaged over the processes, so that all scale by the same factors: 2 processes equal 1. Under
gradient accumulation the factors are those of each micro-batch.

## Source
Wei, Luo, Luo: Improving Multimodal Learning via Imbalanced Learning. ICCV 2025, arXiv:2507.10203. The score for more than two
modalities, and that a batch is scaled by its own factors, are this library's reading; the authors' script computes factors but
trains with a constant one (`aux-scaled`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range, refuse
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows, world_size
from equipoise.training.losses import check_labels, check_logits, check_rows, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform


# -- the functional core ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ARLCoefficients:
    """What ``arl_coefficients`` finds, each (M,) without gradient.

    weights: of the modalities, summing to 1; encoder m's gradient is multiplied by ``1 + weights[m]``.
    entropy: mean entropy of each modality's prediction, in nats. dependence: mean L1 norm of each modality's logits.
    """

    weights: Tensor
    entropy: Tensor
    dependence: Tensor


@torch.no_grad()
def arl_coefficients(logits: Sequence[Tensor], *, temperature: float = 8.0, floor: float = 0.3) -> ARLCoefficients:
    """The modalities' weights for a batch.

    logits: M >= 2 tensors (B, C), one for each modality. temperature: >= 0; at 0 the weights are equal. floor: least share of
    the entropy that a modality is taken to have, in [0, 1). Half precision is computed in float32.
    """
    check_range("temperature", temperature, 0)
    check_range("floor", floor, 0, 1, open_high=True)
    entropy, dependence = _statistics(logits)
    return ARLCoefficients(_weights(entropy, dependence, temperature, floor), entropy, dependence)


def _statistics(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean entropy (M,) and mean L1 norm (M,) of the modalities' logits."""
    check_modalities(logits)
    stacked = torch.stack([precise(u) for u in logits])
    rows = stacked.shape[1]
    return torch.special.entr(stacked.softmax(2)).sum((1, 2)) / rows, stacked.abs().sum((1, 2)) / rows


def _weights(entropy: Tensor, dependence: Tensor, temperature: float, floor: float) -> Tensor:
    modalities = len(entropy)
    inverse = 1 / _shares(entropy).clamp(min=max(floor, 1e-12))
    target = inverse / inverse.sum()
    others = _shares(dependence).expand(modalities, -1).clone().fill_diagonal_(1).prod(1)
    return (temperature * modalities ** (modalities - 2) * target * others).softmax(0)


def _shares(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)


def _over_processes(rows: int, entropy: Tensor, dependence: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of the global batch, of which this process has ``rows``."""
    if world_size() == 1:
        return entropy, dependence
    count = entropy.new_tensor([rows])
    sums = gather_rows(torch.cat([rows * entropy, rows * dependence, count])[None]).sum(0)
    means = sums[:-1] / sums[-1]
    return means[: len(entropy)], means[len(entropy) :]


def check_modalities(logits: Sequence[Tensor], like: Tensor | None = None) -> None:
    """Refuse fewer than 2 modalities, and logits that are not (B, C), the same for all (and for ``like``)."""
    if isinstance(logits, Tensor) or len(logits) < 2:
        raise ArgumentError(f"logits of {len(logits)} modalities: must be a list of at least 2 tensors (B, C)")
    first = logits[0] if like is None else like
    check_logits(first)
    if not len(first):
        raise ArgumentError("logits have no rows: a batch must hold at least one example")
    for number, u in enumerate(logits):
        if u.shape != first.shape:
            raise ArgumentError(
                f"logits[{number}] has the shape {tuple(u.shape)}: must be {tuple(first.shape)}, the same for every modality"
            )


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | float) -> Tensor:
        # Not save_for_backward: the weight may be written between the two passes, and its value then is what counts.
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight.reshape(()) if isinstance(ctx.weight, Tensor) else ctx.weight
        return gradient * (1 + weight), None


def scale_gradient(x: Tensor, weight: Tensor | float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``1 + weight`` on the way back. No gradient flows to the weight.

    weight: a number, or a tensor of one element. The tensor is read in the backward pass: it may be written until then.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            refuse("weight", tuple(weight.shape), "be a number or a tensor of one element")
        weight = weight.detach() if weight.requires_grad else weight
    return _ScaleGradient.apply(x, weight)


def arl_loss(fused: Tensor, unimodal: Sequence[Tensor], targets: Tensor, gamma: float = 1.0) -> Tensor:
    """``CE(s, y) + gamma sum_m CE(u_m, y)``, the mean over the batch.

    fused: (B, C) logits. unimodal: M >= 2 tensors (B, C). targets: (B,) integer classes, or (B, C) soft labels. gamma: >= 0;
    at 0 it is plain cross-entropy. Half precision is computed in float32.
    """
    check_range("gamma", gamma, 0)
    check_modalities(unimodal, fused)
    if targets.ndim == 2:
        check_rows("targets", targets, fused)
    else:
        check_labels(targets, len(fused), fused.shape[1], "ARL needs classification")
    loss = F.cross_entropy(precise(fused), targets)
    if gamma == 0:
        return loss
    return loss + gamma * sum(F.cross_entropy(precise(u), targets) for u in unimodal)


def concat_unimodal_logits(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """``u_m = W_m x_m + b``: what an ``nn.Linear`` on concatenated features says of each modality, the others being zero.

    features: M >= 2 tensors (B, D_m), in the order of concatenation. weight: (C, sum of D_m). bias: (C,); it is in every u_m.
    """
    _check_features(features, weight.shape[1])
    columns = weight.split([x.shape[1] for x in features], dim=1)
    return [F.linear(x, w, bias) for x, w in zip(features, columns, strict=True)]


def _check_features(features: Sequence[Tensor], expected: int | Sequence[int]) -> None:
    """Refuse features that are not (B, D_m), with the widths expected (or the sum of them)."""
    if isinstance(features, Tensor) or len(features) < 2:
        raise ArgumentError(f"features of {len(features)} modalities: must be a list of at least 2 tensors (B, D)")
    shapes = [tuple(x.shape) for x in features]
    widths = [shape[-1] for shape in shapes if len(shape) == 2]
    fits = sum(widths) == expected if isinstance(expected, int) else widths == list(expected)
    if len(widths) < len(features) or len({len(x) for x in features}) > 1 or not fits:
        wanted = f"whose D add up to {expected}" if isinstance(expected, int) else f"with D = {list(expected)}"
        raise ArgumentError(f"features have the shapes {shapes}: must be (B, D), the same B for all, {wanted}")


# -- the fusion heads -------------------------------------------------------------------------------------------------
class ConcatFusion(nn.Module):
    """A linear layer ``fc`` on the concatenated features: ``s = sum_m W_m x_m + b``, ``u_m = W_m x_m + b``.

    in_features: widths D_1 .. D_M, M >= 2. ``forward(features)`` gives the fused logits (B, C) and the M unimodal ones; the
    partial products make up both.
    """

    def __init__(self, in_features: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.in_features = _check_widths(in_features, num_classes)
        self.fc = nn.Linear(sum(in_features), num_classes)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        _check_features(features, self.in_features)
        parts = concat_unimodal_logits(features, self.fc.weight)
        return sum(parts[1:], start=parts[0]) + self.fc.bias, [part + self.fc.bias for part in parts]


class SumFusion(nn.Module):
    """A linear layer for each modality, ``fcs``: ``u_m = W_m x_m + b_m``, ``s = sum_m u_m``.

    in_features: widths D_1 .. D_M, M >= 2. ``forward(features)`` gives the fused logits (B, C) and the M unimodal ones.
    """

    def __init__(self, in_features: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.in_features = _check_widths(in_features, num_classes)
        self.fcs = nn.ModuleList(nn.Linear(width, num_classes) for width in in_features)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        _check_features(features, self.in_features)
        unimodal = [fc(x) for fc, x in zip(self.fcs, features, strict=True)]
        return sum(unimodal[1:], start=unimodal[0]), unimodal


class GatedFusion(nn.Module):
    """The first modality gates the second: ``h_m = F_m(x_m)``, ``s = O(sigmoid(h_1) h_2)``, ``u_m = O(sigmoid(h_m) h_m)``.

    in_features: two widths. dim: width of the linear layers ``fc_x`` (F_1) and ``fc_y`` (F_2); ``fc_out`` is O.
    ``forward(features)`` gives the fused logits (B, C) and the two unimodal ones, by one product of 3 B rows.
    """

    def __init__(self, in_features: Sequence[int], num_classes: int, dim: int = 512) -> None:
        super().__init__()
        self.in_features = _check_widths(in_features, num_classes)
        if len(self.in_features) != 2:
            refuse("in_features", list(in_features), "hold exactly 2 widths", "Use ConcatFusion or SumFusion")
        check_integer("dim", dim, 1)
        self.fc_x, self.fc_y = (nn.Linear(width, dim) for width in in_features)
        self.fc_out = nn.Linear(dim, num_classes)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        _check_features(features, self.in_features)
        h_x, h_y = self.fc_x(features[0]), self.fc_y(features[1])
        gate = h_x.sigmoid()
        fused, *unimodal = self.fc_out(torch.cat([gate * h_y, gate * h_x, h_y.sigmoid() * h_y])).chunk(3)
        return fused, unimodal


def _check_widths(in_features: Sequence[int], num_classes: int) -> tuple[int, ...]:
    if len(in_features) < 2:
        refuse("in_features", list(in_features), "hold the widths of at least 2 modalities")
    for width in in_features:
        check_integer("in_features", width, 1)
    check_integer("num_classes", num_classes, 2)
    return tuple(in_features)


# -- the method -------------------------------------------------------------------------------------------------------
def encoders_of(model: nn.Module) -> dict[str, nn.Module]:
    """The encoders of a model by name, in the order of its unimodal logits: its ``nn.ModuleDict`` (or list) ``encoders``."""
    found = getattr(model, "encoders", None)
    if not isinstance(found, nn.ModuleDict | nn.ModuleList) or len(found) < 2:
        raise ArgumentError(
            f"model = {type(model).__name__}: must hold the encoders of at least 2 modalities, in the order of its unimodal "
            "logits: self.encoders = nn.ModuleDict({'audio': ..., 'image': ...})"
        )
    named = dict(found.named_children())  # names a module once
    if len(named) < len(found):
        raise ArgumentError(f"model.encoders = {list(named)}: two are the same module; each modality needs its own")
    return named


def unimodal_of(output: Output, count: int) -> tuple[Tensor, list[Tensor]]:
    """Fused and unimodal logits of a model's output, or one clear error. count: number of modalities."""
    unimodal = output.unimodal
    if unimodal is None or len(unimodal) != count:
        given = "None" if unimodal is None else f"logits of {len(unimodal)} modalities"
        raise ArgumentError(
            f"output.unimodal = {given}: must be a list of {count} tensors (B, C), one for each encoder. Return "
            "equipoise.Output(prediction=fused, fused=fused, unimodal=[...]); ConcatFusion, SumFusion and GatedFusion give both"
        )
    return output.prediction if output.fused is None else output.fused, list(unimodal)


class Modulation(nn.Module):
    """State of a run, on its device: the encoders' weights (M,), zero until used, and sums for the log."""

    weights: Tensor
    totals: Tensor
    steps: Tensor

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(modalities))
        self.register_buffer("totals", torch.zeros(3, modalities))
        self.register_buffer("steps", torch.zeros(()))


@dataclass
class _ScaleOutput:
    """The forward hook of an encoder; ``weight`` is a view of ``Modulation.weights``."""

    weight: Tensor

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise ArgumentError(f"encoder returned {type(output).__name__}: must return a tensor of features (B, D)")
        return scale_gradient(output, self.weight) if module.training else None


class ARL(Method):
    """Lean on each modality in inverse proportion to its variance, and let each predict by itself.

    gamma: weight of the unimodal losses, >= 0; up to ``start_epoch`` it is at most 1. temperature: sharpness of the factors,
    >= 0. floor: least share of the entropy that a modality is taken to have, in [0, 1). start_epoch: last 0-based epoch
    without factors, >= -1. clip: largest 2-norm of the gradient, > 0, ``inf`` for none. Replaces the task's loss; needs a
    model with an ``nn.ModuleDict`` named ``encoders`` whose output has ``unimodal`` logits (``MultimodalNet``), and
    classification. Records entropy, dependence and weight of each modality in ``run.history``.
    """

    name = "arl"
    paper: ClassVar[Paper | None] = Paper(
        "Improving Multimodal Learning via Imbalanced Learning",
        "Wei, Luo, Luo",
        "ICCV 2025",
        "https://arxiv.org/abs/2507.10203",
    )
    space: ClassVar[Space] = {"gamma": Uniform(0.5, 5.0), "temperature": LogUniform(1.0, 30.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"gamma": 0.0, "start_epoch": 1_000_000, "clip": math.inf}

    modulation: Modulation

    def __init__(
        self,
        gamma: float = 4.0,
        temperature: float = 8.0,
        floor: float = 0.3,
        start_epoch: int = 5,
        clip: float = 40.0,
    ) -> None:
        check_range("gamma", gamma, 0)
        check_range("temperature", temperature, 0)
        check_range("floor", floor, 0, 1, open_high=True)
        check_integer("start_epoch", start_epoch, -1)
        check_range("clip", clip, 0, open_low=True)
        self.gamma, self.temperature, self.floor = gamma, temperature, floor
        self.start_epoch, self.clip = start_epoch, clip

    def prepare(self, run: Run) -> None:
        encoders = encoders_of(run.model)
        self.modalities = tuple(encoders)
        self.modulation = run.register(self, "modulation", Modulation(len(encoders)))
        # Hooks change no parameter's name, and a view sees what is written into the buffer.
        pairs = zip(encoders.values(), self.modulation.weights.unbind(), strict=True)
        self._handles = [encoder.register_forward_hook(_ScaleOutput(weight)) for encoder, weight in pairs]

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        fused, unimodal = unimodal_of(output, len(self.modalities))
        started = run.epoch > self.start_epoch
        self.modulate(unimodal, started)
        return arl_loss(fused, unimodal, batch.targets, self.gamma if started else min(1.0, self.gamma))

    @torch.no_grad()
    def modulate(self, unimodal: Sequence[Tensor], started: bool) -> None:
        """Write the encoders' weights of this batch, before its backward pass, once modulation has ``started``."""
        entropy, dependence = _over_processes(len(unimodal[0]), *_statistics(unimodal))
        state = self.modulation
        if started:
            # Through .data, since autograd refuses a tensor of the forward pass that has got a new version since.
            state.weights.data.copy_(_weights(entropy, dependence, self.temperature, self.floor))
        state.totals += torch.stack([entropy, dependence, state.weights.to(entropy.dtype)])
        state.steps += 1

    def after_backward(self, run: Run) -> None:
        run.accelerator.clip_grad_norm_(run.trainable_parameters(), self.clip)

    def epoch_end(self, run: Run) -> None:
        state = self.modulation
        if state.steps > 0:
            means = (state.totals / state.steps).tolist()
            for what, row in zip(("entropy", "dependence", "weight"), means, strict=True):
                for modality, value in zip(self.modalities, row, strict=True):
                    run.log(f"{what}_{modality}", value)
        state.totals.zero_()
        state.steps.zero_()

    def finish(self, run: Run) -> None:
        for handle in self._handles:
            handle.remove()
