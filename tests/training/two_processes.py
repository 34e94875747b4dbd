"""What ``test_distributed`` starts once in every process of a launcher: several trainings, their results into files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small import blobs, cosine, mlp, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler

import equipoise
from equipoise import Batch, Examples, Method, Output, Run
from equipoise.errors import ArgumentError
from equipoise.training.table import write_rows

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": sgd, "scheduler": cosine, "clip_norm": 0.5}


class Table(Method):
    """A table that every process fills, a module that trains beside the model, and batches of the method's own making."""

    name = "table"

    def prepare(self, run: Run) -> None:
        self.part = run.register(self, "part", nn.Module())
        self.part.register_buffer("seen", torch.zeros(run.num_examples or 0, 3, dtype=torch.float64))
        head = nn.Linear(3, 3)
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        self.scale = run.register(self, "scale", head.double(), optimize=True)

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        return Batch(batch.inputs, batch.targets, batch.index)  # forgets the weight of its shard

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        logits = run.forward(output.prediction, self.scale).prediction
        write_rows(self.part.seen, batch.positions("table"), logits.detach())
        return F.cross_entropy(logits, batch.targets)


class Kill(Method):
    name = "kill"

    def __init__(self, at: int | None) -> None:
        self.at = at

    def settings(self) -> dict[str, Any]:
        return {}

    def after_step(self, run: Run) -> None:
        if run.global_step == self.at:
            raise KeyboardInterrupt


def data() -> Examples:
    """45 examples: batches of 16, 16 and 13, whose halves are uneven."""
    inputs, labels = blobs(45)
    return Examples(inputs.double(), labels)


def trainings() -> dict[str, Run]:
    """Every training once."""
    return {
        "plain": equipoise.fit(mlp().double(), data(), validation=data(), **SETTINGS),
        "accumulated": equipoise.fit(mlp().double(), data(), accumulation=7, **SETTINGS),
        "method": equipoise.fit(mlp().double(), data(), methods=[Table()], accumulation=4, **SETTINGS),
        "own loop": own_loop(),
    }


def resumed(folder: Path) -> tuple[Run, Run]:
    """A run with dropout, and the same run killed in the middle of an epoch and resumed."""
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "checkpoint_every": 4}

    def train(at: int | None, name: str, resume: bool = False) -> Run:
        inputs, labels = blobs(45)
        model, methods = mlp(dropout=0.4, norm=True), [Kill(at)]
        return equipoise.fit(
            model, (inputs, labels), methods=methods, checkpoint=folder / name, resume=resume, **settings
        )

    whole = train(None, "whole")
    try:
        train(10, "killed")
    except KeyboardInterrupt:
        whole.accelerator.wait_for_everyone()
    return whole, train(None, "killed", resume=True)


def own_loop() -> Run:
    """The steps in one's own hands, on batches that each process cuts itself."""
    examples, model = data(), mlp().double()
    run = equipoise.start(model, sgd, data=examples, clip_norm=0.5)
    sampler = RandomSampler(examples, generator=torch.Generator().manual_seed(0))
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    for _ in range(2):
        for rows in torch.tensor(list(sampler)).split(16):
            mine = rows[: len(rows) // 2 * 2].tensor_split(world)[rank]  # even halves
            run.backward(run.training_loss(examples.take(mine)))
            run.step()
        run.end_epoch()
    run.finish()
    return run


def record(run: Run) -> dict[str, Any]:
    return {"history": run.history, "steps": run.global_step, "total": run.total_steps}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    runs = trainings()
    whole, again = resumed(folder)
    rank = whole.accelerator.process_index
    tensors = {f"{name}/{k}": v for name, run in runs.items() for k, v in run.model.state_dict().items()}
    tensors |= {f"whole/{k}": v for k, v in whole.model.state_dict().items()}
    tensors |= {f"again/{k}": v for k, v in again.model.state_dict().items()}
    table = runs["method"].methods[0]
    tensors |= {"seen": table.part.seen, "scale": table.scale.weight}
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / f"{rank}.safetensors")
    document = {name: record(run) for name, run in (*runs.items(), ("whole", whole), ("again", again))}
    document["processes"] = {"count": whole.accelerator.num_processes}
    try:
        equipoise.fit(mlp(), blobs(8), epochs=1, batch_size=1)
    except ArgumentError as error:
        document["refused"] = {"message": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
