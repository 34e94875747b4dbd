"""Reference models and the user's own factories."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.errors import ArgumentError
from equipoise.models import MLP, NAMES, Classifier, ConvNet, Linear, build, source_digest
from equipoise.training.features import find_head

SHAPES = [(1, 8, 8), (1, 14, 14), (3, 28, 28), (3, 1, 5), (1, 40)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_features_and_head_make_the_prediction(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 5, seed=1).eval()
    assert isinstance(model, Classifier)
    x = torch.randn(4, *shape)
    features = model.forward_features(x)
    assert features.shape == (4, model.get_classifier().in_features)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    assert torch.equal(model(x), model.forward_head(features)) and model(x).shape == (4, 5)
    assert find_head(model) is model.get_classifier()
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_models_for_tables(name: str) -> None:
    assert build(name, (7,), 1)(torch.randn(3, 7)).shape == (3, 1)


def test_mlp_is_the_claims_network() -> None:
    layers = [m for m in build("mlp", (1, 14, 14), 10).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == [
        (196, 256, True),
        (256, 256, True),
        (256, 10, False),
    ]


def test_mlp_options() -> None:
    model = MLP((4,), 2, hidden=(8,), head_bias=True, dropout=0.5)
    assert model.head.bias is not None and any(isinstance(m, nn.Dropout) for m in model.modules())
    x = torch.ones(64, 4)
    assert torch.equal(model.eval()(x), model(x))
    assert not any(isinstance(m, nn.Dropout) for m in MLP((4,), 2).modules())


def test_convnet_is_small_and_works_in_bfloat16() -> None:
    model = ConvNet((1, 28, 28), 10)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert model.bfloat16()(torch.randn(2, 1, 28, 28, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_seed_fixes_the_weights_and_nothing_global_moves(name: str) -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    one, same, other = (build(name, (1, 8, 8), 3, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = [(a, b, c) for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build("mlp", (4,), 0),
        lambda: build("mlp", (0,), 2),
        lambda: build("mlp", (4,), 2, seed=-1),
        lambda: build("cnn", (4,), 2),
        lambda: MLP((4,), 2, hidden=()),
        lambda: MLP((4,), 2, hidden=(0,)),
        lambda: MLP((4,), 2, dropout=1.0),
        lambda: ConvNet((1, 8, 8), 2, width=0),
        lambda: Linear((4,), 0),
    ],
)
def test_bad_arguments(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError):
        make()


# -- the user's own ---------------------------------------------------------------------------------------------------
FACTORIES = """
import functools
import torch
from torch import nn

def keywords(input_shape, num_outputs, width=3):
    return nn.Linear(input_shape[0], num_outputs)

def keyword_only(*, num_outputs):
    return nn.Linear(4, num_outputs)

def positions(shape, classes):
    return nn.Linear(shape[0], classes)

def one_default(shape, classes=9, ):
    return nn.Linear(shape[0], classes)

def nothing():
    return nn.Linear(4, 2)

def only_defaults(width=4, depth=1):
    return nn.Linear(width, 2)

def anything(**settings):
    return nn.Linear(settings["input_shape"][0], settings["num_outputs"])

def extra(input_shape, num_outputs, width):
    return nn.Linear(width, num_outputs)

def one(shape):
    return nn.Linear(4, 2)

def fails(input_shape, num_outputs):
    raise RuntimeError("no weights")

def nones():
    return None

class Net(nn.Linear):
    def __init__(self, input_shape, num_outputs):
        super().__init__(input_shape[0], num_outputs)

class Zoo:
    @staticmethod
    def small(input_shape, num_outputs):
        return nn.Linear(input_shape[0], num_outputs)

partial = functools.partial(extra, width=4)
finished = nn.Linear(4, 2)
number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, under a name of its own."""
    name = f"nets_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(
    "factory",
    [
        "keywords",
        "keyword_only",
        "positions",
        "one_default",
        "nothing",
        "only_defaults",
        "anything",
        "Net",
        "Zoo.small",
        "partial",
    ],
)
def test_factories(nets: str, factory: str) -> None:
    path, state = list(sys.path), torch.random.get_rng_state()
    one, same = build(f"{nets}:{factory}", (4,), 2, seed=3), build(f"{nets}:{factory}", [4], 2, seed=3)
    assert one(torch.zeros(1, 4)).shape == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert sys.path == path and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("extra", r"signature \(input_shape, num_outputs, width\).*give defaults"),
        ("one", r"signature \(shape\)"),
        ("fails", "RuntimeError: no weights"),
        ("nones", "returned NoneType"),
        ("finished", "is a Linear: must be a function"),
        ("number", "is a int: must be a function"),
        ("keyword", r"has no 'keyword'. Did you mean 'keywords'"),
        ("", "has no ''"),
    ],
)
def test_bad_factories(nets: str, factory: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(f"{nets}:{factory}", (4,), 2)


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_nets.py").write_text("import a_package_that_is_absent\n")
    (tmp_path / "invalid_nets.py").write_text("def (:\n")
    for name, message in (
        ("absent_nets:net", "no module 'absent_nets'.*Run from the folder"),
        ("torch.absent:net", "no module 'torch.absent'"),
        (":net", "no module ''"),
        ("broken_nets:net", "importing broken_nets failed: ModuleNotFoundError.*a_package_that_is_absent"),
        ("invalid_nets:net", "importing invalid_nets failed: SyntaxError"),
    ):
        with pytest.raises(ArgumentError, match=message):
            build(name, (4,), 2)


def test_unknown_name() -> None:
    with pytest.raises(ArgumentError, match=r"model = 'mpl'.*'package.module:factory'. Did you mean 'mlp'"):
        build("mpl", (4,), 2)


def test_the_digest_of_a_factory_is_that_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, width in (("digest_one", 8), ("digest_same", 8), ("digest_other", 9)):
        (tmp_path / f"{name}.py").write_text(f"import torch\ndef net():\n    return torch.nn.Linear(4, {width})\n")
    one, same, other = (source_digest(f"{name}:net") for name in ("digest_one", "digest_same", "digest_other"))
    assert len(one) == 16
    assert one == same != other
    assert source_digest("builtins:dict") == ""
