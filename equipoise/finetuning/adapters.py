"""What all low-rank adapters share: where they attach, how they merge, and how they are saved.

An adapter is an ``nn.Module`` in the place of an ``nn.Linear``, with the layer's ``weight`` and ``bias`` frozen under their own
names, so that the other keys of the model's ``state_dict`` do not change. It says what its weight is now
(``merged_weight``), what it was (``original_weight``), and what it adds, as LoRA factors over the original weight with scaling 1
(``lora_factors``): from these three everything here follows.

    attach(model, ["q_proj", "v_proj"], lambda linear: LoRALinear(linear, rank=8))     # in place, all else frozen
    save_adapter(model, "adapter.safetensors")                                          # the trained tensors only
    export_peft(model, "folder")                                                        # what peft loads
    merge_adapters(model)                                                               # plain nn.Linear again

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from equipoise.errors import ArgumentError, DataError, check_integer, check_range, suggestion
from equipoise.training.losses import precise

Target = type[nn.Module] | Sequence[str] | str | Callable[[str, nn.Module], bool] | None
FORMAT = "equipoise-adapter"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


# -- one adapter ------------------------------------------------------------------------------------------------------
class Adapter(nn.Module):
    """Base of every low-rank adapter: takes the place of ``base``, whose weight (out, in) and bias it holds, frozen.

    ``weight`` is the layer's own parameter object; a subclass that keeps a residual in its place makes a new one, and gives
    ``original_weight`` and ``rebase`` too. Every subclass gives ``forward``, ``merged_weight`` and ``lora_factors``.
    """

    peft_config: ClassVar[dict[str, Any]] = {}  # what peft must be told beside ranks, as {"use_dora": True}

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise ArgumentError(f"base = {type(base).__name__}: must be an nn.Linear")
        shape = (base.out_features, base.in_features)
        if (
            not isinstance(base.weight, nn.Parameter)
            or base.weight.shape != shape
            or not base.weight.is_floating_point()
        ):
            raise ArgumentError(
                f"base = {type(base).__name__}: must have a plain floating-point weight {shape}. Remove its parametrization or "
                "quantization first"
            )
        self.out_features, self.in_features = shape
        check_rank(rank, base)
        self.rank = rank
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def merged_weight(self) -> Tensor:
        """The weight (out, in) of the plain layer that computes the same, in the dtype of ``weight``."""
        raise NotImplementedError

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) with ``original_weight() + B @ A == merged_weight()``."""
        raise NotImplementedError

    def original_weight(self) -> Tensor:
        """The weight (out, in) before any training."""
        return self.weight.detach()

    def rebase(self, original: Tensor) -> None:
        """After other factors were loaded: make ``weight`` what belongs to them over ``original``. Nothing where it is that."""

    def peft_tensors(self) -> dict[str, Tensor]:
        """What peft holds for this layer, by the end of the key."""
        a, b = self.lora_factors()
        return {"lora_A.weight": a, "lora_B.weight": b}

    def linear(self, weight: Tensor) -> nn.Linear:
        """A plain layer of this shape with ``weight`` and the bias, frozen as they are here."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().to(self.weight.dtype).clone(), requires_grad=False)
        if self.bias is not None:
            plain.bias = self.bias
        return plain.train(self.training)

    def merge(self) -> nn.Linear:
        """The plain layer that computes the same."""
        return self.linear(self.merged_weight())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LoRALinear(Adapter):
    """LoRA: ``y = x W^T + s (x A^T) B^T + bias`` with ``s = alpha / rank``; A uniform in +-1/sqrt(in), B zero.

    base: the layer, whose weight is frozen. rank: in [1, min(out, in)]. alpha: > 0, by default the rank (s = 1).
    dropout: on the adapter's input, in [0, 1). generator: on the CPU, draws A; by default torch's global one.
    Source: Hu et al., LoRA, ICLR 2022, arXiv:2106.09685.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank)
        self.scaling = scaling_of(rank, alpha)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.dropout = dropout
        self.lora_A, self.lora_B = lora_parameters(self.weight, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        path = F.dropout(x, self.dropout, self.training) if self.dropout else x
        y = F.linear(x, self.weight, self.bias)
        return add_product(y, F.linear(path, self.lora_A), self.lora_B, self.scaling)

    def merged_weight(self) -> Tensor:
        change = self.scaling * (precise(self.lora_B) @ precise(self.lora_A))
        return (precise(self.weight) + change).to(self.weight.dtype)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.scaling * self.lora_B


def add_product(y: Tensor, hidden: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """``y + scaling * hidden B^T`` in one operation: y (..., out), hidden (..., r), B (out, r)."""
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, b.shape[1]), b.mT, alpha=scaling)
    return rows.view(y.shape)


def lora_parameters(
    weight: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's start for a weight (out, in): A (rank, in) uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B (out, rank) zero.

    generator: on the CPU; without one torch's global generator draws.
    """
    drawn = torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1
    a = (drawn / math.sqrt(weight.shape[1])).to(weight)
    return nn.Parameter(a), nn.Parameter(weight.new_zeros(weight.shape[0], rank))


def scaling_of(rank: int, alpha: float | None) -> float:
    """``alpha / rank``; 1 where alpha is None."""
    if alpha is None:
        return 1.0
    check_range("alpha", alpha, 0, open_low=True)
    return alpha / rank


def check_rank(rank: int, base: nn.Linear) -> None:
    """Refuse a rank outside [1, min(out, in)]."""
    out_features, in_features = base.weight.shape
    check_integer("rank", rank, 1)
    if rank > min(out_features, in_features):
        raise ArgumentError(
            f"rank = {rank}: must be at most {min(out_features, in_features)} for a layer {in_features} -> {out_features}. "
            "Lower the rank, or leave the layer out of target"
        )


# -- where ------------------------------------------------------------------------------------------------------------
def find_targets(model: nn.Module, target: Target = None) -> dict[str, nn.Linear]:
    """The linear layers that ``target`` means, by their path.

    target: None or ``nn.Linear`` (all), a list of names in the sense of peft's ``target_modules`` (a layer's path, or its
    last parts), one string (a regular expression that fits the whole path), or a function ``(path, module) -> bool``.
    Layers inside an adapter do not count. Raises ``ArgumentError`` where nothing fits, or one of the names does not (with the
    closest), where what fits is not linear, where a weight is shared by two layers, or where torch reads the weight of the layer
    without calling it.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Adapter))
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not f"{name}.".startswith(inside)
    }
    chosen = {name: module for name, module in modules.items() if _fits(name, module, target)}
    linear = {name: module for name, module in chosen.items() if isinstance(module, nn.Linear)}
    if isinstance(target, Sequence) and not isinstance(target, str):
        for wanted in target:
            if not any(_fits(name, module, [wanted]) for name, module in linear.items()):
                _refuse_target(
                    modules, [name for name, module in chosen.items() if _fits(name, module, [wanted])], wanted
                )
    if not linear:
        _refuse_target(modules, list(chosen), target)
    _check_use(modules, linear)
    return linear


def _fits(name: str, module: nn.Module, target: Target) -> bool:
    if target is None:
        return isinstance(module, nn.Linear)
    if isinstance(target, type):
        return isinstance(module, target)
    if isinstance(target, str):
        try:
            return re.fullmatch(target, name) is not None
        except re.error as error:
            raise ArgumentError(
                f"target = {target!r}: must be a regular expression ({error}), or a list of names"
            ) from error
    if callable(target):
        return bool(target(name, module))
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in target)


def _refuse_target(modules: dict[str, nn.Module], chosen: list[str], wanted: Target) -> NoReturn:
    if chosen:
        kind = type(modules[chosen[0]]).__name__
        raise ArgumentError(
            f"target = {wanted!r}: {chosen[0]!r} is {kind}: must be nn.Linear. Name the linear layers in it"
        )
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ArgumentError(f"target = {wanted!r}: the model has no nn.Linear left without an adapter")
    ends = {name.rsplit(".", 1)[-1] for name in linear} | set(linear)
    hint = suggestion(wanted, sorted(ends)) if isinstance(wanted, str) else ""
    more = f" and {len(linear) - 6} more" if len(linear) > 6 else ""
    raise ArgumentError(
        f"target = {wanted!r}: matches no nn.Linear of the model. {hint}{' ' if hint else ''}"
        f"Its linear layers are {', '.join(linear[:6])}{more}"
    )


def _check_use(modules: dict[str, nn.Module], linear: dict[str, nn.Linear]) -> None:
    """Refuse tied weights, and layers whose weight torch uses without calling the layer."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    for name, layer in linear.items():
        own = f"{name}.weight" if name else "weight"
        shared = [other for other in owners.get(id(layer.weight), []) if other != own]
        if shared:
            raise ArgumentError(
                f"target: {own} is tied to {shared[0]}: an adapter on one would untie them. "
                "Leave both out of target, or untie them first"
            )
        parent = modules.get(name.rpartition(".")[0])
        remedy = ""
        if isinstance(parent, nn.MultiheadAttention):
            remedy = "Leave it out of target"
        elif isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            remedy = "Leave it out of target, or call torch.backends.mha.set_fastpath_enabled(False) first"
        if remedy:
            raise ArgumentError(
                f"target: {name!r} belongs to nn.{type(parent).__name__}, which reads its weight without calling it, and would "
                f"pass over the adapter. {remedy}"
            )


def attach(
    model: nn.Module, target: Target, make: Callable[[nn.Linear], nn.Module], *, freeze: bool = True
) -> nn.Module:
    """Put ``make(layer)`` in the place of every target layer, and freeze all parameters outside adapters; return the model.

    The model is changed in place; a model that is itself an ``nn.Linear`` cannot be, and its adapter is returned. An error
    of ``make`` leaves the model as it was. freeze: whether the parameters outside the adapters stop training.
    """
    layers = find_targets(model, target)
    inside = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    outside = {parameter: parameter.requires_grad for parameter in model.parameters() if id(parameter) not in inside}
    try:
        made = {name: make(layer) for name, layer in layers.items()}
    except Exception:
        for parameter, trained in outside.items():
            parameter.requires_grad_(trained)
        raise
    for name, adapter in made.items():
        model = put(model, name, adapter.train(layers[name].training))
    for parameter in outside:
        parameter.requires_grad_(parameter.requires_grad and not freeze)
    return model


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at ``path``; return the model, which is ``module`` where the path is empty."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by path. Raises ``ArgumentError`` where there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not found:
        raise ArgumentError(
            f"model = {type(model).__name__}: has no adapters. Were they merged already? Attach them first"
        )
    return found


# -- merged, and back -------------------------------------------------------------------------------------------------
def merge_adapters(model: nn.Module) -> nn.Module:
    """Put a plain ``nn.Linear`` with the merged weight in the place of every adapter; return the model.

    Raises ``ArgumentError`` where there are no adapters, as when merging twice.
    """
    for name, adapter in adapters_of(model).items():
        model = put(model, name, adapter.merge())
    return model


def detach_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters off: plain layers with the original weights; return the model."""
    for name, adapter in adapters_of(model).items():
        model = put(model, name, adapter.linear(adapter.original_weight()))
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The merged model inside the block, for fast inference; the adapters are back after it."""
    held = adapters_of(model)
    try:
        yield merge_adapters(model)
    finally:
        for name, adapter in held.items():
            put(model, name, adapter)


@dataclass(frozen=True)
class TrainableReport:
    """How many parameters train, of how many; ``layers`` has the numbers of each adapter."""

    trainable: int
    total: int
    layers: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"trainable parameters: {self.trainable:,} of {self.total:,} ({share:.2f} %), {len(self.layers)} adapters"
        )


def trainable_report(model: nn.Module) -> TrainableReport:
    """Numbers of trainable and of all parameters, in peft's way of counting: every parameter once."""
    parameters = list(model.parameters())
    layers = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }
    return TrainableReport(
        sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters), layers
    )


# -- files ------------------------------------------------------------------------------------------------------------
def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapters alone into one safetensors file: what they train, their buffers, and the kind and shape of each."""
    from safetensors.torch import save_file

    found = adapters_of(unwrapped(model))
    tensors = {
        f"{name}.{key}": _copy(tensor) for name, adapter in found.items() for key, tensor in _own(adapter).items()
    }
    about = {name: _about(adapter) for name, adapter in found.items()}
    save_file(tensors, path, metadata={"format": FORMAT, "adapters": json.dumps(about)})


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Read what ``save_adapter`` wrote into a model with the same adapters attached; return the model.

    Raises ``DataError`` for a file that was saved for another base (other layers, shapes or kinds of adapter), or is none.
    """
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path}: was not written by save_adapter. A folder of peft's is read by import_peft")
    about, mine = json.loads(metadata["adapters"]), adapters_of(unwrapped(model))
    for name, there in about.items():
        if name not in mine:
            raise DataError(
                f"{path}: has an adapter for {name!r}, where the model has none. {suggestion(name, list(mine))}"
            )
        if there != _about(mine[name]):
            raise DataError(
                f"{path}: was saved for another base: {name!r} is {there} there and {_about(mine[name])} here"
            )
    for name, adapter in mine.items():
        if name not in about:
            raise DataError(f"{path}: has nothing for the adapter of {name!r}. Attach adapters to the same layers")
        for key, tensor in _own(adapter).items():
            saved = tensors.get(f"{name}.{key}")
            if saved is None or saved.shape != tensor.shape:
                shape = None if saved is None else tuple(saved.shape)
                raise DataError(
                    f"{path}: {name}.{key} is {shape} there and {tuple(tensor.shape)} here. Use the same rank"
                )
    with torch.no_grad():
        for name, adapter in mine.items():
            original = adapter.original_weight().clone()
            for key, tensor in _own(adapter).items():
                tensor.copy_(tensors[f"{name}.{key}"])
            adapter.rebase(original)
    return model


def export_peft(
    model: nn.Module, path: str | Path, *, tensors_of: Callable[[Adapter], dict[str, Tensor]] | None = None
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, path)`` loads over the ORIGINAL model, with equal outputs.

    ``adapter_model.safetensors`` and ``adapter_config.json``, with the exact paths as ``target_modules``. Adapters that start from
    their weight's principal part are written as rank 2r over the original weight. tensors_of: what peft is to hold for an adapter,
    by default its ``peft_tensors()``.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    found = adapters_of(model)
    if "" in found:
        raise ArgumentError(
            "model is an adapter itself, for which peft has no path. Wrap the layer: nn.Sequential(layer)"
        )
    if any(adapter.peft_config != next(iter(found.values())).peft_config for adapter in found.values()):
        raise ArgumentError(
            "model: has adapters of kinds that one peft configuration cannot hold. Export them separately"
        )
    tensors, ranks = {}, {}
    for name, adapter in found.items():
        theirs = adapter.peft_tensors() if tensors_of is None else tensors_of(adapter)
        ranks[name] = len(theirs["lora_A.weight"])
        for key, tensor in theirs.items():
            tensors[f"base_model.model.{name}.{key}"] = _copy(tensor.to(adapter.weight.dtype))
    # peft reads a name as the end of a path, and takes the first pattern that fits: so the longest comes first.
    pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)} if len({*ranks.values()}) > 1 else {}
    ends = tuple(f".{name}" for name in found)
    ambiguous = any(name.endswith(ends) for name, _ in model.named_modules() if name not in found)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": mode(ranks.values()),
        "lora_alpha": mode(ranks.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": "|".join(map(re.escape, found)) if ambiguous else list(found),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        **next(iter(found.values())).peft_config,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_peft(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach the LoRA of a folder that peft saved, as ``LoRALinear`` layers; return the model.

    Raises ``DataError`` where the folder is none, holds a pickle only, something other than plain LoRA, or does not fit.
    """
    folder = Path(path)
    config = json.loads(checked_file(folder / "adapter_config.json").read_text(encoding="utf-8"))
    pickle = folder / "adapter_model.bin"
    tensors, _ = _read(pickle if pickle.exists() else folder / "adapter_model.safetensors")
    plain = {"peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None)}
    plain["init_lora_weights"] = (True, False, None, "gaussian", "eva")  # the others change the base's weight
    for key, values in plain.items():
        if config.get(key) not in values:
            raise DataError(
                f"{folder}: {key} = {config.get(key)!r}: only plain LoRA over the base's own weight can be read"
            )
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            raise DataError(f"{folder}: holds {key!r}, which plain LoRA does not have")
        factors.setdefault(match[1], {})[match[2]] = tensor
    linear = {name: module for name, module in unwrapped(model).named_modules() if isinstance(module, nn.Linear)}
    for name, pair in factors.items():
        if name not in linear:
            raise DataError(
                f"{folder}: is for {name!r}, which is no linear layer here. {suggestion(name, list(linear))}"
            )
        if len(pair) < 2:
            raise DataError(f"{folder}: holds one of the two factors of {name!r}")
        there, here = (pair["lora_B"].shape[0], pair["lora_A"].shape[1]), tuple(linear[name].weight.shape)
        if there != here:
            raise DataError(f"{folder}: was saved for another base: {name!r} is {there} there and {here} here")
    names = {id(linear[name]): name for name in factors}

    def make(layer: nn.Linear) -> LoRALinear:
        name = names[id(layer)]
        a, b = factors[name]["lora_A"], factors[name]["lora_B"]
        patterns = config.get("alpha_pattern") or {}
        alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), config["lora_alpha"])
        adapter = LoRALinear(layer, len(a), alpha=alpha * math.sqrt(len(a)) if config.get("use_rslora") else alpha)
        with torch.no_grad():
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b)
        return adapter

    return attach(model, lambda _, module: id(module) in names, make)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``DistributedDataParallel`` and ``torch.compile``, whose paths are those of its file."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def checked_file(path: str | Path) -> Path:
    """The path of an existing file that is no pickle. Raises ``DataError``."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise DataError(f"{path}: may be a pickle, which can run code when it is read. Save it as safetensors")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checked_file(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: is no safetensors file ({error})") from error


def _own(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of an adapter but the layer's weight and bias."""
    return {key: t for key, t in adapter.state_dict(keep_vars=True).items() if key not in ("weight", "bias")}


def _about(adapter: Adapter) -> dict[str, Any]:
    return {"kind": type(adapter).__name__, "shape": [adapter.out_features, adapter.in_features]}


def _copy(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, as safetensors wants it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
