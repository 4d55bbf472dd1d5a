"""Gain-free RMSNorm fused with activation quantization, and its gradient. Oracle: `reference.py`
followed by `matmul/reference.py::quantize_activation`.

A program owns BLOCK_M whole rows: a first pass takes their sums of squares and maxima, a second
one, which finds the rows in the L2 cache, writes the codes. Shape letters: M positions, K features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.rms_norm.reference import EPSILON
from arbitor.kernel.triton_numeric import (
    e4m3_bits,
    nearest,
    power_of_two,
    round_half_even,
    scale_exponent,
)

# Rows of a program, columns of a step, warps. Transposed stores write BLOCK_M bytes at a stretch:
# 32 is one sector of memory.
_FORWARD_BLOCKS = (32, 128, 8)
_BACKWARD_BLOCKS = (32, 128, 8)
_CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def rms_norm_quantize(
    x_MK: Tensor, activation: str, for_backward: bool
) -> tuple[Quantized, Quantized | None, Tensor]:
    """Codes of x / rms(x) with a scale per position, and the float32 inverse rms [M].

    The second result holds the same codes with positions contiguous (`codes.T` is a contiguous
    [K, M]), as the weight gradient reads them; None unless `for_backward`.
    """
    M, K = x_MK.shape
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    dtype, device = _CODES[activation], x_MK.device
    codes_MK = torch.empty(M, K, dtype=dtype, device=device)
    codes_KM = torch.empty(K, M, dtype=dtype, device=device) if for_backward else codes_MK
    scale_M = torch.empty(M, dtype=torch.float32, device=device)
    inverse_rms_M = torch.empty_like(scale_M)
    block_m, block_k, num_warps = _FORWARD_BLOCKS
    rms_norm_forward_kernel[(triton.cdiv(M, block_m),)](
        x_MK,
        codes_MK.view(torch.int8),
        codes_KM.view(torch.int8),
        scale_M,
        inverse_rms_M,
        M,
        x_MK.stride(0),
        EPSILON,
        K=K,
        FP8=activation == "fp8",
        TRANSPOSE=for_backward,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    scale_M1 = scale_M.unsqueeze(1)
    saved = Quantized(codes_KM.T, scale_M1) if for_backward else None
    return Quantized(codes_MK, scale_M1), saved, inverse_rms_M


def rms_norm_backward_x(
    grad_MK: Tensor, x: Quantized, inverse_rms_M: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient with respect to the norm's input [M, K] in `dtype`; x in either layout."""
    M, K = grad_MK.shape
    out_MK = torch.empty(M, K, dtype=dtype, device=grad_MK.device)
    block_m, block_k, num_warps = _BACKWARD_BLOCKS
    rms_norm_backward_x_kernel[(triton.cdiv(M, block_m),)](
        grad_MK,
        x.codes,
        x.scale,
        inverse_rms_M,
        out_MK,
        M,
        grad_MK.stride(0),
        *x.codes.stride(),
        K=K,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return out_MK


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,
    codes_ptr,
    codes_t_ptr,
    scale_ptr,
    inverse_rms_ptr,
    M,
    stride_xm,
    epsilon,
    K: tl.constexpr,
    FP8: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    row = m.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
        largest = tl.maximum(largest, tl.abs(x))
    inverse_rms = tl.rsqrt(tl.sum(squares, 1) / K + epsilon)
    # Rounding is monotone: the largest product is the product of the largest.
    largest_M = tl.max(largest, 1) * inverse_rms
    if FP8:
        exponent = scale_exponent(largest_M)
        scale = power_of_two(exponent)
        inverse_scale = power_of_two(-exponent)
    else:
        scale = tl.div_rn(tl.maximum(largest_M, 1e-30), 127.0)
    tl.store(inverse_rms_ptr + m, inverse_rms, mask=in_m)
    tl.store(scale_ptr + m, scale, mask=in_m)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        normalized = x * inverse_rms[:, None]
        if FP8:
            codes = e4m3_bits(normalized * inverse_scale[:, None])
        else:
            codes = round_half_even(tl.div_rn(normalized, scale[:, None])).to(tl.int8)
        tl.store(codes_ptr + row * K + k[None, :], codes, mask=mask)
        if TRANSPOSE:
            t_offsets = k.to(tl.int64)[:, None] * M + m[None, :]
            tl.store(codes_t_ptr + t_offsets, tl.trans(codes), mask=tl.trans(mask))


@triton.jit
def rms_norm_backward_x_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    inverse_rms_ptr,
    out_ptr,
    M,
    stride_gm,
    stride_cm,
    stride_ck,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(g - x_hat * mean(g * x_hat)) / rms with x_hat = codes * scale."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    row = m.to(tl.int64)[:, None]
    scale = tl.load(scale_ptr + m, mask=in_m, other=0.0)
    inverse_rms = tl.load(inverse_rms_ptr + m, mask=in_m, other=0.0)
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        column = k.to(tl.int64)[None, :]
        codes = tl.load(codes_ptr + row * stride_cm + column * stride_ck, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + row * stride_gm + column, mask=mask, other=0.0)
        products += grad.to(tl.float32) * codes.to(tl.float32)
    projection = tl.sum(products, 1) * scale / K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        column = k.to(tl.int64)[None, :]
        codes = tl.load(codes_ptr + row * stride_cm + column * stride_ck, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + row * stride_gm + column, mask=mask, other=0.0).to(tl.float32)
        normalized = codes.to(tl.float32) * scale[:, None]
        out = (grad - normalized * projection[:, None]) * inverse_rms[:, None]
        tl.store(out_ptr + row * K + column, nearest(out, out_ptr.dtype.element_ty), mask=mask)
