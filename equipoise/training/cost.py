"""What a piece of training costs, measured so that it is the same on any machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """flops: of the whole training, forward and backward; peak_memory: largest sum of live tensors, in bytes;
    inference_parameters: of the model that training hands over."""

    flops: int
    peak_memory: int
    inference_parameters: int


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all tensors that were made inside the block and are alive; ``peak`` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._track(value.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.alive += self._seen[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._seen.pop(key)


def measure(train: Callable[[], nn.Module]) -> Cost:
    """Run ``train`` once under counters; it returns the model used for inference. Matrix products and convolutions count."""
    memory = PeakMemory()
    counter = FlopCounterMode(display=False)
    collecting = gc.isenabled()
    # When the collector frees cycles depends on what ran before; the peak must not.
    gc.collect()
    gc.disable()
    try:
        with counter, memory:
            model = train()
    finally:
        if collecting:
            gc.enable()
    return Cost(counter.get_total_flops(), memory.peak, sum(p.numel() for p in model.parameters()))
