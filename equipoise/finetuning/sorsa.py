"""SORSA: the singular vectors and values of each weight train as three factors, kept near orthonormal by a regulariser.

LoRA's two factors share the scale of the change between them, and nothing keeps the adapted weight well conditioned. SORSA
splits each weight by its singular value decomposition and trains the principal part as it stands: vectors in `A` and `B`,
values in `S`. A penalty keeps the vectors near orthonormal, so that scale lives in the values.

A layer's weight `W = U S V^T` of rank `r` and scale `s` starts as

    A = V_r^T (r, in),   S = S_r (r,),   B = U_r (out, r),   W_res = W - s B diag(S) A
    y = x W_res^T + s ((x A^T) * S) B^T + bias

and over the L adapted layers

    R  =  sum of ( ||A A^T - I||_F + ||B^T B - I||_F ) / (2 L)          norms, not their squares
    theta  <-  theta - lr_t (gradient of the task's loss) - gamma_t (gradient of R)

where gamma_t follows the schedule of the learning rate. So the gradient of R enters every optimizer step with the constant factor
``gamma / peak learning rate``, in closed form, after gradients are accumulated and clipped: it is never scaled or clipped itself.

## When to use
In the place of LoRA, for faster convergence at equal rank; where the singular values of the trained part should stay meaningful
(how well conditioned it is, which direction counts how much).

## When not
For a gain over PiSSA, which starts from the same part in two factors: none is to be expected. With weight decay, which pulls the
vectors away from length 1: keep it 0. With an optimizer that has several learning rates for the adapters: the factor is then
undefined.

## Cost
As LoRA in each step; the regulariser takes O(r^2 (in + out)) for each layer and optimizer step. One SVD of each weight at the
start. The factors of the start are kept, r (in + out + 1) numbers for each layer, so that the adapter can be exported. Nothing at
inference.

## In a distributed run
Every process adds the same closed-form gradient to the averaged one. 2 processes equal 1.

## Source
Cao, Song: SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models. 2024,
arXiv:2409.00055; one optimizer step for both gradients as in the authors' code (the paper writes two).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.finetuning import adapters
from equipoise.finetuning.adapters import Target, add_product, attach
from equipoise.finetuning.adapters import merge_adapters as merge_adapters
from equipoise.finetuning.principal import PrincipalAdapter, principal_part
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space


# -- the layer --------------------------------------------------------------------------------------------------------
class SORSALinear(PrincipalAdapter):
    """A linear layer whose top ``rank`` singular vectors and values train; what is left of its weight is frozen.

    base: the layer, which stays as it is. rank: in [1, min(out, in)]. alpha: > 0; the trained part is scaled by alpha / rank, 1
    where it is None. dropout: on the trained part's input, in [0, 1). keep_init: keep the factors of the start, without which
    the adapter cannot be exported over the original weight, taken off or loaded. Parameters ``sorsa_A`` (r, in), ``sorsa_S``
    (r,) (may become negative), ``sorsa_B`` (out, r); frozen ``weight`` (the residual) and ``bias``; buffers ``init_A``,
    ``init_S``, ``init_B``. At the start it computes what ``base`` does, to rounding.
    """

    init_A: Tensor | None
    init_S: Tensor | None
    init_B: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        keep_init: bool = True,
    ) -> None:
        super().__init__(base, rank, alpha)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.dropout = dropout
        u, s, v = (part.to(base.weight.dtype) for part in principal_part(base.weight, rank))
        self.sorsa_A, self.sorsa_S, self.sorsa_B = (nn.Parameter(part.clone()) for part in (v, s, u))
        for name, part in (("init_A", v), ("init_S", s), ("init_B", u)):
            self.register_buffer(name, part.clone() if keep_init else None)
        self.leave_residual()

    def forward(self, x: Tensor) -> Tensor:
        path = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden = F.linear(path, self.sorsa_A) * self.sorsa_S
        return add_product(F.linear(x, self.weight, self.bias), hidden, self.sorsa_B, self.scaling)

    def factors(self, *, initial: bool = False) -> tuple[Tensor, Tensor]:
        a, s, b = (self.init_A, self.init_S, self.init_B) if initial else (self.sorsa_A, self.sorsa_S, self.sorsa_B)
        if a is None or s is None or b is None:
            refuse(
                "keep_init",
                False,
                "be True: without the factors of the start the original weight is not known",
                "Export over the residual, export_peft(model, path, over='residual'), or merge",
            )
        return precise(a), precise(b) * (self.scaling * precise(s))


def apply_sorsa(
    model: nn.Module, rank: int, *, alpha: float | None = None, dropout: float = 0.0, target: Target = nn.Linear
) -> nn.Module:
    """Put a ``SORSALinear`` in the place of every target layer, in place, and freeze the rest; return the model.

    target: see ``equipoise.finetuning.adapters.find_targets``.
    """
    return attach(model, target, lambda layer: SORSALinear(layer, rank, alpha=alpha, dropout=dropout))


# -- the regulariser --------------------------------------------------------------------------------------------------
def orthonormal_penalty(module: nn.Module | Iterable[SORSALinear]) -> Tensor:
    """``R``: the mean, over the A and B of all SORSA layers, of the Frobenius distance of their Gram matrix from the identity.

    A scalar >= 0, in float32 at least, with gradient (0 where all are orthonormal). Raises ``ArgumentError`` where there is no
    SORSA layer.
    """
    norms = [torch.linalg.vector_norm(_defect(precise(rows))) for _, rows, _ in _frames(module)]
    return torch.stack(norms).mean()


@torch.no_grad()
def add_orthonormal_gradient(module: nn.Module | Iterable[SORSALinear], coefficient: float) -> Tensor:
    """Add ``coefficient`` times the gradient of R to ``.grad`` of the layers' A and B, in closed form; return R.

    Of rows G: ``d ||G G^T - I||_F / dG = 2 (G G^T - I) G / ||G G^T - I||_F``, and 0 where they are orthonormal.
    """
    frames = _frames(module)
    norms = []
    for parameter, given, transposed in frames:
        rows = precise(given)
        defect = _defect(rows)
        norm = torch.linalg.vector_norm(defect)
        gradient = (defect * (2 * coefficient / len(frames) / norm.clamp(min=1e-12))) @ rows
        gradient = (gradient.mT if transposed else gradient).to(parameter.dtype)
        if parameter.grad is None:
            parameter.grad = gradient.contiguous()
        else:
            parameter.grad.add_(gradient)
        norms.append(norm)
    return torch.stack(norms).mean()


def condition_number(layer: SORSALinear) -> Tensor:
    """Largest over smallest singular value of the trained part ``s B diag(S) A``, a scalar >= 1; infinite below rank r."""
    a, b = layer.factors()
    sigma = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
    return sigma[0] / sigma[-1]


def _frames(module: nn.Module | Iterable[SORSALinear]) -> list[tuple[nn.Parameter, Tensor, bool]]:
    """Each parameter that is to be orthonormal, as rows (r, n), and whether these are its columns."""
    layers = module.modules() if isinstance(module, nn.Module) else module
    frames = []
    for layer in layers:
        if isinstance(layer, SORSALinear):
            frames += [(layer.sorsa_A, layer.sorsa_A, False), (layer.sorsa_B, layer.sorsa_B.mT, True)]
    if not frames:
        raise ArgumentError(
            f"module = {type(module).__name__}: has no SORSA layers. Attach them: apply_sorsa(model, rank)"
        )
    return frames


def _defect(rows: Tensor) -> Tensor:
    """``G G^T - I`` (r, r)."""
    return torch.addmm(torch.eye(len(rows), dtype=rows.dtype, device=rows.device), rows, rows.mT, beta=-1)


# -- files ------------------------------------------------------------------------------------------------------------
def export_peft(model: nn.Module, path: str | Path, *, over: str = "original") -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads.

    over "original": rank 2r over the model as it was. "residual": rank r over a model that holds the residual weights, which are
    written beside the adapter as ``residual.safetensors``: load them into the base model first,
    ``base.load_state_dict(load_file("residual.safetensors"), strict=False)``.
    """
    check_choice("over", over, ("original", "residual"))
    if over == "original":
        adapters.export_peft(model, path)
        return
    from safetensors.torch import save_file

    adapters.export_peft(model, path, tensors_of=_over_residual)
    held = {f"{name}.weight": layer.weight.detach().contiguous() for name, layer in adapters.adapters_of(model).items()}
    save_file(held, Path(path) / "residual.safetensors", metadata={"format": "pt"})


def _over_residual(adapter: adapters.Adapter) -> dict[str, Tensor]:
    if not isinstance(adapter, SORSALinear):
        refuse("over", "residual", f"be 'original' for a model with {type(adapter).__name__} layers")
    a, b = adapter.factors()
    return {"lora_A.weight": a, "lora_B.weight": b}


# -- the method -------------------------------------------------------------------------------------------------------
class SORSA(Method):
    """Fine-tune the singular vectors and values of each weight's principal part, the vectors kept near orthonormal.

    rank: of the trained part, in [1, min(out, in)] of every layer. gamma: step size of the regulariser, >= 0, which follows the
    learning rate's schedule. alpha, dropout: see ``SORSALinear``. target: the adapted layers, by default every ``nn.Linear``;
    all else is frozen.

    The regulariser's gradient is added in ``before_step``, to the final, clipped gradients, once an optimizer step, times gamma
    over the peak learning rate: the rate that the optimizer is made with (``max_lr`` of OneCycleLR), which the schedule scales.
    Raises ``ArgumentError`` where the adapters' parameters have several rates, or the rate 0. There is no neutral setting:
    other parameters train than in the baseline. ``finish`` merges the adapters into plain layers.
    """

    name = "sorsa"
    paper = Paper(
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        "Cao, Song",
        "arXiv 2024",
        "https://arxiv.org/abs/2409.00055",
    )
    space: ClassVar[Space] = {"gamma": LogUniform(1e-5, 1e-2)}
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        *,
        rank: int = 8,
        gamma: float = 4e-4,
        alpha: float | None = None,
        dropout: float = 0.0,
        target: Target = None,
    ) -> None:
        check_integer("rank", rank, 1)
        check_range("gamma", gamma, 0)
        if alpha is not None:
            check_range("alpha", alpha, 0, open_low=True)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.rank, self.gamma, self.alpha, self.dropout, self.target = rank, gamma, alpha, dropout, target

    def prepare(self, run: Run) -> None:
        run.model = apply_sorsa(run.model, self.rank, alpha=self.alpha, dropout=self.dropout, target=self.target)

    def configure_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        self.peak = self._rate(run, optimizer, None)
        return optimizer

    def before_step(self, run: Run) -> None:
        if not self.gamma:
            return
        if run.accelerator.scaler is not None and run.clip_norm is None:
            run.accelerator.unscale_gradients(run.optimizer)  # clipping would have done it
        add_orthonormal_gradient(run.model, self.gamma / self._rate(run, run.optimizer, self.peak))

    def _rate(self, run: Run, optimizer: Optimizer, unscheduled: float | None) -> float:
        """The peak learning rate of the adapters' parameters; ``unscheduled`` where no schedule says, or the present rate."""
        ours = {id(parameter) for parameter, _, _ in _frames(run.model)}
        groups = [group for group in optimizer.param_groups if any(id(p) in ours for p in group["params"])]
        rates = {
            float(group.get("max_lr", group.get("initial_lr", group["lr"] if unscheduled is None else unscheduled)))
            for group in groups
        }
        if len(rates) != 1 or not min(rates) > 0:
            refuse(
                "optimizer",
                sorted(rates),
                "give the adapters' parameters one learning rate above 0",
                "The regulariser's weight is gamma over that rate; put them into one group",
            )
        return rates.pop()

    def finish(self, run: Run) -> None:
        run.model = merge_adapters(run.model)
