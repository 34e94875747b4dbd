"""Checkpoints: what is resumed, what survives a kill, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from small import Stateful, blobs, cosine, mlp, same, sgd
from torch import Tensor, nn
from torch.utils.data import Sampler, WeightedRandomSampler

import equipoise
from equipoise import Method, Run
from equipoise.errors import CheckpointError, NonFiniteError
from equipoise.training import checkpoint as checkpoints


class Stop(Exception):
    """Stands for a kill."""


class Shuffle(Sampler[int]):
    """A sampler with a state of its own, that is not in any generator of the run."""

    def __init__(self, size: int) -> None:
        self.size, self.passes = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.passes)).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


class OwnSampler(Method):
    name = "own-sampler"

    def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
        return Shuffle(run.num_examples or 0)


class Weighted(Method):
    """A stock sampler on a generator of the method: it cannot say where it is within an epoch."""

    name = "weighted"

    def configure_sampler(self, run: Run, sampler: Sampler[int]) -> Sampler[int]:
        return WeightedRandomSampler([1.0, 2.0] * 45, 60, generator=run.new_generator(self))


class Interrupt(Method):
    """Raises after a number of optimizer steps."""

    name = "interrupt"

    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def settings(self) -> dict[str, Any]:
        return {}  # the resumed run is the same run

    def after_step(self, run: Run) -> None:
        if run.global_step == self.at:
            raise Stop


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)


def warm_up(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    schedule = torch.optim.lr_scheduler
    return schedule.SequentialLR(
        optimizer,
        [schedule.LambdaLR(optimizer, lambda step: (step + 1) / 3), schedule.CosineAnnealingLR(optimizer, total_steps)],
        milestones=[3],
    )


CASES: dict[str, dict[str, Any]] = {
    "sgd-cosine": {"optimizer": sgd, "scheduler": cosine},
    "adam-one-cycle-accumulated": {"optimizer": adam, "scheduler": one_cycle, "accumulation": 2},
    "warm-up-bf16": {"optimizer": sgd, "scheduler": warm_up, "mixed_precision": "bf16"},
    "stateful-method": {"optimizer": sgd, "methods": lambda: [Stateful()]},
    "own-sampler": {"optimizer": sgd, "methods": lambda: [OwnSampler()]},
    "weighted-sampler": {"optimizer": sgd, "methods": lambda: [Weighted()]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("every", "at"), [(None, 11), (1, 4), (2, 10), (2, 13), (5, 6)])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(case: str, every: int | None, at: int) -> None:
    """90 examples, 5 steps an epoch (4 of 3 in the weighted case): killed at, before and after the ends of epochs."""
    settings = dict(CASES[case])
    methods: Callable[[], list[Method]] = settings.pop("methods", list)

    def train(stop: int | None, **more: Any) -> Run:
        return equipoise.fit(
            mlp(dropout=0.3, norm=True),
            blobs(),
            epochs=3,
            batch_size=20,
            clip_norm=1.0,
            seed=4,
            methods=[*methods(), Interrupt(stop)],
            **settings,
            **more,
        )

    whole = train(None)
    assert whole.total_steps is not None
    at = min(at, whole.total_steps - 1)
    with pytest.raises(Stop):
        train(at, checkpoint="saved", checkpoint_every=every)
    saved = checkpoints.exists("saved")
    resumed = train(None, checkpoint="saved", checkpoint_every=every, resume=True)
    assert saved
    assert same(whole.model, resumed.model)
    assert whole.history == resumed.history
    assert whole.global_step == resumed.global_step
    for ours, theirs in zip(whole.methods, resumed.methods, strict=True):
        assert flat(ours.state_dict()) == flat(theirs.state_dict())


def flat(state: Any) -> Any:
    """A state with its tensors as lists, so that it compares with ``==``."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    return [flat(value) for value in state] if isinstance(state, list | tuple) else state


def test_a_finished_run_resumes_to_itself_and_without_a_checkpoint_it_starts() -> None:
    first = equipoise.fit(mlp(), blobs(), epochs=2, checkpoint="saved", resume=True)
    again = equipoise.fit(mlp(seed=9), blobs(), epochs=2, checkpoint="saved", resume=True)
    assert same(first.model, again.model) and first.history == again.history
    anew = equipoise.fit(mlp(seed=9), blobs(), epochs=2, checkpoint="saved")
    assert not same(first.model, anew.model)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight
            self.register_buffer("view", torch.arange(12.0)[6:])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.relu(self.first(x))))

    settings: dict[str, Any] = {"epochs": 2, "batch_size": 30}
    whole = equipoise.fit(Tied(), blobs(), **settings)
    settings |= {"checkpoint": "saved", "checkpoint_every": 1}
    with pytest.raises(Stop):
        equipoise.fit(Tied(), blobs(), methods=[Interrupt(2)], **settings)
    resumed = equipoise.fit(Tied(), blobs(), methods=[Interrupt()], resume=True, **settings)
    assert same(whole.model, resumed.model)
    assert resumed.model.first.weight is resumed.model.second.weight


def test_own_loops_save_and_load_too(tmp_path: Path) -> None:
    def begin(model: nn.Module) -> Run:
        return equipoise.start(model, sgd, data=blobs(), batch_size=20, methods=[Stateful()])

    def advance(run: Run, steps: int) -> None:
        for batch, _ in zip(run.batches(), range(steps), strict=False):
            run.backward(run.training_loss(batch))
            run.step()
            run.position += 1

    whole, first, second = (begin(mlp()) for _ in range(3))
    advance(whole, 5)
    advance(first, 2)
    checkpoints.save(first.state_dict(), tmp_path / "x")
    second.load_state_dict(checkpoints.load(tmp_path / "x"))
    assert (second.global_step, second.position) == (2, 2)
    advance(second, 3)
    assert same(whole.model, second.model)


# -- what survives -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", ["save_file", "_flush", "json.dump", "os.replace"])
@pytest.mark.parametrize("how", [Stop, OSError(28, "No space left on device"), SafetensorError("IoError code: 28")])
def test_killed_or_failed_while_saving_keeps_the_previous_one(
    victim: str, how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    checkpoints.save({"x": torch.ones(3)}, folder)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            if victim == "save_file":
                Path(args[1]).write_bytes(b"half a fi")
            if victim == "json.dump":
                args[1].write('{"format": 1, "tens')
            raise how

        patch.setattr(f"equipoise.training.checkpoint.{victim}", fail)
        with pytest.raises(
            Stop if how is Stop else CheckpointError, match=None if how is Stop else "previous one is untouched"
        ):
            checkpoints.save({"x": torch.zeros(3)}, folder)
    assert torch.equal(checkpoints.load(folder)["x"], torch.ones(3))
    checkpoints.save({"x": torch.full((3,), 2.0)}, folder)
    assert torch.equal(checkpoints.load(folder)["x"], torch.full((3,), 2.0))
    assert len(list(folder.iterdir())) == 2  # what was half written is cleared away


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "tensors-mine.safetensors").write_text("mine")
    checkpoints.save({"x": torch.ones(1)}, tmp_path)
    checkpoints.save({"x": torch.ones(1)}, tmp_path)
    assert (tmp_path / "tensors-mine.safetensors").read_text() == "mine"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        equipoise.fit(mlp(), blobs(), epochs=1, checkpoint=tmp_path / "saved")


def test_a_checkpoint_that_cannot_go_on_never_replaces_a_good_one() -> None:
    class Explode(Method):
        def after_step(self, run: Run) -> None:
            if run.global_step == 3:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(torch.inf)

    with pytest.raises(NonFiniteError, match=r"step 3: the weights 0\.weight"):
        equipoise.fit(mlp(), blobs(), epochs=3, checkpoint="saved", methods=[Explode()])
    assert checkpoints.load("saved")["counters"][2] == 2


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.fixture
def saved() -> Path:
    equipoise.fit(mlp(), blobs(), epochs=1, checkpoint="saved", methods=[Stateful()])
    return Path("saved")


def resume(**changes: Any) -> None:
    settings: dict[str, Any] = {"epochs": 1, "methods": [Stateful()], "checkpoint": "saved", "resume": True, **changes}
    equipoise.fit(settings.pop("model", None) or mlp(), settings.pop("data", None) or blobs(), **settings)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        '{"format": 1}',
        '{"format": "1"}',
        '{"format": 1, "tensors": 3, "state": {}}',
        "\xff\xfe",
    ],
)
def test_damaged_json(saved: Path, content: str) -> None:
    (saved / "checkpoint.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="'saved': is damaged"):
        resume()


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_tensors(saved: Path, cut: int) -> None:
    (file,) = saved.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="is damaged"):
        resume()
    file.unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        resume()


def edit(saved: Path, change: Callable[[Any], None]) -> None:
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_newer_format_and_missing_parts(saved: Path) -> None:
    edit(saved, lambda d: d.update(format=2))
    with pytest.raises(CheckpointError, match="format 2; update equipoise"):
        resume()
    edit(saved, lambda d: d.update(format=1))
    for number in range(len(json.loads((saved / "checkpoint.json").read_text())["state"]["dict"])):
        shutil.copytree(saved, "copy", dirs_exist_ok=True)
        edit(Path("copy"), lambda d, n=number: d["state"]["dict"].pop(n))
        key = json.loads((saved / "checkpoint.json").read_text())["state"]["dict"][number][0]
        if key in ("scaler", "scheduler"):  # not used by this run
            continue
        with pytest.raises(CheckpointError, match="does not fit"):
            resume(checkpoint="copy")
    edit(saved, lambda d: d.update(state={"dict": []}))
    with pytest.raises(CheckpointError):
        resume()


def test_another_run(saved: Path) -> None:
    for changes, word in (
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"methods": []}, "methods"),
        ({"epochs": 2}, "total_steps: 1 there, 2 here"),
        ({"data": blobs(50)}, "num_examples: 90 there, 50 here"),
        ({"model": nn.Linear(6, 3)}, "does not fit"),
        ({"optimizer": adam}, "does not fit"),
        ({"scheduler": cosine}, "does not fit"),
    ):
        with pytest.raises(CheckpointError, match=word):
            resume(**changes)
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
        checkpoints.load("nowhere")


def test_addresses_in_settings_do_not_make_another_run() -> None:
    class Callback(Method):
        name = "callback"

        def __init__(self, function: Any) -> None:
            self.function = function

    equipoise.fit(mlp(), blobs(), epochs=1, checkpoint="saved", methods=[Callback(object())])
    equipoise.fit(mlp(), blobs(), epochs=1, checkpoint="saved", methods=[Callback(object())], resume=True)


# -- the format --------------------------------------------------------------------------------------------------------
def test_any_nesting_comes_back(tmp_path: Path) -> None:
    state = {
        "a/b": torch.ones(2),
        "a": {"b": torch.zeros(2), 1: [1, 2.5, None, True, "x", (torch.tensor(3), [])]},
        "kinds": [torch.tensor([1 + 2j]), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16), torch.eye(3).T[1]],
        "tiny": [1e-320, 0.1 + 0.2, float("inf"), 2**62],
        "tensor": {"dict": {"list": []}},
    }
    checkpoints.save(state, tmp_path)
    assert flat(checkpoints.load(tmp_path)) == flat(state)
    loaded = checkpoints.load(tmp_path)
    assert isinstance(loaded["a"][1][5], tuple) and loaded["kinds"][2].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="state/x/0 = object"):
        checkpoints.save({"x": [object()]}, tmp_path)
    assert checkpoints.load(tmp_path)["tiny"] == state["tiny"]


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    resume()
    source = Path(checkpoints.__file__).read_text()
    assert "import pickle" not in source and "torch.load" not in source
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
