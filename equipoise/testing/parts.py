"""``check_loss``, ``check_regularizer`` and ``check_layer``: the kit for plain PyTorch parts, without a run.

    from equipoise.testing import check_loss

    print(check_loss(my_loss))
    check_loss(ELRLoss(20, 4).eval(), lambda g: (torch.randn(6, 4, generator=g), torch.arange(6) % 4, torch.arange(6)))

A part is checked on arguments that a function of a ``torch.Generator`` makes, small and in float32; the kit converts
them. Modules are checked in the mode in which they are given, and copied before every call, so that state which a call
changes does no harm. Where such state depends on the arguments (a table of averages), hand the module over in ``eval()``.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from equipoise.testing.compare import difference, snapshot
from equipoise.testing.method import run_check
from equipoise.testing.report import Report, check_names, fail, skip
from equipoise.testing.subject import isolated

Arguments = Callable[[torch.Generator], tuple[Any, ...]]
LOSS_CHECKS = {
    "arguments-unchanged": "The call writes to none of its arguments.",
    "reduction": '"none" gives one value per row; "mean" and "sum" are its mean and sum.',
    "rows": "Permuting the rows of all arguments permutes the losses of the rows, and changes neither mean nor sum.",
    "gradient": "Automatic derivatives equal numerical ones in float64 (gradcheck).",
    "dtype": "float32 gives float32 and float64 gives float64, on the arguments' device, and close values.",
    "bf16": "bfloat16 arguments give a finite loss near that of float64.",
    "extreme": "Values of 1e4 in the differentiable arguments give finite losses and gradients.",
    "shapes": "Arguments with unequal numbers of rows raise a ValueError (ArgumentError).",
}
REGULARIZER_CHECKS = {
    "arguments-unchanged": LOSS_CHECKS["arguments-unchanged"],
    "scalar": "The result is a finite scalar, the same twice.",
    "gradient": LOSS_CHECKS["gradient"],
    "dtype": LOSS_CHECKS["dtype"],
    "bf16": LOSS_CHECKS["bf16"],
    "extreme": LOSS_CHECKS["extreme"],
}
LAYER_CHECKS = {
    "arguments-unchanged": LOSS_CHECKS["arguments-unchanged"],
    "shape": "The output has the shape announced; in evaluation mode for a batch of one too.",
    "gradient": "Derivatives by inputs and parameters equal numerical ones in float64, in evaluation mode (gradcheck).",
    "evaluation": "In evaluation mode the output is the same twice, and no buffer changes; every submodule follows the mode.",
    "state-dict": "A fresh layer with the state loaded gives the same output.",
    "deepcopy": "A copy gives the same output and shares no memory.",
    "dtype": "The layer follows .double() and .bfloat16(), outputs included.",
}


def logits_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The default arguments: logits (6, 4) and integer labels (6,)."""
    return torch.randn(6, 4, generator=generator), torch.arange(6) % 4


def check_loss(
    loss: Callable[..., Tensor],
    arguments: Arguments = logits_and_labels,
    *,
    differentiable: Collection[int] = (0,),
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check a loss: a function with a ``reduction`` argument, or a module with a ``reduction`` attribute.

    arguments: makes the arguments; all tensors among them have one row per example.
    differentiable: positions of the arguments by which the loss has gradients.
    skip, only: as for ``check_method``; the names are the keys of ``LOSS_CHECKS``.

    Raises ``ConformanceError`` at the first check that fails; returns the report.
    """
    return _Part(loss, arguments, differentiable).check(LOSS_CHECKS, skip, only)


def check_regularizer(
    regularizer: Callable[..., Tensor],
    arguments: Arguments = lambda generator: (torch.randn(6, 4, generator=generator),),
    *,
    differentiable: Collection[int] = (0,),
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check a regularizer: a function or module that maps tensors to a scalar. As ``check_loss``, with ``REGULARIZER_CHECKS``."""
    return _Part(regularizer, arguments, differentiable).check(REGULARIZER_CHECKS, skip, only)


def check_layer(
    make: Callable[[], nn.Module],
    arguments: Arguments = lambda generator: (torch.randn(5, 6, generator=generator),),
    *,
    shape: tuple[int, ...] | None = None,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check a layer.

    make: makes the layer anew, for instance ``lambda: NestedDropout(6)``.
    arguments: makes its arguments; the first has one row per example.
    shape: of the output, without the rows; by default that of the first argument.
    skip, only: as for ``check_method``; the names are the keys of ``LAYER_CHECKS``.

    Raises ``ConformanceError`` at the first check that fails; returns the report.
    """
    return _Layer(make, arguments, shape).check(LAYER_CHECKS, skip, only)


class _Checked:
    """Runs the checks of a table, each a method of the same name."""

    label: str
    arguments: Arguments

    def check(self, table: Mapping[str, str], skips: Mapping[str, str] | None, only: Collection[str] | None) -> Report:
        check_names(skips or {}, only, table)
        report = Report(self.label)
        begin = time.perf_counter()
        for name in table:
            if only is not None and name not in only:
                continue
            if skips and name in skips:
                report.skipped[name] = skips[name]
                continue
            with isolated(0):
                run_check(report, name, getattr(self, name.replace("-", "_")))
        report.seconds = time.perf_counter() - begin
        return report

    def given(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        """The arguments, floating tensors in ``dtype``."""
        made = self.arguments(torch.Generator().manual_seed(1))
        return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in made]


class _Part(_Checked):
    """A loss or regularizer under test."""

    def __init__(self, part: Callable[..., Tensor], arguments: Arguments, differentiable: Collection[int]) -> None:
        self.part, self.arguments, self.differentiable = part, arguments, differentiable
        self.label = type(part).__name__ if isinstance(part, nn.Module) else getattr(part, "__name__", repr(part))
        if isinstance(part, nn.Module):
            self.reduces = hasattr(part, "reduction")
        else:
            self.reduces = "reduction" in inspect.signature(part).parameters

    def call(self, arguments: list[Any], reduction: str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        if not isinstance(self.part, nn.Module):
            return self.part(*arguments, **({} if reduction is None else {"reduction": reduction}))
        module = copy.deepcopy(self.part).to(dtype)
        if reduction is not None:
            module.reduction = reduction  # type: ignore[assignment]
        result: Tensor = module(*arguments)
        return result

    def arguments_unchanged(self) -> None:
        given = self.given()
        before = snapshot(given)
        self.call(given)
        if text := difference(before, given):
            fail(
                f"the call changes argument {text}", "Work on copies; in-place operations belong on tensors of your own"
            )

    def reduction(self) -> None:
        if not self.reduces:
            skip("it has no reduction")
        none, mean, total = (self.call(self.given(torch.float64), r, torch.float64) for r in ("none", "mean", "sum"))
        rows = len(self.given()[0])
        if none.shape != (rows,):
            fail(f'"none" gives shape {tuple(none.shape)}', f"It must give one value per row, ({rows},)")
        for name, seen, wanted in (("mean", mean, none.mean()), ("sum", total, none.sum())):
            if seen.ndim or difference(seen, wanted, 1e-9):
                fail(
                    f'"{name}" gives {seen.tolist()}, and the {name} of "none" is {float(wanted)}',
                    "Reduce in one place",
                )

    def rows(self) -> None:
        given = self.given(torch.float64)
        order = torch.arange(len(given[0])).flip(0)
        permuted = [a[order] if isinstance(a, Tensor) and a.ndim and len(a) == len(order) else a for a in given]
        for reduction in ("none", "mean", "sum") if self.reduces else (None,):
            one, two = (self.call(a, reduction, torch.float64) for a in (given, permuted))
            one = one[order] if reduction == "none" else one
            if text := difference(one, two, 1e-9):
                fail(f"with reduction {reduction!r} permuted rows give another loss: {text}", "Treat every row alike")

    def scalar(self) -> None:
        one, two = self.call(self.given()), self.call(self.given())
        if one.ndim or not bool(torch.isfinite(one)):
            fail(f"the result is {one.tolist()}", "Return one finite number, for instance the mean over the rows")
        if difference(one, two):
            fail(f"two calls give {float(one)} and {float(two)}", "Take randomness as an argument: a torch.Generator")

    def gradient(self) -> None:
        given = self.given(torch.float64)
        leaves = [given[i].requires_grad_() for i in sorted(self.differentiable)]

        def function(*values: Tensor) -> Tensor:
            full = list(given)
            for i, value in zip(sorted(self.differentiable), values, strict=True):
                full[i] = value
            return self.call(full, None, torch.float64)

        _gradcheck(function, leaves)

    def dtype(self) -> None:
        values = {}
        for dtype in (torch.float32, torch.float64):
            result = self.call(self.given(dtype), None, dtype)
            if result.dtype != dtype or result.device != self.given()[0].device:
                fail(
                    f"{dtype} arguments give {result.dtype} on {result.device}",
                    "Make tensors with dtype and device of the input's",
                )
            values[dtype] = result.detach().double()
        if text := difference(values[torch.float32], values[torch.float64], 1e-4):
            fail(
                f"float32 and float64 disagree: {text}",
                "Use log_softmax, log1p, expm1, logsumexp instead of their parts",
            )

    def bf16(self) -> None:
        # Both from values that bfloat16 holds exactly, so that only the computation is compared.
        rounded = [a.to(torch.bfloat16) if _floating(a) else a for a in self.given()]
        exact = [a.double() if _floating(a) else a for a in rounded]
        low = self.call(rounded, None, torch.bfloat16).detach().double()
        if not bool(torch.isfinite(low).all()):
            fail("bfloat16 arguments give a loss that is not finite", "Compute in float32 where the input is narrower")
        if text := difference(low, self.call(exact, None, torch.float64).detach(), 0.03):
            fail(f"bfloat16 and float64 disagree: {text}", "Compute in float32 where the input is narrower")

    def extreme(self) -> None:
        for factor in (1e4, -1e4, 0.0):
            given = self.given()
            for i in self.differentiable:
                given[i] = (torch.sign(given[i]) * factor).requires_grad_()
            result = self.call(given)
            gradients = torch.autograd.grad(result.sum(), [given[i] for i in self.differentiable])
            if not all(bool(torch.isfinite(t).all()) for t in (result, *gradients)):
                fail(
                    f"values of {factor:g} give a loss or gradient that is not finite",
                    "Clamp inside logarithms; take log_softmax instead of log(softmax)",
                )

    def shapes(self) -> None:
        given = self.given()
        wide = [i for i, a in enumerate(given) if isinstance(a, Tensor) and a.ndim and len(a) == len(given[0])]
        if len(wide) < 2:
            skip("there is one argument with rows")
        for i in wide[1:]:
            short = [a[:-1] if j == i else a for j, a in enumerate(given)]
            try:
                self.call(short)
            except ValueError:
                continue
            except Exception as error:
                seen = f"raises {type(error).__name__}: {error}"
            else:
                seen = "is accepted"
            fail(
                f"argument {i} with a row less {seen}", "Compare shapes first, and raise equipoise.errors.ArgumentError"
            )


class _Layer(_Checked):
    """A layer under test."""

    def __init__(self, make: Callable[[], nn.Module], arguments: Arguments, shape: tuple[int, ...] | None) -> None:
        self.make, self.arguments, self.wanted = make, arguments, shape
        with isolated(0):
            self.label = type(make()).__name__

    def arguments_unchanged(self) -> None:
        layer, given = self.make(), self.given()
        before = snapshot(given)
        layer(*given)
        if text := difference(before, given):
            fail(f"the call changes argument {text}", "Work on a copy")

    def shape(self) -> None:
        for rows, training in ((None, True), (None, False), (1, False)):
            given = [a[:rows] if isinstance(a, Tensor) and a.ndim else a for a in self.given()]
            wanted = tuple(given[0].shape) if self.wanted is None else (len(given[0]), *self.wanted)
            result = self.make().train(training)(*given)
            if tuple(result.shape) != wanted:
                fail(f"input {tuple(given[0].shape)} gives {tuple(result.shape)}", f"It must give {wanted}")

    def gradient(self) -> None:
        layer = self.make().double().eval()
        given = self.given(torch.float64)
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        inputs = [i for i, a in enumerate(given) if _floating(a)]
        leaves = [given[i].requires_grad_() for i in inputs]
        leaves += [p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad]

        def function(*values: Tensor) -> Tensor:
            full = list(given)
            for i, value in zip(inputs, values, strict=False):
                full[i] = value
            weights = dict(zip(names, values[len(inputs) :], strict=True))
            result: Tensor = torch.func.functional_call(layer, weights, tuple(full))
            return result

        _gradcheck(function, leaves)

    def evaluation(self) -> None:
        layer = self.make().eval()
        if any(module.training for module in layer.modules()):
            fail("a submodule stays in training mode after eval()", "Keep submodules as attributes or in ModuleList")
        before = snapshot(dict(layer.state_dict()))
        one, two = layer(*self.given()), layer(*self.given())
        if text := difference(before, snapshot(dict(layer.state_dict()))):
            fail(f"a call in evaluation mode changes the state: {text}", "Update buffers where self.training only")
        if text := difference(one, two):
            fail(f"two calls in evaluation mode differ: {text}", "Draw no random numbers where not self.training")
        if not all(module.training for module in layer.train().modules()):
            fail("a submodule stays in evaluation mode after train()", "Do not override train, or pass the mode on")

    def state_dict(self) -> None:
        first = self.make()
        for tensor in first.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.9)
        second = self.make()
        second.load_state_dict(snapshot(dict(first.state_dict())))
        if text := difference(first.eval()(*self.given()), second.eval()(*self.given())):
            fail(
                f"after load_state_dict the output differs: {text}",
                "Keep everything that matters in parameters and buffers",
            )

    def deepcopy(self) -> None:
        layer = self.make().eval()
        layer(*self.given())
        copied = copy.deepcopy(layer)
        if text := difference(layer(*self.given()), copied(*self.given())):
            fail(f"a deep copy gives another output: {text}", "Keep state in parameters and buffers")
        theirs = {t.data_ptr() for t in copied.state_dict().values() if t.numel()}
        if any(t.numel() and t.data_ptr() in theirs for t in layer.state_dict().values()):
            fail("a deep copy shares memory with the layer", "Do not override __deepcopy__ without copying tensors")

    def dtype(self) -> None:
        for dtype in (torch.float64, torch.bfloat16):
            result = self.make().to(dtype)(*self.given(dtype))
            if result.dtype != dtype or not bool(torch.isfinite(result).all()):
                fail(
                    f"a {dtype} layer gives {result.dtype}, or values that are not finite",
                    "Make tensors in the input's dtype",
                )


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradcheck(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    if not leaves:
        skip("nothing to differentiate by")
    try:
        torch.autograd.gradcheck(function, leaves, atol=1e-6, rtol=1e-4)
    except GradcheckError as error:
        text = str(error).strip().replace("\n", " ")
        fail(f"gradcheck says: {text[:300]}", "Look for detach, in-place changes, or a gradient written by hand")
