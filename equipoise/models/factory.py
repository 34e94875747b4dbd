"""``build``: a reference model by name, or the user's own by ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from equipoise.errors import ArgumentError, check_integer, suggestion
from equipoise.models.reference import MLP, ConvNet, Linear

_REFERENCE: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": ConvNet, "linear": Linear}
NAMES = tuple(_REFERENCE)
Shape = tuple[int, ...] | dict[str, tuple[int, ...]]


def build(
    name: str, input_shape: Sequence[int] | Mapping[str, Sequence[int]], num_outputs: int, seed: int = 0
) -> nn.Module:
    """A new model whose initial weights follow from ``seed``; PyTorch's global random state stays as it was.

    name: "mlp", "cnn", "linear", or "package.module:factory" for a function or class of the user's. The module is imported
        with the working directory on the path. The factory is called with ``input_shape`` (a tuple without the batch axis)
        and ``num_outputs``: by name if its signature has these names, else by position if it takes two arguments, or with
        nothing if it takes none. Other arguments need defaults.
    input_shape: for a factory, also the shapes of several inputs by their name; it is then called with ``input_shapes``.

    Raises ``ArgumentError`` where the name, the module, the factory or what it returns is not usable.
    """
    check_integer("num_outputs", num_outputs, 1)
    check_integer("seed", seed, 0)
    shape = _plain(input_shape)
    with _working_directory_on_path():
        # Imported first: a module that draws numbers as it is imported does so only once.
        with _seeded(0):
            factory = _import(name) if ":" in name else _reference(name)
        with _seeded(seed):
            return _call(name, factory, shape, num_outputs) if ":" in name else factory(shape, num_outputs)


def _plain(shape: Sequence[int] | Mapping[str, Sequence[int]]) -> Shape:
    if isinstance(shape, Mapping):
        return {name: tuple(int(side) for side in sides) for name, sides in shape.items()}
    return tuple(int(side) for side in shape)


@lru_cache
def source_digest(name: str) -> str:
    """Digest of the source of the module that holds the factory "package.module:factory"; "" where it has none.

    Results of a model that was edited must not be taken for those of the model as it is. What the module imports is not seen.
    """
    with _working_directory_on_path():
        _import(name)
    try:
        text = inspect.getsource(sys.modules[name.partition(":")[0]])
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reference(name: str) -> Callable[..., nn.Module]:
    if name not in _REFERENCE:
        names = ", ".join(map(repr, NAMES))
        hint = suggestion(name, NAMES)
        raise ArgumentError(f"model = {name!r}: must be one of {names}, or 'package.module:factory'. {hint}".rstrip())
    return _REFERENCE[name]


def _import(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = (
            isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}.")
        )
        if absent or not module_name:
            raise ArgumentError(
                f"model = {name!r}: there is no module {module_name!r}. Run from the folder that holds it, or install it"
            ) from error
        raise ArgumentError(f"model = {name!r}: importing {module_name} failed: {_told(error)}") from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            near = suggestion(part, [known for known in dir(factory) if not known.startswith("_")])
            raise ArgumentError(f"model = {name!r}: {module_name} has no {attribute!r}. {near}".rstrip())
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(
            f"model = {name!r}: is a {type(factory).__name__}: must be a function or class that makes a new model at each call"
        )
    return factory


def _call(name: str, factory: Callable[..., Any], shape: Shape, num_outputs: int) -> nn.Module:
    args, kwargs = _arguments(name, factory, shape, num_outputs)
    try:
        model = factory(*args, **kwargs)
    except Exception as error:
        raise ArgumentError(
            f"model = {name!r}: failed for {_argument(shape)}={shape}, num_outputs={num_outputs}: {_told(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model = {name!r}: returned {type(model).__name__}: must return a torch.nn.Module")
    return model


def _arguments(
    name: str, factory: Callable[..., Any], shape: Shape, num_outputs: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How to call the factory: see ``build``."""
    given = {_argument(shape): shape, "num_outputs": num_outputs}
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError:  # some built-in callables tell no signature
        return (shape, num_outputs), {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    named = {p.name: given[p.name] for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name in given}
    required = [p for p in parameters if p.default is p.empty]
    if all(p.name in named for p in required):
        return (), given if takes_any else named
    by_position = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if not named and all(p in by_position for p in required) and 2 in (len(required), len(by_position)):
        return (shape, num_outputs), {}
    raise ArgumentError(
        f"model = {name!r}: has the signature {inspect.signature(factory)}: must take {_argument(shape)} and num_outputs, or two "
        "arguments, or none; give defaults to all others"
    )


def _argument(shape: Shape) -> str:
    return "input_shapes" if isinstance(shape, dict) else "input_shape"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's generators start from ``seed`` inside, and go on outside as if nothing had been drawn."""
    # A CUDA that is not in use yet must not be woken, and torch.manual_seed would leave a seed waiting for it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
