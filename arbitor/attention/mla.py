"""Multi-head latent attention (DeepSeek-V2, section 2.1): its ternary projections.

Queries come through a low-rank projection; keys and values are expanded from one latent a position,
beside one rotary key that all heads share. Queries and keys are normalized without gain, so logits
stay bounded whatever the scales of the projections do. Which positions see which keys is decided in
`context_attention.py`.
Shape letters: B sequences, T positions, D width, N heads, H head width, R latent rank,
W rotary width, P = W / 2 rotated pairs.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from arbitor.kernel.attention_heads.op import attention_heads, key_heads, query_heads
from arbitor.kernel.attention_heads.reference import fixed_point
from arbitor.kernel.ternary_scale import TernaryLinear

ROTARY_BASE = 10_000.0


class MultiHeadLatentAttention(nn.Module):
    """bfloat16 [B, T, D] to latents, latents to heads, what the heads found to [B, T, D].

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

    def latents(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Low-rank query [B, T, R], latent [B, T, R], unrotated key [B, T, W], residual stream."""
        compressed_BTX, hidden_BTD = self.compress.fork(hidden_BTD)
        ranks = [self.latent_rank, self.latent_rank, self.rotary_width]
        return *compressed_BTX.split(ranks, dim=-1), hidden_BTD

    def heads(
        self, query_low_BTR: Tensor, latent_BTR: Tensor, rotary_key_BTW: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, T, N, H] of positions whose rotation is [2, T, P]."""
        query_BTX, expanded_BTX = self.expand_query(query_low_BTR), self.expand_latent(latent_BTR)
        return attention_heads(query_BTX, expanded_BTX, rotary_key_BTW, rotation, self.num_heads)

    def queries(self, query_low_BTR: Tensor, rotation: Tensor) -> Tensor:
        """The query of `heads` alone."""
        return query_heads(self.expand_query(query_low_BTR), rotation, self.num_heads)

    def keys(
        self, latent_BTR: Tensor, rotary_key_BTW: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Key and value of `heads` alone."""
        expanded_BTX = self.expand_latent(latent_BTR)
        return key_heads(expanded_BTX, rotary_key_BTW, rotation, self.num_heads)


@lru_cache(maxsize=64)
def rotation_table(length: int, num_pairs: int, device: torch.device, stride: int = 1) -> Tensor:
    """Cosines and sines [2, T, P] of the rotary angles of T positions, int16 fixed point.

    The positions are the last ones of T blocks of `stride`: 0..T-1 where it is 1. Made on the
    device and kept: a step that is replayed as a CUDA graph finds it there.
    """
    return rotation_at(torch.arange(1, length + 1, device=device) * stride - 1, num_pairs)


def rotation_at(position_T: Tensor, num_pairs: int) -> Tensor:
    """The same for int64 positions [T], made anew."""
    pair = torch.arange(num_pairs, dtype=torch.float64, device=position_T.device)
    angle = position_T.double().unsqueeze(-1) * ROTARY_BASE ** (-pair / num_pairs)
    return fixed_point(torch.stack([angle.cos(), angle.sin()]))
