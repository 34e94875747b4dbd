"""Random views of a batch, which the run makes for the methods, and samplers that a task asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise
from equipoise import Examples, Method
from equipoise.data.augment import Jitter
from equipoise.errors import ArgumentError
from equipoise.testing.watch import Interrupted, Spy
from equipoise.training.batch import Batch
from equipoise.training.sampler import Balanced, ClassBatches


class Two(Method):
    """Looks at two views."""

    name = "two"
    views = 2

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def penalty(self, run: Any, batch: Batch, output: Any) -> torch.Tensor:
        self.seen.append(batch)
        return output.prediction.sum() * 0


def data(count: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    return Examples(torch.randn(count, 1, 4, 4, generator=generator), labels, group=labels + 10)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def train(*methods: Method, **options: Any) -> equipoise.Run:
    return equipoise.fit(model(), data(), epochs=2, batch_size=5, methods=methods, **options)


def test_views_are_stacked_view_major() -> None:
    two, examples = Two(), data()
    run = train(two, augment=Jitter(noise=0.1))
    batch = two.seen[0]
    assert run.views == 2 and batch.views == 2 and len(batch) == 10
    first, second = batch.inputs.split(5)
    clean = examples.inputs[batch.index[:5]]
    assert torch.equal(batch.index[:5], batch.index[5:])
    assert torch.equal(batch.targets, examples.targets[batch.index])
    assert torch.equal(batch.extras["group"], batch.targets + 10)
    assert not torch.equal(first, second)
    for view in (first, second):
        assert 0.05 < (view - clean).std() < 0.15


def test_one_view_without_such_a_method_and_none_without_augment() -> None:
    two = Two()
    run = train(two)
    assert run.views == 1 and run.augment is None and two.seen[0].views == 1 and len(two.seen[0]) == 5
    assert train(augment=Jitter(noise=0.1)).views == 1
    plain, jittered = train(), train(augment=Jitter(noise=0.5))
    assert not torch.equal(plain.model[1].weight, jittered.model[1].weight)
    assert torch.equal(train(augment=Jitter()).model[1].weight, plain.model[1].weight)


def test_the_views_of_a_resumed_run_go_on(tmp_path: Any) -> None:
    options = {"augment": Jitter(shift=1, noise=0.2), "checkpoint": tmp_path, "checkpoint_every": 2}
    whole = train(augment=Jitter(shift=1, noise=0.2))
    spy = Spy()
    spy.stop_at = 4
    with pytest.raises(Interrupted):
        train(spy, **options)
    resumed = train(Spy(), resume=True, **options)
    assert torch.equal(whole.model[1].weight, resumed.model[1].weight)


def test_dict_inputs_have_views() -> None:
    inputs = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 4)}
    views = [Jitter(noise=1.0)(inputs, torch.Generator().manual_seed(s)) for s in (0, 1)]
    batch = Batch(inputs, torch.arange(3)).with_views(views)
    assert batch.inputs["a"].shape == (6, 2) and batch.inputs["b"].shape == (6, 4)
    assert torch.equal(batch.inputs["b"][3:], views[1]["b"])
    assert batch.split(2)[0].views == 2


def test_jitter_shifts_every_example_by_whole_pixels() -> None:
    images = torch.arange(1.0, 401).reshape(25, 1, 4, 4)
    moved = Jitter(shift=1)(images, torch.Generator().manual_seed(0))
    padded = F.pad(images, [1, 1, 1, 1])
    seen = set()
    for i in range(25):
        offsets = [
            (a, b) for a in range(3) for b in range(3) if torch.equal(moved[i, 0], padded[i, 0, a : a + 4, b : b + 4])
        ]
        assert len(offsets) == 1
        seen |= set(offsets)
    assert len(seen) > 5
    sequences = torch.arange(1.0, 31).reshape(5, 1, 6)
    shifted = Jitter(shift=2)(sequences, torch.Generator().manual_seed(0))
    for i in range(5):
        padded = F.pad(sequences[i, 0], [2, 2])
        assert any(torch.equal(shifted[i, 0], padded[a : a + 6]) for a in range(5))
    with pytest.raises(ArgumentError, match="shift = 1: needs images"):
        Jitter(shift=1)(torch.zeros(2, 3), torch.Generator())
    with pytest.raises(ArgumentError, match="noise = -1"):
        Jitter(noise=-1)


def skewed() -> Examples:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([60, 20, 8, 2]))
    return Examples(torch.randn(90, 2), labels)


def test_class_batches_hold_p_classes_of_k_examples() -> None:
    examples = skewed()
    sampler = ClassBatches(per_class=4)(examples, 12, torch.Generator().manual_seed(0))
    order = torch.tensor(list(sampler))
    assert len(order) == len(sampler) == 84
    for rows in order.split(12):
        labels, counts = examples.targets[rows].unique(return_counts=True)
        assert len(labels) == 3 and counts.tolist() == [4, 4, 4]
        for label in labels:
            of_class = rows[examples.targets[rows] == label]
            assert len(of_class.unique()) == min(4, int((examples.targets == label).sum()))
    again = ClassBatches(per_class=4)(examples, 12, torch.Generator().manual_seed(0))
    assert order.tolist() == list(again) != list(again)


def test_class_batches_refuse_what_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="batch_size = 10: must be a multiple of per_class = 4"):
        ClassBatches(4)(skewed(), 10, torch.Generator())
    with pytest.raises(ArgumentError, match="at most 16, for 4 classes"):
        ClassBatches(4)(skewed(), 20, torch.Generator())
    with pytest.raises(ArgumentError, match="needs the class of every example"):
        ClassBatches(2)(Examples(torch.zeros(4, 1), torch.zeros(4, 1)), 4, torch.Generator())


@pytest.mark.parametrize(("power", "wanted"), [(0.0, [0.25] * 4), (1.0, [60 / 90, 20 / 90, 8 / 90, 2 / 90])])
def test_balanced_draws_classes_as_told(power: float, wanted: list[float]) -> None:
    examples = skewed()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([i for _ in range(40) for i in Balanced(power)(examples, 8, generator)])
    share = torch.bincount(examples.targets[drawn], minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.tensor(wanted), atol=0.03, rtol=0)


def test_fit_takes_a_sampler() -> None:
    seen = Two()
    equipoise.fit(nn.Linear(2, 4), skewed(), epochs=1, batch_size=6, methods=[seen], sampler=ClassBatches(per_class=3))
    assert all(len(batch.targets.unique()) == 2 for batch in seen.seen)


class Projecting(Method):
    """Needs features, and runs a part of its own that has no head."""

    name = "projecting"
    needs_features = True

    def prepare(self, run: Any) -> None:
        self.part = run.register(self, "part", nn.Tanh())

    def penalty(self, run: Any, batch: Batch, output: Any) -> torch.Tensor:
        assert output.features.shape == (len(batch), 16)
        return 0.1 * run.forward(output.features, self.part).prediction.mean()


@pytest.mark.parametrize("head", [None, "1"])
def test_a_part_without_a_head_may_run_beside_features(head: str | None) -> None:
    assert train(Projecting(), head=head).global_step == 6
