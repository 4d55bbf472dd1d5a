"""Correlation of a slot's gradient with the trits, on a GPU: the integers of `reference.py`.

One program owns its groups, so there are no atomics. To time it, call `accumulate_correlation` on
one gradient again and again. README.md has the layout and the roofline.

Shape letters: N rows (outputs), K columns (inputs), G groups = ceil(K / group_size).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.correlation.reference import num_groups
from arbitor.kernel.triton_numeric import widen

BLOCK_WEIGHTS = 4096  # lanes of a program
MAX_ROW_LANES = 1024
NUM_WARPS = 4


def accumulate_correlation(
    grad_NK: Tensor, trits_NK: Tensor, corr_step_NG: Tensor, group_size: int
) -> None:
    """`reference.accumulate_correlation` on a GPU; contiguous tensors, groups of up to 4096."""
    num_rows, num_cols = grad_NK.shape
    groups = num_groups(num_cols, group_size)
    assert grad_NK.dtype in (torch.float32, torch.bfloat16) and trits_NK.dtype == torch.int8
    assert corr_step_NG.dtype == torch.int32 and corr_step_NG.shape == (num_rows, groups)
    assert grad_NK.is_contiguous() and trits_NK.is_contiguous() and corr_step_NG.is_contiguous()
    lanes = triton.next_power_of_2(group_size)
    assert lanes <= BLOCK_WEIGHTS
    block_groups = min(max(1, MAX_ROW_LANES // lanes), triton.next_power_of_2(groups))
    block_rows = min(BLOCK_WEIGHTS // (lanes * block_groups), triton.next_power_of_2(num_rows))
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(groups, block_groups))
    accumulate_correlation_kernel[grid](
        grad_NK,
        trits_NK,
        corr_step_NG,
        num_rows,
        num_cols,
        groups,
        GROUP_SIZE=group_size,
        BLOCK_N=block_rows,
        BLOCK_G=block_groups,
        LANES=lanes,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["N", "G"])
def accumulate_correlation_kernel(
    grad_ptr,
    trits_ptr,
    corr_step_ptr,
    N,
    K,
    G,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LANES: tl.constexpr,
):
    """Groups are padded to a power of two lanes."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    lane = tl.arange(0, LANES)
    col = (group * GROUP_SIZE)[:, None] + lane[None, :]
    in_cols = col < K
    if LANES > GROUP_SIZE:
        in_cols = in_cols & (lane < GROUP_SIZE)[None, :]
    inside = (row < N)[:, None, None] & in_cols[None, :, :]
    offset = (row.to(tl.int64) * K)[:, None, None] + col[None, :, :]
    grad = widen(tl.load(grad_ptr + offset, inside, 0.0))
    trit = tl.load(trits_ptr + offset, inside, 0).to(tl.int32)
    # Comparisons are false for NaN.
    product = tl.where(grad > 0, trit, 0) - tl.where(grad < 0, trit, 0)
    owned = (row < N)[:, None] & (group < G)[None, :]
    sums_ptr = corr_step_ptr + (row.to(tl.int64) * G)[:, None] + group[None, :]
    total = tl.load(sums_ptr, owned, 0) + tl.sum(product, 2)
    tl.store(sums_ptr, total, owned)
