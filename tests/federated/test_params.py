"""Operations on named tensors, and the way to a model and back, against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from federation import toy_model
from torch import nn

from equipoise.errors import ArgumentError
from equipoise.federated.params import (
    Params,
    check_same,
    copy,
    descend,
    is_finite,
    load,
    minus,
    norm,
    plus,
    size,
    stack,
    state_of,
    times,
    unstack,
    weighted_mean,
    zeros,
)

torch.set_num_threads(1)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in {"a": (3, 2), "b": (4,), "c": ()}.items()}


def test_arithmetic() -> None:
    a, b = draw(1), draw(2)
    for key in a:
        assert torch.equal(plus(a, b)[key], a[key] + b[key])
        torch.testing.assert_close(plus(a, b, 0.3)[key], a[key] + 0.3 * b[key])
        assert torch.equal(minus(a, b)[key], a[key] - b[key])
        assert torch.equal(times(a, 0.3)[key], 0.3 * a[key])
        assert torch.equal(zeros(a)[key], torch.zeros_like(a[key]))
    assert norm(a).item() == pytest.approx(sum(float((t**2).sum()) for t in a.values()) ** 0.5)
    assert plus({}, {}) == times({}, 2.0) == {}
    assert size(a) == 8 * 11


def test_the_order_of_names_does_not_matter() -> None:
    a = draw(1)
    turned = dict(reversed(a.items()))
    assert all(torch.equal(plus(a, turned)[key], 2 * a[key]) for key in a)
    assert torch.equal(stack([a, turned])[0], stack([a, turned])[1])


def test_nothing_is_changed_in_place() -> None:
    a, b = draw(1), draw(2)
    before = copy(a), copy(b)
    plus(a, b), minus(a, b), times(a, 2.0), weighted_mean([a, b], [1, 2]), stack([a, b])
    descend(a, b, lr=0.1, weight_decay=0.1, clip_norm=0.1)
    for now, then in zip((a, b), before, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in now)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 0.0, 3.0]])
def test_weighted_mean_against_a_loop(weights: list[float] | None) -> None:
    found = [draw(seed) for seed in range(3)]
    w = weights or [1.0, 1.0, 1.0]
    mean = weighted_mean(found, weights)
    for key in mean:
        expected = sum(share * params[key] for share, params in zip(w, found, strict=True)) / sum(w)
        torch.testing.assert_close(mean[key], torch.as_tensor(expected))


def test_weighted_mean_of_integers_and_booleans() -> None:
    params = [{"n": torch.tensor(n), "m": torch.tensor([True, False])} for n in (1, 2, 10**12)]
    mean = weighted_mean(params, [1, 1, 2])
    assert mean["n"].dtype == torch.int64 and int(mean["n"]) == round((3 + 2 * 10**12) / 4)
    assert mean["m"].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mean_keeps_the_type(dtype: torch.dtype) -> None:
    mean = weighted_mean([draw(seed, dtype) for seed in range(4)])
    exact = weighted_mean([{k: v.double() for k, v in draw(seed, dtype).items()} for seed in range(4)])
    for key in mean:
        assert mean[key].dtype == dtype
        torch.testing.assert_close(mean[key].double(), exact[key], rtol=2e-2, atol=2e-2)


def test_stack_and_back() -> None:
    found = [draw(seed, torch.float32) for seed in range(3)]
    rows = stack(found)
    assert rows.shape == (3, 11)
    for row, params in zip(rows, found, strict=True):
        again = unstack(row, params)
        assert all(torch.equal(again[key], params[key]) and again[key].shape == params[key].shape for key in params)


def test_finite() -> None:
    assert (
        is_finite(draw(1)) and is_finite({}) and is_finite({"n": torch.tensor(3)}) and is_finite({"e": torch.empty(0)})
    )
    assert is_finite({"big": torch.tensor([3e38])})
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not is_finite({**draw(1), "x": torch.tensor([1.0, bad, 2.0])})


def test_descend_by_hand() -> None:
    w, q = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}
    assert torch.allclose(descend(w, q, lr=0.1)["x"], torch.tensor([0.7, 1.6]))
    assert torch.allclose(descend(w, q, lr=0.1, weight_decay=0.5)["x"], torch.tensor([0.65, 1.5]))
    assert torch.allclose(descend(w, q, lr=0.1, clip_norm=1.0)["x"], torch.tensor([0.94, 1.92]))
    assert torch.equal(descend(w, q, lr=0.1, clip_norm=6.0)["x"], descend(w, q, lr=0.1)["x"])


def test_momentum_is_torch_sgd() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    velocity = zeros(w)
    for step in range(4):
        grads = {n: torch.randn_like(p) * (step + 1) for n, p in w.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].clone()
        optimizer.step()
        w = descend(w, grads, lr=0.1, weight_decay=0.01, momentum=0.9, velocity=velocity)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(w[name], parameter.detach())


def test_model_and_back() -> None:
    model = toy_model()
    params, buffers = state_of(model)
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert params.keys() | buffers.keys() == model.state_dict().keys()
    other = toy_model()
    load(other, {name: tensor + 1 for name, tensor in params.items()}, {"1.num_batches_tracked": torch.tensor(7)})
    assert torch.equal(other[0].weight.detach(), model[0].weight.detach() + 1)
    assert int(other[1].num_batches_tracked) == 7  # type: ignore[arg-type]
    model[0].weight.requires_grad_(False)
    params, rest = state_of(model)
    assert "0.weight" in rest and "0.weight" not in params


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: check_same({"a": torch.zeros(1)}, {"b": torch.zeros(1)}), r"lacks \['b'\], has also \['a'\]"),
        (lambda: plus({"a": torch.zeros(1)}, {"a": torch.zeros(2)}), "shape"),
        (lambda: weighted_mean([]), "nothing to average"),
        (lambda: weighted_mean([draw(1)], [-1.0]), "weights"),
        (lambda: weighted_mean([draw(1)], [float("nan")]), "weights"),
        (lambda: weighted_mean([draw(1)], [1.0, 2.0]), "weights"),
        (lambda: weighted_mean([draw(1), {"a": torch.zeros(1)}]), r"params\[1\]: the names"),
        (lambda: stack([]), "nothing to average"),
        (lambda: unstack(torch.zeros(3), draw(1)), "vector"),
        (lambda: load(nn.Linear(1, 1), {"nowhere": torch.zeros(1)}), "the model has no 'nowhere'"),
        (lambda: load(nn.Linear(1, 1), {"weight": torch.zeros(2)}), "shape"),
        (lambda: state_of(nn.ReLU()), "nothing to train"),
        (lambda: descend(draw(1), draw(2), lr=-1.0), "lr"),
        (lambda: descend(draw(1), draw(2), lr=0.1, clip_norm=-1.0), "clip_norm"),
    ],
)
def test_bad_input(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        call()
