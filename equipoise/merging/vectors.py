"""What every merging method stands on: models as task vectors, read block by block.

A method is a *plan*: it may look at all task vectors as often as it likes (for thresholds), and then says what becomes of n
entries that stand at one place. It never holds more than a block, so that the same plan merges a matrix in memory, state_dicts,
and files that do not fit into memory (``equipoise.merging.files``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from equipoise.errors import ArgumentError, refuse, suggestion
from equipoise.merging.selection import BLOCK, Blocks, columns

Weigh = Callable[[Tensor], Tensor]  # entries (n, k) to merged entries (k,)
Plan = Callable[[Blocks, int, int], Weigh]  # task vectors in blocks, n, d
State = Mapping[str, Tensor]
Exclude = Callable[[str], bool] | Sequence[str]


def check_task_vectors(task_vectors: Tensor) -> Tensor:
    """Refuse what is no finite floating-point matrix (n >= 1, d >= 2); return it without its graph."""
    if not task_vectors.is_floating_point() or task_vectors.ndim != 2:
        given = f"{task_vectors.dtype} of shape {tuple(task_vectors.shape)}"
        raise ArgumentError(f"task_vectors: must be floating-point numbers (n, d), one row a model, not {given}")
    n, d = task_vectors.shape
    if n < 1 or d < 2:
        raise ArgumentError(f"task_vectors has shape {(n, d)}: must hold at least 1 model of at least 2 entries")
    for row, vector in enumerate(task_vectors):
        if not vector.isfinite().all():
            raise ArgumentError(f"task_vectors[{row}] holds NaN or infinite values: leave this model out, or repair it")
    return task_vectors.detach()


def merge_vectors(plan: Plan, task_vectors: Tensor) -> Tensor:
    """Merge the rows of (n, d) to (d,), of the same dtype and device."""
    task_vectors = check_task_vectors(task_vectors)
    blocks = columns(task_vectors)
    with torch.no_grad():
        weigh = plan(blocks, *task_vectors.shape)
        return torch.cat([weigh(block) for block in blocks()]).to(task_vectors.dtype)


# -- models -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Models:
    """A base and the models fine-tuned from it, checked against each other.

    base, finetuned: tensors by name, in memory or read on demand. names: the tensors that are merged, sorted. aliases: the name
    of the tensor that stands for one tied to it. labels: what messages call the models, the base first.
    """

    base: State
    finetuned: tuple[State, ...]
    names: tuple[str, ...]
    aliases: Mapping[str, str]
    labels: tuple[str, ...]
    dtype: torch.dtype
    size: int

    @property
    def count(self) -> int:
        """Number of fine-tuned models."""
        return len(self.finetuned)

    def blocks(self) -> Iterator[Tensor]:
        """The task vectors in blocks (n, k), the tensors one after the other."""
        for name in self.names:
            yield from self.tensor_blocks(name)

    def tensor_blocks(self, name: str) -> Iterator[Tensor]:
        """The task vectors of one tensor in blocks (n, k), in the working precision."""
        base = self.base[name].detach().reshape(-1)
        tensors = [state[name].detach().reshape(-1) for state in self.finetuned]
        for first in range(0, len(base), BLOCK):
            part = slice(first, first + BLOCK)
            origin = base[part].to(self.dtype)
            yield torch.stack([tensor[part].to(origin) - origin for tensor in tensors])

    def merged(self, name: str, weigh: Weigh) -> Tensor:
        """One tensor of the merged model, of the base's shape, dtype and device."""
        base = self.base[name].detach()
        change = torch.cat([weigh(block) for block in self.tensor_blocks(name)])
        return (base.reshape(-1).to(self.dtype) + change).to(base.dtype).reshape(base.shape)


def check_models(
    base: State, finetuned: Sequence[State], exclude: Exclude = (), labels: Sequence[str] | None = None
) -> Models:
    """Hold the models against each other; refuse those that cannot be merged, before any work is done."""
    if isinstance(finetuned, Mapping):
        raise ArgumentError("finetuned: must be a list of state_dicts, not a single one. Write [finetuned]")
    if len(finetuned) < 1:
        raise ArgumentError("finetuned = []: must hold at least 1 model fine-tuned from the base")
    named = tuple(labels or ("base", *(f"finetuned[{i}]" for i in range(len(finetuned)))))
    keep = kept(list(base), exclude)
    wanted = {name for name in base if keep(name)}
    for label, state in zip(named[1:], finetuned, strict=True):
        theirs = {name for name in state if keep(name)}
        if theirs != wanted:
            _other_keys(label, wanted - theirs, theirs - wanted)
    aliases = _aliases(base)
    names, dtype, size = [], torch.float32, 0
    for name in sorted(wanted):
        origin = base[name]
        if not origin.is_floating_point():
            continue
        _finite(named[0], name, origin)
        for label, state in zip(named[1:], finetuned, strict=True):
            tensor = state[name]
            if tensor.shape != origin.shape:
                _other_shape(label, name, tensor, origin)
            _finite(label, name, tensor)
            if name in aliases and not torch.equal(tensor, state[aliases[name]]):
                raise ArgumentError(
                    f"{label}: {name} is no longer tied to {aliases[name]}, as in the base, and one of the two would be lost. "
                    "Tie them in the model, or untie them in the base (tensor.clone())"
                )
        if name in aliases or not origin.numel():
            continue
        names.append(name)
        size += origin.numel()
        if origin.dtype == torch.float64:
            dtype = torch.float64
    if size == 0:
        raise ArgumentError("exclude: leaves no floating-point tensor to merge; exclude fewer names")
    if size < 2:
        raise ArgumentError(f"{names[0]} is the only entry to merge: there must be at least 2")
    return Models(base, tuple(finetuned), tuple(names), aliases, named, dtype, size)


def merge_state_dicts(plan: Plan, base: State, finetuned: Sequence[State], exclude: Exclude = ()) -> dict[str, Tensor]:
    """The merged state_dict, with the base's keys, dtypes and devices.

    Integer and boolean tensors, and excluded ones, are the base's. Tensors tied in the base count once and stay tied.
    """
    models = check_models(base, finetuned, exclude)
    with torch.no_grad():
        weigh = plan(models.blocks, models.count, models.size)
        merged = {name: models.merged(name, weigh) for name in models.names}
    result = {}
    for name, tensor in base.items():
        source = models.aliases.get(name, name)
        result[name] = merged[source] if source in merged else tensor.detach().clone()
    return result


def task_vector(base: State, finetuned: State, *, exclude: Exclude = ()) -> Tensor:
    """``theta_i - theta_0`` as one vector (d,): keys sorted by name, each tensor flattened, tied ones once.

    float64 if one of the tensors is, else float32 (the difference of two half-precision numbers is none itself).
    Integer, boolean and excluded tensors have no part. Raises ``ArgumentError`` for other keys, shapes, NaN, or nothing left.
    """
    models = check_models(base, [finetuned], exclude)
    return torch.cat([block[0] for block in models.blocks()])


# -- checks -----------------------------------------------------------------------------------------------------------
def kept(names: list[str], exclude: Exclude) -> Callable[[str], bool]:
    """Whether a name is merged. A string excludes a tensor, all that lies below a module, or what a pattern with * matches."""
    if callable(exclude):
        return lambda name: not exclude(name)
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    matches = lambda name, pattern: name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)  # noqa: E731
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parents = {name.rpartition(".")[0] for name in names} - {""}
            hint = suggestion(pattern, [*names, *sorted(parents)])
            refuse("exclude", pattern, "name a tensor of the base, a module, or match one as a pattern", hint)
    return lambda name: not any(matches(name, pattern) for pattern in patterns)


def _aliases(base: State) -> dict[str, str]:
    """The first name, in the sorted order, of a tensor that stands in a state_dict more than once."""
    if not isinstance(base, dict):  # read on demand from a file, where a tensor stands once
        return {}
    first: dict[object, str] = {}
    aliases = {}
    for name in sorted(base):
        tensor = base[name]
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if (owner := first.setdefault(place, name)) != name:
                aliases[name] = owner
    return aliases


def _other_keys(label: str, missing: set[str], extra: set[str]) -> None:
    parts = [
        f"{words} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for words, names in (("lacks", missing), ("has beside the base's tensors", extra))
        if names
    ]
    raise ArgumentError(
        f"{label}: {' and '.join(parts)}: must have the base's architecture. Exclude what belongs to one task (a head)"
    )


def _other_shape(label: str, name: str, tensor: Tensor, origin: Tensor) -> None:
    text = f"{label}: {name} has shape {tuple(tensor.shape)}, and {tuple(origin.shape)} in the base"
    words = ("embed", "wte", "lm_head", "shared.weight")
    if tensor.ndim == origin.ndim == 2 and tensor.shape[1] == origin.shape[1] and any(word in name for word in words):
        raise ArgumentError(
            f"{text}: the model has another vocabulary ({len(tensor)} tokens against {len(origin)}), so another tokenizer. "
            "Merge models that share the base's tokenizer"
        )
    raise ArgumentError(f"{text}: must have the base's architecture. Exclude what belongs to one task (a head)")


def _finite(label: str, name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ArgumentError(f"{label}: {name} holds NaN or infinite values: leave this model out, or repair it")
