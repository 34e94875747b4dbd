"""The privacy audit: what gives an update away, and what does a defence change? On a model and data of your own, in simulation.

A defender's tool. Nothing here meets a client of anybody's: the data are yours, cut into simulated clients, and so the truth behind
every update is known. Each run does two things under one defence:

- it trains the model over the clients, in rounds of one step: the mean of what they send is the gradient of a step of SGD with
  momentum 0.9. That gives the accuracy that the defence leaves.
- it attacks updates of the untrained model, which give most away, as ``equipoise.federated.gifd`` does: by division (first linear
  layer), in pixel space, in the latent space of a generator, and by GIFD. The generator is the decoder of an autoencoder
  that is trained here on public rows, which no client has. The attack that recovers most counts, by its mean PSNR.

What is compared, and tuned on validation data, is the *exposure*, in dB: that PSNR plus ``price`` dB for each point of error of the
trained model. A defence that ruins the model does not win, nor does one that hides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import RawData, Splits, fingerprint, leakage, load, read, split
from equipoise.errors import ArgumentError, check_integer, check_range
from equipoise.federated.algorithm import predict
from equipoise.federated.defences import Defence
from equipoise.federated.gifd import MOST, AuditRow, LeakageAudit, batch_gradients, exact_leak, psnr
from equipoise.models import build, source_digest
from equipoise.models.factory import _seeded
from equipoise.models.reference import Classifier
from equipoise.training import Examples, LogUniform, Method, RunResult, TradeOff
from equipoise.training.cost import Cost, measure
from equipoise.training.metrics import classification_metrics
from equipoise.training.space import Space
from equipoise.training.task import Config, Task

PARTS = ("validation", "test")


@dataclass(frozen=True)
class PrivacyAudit(Task):
    """How much of a batch can be recovered from an update, under each defence; run on your own model, on simulated updates.

    dataset: name of an embedded data set of images (``equipoise.data.available()``).
    model: "mlp", "cnn", or "package.module:factory" of your own; by default a perceptron with sigmoids, whose gradient is smooth.
    batch_size: examples of a client's step, undefended. clients, rounds: of the training.
    price: dB that a point of error is worth, >= 0.
    steps: of the search in each of the generator's three stages; the other attacks get as many in all. audited: batches attacked.
    restarts: of each attack. latent: size of the generator's latent space. prior_epochs: its training.
    public: share of the training rows that the attacker's generator learns from, and no client has.
    validation, test: shares of the data held out (``test`` only where the data have no test set of their own).
    data, target, test_data: your own folder of images or file, its target column, and a file to test on.
    """

    name: ClassVar[str] = "privacy-audit"
    metric: ClassVar[str] = "exposure"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    baseline: ClassVar[str] = "undefended"
    methods: ClassVar[tuple[str, ...]] = ("clipped-updates", "noisy-updates", "sparse-updates", "larger-batches")
    trade_off: ClassVar[TradeOff | None] = TradeOff("psnr", "accuracy", x_higher=False)

    dataset: str = "digits"
    model: str = "equipoise.federated.task_privacy_audit:SmoothMLP"
    batch_size: int = 4
    clients: int = 8
    rounds: int = 100
    price: float = 1.0
    steps: int = 40
    audited: int = 1
    restarts: int = 1
    latent: int = 8
    prior_epochs: int = 30
    public: float = 0.5
    validation: float = 0.2
    test: float = 0.2
    data: str | None = None
    target: str | None = None
    test_data: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "clients",
            "rounds",
            "steps",
            "audited",
            "restarts",
            "latent",
            "prior_epochs",
        ):
            check_integer(name, getattr(self, name), 1)
        check_range("price", self.price, 0)
        for name in ("public", "validation", "test"):
            check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=True)
        if self.data is None and (self.target is not None or self.test_data is not None):
            raise ArgumentError("target, test_data describe a file of your own: give data='folder' as well")

    # -- what the trial may do ----------------------------------------------------------------------------------------
    @property
    def resampled(self) -> bool:
        return self._raw().test is None

    def space(self) -> Space:
        """The rate of training."""
        return {"lr": LogUniform(0.03, 1.0)}

    def build_method(self, method: type[Method], config: Mapping[str, Any]) -> Method:
        made = super().build_method(method, config)
        if not isinstance(made, Defence):
            raise ArgumentError(
                f"method = {method.name!r}: is no defence. Choose from {', '.join((self.baseline, *self.methods))}"
            )
        return made

    def check(self) -> list[str]:
        raw = self._raw()
        if raw.class_names is None:
            raise ArgumentError(f"data = {raw.name!r}: has a continuous target; {self.name} needs classes")
        shape = split(raw, 0, validation=self.validation, test=self.test).input_shape
        if len(shape) != 3:
            raise ArgumentError(f"data = {raw.name!r}: has inputs of shape {shape}; {self.name} needs images (C, H, W)")
        made = prepared(self, 0)
        model = self._model(made, 0).eval()
        with torch.no_grad():
            given = tuple(model(made.private.inputs[:1]).shape)  # type: ignore[index]
        if given != (1, made.parts.num_outputs):
            raise ArgumentError(
                f"model = {self.model!r}: its output has the shape {given} for one example: must be (1, {made.parts.num_outputs})"
            )
        remarks = [
            "A defender's tool: it audits your own model on updates that are simulated from your own data, whose truth is known. "
            "Attacks that fail here prove nothing about others.",
            self._exact(made, model),
            f"The attacker knows the model, the labels and every defence but its random numbers, and has a generator trained on "
            f"{len(made.public)} public rows. Updates are of the untrained model, {self.batch_size} examples each. "
            f"Exposure is the mean PSNR of the best attack (at most {MOST:g} dB) plus {self.price:g} dB a point of error.",
        ]
        if any(isinstance(module, nn.ReLU) for module in model.modules()):
            remarks.append(
                "The model has ReLU, whose second derivative is zero: searches by gradient work less well against it, which is no "
                "defence against others."
            )
        return remarks

    def _exact(self, made: Prepared, model: nn.Module) -> str:
        """The exact leak of a batch of one, which stands before any search."""
        image, label = made.private.inputs[:1], made.private.targets[:1]  # type: ignore[index]
        leaked = exact_leak(model, batch_gradients(model, image, label), image.shape[1:])
        if not len(leaked):
            return "Exact leak: none by division, since the model does not begin with a linear layer with bias."
        found = min(MOST, float(psnr(leaked[:1], image, data_range=made.range[1] - made.range[0])))
        return (
            "Exact leak: undefended and with a batch of one, the first layer gives the input away by a division, "
            f"at {found:.0f} dB, without any search."
        )

    def fingerprint(self) -> dict[str, Any]:
        files = {key: fingerprint(path) for key in ("data", "test_data") if (path := getattr(self, key))}
        source = source_digest(self.model) if ":" in self.model else ""
        found = {**super().fingerprint(), **{f"{key}_sha256": value for key, value in files.items()}}
        return {**found, "model_source": source} if source else found

    def sanity(self, seed: int) -> list[tuple[str, bool, str]]:
        shared = leakage(prepared(self, seed).parts)
        text = f"{shared} rows of the test set of seed {seed} also occur in its training or validation data"
        return [("no leakage between splits", shared == 0, text)]

    # -- one run ------------------------------------------------------------------------------------------------------
    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        made, defence = prepared(self, seed), self._defence(method, config)
        model = self._train(made, defence, config["lr"], seed, self.rounds)
        metrics: dict[str, float] = {}
        for number, part in enumerate(PARTS):
            learned = classification_metrics(*predict(model, getattr(made.parts, part)))
            rows = [self._attack(made, defence, seed, number * self.audited + repeat) for repeat in range(self.audited)]
            seen = _summary(rows)
            exposure = seen["psnr"] + self.price * 100 * (1 - learned["accuracy"])
            metrics |= {f"{part}_{key}": value for key, value in {**learned, **seen, "exposure": exposure}.items()}
        chance = 1 / made.parts.num_outputs
        margin = 2 * (chance * (1 - chance) / len(made.parts.validation)) ** 0.5
        return RunResult(
            {"last": metrics, "best": metrics},
            sizes={name: len(getattr(made.parts, name)) for name in ("train", *PARTS)},
            trained=metrics["validation_balanced_accuracy"] > chance + margin,
        )

    def _defence(self, method: type[Method], config: Config) -> Defence:
        made = self.build_method(method, config)
        assert isinstance(made, Defence)
        return made

    def _train(self, made: Prepared, defence: Defence, lr: float, seed: int, rounds: int) -> nn.Module:
        """Rounds of one step: each client sends the defended gradient of a batch, and the server steps along the mean."""
        model, draw = self._model(made, seed), torch.Generator().manual_seed(seed)
        parameters = list(model.parameters())
        sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        inputs, targets = made.private.inputs, made.private.targets
        assert isinstance(inputs, Tensor)
        for _ in range(rounds):
            total: list[Tensor] = []
            for rows in made.rows:
                chosen = rows[torch.randperm(len(rows), generator=draw)[: self.batch_size * defence.larger]]
                loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
                grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                sent = defence.defend(grads, draw)
                total = torch._foreach_add(total, sent) if total else sent  # type: ignore[assignment]
            for parameter, mean in zip(parameters, torch._foreach_div(total, len(made.rows)), strict=True):
                parameter.grad = mean
            sgd.step()
        return model

    def _attack(self, made: Prepared, defence: Defence, seed: int, number: int) -> AuditRow:
        """Attack the update of the untrained model on the batch of that number: its rows are no other batch's."""
        size = self.batch_size * defence.larger
        chosen = torch.arange(number * self.batch_size, number * self.batch_size + size) % len(made.private)
        # The first rows are those of the undefended batch; a larger one goes on from there.
        images, labels = made.private.inputs[chosen], made.private.targets[chosen]  # type: ignore[index]
        audit = LeakageAudit(
            made.stages,
            made.sample,
            steps=[self.steps] * len(made.stages),
            clamp=made.range,
            restarts=self.restarts,
            seed=seed + 1_000_003 * number,
        )
        return audit.attack(self._model(made, seed), images, labels, defence)

    def cost(self, method: type[Method], config: Config, seed: int) -> Cost:
        made, defence = prepared(self, seed), self._defence(method, config)
        return measure(lambda: self._train(made, defence, config["lr"], seed, self.rounds))

    def step_seconds(self, method: type[Method], config: Config, seed: int) -> float:
        made, defence = prepared(self, seed), self._defence(method, config)
        start = time.perf_counter()
        self._train(made, defence, config["lr"], seed, min(self.rounds, 10))
        return time.perf_counter() - start

    # -- the data of a seed -------------------------------------------------------------------------------------------
    def _raw(self) -> RawData:
        return read(self.data, self.target, test=self.test_data) if self.data else load(self.dataset)

    def _model(self, made: Prepared, seed: int) -> nn.Module:
        return build(self.model, made.parts.input_shape, made.parts.num_outputs, seed)

    def _make(self, seed: int) -> Prepared:
        parts = split(self._raw(), seed, validation=self.validation, test=self.test)
        order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(seed))
        cut = round(self.public * len(order))
        public, private = parts.train.subset(order[:cut]), parts.train.subset(order[cut:])
        least = max(self.clients, 2 * self.audited * self.batch_size)
        if not len(public) or len(private) < least:
            raise ArgumentError(
                f"public = {self.public}: leaves {len(public)} public and {len(private)} private rows: must leave 1 and {least}"
            )
        assert isinstance(public.inputs, Tensor)
        span = float(parts.train.inputs.min()), float(parts.train.inputs.max())  # type: ignore[union-attr]
        stages, codes = train_prior(public.inputs, span, self.latent, self.prior_epochs, seed)
        rows = tuple(torch.arange(len(private)).chunk(self.clients))
        if len(rows) < self.clients:
            rows = tuple(torch.arange(len(private)).tensor_split(self.clients))
        return Prepared(parts, public, private, rows, span, stages, (codes.mean(0), codes.std(0)))


@dataclass(frozen=True)
class Prepared:
    """The split of a seed: public and private rows, the clients' positions in the private ones, the inputs' range, and the
    generator's stages with the mean and standard deviation of its codes. Nothing may write to it."""

    parts: Splits
    public: Examples
    private: Examples
    rows: tuple[Tensor, ...]
    range: tuple[float, float]
    stages: Sequence[nn.Module]
    moments: tuple[Tensor, Tensor]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Codes (count, latent) from a normal distribution with the public codes' moments."""
        mean, sd = self.moments
        return mean + sd * torch.randn(count, len(mean), generator=generator)


@lru_cache(maxsize=8)
def prepared(task: PrivacyAudit, seed: int) -> Prepared:
    """The data and the generator of a seed, kept for the arms that meet them next."""
    return task._make(seed)


def _summary(rows: Sequence[AuditRow]) -> dict[str, float]:
    """Means over the audited batches: of each attack's PSNR, and of the PSNR and SSIM of whichever attack recovered most."""
    mean = lambda values: sum(values) / len(rows)  # noqa: E731
    found = {f"{name}_psnr": mean([min(MOST, row.attacks[name].mean) for row in rows]) for name in rows[0].attacks}
    found["psnr"] = mean([min(MOST, row.worst[1].mean) for row in rows])
    found["ssim"] = mean([row.worst[1].ssim for row in rows])
    return found


class SmoothMLP(Classifier):
    """Flattened input, one layer of 32 sigmoids, and a linear head: smooth, as a search by second derivatives needs it."""

    def __init__(self, input_shape: Sequence[int], num_outputs: int) -> None:
        pixels = int(torch.Size(input_shape).numel())
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.Sigmoid()), 32, num_outputs)


class Scale(nn.Module):
    """Numbers in [0, 1] as images of a shape and range."""

    def __init__(self, shape: Sequence[int], span: tuple[float, float]) -> None:
        super().__init__()
        self.shape, self.span = tuple(shape), span

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.span
        return (low + (high - low) * x).reshape(-1, *self.shape)


def train_prior(
    images: Tensor, span: tuple[float, float], latent: int, epochs: int, seed: int
) -> tuple[list[nn.Module], Tensor]:
    """The decoder of an autoencoder of images (N, C, H, W), and the images' codes (N, latent).

    The decoder's three stages are latent - 4 latent - 8 latent - pixels, with LeakyReLU 0.2 and a sigmoid at the end. Trained by
    Adam at 0.002, batches of 64, on the mean squared error.
    """
    shape, pixels = tuple(images.shape[1:]), images[0].numel()
    widths = (latent, 4 * latent, 8 * latent, pixels)
    with _seeded(seed):
        encoder = nn.Sequential(
            nn.Flatten(),
            *(
                m
                for a, b in zip(widths[:0:-1], widths[2::-1], strict=True)
                for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))
            ),
        )[:-1]
        stages: list[nn.Module] = [
            nn.Sequential(nn.Linear(widths[0], widths[1]), nn.LeakyReLU(0.2)),
            nn.Sequential(nn.Linear(widths[1], widths[2]), nn.LeakyReLU(0.2)),
            nn.Sequential(nn.Linear(widths[2], widths[3]), nn.Sigmoid(), Scale(shape, span)),
        ]
    whole = nn.Sequential(encoder, *stages)
    adam, draw = torch.optim.Adam(whole.parameters(), lr=2e-3), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draw).split(64):
            adam.zero_grad()
            F.mse_loss(whole(images[rows]), images[rows]).backward()
            adam.step()
    with torch.no_grad():
        return stages, encoder(images)
