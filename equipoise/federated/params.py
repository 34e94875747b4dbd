"""Parameters as ``dict[str, Tensor]``: the vector operations of federated methods, and the way to a model and back.

Operations take whole lists of tensors to ``torch._foreach_*`` in one call, and return new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, refuse

Params = dict[str, Tensor]
GradFn = Callable[[Params], Params]  # gradient of one minibatch at given parameters, without side effects


def check_same(params: Params, like: Params, name: str = "params") -> None:
    """Refuse parameters whose names or shapes differ from those of ``like``. Their order does not matter."""
    if params.keys() != like.keys():
        missing, extra = sorted(like.keys() - params.keys()), sorted(params.keys() - like.keys())
        said = ", ".join(f"{what} {names[:3]}" for what, names in (("lacks", missing), ("has also", extra)) if names)
        raise ArgumentError(
            f"{name}: the names of the parameters differ ({said}). All clients must train the same model"
        )
    for key, tensor in params.items():
        if tensor.shape != like[key].shape:
            shapes = tuple(tensor.shape), tuple(like[key].shape)
            raise ArgumentError(f"{name}[{key!r}] has the shape {shapes[0]}: must be {shapes[1]}")


def _lists(first: Params, *others: Params) -> list[list[Tensor]]:
    for other in others:
        check_same(other, first)
    return [list(first.values()), *([other[key] for key in first] for other in others)]


def _named(like: Params, tensors: Sequence[Tensor]) -> Params:
    return dict(zip(like, tensors, strict=True))


def plus(a: Params, b: Params, scale: float = 1.0) -> Params:
    """``a + scale * b``."""
    left, right = _lists(a, b)
    return _named(a, torch._foreach_add(left, right, alpha=scale)) if a else {}


def add_(a: Params, b: Params, scale: float = 1.0) -> Params:
    """``a + scale * b`` in the memory of ``a``, which is returned."""
    left, right = _lists(a, b)
    if a:
        torch._foreach_add_(left, right, alpha=scale)
    return a


def minus(a: Params, b: Params) -> Params:
    """``a - b``."""
    return plus(a, b, -1.0)


def times(a: Params, scale: float) -> Params:
    """``scale * a``."""
    return _named(a, torch._foreach_mul(list(a.values()), scale)) if a else {}


def zeros(like: Params) -> Params:
    """Zeros of the same names, shapes and types."""
    return {key: torch.zeros_like(tensor) for key, tensor in like.items()}


def copy(params: Params) -> Params:
    """The same numbers in memory of their own."""
    return {key: tensor.detach().clone() for key, tensor in params.items()}


def norm(params: Params) -> Tensor:
    """2-norm over all parameters jointly, ()."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(params.values()))))


def is_finite(params: Params) -> bool:
    """Whether no number is NaN or infinite."""
    floating = [tensor for tensor in params.values() if tensor.is_floating_point() and tensor.numel()]
    # The 2-norm is the faster one, but overflows where numbers are finite; then the largest of them decides.
    return not floating or any(
        bool(torch.stack(torch._foreach_norm(floating, ord=order)).isfinite().all()) for order in (2, torch.inf)
    )


def normalised(weights: Sequence[float] | None, count: int, name: str = "weights") -> list[float]:
    """Weights with the sum 1, equal ones by default. Raises ``ArgumentError`` for negative ones or a sum of 0."""
    if not count:
        raise ArgumentError("updates = []: there is nothing to average. At least one client must have answered")
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = sum(values)
    if len(values) != count or not total > 0 or min(values) < 0 or total == float("inf"):
        refuse(name, weights, f"be {count} numbers >= 0 with a positive sum")
    return [value / total for value in values]


def weighted_mean(params: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """``sum_i w_i params_i / sum_i w_i``; by default every w_i is 1. Raises ``ArgumentError`` as ``normalised`` and ``check_same``.

    Integers (the counters of BatchNorm, say) are averaged in float64 and rounded; booleans must agree, and the first is kept.
    """
    shares = normalised(weights, len(params))
    first = params[0]
    for number, other in enumerate(params[1:], 1):
        check_same(other, first, f"params[{number}]")
    floating = [key for key, tensor in first.items() if tensor.is_floating_point()]
    mean = list(torch._foreach_mul([first[key] for key in floating], shares[0])) if floating else []
    for share, other in zip(shares[1:], params[1:], strict=True):
        if floating:
            torch._foreach_add_(mean, [other[key] for key in floating], alpha=share)
    found = dict(zip(floating, mean, strict=True))
    for key, tensor in first.items():
        if tensor.dtype == torch.bool:
            found[key] = tensor.clone()
        elif key not in found:
            total = sum(share * other[key].double() for share, other in zip(shares, params, strict=True))
            found[key] = torch.as_tensor(total).round().to(tensor.dtype)
    return {key: found[key] for key in first}


def stack(params: Sequence[Params]) -> Tensor:
    """One row (D,) for each of p updates: (p, D), in the order of the first one's names."""
    normalised(None, len(params))
    for number, other in enumerate(params[1:], 1):
        check_same(other, params[0], f"params[{number}]")
    first = torch.cat([tensor.reshape(-1) for tensor in params[0].values()])
    rows = first.new_empty(len(params), len(first))
    rows[0] = first
    for row, other in zip(rows[1:], params[1:], strict=True):
        torch.cat([other[key].reshape(-1) for key in params[0]], out=row)
    return rows


def unstack(vector: Tensor, like: Params) -> Params:
    """The inverse of ``stack`` for one row (D,): names, shapes and types of ``like``."""
    sizes = [tensor.numel() for tensor in like.values()]
    if vector.shape != (sum(sizes),):
        refuse("vector", tuple(vector.shape), f"have the shape ({sum(sizes)},)")
    parts = vector.split(sizes)
    return {
        key: part.reshape(tensor.shape).to(tensor.dtype)
        for (key, tensor), part in zip(like.items(), parts, strict=True)
    }


def state_of(model: nn.Module) -> tuple[Params, Params]:
    """Copies of what a model learns (its parameters that require gradients), and of all else in its ``state_dict``."""
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not learned:
        raise ArgumentError("model has no parameter that requires a gradient: there is nothing to train")
    state = copy(model.state_dict())
    return {k: v for k, v in state.items() if k in learned}, {k: v for k, v in state.items() if k not in learned}


@torch.no_grad()
def load(model: nn.Module, *parts: Params) -> None:
    """Copy tensors into the model's parameters and buffers of the same names. Raises ``ArgumentError`` for others."""
    target = model.state_dict()
    for part in parts:
        if unknown := part.keys() - target.keys():
            raise ArgumentError(
                f"params: the model has no {sorted(unknown)[0]!r}. Both sides must build the same model"
            )
        check_same(part, {key: target[key] for key in part})
        if part:
            torch._foreach_copy_([target[key] for key in part], list(part.values()))


def size(params: Params) -> int:
    """Bytes of the numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def descend(
    params: Params,
    direction: Params,
    *,
    lr: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    momentum: float = 0.0,
    velocity: Params | None = None,
) -> Params:
    """The step that all local optimizers share: ``w - lr (clip(q) + weight_decay w)`` for a direction q.

    ``clip(q) = q min(1, clip_norm / (||q|| + 1e-6))``, over all parameters jointly. With momentum, ``velocity`` is updated in
    place, ``v <- momentum v + clip(q) + weight_decay w``, and takes the place of the bracket. Raises ``ArgumentError``: lr <= 0,
    clip_norm <= 0.
    """
    if not lr > 0:
        refuse("lr", lr, "be a number > 0")
    if clip_norm is not None and not clip_norm > 0:
        refuse("clip_norm", clip_norm, "be a number > 0, or None")
    weights, steps = _lists(params, direction)
    if clip_norm is not None:
        factor = (clip_norm / (norm(direction) + 1e-6)).clamp(max=1.0)
        steps = list(torch._foreach_mul(steps, factor))
    if weight_decay and clip_norm is not None:
        torch._foreach_add_(steps, weights, alpha=weight_decay)  # they are our own
    elif weight_decay:
        steps = list(torch._foreach_add(steps, weights, alpha=weight_decay))
    if momentum and velocity is not None:
        moving = [velocity[key] for key in params]
        torch._foreach_mul_(moving, momentum)
        torch._foreach_add_(moving, steps)
        steps = moving
    return _named(params, torch._foreach_add(weights, steps, alpha=-lr))
