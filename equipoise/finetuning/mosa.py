"""MoSA: adapters split into sparse experts that train in turn and merge into one.

A bottleneck adapter beside each feed-forward part of a frozen backbone has few parameters, and with few examples not even those are
used well. MoSA splits one ordinary adapter's weights into E parts that do not overlap, trains one randomly chosen part per layer
and forward pass, makes two such passes agree, and merges the parts after training into one adapter of the same size.

For an input h (..., d), `D` from d to b and `U` from b to d, each with a bias,

    a(h)       =  c U(drop(gelu(D(LN(h)))))                                      added to the feed-forward part's output
    W_e        =  W_init + M_e (W - W_init)         expert e = 0 .. E-1          M_e: disjoint masks that cover W, drawn once
    training   :  W_e, bias_e                       e drawn uniformly            per layer and forward pass, for the whole batch
    evaluation :  W_init + (W - W_init) / E         the mean of the experts      and the mean of their biases

`W_init` is 0 for U, where evaluation is exactly the mean of what the experts give. By default only U is split (`share="down"`: D is
shared). Two passes over a batch, with experts and dropout drawn anew, give logits z1, z2 and softmax p1, p2; with sg the
stop-gradient,

    loss  =  CE(z1, y)  +  w_add CE(z2, y)  +  w_reg mean (KL(sg p2 || p1) + KL(sg p1 || p2)) / 2

## When to use
Adapter tuning with few labelled examples, where an ordinary adapter would be used and twice its training time is affordable.

## When not
Where the adapter must vanish into the backbone's weights: a bottleneck has a non-linearity and stays a layer (the LoRA
variant, `MoSALoRALinear`, does fold). Models without feed-forward parts, as plain MLPs. With activation checkpointing, which would
draw other experts when it recomputes a pass. Consistency of two passes can be all of the gain: hold it against an ordinary
adapter with the same loss (`num_experts=1`), which on rotated Fashion-MNIST was as good.

## Cost
Two forward and two backward passes a step with the consistency term, which is its minimum, and one without (`reg_weight=0`). One
mask of b d numbers for each split layer and pass. One weight and one map of a byte an entry are stored, not E copies; biases are
(E, d). At inference as an ordinary adapter.

## In a distributed run
The experts are drawn from one stream, equal on all processes; dropout is each process's own. In a loop of your own, give every
process the same `generator`.

## Source
Zhang, Zou, An, Liu, Zhang: MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning. 2023, arXiv:2312.02923 (its first
version: Split & Merge). The adapter's place and form after Chen et al., AdaptFormer, NeurIPS 2022, arXiv:2205.13535. The LoRA
variant's export as B / E is this library's.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse, suggestion
from equipoise.finetuning import adapters
from equipoise.finetuning.adapters import Adapter, Target, lora_parameters, put, scaling_of
from equipoise.training.batch import Batch, Output
from equipoise.training.losses import check_logits, check_rows, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space

MODES = ("all", "row", "column")
SHARES = ("down", "up", "none")
PLACE = "mosa"  # under which name a module holds the adapter beside it


# -- the functional core ----------------------------------------------------------------------------------------------
def split_by_score(score: Tensor, num_experts: int, *, mode: str = "all") -> Tensor:
    """Which expert owns each entry: int64 of the shape of ``score``, in [0, num_experts).

    Expert e owns the entries whose rank by ascending score lies in [floor(e n / E), floor((e + 1) n / E)), of the n entries of
    the whole tensor (mode "all"), or of each row or column of a matrix.

    >>> split_by_score(torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.7, 0.2]]), 3)
    tensor([[2, 0, 1],
            [1, 2, 0]])
    """
    check_choice("mode", mode, MODES)
    if score.ndim == 0 or (mode != "all" and score.ndim != 2):
        raise ArgumentError(f"score has shape {tuple(score.shape)}: must be a matrix for mode = {mode!r}")
    rows = score.T if mode == "column" else score if mode == "row" else score.reshape(1, -1)
    check_integer("num_experts", num_experts, 1)
    n = rows.shape[1]
    if num_experts > n:
        what = "entries" if mode == "all" else f"entries of a {mode}"
        refuse("num_experts", num_experts, f"be at most {n}, the number of {what}")
    rank = rows.argsort(dim=1, stable=True).argsort(dim=1)
    owner = ((rank + 1) * num_experts - 1) // n  # rank >= floor(e n / E) exactly if (rank + 1) E > e n
    return owner.T if mode == "column" else owner.reshape(score.shape)


def random_split(
    shape: tuple[int, ...], num_experts: int, *, mode: str = "all", generator: torch.Generator | None = None
) -> Tensor:
    """A random ``split_by_score`` of a tensor of ``shape``, on the CPU."""
    return split_by_score(torch.rand(shape, generator=generator), num_experts, mode=mode)


def expert_of(weight: Tensor, owner: Tensor, expert: int | Tensor, initial: Tensor | None = None) -> Tensor:
    """The weight of one expert: ``weight`` where it owns the entry, else ``initial`` (None is 0), from where no gradient comes.

    expert: an index, or a tensor (1,) of one.
    """
    chosen = expert.to(owner.dtype) if isinstance(expert, Tensor) else expert
    mask = (owner == chosen).to(weight.dtype)
    # torch.where takes three times as long on a CPU; these are exact at 0 and 1 too.
    return weight * mask if initial is None else torch.lerp(initial, weight, mask)


def mean_of_experts(weight: Tensor, num_experts: int, initial: Tensor | None = None) -> Tensor:
    """The mean of all experts' weights: ``initial + (weight - initial) / E``."""
    return weight / num_experts if initial is None else torch.lerp(initial, weight, 1 / num_experts)


def symmetric_kl(logits1: Tensor, logits2: Tensor) -> Tensor:
    """``mean (KL(sg p2 || p1) + KL(sg p1 || p2)) / 2`` over the rows of two sets of logits (N, C): a scalar.

    Its gradients are (p1 - p2) / 2N and (p2 - p1) / 2N, not those of the value, since each KL's first argument is constant.
    """
    check_logits(logits1)
    check_rows("logits2", logits2, logits1)
    one, two = (F.log_softmax(precise(z), 1) for z in (logits1, logits2))
    kl = partial(F.kl_div, reduction="sum", log_target=True)  # of the second argument from the first
    return (kl(one, two.detach()) + kl(two, one.detach())) / (2 * max(1, len(logits1)))


# -- the modules ------------------------------------------------------------------------------------------------------
class SplitLinear(nn.Module):
    """A linear layer (..., in) -> (..., out) whose weight is split into experts.

    Parameters ``weight`` (out, in) and ``bias`` (num_experts, out), or None. Buffers ``owner`` (out, in) uint8 and
    ``init_weight`` (out, in), None with ``zero_init``. In training mode each call draws an expert, from ``generator`` (on the CPU)
    or torch's global one; in evaluation mode the mean of the experts acts.

    num_experts: in [1, 256], at most the number of entries. zero_init: start from zero, else uniform in +-1/sqrt(in). mode: how
    entries are dealt out (see ``split_by_score``).
    """

    owner: Tensor
    init_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        bias: bool = True,
        zero_init: bool = False,
        mode: str = "all",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, 1)
        check_integer("out_features", out_features, 1)
        check_integer("num_experts", num_experts, 1, 256)
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.generator = generator
        start = torch.zeros(out_features, in_features) if zero_init else _uniform(out_features, in_features, generator)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        owner = random_split((out_features, in_features), num_experts, mode=mode, generator=generator)
        self.register_buffer("owner", owner.to(torch.uint8))
        self.register_buffer("init_weight", None if zero_init else start.clone())

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """With ``expert`` that one acts, in [0, num_experts); else one drawn in training mode, the mean in evaluation."""
        if expert is None and not self.training:
            return F.linear(x, self.merged_weight(), self.merged_bias())
        chosen = _draw(self.num_experts, self.generator, x.device) if expert is None else self._checked(expert)
        bias = None if self.bias is None else self.bias[chosen].reshape(-1)
        return F.linear(x, expert_of(self.weight, self.owner, chosen, self.init_weight), bias)

    def expert_weight(self, expert: int) -> Tensor:
        """The weight (out, in) of one expert."""
        return expert_of(self.weight, self.owner, self._checked(expert), self.init_weight)

    def merged_weight(self) -> Tensor:
        """The mean of the experts' weights (out, in)."""
        return mean_of_experts(self.weight, self.num_experts, self.init_weight)

    def merged_bias(self) -> Tensor | None:
        """The mean of the experts' biases (out,)."""
        return None if self.bias is None else self.bias.mean(0)

    def merge(self) -> nn.Linear:
        """The plain layer that computes what this one does in evaluation mode."""
        return _plain(self.merged_weight(), self.merged_bias()).train(self.training)

    def _checked(self, expert: int) -> int:
        check_integer("expert", expert, 0, self.num_experts - 1)
        return expert

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}, bias={self.bias is not None}"


class MoSAAdapter(nn.Module):
    """A bottleneck adapter whose weights are split into experts; gives what is added to the stream, not the sum.

    >>> adapter = MoSAAdapter(32, bottleneck=8)
    >>> bool((adapter(torch.ones(2, 32)) == 0).all())
    True

    dim, bottleneck: widths, >= 1. num_experts: in [1, 256]; 1 is an ordinary adapter. share: which projection all experts share,
    "down", "up" or "none". scale: factor on the output, not 0. dropout: on the bottleneck, in [0, 1). norm: LayerNorm in front.
    activation: makes the non-linearity. generator: on the CPU, for the initial weights, the split and the draws.

    Submodules ``norm``, ``down``, ``up``: a projection that is not split is an ``nn.Linear``, else a ``SplitLinear``.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        *,
        num_experts: int = 4,
        share: str = "down",
        scale: float = 0.1,
        dropout: float = 0.1,
        norm: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, 1)
        check_integer("bottleneck", bottleneck, 1)
        check_integer("num_experts", num_experts, 1, 256)
        check_choice("share", share, SHARES)
        _check_scale(scale)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.dim, self.num_experts, self.share, self.scale, self.dropout = dim, num_experts, share, scale, dropout
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.activation = activation()
        self.down: nn.Linear | SplitLinear
        self.up: nn.Linear | SplitLinear
        if num_experts > 1 and share != "down":
            self.down = SplitLinear(dim, bottleneck, num_experts, generator=generator)
        else:
            self.down = _plain(_uniform(bottleneck, dim, generator), torch.zeros(bottleneck))
        if num_experts > 1 and share != "up":
            self.up = SplitLinear(bottleneck, dim, num_experts, zero_init=True, generator=generator)
        else:
            self.up = _plain(torch.zeros(dim, bottleneck), torch.zeros(dim))

    def forward(self, x: Tensor, *, expert: tuple[int, int] | None = None) -> Tensor:
        """(..., dim) -> (..., dim). expert: of ``down`` and ``up``; None draws them in training mode, else their mean acts."""
        down, up = (None, None) if expert is None else expert
        for index in expert or ():
            check_integer("expert", index, 0, self.num_experts - 1)
        h = self.activation(_call(self.down, self.norm(x), down))
        return self.scale * _call(self.up, F.dropout(h, self.dropout, self.training), up)

    def merge(self) -> MoSAAdapter:
        """The ordinary adapter (``num_experts=1``) that computes what this one does in evaluation mode."""
        plain = copy.deepcopy(self)
        plain.num_experts = 1
        plain.down, plain.up = (
            layer.merge() if isinstance(layer, SplitLinear) else layer for layer in (plain.down, plain.up)
        )
        return plain

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, share={self.share!r}, scale={self.scale}, dropout={self.dropout}"


class MoSALoRALinear(Adapter):
    """LoRA whose factors are split into experts: ``y = x W^T + s (x A_e^T) B_e^T + bias``, s = alpha / rank.

    base: the layer, frozen. rank: in [1, min(out, in)]. alpha: > 0, by default the rank. num_experts: in [1, 256]. share: which
    factor is not split: "down" (A), "up" (B) or "none". generator: on the CPU, for A, the split and the draws.

    In training mode each call draws experts; in evaluation, and merged, the mean of each factor's experts acts.
    """

    owner_A: Tensor | None
    owner_B: Tensor | None
    init_A: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        num_experts: int = 4,
        share: str = "down",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank)
        check_integer("num_experts", num_experts, 1, 256)
        check_choice("share", share, SHARES)
        self.scaling, self.num_experts, self.share = scaling_of(rank, alpha), num_experts, share
        self.generator = generator
        self.lora_A, self.lora_B = lora_parameters(self.weight, rank, generator)
        split = {
            "owner_A": (self.lora_A, num_experts > 1 and share != "down"),
            "owner_B": (self.lora_B, num_experts > 1 and share != "up"),
        }
        for name, (factor, is_split) in split.items():
            owner = random_split(tuple(factor.shape), num_experts, generator=generator) if is_split else None
            self.register_buffer(name, None if owner is None else owner.to(self.weight.device, torch.uint8))
        self.register_buffer("init_A", None if self.owner_A is None else self.lora_A.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        factors = [
            factor
            if owner is None
            else expert_of(factor, owner, _draw(self.num_experts, self.generator, x.device), initial)
            if self.training
            else mean_of_experts(factor, self.num_experts, initial)
            for factor, owner, initial in self._factors()
        ]
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, factors[0]), factors[1])

    def merged_weight(self) -> Tensor:
        a, b = self.lora_factors()
        return self.weight + b @ a

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        a, b = (
            factor if owner is None else mean_of_experts(factor, self.num_experts, initial)
            for factor, owner, initial in self._factors()
        )
        return a, self.scaling * b

    def _factors(self) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], ...]:
        return (self.lora_A, self.owner_A, self.init_A), (self.lora_B, self.owner_B, None)


def _draw(num_experts: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """An expert, (1,) int64: a tensor, so that compiled code serves them all; drawn on the CPU, so that no device is waited for."""
    return torch.randint(num_experts, (1,), generator=generator).to(device, non_blocking=True)


def _call(layer: nn.Linear | SplitLinear, x: Tensor, expert: int | None) -> Tensor:
    return cast(Tensor, layer(x, expert) if isinstance(layer, SplitLinear) else layer(x))


def _uniform(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Kaiming's uniform start with a = sqrt 5: +-1/sqrt(columns)."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _check_scale(scale: float) -> None:
    check_range("scale", scale)
    if scale == 0 or math.isinf(scale):
        refuse("scale", scale, "be finite and not 0, at which the adapter does nothing")


# -- into a model, and out of it --------------------------------------------------------------------------------------
def insert_adapters(
    model: nn.Module, make: Callable[[int], MoSAAdapter], insert: Target = None, *, freeze: bool = True
) -> nn.Module:
    """Put an adapter ``make(dim)`` beside each feed-forward part of ``model``, freeze all else, and return the model.

    The model is changed in place. A part keeps its own keys in the ``state_dict`` and gains the submodule ``mosa``; its class
    becomes a subclass of what it was, whose ``forward`` adds the adapter of what the part reads (where the block's norm lies
    outside the part, that is the normalised input, which the adapter's own norm leaves nearly as it is).

    insert: which parts. None: every innermost module with two or three linear layers, the last of which maps back to the width
    from which the others start (transformers' ``mlp``, ``ffn``, gated ones, residual MLPs); the layers ``intermediate`` and
    ``output`` of Hugging Face's BERT and its like, where the adapter is beside both; and torch's own transformer layers. Else
    names, a class, a regular expression or a function, as for ``equipoise.finetuning.adapters.find_targets``, of modules that take
    and give tensors of one width, which their first linear layer or LayerNorm tells.

    Raises ``ArgumentError`` where nothing fits, or one of the names does not, where a width cannot be told, and where the model
    has adapters already.
    """
    if any(isinstance(module, MoSAAdapter) for module in model.modules()):
        raise ArgumentError("model has MoSA's adapters already. Start from the base model")
    modules = dict(model.named_modules())
    chosen = _chosen(modules, insert)
    made = {path: make(_width(path, modules[path])).to(next(modules[path].parameters())) for path in chosen}
    if freeze:
        model.requires_grad_(False)
    for path, adapter in made.items():
        module = _place(modules[path])
        adapter.train(module.training)
        _put_beside(module, adapter)
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fast path would read the layers' weights without calling them
    return model


def _chosen(modules: dict[str, nn.Module], insert: Target) -> list[str]:
    """The paths that ``insert`` means."""
    if insert is None:
        fitting = [path for path, module in modules.items() if path and _is_feed_forward(module)]
        if not fitting:
            raise ArgumentError(
                "insert = None: the model has no feed-forward part to put an adapter beside. Name modules whose output is as "
                "wide as their input: insert=['path.to.module']"
            )
        return [path for path in fitting if not any(other.startswith(f"{path}.") for other in fitting)]
    chosen: dict[str, None] = {}
    for part in [[name] for name in insert] if isinstance(insert, list | tuple) else [insert]:
        found = [path for path, module in modules.items() if adapters._fits(path, module, part)]
        if not found:
            name = part[0] if isinstance(part, list) else part
            hint = suggestion(name, list(modules)) if isinstance(name, str) else ""
            raise ArgumentError(f"insert = {name!r}: fits no module of the model. {hint}".rstrip())
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _is_feed_forward(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or _is_bert_like(module):
        return True
    shapes = [(layer.in_features, layer.out_features) for layer in _linear(module)]
    if len(shapes) not in (2, 3):
        return False
    (narrow, wide), last = shapes[0], shapes[-1]
    # Three square maps are an attention's query, key and value.
    return set(shapes[:-1]) == {(narrow, wide)} and last == (wide, narrow) and (len(shapes) == 2 or wide != narrow)


def _is_bert_like(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    output = parts.get("output")
    return "intermediate" in parts and isinstance(getattr(output, "dense", None), nn.Linear) and _inputs(output) == 2


def _inputs(module: nn.Module | None) -> int:
    """How many arguments a module's ``forward`` must be given."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]  # type: ignore[union-attr]
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _place(module: nn.Module) -> nn.Module:
    """The module that holds the adapter: in BERT's manner the one that adds what both layers read to what they give."""
    return cast(nn.Module, module.output) if _is_bert_like(module) else module


def _width(path: str, module: nn.Module) -> int:
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return module.linear1.in_features
    linear = _linear(_place(module))
    if _is_bert_like(module):
        return linear[0].out_features
    if linear and linear[0].in_features == linear[-1].out_features:
        return linear[0].in_features
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    if not linear and norms:
        return norms[0].normalized_shape[-1]
    ends = f"{linear[0].in_features} to {linear[-1].out_features}" if linear else "an unknown width"
    raise ArgumentError(
        f"insert: {path!r} ({type(module).__name__}) maps {ends}: must give what is as wide as what it reads"
    )


def _put_beside(module: nn.Module, adapter: MoSAAdapter) -> None:
    """Make ``module`` add the adapter of its input, without another module around it that would change its keys."""
    kind = type(module)
    base = cast(Any, kind)

    def beside(self: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return base.forward(self, x, *arguments, **named) + self.mosa(x)

    def in_a_row(self: Any, x: Tensor) -> Tensor:  # nn.Sequential would call the adapter as its last stage
        y = x
        for name, stage in self._modules.items():
            y = y if name == PLACE else stage(y)
        return y + self.mosa(x)

    def on_the_stream(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return base.forward(self, hidden_states, input_tensor + self.mosa(input_tensor))

    def inside(self: Any, x: Tensor) -> Tensor:
        return base._ff_block(self, x) + self.mosa(x)

    changed: dict[str, Callable[..., Tensor]]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        changed = {"_ff_block": inside}
        module.activation_relu_or_gelu = 0  # the layer's fast path would read its weights without calling this
    elif isinstance(module, nn.Sequential):
        changed = {"forward": in_a_row}
    else:
        changed = {"forward": on_the_stream if _inputs(module) == 2 else beside}
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **changed})
    module.add_module(PLACE, adapter)


def _split(model: nn.Module) -> dict[str, MoSAAdapter]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, MoSAAdapter) and module.num_experts > 1
    }


def _has_experts(model: nn.Module) -> bool:
    return bool(_split(model)) or any(isinstance(module, MoSALoRALinear) for module in model.modules())


def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge the experts of every ``MoSAAdapter`` into an ordinary adapter, and fold the LoRA variant; return the model.

    Raises ``ArgumentError`` where there is nothing to merge, as when merging twice.
    """
    split, lora = _split(model), any(isinstance(module, Adapter) for module in model.modules())
    if not split and not lora:
        raise ArgumentError(f"model = {type(model).__name__}: has no experts to merge. Were they merged already?")
    for path, adapter in split.items():
        model = put(model, path, adapter.merge())
    return adapters.merge_adapters(model) if lora else model


def export_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapters as ordinary ones: ``down.weight``, ``down.bias``, ``up.weight``, ``up.bias``, ``norm.*``, after each one's path.

    The model is left as it is. A ``MoSAAdapter(num_experts=1, scale=...)`` loads them; the scale is not in them.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, MoSAAdapter)}
    if not found:
        raise ArgumentError(f"model = {type(model).__name__}: has no MoSAAdapter. The LoRA variant: export_peft")
    return {
        f"{path}.{key}".lstrip("."): tensor.detach().clone()
        for path, adapter in found.items()
        for key, tensor in adapter.merge().state_dict().items()
    }


def export_peft(model: nn.Module, path: str | Path) -> None:
    """Write the LoRA variant as a folder that peft loads (see ``equipoise.finetuning.adapters.export_peft``)."""
    if not any(isinstance(module, Adapter) for module in model.modules()):
        raise ArgumentError(
            f"model = {type(model).__name__}: has no MoSALoRALinear. A bottleneck adapter has a non-linearity, which no LoRA "
            "holds: use export_adapter"
        )
    adapters.export_peft(model, path)


# -- the method -------------------------------------------------------------------------------------------------------
class MoSA(Method):
    """Train adapters beside the feed-forward parts as sparse experts that take turns, and merge them into ordinary ones.

    bottleneck: width of an adapter, >= 1; a budget, not tuned. num_experts: in [1, 256]; 1 is an ordinary adapter. share: which
    projection is not split, "down", "up" or "none". scale: of the adapter's output, not 0. dropout: on the bottleneck, in [0, 1).
    reg_weight: of the two passes' symmetric KL, >= 0. add_weight: of the second pass's own loss, >= 0; both 0: one pass.
    insert: where adapters go (see ``insert_adapters``); None: beside every feed-forward part; a model without any is refused.

    The backbone is frozen; adapters and the head train. A model that holds MoSA's layers already (``MoSALoRALinear``, or adapters
    placed by hand) is trained as it is: nothing is inserted or frozen. There is no neutral setting: without adapters the head alone
    would train. For logits of at least two classes, unless ``reg_weight`` is 0.
    """

    name = "mosa"
    paper = Paper(
        "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning",
        "Zhang, Zou, An, Liu, Zhang",
        "arXiv 2023",
        "https://arxiv.org/abs/2312.02923",
    )
    space: ClassVar[Space] = {"num_experts": Choice((2, 4, 8)), "scale": LogUniform(0.05, 1.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        *,
        bottleneck: int = 64,
        num_experts: int = 4,
        share: str = "down",
        scale: float = 0.1,
        dropout: float = 0.1,
        reg_weight: float = 1.0,
        add_weight: float = 0.0,
        insert: Target = None,
    ) -> None:
        check_integer("bottleneck", bottleneck, 1)
        check_integer("num_experts", num_experts, 1, 256)
        check_choice("share", share, SHARES)
        _check_scale(scale)
        check_range("dropout", dropout, 0, 1, open_high=True)
        check_range("reg_weight", reg_weight, 0)
        check_range("add_weight", add_weight, 0)
        self.bottleneck, self.num_experts, self.share, self.scale = bottleneck, num_experts, share, scale
        self.dropout, self.reg_weight, self.add_weight, self.insert = dropout, reg_weight, add_weight, insert

    def prepare(self, run: Run) -> None:
        generator = run.new_generator(self)

        def make(dim: int) -> MoSAAdapter:
            return MoSAAdapter(
                dim,
                self.bottleneck,
                num_experts=self.num_experts,
                share=self.share,
                scale=self.scale,
                dropout=self.dropout,
                generator=generator,
            )

        if not _has_experts(run.model):
            head = run.head()
            run.model = insert_adapters(run.model, make, self.insert)
            head.requires_grad_(True)
        for module in run.model.modules():
            if isinstance(module, SplitLinear | MoSALoRALinear):
                module.generator = generator

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        loss = run.task_loss(output.prediction, batch.targets)
        if self.reg_weight == 0 and self.add_weight == 0:
            return loss
        second = run.forward(batch.inputs).prediction
        if self.add_weight:
            loss = loss + self.add_weight * run.task_loss(second, batch.targets)
        if self.reg_weight:
            loss = loss + self.reg_weight * symmetric_kl(_rows(output.prediction), _rows(second))
        return loss

    def finish(self, run: Run) -> None:
        if _has_experts(run.model):
            run.model = merge_adapters(run.model)


def _rows(logits: Tensor) -> Tensor:
    """Logits (N, C, ...) as rows (M, C)."""
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ArgumentError(
            f"prediction has shape {tuple(logits.shape)}: MoSA's consistency is that of probabilities over at least two classes, "
            "(N, C, ...). Give reg_weight=0"
        )
    return logits.movedim(1, -1).flatten(0, -2)
