"""Reference models of several modalities: an encoder for each, and a fusion head.

`MultimodalNet` is what the methods of this family expect of a model: it takes each modality as a keyword argument, keeps its
encoders in an `nn.ModuleDict` called `encoders`, and returns an `equipoise.Output` with fused and unimodal logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from equipoise.errors import ArgumentError, check_choice, check_integer, refuse
from equipoise.models import MLP, ConvNet
from equipoise.multimodal.arl import ConcatFusion, GatedFusion, SumFusion
from equipoise.training.batch import Output

FUSIONS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "concat": ConcatFusion,
    "sum": SumFusion,
    "gated": GatedFusion,
}
ENCODERS = ("mlp", "cnn")


class MultimodalNet(nn.Module):
    """``encoders`` turn the modalities into features (N, D_m); ``fusion`` turns these into fused and unimodal logits.

    encoders: module by the name of its modality, at least 2. fusion: ``features -> (fused, unimodal)``, such as
    ``ConcatFusion``. Called with the modalities as keyword arguments, ``net(audio=..., image=...)``; returns an
    ``equipoise.Output`` whose ``prediction`` is ``fused``, and ``unimodal`` is in the order of the encoders.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], fusion: nn.Module) -> None:
        super().__init__()
        if len(encoders) < 2:
            refuse("encoders", list(encoders), "hold at least 2 modalities")
        check_names(encoders)
        self.encoders = nn.ModuleDict(dict(encoders))
        self.fusion = fusion

    def forward(self, **inputs: Tensor) -> Output:
        if inputs.keys() != self.encoders.keys():
            raise ArgumentError(
                f"inputs = {sorted(inputs)}: must hold the modalities {', '.join(self.encoders)}, one tensor for each"
            )
        fused, unimodal = self.fusion([encoder(inputs[name]) for name, encoder in self.encoders.items()])
        return Output(fused, fused=fused, unimodal=unimodal)


class AllLogits(nn.Module):
    """A model's logits in one tensor (N, 1 + M, C): its prediction first, then those of the M modalities where it gives them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        output = Output.of(self.model(**inputs))
        return torch.stack([output.prediction, *(output.unimodal or ())], 1)


class OneModality(nn.Module):
    """A model whose prediction is that of one modality. modality: its number, from 0."""

    def __init__(self, model: nn.Module, modality: int = 0) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, **inputs: Tensor) -> Output:
        unimodal = Output.of(self.model(**inputs)).unimodal
        return Output(unimodal[self.modality], unimodal=unimodal)


def check_names(names: Mapping[str, object] | Sequence[str]) -> None:
    """Refuse names of modalities that cannot be keyword arguments, or keys of an ``nn.ModuleDict``."""
    for name in names:
        if not str(name).isidentifier() or hasattr(nn.ModuleDict(), name) or name == "self":
            refuse(
                "modality",
                name,
                "be a word of letters, digits and _ that is no attribute of nn.ModuleDict",
                "Rename it",
            )


def make_net(
    input_shapes: Mapping[str, Sequence[int]],
    num_classes: int,
    *,
    encoder: str = "mlp",
    fusion: str = "concat",
    hidden: int = 128,
    features: int = 32,
    seed: int = 0,
) -> MultimodalNet:
    """A ``MultimodalNet`` whose initial weights follow from ``seed``; torch's global generator stays as it was.

    input_shapes: shape of one input, without the batch axis, by the name of its modality.
    encoder: "mlp" (two ReLU layers of widths ``hidden`` and ``features`` on the flattened input), or "cnn" (for inputs
        (C, H, W) and (C, L), with ``features`` rounded up to a multiple of 4; other inputs get the "mlp").
    fusion: "concat", "sum" or "gated" (2 modalities).
    """
    check_choice("encoder", encoder, ENCODERS)
    check_choice("fusion", fusion, tuple(FUSIONS))
    check_integer("hidden", hidden, 1)
    check_integer("features", features, 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoders, widths = {}, []
        for name, shape in input_shapes.items():
            if encoder == "cnn" and len(shape) in (2, 3):
                width = -(-features // 4)
                encoders[name], made = ConvNet(shape, 1, width).body, 4 * width
            else:
                encoders[name], made = MLP(shape, 1, (hidden, features)).body, features
            widths.append(made)
        return MultimodalNet(encoders, FUSIONS[fusion](widths, num_classes))
