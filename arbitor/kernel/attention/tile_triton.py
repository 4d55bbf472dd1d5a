"""Tiles of heads, and which keys and queries see each other: what the attention kernels share.

WINDOW 0 stands for none: every position before is an exact key. Shape letters: T positions,
H head width; blocks of M queries and N keys.
"""

import triton
import triton.language as tl

from arbitor.kernel.triton_numeric import nearest


@triton.jit
def load_tile(desc, b, first, n, H: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [BLOCK, H] of a head from position `first` on; zeros beyond the end."""
    return desc.load([b, first, n, 0]).reshape(BLOCK, H)


@triton.jit
def store_tile(desc, b, first, n, x, H: tl.constexpr, BLOCK: tl.constexpr):
    desc.store([b, first, n, 0], nearest(x, desc.dtype).reshape(1, BLOCK, 1, H))


@triton.jit
def load_rows(
    ptr, b, first, n, length, stride_b, stride_t, stride_n, H: tl.constexpr, BLOCK: tl.constexpr
):
    """The same through pointers: a left operand that was loaded so stays in shared memory.

    A reshaped tile would lie in registers during the whole loop, and ptxas (Triton 3.6, sm_90)
    gives these to the left operand of a second matmul too: from the second block on, the first one
    reads the wrong numbers.
    """
    ptr += b.to(tl.int64) * stride_b + first.to(tl.int64) * stride_t + n * stride_n
    row = tl.arange(0, BLOCK)[:, None]
    return tl.load(
        ptr + row * stride_t + tl.arange(0, H)[None, :], mask=row < length - first, other=0.0
    )


@triton.jit
def exact_start(m, WINDOW: tl.constexpr, STRIDE: tl.constexpr):
    """The first exact key of query m, `reference.exact_start`."""
    return tl.maximum(m + 1 - WINDOW, 0) // STRIDE * STRIDE


@triton.jit
def exact_keys(
    first_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Four bounds of the exact keys of a block of queries: between the middle ones all of them see
    every key, outside of those some see some."""
    end = first_m + BLOCK_M
    if WINDOW:
        begin = exact_start(first_m, WINDOW, STRIDE) // BLOCK_N * BLOCK_N
        last_start = exact_start(end - 1, WINDOW, STRIDE)
        left = tl.minimum(tl.cdiv(last_start, BLOCK_N) * BLOCK_N, end)
    else:
        begin = first_m * 0
        left = begin
    return begin, left, tl.maximum(first_m // BLOCK_N * BLOCK_N, left), end


@triton.jit
def compressed_keys(
    first_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Two bounds of the compressed keys of a block of queries: all see those before the first."""
    whole = exact_start(first_m, WINDOW, STRIDE) // STRIDE // BLOCK_N * BLOCK_N
    return whole, exact_start(first_m + BLOCK_M - 1, WINDOW, STRIDE) // STRIDE


@triton.jit
def first_query(n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, COMPRESSED: tl.constexpr):
    """The first query that sees key n."""
    if COMPRESSED:
        return (n + 1) * STRIDE + WINDOW - 1
    else:
        return n


@triton.jit
def last_query(n, T, WINDOW: tl.constexpr, STRIDE: tl.constexpr, COMPRESSED: tl.constexpr):
    """The end of the queries that see key n."""
    if WINDOW == 0 or COMPRESSED:
        return n * 0 + T
    else:
        return tl.minimum((n // STRIDE + 1) * STRIDE + WINDOW - 1, T)


@triton.jit
def queries(
    first_n,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    COMPRESSED: tl.constexpr,
):
    """Four bounds of the queries of a block of keys: between the middle ones all see every key."""
    last_n = first_n + BLOCK_N - 1
    begin = first_query(first_n, WINDOW, STRIDE, COMPRESSED) // BLOCK_M * BLOCK_M
    left = tl.cdiv(first_query(last_n, WINDOW, STRIDE, COMPRESSED), BLOCK_M) * BLOCK_M
    left = tl.minimum(left, tl.cdiv(T, BLOCK_M) * BLOCK_M)
    end = last_query(last_n, T, WINDOW, STRIDE, COMPRESSED)
    right = last_query(first_n, T, WINDOW, STRIDE, COMPRESSED)
    # Beyond the last query there are zeros: its block is a whole one.
    right = tl.where(right == T, tl.cdiv(T, BLOCK_M), right // BLOCK_M) * BLOCK_M
    return begin, left, tl.maximum(left, right), end
