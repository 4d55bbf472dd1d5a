"""From expanded projections to what attention reads: heads, gain-free norms, rotary embedding.

Plain differentiable torch: the specification, and the path of a CPU. Each part is computed in
float32 and rounded once.
Shape letters: B sequences, T positions, N heads, H head width = C content width + W rotary width,
P = W / 2 rotated pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# What F.rms_norm adds for bfloat16 and float32 alike.
EPSILON = 2.0**-23

# Cosines and sines outlive a step, so they are integers: 2^-15 off, where bfloat16 rounds at 2^-9.
ROTATION_UNIT = 2.0**-14


def fixed_point(rotation: Tensor) -> Tensor:
    """int16 multiples of `ROTATION_UNIT` nearest to numbers in [-1, 1]."""
    return (rotation / ROTATION_UNIT).round().to(torch.int16)


def attention_heads(
    query_BTX: Tensor,
    expanded_BTX: Tensor,
    rotary_key_BTW: Tensor,
    rotation_2TP: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, T, N, H], in the dtype of the input; the value is a view.

    query [B, T, N * H] holds the content part and the rotary part of each head, expanded
    [B, T, N * (C + H)] the key's content and the value of each head; the rotary key is shared by
    all heads. Every part is normalized by itself, the rotary ones are then rotated.
    """
    query_BTNH = query_heads(query_BTX, rotation_2TP, num_heads)
    return query_BTNH, *key_heads(expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads)


def query_heads(query_BTX: Tensor, rotation_2TP: Tensor, num_heads: int) -> Tensor:
    """The query of `attention_heads` alone."""
    query_BTNH = query_BTX.unflatten(-1, (num_heads, -1))
    rotary_width = 2 * rotation_2TP.shape[-1]
    content, rotary = query_BTNH.split([query_BTNH.shape[-1] - rotary_width, rotary_width], dim=-1)
    query_BTNH = torch.cat([_normalize(content), rotate(_normalize(rotary), rotation_2TP)], dim=-1)
    return query_BTNH.to(query_BTX.dtype)


def key_heads(
    expanded_BTX: Tensor, rotary_key_BTW: Tensor, rotation_2TP: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Key and value of `attention_heads` alone: of positions that ask nothing."""
    expanded_BTNX = expanded_BTX.unflatten(-1, (num_heads, -1))
    head_width = (expanded_BTNX.shape[-1] + rotary_key_BTW.shape[-1]) // 2
    content, value_BTNH = expanded_BTNX.split(
        [head_width - rotary_key_BTW.shape[-1], head_width], dim=-1
    )
    rotary = rotate(_normalize(rotary_key_BTW.unsqueeze(2)), rotation_2TP)
    rotary = rotary.expand(-1, -1, num_heads, -1)
    key_BTNH = torch.cat([_normalize(content), rotary], dim=-1)
    return key_BTNH.to(expanded_BTX.dtype), value_BTNH


def rotate(x_BTNW: Tensor, rotation_2TP: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, section 3.4.2), float32: turns the pairs (p, P + p)."""
    cos_TNP, sin_TNP = (rotation_2TP.float() * ROTATION_UNIT).unsqueeze(2)
    first, second = x_BTNW.chunk(2, dim=-1)
    return torch.cat(
        [first * cos_TNP - second * sin_TNP, first * sin_TNP + second * cos_TNP], dim=-1
    )


def _normalize(x: Tensor) -> Tensor:
    """float32 x / rms(x) over the last dimension."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON)
