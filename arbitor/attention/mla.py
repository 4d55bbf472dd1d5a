"""Multi-head latent attention (DeepSeek-V2, section 2.1), causal, with ternary projections.

Queries come through a low-rank projection; keys and values are expanded from one latent a position,
beside one rotary key that all heads share. Queries and keys are normalized without gain, so logits
stay bounded whatever the scales of the projections do.
Shape letters: B sequences, T positions, D width, N heads, H head width, R latent rank,
W rotary width, P = W / 2 rotated pairs.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from arbitor.kernel.attention.op import attend
from arbitor.kernel.attention_heads.op import attention_heads
from arbitor.kernel.attention_heads.reference import fixed_point
from arbitor.kernel.ternary_scale import TernaryLinear

ROTARY_BASE = 10_000.0


class MultiHeadLatentAttention(nn.Module):
    """bfloat16 [B, T, D] -> bfloat16 [B, T, D], the input with what attention found added.

    Position t sees positions 0..t of its own row.
    Of the H numbers of a head's query and key, the last `rotary_width` carry the position.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        rotary_width: int,
        latent_rank: int,
        activation: str,
        output_gain: float,
    ):
        super().__init__()
        self.num_heads, self.rotary_width = num_heads, rotary_width
        self.latent_rank = latent_rank
        # Query rank, latent and shared rotary key from one matrix: one norm, one read.
        self.compress = TernaryLinear(width, 2 * latent_rank + rotary_width, activation)
        self.expand_query = TernaryLinear(latent_rank, num_heads * head_width, activation)
        # Of each head the content part of the key, then the value.
        self.expand_latent = TernaryLinear(
            latent_rank, num_heads * (head_width - rotary_width + head_width), activation
        )
        self.output = TernaryLinear(num_heads * head_width, width, activation, gain=output_gain)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        compressed_BTX, hidden_BTD = self.compress.fork(hidden_BTD)
        query_low_BTR, latent_BTR, rotary_key_BTW = compressed_BTX.split(
            [self.latent_rank, self.latent_rank, self.rotary_width], dim=-1
        )
        query_BTNH, key_BTNH, value_BTNH = attention_heads(
            self.expand_query(query_low_BTR),
            self.expand_latent(latent_BTR),
            rotary_key_BTW,
            rotation_table(hidden_BTD.shape[1], self.rotary_width // 2, hidden_BTD.device),
            self.num_heads,
        )
        mixed_BTNH = attend(query_BTNH, key_BTNH, value_BTNH)
        return hidden_BTD + self.output(mixed_BTNH.flatten(2))


@lru_cache(maxsize=64)
def rotation_table(length: int, num_pairs: int, device: torch.device) -> Tensor:
    """Cosines and sines [2, T, P] of the rotary angles of positions 0..T-1, int16 fixed point.

    Made on the device and kept: a step that is replayed as a CUDA graph finds it there.
    """
    pair = torch.arange(num_pairs, dtype=torch.float64, device=device)
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position.unsqueeze(-1) * ROTARY_BASE ** (-pair / num_pairs)
    return fixed_point(torch.stack([angle.cos(), angle.sin()]))
