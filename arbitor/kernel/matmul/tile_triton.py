"""Parts of the matmul kernels: which tile a program owns, and the sum over the contracted axis.

Shape letters as in `gemm_triton.py`: M rows and N columns of the result, K the contracted axis.
"""

import triton
import triton.language as tl


@triton.jit
def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile; neighbours share operands in the L2 cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_size = tl.minimum(tiles_m - first_m, GROUP_M)
    inside = program % (GROUP_M * tiles_n)
    return (first_m + inside % group_size) * BLOCK_M, (inside // group_size) * BLOCK_N


@triton.jit
def accumulate(
    a_ptr,
    b_ptr,
    m,
    n,
    M,
    N,
    stride_am,
    stride_bn,
    K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Accumulators of a tile, int32 for int8 operands; rows beyond the end read the first."""
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.where(m < M, m, 0).to(tl.int64)[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * stride_bn + k[:, None]
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    accumulator = tl.zeros((m.shape[0], n.shape[0]), ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(start + k < K)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(start + k < K)[:, None], other=0.0)
        accumulator = add_products(accumulator, a, b, EXACT, BLOCK_K)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return accumulator


@triton.jit
def accumulate_tma(
    a_desc,
    b_desc,
    first_m,
    first_n,
    K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same through descriptors, which read zeros beyond the ends."""
    INTEGER: tl.constexpr = a_desc.dtype == tl.int8
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        a = a_desc.load([first_m, start])
        b = b_desc.load([first_n, start]).T
        accumulator = add_products(accumulator, a, b, EXACT, BLOCK_K)
    return accumulator


@triton.jit
def add_products(accumulator, a, b, EXACT: tl.constexpr, BLOCK_K: tl.constexpr):
    """accumulator + a b.

    With EXACT each BLOCK_K products are added in float32 outside the tensor cores, whose own fp8
    accumulators keep 14 bits: so do cuBLASLt's without fast accumulation.
    """
    if EXACT:
        accumulator = tl.dot(a, b, accumulator, max_num_imprecise_acc=BLOCK_K)
    else:
        accumulator = tl.dot(a, b, accumulator, out_dtype=accumulator.dtype)
    return accumulator
