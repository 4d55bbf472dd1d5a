"""ByteHead: logits over the 288 symbols."""

from torch import Tensor, nn

from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.vocab import VOCAB_SIZE

# A small start keeps the first predictions close to uniform.
HEAD_GAIN = 0.5


class ByteHead(nn.Module):
    """bfloat16 [B, T, D] -> bfloat16 logits [B, T, 288]."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.projection = TernaryLinear(width, VOCAB_SIZE, activation, gain=HEAD_GAIN, rate="table")

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.projection(hidden_BTD)
