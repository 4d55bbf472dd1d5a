"""Text encoder: byte embedding and a causal window of three symbols.

Shape letters: B sequences, T positions, D width.
"""

from torch import Tensor, nn

from arbitor.kernel.causal_window.op import causal_window
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
        return self.projection(causal_window(embedded_BTD, WINDOW))


class TextEncoder(nn.Module):
    """Symbols of text or code, int64 [B, T] -> bfloat16 [B, T, D]."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.embedding = TernaryEmbedding(VOCAB_SIZE, width)
        self.sequencer = TextSequencer(width, activation)

    def forward(self, symbols_BT: Tensor) -> Tensor:
        return self.sequencer(self.embedding(symbols_BT))
