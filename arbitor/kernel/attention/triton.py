"""Softmax attention with bounded logits, and its gradients. Oracle: `reference.py`.

No running maximum: queries and keys of norm sqrt(H) at most, as the gain-free norms make them, keep
every logit within sqrt(H), and the sum of exponentials far inside float32. No atomics: every
result is summed by one program in a fixed order.
Shape letters: B sequences, T positions, N heads, H head width, S = T rounded up to `_PADDING`;
blocks of M queries and N keys.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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

# What is kept of each query is written up to a multiple of this and of every tile's block_m, so
# that blocks of queries are read whole.
_PADDING = 128
# The tensor memory accelerator reads from addresses that are multiples of 16 bytes.
_ALIGNMENT = 8
_LOG2_E = math.log2(math.e)


def supports(query_BTNH: Tensor) -> bool:
    """Whether the kernels serve this dtype and head width."""
    return query_BTNH.dtype == torch.bfloat16 and query_BTNH.shape[-1] in (16, 32, 64, 128)


def readable(x_BTNH: Tensor) -> Tensor:
    """x, or a copy where its strides are none that the kernels read."""
    strides = x_BTNH.stride()
    aligned = all(stride and stride % _ALIGNMENT == 0 for stride in strides[:3])
    if aligned and strides[3] == 1 and x_BTNH.data_ptr() % (2 * _ALIGNMENT) == 0:
        return x_BTNH
    return x_BTNH.clone(memory_format=torch.contiguous_format)


def attention_forward(
    query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H], contiguous, and log2 of the sums of exponentials, float32 [B, N, S]."""
    B, T, N, H = query_BTNH.shape
    S = triton.cdiv(T, _PADDING) * _PADDING
    out_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    log2_sum_BNS = torch.empty(B, N, S, dtype=torch.float32, device=query_BTNH.device)
    tile = _choose(FORWARD, H)
    attention_forward_kernel[(S // tile.block_m, B * N)](
        _tiles(query_BTNH, tile.block_m),
        _tiles(key_BTNH, tile.block_n),
        _tiles(value_BTNH, tile.block_n),
        _tiles(out_BTNH, tile.block_m),
        log2_sum_BNS,
        T,
        N,
        S,
        **_constants(H, tile),
    )
    return out_BTNH, log2_sum_BNS


def attention_backward_query(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    out_BTNH: Tensor,
    log2_sum_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the query, contiguous [B, T, N, H], and the product of each query's output and
    its gradient, float32 [B, N, S], which the other gradients need."""
    B, T, N, H = query_BTNH.shape
    S = log2_sum_BNS.shape[2]
    grad_query_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    delta_BNS = torch.empty_like(log2_sum_BNS)
    tile = _choose(BACKWARD_QUERY, H)
    attention_backward_query_kernel[(S // tile.block_m, B * N)](
        _tiles(query_BTNH, tile.block_m),
        _tiles(key_BTNH, tile.block_n),
        _tiles(value_BTNH, tile.block_n),
        _tiles(grad_BTNH, tile.block_m),
        _tiles(out_BTNH, tile.block_m),
        _tiles(grad_query_BTNH, tile.block_m),
        log2_sum_BNS,
        delta_BNS,
        T,
        N,
        S,
        **_constants(H, tile),
    )
    return grad_query_BTNH, delta_BNS


def attention_backward_key(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    log2_sum_BNS: Tensor,
    delta_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, contiguous [B, T, N, H]."""
    B, T, N, H = query_BTNH.shape
    grad_key_BTNH, grad_value_BTNH = (
        torch.empty(B, T, N, H, dtype=x.dtype, device=x.device) for x in (key_BTNH, value_BTNH)
    )
    tile = _choose(BACKWARD_KEY, H)
    attention_backward_key_kernel[(triton.cdiv(T, tile.block_n), B * N)](
        _tiles(query_BTNH, tile.block_m),
        _tiles(key_BTNH, tile.block_n),
        _tiles(value_BTNH, tile.block_n),
        _tiles(grad_BTNH, tile.block_m),
        _tiles(grad_key_BTNH, tile.block_n),
        _tiles(grad_value_BTNH, tile.block_n),
        log2_sum_BNS,
        delta_BNS,
        T,
        N,
        log2_sum_BNS.shape[2],
        **_constants(H, tile),
    )
    return grad_key_BTNH, grad_value_BTNH


def _choose(tiles: dict[int, Tile], H: int) -> Tile:
    return tiles[min(width for width in tiles if width >= H)]


def _tiles(x_BTNH: Tensor, block: int) -> TensorDescriptor:
    """Blocks of positions of one head: read as zeros and not written beyond the last position."""
    return TensorDescriptor.from_tensor(x_BTNH, [1, block, 1, x_BTNH.shape[3]])


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
    query_desc,
    key_desc,
    value_desc,
    out_desc,
    log2_sum_ptr,
    T,
    N,
    S,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_M queries of one head; those with most keys start first."""
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    query = _load(query_desc, b, first_m, n, H, BLOCK_M)
    out = tl.zeros((BLOCK_M, H), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    border = first_m // BLOCK_N * BLOCK_N
    out, total = _attend_to_keys(
        out, total, query, m, b, n, key_desc, value_desc,
        0, border, LOG2_SCALE, H, BLOCK_N, False,
    )  # fmt: skip
    out, total = _attend_to_keys(
        out, total, query, m, b, n, key_desc, value_desc,
        border, first_m + BLOCK_M, LOG2_SCALE, H, BLOCK_N, True,
    )  # fmt: skip
    tl.store(log2_sum_ptr + tl.program_id(1).to(tl.int64) * S + m, tl.log2(total))
    _store(out_desc, b, first_m, n, out / total[:, None], H, BLOCK_M)


@triton.jit
def _attend_to_keys(
    out,
    total,
    query,
    m,
    b,
    n,
    key_desc,
    value_desc,
    first,
    last,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys from `first` to `last`; all queries see all of them, unless MASKED."""
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = _load(key_desc, b, first_n, n, H, BLOCK_N)
        weight = tl.exp2(dot(query, tl.trans(key)) * LOG2_SCALE)
        if MASKED:
            key_n = first_n + tl.arange(0, BLOCK_N)
            weight = tl.where(key_n[None, :] <= m[:, None], weight, 0.0)
        total += tl.sum(weight, 1)
        value = _load(value_desc, b, first_n, n, H, BLOCK_N)
        out = dot(nearest(weight, value.dtype), value, out)
    return out, total


@triton.jit
def attention_backward_query_kernel(
    query_desc,
    key_desc,
    value_desc,
    grad_desc,
    out_desc,
    grad_query_desc,
    log2_sum_ptr,
    delta_ptr,
    T,
    N,
    S,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of BLOCK_M queries of one head, and their products of output and gradient."""
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    query = _load(query_desc, b, first_m, n, H, BLOCK_M)
    grad = _load(grad_desc, b, first_m, n, H, BLOCK_M)
    out = _load(out_desc, b, first_m, n, H, BLOCK_M)
    delta = tl.sum(widen(grad) * widen(out), 1)
    row = tl.program_id(1).to(tl.int64) * S + m
    tl.store(delta_ptr + row, delta)
    log2_sum = tl.load(log2_sum_ptr + row)
    grad_query = tl.zeros((BLOCK_M, H), tl.float32)
    border = first_m // BLOCK_N * BLOCK_N
    grad_query = _query_gradient(
        grad_query, query, grad, log2_sum, delta, m, b, n, key_desc, value_desc,
        0, border, LOG2_SCALE, H, BLOCK_N, False,
    )  # fmt: skip
    grad_query = _query_gradient(
        grad_query, query, grad, log2_sum, delta, m, b, n, key_desc, value_desc,
        border, first_m + BLOCK_M, LOG2_SCALE, H, BLOCK_N, True,
    )  # fmt: skip
    _store(grad_query_desc, b, first_m, n, grad_query * LOGIT_SCALE, H, BLOCK_M)


@triton.jit
def _query_gradient(
    grad_query,
    query,
    grad,
    log2_sum,
    delta,
    m,
    b,
    n,
    key_desc,
    value_desc,
    first,
    last,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first_n in tl.range(loop_bound(first), loop_bound(last), BLOCK_N):
        key = _load(key_desc, b, first_n, n, H, BLOCK_N)
        value = _load(value_desc, b, first_n, n, H, BLOCK_N)
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
    query_desc,
    key_desc,
    value_desc,
    grad_desc,
    grad_key_desc,
    grad_value_desc,
    log2_sum_ptr,
    delta_ptr,
    T,
    N,
    S,
    LOGIT_SCALE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one head; those with most queries start first."""
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    first_n = tl.program_id(0) * BLOCK_N
    key_n = first_n + tl.arange(0, BLOCK_N)
    key = _load(key_desc, b, first_n, n, H, BLOCK_N)
    value = _load(value_desc, b, first_n, n, H, BLOCK_N)
    log2_sum_ptr += tl.program_id(1).to(tl.int64) * S
    delta_ptr += tl.program_id(1).to(tl.int64) * S
    grad_key = tl.zeros((BLOCK_N, H), tl.float32)
    grad_value = tl.zeros((BLOCK_N, H), tl.float32)
    # Queries on the border see some of the keys, those after it all.
    border = tl.minimum(tl.cdiv(first_n + BLOCK_N, BLOCK_M) * BLOCK_M, S)
    grad_key, grad_value = _key_gradients(
        grad_key, grad_value, key, value, key_n, b, n, query_desc, grad_desc,
        log2_sum_ptr, delta_ptr, first_n // BLOCK_M * BLOCK_M, border, LOG2_SCALE, H, BLOCK_M, True,
    )  # fmt: skip
    grad_key, grad_value = _key_gradients(
        grad_key, grad_value, key, value, key_n, b, n, query_desc, grad_desc,
        log2_sum_ptr, delta_ptr, border, T, LOG2_SCALE, H, BLOCK_M, False,
    )  # fmt: skip
    _store(grad_key_desc, b, first_n, n, grad_key * LOGIT_SCALE, H, BLOCK_N)
    _store(grad_value_desc, b, first_n, n, grad_value, H, BLOCK_N)


@triton.jit
def _key_gradients(
    grad_key,
    grad_value,
    key,
    value,
    key_n,
    b,
    n,
    query_desc,
    grad_desc,
    log2_sum_ptr,
    delta_ptr,
    first,
    last,
    LOG2_SCALE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores and weights are transposed, [BLOCK_N, BLOCK_M]: they are left operands here."""
    for first_m in tl.range(loop_bound(first), loop_bound(last), BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        query = _load(query_desc, b, first_m, n, H, BLOCK_M)
        grad = _load(grad_desc, b, first_m, n, H, BLOCK_M)
        log2_sum, delta = tl.load(log2_sum_ptr + m), tl.load(delta_ptr + m)
        scores = dot(key, tl.trans(query))
        grad_weight = dot(value, tl.trans(grad))
        weight = tl.exp2(scores * LOG2_SCALE - log2_sum[None, :])
        if MASKED:
            weight = tl.where(key_n[:, None] <= m[None, :], weight, 0.0)
        grad_value = dot(nearest(weight, grad.dtype), grad, grad_value)
        grad_scores = weight * (grad_weight - delta[None, :])
        grad_key = dot(nearest(grad_scores, query.dtype), query, grad_key)
    return grad_key, grad_value


@triton.jit
def _load(desc, b, first, n, H: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [BLOCK, H] of a head from position `first` on."""
    return desc.load([b, first, n, 0]).reshape(BLOCK, H)


@triton.jit
def _store(desc, b, first, n, x, H: tl.constexpr, BLOCK: tl.constexpr):
    desc.store([b, first, n, 0], nearest(x, desc.dtype).reshape(1, BLOCK, 1, H))
