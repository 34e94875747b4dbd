"""The claims of GIFD, as they can be checked on digits: audits of updates of one's own model, simulated from public data.

1200 of the 1797 digits are public and train the generator: the decoder of an autoencoder with 8 latent variables, stages
8-32-64-64, 40 epochs. The update is the gradient of an untrained perceptron 64-32-10 with sigmoids on 4 of the other digits. GIFD
takes 150 steps in each of 3 stages, with radii (none, 10, 20); the searches in latent and in pixel space take 450. One start each.
Noise is relative to the root mean square of each gradient tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.comparison.claims import Claim
from equipoise.data import load
from equipoise.federated.gifd import LeakageAudit
from equipoise.federated.task_privacy_audit import PrivacyAudit, _summary, train_prior
from equipoise.models import build
from equipoise.training import Method, RunResult
from equipoise.training.task import Config

PUBLIC = 1200
RADII = (None, 10.0, 20.0)


@dataclass(frozen=True)
class LeakageClaims(PrivacyAudit):
    """Audits of one batch a seed, without training."""

    name: ClassVar[str] = "gifd-leakage"
    metric: ClassVar[str] = "psnr"
    higher_is_better: ClassVar[bool] = True

    steps: int = 150
    prior_epochs: int = 40

    def check(self) -> list[str]:
        return []

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        return []

    def cost(self, method: type[Method], config: Config, seed: int) -> None:  # type: ignore[override]
        return None

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        images, labels, stages, (mean, sd) = prior(self, seed)
        audit = LeakageAudit(
            stages,
            lambda count, draw: mean + sd * torch.randn(count, len(mean), generator=draw),
            steps=[self.steps] * 3,
            radius=RADII,
            restarts=self.restarts,
            seed=seed,
        )
        model = build(self.model, images.shape[1:], 10, seed)
        batch = images[: self.batch_size], labels[: self.batch_size]
        seen = _summary([audit.attack(model, *batch, self._defence(method, config))])
        metrics = {f"{part}_{key}": value for part in ("validation", "test") for key, value in seen.items()}
        return RunResult({"last": metrics, "best": metrics}, sizes={"train": PUBLIC, "validation": 4, "test": 4})


@lru_cache(maxsize=8)
def prior(task: LeakageClaims, seed: int) -> tuple[Tensor, Tensor, list[nn.Module], tuple[Tensor, Tensor]]:
    """The private images and labels of a seed, the generator, and its codes' mean and standard deviation."""
    raw = load("digits")
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.as_tensor(raw.inputs).float(), torch.as_tensor(raw.targets)
    public, private = images[order[:PUBLIC]], order[PUBLIC:]
    stages, codes = train_prior(public, (0.0, 1.0), task.latent, task.prior_epochs, seed)
    return images[private], labels[private], stages, (codes.mean(0), codes.std(0))


def arm(name: str, method: str, **settings: Any) -> tuple[str, str, dict[str, Any]]:
    return name, method, {f"{method}.{key}": value for key, value in settings.items()}


ARMS = (
    arm("undefended", "undefended"),
    arm("noise 0.5", "noisy-updates", sigma=0.5),
    arm("noise 2", "noisy-updates", sigma=2.0),
)
GIFD, LATENT, PIXEL = (f"last.test_{attack}_psnr" for attack in ("gifd", "latent", "pixel"))
claim = partial(
    Claim,
    slug="gifd",
    number=20,
    source=(
        "Fang et al., ICCV 2023, abstract: ImageNet and FFHQ 64x64, batch of one, better than inversion in latent space and "
        "without a generator, also under defences (numbers were not available)"
    ),
    task=LeakageClaims,
    settings={},
    arms=ARMS,
    seeds=8,
    unit="dB PSNR",
)
# What two attacks recover from the same update, and what one attack recovers of a defended and of the undefended update.
one = lambda arm, metric, reference, **rest: claim(  # noqa: E731
    method=arm, reference=arm, metric=metric, reference_metric=reference, **rest
)
lowered = partial(claim, method="noise 2", reference="undefended", at_most=-5.0)

CLAIMS = [
    one(
        "undefended",
        GIFD,
        LATENT,
        claim="Without a defence GIFD recovers images at least 2 dB better than a search in latent space alone with as many steps.",
        name="latent",
        at_least=2.0,
    ),
    one(
        "undefended",
        GIFD,
        PIXEL,
        claim="Without a defence GIFD recovers images at least 2 dB better than a search without a generator.",
        name="pixels",
        at_least=2.0,
        remarks="Not expected here: a small perceptron gives 4 images of 64 pixels away by itself, and a prior limits the search.",
    ),
    one(
        "noise 0.5",
        GIFD,
        PIXEL,
        claim="Under noise of half the gradient's size GIFD is at least 2 dB better than a search without a generator.",
        name="noise",
        at_least=2.0,
    ),
    one(
        "noise 2",
        GIFD,
        PIXEL,
        claim="Under noise of twice the gradient's size GIFD is at least 2 dB better than a search without a generator.",
        name="strong-noise",
        at_least=2.0,
    ),
    one(
        "noise 0.5",
        GIFD,
        LATENT,
        claim="Under noise GIFD is at least 1 dB better than a search in latent space alone.",
        name="noise-latent",
        at_least=1.0,
        remarks="Not expected at this scale: more freedom fits more of the noise.",
    ),
    lowered(
        metric=GIFD,
        claim="Noise of twice the gradient's size takes at least 5 dB from GIFD.",
        name="defence",
    ),
    lowered(
        metric=LATENT,
        claim="Noise of twice the gradient's size takes at least 5 dB from a search in latent space.",
        name="defence-latent",
    ),
    lowered(
        metric=PIXEL,
        claim="Noise of twice the gradient's size takes at least 5 dB from a search without a generator.",
        name="defence-pixels",
    ),
]
