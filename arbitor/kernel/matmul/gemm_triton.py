"""Eight-bit matmul kernels: C[m, n] = row_scale[m] * col_scale[n] * sum_k A[m, k] B[n, k].

The three matmuls of a ternary linear are all of this form, with both operands contiguous along the
contracted axis (the tensor cores read eight-bit operands in no other way). Oracle: `reference.py`.

Shape letters, of this file alone: M rows and N columns of the result, K the contracted axis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.kernel.matmul.configs import GemmConfig
from arbitor.kernel.matmul.tile_triton import accumulate, accumulate_tma, tile
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
