"""AnyLoss against the paper's formulas, hand-computed numbers, hard metrics of scikit-learn and a loop in plain Python."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn import metrics as hard
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.imbalance.anyloss import (
    METRICS,
    AnyLoss,
    AnyLossMethod,
    SoftConfusion,
    amplify,
    metric_value,
    soft_confusion,
)
from equipoise.testing import check_loss, check_method
from equipoise.testing.distributed import spawn
from equipoise.testing.problem import classification

torch.set_num_threads(1)
PROBS = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 1, 0])
LOSSES = {  # at L = 10: metric, beta -> loss
    ("accuracy", 1.0): 0.381882,
    ("f1", 1.0): 0.379092,
    ("fbeta", 0.5): 0.381802,
    ("fbeta", 2.0): 0.376358,
    ("gmean", 1.0): 0.381926,
    ("balanced_accuracy", 1.0): 0.381882,
}


def drawn(n: int, seed: int = 0, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(n, generator=generator) < share).long()


def of_probs(metric: Any = "f1", beta: float = 1.0, amplification: float = 73.0) -> AnyLoss:
    return AnyLoss(metric, beta=beta, amplification=amplification, from_logits=False)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


# -- the numbers of the card ------------------------------------------------------------------------------------------
def test_oracle_1_at_amplification_10() -> None:
    assert amplify(PROBS, 10).tolist() == pytest.approx([0.982014, 0.731059, 0.268941, 0.047426], abs=5e-7)
    counts = soft_confusion(PROBS, LABELS, 10)
    assert [float(c) for c in (counts.tp, counts.fp, counts.fn, counts.tn)] == pytest.approx(
        [1.250955, 0.778484, 0.749045, 1.221516], abs=1e-6
    )
    for (metric, beta), expected in LOSSES.items():
        assert of_probs(metric, beta, 10)(PROBS, LABELS).item() == pytest.approx(expected, abs=1e-6)
    slope = gradient(lambda p: of_probs("f1", 1, 10)(p, LABELS), PROBS)
    assert slope.tolist() == pytest.approx([-0.060451, 0.302965, -0.672912, 0.069614], abs=1e-6)
    slope = gradient(lambda p: of_probs("balanced_accuracy", 1, 10)(p, LABELS), PROBS)
    assert slope.tolist() == pytest.approx([-0.044157, 0.491530, -0.491530, 0.112942], abs=1e-6)


def test_oracle_2_at_amplification_73() -> None:
    counts = soft_confusion(PROBS, LABELS)
    assert [counts.tp.item(), counts.fp.item()] == pytest.approx([1.000675, 0.999325], abs=1e-6)
    for metric, beta in LOSSES:
        assert of_probs(metric, beta)(PROBS, LABELS).item() == pytest.approx(0.499662, abs=1e-6)


@pytest.mark.parametrize(("n", "positives", "f1_loss"), [(100, 10, 0.833333), (10, 5, 0.5)])
def test_oracle_3_all_probabilities_one_half(n: int, positives: int, f1_loss: float) -> None:
    half, labels = torch.full((n,), 0.5, dtype=torch.float64), (torch.arange(n) < positives).long()
    assert torch.equal(amplify(half), half)
    for metric in ("accuracy", "balanced_accuracy", "gmean"):
        assert of_probs(metric)(half, labels).item() == pytest.approx(0.5, abs=1e-15)
    assert of_probs()(half, labels).item() == pytest.approx(f1_loss, abs=1e-6)
    torch.testing.assert_close(gradient(lambda p: amplify(p).sum(), half), torch.full_like(half, 18.25))


def test_oracle_4_certain_predictions_give_the_hard_metric() -> None:
    logits, labels = drawn(60)
    certain = (logits > 0).double()
    y, p = labels.numpy(), certain.numpy()
    recall, specificity = hard.recall_score(y, p), hard.recall_score(1 - y, 1 - p)
    expected = {
        ("accuracy", 1.0): hard.accuracy_score(y, p),
        ("f1", 1.0): hard.f1_score(y, p),
        ("fbeta", 0.5): hard.fbeta_score(y, p, beta=0.5),
        ("fbeta", 2.0): hard.fbeta_score(y, p, beta=2),
        ("gmean", 1.0): math.sqrt(recall * specificity),
        ("balanced_accuracy", 1.0): hard.balanced_accuracy_score(y, p),
    }
    for (metric, beta), value in expected.items():
        assert of_probs(metric, beta)(certain, labels).item() == pytest.approx(1 - value, abs=1e-15)


def test_oracle_5_relations_between_the_metrics() -> None:
    logits, _ = drawn(40)
    probs, labels = logits.sigmoid(), torch.arange(40) % 2
    torch.testing.assert_close(of_probs("accuracy")(probs, labels), of_probs("balanced_accuracy")(probs, labels))
    counts = soft_confusion(probs, labels)
    torch.testing.assert_close(metric_value(counts, "fbeta", beta=1e-8), counts.tp / (counts.tp + counts.fp))
    torch.testing.assert_close(metric_value(counts, "fbeta", beta=1e8), counts.tp / (counts.tp + counts.fn))
    torch.testing.assert_close(metric_value(counts, "fbeta", beta=1.0), metric_value(counts, "f1"))


def test_oracle_6_classes_swapped_and_batch_doubled() -> None:
    logits, labels = drawn(40, share=0.2)
    probs = logits.sigmoid()
    for metric in METRICS:
        loss = of_probs(metric, 2.0)
        torch.testing.assert_close(loss(probs.repeat(2), labels.repeat(2)), loss(probs, labels))
        same = torch.isclose(loss(1 - probs, 1 - labels), loss(probs, labels), rtol=1e-9)
        assert bool(same) == (metric in ("accuracy", "gmean", "balanced_accuracy"))


def test_oracle_7_a_batch_without_positives() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    slope = gradient(lambda p: of_probs()(p, labels), PROBS)
    assert of_probs()(PROBS, labels).item() == 1 and torch.equal(slope, torch.zeros(4, dtype=torch.float64))
    balanced = of_probs("balanced_accuracy")(PROBS, labels)
    torch.testing.assert_close(balanced, 1 - 0.5 * (1 - amplify(PROBS)).mean())
    for metric, value in itertools.product(METRICS, (0, 1)):
        slope = gradient(lambda p, m=metric, v=value: of_probs(m)(p, torch.full((4,), v)), PROBS)
        assert torch.isfinite(slope).all()


# -- the functional core ----------------------------------------------------------------------------------------------
def reference(probs: list[float], labels: list[int], steepness: float, metric: str, beta: float) -> float:
    """The definition, one example at a time."""
    tp = fp = fn = tn = 0.0
    for p, y in zip(probs, labels, strict=True):
        a = 1 / (1 + math.exp(-steepness * (p - 0.5)))
        tp, fn = tp + y * a, fn + y * (1 - a)
        fp, tn = fp + (1 - y) * a, tn + (1 - y) * (1 - a)
    n, p, q = len(labels), sum(labels), len(labels) - sum(labels)
    score = {
        "accuracy": (tp + tn) / n,
        "f1": 2 * tp / (p + tp + fp),
        "fbeta": (1 + beta**2) * tp / (beta**2 * p + tp + fp),
        "gmean": math.sqrt(tp / p * tn / q),
        "balanced_accuracy": (tp / p + tn / q) / 2,
    }
    return 1 - score[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_against_a_plain_loop(metric: str) -> None:
    for seed, steepness, beta in ((0, 73.0, 2.0), (1, 10.0, 0.5), (2, 1.0, 1.0)):
        logits, labels = drawn(31, seed)
        expected = reference(logits.sigmoid().tolist(), labels.tolist(), steepness, metric, beta)
        loss = AnyLoss(metric, beta=beta, amplification=steepness)
        assert loss(logits, labels).item() == pytest.approx(expected, abs=1e-12)


def test_class_counts_are_exact_and_weights_are_repetitions() -> None:
    logits, labels = drawn(50)
    counts = soft_confusion(logits.sigmoid(), labels)
    torch.testing.assert_close(counts.tp + counts.fn, labels.sum().double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(counts.fp + counts.tn, (1 - labels).sum().double(), rtol=0, atol=1e-13)
    weight = torch.arange(50) % 3
    weighted = soft_confusion(logits.sigmoid(), labels, weight=weight)
    narrow = soft_confusion(logits.sigmoid().float(), labels, weight=weight.double())
    assert narrow.tp.dtype == torch.float32
    repeated = soft_confusion(logits.sigmoid().repeat_interleave(weight), labels.repeat_interleave(weight))
    for name in ("tp", "fp", "fn", "tn"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_gradients() -> None:
    logits, labels = drawn(9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: amplify(z.sigmoid(), 10), logits)
    for metric in METRICS:
        assert torch.autograd.gradcheck(lambda z, m=metric: AnyLoss(m, beta=2, amplification=10)(z, labels), logits)


def test_73_is_the_largest_amplification_with_a_gradient_at_1_in_float64_and_33_in_float32() -> None:
    for dtype, largest in ((torch.float64, 73), (torch.float32, 33)):
        one = torch.ones((), dtype=dtype)
        assert amplify(one, largest) < 1 and amplify(one, largest + 1) == 1
        assert gradient(lambda p, steep=largest: amplify(p, steep), one) > 0
        assert gradient(lambda p, steep=largest + 1: amplify(p, steep), one) == 0


def test_hard_counts_may_be_whole_columns() -> None:
    column = SoftConfusion(*(torch.tensor(values) for values in ([3.0, 0], [1.0, 0], [1.0, 2], [5.0, 8])))
    assert metric_value(column).tolist() == pytest.approx([0.75, 0])
    assert metric_value(column, "balanced_accuracy").tolist() == pytest.approx([(3 / 4 + 5 / 6) / 2, 0.5])


# -- the module -------------------------------------------------------------------------------------------------------
def test_one_logit_two_logits_and_probabilities_agree() -> None:
    logits, labels = drawn(20)
    shift = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = AnyLoss()(logits, labels)
    torch.testing.assert_close(AnyLoss()(logits[:, None], labels[:, None].double()), expected)
    torch.testing.assert_close(AnyLoss()(torch.stack([shift, logits + shift], 1), labels), expected)
    torch.testing.assert_close(of_probs()(logits.sigmoid(), labels.bool()), expected)
    torch.testing.assert_close(of_probs()(logits.sigmoid()[:, None], labels), expected)


def test_any_function_of_the_counts() -> None:
    logits, labels = drawn(20)
    jaccard = lambda c: c.tp / (c.tp + c.fp + c.fn)  # noqa: E731
    f1 = metric_value(soft_confusion(logits.sigmoid(), labels))
    torch.testing.assert_close(AnyLoss(jaccard)(logits, labels), 1 - f1 / (2 - f1))


def test_training_and_evaluation_are_the_same() -> None:
    logits, labels = drawn(20)
    assert torch.equal(AnyLoss()(logits, labels), AnyLoss().eval()(logits, labels))


@pytest.mark.parametrize("metric", METRICS)
def test_the_kit(metric: str) -> None:
    report = check_loss(AnyLoss(metric, beta=2.0), lambda g: (torch.randn(12, generator=g), torch.arange(12) % 3 % 2))
    assert set(report.skipped) == {"reduction"}


@pytest.mark.parametrize("metric", METRICS)
def test_extreme_logits_batches_of_one_and_half_precision(metric: str) -> None:
    loss = AnyLoss(metric)
    for size, label in itertools.product((1e4, 40.0, 0.0, -40.0, -1e4), (0, 1)):
        for labels in (torch.tensor([label]), torch.tensor([label, 1 - label])):
            logits = torch.full((len(labels),), size)
            slope = gradient(lambda z, y=labels: loss(z, y), logits)
            assert torch.isfinite(slope).all() and 0 <= loss(logits, labels) <= 1
    logits, labels = drawn(64)
    for dtype in (torch.bfloat16, torch.float16):
        value = loss(logits.to(dtype), labels)
        assert value.dtype == torch.float32 and torch.equal(value, loss(logits.to(dtype).float(), labels))


@pytest.mark.parametrize("metric", METRICS)
def test_compiles_without_a_break(metric: str) -> None:
    logits, labels = drawn(16)
    loss = AnyLoss(metric)
    compiled = torch.compile(lambda z: loss(z, labels), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, logits), gradient(lambda z: loss(z, labels), logits))


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amplification": 0}, r"amplification = 0: must be a number in \(0, inf\)"),
        ({"amplification": math.nan}, "amplification = nan"),
        ({"beta": 0.0}, r"beta = 0.0: must be a number in \(0, inf\)"),
        ({"beta": -1}, "beta = -1"),
        ({"eps": 0}, "eps = 0"),
        ({"metric": "f2"}, "metric = 'f2': must be one of 'accuracy', 'f1'"),
        ({"metric": "g-mean"}, "Did you mean 'gmean'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyLoss(**change)
    if "eps" not in change:
        with pytest.raises(ValueError, match=message):
            AnyLossMethod(**change)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(2), torch.tensor([0, 2]), r"targets = values 0, 2: must lie in \{0, 1\}"),
        (torch.zeros(2), torch.tensor([0.0, math.nan]), "targets = values 0, nan"),
        (torch.zeros(2), torch.tensor([0.0, 0.5]), "targets = values 0, 0.5"),
        (torch.zeros(2), torch.tensor([0, 1, 1]), r"targets = .*\(3,\): must have the shape \(2,\)"),
        (torch.zeros(2), torch.tensor([[0, 1], [1, 0]]), r"targets = .*\(2, 2\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"inputs = .*\(2, 3\): .* one model for each class against the rest"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), r"inputs = torch\.int64"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.int64), r"inputs = \(0,\): must hold at least one example"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "must hold at least one example"),
    ],
)
def test_batches_are_checked(inputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyLoss()(inputs, targets)


@pytest.mark.parametrize("bad", [1.1, -0.1, math.nan])
def test_probabilities_are_checked(bad: float) -> None:
    probs, labels = torch.tensor([0.5, bad]), torch.tensor([0, 1])
    for call in (
        lambda: of_probs()(probs, labels),
        lambda: soft_confusion(probs, labels),
        lambda: amplify(probs),
    ):
        with pytest.raises(ValueError, match=r"probs = values in \[.*\]: must lie in \[0, 1\]. Take the sigmoid"):
            call()


def test_functions_are_checked() -> None:
    with pytest.raises(ValueError, match="amplification = -1"):
        amplify(PROBS, -1)
    with pytest.raises(ValueError, match=r"weight = \(3,\): must have the shape \(4,\)"):
        soft_confusion(PROBS, LABELS, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"inputs = .*\(4, 2\)"):
        of_probs()(torch.zeros(4, 2), LABELS)
    with pytest.raises(ValueError, match="beta = 0"):
        metric_value(soft_confusion(PROBS, LABELS), "fbeta", beta=0)


# -- two processes ----------------------------------------------------------------------------------------------------
def shares(rank: int | None) -> Tensor:
    """Rows of each of two processes: 5 and 2, the second without a positive."""
    return torch.arange(7) if rank is None else torch.arange(7)[[slice(0, 5), slice(5, 7)][rank]]


def step(rank: int | None) -> list[Any]:
    """Loss and gradient of the weights of a small model on a share of the batch, averaged as DDP does it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 0])
    results = []
    for metric in ("f1", "gmean"):
        weight = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
        criterion = AnyLoss(metric, amplification=10.0)
        rows = shares(rank)
        loss = criterion(inputs[rows] @ weight, labels[rows])
        (slope,) = torch.autograd.grad(loss, weight)
        if rank is not None:
            torch.distributed.all_reduce(slope)
            slope = slope / 2
        results.append([loss.item(), slope])
    return results


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    def work() -> Iterator[Any]:
        torch.distributed.init_process_group("gloo")
        yield from step(torch.distributed.get_rank())

    whole = step(None)
    for rank in spawn(work):
        assert len(rank) == 2, rank
        for mine, expected in zip(rank, whole, strict=True):
            assert mine[0] == pytest.approx(expected[0], abs=1e-12)
            torch.testing.assert_close(mine[1], expected[1], rtol=1e-10, atol=1e-12)


# -- the method in a run ----------------------------------------------------------------------------------------------
def test_the_method_kit() -> None:
    report = check_method(
        AnyLossMethod,
        problem=classification(classes=2),
        skip={"accumulation": "the score of a batch is no mean over its examples"},
    )
    assert "permuted-rows" in report.passed and "resume" in report.passed


def data(n: int = 40, share: float = 0.25) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(7)
    labels = (torch.arange(n) < share * n).long()
    inputs = torch.randn(n, 5, generator=generator) + 1.5 * labels[:, None]
    return equipoise.Examples(inputs, labels, num_classes=2)


def zero_start(outputs: int = 1) -> nn.Module:
    model = nn.Linear(5, outputs)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))


def train(method: AnyLossMethod, **options: Any) -> equipoise.Run:
    settings: dict[str, Any] = {"epochs": 30, "batch_size": 40, "loss": bce, "methods": [method], **options}
    model = settings.pop("model", None)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    return equipoise.fit(zero_start() if model is None else model, data(), optimizer=optimizer, **settings)


def test_in_a_run_it_is_the_loss_in_a_loop() -> None:
    run = train(AnyLossMethod("balanced_accuracy", amplification=20.0))
    model, examples, criterion = zero_start(), data(), AnyLoss("balanced_accuracy", amplification=20.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(examples.inputs), examples.targets).backward()
        optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))


def test_it_learns_with_one_logit_and_with_two() -> None:
    for outputs in (1, 2):
        run = train(AnyLossMethod(), model=zero_start(outputs), loss=bce if outputs == 1 else None)
        logits, labels = run.predict(data())
        logits = logits[:, 0] if outputs == 1 else logits[:, 1] - logits[:, 0]
        assert hard.f1_score(labels.numpy(), (logits > 0).numpy()) > 0.8


def test_it_warns_once_of_batches_of_one_class(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = train(AnyLossMethod(), batch_size=3, epochs=3)
    (method,) = run.methods
    assert isinstance(method, AnyLossMethod) and method.one_class_batches > 3
    (message,) = [record.getMessage() for record in caplog.records if "AnyLoss" in record.getMessage()]
    assert "batches so far held one class only" in message and "Raise batch_size" in message


def test_more_than_two_classes_are_refused_before_training() -> None:
    examples = equipoise.Examples(torch.randn(9, 5), torch.arange(9) % 3)
    with pytest.raises(ArgumentError, match="num_classes = 3: must be 2 for AnyLoss"):
        equipoise.fit(nn.Linear(5, 3), examples, epochs=1, methods=[AnyLossMethod()])


def test_values_as_targets_are_refused() -> None:
    examples = equipoise.Examples(torch.randn(9, 5), torch.linspace(0, 1, 9))
    loss = lambda prediction, targets: F.mse_loss(prediction[:, 0], targets)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"must lie in \{0, 1\}"):
        equipoise.fit(nn.Linear(5, 1), examples, epochs=1, loss=loss, methods=[AnyLossMethod()])
