"""Text encoder: byte embedding and a causal window of three symbols.

Shape letters: B sequences, T positions, D width.
"""

import torch
from torch import Tensor, nn

from arbitor.kernel.causal_window.op import causal_window
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear
from arbitor.vocab import VOCAB_SIZE

WINDOW = 3


class TextSequencer(nn.Module):
    """Projects each position's embedding with those of the two before it: [B, T, 3D] -> [B, T, D].

    Positions before the start are zeros, so nothing looks ahead. Rows that go on have the
    embeddings before them in `before`, [B, 2, D], which is moved on to their last ones.
    """

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.projection = TernaryLinear(WINDOW * width, width, activation)

    def forward(self, embedded_BTD: Tensor, before: Tensor | None = None) -> Tensor:
        if before is None:
            return self.projection(causal_window(embedded_BTD, WINDOW))
        embedded = torch.cat([before, embedded_BTD], dim=1)
        before.copy_(embedded[:, 1 - WINDOW :])
        return self.projection(causal_window(embedded, WINDOW)[:, WINDOW - 1 :])


class TextEncoder(nn.Module):
    """Symbols of text or code, int64 [B, T] -> bfloat16 [B, T, D]."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.embedding = TernaryEmbedding(VOCAB_SIZE, width)
        self.sequencer = TextSequencer(width, activation)

    def forward(self, symbols_BT: Tensor, before: Tensor | None = None) -> Tensor:
        return self.sequencer(self.embedding(symbols_BT), before)
