"""Checks of what a method does in a run. Each trains the tiny problem once or a few times."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, MethodConflictError
from equipoise.testing.compare import difference, fingerprint, snapshot
from equipoise.testing.report import fail, skip
from equipoise.testing.subject import TOLERANCE, Subject, isolated, one_epoch
from equipoise.testing.watch import Interrupted, Spy
from equipoise.training import Batch, Method, Output, Run, start
from equipoise.training import checkpoint as checkpoints
from equipoise.training.batch import map_inputs
from equipoise.training.method import EXCLUSIVE_HOOKS

STEP_OF_CHECKPOINT, STEP_OF_INTERRUPTION = 7, 9  # in the middle of the second of three epochs of five steps


# -- training at all --------------------------------------------------------------------------------------------------
def check_trains(subject: Subject) -> None:
    """A run with the method ends with finite losses, and with weights that have moved."""
    run, spy = subject.train()
    for record in run.history:
        if not np.isfinite(record["train_loss"]):
            fail(f"the loss of epoch {record['epoch']} is {record['train_loss']}", "Keep every term finite")
    frozen = difference(spy.steps[0], spy.steps[-1]) is None and not spy.replaced
    if frozen and difference(spy.steps[0], snapshot({**run.model.state_dict()})) is None:  # adapters move it at the end
        fail(
            "the model's weights are those from before training",
            "A method must let the model learn, or replace its weights",
        )


def check_global_state(subject: Subject) -> None:
    """A run changes neither attributes of the class nor variables of its module."""
    before = _globals(subject.method)
    subject.train()
    after = _globals(subject.method)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        fail(
            f"a run changes {', '.join(changed)}",
            "Two runs of one process would share it: keep state on the object (self.x), made in prepare",
        )


def check_determinism(subject: Subject) -> None:
    """Two runs with one seed are equal bit for bit: weights, state and history."""
    (first, one), (second, two) = subject.train(), subject.train()
    text = _bits(first, one, second, two)
    if text:
        fail(
            f"two runs with one seed differ: {text}",
            "Draw from run.new_generator(self) only; sort what comes from sets",
        )


# -- leaving the rest alone -------------------------------------------------------------------------------------------
def check_random_state(subject: Subject) -> None:
    """Hooks draw nothing from the global generators of torch, numpy and Python, and ``fit`` leaves these as they were."""
    if "random-state" in subject.watched[0]:
        fail(
            subject.watched[0]["random-state"],
            "Draw from run.new_generator(self); build modules with random weights inside torch.random.fork_rng() after a "
            "torch.manual_seed drawn from that generator",
        )
    before = torch.get_rng_state(), random.getstate(), fingerprint(np.random.get_state())  # noqa: NPY002
    subject.train()
    after = torch.get_rng_state(), random.getstate(), fingerprint(np.random.get_state())  # noqa: NPY002
    for name, one, two in zip(("torch", "Python", "numpy"), before, after, strict=True):
        if difference(one, two):
            fail(f"a run leaves {name}'s global generator in another state", "Draw from run.new_generator(self)")


def check_data_order(subject: Subject) -> None:
    """The run draws the same examples in the same order as without the method."""
    if subject.make().overrides("configure_sampler"):
        skip("the method decides which examples are drawn")
    _, spy = subject.train()
    plain = Spy()
    subject.problem.train([plain])
    if spy.indices != plain.indices:
        where = next(i for i, pair in enumerate(zip(spy.indices, plain.indices, strict=False)) if pair[0] != pair[1])
        fail(
            f"batch {where} holds other examples than without the method",
            "Leave run.loader and its generators alone; override configure_sampler where the order is the method's point",
        )


def check_batch_unchanged(subject: Subject) -> None:
    """Hooks write neither to the batch that they are given nor to the model's output."""
    if "batch-unchanged" in subject.watched[0]:
        fail(
            subject.watched[0]["batch-unchanged"],
            "Other methods and the user's own loop see the same tensors: return dataclasses.replace(batch, inputs=...)",
        )


def check_modes(subject: Subject) -> None:
    """Hooks leave training mode, requires_grad, gradients and autocast as they were; no hooks remain on the model."""
    seen, hooks = subject.watched
    if "modes" in seen:
        fail(seen["modes"], "Restore it in a finally block, or use a context manager (torch.no_grad(), run.predict)")
    if hooks:
        fail(
            f"{', '.join(hooks)} carry hooks after the run",
            "Remove in finish what prepare registered (handle.remove())",
        )


# -- being the baseline at strength 0 ---------------------------------------------------------------------------------
def check_neutral(subject: Subject) -> None:
    """At the neutral setting the model's weights equal the baseline's after every step."""
    neutral = subject.method.neutral
    if neutral is None:
        skip("the method declares no neutral setting (neutral = None)")
    problem = subject.problem.with_norm().double()
    try:
        method = subject.make(**neutral)
    except Exception as error:  # a method may raise anything here; all of it is a finding
        fail(f"neutral = {dict(neutral)} is refused ({error})", "Its keys must be arguments, its values valid settings")
    _, spy = subject.train(problem, method=method)
    plain = Spy()
    problem.train([plain])
    text: str | None
    if len(spy.steps) != len(plain.steps):
        text = f"which takes {len(plain.steps) - 1} steps and not {len(spy.steps) - 1}"
    elif spy.replaced:
        text = difference({"prediction": spy.prediction}, {"prediction": plain.prediction}, TOLERANCE)
    else:
        found = (
            f"before step {i}: {text}"
            for i, (mine, theirs) in enumerate(zip(spy.steps, plain.steps, strict=True))
            if (text := difference(mine, theirs, TOLERANCE))
        )
        text = next(found, None)
    if text:
        fail(
            f"at {dict(neutral)} the run differs from the baseline, {text}",
            "Find what remains of the method at strength 0, or set neutral = None and say why in the docstring",
        )


# -- state ------------------------------------------------------------------------------------------------------------
def check_evaluation(subject: Subject) -> None:
    """Evaluating changes nothing, and the finished model gives finite predictions of the right shape, the same twice."""
    problem = subject.problem.with_norm()
    with isolated(0):
        run = subject.begin(problem)
        for _ in range(2):
            for _ in one_epoch(run):
                before = snapshot([run.model.state_dict(), run.methods[0].state_dict()])
                run.predict(problem.validation)
                text = difference(before, snapshot([run.model.state_dict(), run.methods[0].state_dict()]))
                if text:
                    fail(
                        f"run.predict changes the state: {text}", "Update state in training mode only (module.training)"
                    )
        model = run.finish()
        wanted = tuple(run.forward(_inputs(problem.validation), problem.network().to(run.device)).prediction.shape)
        for name, network in (("model", model), ("inference_model", run.inference_model)):
            one, two = (run.predict(problem.validation, network)[0] for _ in range(2))
            if tuple(one.shape) != wanted or not bool(torch.isfinite(one).all()):
                fail(
                    f"run.{name} predicts shape {tuple(one.shape)}, finite: {bool(torch.isfinite(one).all())}",
                    f"After finish it must predict finite values of shape {wanted}",
                )
            if difference(one, two):
                fail(
                    f"run.{name} predicts differently twice",
                    "In evaluation mode draw no random numbers, write no state",
                )


def check_state(subject: Subject) -> None:
    """``state_dict`` survives a checkpoint and ``load_state_dict``, and shares no memory with what was loaded."""
    with tempfile.TemporaryDirectory() as folder, isolated(0):
        run = subject.begin()
        for _ in one_epoch(run):
            pass
        state = snapshot(run.methods[0].state_dict())
        checkpoints.save({"state": state}, folder)
        loaded = checkpoints.load(folder)["state"]
        if text := difference(state, loaded):
            fail(
                f"a checkpoint changes the state: {text}",
                "Keep tensors, numbers, strings, None, lists and dicts of these",
            )
        other = subject.begin(seed=subject.problem.seed + 1)
        other.methods[0].load_state_dict(loaded)
        if text := difference(state, snapshot(other.methods[0].state_dict())):
            fail(f"load_state_dict does not restore the state: {text}", "Restore every entry that state_dict returns")
        for _ in one_epoch(other):
            pass
        if text := difference(state, loaded):
            fail(
                f"training writes into the loaded state: {text}",
                "Copy what is loaded: self.table.copy_(state['table'])",
            )


def check_resume(subject: Subject) -> None:
    """A run stopped in the middle of an epoch and resumed from its checkpoint equals an undisturbed one bit for bit."""
    problem = subject.problem.with_norm()
    first, one = subject.train(problem)
    if len(one.indices) <= STEP_OF_INTERRUPTION:
        skip(f"the problem trains for {len(one.indices)} steps, of which the check needs {STEP_OF_INTERRUPTION + 1}")
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"checkpoint": folder, "checkpoint_every": STEP_OF_CHECKPOINT}
        stopped = Spy()
        stopped.stop_at = STEP_OF_INTERRUPTION
        with suppress(Interrupted):
            problem.train([stopped, subject.make()], **options)
        second, two = subject.train(problem, **options, resume=True)
    text = _bits(first, one, second, two)
    if text:
        fail(
            f"a run resumed at step {STEP_OF_CHECKPOINT} differs from an undisturbed one: {text}",
            "Register what changes during training (run.register, run.new_generator), or add it to state_dict and load_state_dict",
        )


def check_interleaved(subject: Subject) -> None:
    """Two runs stepped in turn, in a loop of one's own, equal the same two runs by ``fit``, one after the other."""
    problem = subject.problem
    seeds = (problem.seed, problem.seed + 1)
    alone = [subject.train(seed=seed)[1] for seed in seeds]
    spies = [Spy(), Spy()]
    with isolated(0):
        loops = [_loop(subject, seed, spy) for seed, spy in zip(seeds, spies, strict=True)]
        states: list[Any] = [checkpoints.random_state()] * 2
        running = [0, 1]
        while running:
            for i in list(running):
                checkpoints.set_random_state(states[i])
                if next(loops[i], "done") == "done":
                    running.remove(i)
                states[i] = checkpoints.random_state()
    for one, two in zip(alone, spies, strict=True):
        text = difference([one.model, one.methods], [two.model, two.methods])
        if text:
            fail(
                f"two runs stepped in turn differ from the same runs one after the other: {text}",
                "Keep state on the object and in the run, not in the module, a cache or torch itself",
            )


# -- other data, other numbers ----------------------------------------------------------------------------------------
def check_permuted_rows(subject: Subject) -> None:
    """Permuting the rows of a batch changes neither its loss nor what the method remembers."""
    results = []
    for reverse in (False, True):
        with isolated(0):
            run = subject.begin(subject.problem.double())
            for _ in one_epoch(run):
                pass
            assert run.loader is not None
            batch = run.loader.data.take(torch.arange(1, 8))  # type: ignore[attr-defined]
            if reverse:
                batch = _rows(batch, torch.tensor([6, 2, 4, 0, 5, 1, 3]))
            loss = run.training_loss(batch).item()
            results.append([loss, snapshot(run.methods[0].state_dict())])
    text = difference(results[0], results[1], TOLERANCE)
    if text and subject.draws:
        skip("the method draws random numbers, which may differ for each row")
    if text:
        fail(
            f"permuting the rows of a batch changes the loss [0] or the state [1]: {text}",
            "Find state by batch.index, never by the position in the batch",
        )


def check_last_batch(subject: Subject) -> None:
    """A last batch of one example, and a training set smaller than a batch, train to finite weights."""
    size = subject.problem.batch_size
    for count in (2 * size + 1, size // 2 + 1):
        _, spy = subject.train(subject.problem.first(count))
        _finite(spy, f"with {count} examples in batches of {size}")


def check_float64(subject: Subject) -> None:
    """A float64 model trains in float64, with the loss of float32 up to rounding."""
    problem = subject.problem.double()
    run, spy = subject.train(problem)
    _finite(spy, "in float64")
    narrow = [name for name, p in run.model.named_parameters() if p.is_floating_point() and p.dtype != torch.float64]
    if narrow:
        fail(f"{', '.join(narrow)} are not float64", "Make new parameters in the dtype of the model's")
    if not subject.draws:
        _near(_first_loss(subject), _first_loss(subject, problem), 1e-4, "float32", "float64")


def check_bf16(subject: Subject) -> None:
    """Under bf16 autocast the run stays finite, and its first loss is near that of float32."""
    _, spy = subject.train(mixed_precision="bf16")
    _finite(spy, 'with mixed_precision="bf16"')
    _near(_first_loss(subject), _first_loss(subject, mixed_precision="bf16"), 0.05, "float32", "bf16")


def check_accumulation(subject: Subject) -> None:
    """A batch in two micro-batches gives the weights and the state of the whole batch."""
    problem = subject.problem.double()
    _, one = subject.train(problem)
    _, two = subject.train(problem, accumulation=2)
    _finite(two, "with accumulation=2")
    text = difference([one.model, one.methods], [two.model, two.methods], TOLERANCE)
    if text and subject.draws:
        skip("it trains; equality does not apply, because the method draws random numbers for each micro-batch")
    if text:
        fail(
            f"accumulation=2 differs from accumulation=1 in the model [0] or the state [1]: {text}",
            "Do once a step in after_step what must not happen once a micro-batch; where the loss couples the rows of a batch, "
            "skip this check with that reason",
        )


def check_dict_inputs(subject: Subject) -> None:
    """Inputs that are a dict of tensors give the same run as the tensor alone."""
    if not isinstance(subject.problem.examples.inputs, Tensor):
        skip("the problem's inputs are a dict already")
    _, one = subject.train()
    try:
        _, two = subject.train(subject.problem.keyword_inputs())
    except EquipoiseError as error:
        skip(f"the method refuses them: {error}")
    text = difference(list(one.model.values()), list(two.model.values()), TOLERANCE)
    if text:
        fail(
            f"the run differs from one with the tensor alone: {text}",
            "Treat every entry of a dict as the tensor (map_inputs)",
        )


def check_compile(subject: Subject) -> None:
    """A compiled model (backend aot_eager) trains to the weights of the plain one, also after one without the method."""

    def compiled() -> nn.Module:
        network = problem.network()
        network.compile(backend="aot_eager")
        return network

    problem = subject.problem.double()
    _, one = subject.train(problem)
    replace(problem, network=compiled).train([Spy()])
    _, two = subject.train(replace(problem, network=compiled))
    text = difference(one.model, two.model, TOLERANCE)
    if text:
        fail(
            f"compiling the model changes the run: {text}", "Change the model in prepare, before its first forward pass"
        )


# -- errors -----------------------------------------------------------------------------------------------------------
def check_missing_data(subject: Subject) -> None:
    """Without a training set the method works, or says in an ``EquipoiseError`` what it needs."""
    problem = subject.problem
    with isolated(0):
        try:
            run = start(problem.network(), problem.make_optimizer, methods=[subject.make()], loss=problem.loss)
            run.backward(run.training_loss(problem.examples.take(torch.arange(8))))
            run.step()
        except EquipoiseError:
            pass
        except Exception as error:
            fail(
                f"equipoise.start without data raises {type(error).__name__}: {error}",
                "Check run.num_examples, run.num_classes, run.total_epochs and run.validation for None in prepare, and raise "
                "an ArgumentError that says what to give",
            )


def check_missing_index(subject: Subject) -> None:
    """A batch without ``index`` works, or is refused by an ``EquipoiseError`` that mentions the index."""
    problem = subject.problem
    with isolated(0):
        run = subject.begin()
        count = len(problem.examples)
        tables = [name for name, size in _lengths(snapshot(run.methods[0].state_dict())) if size == count]
        remedy = "Read the positions by batch.positions(self.name), which raises the error"
        try:
            run.backward(run.training_loss(replace(problem.examples.take(torch.arange(8)), index=None)))
            run.step()
        except EquipoiseError as error:
            if "index" not in str(error):
                fail(f"a batch without index raises {error}", remedy)
        except Exception as error:
            fail(f"a batch without index raises {type(error).__name__}: {error}", remedy)
        else:
            if tables:
                fail(f"the method keeps {', '.join(tables)} per example, but accepts a batch without index", remedy)


def check_conflict(subject: Subject) -> None:
    """A second method that claims the same exclusive hook is refused by name."""
    mine = [hook for hook in EXCLUSIVE_HOOKS if subject.make().overrides(hook)]
    if not mine:
        skip("the method claims no exclusive hook")
    for hook in mine:
        rival = _RivalLoss() if hook == "loss" else _RivalSampler()
        try:
            subject.problem.train([subject.make(), rival])
        except MethodConflictError as error:
            if subject.method.name not in str(error):
                fail(f"the conflict is reported as {error}", "Its message must name the method: give it a name")
        else:
            fail(f"a second method with {hook} is accepted", f"Override {hook} as an ordinary method of the class")


class _RivalLoss(Method):
    """Replaces the loss, to be refused."""

    name = "rival"

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return output.prediction.sum()


class _RivalSampler(Method):
    """Decides the order, to be refused."""

    name = "rival"

    def configure_sampler(self, run: Run, sampler: Any) -> Any:
        return sampler


# -- shared -----------------------------------------------------------------------------------------------------------
def _bits(first: Run, one: Spy, second: Run, two: Spy) -> str | None:
    """The first difference in bits between two runs: model, methods, history, and the model after ``finish``."""
    pairs = {
        "the model": (one.model, two.model),
        "the method's state": (one.methods, two.methods),
        "the history": (first.history, second.history),
        "the finished model": (snapshot(dict(first.model.state_dict())), snapshot(dict(second.model.state_dict()))),
    }
    found = (f"{name}, {text}" for name, pair in pairs.items() if (text := difference(*pair)))
    return next(found, None)


def _globals(method: type[Method]) -> dict[str, Any]:
    """Fingerprints of the class's attributes and of its module's variables."""
    found: dict[str, Any] = {}
    for cls in method.__mro__:
        if cls in Method.__mro__:
            break
        found |= {f"{cls.__name__}.{key}": fingerprint(v) for key, v in vars(cls).items() if not key.startswith("__")}
    module = sys.modules.get(method.__module__)
    for key, value in vars(module).items() if module is not None else ():
        if not key.startswith("__") and not isinstance(value, type):
            found[f"{method.__module__}.{key}"] = fingerprint(value)
    return found


def _loop(subject: Subject, seed: int, spy: Spy) -> Iterator[None]:
    problem = subject.problem
    torch.manual_seed(seed)
    options = problem.options(seed=seed)
    run = start(problem.network(), data=problem.examples, methods=[spy, subject.make()], **options)
    for _ in range(problem.epochs):
        yield from one_epoch(run)
    run.finish()


def _rows(batch: Batch, order: Tensor) -> Batch:
    """The batch with its rows in another order."""
    return Batch(
        map_inputs(lambda t: t[order], batch.inputs),
        batch.targets[order],
        None if batch.index is None else batch.index[order],
        {name: extra[order] for name, extra in batch.extras.items()},
    )


def _inputs(examples: Any) -> Any:
    return examples.take(torch.arange(len(examples))).inputs


def _finite(spy: Spy, when: str) -> None:
    for name, tensor in spy.model.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fail(
                f"{when} the weights {name} are not finite", "Guard divisions, logarithms and means of empty selections"
            )


def _first_loss(subject: Subject, problem: Any = None, **options: Any) -> float:
    with isolated(0):
        run = subject.begin(problem, **options)
        assert run.loader is not None
        return run.training_loss(next(iter(run.loader))).item()


def _near(one: float, two: float, tolerance: float, name_one: str, name_two: str) -> None:
    if abs(one - two) > tolerance * max(1.0, abs(one)):
        fail(
            f"the first loss is {one:.6g} in {name_one} and {two:.6g} in {name_two}",
            "Take softmax, logarithms and sums in float32 at least, and nothing below the model's own precision",
        )


def _lengths(value: Any, where: str = "") -> Iterator[tuple[str, int]]:
    """Names and first dimensions of the tensors in a state."""
    if isinstance(value, Tensor) and value.ndim:
        yield where, len(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _lengths(item, f"{where}.{key}".lstrip("."))
