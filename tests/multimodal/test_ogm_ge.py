"""OGM-GE against the paper's formulas, hand-computed numbers and a loop by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.multimodal import OGMGE, ConcatFusion, SumFusion, modality_scores, ogm_coefficients
from equipoise.testing import check_method, check_methods_ddp, multimodal

torch.set_num_threads(1)
PROBLEM = multimodal()


def test_by_hand() -> None:
    u, v, labels = torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([0, 1])
    scores = modality_scores(u + v, [u, v], labels)  # no bias: the contributions are the unimodal logits
    sigmoid: Callable[[float], float] = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    expected = [sigmoid(2) + 0.5, 0.5 + sigmoid(-1)]
    assert scores.tolist() == pytest.approx(expected) and expected == pytest.approx([1.380797, 0.768941], abs=1e-6)
    found = ogm_coefficients(scores, alpha=0.5).tolist()
    assert found == pytest.approx([1 - math.tanh(0.5 * expected[0] / expected[1]), 1.0])
    assert found[0] == pytest.approx(0.284748, abs=1e-6)
    assert ogm_coefficients(scores.flip(0), alpha=0.5).tolist() == found[::-1]
    assert ogm_coefficients(scores, alpha=0.0).tolist() == [1.0, 1.0]
    assert ogm_coefficients(torch.tensor([1.5, 1.5]), alpha=1.0).tolist() == [1.0, 1.0]  # not above 1


def test_contributions_of_a_concat_head_are_the_papers() -> None:
    """Each with half of the bias: W_m x_m + b / 2; and with a third of it for three modalities."""
    generator = torch.Generator().manual_seed(0)
    for widths in ([3, 2], [3, 2, 4]):
        features = [torch.randn(6, width, generator=generator) for width in widths]
        head, labels = ConcatFusion(widths, 4), torch.arange(6) % 4
        parts = zip(features, head.fc.weight.split(widths, 1), strict=True)
        expected = [
            (x @ w.T + head.fc.bias / len(widths)).softmax(1)[torch.arange(6), labels].sum().item() for x, w in parts
        ]
        assert modality_scores(*head(features), labels).tolist() == pytest.approx(expected, abs=1e-5)
    unimodal = SumFusion(widths, 4)(features)
    own = [u.softmax(1)[torch.arange(6), labels].sum().item() for u in unimodal[1]]
    assert modality_scores(*unimodal, labels).tolist() == pytest.approx(own, abs=1e-5)


def test_three_modalities_are_compared_with_the_mean_of_the_others() -> None:
    scores = [3.0, 2.0, 1.0]
    expected = []
    for score in scores:
        ratio = score / ((sum(scores) - score) / 2)
        expected.append(1 - math.tanh(0.3 * ratio) if ratio > 1 else 1.0)
    assert ogm_coefficients(torch.tensor(scores), 0.3).tolist() == pytest.approx(expected)
    assert expected[0] < 1 == expected[1] == expected[2]


def test_extreme_and_low_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sure = torch.tensor([[1e4, -1e4]], dtype=dtype)
        scores = modality_scores(sure, [sure, -sure], torch.tensor([0]))
        found = ogm_coefficients(scores, 0.5)
        assert scores.dtype == torch.float32 and torch.isfinite(found).all() and found.tolist() == [0.0, 1.0]
    assert ogm_coefficients(torch.zeros(2), 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ogm_coefficients(torch.ones(2), -1.0), r"alpha = -1.0: must be a number in \[0, inf\)"),
        (lambda: OGMGE(alpha=-0.1), "alpha = -0.1"),
        (lambda: OGMGE(noise=-0.1), "noise = -0.1"),
        (lambda: OGMGE(end_epoch=-1), "end_epoch = -1"),
        (
            lambda: modality_scores(torch.zeros(2, 3), [torch.zeros(2, 3)], torch.tensor([0, 1])),
            "logits of 1 modalities",
        ),
        (lambda: modality_scores(torch.zeros(2, 3), [torch.zeros(2, 3)] * 2, torch.zeros(2, 3)), "single-label"),
        (lambda: modality_scores(torch.zeros(2, 3), [torch.zeros(2, 3)] * 2, torch.tensor([0, 3])), r"\[0, 3\]"),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


# -- the method in a run ----------------------------------------------------------------------------------------------
def test_the_kit() -> None:
    check_method(OGMGE, problem=PROBLEM)


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    (report,) = check_methods_ddp([OGMGE], problem=PROBLEM)
    assert report.passed == ["ddp-trains", "ddp-ranks", "ddp-equals-one"]


@pytest.mark.parametrize("end_epoch", [0, 50])
def test_in_a_run_it_is_the_loop_by_hand(end_epoch: int) -> None:
    run = PROBLEM.train([OGMGE(alpha=0.8, noise=0.0, end_epoch=end_epoch)])
    model, data = PROBLEM.network(), PROBLEM.examples
    optimizer = PROBLEM.make_optimizer(model.parameters())
    order = torch.Generator().manual_seed(PROBLEM.seed)
    for epoch in range(PROBLEM.epochs):
        sampler = torch.utils.data.RandomSampler(data, generator=order)
        for rows in torch.tensor(list(sampler)).split(PROBLEM.batch_size):
            batch = data.take(rows)
            output = model(**batch.inputs)
            optimizer.zero_grad()
            F.cross_entropy(output.fused, batch.targets).backward()
            factors = ogm_coefficients(modality_scores(output.fused, output.unimodal, batch.targets), 0.8)
            for encoder, factor in zip(model.encoders.values(), factors, strict=True):
                for parameter in encoder.parameters():
                    parameter.grad *= factor if epoch <= end_epoch else 1
            optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))


def test_noise_has_the_size_of_the_gradient_and_touches_encoders_only() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoders = nn.ModuleDict({name: nn.Linear(50, 100) for name in ("a", "b")})
            self.fusion = SumFusion([100, 100], 3)

        def forward(self, a: Tensor, b: Tensor) -> equipoise.Output:
            fused, unimodal = self.fusion([self.encoders["a"](a), self.encoders["b"](b)])
            return equipoise.Output(fused, unimodal=unimodal)

    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(20, 50, generator=generator) for name in ("a", "b")}
    data = equipoise.Examples(inputs, torch.arange(20) % 3)
    found = []
    with torch.random.fork_rng(devices=[]):
        for noise in (0.0, 2.0):
            torch.manual_seed(0)
            run = equipoise.start(Wide(), PROBLEM.make_optimizer, data=data, methods=[OGMGE(0.0, noise)])
            run.backward(run.training_loss(data.take(torch.arange(20))))
            run.methods[0].after_backward(run)
            found.append({name: p.grad for name, p in run.model.named_parameters()})
    for name, plain in found[0].items():
        noise = found[1][name] - plain
        if name.startswith("encoders"):
            assert noise.std().item() == pytest.approx(2 * plain.std().item(), rel=0.25)
            assert abs(noise.mean()) < 0.3 * noise.std()
        else:
            assert torch.equal(noise, torch.zeros_like(noise))


def test_neutral_is_joint_training() -> None:
    assert OGMGE.neutral is not None
    ours, plain = PROBLEM.train([OGMGE(**OGMGE.neutral)]).model, PROBLEM.train().model
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
