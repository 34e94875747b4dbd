"""Two observers of a run: ``Spy``, a method that only records, and ``Watch``, which looks at what a method's hooks leave behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from equipoise.testing.compare import snapshot
from equipoise.training import Batch, Method, Run
from equipoise.training.method import HOOKS

BETWEEN_STEPS = ("prepare", "configure_optimizer", "configure_sampler", "stage_end", "finish")


class Interrupted(Exception):
    """Ends a run on purpose."""


class Spy(Method):
    """Records what the method after it meets. Put it first: what it sees in a step is what the step before left.

    indices: the positions of every batch. steps: parameters and buffers of the model before every batch and at the end.
    model, methods: states at the end, before any other method's ``finish``. replaced: whether parameters were replaced.
    prediction: the model's on the validation data at the end.
    """

    name = "spy"

    def __init__(self) -> None:
        self.stop_at: int | None = None
        self.indices: list[list[int]] = []
        self.steps: list[dict[str, Tensor]] = []
        self.model: dict[str, Any] = {}
        self.methods: list[Any] = []
        self.replaced = False
        self.prediction: Tensor | None = None

    def prepare(self, run: Run) -> None:
        self._weights: dict[str, Tensor] = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        if self.stop_at is not None and run.global_step == self.stop_at:
            raise Interrupted
        self.indices.append([] if batch.index is None else batch.index.tolist())
        self.steps.append(snapshot(self._weights))
        return batch

    def finish(self, run: Run) -> None:
        self.steps.append(snapshot(self._weights))
        self.model = snapshot(dict(run.model.state_dict()))
        self.methods = [snapshot(method.state_dict()) for method in run.methods if method is not self]
        present = {id(p) for p in run.model.parameters()}
        self.replaced = any(id(p) not in present for p in self._weights.values() if isinstance(p, nn.Parameter))
        if run.validation is not None:
            self.prediction = snapshot(run.predict(run.validation, run.model)[0])


class Watch:
    """Surrounds the hooks of one method object and notes what they disturb, in ``seen`` by the name of the check.

    Random numbers drawn inside a module's ``forward`` (dropout) are the module's business; a hook itself must draw none from
    a global generator.
    """

    def __init__(self, method: Method) -> None:
        self.seen: dict[str, str] = {}
        self._expected: Tensor | None = None
        self._hook = ""
        self._depth = 0
        for hook in HOOKS:
            if method.overrides(hook):
                setattr(method, hook, self._surround(hook, getattr(method, hook)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Also follow the modules' ``forward``, inside the block."""
        before = torch_module.register_module_forward_pre_hook(self._enter)
        after = torch_module.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _surround(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def surrounded(run: Run, *arguments: Any) -> Any:
            versions = [_versions(argument) for argument in arguments]
            modes = _modes(run)
            python, numpy = random.getstate(), _numpy_state()
            self._hook, self._expected, self._depth = hook, torch.get_rng_state(), 0
            result = function(run, *arguments)
            self._compare_random(torch.get_rng_state())
            self._expected = None
            if python != random.getstate():
                self._note("random-state", f"{hook} draws from Python's global random generator")
            if numpy != _numpy_state():
                self._note("random-state", f"{hook} draws from numpy's global random generator")
            for argument, earlier in zip(arguments, versions, strict=True):
                for name, version in _versions(argument).items():
                    if name not in earlier or earlier[name] != version:
                        self._note("batch-unchanged", f"{hook} changes {name} in place")
            for name, value in _modes(run).items():
                process_wide = name.startswith("torch.")
                if (process_wide or hook not in BETWEEN_STEPS) and name in modes and modes[name] != value:
                    self._note("modes", f"{hook} leaves {name} = {value} (it was {modes[name]})")
            return result

        return surrounded

    def _note(self, check: str, text: str) -> None:
        self.seen.setdefault(check, text)

    def _compare_random(self, state: Tensor) -> None:
        if self._expected is not None and not torch.equal(self._expected, state):
            self._note("random-state", f"{self._hook} draws from torch's global random generator")

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if self._expected is not None and self._depth == 0:
            self._compare_random(torch.get_rng_state())
        self._depth += 1

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._depth -= 1
        if self._expected is not None and self._depth == 0:
            self._expected = torch.get_rng_state()


def leftover_hooks(model: nn.Module) -> list[str]:
    """Names of modules and parameters of ``model`` that carry hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [name or "the model" for name, m in model.named_modules() if any(getattr(m, kind, None) for kind in kinds)]
    of_tensors = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return found + [name for name, p in model.named_parameters() if any(getattr(p, kind, None) for kind in of_tensors)]


def _versions(value: Any) -> dict[str, tuple[int, int]]:
    """Identity and version of the tensors in a batch or output; both change when something is written there."""
    parts: dict[str, Any] = {}
    if isinstance(value, Batch):
        inputs = value.inputs
        parts = (
            {"batch.inputs": inputs}
            if isinstance(inputs, Tensor)
            else {f"batch.inputs[{k!r}]": v for k, v in inputs.items()}
        )
        parts |= {"batch.targets": value.targets, "batch.index": value.index}
        parts |= {f"batch.extras[{name!r}]": extra for name, extra in value.extras.items()}
    elif hasattr(value, "prediction"):
        parts = {"output.prediction": value.prediction, "output.features": value.features}
    return {name: (id(part), part._version) for name, part in parts.items() if isinstance(part, Tensor)}


def _numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy global state is what is watched
    return (kind, np.asarray(keys).tobytes(), *rest)


def _modes(run: Run) -> dict[str, Any]:
    modes: dict[str, Any] = {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_autocast_enabled()": torch.is_autocast_enabled(run.device.type),
    }
    modes |= {f"{name or 'run.model'}.training": module.training for name, module in run.model.named_modules()}
    modes |= {f"{name}.requires_grad": p.requires_grad for name, p in run.model.named_parameters()}
    return modes
