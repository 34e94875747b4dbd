"""``MergingMethod``: what the merging methods have in common when they act at the end of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, refuse
from equipoise.merging.vectors import Plan, State, kept, merge_state_dicts
from equipoise.training.method import Method
from equipoise.training.run import Run

Coefficients = float | Sequence[float] | Tensor


def check_coefficients(coefficients: Coefficients, n: int | None = None, name: str = "coefficients") -> Tensor:
    """A finite number, or one for each of ``n`` models, as float64 of shape () or (n,)."""
    try:
        found = torch.as_tensor(coefficients, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        refuse(name, coefficients, "be a number, or a sequence of one number for each model")
    if found.ndim > 1 or isinstance(coefficients, bool):
        refuse(name, coefficients, "be a number, or a sequence of one number for each model")
    if not all(map(math.isfinite, found.reshape(-1).tolist())):
        refuse(name, coefficients, "be finite")
    if found.ndim and n is not None and len(found) != n:
        refuse(name, coefficients, f"be a number, or {n} numbers, one for each model")
    return found


class MergingMethod(Method):
    """Base of the merging methods: ``finish`` replaces the weights of ``run.model`` by merged ones.

    The base is the model as it was in ``prepare``. What is merged: the state_dicts in ``run.merge_sources``, a list that you set
    on the run before it is finished; and the run's own model, if it has taken steps. A run that only merges takes none:

        run = equipoise.start(base, torch.optim.SGD, methods=[PCBMerging(ratio=0.1)])
        run.merge_sources = [load_file("a.safetensors"), load_file("b.safetensors")]
        merged = run.finish()

    Integer, boolean and excluded tensors stay the run's own.
    """

    base: nn.Module
    exclude: tuple[str, ...] = ()

    def plan(self, seed: int = 0) -> Plan:
        """How task vectors are merged; ``seed`` is for methods that draw random numbers."""
        raise NotImplementedError

    def merge(self, run: Run, base: State, sources: Sequence[State]) -> State:
        """The merged state_dict."""
        return merge_state_dicts(self.plan(run.seed), base, sources, self.exclude)

    def prepare(self, run: Run) -> None:
        self.base = run.register(self, "base", copy.deepcopy(run.model))

    def finish(self, run: Run) -> None:
        own = run.model.state_dict()
        sources = [*getattr(run, "merge_sources", ()), *([own] if run.global_step else [])]
        if not sources:
            raise ArgumentError(
                f"run.merge_sources: {self.name} has nothing to merge. Set a list of state_dicts fine-tuned from the run's model"
            )
        merged = kept(list(own), self.exclude)
        base = {
            name: tensor if merged(name) and tensor.is_floating_point() else own[name]
            for name, tensor in self.base.state_dict().items()
        }
        run.model.load_state_dict(self.merge(run, base, sources))
