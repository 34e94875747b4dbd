"""What a check works on: a method class, the settings under which it is checked, and the tiny problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from equipoise.testing.problem import TinyProblem
from equipoise.testing.watch import Spy, Watch, leftover_hooks
from equipoise.training import Method, Run, start
from equipoise.training.checkpoint import random_state, set_random_state

TOLERANCE = 1e-6  # of comparisons in float64, so that tables kept in float32 may take part


@dataclass
class Subject:
    """One method under test. Results that several checks look at are computed once."""

    method: type[Method]
    settings: dict[str, Any]
    problem: TinyProblem
    ran: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method's slug, or its class name while the slug is missing."""
        return getattr(self.method, "name", "") or getattr(self.method, "__name__", repr(self.method))

    def make(self, **changes: Any) -> Method:
        """A new object of the method."""
        return self.method(**{**self.settings, **changes})

    def train(
        self, problem: TinyProblem | None = None, *, method: Method | None = None, **options: Any
    ) -> tuple[Run, Spy]:
        """``fit`` on the problem with a ``Spy`` and the method."""
        spy = Spy()
        method = self.make() if method is None else method
        return (self.problem if problem is None else problem).train([spy, method], **options), spy

    def begin(self, problem: TinyProblem | None = None, **options: Any) -> Run:
        """``start`` on the problem: a run whose loop is the check's."""
        problem = self.problem if problem is None else problem
        return start(problem.network(), data=problem.examples, methods=[self.make()], **problem.options(**options))

    @cached_property
    def watched(self) -> tuple[dict[str, str], list[str]]:
        """What the method's hooks disturbed in a run, by name of the check, and what carries hooks after it."""
        method = self.make()
        watch = Watch(method)
        with watch.active():
            run, _ = self.train(self.problem.with_norm(), method=method)
        return watch.seen, leftover_hooks(run.model)

    @cached_property
    def draws(self) -> bool:
        """Whether the method, or a layer that it put into the model, draws random numbers while it trains."""

        def states() -> list[Any]:
            owned = run.methods[0].owned.values()
            return [part.get_state().tolist() for part in owned if isinstance(part, torch.Generator)]

        with isolated(0):
            run = self.begin()
            before, seen = states(), torch.get_rng_state()
            for _ in one_epoch(run):
                pass
            return before != states() or not torch.equal(seen, torch.get_rng_state())


def one_epoch(run: Run) -> Iterator[None]:
    """Train one epoch in a loop of one's own, pausing after every step."""
    run.begin_epoch()
    for batch in run.batches():
        run.backward(run.training_loss(batch))
        run.step()
        yield
    run.end_epoch()


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put their states back after it."""
    state = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state)
