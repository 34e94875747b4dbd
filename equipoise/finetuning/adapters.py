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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, DataError, check_integer, check_range, suggestion

Target = type[nn.Module] | Sequence[str] | str | Callable[[str, nn.Module], bool] | None
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
        self.out_features, self.in_features = base.weight.shape
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
    dropout: on the adapter's input, in [0, 1). Source: Hu et al., LoRA, ICLR 2022, arXiv:2106.09685.
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
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(path, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.scaling * self.lora_B


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
    Layers inside an adapter do not count. Raises ``ArgumentError`` where nothing fits (with the closest name), where a name
    means no linear layer, where a weight is shared by two layers, or where torch's attention reads the layer's weight itself.
    """
    modules: dict[str, nn.Module] = {}
    inside = [name for name, module in model.named_modules() if isinstance(module, Adapter)]
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(name == outer or name.startswith(f"{outer}.") for outer in inside):
            modules[name] = module
    chosen = {name: module for name, module in modules.items() if _fits(name, module, target)}
    linear = {name: module for name, module in chosen.items() if isinstance(module, nn.Linear)}
    if not linear:
        _refuse_target(modules, chosen, target)
    _check_use(modules, linear)
    return linear


def _fits(name: str, module: nn.Module, target: Target) -> bool:
    if target is None:
        return isinstance(module, nn.Linear)
    if isinstance(target, type):
        return isinstance(module, target)
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    if callable(target):
        return bool(target(name, module))
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in target)


def _refuse_target(modules: dict[str, nn.Module], chosen: dict[str, nn.Module], target: Target) -> None:
    if chosen:
        name, module = next(iter(chosen.items()))
        raise ArgumentError(
            f"target = {target!r}: {name!r} is {type(module).__name__}: must be nn.Linear. Name the linear layers in it"
        )
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        adapted = any(isinstance(module, Adapter) for module in modules.values()) or isinstance(
            modules.get(""), Adapter
        )
        raise ArgumentError(
            f"target = {target!r}: the model has no nn.Linear" + (" left without an adapter" if adapted else "")
        )
    ends = sorted({name.rsplit(".", 1)[-1] for name in linear} | set(linear))
    wanted = target if isinstance(target, str) else next(iter(target), "") if isinstance(target, Sequence) else ""
    hint = suggestion(wanted, ends) if wanted else ""
    raise ArgumentError(
        f"target = {target!r}: matches no nn.Linear of the model. {hint} Its linear layers are "
        f"{', '.join(linear[:6])}{f' and {len(linear) - 6} more' if len(linear) > 6 else ''}".replace("  ", " ")
    )


def _check_use(modules: dict[str, nn.Module], linear: dict[str, nn.Linear]) -> None:
    """Refuse tied weights, and layers whose weight torch's attention uses without calling the layer."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if key == "weight":
                owners.setdefault(id(parameter), []).append(name)
    for name, layer in linear.items():
        shared = [other for other in owners[id(layer.weight)] if other != name]
        if shared:
            raise ArgumentError(
                f"target: the weight of {name!r} is tied to {shared[0]!r}: an adapter on one would untie them. "
                "Leave both out of target, or untie them first"
            )
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ArgumentError(
                f"target: {name!r} belongs to nn.MultiheadAttention, which reads its weight without calling it. "
                "Leave it out of target"
            )


def attach(
    model: nn.Module, target: Target, make: Callable[[nn.Linear], nn.Module], *, freeze: bool = True
) -> nn.Module:
    """Put ``make(layer)`` in the place of every target layer, and freeze all other parameters; return the model.

    The model is changed in place; a model that is itself an ``nn.Linear`` cannot be, and its adapter is returned. All
    adapters are made before the first is put in, so that an error leaves the model as it was. freeze: whether the parameters
    outside the adapters stop training.
    """
    made = {name: make(layer) for name, layer in find_targets(model, target).items()}
    if freeze:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for name, adapter in made.items():
        adapter.train(model.training)
        model = put(model, name, adapter)
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
    """The merged model inside the block, for fast inference; the adapters are back after it.

    Not for a model that is itself an adapter."""
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

    tensors, about = {}, {}
    for name, adapter in adapters_of(model).items():
        about[name] = {"kind": type(adapter).__name__, "shape": [adapter.out_features, adapter.in_features]}
        for key, tensor in _own(adapter).items():
            tensors[f"{name}.{key}"] = tensor.detach().contiguous()
    save_file(tensors, path, metadata={"format": "equipoise-adapter", "adapters": json.dumps(about)})


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Read what ``save_adapter`` wrote into a model with the same adapters attached; return the model.

    Raises ``DataError`` for a file that was saved for another base (other layers, shapes or kinds of adapter), or is none.
    """
    from safetensors import SafetensorError, safe_open

    path = checked_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: is no safetensors file ({error})") from error
    if metadata.get("format") != "equipoise-adapter":
        raise DataError(f"{path}: was not written by save_adapter. A folder of peft's is read by import_peft")
    about, mine = json.loads(metadata["adapters"]), adapters_of(model)
    for name, told in about.items():
        if name not in mine:
            raise DataError(
                f"{path}: has an adapter for {name!r}, where the model has none. {suggestion(name, list(mine))}"
            )
        adapter = mine[name]
        here = {"kind": type(adapter).__name__, "shape": [adapter.out_features, adapter.in_features]}
        if told != here:
            raise DataError(f"{path}: was saved for another base: {name!r} is {told} there and {here} here")
    missing = [name for name in mine if name not in about]
    if missing:
        raise DataError(f"{path}: has nothing for the adapter of {missing[0]!r}. Attach adapters to the same layers")
    with torch.no_grad():
        for name, adapter in mine.items():
            for key, tensor in _own(adapter).items():
                saved = tensors.get(f"{name}.{key}")
                if saved is None or saved.shape != tensor.shape:
                    there = None if saved is None else tuple(saved.shape)
                    raise DataError(
                        f"{path}: {name}.{key} has the shape {there}, but {tuple(tensor.shape)} here. Use the same rank"
                    )
        for name, adapter in mine.items():
            original = adapter.original_weight().clone()
            for key, tensor in _own(adapter).items():
                tensor.copy_(tensors[f"{name}.{key}"])
            adapter.rebase(original)
    return model


def _own(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of an adapter but the layer's weight and bias."""
    return {key: t for key, t in adapter.state_dict(keep_vars=True).items() if key not in ("weight", "bias")}


def checked_file(path: str | Path) -> Path:
    """The path of an existing file that is no pickle. Raises ``DataError``."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise DataError(f"{path}: may be a pickle, which can run code when it is read. Save it as safetensors")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def export_peft(model: nn.Module, path: str | Path) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, path)`` loads over the ORIGINAL model, with equal outputs.

    ``adapter_model.safetensors`` and ``adapter_config.json``, with the exact paths as ``target_modules``. Adapters that start from
    their weight's principal part are written as rank 2r over the original weight.
    """
    from safetensors.torch import save_file

    found = adapters_of(model)
    told = {json.dumps(adapter.peft_config, sort_keys=True) for adapter in found.values()}
    if len(told) > 1:
        raise ArgumentError(
            "model: has adapters of kinds that one peft configuration cannot hold. Export them separately"
        )
    tensors, ranks = {}, {}
    for name, adapter in found.items():
        for key, tensor in adapter.peft_tensors().items():
            tensors[f"base_model.model.{name}.{key}"] = tensor.detach().to(adapter.weight.dtype).contiguous().clone()
        ranks[name] = len(adapter.peft_tensors()["lora_A.weight"])
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": list(found),
        "rank_pattern": others,
        "alpha_pattern": others,
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
    from safetensors.torch import load_file

    folder = Path(path)
    config_path, tensors_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not tensors_path.exists() and (folder / "adapter_model.bin").exists():
        checked_file(folder / "adapter_model.bin")
    tensors, config = load_file(checked_file(tensors_path)), json.loads(checked_file(config_path).read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise DataError(
            f"{folder}: holds {config.get('peft_type')} with options beyond plain LoRA, which cannot be read"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            raise DataError(f"{folder}: holds {key!r}, which plain LoRA does not have")
        factors.setdefault(match[1], {})[match[2]] = tensor
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, pair in factors.items():
        if name not in linear:
            raise DataError(
                f"{folder}: is for {name!r}, which is no linear layer here. {suggestion(name, list(linear))}"
            )
        there, here = (pair["lora_B"].shape[0], pair["lora_A"].shape[1]), tuple(linear[name].weight.shape)
        if there != here:
            raise DataError(f"{folder}: was saved for another base: {name!r} is {there} there and {here} here")

    def alpha_of(name: str, rank: int) -> float:
        fitting = [v for k, v in (config.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({k})", name)]
        alpha = float(fitting[0] if fitting else config["lora_alpha"])
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

    made = {}
    for name, pair in factors.items():
        rank = len(pair["lora_A"])
        adapter = LoRALinear(linear[name], rank, alpha=alpha_of(name, rank))
        with torch.no_grad():
            adapter.lora_A.copy_(pair["lora_A"])
            adapter.lora_B.copy_(pair["lora_B"])
        made[id(linear[name])] = adapter
    return attach(model, lambda name, _: name in factors, lambda layer: made[id(layer)])
