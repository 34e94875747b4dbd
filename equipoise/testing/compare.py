"""Copies of state, and the first difference between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def snapshot(value: Any) -> Any:
    """A copy, on the CPU, that later training cannot change. Containers are walked, tensors cloned, all else kept."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value) if type(value) in (list, tuple) else list(value)
    return value


def difference(a: Any, b: Any, tolerance: float | None = None, where: str = "") -> str | None:
    """Where and how ``a`` and ``b`` first differ, in words; None if they are equal.

    tolerance: None compares bits (NaN equals NaN); else numbers may differ by ``tolerance * max(1, largest magnitude)``.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensors(a, b, tolerance, where)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return (
                f"{where or 'state'} has the keys {sorted(map(str, a))} in one and {sorted(map(str, b))} in the other"
            )
        found = (difference(a[key], b[key], tolerance, f"{where}[{key!r}]" if where else str(key)) for key in a)
        return next((text for text in found if text), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where or 'state'} has {len(a)} entries in one and {len(b)} in the other"
        found = (difference(x, y, tolerance, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((text for text in found if text), None)
    if isinstance(a, float) and isinstance(b, float):
        same = a == b or (a != a and b != b)
        if tolerance is not None:
            same = same or abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
    else:
        same = type(a) is type(b) and bool(a == b)
    return None if same else f"{where or 'value'} is {a!r} in one and {b!r} in the other"


def _tensors(a: Tensor, b: Tensor, tolerance: float | None, where: str) -> str | None:
    name = where or "tensor"
    if a.shape != b.shape or (tolerance is None and a.dtype != b.dtype):
        return f"{name} is {a.dtype} {tuple(a.shape)} in one and {b.dtype} {tuple(b.shape)} in the other"
    if not a.numel():
        return None
    a, b = a.detach().cpu(), b.detach().cpu()
    equal = (a == b) | ((a != a) & (b != b))
    if bool(equal.all()):
        return None
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"{name} differs in {int((~equal).sum())} of {a.numel()} entries"
    gap = (a.double() - b.double()).abs().masked_fill(equal, 0.0)
    largest = float(gap.max())
    scale = max(1.0, float(a.double().nan_to_num(0, 0, 0).abs().max()))
    if tolerance is not None and largest <= tolerance * scale:
        return None
    return f"{name} differs by up to {largest:.3g} (in {int((~equal).sum())} of {a.numel()} entries)"


def fingerprint(value: Any, depth: int = 4) -> Any:
    """Something that changes when plain data changes: numbers, strings, tensors, arrays, containers and modules of them.

    Anything else is represented by its identity.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), value.detach().cpu().reshape(-1).tolist())
    if isinstance(value, torch.nn.Module):
        return (id(value), fingerprint(dict(value.state_dict()), depth - 1))
    if isinstance(value, torch.Generator):
        return (id(value), value.get_state().tolist())
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return ("array", value.tobytes())
    if depth and isinstance(value, Mapping):
        return ("mapping", [(repr(key), fingerprint(item, depth - 1)) for key, item in value.items()])
    if depth and isinstance(value, list | tuple | set | frozenset):
        return (type(value).__name__, [fingerprint(item, depth - 1) for item in value])
    return id(value)
