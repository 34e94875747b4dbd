"""BA-LoRA: low-rank fine-tuning that does not take over the bias and noise of the data, by three penalties on the outputs.

Fine-tuning on few, skewed or wrongly labelled examples pulls a pretrained model away from what it knew. BA-LoRA trains adapters
that start from the top singular directions of each weight (PiSSA), and adds to the task's loss: stay near the pretrained
model's predictions, keep the outputs decorrelated (in generation: the top tokens diverse), and concentrate the batch's logits
in few singular directions.

A layer's weight `W = U S V^T` of rank `r` and scale `s` starts as

    A = diag(q) V_r^T,   B = U_r diag(q),   q = sqrt(S_r / s),   W_res = W - s B A        y = x W_res^T + s (x A^T) B^T + bias

and of the logits `Z` (M, D) of a batch, the pretrained model's `Z_P` (constant), `C` the covariance of Z's columns and `sigma` its
singular values,

    consistency   T^2 mean over rows of KL(softmax(Z_P / T) || softmax(Z / T))
    diversity     understanding:  sum over i != j of C_ij^2 / D      generation:  mean over rows of sum p log p (top tokens)
    spectrum      - (sigma_1 + .. + sigma_k) / (sum of sigma; generation: ||Z||_F)
    loss          task + l1 consistency + l2 diversity + l3 spectrum

With ``task="nlu"`` (understanding: classes) the weights are constant; with ``"nlg"`` (generation: tokens) l1 falls along a cosine
to a tenth, and l2 and l3 begin after a fifth of the steps. The pretrained model needs no second copy: the layers with the
factors that they started from are it.

## When to use
Fine-tuning on few, imbalanced or noisy data, where the pretrained model is good at what the data lack. Consistency is the term
that matters; a larger ``lambdas[0]`` keeps more of the pretrained model.

## When not
Where the new task contradicts the old one: consistency then holds the model back. With one output, where every penalty is
constant. With at most ``k`` outputs the spectrum's term is constant too. Do not expect a gain over plain LoRA at the paper's
weights.

## Cost
One forward pass more for each step, without gradients (about a third of a step); no second model. The singular values of (M, D)
take O(M D min(M, D)); above 4096 columns a random projection takes O(M D k). One SVD of each weight at the start. Nothing at
inference: the trained model is merged.

## In a distributed run
With ``task="nlu"`` the penalties are those of the global batch: its logits are gathered, and 2 processes equal 1. With ``"nlg"``
each process takes those of its own share, as the authors' code does: gathering would send whole vocabularies.

## Source
Chang, Chang, Wu: BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models.
ICLR 2026, arXiv:2408.04556; the losses and schedule of generation as in the authors' code. PiSSA: Meng, Wang, Zhang, NeurIPS 2024,
arXiv:2404.02948. The temperature for understanding (2.0) is our choice: the paper's value was not found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.finetuning.adapters import Target, add_product, attach
from equipoise.finetuning.adapters import export_peft as export_peft
from equipoise.finetuning.adapters import merge_adapters as merge_adapters
from equipoise.finetuning.principal import PrincipalAdapter, principal_part
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import check_logits, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, Space

TASKS = ("nlu", "nlg")
LAMBDAS = {"nlu": (0.15, 0.03, 0.03), "nlg": (0.025, 0.005, 0.005)}
TOP = {"nlu": 5, "nlg": 10}
SMALLEST = 1e-8  # norm of logits below which the spectrum's term is skipped
WIDE = 4096  # more columns than that: singular values by a random projection


# -- the functional core ----------------------------------------------------------------------------------------------
def consistency_loss(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None, kind: str = "kl"
) -> Tensor:
    """How far the predictions are from the pretrained model's, a scalar >= 0. Gradients flow to ``logits`` only.

    kind "kl": ``T^2`` times the mean over rows of ``KL(softmax(teacher / T) || softmax(logits / T))``. kind "mse": mean over
    all entries of the squared difference of the rows, each divided by its 2-norm; without temperature (2024 version).
    logits, teacher_logits: (N, D) or (B, T, V). mask: bool of their shape without the last, the rows that count; 0 if none does.
    """
    check_choice("kind", kind, ("kl", "mse"))
    check_range("temperature", temperature, 0, open_low=True)
    if teacher_logits.shape != logits.shape:
        raise ArgumentError(
            f"teacher_logits = {tuple(teacher_logits.shape)}: must be of the logits' shape {tuple(logits.shape)}"
        )
    rows, teacher = _rows(logits, mask), _rows(teacher_logits.detach(), mask)
    if not len(rows):
        return rows.sum()
    if kind == "mse":
        return F.mse_loss(_unit(rows), _unit(teacher))
    student, teacher = (F.log_softmax(z / temperature, 1) for z in (rows, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def covariance_diversity_loss(logits: Tensor) -> Tensor:
    """``sum over i != j of C_ij^2 / D`` with C the covariance of the columns of ``logits`` (N, D) over the batch, N >= 2."""
    check_logits(logits)
    rows = precise(logits)
    n, columns = rows.shape
    if n < 2:
        refuse("logits", tuple(logits.shape), "have at least 2 rows: one has no covariance", "Leave such a batch out")
    centred = rows - rows.mean(0)
    covariance = centred.mT @ centred / (n - 1)
    return covariance.square().masked_fill(torch.eye(columns, dtype=torch.bool, device=rows.device), 0).sum() / columns


def entropy_diversity_loss(logits: Tensor, *, top_k: int = 0, mask: Tensor | None = None) -> Tensor:
    """Mean over rows of ``sum p log p`` (minus the entropy) of the softmax over the ``top_k`` largest logits; 0: over all.

    logits: (N, V) or (B, T, V). mask: bool of their shape without the last, the rows that count; 0 if none does.
    """
    check_integer("top_k", top_k, 0)
    rows = _rows(logits, mask)
    if not len(rows):
        return rows.sum()
    if 0 < top_k < rows.shape[1]:
        rows = rows.topk(top_k, 1).values
    log = F.log_softmax(rows, 1)
    return (log.exp() * log).sum(1).mean()


def svd_loss(
    logits: Tensor,
    k: int,
    *,
    norm: str = "nuclear",
    mask: Tensor | None = None,
    randomized: bool | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Minus the sum of the ``k`` largest singular values of the logits over their norm; does not depend on their scale.

    logits: (N, D) or (B, T, V). mask: bool of their shape without the last, the rows that count. k: >= 1, cut to the number of
    singular values. norm: "nuclear" (the sum of all) or "fro". 0 with zero gradient for fewer than 2 rows or columns, and for
    logits whose norm is at most 1e-8. Non-finite logits give a non-finite loss.

    randomized: take the top singular values from a random projection, with the Frobenius norm whatever ``norm`` says; None
    does so where it pays: for more than 4096 columns, and k below their number. generator: draws it (on the CPU), by default
    torch's global one.
    """
    check_integer("k", k, 1)
    check_choice("norm", norm, ("nuclear", "fro"))
    rows = _rows(logits, mask)
    smaller = min(rows.shape)
    if smaller < 2:
        return rows.sum() * 0
    if randomized is None:
        randomized = rows.shape[1] > WIDE and k < smaller
    matrix = rows.nan_to_num(0, 0, 0)  # the decomposition of others would raise
    top = matrix
    if randomized:
        top, norm = _range(matrix.detach(), min(k + 5, smaller), generator).mT @ matrix, "fro"
    sigma = torch.linalg.svdvals(top)
    whole = sigma.sum() if norm == "nuclear" else torch.linalg.vector_norm(matrix)
    share = sigma[:k].sum() / torch.where(whole > SMALLEST, whole, math.inf)
    size = rows.detach().sum()
    return (size - size) - share  # the first is 0, and NaN for non-finite logits


def _range(matrix: Tensor, width: int, generator: torch.Generator | None, iterations: int = 2) -> Tensor:
    """Orthonormal columns (M, width) that nearly span the top left singular vectors (Halko et al. 2011, algorithm 4.4).

    Constant: where it spans them, the gradient of the projected singular values is that of the singular values.
    """
    drawn = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    return basis


def ba_lora_weights(
    step: int,
    total_steps: int,
    *,
    lambdas: Sequence[float],
    warmup_ratio: float = 0.2,
    ramp_ratio: float = 0.05,
    floor: float = 0.1,
) -> tuple[float, float, float]:
    """The weights of the three terms in generation, at the 0-based optimizer ``step`` of ``total_steps``.

    Consistency falls along a cosine to ``floor`` of its weight; the others are 0 for ``warmup_ratio`` of the steps and then rise
    linearly over ``ramp_ratio`` of them.
    """
    check_integer("total_steps", total_steps, 1)
    check_integer("step", step, 0)
    for name, value in (("warmup_ratio", warmup_ratio), ("ramp_ratio", ramp_ratio), ("floor", floor)):
        check_range(name, value, 0, 1)
    l1, l2, l3 = _checked(lambdas)
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1)))
    rise = (step - int(warmup_ratio * total_steps)) / max(int(ramp_ratio * total_steps), 1)
    rise = min(max(rise, 0.0), 1.0)
    return l1 * fall, l2 * rise, l3 * rise


def next_token_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The supervised positions (B, T) of a causal language model: t is one where the label at t + 1 is not ``ignore_index``."""
    return F.pad(labels[:, 1:] != ignore_index, (0, 1), value=False)


def _rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (M, D) that count, in float32 at least."""
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ArgumentError(
            f"logits = {logits.dtype} {tuple(logits.shape)}: must be floating point (N, D) or (B, T, V)"
        )
    if mask is None:
        return precise(logits.flatten(0, -2))
    if mask.dtype != torch.bool or mask.shape != logits.shape[:-1]:
        raise ArgumentError(
            f"mask = {mask.dtype} {tuple(mask.shape)}: must be bool of shape {tuple(logits.shape[:-1])}"
        )
    return precise(logits[mask])


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays as it is."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1)


def _checked(lambdas: Sequence[float]) -> tuple[float, float, float]:
    if not isinstance(lambdas, Sequence) or isinstance(lambdas, str) or len(lambdas) != 3:
        refuse("lambdas", lambdas, "be 3 numbers: the weights of consistency, diversity and spectrum")
    for value in lambdas:
        check_range("lambdas", value, 0)
    return lambdas[0], lambdas[1], lambdas[2]


# -- the module -------------------------------------------------------------------------------------------------------
class BALoRALoss(nn.Module):
    """The penalty on the outputs, to be added to the task's loss in any training loop.

    >>> penalty = BALoRALoss()
    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> round(penalty(logits, logits).item(), 4)
    0.09

    task: "nlu" (classes; covariance, nuclear norm, constant weights) or "nlg" (tokens; entropy, Frobenius norm, scheduled weights).
    lambdas: weights of consistency, diversity and spectrum, >= 0; by default (0.15, 0.03, 0.03) and (0.025, 0.005, 0.005).
    k: singular values that are concentrated in, >= 1; by default 5 and 10. temperature: of consistency, > 0; by default 2.
    top_k: tokens of the entropy, 0 for all. kind: of consistency. A term of weight 0 is not computed; a batch of one row has no
    diversity and no spectrum. ``generator`` draws the random projections of wide logits; torch's global one by default.
    """

    def __init__(
        self,
        *,
        task: str = "nlu",
        lambdas: Sequence[float] | None = None,
        k: int | None = None,
        temperature: float | None = None,
        top_k: int = 20,
        kind: str = "kl",
    ) -> None:
        super().__init__()
        check_choice("task", task, TASKS)
        check_choice("kind", kind, ("kl", "mse"))
        check_integer("top_k", top_k, 0)
        self.task, self.kind, self.top_k = task, kind, top_k
        self.lambdas = _checked(LAMBDAS[task] if lambdas is None else lambdas)
        self.k = TOP[task] if k is None else k
        check_integer("k", self.k, 1)
        self.temperature = 2.0 if temperature is None else temperature
        check_range("temperature", self.temperature, 0, open_low=True)
        self.generator: torch.Generator | None = None

    def weights(self, step: int | None = None, total_steps: int | None = None) -> tuple[float, float, float]:
        """The weights at an optimizer step; constant for "nlu", and where no step is given."""
        if self.task == "nlu" or step is None:
            return self.lambdas
        if total_steps is None:
            refuse("total_steps", None, "be given with step", "The weights follow a schedule over all steps")
        return ba_lora_weights(step, total_steps, lambdas=self.lambdas)

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
    ) -> Tensor:
        """The weighted sum of the three terms, without the task's loss.

        logits, teacher_logits: (N, D) or (B, T, V); the latter of the pretrained model, no gradient reaches it. mask: bool of their
        shape without the last, the positions that count: for a causal language model ``next_token_mask(labels)``.
        step, total_steps: optimizer steps done, and of the training, for the schedule of "nlg".
        """
        if teacher_logits.shape != logits.shape:
            raise ArgumentError(
                f"teacher_logits = {tuple(teacher_logits.shape)}: must be of the logits' shape {tuple(logits.shape)}"
            )
        consistency, diversity, spectrum = self.weights(step, total_steps)
        rows, teacher = _rows(logits, mask), _rows(teacher_logits.detach(), mask)
        if self.task == "nlu":
            rows, teacher = gather_rows(rows, teacher)
        terms = []
        if consistency:
            terms.append(consistency * consistency_loss(rows, teacher, temperature=self.temperature, kind=self.kind))
        if diversity and self.task == "nlg":
            terms.append(diversity * entropy_diversity_loss(rows, top_k=self.top_k))
        elif diversity and len(rows) > 1:
            terms.append(diversity * covariance_diversity_loss(rows))
        if spectrum:
            norm = "nuclear" if self.task == "nlu" else "fro"
            terms.append(spectrum * svd_loss(rows, self.k, norm=norm, generator=self.generator))
        return sum(terms[1:], start=terms[0]) if terms else rows.new_zeros(())

    def extra_repr(self) -> str:
        return f"task={self.task!r}, lambdas={self.lambdas}, k={self.k}, temperature={self.temperature}, kind={self.kind!r}"


class PiSSALinear(PrincipalAdapter):
    """A linear layer whose top ``rank`` singular directions train, as LoRA factors; what is left of its weight is frozen.

    base: the layer, which stays as it is. rank: in [1, min(out, in)]. alpha: > 0; the factors are scaled by alpha / rank, 1
    where it is None. Parameters ``lora_A`` (r, in) and ``lora_B`` (out, r); frozen ``weight`` (the residual) and ``bias``;
    buffers ``init_A`` and ``init_B``, the factors at the start. At the start it computes what ``base`` does, to rounding.
    """

    init_A: Tensor
    init_B: Tensor

    def __init__(self, base: nn.Linear, rank: int, *, alpha: float | None = None) -> None:
        super().__init__(base, rank, alpha)
        u, s, v = principal_part(base.weight, rank)
        q = (s / self.scaling).sqrt()
        self.lora_A = nn.Parameter((q[:, None] * v).to(base.weight.dtype))
        self.lora_B = nn.Parameter((u * q).to(base.weight.dtype))
        self.register_buffer("init_A", self.lora_A.detach().clone())
        self.register_buffer("init_B", self.lora_B.detach().clone())
        self.pretrained = False  # whether to run with the factors of the start, see teacher_mode
        self.leave_residual()

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.init_A, self.init_B) if self.pretrained else (self.lora_A, self.lora_B)
        return add_product(F.linear(x, self.weight, self.bias), F.linear(x, a), b, self.scaling)

    def factors(self, *, initial: bool = False) -> tuple[Tensor, Tensor]:
        a, b = (self.init_A, self.init_B) if initial else (self.lora_A, self.lora_B)
        return precise(a), self.scaling * precise(b)


def apply_pissa(model: nn.Module, rank: int, *, alpha: float | None = None, target: Target = nn.Linear) -> nn.Module:
    """Put a ``PiSSALinear`` in the place of every target layer, in place, and freeze the rest; return the model.

    target: see ``equipoise.finetuning.adapters.find_targets``.
    """
    return attach(model, target, lambda layer: PiSSALinear(layer, rank, alpha=alpha))


@contextmanager
def teacher_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` is the pretrained one, in evaluation mode: its PiSSA layers use the factors that they started
    from.

    Modes and layers are back after it. What else has changed in the model (running statistics of BatchNorm) stays as it is.
    Raises ``ArgumentError`` for a model without PiSSA layers.
    """
    layers = [module for module in model.modules() if isinstance(module, PiSSALinear)]
    if not layers:
        raise ArgumentError(
            f"model = {type(model).__name__}: has no PiSSA layers. Attach them: apply_pissa(model, rank)"
        )
    training = [module for module in model.modules() if module.training]
    before = [layer.pretrained for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.pretrained = True
        yield model
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.pretrained = was
        for module in training:
            module.training = True


# -- the method -------------------------------------------------------------------------------------------------------
class BALoRA(Method):
    """Fine-tune PiSSA adapters, and keep the outputs near the pretrained model's, decorrelated and of few directions.

    rank, alpha: of the adapters; alpha None scales by 1. task, lambdas, k, temperature, top_k: see ``BALoRALoss``. target: the
    adapted layers, by default every ``nn.Linear``; all else is frozen. Logits are (N, C), or (B, T, V) with labels (B, T) in
    which -100 is not supervised; for "nlg" position t is supervised where the label at t + 1 is. There is no neutral setting:
    other parameters train than in the baseline (with ``lambdas=(0, 0, 0)`` it is PiSSA). After ``prepare``, ``criterion`` is
    the ``BALoRALoss``; ``finish`` merges the adapters into plain layers.
    """

    name = "ba-lora"
    paper = Paper(
        "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models",
        "Chang, Chang, Wu",
        "ICLR 2026",
        "https://arxiv.org/abs/2408.04556",
    )
    space: ClassVar[Space] = {
        "lambdas": Choice(((0.15, 0.03, 0.03), (0.5, 0.03, 0.03), (0.05, 0.01, 0.01))),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = None

    criterion: BALoRALoss

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        task: str = "nlu",
        lambdas: Sequence[float] | None = None,
        k: int | None = None,
        temperature: float | None = None,
        top_k: int = 20,
        target: Target = None,
    ) -> None:
        check_integer("rank", rank, 1)
        if alpha is not None:
            check_range("alpha", alpha, 0, open_low=True)
        self.rank, self.alpha, self.target = rank, alpha, target
        self.task, self.lambdas, self.k, self.temperature, self.top_k = task, lambdas, k, temperature, top_k
        self._loss()

    def _loss(self) -> BALoRALoss:
        return BALoRALoss(
            task=self.task, lambdas=self.lambdas, k=self.k, temperature=self.temperature, top_k=self.top_k
        )

    def prepare(self, run: Run) -> None:
        if self.task == "nlg" and run.total_steps is None:
            refuse(
                "total_steps", None, "be known for task='nlg', whose weights follow a schedule", "Give total_steps=..."
            )
        run.model = apply_pissa(run.model, self.rank, alpha=self.alpha, target=self.target)
        self.criterion = self._loss()
        self.criterion.generator = run.new_generator(self)

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        logits = output.prediction
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise ArgumentError(
                f"output.prediction = {tuple(logits.shape)}: must be logits of at least 2 outputs; of one every penalty is constant"
            )
        weights = self.criterion.weights(run.global_step, run.total_steps)
        if not any(weights):
            return logits.new_zeros(())
        teacher = logits  # not looked at without consistency
        if weights[0]:
            with torch.no_grad(), teacher_mode(run.model):
                teacher = run.forward(batch.inputs).prediction
        mask = self._supervised(logits, batch.targets)
        return self.criterion(logits, teacher, mask=mask, step=run.global_step, total_steps=run.total_steps)

    def _supervised(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        if logits.ndim == 2:
            return None
        if targets.shape != logits.shape[:-1] or targets.is_floating_point():
            raise ArgumentError(
                f"batch.targets = {targets.dtype} {tuple(targets.shape)}: must be labels of shape {tuple(logits.shape[:-1])}, "
                "with -100 where nothing is supervised"
            )
        return next_token_mask(targets) if self.task == "nlg" else targets != -100

    def finish(self, run: Run) -> None:
        run.model = merge_adapters(run.model)
