"""Latents to the weight operand of a matmul, and row scales. Oracles:
`latent_update/state.py::trits` and the torch path of `op.py::row_scale`.

Shape letters: N outputs (rows), K inputs (columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.latent_update.state import DEAD_ZONE

_BLOCK = 128

# Bit patterns of +1 and -1. The kernel writes integers, so that it is the same for every dtype.
_ONES = {
    torch.float8_e4m3fn: (torch.uint8, 0x38, 0xB8),
    torch.int8: (torch.uint8, 0x01, 0xFF),
    torch.bfloat16: (torch.int16, 0x3F80, 0xBF80 - 0x10000),
}


def decode_weight(
    latent_NK: Tensor, dtype: torch.dtype, *, row_major: bool = True, transposed: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Trits of int8 latents as fp8 e4m3, int8 or bfloat16: [N, K] and [K, N], both contiguous.

    One read serves both; a layout that is not asked for is None.
    """
    assert latent_NK.is_contiguous() and (row_major or transposed)
    N, K = latent_NK.shape
    bits, plus, minus = _ONES[dtype]
    out_NK = torch.empty(N, K, dtype=bits, device=latent_NK.device) if row_major else None
    out_KN = torch.empty(K, N, dtype=bits, device=latent_NK.device) if transposed else None
    decode_weight_forward_kernel[(triton.cdiv(N, _BLOCK), triton.cdiv(K, _BLOCK))](
        latent_NK,
        out_NK if row_major else out_KN,
        out_KN if transposed else out_NK,
        N,
        K,
        PLUS=plus,
        MINUS=minus,
        DEAD_ZONE=DEAD_ZONE,
        ROW_MAJOR=row_major,
        TRANSPOSED=transposed,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return (
        out_NK.view(dtype) if row_major else None,
        out_KN.view(dtype) if transposed else None,
    )


def decode_row_scale(log2_scale_N: Tensor, pow2_q16: Tensor) -> Tensor:
    """float32 2^(log2_scale / 256) [N], from the table `fixed_point.POW2_Q16` on the device."""
    N = log2_scale_N.numel()
    scale_N = torch.empty(N, dtype=torch.float32, device=log2_scale_N.device)
    row_scale_forward_kernel[(triton.cdiv(N, 256),)](
        log2_scale_N, pow2_q16, scale_N, N, BLOCK_N=256
    )
    return scale_N


@triton.jit
def decode_weight_forward_kernel(
    latent_ptr,
    out_ptr,
    out_t_ptr,
    N,
    K,
    PLUS: tl.constexpr,
    MINUS: tl.constexpr,
    DEAD_ZONE: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < N)[:, None] & (k < K)[None, :]
    latent = tl.load(latent_ptr + n[:, None] * K + k[None, :], mask=mask, other=0)
    trits = tl.where(latent > DEAD_ZONE, PLUS, tl.where(latent < -DEAD_ZONE, MINUS, 0))
    trits = trits.to(out_ptr.dtype.element_ty)
    if ROW_MAJOR:
        tl.store(out_ptr + n[:, None] * K + k[None, :], trits, mask=mask)
    if TRANSPOSED:
        t_offsets = k[:, None] * N + n[None, :]
        tl.store(out_t_ptr + t_offsets, tl.trans(trits), mask=tl.trans(mask))


@triton.jit
def row_scale_forward_kernel(log2_scale_ptr, pow2_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    log2_scale = tl.load(log2_scale_ptr + n, mask=n < N, other=0).to(tl.int32)
    mantissa = tl.load(pow2_ptr + (log2_scale & 255)).to(tl.float32)
    power = (((log2_scale >> 8) - 16 + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(out_ptr + n, mantissa * power, mask=n < N)
