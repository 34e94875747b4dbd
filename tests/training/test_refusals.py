"""What a user can get wrong: one clear error, before training where it can be known, with the step and term where not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import blobs, mlp, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import equipoise
from equipoise import Batch, Examples, Method, Output, Run
from equipoise.errors import ArgumentError, DataError, NonFiniteError
from equipoise.training.features import find_head


# -- runs that go non-finite -------------------------------------------------------------------------------------------
class Spoil(Method):
    """Returns a bad term at one step."""

    name = "spoil"

    def __init__(self, hook: str, step: int, value: float = math.nan) -> None:
        self.step, self.value = step, value
        setattr(self, hook, getattr(self, f"bad_{hook}"))

    def bad_penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return output.prediction.sum() * (self.value if run.global_step == self.step else 0.0)

    def bad_loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return F.cross_entropy(output.prediction, batch.targets) * (self.value if run.global_step == self.step else 1.0)

    def bad_after_backward(self, run: Run) -> None:
        if run.global_step == self.step:
            next(run.model.parameters()).grad.fill_(self.value)

    def bad_after_step(self, run: Run) -> None:
        if run.global_step == self.step:
            with torch.no_grad():
                next(run.model.parameters()).fill_(self.value)


class Calm(Method):
    name = "calm"

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return output.prediction.sum() * 0.0


@pytest.mark.parametrize("looks", [1, 4, 50])  # every step as on a CPU; less often as on an accelerator
@pytest.mark.parametrize(
    ("hook", "step", "message"),
    [
        ("penalty", 2, "step 2: the penalty of spoil is nan"),
        ("loss", 2, "step 2: the loss of spoil is nan"),
        ("after_backward", 2, "step 2: the norm of the gradient is nan"),
        ("after_step", 3, "step 3: the (task's loss is|weights)"),
        ("after_step", 5, "step 5: the weights 0.weight hold NaN"),
    ],
)
def test_step_and_term_are_named(
    hook: str, step: int, message: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Look(Method):
        name = "look"

        def configure_optimizer(self, run: Run, optimizer: Any) -> Any:
            return optimizer

        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            run._look_every = looks
            return batch

    methods = [Look(), Calm(), Spoil(hook, step)]
    if hook == "after_step" and step == 3 and looks > 1:
        message = "step 3: the task's loss is nan, the penalty of calm is nan"
    with pytest.raises(NonFiniteError, match=message) as caught:
        equipoise.fit(mlp(), blobs(), epochs=1, batch_size=18, clip_norm=1.0, methods=methods)
    assert "Lower the learning rate" in str(caught.value)
    assert "calm" not in str(caught.value) or hook == "after_step"


def test_infinite_and_the_tasks_own_loss() -> None:
    with pytest.raises(NonFiniteError, match=r"step 0: the penalty of spoil is (-?inf|nan)"):
        equipoise.fit(mlp(), blobs(), epochs=1, methods=[Spoil("penalty", 0, math.inf)])
    with pytest.raises(NonFiniteError, match="step 0: the task's loss is nan"):
        equipoise.fit(mlp(), blobs(), epochs=1, loss=lambda p, t: (p.sum() * 0 - 1).sqrt())
    with pytest.raises(NonFiniteError, match=r"step \d+: the"):
        equipoise.fit(mlp(), blobs(), epochs=40, optimizer=lambda p: torch.optim.SGD(p, lr=1e20))


def test_losses_are_summed_alike_however_often_one_looks() -> None:
    class Look(Method):
        def transform_batch(self, run: Run, batch: Batch) -> Batch:
            run._look_every = 3
            return batch

    every = equipoise.fit(mlp(), blobs(), epochs=2, batch_size=10).history
    seldom = equipoise.fit(mlp(), blobs(), epochs=2, batch_size=10, methods=[Look()]).history
    assert [r["train_loss"] for r in every] == pytest.approx([r["train_loss"] for r in seldom], rel=1e-6)


# -- data --------------------------------------------------------------------------------------------------------------
class Broken(nn.Module):
    """A model that must never be called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("training began")


def with_nan() -> Tensor:
    inputs = blobs()[0].clone()
    inputs[[3, 7], 2] = math.nan
    inputs[3, 1] = math.inf
    return inputs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((with_nan(), blobs()[1]), "inputs holds NaN or infinite values in 2 of 90 rows"),
        (({"x": with_nan()}, blobs()[1]), "x holds NaN"),
        ((blobs()[0], torch.tensor([1.0, math.nan] * 45)), "targets holds NaN or infinite values in 45 of 90"),
        ((blobs()[0], blobs()[1] - 1), "class -1: classes are numbered from 0"),
        ((blobs()[0], blobs()[1][:80]), "inputs has 90 rows but targets has 80"),
        ((blobs()[0][:0], blobs()[1][:0]), "data is empty"),
        ((blobs()[0], torch.tensor(3)), "targets = Tensor: must be a tensor with one row per example"),
        (([1, 2, 3], torch.tensor([0, 1, 0])), "inputs = list"),
        ((blobs()[0].numpy(), blobs()[1].numpy()), "torch.as_tensor"),
        ([blobs()[0].numpy(), blobs()[1].numpy()], "torch.as_tensor"),
        ((blobs()[0], [0] * 90), "torch.as_tensor"),
        (blobs()[0].numpy(), r"item \d+ of the data set is ndarray"),
        (iter([]), "data = list_iterator: must be"),
        (None, "data"),
    ],
)
def test_data_is_refused_before_training(data: Any, message: str) -> None:
    with pytest.raises((DataError, ArgumentError), match=message):
        equipoise.fit(Broken(), data, epochs=1)


def test_labels_out_of_range() -> None:
    inputs, labels = blobs()
    with pytest.raises(ArgumentError, match="num_classes = 2: must be at least 3"):
        equipoise.fit(Broken(), (inputs, labels), epochs=1, num_classes=2)
    with pytest.raises(DataError, match="class 2 but num_classes = 2"):
        Examples(inputs, labels, num_classes=2)
    with pytest.raises(ArgumentError, match="num_classes = 3: must be at least 8"):
        equipoise.fit(Broken(), (inputs, labels), epochs=1, validation=(inputs, labels + 5), num_classes=3)
    with pytest.raises(ArgumentError, match=r"model output has shape \(90, 2\): must be \(90, 3\)"):
        equipoise.fit(mlp(classes=2), (inputs, labels), epochs=1)

    class Late(Dataset[Any]):
        """Labels are seen only when they are drawn."""

        def __len__(self) -> int:
            return 90

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return inputs[i], 9 if i == 89 else int(labels[i])

    with pytest.raises((DataError, ArgumentError), match=r"labels must lie in|must be \(\d+, 10\)"):
        equipoise.fit(mlp(), Late(), epochs=1, batch_size=30)


@pytest.mark.parametrize(
    ("targets", "counts"),
    [
        (["cat", "dog"], None),
        ([{"box": 1}, {"box": 2}], None),
        ([0, 1, 1], None),  # of another length: not the labels of these examples
        ([0, 1], [1, 1]),
        (np.array([1, 1]), [0, 2]),
        ([0.5, 1.5], None),
        (3, None),
    ],
)
def test_what_a_dataset_calls_targets_is_used_only_if_it_is_labels(targets: Any, counts: list[int] | None) -> None:
    class Own(Dataset[Any]):
        def __init__(self) -> None:
            self.targets = targets

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.zeros(6), 1

    run = equipoise.start(mlp(), sgd, data=Own())
    assert (run.class_counts if counts is None else run.class_counts.tolist()) == counts
    targets_below = Own()
    targets_below.targets = [-1, 0]
    with pytest.raises(DataError, match="class -1"):
        equipoise.start(mlp(), sgd, data=targets_below)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(6),), r"item \d of the data set is tuple: must be \(inputs, target\) or a dict"),
        (torch.zeros(6), "item . of the data set is Tensor"),
        ({"x": torch.zeros(6)}, r"batch has keys \['x'\]: it must hold targets under one of targets, labels"),
    ],
)
def test_items_of_a_dataset(item: Any, message: str) -> None:
    class Own(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            return item

    with pytest.raises(DataError, match=message):
        equipoise.fit(mlp(), Own(), epochs=1)


def test_batches_of_an_own_loop() -> None:
    run = equipoise.start(mlp(), sgd)
    with pytest.raises(DataError, match="batch = int"):
        run.training_loss(3)
    with pytest.raises(ArgumentError, match="data, batch_size = None"):
        run.batches()

    class Table(Method):
        def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
            return batch.positions("table").sum() * 0.0

    run = equipoise.start(mlp(), sgd, methods=[Table()])
    with pytest.raises(ArgumentError, match=r"batch.index = None: table keeps state .* equipoise.indexed\(dataset\)"):
        run.training_loss(blobs())


# -- models and losses -------------------------------------------------------------------------------------------------
class Returns(nn.Module):
    """Returns whatever it is told to, connected to a parameter."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(6, 3), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda z: z[:5], r"model output has shape \(5, 3\): must be \(90, 3\)"),
        (lambda z: z[:, 0], r"shape \(90,\): must be \(90, 3\)"),
        (lambda z: z[:, :, None], r"shape \(90, 3, 1\): must be \(90, 3\)"),
        (lambda z: z.sum(), r"shape \(\): must be \(90, 3\)"),
        (lambda z: "text", "model output = str: must be a tensor"),
        (lambda z: {"scores": z}, "model output = dict"),
        (lambda z: (z, z), "model output = tuple"),
    ],
)
def test_model_output(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        equipoise.fit(Returns(make), blobs(), epochs=1)


def test_values_need_a_loss_and_no_silent_broadcasting() -> None:
    inputs = blobs()[0]
    with pytest.raises(ArgumentError, match=r"loss = None: is cross-entropy.*mse_loss"):
        equipoise.fit(mlp(), (inputs, inputs[:, 0]), epochs=1)
    for loss in (F.mse_loss, nn.L1Loss()):
        with pytest.raises(ArgumentError, match=r"model output has shape \(90, 1\): must be \(90,\)"):
            equipoise.fit(nn.Linear(6, 1), (inputs, inputs[:, 0]), epochs=1, loss=loss)
    with pytest.raises(ArgumentError, match=r"shape \(90, 3\): must be \(90, 2\)"):
        equipoise.fit(mlp(), (inputs, torch.full((90, 2), 0.5)), epochs=1)
    equipoise.fit(nn.Linear(6, 1), (inputs, inputs[:, 0]), epochs=1, loss=lambda p, t: F.mse_loss(p.squeeze(1), t))


def test_loss_must_be_a_scalar() -> None:
    with pytest.raises(ArgumentError, match=r"loss has shape \(90,\): must be a scalar"):
        equipoise.fit(mlp(), blobs(), epochs=1, loss=lambda p, t: F.cross_entropy(p, t, reduction="none"))


def test_find_head() -> None:
    model = mlp()
    assert find_head(model, "0") is model[0]
    with pytest.raises(ArgumentError, match=r"head = 'classifer': must name a module.*Did you mean 'classifier'"):
        find_head(nn.ModuleDict({"classifier": nn.Linear(2, 2)}), "classifer")
    with pytest.raises(ArgumentError, match=r"head = None: the model has no nn\.Linear"):
        find_head(nn.Sequential(nn.Conv2d(1, 1, 1)))


# -- arguments ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0: must be an integer >= 1"),
        ({"epochs": 1.5}, "epochs = 1.5"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"accumulation": 0}, "accumulation = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": "0"}, "seed = '0'"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"clip_norm": 0}, "clip_norm = 0"),
        ({"clip_norm": math.nan}, "clip_norm = nan"),
        ({"mixed_precision": "bf17"}, "mixed_precision = 'bf17': must be one of 'no', 'bf16'. Did you mean 'bf16'"),
        ({"checkpoint_every": 0, "checkpoint": "x"}, "checkpoint_every = 0"),
        ({"checkpoint_every": 3}, "checkpoint = None"),
        ({"resume": True}, "checkpoint = None"),
        ({"optimizer": lambda p: 3}, "optimizer = int: must be a torch Optimizer"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd': must be a torch Optimizer"),
        ({"scheduler": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, "ReduceLROnPlateau"),
    ],
)
def test_arguments_of_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        equipoise.fit(Broken(), blobs(), **{"epochs": 1, **settings})


@pytest.mark.parametrize(("model", "given"), [(None, "None"), (nn.Linear, "Linear")])
def test_a_model_is_an_instance(model: Any, given: str) -> None:
    with pytest.raises(ArgumentError, match=f"model = {given}: must be an instance"):
        equipoise.fit(model, (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), epochs=1)


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="'lr'"):
        equipoise.fit(Broken(), blobs(), epochs=1, lr=0.1)
    with pytest.raises(TypeError, match="'lr'"):
        equipoise.start(mlp(), sgd, lr=0.1)
    with pytest.raises(ArgumentError, match="give epochs with data and batch_size, or total_steps"):
        equipoise.start(mlp(), sgd, scheduler=lambda o, n: None)


def test_an_accelerator_must_not_scale_the_loss_again() -> None:
    from accelerate import Accelerator

    with pytest.raises(ArgumentError, match=r"gradient_accumulation_steps = 4.*fit\(accumulation"):
        equipoise.start(mlp(), sgd, accelerator=Accelerator(gradient_accumulation_steps=4))
    own = Accelerator()
    assert equipoise.start(mlp(), sgd, accelerator=own).accelerator is own
