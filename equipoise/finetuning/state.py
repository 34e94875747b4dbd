"""What the optimizers of this family share: a state that comes back from a checkpoint as it was, and how large it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExactOptimizer(torch.optim.Optimizer):
    """An optimizer whose ``load_state_dict`` keeps every tensor's own dtype.

    torch's own turns all of a parameter's state into the parameter's dtype: masks, 8-bit codes, float32 moments of a
    half-precision weight.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer keeps, without step counters."""
    return [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    ]


def optimizer_state_numel(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer keeps beside the parameters, step counters not counted.

    ``torch.optim.AdamW`` keeps 2 m n for a weight (m, n).
    """
    return sum(tensor.numel() for tensor in state_tensors(optimizer))


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """How many bytes these numbers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer))
