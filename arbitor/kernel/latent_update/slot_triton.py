"""Conversion of a slot's gradient on a GPU: the same integers as `slots.quantize_slot`, its oracle.

To time it, call `quantize_slot_` on one gradient again and again: the sum wraps, the work is equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.latent_update.device_math import hash_word, row_exponent
from arbitor.kernel.latent_update.slots import SlotFormat
from arbitor.kernel.triton_numeric import power_of_two, widen

TILE = {"BLOCK_N": 4, "BLOCK_K": 256, "num_warps": 4}  # 8 weights a thread: memory-bound


def quantize_slot_(
    grad_NK: Tensor,
    row_moment_N: Tensor,
    slot_format: SlotFormat,
    key: Tensor,
    sum_NK: Tensor,
    counters: Tensor,
) -> None:
    """Add one slot's gradient (float32 or bfloat16) as integers to `sum_NK` (of its `sum_dtype`).

    `row_moment_N` int16 gives the exponents, `key` int32 [1] is the slot's stream as a signed word.
    Adds the numbers of non-finite and clipped entries to `counters`, int64 [2]; nothing waits for
    the device.
    """
    num_rows, num_cols = grad_NK.shape
    assert grad_NK.dtype in (torch.float32, torch.bfloat16)
    assert sum_NK.shape == grad_NK.shape and sum_NK.dtype == slot_format.sum_dtype
    assert grad_NK.is_contiguous() and sum_NK.is_contiguous()
    grid = (triton.cdiv(num_rows, TILE["BLOCK_N"]), triton.cdiv(num_cols, TILE["BLOCK_K"]))
    quantize_slot_kernel[grid](
        grad_NK,
        row_moment_N,
        sum_NK,
        counters,
        key,
        num_rows,
        num_cols,
        R0=slot_format.r0,
        LIMIT=float(slot_format.qmax << 16),
        STOCHASTIC=slot_format.stochastic,
        **TILE,
    )


@triton.jit(do_not_specialize=["N"])
def quantize_slot_kernel(
    grad_ptr,
    row_moment_ptr,
    sum_ptr,
    counters_ptr,
    key_ptr,
    N,
    K,
    R0: tl.constexpr,
    LIMIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scale by a power of two, clamp, truncate, round in integers: no addition of floats."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < N)[:, None] & (col < K)[None, :]
    offset = row.to(tl.int64)[:, None] * K + col[None, :]
    grad = widen(tl.load(grad_ptr + offset, inside, 0.0))
    exponent = row_exponent(tl.load(row_moment_ptr + row, row < N, 0), R0)
    scale = power_of_two(exponent + 16)
    finite = tl.abs(grad) < float("inf")  # false for NaN
    scaled = tl.where(finite, grad, 0.0) * scale[:, None]
    clipped = tl.abs(scaled) > LIMIT
    q16 = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT).to(tl.int32)
    if STOCHASTIC:
        word = hash_word(((row * K)[:, None] + col[None, :]) ^ tl.load(key_ptr))
        q16 += (word & 0xFFFF).to(tl.int32)
    else:
        q16 += 1 << 15
    total = tl.load(sum_ptr + offset, inside, 0) + (q16 >> 16)
    tl.store(sum_ptr + offset, total.to(sum_ptr.dtype.element_ty), inside)
    counts = tl.sum(tl.sum((~finite).to(tl.int32) + (clipped.to(tl.int32) << 16), 1), 0)
    if counts > 0:  # rare, and many atomics on one address are slow
        tl.atomic_add(counters_ptr, (counts & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + 1, (counts >> 16).to(tl.int64), sem="relaxed")
