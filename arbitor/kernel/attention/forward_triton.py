"""The forward kernel of attention. Oracle: `reference.py`; launched by `triton.py`.

Shape letters: T positions, N heads, H head width, S = T rounded up; blocks of M queries and N keys.
"""

import triton
import triton.language as tl

from arbitor.kernel.attention.tile_triton import (
    compressed_keys,
    exact_keys,
    exact_start,
    load_rows,
    load_tile,
    store_tile,
)
from arbitor.kernel.triton_numeric import dot, loop_bound, nearest


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_desc,
    value_desc,
    compressed_key_desc,
    compressed_value_desc,
    out_desc,
    log2_sum_ptr,
    T,
    N,
    S,
    stride_qb,
    stride_qt,
    stride_qn,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_COMPRESSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_M queries of one head; those with most keys start first."""
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    query = load_rows(query_ptr, b, first_m, n, T, stride_qb, stride_qt, stride_qn, H, BLOCK_M)
    out = tl.zeros((BLOCK_M, H), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    low = m * 0
    if HAS_COMPRESSED:
        high = exact_start(m, WINDOW, STRIDE) // STRIDE
        whole, end = compressed_keys(first_m, BLOCK_M, BLOCK_N, WINDOW, STRIDE)
        out, total = _attend_to_keys(
            out, total, query, low, high, b, n, compressed_key_desc, compressed_value_desc,
            0, end, 0, whole, LOG2_SCALE, H, BLOCK_N,
        )  # fmt: skip
    begin, left, right, end = exact_keys(first_m, BLOCK_M, BLOCK_N, WINDOW, STRIDE)
    if WINDOW:
        low = exact_start(m, WINDOW, STRIDE)
    out, total = _attend_to_keys(
        out, total, query, low, m + 1, b, n, key_desc, value_desc,
        begin, end, left, right, LOG2_SCALE, H, BLOCK_N,
    )  # fmt: skip
    tl.store(log2_sum_ptr + tl.program_id(1).to(tl.int64) * S + m, tl.log2(total))
    store_tile(out_desc, b, first_m, n, out / total[:, None], H, BLOCK_M)


@triton.jit
def _attend_to_keys(
    out,
    total,
    query,
    low,
    high,
    b,
    n,
    key_desc,
    value_desc,
    first,
    last,
    left,
    right,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the keys from `first` to `last`, of which a query sees those from `low` to `high`; all
    queries see the blocks of keys between `left` and `right`.

    One loop: accumulators that are handed from one loop to another make the compiler wait for each
    matmul of the second.
    """
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = load_tile(key_desc, b, first_n, n, H, BLOCK_N)
        weight = tl.exp2(dot(query, tl.trans(key)) * LOG2_SCALE)
        if (first_n < left) | (first_n >= right):
            key_n = (first_n + tl.arange(0, BLOCK_N))[None, :]
            weight = tl.where((key_n >= low[:, None]) & (key_n < high[:, None]), weight, 0.0)
        total += tl.sum(weight, 1)
        value = load_tile(value_desc, b, first_n, n, H, BLOCK_N)
        out = dot(nearest(weight, value.dtype), value, out)
    return out, total
