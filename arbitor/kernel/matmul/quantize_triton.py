"""The gradient of a matmul's output, quantized twice. Oracle: `reference.py::matmul_backward_x` and
`matmul_backward_weight`, whose `quantize_fp8` calls this reproduces bit for bit.

Both maxima must be known before a code is written, so the gradient passes twice: 2 + 2 bytes read,
1 + 1 written an element. Maxima are combined as integers (the bits of a float32 >= 0 are ordered),
so their order cannot matter. Shape letters: M positions, N outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.triton_numeric import e4m3_bits, power_of_two, scale_exponent

_BLOCK_M, _BLOCK_N, _WARPS = 128, 128, 8


def quantize_gradient(
    grad_MN: Tensor, row_scale_N: Tensor, position_scale_M1: Tensor
) -> tuple[Quantized, Quantized]:
    """fp8 codes of grad * row_scale with a scale per position, and of grad * position_scale with a
    scale per output feature. The second is written output feature by output feature:
    its `codes.T` is a contiguous [N, M] and its scale is [1, N].
    """
    M, N = grad_MN.shape
    grad_MN = grad_MN if grad_MN.stride(1) == 1 else grad_MN.contiguous()
    device = grad_MN.device
    maxima = torch.zeros(M + N, dtype=torch.int32, device=device)
    scales = torch.empty(M + N, dtype=torch.float32, device=device)
    codes_MN = torch.empty(M, N, dtype=torch.float8_e4m3fn, device=device)
    codes_NM = torch.empty(N, M, dtype=torch.float8_e4m3fn, device=device)
    grid = (triton.cdiv(M, _BLOCK_M), triton.cdiv(N, _BLOCK_N))
    blocks = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "num_warps": _WARPS}
    inputs = (grad_MN, row_scale_N, position_scale_M1, maxima)
    gradient_maxima_kernel[grid](*inputs, M, N, grad_MN.stride(0), **blocks)
    codes = (codes_MN.view(torch.int8), codes_NM.view(torch.int8))
    gradient_quantize_kernel[grid](*inputs, *codes, scales, M, N, grad_MN.stride(0), **blocks)
    per_position = Quantized(codes_MN, scales[:M].unsqueeze(1))
    per_output = Quantized(codes_NM.T, scales[M:].unsqueeze(0))
    return per_position, per_output


@triton.jit
def gradient_maxima_kernel(
    grad_ptr,
    row_scale_ptr,
    position_scale_ptr,
    maxima_ptr,
    M,
    N,
    stride_gm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """maxima [M + N]: bits of max |grad * row_scale| of the positions, then of max
    |grad * position_scale| of the outputs."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad, row_scale, position_scale = _load_tile(
        grad_ptr, row_scale_ptr, position_scale_ptr, m, n, M, N, stride_gm
    )
    row_largest = tl.max(tl.abs(grad * row_scale[None, :]), 1).to(tl.int32, bitcast=True)
    col_largest = tl.max(tl.abs(grad * position_scale[:, None]), 0).to(tl.int32, bitcast=True)
    tl.atomic_max(maxima_ptr + m, row_largest, mask=m < M, sem="relaxed")
    tl.atomic_max(maxima_ptr + M + n, col_largest, mask=n < N, sem="relaxed")


@triton.jit
def gradient_quantize_kernel(
    grad_ptr,
    row_scale_ptr,
    position_scale_ptr,
    maxima_ptr,
    codes_ptr,
    codes_t_ptr,
    scales_ptr,
    M,
    N,
    stride_gm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    grad, row_scale, position_scale = _load_tile(
        grad_ptr, row_scale_ptr, position_scale_ptr, m, n, M, N, stride_gm
    )
    row_largest = tl.load(maxima_ptr + m, mask=in_m, other=0).to(tl.float32, bitcast=True)
    col_largest = tl.load(maxima_ptr + M + n, mask=in_n, other=0).to(tl.float32, bitcast=True)
    row_exponent, col_exponent = scale_exponent(row_largest), scale_exponent(col_largest)
    tl.store(scales_ptr + m, power_of_two(row_exponent), mask=in_m & (tl.program_id(1) == 0))
    tl.store(scales_ptr + M + n, power_of_two(col_exponent), mask=in_n & (tl.program_id(0) == 0))

    mask = in_m[:, None] & in_n[None, :]
    codes = e4m3_bits(grad * row_scale[None, :] * power_of_two(-row_exponent)[:, None])
    tl.store(codes_ptr + m.to(tl.int64)[:, None] * N + n[None, :], codes, mask=mask)
    codes = e4m3_bits(grad * position_scale[:, None] * power_of_two(-col_exponent)[None, :])
    t_offsets = n.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(codes_t_ptr + t_offsets, tl.trans(codes), mask=tl.trans(mask))


@triton.jit
def _load_tile(grad_ptr, row_scale_ptr, position_scale_ptr, m, n, M, N, stride_gm):
    mask = (m < M)[:, None] & (n < N)[None, :]
    offsets = m.to(tl.int64)[:, None] * stride_gm + n[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    row_scale = tl.load(row_scale_ptr + n, mask=n < N, other=0.0)
    position_scale = tl.load(position_scale_ptr + m, mask=m < M, other=0.0)
    return grad, row_scale, position_scale
