"""The two apps of the project. Put your own model and data here; ``data`` finds this client's by its node's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from equipoise.data import load, split
from equipoise.federated import partition
from equipoise.federated.algorithm import LocalTraining
from equipoise.federated.fedspeed import FedSpeed
from equipoise.integrations.flower import FederatedStrategy, client_app, server_app
from equipoise.models import build
from equipoise.training import Examples

torch.set_num_threads(1)


def model() -> nn.Module:
    return build("mlp", (1, 8, 8), 10, seed=0)


def data(context: Any) -> Examples:
    """The examples of the client ``partition-id`` of ``num-partitions``."""
    train = split(load("digits"), seed=0, standardise=True).train
    number, clients = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    rows = partition.dirichlet(train.targets, clients, 0.3, torch.Generator().manual_seed(0), least=20)
    return train.subset(rows[number])


def finished(strategy: FederatedStrategy, context: Any) -> None:
    out = context.run_config["out"]
    for record in (*strategy.history, *strategy.faults):
        print(record, flush=True)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(strategy.server.load().state_dict(), Path(out) / "model.safetensors")


# A folder on the client's own machine: without it what FedSpeed keeps there is lost with the node, and when a run is resumed.
client = client_app(FedSpeed(), model, data, state=os.environ.get("DIGITS_STATE") or None)
server = server_app(FedSpeed(), model, rounds=3, clients=3, local=LocalTraining(batch_size=16), finished=finished)
