"""Heads of queries, keys and values, and their gradients. Oracle: `reference.py`.

Shape letters: B sequences, T positions, M = B * T, N heads, H head width = C content width + 2 P,
P rotated pairs; a row is one head of one position, R = M * N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.attention_heads.reference import EPSILON, ROTATION_UNIT
from arbitor.kernel.triton_numeric import nearest, widen

# Rows of a forward program, positions of a backward program, and their warps.
_FORWARD_BLOCKS = (64, 4)
_BACKWARD_BLOCKS = (16, 2)
# Attention loads 16 bytes at a time: where a head's value would start elsewhere, it is copied.
_ALIGNMENT = 8


def heads_forward(
    query_BTX: Tensor | None,
    expanded_BTX: Tensor | None,
    rotary_key_BTW: Tensor | None,
    rotation_2TP: Tensor,
    num_heads: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Query, key, value [B, T, N, H] and the float32 inverse rms [4, R] of the normalized parts:
    query content, query rotary, key content, rotary key (the same for all heads of a position).

    Without a query or without a key (expanded and rotary) there is none among the results, and
    their inverse rms are not written.
    """
    N, P = num_heads, rotation_2TP.shape[-1]
    some = expanded_BTX if query_BTX is None else query_BTX
    (B, T, X), W, device = some.shape, 2 * P, some.device
    H = (X // N + W) // 2 if query_BTX is None else X // N
    C, R = H - W, B * T * N
    query_BTNH = key_BTNH = value_BTNH = rotary_key_MW = None
    if query_BTX is not None:
        query_BTX = query_BTX.contiguous()
        query_BTNH = torch.empty(B, T, N, H, dtype=query_BTX.dtype, device=device)
    if expanded_BTX is not None:
        expanded_BTX, rotary_key_MW = expanded_BTX.contiguous(), _rows(rotary_key_BTW)
        key_BTNH = torch.empty(B, T, N, H, dtype=expanded_BTX.dtype, device=device)
        value_BTNH = expanded_BTX.view(B, T, N, C + H)[..., C:]
        if C % _ALIGNMENT or H % _ALIGNMENT:
            value_BTNH = value_BTNH.contiguous()
    inverse_rms_4R = torch.empty(4, R, dtype=torch.float32, device=device)
    block_r, num_warps = _FORWARD_BLOCKS
    attention_heads_forward_kernel[(triton.cdiv(R, block_r),)](
        query_BTX,
        expanded_BTX,
        rotary_key_MW,
        *rotation_2TP,
        query_BTNH,
        key_BTNH,
        inverse_rms_4R,
        R,
        T,
        0 if rotary_key_MW is None else rotary_key_MW.stride(0),
        EPSILON,
        HAS_QUERY=query_BTX is not None,
        HAS_KEY=expanded_BTX is not None,
        **_constants(N, C, P),
        BLOCK_R=block_r,
        num_warps=num_warps,
    )
    return query_BTNH, key_BTNH, value_BTNH, inverse_rms_4R


def heads_backward(
    grad_query_BTNH: Tensor | None,
    grad_key_BTNH: Tensor,
    grad_value_BTNH: Tensor,
    query_BTNH: Tensor | None,
    key_BTNH: Tensor,
    rotation_2TP: Tensor,
    inverse_rms_4R: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of expanded query [B, T, N * H], latent [B, T, N * (C + H)], rotary key [B, T, W].

    The rotary key's is summed over the heads in their order. No gradient of a query without one.
    """
    B, T, N, H = key_BTNH.shape
    P = rotation_2TP.shape[-1]
    C, M = H - 2 * P, B * T
    device, out_query, has_query = key_BTNH.device, None, query_BTNH is not None
    if has_query:
        out_query = torch.empty(B, T, N * H, dtype=query_BTNH.dtype, device=device)
    else:
        grad_query_BTNH = grad_key_BTNH
    grads = [_last_contiguous(g) for g in (grad_query_BTNH, grad_key_BTNH, grad_value_BTNH)]
    out_expanded = torch.empty(B, T, N * (C + H), dtype=key_BTNH.dtype, device=device)
    out_rotary_key = torch.empty(B, T, 2 * P, dtype=key_BTNH.dtype, device=device)
    block_m, num_warps = _BACKWARD_BLOCKS
    attention_heads_backward_kernel[(triton.cdiv(M, block_m),)](
        *grads,
        query_BTNH,
        key_BTNH,
        *rotation_2TP,
        inverse_rms_4R,
        out_query,
        out_expanded,
        out_rotary_key,
        M,
        T,
        *(stride for grad in grads for stride in grad.stride()[:3]),
        HAS_QUERY=has_query,
        **_constants(N, C, P),
        BLOCK_H=triton.next_power_of_2(H),
        BLOCK_M=block_m,
        num_warps=num_warps,
    )
    return out_query, out_expanded, out_rotary_key


def _constants(N: int, C: int, P: int) -> dict[str, int]:
    blocks = {"BLOCK_C": triton.next_power_of_2(C), "BLOCK_P": triton.next_power_of_2(P)}
    return {"N": N, "C": C, "P": P, "UNIT": ROTATION_UNIT} | blocks


def _rows(x_BTW: Tensor) -> Tensor:
    """[M, W] with the last dimension contiguous; a view where B and T lie evenly."""
    return _last_contiguous(x_BTW).flatten(0, 1)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def attention_heads_forward_kernel(
    query_ptr,
    expanded_ptr,
    rotary_key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    inverse_rms_ptr,
    R,
    T,
    stride_km,
    epsilon,
    HAS_QUERY: tl.constexpr,
    HAS_KEY: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    H: tl.constexpr = C + 2 * P
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = r < R
    m = r // N
    row, position = r.to(tl.int64)[:, None], m.to(tl.int64)[:, None]
    c, p = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_P)[None, :]
    in_content, in_pairs = in_r[:, None] & (c < C), in_r[:, None] & (p < P)
    angle = (m % T)[:, None] * P + p
    cos = tl.load(cos_ptr + angle, mask=in_pairs, other=0).to(tl.float32) * UNIT
    sin = tl.load(sin_ptr + angle, mask=in_pairs, other=0).to(tl.float32) * UNIT

    if HAS_QUERY:
        query, out = query_ptr + row * H, query_out_ptr + row * H
        content = _normalize(query + c, out + c, in_content, C, epsilon)
        rotary = _normalize_and_rotate(query + C + p, out + C + p, in_pairs, cos, sin, P, epsilon)
        tl.store(inverse_rms_ptr + r, content, mask=in_r)
        tl.store(inverse_rms_ptr + R + r, rotary, mask=in_r)

    if HAS_KEY:
        expanded, out = expanded_ptr + row * (C + H), key_out_ptr + row * H
        content = _normalize(expanded + c, out + c, in_content, C, epsilon)
        key = rotary_key_ptr + position * stride_km
        rotary = _normalize_and_rotate(key + p, out + C + p, in_pairs, cos, sin, P, epsilon)
        tl.store(inverse_rms_ptr + 2 * R + r, content, mask=in_r)
        tl.store(inverse_rms_ptr + 3 * R + r, rotary, mask=in_r)


@triton.jit
def _normalize(in_ptrs, out_ptrs, mask, C: tl.constexpr, epsilon):
    x = widen(tl.load(in_ptrs, mask=mask, other=0.0))
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / C + epsilon)
    tl.store(out_ptrs, nearest(x * inverse_rms[:, None], out_ptrs.dtype.element_ty), mask=mask)
    return inverse_rms


@triton.jit
def _normalize_and_rotate(in_ptrs, out_ptrs, mask, cos, sin, P: tl.constexpr, epsilon):
    first = widen(tl.load(in_ptrs, mask=mask, other=0.0))
    second = widen(tl.load(in_ptrs + P, mask=mask, other=0.0))
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * P)
    inverse_rms = tl.rsqrt(mean + epsilon)
    first, second = first * inverse_rms[:, None], second * inverse_rms[:, None]
    _store_rotated(out_ptrs, mask, first, second, cos, sin, P)
    return inverse_rms


@triton.jit
def _store_rotated(out_ptrs, mask, first, second, cos, sin, P: tl.constexpr):
    dtype: tl.constexpr = out_ptrs.dtype.element_ty
    tl.store(out_ptrs, nearest(first * cos - second * sin, dtype), mask=mask)
    tl.store(out_ptrs + P, nearest(first * sin + second * cos, dtype), mask=mask)


@triton.jit
def attention_heads_backward_kernel(
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    inverse_rms_ptr,
    out_query_ptr,
    out_expanded_ptr,
    out_rotary_key_ptr,
    M,
    T,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    HAS_QUERY: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program has BLOCK_M positions and goes through their heads."""
    H: tl.constexpr = C + 2 * P
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    b, t = (m // T).to(tl.int64)[:, None], (m % T).to(tl.int64)[:, None]
    c, p, h = (
        tl.arange(0, BLOCK_C)[None, :],
        tl.arange(0, BLOCK_P)[None, :],
        tl.arange(0, BLOCK_H)[None, :],
    )
    in_content, in_pairs = in_m[:, None] & (c < C), in_m[:, None] & (p < P)
    in_value = in_m[:, None] & (h < H)
    cos = tl.load(cos_ptr + t * P + p, mask=in_pairs, other=0).to(tl.float32) * UNIT
    sin = tl.load(sin_ptr + t * P + p, mask=in_pairs, other=0).to(tl.float32) * UNIT
    grad_query = grad_query_ptr + b * stride_qb + t * stride_qt
    grad_key = grad_key_ptr + b * stride_kb + t * stride_kt
    grad_value = grad_value_ptr + b * stride_vb + t * stride_vt
    R = M * N

    key_first = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    key_second = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for n in range(N):
        r = m.to(tl.int64) * N + n
        row = r[:, None]
        if HAS_QUERY:
            content_rms = tl.load(inverse_rms_ptr + r, mask=in_m, other=0.0)
            rotary_rms = tl.load(inverse_rms_ptr + R + r, mask=in_m, other=0.0)
            query, out = query_ptr + row * H, out_query_ptr + row * H
            _content_gradient(grad_query + c, query + c, out + c, in_content, content_rms, C)
            first = widen(tl.load(grad_query + C + p, mask=in_pairs, other=0.0))
            second = widen(tl.load(grad_query + C + P + p, mask=in_pairs, other=0.0))
            _rotary_gradient(
                first, second, query + C + p, out + C + p, in_pairs, rotary_rms, cos, sin, P
            )

        key_rms = tl.load(inverse_rms_ptr + 2 * R + r, mask=in_m, other=0.0)
        out = out_expanded_ptr + row * (C + H)
        _content_gradient(grad_key + c, key_ptr + row * H + c, out + c, in_content, key_rms, C)
        value = tl.load(grad_value + h, mask=in_value, other=0.0)
        tl.store(out + C + h, value, mask=in_value)
        key_first += widen(tl.load(grad_key + C + p, mask=in_pairs, other=0.0))
        key_second += widen(tl.load(grad_key + C + P + p, mask=in_pairs, other=0.0))

        if HAS_QUERY:
            grad_query += stride_qn
        grad_key += stride_kn
        grad_value += stride_vn

    position = m.to(tl.int64)
    rotary_rms = tl.load(inverse_rms_ptr + 3 * R + position * N, mask=in_m, other=0.0)
    key = key_ptr + position[:, None] * (N * H) + C + p
    out = out_rotary_key_ptr + position[:, None] * (2 * P) + p
    _rotary_gradient(key_first, key_second, key, out, in_pairs, rotary_rms, cos, sin, P)


@triton.jit
def _content_gradient(grad_ptrs, x_ptrs, out_ptrs, mask, inverse_rms, C: tl.constexpr):
    """(g - x_hat * mean(g * x_hat)) / rms, x_hat the normalized vector."""
    grad = widen(tl.load(grad_ptrs, mask=mask, other=0.0))
    x = widen(tl.load(x_ptrs, mask=mask, other=0.0))
    projection = tl.sum(grad * x, 1) / C
    out = (grad - x * projection[:, None]) * inverse_rms[:, None]
    tl.store(out_ptrs, nearest(out, out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_gradient(
    grad_first, grad_second, x_ptrs, out_ptrs, mask, inverse_rms, cos, sin, P: tl.constexpr
):
    """The same among rotated vectors, then turned back: rotations keep products and lengths."""
    first = widen(tl.load(x_ptrs, mask=mask, other=0.0))
    second = widen(tl.load(x_ptrs + P, mask=mask, other=0.0))
    products = tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1)
    projection = (products / (2 * P))[:, None]
    first = (grad_first - first * projection) * inverse_rms[:, None]
    second = (grad_second - second * projection) * inverse_rms[:, None]
    _store_rotated(out_ptrs, mask, first, second, cos, -sin, P)
