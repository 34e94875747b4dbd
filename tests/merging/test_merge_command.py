"""``equipoise merge`` as a user meets it."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from equipoise.cli import main
from equipoise.cli.app import app
from equipoise.errors import EquipoiseError
from equipoise.merging.baselines import DARE, TIES
from equipoise.merging.pcb_merging import pcb_merge_state_dicts
from equipoise.merging.vectors import State, merge_state_dicts


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(20, 10, generator=generator) for name in ("body.weight", "head.weight")}


@pytest.fixture(autouse=True)
def _models() -> None:
    for i, name in enumerate(("base", "one", "two")):
        Path(name).mkdir()
        save_file(state(i), f"{name}/model.safetensors")
        Path(name, "config.json").write_text('{"model_type": "tiny"}')


def run(*words: str) -> str:
    """The output of a command that must succeed."""
    found = CliRunner().invoke(app, ["merge", *words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def merged(folder: str = "out") -> State:
    return load_file(f"{folder}/model.safetensors")


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_merges_and_says_what_it_did() -> None:
    text = run("base", "one", "two", "--out", "out", "--ratio", "0.3", "--coefficient", "1.2", "--exclude", "head")
    assert "2 models merged by pcb (ratio 0.3, coefficients 1.2, clip 0.0001, inter sum, form tanh)" in text
    assert "1 tensors with 200 parameters merged, 1 tensors copied" in text
    expected = pcb_merge_state_dicts(state(0), [state(1), state(2)], ratio=0.3, coefficients=1.2, exclude=["head"])
    assert same(merged(), expected)
    assert json.loads(Path("out/equipoise_merge.json").read_text()) == {
        "method": "pcb",
        "options": {"ratio": 0.3, "coefficients": 1.2, "clip": 0.0001, "inter": "sum", "form": "tanh"},
        "base": "base",
        "models": ["one", "two"],
        "exclude": ["head"],
    }


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (["ties", "--ratio", "0.4", "--coefficient", "2"], TIES(ratio=0.4, coefficient=2.0).plan()),
        (["dare-linear", "--density", "0.3", "--seed", "7"], DARE(density=0.3).plan(7)),
        (["dare-ties", "--seed", "7"], DARE(elect_sign=True).plan(7)),
    ],
)
def test_every_method_has_its_options(words: list[str], plan: object) -> None:
    run("base", "one", "two", "--out", "out", "--method", *words)
    assert same(merged(), merge_state_dicts(plan, state(0), [state(1), state(2)]))  # type: ignore[arg-type]


def test_coefficients_and_forms_and_json() -> None:
    words = ["--coefficients", "0.5,1.5", "--inter", "pairwise", "--clip", "0.01", "--json"]
    found = json.loads(run("base", "one", "two", "--out", "out", *words))
    assert found["options"]["coefficients"] == [0.5, 1.5] and found["parameters"] == 400
    settings = {"coefficients": (0.5, 1.5), "inter": "pairwise", "clip": 0.01}
    assert same(merged(), pcb_merge_state_dicts(state(0), [state(1), state(2)], **settings))  # type: ignore[arg-type]
    run("base", "one", "two", "--out", "soft", "--form", "softmax")
    assert same(merged("soft"), pcb_merge_state_dicts(state(0), [state(1), state(2)], form="softmax"))
    run("base", "one", "two", "--out", "mean", "--method", "average")
    run("base", "one", "two", "--out", "half", "--method", "task-arithmetic", "--coefficient", "0.5")
    torch.testing.assert_close(dict(merged("mean")), dict(merged("half")))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["base", "--out", "out"], "MODEL: at least one model is needed"),
        (["base", "one"], "--out: the folder of the merged model is needed"),
        (["base", "one", "--out", "out", "--method", "tiess"], "method = 'tiess'.*Did you mean 'ties'"),
        (["base", "one", "--out", "out", "--density", "0.5"], "--density: is no option of pcb, which has --ratio"),
        (["base", "one", "--out", "out", "--method", "average", "--seed", "1"], "--seed: is no option of average"),
        (["base", "one", "--out", "out", "--ratio", "1.5"], "ratio = 1.5"),
        (["base", "one", "--out", "out", "--inter", "summ"], "inter = 'summ'"),
        (["base", "one", "--out", "out", "--coefficients", "1,2"], "be 1 numbers"),
        (["base", "one", "--out", "out", "--coefficients", "a"], "numbers separated by commas"),
        (["base", "one", "--out", "out", "--coefficient", "1", "--coefficients", "1"], "not both"),
        (["base", "one", "--out", "out", "--exclude", "heat"], "exclude = 'heat'.*Did you mean 'head"),
        (["base", "nowhere", "--out", "out"], "nowhere.*existing folder"),
        (["base", "one", "--out", "two"], "new or empty folder"),
        (["base", "one", "two", "--out", "one", "--overwrite"], "must not hold a model that is merged"),
    ],
)
def test_mistakes_are_said_before_any_work(words: list[str], error: str) -> None:
    before = sorted(path.name for path in Path().rglob("*"))
    with pytest.raises(EquipoiseError, match=error):
        run(*words)
    assert sorted(path.name for path in Path().rglob("*")) == before


def test_an_error_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = state(2)
    broken["head.weight"][0, 0] = math.nan
    save_file(broken, "two/model.safetensors")
    monkeypatch.setattr(sys, "argv", ["equipoise", "merge", "base", "one", "two", "--out", "out"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: two: head.weight holds NaN or infinite values: leave this model out, or repair it\n"
    )
    assert not Path("out").exists()


def test_a_model_given_twice_is_a_warning() -> None:
    found = CliRunner().invoke(app, ["merge", "base", "one", "one", "--out", "out"])
    assert found.exit_code == 0 and "one is given more than once" in found.stderr


def test_a_killed_merge_leaves_no_folder() -> None:
    big = {f"layer.{i:02d}": torch.randn(1000, 1000) for i in range(12)}
    for name in ("base", "one", "two"):
        save_file({key: tensor + len(name) for key, tensor in big.items()}, f"{name}/model.safetensors")
    words = ["merge", "base", "one", "two", "--out", "out"]
    process = subprocess.Popen([sys.executable, "-m", "equipoise", *words], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(Path().glob(".out.*.part")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("out").exists() and list(Path().glob(".out.*.part"))
    run("base", "one", "two", "--out", "out", "--method", "average")
    assert merged().keys() == big.keys()
