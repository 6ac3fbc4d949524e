"""The transformer encoder. Shape suffixes: B rows of the batch, T tokens, D width, N heads, K outputs."""

# ruff: noqa: N803, N806 -- the shape suffixes are capitals

import torch
from torch import Tensor, nn
from torch.nn import functional

from tiltyard.models.network import Network
from tiltyard.modelspec import ModelSpec, Transformer

EMBEDDING_DEVIATION = 0.02
"""Standard deviation of fresh embeddings (Devlin et al. 2019)."""


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, architecture: Transformer) -> None:
        super().__init__()
        width, feed_forward = architecture.width, architecture.feed_forward
        self.heads = architecture.heads
        self.attention_norm = nn.LayerNorm(width, device="meta")
        self.query_key_value = nn.Linear(width, 3 * width, device="meta")
        self.attended = nn.Linear(width, width, device="meta")
        self.feed_forward_norm = nn.LayerNorm(width, device="meta")
        self.widen = nn.Linear(width, feed_forward, device="meta")
        self.narrow = nn.Linear(feed_forward, width, device="meta")
        self.dropout = nn.Dropout(architecture.dropout) if architecture.dropout else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The same shape."""
        B, T, D = x_BTD.shape
        qkv = self.query_key_value(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.dropout(self.attended(attended))
        widened = functional.gelu(self.widen(self.feed_forward_norm(x_BTD)))
        out: Tensor = x_BTD + self.dropout(self.narrow(widened))
        return out


class TransformerEncoder(Network):
    """`transformer`: embedded tokens and learned positions, the layers, the average over the tokens, head."""

    def __init__(self, spec: ModelSpec, architecture: Transformer) -> None:
        super().__init__(spec)
        width = architecture.width
        self.tokens = nn.Embedding(architecture.vocabulary, width, device="meta")
        self.positions = nn.Embedding(spec.input_shape[0], width, device="meta")
        self.dropout = nn.Dropout(architecture.dropout) if architecture.dropout else nn.Identity()
        self.layers = nn.ModuleList(EncoderLayer(architecture) for _ in range(architecture.layers))
        self.norm = nn.LayerNorm(width, device="meta")
        self.head = nn.Linear(width, spec.outputs, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of token ids [B, T] of any dtype."""
        # On a GPU an id out of bounds would take the process down, so it is brought inside everywhere alike.
        last = self.tokens.num_embeddings - 1
        if x.is_floating_point():
            # What no int64 holds becomes the smallest one on some processors, the nearest on others.
            x = x.to(torch.float64).clamp(0, last)
        ids = x.to(torch.int64).clamp(0, last)
        h_BTD = self.dropout(self.tokens(ids) + self.positions.weight)
        for layer in self.layers:
            h_BTD = layer(h_BTD)
        logits: Tensor = self.head(self.norm(h_BTD).mean(1))
        return logits
