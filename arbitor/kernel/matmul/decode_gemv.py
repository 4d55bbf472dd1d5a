"""Matmul with few positions (generation) on the 2-bit plane of `plane.py`. Oracle: `plane_matmul`
there.

Two instructions turn a plane's bits into four operands of the tensor cores, which take the weight
from registers; no correction follows.
Shape letters: M positions, N outputs, K inputs, Q bytes of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.matmul.plane import row_bytes_of
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.triton_numeric import INTERPRET, nearest

# (largest M, smallest N) -> (outputs, bytes, warps, stages) of a tile, the first that fits: tall
# tiles where they fill a GPU. Swept on an H200 (`benchmarks/tune.py`).
_TILES = (
    (16, 128 * 128, (128, 128, 4, 5)),
    (16, 0, (64, 512, 4, 3)),
    (64, 128 * 128, (128, 128, 4, 5)),
    (64, 0, (64, 128, 4, 5)),
)
_LARGEST_BLOCK = 64  # positions of a tile
MAX_POSITIONS = 4096  # beyond, a weight that is unpacked once costs less


def plane_matmul(x: Quantized, plane_NQ: Tensor, row_scale_N: Tensor) -> Tensor:
    """bfloat16 y [M, N] of at most `MAX_POSITIONS` positions with fp8 or int8 codes."""
    (M, K), (N, row_bytes) = x.codes.shape, plane_NQ.shape
    assert M <= MAX_POSITIONS and row_bytes == row_bytes_of(K) and x.codes.stride(1) == 1
    at_once = min(M, _LARGEST_BLOCK)
    tile = next(t for m, n, t in _TILES if m >= at_once and n <= N)
    block_n, block_q, num_warps, num_stages = tile
    block_m = max(16, triton.next_power_of_2(at_once))
    out_MN = torch.empty(M, N, dtype=torch.bfloat16, device=plane_NQ.device)
    plane_matmul_forward_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        plane_NQ,
        x.codes,
        x.scale,
        row_scale_N,
        out_MN,
        M,
        N,
        x.codes.stride(0),
        K=K,
        ROW_BYTES=row_bytes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_Q=block_q,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out_MN


@triton.jit
def plane_matmul_forward_kernel(
    plane_ptr,
    x_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The weight is the left operand: the tensor cores take that one from registers."""
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    OPERAND: tl.constexpr = tl.int8 if INTEGER else tl.float8e4nv
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane_ptrs = plane_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * ROW_BYTES
    x_ptrs = x_ptr + m[None, :] * stride_xm
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), ACCUMULATOR)
    for start in range(0, ROW_BYTES, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        packed = tl.load(plane_ptrs + q[None, :], mask=(q < ROW_BYTES)[None, :], other=0)
        quarters = _quarters(packed)
        for i in tl.static_range(4):
            trits = quarters[i].to(OPERAND, bitcast=True)
            k = q + i * ROW_BYTES
            mask = ((q < ROW_BYTES) & (k < K))[:, None] & (m < M)[None, :]
            x = tl.load(x_ptrs + k[:, None], mask=mask, other=0.0)
            accumulator = tl.dot(trits, x, accumulator, out_dtype=ACCUMULATOR)
    products = (accumulator >> 6).to(tl.float32) if INTEGER else accumulator * 0.5
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    row_scale = tl.load(row_scale_ptr + n, mask=n < N, other=0.0)
    out = nearest(products * (scale[None, :] * row_scale[:, None]), tl.bfloat16)
    tl.store(out_ptr + m[None, :] * N + n[:, None], out, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _quarters(packed):
    """The four trits of each byte, each at the top of a byte of its own."""
    if INTERPRET:
        wide = packed.to(tl.int32)
        first = ((wide << 6) & 0xC0).to(tl.uint8)
        second = ((wide << 4) & 0xC0).to(tl.uint8)
        third = ((wide << 2) & 0xC0).to(tl.uint8)
        fourth = (wide & 0xC0).to(tl.uint8)
    else:
        # Four bytes at once: what a shift carries into the next byte is masked off.
        first, second, third, fourth = tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            shl.b32 t, $4, 6; and.b32 $0, t, 0xC0C0C0C0;
            shl.b32 t, $4, 4; and.b32 $1, t, 0xC0C0C0C0;
            shl.b32 t, $4, 2; and.b32 $2, t, 0xC0C0C0C0;
            and.b32 $3, $4, 0xC0C0C0C0; }""",
            "=&r,=&r,=&r,=&r,r",
            [packed],
            (tl.uint8, tl.uint8, tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    return first, second, third, fourth
