"""Nested dropout, which orders and cuts the features in front of the classifier; and Co-teaching on top of it.

Part of the training labels is wrong. What a network needs for the correct labels fits into few features; memorising the wrong
ones takes many. Nested dropout keeps only the first `k` of the `D` feature channels in each training step, with `k` random.
The first channels must then carry what matters most, and the last ones, where noise would be stored, are cut off for good.

For features `h` (N, D) and a linear classifier `W` (C, D), bias `b`, each training step draws one `k` for the whole batch:

    P(k)  proportional to  exp(-((k - mu) / sigma)^2),  k = 1 .. D
    z     =  W (h * m_k) + b                             m_k is 1 for the channels 1..k, else 0; no rescaling
    keep  =  argmax over k of [accuracy_k - 1e-5 (k - 1)]     on validation data, after each epoch

and evaluation uses the first `keep` channels. (There is no 1/2 in the exponent: this sigma is sqrt(2) times a standard
deviation.) Plain dropout on the same features is the simpler variant.

Co-teaching then lets two such networks choose examples for each other. A batch is cut into halves A and B; network 1 marks the
share `1 - forget_rate` of A with the smallest cross-entropy, network 2 that of B; each trains on what the *other* has
marked, since a mislabelled example is rarely easy for both. Prediction is the mean of the two networks' logits.

## When to use
Wrong labels, a network that ends in a linear layer, and a small validation set to choose `keep` by; also where an ordered
representation is wanted in itself, since any prefix of the features is a classifier. Co-teaching is for when twice the
training and inference compute is acceptable.

## When not
Without validation data `keep` stays D, and only the training differs. Do not choose `keep` on test data. Do not expect it to
beat a tuned dropout on small problems: try `dropout=...` as well. A non-linearity or a normalisation between the features and
the classifier would bring cut channels back as constants. Co-teaching with a `forget_rate` far above the share of wrong labels
throws away hard, correct examples.

## Cost
Training: none beyond the mask. Choosing `keep`: one forward pass over the validation data an epoch, and O(N D C) for all
D prefixes at once. Co-teaching: two networks in memory, in training and at inference; in its second stage each of them scores
half of the batch and trains on the share `1 - forget_rate` of the other half.

## In a distributed run
All processes draw the same `k` and use the same `keep`; 2 processes equal 1 for nested dropout. In Co-teaching each process
splits and selects within its share of the batch.

## Differences from the released code
Both stages are one run with one optimizer and one schedule; the authors train the two networks apart, each with its own order
of examples, and fine-tune from the best checkpoints with a new optimizer. So here the two differ by initial weights and by
their draws of `k`. The authors' second stage replaces `keep = 1` by D and drops the last row of an odd batch; here neither
happens. The variant with two nested dropout layers that take turns (VGG) is not offered.

## Source
Chen, Hu, Shen, Ai, Suykens: Compressing Features for Learning with Noisy Labels. IEEE TNNLS 2022, arXiv:2206.13140; the law of
k, the tie-break and the order of the steps from the authors' code. Co-teaching: Han et al., NeurIPS 2018, arXiv:1804.06872.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import ArgumentError, check_choice, check_integer, check_range, refuse
from equipoise.noisy_labels.two_networks import LogitAverage, make_peer
from equipoise.training.batch import Batch, Output, map_inputs
from equipoise.training.features import FeatureTap, find_head
from equipoise.training.losses import check_labels, check_logits, precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform

SIGMA, MU = 100.0, 0.0
MIN_ROWS = 2  # of a part of a batch in Co-teaching: BatchNorm cannot train on one
PENALTY = 1e-5  # price of a channel, in accuracy: it only decides between prefixes that are equally good
ELEMENTS_AT_ONCE = 2**18  # of prefix logits while correct predictions are counted; about what a processor's cache holds


# -- the functional core ----------------------------------------------------------------------------------------------
def nested_dropout_probs(num_features: int, sigma: float, mu: float = 0.0) -> Tensor:
    """P(k) for k = 1 .. D, proportional to ``exp(-((k - mu) / sigma)^2)``: (D,) float64, sums to 1.

    num_features: D >= 1. sigma: > 0; infinity gives the uniform law. mu: finite, in channels.
    """
    check_integer("num_features", num_features, 1)
    _check_law(sigma, mu)
    k = torch.arange(1, num_features + 1, dtype=torch.float64)
    return torch.softmax(-(((k - mu) / sigma) ** 2), 0)


def prefix_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None, *, chunk: int | None = None) -> Tensor:
    """Logits of the linear classifier on the first 1, 2, ..., D feature channels: (D, N, C), in O(N D C).

    features: (N, D). weight: (C, D). bias: (C,) or None; every prefix has it once. chunk: rows to process at a time, which
    bounds the memory beside the result. Entry D - 1 is the full linear layer. Half precision is accumulated and returned in
    float32. Differentiable.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ArgumentError(
            f"features = {features.dtype} {tuple(features.shape)}: must be floating point of shape (N, D)"
        )
    if weight.ndim != 2 or weight.shape[1] != features.shape[1]:
        raise ArgumentError(
            f"weight has shape {tuple(weight.shape)}: must be (C, {features.shape[1]}) for features {tuple(features.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"bias has shape {tuple(bias.shape)}: must be ({len(weight)},)")
    if chunk is not None:
        check_integer("chunk", chunk, 1)
    if chunk is not None and chunk < len(features):
        return torch.cat([prefix_logits(rows, weight, bias) for rows in features.split(chunk)], 1)
    contributions = precise(features).T[:, :, None] * precise(weight).T[:, None, :]
    logits = contributions.cumsum_(0)  # in place: the largest tensor here exists once
    return logits if bias is None else logits.add_(precise(bias))


@dataclass(frozen=True)
class PrefixSelection:
    """How many channels to keep, 1 <= ``keep`` <= D, and the ``accuracy`` (D,) float64 of each prefix, on the CPU."""

    keep: int
    accuracy: Tensor


def select_keep(prefix_logits: Tensor, targets: Tensor, *, penalty: float = PENALTY) -> PrefixSelection:
    """The prefix with the best ``accuracy_k - penalty * (k - 1)``; of equals the shortest.

    prefix_logits: (D, N, C) from the function of that name, N >= 1, of validation data. targets: (N,) integer classes.
    penalty: price of a channel in accuracy, >= 0.
    """
    if prefix_logits.ndim != 3 or 0 in prefix_logits.shape:
        raise ArgumentError(f"prefix_logits has shape {tuple(prefix_logits.shape)}: must be (D, N, C), none of them 0")
    check_labels(targets, *prefix_logits.shape[1:])
    return _select(_count_correct(prefix_logits, targets), len(targets), penalty)


def small_loss_indices(losses: Tensor, forget_rate: float) -> Tensor:
    """Positions of the ``int((1 - forget_rate) * N)`` smallest losses, in ascending order of loss: int64.

    losses: (N,). forget_rate: in [0, 1). Of equal losses the first comes first. NaN is never selected: where there are not
    enough others, fewer positions are returned.
    """
    if losses.ndim != 1:
        raise ArgumentError(f"losses has shape {tuple(losses.shape)}: must be (N,), one for each example")
    _check_rate(forget_rate)
    order = torch.argsort(losses.detach(), stable=True)[: int((1 - forget_rate) * len(losses))]
    return order[~losses[order].isnan()]


def forget_rate_schedule(epoch: int, forget_rate: float, num_gradual: int = 0) -> float:
    """The rate in ``epoch`` (from 0): linear from 0 to ``forget_rate`` over the first ``num_gradual`` epochs, then constant.

    forget_rate: in [0, 1). num_gradual: >= 0; 0 means ``forget_rate`` from the start, 1 nothing forgotten in the first epoch.
    """
    check_integer("epoch", epoch, 0)
    _check_rate(forget_rate)
    check_integer("num_gradual", num_gradual, 0)
    return forget_rate if epoch >= num_gradual else forget_rate * epoch / max(num_gradual - 1, 1)


def _count_correct(prefix_logits: Tensor, targets: Tensor) -> Tensor:
    # Not argmax, which is ten times slower on the CPU. Both take the first of equal logits.
    return (prefix_logits.max(2).indices == targets).sum(1)


def _select(correct: Tensor, count: int, penalty: float = PENALTY) -> PrefixSelection:
    check_range("penalty", penalty, 0)
    accuracy = correct.cpu().double() / count
    return PrefixSelection(int((accuracy - penalty * torch.arange(len(accuracy))).argmax()) + 1, accuracy)


def _check_law(sigma: float, mu: float) -> None:
    check_range("sigma", sigma, 0, open_low=True)
    check_range("mu", mu, -math.inf, math.inf, open_low=True, open_high=True)


def _check_rate(forget_rate: float) -> None:
    check_range("forget_rate", forget_rate, 0, 1, open_high=True)


# -- the layer --------------------------------------------------------------------------------------------------------
class NestedDropout(nn.Module):
    """Zeroes all but the first k channels: a random k for the whole batch in training, ``keep`` in evaluation.

    >>> classifier = nn.Sequential(NestedDropout(512, sigma=10.0), nn.Linear(512, 10, bias=False))
    >>> selection = select_keep(prefix_logits(features, classifier[1].weight), labels)      # of validation data
    >>> classifier[0].keep.fill_(selection.keep)

    num_features: D >= 1. sigma: > 0, mu: the law of k, see ``nested_dropout_probs``. generator: a CPU generator to draw k
    from; in a distributed run it must be seeded alike on all processes. Without one the layer makes its own, seeded with
    ``torch.initial_seed()``; two layers made so draw the same widths. Raises ``ArgumentError`` (a ``ValueError``).

    ``probs`` (D,) float64 is the law, a buffer that no state dict needs. It stays on the CPU, where k is drawn, so that no device
    must be waited for and no cast changes it. ``keep`` is a buffer, an int64 scalar, at first D. ``held``, an int64 scalar on the
    layer's device, replaces the draw in training while it is not None (several forward passes with one width).
    """

    probs: Tensor
    keep: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        sigma: float = SIGMA,
        mu: float = MU,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("probs", nested_dropout_probs(num_features, sigma, mu), persistent=False)
        if generator is not None and generator.device.type != "cpu":
            refuse("generator", str(generator.device), "be on the CPU", "Use torch.Generator().manual_seed(seed)")
        self.num_features, self.sigma, self.mu = num_features, sigma, mu
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self.held: Tensor | None = None
        self.register_buffer("keep", torch.tensor(num_features))

    def _apply(self, fn: Any, recurse: bool = True) -> NestedDropout:
        law = self._buffers.pop("probs")
        super()._apply(fn, recurse)
        self._buffers["probs"] = law
        return self

    def sample_keep(self) -> int:
        """Draw k, 1 <= k <= D."""
        return int(torch.multinomial(self.probs, 1, generator=self.generator)) + 1

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """x: (N, D) or (N, D, *spatial). keep: use this prefix, in [1, D], whatever the mode. Returns the shape of x."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)}: must be (N, {self.num_features}) or (N, {self.num_features}, ...)"
            )
        width: int | Tensor
        if keep is not None:
            check_integer("keep", keep, 1, self.num_features)
            width = keep
        elif not self.training:
            width = self.keep
        else:
            width = self.sample_keep() if self.held is None else self.held
        channel = torch.arange(self.num_features, device=x.device).reshape(-1, *[1] * (x.ndim - 2))
        return torch.where(channel < width, x, 0)

    def extra_repr(self) -> str:
        return f"{self.num_features}, sigma={self.sigma}, mu={self.mu}"


# -- in front of the heads of a run's networks ------------------------------------------------------------------------
def attach(head: nn.Linear, layer: nn.Module) -> None:
    """Let ``layer`` see what enters ``head`` first. It becomes the head's child, so that no name in the model changes."""
    if hasattr(head, "nested_dropout"):
        raise ArgumentError(
            "head: carries a nested dropout layer already. Use one of the methods nested-dropout and co-teaching in a run; on a "
            "copy that was made during training call equipoise.noisy_labels.nested_dropout.fold(head) first"
        )
    head.add_module("nested_dropout", layer.to(head.weight.device))
    head.register_forward_pre_hook(_before_head)


def fold(head: nn.Linear) -> None:
    """Take the layer off ``head``, and set the weights of the channels beyond ``keep`` to 0 instead.

    The plain model then predicts the same. A head whose weight is computed (a parametrization) keeps its layer.
    """
    layer = getattr(head, "nested_dropout", None)
    if layer is None:
        return
    if isinstance(layer, NestedDropout):
        if "weight" not in head._parameters:
            layer.held = None
            return
        with torch.no_grad():
            head.weight[:, int(layer.keep) :] = 0
    del head.nested_dropout
    for key in [key for key, hook in head._forward_pre_hooks.items() if hook is _before_head]:
        del head._forward_pre_hooks[key]


def _before_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # A function of the module: copies of a model carry it, and find their own layer, mode and device.
    layer: Any = module.nested_dropout
    features = args[0]
    if isinstance(layer, NestedDropout) and features.ndim != 2:
        raise ArgumentError(
            f"the head's inputs have shape {tuple(features.shape)}: nested dropout needs features (N, D). "
            "Pool them before the head, or use dropout=..."
        )
    return (layer(features), *args[1:])


class Truncation:
    """The layers in front of the heads of one or two networks of a run: draws their widths and selects what they keep."""

    def __init__(
        self,
        run: Run,
        networks: Sequence[nn.Module],
        generator: torch.Generator,
        *,
        sigma: float,
        mu: float,
        dropout: float | None,
    ) -> None:
        self.networks = list(networks)
        self.heads = [_linear_head(network, run.head_name) for network in networks]
        self.layers: list[NestedDropout] = []
        self.selections: list[PrefixSelection] = []
        self._drawn_at = self._selected_at = -1
        widths = {head.in_features for head in self.heads}
        if len(widths) > 1:
            raise ArgumentError(
                f"peer has {max(widths)} or {min(widths)} features: both networks must have equally many"
            )
        if dropout is None:
            self.layers = [
                NestedDropout(head.in_features, sigma=sigma, mu=mu, generator=generator) for head in self.heads
            ]
            if run.validation is not None:
                targets = next(iter(run.validation)).targets
                remedy = "keep is selected by accuracy: give class labels as validation targets, or no validation data"
                check_labels(targets, len(targets), self.heads[0].out_features, remedy)
        for i, head in enumerate(self.heads):
            attach(head, self.layers[i] if dropout is None else nn.Dropout(dropout))

    def draw(self, run: Run, *, together: bool = False) -> None:
        """Draw the widths of this optimizer step, once however many micro-batches it has; ``together``: one for all."""
        if self._drawn_at == run.global_step:
            return
        self._drawn_at = run.global_step
        keep = 0
        for i, layer in enumerate(self.layers):
            keep = keep if together and i else layer.sample_keep()
            layer.held = torch.full((), keep, device=layer.keep.device)

    @torch.no_grad()
    def select(self, run: Run, *, together: bool = False) -> None:
        """Select each network's ``keep`` on the validation data, or one by the mean of their logits; nothing without data."""
        if not self.layers or run.validation is None or self._selected_at == run.global_step:
            return
        self._selected_at = run.global_step
        every = range(len(self.networks))
        groups = [list(every)] if together else [[i] for i in every]
        correct = [torch.zeros(self.layers[0].num_features, dtype=torch.int64, device=run.device) for _ in groups]
        count = 0
        for features, targets in self._features(run):
            count += len(targets)
            for total, group in zip(correct, groups, strict=True):
                total += correct_by_prefix([features[i] for i in group], [self.heads[i] for i in group], targets)
        self.selections = [_select(_of_first_process(total), count) for total in correct]
        for selection, group in zip(self.selections, groups, strict=True):
            for i in group:
                self.layers[i].keep.fill_(selection.keep)

    def log(self, run: Run) -> None:
        """Record what the networks keep."""
        for name, layer in zip(("keep", "keep_second"), self.layers, strict=False):
            run.log(name, layer.keep)

    def fold(self) -> None:
        """Leave plain networks behind."""
        for head in self.heads:
            fold(head)

    def _features(self, run: Run) -> Iterator[tuple[list[Tensor], Tensor]]:
        """For each validation batch what enters every head, and the targets."""
        taps = [FeatureTap(head) for head in self.heads]
        try:
            with evaluating(*self.networks):
                for batch in run.validation or ():
                    for network in self.networks:
                        run.forward(batch.inputs, network)
                    yield [tap.take() for tap in taps], batch.targets  # type: ignore[misc]
        finally:
            for tap in taps:
                tap.remove()


def correct_by_prefix(features: Sequence[Tensor], heads: Sequence[nn.Linear], targets: Tensor) -> Tensor:
    """How many examples the first 1 .. D channels classify right, by the mean of the networks' logits: (D,) int64.

    features: (N, D) of each network. heads: their classifiers. targets: (N,). Memory does not grow with N.
    """
    rows = max(1, ELEMENTS_AT_ONCE // (features[0].shape[1] * heads[0].out_features))
    correct = torch.zeros(features[0].shape[1], dtype=torch.int64, device=targets.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = [prefix_logits(h[part], head.weight, head.bias) for h, head in zip(features, heads, strict=True)]
        correct += _count_correct(torch.stack(logits).mean(0) if len(logits) > 1 else logits[0], targets[part])
    return correct


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then every module's own mode again."""
    training = [module for network in networks for module in network.modules() if module.training]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _linear_head(network: nn.Module, name: str | None) -> nn.Linear:
    head = find_head(network, name)
    if not isinstance(head, nn.Linear):
        raise ArgumentError(
            f"head = {type(head).__name__}: nested dropout needs an nn.Linear that makes the predictions. "
            "Name it: head='path.to.layer'"
        )
    return head


def _of_first_process(counts: Tensor) -> Tensor:
    """The first process' counts on all: the others' running statistics of BatchNorm may differ from those it saves."""
    from accelerate.utils import broadcast

    shared: Tensor = broadcast(counts)
    return shared


def _check_layer(sigma: float, mu: float, dropout: float | None) -> None:
    _check_law(sigma, mu)
    if dropout is None:
        return
    check_range("dropout", dropout, 0, 1, open_high=True)
    if (sigma, mu) != (SIGMA, MU):
        refuse(
            "dropout, sigma, mu",
            (dropout, sigma, mu),
            "not be given together",
            "Choose plain dropout or nested dropout",
        )


# -- the methods ------------------------------------------------------------------------------------------------------
class NestedDropoutMethod(Method):
    """Keep only the first k feature channels, k random, so that the last ones cannot memorise wrong labels.

    sigma: width of the law of k in channels, > 0 (10 on CIFAR-10 with 512 features, 100 on larger problems). mu: its centre.
    dropout: None, or the rate of plain dropout in [0, 1) on the same features instead; ``sigma`` and ``mu`` then keep their
    defaults. Needs a model that ends in an ``nn.Linear``, and validation data to cut anything off.

    All micro-batches of an optimizer step share one k. After the run the model is its plain self again: the weights of the
    channels beyond ``layer.keep`` are zero. ``selection`` holds the last ``PrefixSelection``, with every prefix' accuracy.
    """

    name = "nested-dropout"
    paper = Paper(
        "Compressing Features for Learning with Noisy Labels",
        "Chen, Hu, Shen, Ai, Suykens",
        "IEEE TNNLS 2022",
        "https://arxiv.org/abs/2206.13140",
    )
    space: ClassVar[Space] = {"sigma": LogUniform(3, 250)}
    neutral: ClassVar[Mapping[str, Any] | None] = {"sigma": SIGMA, "mu": MU, "dropout": 0.0}

    truncation: Truncation

    def __init__(self, sigma: float = SIGMA, mu: float = MU, dropout: float | None = None) -> None:
        _check_layer(sigma, mu, dropout)
        self.sigma, self.mu, self.dropout = sigma, mu, dropout

    def prepare(self, run: Run) -> None:
        generator = run.new_generator(self)
        self.truncation = Truncation(run, [run.model], generator, sigma=self.sigma, mu=self.mu, dropout=self.dropout)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        self.truncation.draw(run)
        return batch

    def epoch_end(self, run: Run) -> None:
        self.truncation.select(run)
        self.truncation.log(run)

    def finish(self, run: Run) -> None:
        self.truncation.select(run)
        self.truncation.fold()

    @property
    def layer(self) -> NestedDropout | None:
        """The layer of the run; None for plain dropout."""
        return self.truncation.layers[0] if self.truncation.layers else None

    @property
    def selection(self) -> PrefixSelection | None:
        """What was selected last; None without validation data."""
        return self.truncation.selections[0] if self.truncation.selections else None


class CoTeaching(Method):
    """Two networks with nested dropout, each trained on the examples that the other finds plausible.

    Stage one trains both networks on whole batches, each with its own widths; stage two lets them exchange examples.

    forget_rate: share of each half-batch that is left out, in [0, 1); about the share of wrong labels. num_gradual: epochs of
    stage two over which it grows from 0, >= 0 (0 after a stage one; 10 when training from scratch). sigma, mu, dropout: as for
    ``NestedDropoutMethod``; ``dropout=0.0`` is plain Co-teaching. pretrain_epochs: length of stage one, as a number of epochs
    (int) or as a share of the run's (float in [0, 1), rounded down); the authors' CIFAR runs spend 350 of 450. split_batch:
    whether each network judges its own half of the batch (as above) or both judge all of it (as in the original Co-teaching).
    freeze_norm: whether stage two freezes BatchNorm, statistics and weights; None does so if there was a stage one.
    peer: a ready second network (a copy of it is trained); by default one like the model with fresh weights, see ``make_peer``.

    The loss of the run is the sum of both networks' losses; evaluation uses the mean of their logits. A gradient clipped by
    norm is clipped over both. Very small batches are not split, and at least two rows of a part are kept. At the neutral
    setting the first network, ``networks[0]``, is the baseline, with a second one beside it. In stage two other methods of the
    run see the rows that the first network trains on.
    """

    name = "co-teaching"
    paper = Paper(
        "Compressing Features for Learning with Noisy Labels",
        "Chen, Hu, Shen, Ai, Suykens",
        "IEEE TNNLS 2022",
        "https://arxiv.org/abs/2206.13140",
    )
    space: ClassVar[Space] = {"forget_rate": Uniform(0.05, 0.5), "sigma": LogUniform(3, 250)}
    neutral: ClassVar[Mapping[str, Any] | None] = {
        "forget_rate": 0.0,
        "sigma": SIGMA,
        "mu": MU,
        "dropout": 0.0,
        "pretrain_epochs": 0,
        "split_batch": False,
    }

    truncation: Truncation
    networks: tuple[nn.Module, nn.Module]

    def __init__(
        self,
        forget_rate: float = 0.2,
        num_gradual: int = 0,
        sigma: float = SIGMA,
        dropout: float | None = None,
        pretrain_epochs: int | float = 0.75,
        *,
        mu: float = MU,
        split_batch: bool = True,
        freeze_norm: bool | None = None,
        peer: nn.Module | None = None,
    ) -> None:
        _check_rate(forget_rate)
        check_integer("num_gradual", num_gradual, 0)
        _check_layer(sigma, mu, dropout)
        if isinstance(pretrain_epochs, float):
            check_range("pretrain_epochs", pretrain_epochs, 0, 1, open_high=True)
        else:
            check_integer("pretrain_epochs", pretrain_epochs, 0)
        check_choice("split_batch", split_batch, (True, False))
        check_choice("freeze_norm", freeze_norm, (True, False, None))
        self.forget_rate, self.num_gradual, self.sigma, self.dropout = forget_rate, num_gradual, sigma, dropout
        self.pretrain_epochs, self.mu, self.split_batch = pretrain_epochs, mu, split_batch
        self.freeze_norm, self.peer = freeze_norm, peer

    def prepare(self, run: Run) -> None:
        self.stage_two = _stage_two(self.pretrain_epochs, run.total_epochs)
        generator = run.new_generator(self)
        second = make_peer(run.model, generator, peer=copy.deepcopy(self.peer))
        self.networks = (run.model, run.register(self, "second", second, optimize=True))
        self.truncation = Truncation(run, self.networks, generator, sigma=self.sigma, mu=self.mu, dropout=self.dropout)
        freeze = self.stage_two > 0 if self.freeze_norm is None else self.freeze_norm
        modules = [module for network in self.networks for module in network.modules()]
        self.norms = [module for module in modules if freeze and isinstance(module, nn.modules.batchnorm._BatchNorm)]
        run.inference_model = LogitAverage(self.networks)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        exchanging = run.epoch >= self.stage_two
        self.truncation.draw(run, together=exchanging)
        if not exchanging:
            return batch
        for norm in self.norms:
            norm.eval()
        first, second = self._exchange(run, batch)
        return replace(first, extras={**first.extras, self.name: second})

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        other = batch.extras.get(self.name, batch)
        second = run.forward(other.inputs, self.networks[1]).prediction
        return run.task_loss(output.prediction, batch.targets) + run.task_loss(second, other.targets)

    def after_backward(self, run: Run) -> None:
        if run.epoch >= self.stage_two:
            for norm in self.norms:
                for parameter in norm.parameters():
                    parameter.grad = None

    def epoch_end(self, run: Run) -> None:
        self.truncation.select(run, together=run.epoch + 1 >= self.stage_two)
        self.truncation.log(run)

    def finish(self, run: Run) -> None:
        self.truncation.select(run, together=run.epoch >= self.stage_two)
        self.truncation.fold()
        run.model = run.inference_model

    def _exchange(self, run: Run, batch: Batch) -> tuple[Batch, Batch]:
        """What networks 1 and 2 train on: the part of the batch that the other one has judged, or what it kept of it."""
        half = len(batch) // 2
        judged = [batch, batch]
        if self.split_batch and half >= MIN_ROWS:
            judged = [_rows(batch, slice(half)), _rows(batch, slice(half, None))]
        rate = forget_rate_schedule(run.epoch - self.stage_two, self.forget_rate, self.num_gradual)
        if rate > 0:
            with torch.no_grad(), evaluating(*self.networks):
                judged = [
                    _rows(part, _kept(run, part, network, rate))
                    for part, network in zip(judged, self.networks, strict=True)
                ]
        return judged[1], judged[0]


def _kept(run: Run, batch: Batch, network: nn.Module, forget_rate: float) -> Tensor:
    """Positions of the examples that ``network`` finds plausible, at least ``MIN_ROWS`` where there are so many."""
    logits = run.forward(batch.inputs, network).prediction
    check_logits(logits)
    losses = F.cross_entropy(precise(logits), batch.targets, reduction="none")
    kept = small_loss_indices(losses, forget_rate)
    return kept if len(kept) >= MIN_ROWS else losses.argsort(stable=True)[:MIN_ROWS]


def _rows(batch: Batch, rows: slice | Tensor) -> Batch:
    """The batch of the given rows."""
    return replace(
        batch,
        inputs=map_inputs(lambda t: t[rows], batch.inputs),
        targets=batch.targets[rows],
        index=None if batch.index is None else batch.index[rows],
        extras={name: extra[rows] if isinstance(extra, Tensor) else extra for name, extra in batch.extras.items()},
    )


def _stage_two(pretrain_epochs: int | float, total_epochs: int | None) -> int:
    """The epoch, from 0, in which stage two begins."""
    if isinstance(pretrain_epochs, float):
        if total_epochs is None and pretrain_epochs > 0:
            refuse(
                "pretrain_epochs",
                pretrain_epochs,
                "be a number of epochs (int) where the run's length is unknown",
                "Or give epochs=...",
            )
        return math.floor(pretrain_epochs * (total_epochs or 0) + 1e-9)  # 0.29 of 100 epochs is 29
    if total_epochs is not None and pretrain_epochs >= total_epochs:
        refuse(
            "pretrain_epochs",
            pretrain_epochs,
            f"be less than the run's {total_epochs} epochs, or no epoch is left for Co-teaching",
        )
    return pretrain_epochs
