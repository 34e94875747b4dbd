"""The tiny task: clients with skewed data train a network of a few per cent of its weights; which weights is what is compared.

All arms but ``fedavg``, the dense line of reference, keep ``density`` of the parameters. Messages hold these alone, and bytes are
measured. Devices are simulated with dense tensors that hold zeros, so what a sparse format saves there is counted: by the number of
weights in the mask, and its own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from equipoise.errors import check_range
from equipoise.federated.algorithm import LocalTraining, predict
from equipoise.federated.fedtiny import FedTiny, MaskedTraining, pack_mask, prunable, weights_density
from equipoise.federated.params import Params, size, state_of
from equipoise.federated.task import FederatedTask
from equipoise.models.factory import _seeded
from equipoise.training import Examples, Method, Problem, RunResult, TradeOff
from equipoise.training.task import Config

if TYPE_CHECKING:
    from equipoise.federated.simulation import FederatedRun


@dataclass(frozen=True)
class FederatedTiny(FederatedTask):
    """Clients with skewed data train one very sparse model; judged by its accuracy, beside what it costs a client.

    Counted for sparse tensors: ``client_kilobytes``, the largest sum of weights, mask and gradients on a client, with the gradient
    of the block whose mask is adjusted; ``training_megaflops``, the products of weights and values in all clients' training (thrice
    those of the forward passes); and ``density``, the share of the parameters that is left. Measured: ``megabytes_up`` and
    ``_down``, values, masks and uploaded gradients of all messages, with a header of 128 bytes for each array.

    density: share of all parameters that the arms keep, in (0, 1]; biases and normalisation are kept and count. model: "mlp" has
        BatchNorm here, without which so sparse a network hardly learns. All other settings are those of the task ``federated``.
        FedTiny adjusts one layer in each of the first three quarters of the rounds.
    """

    name: ClassVar[str] = "federated-tiny"
    baseline: ClassVar[str] = "magnitude-mask"
    methods: ClassVar[tuple[str, ...]] = ("random-mask", "fedtiny", "fedavg")
    trade_off: ClassVar[TradeOff | None] = TradeOff("client_kilobytes", "accuracy")

    density: float = 0.05
    alpha: float = 0.5
    clients: int = 8
    fraction: float = 1.0
    epochs: int = 1
    hidden: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 0, 1, open_low=True)

    def check(self) -> list[str]:
        remarks = super().check()
        model = self.build_model(self.problem(0), 0)
        params = state_of(model)[0]
        names = prunable(model, params)
        inside = weights_density(params, names, self.density)
        total, weights = (sum(params[name].numel() for name in group) for group in (params, names))
        text = (
            f"At density {self.density:g} the sparse arms keep {int(self.density * total)} of {total} parameters: all "
            f"{total - weights} that are no weights of linear or convolutional layers, and {100 * inside:.2g} % of these weights."
        )
        return [*remarks, text]

    def build_model(self, problem: Problem, seed: int) -> nn.Module:
        if self.model != "mlp":
            return super().build_model(problem, seed)
        with _seeded(seed):
            return normalised_mlp(problem.input_shape, problem.num_outputs, self.hidden)

    def build_method(self, method: type[Method], config: Config) -> Method:
        """The sparse arms are told the density, and FedTiny when to stop."""
        given: dict[str, Any] = {}
        if issubclass(method, MaskedTraining):
            given[f"{method.name}.density"] = self.density
        if issubclass(method, FedTiny):
            given |= {f"{method.name}.interval": 1, f"{method.name}.t_stop": max(1, 3 * self.rounds // 4)}
        return super().build_method(method, {**given, **config})

    def local(self, config: Config) -> LocalTraining:
        """As in ``federated``, without batches of one example, of which normalisation makes nothing."""
        return replace(super().local(config), least_batch=2)

    def run(self, method: type[Method], config: Config, seed: int) -> RunResult:
        result = super().run(method, config, seed)
        last = result.metrics["last"]  # what is counted is the same for the best round
        return replace(result, metrics={**result.metrics, "best": {**last, **result.metrics["best"]}})

    def train(
        self,
        problem: Problem,
        method: type[Method],
        config: Config,
        seed: int,
        *,
        rounds: int | None = None,
        evaluate: Any = None,
    ) -> FederatedRun:
        run = super().train(problem, method, config, seed, rounds=rounds, evaluate=evaluate)
        each = layer_positions(run.model, problem.validation)
        rows = {number: len(part) for number, part in enumerate(problem.extra["parts"])}
        drawn = [[rows[number] for number in record["clients"]] for record in run.history]
        made, masks, epochs = self.build_method(method, config), run.results.get("masks"), self.local(config).epochs
        run.results["counted"] = count(made, run.params, masks, each, drawn, epochs)
        return run

    def examine(self, problem: Problem, run: FederatedRun) -> dict[str, float]:
        return {f"test_{name}": value for name, value in run.results["counted"].items()}


def normalised_mlp(input_shape: Sequence[int], num_outputs: int, hidden: int) -> nn.Sequential:
    """Two layers of ``hidden``, each followed by BatchNorm, which lifts the faint signal that so few weights let through."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for _ in range(2):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def layer_positions(model: nn.Module, examples: Examples) -> dict[str, int]:
    """At how many places of one example each linear or convolutional layer applies its weights, by the weight's name."""
    found: dict[str, int] = {}

    def hook(name: str, channels: int) -> Any:
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = found.get(name, 0) + output.numel() // channels

        return look

    handles = []
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            handles.append(module.register_forward_hook(hook(f"{prefix}.weight".lstrip("."), channels)))
    try:
        predict(model, examples.subset(torch.arange(1)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def count(
    method: Method,
    params: Params,
    masks: Mapping[str, Tensor] | None,
    positions: Mapping[str, int],
    drawn: Sequence[Sequence[int]],
    epochs: int,
) -> dict[str, float]:
    """What sparse training costs: density, a client's peak kilobytes, and megaflops of all rounds and clients.

    masks: of the pruned layers; None for dense training. positions: see ``layer_positions``. drawn: in each round, the numbers of
    training rows of the clients that answered. Weights and gradients have the bytes of their type (4), an uploaded gradient 8 more
    for its place. A mask moves, but how many weights of a layer it holds does not. A selection before training is not counted.
    """
    masks = masks or {}
    inside = {name: int(masks[name].sum()) if name in masks else tensor.numel() for name, tensor in params.items()}
    total, kept = sum(tensor.numel() for tensor in params.values()), sum(inside.values())
    width = next(iter(params.values())).element_size()
    weights = width * kept + size({name: pack_mask(mask) for name, mask in masks.items()})
    peak, flops = weights + width * kept, 0
    forward = sum(2 * inside[name] * each for name, each in positions.items() if name in inside)
    for round, rows in enumerate(drawn, 1):
        due = method.due(round, dict(masks)) if isinstance(method, FedTiny) else {}
        flops += sum(3 * forward * epochs * n for n in rows)
        if isinstance(method, FedTiny) and due:
            block = sum(params[name].numel() for name in due)
            uploads = sum((8 + width) * k for k in due.values())
            peak = max(peak, weights + width * block + uploads)  # the gradients of training are no longer needed
            dense = sum(2 * params[name].numel() * positions.get(name, 0) for name in due)
            flops += sum(min(method.dev_size, n) * (2 * forward + dense) for n in rows)
    return {
        "density": kept / total,
        "client_kilobytes": peak / 1e3,
        "training_megaflops": flops / 1e6,
    }
