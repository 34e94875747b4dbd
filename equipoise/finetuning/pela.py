"""PELA: a pre-trained model made smaller by low-rank factors, and repaired with the original as teacher.

A trained linear layer is nearly of low rank, and the best low-rank matrix is known: the truncated singular value
decomposition. Cut deep enough to pay, though, the errors of all layers add up. PELA replaces every linear layer by two thin
ones, and before (or while) the small model is trained on its task, a short intermediate stage repairs it: the features of
the original model are distilled, and each product of factors is kept near the weight that it stands for.

For a layer `y = W x + b`, `W` (out, in), and a compression ratio `rho > 1`, with the thin SVD `W = U S V^T`,

    R     =  floor(in out / (rho (in + out)))                   at most in out / rho numbers in both factors
    down  =  sqrt(S_R) V_R^T                                    (R, in)
    up    =  U_R sqrt(S_R)                                      (out, R)
    y     =  up (down x) + b

In the intermediate stage, with features `f_1 .. f_L` of student S and teacher T, logits `z`, and P compressed layers,

    L_FD  =  (1/L) sum over l of  mean (f_l^S - f_l^T)^2
    L_LM  =  mean (z^S - z^T)^2
    L_WP  =  (1/P) sum over p of  (max over i, j of |(up_p down_p - W_p)_ij|  -  eps)^2
    loss  =  task loss + alpha L_FD + beta L_LM + gamma L_WP

`L_WP` looks at the largest single entry of the error, and has two sides: an error below `eps` is pushed up to it. The teacher is
the original model, frozen, in evaluation mode, and constant in all gradients. After the stage it is dropped, and the small
model is trained on the task alone.

    small = compress(model, ratio=4.0, skip=["head"])           # a new model; the old one is the teacher
    terms = PELALoss()
    with FeatureTap(small, names) as f, FeatureTap(model, names) as g:
        ...

## When to use
A pre-trained model is too large or too slow for where it runs, and some of its training data (or of the new task's) are at
hand. The small model needs no special kernels, and everything that works on `nn.Linear` works on its factors: fine-tuning,
adapters, quantisation.

## When not
Where the model is to keep its size: the factors replace weights, and there is no adapter to export (`export_peft` says so). Layers
below about 32 features, whose rank would be a handful. At mild ratios, up to 3 or so, where plain training after the SVD
(`svd-finetune`) repairs as well; nor where the cut is so deep that the small layers cannot hold the features that they are to
match (ratio 24 on the task's digits), where it repairs more. For convolutions: only `nn.Linear` is compressed. Inside
`nn.MultiheadAttention`, which reads its weights without calling its layers: leave `out_proj` out with `skip`.

## Cost
One SVD a layer, `O(in out min(in, out))`, once. In the intermediate stage one forward pass of the teacher without gradient, and
one product of the factors a layer, `O(in out R)`, also without gradient: that of `L_WP` flows through a single entry. At
inference `R (in + out)` instead of `in out` multiplications a row and layer: `rho` times fewer. Until the stage ends a
checkpoint also holds the teacher.

## In a distributed run
All terms are means over rows, or do not depend on them; every process holds the teacher. 2 processes equal 1.

## Source
Guo, Wang, Kankanhalli: PELA: Learning Parameter-Efficient Models with Low-Rank Approximation. CVPR 2024, arXiv:2310.10700; weights
and eps as in the authors' code, whose scripts differ from each other (gamma 0 or 1, eps 1e-3 or 0). Ours: what happens to
layers of rank 0 (they stay) and of tied weights (they share their factors), and that the stage is a part of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_integer, check_range, refuse, suggestion
from equipoise.finetuning.adapters import put
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space


# -- the functional core ----------------------------------------------------------------------------------------------
def pela_rank(in_features: int, out_features: int, ratio: float) -> int:
    """The rank at which both factors hold at most ``in * out / ratio`` numbers; 0 where a layer is too small for the ratio.

    >>> pela_rank(768, 3072, 2), pela_rank(4, 3, 2)
    (307, 0)

    ratio: > 0, and large enough that the rank stays below ``min(in, out)``; both else raise ``ArgumentError``.
    """
    check_integer("in_features", in_features, 1)
    check_integer("out_features", out_features, 1)
    check_range("ratio", ratio, 0, open_low=True)
    rank = int(in_features * out_features // (ratio * (in_features + out_features)))
    if rank >= min(in_features, out_features):
        refuse("ratio", ratio, f"give a layer {in_features} -> {out_features} less than full rank", "Take one above 1")
    return rank


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``weight`` (out, in) of a rank, as ``down`` (rank, in) and ``up`` (out, rank).

    Each takes the square roots of the singular values. ``||weight - up @ down||_F^2`` is the sum of the squares of those left
    out. rank: in [1, min(out, in)]. Computed in float32 for half precision; the factors have the dtype of ``weight``.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", "be a matrix (out, in) of floating-point numbers")
    check_integer("rank", rank, 1, min(weight.shape))
    if not torch.isfinite(weight).all():
        raise ArgumentError("weight: holds NaN or infinite values, which no factors approximate")
    u, s, vt = torch.linalg.svd(precise(weight.detach()), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = root[:, None] * vt[:rank], u[:, :rank] * root
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()  # as safetensors wants them


def feature_distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``L_FD``: the mean squared difference of each pair of features, and the mean of these. The teacher is constant.

    student, teacher: equally many tensors, pairwise of equal shape (any). Half precision is computed in float32.
    """
    if len(student) != len(teacher) or not len(student):
        refuse("student, teacher", (len(student), len(teacher)), "be lists of equally many features, at least one")
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            raise ArgumentError(f"features {i}: must be tensors. Was the module called in the forward pass?")
        if ours.shape != theirs.shape:
            raise ArgumentError(
                f"features {i}: have shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher: "
                "must be equal"
            )
    return torch.stack([_mean_square(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def _mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    student = precise(student)
    return F.mse_loss(student, teacher.detach().to(student.dtype))


def weight_perturbation_loss(student: nn.Module, teacher: nn.Module, eps: float = 1e-3) -> Tensor:
    """``L_WP``: how far the largest entry of each layer's error ``up @ down - W`` is from ``eps``, squared; the layers' mean.

    student: a compressed model. teacher: the original, whose layers are found by the same names. eps: >= 0. The gradient reaches
    the factors only, and of each layer only through its largest entry. Computed in float32 or wider, also under autocast.
    """
    check_range("eps", eps, 0)
    terms = []
    for name, layer in low_rank_layers(student).items():
        try:
            original = teacher.get_submodule(name)
        except AttributeError:
            original = None
        if not isinstance(original, nn.Linear) or original.weight.shape != (layer.out_features, layer.in_features):
            raise ArgumentError(
                f"teacher: has no nn.Linear {layer.in_features} -> {layer.out_features} at {name!r}, where the student has a "
                "compressed one: must be the model that was compressed"
            )
        terms.append((_largest_error(*layer.factors, original.weight.detach()) - eps).square())
    return torch.stack(terms).mean()


def _largest_error(down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``max |up @ down - weight|``. The product is taken without gradient, and its one entry that has any once more with it."""
    up, down = precise(up), precise(down)
    weight = weight.to(up.dtype)
    with torch.autocast(up.device.type, enabled=False):  # the error is smaller than bfloat16 resolves
        with torch.no_grad():
            error = torch.addmm(weight, up, down, beta=-1).abs_()
            row = error.amax(1).argmax().view(1)  # faster than argmax over all entries
            column = error.index_select(0, row).argmax().view(1)
        entry = up.index_select(0, row) @ down.index_select(1, column)
        return (entry - weight.index_select(0, row).index_select(1, column)).abs().squeeze()


# -- the layer --------------------------------------------------------------------------------------------------------
class LowRankLinear(nn.Sequential):
    """Two thin linear layers in the place of one: ``[0]`` (in -> rank, without bias), then ``[1]`` (rank -> out).

    The keys of its ``state_dict`` are ``0.weight``, ``1.weight`` and, with ``bias``, ``1.bias``. Made by ``from_linear`` from a
    trained layer; by itself it has the initial weights of ``nn.Linear``. rank: in [1, min(out, in)].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("rank", rank, 1, min(in_features, out_features))
        super().__init__(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The best approximation of a layer, with its bias; trainable. rank: in [1, min(out, in)]."""
        made = cls._holding(linear, *map(nn.Parameter, low_rank_factors(linear.weight, rank)))
        if linear.bias is not None:
            made[1].bias = nn.Parameter(linear.bias.detach().clone())
        return made

    @classmethod
    def _holding(cls, linear: nn.Linear, down: nn.Parameter, up: nn.Parameter) -> LowRankLinear:
        """A layer of these factors, and of the very bias of ``linear``."""
        made = cls(linear.in_features, linear.out_features, len(down), linear.bias is not None, device="meta")
        made[0].weight, made[1].weight = down, up
        if linear.bias is not None:
            made[1].bias = linear.bias
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """``merged_weight()``, for code that reads a layer's weight, as ``nn.TransformerEncoderLayer`` does in evaluation."""
        return self.merged_weight()

    @property
    def bias(self) -> nn.Parameter | None:
        """The second layer's, (out,)."""
        up: Any = self[1]
        bias: nn.Parameter | None = up.bias
        return bias

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``down`` (rank, in) and ``up`` (out, rank), the weights of the two layers."""
        down: Any = self[0]
        up: Any = self[1]
        return down.weight, up.weight

    def merged_weight(self) -> Tensor:
        """``up @ down``, (out, in)."""
        down, up = self.factors
        return (precise(up) @ precise(down)).to(up.dtype)

    def merge(self) -> nn.Linear:
        """The plain layer, of full size, that computes the same."""
        return self._dense(nn.Parameter(self.merged_weight().detach()), copy.deepcopy(self.bias))

    def _dense(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        plain.weight = weight
        if bias is not None:
            plain.bias = bias
        return plain.train(self.training)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The compressed layers by path, each once. Raises ``ArgumentError`` where there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not found:
        raise ArgumentError(
            f"model = {type(model).__name__}: has no compressed layer. Compress it first; a model cannot be merged twice"
        )
    return found


# -- whole models -----------------------------------------------------------------------------------------------------
def compress(
    model: nn.Module, ratio: float = 2.0, *, skip: Sequence[str] = (), min_out_features: int = 10
) -> nn.Module:
    """A copy of ``model`` with a ``LowRankLinear`` in the place of every ``nn.Linear``; the model itself is not touched.

    ratio: how many times fewer numbers a layer's factors hold than its weight, > 0 (in earnest > 1). skip: layers whose path
    contains one of these stay as they are. min_out_features: so do layers with fewer outputs, and those whose rank would be 0.
    Layers that share a weight share its factors, which are decomposed once; a compressed layer is left alone. The factors are
    trainable; all other parameters are as they were, so compress first and freeze the teacher then.

    Raises ``ArgumentError`` where nothing is compressed, a ratio is so small that nothing would be gained, a weight is also used by
    something that stays, or ``nn.MultiheadAttention`` reads the weight itself.
    """
    return compress_in_place(copy.deepcopy(model), ratio, skip, min_out_features)


def compress_in_place(model: nn.Module, ratio: float, skip: Sequence[str], min_out_features: int = 10) -> nn.Module:
    """``compress``, in place (but for a model that is one layer)."""
    check_range("ratio", ratio, 0, open_low=True)
    check_integer("min_out_features", min_out_features, 1)
    skip = checked_names("skip", skip)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in modules.items() if isinstance(module, LowRankLinear))
    chosen: dict[str, nn.Linear] = {}
    ranks: dict[str, int] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or name.startswith(inside) or any(part in name for part in skip):
            continue
        if module.out_features < min_out_features or not (
            rank := pela_rank(module.in_features, module.out_features, ratio)
        ):
            continue
        chosen[name], ranks[name] = module, rank
    if not chosen and not inside:
        raise ArgumentError(
            f"ratio = {ratio!r}, skip = {list(skip)!r}: leave no layer of {type(model).__name__} to compress. It must have an "
            f"nn.Linear with at least {min_out_features} outputs, a rank of 1 at this ratio, and a path without these words"
        )
    _check_use(modules, chosen)
    factors: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    made: dict[int, LowRankLinear] = {}
    for name, linear in chosen.items():
        key = id(linear.weight)
        if key not in factors:
            down, up = low_rank_factors(linear.weight, ranks[name])
            factors[key] = nn.Parameter(down), nn.Parameter(up)
        if id(linear) not in made:
            made[id(linear)] = LowRankLinear._holding(linear, *factors[key])
    for name, linear in chosen.items():
        model = put(model, name, made[id(linear)])
    return model


def _check_use(modules: dict[str, nn.Module], chosen: dict[str, nn.Linear]) -> None:
    """Refuse layers whose weight something else uses: a layer that stays dense, an embedding, torch's attention."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name if key == "weight" else f"{name}.{key}")
    for name, layer in chosen.items():
        if other := next((other for other in owners.get(id(layer.weight), []) if other not in chosen), None):
            raise ArgumentError(
                f"model: the weight of {name!r} is tied to {other!r}, which is not compressed: its factors would untie it. "
                f"Leave it out: skip=[{name!r}]"
            )
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ArgumentError(
                f"model: {name!r} belongs to nn.MultiheadAttention, which reads its weight without calling it. "
                f"Leave it out: skip=[{name.rpartition('.')[2]!r}]"
            )


def merge_low_rank(model: nn.Module) -> nn.Module:
    """A copy of a compressed model with plain ``nn.Linear`` layers again, of full size and with the same outputs.

    Raises ``ArgumentError`` where there is no compressed layer.
    """
    low_rank_layers(model)
    model = copy.deepcopy(model)
    weights: dict[tuple[int, int], nn.Parameter] = {}
    made: dict[int, nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LowRankLinear):
            down, up = layer.factors
            key = id(down), id(up)
            if key not in weights:
                weights[key] = nn.Parameter(layer.merged_weight().detach())
            if id(layer) not in made:
                made[id(layer)] = layer._dense(weights[key], layer.bias)
            model = put(model, name, made[id(layer)])
    return model


def export_peft(model: nn.Module, path: str | Path) -> NoReturn:
    """Not possible, and says why."""
    raise NotImplementedError(
        "PELA's factors replace a layer's weight, and a LoRA is added to it: over the original model there is nothing of low rank "
        "to add. Save the compressed model's state_dict, or that of merge_low_rank(model), whose layers are plain nn.Linear"
    )


def checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sequence of strings as a tuple; a single string is refused, whose letters would be taken for names."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        refuse(argument, names, "be a list of words", f"Write [{names!r}]" if isinstance(names, str) and names else "")
    return tuple(names)


class FeatureTap:
    """Keeps the outputs of some modules: ``with FeatureTap(model, names) as features: model(x)``.

    modules: paths as in ``model.named_modules()``. ``features`` holds, in their order, the last output of each, or None for one
    that was not called yet; of an output with several tensors it is the first. A compressed layer has the path of the layer
    whose place it took, so the same names serve teacher and student. An activation that works in place on the output changes
    what is kept. Raises ``ArgumentError`` for a path that does not exist.
    """

    def __init__(self, model: nn.Module, modules: list[str]) -> None:
        known = dict(model.named_modules())
        self.names = list(checked_names("features", modules))
        for name in self.names:
            if name not in known:
                refuse("features", name, "name a module of the model", suggestion(name, list(known)))
        self._modules = [known[name] for name in self.names]
        self._handles: list[Any] = []
        self.features: list[Any] = []

    def __enter__(self) -> list[Any]:
        self.features = [None] * len(self._modules)
        for place, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(self._keep(self.features, place)))
        return self.features

    def __exit__(self, *error: object) -> None:
        self.features = []  # whoever entered has the list; the tap does not keep the tensors
        while self._handles:
            self._handles.pop().remove()

    @staticmethod
    def _keep(features: list[Any], place: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            features[place] = _first_tensor(output)

        return keep


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a tuple, list or mapping, as Hugging Face's blocks return them."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


# -- the loss ---------------------------------------------------------------------------------------------------------
class PELALoss(nn.Module):
    """``alpha L_FD + beta L_LM + gamma L_WP``, without the task's loss; terms of weight 0 are not computed.

    alpha, beta, gamma: weights of feature distillation, logit matching and weight perturbation, >= 0. eps: >= 0.
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 0.0, gamma: float = 1.0, eps: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("eps", eps)):
            check_range(name, value, 0)
        self.alpha, self.beta, self.gamma, self.eps = alpha, beta, gamma, eps

    def forward(
        self,
        student_feats: Sequence[Tensor],
        teacher_feats: Sequence[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        student: nn.Module,
        teacher: nn.Module,
    ) -> Tensor:
        """The scalar. Features: see ``FeatureTap``. Logits: of equal shape. student, teacher: the two models."""
        total = precise(student_logits).new_zeros(())
        if self.alpha:
            total = total + self.alpha * feature_distillation_loss(student_feats, teacher_feats)
        if self.beta:
            if student_logits.shape != teacher_logits.shape:
                shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
                refuse("student_logits, teacher_logits", shapes, "have the same shape")
            total = total + self.beta * _mean_square(student_logits, teacher_logits)
        if self.gamma:
            total = total + self.gamma * weight_perturbation_loss(student, teacher, self.eps)
        return total

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, eps={self.eps}"


# -- the method -------------------------------------------------------------------------------------------------------
class PELA(Method):
    """Factorise the model's linear layers, and repair it with the original as teacher in the first part of the run.

    ratio, skip: see ``compress``. features: paths of the modules whose outputs are distilled, by default all compressed layers.
    alpha, beta, gamma, eps: see ``PELALoss``. intermediate_steps: length of the stage with these terms, as a number of optimizer
    steps, or as a share of the run in (0, 1].

    There is no neutral setting: the run trains another, smaller set of parameters. The finished model keeps its factors, as
    ``LowRankLinear`` layers. With several micro-batches a step the teacher sees each of them.
    """

    name = "pela"
    paper: ClassVar[Paper | None] = Paper(
        "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
        "Guo, Wang, Kankanhalli",
        "CVPR 2024",
        "https://arxiv.org/abs/2310.10700",
    )
    space: ClassVar[Space] = {
        "alpha": LogUniform(0.1, 10.0),
        "gamma": Choice((0.0, 1.0)),
        "intermediate_steps": Choice((0.5, 1.0)),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        *,
        ratio: float = 2.0,
        skip: Sequence[str] = ("head",),
        features: list[str] | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 1.0,
        eps: float = 1e-3,
        intermediate_steps: int | float = 0.5,
    ) -> None:
        check_range("ratio", ratio, 0, open_low=True)
        checked_names("skip", skip)
        if features is not None and not checked_names("features", features):
            refuse("features", features, "name at least one module", "Leave it out to take all compressed layers")
        if isinstance(intermediate_steps, int):
            check_integer("intermediate_steps", intermediate_steps, 0)
        else:
            check_range("intermediate_steps", intermediate_steps, 0, 1, open_low=True)
        self.ratio, self.skip, self.features = ratio, skip, features
        self.alpha, self.beta, self.gamma, self.eps = alpha, beta, gamma, eps
        self.intermediate_steps = intermediate_steps
        self.criterion = PELALoss(alpha=alpha, beta=beta, gamma=gamma, eps=eps)

    teacher: nn.Module | None = None

    def prepare(self, run: Run) -> None:
        self._until = self._stage_length(run.total_steps)
        teaches = self._until and (self.alpha or self.beta or self.gamma)
        teacher = copy.deepcopy(run.model).eval().requires_grad_(False) if teaches else None
        run.model = compress_in_place(run.model, self.ratio, self.skip)
        names = list(low_rank_layers(run.model)) if self.features is None else self.features
        self._student_tap = FeatureTap(run.model, names)
        if teacher is not None:
            self.teacher = run.register(self, "teacher", teacher)
            self._student_tap.__enter__()

    def _stage_length(self, total_steps: int | None) -> int:
        if isinstance(self.intermediate_steps, int):
            return self.intermediate_steps
        if total_steps is None:
            refuse("total_steps", None, "be known for intermediate_steps as a share", "Give it as a number of steps")
        return max(1, round(self.intermediate_steps * total_steps))

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        if self.teacher is None:
            return output.prediction.new_zeros(())
        names, ours, theirs = self._student_tap.names, self._student_tap.features, []
        logits = output.prediction
        if self.alpha or self.beta:
            with torch.no_grad(), FeatureTap(self.teacher, names) as theirs:
                logits = run.forward(batch.inputs, self.teacher).prediction
        unused = next((name for name, kept in zip(names, theirs, strict=False) if kept is None), None)
        if self.alpha and unused is not None:
            refuse("features", unused, "be called in the forward pass", "Name modules that are: features=[...]")
        loss: Tensor = self.criterion(ours, theirs, output.prediction, logits, run.model, self.teacher)
        return loss

    def after_step(self, run: Run) -> None:
        if run.global_step >= self._until:
            self._drop_teacher()

    def finish(self, run: Run) -> None:
        self._drop_teacher()  # a stage longer than the run

    def _drop_teacher(self) -> None:
        self.teacher = None
        self.owned.pop("teacher", None)
        self._student_tap.__exit__()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "teacher" not in state:  # saved after the stage
            self._drop_teacher()
        super().load_state_dict(state)
