"""The backward kernels of attention. Oracle: `reference.py`; launched by `triton.py`.

Shape letters: T positions, J keys of a pair, N heads, H head width, S = T rounded up; blocks of
M queries and N keys.
"""

import triton
import triton.language as tl

from arbitor.kernel.attention.tile_triton import (
    compressed_keys,
    exact_keys,
    exact_start,
    first_query,
    last_query,
    load_rows,
    load_tile,
    queries,
    store_tile,
)
from arbitor.kernel.triton_numeric import dot, loop_bound, nearest, widen


@triton.jit
def attention_backward_query_kernel(
    query_ptr,
    grad_ptr,
    key_desc,
    value_desc,
    compressed_key_desc,
    compressed_value_desc,
    out_desc,
    grad_query_desc,
    log2_sum_ptr,
    delta_ptr,
    T,
    N,
    S,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_gb,
    stride_gt,
    stride_gn,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_COMPRESSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of BLOCK_M queries of one head, and their products of output and gradient."""
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    query = load_rows(query_ptr, b, first_m, n, T, stride_qb, stride_qt, stride_qn, H, BLOCK_M)
    grad = load_rows(grad_ptr, b, first_m, n, T, stride_gb, stride_gt, stride_gn, H, BLOCK_M)
    out = load_tile(out_desc, b, first_m, n, H, BLOCK_M)
    delta = tl.sum(widen(grad) * widen(out), 1)
    row = tl.program_id(1).to(tl.int64) * S + m
    tl.store(delta_ptr + row, delta)
    log2_sum = tl.load(log2_sum_ptr + row)
    grad_query = tl.zeros((BLOCK_M, H), tl.float32)
    low = m * 0
    if HAS_COMPRESSED:
        high = exact_start(m, WINDOW, STRIDE) // STRIDE
        whole, end = compressed_keys(first_m, BLOCK_M, BLOCK_N, WINDOW, STRIDE)
        grad_query = _query_gradient(
            grad_query, query, grad, log2_sum, delta, low, high, b, n,
            compressed_key_desc, compressed_value_desc, 0, end, 0, whole, LOG2_SCALE, H, BLOCK_N,
        )  # fmt: skip
    begin, left, right, end = exact_keys(first_m, BLOCK_M, BLOCK_N, WINDOW, STRIDE)
    if WINDOW:
        low = exact_start(m, WINDOW, STRIDE)
    grad_query = _query_gradient(
        grad_query, query, grad, log2_sum, delta, low, m + 1, b, n,
        key_desc, value_desc, begin, end, left, right, LOG2_SCALE, H, BLOCK_N,
    )  # fmt: skip
    store_tile(grad_query_desc, b, first_m, n, grad_query * LOGIT_SCALE, H, BLOCK_M)


@triton.jit
def _query_gradient(
    grad_query,
    query,
    grad,
    log2_sum,
    delta,
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
    """Adds what comes through the keys from `first` to `last`, bounds as in the forward kernel."""
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = load_tile(key_desc, b, first_n, n, H, BLOCK_N)
        value = load_tile(value_desc, b, first_n, n, H, BLOCK_N)
        scores = dot(query, tl.trans(key))
        grad_weight = dot(grad, tl.trans(value))
        weight = tl.exp2(scores * LOG2_SCALE - log2_sum[:, None])
        if (first_n < left) | (first_n >= right):
            key_n = (first_n + tl.arange(0, BLOCK_N))[None, :]
            weight = tl.where((key_n >= low[:, None]) & (key_n < high[:, None]), weight, 0.0)
        grad_scores = weight * (grad_weight - delta[:, None])
        grad_query = dot(nearest(grad_scores, key.dtype), key, grad_query)
    return grad_query


@triton.jit
def attention_backward_key_kernel(
    key_ptr,
    value_ptr,
    query_desc,
    grad_desc,
    grad_key_desc,
    grad_value_desc,
    log2_sum_ptr,
    delta_ptr,
    T,
    J,
    N,
    S,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    COMPRESSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one head, exact or COMPRESSED ones.

    Scores and weights are transposed, [BLOCK_N, BLOCK_M]: they are left operands here.
    """
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_n = tl.program_id(0) * BLOCK_N
    key_n = first_n + tl.arange(0, BLOCK_N)
    key = load_rows(key_ptr, b, first_n, n, J, stride_kb, stride_kt, stride_kn, H, BLOCK_N)
    value = load_rows(value_ptr, b, first_n, n, J, stride_vb, stride_vt, stride_vn, H, BLOCK_N)
    log2_sum_ptr += tl.program_id(1).to(tl.int64) * S
    delta_ptr += tl.program_id(1).to(tl.int64) * S
    grad_key = tl.zeros((BLOCK_N, H), tl.float32)
    grad_value = tl.zeros((BLOCK_N, H), tl.float32)
    low = first_query(key_n, WINDOW, STRIDE, COMPRESSED)
    high = last_query(key_n, T, WINDOW, STRIDE, COMPRESSED)
    begin, left, right, end = queries(first_n, T, BLOCK_M, BLOCK_N, WINDOW, STRIDE, COMPRESSED)
    for first_m in tl.range(loop_bound(begin), loop_bound(end), BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        query = load_tile(query_desc, b, first_m, n, H, BLOCK_M)
        grad = load_tile(grad_desc, b, first_m, n, H, BLOCK_M)
        log2_sum, delta = tl.load(log2_sum_ptr + m), tl.load(delta_ptr + m)
        scores = dot(key, tl.trans(query))
        weight = tl.exp2(scores * LOG2_SCALE - log2_sum[None, :])
        if (first_m < left) | (first_m >= right):
            seen = (m[None, :] >= low[:, None]) & (m[None, :] < high[:, None])
            weight = tl.where(seen, weight, 0.0)
        grad_value = dot(nearest(weight, grad.dtype), grad, grad_value)
        grad_weight = dot(value, tl.trans(grad))
        grad_scores = weight * (grad_weight - delta[None, :])
        grad_key = dot(nearest(grad_scores, query.dtype), query, grad_key)
    store_tile(grad_key_desc, b, first_n, n, grad_key * LOGIT_SCALE, H, BLOCK_N)
    store_tile(grad_value_desc, b, first_n, n, grad_value, H, BLOCK_N)
