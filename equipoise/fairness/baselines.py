"""What a practitioner tries first: nothing, weights for the training examples, or fairlearn's reductions.

A penalty must beat these, tuned as carefully as itself. For groups s (the cells of all protected attributes, continuous ones
binned) and labels y, with shares P over the training examples,

    unconstrained   the task's loss
    reweighing      the mean of  (P(s) P(y) / P(s, y))^strength  times the loss of each example
    reductions      a mixture of classifiers, each trained with other weights and labels, that plays against the constraints

Weighted so, group and label are independent in the training data, and a model that fits them has no reason to tell the groups
apart. The reductions solve  min over mixtures of the error  s.t.  |P(positive | s) - P(positive)| <= bound  for each group, by
exponentiated gradient: a player that raises the price of violated constraints against one that retrains the classifier.

## When to use
Reweighing always: it has one setting and costs nothing. The reductions for decisions in two classes where a stated bound has to
be met, and where shipping several models is no obstacle.

## When not
Reweighing where cells have a handful of examples, whose weights are noise; or where the model can tell the groups from its
inputs so well that it fits each of them, whatever the weights. The reductions for regression, for many classes, and where
training is dear.

## Cost
Reweighing: that of the loss. Reductions: two or three short trainings in each iteration, started from the trained model, and
one forward pass for each model of the mixture at inference.

## Source
Reweighing: Kamiran, Calders: Data preprocessing techniques for classification without discrimination. Knowledge and Information
Systems 2012. Reductions: Agarwal, Beygelzimer, Dudik, Langford, Wallach: A Reductions Approach to Fair Classification. ICML 2018,
arXiv:1803.02453, as in the library fairlearn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, DataError, MissingDependencyError, check_integer, check_range
from equipoise.fairness.outputs import per_example_loss
from equipoise.training.batch import Batch, Examples, Output
from equipoise.training.fit import fit
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform

GROUP = "group"
BINS = 4  # quantile bins that stand for the label in regression


# -- the functional core ----------------------------------------------------------------------------------------------
def reweighing_weights(groups: Tensor, labels: Tensor) -> Tensor:
    """``P(s) P(y) / P(s, y)`` for each pair that occurs, in a table (groups, labels); 0 for the others.

    groups, labels: (N,) int64 codes from 0. The weights of the N examples have mean 1.
    """
    for name, codes in (("groups", groups), ("labels", labels)):
        if codes.is_floating_point() or codes.ndim != 1 or not len(codes) or int(codes.min()) < 0:
            raise ArgumentError(
                f"{name} = {codes.dtype} {tuple(codes.shape)}: must be integer codes (N,) from 0, N >= 1"
            )
    if len(groups) != len(labels):
        raise ArgumentError(f"groups has {len(groups)} rows but labels has {len(labels)}: must be the same examples")
    rows, columns = int(groups.max()) + 1, int(labels.max()) + 1
    joint = torch.bincount(groups * columns + labels, minlength=rows * columns).view(rows, columns).double()
    expected = joint.sum(1, keepdim=True) * joint.sum(0) / len(groups)
    return torch.where(joint > 0, expected / joint.clamp(min=1), 0)


# -- the methods ------------------------------------------------------------------------------------------------------
class Unconstrained(Method):
    """The task's own loss and nothing else: the baseline.

    Has no hooks and no settings.
    """

    name = "unconstrained"
    neutral: ClassVar[Mapping[str, Any] | None] = {}


class Reweighing(Method):
    """Weigh training examples so that group and label are independent (Kamiran and Calders).

    strength: power of the weights, in [0, 1]; 0 is the baseline, 1 the paper's. Needs the extra ``group`` (N,) int64 with the
    training data; of values, four quantile bins are the label. Replaces the task's loss, which must be cross-entropy or mse_loss.
    """

    name = "reweighing"
    paper = Paper(
        "Data preprocessing techniques for classification without discrimination",
        "Kamiran, Calders",
        "Knowledge and Information Systems 2012",
        "https://doi.org/10.1007/s10115-011-0463-8",
    )
    space: ClassVar[Space] = {"strength": Uniform(0.2, 1.0)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}

    weights: Tensor
    edges: Tensor

    def __init__(self, strength: float = 1.0) -> None:
        check_range("strength", strength, 0, 1)
        self.strength = strength

    def prepare(self, run: Run) -> None:
        data = grouped(run, self.name)
        targets = data.targets.reshape(len(data), -1)
        if targets.shape[1] > 1:
            raise ArgumentError(
                f"targets = (N, {targets.shape[1]}): {self.name} needs one label or value for each example"
            )
        self.edges = targets.new_empty(0)
        if targets.is_floating_point():
            self.edges = targets.double().quantile(torch.arange(1, BINS).double() / BINS).to(targets)
        self.weights = (
            reweighing_weights(data.extras[GROUP], self._labels(data.targets)).to(run.device) ** self.strength
        )

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        each = per_example_loss(output.prediction, batch.targets, run.task_loss)
        return (each * self.weights[batch.extras[GROUP], self._labels(batch.targets)].to(each.dtype)).mean()

    def _labels(self, targets: Tensor) -> Tensor:
        if not targets.is_floating_point():
            return targets
        return torch.bucketize(targets.reshape(-1), self.edges.to(targets.device))


class FairlearnReductions(Method):
    """A mixture of classifiers under demographic-parity constraints, by fairlearn's exponentiated gradient.

    bound: largest deviation of a group's rate of positive decisions from the overall rate, in (0, 1). iterations: of the game,
    >= 1. epochs: of each retraining, which starts from the trained model, >= 1. Two classes; needs the extra ``group`` (N,)
    int64 and the package fairlearn (``pip install equipoise[peers]``). The finished model gives the weighted share of the
    mixture's decisions, as fairlearn does, as a logit; its sign is the majority's decision. There is no neutral setting: whatever
    the bound, the trained model is replaced by a mixture.
    """

    name = "fairlearn-reductions"
    paper = Paper(
        "A Reductions Approach to Fair Classification",
        "Agarwal, Beygelzimer, Dudik, Langford, Wallach",
        "ICML 2018",
        "https://arxiv.org/abs/1803.02453",
    )
    space: ClassVar[Space] = {"bound": LogUniform(0.01, 0.2)}

    def __init__(self, bound: float = 0.02, iterations: int = 6, epochs: int = 3) -> None:
        check_range("bound", bound, 0, 1, open_low=True, open_high=True)
        check_integer("iterations", iterations, 1)
        check_integer("epochs", epochs, 1)
        self.bound, self.iterations, self.epochs = bound, iterations, epochs

    def prepare(self, run: Run) -> None:
        if find_spec("fairlearn") is None:
            raise MissingDependencyError(
                "fairlearn-reductions needs the package fairlearn: pip install equipoise[peers] (or pip install fairlearn)"
            )
        data = grouped(run, self.name)
        if data.targets.is_floating_point() or run.num_classes != 2:
            raise ArgumentError(f"num_classes = {run.num_classes}: {self.name} needs two classes, as targets 0 and 1")

    def finish(self, run: Run) -> None:
        from fairlearn.reductions import DemographicParity, ExponentiatedGradient

        data = grouped(run, self.name)
        calls = 0

        def train(labels: np.ndarray, weights: np.ndarray) -> nn.Module:
            nonlocal calls
            calls += 1
            examples = Examples(
                data.inputs,
                torch.tensor(labels, dtype=torch.int64, device=data.targets.device),
                num_classes=2,
                weight=torch.tensor(weights, dtype=torch.float32, device=data.targets.device),
            )
            assert run.loader is not None  # grouped has checked the data
            return fit(
                copy.deepcopy(run.model),
                examples,
                epochs=self.epochs,
                batch_size=run.loader.batch_size,
                optimizer=lambda parameters: type(run.optimizer)(parameters, **_settings(run.optimizer)),
                methods=[_Weighted()],
                loss=run.task_loss,
                seed=run.seed + calls,
                mixed_precision=run.mixed_precision,
                accelerator=run.accelerator,
                on_epoch_end=lambda _: {},
            ).model

        def decide(model: nn.Module) -> np.ndarray:
            return (positive_logit(run.predict(data, model)[0]) > 0).cpu().numpy().astype(np.int64)

        game = ExponentiatedGradient(
            _Oracle(train, decide), DemographicParity(difference_bound=self.bound), max_iter=self.iterations
        )
        places = np.arange(len(data)).reshape(-1, 1)  # fairlearn sees positions only, so that inputs may be of any form
        game.fit(places, data.targets.cpu().numpy(), sensitive_features=data.extras[GROUP].cpu().numpy())
        used = {i: float(w) for i, w in game.weights_.items() if w > 0}
        models = [getattr(game.predictors_[i], "model", None) for i in used]
        always = [float(getattr(game.predictors_[i], "constant", 0) or 0) for i in used]
        columns = 1 if run.predict(data.subset([0]))[0][0].numel() == 1 else 2
        run.inference_model = run.model = Mixture(models, always, list(used.values()), columns).to(run.device)


class Mixture(nn.Module):
    """The weighted share of binary classifiers that decide for class 1, as one logit (N, 1), or two (N, 2).

    models: classifiers that return one logit or two; None for one that always decides as ``always`` says, 0 or 1.
    """

    weights: Tensor
    always: Tensor

    def __init__(
        self, models: Sequence[nn.Module | None], always: Sequence[float], weights: Sequence[float], columns: int
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(model for model in models if model is not None)
        present = [model is not None for model in models]
        total = sum(weights)
        self.columns = columns
        self.register_buffer("weights", torch.tensor([w / total for w, p in zip(weights, present, strict=True) if p]))
        constant = sum(w / total * a for w, a, p in zip(weights, always, present, strict=True) if not p)
        self.register_buffer("always", torch.tensor(float(constant)))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        logits = [positive_logit(Output.of(model(*inputs, **named)).prediction) for model in self.models]
        share = self.always + self.weights @ (torch.stack(logits) > 0).to(self.weights.dtype)
        p = share.clamp(1e-3, 1 - 1e-3)
        logit = torch.log(p / (1 - p))[:, None]
        return logit if self.columns == 1 else torch.cat([torch.zeros_like(logit), logit], 1)


# -- shared -----------------------------------------------------------------------------------------------------------
class _Weighted(Method):
    """Multiplies the loss of each example by the extra ``weight``."""

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        each = per_example_loss(output.prediction, batch.targets, run.task_loss)
        return (each * batch.extras["weight"]).mean()


class _Oracle:
    """A scikit-learn-style classifier over positions in the training data, which trains and asks a torch model."""

    def __init__(
        self, train: Callable[[np.ndarray, np.ndarray], nn.Module], decide: Callable[[nn.Module], np.ndarray]
    ) -> None:
        self.train, self.decide = train, decide

    def __sklearn_clone__(self) -> _Oracle:
        return _Oracle(self.train, self.decide)

    def fit(self, places: Any, labels: Any, sample_weight: Any) -> _Oracle:
        self.model = self.train(np.asarray(labels), np.asarray(sample_weight))
        self.decisions = self.decide(self.model)
        return self

    def predict(self, places: Any) -> np.ndarray:
        return self.decisions[np.asarray(places)[:, 0]]


def positive_logit(output: Tensor) -> Tensor:
    """The logit (N,) of class 1 against class 0, from one logit (N,) or (N, 1), or two (N, 2)."""
    return output[:, 1] - output[:, 0] if output.ndim == 2 and output.shape[1] == 2 else output.reshape(-1)


def grouped(run: Run, method: str) -> Examples:
    """The run's training data, which must have a group for each example."""
    if not isinstance(run.data, Examples) or GROUP not in run.data.extras:
        raise ArgumentError(
            f"data = without the extra {GROUP!r}: {method} needs the group of each training example, (N,) int64. "
            "Give data=equipoise.Examples(inputs, targets, group=...)"
        )
    groups = run.data.extras[GROUP]
    if groups.is_floating_point() or groups.ndim != 1:
        raise ArgumentError(f"{GROUP} = {groups.dtype} {tuple(groups.shape)}: must be integer codes (N,)")
    if bool((groups == groups[0]).all()):
        raise DataError(
            f"{GROUP} is {int(groups[0])} in all {len(groups)} training examples: there is nothing to compare"
        )
    return run.data


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings with which an optimizer was made, its learning rate that of the start of the schedule."""
    return {**optimizer.defaults, "lr": optimizer.param_groups[0].get("initial_lr", optimizer.defaults["lr"])}
