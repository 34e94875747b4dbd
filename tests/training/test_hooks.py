"""Hooks: their order, who may have them, and what a run offers inside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import blobs, far, mlp, same, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler, SequentialSampler, WeightedRandomSampler

import equipoise
from equipoise import Batch, Method, Output, Run
from equipoise.errors import ArgumentError, MethodConflictError
from equipoise.training.method import EXCLUSIVE_HOOKS, HOOKS


class Trace(Method):
    """Writes down every call."""

    name = "trace"

    def __init__(self, label: str = "a", exclusive: bool = True) -> None:
        self.label, self.exclusive = label, exclusive
        self.seen: list[str] = []

    def note(self, hook: str, run: Run, result: Any = None) -> Any:
        self.seen.append(hook)
        return result

    def prepare(self, run: Run) -> None:
        assert not hasattr(run, "optimizer")
        self.note("prepare", run)

    def configure_optimizer(self, run: Run, optimizer: Any) -> Any:
        return self.note("configure_optimizer", run, optimizer)

    def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
        return self.note("configure_sampler", run, sampler)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        return self.note("transform_batch", run, batch)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return self.note("loss", run, F.cross_entropy(output.prediction, batch.targets))

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return self.note("penalty", run, output.prediction.square().mean())

    def after_backward(self, run: Run) -> None:
        self.norm_before = norm(run)
        self.note("after_backward", run)

    def before_step(self, run: Run) -> None:
        self.norm_after = norm(run)
        self.weight = weight(run)
        self.note("before_step", run)

    def after_step(self, run: Run) -> None:
        assert not torch.equal(weight(run), self.weight)
        assert all(p.grad is None for p in run.model.parameters())
        self.note(f"after_step {run.global_step}", run)

    def stage_end(self, run: Run) -> None:
        self.note("stage_end", run)

    def epoch_end(self, run: Run) -> None:
        self.note(f"epoch_end {run.epoch}", run)

    def finish(self, run: Run) -> None:
        self.note("finish", run)


def norm(run: Run) -> float:
    return float(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm())


def weight(run: Run) -> Tensor:
    return next(run.model.parameters()).detach().clone()


def test_documented_order() -> None:
    trace = Trace()
    equipoise.fit(mlp(), blobs(20), epochs=2, batch_size=10, methods=[trace], clip_norm=0.01)
    step = ["transform_batch", "loss", "penalty", "after_backward", "before_step"]
    epochs = [[*step, f"after_step {2 * e + 1}", *step, f"after_step {2 * e + 2}", f"epoch_end {e}"] for e in range(2)]
    assert trace.seen == [
        "prepare",
        "configure_optimizer",
        "configure_sampler",
        *epochs[0],
        *epochs[1],
        "finish",
    ]
    assert trace.norm_before > 0.011
    assert trace.norm_after == pytest.approx(0.01, rel=1e-3)  # before_step sees clipped gradients


def test_methods_are_called_in_the_order_given_and_penalties_add_up() -> None:
    calls: list[str] = []

    class Named(Method):
        def __init__(self, label: str, strength: float) -> None:
            self.label, self.strength = label, strength

        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            calls.append(self.label)
            return batch

        def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
            return self.strength * output.prediction.square().mean()

    data = blobs(30)
    model = mlp()
    run = equipoise.start(model, sgd(model.parameters()), methods=[Named("b", 0.25), Named("a", 0.5)])
    found = run.training_loss(data)
    assert calls == ["b", "a"]
    logits = model(data[0])
    torch.testing.assert_close(found, F.cross_entropy(logits, data[1]) + 0.75 * logits.square().mean())


def test_stage_end_and_instance_hooks() -> None:
    method = Method()
    stages: list[int] = []
    method.stage_end = lambda run: stages.append(run.stage)
    model = mlp()
    run = equipoise.start(model, sgd(model.parameters()), methods=[method])
    run.begin_stage()
    run.begin_stage()
    assert stages == [1, 2]


def test_only_overridden_hooks_are_called() -> None:
    class Quiet(Method):
        name = "quiet"

    assert [hook for hook in HOOKS if Quiet().overrides(hook)] == []
    assert all(Trace().overrides(hook) for hook in HOOKS)
    equipoise.fit(mlp(), blobs(20), epochs=1, methods=[Quiet()])  # base hooks that raise are never reached


@pytest.mark.parametrize("hook", EXCLUSIVE_HOOKS)
def test_exclusive_hooks_conflict_naming_both(hook: str) -> None:
    first = type("First", (Method,), {"name": "first-one", hook: lambda *a: None})
    second = type("Second", (Method,), {hook: lambda *a: None})
    third = type("Third", (Method,), {"name": "third-one", hook: lambda *a: None})
    with pytest.raises(MethodConflictError, match="first-one and third-one"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=[first(), third()])
    with pytest.raises(MethodConflictError, match="first-one and Second"):  # no slug: the class's name
        equipoise.start(mlp(), sgd, methods=[first(), second()])


def test_class_instead_of_instance() -> None:
    with pytest.raises(ArgumentError, match=r"methods holds Trace.*Pass an instance: Trace\(\.\.\.\)"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=[Trace])
    with pytest.raises(ArgumentError, match=r"methods=\[Trace\(\.\.\.\)\]"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=Trace())
    with pytest.raises(ArgumentError, match="'elr'"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=["elr"])


def test_transform_batch_replaces_inputs_and_targets_softly() -> None:
    class Smooth(Method):
        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            return Batch(batch.inputs, F.one_hot(batch.targets, 3) * 0.7 + 0.1)

    model = mlp()
    run = equipoise.start(model, sgd(model.parameters()), methods=[Smooth()])
    inputs, labels = blobs(30)
    wanted = F.cross_entropy(model(inputs), labels, label_smoothing=0.3)
    torch.testing.assert_close(run.training_loss((inputs, labels)), wanted)


def test_sampler_of_a_method_decides_the_order_and_the_length() -> None:
    class Half(Method):
        name = "half"

        def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
            return SequentialSampler(range(run.num_examples // 2))

    class See(Method):
        def __init__(self) -> None:
            self.rows: list[int] = []

        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            self.rows += batch.positions("see").tolist()
            return batch

    see = See()
    run = equipoise.fit(mlp(), blobs(40), epochs=2, batch_size=8, methods=[Half(), see])
    assert see.rows == [*range(20), *range(20)]
    assert run.total_steps == run.global_step == 6


def test_weighted_sampler_keeps_to_its_generator() -> None:
    class Weighted(Method):
        name = "weighted"

        def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
            weights = (torch.arange(run.num_examples) % 2).tolist()
            return WeightedRandomSampler(weights, 30, generator=run.new_generator(self))

    class Odd(Method):
        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            assert (batch.positions("odd") % 2 == 1).all()
            return batch

    models = [equipoise.fit(mlp(), blobs(), epochs=2, batch_size=10, methods=[Weighted(), Odd()]).model for _ in "12"]
    assert same(*models)


def test_registered_module_trains_and_needs_prepare() -> None:
    class Peer(Method):
        name = "peer"

        def prepare(self, run: Run) -> None:
            self.net = run.register(self, "net", nn.Linear(6, 3), optimize=True)
            self.start = self.net.weight.detach().clone()

        def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
            return run.forward(batch.inputs, self.net).prediction.square().mean()

    peer = Peer()
    run = equipoise.fit(mlp(), blobs(), epochs=1, methods=[peer])
    assert not torch.equal(peer.start, peer.net.weight)
    assert len(run.trainable_parameters()) == 6
    assert peer.state_dict()["net"].keys() == {"weight", "bias"}

    class Late(Method):
        def epoch_end(self, run: Run) -> None:
            run.register(self, "net", nn.Linear(1, 1), optimize=True)

    with pytest.raises(ArgumentError, match="inside prepare"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=[Late()])


def test_prepare_may_replace_weights_and_the_optimizer_follows() -> None:
    class Double(Method):
        def prepare(self, run: Run) -> None:
            run.model[0] = nn.Linear(6, 16)

    model = mlp()
    given = sgd(model.parameters())
    run = equipoise.start(model, given, methods=[Double()])
    trained = {id(p) for p in run.trainable_parameters()}
    assert all(id(p) in trained for p in model.parameters())
    with pytest.raises(ArgumentError, match="optimizer holds none of the model's parameters"):
        equipoise.start(mlp(), sgd(mlp().parameters()))


def test_log_joins_the_history() -> None:
    class Log(Method):
        def after_step(self, run: Run) -> None:
            run.log("step", run.global_step)
            run.log("tensor", torch.tensor(2.0))

    history = equipoise.fit(mlp(), blobs(40), epochs=2, batch_size=10, methods=[Log()]).history
    assert [record["step"] for record in history] == [2.5, 6.5]
    assert [record["tensor"] for record in history] == [2.0, 2.0]
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[0]["train_loss"] > history[1]["train_loss"] > 0


def test_inference_model_is_what_predicts_and_follows_a_replaced_model() -> None:
    class Average(Method):
        def prepare(self, run: Run) -> None:
            self.twin = nn.Sequential(run.model, nn.Flatten(), nn.Identity())
            run.inference_model = self.twin

    run = equipoise.fit(mlp(), blobs(), epochs=1, methods=[Average()])
    assert run.inference_model is run.methods[0].twin

    class Shrink(Method):
        def finish(self, run: Run) -> None:
            run.model = nn.Sequential(run.model, nn.Softmax(1))

    run = equipoise.fit(mlp(), blobs(), epochs=1, methods=[Shrink()])
    assert run.inference_model is run.model
    torch.testing.assert_close(run.predict(blobs())[0].sum(1), torch.ones(90))


def test_finish_returns_the_model_a_method_made() -> None:
    class Wrap(Method):
        def finish(self, run: Run) -> None:
            run.model = nn.Sequential(run.model)

    model = mlp()
    run = equipoise.start(model, sgd(model.parameters()), methods=[Wrap()])
    assert isinstance(run.finish()[0], nn.Sequential)


def test_settings_repr_and_streams() -> None:
    assert Trace("x").settings() == {"label": "x", "exclusive": True}
    assert repr(Trace("x")) == "Trace(label='x', exclusive=True)"
    model = mlp()
    run = equipoise.start(model, sgd(model.parameters()), seed=3)
    again = equipoise.start(model, sgd(model.parameters()), seed=3)
    other = equipoise.start(model, sgd(model.parameters()), seed=4)
    draws = [torch.rand(3, generator=r.new_generator(Trace(), "n")) for r in (run, again, other)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], torch.rand(3, generator=run.new_generator(Trace(), "m")))


def test_gradients_left_behind_before_the_run_do_not_count() -> None:
    data, models = blobs(), [mlp(), mlp()]
    F.cross_entropy(models[1](data[0]), data[1]).backward()
    for model in models:
        equipoise.fit(model, data, epochs=1)
    assert far(*models) == 0
