"""``fit``: a thin loop over the public steps of ``Run``.

The order of the examples is that of ``RandomSampler(data, generator=torch.Generator().manual_seed(seed))``; torch's global
generator (dropout inside the model) is seeded for the duration of the call and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from equipoise.errors import ArgumentError, check_integer
from equipoise.training import checkpoint as checkpoints
from equipoise.training.assemble import Augment, SamplerFactory
from equipoise.training.method import Method
from equipoise.training.run import LossFunction, OptimizerLike, Run, SchedulerLike, start

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Run", "fit", "start"]


def default_optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """SGD, learning rate 0.05, momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def fit(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: OptimizerLike | None = None,
    scheduler: SchedulerLike | None = None,
    methods: Sequence[Method] = (),
    loss: LossFunction | None = None,
    validation: Any = None,
    seed: int = 0,
    num_classes: int | None = None,
    head: str | None = None,
    mixed_precision: str = "no",
    clip_norm: float | None = None,
    accumulation: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    on_epoch_end: Callable[[Run], dict[str, Any] | None] | None = None,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
    augment: Augment | None = None,
    sampler: SamplerFactory | None = None,
) -> Run:
    """Train ``model`` on ``data`` with ``methods``; return the finished ``Run`` (``run.model``, ``run.history``).

    data, validation: (inputs, targets) tensors, ``equipoise.Examples``, or a map-style Dataset; inputs may be dicts of tensors.
    epochs: passes over the data, >= 1.
    batch_size: examples of one optimizer step, over all processes and micro-batches.
    optimizer: an optimizer or ``parameters -> optimizer``; by default SGD with learning rate 0.05 and momentum 0.9.
    scheduler: ``(optimizer, total_steps) -> scheduler``, stepped once an optimizer step.
    accumulation: number of micro-batches in which a batch is processed, to save memory; the mean gradient is the same.
    checkpoint: folder to save to after every epoch, or every ``checkpoint_every`` optimizer steps and at the end.
    resume: continue bit for bit from the checkpoint if there is one, else start anew.
    on_epoch_end: called with the run after each epoch and the methods' ``epoch_end``; a dict it returns joins the epoch's
    record in ``run.history``.
    Without it, ``validation`` data put ``validation_loss`` (and ``validation_accuracy`` for classes) there.
    The rest: see ``equipoise.start``. Raises ``NonFiniteError``, ``ArgumentError``, ``DataError``, ``CheckpointError``.
    """
    check_integer("epochs", epochs, 1)
    check_integer("accumulation", accumulation, 1)
    if checkpoint_every is not None:
        check_integer("checkpoint_every", checkpoint_every, 1)
    if checkpoint is None and (resume or checkpoint_every is not None):
        raise ArgumentError("checkpoint = None: must name a folder where resume or checkpoint_every is given")
    with _seeded(seed):
        run = Run(
            model,
            default_optimizer if optimizer is None else optimizer,
            methods=methods,
            data=data,
            validation=validation,
            loss=loss,
            scheduler=scheduler,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            num_classes=num_classes,
            head=head,
            mixed_precision=mixed_precision,
            clip_norm=clip_norm,
            accelerator=accelerator,
            num_workers=num_workers,
            augment=augment,
            sampler=sampler,
        )
        rank = run.accelerator.process_index
        if rank:
            torch.manual_seed(seed + rank)  # dropout differs between processes; everything else is shared
        if resume and checkpoint is not None and checkpoints.exists(checkpoint):
            run.load_state_dict(checkpoints.load(checkpoint))

        def save() -> None:
            if checkpoint is not None:
                run.check_finite()  # never replace a good checkpoint by one that cannot go on
                state = run.state_dict()
                if rank == 0:
                    checkpoints.save(state, checkpoint)
                run.accelerator.wait_for_everyone()

        while run.epoch < epochs:
            run.begin_epoch()
            for batch in run.batches():
                if accumulation == 1:
                    run.backward(run.training_loss(batch))
                else:
                    pieces = batch.split(accumulation)
                    for number, piece in enumerate(pieces, 1):
                        with run.no_sync(last=number == len(pieces)):
                            run.backward(run.training_loss(piece) * (len(piece) / len(batch)))
                run.step()
                run.position += 1
                if checkpoint_every is not None and run.global_step % checkpoint_every == 0:
                    save()
            run.end_epoch(_evaluate if on_epoch_end is None else on_epoch_end)
            if checkpoint_every is None or run.epoch == epochs:
                save()
        run.finish()
    return run


def _evaluate(run: Run) -> dict[str, Any]:
    if run.validation is None:
        return {}
    prediction, targets = run.predict(run.validation)
    record = {"validation_loss": float(run.task_loss(prediction, targets))}
    if prediction.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point():
        record["validation_accuracy"] = float((prediction.argmax(1) == targets).float().mean())
    return record


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put their states back after it."""
    state = checkpoints.random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        checkpoints.set_random_state(state)
