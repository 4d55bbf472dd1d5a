"""Multi-head latent attention (DeepSeek-V2, section 2.1), causal, with ternary projections.

Queries come through a low-rank projection; keys and values are expanded from one latent a position,
beside one rotary key that all heads share. Queries and keys are normalized without gain, so logits
stay bounded whatever the scales of the projections do.
Shape letters: B sequences, T positions, D width, N heads, H head width, R latent rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.kernel.ternary_scale import TernaryLinear

ROTARY_BASE = 10_000.0


class MultiHeadLatentAttention(nn.Module):
    """bfloat16 [B, T, D] -> bfloat16 [B, T, D]; position t sees positions 0..t of its own row.

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
        self.num_heads, self.head_width = num_heads, head_width
        self.rotary_width, self.content_width = rotary_width, head_width - rotary_width
        self.latent_rank = latent_rank
        # Query rank, latent and shared rotary key from one matrix: one norm, one read.
        self.compress = TernaryLinear(width, 2 * latent_rank + rotary_width, activation)
        self.expand_query = TernaryLinear(latent_rank, num_heads * head_width, activation)
        self.expand_latent = TernaryLinear(
            latent_rank, num_heads * (self.content_width + head_width), activation
        )
        self.output = TernaryLinear(num_heads * head_width, width, activation, gain=output_gain)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        query_low_BTR, latent_BTR, rotary_key_BTH = self.compress(hidden_BTD).split(
            [self.latent_rank, self.latent_rank, self.rotary_width], dim=-1
        )
        query_BNTH = self._queries(query_low_BTR)
        key_BNTH, value_BNTH = self._keys_and_values(latent_BTR, rotary_key_BTH)
        mixed_BNTH = F.scaled_dot_product_attention(
            query_BNTH, key_BNTH, value_BNTH, is_causal=True
        )
        return self.output(mixed_BNTH.transpose(1, 2).flatten(2))

    def _queries(self, query_low_BTR: Tensor) -> Tensor:
        query_BNTH = self._split_heads(self.expand_query(query_low_BTR), self.head_width)
        content, rotary = query_BNTH.split([self.content_width, self.rotary_width], dim=-1)
        return torch.cat([_normalize(content), rotate(_normalize(rotary))], dim=-1)

    def _keys_and_values(self, latent_BTR: Tensor, rotary_key_BTH: Tensor) -> tuple[Tensor, Tensor]:
        expanded = self._split_heads(
            self.expand_latent(latent_BTR), self.content_width + self.head_width
        )
        content, value_BNTH = expanded.split([self.content_width, self.head_width], dim=-1)
        rotary = rotate(_normalize(rotary_key_BTH)).unsqueeze(1)
        rotary = rotary.expand(-1, self.num_heads, -1, -1)
        return torch.cat([_normalize(content), rotary], dim=-1), value_BNTH

    def _split_heads(self, x_BTX: Tensor, width: int) -> Tensor:
        return x_BTX.unflatten(-1, (self.num_heads, width)).transpose(1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, section 3.4.2) of [..., T, H]; angles in float32."""
    length, half = x.shape[-2], x.shape[-1] // 2
    channel = torch.arange(half, dtype=torch.float32, device=x.device)
    position = torch.arange(length, dtype=torch.float32, device=x.device)
    angle = position.unsqueeze(-1) * ROTARY_BASE ** (-channel / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)


def _normalize(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
