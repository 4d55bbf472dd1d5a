"""TalkerHead: the 16 codes of the next frame of sound, in parallel.

Shape letters: B sequences, T positions, D width, C codes of a frame, V levels of a code.
"""

import torch
from torch import Tensor, nn

from arbitor.audio_codec import NUM_CODES, NUM_LEVELS
from arbitor.batch import NO_TARGET
from arbitor.encoder.places import Places
from arbitor.head.byte import HEAD_GAIN
from arbitor.kernel.cross_entropy.op import cross_entropy
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.vocab import AUDIO_FRAME


class TalkerHead(nn.Module):
    """bfloat16 [..., D] -> bfloat16 logits [..., C, V]."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.projection = TernaryLinear(
            width, NUM_CODES * NUM_LEVELS, activation, gain=HEAD_GAIN, rate="table"
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden).unflatten(-1, (NUM_CODES, NUM_LEVELS))

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, places: Places) -> Tensor:
        """Mean cross entropy of a code, in nats, where the next position is a frame; float32."""
        speaks_BT1 = (targets_BT == AUDIO_FRAME).unsqueeze(-1)
        codes_BTC = torch.where(speaks_BT1, places.next_content().long(), NO_TARGET)
        return cross_entropy(self(hidden_BTD).flatten(0, 2), codes_BTC.flatten())
