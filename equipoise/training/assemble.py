"""What a run is made of, checked and put together: hooks, devices, classes, optimizer, schedule."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import RandomSampler, Sampler

from equipoise.errors import ArgumentError, DataError, MethodConflictError
from equipoise.training.batch import Examples, Inputs
from equipoise.training.method import EXCLUSIVE_HOOKS, HOOKS, Method

if TYPE_CHECKING:
    from accelerate import Accelerator

OptimizerLike = Optimizer | Callable[[Iterable[Any]], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer, int], LRScheduler]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[[Inputs, torch.Generator], Inputs]
SamplerFactory = Callable[[Any, int, torch.Generator], Sampler[int]]
ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def hooks_of(methods: Sequence[Method]) -> dict[str, list[Method]]:
    if isinstance(methods, Method):
        raise ArgumentError(f"methods = {methods!r}: must be a list. Write methods=[{type(methods).__name__}(...)]")
    for method in methods:
        if not isinstance(method, Method):
            given = method.__name__ if isinstance(method, type) else repr(method)
            hint = "Pass an instance: " + given + "(...)" if isinstance(method, type) else ""
            raise ArgumentError(f"methods holds {given}: must hold instances of equipoise.Method. {hint}")
    table = {hook: [method for method in methods if method.overrides(hook)] for hook in HOOKS}
    for hook in EXCLUSIVE_HOOKS:
        if len(table[hook]) > 1:
            names = " and ".join(method.name or type(method).__name__ for method in table[hook])
            what = "replace the task's loss" if hook == "loss" else "decide which examples are drawn"
            raise MethodConflictError(
                f"{names} both {what}; a run can have one of them. Remove one, or train them in separate runs"
            )
    return table


def accelerator_of(given: Accelerator | None) -> Accelerator:
    """The accelerator given, else one that joins the processes of a launcher, also where there are only CPUs."""
    from accelerate import Accelerator

    launched = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = given or Accelerator(cpu=launched > 1 and not torch.accelerator.is_available())
    if launched > 1 and accelerator.num_processes == 1:
        raise ArgumentError(
            f"accelerator sees 1 process, but WORLD_SIZE = {launched}: each process would train by itself. "
            "On CPUs make it with Accelerator(cpu=True)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ArgumentError(
            f"accelerator.gradient_accumulation_steps = {accelerator.gradient_accumulation_steps}: must be 1, accelerate would "
            "scale the loss a second time. Use fit(accumulation=...), or scale the loss in your own loop"
        )
    return accelerator


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(model)`` or ``model.compile()`` was called for the model or a part of it."""
    modules = model.modules()
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules)


def derived_seed(seed: int, name: str) -> int:
    return (seed * 0x9E3779B1 + zlib.crc32(name.encode())) % (2**63)


def classes_of(data: Any, num_classes: int | None) -> tuple[int | None, Tensor | None]:
    """Number of classes and examples of each, from the argument or the data set's ``num_classes`` / ``targets``."""
    targets = getattr(data if isinstance(data, Examples) else getattr(data, "dataset", None), "targets", None)
    if targets is not None:
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            targets = None  # something else of that name (boxes, strings)
    if targets is not None and (targets.ndim == 0 or len(targets) != len(data)):
        targets = None
    if targets is not None and (targets.is_floating_point() or targets.ndim != 1):
        return num_classes or getattr(data, "num_classes", None), None
    known = num_classes or getattr(data, "num_classes", None)
    if targets is None or not len(targets):
        return known, None
    largest = int(targets.max()) + 1
    if known is not None and largest > known:
        raise ArgumentError(
            f"num_classes = {known}: must be at least {largest}, the largest label in the data plus one"
        )
    if int(targets.min()) < 0:
        raise DataError(f"targets holds the class {int(targets.min())}: classes are numbered from 0")
    known = known or largest
    return known, torch.bincount(targets.to(torch.int64), minlength=known)


def random_order(data: Any, batch_size: int, generator: torch.Generator) -> Sampler[int]:
    """The default sampler: every example once, in random order."""
    return RandomSampler(data, generator=generator)


def make_optimizer(given: OptimizerLike, networks: list[nn.Module], before: set[int]) -> Optimizer:
    """The optimizer over all networks; one made by the user gets the parameters that ``prepare`` added."""
    present = {id(p): p for network in networks for p in network.parameters() if p.requires_grad}
    if not isinstance(given, Optimizer):
        if not callable(given):
            raise ArgumentError(f"optimizer = {given!r}: must be a torch Optimizer or return one from parameters")
        optimizer = given(list(present.values()))
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(
                f"optimizer = {type(optimizer).__name__}: must be a torch Optimizer or return one from parameters"
            )
        return optimizer
    held = {id(p) for group in given.param_groups for p in group["params"]}
    if not held & present.keys():
        raise ArgumentError(
            "optimizer holds none of the model's parameters (a method may have replaced them in prepare): pass a function instead, "
            "for instance optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    new = [p for key, p in present.items() if key not in held and key not in before]
    if new:
        given.add_param_group({"params": new})
    return given


def make_scheduler(given: SchedulerLike | None, optimizer: Optimizer, total_steps: int | None) -> LRScheduler | None:
    if isinstance(given, ReduceLROnPlateau):
        raise ArgumentError("scheduler = ReduceLROnPlateau: must be one that is stepped without a metric")
    if given is None or isinstance(given, LRScheduler):
        return given
    if total_steps is None:
        raise ArgumentError(
            "scheduler is a function of the number of steps: give epochs with data and batch_size, or total_steps"
        )
    return make_scheduler(given(optimizer, total_steps), optimizer, total_steps)


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}


def check_output(
    prediction: Tensor, targets: Tensor, loss: LossFunction, num_classes: int | None, own_loss: bool
) -> None:
    """Refuse a prediction whose shape does not fit the targets under ``loss``; ``own_loss``: a method replaces it."""
    rows, soft = len(targets), targets.is_floating_point()
    wrong, wanted = prediction.ndim == 0 or len(prediction) != rows, f"({rows}, ...)"
    elementwise = loss in ELEMENTWISE or isinstance(loss, ELEMENTWISE_MODULES)
    if loss is F.cross_entropy and soft and targets.ndim == 1:
        if not own_loss:
            raise ArgumentError(
                "loss = None: is cross-entropy, but the targets are floating point. Give loss=torch.nn.functional.mse_loss "
                "for values, or int64 targets for classes"
            )
    elif elementwise or (loss is F.cross_entropy and soft):
        wrong, wanted = prediction.shape != targets.shape, f"{tuple(targets.shape)}"
    elif loss is F.cross_entropy:
        classes = num_classes or int(targets.max()) + 1
        wrong = wrong or prediction.ndim != targets.ndim + 1 or prediction.shape[1] < classes
        wanted = f"({rows}, {', '.join(map(str, (classes, *targets.shape[1:])))})"
    if wrong:
        raise ArgumentError(
            f"model output has shape {tuple(prediction.shape)}: must be {wanted} for targets of shape {tuple(targets.shape)}. "
            "Change the model's last layer"
        )
