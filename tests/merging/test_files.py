"""Merging files against merging in memory; folders that transformers loads; and what must be refused before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.errors import ArgumentError
from equipoise.merging import selection, vectors
from equipoise.merging.baselines import DARE, TIES, TaskArithmetic, WeightAveraging
from equipoise.merging.files import SafetensorsModel, merge_files
from equipoise.merging.pcb_merging import PCBMerging, pcb_merge_state_dicts
from equipoise.merging.vectors import merge_state_dicts

METHODS = [
    WeightAveraging(),
    TaskArithmetic(),
    TIES(),
    DARE(),
    DARE(elect_sign=True),
    PCBMerging(ratio=0.3),
    PCBMerging(inter="normalized_sum", coefficients=(0.5, 1.0, 1.5)),
    PCBMerging(inter="pairwise"),
    PCBMerging(form="softmax"),
]
SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (10, 40), "empty": (0, 3), "scalar": ()}


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**found, "count": torch.tensor([seed]), "mask": torch.tensor([True, False])}


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A model in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and three models, sharded differently."""
    return [write(tmp_path / f"model-{i}", state(i), shards=1 + i % 3) for i in range(4)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_files_give_what_memory_gives(method: Any, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge_state_dicts(method.plan(3), state(0), [state(i) for i in (1, 2, 3)])
    for module in (selection, vectors):
        monkeypatch.setattr(module, "BLOCK", 64)
    done = merge_files(method.plan(3), models[0], models[1:], "out")
    found = load_file(done.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "softmax" in repr(method):  # sums of blocks, in float64
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(found[name], tensor), name
    assert (done.models, done.merged, done.copied, done.entries) == (3, 4, 3, 1641)
    assert not list(done.folder.parent.glob(".out*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = [write(tmp_path / str(i), state(i, dtype)) for i in range(3)]
    done = merge_files(PCBMerging().plan(), paths[0], paths[1:], "out")
    expected = pcb_merge_state_dicts(state(0, dtype), [state(1, dtype), state(2, dtype)])
    found = load_file(done.folder / "model.safetensors")
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


def test_the_layout_is_the_bases(tmp_path: Path) -> None:
    base = write(tmp_path / "base", state(0), shards=3)
    (base / "config.json").write_text('{"model_type": "tiny"}')
    (base / "vocab.txt").write_text("a\nb\n")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "runs").mkdir()
    model = write(tmp_path / "model", state(1))
    done = merge_files(PCBMerging().plan(), base, [model], "deep/out", record={"method": "pcb"})
    names = {path.name for path in done.folder.iterdir()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    others = {"config.json", "vocab.txt", "model.safetensors.index.json", "equipoise_merge.json"}
    assert names == shards | others
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(done.folder / file, "pt") as opened:
            assert name in opened.keys() and opened.metadata() == {"format": "pt"}  # noqa: SIM118
    assert json.loads((done.folder / "equipoise_merge.json").read_text()) == {"method": "pcb"}
    assert (done.folder.stat().st_mode & 0o777) == (Path("deep").stat().st_mode & 0o777)


def test_single_files_merge_into_a_folder(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one")]
    for i, path in enumerate(paths):
        save_file(state(i), path)
    done = merge_files(WeightAveraging().plan(), paths[0], paths[1:], "out")
    assert [path.name for path in done.folder.iterdir()] == ["base.safetensors"]
    assert torch.equal(load_file(done.folder / "base.safetensors")["scalar"], state(1)["scalar"])


def test_heads_are_excluded(models: list[Path]) -> None:
    done = merge_files(PCBMerging().plan(), models[0], models[1:], "out", exclude=["b"])
    assert torch.equal(load_file(done.folder / "model.safetensors")["b.weight"], state(0)["b.weight"])


# -- Hugging Face -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_transformers_loads_the_merged_folder(tmp_path: Path, shard_size: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = transformers.GPT2LMHeadModel(config)  # its head is tied to the embedding
        folders.append(tmp_path / f"gpt-{seed}")
        network.save_pretrained(folders[-1], max_shard_size=shard_size)
    done = merge_files(PCBMerging(ratio=0.5).plan(), folders[0], folders[1:], tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    states = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    expected = pcb_merge_state_dicts(states[0], states[1:], ratio=0.5)
    found = merged.state_dict()
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert done.entries == sum(p.numel() for p in merged.parameters())
    assert merged(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    again = transformers.AutoModel.from_pretrained(done.folder)
    assert torch.equal(again.wte.weight, found["transformer.wte.weight"])


# -- memory -----------------------------------------------------------------------------------------------------------
def test_one_tensor_of_each_model_is_read_at_a_time(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = SafetensorsModel.__getitem__

    def watched(self: SafetensorsModel, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(SafetensorsModel, "__getitem__", watched)
    merge_files(PCBMerging().plan(), models[0], models[1:], "out")
    assert len(alive) > 100 and most <= len(models) + 1  # the base's once more, while it is written


# -- bad input --------------------------------------------------------------------------------------------------------
def nan(tensors: dict[str, Tensor]) -> None:
    tensors["a.weight"][3, 4] = math.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("a.bias"), r"model-2: lacks a.bias: must have the base's architecture"),
        (lambda s: s.update(extra=torch.ones(2)), r"model-2: has beside the base's tensors extra"),
        (lambda s: s.update({"a.bias": torch.ones(9)}), r"model-2: a.bias has shape \(9,\)"),
        (nan, r"model-2: a.weight holds NaN"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    models: list[Path], change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    broken = state(2)
    change(broken)
    write(models[2], broken, shards=3)
    with pytest.raises(ArgumentError, match=words):
        merge_files(PCBMerging().plan(), models[0], models[1:], "out")
    assert not list(Path().iterdir()) or not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_other_kinds_and_vocabularies_are_refused(models: list[Path]) -> None:
    go = lambda: merge_files(PCBMerging().plan(), models[0], models[1:], "out", overwrite=True)  # noqa: E731
    (models[0] / "config.json").write_text('{"model_type": "bert"}')
    (models[1] / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ArgumentError, match="model-1: is of type 'gpt2', and the base of 'bert'"):
        go()
    (models[1] / "config.json").unlink()
    (models[0] / "vocab.txt").write_text("a\nb\n")
    (models[3] / "vocab.txt").write_text("b\na\n")
    with pytest.raises(ArgumentError, match=r"model-3: has another tokenizer \(2 tokens against 2, not the same\)"):
        go()
    (models[3] / "vocab.txt").unlink()
    words = lambda *known: json.dumps({"model": {"vocab": {word: i for i, word in enumerate(known)}}})  # noqa: E731
    (models[0] / "tokenizer.json").write_text(words("a", "b"))
    (models[1] / "tokenizer.json").write_text(words("a", "b", "c"))
    with pytest.raises(ArgumentError, match=r"model-1: has another tokenizer \(3 tokens against 2"):
        go()
    (models[1] / "tokenizer.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"tokenizer.json is no JSON"):
        go()
    (models[1] / "tokenizer.json").unlink()
    assert go().merged == 4


def test_an_embedding_of_another_size_is_said_in_words(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n), {"model.embed_tokens.weight": torch.ones(n, 4)}) for n in (10, 12)]
    with pytest.raises(ArgumentError, match=r"another vocabulary .12 tokens against 10., so another tokenizer"):
        merge_files(WeightAveraging().plan(), paths[0], [paths[1]], "out")


def test_pickles_adapters_and_other_folders_are_refused(models: list[Path], tmp_path: Path) -> None:
    go = lambda path: merge_files(PCBMerging().plan(), models[0], [models[1], path], "out")  # noqa: E731
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(state(1), pickled / "pytorch_model.bin")
    for path in (pickled, pickled / "pytorch_model.bin"):
        with pytest.raises(ArgumentError, match=r"pytorch_model.bin: is a pickle.*safe_serialization=True"):
            go(path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"is an adapter without its base.*merge_and_unload"):
        go(adapter)
    (tmp_path / "none").mkdir()
    with pytest.raises(ArgumentError, match=r"none: must hold model.safetensors, or shards"):
        go(tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"model = .*missing.*existing folder"):
        go(tmp_path / "missing")
    torn = write(tmp_path / "torn", state(1))
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArgumentError, match=r"torn: model.safetensors cannot be read"):
        go(torn)
    (models[2] / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"names model-00002-of-00003.safetensors, which the folder must hold"):
        go(models[2])
    write(tmp_path / "note", state(1))
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ArgumentError, match=r"must be a .safetensors file"):
        go(tmp_path / "note.txt")


def test_an_index_that_leads_elsewhere_is_refused(models: list[Path]) -> None:
    index = models[2] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model-1/model-00001-of-00002.safetensors"}}))
    with pytest.raises(ArgumentError, match="which the folder must hold"):
        SafetensorsModel(models[2])
    index.write_text("[]")
    with pytest.raises(ArgumentError, match="no index of shards"):
        SafetensorsModel(models[2])


def test_no_models_and_models_given_twice(models: list[Path]) -> None:
    with pytest.raises(ArgumentError, match="at least 1 model"):
        merge_files(PCBMerging().plan(), models[0], [], "out")
    done = merge_files(PCBMerging().plan(), models[0], [models[1], models[1], models[0]], "out")
    assert any("model-1 is given more than once" in text for text in done.warnings)
    assert any("model-0 is the base itself" in text for text in done.warnings)


def test_a_folder_in_use_is_left_alone(models: list[Path]) -> None:
    plan = WeightAveraging().plan()
    out = Path("out")
    out.mkdir()
    merge_files(plan, models[0], models[1:], out)  # an empty folder may be there
    (out / "mine.txt").write_text("x")
    with pytest.raises(ArgumentError, match=r"new or empty folder.*--overwrite"):
        merge_files(plan, models[0], models[1:], out)
    assert (out / "mine.txt").exists()
    merge_files(plan, models[0], models[2:], out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in Path().iterdir()] == ["out"] or not list(Path().glob(".out*"))
    for target in (models[1], models[1].parent):
        with pytest.raises(ArgumentError, match="must not hold a model that is merged"):
            merge_files(plan, models[0], models[1:], target, overwrite=True)
    assert (models[1] / "model.safetensors.index.json").exists()


def test_an_error_in_the_middle_leaves_nothing(models: list[Path]) -> None:
    def plan(blocks: Any, n: int, d: int) -> Any:
        def weigh(block: Tensor) -> Tensor:
            raise KeyboardInterrupt

        return weigh

    Path("out").mkdir()
    (Path("out") / "mine.txt").write_text("x")
    before = sorted(path.name for path in Path().iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_files(plan, models[0], models[1:], "out", overwrite=True)
    assert sorted(path.name for path in Path().iterdir()) == before and (Path("out") / "mine.txt").exists()
