"""Checkpoints: a folder with ``checkpoint.json`` and one safetensors file beside it. Nothing is ever unpickled.

A state is any nesting of dicts, lists and tuples with tensors, numbers, strings, booleans and None. Tensors go to the
safetensors file, all else to the JSON, which is replaced last and in one move: a run killed while saving keeps the
checkpoint before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.errors import CheckpointError

FORMAT = 1


def save(state: dict[str, Any], folder: str | Path) -> Path:
    """Write ``state`` into ``folder`` (made if missing) and return the path of its JSON."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        previous = _tensor_file(folder)
        taken = int(previous.stem.split("-")[1]) if previous else -1
        tensor_file = folder / f"tensors-{taken + 1}.safetensors"
        save_file(tensors, tensor_file)
        _flush(tensor_file)
        draft = folder / "checkpoint.json.part"
        with draft.open("w") as file:
            json.dump({"format": FORMAT, "tensors": tensor_file.name, "state": tree}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / "checkpoint.json")
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise CheckpointError(
            f"checkpoint = {str(folder)!r}: cannot be written ({error}); the previous one is untouched"
        ) from error
    for stale in folder.glob("tensors-[0-9]*.safetensors"):
        if stale != tensor_file:
            stale.unlink(missing_ok=True)
    return folder / "checkpoint.json"


def load(folder: str | Path) -> dict[str, Any]:
    """Read what ``save`` wrote. Raises ``CheckpointError`` if it is missing, damaged or of a newer format."""
    path = Path(folder) / "checkpoint.json"
    if not path.exists():
        raise CheckpointError(
            f"checkpoint = {str(folder)!r}: holds no checkpoint.json; give a folder that a run has saved to"
        )
    try:
        document = json.loads(path.read_text())
        if document["format"] > FORMAT:
            raise CheckpointError(
                f"checkpoint = {str(folder)!r}: is of format {document['format']}; update equipoise to read it"
            )
        tensors = load_file(path.parent / document["tensors"])
        state: dict[str, Any] = _unpack(document["state"], tensors)
        return state
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint = {str(folder)!r}: is damaged ({type(error).__name__}: {error}); "
            "delete the folder to start again, or restore it from a copy"
        ) from error


def exists(folder: str | Path) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return (Path(folder) / "checkpoint.json").exists()


def _tensor_file(folder: Path) -> Path | None:
    files = sorted(folder.glob("tensors-[0-9]*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))
    return files[-1] if files else None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while key in tensors:  # {"a/b": x} and {"a": {"b": y}} have one path
            key += "'"
        # A copy of its own: safetensors refuses tensors that share memory (tied weights, views).
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"state{key} = {type(value).__name__}: a state_dict may hold tensors, numbers, strings, lists and dicts"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """The state of torch's global generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
