"""SaRA: train only the weights that are close to zero.

In a trained network a share of the weights is so small that setting them to zero hardly changes what it computes. SaRA trains
exactly these, of every tensor, and leaves all others as they are, bit for bit: capacity that lay idle learns the new task, and
what carries the old one stays.

With the trained weights `p0`, a threshold `theta` and `M0 = |p0| < theta`, element by element,

    only entries with M = 1 train        M = M0 at first
    M  <-  M0 and |p| < theta            once, after `progressive_step` steps: what has grown large stays where it is
    loss  +  lambda ||p * M||_*          keeps the change of low rank: the sum of singular values, gradient (U V^T) * M

Two forms, with equal numbers. Dense: `SaRAAdamW`, an optimizer in the place of AdamW. Sparse: `sparse_parametrize` makes the
chosen entries of a tensor a leaf of their own, so that only their gradients and moments exist. The low-rank term is that of
one matrix a step, drawn at random, of those whose sides are longer than `min_rank_dim`.

## When to use
Any pretrained network, convolutions and embeddings included, that shall learn something new and keep what it can, with no cost
at inference and little memory for gradients and moments. Several changes of one network add up (`apply_sparse_delta`).

## When not
Where the change must be a low-rank adapter that other software loads: it is sparse, and a factorisation would only be near it.
The default threshold and learning rate are those of Stable Diffusion 1.5: for another network take the threshold below which
10 % of its weights lie, and set the learning rate by hand. Do not expect the small weights to beat weights chosen at random: on
Fashion-MNIST (see the evidence) they kept no more of the old task. Recurrent layers of torch and tied weights have the dense
form only.

## Cost
Sparse: gradient and moments of the chosen entries (3 numbers and a 4-byte index each, 1 byte to freeze it) and, in each forward
pass, one copy of every tensor. Dense: as AdamW, 2 bytes of masks an entry, and the pretrained value of each chosen one. With
the low-rank term one singular value decomposition a step, which for a large matrix costs more than the rest.

## In a distributed run
Gradients are averaged before the step and the draws are those of one seed, so all processes choose and change the same entries.

## Source
Hu et al.: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation. ICLR 2025,
arXiv:2409.06633. The low-rank term of one random matrix and the moments kept at the second choice as in the authors' code
(optim/adamw2.py); the sparse form and its files are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.errors import ArgumentError, check_integer, check_range, refuse, suggestion
from equipoise.finetuning.state import ExactOptimizer
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space

MIN_ENTRIES = 100  # a mask of no more entries has no low-rank term


# -- the functional core ----------------------------------------------------------------------------------------------
def adaptive_lr(threshold: float) -> float:
    """``1e-3 exp(-350 threshold)``: the paper's learning rate, fitted on Stable Diffusion."""
    check_range("threshold", threshold, 0, open_low=True)
    return 1e-3 * math.exp(-350 * threshold)


def below_threshold_mask(param: Tensor, threshold: float) -> Tensor:
    """Which entries have an absolute value below the threshold (strictly): bool, the shape of ``param``."""
    check_range("threshold", threshold, 0, open_low=True)
    return param.detach().abs() < threshold


def masked_nuclear_norm(param: Tensor, mask: Tensor) -> Tensor:
    """The sum of the singular values of ``param * mask``, a differentiable scalar; both (m, n), the mask bool.

    The gradient is ``(U V^T) * mask`` with ``param * mask = U S V^T``. Half precision is computed in float32.
    """
    check_mask(mask, param)
    if param.ndim != 2:
        raise ArgumentError(f"param = shape {tuple(param.shape)}: must be a matrix")
    return torch.linalg.svdvals(torch.where(mask, precise(param), 0)).sum()


def check_mask(mask: Tensor, param: Tensor) -> None:
    """Refuse a mask that is not bool, or of another shape than the parameter's."""
    if mask.dtype != torch.bool or mask.shape != param.shape:
        raise ArgumentError(
            f"mask = {mask.dtype} {tuple(mask.shape)}: must be torch.bool of the parameter's shape {tuple(param.shape)}"
        )


def _has_rank_term(shape: torch.Size, min_rank_dim: int) -> bool:
    return len(shape) == 2 and min(shape) > min_rank_dim


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _warn_without_rank_term(min_rank_dim: int) -> None:
    warnings.warn(
        f"lambda_rank does nothing here: no matrix that trains has both sides longer than {min_rank_dim}", stacklevel=3
    )


# -- dense: the optimizer ---------------------------------------------------------------------------------------------
class SaRAAdamW(ExactOptimizer):
    """AdamW that moves only the entries whose absolute value was below ``threshold`` when it was made.

    >>> weight = torch.nn.Parameter(torch.tensor([0.001, 0.5]))
    >>> optimizer = SaRAAdamW([weight], lr=1e-3, weight_decay=0.0)
    >>> weight.sum().backward(); optimizer.step()
    >>> [round(value, 4) for value in weight.tolist()]
    [0.0, 0.5]

    params: tensors or groups; groups may set all but ``min_rank_dim`` and ``generator``. lr: >= 0, by default
    ``adaptive_lr(threshold)``. threshold: > 0. progressive_step: after so many steps those that have left the threshold stop;
    None for never. lambda_rank: weight of the low-rank term, >= 0. min_rank_dim: matrices with both sides longer have the
    term. betas, eps, weight_decay: AdamW's. generator: on the CPU, draws the matrix of each step; by default one of seed 0,
    since all processes must draw alike.

    Frozen entries have neither decay nor motion from moments: they keep their bits. For each entry it keeps AdamW's moments
    and two masks, for each chosen one its pretrained value. Raises ``ArgumentError`` (a ``ValueError``) for values outside
    these ranges, and for a threshold below which nothing lies.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        threshold: float = 2e-3,
        progressive_step: int | None = None,
        lambda_rank: float = 0.0,
        min_rank_dim: int = 64,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("min_rank_dim", min_rank_dim, 0)
        self.min_rank_dim = min_rank_dim
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "progressive_step": progressive_step,
            "lambda_rank": lambda_rank,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "completed": 0,
        }
        super().__init__(params, defaults)
        chosen = [state["initial"].numel() for state in self.state.values()]
        if not sum(chosen):
            _refuse_threshold(threshold, [p for group in self.param_groups for p in group["params"]])
        if any(group["lambda_rank"] for group in self.param_groups) and not self._eligible():
            _warn_without_rank_term(min_rank_dim)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entries below the threshold are chosen now."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_range("threshold", group["threshold"], 0, open_low=True)
        if group["lr"] is None:
            group["lr"] = adaptive_lr(group["threshold"])
        for name in ("lr", "lambda_rank", "eps", "weight_decay"):
            check_range(name, group[name], 0)
        for i, beta in enumerate(group["betas"]):
            check_range(f"betas[{i}]", beta, 0, 1, open_high=True)
        if group["progressive_step"] is not None:
            check_integer("progressive_step", group["progressive_step"], 1)
        for p in group["params"]:
            mask = below_threshold_mask(p, group["threshold"])
            self.state[p] = {"initial_mask": mask, "mask": mask.clone(), "initial": p.detach()[mask].clone()}

    def mask(self, p: Tensor) -> Tensor:
        """Which entries of the parameter train now: bool, its shape."""
        mask: Tensor = self.state[p]["mask"]
        return mask

    def delta(self) -> dict[int, tuple[Tensor, Tensor]]:
        """What was learned: for the i-th parameter the flat indices (int64) chosen at first, and value now minus pretrained."""
        held = [p for group in self.param_groups for p in group["params"]]
        found = {}
        for i, p in enumerate(held):
            chosen = self.state[p]["initial_mask"]
            found[i] = chosen.flatten().nonzero().flatten(), p.detach()[chosen] - self.state[p]["initial"]
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a parameter without a gradient is passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        drawn = self._draw_matrix()
        for group in self.param_groups:
            if group["completed"] == group["progressive_step"]:
                for p in group["params"]:
                    self.mask(p).logical_and_(below_threshold_mask(p, group["threshold"]))
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, p is drawn)
            group["completed"] += 1
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], drawn: bool) -> None:
        state, mask = self.state[p], self.mask(p)
        if p.grad.is_sparse:  # type: ignore[union-attr]
            raise ArgumentError(
                "gradient = sparse tensor: SaRAAdamW needs dense gradients. Use Embedding(sparse=False)"
            )
        gradient = torch.where(mask, p.grad, 0)  # type: ignore[arg-type]
        if drawn and int(mask.sum()) > MIN_ENTRIES:
            u, _, vh = torch.linalg.svd(torch.where(mask, precise(p), 0), full_matrices=False)
            gradient += group["lambda_rank"] * torch.where(mask, u @ vh, 0)
        if "step" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        first, second, (beta1, beta2), lr = state["exp_avg"], state["exp_avg_sq"], group["betas"], group["lr"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        divisor = second.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        moved = p.mul(1 - lr * group["weight_decay"])
        moved.addcdiv_(first, divisor, value=-lr / (1 - beta1 ** state["step"]))
        p.copy_(torch.where(mask, moved, p))

    def _eligible(self) -> list[Tensor]:
        """The matrices that may have the low-rank term, in order."""
        groups = [group for group in self.param_groups if group["lambda_rank"]]
        return [p for group in groups for p in group["params"] if _has_rank_term(p.shape, self.min_rank_dim)]

    def _draw_matrix(self) -> Tensor | None:
        eligible = self._eligible()
        return eligible[_draw(len(eligible), self.generator)] if eligible else None

    def state_dict(self) -> dict[str, Any]:
        """Moments, masks, pretrained values, counts of steps, and the generator."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly from what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator, "min_rank_dim": self.min_rank_dim}


def _refuse_threshold(threshold: float, parameters: list[Tensor]) -> None:
    smallest = min((float(p.detach().abs().min()) for p in parameters if p.numel()), default=math.inf)
    if math.isinf(smallest):
        raise ArgumentError(
            "model: has no parameter that requires a gradient. Call model.requires_grad_(True) first, as after merged adapters"
        )
    refuse(
        "threshold",
        threshold,
        f"be above {smallest:.3g}, the smallest absolute value of any weight: nothing would train",
        "Take the value below which 10 % of the weights lie",
    )


# -- sparse: the parametrization --------------------------------------------------------------------------------------
class _Place(torch.autograd.Function):
    """``base`` with the values that train at their positions; its gradient is that of these entries.

    A function of its own, since torch's would keep 8-byte indices from the forward pass to the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, base: Tensor, index: Tensor, trains: Tensor) -> Tensor:
        ctx.save_for_backward(index, trains)
        placed = base.clone(memory_format=torch.contiguous_format)
        flat = placed.view(-1)
        flat.index_copy_(0, index.long(), torch.where(trains, values, flat.index_select(0, index)))
        return placed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, trains = ctx.saved_tensors
        return torch.where(trains, gradients[0].flatten().index_select(0, index), 0), None, None, None


class SparseEntries(nn.Module):
    """A tensor whose chosen entries are a leaf: ``values`` (nnz,) -> the tensor, all other entries from ``base``.

    Buffers: ``base`` (the tensor's shape), ``index`` (nnz,) flat positions, int32 where they fit, and ``trains`` (nnz,) bool.
    An entry that no longer trains is read from ``base``; the leaf keeps its length, so that its optimizer goes on.
    """

    base: Tensor
    index: Tensor
    trains: Tensor
    order: tuple[str, ...]  # of the module's parameters, before any became sparse

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        super().__init__()
        index = mask.flatten().nonzero().flatten()
        self.register_buffer("base", tensor.detach())
        self.register_buffer("index", index.int() if tensor.numel() < 2**31 else index)
        self.register_buffer("trains", torch.ones_like(index, dtype=torch.bool))

    def forward(self, values: Tensor) -> Tensor:
        placed: Tensor = _Place.apply(values, self.base, self.index, self.trains)
        return placed

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The chosen entries (nnz,) of a tensor."""
        return tensor.flatten().index_select(0, self.index)

    def mask(self) -> Tensor:
        """Which entries of the tensor train: bool, its shape."""
        flat = torch.zeros(self.base.numel(), dtype=torch.bool, device=self.base.device)
        return flat.index_copy(0, self.index.long(), self.trains).view_as(self.base)

    @torch.no_grad()
    def freeze(self, values: Tensor, stop: Tensor) -> None:
        """Let the entries where ``stop`` (nnz,) stay at their values from now on."""
        stop = stop & self.trains
        self.base.view(-1)[self.index[stop].long()] = values[stop]
        self.trains &= ~stop


def sparse_parametrize(module: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """Let only the entries of ``module``'s parameter ``name`` train where ``mask`` (bool, its shape); return the module.

    The parameter object stays, as the 1-D leaf ``parametrizations.<name>.original`` of the chosen entries, so that an
    optimizer made before goes on if it has no state yet. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)``
    makes it dense again. Raises ``ArgumentError`` for a mask of another shape or dtype, and for torch's recurrent layers,
    which read their weights past any parametrization.
    """
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    if parameter is None:
        known = [key for key, _ in module.named_parameters(recurse=False)]
        refuse("name", name, f"be a parameter of {type(module).__name__}: {', '.join(known)}", suggestion(name, known))
    check_mask(mask, parameter)
    if isinstance(module, nn.RNNBase):
        raise ArgumentError(
            f"module = {type(module).__name__}: reads its weights past a parametrization. Use SaRAAdamW or SaRA(sparse=False)"
        )
    entries = SparseEntries(parameter.contiguous(), mask)
    others = [other.order for owner, _, other in sparse_entries(module).values() if owner is module]
    entries.order = others[0] if others else tuple(module._parameters)
    parameter.grad = None  # of the dense shape
    parametrize.register_parametrization(module, name, entries, unsafe=True)
    return module


def sparse_entries(model: nn.Module) -> dict[str, tuple[nn.Module, str, SparseEntries]]:
    """The sparse tensors of a model: by the name of the dense parameter its module, its name there, and the entries."""
    found = {}
    for path, module in model.named_modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain, parametrize.ParametrizationList) and isinstance(chain[0], SparseEntries):
                found[f"{path}.{name}".lstrip(".")] = module, name, chain[0]
    return found


def reselect(model: nn.Module, threshold: float) -> None:
    """The second choice, of every sparse tensor: entries that have reached the threshold stay where they are from now on."""
    for module, name, entries in sparse_entries(model).values():
        values = module.parametrizations[name].original.detach()  # type: ignore[union-attr, index]
        entries.freeze(values, ~below_threshold_mask(values, threshold))


def remove_sparse(model: nn.Module) -> nn.Module:
    """Make every sparse tensor a plain, dense parameter again, in its place among the others; return the model."""
    found = sparse_entries(model).values()
    for module, name, _ in found:
        parametrize.remove_parametrizations(module, name)
    for module, _, entries in found:
        for key in entries.order:
            module._parameters[key] = module._parameters.pop(key)
    return model


# -- files ------------------------------------------------------------------------------------------------------------
def export_sparse_delta(model: nn.Module, base_state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What training changed, tensor by tensor: ``{"indices": flat positions, int64, "values": now minus base}``.

    model: dense or sparse. base_state_dict: of the model before training. Tensors that did not change are left out; buffers
    that changed (BatchNorm's) are not. Save it with ``safetensors``. Raises ``ArgumentError`` for another model's base.
    """
    state = {
        name: value.detach() for name, value in model.state_dict().items() if ".parametrizations." not in f".{name}"
    }
    state |= {key: getattr(module, name).detach() for key, (module, name, _) in sparse_entries(model).items()}
    delta = {}
    for name, value in state.items():
        base = _entry(base_state_dict, name, "base_state_dict").to(value.device)
        if base.shape != value.shape:
            raise ArgumentError(
                f"base_state_dict[{name!r}] has shape {tuple(base.shape)}: must be that of the model, {tuple(value.shape)}"
            )
        indices = (value != base).flatten().nonzero().flatten()
        if len(indices):
            delta[name] = {"indices": indices, "values": value.flatten()[indices] - base.flatten()[indices]}
    return delta


def apply_sparse_delta(
    state_dict: Mapping[str, Tensor], delta: Mapping[str, Mapping[str, Tensor]], *, scale: float = 1.0
) -> dict[str, Tensor]:
    """A copy of ``state_dict`` with ``scale`` times the change added; several changes of one base are added one by one.

    scale: 0 gives the base, 1 the trained model (to rounding), between 0 and 2 more or less of it. Raises ``ArgumentError``
    for a tensor that the state does not have, or that is too small for the indices.
    """
    check_range("scale", scale, -math.inf, math.inf, open_low=True, open_high=True)
    result = {name: value.detach().clone() for name, value in state_dict.items()}
    for name, change in delta.items():
        tensor = _entry(result, name, "state_dict")
        indices, values = change["indices"].to(tensor.device), change["values"].to(tensor.device, torch.float64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < tensor.numel():
            raise ArgumentError(
                f"delta[{name!r}] has the index {int(indices.max())}: must lie below {tensor.numel()}, the size of the "
                "tensor. Was it saved for another base?"
            )
        flat = tensor.flatten()
        changed = flat[indices].double() + scale * values
        flat[indices] = (changed if tensor.is_floating_point() else changed.round()).to(tensor.dtype)
        result[name] = flat.view_as(tensor)
    return result


def _entry(state: Mapping[str, Tensor], name: str, argument: str) -> Tensor:
    if name not in state:
        refuse(argument, list(state)[:5], f"have {name!r}: it belongs to another model", suggestion(name, list(state)))
    return state[name]


# -- the method -------------------------------------------------------------------------------------------------------
class SaRA(Method):
    """Fine-tune only the weights close to zero, and leave all others as they are.

    threshold: of the absolute value, > 0. lr: of its AdamW, None for ``adaptive_lr(threshold)``. lambda_rank: weight of the
    low-rank term, >= 0. progressive: the share of the steps after which the entries that have left the threshold stop, in
    (0, 1]; None for never. sparse: whether only the chosen entries have gradients and moments; the numbers are the same, but
    for the random draws of the low-rank term. weight_decay: AdamW's.

    Replaces the run's optimizer by AdamW; there is no neutral setting, since with every weight chosen it is AdamW, whatever
    the baseline's optimizer is. After ``prepare``, ``chosen`` counts the entries that train.
    """

    name = "sara"
    paper = Paper(
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "Hu et al.",
        "ICLR 2025",
        "https://arxiv.org/abs/2409.06633",
    )
    space: ClassVar[Space] = {"threshold": LogUniform(1e-3, 1e-1), "lr": LogUniform(2e-4, 1e-2)}
    min_rank_dim: ClassVar[int] = 64

    chosen: int

    def __init__(
        self,
        *,
        threshold: float = 2e-3,
        lr: float | None = None,
        lambda_rank: float = 5e-4,
        progressive: float | None = 0.5,
        sparse: bool = True,
        weight_decay: float = 1e-2,
    ) -> None:
        check_range("threshold", threshold, 0, open_low=True)
        if lr is not None:
            check_range("lr", lr, 0)
        check_range("lambda_rank", lambda_rank, 0)
        if progressive is not None:
            check_range("progressive", progressive, 0, 1, open_low=True)
        check_range("weight_decay", weight_decay, 0)
        self.threshold, self.lr, self.lambda_rank = threshold, lr, lambda_rank
        self.progressive, self.sparse, self.weight_decay = progressive, sparse, weight_decay

    def _choose(self, run: Run, parameter: Tensor) -> Tensor:
        """The mask of a parameter's entries that shall train (M0)."""
        return below_threshold_mask(parameter, self.threshold)

    def prepare(self, run: Run) -> None:
        self._last = None if self.progressive is None else self._reselection(run)
        self.generator = run.new_generator(self)
        self._drawn: tuple[int, int] | None = None
        trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        masks = {name: self._choose(run, p) for name, p in trained.items()}
        self.chosen = sum(int(mask.sum()) for mask in masks.values())
        if not self.chosen:
            _refuse_threshold(self.threshold, list(trained.values()))
        if not self.sparse:
            return
        _refuse_tied(run.model)
        for name, mask in masks.items():
            if mask.any():
                path, _, key = name.rpartition(".")
                sparse_parametrize(run.model.get_submodule(path), key, mask)
            else:
                trained[name].requires_grad_(False)
        if self.lambda_rank and not self._eligible(run):
            _warn_without_rank_term(self.min_rank_dim)

    def configure_optimizer(self, run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        lr = adaptive_lr(self.threshold) if self.lr is None else self.lr
        if self.sparse:
            return torch.optim.AdamW(parameters, lr, weight_decay=self.weight_decay)
        return SaRAAdamW(
            parameters,
            lr,
            threshold=self.threshold,
            progressive_step=self._last,
            lambda_rank=self.lambda_rank,
            min_rank_dim=self.min_rank_dim,
            weight_decay=self.weight_decay,
            generator=self.generator,
        )

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        nothing = output.prediction.new_zeros(())
        eligible = self._eligible(run) if self.sparse and self.lambda_rank else []
        if not eligible:
            return nothing
        if self._drawn is None or self._drawn[0] != run.global_step:  # once a step, not once a micro-batch
            self._drawn = run.global_step, _draw(len(eligible), self.generator)
        module, name, entries = eligible[self._drawn[1]]
        mask = entries.mask()
        if int(mask.sum()) <= MIN_ENTRIES:
            return nothing
        return self.lambda_rank * masked_nuclear_norm(getattr(module, name), mask)

    def after_step(self, run: Run) -> None:
        if self.sparse and run.global_step == self._last:
            reselect(run.model, self.threshold)

    def finish(self, run: Run) -> None:
        remove_sparse(run.model)

    def _reselection(self, run: Run) -> int:
        if run.total_steps is None:
            refuse(
                "total_steps",
                None,
                "be a fixed number for SaRA's second choice",
                "Give epochs=..., or progressive=None",
            )
        return max(1, int(self.progressive * run.total_steps))  # type: ignore[operator]

    def _eligible(self, run: Run) -> list[tuple[nn.Module, str, SparseEntries]]:
        found = sparse_entries(run.model).values()
        return [entry for entry in found if _has_rank_term(entry[2].base.shape, self.min_rank_dim)]


def _refuse_tied(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and seen.setdefault(id(p), name) != name:
            raise ArgumentError(
                f"model: {seen[id(p)]!r} and {name!r} are one tied tensor, which the sparse form would untie. "
                "Use SaRA(sparse=False)"
            )
