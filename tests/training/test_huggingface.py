"""A Hugging Face model trains as it is: dicts in, model outputs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import equipoise
from equipoise import Batch, Examples, Method, Output, Run

transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")


def words(count: int = 48) -> tuple[dict[str, Tensor], Tensor]:
    """Sentences of 8 tokens; the class is whether the second token is a large number."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 30, (count, 8), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::2, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask}, (tokens[:, 1] > 15).long()


def bert(dropout: float = 0.1) -> Any:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=2,
        hidden_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


class Sentences(Dataset[dict[str, Any]]):
    """What a tokenised ``datasets.Dataset`` in torch format yields."""

    def __init__(self) -> None:
        self.inputs, self.labels = words()

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**{key: value[i] for key, value in self.inputs.items()}, "labels": self.labels[i]}


class Look(Method):
    """Keeps the width of the features, which enter the model's own classifier."""

    needs_features = True

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None and output.features.shape == (len(batch), 16)
        assert run.head() is run.model.classifier
        return output.features.mean() * 0


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def test_trains_without_an_adapter() -> None:
    inputs, labels = words()
    settings: dict[str, Any] = {"epochs": 10, "batch_size": 16, "optimizer": adamw, "num_classes": 2}
    run = equipoise.fit(bert(), Sentences(), methods=[Look()], validation=Sentences(), **settings)
    assert run.history[-1]["train_loss"] < 0.5 < run.history[0]["train_loss"]
    assert run.history[-1]["validation_accuracy"] > 0.9
    in_memory = equipoise.fit(bert(), Examples(inputs, labels), methods=[Look()], **settings)
    for ours, theirs in zip(run.model.parameters(), in_memory.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resumes_and_accumulates_too() -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": adamw, "accumulation": 2}
    whole = equipoise.fit(bert(), Sentences(), **settings)

    class Stop(Method):
        def after_step(self, run: Run) -> None:
            if run.global_step == 5:
                raise KeyboardInterrupt

        def settings(self) -> dict[str, Any]:
            return {}

        def __repr__(self) -> str:
            return "Method()"

    with pytest.raises(KeyboardInterrupt):
        equipoise.fit(bert(), Sentences(), **settings, checkpoint="saved", checkpoint_every=2, methods=[Stop()])
    resumed = equipoise.fit(bert(), Sentences(), **settings, checkpoint="saved", resume=True, methods=[Method()])
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
