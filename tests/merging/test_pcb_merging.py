"""PCB-Merging against the numbers of the definition, a version written with sorts, and what must hold for any task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise
from equipoise.errors import ArgumentError
from equipoise.merging import selection
from equipoise.merging.pcb_merging import (
    FORMS,
    INTERS,
    PCBMerging,
    PCBResult,
    pcb_merge,
    pcb_merge_state_dicts,
    search_coefficients,
    task_arithmetic,
    task_vector,
    ties_merge,
)
from equipoise.testing import TinyNetwork, check_method, classification

BY_HAND = torch.tensor([[1.0, -2, 3, 0, 4], [2, 2, -1, 1, 0]])
WAYS = [("sum", "tanh"), ("normalized_sum", "tanh"), ("pairwise", "tanh"), ("sum", "softmax")]


def vectors(n: int = 3, d: int = 400, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def minmax(rows: Tensor) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return torch.where(high > low, (rows - low) / (high - low), torch.zeros_like(rows))


def reference(
    tau: Tensor, ratio: float, lam: Tensor, clip: float, inter: str, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with whole matrices and sorts."""
    n, d = tau.shape
    place = min(int(d * (1 - ratio)), d - 1)
    if form == "softmax":
        intra = torch.softmax(n * minmax(tau**2), 1)
        agreement = sum(torch.softmax(minmax(tau * other), 1) for other in tau)
        beta = intra * agreement
        scale, clipped = torch.where(beta >= beta.sort(1).values[:, place, None], beta, 0.0), tau
    else:
        magnitudes = tau.abs()
        order = magnitudes.sort(1).values
        low, high = order[:, int(d * clip), None], order[:, int(d * (1 - clip) - 1), None]
        a = torch.minimum(torch.maximum(magnitudes, low), high)
        clipped, z = tau.sign() * a, tau.sign() * minmax(a)
        intra = torch.exp(n * minmax(a) ** 2)
        agreement = {
            "sum": torch.tanh(tau * tau.sum(0)),
            "normalized_sum": torch.tanh(tau * z.sum(0)),
            "pairwise": sum(torch.tanh(z * other) for other in z),
        }[inter]
        score = intra * agreement
        scale = minmax(torch.maximum(score, score.sort(1).values[:, place, None]))
    total = scale.sum(0)
    weighted = (lam.reshape(-1, 1) * scale * clipped).sum(0)
    return torch.where(total > 0, weighted / total, 0.0), scale, clipped


# -- the oracles ------------------------------------------------------------------------------------------------------
def test_oracle_1_the_tanh_form_by_hand() -> None:
    found = pcb_merge(BY_HAND, ratio=0.4, clip=0.0)
    assert found.scale.tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert found.merged.tolist() == [2, 0, 0, 0, 4]
    assert torch.equal(found.clipped, BY_HAND)
    # The published numbers of the two factors, which the result no longer shows, are the reference's.
    intra = torch.exp(2 * minmax(BY_HAND.abs()) ** 2)
    by_hand = [[1.133148, 1.648721, 3.080217, 1, 7.389056], [7.389056, 7.389056, 1.648721, 1.648721, 1]]
    torch.testing.assert_close(intra, torch.tensor(by_hand), atol=1e-6, rtol=0)


def test_oracle_2_the_softmax_form_by_hand() -> None:
    found = pcb_merge(BY_HAND, ratio=0.4, form="softmax")
    expected = torch.zeros(2, 5)
    expected[0, 2], expected[0, 4], expected[1, 0], expected[1, 1] = 0.077528, 0.295010, 0.236654, 0.160976
    torch.testing.assert_close(found.scale, expected, atol=1e-6, rtol=0)
    assert found.merged.tolist() == pytest.approx([2, 2, 3, 0, 4], abs=1e-6)
    assert torch.equal(found.clipped, BY_HAND)


@pytest.mark.parametrize("inter", INTERS)
def test_oracle_3_identical_task_vectors(inter: str) -> None:
    tau = vectors(1).expand(3, -1)
    found = pcb_merge(tau, coefficients=1.7, inter=inter, clip=0.01)
    assert torch.equal(found.scale[0], found.scale[1]) and torch.equal(found.scale[0], found.scale[2])
    expected = torch.where(found.scale[0] > 0, 1.7 * found.clipped[0], 0)
    torch.testing.assert_close(found.merged, expected)


@pytest.mark.parametrize(("inter", "form"), WAYS)
def test_oracle_4_permutations_and_coefficients(inter: str, form: str) -> None:
    tau, ways = vectors(), {"inter": inter, "form": form, "ratio": 0.3}
    found = pcb_merge(tau, **ways)
    tasks, entries = torch.tensor([2, 0, 1]), torch.randperm(400, generator=torch.Generator().manual_seed(1))
    turned = pcb_merge(tau[tasks], **ways)
    torch.testing.assert_close(turned.scale, found.scale[tasks])
    torch.testing.assert_close(turned.merged, found.merged)
    moved = pcb_merge(tau[:, entries], **ways)
    torch.testing.assert_close(moved.merged, found.merged[entries])
    torch.testing.assert_close(pcb_merge(tau, coefficients=2.5, **ways).merged, 2.5 * found.merged)
    torch.testing.assert_close(pcb_merge(tau, coefficients=torch.full((3,), 2.5), **ways).merged, 2.5 * found.merged)


@pytest.mark.parametrize("inter", INTERS)
def test_oracle_5_scales_and_merged_entries_are_bounded(inter: str) -> None:
    lam = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = pcb_merge(vectors(), coefficients=lam, inter=inter, ratio=0.4)
    assert found.scale.amin() >= 0 and torch.equal(found.scale.amax(1), torch.ones(3, dtype=torch.float64))
    values = lam[:, None] * found.clipped
    low = torch.where(found.scale > 0, values, math.inf).amin(0)
    high = torch.where(found.scale > 0, values, -math.inf).amax(0)
    some = (found.scale > 0).any(0)
    assert (found.merged[some] >= low[some] - 1e-12).all() and (found.merged[some] <= high[some] + 1e-12).all()
    assert (found.merged[~some] == 0).all() and (~some).any()


@pytest.mark.parametrize(("inter", "form"), WAYS)
def test_oracle_6_the_sign_of_all_task_vectors(inter: str, form: str) -> None:
    tau = vectors()
    found, turned = (pcb_merge(t, inter=inter, form=form) for t in (tau, -tau))
    torch.testing.assert_close(turned.merged, -found.merged)
    torch.testing.assert_close(turned.scale, found.scale)


@pytest.mark.parametrize("inter", INTERS)
def test_oracle_7_a_zero_task_vector(inter: str) -> None:
    tau = torch.cat([vectors(), torch.zeros(1, 400, dtype=torch.float64)])
    found = pcb_merge(tau, inter=inter)
    assert (found.scale[3] == 0).all() and found.merged.isfinite().all()
    assert torch.count_nonzero(found.merged) > 0
    assert (pcb_merge(torch.zeros(2, 5), inter=inter).merged == 0).all()


def test_oracle_7_a_zero_task_vector_in_the_softmax_form() -> None:
    assert pcb_merge(torch.cat([vectors(), torch.zeros(1, 400)]), form="softmax").merged.isfinite().all()
    assert (pcb_merge(torch.zeros(2, 5), form="softmax").merged == 0).all()


def test_oracle_8_one_task_kept_whole_and_the_baselines() -> None:
    tau = vectors(1)
    torch.testing.assert_close(pcb_merge(tau, form="softmax", ratio=1.0).merged, tau[0])
    tau = vectors(4)
    torch.testing.assert_close(task_arithmetic(tau, 1 / 4), tau.mean(0))
    torch.testing.assert_close(ties_merge(tau.abs(), ratio=1.0), tau.abs().mean(0))
    torch.testing.assert_close(ties_merge(-tau.abs(), ratio=1.0), -tau.abs().mean(0))


# -- against the definition -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("inter", "form"), WAYS)
@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 1e-4), (0.4, 0.01), (1.0, 0.0), (0.005, 0.2)])
def test_it_is_the_definition(inter: str, form: str, ratio: float, clip: float) -> None:
    tau, lam = vectors(4, 997, scale=0.5), torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    found = pcb_merge(tau, ratio=ratio, coefficients=lam, clip=clip, inter=inter, form=form)
    merged, scale, clipped = reference(tau, ratio, lam, clip, inter, form)
    torch.testing.assert_close(found.scale, scale, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.clipped, clipped)
    torch.testing.assert_close(found.merged, merged, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("inter", "form"), WAYS)
@pytest.mark.parametrize("d", [2, 3, 4])
def test_few_entries(inter: str, form: str, d: int) -> None:
    tau = vectors(2, d)
    found = pcb_merge(tau, ratio=0.5, clip=0.45, inter=inter, form=form)
    merged, scale, _ = reference(tau, 0.5, torch.ones((), dtype=torch.float64), 0.45, inter, form)
    torch.testing.assert_close(found.scale, scale)
    torch.testing.assert_close(found.merged, merged)


def test_so_many_entries_of_each_task_are_positive() -> None:
    d, ratio = 1_000, 0.3
    found = pcb_merge(vectors(3, d), ratio=ratio)
    assert (found.scale > 0).sum(1).tolist() == [d - int(d * (1 - ratio)) - 1] * 3


def test_conflicts_are_kept_where_too_few_scores_are_positive() -> None:
    tau = torch.tensor([[1.0, 2, 3, 4], [-3, -6, -9, -12]])
    found = pcb_merge(tau, ratio=0.75, clip=0.0)
    assert (found.scale[0] > 0).sum() == 2  # all scores of the first task are negative


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = vectors(3, 1_000).float()
    whole = pcb_merge(tau)
    monkeypatch.setattr(selection, "BLOCK", 64)
    assert torch.equal(pcb_merge(tau).merged, whole.merged)


def test_inputs_stay_and_dtype_and_graph_do_not_matter() -> None:
    tau = vectors().float().requires_grad_()
    before = tau.detach().clone()
    found = pcb_merge(tau)
    assert torch.equal(tau, before) and not found.merged.requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        half = tau.detach().to(dtype)
        low, exact = pcb_merge(half), pcb_merge(half.double())
        assert {low.merged.dtype, low.scale.dtype, low.clipped.dtype} == {dtype}
        torch.testing.assert_close(low.merged.double(), exact.merged, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("inter", ["normalized_sum", "pairwise"])
def test_the_scaled_variants_hardly_see_the_size_of_the_task_vectors(inter: str) -> None:
    tau = vectors(3, 200)
    if inter == "pairwise":
        torch.testing.assert_close(pcb_merge(1e3 * tau, inter=inter).scale, pcb_merge(tau, inter=inter).scale)
    small = pcb_merge(1e-3 * tau, inter=inter)
    torch.testing.assert_close(pcb_merge(1e-6 * tau, inter=inter).scale, small.scale, atol=1e-5, rtol=1e-4)


def test_many_tasks_and_extreme_sizes_stay_finite() -> None:
    for tau in (vectors(200, 50).float(), vectors(3, 50, scale=1e15).float(), vectors(3, 50, scale=1e-15).float()):
        for inter, form in WAYS:
            assert pcb_merge(tau, inter=inter, form=form).merged.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_vectors": torch.zeros(0, 4)}, "at least 1 model"),
        ({"task_vectors": torch.zeros(2, 1)}, "2 entries"),
        ({"task_vectors": torch.zeros(4)}, "one row a model"),
        ({"task_vectors": torch.zeros(2, 4, dtype=torch.int64)}, "floating-point"),
        ({"task_vectors": torch.tensor([[1.0, 2], [math.nan, 1]])}, r"task_vectors\[1\] holds NaN"),
        ({"task_vectors": torch.tensor([[math.inf, 2], [0, 1]])}, r"task_vectors\[0\] holds NaN or infinite"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.1}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"clip": 0.5}, "clip"),
        ({"clip": -0.1}, "clip"),
        ({"coefficients": torch.ones(3)}, "coefficients.*2 numbers"),
        ({"coefficients": torch.ones(2, 2)}, "coefficients"),
        ({"coefficients": math.inf}, "coefficients.*finite"),
        ({"coefficients": (1.0, math.nan)}, "coefficients.*finite"),
        ({"coefficients": "text"}, "coefficients"),
        ({"inter": "summ"}, "Did you mean 'sum'"),
        ({"form": "exp"}, "form"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"task_vectors": BY_HAND, **change}
    with pytest.raises(ValueError, match=words):
        pcb_merge(arguments.pop("task_vectors"), **arguments)


# -- state_dicts ------------------------------------------------------------------------------------------------------
def states(n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = TinyNetwork(norm=True, seed=9).to(dtype).state_dict()
    tuned = [
        {
            k: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(10 * i + j)).to(dtype)
            if v.is_floating_point()
            else v + i + 1
            for j, (k, v) in enumerate(base.items())
        }
        for i in range(n)
    ]
    return base, tuned


@pytest.mark.parametrize(("inter", "form"), WAYS)
def test_state_dicts_are_one_vector_of_sorted_keys(inter: str, form: str) -> None:
    base, tuned = states()
    lam = (0.5, 1.0, 1.5)
    found = pcb_merge_state_dicts(base, tuned, ratio=0.3, coefficients=lam, inter=inter, form=form)
    vector = pcb_merge(
        torch.stack([task_vector(base, state) for state in tuned]),
        ratio=0.3,
        coefficients=torch.tensor(lam),
        inter=inter,
        form=form,
    ).merged
    names = sorted(k for k, v in base.items() if v.is_floating_point())
    expected = torch.cat([base[name].flatten() for name in names]) + vector
    assert torch.equal(torch.cat([found[name].flatten() for name in names]), expected)
    assert list(found) == list(base)
    TinyNetwork(norm=True).load_state_dict(found)


def test_integer_buffers_and_excluded_names_are_the_bases() -> None:
    base, tuned = states()
    found = pcb_merge_state_dicts(base, tuned, exclude=["head"])
    for name in ("norm.num_batches_tracked", "head.weight", "head.bias"):
        assert torch.equal(found[name], base[name]) and found[name].data_ptr() != base[name].data_ptr()
    assert not torch.equal(found["body.weight"], base["body.weight"])
    by_function = pcb_merge_state_dicts(base, tuned, exclude=lambda name: name.startswith("head."))
    by_pattern = pcb_merge_state_dicts(base, tuned, exclude=["he*.weight", "head.bias"])
    for name, tensor in found.items():
        assert torch.equal(tensor, by_function[name]) and torch.equal(tensor, by_pattern[name])
    assert task_vector(base, tuned[0], exclude=["head", "norm"]).shape == (8 * 6 + 8,)


def test_excluded_heads_may_differ_in_shape() -> None:
    base, tuned = states()
    tuned[1]["head.weight"] = torch.zeros(7, 8)
    del tuned[0]["head.bias"]
    assert torch.equal(pcb_merge_state_dicts(base, tuned, exclude=["head"])["head.weight"], base["head.weight"])


def test_tied_tensors_count_once_and_stay_tied() -> None:
    base, tuned = states()
    tied = lambda state: {**state, "decoder.weight": state["body.weight"]}  # noqa: E731
    found = pcb_merge_state_dicts(tied(base), [tied(state) for state in tuned])
    plain = pcb_merge_state_dicts(base, tuned)
    assert found["decoder.weight"] is found["body.weight"]
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    assert len(task_vector(tied(base), tied(tuned[0]))) == len(task_vector(base, tuned[0]))
    untied = [tied(state) for state in tuned]
    untied[1]["decoder.weight"] = untied[1]["decoder.weight"] + 1
    with pytest.raises(ArgumentError, match=r"finetuned\[1\]: decoder.weight is no longer tied to body.weight"):
        pcb_merge_state_dicts(tied(base), untied)
    copies = [{**tied(state), "decoder.weight": state["body.weight"].clone()} for state in tuned]
    assert torch.equal(pcb_merge_state_dicts(tied(base), copies)["body.weight"], plain["body.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay_and_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    base, tuned = states(dtype=dtype)
    found = pcb_merge_state_dicts(base, tuned)
    assert all(found[name].dtype == tensor.dtype for name, tensor in base.items())
    wide = lambda state: {k: v.float() if v.is_floating_point() else v for k, v in state.items()}  # noqa: E731
    assert task_vector(base, tuned[0]).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:
        exact = pcb_merge_state_dicts(wide(base), [wide(state) for state in tuned])
        assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in exact.items())


def test_inputs_are_not_modified() -> None:
    base, tuned = states()
    before = [{k: v.clone() for k, v in state.items()} for state in (base, *tuned)]
    pcb_merge_state_dicts(base, tuned)
    for state, old in zip((base, *tuned), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in old.items())


def _break(change: Callable[[dict[str, Tensor]], object]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base, tuned = states()
    change(tuned[1])
    return base, tuned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("body.bias"), r"finetuned\[1\]: lacks body.bias: must have the base's architecture"),
        (lambda s: s.update(other=torch.ones(2)), r"finetuned\[1\]: has beside the base's tensors other"),
        (lambda s: s.update({"body.bias": torch.ones(9)}), r"body.bias has shape \(9,\), and \(8,\) in the base"),
        (lambda s: s["body.weight"].view(-1)[3].fill_(math.nan), r"finetuned\[1\]: body.weight holds NaN"),
        (lambda s: s["body.weight"].view(-1)[3].fill_(math.inf), r"finetuned\[1\]: body.weight holds NaN or inf"),
    ],
)
def test_models_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    base, tuned = _break(change)
    with pytest.raises(ValueError, match=words):
        pcb_merge_state_dicts(base, tuned)


def test_other_bad_models_are_refused() -> None:
    base, tuned = states()
    with pytest.raises(ValueError, match="at least 1 model"):
        pcb_merge_state_dicts(base, [])
    with pytest.raises(ValueError, match="must be a list"):
        pcb_merge_state_dicts(base, tuned[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leaves no floating-point tensor"):
        pcb_merge_state_dicts(base, tuned, exclude=["*"])
    with pytest.raises(ValueError, match=r"exclude = 'haed'.*Did you mean 'head'"):
        pcb_merge_state_dicts(base, tuned, exclude=["haed"])
    with pytest.raises(ValueError, match="at least 2"):
        pcb_merge_state_dicts({"a": torch.ones(1)}, [{"a": torch.zeros(1)}])
    embedding = {"embed_tokens.weight": torch.zeros(10, 4)}
    with pytest.raises(ValueError, match=r"another vocabulary .12 tokens against 10., so another tokenizer"):
        pcb_merge_state_dicts(embedding, [{"embed_tokens.weight": torch.zeros(12, 4)}])


# -- the search -------------------------------------------------------------------------------------------------------
def test_the_search_finds_the_coefficients_of_a_known_optimum() -> None:
    result = pcb_merge(vectors(3, 300), ratio=0.5)
    wanted = torch.tensor([0.9, 1.2, 1.05], dtype=torch.float64)
    goal = (wanted @ (result.scale / result.scale.sum(0).clamp(min=1e-300) * result.clipped)).detach()
    calls = []

    def evaluate(merged: Tensor) -> float:
        calls.append(1)
        return -float((merged - goal).square().sum())

    found, score = search_coefficients(result, evaluate, budget=300)
    assert len(calls) == 300 and found.shape == (3,)
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)
    assert score == max(score, evaluate(result.merged))
    again, _ = search_coefficients(result, evaluate, budget=300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, found)


def test_the_search_stays_in_its_bounds_and_needs_a_score() -> None:
    result = pcb_merge(vectors(), ratio=0.5)
    found, _ = search_coefficients(result, lambda merged: float(merged.norm()), bounds=(0.8, 1.3))
    assert (found >= 0.8).all() and (found <= 1.3).all() and found.max() == pytest.approx(1.3)
    one, score = search_coefficients(result, lambda merged: 7.0, budget=1)
    assert one.tolist() == [1, 1, 1] and score == 7.0
    merged: list[Tensor] = []
    search_coefficients(result, lambda m: merged.append(m) or 0.0, budget=1)  # type: ignore[func-returns-value]
    torch.testing.assert_close(merged[0], result.merged)
    with pytest.raises(ValueError, match="evaluate"):
        search_coefficients(result, lambda merged: math.nan, budget=3)
    for change in ({"bounds": (1.3, 0.8)}, {"init": 2.0}, {"budget": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            search_coefficients(result, lambda merged: 0.0, **change)


# -- the method -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_the_method_satisfies_the_kit(form: str) -> None:
    check_method(PCBMerging, settings={"form": form})


def start(method: PCBMerging, model: nn.Module) -> equipoise.Run:
    return equipoise.start(model, torch.optim.SGD(model.parameters(), lr=0.1), methods=[method])


def test_the_method_merges_the_sources_of_a_run() -> None:
    base, tuned = states()
    model = TinyNetwork(norm=True, seed=9)
    run = start(PCBMerging(ratio=0.3, coefficients=1.2, exclude=("head",)), model)
    run.merge_sources = tuned  # type: ignore[attr-defined]
    merged = run.finish()
    expected = pcb_merge_state_dicts(base, tuned, ratio=0.3, coefficients=1.2, exclude=["head"])
    assert merged is model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_the_method_merges_what_the_run_trained_with_the_sources() -> None:
    problem = classification().with_norm()
    base = problem.network().state_dict()
    trained = problem.train().model.state_dict()
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in base.items()}
    method = PCBMerging(ratio=0.5, exclude=("head",))
    run = problem.train([method], on_epoch_end=lambda run: setattr(run, "merge_sources", [other]))
    expected = pcb_merge_state_dicts(base, [other, trained], ratio=0.5, exclude=["head"])
    found = run.model.state_dict()
    for name in found:
        kept = name.startswith("head") or not found[name].is_floating_point()
        assert torch.equal(found[name], (trained if kept else expected)[name]), name


def test_the_method_refuses_a_run_with_nothing_to_merge() -> None:
    with pytest.raises(ArgumentError, match=r"run\.merge_sources: pcb-merging has nothing to merge"):
        start(PCBMerging(), TinyNetwork()).finish()
    for bad in ({"ratio": 2.0}, {"clip": 0.7}, {"inter": "all"}, {"form": "x"}, {"coefficients": math.nan}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            PCBMerging(**bad)


def test_the_result_is_a_record() -> None:
    found = pcb_merge(BY_HAND)
    assert isinstance(found, PCBResult) and found.merged.shape == (5,) and found.scale.shape == (2, 5)
