"""ConR against the paper's formulas, hand-computed numbers and a loop in plain Python."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.data.augment import Jitter
from equipoise.errors import ArgumentError
from equipoise.imbalance.conr import ConR, ConRLoss, conr_loss
from equipoise.imbalance.regression_baselines import LabelDensity
from equipoise.testing import check_method, check_regularizer, regression, spawn

torch.set_num_threads(1)
ANGLES = torch.tensor([0.0, 10.0, 60.0, 80.0], dtype=torch.float64).deg2rad()
FEATURES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
LABELS = torch.tensor([1.0, 1.5, 4.0, 4.5], dtype=torch.float64)
GUESSES = torch.tensor([1.2, 1.4, 1.9, 4.4], dtype=torch.float64)
SETTINGS: dict[str, Any] = {"window": 1.0, "temperature": 0.5, "pushing": 0.1}


def batch(m: int = 12, d: int = 5, values: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels in [0, 6], predictions near 3, weights; float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(m, d, generator=generator, dtype=torch.float64)
    labels = 6 * torch.rand(m, values, generator=generator, dtype=torch.float64)
    guesses = 3 + 0.4 * (labels - 3) + 0.3 * torch.randn(m, values, generator=generator, dtype=torch.float64)
    return features, labels, guesses, 0.5 + torch.rand(m, generator=generator, dtype=torch.float64)


def reference(
    features: Tensor,
    labels: Tensor,
    guesses: Tensor,
    weights: Tensor,
    *,
    window: float,
    temperature: float,
    pushing: float,
    form: str = "exp",
    denominator: str = "paper",
) -> list[float]:
    """The definition, one pair at a time."""
    m = len(features)
    z = [(row / max(row.norm().item(), 1e-300)).tolist() for row in features]
    y, p, w = labels.reshape(m, -1).tolist(), guesses.reshape(m, -1).tolist(), weights.reshape(-1).tolist()
    values = []
    for j in range(m):
        s = [sum(a * b for a, b in zip(z[j], z[i], strict=True)) / temperature for i in range(m)]
        gap = [math.dist(y[j], y[i]) for i in range(m)]
        positives = [i for i in range(m) if i != j and gap[i] <= window]
        negatives = [i for i in range(m) if gap[i] > window and math.dist(p[j], p[i]) <= window]
        if not positives or not negatives:
            values.append(0.0)
            continue
        total = sum(math.exp(s[a]) for a in positives)
        for q in negatives:
            push = math.exp(pushing * gap[q]) if form == "exp" else pushing * gap[q]
            total += w[j] * push * math.exp(s[q])
        if denominator == "official":
            total += m - len(positives)
        values.append(-w[j] * sum(s[i] - math.log(total) for i in positives) / len(positives))
    return values


# -- oracles of the method's card -------------------------------------------------------------------------------------
def test_oracle_1_per_anchor() -> None:
    each = conr_loss(FEATURES, LABELS, GUESSES, **SETTINGS, reduction="none")
    assert each.tolist() == pytest.approx([0.413371, 0.499493, 0.819474, 0], abs=1e-6)
    assert conr_loss(FEATURES, LABELS, GUESSES, **SETTINGS).item() == pytest.approx(0.433085, abs=1e-6)
    assert ConRLoss(**SETTINGS)(FEATURES, LABELS, GUESSES).item() == pytest.approx(0.433085, abs=1e-6)


def test_oracle_1_official_denominator() -> None:
    each = conr_loss(FEATURES, LABELS, GUESSES, **SETTINGS, denominator="official", reduction="none")
    assert each.tolist() == pytest.approx([0.657746, 0.725816, 1.003333, 0], abs=1e-6)
    mean = ConRLoss(**SETTINGS, denominator="official")(FEATURES, LABELS, GUESSES)
    assert mean.item() == pytest.approx(0.596724, abs=1e-6)


def test_oracle_1_without_pushing_and_with_weights() -> None:
    without = conr_loss(FEATURES, LABELS, GUESSES, **{**SETTINGS, "pushing": 0.0})
    assert without.item() == pytest.approx(0.351669, abs=1e-6)
    weights = torch.tensor([1.0, 1, 2, 1], dtype=torch.float64)
    each = conr_loss(FEATURES, LABELS, GUESSES, **SETTINGS, weights=weights, reduction="none")
    assert each[2].item() == pytest.approx(2.527469, abs=1e-6)
    mean = ConRLoss(**SETTINGS)(FEATURES, LABELS, GUESSES, weights[:, None])
    assert mean.item() == pytest.approx(0.860083, abs=1e-6)


def zero_with_zero_gradient(features: Tensor, labels: Tensor, guesses: Tensor, **settings: Any) -> None:
    leaf = features.clone().requires_grad_()
    result = conr_loss(leaf, labels, guesses, **{**SETTINGS, **settings})
    (gradient,) = torch.autograd.grad(result, leaf)
    assert result.item() == 0
    assert torch.equal(gradient, torch.zeros_like(leaf))


def test_oracle_2_no_confusion_is_zero() -> None:
    features, labels, _, _ = batch()
    far = torch.arange(12, dtype=torch.float64)[:, None] * 1.5  # all predictions further apart than the window
    zero_with_zero_gradient(features, labels, far)
    groups = torch.tensor([0.0, 5, 10] * 4, dtype=torch.float64)  # right about well-separated labels
    zero_with_zero_gradient(features, groups, groups)


def test_oracle_3_no_negatives_or_no_positives_is_zero() -> None:
    features, labels, guesses, _ = batch()
    zero_with_zero_gradient(features, labels, guesses, window=6.0)
    zero_with_zero_gradient(features, labels, guesses, window=6.0, denominator="official")
    distinct = torch.arange(12, dtype=torch.float64) * 1.5
    zero_with_zero_gradient(features, distinct, guesses)
    zero_with_zero_gradient(features, distinct, guesses, denominator="official")


def test_oracle_4_rows_may_be_rescaled() -> None:
    features, labels, guesses, weights = batch()
    scales = torch.logspace(-6, 6, 12, dtype=torch.float64)[:, None]
    one, two = (conr_loss(f, labels, guesses, **SETTINGS, weights=weights) for f in (features, scales * features))
    torch.testing.assert_close(one, two)
    assert one > 0.1
    leaf = features.requires_grad_()
    (gradient,) = torch.autograd.grad(conr_loss(leaf, labels, guesses, **SETTINGS, weights=weights), leaf)
    torch.testing.assert_close((leaf * gradient).sum(1), torch.zeros(12, dtype=torch.float64), atol=1e-15, rtol=0)
    assert gradient.abs().sum() > 0.1


def test_oracle_5_labels_may_be_shifted_and_rescaled() -> None:
    features, labels, guesses, _ = batch()
    one = conr_loss(features, labels, guesses, **SETTINGS)
    torch.testing.assert_close(conr_loss(features, labels - 8, guesses - 8, **SETTINGS), one)
    scaled = {"window": 4.0, "temperature": 0.5, "pushing": 0.025}
    torch.testing.assert_close(conr_loss(features, 4 * labels, 4 * guesses, **scaled), one)
    assert (conr_loss(features, 4 * labels, 4 * guesses, **SETTINGS) - one).abs() > 0.01


def test_oracle_6_without_pushing_it_is_supervised_contrastive() -> None:
    features, _, _, _ = batch()
    classes = torch.arange(12) % 3
    ours = conr_loss(features, 10.0 * classes, torch.zeros(12), window=1.0, temperature=0.2, pushing=0.0)
    z = F.normalize(features, dim=1)
    log_p = (z @ z.T / 0.2).fill_diagonal_(-torch.inf).log_softmax(1)
    same = (classes[:, None] == classes).fill_diagonal_(False)
    torch.testing.assert_close(ours, -(log_p.masked_fill(~same, 0).sum(1) / same.sum(1)).mean())
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.testing.assert_close(ours, losses.SupConLoss(temperature=0.2)(features, classes))


def test_oracle_7_predictions_get_no_gradient() -> None:
    features, labels, guesses, weights = (t.requires_grad_() for t in batch())
    inputs = (features, labels, guesses, weights)
    result = ConRLoss(**SETTINGS)(*inputs)
    gradients = torch.autograd.grad(result, inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [True, False, False, False]


# -- against the definition -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["exp", "linear"])
@pytest.mark.parametrize("denominator", ["paper", "official"])
@pytest.mark.parametrize("values", [1, 3])
def test_against_a_loop(form: str, denominator: str, values: int) -> None:
    features, labels, guesses, weights = batch(values=values)
    settings: dict[str, Any] = {"window": 1.3 * values**0.5, "temperature": 0.3, "pushing": 0.2}
    settings |= {"form": form, "denominator": denominator}
    expected = reference(features, labels, guesses, weights, **settings)
    assert sum(value > 0 for value in expected) > 2
    for reduction, wanted in (("none", expected), ("sum", sum(expected)), ("mean", sum(expected) / 12)):
        got = conr_loss(features, labels, guesses, **settings, weights=weights, reduction=reduction)
        assert got.tolist() == pytest.approx(wanted, abs=1e-12)


def test_both_comparisons_include_the_window() -> None:
    features = torch.eye(3, dtype=torch.float64)
    settings: dict[str, Any] = {"window": 1.0, "temperature": 1.0, "pushing": 0.0, "reduction": "none"}
    labels, guesses = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 5.0, 1.0])
    # 0 and 1 are positives of each other; 2 is confused with 0 and not with 1.
    assert conr_loss(features, labels, guesses, **settings).tolist() == pytest.approx([math.log(2), 0, 0])
    apart = conr_loss(features, labels, torch.tensor([0.0, 5.0, 1.001]), **settings)
    assert apart.tolist() == [0, 0, 0]


def test_shapes_of_one_value_mean_the_same() -> None:
    features, labels, guesses, weights = batch()
    one = conr_loss(features, labels, guesses, **SETTINGS, weights=weights)
    for y, p, w in ((labels[:, 0], guesses, weights), (labels, guesses[:, 0], weights[:, None])):
        assert torch.equal(conr_loss(features, y, p, **SETTINGS, weights=w), one)
    images = features.reshape(12, 1, 5).expand(12, 2, 5)
    torch.testing.assert_close(conr_loss(images, labels, guesses, **SETTINGS, weights=weights), one)
    whole = (10 * labels).round()
    wide = {"window": 10.0, "temperature": 0.5, "pushing": 0.01}
    assert torch.equal(
        conr_loss(features, whole.long(), 10 * guesses, **wide), conr_loss(features, whole, 10 * guesses, **wide)
    )


def test_two_views_give_every_anchor_a_positive() -> None:
    features, labels, guesses, _ = batch(6)
    labels = torch.arange(6, dtype=torch.float64)[:, None] * 2
    assert conr_loss(features, labels, guesses, **SETTINGS) == 0
    views = torch.cat([features, features + 0.1])
    twice = conr_loss(views, labels.repeat(2, 1), guesses.repeat(2, 1), **SETTINGS, reduction="none")
    assert (twice[:6] > 0).sum() >= 3


def test_gradient() -> None:
    features, labels, guesses, weights = batch(8, values=2)
    settings: dict[str, Any] = {"window": 1.5, "temperature": 0.3, "pushing": 0.2, "weights": weights}
    for denominator in ("paper", "official"):
        function = lambda f, d=denominator: conr_loss(f, labels, guesses, **settings, denominator=d, reduction="none")  # noqa: E731
        assert torch.autograd.gradcheck(function, features.requires_grad_())


def test_regularizer_kit() -> None:
    def arguments(generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = 4 * torch.rand(8, generator=generator)
        return torch.randn(8, 4, generator=generator), labels, 2 + torch.rand(8, generator=generator)

    check_regularizer(ConRLoss(window=1.0, temperature=0.5, pushing=0.1), arguments)
    check_regularizer(ConRLoss(window=1.0, pushing=0.1, denominator="official", form="linear"), arguments)


# -- extremes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, labels, guesses, _ = (t.to(dtype) for t in batch())
    low = conr_loss(features, labels, guesses, **SETTINGS)
    assert low.dtype == torch.float32
    assert torch.equal(low, conr_loss(features.float(), labels.float(), guesses.float(), **SETTINGS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, conr_loss(features, labels, guesses, **SETTINGS))


def test_tiny_temperature_and_huge_pushing_do_not_overflow() -> None:
    features, labels, guesses, weights = (t.float() for t in batch())
    leaf = features.requires_grad_()
    for change in ({"temperature": 1e-3}, {"pushing": 1e3}, {"pushing": 1e3, "denominator": "official"}):
        result = conr_loss(leaf, labels, guesses, **{**SETTINGS, **change}, weights=weights)
        (gradient,) = torch.autograd.grad(result, leaf)
        assert torch.isfinite(result) and torch.isfinite(gradient).all() and result > 0


def test_zero_rows_and_zero_weights_stay_finite() -> None:
    features, labels, guesses, weights = batch()
    features[3], weights[5] = 0, 0
    each = conr_loss(features.requires_grad_(), labels, guesses, **SETTINGS, weights=weights, reduction="none")
    assert each.tolist() == pytest.approx(reference(features.detach(), labels, guesses, weights + 1e-300, **SETTINGS))
    assert each[5] == 0
    (gradient,) = torch.autograd.grad(each.sum(), features)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e3
    assert conr_loss(features, labels, guesses, **SETTINGS, weights=torch.zeros(12)) == 0


def test_linear_form_without_pushing_leaves_positives_only() -> None:
    settings = {**SETTINGS, "pushing": 0.0, "form": "linear"}
    each = conr_loss(FEATURES.requires_grad_(), LABELS, GUESSES, **settings, reduction="none")
    assert each.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-12)  # one positive each: its own share is 1
    (gradient,) = torch.autograd.grad(each.sum(), FEATURES)
    assert torch.isfinite(gradient).all()
    FEATURES.requires_grad_(False)


def test_compiles_without_a_break() -> None:
    features, labels, guesses, weights = batch()
    for denominator in ("paper", "official"):
        part = ConRLoss(**SETTINGS, denominator=denominator)
        compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(features, labels, guesses, weights), part(features, labels, guesses, weights)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature = 0.0: must be a number in \(0, inf\)"),
        ({"window": -1.0}, r"window = -1.0: must be a number in \[0, inf\)"),
        ({"pushing": -0.1}, r"pushing = -0.1: must be a number in \[0, inf\)"),
        ({"window": math.nan}, r"window = nan"),
        ({"form": "log"}, r"form = 'log': must be one of 'exp', 'linear'"),
        ({"denominator": "offical"}, r"denominator = 'offical'.*Did you mean 'official'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConRLoss(**change)
    with pytest.raises(ValueError, match=message):
        conr_loss(FEATURES, LABELS, GUESSES, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": FEATURES[:1], "targets": LABELS[:1], "predictions": GUESSES[:1]}, r"\(1, 2\): must be .* M >= 2"),
        ({"features": FEATURES[:, 0]}, r"features = torch.float64 \(4,\): must be floating point \(M, ...\)"),
        ({"targets": LABELS[:3]}, r"targets has shape \(3,\): must be \(4,\) or \(4, L\)"),
        ({"predictions": GUESSES[:3]}, r"predictions has shape \(3,\)"),
        ({"predictions": torch.zeros(4, 3)}, r"predictions has shape \(4, 3\): must hold as many values .* as targets"),
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\): must be \(4,\)"),
        ({"weights": torch.tensor([1.0, -0.5, 1, 1])}, r"weights = values down to -0.5: must be >= 0"),
        ({"weights": torch.tensor([1.0, math.nan, 1, 1])}, r"weights = values"),
        ({"targets": torch.tensor([1.0, math.nan, 2, 3])}, r"targets holds NaN or infinite values"),
        ({"reduction": "avg"}, r"reduction = 'avg'"),
    ],
)
def test_batches_are_checked(change: dict[str, Any], message: str) -> None:
    given = {"features": FEATURES, "targets": LABELS, "predictions": GUESSES, **change}
    with pytest.raises(ValueError, match=message):
        conr_loss(**given)


# -- the method in a run ----------------------------------------------------------------------------------------------
PROBLEM = replace(regression(), loss=F.l1_loss)
SMALL: dict[str, Any] = {"beta": 0.5, "window": 0.5, "temperature": 0.3, "pushing": 0.3}
SKIP = {"accumulation": "pairs are formed within each micro-batch"}


def test_method_kit() -> None:
    check_method(ConR, problem=PROBLEM, settings=SMALL, skip=SKIP)
    check_method(ConR, problem=PROBLEM, settings={**SMALL, "weights": "inverse"}, skip=SKIP)


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    def work() -> Any:
        from accelerate import PartialState

        rank = PartialState(cpu=True).process_index
        features, labels, guesses, weights = batch()
        rows = slice(0, 5) if rank == 0 else slice(5, 12)  # uneven shares
        layer = nn.Linear(5, 4).double()
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
        network = nn.parallel.DistributedDataParallel(layer)
        loss = ConRLoss(**SETTINGS)(network(features[rows]), labels[rows], guesses[rows], weights[rows])
        loss.backward()
        yield loss.detach(), layer.weight.grad

    results = spawn(work)
    features, labels, guesses, weights = batch()
    weight = torch.eye(4, 5, dtype=torch.float64).requires_grad_()
    loss = ConRLoss(**SETTINGS)(features @ weight.T, labels, guesses, weights)
    loss.backward()
    assert loss > 0.1
    for (other, gradient), *_ in results:
        torch.testing.assert_close(other, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)


def examples(n: int = 41) -> equipoise.Examples:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(n, 5, generator=generator)
    return equipoise.Examples(inputs, (inputs[:, 0].exp() * 2)[:, None])


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def train(*methods: Any, **options: Any) -> equipoise.Run:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 20, "loss": F.l1_loss, **options}
    return equipoise.fit(settings.pop("model", network()), examples(), methods=methods, **settings)


def parameters(run: equipoise.Run) -> list[Tensor]:
    return [p.detach() for p in run.model.parameters()]


@pytest.mark.parametrize("weights", [None, "inverse"])
def test_in_a_run_it_is_the_penalty_in_a_loop(weights: str | None) -> None:
    model, data = copy.deepcopy(network()), examples()
    run = train(ConR(**SMALL, weights=weights), model=copy.deepcopy(model))
    density = LabelDensity(data.targets, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    seen = 0.0
    for _ in range(2):
        for rows in torch.tensor(list(torch.utils.data.RandomSampler(data, generator=order))).split(20):
            x, y = data.inputs[rows], data.targets[rows]
            features = model[:2](x)
            prediction = model[2](features)
            loss = F.l1_loss(prediction, y)
            if len(rows) > 1:  # the last batch has one example and no pairs
                w = density(y) if weights else None
                penalty = conr_loss(features, y, prediction, window=0.5, temperature=0.3, pushing=0.3, weights=w)
                seen += penalty.item()
                loss = loss + 0.5 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert seen > 0.5
    torch.testing.assert_close(parameters(run), list(model.parameters()))


def test_with_augment_it_compares_two_views() -> None:
    seen = []

    class Look(equipoise.Method):
        name = "look"

        def penalty(self, run: Any, batch: Any, output: Any) -> Tensor:
            seen.append((batch.views, len(batch), torch.equal(*batch.targets.chunk(batch.views))))
            return output.prediction.new_zeros(())

    run = train(ConR(**SMALL), Look(), augment=Jitter(noise=0.1), batch_size=21)
    assert run.views == 2 and seen == [(2, 42, True), (2, 40, True)] * 2
    assert ConR(beta=0.0).views == 1
    plain, neutral = train(augment=Jitter(noise=0.1)), train(ConR(beta=0.0), augment=Jitter(noise=0.1))
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(neutral), strict=True))


def test_works_on_vectors_and_in_bfloat16() -> None:
    data = equipoise.Examples(examples().inputs, examples().inputs[:, :2] * 2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    run = equipoise.fit(
        model, data, epochs=2, batch_size=20, loss=F.l1_loss, methods=[ConR(**SMALL)], mixed_precision="bf16"
    )
    assert all(math.isfinite(record["train_loss"]) for record in run.history)


def test_a_run_must_fit() -> None:
    vectors = equipoise.Examples(examples().inputs, examples().inputs[:, :2])
    classes = equipoise.Examples(examples().inputs, torch.arange(41) % 3)
    weighted = ConR(weights="inverse")
    with pytest.raises(
        ArgumentError, match=r"targets = .*\(41, 2\): must be .* one value per example. ConR with weights"
    ):
        equipoise.fit(network(), vectors, epochs=1, loss=F.l1_loss, methods=[weighted])
    with pytest.raises(ArgumentError, match=r"data = without targets: ConR with weights needs the labels"):
        equipoise.start(network(), lambda p: torch.optim.SGD(p, lr=0.1), methods=[ConR(weights="inverse")])
    with pytest.raises(ArgumentError, match=r"predictions has shape .* ConR is for regression"):
        equipoise.fit(nn.Linear(5, 3), classes, epochs=1, methods=[ConR()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta = -1.0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"weights": "inverted"}, r"weights = 'inverted'.*Did you mean 'inverse'"),
        ({"weights": "inverse", "window": 0.0}, "window = 0.0: must be > 0 where weights are given"),
    ],
)
def test_method_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ConR(**change)
