"""Softmax attention with bounded logits, and its gradients. Oracle: `reference.py`.

No running maximum: queries and keys of norm sqrt(H) at most, as the gain-free norms make them, keep
every logit within sqrt(H), and the sum of exponentials far inside float32. No atomics: every
result is summed by one program in a fixed order.
Shape letters: B sequences, T positions, N heads, H head width; blocks of M queries and N keys.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.triton_numeric import dot, loop_bound, nearest, widen


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the largest head width that they serve.
FORWARD = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2)}
BACKWARD_QUERY = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 2)}
BACKWARD_KEY = {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 2)}

_LOG2_E = math.log2(math.e)


def supports(query_BTNH: Tensor) -> bool:
    """Whether the kernels serve this dtype and head width."""
    H = query_BTNH.shape[-1]
    return query_BTNH.dtype == torch.bfloat16 and H in (16, 32, 64, 128)


def attention_forward(
    query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H], contiguous, and log2 of the sums of exponentials, float32 [B, N, T]."""
    B, T, N, H = query_BTNH.shape
    out_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    log2_sum_BNT = torch.empty(B, N, T, dtype=torch.float32, device=query_BTNH.device)
    tile = _choose(FORWARD, H)
    attention_forward_kernel[(triton.cdiv(T, tile.block_m), B * N)](
        query_BTNH,
        key_BTNH,
        value_BTNH,
        out_BTNH,
        log2_sum_BNT,
        T,
        N,
        *_strides(query_BTNH, key_BTNH, value_BTNH),
        **_constants(H, tile),
    )
    return out_BTNH, log2_sum_BNT


def attention_backward_query(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    out_BTNH: Tensor,
    log2_sum_BNT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the query, contiguous [B, T, N, H], and the product of each query's output and
    its gradient, float32 [B, N, T], which the other gradients need."""
    B, T, N, H = query_BTNH.shape
    grad_query_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    delta_BNT = torch.empty_like(log2_sum_BNT)
    tile = _choose(BACKWARD_QUERY, H)
    attention_backward_query_kernel[(triton.cdiv(T, tile.block_m), B * N)](
        query_BTNH,
        key_BTNH,
        value_BTNH,
        grad_BTNH,
        out_BTNH,
        log2_sum_BNT,
        delta_BNT,
        grad_query_BTNH,
        T,
        N,
        *_strides(query_BTNH, key_BTNH, value_BTNH, grad_BTNH),
        **_constants(H, tile),
    )
    return grad_query_BTNH, delta_BNT


def attention_backward_key(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    log2_sum_BNT: Tensor,
    delta_BNT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, contiguous [B, T, N, H]."""
    B, T, N, H = query_BTNH.shape
    grad_key_BTNH, grad_value_BTNH = (
        torch.empty(B, T, N, H, dtype=x.dtype, device=x.device) for x in (key_BTNH, value_BTNH)
    )
    tile = _choose(BACKWARD_KEY, H)
    attention_backward_key_kernel[(triton.cdiv(T, tile.block_n), B * N)](
        query_BTNH,
        key_BTNH,
        value_BTNH,
        grad_BTNH,
        log2_sum_BNT,
        delta_BNT,
        grad_key_BTNH,
        grad_value_BTNH,
        T,
        N,
        *_strides(query_BTNH, key_BTNH, value_BTNH, grad_BTNH),
        **_constants(H, tile),
    )
    return grad_key_BTNH, grad_value_BTNH


def _choose(tiles: dict[int, Tile], H: int) -> Tile:
    return tiles[min(width for width in tiles if width >= H)]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(H: int, tile: Tile) -> dict[str, float]:
    return {
        "LOGIT_SCALE": 1 / math.sqrt(H),
        "LOG2_SCALE": _LOG2_E / math.sqrt(H),
        "H": H,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    log2_sum_ptr,
    T,
    N,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_M queries of one head; those with most keys start first."""
    b, n = tl.program_id(1).to(tl.int64) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    key_ptr += b * stride_kb + n * stride_kn
    value_ptr += b * stride_vb + n * stride_vn
    query = _rows(
        query_ptr + b * stride_qb + n * stride_qn, first_m, T, stride_qt, H, BLOCK_M, True
    )
    out = tl.zeros((BLOCK_M, H), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    border = first_m // BLOCK_N * BLOCK_N
    out, total = _attend_to_keys(
        out, total, query, m, key_ptr, value_ptr, stride_kt, stride_vt,
        0, border, T, LOG2_SCALE, H, BLOCK_N, False,
    )  # fmt: skip
    out, total = _attend_to_keys(
        out, total, query, m, key_ptr, value_ptr, stride_kt, stride_vt,
        border, tl.minimum(first_m + BLOCK_M, T), T, LOG2_SCALE, H, BLOCK_N, True,
    )  # fmt: skip
    tl.store(log2_sum_ptr + tl.program_id(1).to(tl.int64) * T + m, tl.log2(total), mask=m < T)
    out_ptr += (b * T * N + n) * H
    _store_rows(out_ptr, first_m, T, N * H, out / total[:, None], H, BLOCK_M)


@triton.jit
def _attend_to_keys(
    out,
    total,
    query,
    m,
    key_ptr,
    value_ptr,
    stride_kt,
    stride_vt,
    first,
    last,
    T,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys from `first` to `last`; all queries see all of them, unless MASKED."""
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = _rows(key_ptr, first_n, T, stride_kt, H, BLOCK_N, MASKED)
        weight = tl.exp2(dot(query, tl.trans(key)) * LOG2_SCALE)
        if MASKED:
            key_n = first_n + tl.arange(0, BLOCK_N)
            weight = tl.where(key_n[None, :] <= m[:, None], weight, 0.0)
        total += tl.sum(weight, 1)
        value = _rows(value_ptr, first_n, T, stride_vt, H, BLOCK_N, MASKED)
        out = dot(nearest(weight, value.dtype), value, out)
    return out, total


@triton.jit
def attention_backward_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    out_ptr,
    log2_sum_ptr,
    delta_ptr,
    grad_query_ptr,
    T,
    N,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    stride_gb,
    stride_gt,
    stride_gn,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of BLOCK_M queries of one head, and their products of output and gradient."""
    b, n = tl.program_id(1).to(tl.int64) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    key_ptr += b * stride_kb + n * stride_kn
    value_ptr += b * stride_vb + n * stride_vn
    query = _rows(
        query_ptr + b * stride_qb + n * stride_qn, first_m, T, stride_qt, H, BLOCK_M, True
    )
    grad = _rows(grad_ptr + b * stride_gb + n * stride_gn, first_m, T, stride_gt, H, BLOCK_M, True)
    head = (b * T * N + n) * H
    out = _rows(out_ptr + head, first_m, T, N * H, H, BLOCK_M, True)
    delta = tl.sum(widen(grad) * widen(out), 1)
    row = tl.program_id(1).to(tl.int64) * T + m
    tl.store(delta_ptr + row, delta, mask=m < T)
    log2_sum = tl.load(log2_sum_ptr + row, mask=m < T, other=0.0)
    grad_query = tl.zeros((BLOCK_M, H), tl.float32)
    border = first_m // BLOCK_N * BLOCK_N
    grad_query = _query_gradient(
        grad_query, query, grad, log2_sum, delta, m, key_ptr, value_ptr, stride_kt, stride_vt,
        0, border, T, LOG2_SCALE, H, BLOCK_N, False,
    )  # fmt: skip
    grad_query = _query_gradient(
        grad_query, query, grad, log2_sum, delta, m, key_ptr, value_ptr, stride_kt, stride_vt,
        border, tl.minimum(first_m + BLOCK_M, T), T, LOG2_SCALE, H, BLOCK_N, True,
    )  # fmt: skip
    _store_rows(grad_query_ptr + head, first_m, T, N * H, grad_query * LOGIT_SCALE, H, BLOCK_M)


@triton.jit
def _query_gradient(
    grad_query,
    query,
    grad,
    log2_sum,
    delta,
    m,
    key_ptr,
    value_ptr,
    stride_kt,
    stride_vt,
    first,
    last,
    T,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = _rows(key_ptr, first_n, T, stride_kt, H, BLOCK_N, MASKED)
        value = _rows(value_ptr, first_n, T, stride_vt, H, BLOCK_N, MASKED)
        scores = dot(query, tl.trans(key))
        grad_weight = dot(grad, tl.trans(value))
        weight = tl.exp2(scores * LOG2_SCALE - log2_sum[:, None])
        if MASKED:
            key_n = first_n + tl.arange(0, BLOCK_N)
            weight = tl.where(key_n[None, :] <= m[:, None], weight, 0.0)
        grad_scores = weight * (grad_weight - delta[:, None])
        grad_query = dot(nearest(grad_scores, key.dtype), key, grad_query)
    return grad_query


@triton.jit
def attention_backward_key_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    log2_sum_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    T,
    N,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    stride_gb,
    stride_gt,
    stride_gn,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one head; those with most queries start first."""
    b, n = tl.program_id(1).to(tl.int64) // N, tl.program_id(1) % N
    first_n = tl.program_id(0) * BLOCK_N
    key_n = first_n + tl.arange(0, BLOCK_N)
    key = _rows(key_ptr + b * stride_kb + n * stride_kn, first_n, T, stride_kt, H, BLOCK_N, True)
    value = _rows(
        value_ptr + b * stride_vb + n * stride_vn, first_n, T, stride_vt, H, BLOCK_N, True
    )
    query_ptr += b * stride_qb + n * stride_qn
    grad_ptr += b * stride_gb + n * stride_gn
    log2_sum_ptr += tl.program_id(1).to(tl.int64) * T
    delta_ptr += tl.program_id(1).to(tl.int64) * T
    grad_key = tl.zeros((BLOCK_N, H), tl.float32)
    grad_value = tl.zeros((BLOCK_N, H), tl.float32)
    # Queries on the border see some of the keys; those of whole blocks after it see them all; the
    # last ones may reach over the end.
    start = first_n // BLOCK_M * BLOCK_M
    border = tl.minimum(
        tl.cdiv(first_n + BLOCK_N, BLOCK_M) * BLOCK_M, tl.cdiv(T, BLOCK_M) * BLOCK_M
    )
    whole = tl.maximum(border, T // BLOCK_M * BLOCK_M)
    grad_key, grad_value = _key_gradients(
        grad_key, grad_value, key, value, key_n, query_ptr, grad_ptr, log2_sum_ptr, delta_ptr,
        stride_qt, stride_gt, start, border, T, LOG2_SCALE, H, BLOCK_M, True,
    )  # fmt: skip
    grad_key, grad_value = _key_gradients(
        grad_key, grad_value, key, value, key_n, query_ptr, grad_ptr, log2_sum_ptr, delta_ptr,
        stride_qt, stride_gt, border, whole, T, LOG2_SCALE, H, BLOCK_M, False,
    )  # fmt: skip
    grad_key, grad_value = _key_gradients(
        grad_key, grad_value, key, value, key_n, query_ptr, grad_ptr, log2_sum_ptr, delta_ptr,
        stride_qt, stride_gt, whole, T, T, LOG2_SCALE, H, BLOCK_M, True,
    )  # fmt: skip
    head = (b * T * N + n) * H
    _store_rows(grad_key_ptr + head, first_n, T, N * H, grad_key * LOGIT_SCALE, H, BLOCK_N)
    _store_rows(grad_value_ptr + head, first_n, T, N * H, grad_value, H, BLOCK_N)


@triton.jit
def _key_gradients(
    grad_key,
    grad_value,
    key,
    value,
    key_n,
    query_ptr,
    grad_ptr,
    log2_sum_ptr,
    delta_ptr,
    stride_qt,
    stride_gt,
    first,
    last,
    T,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores and weights are transposed, [BLOCK_N, BLOCK_M]: they are left operands here."""
    for first_m in tl.range(loop_bound(first), loop_bound(last), BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        query = _rows(query_ptr, first_m, T, stride_qt, H, BLOCK_M, MASKED)
        grad = _rows(grad_ptr, first_m, T, stride_gt, H, BLOCK_M, MASKED)
        log2_sum = _numbers(log2_sum_ptr, m, T, MASKED)
        delta = _numbers(delta_ptr, m, T, MASKED)
        scores = dot(key, tl.trans(query))
        grad_weight = dot(value, tl.trans(grad))
        weight = tl.exp2(scores * LOG2_SCALE - log2_sum[None, :])
        if MASKED:
            seen = (key_n[:, None] <= m[None, :]) & (m < T)[None, :]
            weight = tl.where(seen, weight, 0.0)
        grad_value = dot(nearest(weight, grad.dtype), grad, grad_value)
        grad_scores = weight * (grad_weight - delta[None, :])
        grad_key = dot(nearest(grad_scores, query.dtype), query, grad_key)
    return grad_key, grad_value


@triton.jit
def _rows(ptr, first, length, stride, H: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows [BLOCK, H] from `first` on; zeros from `length` on, if MASKED."""
    row = tl.arange(0, BLOCK)[:, None]
    ptrs = ptr + tl.cast(first, tl.int64) * stride + row * stride + tl.arange(0, H)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=row < length - first, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _numbers(ptr, m, T, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + m, mask=m < T, other=0.0)
    else:
        return tl.load(ptr + m)


@triton.jit
def _store_rows(ptr, first, length, stride, x, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)[:, None]
    ptrs = ptr + tl.cast(first, tl.int64) * stride + row * stride + tl.arange(0, H)[None, :]
    tl.store(ptrs, nearest(x, ptr.dtype.element_ty), mask=row < length - first)
