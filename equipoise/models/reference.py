"""Reference models: a linear one, a multilayer perceptron and a small convolutional network.

All follow timm's convention: ``forward(x) == forward_head(forward_features(x))``, ``forward_head(features, pre_logits=True)``
gives what enters the head, and ``get_classifier()`` the head itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from equipoise.errors import check_integer, check_range, refuse


class Classifier(nn.Module):
    """A ``body`` that turns inputs (N, *input_shape) into features (N, F), and a linear ``head``: (N, num_outputs)."""

    def __init__(self, body: nn.Module, num_features: int, num_outputs: int, *, head_bias: bool = True) -> None:
        super().__init__()
        check_integer("num_outputs", num_outputs, 1)
        self.body = body
        self.head = nn.Linear(num_features, num_outputs, bias=head_bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head


class Linear(Classifier):
    """Logistic (or linear) regression on the flattened input."""

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, head_bias: bool = True) -> None:
        super().__init__(nn.Flatten(), _size(input_shape), num_outputs, head_bias=head_bias)


class MLP(Classifier):
    """Flattened input, ReLU layers of widths ``hidden``, and a head without bias unless ``head_bias``.

    dropout: probability in [0, 1) after each hidden layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        hidden: Sequence[int] = (256, 256),
        *,
        head_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_range("dropout", dropout, 0, 1, open_high=True)
        if not hidden:
            refuse("hidden", hidden, "name at least one width", "Use Linear for a model without hidden layers")
        layers: list[nn.Module] = [nn.Flatten()]
        width = _size(input_shape)
        for next_width in hidden:
            check_integer("hidden", next_width, 1)
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = next_width
        super().__init__(nn.Sequential(*layers), width, num_outputs, head_bias=head_bias)


class ConvNet(Classifier):
    """Three blocks of convolution (3 wide), batch norm, ReLU and pooling by 2, then the average over all positions.

    input_shape: (C, H, W) for images or (C, L) for sequences, of any size. width: channels of the first block; the others
    have twice and four times as many.
    """

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, width: int = 32, *, head_bias: bool = True
    ) -> None:
        check_integer("width", width, 1)
        if len(input_shape) not in (2, 3):
            refuse("input_shape", tuple(input_shape), "be (C, H, W) or (C, L)", "Use the model 'mlp' for tables")
        _size(input_shape)
        images = len(input_shape) == 3
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if images else (nn.Conv1d, nn.BatchNorm1d)
        pool, mean = (nn.MaxPool2d, nn.AdaptiveAvgPool2d) if images else (nn.MaxPool1d, nn.AdaptiveAvgPool1d)
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for wide in (width, 2 * width, 4 * width):
            # Rounding up lets a side of one pixel stay one pixel.
            layers += [conv(channels, wide, 3, padding=1, bias=False), norm(wide), nn.ReLU(), pool(2, ceil_mode=True)]
            channels = wide
        super().__init__(nn.Sequential(*layers, mean(1), nn.Flatten()), channels, num_outputs, head_bias=head_bias)


def _size(input_shape: Sequence[int]) -> int:
    for side in input_shape:
        check_integer("input_shape", side, 1)
    return math.prod(input_shape)
