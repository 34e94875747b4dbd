"""A small federation for tests: four clients with skewed classes, a model with statistics, and faults of a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise.federated.params import Params
from equipoise.training import Examples


def toy_clients(count: int = 4, rows: int = 24) -> list[Examples]:
    generator = torch.Generator().manual_seed(5)
    centres = 2 * torch.randn(3, 6, generator=generator)
    made = []
    for number in range(count):
        shares = torch.full((3,), 0.1)
        shares[number % 3] = 0.8
        targets = torch.multinomial(shares, rows + 2 * number, replacement=True, generator=generator)
        inputs = centres[targets] + torch.randn(len(targets), 6, generator=generator)
        made.append(Examples(inputs, targets, num_classes=3))
    return made


def toy_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def mod(fault: Callable[..., Any], client: int = 2, round: int = 2, kind: str = "train") -> Callable[..., Any]:
    """A Flower mod: in one round, one client's call becomes ``fault(message, context, call)``."""

    def found(message: Any, context: Any, call: Any) -> Any:
        config = message.content.config_records["config"]
        hit = context.node_config["partition-id"] == client and config.get("server-round") == round
        return (
            fault(message, context, call) if hit and message.metadata.message_type == kind else call(message, context)
        )

    return found


def changed(change: Callable[[Any], None]) -> Callable[..., Any]:
    """A fault that trains, and then spoils the reply's content."""

    def fault(message: Any, context: Any, call: Any) -> Any:
        reply = call(message, context)
        change(reply.content)
        return reply

    return fault


def spoil(edit: Callable[[np.ndarray], np.ndarray], name: str = "0.weight") -> Callable[[Any], None]:
    """Change one array of a reply."""

    def change(content: Any) -> None:
        from flwr.app import Array

        content["arrays"][name] = Array(edit(content["arrays"][name].numpy()))

    return change
