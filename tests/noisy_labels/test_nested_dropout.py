"""Nested dropout and Co-teaching against the paper's formulas, hand-computed numbers and loops in plain Python."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler

import equipoise
from equipoise.errors import ArgumentError
from equipoise.noisy_labels.elr import ELR
from equipoise.noisy_labels.nested_dropout import (
    CoTeaching,
    NestedDropout,
    NestedDropoutMethod,
    PrefixSelection,
    attach,
    correct_by_prefix,
    fold,
    forget_rate_schedule,
    nested_dropout_probs,
    prefix_logits,
    select_keep,
    small_loss_indices,
)
from equipoise.noisy_labels.two_networks import LogitAverage
from equipoise.testing import check_method, check_methods_ddp


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the law of k -----------------------------------------------------------------------------------------------------
def test_probabilities_by_hand() -> None:
    probs = nested_dropout_probs(4, sigma=2)
    assert probs.dtype == torch.float64 and probs.shape == (4,)
    assert probs.tolist() == pytest.approx([0.613038, 0.289579, 0.082966, 0.014417], abs=1e-6)
    shifted = nested_dropout_probs(4, sigma=2, mu=3)
    assert shifted.tolist() == pytest.approx([0.125750, 0.266213, 0.341824, 0.266213], abs=1e-6)


@pytest.mark.parametrize(("sigma", "mu"), [(0.1, 0.0), (2.0, 3.0), (40.0, -7.5), (1e6, 0.0)])
def test_probabilities_are_the_formula(sigma: float, mu: float) -> None:
    weights = [math.exp(-(((k - mu) / sigma) ** 2)) for k in range(1, 21)]
    expected = [w / sum(weights) for w in weights] if sum(weights) else [1.0] + 19 * [0.0]
    probs = nested_dropout_probs(20, sigma, mu)
    assert probs.tolist() == pytest.approx(expected, abs=1e-14)
    assert probs.sum().item() == pytest.approx(1, abs=1e-14)


def test_wide_law_is_uniform_and_one_channel_certain() -> None:
    for sigma in (1e9, math.inf):
        torch.testing.assert_close(nested_dropout_probs(7, sigma), torch.full((7,), 1 / 7, dtype=torch.float64))
    assert nested_dropout_probs(1, 5.0).tolist() == [1.0]
    assert nested_dropout_probs(3, 0.1).tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-100)


@pytest.mark.parametrize(
    ("width", "sigma", "mean", "first"),
    [(512, 10, 5.969263, 0.118395), (512, 100, 56.738129, 0.011347), (2048, 100, 56.738129, 0.011347)],
)
def test_mean_kept_width(width: int, sigma: float, mean: float, first: float) -> None:
    probs = nested_dropout_probs(width, sigma)
    assert (probs * torch.arange(1, width + 1)).sum().item() == pytest.approx(mean, abs=1e-6)
    assert probs[0].item() == pytest.approx(first, abs=1e-6)


# -- prefixes ---------------------------------------------------------------------------------------------------------
def test_prefix_logits_by_hand() -> None:
    h, w = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    assert prefix_logits(h, w).tolist() == [[[1, 0]], [[1, 2]], [[0, 0]]]
    assert prefix_logits(h, w, torch.tensor([10.0, -1.0])).tolist() == [[[11, -1]], [[11, 1]], [[10, -1]]]


@pytest.mark.parametrize("chunk", [None, 1, 4, 99])
@pytest.mark.parametrize("bias", [True, False])
def test_prefix_logits_are_separate_forward_passes(chunk: int | None, bias: bool) -> None:
    h, head = values(11, 6), nn.Linear(6, 3, bias=bias, dtype=torch.float64)
    got = prefix_logits(h, head.weight, head.bias, chunk=chunk)
    assert got.shape == (6, 11, 3)
    for k in range(1, 7):
        masked = h.clone()
        masked[:, k:] = 0
        torch.testing.assert_close(got[k - 1], head(masked))
    torch.testing.assert_close(got[-1], head(h))


@pytest.mark.parametrize("chunk", [None, 2])
def test_prefix_logits_gradcheck(chunk: int | None) -> None:
    leaves = [v.requires_grad_() for v in (values(3, 4), values(2, 4, seed=1), values(2, seed=2))]
    assert torch.autograd.gradcheck(lambda h, w, b: prefix_logits(h, w, b, chunk=chunk), leaves)


def test_prefix_logits_in_half_precision_accumulate_in_float32() -> None:
    h, w, b = values(5, 300), values(4, 300, seed=1), values(4, seed=2)
    low = prefix_logits(h.bfloat16(), w.bfloat16(), b.bfloat16())
    exact = prefix_logits(h.bfloat16().double(), w.bfloat16().double(), b.bfloat16().double())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, atol=1e-3, rtol=1e-5)
    assert prefix_logits(h.bfloat16(), w.float()).dtype == torch.float32  # features under autocast


def test_select_keep_prefers_the_shortest_of_equals() -> None:
    # Four examples, four prefixes with accuracies 1/2, 3/4, 3/4, 3/4.
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    rows = [[right, right, wrong, wrong], *3 * [[right, right, right, wrong]]]
    selection = select_keep(torch.tensor(rows), torch.zeros(4, dtype=torch.int64))
    assert isinstance(selection, PrefixSelection) and selection.keep == 2
    assert selection.accuracy.dtype == torch.float64 and selection.accuracy.tolist() == [0.5, 0.75, 0.75, 0.75]


def test_select_keep_weighs_accuracy_against_width() -> None:
    logits, labels = values(9, 200, 5), torch.randint(5, (200,), generator=torch.Generator().manual_seed(3))
    for penalty in (0.0, 1e-5, 0.01, 1.0):
        accuracy = [sum(int(logits[k, i].argmax()) == int(labels[i]) for i in range(200)) / 200 for k in range(9)]
        scores = [a - penalty * k for k, a in enumerate(accuracy)]
        selection = select_keep(logits, labels, penalty=penalty)
        assert selection.keep == scores.index(max(scores)) + 1
        assert selection.accuracy.tolist() == pytest.approx(accuracy)
    # A prefix that is better by one example in ten thousand pays for nine channels, not for eleven.
    gain = torch.zeros(12, 10_000, 2)
    gain[9:, 0, 1] = 1
    labels = torch.zeros(10_000, dtype=torch.int64)
    labels[0] = 1
    assert select_keep(gain, labels).keep == 10
    assert select_keep(torch.cat([gain[:2], gain]), labels).keep == 1


def test_equal_logits_predict_the_first_class() -> None:
    # Features that are all zero give equal logits; counting every label as predicted would make them look perfect.
    labels = torch.tensor([0, 1, 2])
    assert select_keep(torch.zeros(2, 3, 3), labels).accuracy.tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_counting_in_chunks_is_counting_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equipoise.noisy_labels.nested_dropout.ELEMENTS_AT_ONCE", at_once)
    heads = [nn.Linear(6, 3, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)]
    features, labels = [values(17, 6), values(17, 6, seed=1)], torch.arange(17) % 3
    whole = [prefix_logits(h, head.weight, head.bias) for h, head in zip(features, heads, strict=True)]
    one, both = correct_by_prefix(features[:1], heads[:1], labels), correct_by_prefix(features, heads, labels)
    assert torch.equal(one.double() / 17, select_keep(whole[0], labels).accuracy)
    assert torch.equal(both.double() / 17, select_keep((whole[0] + whole[1]) / 2, labels).accuracy)


# -- small losses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rate", "count", "kept"), [(0.2, 10, 8), (0.3, 10, 7), (0.45, 40, 22), (0.36, 7, 4), (0.0, 5, 5)]
)
def test_small_loss_sizes(rate: float, count: int, kept: int) -> None:
    losses = values(count).abs()
    chosen = small_loss_indices(losses, rate)
    assert chosen.dtype == torch.int64 and chosen.shape == (kept,)
    assert chosen.tolist() == sorted(range(count), key=lambda i: float(losses[i]))[:kept]


def test_small_losses_are_stable_and_leave_nan_out() -> None:
    assert small_loss_indices(torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0]), 0.2).tolist() == [1, 3, 0, 2]
    assert small_loss_indices(torch.ones(1000), 0.5).tolist() == list(range(500))
    nan, inf = math.nan, math.inf
    assert small_loss_indices(torch.tensor([nan, 2.0, inf, nan, 1.0]), 0.0).tolist() == [4, 1, 2]
    assert small_loss_indices(torch.tensor([nan, 2.0, 3.0, 1.0]), 0.5).tolist() == [3, 1]
    assert small_loss_indices(torch.tensor([], dtype=torch.float64), 0.5).tolist() == []


def test_forget_rate_schedule() -> None:
    got = [forget_rate_schedule(epoch, 0.3, 5) for epoch in range(8)]
    assert got == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.3, 0.3, 0.3])
    assert got[4:] == [0.3] * 4
    assert [forget_rate_schedule(epoch, 0.3) for epoch in range(3)] == [0.3] * 3
    assert [forget_rate_schedule(epoch, 0.3, 1) for epoch in range(3)] == [0.0, 0.3, 0.3]


# -- the layer --------------------------------------------------------------------------------------------------------
def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 12), (6, 12, 5), (3, 12, 4, 2)])
def test_rows_of_a_batch_share_the_zeroed_suffix(shape: tuple[int, ...]) -> None:
    layer, twin = (NestedDropout(12, sigma=5.0, generator=seeded()) for _ in range(2))
    widths = set()
    for _ in range(30):
        x = values(*shape)
        k = twin.sample_keep()
        z = layer(x)
        assert torch.equal(z[:, :k], x[:, :k]) and not z[:, k:].any()
        widths.add(k)
    assert len(widths) > 3


def test_a_channel_learns_with_the_probability_that_it_is_kept() -> None:
    layer, h, y = NestedDropout(5, sigma=3.0), values(8, 5), torch.arange(8) % 3
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(1, 6):
        w = torch.zeros(
            3, 5, dtype=torch.float64, requires_grad=True
        )  # at W = 0 the gradient of a kept column is the same
        F.cross_entropy(F.linear(layer(h, keep=k), w), y).backward()
        assert w.grad is not None and not w.grad[:, k:].any() and w.grad[:, :k].all()
        expected += layer.probs[k - 1] * w.grad
    full = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(F.linear(h, full), y).backward()
    assert full.grad is not None
    tail = layer.probs.flip(0).cumsum(0).flip(0)  # P(k >= j)
    torch.testing.assert_close(expected, full.grad * tail)


def test_input_gradient_stops_at_the_cut() -> None:
    x = values(4, 6).requires_grad_()
    NestedDropout(6)(x, keep=2).sum().backward()
    assert x.grad is not None and x.grad[:, :2].eq(1).all() and not x.grad[:, 2:].any()


def test_widths_follow_the_law() -> None:
    layer = NestedDropout(10, sigma=4.0, mu=2.0, generator=seeded())
    drawn = torch.tensor([layer.sample_keep() for _ in range(4000)])
    observed = torch.bincount(drawn, minlength=11)[1:].double()
    chi_squared = ((observed - 4000 * layer.probs) ** 2 / (4000 * layer.probs)).sum().item()
    assert chi_squared < 27.9  # 99.9 % quantile, 9 degrees of freedom
    tiny = NestedDropout(10, sigma=0.1)
    assert {tiny.sample_keep() for _ in range(50)} == {1}


def test_evaluation_is_deterministic() -> None:
    layer, x = NestedDropout(6, sigma=2.0).eval(), values(3, 6)
    assert layer.keep.dtype == torch.int64 and layer.keep.shape == () and int(layer.keep) == 6
    assert torch.equal(layer(x), x)
    layer.keep.fill_(2)
    assert torch.equal(layer(x)[:, :2], x[:, :2]) and not layer(x)[:, 2:].any()
    assert torch.equal(layer(x, keep=6), x) and torch.equal(layer.train()(x, keep=6), x)
    huge = torch.full((1, 6), math.inf)
    assert layer(huge, keep=1).tolist() == [[math.inf, 0, 0, 0, 0, 0]]  # not inf * 0


def test_held_width_replaces_the_draw_in_training_only() -> None:
    layer, x = NestedDropout(6, generator=seeded()), torch.ones(2, 6)
    before = layer.generator.get_state()
    layer.held = torch.tensor(3)
    assert layer(x).sum() == 6 and layer.eval()(x).sum() == 12
    assert torch.equal(before, layer.generator.get_state())


def test_layer_draws_from_its_own_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two = NestedDropout(50), NestedDropout(50)
    drawn = [one.sample_keep() for _ in range(20)]
    assert drawn == [two.sample_keep() for _ in range(20)] and torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12)
    assert drawn != [sample() for sample in [NestedDropout(50).sample_keep] for _ in range(20)]


def test_layer_survives_copies_saving_and_casts() -> None:
    layer = NestedDropout(8, sigma=3.0, mu=1.0, generator=seeded())
    layer.keep.fill_(5)
    layer.sample_keep()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    stream = None
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), copy.deepcopy(layer).bfloat16()):
        assert int(twin.keep) == 5 and torch.equal(twin.probs, layer.probs)
        drawn = [twin.sample_keep() for _ in range(20)]
        stream = stream or drawn
        assert drawn == stream
    assert [layer.sample_keep() for _ in range(20)] == stream  # the copies drew from generators of their own
    other = NestedDropout(8)
    other.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["keep"] and int(other.keep) == 5
    assert "8, sigma=3.0, mu=1.0" in repr(layer)
    x = values(2, 8).bfloat16()
    assert layer(x).dtype == torch.bfloat16 and layer(x.half()).dtype == torch.float16


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: nested_dropout_probs(4, 0.0), r"sigma = 0.0: must be a number in \(0, inf\)"),
    (lambda: nested_dropout_probs(4, -1.0), "sigma = -1.0"),
    (lambda: nested_dropout_probs(0, 1.0), "num_features = 0: must be an integer >= 1"),
    (lambda: nested_dropout_probs(4, 1.0, math.inf), r"mu = inf: must be a number in \(-inf, inf\)"),
    (lambda: NestedDropout(0), "num_features = 0"),
    (lambda: NestedDropout(4, sigma=math.nan), "sigma = nan"),
    (lambda: NestedDropout(4)(torch.zeros(2, 5)), r"x has shape \(2, 5\): must be \(N, 4\)"),
    (lambda: NestedDropout(4)(torch.zeros(4)), r"x has shape \(4,\)"),
    (lambda: NestedDropout(4)(torch.zeros(2, 4), keep=0), r"keep = 0: must be an integer in \[1, 4\]"),
    (lambda: NestedDropout(4)(torch.zeros(2, 4), keep=5), "keep = 5"),
    (lambda: small_loss_indices(torch.zeros(3), 1.0), r"forget_rate = 1.0: must be a number in \[0, 1\)"),
    (lambda: small_loss_indices(torch.zeros(3), -0.1), "forget_rate = -0.1"),
    (lambda: small_loss_indices(torch.zeros(3, 1), 0.1), r"losses has shape \(3, 1\)"),
    (lambda: forget_rate_schedule(-1, 0.2), "epoch = -1"),
    (lambda: forget_rate_schedule(0, 1.2), "forget_rate = 1.2"),
    (lambda: forget_rate_schedule(0, 0.2, -1), "num_gradual = -1"),
    (lambda: prefix_logits(torch.zeros(2, 3, 1), torch.zeros(2, 3)), r"features = torch.float32 \(2, 3, 1\)"),
    (lambda: prefix_logits(torch.zeros(2, 3), torch.zeros(2, 4)), r"weight has shape \(2, 4\): must be \(C, 3\)"),
    (
        lambda: prefix_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)),
        r"bias has shape \(3,\): must be \(2,\)",
    ),
    (lambda: prefix_logits(torch.zeros(2, 3), torch.zeros(2, 3), chunk=0), "chunk = 0"),
    (lambda: select_keep(torch.zeros(2, 0, 3), torch.zeros(0).long()), r"prefix_logits has shape \(2, 0, 3\)"),
    (lambda: select_keep(torch.zeros(2, 2, 3), torch.zeros(2)), "targets = torch.float32"),
    (lambda: select_keep(torch.zeros(2, 2, 3), torch.tensor([0, 3])), r"targets = values in \[0, 3\]"),
    (lambda: select_keep(torch.zeros(2, 2, 3), torch.tensor([0, 2]), penalty=-1.0), "penalty = -1.0"),
    (lambda: NestedDropoutMethod(sigma=10.0, dropout=0.5), "dropout, sigma, mu = .* must not be given together"),
    (lambda: NestedDropoutMethod(dropout=1.0), r"dropout = 1.0: must be a number in \[0, 1\)"),
    (lambda: NestedDropoutMethod(sigma=0.0), "sigma = 0.0"),
    (lambda: CoTeaching(forget_rate=1.0), "forget_rate = 1.0"),
    (lambda: CoTeaching(num_gradual=-1), "num_gradual = -1"),
    (lambda: CoTeaching(pretrain_epochs=-1), "pretrain_epochs = -1"),
    (lambda: CoTeaching(pretrain_epochs=1.0), r"pretrain_epochs = 1.0: must be a number in \[0, 1\)"),
    (lambda: CoTeaching(sigma=5.0, dropout=0.1), "must not be given together"),
    (lambda: CoTeaching(split_batch="yes"), "split_batch = 'yes'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError)


# -- nested dropout in a run ------------------------------------------------------------------------------------------
def data(count: int = 47, seed: int = 0) -> equipoise.Examples:
    labels = torch.arange(count) % 3
    return equipoise.Examples((values(count, 5, seed=seed) + 2 * F.one_hot(labels, 5)).float(), labels)


def network(seed: int = 0, *, dropout: float | None = None, norm: bool = False, bias: bool = True) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(9)] if norm else []
    last: list[nn.Module] = [] if dropout is None else [nn.Dropout(dropout)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 9), *middle, nn.ReLU(), *last, nn.Linear(9, 3, bias=bias))


def train(method: Any = None, model: nn.Module | None = None, examples: Any = None, **options: Any) -> equipoise.Run:
    methods = [] if method is None else [method]
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 20, "methods": methods, "validation": data(31, 7), **options}
    return equipoise.fit(model or network(), examples or data(), **settings)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def replay(head: nn.Linear) -> NestedDropout:
    """The head's layer, free of its run: draws what the run will draw."""
    return copy.deepcopy(head.nested_dropout)  # type: ignore[return-value]


def batches(seed: int, epochs: int, count: int = 47, size: int = 20) -> list[list[Tensor]]:
    sampler = RandomSampler(range(count), generator=torch.Generator().manual_seed(seed))
    return [list(torch.tensor(list(sampler)).split(size)) for _ in range(epochs)]


class Watcher(equipoise.Method):
    """Calls functions from hooks of a run."""

    name = "watcher"

    def __init__(self, **hooks: Callable[[equipoise.Run], Any]) -> None:
        self.hooks = hooks

    def prepare(self, run: equipoise.Run) -> None:
        self.hooks.get("prepare", lambda run: None)(run)

    def after_step(self, run: equipoise.Run) -> None:
        self.hooks.get("after_step", lambda run: None)(run)

    def epoch_end(self, run: equipoise.Run) -> None:
        self.hooks.get("epoch_end", lambda run: None)(run)


def test_dropout_variant_is_a_dropout_layer_in_front_of_the_head() -> None:
    assert same(train(NestedDropoutMethod(dropout=0.3)).model, train(None, network(dropout=0.3)).model)
    neutral = NestedDropoutMethod(**NestedDropoutMethod.neutral)  # type: ignore[arg-type]
    assert same(train(neutral).model, train().model)


@pytest.mark.parametrize("bias", [True, False])
def test_run_is_the_loop_anyone_would_write(bias: bool) -> None:
    method, layers = NestedDropoutMethod(sigma=4.0), []
    watcher = Watcher(prepare=lambda run: layers.append(replay(run.head())))  # type: ignore[arg-type]
    run = train(None, network(bias=bias), methods=[method, watcher])
    (layer,), model = layers, network(bias=bias)
    body, head = model[:-1], model[-1]
    examples, held_out = data(), data(31, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        for rows in batches(0, 3)[epoch]:
            optimizer.zero_grad()
            F.cross_entropy(head(layer(body(examples.inputs[rows]))), examples.targets[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            scores = []
            for k in range(1, 10):
                right = head(layer(body(held_out.inputs), keep=k)).argmax(1) == held_out.targets
                scores.append(right.double().mean().item() - 1e-5 * (k - 1))
        best = scores.index(max(scores)) + 1
        assert run.history[epoch]["keep"] == best
    assert method.layer is not None and int(method.layer.keep) == best
    assert method.selection is not None and method.selection.keep == best
    layer.eval().keep.fill_(best)
    expected = head(layer(body(held_out.inputs)))
    torch.testing.assert_close(run.predict(held_out)[0], expected, atol=1e-6, rtol=1e-5)


def test_during_the_run_names_stay_and_after_it_the_model_is_plain() -> None:
    model, seen = network(), {}
    plain = set(model.state_dict())

    def look(run: equipoise.Run) -> dict[str, Any]:
        seen["keys"], seen["copy"] = set(run.model.state_dict()), copy.deepcopy(run.model)
        return {}

    method = NestedDropoutMethod(sigma=3.0)
    train(method, model, on_epoch_end=look)
    assert seen["keys"] - plain == {"2.nested_dropout.keep"} and plain < seen["keys"]
    keep = int(method.layer.keep)  # type: ignore[union-attr]
    assert set(model.state_dict()) == plain and not model[2]._forward_pre_hooks
    assert keep < 9 and not model[2].weight[:, keep:].any() and model[2].weight[:, :keep].all()
    # A copy made during the run truncates by its own layer; folded, it predicts the same.
    twin, x = seen["copy"].eval(), data().inputs
    twin[2].nested_dropout.keep.fill_(2)
    before = twin(x)
    masked = twin[:2](x)
    masked[:, 2:] = 0
    torch.testing.assert_close(before, F.linear(masked, twin[2].weight, twin[2].bias))
    fold(twin[2])
    fold(twin[2])  # nothing left to do
    assert torch.equal(twin(x), before) and set(twin.state_dict()) == plain
    train(NestedDropoutMethod(), twin)  # and trains again


def test_a_parametrized_head_keeps_its_layer() -> None:
    model = network()
    nn.utils.parametrizations.weight_norm(model[2])
    method = NestedDropoutMethod(sigma=2.0)
    run = train(method, model)
    keep, x = int(method.layer.keep), data().inputs  # type: ignore[union-attr]
    masked = model[:2](x)
    masked[:, keep:] = 0
    torch.testing.assert_close(run.predict(data())[0], F.linear(masked, model[2].weight, model[2].bias))


def test_without_validation_all_channels_stay() -> None:
    method = NestedDropoutMethod(sigma=2.0)
    run = train(method, validation=None)
    assert int(method.layer.keep) == 9 and method.selection is None  # type: ignore[union-attr]
    assert run.head().weight.all()


def test_own_loop_selects_at_the_end() -> None:
    method, examples = NestedDropoutMethod(sigma=2.0), data()
    model = network()
    run = equipoise.start(model, torch.optim.SGD(model.parameters(), lr=0.1), methods=[method], validation=data(31, 7))
    for rows in torch.arange(47).split(8):
        run.backward(run.training_loss((examples.inputs[rows], examples.targets[rows])))
        run.step()
    run.finish()
    assert method.selection is not None and not model[2].weight[:, method.selection.keep :].any()


def test_micro_batches_share_the_width_of_their_step() -> None:
    whole, parts = (train(NestedDropoutMethod(sigma=4.0), accumulation=n).model for n in (1, 4))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_heads_that_cannot_be_truncated_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"head = ReLU: nested dropout needs an nn.Linear"):
        train(NestedDropoutMethod(), head="1")
    tokens = equipoise.Examples(torch.ones(40, 6, 5), torch.arange(40) % 3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    with pytest.raises(ArgumentError, match=r"head's inputs have shape \(20, 6, 6\)"):
        train(NestedDropoutMethod(), model, tokens, validation=None)
    with pytest.raises(ArgumentError, match="carries a nested dropout layer already"):
        train(None, methods=[NestedDropoutMethod(), CoTeaching()])
    values_ = (torch.ones(8, 5), torch.ones(8, 3))
    with pytest.raises(ArgumentError, match="keep is selected by accuracy"):
        train(NestedDropoutMethod(), examples=equipoise.Examples(*values_), validation=values_, loss=F.mse_loss)


def test_attach_works_without_a_run() -> None:
    model, layer = network(), NestedDropout(9, sigma=2.0)
    attach(model[2], layer)
    layer.keep.fill_(1)
    x = values(4, 5).float()
    assert torch.equal(model.eval()(x), F.linear(layer(model[:2](x)), model[2].weight, model[2].bias))


# -- Co-teaching ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [True, False])
def test_at_the_neutral_setting_the_first_network_is_the_baseline(norm: bool) -> None:
    method = CoTeaching(**CoTeaching.neutral)  # type: ignore[arg-type]
    run = train(method, network(norm=norm))
    assert same(method.networks[0], train(None, network(norm=norm)).model)
    assert isinstance(run.model, LogitAverage)


def test_nothing_forgotten_and_nothing_split_trains_both_on_everything() -> None:
    method = CoTeaching(forget_rate=0.0, dropout=0.0, pretrain_epochs=0, split_batch=False, peer=network())
    train(method)
    assert same(*method.networks) and same(method.networks[0], train().model)


def test_stage_one_is_two_separate_trainings() -> None:
    states: list[Any] = []
    watcher = Watcher(epoch_end=lambda run: states.append(copy.deepcopy(method.networks)) if run.epoch == 1 else None)
    method = CoTeaching(dropout=0.0, pretrain_epochs=2, peer=network(5, norm=True))
    train(None, network(norm=True), methods=[method, watcher])
    for trained, start in zip(states[0], (network(norm=True), network(5, norm=True)), strict=True):
        assert same(train(None, start, epochs=2).model, plain(trained))
    widths: list[tuple[int, int]] = []
    look = Watcher(after_step=lambda run: widths.append(tuple(int(layer.held) for layer in layers_of(method))))  # type: ignore[arg-type]
    method = CoTeaching(sigma=5.0, pretrain_epochs=2)
    run = train(None, methods=[method, look])
    assert any(a != b for a, b in widths[:6]) and all(a == b for a, b in widths[6:])
    assert run.history[1]["keep"] == run.history[1]["keep_second"]  # together, in time for stage two


def layers_of(method: CoTeaching) -> list[NestedDropout]:
    return method.truncation.layers


def plain(model: nn.Module) -> nn.Module:
    """The network without the layer of a run."""
    fold(model[-1])  # type: ignore[index]
    return model


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("gradual", [0, 3])
def test_stage_two_is_the_loop_anyone_would_write(split: bool, gradual: int) -> None:
    examples, held_out, rate, epochs = data(50), data(31, 7), 0.4, 4
    started: list[Any] = []
    method = CoTeaching(rate, gradual, 4.0, None, 1, split_batch=split)
    after = Watcher(epoch_end=lambda run: started or started.append([copy.deepcopy(n) for n in method.networks]))
    run = train(None, network(norm=True), examples, methods=[method, after], epochs=epochs)
    nets = started[0]  # at the end of stage one; copies that draw what the run will draw
    heads, bodies = [net[-1] for net in nets], [net[:-1] for net in nets]
    layer = heads[0].nested_dropout
    frozen = [{k: v.clone() for k, v in net[1].state_dict().items()} for net in nets]
    # Momentum is carried over from stage one: train that again.
    optimizers = stage_one_momentum(method, examples, nets)
    for epoch in range(1, epochs):
        for rows in batches(0, epochs, 50)[epoch]:
            half = len(rows) // 2
            parts = [rows[:half], rows[half:]] if split else [rows, rows]
            f = rate if epoch - 1 >= gradual else rate * (epoch - 1) / (gradual - 1)
            kept = []
            with torch.no_grad():
                for net, part in zip(nets, parts, strict=True):
                    losses = F.cross_entropy(
                        net.eval()(examples.inputs[part]), examples.targets[part], reduction="none"
                    )
                    ranked = sorted(range(len(part)), key=lambda i: float(losses[i]))
                    kept.append(part[torch.tensor(ranked[: int((1 - f) * len(part))])] if f else part)
            k = layer.sample_keep()
            for net, body, head, rows_, optimizer in zip(nets, bodies, heads, reversed(kept), optimizers, strict=True):
                net.train()
                net[1].eval()
                optimizer.zero_grad()
                logits = F.linear(layer(body(examples.inputs[rows_]), keep=k), head.weight, head.bias)
                F.cross_entropy(logits, examples.targets[rows_]).backward()
                for p in net[1].parameters():
                    p.grad = None
                optimizer.step()
        with torch.no_grad():
            scores = []
            for k in range(1, 10):
                both = sum(
                    F.linear(layer(net[:-1].eval()(held_out.inputs), keep=k), net[-1].weight, net[-1].bias)
                    for net in nets
                )
                right = (both / 2).argmax(1) == held_out.targets
                scores.append(right.double().mean().item() - 1e-5 * (k - 1))
        best = scores.index(max(scores)) + 1
        assert run.history[epoch]["keep"] == run.history[epoch]["keep_second"] == best
        for head in heads:
            head.nested_dropout.keep.fill_(best)
    for net, before in zip(nets, frozen, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in net[1].state_dict().items())
    for mine, theirs in zip(method.networks, nets, strict=True):
        fold(theirs[-1])
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def stage_one_momentum(
    method: CoTeaching, examples: equipoise.Examples, nets: list[Any]
) -> list[torch.optim.Optimizer]:
    """Optimizers of the networks with the momentum that an epoch of stage one leaves."""
    starts: list[Any] = []
    again = CoTeaching(**method.settings())
    watcher = Watcher(prepare=lambda run: starts.extend(copy.deepcopy(n) for n in again.networks))
    train(None, network(norm=True), examples, methods=[again, watcher], epochs=2)
    first, second = starts
    source = first[-1].nested_dropout
    optimizers = []
    draws = [(source.sample_keep(), source.sample_keep()) for _ in range(3)]
    for i, (net, final) in enumerate(zip((first, second), nets, strict=True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for rows, widths in zip(batches(0, 1, 50)[0], draws, strict=True):
            optimizer.zero_grad()
            h = source(net[:-1](examples.inputs[rows]), keep=widths[i])
            F.cross_entropy(F.linear(h, net[-1].weight, net[-1].bias), examples.targets[rows]).backward()
            optimizer.step()
        moved = torch.optim.SGD(final.parameters(), lr=0.05, momentum=0.9)
        for mine, theirs in zip(final.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
            moved.state[mine]["momentum_buffer"] = optimizer.state[theirs]["momentum_buffer"].clone()
        optimizers.append(moved)
    return optimizers


@pytest.mark.parametrize(("split", "scored", "trained"), [(True, 10, 7), (False, 20, 14)])
def test_stage_two_costs_what_it_must(split: bool, scored: int, trained: int) -> None:
    rows: list[tuple[int, bool, bool]] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            rows.append((len(x), self.training, torch.is_grad_enabled()))
            return super().forward(x)

    def make() -> nn.Module:
        return nn.Sequential(Counted(5, 4), nn.Linear(4, 3))

    train(CoTeaching(0.3, pretrain_epochs=0, split_batch=split), make(), data(40), epochs=1, validation=None)
    step = [(scored, False, False)] * 2 + [(trained, True, True)] * 2
    assert rows == 2 * step


def test_norm_is_frozen_after_a_stage_one_and_not_without() -> None:
    for settings, frozen in (
        ({"pretrain_epochs": 2}, True),
        ({"pretrain_epochs": 0}, False),
        ({"pretrain_epochs": 2, "freeze_norm": False}, False),
        ({"pretrain_epochs": 0, "freeze_norm": True}, True),
    ):
        states: list[Any] = []
        look = Watcher(epoch_end=lambda run: states.append(copy.deepcopy(run.model[1].state_dict())))  # noqa: B023
        train(None, network(norm=True), methods=[CoTeaching(**settings), look], epochs=4)  # type: ignore[arg-type]
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(states[-2][key], states[-1][key]) is frozen
        if settings["pretrain_epochs"]:
            assert not torch.equal(states[0]["running_mean"], states[1]["running_mean"])


@pytest.mark.parametrize(
    ("pretrain", "epochs", "begins"),
    [(0.75, 4, 3), (0.75, 3, 2), (0.75, 1, 0), (0.29, 100, 29), (3, 4, 3), (0.0, 4, 0)],
)
def test_when_stage_two_begins(pretrain: float, epochs: int, begins: int) -> None:
    method = CoTeaching(pretrain_epochs=pretrain)
    equipoise.start(network(), torch.optim.Adam, methods=[method], epochs=epochs)
    assert method.stage_two == begins


def test_when_stage_two_cannot_begin() -> None:
    with pytest.raises(ArgumentError, match="pretrain_epochs = 3: must be less than the run's 3 epochs"):
        train(CoTeaching(pretrain_epochs=3))
    with pytest.raises(ArgumentError, match=r"pretrain_epochs = 0.75: must be a number of epochs"):
        equipoise.start(network(), torch.optim.Adam, methods=[CoTeaching()])
    method = CoTeaching(pretrain_epochs=7)
    equipoise.start(network(), torch.optim.Adam, methods=[method])
    assert method.stage_two == 7


def test_peers_must_fit_each_other() -> None:
    wide = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(ArgumentError, match="12 or 9 features: both networks must have equally many"):
        train(CoTeaching(peer=wide))
    peer = network(4)
    start = copy.deepcopy(peer.state_dict())
    train(CoTeaching(peer=peer))
    assert all(torch.equal(start[key], value) for key, value in peer.state_dict().items())  # a copy was trained


@pytest.mark.parametrize("count", [1, 2, 3, 21, 22, 23])
def test_small_batches_train_to_finite_weights(count: int) -> None:
    run = train(CoTeaching(0.9, pretrain_epochs=0), examples=data(count), epochs=1, num_classes=3)
    assert all(p.isfinite().all() for p in run.model.parameters()) and math.isfinite(run.history[0]["train_loss"])


def test_soft_labels_and_other_losses_train() -> None:
    soft = equipoise.Examples(data().inputs, F.one_hot(data().targets, 3).float() * 0.8 + 0.2 / 3)
    run = train(CoTeaching(pretrain_epochs=1), examples=soft)
    assert math.isfinite(run.history[-1]["train_loss"])
    smooth = train(CoTeaching(pretrain_epochs=1), loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    assert not same(smooth.model, train(CoTeaching(pretrain_epochs=1)).model)


def test_other_methods_meet_the_rows_that_the_first_network_trains_on() -> None:
    run = train(None, methods=[CoTeaching(pretrain_epochs=1), ELR()], epochs=3)
    assert math.isfinite(run.history[-1]["train_loss"])


# -- both methods -----------------------------------------------------------------------------------------------------
CASES = [NestedDropoutMethod(sigma=3.0), NestedDropoutMethod(dropout=0.4), CoTeaching(sigma=3.0, pretrain_epochs=2)]


@pytest.mark.parametrize("method", CASES, ids=repr)
@pytest.mark.parametrize("stop", [7, 11])
def test_resumes_bit_for_bit(method: Any, stop: int, tmp_path: Any) -> None:
    class Stop(Exception):
        pass

    def interrupt(run: equipoise.Run) -> None:
        if run.global_step == stop:
            raise Stop

    options: dict[str, Any] = {"epochs": 4, "checkpoint": tmp_path, "checkpoint_every": 2}
    whole = train(None, network(norm=True), methods=[Watcher(), copy.deepcopy(method)], epochs=4)
    stopper = [Watcher(after_step=interrupt), copy.deepcopy(method)]
    stopper[0].settings = dict  # type: ignore[union-attr,method-assign]
    with pytest.raises(Stop):
        train(None, network(norm=True), methods=stopper, **options)
    again = [Watcher(), copy.deepcopy(method)]
    again[0].settings = dict  # type: ignore[union-attr,method-assign]
    resumed = train(None, network(5, norm=True), methods=again, resume=True, **options)
    assert same(whole.model, resumed.model) and whole.history == resumed.history


@pytest.mark.parametrize("method", CASES, ids=repr)
def test_runs_repeat_and_leave_the_global_generator_alone(method: Any) -> None:
    before = torch.get_rng_state()
    one, two, other = (train(copy.deepcopy(method), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(one.model, two.model) and not same(one.model, other.model)


@pytest.mark.parametrize("method", CASES, ids=repr)
def test_runs_in_bfloat16_and_with_micro_batches(method: Any) -> None:
    run = train(copy.deepcopy(method), mixed_precision="bf16", accumulation=2)
    assert all(math.isfinite(record["train_loss"]) for record in run.history)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())


def test_conformance() -> None:
    check_method(NestedDropoutMethod, settings={"sigma": 3.0})
    frozen = {"modes": "stage two freezes BatchNorm"}
    check_method(CoTeaching, settings={"pretrain_epochs": 1}, skip=frozen)
    check_method(CoTeaching, settings={"pretrain_epochs": 0, "sigma": 3.0})


@pytest.mark.distributed
def test_two_processes() -> None:
    own = {"ddp-equals-one": "each process selects within its share of the batch"}
    check_methods_ddp(
        [
            (NestedDropoutMethod, {"sigma": 5.0}),
            (CoTeaching, {"pretrain_epochs": 1}, own),
            (CoTeaching, {"forget_rate": 0.0, "pretrain_epochs": 1, "split_batch": False}),
        ]
    )
