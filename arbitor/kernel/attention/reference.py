"""Causal softmax attention over exact keys and, before them, over compressed ones: the oracle.

Dense, differentiable torch: every score of every query is there, masked.
Shape letters: B sequences, T positions, N heads, H head width, J compressed blocks.
"""

import math

import torch
from torch import Tensor


def attend(
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    compressed: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    stride: int = 1,
) -> Tensor:
    """One softmax of query . key / sqrt(H) over what a position sees: [B, T, N, H] float32 (or
    float64, of such inputs).

    Position t sees the exact keys b(t)..t and the compressed blocks before b(t) / stride, keys and
    values [B, J, N, H]; b as `exact_start` says.
    """
    query, key, value = (x.to(_float(x)) for x in (query_BTNH, key_BTNH, value_BTNH))
    t = torch.arange(query.shape[1], device=query.device)
    start_T = exact_start(t, window, stride)
    seen = (t <= t[:, None]) & (t >= start_T[:, None])
    if compressed is not None:
        compressed_key, compressed_value = (x.to(_float(x)) for x in compressed)
        j = torch.arange(compressed_key.shape[1], device=query.device)
        key = torch.cat([compressed_key, key], dim=1)
        value = torch.cat([compressed_value, value], dim=1)
        seen = torch.cat([j < start_T[:, None] // stride, seen], dim=1)
    scores = torch.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return torch.einsum("bnts,bsnh->btnh", weights, value)


def exact_start(t: Tensor, window: int, stride: int) -> Tensor:
    """b(t), the first exact key of position t: the end of the last compressed block that leaves
    at least `window` exact keys; 0 without a window."""
    if not window:
        return torch.zeros_like(t)
    return (t + 1 - window).clamp(min=0) // stride * stride


def _float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
