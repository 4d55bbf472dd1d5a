"""Eight-bit matmul kernels: C[m, n] = row_scale[m] * col_scale[n] * sum_k A[m, k] B[n, k].

The three matmuls of a ternary linear are all of this form, with both operands contiguous along the
contracted axis (the tensor cores read eight-bit operands in no other way). Oracle: `reference.py`.
The second kernel turns each tile of the weight gradient into its slot integers and adds them to the
running sum, so that the float gradient is never in memory; oracle: `latent_update/slots.py`.

Shape letters, of this file alone: M rows and N columns of the result, K the contracted axis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.kernel.latent_update.device_math import hash_word, signed_word
from arbitor.kernel.latent_update.slots import SlotFormat
from arbitor.kernel.matmul.configs import GemmConfig
from arbitor.kernel.matmul.tile_triton import accumulate, accumulate_tma, count, tile
from arbitor.kernel.triton_numeric import nearest


def matmul_scaled(
    a_MK: Tensor,
    b_NK: Tensor,
    row_scale_M: Tensor,
    col_scale_N: Tensor | None,
    dtype: torch.dtype,
    config: GemmConfig,
) -> Tensor:
    """C [M, N] in `dtype`; operands both fp8 or both int8 (int32 accumulators).

    No column scale stands for ones.
    """
    (M, K), N = a_MK.shape, b_NK.shape[0]
    out_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    matmul_scaled_kernel[_grid(M, N, config)](
        *_operands(a_MK, b_NK, config),
        row_scale_M,
        row_scale_M if col_scale_N is None else col_scale_N,
        out_MN,
        M,
        N,
        a_MK.stride(0),
        b_NK.stride(0),
        K=K,
        HAS_COL_SCALE=col_scale_N is not None,
        **_constants(config, a_MK, b_NK),
    )
    return out_MN


def matmul_backward_weight_to_sum_(
    sum_NK: Tensor,
    grad_NM: Tensor,
    grad_scale_N: Tensor,
    x_KM: Tensor,
    row_exponent_N: Tensor,
    fmt: SlotFormat,
    key: int,
    counters: Tensor,
    config: GemmConfig,
) -> None:
    """Adds one slot's integers of the weight gradient to int16 or int32 `sum_NK`, in place.

    `grad_NM` and `x_KM` fp8 codes, `row_exponent_N` int32 from `row_exponents`, `key` the slot's
    stream. `counters` int64 [2] gains the numbers of non-finite and of clipped entries.
    """
    (N, M), K = grad_NM.shape, x_KM.shape[0]
    assert sum_NK.shape == (N, K) and sum_NK.is_contiguous() and sum_NK.dtype == fmt.sum_dtype
    matmul_backward_weight_to_sum_kernel[_grid(N, K, config)](
        *_operands(grad_NM, x_KM, config),
        grad_scale_N,
        row_exponent_N,
        sum_NK,
        counters,
        N,
        K,
        grad_NM.stride(0),
        x_KM.stride(0),
        signed_word(key),
        float(fmt.qmax << 16),
        K=M,
        STOCHASTIC=fmt.stochastic,
        **_constants(config, grad_NM, x_KM),
    )


def _grid(M: int, N: int, config: GemmConfig) -> tuple[int]:
    return (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)


def _operands(
    a_MK: Tensor, b_NK: Tensor, config: GemmConfig
) -> tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]:
    """The operands, or descriptors of their tiles for the tensor memory accelerator."""
    if not _uses_tma(a_MK, b_NK, config):
        return a_MK, b_NK
    return (
        TensorDescriptor.from_tensor(a_MK, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(b_NK, [config.block_n, config.block_k]),
    )


def _uses_tma(a_MK: Tensor, b_NK: Tensor, config: GemmConfig) -> bool:
    """Whether the configuration wants it and rows begin at multiples of 16 bytes, as it needs."""
    starts = (a_MK.data_ptr(), b_NK.data_ptr(), a_MK.stride(0), b_NK.stride(0))
    return config.tma and all(start % 16 == 0 for start in starts)


def _constants(config: GemmConfig, a_MK: Tensor, b_NK: Tensor) -> dict[str, int]:
    return {
        "TMA": _uses_tma(a_MK, b_NK, config),
        "EVEN_K": a_MK.shape[1] % config.block_k == 0,
        "EXACT": config.exact and a_MK.dtype == torch.float8_e4m3fn,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@triton.jit
def matmul_scaled_kernel(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    col_scale_ptr,
    out_ptr,
    M,
    N,
    stride_am,
    stride_bn,
    K: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    first_m, first_n = tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if TMA:
        accumulator = accumulate_tma(
            a_ptr, b_ptr, first_m, first_n, K, EXACT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        accumulator = accumulate(
            a_ptr, b_ptr, m, n, M, N, stride_am, stride_bn, K, EVEN_K, EXACT, BLOCK_K
        )
    row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    if HAS_COL_SCALE:
        col_scale = tl.load(col_scale_ptr + n, mask=n < N, other=0.0)
        scaled = accumulator.to(tl.float32) * (row_scale[:, None] * col_scale[None, :])
    else:
        scaled = accumulator.to(tl.float32) * row_scale[:, None]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + offsets, nearest(scaled, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["key"])
def matmul_backward_weight_to_sum_kernel(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    row_exponent_ptr,
    sum_ptr,
    counters_ptr,
    M,
    N,
    stride_am,
    stride_bn,
    key,
    limit,
    K: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """sum += (trunc(clamp(C * 2^(exponent + 16))) + dither) >> 16; non-finite entries give 0."""
    first_m, first_n = tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if TMA:
        accumulator = accumulate_tma(
            a_ptr, b_ptr, first_m, first_n, K, EXACT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        accumulator = accumulate(
            a_ptr, b_ptr, m, n, M, N, stride_am, stride_bn, K, EVEN_K, EXACT, BLOCK_K
        )
    in_m = m < M
    mask = in_m[:, None] & (n < N)[None, :]
    row_scale = tl.load(row_scale_ptr + m, mask=in_m, other=0.0)
    exponent = tl.load(row_exponent_ptr + m, mask=in_m, other=0)
    to_q16 = ((exponent + 16 + 127) << 23).to(tl.float32, bitcast=True)
    grad = accumulator * row_scale[:, None]
    finite = tl.abs(grad) < float("inf")
    scaled = tl.where(finite, grad * to_q16[:, None], 0.0)
    clipped = tl.abs(scaled) > limit
    q16 = tl.minimum(tl.maximum(scaled, -limit), limit).to(tl.int32)
    if STOCHASTIC:
        word = hash_word((m[:, None] * N + n[None, :]) ^ key)
        q16 += (word & 0xFFFF).to(tl.int32)
    else:
        q16 += 1 << 15
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.load(sum_ptr + offsets, mask=mask, other=0).to(tl.int32) + (q16 >> 16)
    tl.store(sum_ptr + offsets, total.to(sum_ptr.dtype.element_ty), mask=mask)
    nonfinite, clipped = count(mask & ~finite), count(mask & clipped)
    if nonfinite + clipped > 0:  # rare, and atomics on one address are slow
        tl.atomic_add(counters_ptr, nonfinite.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + 1, clipped.to(tl.int64), sem="relaxed")
