"""TCM and OPIS against numbers computed by hand, loops in plain Python, and pytorch-metric-learning where it is installed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError
from equipoise.retrieval import pairs as pairs_module
from equipoise.retrieval.pairs import PairDistances, unit_rows
from equipoise.retrieval.tcm import TCM, TCMLoss, opis, tcm_loss
from equipoise.testing import check_method, check_regularizer, spawn
from equipoise.training.gather import world_size
from equipoise.training.sampler import ClassBatches

torch.set_num_threads(1)
FOUR = torch.tensor([[0.0, 1.0], [0.43, 0.9], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


def drawn(n: int = 12, d: int = 5, classes: int = 3, seed: int = 0, spread: float = 0.6) -> tuple[Tensor, Tensor]:
    """Embeddings of loose classes, some of whose pairs are hard and some not, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def gradient(loss: Any, embeddings: Tensor) -> Tensor:
    leaf = embeddings.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def at_degrees(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


# -- the loss: known values -------------------------------------------------------------------------------------------
def test_four_embeddings_by_hand() -> None:
    assert tcm_loss(FOUR, LABELS).item() == pytest.approx(0.517876, abs=1e-6)
    assert tcm_loss(FOUR, LABELS, neg_weight=0.0).item() == pytest.approx(0.192893, abs=1e-6)
    assert tcm_loss(FOUR, LABELS, pos_weight=0.0).item() == pytest.approx(0.324983, abs=1e-6)
    assert TCMLoss()(FOUR, LABELS).item() == pytest.approx(0.517876, abs=1e-6)


def test_orthonormal_classes_have_no_loss_and_no_gradient() -> None:
    embeddings = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2]]
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert tcm_loss(embeddings, labels).item() == 0
    assert torch.equal(gradient(lambda e: tcm_loss(e, labels), embeddings), torch.zeros_like(embeddings))


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_equal_embeddings_cost_half_the_negative_weight(weight: float) -> None:
    assert tcm_loss(torch.ones(4, 3), LABELS, neg_weight=weight).item() == pytest.approx(0.5 * weight)


def test_weights_scale_the_two_parts() -> None:
    embeddings, labels = drawn()
    positive, negative = (tcm_loss(embeddings, labels, pos_weight=p, neg_weight=1 - p) for p in (1.0, 0.0))
    assert positive > 0 and negative > 0
    torch.testing.assert_close(
        tcm_loss(embeddings, labels, pos_weight=0.3, neg_weight=7.0), 0.3 * positive + 7 * negative
    )
    assert tcm_loss(embeddings, labels, pos_weight=0.0, neg_weight=0.0).item() == 0


def test_norms_and_order_of_the_embeddings_do_not_matter() -> None:
    embeddings, labels = drawn()
    loss = tcm_loss(embeddings, labels)
    torch.testing.assert_close(tcm_loss(2 * embeddings, labels), loss)
    torch.testing.assert_close(tcm_loss(embeddings * torch.arange(1.0, 13.0)[:, None], labels), loss)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tcm_loss(embeddings[order], labels[order]), loss)
    torch.testing.assert_close(tcm_loss(embeddings, 7 - 3 * labels), loss)  # any integers name classes
    along = (gradient(lambda e: tcm_loss(e, labels), embeddings) * embeddings).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)


def test_with_the_widest_margins_all_pairs_are_hard() -> None:
    embeddings, labels = drawn()
    cosines = unit_rows(embeddings) @ unit_rows(embeddings).T
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(12, dtype=torch.bool), ~same
    expected = (1 - cosines[positive].mean()) + (1 + cosines[negative].mean())
    torch.testing.assert_close(tcm_loss(embeddings, labels, pos_margin=1.0, neg_margin=-1.0), expected)


# -- the loss: more ---------------------------------------------------------------------------------------------------
def loop(
    embeddings: Tensor, labels: Tensor, references: Tensor, ref_labels: Tensor, margins: tuple[float, float], own: bool
) -> float:
    """The definition, one pair at a time."""
    positive: list[float] = []
    negative: list[float] = []
    for i, a in enumerate(embeddings.tolist()):
        for j, b in enumerate(references.tolist()):
            if own and i == j:
                continue
            s = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            if labels[i] == ref_labels[j]:
                if s <= margins[0]:
                    positive.append(margins[0] - s)
            elif s >= margins[1]:
                negative.append(s - margins[1])
    return sum(sum(part) / max(len(part), 1) for part in (positive, negative))


@pytest.mark.parametrize("margins", [(0.9, 0.5), (0.8, 0.3), (0.95, 0.94), (0.2, -0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_plain_loop(margins: tuple[float, float], seed: int) -> None:
    embeddings, labels = drawn(seed=seed)
    options = {"pos_margin": margins[0], "neg_margin": margins[1]}
    expected = loop(embeddings, labels, embeddings, labels, margins, own=True)
    assert tcm_loss(embeddings, labels, **options).item() == pytest.approx(expected, abs=1e-12)
    references, ref_labels = drawn(7, seed=seed + 10)
    expected = loop(embeddings, labels, references, ref_labels, margins, own=False)
    got = TCMLoss(**options)(embeddings, labels, references, ref_labels)
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_every_hard_pair_pulls_alike() -> None:
    """The gradient by a hard positive cosine is -1 / their number, by a hard negative one +1 / theirs; all others get 0."""
    left, right = torch.eye(2, dtype=torch.float64)[[0, 0, 1]], torch.tensor([0, 0, 1])
    # Against references a cosine is a coordinate of the reference's unit vector.
    references = at_degrees(10, 40, 80)
    ref_labels = torch.tensor([0, 0, 1])
    leaf = references.clone().requires_grad_()
    loss = tcm_loss(left, right, ref_embeddings=leaf, ref_labels=ref_labels)
    # Hard positives: the two of class 0 with 40 degrees. Hard negatives: class 1's direction with 40 degrees (s = 0.643).
    expected = (0.9 - math.cos(math.radians(40))) + (math.sin(math.radians(40)) - 0.5)
    assert loss.item() == pytest.approx(expected)
    (grad,) = torch.autograd.grad(loss, leaf)
    tangent = torch.tensor([-math.sin(math.radians(40)), math.cos(math.radians(40))], dtype=torch.float64)
    torch.testing.assert_close(grad[1], (-tangent[0] + tangent[1]) * tangent)
    assert torch.equal(grad[[0, 2]], torch.zeros(2, 2, dtype=torch.float64))


def test_references_get_gradient_unless_detached() -> None:
    embeddings, labels = drawn()
    references, ref_labels = drawn(6, seed=3)
    references.requires_grad_()
    tcm_loss(embeddings.requires_grad_(), labels, ref_embeddings=references, ref_labels=ref_labels).backward()
    assert references.grad is not None and references.grad.abs().sum() > 0
    embeddings.grad = None
    tcm_loss(embeddings, labels, ref_embeddings=references.detach(), ref_labels=ref_labels).backward()
    assert embeddings.grad is not None


@pytest.mark.parametrize(
    ("embeddings", "labels"),
    [
        (torch.randn(1, 3), torch.tensor([4])),  # a batch of one
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.eye(3), torch.arange(3)),  # no class twice, and no hard negative pair
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)),  # one class, no negative pair, no hard positive one
    ],
)
def test_no_hard_pair_is_exactly_zero(embeddings: Tensor, labels: Tensor) -> None:
    leaf = embeddings.clone().requires_grad_()
    loss = tcm_loss(leaf, labels)
    loss.backward()
    assert loss.item() == 0 and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_zero_embedding_has_cosine_0_and_no_gradient() -> None:
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    loss = tcm_loss(embeddings, labels)
    # Positive (0, 1) has s = 0; negatives (0, 2) with s = 0 and (1, 2) with s = 0.7071.
    assert loss.item() == pytest.approx(0.9 + math.sqrt(0.5) - 0.5)
    grad = gradient(lambda e: tcm_loss(e, labels), embeddings)
    assert torch.equal(grad[0], torch.zeros(2)) and torch.isfinite(grad).all() and grad[2].abs().sum() > 0


def test_nan_shows() -> None:
    embeddings = FOUR.clone()
    embeddings[1, 0] = math.nan
    assert tcm_loss(embeddings, LABELS).isnan()


def test_gradcheck() -> None:
    embeddings, labels = drawn()
    references, ref_labels = drawn(5, seed=4)
    leaves = (embeddings.requires_grad_(), references.requires_grad_())
    assert torch.autograd.gradcheck(lambda e: tcm_loss(e, labels, pos_weight=0.7, neg_weight=2.0), leaves[0])
    assert torch.autograd.gradcheck(lambda e, r: tcm_loss(e, labels, ref_embeddings=r, ref_labels=ref_labels), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    embeddings, labels = drawn(40, 16)
    low = embeddings.to(dtype)
    loss = tcm_loss(low, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(tcm_loss(low.double(), labels).item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert tcm_loss(low.float(), labels).item() == loss.item()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_norms(scale: float) -> None:
    embeddings, labels = drawn()
    loss = tcm_loss((scale * embeddings).float(), labels)
    assert loss.item() == pytest.approx(tcm_loss(embeddings, labels).item(), rel=1e-4)


def test_compiles() -> None:
    embeddings, labels = drawn()
    compiled = torch.compile(tcm_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeddings, labels), tcm_loss(embeddings, labels))
    module = TCMLoss(pos_margin=0.8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradient(lambda e: compiled(e, labels), embeddings), gradient(lambda e: module(e, labels), embeddings)
    )


def test_the_kit_for_parts() -> None:
    part = TCMLoss(pos_margin=0.85, neg_margin=0.2)
    check_regularizer(part, lambda g: (torch.randn(6, 4, generator=g), torch.arange(6) % 2))


def test_the_values_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    for seed in range(4):
        embeddings, labels = drawn(20, seed=seed)
        peer = losses.ThresholdConsistentMarginLoss(2.0, 0.5, 0.85, 0.4)
        ours = TCMLoss(pos_weight=2.0, neg_weight=0.5, pos_margin=0.85, neg_margin=0.4)
        torch.testing.assert_close(ours(embeddings, labels), peer(embeddings, labels))
        slopes = [gradient(lambda e, f=f, y=labels: f(e, y), embeddings) for f in (ours, peer)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_margin": 1.1}, r"pos_margin = 1.1: must be a number in \[-1, 1\]"),
        ({"neg_margin": -1.5}, r"neg_margin = -1.5: must be a number in \[-1, 1\]"),
        ({"pos_margin": 0.5}, r"pos_margin = 0.5: must be greater than neg_margin = 0.5"),
        ({"pos_weight": -0.1}, r"pos_weight = -0.1: must be a number in \[0, inf\)"),
        ({"neg_weight": math.nan}, r"neg_weight = nan"),
    ],
)
def test_settings_are_checked(change: dict[str, float], message: str) -> None:
    for make in (lambda: tcm_loss(FOUR, LABELS, **change), lambda: TCMLoss(**change), lambda: TCM(**change)):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FOUR[0], LABELS[:2]), r"embeddings = torch.float64 \(2,\): must be floating point of shape \(N, D\)"),
        ((FOUR.long(), LABELS), r"embeddings = torch.int64 \(4, 2\)"),
        ((FOUR, LABELS[:3]), r"labels = torch.int64 \(3,\): must be integer classes of shape \(4,\)"),
        ((FOUR, LABELS.double()), r"labels = torch.float64 \(4,\)"),
        ((FOUR, LABELS == 0), r"labels = torch.bool \(4,\)"),
        ((FOUR, LABELS, FOUR), r"ref_labels = None: must be given with the other"),
        ((FOUR, LABELS, None, LABELS), r"ref_embeddings = None: must be given with the other"),
        ((FOUR, LABELS, FOUR, LABELS[:2]), r"ref_labels = torch.int64 \(2,\)"),
        ((FOUR, LABELS, torch.ones(2, 3), LABELS[:2]), r"ref_embeddings = \(2, 3\): must have 2 columns"),
    ],
)
def test_tensors_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TCMLoss()(*arguments)


# -- OPIS: known values -----------------------------------------------------------------------------------------------
SIX = at_degrees(0, 10, 30, 90, 130, 150)
THREES = torch.tensor([0, 0, 0, 1, 1, 1])


def test_opis_of_six_directions_by_hand() -> None:
    result = opis(SIX, THREES, calibration_range=(0.25, 0.85), num_thresholds=4)
    torch.testing.assert_close(result.thresholds, torch.tensor([0.25, 0.45, 0.65, 0.85], dtype=torch.float64))
    expected = torch.tensor([[0.5, 0.8, 1, 1], [0, 0.5, 0.5, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(result.utility, expected)
    assert result.per_class.tolist() == pytest.approx([0.040417, 0.040417], abs=1e-6)
    assert result.opis == pytest.approx(0.040417, abs=1e-6)
    assert result.classes.tolist() == [0, 1] and result.calibration_range == (0.25, 0.85)


def test_opis_of_mirror_images_is_0() -> None:
    embeddings = torch.cat([at_degrees(0, 7, 20, 45), at_degrees(0, -7, -20, -45) * torch.tensor([-1.0, 1.0])])
    # The second class is the first, mirrored on the axis between them.
    assert opis(embeddings, torch.arange(8) // 4).opis == pytest.approx(0, abs=1e-12)


def test_opis_does_not_depend_on_rotation_norms_names_or_order() -> None:
    embeddings, labels = drawn(24, classes=4)
    before = opis(embeddings, labels)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    norms = torch.rand(24, 1, generator=torch.Generator().manual_seed(3)).double() + 0.1
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    for changed in (
        opis(embeddings @ rotation, labels),
        opis(norms * embeddings, labels),
        opis(embeddings[order], labels[order]),
        opis(embeddings, 10 - 2 * labels),
    ):
        assert changed.opis == pytest.approx(before.opis, abs=1e-12)
    assert opis(embeddings, 10 - 2 * labels).classes.tolist() == [4, 6, 8, 10]
    torch.testing.assert_close(opis(embeddings, 10 - 2 * labels).per_class, before.per_class.flip(0))


def test_two_classes_deviate_alike_and_opis_is_at_most_a_quarter() -> None:
    for seed in range(5):
        result = opis(*drawn(20, classes=2, seed=seed, spread=1.0))
        assert result.per_class[0].item() == pytest.approx(result.per_class[1].item())
        assert 0 <= result.opis <= 0.25
    # One class in a point, the other far apart: utilities 1 and 0 between.
    extreme = opis(
        torch.cat([torch.ones(3, 3), torch.eye(3)]) * torch.tensor([1.0, 1, -1]), THREES, calibration_range=(0.1, 0.2)
    )
    assert extreme.opis == pytest.approx(0.25)


def test_separated_classes_have_opis_0_between_them() -> None:
    embeddings = at_degrees(0, 1, 5, 90, 91, 98)
    result = opis(embeddings, THREES, calibration_range=(0.2, 1.0))
    assert torch.equal(result.utility, torch.ones(2, 101, dtype=torch.float64)) and result.opis == 0


# -- OPIS: more -------------------------------------------------------------------------------------------------------
def naive_opis(
    embeddings: Tensor, labels: Tensor, calibration_range: tuple[float, float] | None, count: int, c: float, kind: str
) -> tuple[list[float], tuple[float, float]]:
    """The definition: thresholds x classes x pairs, one number at a time. Returns the terms of the classes, and the range."""
    unit = [[x / (math.hypot(*row) or 1) for x in row] for row in embeddings.tolist()]
    names, n = labels.tolist(), len(labels)

    def distance(i: int, j: int) -> float:
        s = sum(a * b for a, b in zip(unit[i], unit[j], strict=True))
        return 1 - s if kind == "cosine" else math.sqrt(max(2 - 2 * s, 0))

    unordered = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if calibration_range is None:
        far = sorted(distance(i, j) for i, j in unordered if names[i] != names[j])

        def quantile(share: float) -> float:
            place = share * (len(far) - 1)
            low = math.floor(place)
            return far[low] + (place - low) * (far[math.ceil(place)] - far[low])

        calibration_range = (quantile(0.01), quantile(0.1))
    low, high = calibration_range
    grid = [low + (high - low) * g / (count - 1) for g in range(count)]
    utilities = []
    for name in sorted({x for x in names if names.count(x) > 1}):
        inner = [distance(i, j) for i, j in unordered if names[i] == names[j] == name]
        outer = [distance(i, j) for i in range(n) for j in range(n) if names[i] == name != names[j]]
        row = []
        for d in grid:
            psi = sum(x <= d for x in inner) / len(inner)
            phi = sum(x > d for x in outer) / len(outer)
            row.append((1 + c * c) * phi * psi / (c * c * phi + psi) if phi or psi else 0.0)
        utilities.append(row)
    means = [sum(column) / len(utilities) for column in zip(*utilities, strict=True)]
    terms = []
    for row in utilities:
        squares = [(u - m) ** 2 for u, m in zip(row, means, strict=True)]
        step = (high - low) / (count - 1)
        terms.append(step * (sum(squares) - (squares[0] + squares[-1]) / 2) / (high - low))
    return terms, calibration_range


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
@pytest.mark.parametrize("given", [None, (0.31, 0.77)])
@pytest.mark.parametrize("c", [1.0, 2.0])
def test_opis_against_a_plain_loop(
    kind: str, given: tuple[float, float] | None, c: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, labels = drawn(26, classes=4, seed=5)
    labels[:2] = torch.tensor([9, 8])  # two classes of one example
    expected, span = naive_opis(embeddings, labels, given, 23, c, kind)
    for block in (pairs_module.BLOCK, 26 * 5):  # one block, and blocks of five rows with a rest
        monkeypatch.setattr(pairs_module, "BLOCK", block)
        result = opis(embeddings, labels, calibration_range=given, num_thresholds=23, c=c, distance=kind)
        assert result.per_class.tolist() == pytest.approx(expected, abs=1e-12)
        assert result.opis == pytest.approx(sum(expected) / 4, abs=1e-12)
        assert result.calibration_range == pytest.approx(span, abs=1e-12)
        assert result.classes.tolist() == [0, 1, 2, 3] and result.utility.shape == (4, 23)


@pytest.mark.parametrize("n", [7, 60, 300])
def test_the_quantiles_are_exact(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "BLOCK", 64 * n)
    embeddings, labels = drawn(n, 3)
    found = PairDistances(embeddings, labels)
    distances = (2 - 2 * found.unit @ found.unit.T).clamp(min=0).sqrt()
    later = torch.ones(n, n, dtype=torch.bool).triu(1) & (labels[:, None] != labels)
    shares = (0.001, 0.01, 0.1, 0.5, 0.999)
    expected = torch.quantile(distances[later], torch.tensor(shares, dtype=torch.float64))
    assert found.negative_quantiles(shares) == pytest.approx(expected.tolist(), abs=1e-12)


def test_thresholds_need_not_be_sorted() -> None:
    found = PairDistances(*drawn(30))
    thresholds = torch.tensor([1.2, 0.1, 0.7, 0.7], dtype=torch.float64)
    one, two = found.curves(thresholds), found.curves(thresholds.sort().values)
    for mixed, ordered in zip(one, two, strict=True):
        torch.testing.assert_close(mixed, ordered[:, [3, 0, 1, 1]])


def test_thresholds_beyond_all_distances_accept_all() -> None:
    sensitivity, specificity = PairDistances(*drawn(30)).curves(torch.tensor([2.0, 1e12]))
    assert bool((sensitivity == 1).all()) and bool((specificity == 0).all())


def test_epsilon_opis_is_the_mean_over_the_worst_classes() -> None:
    result = opis(*drawn(80, classes=20, seed=1))
    worst = sorted(result.per_class.tolist(), reverse=True)
    assert result.epsilon() == pytest.approx(sum(worst[:2]) / 2)
    assert result.epsilon(0.11) == pytest.approx(sum(worst[:3]) / 3)
    assert result.epsilon(1e-6) == pytest.approx(worst[0])
    assert result.epsilon(1.0) == pytest.approx(result.opis)
    seventy = opis(*drawn(140, classes=70))
    assert seventy.epsilon(0.1) == pytest.approx(sum(sorted(seventy.per_class.tolist())[-7:]) / 7)
    with pytest.raises(ValueError, match=r"eps = 0: must be a number in \(0, 1\]"):
        result.epsilon(0)


def test_collapsed_embeddings_have_a_range_without_width_and_opis_0() -> None:
    result = opis(torch.ones(6, 3), THREES)
    assert result.opis == 0 and torch.equal(result.utility, torch.zeros(2, 101, dtype=torch.float64))
    assert result.calibration_range[0] == result.calibration_range[1]


def test_zero_embeddings_are_orthogonal_to_all() -> None:
    embeddings = torch.cat([torch.zeros(2, 2, dtype=torch.float64), at_degrees(0, 10)])
    found = PairDistances(embeddings, LABELS)
    sensitivity, specificity = found.curves(torch.tensor([1.4, 1.42], dtype=torch.float64))
    assert sensitivity.tolist() == [[0, 1], [1, 1]]  # the zeros are sqrt(2) from each other
    assert specificity.tolist() == [[1, 0], [1, 0]]


def test_opis_has_no_gradient_and_is_float64() -> None:
    embeddings, labels = drawn()
    result = opis(embeddings.float().requires_grad_(), labels)
    assert not result.utility.requires_grad
    assert {result.per_class.dtype, result.thresholds.dtype, result.utility.dtype} == {torch.float64}
    assert result.opis == pytest.approx(opis(embeddings.float().double(), labels).opis)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_thresholds": 1}, "num_thresholds = 1: must be an integer >= 2"),
        ({"far_range": (0.1, 0.1)}, r"far_range = \(0.1, 0.1\): must be a pair with 0 < low < high < 1"),
        ({"far_range": (0.0, 0.1)}, r"far_range = \(0.0, 0.1\)"),
        ({"far_range": (0.5, 1.0)}, r"far_range = \(0.5, 1.0\)"),
        ({"calibration_range": (0.8, 0.2)}, r"calibration_range = \(0.8, 0.2\): must be a pair of distances"),
        ({"calibration_range": (-0.1, 0.2)}, r"calibration_range = \(-0.1, 0.2\): .* with 0 <= low < high"),
        ({"calibration_range": (0.2, 0.5, 0.8)}, r"calibration_range = \(0.2, 0.5, 0.8\): must be a pair"),
        ({"c": 0.0}, r"c = 0.0: must be a number in \(0, inf\)"),
        ({"distance": "manhattan"}, "distance = 'manhattan': must be one of 'euclidean', 'cosine'"),
        ({"distance": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_opis_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opis(SIX, THREES, **options)


def test_opis_data_are_checked() -> None:
    with pytest.raises(ValueError, match="labels = 1 of 4 classes with at least 2 examples: must be at least 2"):
        opis(SIX, torch.tensor([0, 0, 0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"labels = torch.int64 \(5,\)"):
        opis(SIX, THREES[:5])
    with pytest.raises(ValueError, match="embeddings hold NaN or infinite values"):
        opis(SIX.masked_fill(SIX > 0.9, math.nan), THREES)


# -- two processes ----------------------------------------------------------------------------------------------------
def test_two_processes_equal_one() -> None:
    embeddings, labels = drawn(9, classes=3)
    weight = torch.eye(5, dtype=torch.float64) + 0.1
    references, ref_labels = drawn(4, seed=6)

    def work() -> Iterator[list[Any]]:
        torch.set_num_threads(1)
        accelerator = equipoise.training.assemble.accelerator_of(None)
        rank = accelerator.process_index
        rows = torch.arange(9).tensor_split(world_size())[rank]  # uneven shards
        for extra in ((), (references, ref_labels)):
            layer = weight.clone().requires_grad_()
            loss = TCMLoss(pos_margin=0.95, neg_margin=0.1)(embeddings[rows] @ layer, labels[rows], *extra)
            loss.backward()
            yield [loss.item(), accelerator.reduce(layer.grad, "mean")]

    whole = list(work())
    for rank in spawn(work):
        assert len(rank) == 2, rank
        for mine, expected in zip(rank, whole, strict=True):
            assert mine[0] == pytest.approx(expected[0], abs=1e-12)
            torch.testing.assert_close(mine[1], expected[1], rtol=1e-10, atol=1e-12)


# -- the method in a run ----------------------------------------------------------------------------------------------
def test_the_method_kit() -> None:
    report = check_method(TCM, skip={"accumulation": "the loss is over the pairs of a batch"})
    assert {"neutral", "permuted-rows", "resume", "last-batch"} <= set(report.passed)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def test_in_a_run_it_is_the_loss_in_a_loop() -> None:
    embeddings, labels = drawn(30)
    examples = equipoise.Examples(embeddings.float(), labels)
    model, sampler = network(), ClassBatches(per_class=2)
    method = TCM(pos_margin=0.95, neg_margin=0.2, pos_weight=0.5, neg_weight=2.0)
    run = equipoise.fit(copy.deepcopy(model), examples, epochs=2, batch_size=6, methods=[method], sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = sampler(examples, 6, torch.Generator().manual_seed(0))
    for _ in range(2):
        for rows in torch.tensor(list(order)).split(6):
            features = model[:2](examples.inputs[rows])
            penalty = tcm_loss(features, labels[rows], pos_margin=0.95, neg_margin=0.2, pos_weight=0.5, neg_weight=2.0)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model[2](features), labels[rows]) + penalty).backward()
            optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), list(model.parameters()))


def test_soft_labels_are_refused() -> None:
    examples = equipoise.Examples(torch.randn(8, 5), torch.eye(3)[torch.arange(8) % 3])
    with pytest.raises(ArgumentError, match=r"labels = torch.float32 \(8, 3\): must be integer classes"):
        equipoise.fit(network(), examples, epochs=1, batch_size=8, methods=[TCM()])
