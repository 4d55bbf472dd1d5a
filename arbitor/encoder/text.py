"""Text encoder: byte embedding and a causal window of three symbols.

Shape letters: B sequences, T positions, D width.
"""

import torch.nn.functional as F
from torch import Tensor, cat, nn

from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear
from arbitor.vocab import VOCAB_SIZE

WINDOW = 3


class TextSequencer(nn.Module):
    """Projects each position's embedding with those of the two before it: [B, T, 3D] -> [B, T, D].

    Positions before the start are zeros, so nothing looks ahead.
    """

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.projection = TernaryLinear(WINDOW * width, width, activation)

    def forward(self, embedded_BTD: Tensor) -> Tensor:
        length = embedded_BTD.shape[1]
        padded = F.pad(embedded_BTD, (0, 0, WINDOW - 1, 0))
        return self.projection(cat([padded[:, i : i + length] for i in range(WINDOW)], dim=-1))


class TextEncoder(nn.Module):
    """Symbols of text or code, int64 [B, T] -> bfloat16 [B, T, D]."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.embedding = TernaryEmbedding(VOCAB_SIZE, width)
        self.sequencer = TextSequencer(width, activation)

    def forward(self, symbols_BT: Tensor) -> Tensor:
        return self.sequencer(self.embedding(symbols_BT))
