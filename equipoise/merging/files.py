"""Merge models in safetensors files, tensor by tensor, into a folder that Hugging Face's ``from_pretrained`` loads.

Of each model at most one tensor is in memory, and of the work a block of it, for every method here: thresholds are found by passes
over the files (``equipoise.merging.selection``). The result is that of merging the models' state_dicts in memory. The shards
and the other files (configuration, tokenizer) are the base's. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from equipoise.errors import ArgumentError, refuse
from equipoise.merging.vectors import Exclude, Models, Plan, check_models

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
REMEDY = "Save it as safetensors: model.save_pretrained(folder, safe_serialization=True)"


class SafetensorsModel(Mapping[str, Tensor]):
    """The tensors of a model by name, each read when it is asked for, and given back when it is let go.

    path: a folder with ``model.safetensors``, or with shards and their index; or a single file. ``files`` names each tensor's file.
    Raises ``ArgumentError`` for anything else, a pickle above all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            refuse("model", str(path), "be an existing folder or .safetensors file")
        shards = [self.path] if self.path.is_file() else _shards(self.path)
        self.folder = shards[0].parent
        self.files: dict[str, str] = {}
        for shard in shards:
            if shard.suffix != ".safetensors":
                _refuse_pickle(shard)
            try:
                with safe_open(shard, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # it is no mapping
                        if name in self.files:
                            raise ArgumentError(f"model {path}: {name} is in {self.files[name]} and in {shard.name}")
                        self.files[name] = shard.name
            except (SafetensorError, OSError) as error:
                raise ArgumentError(f"model {path}: {shard.name} cannot be read ({error}); fetch it again") from error

    def __getitem__(self, name: str) -> Tensor:
        # Opened for each tensor: what was read stays in the process's memory as long as the file is open.
        with safe_open(self.folder / self.files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def json(self, name: str) -> Any:
        """The content of a JSON file that lies beside the weights, None where there is none."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise ArgumentError(f"model {self.path}: {name} is no JSON ({error})") from error


@dataclass(frozen=True)
class Summary:
    """What was merged into ``folder``: numbers of models, of tensors merged and copied, of entries merged, and warnings."""

    folder: Path
    models: int
    merged: int
    copied: int
    entries: int
    warnings: tuple[str, ...] = ()


def merge_files(
    plan: Plan,
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    exclude: Exclude = (),
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Summary:
    """Merge models fine-tuned from ``base`` into the new folder ``out``; return what was done.

    plan: how, the ``plan()`` of a merging method. base, models: folders in Hugging Face's layout, or .safetensors files.
    exclude: as for ``merge_state_dicts``. overwrite: replace ``out`` if it is there and not empty.
    record: kept as JSON in ``out/equipoise_merge.json``.

    Everything is checked first: architecture, vocabulary, NaN, pickles (``ArgumentError``). The folder is written beside ``out``
    under another name and renamed at the end, so that ``out`` is complete or is not there.
    """
    target = Path(os.path.abspath(out))
    warnings = _check_paths(base, models, target, overwrite)
    origin = SafetensorsModel(base)
    finetuned = [SafetensorsModel(model) for model in models]
    _check_configurations(origin, finetuned)
    checked = check_models(origin, finetuned, exclude, [str(base), *map(str, models)])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with torch.no_grad():
            _write(plan, origin, checked, temporary)
        for path in sorted(origin.folder.iterdir()) if origin.path.is_dir() else []:
            if path.is_file() and not _is_weights(path):
                shutil.copy2(path, temporary / path.name)
        if record is not None:
            text = json.dumps(dict(record), indent=2, ensure_ascii=False)
            (temporary / "equipoise_merge.json").write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o777 & ~_umask())
        _put(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    merged = len(checked.names)
    return Summary(target, len(models), merged, len(origin) - merged, checked.size, tuple(warnings))


# -- writing ----------------------------------------------------------------------------------------------------------
def _write(plan: Plan, origin: SafetensorsModel, models: Models, folder: Path) -> None:
    """Write the shards of the base with merged tensors, one tensor after the other.

    A file is the length of the header (8 bytes, little endian), the header in JSON, then the bytes of the tensors. The header is
    the base's, so that every tensor has its place before it is computed; tensors are computed in the order of the plan.
    """
    places: dict[str, tuple[Path, int]] = {}
    for shard in sorted(set(origin.files.values())):
        with (origin.folder / shard).open("rb") as source, (folder / shard).open("wb") as sink:
            length = source.read(8)
            text = source.read(int.from_bytes(length, "little"))
            sink.write(length + text)
            entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
            places |= {n: (folder / shard, sink.tell() + entry["data_offsets"][0]) for n, entry in entries.items()}
            sink.truncate(sink.tell() + max((entry["data_offsets"][1] for entry in entries.values()), default=0))
    weigh = plan(models.blocks, models.count, models.size)
    merged = set(models.names)
    for name in (*models.names, *(name for name in origin if name not in merged)):
        tensor = models.merged(name, weigh) if name in merged else origin[name]
        path, offset = places[name]
        with path.open("r+b") as sink:
            sink.seek(offset)
            if tensor.numel():
                sink.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _put(temporary: Path, target: Path) -> None:
    """Rename the finished folder to its place; what was there is removed once the new one stands."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)) / target.name
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    if old is not None:
        shutil.rmtree(old.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- checks -----------------------------------------------------------------------------------------------------------
def _check_paths(base: str | Path, models: Sequence[str | Path], target: Path, overwrite: bool) -> list[str]:
    if not models:
        raise ArgumentError("models = []: must name at least 1 model fine-tuned from the base")
    real = [Path(path).resolve() for path in (base, *models)]
    for path in real:
        folder = path.parent if path.is_file() else path
        if target.resolve() in (folder, *folder.parents):
            refuse("out", str(target), f"not hold a model that is merged ({path})")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        refuse("out", str(target), "be a new or empty folder", "Give --overwrite to replace it")
    warnings = [
        f"{path} is given more than once, and counts as often"
        for path in sorted({p for p in real if real.count(p) > 1})
    ]
    if real[0] in real[1:]:
        warnings.append(f"{real[0]} is the base itself: its task vector is zero")
    return warnings


def _check_configurations(origin: SafetensorsModel, finetuned: Sequence[SafetensorsModel]) -> None:
    """Refuse another kind of model, and another vocabulary of the same size, which no tensor's shape shows."""
    kind, words = _kind(origin), _vocabulary(origin)
    for model in finetuned:
        theirs = _kind(model)
        if kind is not None and theirs is not None and theirs != kind:
            raise ArgumentError(
                f"{model.path}: is of type {theirs!r}, and the base of {kind!r}: must be of one architecture"
            )
        other = _vocabulary(model)
        if words is not None and other is not None and words != other:
            raise ArgumentError(
                f"{model.path}: has another tokenizer ({len(other)} tokens against {len(words)}, not the same): "
                "rows of the embeddings would mean other tokens. Merge models that share the base's tokenizer"
            )


def _kind(model: SafetensorsModel) -> str | None:
    config = model.json("config.json")
    return config.get("model_type") if isinstance(config, dict) else None


def _vocabulary(model: SafetensorsModel) -> Any:
    tokenizer = model.json("tokenizer.json")
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("model"), dict):
        return tokenizer["model"].get("vocab")
    text = model.folder / "vocab.txt"
    return text.read_text(encoding="utf-8").splitlines() if text.is_file() else model.json("vocab.json")


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"model {folder}: {INDEX} is no index of shards ({error!r})") from error
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing or not names:
            raise ArgumentError(
                f"model {folder}: {INDEX} names {', '.join(missing) or 'no file'}, which the folder must hold"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / "adapter_config.json").is_file():
        raise ArgumentError(
            f"model {folder}: is an adapter without its base: must be a whole model. Merge it into its base first, and save that "
            "(peft: model.merge_and_unload().save_pretrained(folder))"
        )
    pickles = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if pickles:
        _refuse_pickle(pickles[0])
    raise ArgumentError(f"model {folder}: must hold {SINGLE}, or shards and {INDEX}")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ArgumentError(
            f"model {path}: is a pickle, which could run any code when it is loaded, and is not read. {REMEDY}"
        )
    raise ArgumentError(f"model {path}: must be a .safetensors file, or a folder of them. {REMEDY}")


def _is_weights(path: Path) -> bool:
    if path.name == INDEX:
        return False
    return path.suffix in (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf") or path.name.endswith(
        ".index.json"
    )
