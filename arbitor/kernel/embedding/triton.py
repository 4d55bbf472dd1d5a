"""Embedding lookup in a table of latents or packed trits, and the table's gradient. Oracle:
`reference.py`, equal in every bit.

The gradient adds each symbol's positions in their order, one program per symbol and block of
columns: no atomics. Positions are sorted by symbol first (a stable integer sort).
Shape letters: M positions, V symbols (rows of the table), D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.latent_update.state import DEAD_ZONE
from arbitor.kernel.triton_numeric import nearest

_BLOCK_M, _BLOCK_D, _BACKWARD_BLOCK_D = 16, 256, 128
_UNROLL = 16  # rows in flight: a symbol's additions wait for one another, their loads do not


def embedding_forward(
    indices_M: Tensor, table_VX: Tensor, row_scale_V: Tensor, width: int
) -> Tensor:
    """bfloat16 rows 2^s[v] * trit[v] for int64 indices, [M, D]; trits decoded on the way from int8
    latents [V, D] or from the uint8 plane of packed trits, `matmul/plane.py`."""
    M, D = indices_M.numel(), width
    out_MD = torch.empty(M, D, dtype=torch.bfloat16, device=table_VX.device)
    embedding_forward_kernel[(triton.cdiv(M, _BLOCK_M), triton.cdiv(D, _BLOCK_D))](
        indices_M.contiguous(),
        table_VX,
        row_scale_V,
        out_MD,
        M,
        D,
        ROW_BYTES=table_VX.shape[1] if table_VX.dtype == torch.uint8 else 0,
        DEAD_ZONE=DEAD_ZONE,
        BLOCK_M=_BLOCK_M,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
    )
    return out_MD


def embedding_backward(indices_M: Tensor, grad_MD: Tensor, num_rows: int) -> Tensor:
    """float32 gradient of the table's effective rows [V, D]: sums over a symbol's positions."""
    D = grad_MD.shape[1]
    grad_MD = grad_MD if grad_MD.stride(1) == 1 else grad_MD.contiguous()
    symbols_M, order_M = torch.sort(indices_M, stable=True)
    every_symbol = torch.arange(num_rows + 1, device=indices_M.device)
    first_V1 = torch.searchsorted(symbols_M, every_symbol)
    grad_VD = torch.empty(num_rows, D, dtype=torch.float32, device=grad_MD.device)
    embedding_backward_table_kernel[(num_rows, triton.cdiv(D, _BACKWARD_BLOCK_D))](
        grad_MD,
        order_M,
        first_V1,
        grad_VD,
        D,
        grad_MD.stride(0),
        UNROLL=_UNROLL,
        BLOCK_D=_BACKWARD_BLOCK_D,
        num_warps=1,
    )
    return grad_VD


@triton.jit
def embedding_forward_kernel(
    indices_ptr,
    table_ptr,
    row_scale_ptr,
    out_ptr,
    M,
    D,
    ROW_BYTES: tl.constexpr,
    DEAD_ZONE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (m < M)[:, None] & (d < D)[None, :]
    symbol = tl.load(indices_ptr + m, mask=m < M, other=0)
    row_scale = tl.load(row_scale_ptr + symbol, mask=m < M, other=0.0)[:, None]
    if ROW_BYTES:
        place = symbol[:, None] * ROW_BYTES + d[None, :] % ROW_BYTES
        packed = tl.load(table_ptr + place, mask=mask, other=0).to(tl.int32)
        bits = (packed >> (d // ROW_BYTES * 2)[None, :]) & 3
        positive, negative = bits == 1, bits == 3
    else:
        latent = tl.load(table_ptr + symbol[:, None] * D + d[None, :], mask=mask, other=0)
        positive, negative = latent > DEAD_ZONE, latent < -DEAD_ZONE
    value = tl.where(positive, row_scale, tl.where(negative, -row_scale, 0.0))
    offsets = m.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + offsets, nearest(value, tl.bfloat16), mask=mask)


@triton.jit
def embedding_backward_table_kernel(
    grad_ptr,
    order_ptr,
    first_ptr,
    out_ptr,
    D,
    stride_gm,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    symbol = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    position = tl.load(first_ptr + symbol)
    end = tl.load(first_ptr + symbol + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    while position < end:
        for ahead in tl.static_range(UNROLL):
            valid = position + ahead < end
            m = tl.load(order_ptr + position + ahead, mask=valid, other=0)
            grad = tl.load(grad_ptr + m * stride_gm + d, mask=in_d & valid, other=0.0)
            total += grad.to(tl.float32)
        position += UNROLL
    tl.store(out_ptr + symbol.to(tl.int64) * D + d, total, mask=in_d)
