"""Attention of few queries to the keys of a cache in one launch. Oracle: `cached.py`.

Shape letters: B sequences, M queries, S keys, N heads, H head width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.triton_numeric import loop_bound, nearest, widen

MAX_QUERIES = 16  # of a sequence: further ones are worth matmuls
_BLOCK_S, _WARPS = 64, 4


def attend_seen(
    query_BMNH: Tensor, key_BSNH: Tensor, value_BSNH: Tensor, seen_MS: Tensor
) -> Tensor:
    """[B, M, N, H], contiguous, as `cached.attend_seen` defines it."""
    B, M, N, H = query_BMNH.shape
    query_BMNH, key_BSNH = query_BMNH.contiguous(), key_BSNH.contiguous()
    out_BMNH = torch.empty_like(query_BMNH)
    attend_seen_kernel[(B * M * N,)](
        query_BMNH,
        key_BSNH,
        value_BSNH,
        seen_MS.contiguous().view(torch.int8),
        out_BMNH,
        M,
        key_BSNH.shape[1],
        N,
        *value_BSNH.stride()[:3],
        LOG2_SCALE=math.log2(math.e) / math.sqrt(H),
        H=H,
        BLOCK_S=_BLOCK_S,
        BLOCK_H=triton.next_power_of_2(H),
        num_warps=_WARPS,
    )
    return out_BMNH


@triton.jit
def attend_seen_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    seen_ptr,
    out_ptr,
    M,
    S,
    N,
    stride_vb,
    stride_vs,
    stride_vn,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program has one query of one head."""
    program = tl.program_id(0).to(tl.int64)
    b, m, n = program // (M * N), program // N % M, program % N
    h = tl.arange(0, BLOCK_H)
    query = widen(tl.load(query_ptr + program * H + h, mask=h < H, other=0.0))
    out = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    for first in tl.range(0, loop_bound(S), BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & (h < H)[None, :]
        key = tl.load(key_ptr + ((b * S + s) * N + n)[:, None] * H + h[None, :], mask, 0.0)
        seen = tl.load(seen_ptr + m * S + s, mask=s < S, other=0)
        weight = tl.exp2(tl.sum(widen(key) * query[None, :], 1) * LOG2_SCALE)
        weight = tl.where(seen != 0, weight, 0.0)
        total += weight
        value_ptrs = value_ptr + b * stride_vb + n * stride_vn + s[:, None] * stride_vs + h[None, :]
        value = widen(tl.load(value_ptrs, mask, 0.0))
        out += tl.sum(widen(nearest(weight, dtype))[:, None] * value, 0)
    tl.store(out_ptr + program * H + h, nearest(out / tl.sum(total, 0), dtype), mask=h < H)
