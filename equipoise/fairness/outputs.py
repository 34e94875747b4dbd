"""What the fairness methods read from a run: predictions on the output scale, and protected attributes of a batch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, DataError
from equipoise.training.assemble import LossFunction
from equipoise.training.batch import Batch, Examples
from equipoise.training.losses import precise
from equipoise.training.run import Run

SCALES = ("auto", "sigmoid", "softmax", "exp", "identity")
PREFIX = "protected"


def on_output_scale(output: Tensor, targets: Tensor, scale: str, loss: LossFunction) -> Tensor:
    """Probabilities, rates or values (N,) or (N, k) from a model's output, in float32 at least.

    scale: see ``CCdCov``. "auto" goes by the loss, where it is one of torch's, else by the targets: integers are classes.
    """
    output = precise(output)
    if scale == "auto":
        scale = _scale(output, targets, loss)
    if scale == "softmax":
        return output.softmax(1)
    if scale == "identity":
        return output
    return output.sigmoid() if scale == "sigmoid" else output.exp()


def _scale(output: Tensor, targets: Tensor, loss: LossFunction) -> str:
    if loss is F.poisson_nll_loss or (isinstance(loss, nn.PoissonNLLLoss) and loss.log_input):
        return "exp"
    if loss is F.binary_cross_entropy_with_logits or isinstance(loss, nn.BCEWithLogitsLoss):
        return "sigmoid"
    classes = not targets.is_floating_point() or loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    if not classes:
        return "identity"
    return "sigmoid" if output.ndim == 1 or output.shape[1] == 1 else "softmax"


def binary_cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of one logit, (N,) or (N, 1), and classes (N,) in {0, 1}."""
    return F.binary_cross_entropy_with_logits(output.reshape(-1), targets.to(output.dtype))


def per_example_loss(output: Tensor, targets: Tensor, loss: LossFunction) -> Tensor:
    """The task's loss of each example (N,): cross-entropy of classes (binary for one logit), squared error of values."""
    output = precise(output)
    if not targets.is_floating_point() and targets.ndim == 1:
        if output.ndim == 1 or output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output.reshape(-1), targets.to(output.dtype), reduction="none")
        return F.cross_entropy(output, targets, reduction="none")
    if loss is F.mse_loss or isinstance(loss, nn.MSELoss):
        return (output - targets).square().flatten(1).mean(1) if output.ndim > 1 else (output - targets).square()
    raise ArgumentError(
        f"loss = {getattr(loss, '__name__', type(loss).__name__)}: must be cross-entropy of integer classes or torch's mse_loss: "
        "weights of examples need the loss of each"
    )


def protected_of(batch: Batch, method: str) -> list[Tensor]:
    """The encoded protected attributes of a batch, each (N,) or (N, p): its extras whose names begin with ``protected``."""
    found = [extra for name, extra in sorted(batch.extras.items()) if name.startswith(PREFIX)]
    if not found:
        _refuse_missing(method, sorted(batch.extras))
    return found


def check_protected(run: Run, method: str) -> None:
    """Refuse training data without a protected attribute, or with one that is constant."""
    if not isinstance(run.data, Examples):
        return  # another Dataset shows its extras batch by batch
    found = {name: extra for name, extra in run.data.extras.items() if name.startswith(PREFIX)}
    if not found:
        _refuse_missing(method, sorted(run.data.extras))
    for name, extra in found.items():
        if bool((extra == extra[0]).all()):
            raise DataError(
                f"{name} is the same in all {len(extra)} training examples: a constant protected attribute has no groups to "
                "compare. Leave it out"
            )


def _refuse_missing(method: str, extras: list[str]) -> None:
    raise ArgumentError(
        f"batch.extras = {extras}: {method} needs the protected attributes, as extras whose names begin with {PREFIX!r}. "
        "Give them with the data: equipoise.Examples(inputs, targets, protected_sex=..., protected_age=...), encoded by "
        "equipoise.fairness.ProtectedEncoder"
    )
