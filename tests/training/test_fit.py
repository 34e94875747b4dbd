"""``fit`` against loops written by hand; precision, accumulation, clipping; randomness; kinds of inputs and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Stateful, blobs, cosine, far, hand_loop, mlp, same, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import equipoise
from equipoise import Batch, Examples, Method, Output, Run
from equipoise.training.features import find_head


# -- against loops written by hand -------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [16, 45, 200])  # uneven last batch, even batches, one batch
def test_equals_a_hand_written_loop_bit_for_bit(batch_size: int) -> None:
    ours, theirs = mlp(dropout=0.3, norm=True), mlp(dropout=0.3, norm=True)
    settings: dict[str, Any] = {"epochs": 3, "batch_size": batch_size, "optimizer": sgd, "scheduler": cosine, "seed": 5}
    equipoise.fit(ours, blobs(), clip_norm=0.5, **settings)
    hand_loop(theirs, blobs(), clip=0.5, **settings)
    assert same(ours, theirs)


def test_default_optimizer_is_as_documented() -> None:
    ours, theirs = mlp(), mlp()
    equipoise.fit(ours, blobs(), epochs=2, batch_size=32)
    hand_loop(theirs, blobs(), epochs=2, batch_size=32, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    assert same(ours, theirs)


def test_optimizer_and_scheduler_may_be_ready_made() -> None:
    ours, theirs = mlp(), mlp()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    equipoise.fit(ours, blobs(), epochs=2, batch_size=32, optimizer=optimizer, scheduler=schedule)
    hand_loop(
        theirs,
        blobs(),
        epochs=2,
        batch_size=32,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        scheduler=lambda o, _: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    )
    assert same(ours, theirs)


@pytest.mark.parametrize("methods", [list, lambda: [Stateful()]])
def test_own_loop_equals_fit(methods: Callable[[], list[Method]]) -> None:
    data = blobs()
    by_fit, by_hand = mlp(), mlp()
    equipoise.fit(by_fit, data, epochs=2, batch_size=20, optimizer=sgd, methods=methods(), clip_norm=1.0)

    run = equipoise.start(by_hand, sgd, methods=methods(), data=data, clip_norm=1.0)
    sampler = torch.utils.data.RandomSampler(range(90), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(Examples(*data), 20, sampler=sampler)
    for _ in range(2):
        for batch in loader:
            loss = run.training_loss(batch)
            run.backward(loss)
            run.step()
        run.end_epoch()
    run.finish()
    assert same(by_fit, by_hand)


def test_own_loop_over_the_runs_own_batches() -> None:
    by_fit, by_hand = mlp(), mlp()
    equipoise.fit(by_fit, blobs(), epochs=2, batch_size=20, optimizer=sgd, scheduler=cosine)
    run = equipoise.start(by_hand, sgd, data=blobs(), batch_size=20, epochs=2, scheduler=cosine)
    while run.epoch < 2:
        for batch in run.batches():
            run.backward(run.training_loss(batch))
            run.step()
        run.end_epoch()
    assert same(by_fit, by_hand)
    assert run.global_step == run.total_steps == 10


# -- randomness --------------------------------------------------------------------------------------------------------
def test_global_generators_are_left_as_they_were() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    equipoise.fit(mlp(dropout=0.5), blobs(), epochs=1, methods=[Stateful()], validation=blobs(seed=2))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="stop"):
        equipoise.fit(
            mlp(dropout=0.5), blobs(), epochs=1, on_epoch_end=lambda run: (_ for _ in ()).throw(RuntimeError("stop"))
        )
    assert torch.equal(before, torch.get_rng_state())


def test_the_global_generator_before_does_not_matter_and_the_seed_does() -> None:
    models = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        models.append(equipoise.fit(mlp(dropout=0.5), blobs(), epochs=1, seed=seed).model)
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_a_run_inside_another_changes_nothing() -> None:
    alone, outer = mlp(dropout=0.5), mlp(dropout=0.5)
    equipoise.fit(alone, blobs(), epochs=3, batch_size=32)
    inner: list[nn.Module] = []

    def nested(run: Run) -> None:
        inner.append(equipoise.fit(mlp(dropout=0.5), blobs(), epochs=3, batch_size=32).model)

    equipoise.fit(outer, blobs(), epochs=3, batch_size=32, on_epoch_end=nested)
    assert same(alone, outer) and all(same(alone, model) for model in inner)


def test_two_runs_step_by_step_in_turn() -> None:
    alone = [mlp(seed=1), mlp(seed=2)]
    for model in alone:
        equipoise.fit(model, blobs(), epochs=1, batch_size=20, methods=[Stateful()], optimizer=sgd)
    turns = [mlp(seed=1), mlp(seed=2)]
    runs = [equipoise.start(m, sgd, methods=[Stateful()], data=blobs(), batch_size=20) for m in turns]
    for pair in zip(*(run.batches() for run in runs), strict=True):
        for run, batch in zip(runs, pair, strict=True):
            run.backward(run.training_loss(batch))
            run.step()
    assert all(same(a, b) for a, b in zip(alone, turns, strict=True))


# -- precision, accumulation, clipping ---------------------------------------------------------------------------------
class See(Method):
    """Keeps what the loss would see."""

    needs_features = True

    def __init__(self) -> None:
        self.prediction: list[torch.dtype] = []
        self.features: list[torch.dtype] = []

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None
        self.prediction.append(output.prediction.dtype)
        self.features.append(output.features.dtype)
        return output.prediction.sum() * 0


def test_bf16_is_used_in_the_model_only_and_float32_is_the_default() -> None:
    plain, half, see = mlp(), mlp(), [See(), See()]
    equipoise.fit(plain, blobs(), epochs=3, methods=[see[0]])
    equipoise.fit(half, blobs(), epochs=3, methods=[see[1]], mixed_precision="bf16")
    for seen in see:  # what methods compute with is float32 in both
        assert set(seen.features) == set(seen.prediction) == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), half.parameters(), strict=True))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert 0 < far(plain, half) < 0.02


def test_float64_models_stay_float64() -> None:
    inputs, labels = blobs()
    model = equipoise.fit(mlp().double(), (inputs.double(), labels), epochs=1).model
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("accumulation", [2, 3, 7, 1000])
def test_accumulation_has_the_same_gradient(accumulation: int) -> None:
    inputs, labels = blobs()
    data = (inputs.double(), labels)
    whole, pieces = mlp().double(), mlp().double()
    first = equipoise.fit(whole, data, epochs=2, batch_size=20, clip_norm=0.5)
    second = equipoise.fit(pieces, data, epochs=2, batch_size=20, clip_norm=0.5, accumulation=accumulation)
    assert far(whole, pieces) < 1e-12
    assert first.global_step == second.global_step == 10
    assert first.history[0]["train_loss"] == pytest.approx(second.history[0]["train_loss"], rel=1e-12)


# -- kinds of inputs ---------------------------------------------------------------------------------------------------
class TwoInputs(nn.Module):
    """Takes keyword arguments, returns a record."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.body(x)) * mask)}


def test_dict_inputs_become_keyword_arguments() -> None:
    inputs, labels = blobs()
    mask = (torch.arange(90) % 2).float()[:, None].expand(90, 8)
    data = Examples({"x": inputs, "mask": mask}, labels)
    run = equipoise.fit(TwoInputs(), data, epochs=3, validation=data)
    prediction, targets = run.predict(data)
    assert prediction.shape == (90, 3) and torch.equal(targets, labels)
    assert torch.equal(prediction[mask[:, 0] == 0], run.model.head.bias.detach().expand(45, 3))
    assert run.history[-1]["validation_accuracy"] == (prediction.argmax(1) == labels).float().mean().item()


class Dicts(Dataset[dict[str, Any]]):
    """The Hugging Face way: one dict an example."""

    def __init__(self, key: str = "labels") -> None:
        self.inputs, self.labels = blobs()
        self.key = key

    def __len__(self) -> int:
        return 90

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.inputs[i], "mask": torch.ones(8), self.key: int(self.labels[i])}


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_a_dataset_of_dicts_equals_examples(key: str) -> None:
    inputs, labels = blobs()
    data = Examples({"x": inputs, "mask": torch.ones(90, 8)}, labels)
    runs = [equipoise.fit(TwoInputs(), d, epochs=2, batch_size=20, num_classes=3) for d in (data, Dicts(key))]
    assert same(runs[0].model, runs[1].model)
    assert runs[1].num_examples == 90


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Any map-style data set; ``noise`` draws from torch's global generator, as augmentations do."""

    def __init__(self, noise: float = 0.0) -> None:
        self.inputs, self.labels = blobs()
        self.noise = noise
        self.targets = self.labels.tolist()

    def __len__(self) -> int:
        return 90

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i] + self.noise * torch.randn(6), self.labels[i]


class Record(Method):
    """Keeps the batches of each epoch."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        self.rows.append(batch.positions("record"))
        self.inputs.append(batch.inputs)
        return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_any_dataset_equals_tensors(workers: int) -> None:
    reference = equipoise.fit(mlp(), blobs(), epochs=2, batch_size=40)
    record = Record()
    run = equipoise.fit(mlp(), Pairs(), epochs=2, batch_size=40, num_workers=workers, methods=[record])
    assert same(run.model, reference.model)
    assert run.class_counts is not None and run.class_counts.tolist() == blobs()[1].bincount().tolist()
    assert torch.equal(torch.cat(record.rows[:3]).sort().values, torch.arange(90))
    assert torch.equal(record.inputs[0], blobs()[0][record.rows[0]])
    assert same(equipoise.fit(mlp(), TensorDataset(*blobs()), epochs=2, batch_size=40).model, reference.model)


def test_workers_draw_other_noise_every_epoch_and_the_same_in_every_run() -> None:
    found = []
    for _ in range(2):
        record = Record()
        equipoise.fit(mlp(), Pairs(1.0), epochs=2, batch_size=45, num_workers=1, methods=[record])
        noise = torch.cat(record.inputs) - blobs()[0][torch.cat(record.rows)]
        found.append(noise)
        # each worker starts an epoch with a stream of its own: no row of noise comes twice
        assert len(noise.round(decimals=4).unique(dim=0)) == 180
    assert torch.equal(*found)


def test_examples_on_any_loader_keep_index_and_extras() -> None:
    data = Examples(*blobs(), group=torch.arange(90) % 4)
    batch = Batch.of(next(iter(DataLoader(data, 7))))
    assert torch.equal(batch.extras["group"], torch.arange(7) % 4)
    assert torch.equal(batch.positions("x"), torch.arange(7))
    assert torch.equal(batch.targets, data.targets[:7])


def test_regression_needs_only_a_loss() -> None:
    inputs, _ = blobs()
    targets = inputs[:, :1] * 2
    run = equipoise.fit(
        nn.Linear(6, 1), (inputs, targets), epochs=30, loss=F.mse_loss, batch_size=30, validation=(inputs, targets)
    )
    assert run.history[-1]["validation_loss"] < 0.01
    assert "validation_accuracy" not in run.history[-1]
    assert run.class_counts is None


def test_soft_labels_and_label_types() -> None:
    inputs, labels = blobs()
    hard = equipoise.fit(mlp(), (inputs, labels), epochs=1).model
    for kind in (torch.int32, torch.uint8):
        assert same(equipoise.fit(mlp(), (inputs, labels.to(kind)), epochs=1).model, hard)
    soft = equipoise.fit(mlp(), (inputs, F.one_hot(labels, 3).float()), epochs=1)
    assert soft.num_classes == 3
    assert far(soft.model, hard) < 1e-6


def test_segmentation_like_targets() -> None:
    images = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    run = equipoise.fit(nn.Conv2d(2, 3, 1), (images, (images[:, 0] > 0).long()), epochs=1, batch_size=4)
    assert run.history[0]["train_loss"] > 0


# -- features ----------------------------------------------------------------------------------------------------------
class Timm(nn.Module):
    """The convention of timm: a classifier that is not the last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.other = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 4)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        self.other(x)
        return self.forward_head(self.forward_features(x))


class Features(Method):
    """Checks that the features are what enters the head."""

    needs_features = True

    def __init__(self, width: int) -> None:
        self.width, self.calls = width, 0

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None and output.features.shape == (len(batch), self.width)
        assert output.features.requires_grad
        torch.testing.assert_close(run.head()(output.features), output.prediction)
        self.calls += 1
        return F.cross_entropy(output.prediction, batch.targets)


def test_features_by_timm_convention_last_linear_and_name() -> None:
    for model, head, width in (
        (Timm(), None, 5),
        (mlp(), None, 16),
        (nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3), nn.Identity(), nn.BatchNorm1d(3, affine=False)), "1", 9),
    ):
        if head == "1":  # predictions are not the head's output here: only the width is checked
            method: Features = Features(width)
            method.loss = lambda run, batch, output: F.cross_entropy(output.prediction, batch.targets)
        else:
            method = Features(width)
        run = equipoise.fit(model, blobs(), epochs=2, methods=[method], head=head)
        assert run.head() is find_head(model, head)
        assert head == "1" or method.calls == 2
        assert not any(module._forward_pre_hooks for module in model.modules())  # no hook stays behind


def test_a_model_may_hand_out_features_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Output:
            return Output(self.head(x), features=x[:, :2] + 0)

    class Check(Method):
        needs_features = True

        def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
            assert output.features is not None and output.features.shape[1] == 2
            return output.features.mean() * 0

    equipoise.fit(Own(), blobs(), epochs=1, methods=[Check()])


# -- evaluation --------------------------------------------------------------------------------------------------------
def test_predict_takes_data_sets_and_loaders_and_keeps_modes() -> None:
    model = mlp(dropout=0.5, norm=True)
    run = equipoise.start(model, sgd(model.parameters()))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    inputs, labels = blobs()
    wanted = mlp(dropout=0.5, norm=True).eval()(inputs).detach()
    loader = DataLoader(TensorDataset(inputs, labels), 7)
    for data in ((inputs, labels), Examples(inputs, labels), TensorDataset(inputs, labels), loader, Pairs()):
        prediction, targets = run.predict(data)
        torch.testing.assert_close(prediction, wanted)
        assert torch.equal(targets, labels) and not prediction.requires_grad
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        run.predict((torch.randn(4, 99), labels[:4]))
    assert modes == [module.training for module in model.modules()]


def test_evaluation_and_own_records_join_the_history() -> None:
    run = equipoise.fit(mlp(), blobs(), epochs=2, validation=blobs(seed=3))
    logits, labels = run.predict(blobs(seed=3))
    assert run.history[-1]["validation_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert run.model.training
    assert [len(batch) for batch in run.validation or ()] == [90]
    run = equipoise.fit(mlp(), blobs(), epochs=2, on_epoch_end=lambda run: {"seen": run.epoch})
    assert [record["seen"] for record in run.history] == [0, 1]
