"""The small transformer of the fine-tuning tasks: rows of an image are its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.errors import check_integer, refuse


class Attention(nn.Module):
    """Self-attention over tokens (N, T, D), its four maps as linear layers that an adapter can be attached to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between, each token by itself."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class RowTransformer(nn.Module):
    """A transformer whose tokens are the rows of an image (C, H, W), the steps of a sequence (C, L) or the columns of a table (F,).

    dim: width of a token, a multiple of ``heads``. depth: number of blocks. hidden: width inside each block's feed-forward part.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        dim: int = 64,
        heads: int = 4,
        hidden: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (("num_outputs", num_outputs), ("heads", heads), ("hidden", hidden), ("depth", depth)):
            check_integer(name, value, 1)
        if dim % heads:
            refuse("dim", dim, f"be a multiple of heads = {heads}")
        if not 1 <= len(input_shape) <= 3:
            refuse("input_shape", tuple(input_shape), "be (C, H, W), (C, L) or (F,)")
        channels, tokens, width = {1: (1, *input_shape, 1), 2: (*input_shape, 1), 3: tuple(input_shape)}[
            len(input_shape)
        ]
        self.shape = (channels, tokens, width)
        self.embedding = nn.Linear(channels * width, dim)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        """The mean token (N, dim) of inputs (N, *input_shape)."""
        tokens = x.reshape(-1, *self.shape).transpose(1, 2).flatten(2)
        return self.norm(self.blocks(self.embedding(tokens) + self.position)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head
