"""The latent update on a GPU: the same integers as `reference.update`, its oracle, bit for bit.

Three kernels an update. `prepare` turns the moments of before into factors of rows and columns and
clears the sums, `update` passes once over the matrix, `finish` moves the moments and the scales.
Sums over rows and columns are 64-bit integer atomics, so the order of programs does not matter.
Nothing waits for the device. To time an update, call `update_` alone: it leaves the gradient sum
as it was.

Shape letters: N rows (outputs), K columns (inputs), G momentum groups = ceil(K / 64). Formula,
memory layout and roofline: README.md.
"""

import torch
import triton
from torch import Tensor

from arbitor.kernel.latent_update.device_math import device_tables
from arbitor.kernel.latent_update.fixed_point import log2_fraction
from arbitor.kernel.latent_update.moments import MOMENTUM_WEIGHT, NUM_WORDS, column_shift_of
from arbitor.kernel.latent_update.moments_triton import finish_kernel, prepare_kernel
from arbitor.kernel.latent_update.slot_triton import quantize_slot_
from arbitor.kernel.latent_update.slots import SlotFormat, fraction_bits
from arbitor.kernel.latent_update.state import GROUP, TernaryState
from arbitor.kernel.latent_update.update_triton import update_kernel
from arbitor.kernel.state_format import INT8, StateFormat

__all__ = ["quantize_slot_", "update_"]

# One warp owns 8 rows of one group, 16 weights a thread, and walks down STEPS such tiles: sums
# over columns and their factors stay in registers. 128 of these let 16 warps share a processor.
TILE = {"BLOCK_N": 8, "num_warps": 1}
REGISTERS = {True: 128, False: 255}  # where 64 divides K, and elsewhere
STEPS = 4
BLOCK_PREPARE = 1024
BLOCK_FINISH = 128


def update_(
    state: TernaryState,
    grad_sum_NK: Tensor,
    slot_format: SlotFormat,
    words: Tensor,
    counters: Tensor | None = None,
    state_format: StateFormat = INT8,
) -> None:
    """`reference.update` of a state on a GPU, in place; contiguous tensors.

    `words` int32 on the device are the step's (`update_words`): nothing else differs from step to
    step, so the launches can be recorded. Adds to `counters`, int64 [3], the numbers of flips,
    zeros and saturated latents; counting them takes a quarter more instructions, None leaves it
    away.
    """
    num_rows, num_cols = state.latent.shape
    num_groups = -(-num_cols // GROUP)
    assert grad_sum_NK.shape == state.latent.shape and grad_sum_NK.dtype == slot_format.sum_dtype
    assert grad_sum_NK.is_contiguous() and state.latent.is_contiguous()
    assert state.momentum.is_contiguous() and num_rows * num_cols <= 1 << 32
    assert words.dtype == torch.int32 and words.shape == (NUM_WORDS,)
    device = state.latent.device
    pow2_q11, pow2_q16, log2_q16 = device_tables(device)
    num_blocks = triton.cdiv(max(num_rows, num_cols + 1), BLOCK_PREPARE)  # col_sums has K + 1
    rows = torch.empty(3, num_rows, dtype=torch.int32, device=device)
    cols = torch.empty(num_cols, dtype=torch.float32, device=device)
    lowest = torch.empty(num_blocks, dtype=torch.int32, device=device)
    row_sums = torch.empty(2, num_rows, dtype=torch.int64, device=device)
    col_sums = torch.empty(num_cols + 1, dtype=torch.int64, device=device)
    prepare_kernel[(num_blocks,)](
        state.row_moment,
        state.col_moment,
        state.tensor_moment,
        pow2_q11,
        rows,
        cols,
        lowest,
        row_sums,
        col_sums,
        words,
        num_rows,
        num_cols,
        R0=slot_format.r0,
        FRACTION=fraction_bits(slot_format),
        BLOCK=BLOCK_PREPARE,
    )
    column_shift = column_shift_of(num_rows, num_cols, slot_format)
    row_tiles = triton.cdiv(num_rows, TILE["BLOCK_N"])
    steps = min(STEPS, triton.next_power_of_2(row_tiles))
    grid = (num_groups, triton.cdiv(row_tiles, steps))
    update_kernel[grid](
        grad_sum_NK,
        state.latent,
        state.momentum,
        state.momentum_exponent,
        rows,
        cols,
        lowest,
        row_sums,
        col_sums,
        counters,
        words,
        num_rows,
        num_cols,
        num_groups,
        num_blocks,
        column_shift,
        SUM_BITS=slot_format.sum_bits,
        FRACTION=fraction_bits(slot_format),
        ALIGNED=num_cols % GROUP == 0,
        WIDE=column_shift > 30 or slot_format.sum_bits > 15,
        COUNT=counters is not None,
        MOMENTUM_WEIGHT=MOMENTUM_WEIGHT,
        MOMENTUM_BITS=state_format.momentum_bits,
        MOMENTUM_MAX=state_format.largest_momentum,
        LATENT_SHIFT=state_format.latent_shift,
        STEPS=steps,
        BLOCK_BLOCKS=triton.next_power_of_2(num_blocks),
        maxnreg=REGISTERS[num_cols % GROUP == 0],
        **TILE,
    )
    finish_kernel[(triton.cdiv(max(num_rows, num_cols), BLOCK_FINISH),)](
        state.row_moment,
        state.col_moment,
        state.tensor_moment,
        state.scale_moment,
        state.log2_scale,
        state.num_updates,
        pow2_q16,
        log2_q16,
        rows,
        lowest,
        row_sums,
        col_sums,
        counters,
        words,
        num_rows,
        num_cols,
        num_blocks,
        log2_fraction(num_rows),
        log2_fraction(num_cols),
        column_shift,
        FRACTION=fraction_bits(slot_format),
        COUNT=counters is not None,
        BLOCK=BLOCK_FINISH,
        BLOCK_BLOCKS=triton.next_power_of_2(num_blocks),
    )
