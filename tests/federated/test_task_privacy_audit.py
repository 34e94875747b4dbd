"""The privacy audit, its generator, and the claims' audits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equipoise import catalogue
from equipoise.errors import ArgumentError
from equipoise.federated.claims_gifd import ARMS, CLAIMS, LeakageClaims, prior
from equipoise.federated.defences import Undefended
from equipoise.federated.task_privacy_audit import PrivacyAudit, SmoothMLP, prepared, train_prior
from equipoise.training import Method

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"rounds": 30, "clients": 3, "batch_size": 2, "steps": 6, "prior_epochs": 1}


def method(name: str) -> type[Method]:
    return catalogue.find("method", name).load()  # type: ignore[no-any-return]


def small_mlp(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), 8, bias=False), nn.ReLU(), nn.Linear(8, num_outputs)
    )


def wrong(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_outputs + 1))


def test_default_arms_exist_and_are_defences() -> None:
    task = PrivacyAudit()
    for name in (task.baseline, *task.methods):
        task.build_method(method(name), {})
    with pytest.raises(ArgumentError, match="'elr': is no defence"):
        task.build_method(method("elr"), {})
    assert not task.higher_is_better and not task.percent and task.trade_off is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"latent": 1.5}, "latent = 1.5"),
        ({"price": -1.0}, "price = -1"),
        ({"public": 1.0}, "public = 1"),
        ({"target": "y"}, "data='folder'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PrivacyAudit(**settings)


def test_data_that_cannot_be_audited() -> None:
    with pytest.raises(ArgumentError, match="needs images"):
        PrivacyAudit(dataset="wine").check()
    with pytest.raises(ArgumentError, match="needs classes"):
        PrivacyAudit(dataset="diabetes").check()
    with pytest.raises(ArgumentError, match=r"public = 0\.999: leaves"):
        PrivacyAudit(**SMALL, public=0.999).check()
    with pytest.raises(ArgumentError, match=r"must be \(1, 10\)"):
        PrivacyAudit(**SMALL, model=f"{__name__}:wrong").check()


def test_the_report_says_whose_tool_it_is_and_the_exact_leak_before_any_search() -> None:
    remarks = PrivacyAudit(**SMALL).check()
    assert "defender's tool" in remarks[0] and "your own model" in remarks[0] and "simulated" in remarks[0]
    assert "Exact leak" in remarks[1] and "at 100 dB" in remarks[1] and len(remarks) == 3
    other = PrivacyAudit(**SMALL, model=f"{__name__}:small_mlp").check()
    assert "none by division" in other[1] and "ReLU" in other[3]


def test_public_private_and_clients_rows_are_disjoint() -> None:
    task = PrivacyAudit(**SMALL)
    made = prepared(task, 0)
    assert len(made.public) + len(made.private) == len(made.parts.train)
    assert torch.cat(made.rows).unique().numel() == len(made.private) and len(made.rows) == 3
    assert made.range == (0.0, 1.0) and made.sample(5, torch.Generator()).shape == (5, 8)
    assert task.sanity(0)[0][1] and task.resampled


def test_prior_learns_its_images() -> None:
    images = torch.rand(96, 1, 1, 1).expand(96, 1, 6, 6) * 4 - 2
    errors = []
    for epochs in (1, 60):
        stages, codes = train_prior(images, (-2.0, 2.0), 4, epochs, 0)
        assert codes.shape == (96, 4) and len(stages) == 3
        found = nn.Sequential(*stages)(codes)
        assert found.shape == images.shape and found.min() >= -2 and found.max() <= 2
        errors.append(F.mse_loss(found, images).item())
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", [PrivacyAudit.baseline, *PrivacyAudit.methods])
def test_runs_of_every_arm(name: str) -> None:
    task = PrivacyAudit(**SMALL)
    result = task.run(method(name), {"lr": 0.3}, 0)
    found = result.metrics["last"]
    assert all(math.isfinite(value) for value in found.values())
    for part in ("validation", "test"):
        attacks = [found[f"{part}_{attack}_psnr"] for attack in ("exact", "pixel", "latent", "gifd")]
        assert found[f"{part}_psnr"] == pytest.approx(max(attacks))
        assert found[f"{part}_exposure"] == pytest.approx(found[f"{part}_psnr"] + 100 * (1 - found[f"{part}_accuracy"]))
    assert found["validation_psnr"] != found["test_psnr"]
    if name == "noisy-updates":
        assert task.run(method(name), {"lr": 0.3}, 0).metrics == result.metrics


def test_training_of_one_client_is_sgd() -> None:
    task = PrivacyAudit(**{**SMALL, "clients": 1, "batch_size": 10_000})
    made = prepared(PrivacyAudit(**{**SMALL, "clients": 1}), 0)
    trained, expected = task._train(made, Undefended(), 0.2, 0, 2), task._model(made, 0)
    sgd = torch.optim.SGD(expected.parameters(), lr=0.2, momentum=0.9)
    for _ in range(2):
        sgd.zero_grad()
        F.cross_entropy(expected(made.private.inputs), made.private.targets).backward()
        sgd.step()
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_strong_defence_lowers_what_is_recovered() -> None:
    task = PrivacyAudit(**{**SMALL, "steps": 15})
    found = {
        name: task.run(method(name), {"lr": 0.3, **config}, 1).score("test_psnr")
        for name, config in (("undefended", {}), ("noisy-updates", {"noisy-updates.sigma": 5.0}))
    }
    assert found["noisy-updates"] < found["undefended"] - 8


def test_cost_and_own_images(tmp_path: Path) -> None:
    task = PrivacyAudit(**SMALL)
    one, four = (task.cost(method(name), {"lr": 0.1}, 0) for name in ("undefended", "larger-batches"))
    assert one is not None and four is not None
    assert four.flops == 4 * one.flops > 0 and one.inference_parameters == sum(
        p.numel() for p in SmoothMLP((1, 8, 8), 10).parameters()
    )
    assert task.step_seconds(method("undefended"), {"lr": 0.1}, 0) > 0
    draw = np.random.default_rng(0)
    labels = np.arange(80) % 2
    images = (draw.random((80, 6, 6)) * 0.5 + 0.5 * labels[:, None, None]).astype(np.float32)
    np.savez(tmp_path / "mine.npz", inputs=images, target=labels)
    own = PrivacyAudit(**{**SMALL, "data": str(tmp_path / "mine.npz"), "target": "target", "model": "mlp"})
    assert own.check() and "data_sha256" in own.fingerprint()
    assert own.run(method("sparse-updates"), {"lr": 0.1}, 0).score("test_psnr") > 0


def test_claims() -> None:
    task = LeakageClaims(steps=3, prior_epochs=1)
    assert task.check() == [] and task.cost(Undefended, {}, 0) is None
    images, labels, stages, _ = prior(task, 0)
    assert len(images) == len(labels) == 597 and len(stages) == 3
    for _, slug, config in ARMS:
        metrics = task.run(method(slug), config, 0).metrics["last"]
        assert {claim.metric.removeprefix("last.") for claim in CLAIMS} <= set(metrics)
    assert {claim.slug for claim in CLAIMS} == {"gifd"} and len({claim.id for claim in CLAIMS}) == len(CLAIMS)
