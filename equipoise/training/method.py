"""``Method``: one small class that plugs parts into a training run through hooks. Free of torch at import.

A method overrides only the hooks it needs; the order below is the order in a run. ``loss`` and ``configure_sampler`` are
exclusive: two methods of one run that both override one of them raise ``MethodConflictError``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.utils.data import Sampler

    from equipoise.training.batch import Batch, Output
    from equipoise.training.fit import Run
    from equipoise.training.space import Space

HOOKS = (
    "prepare",
    "configure_optimizer",
    "configure_sampler",
    "transform_batch",
    "loss",
    "penalty",
    "after_backward",
    "before_step",
    "after_step",
    "stage_end",
    "epoch_end",
    "finish",
)
EXCLUSIVE_HOOKS = ("configure_sampler", "loss")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. Written as a literal in the class body, so that the catalogue reads it without importing."""

    title: str
    authors: str
    venue: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.authors}: {self.title}. {self.venue}" + (f", {self.url}" if self.url else "")


class Method:
    """Base of every method. Hooks do nothing here; a run calls only those that a subclass overrides.

    Class attributes
    ----------------
    name: the slug on the command line (``elr``, ``elr-plus``).
    paper: its source, None for folklore.
    space: what may be tuned, keyed by the constructor's argument names.
    neutral: constructor arguments at which the method equals the baseline step for step; None where no such setting exists
        (the class docstring then says why).
    needs_features: whether ``output.features`` (the input of the model's head) must be captured.
    views: number of random views of each example that the method needs in a batch, where the run has ``augment``; a class
        attribute or a property. The run takes the largest of its methods' (see ``Batch.views``).
    """

    name: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None
    space: ClassVar[Space] = {}
    neutral: ClassVar[Mapping[str, Any] | None] = None
    needs_features: ClassVar[bool] = False
    views: int = 1

    # -- hooks, in the order of a run ---------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        """Change the model, or size per-example state, before the optimizer exists."""

    def configure_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Wrap or replace the optimizer, or add parameter groups; return the one to use."""
        return optimizer

    def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
        """Return the sampler that decides which examples are drawn. At most one method per run."""
        return sampler

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Return the batch with changed inputs or targets (attack, mix, resample)."""
        return batch

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        """Return the scalar that replaces the task's loss. At most one method per run."""
        raise NotImplementedError

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        """Return a scalar that is added to the loss."""
        raise NotImplementedError

    def after_backward(self, run: Run) -> None:
        """Change gradients, before they are clipped."""

    def before_step(self, run: Run) -> None:
        """Act on the final, clipped gradients."""

    def after_step(self, run: Run) -> None:
        """Change weights (proximal maps, masks, averages), or take an outer step."""

    def stage_end(self, run: Run) -> None:
        """A new task, domain or phase begins."""

    def epoch_end(self, run: Run) -> None:
        """Refresh statistics; ``run.epoch`` is the 0-based epoch that has just ended."""

    def finish(self, run: Run) -> None:
        """Compress, merge or calibrate after training; may replace ``run.model``."""

    # -- state --------------------------------------------------------------------------------------------------------
    @property
    def owned(self) -> dict[str, Any]:
        """What the method registered with its run (modules, optimizers, generators), by name."""
        return self.__dict__.setdefault("_owned", {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during training: by default the state of what was registered with the run.

        A method with counters of its own adds them: ``{**super().state_dict(), "visits": self.visits}``. Values are
        tensors, numbers, strings, None, and lists and dicts of these.
        """
        import torch

        return {
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self.owned.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; call it after ``prepare``."""
        import torch

        for name, part in self.owned.items():
            if isinstance(part, torch.Generator):
                part.set_state(state[name].cpu())
            else:
                part.load_state_dict(state[name])

    # -- introspection ------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments and their values, read from the attributes of the same names."""
        names = list(inspect.signature(type(self)).parameters)
        return {name: getattr(self, name) for name in names}

    def overrides(self, hook: str) -> bool:
        """Whether this method implements ``hook``."""
        return getattr(type(self), hook) is not getattr(Method, hook) or hook in self.__dict__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"
