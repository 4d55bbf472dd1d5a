"""Gain-free RMSNorm fused with activation quantization, and its gradient. Oracle: `reference.py`
followed by `matmul/reference.py::quantize_activation`; before a gated one `swiglu/reference.py`.

A program owns BLOCK_M whole rows: a first pass takes their sums of squares and maxima, a second
one writes the codes. It goes backwards, so as to find what was read last in the L2 cache.
Shape letters: M positions, K features, X columns of the input: 2 K of a gated norm, else K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.rms_norm.reference import EPSILON
from arbitor.kernel.swiglu.triton import swiglu, swiglu_gradient
from arbitor.kernel.triton_numeric import (
    e4m3_bits,
    nearest,
    power_of_two,
    round_half_even,
    scale_exponent,
    widen,
)

# Rows of a program, columns of a step, warps. Transposed stores write BLOCK_M bytes at a stretch:
# 32 is one sector of memory.
_FORWARD_BLOCKS = (32, 128, 8)
_BACKWARD_BLOCKS = (32, 128, 4)
_GATED_FORWARD_BLOCKS = (32, 128, 8)
_GATED_BACKWARD_BLOCKS = (16, 256, 4)
# Generation: a position a program, so that few positions fill more than one processor, and a step
# as wide as a row, for each step waits for memory.
_FEW_POSITIONS = 512
_WIDEST_STEP = 4096
_CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def rms_norm_quantize(
    x_MX: Tensor, activation: str, for_backward: bool, gated: bool = False
) -> tuple[Quantized, Quantized | None, Tensor]:
    """Codes of x / rms(x) with a scale per position, and the float32 inverse rms [M].

    The second result holds the same codes with positions contiguous (`codes.T` is a contiguous
    [K, M]), as the weight gradient reads them; None unless `for_backward`.
    """
    M, X = x_MX.shape
    K = X // 2 if gated else X
    x_MX = x_MX if x_MX.stride(1) == 1 else x_MX.contiguous()
    dtype, device = _CODES[activation], x_MX.device
    codes_MK = torch.empty(M, K, dtype=dtype, device=device)
    codes_KM = torch.empty(K, M, dtype=dtype, device=device) if for_backward else codes_MK
    scale_M = torch.empty(M, dtype=torch.float32, device=device)
    inverse_rms_M = torch.empty_like(scale_M)
    block_m, block_k, num_warps = _forward_blocks(M, K, for_backward, gated)
    rms_norm_forward_kernel[(triton.cdiv(M, block_m),)](
        x_MX,
        codes_MK.view(torch.int8),
        codes_KM.view(torch.int8),
        scale_M,
        inverse_rms_M,
        M,
        x_MX.stride(0),
        EPSILON,
        K=K,
        GATED=gated,
        FP8=activation == "fp8",
        TRANSPOSE=for_backward,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    scale_M1 = scale_M.unsqueeze(1)
    saved = Quantized(codes_KM.T, scale_M1) if for_backward else None
    return Quantized(codes_MK, scale_M1), saved, inverse_rms_M


def _forward_blocks(M: int, K: int, for_backward: bool, gated: bool) -> tuple[int, int, int]:
    if for_backward or M > _FEW_POSITIONS:
        return _GATED_FORWARD_BLOCKS if gated else _FORWARD_BLOCKS
    block_k = min(_WIDEST_STEP, max(128, triton.next_power_of_2(K)))
    return 1, block_k, max(1, block_k // 512)


def rms_norm_backward_x(
    grad_MK: Tensor,
    x: Quantized,
    inverse_rms_M: Tensor,
    dtype: torch.dtype,
    gate_and_up_MX: Tensor | None = None,
    residual_MX: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the norm's input [M, X] in `dtype`, plus `residual`.

    x is taken in either layout.
    """
    M, K = grad_MK.shape
    gated = gate_and_up_MX is not None
    grad_MK, gate_and_up_MX, residual_MX = (
        x if x is None or x.stride(1) == 1 else x.contiguous()
        for x in (grad_MK, gate_and_up_MX, residual_MX)
    )
    out_MX = torch.empty(M, 2 * K if gated else K, dtype=dtype, device=grad_MK.device)
    block_m, block_k, num_warps = _GATED_BACKWARD_BLOCKS if gated else _BACKWARD_BLOCKS
    rms_norm_backward_x_kernel[(triton.cdiv(M, block_m),)](
        grad_MK,
        x.codes,
        x.scale,
        inverse_rms_M,
        gate_and_up_MX,
        residual_MX,
        out_MX,
        M,
        grad_MK.stride(0),
        *x.codes.stride(),
        gate_and_up_MX.stride(0) if gated else 0,
        residual_MX.stride(0) if residual_MX is not None else 0,
        K=K,
        GATED=gated,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return out_MX


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
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    row = m.to(tl.int64)[:, None]
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        x = _load(x_ptr + row * stride_xm + k[None, :], mask, K, GATED)
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
        k = LAST - start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        x = _load(x_ptr + row * stride_xm + k[None, :], mask, K, GATED)
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
def _load(x_ptrs, mask, K: tl.constexpr, GATED: tl.constexpr):
    """float32 x, or the SwiGLU of gate and up, which lie K columns apart."""
    x = widen(tl.load(x_ptrs, mask=mask, other=0.0))
    if GATED:
        x = swiglu(x, widen(tl.load(x_ptrs + K, mask=mask, other=0.0)))
    return x


@triton.jit
def rms_norm_backward_x_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    inverse_rms_ptr,
    gate_and_up_ptr,
    residual_ptr,
    out_ptr,
    M,
    stride_gm,
    stride_cm,
    stride_ck,
    stride_um,
    stride_rm,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(g - x_hat * mean(g * x_hat)) / rms with x_hat = codes * scale, then through the gate."""
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
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
        products += widen(grad) * codes.to(tl.float32)
    projection = tl.sum(products, 1) * scale / K
    for start in range(0, K, BLOCK_K):
        k = LAST - start + tl.arange(0, BLOCK_K)
        mask = in_m[:, None] & (k < K)[None, :]
        column = k.to(tl.int64)[None, :]
        codes = tl.load(codes_ptr + row * stride_cm + column * stride_ck, mask=mask, other=0.0)
        grad = widen(tl.load(grad_ptr + row * stride_gm + column, mask=mask, other=0.0))
        normalized = codes.to(tl.float32) * scale[:, None]
        grad = (grad - normalized * projection[:, None]) * inverse_rms[:, None]
        if GATED:
            gates = gate_and_up_ptr + row * stride_um + column
            gate = widen(tl.load(gates, mask=mask, other=0.0))
            up = widen(tl.load(gates + K, mask=mask, other=0.0))
            grad, grad_up = swiglu_gradient(grad, gate, up)
            out = out_ptr + row * (2 * K) + column
            _store_sum(out + K, grad_up, residual_ptr, row * stride_rm + column + K, mask)
        else:
            out = out_ptr + row * K + column
        _store_sum(out, grad, residual_ptr, row * stride_rm + column, mask)


@triton.jit
def _store_sum(out_ptrs, grad, residual_ptr, offsets, mask):
    """Stores the gradient, with the residual's added if there is one."""
    if residual_ptr is not None:
        grad += widen(tl.load(residual_ptr + offsets, mask=mask, other=0.0))
    tl.store(out_ptrs, nearest(grad, out_ptrs.dtype.element_ty), mask=mask)
