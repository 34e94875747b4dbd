"""PS-KD against the paper's formulas, hand-computed numbers and a loop in plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.noisy_labels.ps_kd import PSKD, PSKDLoss, refine_targets, soft_cross_entropy
from equipoise.training import Batch, Method


def logits_of(n: int, c: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def loss_with_memory(memory: Tensor, epoch: int, total: int = 10, alpha_T: float = 0.8) -> PSKDLoss:
    part = PSKDLoss(*memory.shape, total, alpha_T=alpha_T).to(memory.dtype)
    part.memory.copy_(memory)
    part.seen.fill_(True)
    part.set_epoch(epoch)
    return part


# -- the functional core ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_soft_cross_entropy_is_its_formula(reduction: str) -> None:
    z, q = logits_of(6, 4), logits_of(6, 4, 1).softmax(1)
    each = -(q * z.log_softmax(1)).sum(1)
    expected = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    torch.testing.assert_close(soft_cross_entropy(z, q, reduction), expected)
    assert torch.autograd.gradcheck(lambda v: soft_cross_entropy(v, q, reduction), z.requires_grad_())


def test_refined_targets() -> None:
    previous = logits_of(3, 4).softmax(1)
    refined = refine_targets(torch.tensor([0, 3, 1]), previous, 0.3)
    torch.testing.assert_close(refined, 0.7 * F.one_hot(torch.tensor([0, 3, 1]), 4) + 0.3 * previous)
    torch.testing.assert_close(refined.sum(1), torch.ones(3, dtype=torch.float64))
    mixed = logits_of(3, 4, 1).softmax(1)
    torch.testing.assert_close(refine_targets(mixed, previous, 0.3), 0.7 * mixed + 0.3 * previous)
    assert not refine_targets(mixed, previous.requires_grad_(), 0.3).requires_grad


def test_by_hand() -> None:
    z, y, index = torch.tensor([[1.0, 0, -1]], dtype=torch.float64), torch.tensor([0]), torch.tensor([0])
    part = loss_with_memory(torch.tensor([[0.5, 0.3, 0.2]]), epoch=4)
    assert part.alpha == pytest.approx(0.4)
    assert part.targets_for(y, index)[0].tolist() == pytest.approx([0.8, 0.12, 0.08], abs=1e-6)
    got = gradient(lambda v: part(v, y, index, update=False), z)
    assert got[0].tolist() == pytest.approx([-0.134759, 0.124728, 0.010031], abs=1e-6)
    assert part(z, y, index).item() == pytest.approx(0.687606, abs=1e-6)
    assert pytest.approx(0.687606, abs=1e-6) == 0.6 * 0.407606 + 0.4 * 1.107606


def test_gradient_is_rescaled_as_in_the_paper() -> None:
    z, y = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64).log(), torch.tensor([0])
    q = refine_targets(y, torch.tensor([[0.9, 0.05, 0.05]], dtype=torch.float64), 0.3)
    ours = gradient(lambda v: soft_cross_entropy(v, q), z).abs().sum()
    plain = gradient(lambda v: F.cross_entropy(v, y), z).abs().sum()
    assert (ours / plain).item() == pytest.approx(0.925) == pytest.approx(1 - 0.3 * 0.1 / 0.4)


def test_agreement_scales_the_gradient() -> None:
    z, y = logits_of(5, 4), torch.tensor([0, 1, 2, 3, 1])
    ours = gradient(lambda v: soft_cross_entropy(v, refine_targets(y, z.softmax(1), 0.35)), z)
    torch.testing.assert_close(ours, 0.65 * gradient(lambda v: F.cross_entropy(v, y), z))


def test_uniform_memory_is_label_smoothing() -> None:
    z, y = logits_of(5, 4), torch.tensor([0, 1, 2, 3, 1])
    refined = refine_targets(y, torch.full((5, 4), 0.25, dtype=torch.float64), 0.3)
    torch.testing.assert_close(soft_cross_entropy(z, refined), F.cross_entropy(z, y, label_smoothing=0.3))


def test_compiles() -> None:
    z, y, previous = logits_of(4, 3), torch.tensor([0, 1, 2, 0]), logits_of(4, 3, 1).softmax(1)
    compiled = torch.compile(lambda v: soft_cross_entropy(v, refine_targets(y, previous, 0.5)), backend="aot_eager")
    torch.testing.assert_close(compiled(z), soft_cross_entropy(z, refine_targets(y, previous, 0.5)))


# -- the module -------------------------------------------------------------------------------------------------------
def test_first_epoch_and_alpha_0_are_cross_entropy() -> None:
    z, y, index = logits_of(6, 4).float(), torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(6)
    first, never = PSKDLoss(6, 4, 5, alpha_T=1.0), PSKDLoss(6, 4, 5, alpha_T=0.0)
    plain = gradient(lambda v: F.cross_entropy(v, y), z)
    for _ in range(2):  # an example drawn twice in the first epoch still counts as unseen
        assert torch.equal(gradient(lambda v: first(v, y, index), z), plain)
    for epoch in range(5):
        never.set_epoch(epoch)
        assert torch.equal(gradient(lambda v: never(v, y, index), z), plain)
        torch.testing.assert_close(never(z, y, index), F.cross_entropy(z, y))


def test_alpha_grows_linearly_to_alpha_T() -> None:
    part = PSKDLoss(1, 2, 10, alpha_T=0.8)
    got = []
    for epoch in (0, 4, 9):
        part.set_epoch(epoch)
        got.append(part.alpha)
    assert got == pytest.approx([0.08, 0.4, 0.8])


def reference(
    z: list[list[float]], labels: list[int], index: list[int], memory: dict[int, list[float]], alpha: float, first: bool
) -> float:
    """The definition, one number at a time; ``memory`` holds only what was seen."""
    total, written = 0.0, {}
    for row, label, i in zip(z, labels, index, strict=True):
        weights = [math.exp(v) for v in row]
        p = [w / sum(weights) for w in weights]
        own = [float(c == label) for c in range(len(row))]
        previous = own if first or i not in memory else memory[i]
        q = [(1 - alpha) * a + alpha * b for a, b in zip(own, previous, strict=True)]
        total -= sum(a * math.log(b) for a, b in zip(q, p, strict=True)) / len(z)
        written[i] = p
    memory.update(written)
    return total


def test_against_a_plain_loop() -> None:
    part = PSKDLoss(6, 4, 3, alpha_T=0.9).double()
    memory: dict[int, list[float]] = {}
    batches = [
        [[0, 1, 2], [3, 1, 1]],
        [[5, 0, 3], [2, 2, 5]],
        [[4, 5, 0], [1, 2, 3]],
    ]  # 4 is seen in the last epoch only
    for epoch, rows in enumerate(batches):
        part.set_epoch(epoch)
        for number, index in enumerate(rows):
            z, y = logits_of(3, 4, seed=10 * epoch + number), [i % 4 for i in index]
            expected = reference(z.tolist(), y, index, memory, 0.9 * (epoch + 1) / 3, epoch == 0)
            assert part(z, torch.tensor(y), torch.tensor(index)).item() == pytest.approx(expected, abs=1e-12)
    assert part.seen.tolist() == [i in memory for i in range(6)]
    for i, row in memory.items():
        assert part.memory[i].tolist() == pytest.approx(row, abs=1e-12)


def test_memory_holds_the_epochs_predictions_in_any_order() -> None:
    z, y = logits_of(11, 4), torch.arange(11) % 4
    for seed in (None, 1, 2):
        order = torch.arange(11) if seed is None else torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        part = PSKDLoss(11, 4, 5).double()
        for rows in order.split(4):
            part(z[rows], y[rows], rows)
        assert part.seen.all()
        torch.testing.assert_close(part.memory, z.softmax(1), atol=1e-15, rtol=0)


def test_reads_the_old_row_before_writing() -> None:
    z, y, index = logits_of(3, 4), torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    before = logits_of(3, 4, 1).softmax(1)
    part = loss_with_memory(before, epoch=9)
    expected = soft_cross_entropy(z, refine_targets(y, before[index], 0.8))
    torch.testing.assert_close(part(z, y, index), expected)
    torch.testing.assert_close(part.memory[index], z.softmax(1))


def test_of_a_repeated_example_the_last_prediction_is_kept() -> None:
    z, part = logits_of(3, 4), PSKDLoss(5, 4, 5).double()
    part(z, torch.tensor([1, 0, 1]), torch.tensor([2, 4, 2]))
    torch.testing.assert_close(part.memory[2], z[2].softmax(0))
    assert part.seen.tolist() == [False, False, True, False, True]


def test_writes_only_in_training_and_with_update() -> None:
    z, y, index = logits_of(2, 3).float(), torch.tensor([0, 1]), torch.tensor([0, 1])
    part = PSKDLoss(2, 3, 5)
    part.targets_for(y, index)
    part(z, y, index, update=False)
    part.eval()
    part(z, y, index)
    assert not part.seen.any() and part.memory.abs().sum() == 0


def test_state_round_trip() -> None:
    z, y, index = logits_of(4, 3).float(), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 2, 1])
    part, twin = PSKDLoss(5, 3, 5), PSKDLoss(5, 3, 5)
    part(z, y, index)
    part.set_epoch(3)
    assert set(part.state_dict()) == {"memory", "seen", "epoch"}
    twin.load_state_dict(part.state_dict())
    assert twin.alpha == part.alpha == pytest.approx(0.64)
    assert torch.equal(part(z, y, index), twin(z, y, index))
    assert (
        part.half().memory.dtype == torch.float16 and part.epoch.dtype == torch.int64 and part.seen.dtype == torch.bool
    )


def test_mixed_labels_without_update() -> None:
    before, z, index = logits_of(3, 4, 1).softmax(1), logits_of(3, 4), torch.tensor([0, 1, 2])
    part, mixed = loss_with_memory(before, epoch=4), logits_of(3, 4, 2).softmax(1)
    expected = soft_cross_entropy(z, 0.6 * mixed + 0.4 * before)
    torch.testing.assert_close(part(z, mixed, index, update=False), expected)
    fresh = PSKDLoss(3, 4, 10).double()
    fresh.set_epoch(4)
    torch.testing.assert_close(fresh.targets_for(mixed, index), mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, y, index = torch.tensor([[30.0, 0, 0], [1.0, 0.5, -0.5]], dtype=dtype), torch.tensor([1, 0]), torch.arange(2)
    low, high = PSKDLoss(2, 3, 4), PSKDLoss(2, 3, 4)
    for epoch in range(4):
        low.set_epoch(epoch)
        high.set_epoch(epoch)
        loss = low(z, y, index)
        assert loss.dtype == torch.float32 and torch.equal(loss, high(z.float(), y, index))
    low.to(dtype)
    assert torch.isfinite(low(z, y, index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_T": 1.1}, r"alpha_T = 1.1: must be a number in \[0, 1\]"),
        ({"alpha_T": -0.1}, "alpha_T = -0.1"),
        ({"total_epochs": 0}, "total_epochs = 0: must be an integer >= 1"),
        ({"num_classes": 1}, "num_classes = 1: must be an integer >= 2"),
        ({"num_examples": 0}, "num_examples = 0: must be an integer >= 1"),
        ({"reduction": "avg"}, "reduction = 'avg'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSKDLoss(**{"num_examples": 4, "num_classes": 3, "total_epochs": 5, **change})


@pytest.mark.parametrize("epoch", [-1, 5, 1.0])
def test_epoch_is_checked(epoch: Any) -> None:
    with pytest.raises(ValueError, match=r"epoch = .*: must be an integer in \[0, 4\]"):
        PSKDLoss(4, 3, 5).set_epoch(epoch)


@pytest.mark.parametrize(
    ("z", "y", "index", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 4]), r"index = values in \[0, 4\]"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), r"index = torch\.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([[0, 1]]), r"index = torch\.int64 \(1, 2\)"),
        (
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            torch.tensor([0, 1]),
            r"targets = values in \[0, 3\]: must lie in \[0, 3\)",
        ),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), torch.tensor([0, 1]), r"targets = values in \[-1, 0\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]), r"targets = .*\(2, 4\)"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 1]), r"logits = .*\(2, 4\): must .*\(N, 3\)"),
        (torch.zeros(3, 3), torch.tensor([0, 1]), torch.tensor([0, 1]), r"soft_targets = .*\(2, 3\).*\(3, 3\)"),
    ],
)
def test_batches_are_checked_and_nothing_is_written(z: Tensor, y: Tensor, index: Tensor, message: str) -> None:
    part = PSKDLoss(4, 3, 5)
    with pytest.raises(ValueError, match=message):
        part(z, y, index)
    assert not part.seen.any() and part.memory.abs().sum() == 0


def test_functions_are_checked() -> None:
    with pytest.raises(ValueError, match=r"alpha = 1.5: must be a number in \[0, 1\]"):
        refine_targets(torch.tensor([0]), torch.ones(1, 2), 1.5)
    with pytest.raises(ValueError, match="reduction = 'max'"):
        soft_cross_entropy(torch.zeros(1, 2), torch.ones(1, 2), "max")


# -- the method in a run ----------------------------------------------------------------------------------------------
def data(n: int = 48) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(7)
    return equipoise.Examples(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def network(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def train(*methods: Method, **options: Any) -> equipoise.Run:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 20, "methods": methods, **options}
    return equipoise.fit(settings.pop("model", network()), data(), **settings)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_neutral_is_the_baseline() -> None:
    assert PSKD.neutral is not None
    assert same(train(PSKD(**PSKD.neutral)).model, train().model)
    assert not same(train(PSKD()).model, train().model)


def test_in_a_run_it_is_the_loss_in_a_loop() -> None:
    method, part, model, examples = PSKD(0.9), PSKDLoss(48, 3, 4, alpha_T=0.9), network(dropout=0.0), data()
    run = train(method, model=copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for epoch in range(4):
        part.set_epoch(epoch)
        for rows in torch.tensor(list(torch.utils.data.RandomSampler(examples, generator=order))).split(20):
            batch = examples.take(rows)
            optimizer.zero_grad()
            part(model(batch.inputs), batch.targets, rows).backward()
            optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))
    torch.testing.assert_close(method.criterion.memory, part.memory)
    assert method.criterion.alpha == pytest.approx(0.9) and method.criterion.seen.all()


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    class Stop(Method):
        name = "stop"

        def __init__(self, at: int) -> None:
            self.at = at

        def after_step(self, run: Any) -> None:
            if run.global_step == self.at:
                raise KeyboardInterrupt

        def __repr__(self) -> str:
            return "stop"

    whole = train(PSKD(), Stop(0))
    with pytest.raises(KeyboardInterrupt):
        train(PSKD(), Stop(8), checkpoint=tmp_path, checkpoint_every=2)
    resumed = train(PSKD(), Stop(0), model=network(3), checkpoint=tmp_path, resume=True)
    assert same(whole.model, resumed.model)


def test_runs_in_bfloat16_and_with_micro_batches() -> None:
    run = train(PSKD(), mixed_precision="bf16", accumulation=2)
    assert all(math.isfinite(record["train_loss"]) for record in run.history)


def test_a_run_must_fit() -> None:
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"epochs = None: must be a fixed number for PS-KD.*Give epochs="):
        equipoise.start(network(), sgd, methods=[PSKD()], data=data())
    with pytest.raises(ArgumentError, match=r"data = None: PS-KD keeps a row"):
        equipoise.start(network(), sgd, methods=[PSKD()], epochs=3)
    with pytest.raises(ArgumentError, match=r"alpha_T = 2.0"):
        PSKD(alpha_T=2.0)

    class Mix(Method):
        name = "mix"

        def transform_batch(self, run: Any, batch: Batch) -> Batch:
            return replace(batch, targets=F.one_hot(batch.targets, 3).float())

    with pytest.raises(ArgumentError, match=r"targets = torch\.float32 \(20, 3\).*leave out the method that mixes"):
        train(PSKD(), Mix())
