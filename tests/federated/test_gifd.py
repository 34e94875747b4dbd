"""GIFD and the leakage audit: the parts, the search, the defences, the audit, and the method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from federation import toy_clients, toy_model
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, NonFiniteError
from equipoise.federated import gifd as module
from equipoise.federated.algorithm import Client, LocalTraining, Sent, Server, Update
from equipoise.federated.defences import (
    ClippedUpdates,
    Defence,
    LargerBatches,
    NoisyUpdates,
    SparseUpdates,
    Undefended,
)
from equipoise.federated.gifd import (
    GIFD,
    LeakageAudit,
    batch_gradients,
    clip_gradients,
    exact_leak,
    gifd,
    gradient_matching_loss,
    infer_labels,
    invert_pixels,
    match_images,
    noise_gradients,
    project_l1_ball,
    psnr,
    ramp_lr,
    sparsify_gradients,
    ssim,
    total_variation,
    update_gradients,
)
from equipoise.federated.params import state_of
from equipoise.training import Examples

torch.set_num_threads(1)


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(np.asarray(expected)).double(), atol=tolerance, rtol=tolerance
    )


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """The layers with weights of a seed."""
    found, generator = nn.Sequential(*layers), draw(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return found


def audited(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return made(nn.Flatten(), nn.Linear(16, 12), nn.Sigmoid(), nn.Linear(12, 5)).to(dtype)


def generator(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    whole = made(
        nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(6, 10), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(10, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4))),
        seed=1,
    ).to(dtype)
    return list(whole)


def render(stages: list[nn.Module], h: Tensor) -> Tensor:
    for stage in stages:
        h = stage(h)
    return h.detach()


LABELS = torch.tensor([1, 4])


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[nn.Module], Tensor, Tensor, list[Tensor]]:
    """Model, stages, start, true images and their update."""
    model, stages = audited(dtype), generator(dtype)
    z = torch.randn(2, 3, generator=draw(3), dtype=dtype)
    x = render(stages, z)
    return model, stages, z, x, batch_gradients(model, x, LABELS)


# -- the parts --------------------------------------------------------------------------------------------------------
G, T = [torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]


def test_oracle_1_distances() -> None:
    close(gradient_matching_loss(G, T), 0.528595)
    close(gradient_matching_loss(G, T, metric="l2"), 2.5)
    close(gradient_matching_loss(G, T, metric="l1"), (2 + 1) / 2)
    for c in (1e-3, 1.0, 1e6):
        close(gradient_matching_loss([c * g for g in G], G), 0.0)
        close(gradient_matching_loss([-c * g for g in G], G), 2.0)


def test_distance_is_differentiable_and_robust() -> None:
    generator = draw()
    target = [
        torch.randn(3, 2, generator=generator, dtype=torch.float64),
        torch.randn(4, generator=generator, dtype=torch.float64),
    ]
    start = [torch.randn_like(t).requires_grad_() for t in target]
    for metric in module.METRICS:
        assert torch.autograd.gradcheck(lambda a, b, m=metric: gradient_matching_loss([a, b], target, metric=m), start)
    assert torch.autograd.gradgradcheck(lambda a, b: gradient_matching_loss([a, b], target), start)
    for factor in (1e-25, 1e25):
        close(gradient_matching_loss([factor * g for g in G], [t / factor for t in T]), 0.528595, 1e-5)
    zero = [torch.zeros(2, requires_grad=True), torch.zeros(2)]
    found = gradient_matching_loss(zero, T)
    close(found.detach(), 1.0)
    (slope,) = torch.autograd.grad(found, zero[:1])
    assert slope.isfinite().all()
    close(gradient_matching_loss([g.bfloat16() for g in G], [t.bfloat16() for t in T]), 0.528595, 1e-5)


def slow_l1(u: np.ndarray, radius: float) -> np.ndarray:
    """By bisection on the threshold."""
    if abs(u).sum() <= radius:
        return u
    low, high = 0.0, abs(u).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(abs(u) - middle, 0).sum() > radius else (low, middle)
    return np.sign(u) * np.maximum(abs(u) - high, 0)


def test_oracle_2_l1_ball() -> None:
    close(project_l1_ball(torch.tensor([[3.0, -1.0, 0.5]]), 2.0), [[2.0, 0.0, 0.0]])
    inside = torch.tensor([[0.3, -0.2], [0.0, 0.0], [0.5, -0.5]])
    assert torch.equal(project_l1_ball(inside, 1.0), inside)
    x = 3 * torch.randn(6, 2, 5, generator=draw(), dtype=torch.float64)
    for radius in (0.1, 2.0, 15.0, 25.0):
        found = project_l1_ball(x, radius)
        close(found.flatten(1), np.stack([slow_l1(row, radius) for row in x.flatten(1).numpy()]), 1e-9)
        norms = x.flatten(1).abs().sum(1)
        close(found.flatten(1).abs().sum(1), norms.clamp(max=radius), 1e-9)
        close(project_l1_ball(found, radius), found, 1e-12)
        assert (found * x >= 0).all()
    wide = torch.randn(2, 50_000, generator=draw())
    assert (project_l1_ball(wide, 100.0).double().abs().sum(1) <= 100 * (1 + 1e-6)).all()
    assert project_l1_ball(wide.bfloat16(), 1.0).dtype == torch.bfloat16


def test_oracle_3_rate() -> None:
    found = [ramp_lr(t, 0.1) for t in (0, 0.025, 0.05, 0.25, 0.5, 0.75, 0.9, 1)]
    close(found, [0, 0.05, 0.1, 0.1, 0.075, 0.025, 0.004323, 0], 1e-6)


def test_oracle_4_variation_and_psnr() -> None:
    close(total_variation(torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])), 3.0)
    close(total_variation(torch.ones(2, 3, 1, 1)), 0.0)
    x = torch.zeros(2, 1, 5, 5)
    close(psnr(x + 0.1, x), [20.0, 20.0], 1e-5)
    close(psnr(x + 25.5, x, data_range=255), [20.0, 20.0], 1e-5)
    assert psnr(x, x).isinf().all()
    assert psnr(x, torch.cat([x[:1], x[:1] + 1]))[1] == 0


@pytest.mark.parametrize(("shape", "side"), [((2, 1, 8, 8), 7), ((1, 3, 4, 6), 3), ((1, 2, 9, 12), 7)])
def test_ssim_equals_a_loop(shape: tuple[int, ...], side: int) -> None:
    a, b = (torch.rand(shape, generator=draw(i), dtype=torch.float64) for i in range(2))
    found = ssim(a, b, data_range=2.0)
    for image in range(shape[0]):
        seen = []
        for channel, top, left in itertools.product(
            range(shape[1]), range(shape[2] - side + 1), range(shape[3] - side + 1)
        ):
            p, q = (t[image, channel, top : top + side, left : left + side].flatten().numpy() for t in (a, b))
            c1, c2, cov = 0.02**2, 0.06**2, np.cov(p, q)
            seen.append(
                (2 * p.mean() * q.mean() + c1)
                * (2 * cov[0, 1] + c2)
                / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
            )
        close(found[image], np.mean(seen), 1e-9)
    close(ssim(a, a), torch.ones(shape[0]), 1e-9)


def test_oracle_5_labels() -> None:
    features = torch.tensor([[1.0, 2.0]])
    head = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(head.weight)
    F.cross_entropy(head(features), torch.tensor([1])).backward()
    grad = head.weight.grad
    assert grad is not None
    close(grad.sum(1), [1.0, -2.0, 1.0], 1e-6)
    assert infer_labels(grad, 1).tolist() == [1]
    model = made(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7))
    with torch.no_grad():
        model[2].weight.mul_(0.1)  # type: ignore[operator, union-attr]  # nearly equal logits
        model[2].bias.zero_()  # type: ignore[operator, union-attr]
    labels = torch.tensor([6, 2, 5])
    grads = batch_gradients(model, torch.randn(3, 6, generator=draw()), labels)
    assert infer_labels(grads[2], 3).tolist() == [2, 5, 6]
    assert infer_labels(torch.eye(3), 3).tolist() == [0, 1, 2]


def test_oracle_6_exact_leak() -> None:
    model = audited(torch.float64)
    x = torch.rand(1, 1, 4, 4, generator=draw(), dtype=torch.float64)
    leaked = exact_leak(model, batch_gradients(model, x, LABELS[:1]), (1, 4, 4))
    assert leaked.shape == (12, 1, 4, 4)
    assert (psnr(leaked, x.expand_as(leaked)) > 100).all()
    dead = made(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    alive = int((F.linear(x.flatten(1), dead[1].weight, dead[1].bias) > 0).sum())  # type: ignore[arg-type]
    assert len(exact_leak(dead, batch_gradients(dead, x, LABELS[:1]), (1, 4, 4))) == alive < 12
    for other in (
        made(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5)),
        made(nn.Flatten(), nn.Linear(16, 5, bias=False)),
    ):
        assert len(exact_leak(other, list(other.parameters()), (1, 4, 4))) == 0


def test_images_are_matched_within_their_class() -> None:
    truth = torch.arange(4.0).view(4, 1, 1, 1)
    found = truth[[2, 0, 3, 1]] + 0.1
    close(match_images(found, truth), truth + 0.1)
    labels = torch.tensor([0, 0, 1, 1])
    close(match_images(found, truth, labels).flatten(), [0.1, 2.1, 1.1, 3.1])
    assert match_images(torch.full_like(truth, math.nan), truth).isnan().all()


def test_update_of_one_step_is_the_gradient() -> None:
    client = Client(
        0, toy_model().eval(), toy_clients(1, 10)[0], local=LocalTraining(lr=0.3, batch_size=64, clip_norm=None)
    )
    client.model.eval()
    batch = next(client.batches(1, 64))
    grads = batch_gradients(client.model, batch.inputs, batch.targets)  # type: ignore[arg-type]
    client.generator.manual_seed(0)
    sent = client.params
    local = client.train()
    for found, expected in zip(update_gradients(client.model, sent, local, 0.3), grads, strict=True):
        close(found, expected, 1e-5)


# -- defences ---------------------------------------------------------------------------------------------------------
def test_defences_by_hand() -> None:
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    close(torch.cat([g.flatten() for g in clip_gradients(grads, 1.0)]), [0.6, 0.0, 0.8])
    assert all(map(torch.equal, clip_gradients(grads, 5.0), grads))
    assert not clip_gradients([torch.zeros(2)], 1.0)[0].any()
    sparse = sparsify_gradients([torch.tensor([[1.0, -3.0], [2.0, 0.5]]), torch.tensor([7.0])], 0.5)
    assert sparse[0].tolist() == [[0, -3], [2, 0]] and sparse[1].tolist() == [7]
    assert all(map(torch.equal, sparsify_gradients(grads, 1.0), grads))
    large = [torch.randn(100, 100, generator=draw()) * 3, torch.full((5000,), 0.2)]
    noisy = noise_gradients(large, 0.5, draw(1))
    for before, after in zip(large, noisy, strict=True):
        close((after - before).std(), 0.5 * before.square().mean().sqrt(), 0.03)
    assert all(map(torch.equal, noise_gradients(large, 0.5, draw(1)), noisy))
    assert all(map(torch.equal, noise_gradients(large, 0.0), large))


def test_deterministic_defences_have_second_derivatives() -> None:
    x = torch.rand(2, 1, 4, 4, generator=draw(), dtype=torch.float64)
    model = audited(torch.float64)
    target = batch_gradients(model, x, LABELS)
    for defence in (ClippedUpdates(0.05).defend, SparseUpdates(0.3).defend):
        found = gifd(model, defence(target), LABELS, [nn.Identity()], x, steps=[1], tv=0, image_norm=0, defense=defence)
        assert found.score < 1e-12


@pytest.mark.parametrize("defence", [ClippedUpdates(0.1), NoisyUpdates(0.5), SparseUpdates(0.2)], ids=lambda d: d.name)
def test_defences_as_methods_change_what_is_sent(defence: Defence) -> None:
    def answer(method: Defence) -> tuple[Sent, Update]:
        client = Client(0, toy_model(), toy_clients(1)[0], local=LocalTraining(lr=0.2), seed=1)
        sent = Sent(*state_of(client.model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return sent, method.client_update(client, sent)

    sent, plain = answer(Undefended())
    neutral = answer(type(defence)(**type(defence).neutral))[1]  # type: ignore[arg-type]
    _, found = answer(defence)
    steps = [(sent.params[k] - plain.params[k]) / 0.2 for k in sent.params]
    expected = defence.defend(steps, None) if not defence.random else None
    assert not torch.equal(found.params["4.weight"], plain.params["4.weight"])
    for i, key in enumerate(sent.params):
        close(neutral.params[key], plain.params[key], 1e-6)
        if expected is not None:
            close((sent.params[key] - found.params[key]) / 0.2, expected[i], 1e-5)


def test_larger_batches_take_fewer_steps() -> None:
    def steps(method: Defence) -> int:
        client = Client(0, toy_model(), toy_clients(1)[0], local=LocalTraining(batch_size=6))
        return method.client_update(client, Sent(*state_of(client.model))).num_steps

    assert (steps(Undefended()), steps(LargerBatches(1)), steps(LargerBatches(2)), steps(LargerBatches(99))) == (
        4,
        4,
        2,
        1,
    )


# -- the search -------------------------------------------------------------------------------------------------------
def slow_search(
    model: nn.Module, target: list[Tensor], stages: list[nn.Module], z: Tensor, steps: list[int], radius: list[Any]
) -> list[Tensor]:
    """GIFD as the definition has it, with Adam written out; the clamped images of every stage."""
    found, h = [], z
    flat_target = torch.cat([t.flatten() for t in target])
    for k, count in enumerate(steps):
        start = h.clone()
        m, s = torch.zeros_like(h), torch.zeros_like(h)
        for i in range(count):
            v = h.clone().requires_grad_()
            x = v
            for stage in stages[k:]:
                x = stage(x)
            loss = F.cross_entropy(model(x), LABELS)
            g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()), create_graph=True)])
            j = 1 - (g * flat_target).sum() / (g.square().sum().sqrt() * flat_target.square().sum().sqrt())
            across = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
            j = j + 1e-2 * across + 1e-3 * x.square().sum().sqrt() / 16
            (d,) = torch.autograd.grad(j, v)
            m, s = 0.9 * m + 0.1 * d, 0.999 * s + 0.001 * d * d
            rate = 0.1 * (0.5 - 0.5 * math.cos(math.pi * min(1, (1 - i / count) / 0.75))) * min(1, i / count / 0.05)
            h = h - rate * (m / (1 - 0.9 ** (i + 1))) / ((s / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
            if k == 0:
                h = h * start.norm(dim=1, keepdim=True) / h.norm(dim=1, keepdim=True)
            elif radius[k] is not None:
                h = start + torch.stack([torch.as_tensor(slow_l1(u.numpy(), radius[k])) for u in h - start])
        x = h
        for stage in stages[k:]:
            x = stage(x)
        found.append(x.detach().clamp(0, 1))
        h = stages[k](h).detach()
    return found


def test_search_equals_a_slow_one() -> None:
    model, stages, z, _, target = problem(torch.float64)
    start = z + 0.7
    options: dict[str, Any] = {"steps": [7, 5, 6], "radius": [None, 0.2, None]}
    found = gifd(model, target, LABELS, stages, start, tv=1e-2, image_norm=1e-3, **options)
    expected = slow_search(model, target, stages, start, **options)
    for ours, theirs in zip(found.stage_images, expected, strict=True):
        close(ours, theirs, 1e-8)
    for score, images in zip(found.stage_scores, expected, strict=True):
        close(score, gradient_matching_loss(batch_gradients(model, images, LABELS), target), 1e-9)
    assert torch.equal(found.images, found.stage_images[found.stage])


def test_oracle_7_starts_at_the_truth_and_stays_close() -> None:
    model, stages, z, x, target = problem(torch.float64)
    still = gifd(model, target, LABELS, stages, z, steps=[1], tv=0, image_norm=0)
    assert torch.equal(still.images, x) and abs(still.score) < 1e-12
    found = gifd(model, target, LABELS, stages, z, steps=[30, 30, 30], tv=0, image_norm=0)
    assert (found.images - x).abs().max() < 0.02 and found.score < 1e-4


def test_oracle_8_projections_and_the_least_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stages, z, _, target = problem()
    seen: list[tuple[Tensor, Tensor]] = []
    search = module._search

    def watched(start: Tensor, *arguments: Any) -> Tensor:
        seen.append((start, search(start, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(module, "_search", watched)
    start = z + 1
    found = gifd(model, target, LABELS, stages, start, steps=[12, 12, 12], radius=[None, 0.3, 0.5])
    close(seen[0][1].norm(dim=1), start.norm(dim=1), 1e-5)
    for (h0, h), radius in zip(seen[1:], (0.3, 0.5), strict=True):
        moved = (h - h0).abs().sum(1)
        assert (moved <= radius * (1 + 1e-5)).all() and (moved > 0).all()
    assert found.stage_scores[found.stage] == found.stage_scores.min() == found.score
    assert len(found.stage_images) == 3 and found.images.shape == (2, 1, 4, 4)
    assert ((found.images >= 0) & (found.images <= 1)).all()


def test_searches_get_closer() -> None:
    model, stages, z, x, target = problem()
    start = z + 0.8 * torch.randn(2, 3, generator=draw(9))
    found = gifd(model, target, LABELS, stages, start, steps=[60, 60])
    before = gradient_matching_loss(batch_gradients(model, render(stages, start), LABELS), target)
    assert found.score < 0.2 * before
    pixels = [invert_pixels(model, target, LABELS, x.shape, steps=n, generator=draw(2)) for n in (1, 100)]
    assert pixels[1].score < 0.05 * pixels[0].score and pixels[0].stage_scores.shape == (1,)
    assert psnr(pixels[1].images, x).mean() > psnr(pixels[0].images, x).mean() + 5
    again = invert_pixels(model, target, LABELS, x.shape, steps=100, generator=draw(2))
    assert torch.equal(again.images, pixels[1].images)
    shifted = invert_pixels(model, target, LABELS, x.shape, steps=3, clamp=(-2.0, 3.0), generator=draw(2))
    assert shifted.images.min() < -0.5 and shifted.images.max() > 1.5


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_other_metrics(metric: Any) -> None:
    model, stages, z, _, target = problem()
    scores = [gifd(model, target, LABELS, stages, z + 1, steps=[n], metric=metric).score for n in (1, 50)]
    assert scores[1] < scores[0]


def test_nothing_is_changed() -> None:
    model, stages, z, _, target = problem()
    model.insert(2, nn.BatchNorm1d(12))  # type: ignore[operator]
    model.train()
    stages[0].train()
    model[1].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    target = batch_gradients(model, torch.rand(2, 1, 4, 4, generator=draw()), LABELS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gifd(model, target, LABELS, stages, z, steps=[2, 2])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for part in (model, *stages) for p in part.parameters())
    assert model.training and stages[0].training and not model[1].weight.requires_grad  # type: ignore[index, union-attr]
    assert all(p.requires_grad for stage in stages for p in stage.parameters())


def test_nan_scores_are_excluded() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * math.nan

    model, stages, z, x, target = problem()
    with pytest.raises(NonFiniteError, match="every stage"):
        gifd(model, target, LABELS, [Broken(), *stages], z, steps=[2])
    images, nan = [x, x + 1, x + 2], torch.tensor(math.nan)
    found = module._least(images, [nan, torch.tensor(0.5), torch.tensor(0.7)])
    assert found.stage == 1 and found.images is images[1]


# -- the audit --------------------------------------------------------------------------------------------------------
def auditor(dtype: torch.dtype = torch.float32, **settings: Any) -> LeakageAudit:
    sampler = lambda count, generator: torch.randn(count, 3, generator=generator)  # noqa: E731
    return LeakageAudit(generator(dtype), sampler, **{"steps": [10, 5], "restarts": 1, **settings})


def test_audit_reports_every_attack_and_defence() -> None:
    model, _, _, x, _ = problem()
    defences = [NoisyUpdates(3.0), ClippedUpdates(0.1), SparseUpdates(0.1)]
    rows = auditor().audit(model, (x, LABELS), defenses=defences)
    assert list(rows) == ["none", "noisy-updates", "clipped-updates", "sparse-updates"]
    for row in rows.values():
        assert list(row.attacks) == ["exact", "pixel", "latent", "gifd"]
        for found in row.attacks.values():
            assert found.images.shape == x.shape and found.max >= found.mean and found.ssim <= 1
            close(psnr(found.images, x).mean(), found.mean, 1e-4)
        assert row.worst[1].mean == max(found.mean for found in row.attacks.values())
    assert rows["noisy-updates"].worst[1].mean < rows["none"].worst[1].mean
    assert str(rows["none"]).startswith("exact ")
    again = auditor().audit(model, (x, LABELS), defenses=defences)
    assert torch.equal(again["noisy-updates"].pixel.images, rows["noisy-updates"].pixel.images)


def test_clipping_alone_hides_nothing_from_the_cosine() -> None:
    model, _, _, x, _ = problem(torch.float64)
    rows = auditor(torch.float64).audit(model, (x, LABELS), defenses={"clipped": ClippedUpdates(0.01)})
    close(rows["clipped"].pixel.mean, rows["none"].pixel.mean, 1e-2)


def test_audit_reports_the_exact_leak_first() -> None:
    model = audited(torch.float64)
    x = torch.rand(1, 1, 4, 4, generator=draw(), dtype=torch.float64)
    row = LeakageAudit(steps=[2], restarts=1).audit(model, (x, LABELS[:1]))["none"]
    assert row.exact is not None and row.exact.mean > 100 and row.worst[0] == "exact"
    assert row.latent is None and row.gifd is None


def test_restarts_keep_the_least_score() -> None:
    model, _, _, x, target = problem()
    one, four = (auditor(restarts=n, steps=[10]).attack(model, x, LABELS, None) for n in (1, 4))
    assert four.pixel.score <= one.pixel.score
    close(gradient_matching_loss(batch_gradients(model, four.pixel.images, LABELS), target), four.pixel.score, 1e-4)


def test_functions_are_defences_too() -> None:
    model, _, _, x, _ = problem()

    def halved(grads: Any) -> list[Tensor]:
        return [grad / 2 for grad in grads]

    rows = LeakageAudit(steps=[3], restarts=1).audit(
        model, Examples(x, LABELS, num_classes=5).take(torch.arange(2)), defenses=[halved]
    )
    assert list(rows) == ["none", "halved"]
    with pytest.raises(ArgumentError, match="larger-batches"):
        LeakageAudit(steps=[3]).audit(model, (x, LABELS), defenses=[LargerBatches(2)])


# -- the method -------------------------------------------------------------------------------------------------------
def image_clients(count: int = 3) -> list[Examples]:
    return [
        Examples(torch.rand(9, 1, 4, 4, generator=draw(n)), torch.arange(9) % 5, num_classes=5) for n in range(count)
    ]


def test_method_audits_the_client_that_agreed_and_sends_figures_alone() -> None:
    client = Client(1, audited(), image_clients()[1])
    method = GIFD(LeakageAudit(steps=[5], restarts=1), client=1, batch_size=2, defences=[NoisyUpdates(1.0)])
    assert method.answer(client, Sent(*state_of(client.model), query="other")) is None
    model = audited()
    server = Server(model, *state_of(model), clients={0: 9, 1: 9})
    asked: list[Any] = []

    def ask(query: str, clients: list[int] | None = None) -> list[Update]:
        asked.append(clients)
        found = method.answer(client, Sent(server.params, server.buffers, query=query))
        return [] if found is None else [found]

    server.ask = ask
    method.finish(server)
    assert asked == [[1]]
    found = server.results["leakage"]
    assert set(found) == {f"{d}/{a}" for d in ("none", "noisy-updates") for a in ("exact", "pixel")}
    assert all(math.isfinite(value) and value <= 100 for value in found.values())
    client.local = LocalTraining(least_batch=3)
    with pytest.raises(ArgumentError, match="batch_size = 2"):
        method.answer(client, Sent(*state_of(client.model), query="leakage-audit"))
    server.clients = {0: 9}
    with pytest.raises(ArgumentError, match="client = 1"):
        method.finish(server)


def test_method_in_a_run() -> None:
    pytest.importorskip("flwr")
    from equipoise.federated.simulation import simulate

    audit = GIFD(LeakageAudit(steps=[4], restarts=1), client=2, batch_size=1)
    runs = [
        simulate(methods, audited(), image_clients(), 1)
        for methods in ([audit, NoisyUpdates(0.1)], [NoisyUpdates(0.1)])
    ]
    assert runs[0].results["leakage"]["none/exact"] > 60
    assert all(torch.equal(runs[0].params[k], runs[1].params[k]) for k in runs[0].params)


# -- bad input --------------------------------------------------------------------------------------------------------
def call(**changes: Any) -> Callable[[], object]:
    def found() -> object:
        model, stages, z, _, target = problem()
        given: dict[str, Any] = {"target": target, "labels": LABELS, "stages": stages, "z0": z, "steps": [1], **changes}
        return gifd(model, **given)

    return found


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (call(target=[torch.zeros(2)]), "target has 1 tensors: must have 4"),
        (call(target=[torch.ones(1)] * 4), r"target\[0\].shape"),
        (call(target=[torch.zeros(12, 16), torch.zeros(12), torch.zeros(5, 12), torch.zeros(5)]), "target is zero"),
        (call(steps=[1] * 4), r"steps = .*from 1 to 3"),
        (call(steps=[]), "steps = "),
        (call(steps=[0]), "steps = 0"),
        (call(radius=[None, 1.0]), "radius = "),
        (call(steps=[1, 1], radius=[None, 0.0]), "radius = 0.0"),
        (call(lr=[0.1, 0.1]), "lr = "),
        (call(lr=0.0), "lr = 0"),
        (call(labels=LABELS[:1]), "z0 = .*1 examples"),
        (call(metric="cosin"), "metric = 'cosin'.*cosine"),
        (call(tv=-1.0), "tv = -1"),
        (call(clamp=(1.0, 0.0)), "clamp = "),
        (lambda: gradient_matching_loss(G, T[:1]), "target has 1"),
        (lambda: gradient_matching_loss(G, [torch.zeros(2), torch.zeros(2)]), "target is zero"),
        (lambda: gradient_matching_loss(G, T, metric="x"), "metric = 'x'"),  # type: ignore[arg-type]
        (lambda: project_l1_ball(torch.ones(1, 2), 0.0), "radius = 0"),
        (lambda: ramp_lr(1.5, 0.1), "t = 1.5"),
        (lambda: infer_labels(torch.ones(3, 2), 4), "num = 4"),
        (lambda: infer_labels(torch.ones(3, 2), 0), "num = 0"),
        (lambda: infer_labels(torch.ones(3), 1), "weight_grad = "),
        (lambda: total_variation(torch.ones(2, 2)), "x.shape"),
        (lambda: psnr(torch.ones(2, 2), torch.ones(2, 3)), "x.shape"),
        (lambda: psnr(torch.ones(2, 2), torch.ones(2, 2), data_range=0.0), "data_range = 0"),
        (lambda: match_images(torch.ones(2, 1), torch.ones(3, 1)), "images = "),
        (lambda: clip_gradients(G, 0.0), "max_norm = 0"),
        (lambda: clip_gradients([], 1.0), r"grads = \[\]"),
        (lambda: sparsify_gradients(G, 0.0), "keep = 0"),
        (lambda: sparsify_gradients(G, 1.1), "keep = 1.1"),
        (lambda: noise_gradients(G, -1.0), "sigma = -1"),
        (lambda: invert_pixels(audited(), [], LABELS, (1, 1, 4, 4), steps=1), "shape = "),
        (lambda: invert_pixels(audited(), [], LABELS, (2, 1, 4, 4), steps=0), "steps = 0"),
        (lambda: batch_gradients(nn.Flatten(), torch.ones(1, 2), LABELS[:1]), "no parameters"),
        (lambda: update_gradients(audited(), {}, {}, 0.1), "sent: the names"),
        (lambda: auditor(steps=[1] * 4), "steps = "),
        (lambda: auditor(restarts=0), "restarts = 0"),
        (lambda: LeakageAudit(generator()), "z_sampler = None"),
        (lambda: auditor().audit(audited(), (torch.ones(2, 16), LABELS)), "batch.shape"),
        (lambda: LargerBatches(0), "times = 0"),
        (lambda: GIFD(client=-1), "client = -1"),
    ],
)
def test_bad_input(work: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work()
