"""Equipoise's methods inside of ``transformers.Trainer``.

    class MyTrainer(EquipoiseTrainerMixin, Trainer): ...

    trainer = MyTrainer(model=model, args=arguments, train_dataset=data, methods=[BALoRA(rank=8, target=["query", "value"])])
    trainer.train()
    trainer.save_model("merged")        # a plain model: the methods' ``finish`` has merged the adapters

The mixin goes before any ``Trainer`` (``Seq2SeqTrainer``, those of trl). The Trainer keeps its loop, its batches, its optimizer and
its own loss; the methods' hooks run at the same places as in ``equipoise.fit``. Adapters that were attached by hand
(``apply_pissa``, ``attach``) need no mixin: they are layers, and train in any Trainer.

A loop of one's own with Accelerate needs nothing of this module: ``equipoise.start(model, optimizer, methods=[...],
accelerator=accelerator)`` takes the accelerator, and prepares the model for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import ArgumentError, CheckpointError, MissingDependencyError
from equipoise.training import checkpoint as checkpoints
from equipoise.training.assemble import hooks_of
from equipoise.training.batch import Batch, Output
from equipoise.training.method import Method
from equipoise.training.run import Run

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError("equipoise.integrations.hf needs transformers: pip install 'equipoise[hf]'") from error

FOLDER = "equipoise"  # of a checkpoint, with the methods' state

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class TrainerRun(Run):
    """The run that methods see inside of a Trainer, which wraps the model and calls it itself."""

    def hooks(self, name: str) -> list[Method]:
        """The methods that implement a hook."""
        return self._hooks[name]

    def wrapped(self, model: nn.Module) -> None:
        """From now on ``forward`` calls the model as the Trainer has wrapped it."""
        if model is not self.model:
            self._wrapped[id(self.model)] = model

    def watched(self, call: Callable[[], Any]) -> tuple[Output, Tensor]:
        """A loss and the model's outputs, which ``call`` gives; with the features where a method needs them."""
        tap = self._tap(self.model) if self._needs_features else None
        loss, outputs = call()
        output = Output.of(outputs)
        if tap is not None and output.features is None:
            output.features = tap.take()
        return output, loss

    def total(self, terms: list[Tensor], count: int) -> Tensor:
        """The sum of a batch's loss and penalties. Raises ``NonFiniteError`` naming the term that is not finite."""
        total = sum(terms[1:], start=terms[0])
        self._watch(total, tuple(terms), count)
        return total

    def _wrap(self, module: nn.Module) -> None:
        if module is not self.model:
            super()._wrap(module)


class EquipoiseTrainerMixin(_Base):
    """Put before a ``Trainer`` class: takes ``methods=[...]`` and runs their hooks in the Trainer's loop.

    methods: the methods, in the order in which their hooks run; ``prepare`` is called at once, by the constructor. Their run knows
    the Trainer's accelerator, seed, number of steps, epochs and classes (``config.num_labels``), but not the training data.
    ``run`` is that ``equipoise.Run``: its ``history`` has each epoch's training loss and what methods logged.

    Penalties are added in training alone; under gradient accumulation they are averaged over the micro-batches. At the end of
    ``train``, after the best checkpoint was loaded if that was asked for, the methods' ``finish`` is called: ``trainer.model`` is
    then the finished model, and another ``train`` is refused. Checkpoints hold the model with its adapters and, in the folder
    ``equipoise``, the methods' state; resuming restores both.
    Raises ``ArgumentError`` with ``model_init``, which would throw the adapters away, and for a method that chooses the examples.
    """

    run: TrainerRun

    def __init__(self, *args: Any, methods: Sequence[Method] = (), **kwargs: Any) -> None:
        choosing = hooks_of(methods)["configure_sampler"]
        if choosing:
            raise ArgumentError(f"methods holds {choosing[0].name}: must leave the choice of examples to the Trainer")
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ArgumentError(
                "model_init: must be None, train would put a new model in the place of the prepared one. Give model=..."
            )
        self.run = TrainerRun(
            self.model,
            self._make_optimizer if self.optimizer is None else self.optimizer,
            methods=methods,
            accelerator=self.accelerator,
            seed=self.args.seed,
            num_classes=getattr(getattr(self.model, "config", None), "num_labels", None),
            epochs=max(1, math.ceil(self.args.num_train_epochs)),
            total_steps=self._steps(),
            clip_norm=self.args.max_grad_norm or None,
        )
        self.model = self.model_wrapped = self.run.model
        self.optimizer = self.run.optimizer
        self.add_callback(_Hooks(self))

    def _make_optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """The Trainer's own optimizer, over the networks of methods too."""
        optimizer = self.create_optimizer()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        more = [p for p in parameters if id(p) not in held]
        if more:
            optimizer.add_param_group({"params": more})
        return optimizer

    def _steps(self) -> int | None:
        """How many optimizer steps ``train`` will take, where that is known beforehand."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        try:
            batches = len(self.get_train_dataloader())
        except (TypeError, ValueError):  # data without a length, or none
            return None
        return math.ceil(math.ceil(batches / self.args.gradient_accumulation_steps) * self.args.num_train_epochs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        run, ask = self.run, super().compute_loss
        transforms, owner, penalties = (run.hooks(name) for name in ("transform_batch", "loss", "penalty"))
        if not model.training or not (transforms or owner or penalties):
            return ask(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        run.wrapped(model)
        batch = Batch.of(inputs)
        for method in transforms:
            batch = method.transform_batch(run, batch)
        # The Trainer divides a mean by the number of micro-batches, and leaves a loss alone that counts the tokens of all of them.
        counted = getattr(self, "loss_is_scaled_for_ga", None)
        if counted is None:
            counted = (num_items_in_batch is not None and self.model_accepts_loss_kwargs) or self.compute_loss_func
        steps = self.current_gradient_accumulation_steps if counted else 1
        if owner:
            output = run.forward(batch.inputs)
            loss = owner[0].loss(run, batch, output)
        else:
            named: Any = {**batch.inputs, "labels": batch.targets}  # type: ignore[dict-item]  # the Trainer's inputs are dicts
            output, loss = run.watched(
                lambda: ask(model, named, return_outputs=True, num_items_in_batch=num_items_in_batch)
            )
            loss = loss * steps
        total = run.total([loss, *(method.penalty(run, batch, output) for method in penalties)], len(batch)) / steps
        return (total, output) if return_outputs else total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for method in self.run.hooks("after_backward"):
                method.after_backward(self.run)
        return loss

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and checkpoints.exists(Path(checkpoint, FOLDER)):
            state = checkpoints.load(Path(checkpoint, FOLDER))
            names = [method.name for method in self.run.methods]
            if state["names"] != names:
                raise CheckpointError(
                    f"checkpoint = {checkpoint!r}: was made with the methods {state['names']}, here are {names}"
                )
            for method, saved in zip(self.run.methods, state["methods"], strict=True):
                method.load_state_dict(saved)
            self.run.generator.set_state(state["generator"])


class _Hooks(TrainerCallback):
    """The hooks that need no more than a callback."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.run, self.finished = trainer, trainer.run, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.finished:
            raise ArgumentError("train: the methods have finished the model. Make another Trainer to train it further")
        self.run.optimizer, self.run.scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        self.run.total_steps, self.run.total_epochs = state.max_steps, state.num_train_epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.run.epoch = int(state.epoch or 0)
        self.run.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.run.global_step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for method in self.run.hooks("before_step"):
            method.before_step(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.run.global_step = state.global_step
        for method in self.run.hooks("after_step"):
            method.after_step(self.run)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.run.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if args.should_save:
            methods = self.run.methods
            saved = {
                "names": [method.name for method in methods],
                "methods": [method.state_dict() for method in methods],
                "generator": self.run.generator.get_state(),
            }
            checkpoints.save(saved, Path(args.output_dir, f"checkpoint-{state.global_step}", FOLDER))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.finished = True
        self.trainer.model = self.trainer.model_wrapped = self.run.finish()
