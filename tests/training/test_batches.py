"""Batch, Output, Examples and Loader by themselves."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import blobs
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from equipoise import Batch, Examples, Output, indexed
from equipoise.errors import ArgumentError, DataError
from equipoise.training import Loader
from equipoise.training.batch import as_dataset, map_inputs, size_of


# -- Batch -------------------------------------------------------------------------------------------------------------
def test_batch_of_everything_a_loader_yields() -> None:
    x, y, i, g = torch.randn(4, 2), torch.arange(4), torch.arange(4) + 10, torch.ones(4)
    assert Batch.of(Batch(x, y)).inputs is x
    for item in ((x, y), [x, y], {"inputs": x, "targets": y}):
        batch = Batch.of(item)
        assert batch.inputs is x and batch.targets is y and batch.index is None and batch.extras == {}
    for item in ((x, y, i), {"inputs": x, "labels": y, "index": i}):
        assert Batch.of(item).positions("x") is i
    assert Batch.of({"inputs": x, "targets": y, "group": g}).extras == {"group": g}
    words = {"input_ids": x, "attention_mask": g, "labels": y, "index": i}
    batch = Batch.of(words)
    assert batch.inputs == {"input_ids": x, "attention_mask": g} and batch.targets is y and batch.index is i
    assert set(words) == {"input_ids", "attention_mask", "labels", "index"}  # the caller's dict is left alone
    for bad in ("text", 3, (x,), (x, y, i, g)):
        with pytest.raises(DataError):
            Batch.of(bad)


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
@pytest.mark.parametrize("parts", [1, 2, 5, 7, 99])
def test_split_is_even_and_complete(rows: int, parts: int) -> None:
    x = torch.arange(rows * 2).view(rows, 2)
    batch = Batch(
        {"a": x, "b": x + 1}, torch.arange(rows), torch.arange(rows) + 5, {"g": torch.arange(rows), "n": "name"}
    )
    pieces = batch.split(parts)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == min(rows, parts) and max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([piece.inputs["a"] for piece in pieces]), x)
    assert torch.equal(torch.cat([piece.positions("x") for piece in pieces]), torch.arange(rows) + 5)
    assert torch.equal(torch.cat([piece.extras["g"] for piece in pieces]), batch.targets)
    assert all(piece.extras["n"] == "name" for piece in pieces)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("parts", [2, 3, 4, 50])
def test_all_processes_cut_equally_many_pieces(world: int, size: int, parts: int) -> None:
    shards = [next(Loader(Examples(*blobs(9)), size, rank=rank, world=world).batches()) for rank in range(world)]
    assert len({len(shard.split(parts)) for shard in shards}) == 1
    assert sum(
        shard.weight * len(piece) / len(shard) for shard in shards for piece in shard.split(parts)
    ) == pytest.approx(world)


def test_batch_moves_as_a_whole() -> None:
    batch = Batch({"a": torch.ones(2)}, torch.ones(2), torch.arange(2), {"g": torch.ones(2), "n": 1}, weight=0.5)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["a"].device.type == moved.extras["g"].device.type == moved.positions("x").device.type == "meta"
    assert moved.weight == 0.5 and moved.extras["n"] == 1


def test_inputs_of_both_kinds() -> None:
    x = torch.ones(3, 2)
    assert size_of(x) == size_of({"a": x}) == 3
    assert torch.equal(map_inputs(lambda t: t + 1, x), x + 1)
    assert torch.equal(map_inputs(lambda t: t + 1, {"a": x})["a"], x + 1)


# -- Output ------------------------------------------------------------------------------------------------------------
def test_output_of_everything_a_model_returns() -> None:
    z, f = torch.ones(2, 3), torch.zeros(2, 4)
    whole = Output(z, features=f)
    assert Output.of(whole) is whole
    for result in (z, {"logits": z}, OrderedDict(loss=None, logits=z), {"prediction": z}, SimpleNamespace(logits=z)):
        assert Output.of(result).prediction is z
    output = Output.of({"prediction": z, "features": f, "fused": f, "unimodal": [f], "router": None, "other": 1})
    assert output.features is f and output.fused is f and output.unimodal == [f]
    assert Output.of({"logits": z, "features": f}).features is f
    for bad in (None, (z,), {"scores": z}, SimpleNamespace(logits=None)):
        with pytest.raises(ArgumentError, match="model output"):
            Output.of(bad)


# -- Examples ----------------------------------------------------------------------------------------------------------
def test_examples_take_rows_in_order() -> None:
    x, y = blobs(20)
    data = Examples({"x": x}, y, group=torch.arange(20))
    index = torch.tensor([4, 2, 4])
    batch = data.take(index)
    assert torch.equal(batch.inputs["x"], x[index]) and torch.equal(batch.targets, y[index])
    assert torch.equal(batch.extras["group"], index) and torch.equal(batch.positions("x"), index)
    assert data.num_classes == 3 and len(data) == 20


def test_subsets_by_position_list_and_mask() -> None:
    x, y = blobs(20)
    data = Examples(x, y, num_classes=7, group=torch.arange(20))
    mask = y == 1
    for rows in (mask, mask.nonzero().squeeze(1), mask.nonzero().squeeze(1).tolist()):
        part = data.subset(rows)
        assert torch.equal(part.inputs, x[mask]) and part.num_classes == 7
        assert torch.equal(part.extras["group"], torch.arange(20)[mask])
        assert torch.equal(part.take(torch.tensor([0])).positions("x"), torch.tensor([0]))


def test_examples_leave_the_callers_tensors_alone() -> None:
    x, y = blobs(5)
    data = Examples(x, y)
    assert data.inputs is x and data.targets is y
    assert Examples(x, y.to(torch.int32)).targets.dtype == torch.int64
    assert Examples(x, x).num_classes == 6 and Examples(x, x[:, 0]).num_classes is None
    with pytest.raises(DataError, match="group has 3 rows but targets has 5"):
        Examples(x, y, group=torch.ones(3))


def test_as_dataset() -> None:
    x, y = blobs(5)
    data = Examples(x, y)
    assert as_dataset(data) is data
    assert isinstance(as_dataset((x, y)), Examples) and isinstance(as_dataset(TensorDataset(x, y)), Examples)
    wrapped = indexed(TensorDataset(x, y))
    assert as_dataset(wrapped) is wrapped and wrapped[3][2] == 3
    assert as_dataset([(x[i], y[i]) for i in range(5)])[4][2] == 4
    with pytest.raises(DataError, match="validation is empty"):
        as_dataset([], "validation")


# -- Loader ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda d, g: RandomSampler(d, generator=g),
        lambda d, g: RandomSampler(d, replacement=True, num_samples=30, generator=g),
        lambda d, g: RandomSampler(d, num_samples=50, generator=g),
        lambda d, g: WeightedRandomSampler([1.0] * 20, 33, generator=g),
        lambda d, g: SubsetRandomSampler(range(7), generator=g),
        lambda d, g: SequentialSampler(d),
    ],
)
def test_loader_follows_any_sampler_epoch_after_epoch(make: Any) -> None:
    data = Examples(*blobs(20))
    sampler = make(data, torch.Generator().manual_seed(3))
    loader = Loader(data, 8, sampler=make(data, torch.Generator().manual_seed(3)))
    for _ in range(3):
        wanted = torch.tensor(list(sampler))
        batches = list(loader)
        assert torch.equal(torch.cat([batch.positions("x") for batch in batches]), wanted)
        assert len(batches) == len(loader)


def test_loader_goes_on_within_an_order() -> None:
    data = Examples(*blobs(20))
    loader = Loader(data, 6, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)))
    order = loader.order()
    rest = [batch.positions("x") for batch in loader.batches(order, skip=2)]
    assert torch.equal(torch.cat(rest), order[12:])
    assert list(loader.batches(order, skip=4)) == []


@pytest.mark.parametrize("count", [12, 13, 17, 18])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["examples", "dataset"])
def test_shards_make_up_the_global_batches_and_weights_the_global_mean(count: int, world: int, kind: str) -> None:
    x, y = blobs(count)
    data: Any = Examples(x, y) if kind == "examples" else as_dataset(list(zip(x, y, strict=True)))
    loaders = [Loader(data, 6, rank=rank, world=world) for rank in range(world)]
    shards = [list(loader) for loader in loaders]
    kept = list(Loader(data, 6))
    if 0 < count % 6 < world:  # too few for every process: left out
        kept = kept[:-1]
    assert {len(shard) for shard in shards} == {len(loader) for loader in loaders} == {len(kept)}
    for whole, *parts in zip(kept, *shards, strict=True):
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.positions("x") for part in parts]), whole.positions("x"))
        means = torch.stack([tensor(part).mean() * part.weight for part in parts])
        torch.testing.assert_close(means.mean(), tensor(whole).mean())  # DDP averages over processes


def tensor(batch: Batch) -> Tensor:
    assert isinstance(batch.inputs, Tensor)
    return batch.inputs.double()


def test_loader_refuses_batches_smaller_than_the_processes() -> None:
    data = Examples(*blobs(20))
    for size, message in ((0, "batch_size = 0"), (2, "batch_size = 2.*each of the 3 processes")):
        with pytest.raises(ArgumentError, match=message):
            Loader(data, size, world=3)
    with pytest.raises(ArgumentError, match="for 2 examples"):
        Loader(Examples(*blobs(2)), 8, world=3)
