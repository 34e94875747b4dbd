"""``Run``: one training run as public steps, for ``fit`` and for anyone's own loop.

run = equipoise.start(model, optimizer, methods=[ELR(lam=3.0)], data=train_set)
for batch in loader:
    loss = run.training_loss(batch)      # transform, forward, loss, penalties
    run.backward(loss)
    run.step()                           # gradients, clipping, update
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from equipoise.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    NonFiniteError,
    check_choice,
    check_integer,
    check_range,
)
from equipoise.training import checkpoint as checkpoints
from equipoise.training.assemble import (
    Augment,
    LossFunction,
    OptimizerLike,
    SamplerFactory,
    SchedulerLike,
    accelerator_of,
    check_output,
    classes_of,
    derived_seed,
    hooks_of,
    is_compiled,
    make_optimizer,
    make_scheduler,
    random_order,
    scheduler_state,
)
from equipoise.training.batch import Batch, Inputs, Loader, Output, as_dataset
from equipoise.training.features import FeatureTap, find_head
from equipoise.training.method import Method

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECK_EVERY = 50  # steps between looks at the losses on an accelerator, where each look waits for the device


class Run:
    """What a method sees of the training, and the steps of the loop. Made by ``equipoise.start``.

    Attributes: ``model``, ``inference_model`` (what evaluation uses; a method may set another one), ``optimizer``,
    ``scheduler``, ``global_step`` (optimizer steps done), ``total_steps``, ``epoch`` (0-based), ``total_epochs``, ``stage``,
    ``device``, ``seed``, ``generator`` (CPU), ``num_examples``, ``num_classes``, ``class_counts`` ((C,) int64), ``validation``
    (re-iterable of batches), ``accelerator``, ``methods``, ``task_loss``, ``head_name``, ``history`` (one dict an epoch),
    ``data`` (the training set), ``augment`` (makes random views), ``views`` (how many of them are stacked in a batch).
    What is unknown is None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerLike,
        *,
        methods: Sequence[Method] = (),
        data: Any = None,
        validation: Any = None,
        loss: LossFunction | None = None,
        scheduler: SchedulerLike | None = None,
        epochs: int | None = None,
        total_steps: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        head: str | None = None,
        mixed_precision: str = "no",
        clip_norm: float | None = None,
        accelerator: Accelerator | None = None,
        num_workers: int = 0,
        augment: Augment | None = None,
        sampler: SamplerFactory | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            given = model.__name__ if isinstance(model, type) else repr(model)
            raise ArgumentError(f"model = {given}: must be an instance of torch.nn.Module")
        check_choice("mixed_precision", mixed_precision, ("no", "bf16"))
        check_integer("seed", seed, 0)
        if clip_norm is not None:
            check_range("clip_norm", clip_norm, 0, open_low=True)
        if num_classes is not None:
            check_integer("num_classes", num_classes, 1)
        self._hooks = hooks_of(methods)
        self.methods = list(methods)
        self.accelerator = accelerator_of(accelerator)
        self.device = torch.device(self.accelerator.device)
        if self.device.type == "cpu":  # accelerate may add an index, and then no tensor's device would equal it
            self.device = torch.device("cpu")
        self.seed, self.stage, self.epoch, self.global_step, self.position = seed, 0, 0, 0, 0
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "run"))
        self.task_loss: LossFunction = F.cross_entropy if loss is None else loss
        self.clip_norm, self.head_name, self.mixed_precision = clip_norm, head, mixed_precision
        self.history: list[dict[str, Any]] = []
        self.augment = augment
        self.views = max((method.views for method in self.methods), default=1) if augment is not None else 1
        self.view_generator = torch.Generator().manual_seed(
            derived_seed(seed, f"views/{self.accelerator.process_index}")
        )

        self.data = None if data is None else as_dataset(data)
        self.num_examples = None if self.data is None else len(self.data)  # type: ignore[arg-type]
        self.num_classes, self.class_counts = classes_of(self.data, num_classes)
        self.total_epochs, self.total_steps = epochs, total_steps
        self.loader: Loader | None = None
        if self.data is not None and batch_size is not None:
            self.order_generator = torch.Generator().manual_seed(seed)
            self.loader = Loader(
                self.data,
                batch_size,
                sampler=(sampler or random_order)(self.data, batch_size, self.order_generator),
                device=self.device,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                num_workers=num_workers,
            )
            if epochs is not None and total_steps is None:
                self.total_steps = epochs * len(self.loader)
        self.validation: Loader | None = None
        if validation is not None:
            held_out = as_dataset(validation, "validation")
            classes_of(held_out, self.num_classes)  # refuses labels that training does not know
            self.validation = Loader(held_out, 1024, device=self.device, num_workers=num_workers)

        self.model = model.to(self.device)
        self._inference_model: nn.Module | None = None
        self._wrapped: dict[int, nn.Module] = {}
        self._networks: list[nn.Module] = []
        self._taps: WeakKeyDictionary[nn.Module, FeatureTap] = WeakKeyDictionary()
        self._needs_features = any(method.needs_features for method in self.methods)
        self._preparing = True
        before = {id(p) for p in self.model.parameters()}
        for method in self._hooks["prepare"]:
            method.prepare(self)
        self._preparing = False
        if self.methods and is_compiled(self.model):
            torch.compiler.reset()  # code compiled before, for a model of the same class, would pass over the methods' hooks
        self._networks.insert(0, self.model)
        self.optimizer = make_optimizer(optimizer, self._networks, before)
        for method in self._hooks["configure_optimizer"]:
            self.optimizer = method.configure_optimizer(self, self.optimizer)
        for method in self._hooks["configure_sampler"]:
            if self.loader is not None:
                self.loader.sampler = method.configure_sampler(self, self.loader.sampler)
                if epochs is not None and total_steps is None:
                    self.total_steps = epochs * len(self.loader)
        self.scheduler = make_scheduler(scheduler, self.optimizer, self.total_steps)
        self._wrap(self.model)
        # Accelerate's own wrapper matters only with a gradient scaler or a sharded model; elsewhere it only costs time.
        self._plain = self.accelerator.scaler is None and self.accelerator.num_processes == 1
        if self.accelerator.scaler is not None:
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.optimizer.zero_grad()  # gradients that the caller or a method left behind
        self._look_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        self._pending: list[tuple[int, int, Tensor]] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._loss_sum, self._loss_count = 0.0, 0
        self._logged: dict[str, list[float]] = {}
        self._checked = False

    @property
    def inference_model(self) -> nn.Module:
        """What evaluation uses: ``model``, unless a method sets another one."""
        return self.model if self._inference_model is None else self._inference_model

    @inference_model.setter
    def inference_model(self, model: nn.Module) -> None:
        self._inference_model = model

    # -- for methods --------------------------------------------------------------------------------------------------
    def register(self, method: Method, name: str, part: Any, *, optimize: bool = False) -> Any:
        """Let the run move, save and resume ``part`` (a module, optimizer, generator, or anything with a ``state_dict``).

        ``optimize=True``, inside ``prepare`` only, adds a module's parameters to the run's optimizer; call such a module
        through ``run.forward(inputs, part)``, which averages its gradients over processes. Returns ``part``.
        """
        if isinstance(part, nn.Module):
            part = part.to(self.device)
            if optimize:
                if not self._preparing:
                    raise ArgumentError(
                        f"optimize = True for {name!r}: must be given inside prepare, before the optimizer exists"
                    )
                self._networks.append(part)
                self._wrap(part)
        method.owned[name] = part
        return part

    def new_generator(self, method: Method, name: str = "generator") -> torch.Generator:
        """A CPU generator of the method's own, registered: the same stream on every process, independent of the data order."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, f"{method.name}/{name}"))
        self.register(method, name, generator)
        return generator

    def head(self) -> nn.Module:
        """The layer of the model that makes the predictions (see ``find_head``)."""
        return find_head(self.model, self.head_name)

    def log(self, name: str, value: float | Tensor) -> None:
        """Record a number; its mean over the epoch goes into ``history``."""
        self._logged.setdefault(name, []).append(float(value))

    # -- the steps of a loop ------------------------------------------------------------------------------------------
    def forward(self, inputs: Inputs, model: nn.Module | None = None) -> Output:
        """Run ``model`` (by default the run's) on inputs that are on the device; a dict becomes keyword arguments."""
        module = self.model if model is None else model
        tap = self._tap(module) if self._needs_features else None
        target = self._wrapped.get(id(module), module)
        with self._autocast():
            output = Output.of(target(**inputs) if isinstance(inputs, dict) else target(inputs))
        if tap is not None and output.features is None:
            output.features = tap.take()
        if self._low_precision():
            if output.prediction.is_floating_point():
                output.prediction = output.prediction.float()
            if output.features is not None:
                output.features = output.features.float()
        return output

    def training_loss(self, batch: Any) -> Tensor:
        """Transform the batch, run the model, and return the scalar loss with every penalty added.

        ``batch`` is an ``equipoise.Batch`` or what ``Batch.of`` reads. Raises ``NonFiniteError`` naming the step and the term.
        """
        batch = Batch.of(batch).to(self.device)
        weight = batch.weight  # kept here, since a method may return a batch of its own making
        if self.augment is not None:
            batch = batch.with_views([self.augment(batch.inputs, self.view_generator) for _ in range(self.views)])
        for method in self._hooks["transform_batch"]:
            batch = method.transform_batch(self, batch)
        output = self.forward(batch.inputs)
        if not self._checked:
            check_output(output.prediction, batch.targets, self.task_loss, self.num_classes, bool(self._hooks["loss"]))
            self._checked = True
        owner = self._hooks["loss"]
        loss = owner[0].loss(self, batch, output) if owner else self._task_loss(output.prediction, batch.targets)
        penalties = self._hooks["penalty"]
        terms = (loss, *(method.penalty(self, batch, output) for method in penalties)) if penalties else (loss,)
        total = sum(terms[1:], start=loss)
        if total.numel() != 1:
            raise ArgumentError(f"loss has shape {tuple(total.shape)}: must be a scalar, the mean over the batch")
        self._watch(total, terms, len(batch))
        return total if weight == 1.0 else total * weight

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Call it once for each micro-batch (with a loss already scaled), then ``step``."""
        if self._plain:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def step(self) -> None:
        """Hand the gradients to the methods, clip them, update the weights and the schedule, and clear the gradients."""
        for method in self._hooks["after_backward"]:
            method.after_backward(self)
        if self.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.trainable_parameters(), self.clip_norm)
            if norm is not None and self.accelerator.scaler is None:  # fp16's scaler skips a step that overflows
                self._norms.append((self.global_step, norm))
                if len(self._norms) >= self._look_every:
                    self._flush()
        for method in self._hooks["before_step"]:
            method.before_step(self)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.global_step += 1
        for method in self._hooks["after_step"]:
            method.after_step(self)

    def begin_epoch(self) -> None:
        """Put every network that trains into training mode."""
        for network in self._networks:
            network.train()

    def batches(self) -> Iterator[Batch]:
        """The batches of this epoch, without the first ``position`` (where a resumed run goes on)."""
        if self.loader is None:
            raise ArgumentError("data, batch_size = None: the run draws batches only if both are given")
        if not self.position:
            self._order = self.loader.order()
        return self.loader.batches(self._order, self.position)

    def end_epoch(self, evaluate: Callable[[Run], dict[str, Any] | None] | None = None) -> dict[str, Any]:
        """Call ``epoch_end`` of the methods, then ``evaluate``; close the epoch's record, with what that gave, and return it."""
        self._flush()
        for method in self._hooks["epoch_end"]:
            method.epoch_end(self)
        record: dict[str, Any] = {"epoch": self.epoch}
        if self._loss_count:
            record["train_loss"] = self._mean_loss()
        record |= {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._loss_sum, self._loss_count, self._logged = 0.0, 0, {}
        self.history.append(record | ((evaluate(self) if evaluate is not None else None) or {}))
        self.epoch += 1
        self.position = 0
        return self.history[-1]

    def begin_stage(self) -> None:
        """A new task, domain or phase begins: tell the methods."""
        self.stage += 1
        for method in self._hooks["stage_end"]:
            method.stage_end(self)

    def finish(self) -> nn.Module:
        """End the training: check the weights, let the methods compress, merge or calibrate, and return the model."""
        self.check_finite()
        for method in self._hooks["finish"]:
            method.finish(self)
        for tap in self._taps.values():
            tap.remove()
        return self.model

    def check_finite(self) -> None:
        """Raise ``NonFiniteError`` if a loss, a gradient or a weight of the model has become NaN or infinite."""
        self._flush()
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(
                    f"step {self.global_step}: the weights {name} hold NaN or infinite values. {_REMEDY}"
                )

    # -- evaluation ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def predict(self, data: Any, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Predictions and targets for a data set or a loader, in order, in evaluation mode.

        Uses ``inference_model`` unless another is given, and leaves every module's mode as it was.
        """
        model = self.inference_model if model is None else model
        batches: Iterable[Any] = data
        if hasattr(data, "__getitem__"):  # a data set; a loader has none
            batches = Loader(as_dataset(data), 1024, device=self.device)
        training = [module for module in model.modules() if module.training]
        needs_features, self._needs_features = self._needs_features, False
        model.eval()
        try:
            moved = (Batch.of(batch).to(self.device) for batch in batches)
            pairs = [(self.forward(batch.inputs, model).prediction, batch.targets) for batch in moved]
        finally:
            self._needs_features = needs_features
            for module in training:
                module.training = True
        return torch.cat([p for p, _ in pairs]), torch.cat([t for _, t in pairs])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: weights, optimizer, schedule, methods, generators, data order, history."""
        self._flush()
        own = {
            "random": checkpoints.random_state(),
            "views": self.view_generator.get_state(),
            "loss": [self._loss_sum, self._loss_count],
            "logged": self._logged,
        }
        ranks = [own]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            ranks = gather_object(ranks)
        return {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else scheduler_state(self.scheduler),
            "methods": [method.state_dict() for method in self.methods],
            "ranks": ranks,
            "generator": self.generator.get_state(),
            "order": self._order_state(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "counters": [self.stage, self.epoch, self.global_step, self.position],
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``. Raises ``CheckpointError`` if it comes from a run with other methods, seed or data."""
        try:
            mine, theirs = self._identity(), state["identity"]
            different = [
                f"{key}: {theirs.get(key)!r} there, {mine[key]!r} here" for key in mine if mine[key] != theirs.get(key)
            ]
            if different:
                raise CheckpointError(
                    f"checkpoint belongs to another run ({'; '.join(different)}): use another folder, or the same settings"
                )
            self._restore(state)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint does not fit this run: {type(error).__name__}: {error}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        own = state["ranks"][self.accelerator.process_index]
        checkpoints.set_random_state(own["random"])
        self.view_generator.set_state(own["views"])
        self._loss_sum, self._loss_count = own["loss"]
        self._logged, self.history = dict(own["logged"]), list(state["history"])
        self.generator.set_state(state["generator"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.loader is not None:
            self.order_generator.set_state(state["order"]["generator"])
            if "sampler" in state["order"]:
                self.loader.sampler.load_state_dict(state["order"]["sampler"])  # type: ignore[attr-defined]
            self._order = state["order"]["rows"]
        self.stage, self.epoch, self.global_step, self.position = state["counters"]

    _order: Tensor | None = None  # of the epoch that is under way

    def _order_state(self) -> dict[str, Any] | None:
        if self.loader is None:
            return None
        sampler = self.loader.sampler
        extra = {"sampler": sampler.state_dict()} if hasattr(sampler, "state_dict") else {}
        rows = self._order if self.position else None  # a sampler cannot be asked again for an order it has given
        return {"generator": self.order_generator.get_state(), "rows": rows, **extra}

    def _identity(self) -> dict[str, Any]:
        return {
            "methods": [re.sub(r" at 0x[0-9a-f]+", "", repr(method)) for method in self.methods],
            "seed": self.seed,
            "num_examples": self.num_examples,
            "total_steps": self.total_steps,
            "processes": self.accelerator.num_processes,
        }

    # -- inner workings -----------------------------------------------------------------------------------------------
    def _wrap(self, module: nn.Module) -> None:
        if self.accelerator.num_processes > 1 and any(p.requires_grad for p in module.parameters()):
            self._wrapped[id(module)] = self.accelerator.prepare_model(module)

    def no_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Skip the exchange of gradients for every micro-batch but the last of a step."""
        wrapped = self._wrapped.get(id(self.model))
        return nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()

    def _low_precision(self) -> bool:
        return self.mixed_precision != "no" or self.accelerator.mixed_precision != "no"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.accelerator.mixed_precision != "no":
            return self.accelerator.autocast()
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed_precision == "bf16" else nullcontext()

    def _tap(self, module: nn.Module) -> FeatureTap | None:
        """The tap in front of a network's head; None for a part of a method (a projection, say) that has no such head."""
        if module not in self._taps:
            try:
                head = find_head(module, self.head_name)
            except ArgumentError:
                if module is self.model:
                    raise
                return None
            self._taps[module] = FeatureTap(head)
        return self._taps[module]

    def _task_loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        try:
            return self.task_loss(prediction, targets)
        except IndexError as error:  # how torch's losses report a label that the model has no output for
            raise DataError(
                f"step {self.global_step}: {error} The model's output has shape {tuple(prediction.shape)}: "
                "labels must lie in [0, number of classes)"
            ) from error

    def _watch(self, total: Tensor, terms: tuple[Tensor, ...], count: int) -> None:
        if self._look_every == 1:
            value = total.item()
            if not math.isfinite(value):
                self._refuse(self.global_step, [term.item() for term in terms])
            self._loss_sum += value * count
            self._loss_count += count
            return
        # One look at many steps: each look makes the processor wait for the device.
        self._pending.append((self.global_step, count, torch.stack([total, *terms]).detach()))
        if len(self._pending) >= self._look_every:
            self._flush()

    def _flush(self) -> None:
        pending, norms = self._pending, self._norms
        self._pending, self._norms = [], []
        bad = next(((step, float(norm)) for step, norm in norms if not math.isfinite(norm)), (math.inf, 0.0))
        losses = torch.stack([values for _, _, values in pending]).tolist() if pending else []
        for (step, count, _), values in zip(pending, losses, strict=True):
            if step > bad[0]:
                break
            if not math.isfinite(values[0]):
                self._refuse(step, values[1:])
            self._loss_sum += values[0] * count
            self._loss_count += count
        if math.isfinite(bad[0]):
            raise NonFiniteError(f"step {bad[0]}: the norm of the gradient is {bad[1]}. {_REMEDY}")

    def _mean_loss(self) -> float:
        """The mean training loss of the epoch so far, over all processes."""
        sums = torch.tensor([self._loss_sum, self._loss_count], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.device), "sum")
        return float(sums[0] / sums[1])

    def _refuse(self, step: int, values: list[float]) -> None:
        owner = self._hooks["loss"]
        names = [f"the loss of {owner[0].name}" if owner else "the task's loss"]
        names += [f"the penalty of {method.name}" for method in self._hooks["penalty"]]
        bad = [f"{name} is {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        raise NonFiniteError(f"step {step}: {', '.join(bad) or 'the sum of the terms is not finite'}. {_REMEDY}")


_REMEDY = "Lower the learning rate, clip the gradient (clip_norm=1.0), or check the inputs for extreme values"


def start(model: nn.Module, optimizer: OptimizerLike, **options: Any) -> Run:
    """Begin a run and return it; the loop is yours. Takes the keyword arguments of ``Run``.

    model: any ``nn.Module``; called with a tensor, or with keyword arguments where inputs are dicts.
    optimizer: an optimizer, or a function ``parameters -> optimizer`` (needed when a method replaces weights).
    methods: the methods, in the order in which their hooks run.
    data: the training set (``Examples``, a pair of tensors, a map-style Dataset): gives methods its size and classes.
    validation: held-out data for methods that choose or learn hyperparameters; never the test set.
    loss: ``(prediction, targets) -> scalar``, by default cross-entropy.
    scheduler: a scheduler, or a function ``(optimizer, total_steps) -> scheduler``; stepped once an optimizer step.
    epochs, total_steps: the length of the training, for methods with a schedule.
    seed: seeds the methods' generators (and, in ``fit``, everything else).
    num_classes: number of classes, where the data do not tell.
    head: path of the layer that makes the predictions, where it is not the last ``nn.Linear``.
    mixed_precision: "no" or "bf16" (for fp16 hand over an ``Accelerator(mixed_precision="fp16")``).
    clip_norm: largest 2-norm of the gradient.
    accelerator: an ``accelerate.Accelerator`` of your own.
    augment: ``(inputs, generator) -> inputs``, a random view of a batch's inputs; applied to every training batch, as often
        as the methods need views.
    sampler: ``(data, batch_size, generator) -> sampler`` of positions, by default all in random order; see
        ``equipoise.training.sampler``.
    """
    run = Run(model, optimizer, **options)
    run.begin_epoch()
    return run
