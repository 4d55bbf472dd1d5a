"""Audio encoder: the embeddings of a frame's 16 codes, summed.

Shape letters: C codes of a frame, D width.
"""

import torch
from torch import Tensor, nn

from arbitor.audio_codec import NUM_CODES, NUM_LEVELS
from arbitor.kernel.ternary_scale import TernaryEmbedding


class AudioEncoder(nn.Module):
    """Codes, uint8 [..., C] -> bfloat16 [..., D] of unit variance at first."""

    def __init__(self, width: int):
        super().__init__()
        self.code = TernaryEmbedding(NUM_CODES * NUM_LEVELS, width)

    def forward(self, codes: Tensor) -> Tensor:
        first_level_C = torch.arange(NUM_CODES, device=codes.device) * NUM_LEVELS
        embedded = self.code(codes.long() + first_level_C)
        return embedded.sum(-2) * NUM_CODES**-0.5
