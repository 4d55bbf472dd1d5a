"""Gradients of one slot to integers: the only floating-point step of the rule.

Shape letters: N rows, K columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    BLOCK_ELEMENTS,
    EXACT_BITS,
    counter_hash,
    element_index,
    float32_power_of_two,
    low_bits,
)

MAX_SLOTS = 516  # a step's


@dataclass(frozen=True)
class SlotFormat:
    """Integers of the slot gradients of a step. No sum over the slots can overflow `sum_dtype`."""

    slots_per_step: int
    bits: int
    r0: int  # the rms of a row of the *sum* is 2^r0 units
    stochastic: bool

    @property
    def qmax(self) -> int:
        """Largest magnitude of a slot's integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def sum_bits(self) -> int:
        """Number of bits of the largest magnitude of the sum."""
        return (self.slots_per_step * self.qmax).bit_length()

    @property
    def sum_dtype(self) -> torch.dtype:
        """dtype of slot integers and of their sums."""
        return torch.int16 if self.slots_per_step * self.qmax <= 32767 else torch.int32


def slot_format_of(slots_per_step: int) -> SlotFormat:
    """12 bits rounded to nearest up to 16 slots, so that sums fit 16 bits; else 8, stochastic.

    Headroom qmax / 2^r0 over the row's rms: 64x and 16x.
    """
    assert 1 <= slots_per_step <= MAX_SLOTS, "sums of the slots must stay below 2^16"
    if slots_per_step <= 16:
        return SlotFormat(slots_per_step, bits=12, r0=5, stochastic=False)
    return SlotFormat(slots_per_step, bits=8, r0=3, stochastic=True)


def row_exponents(row_moment_N: Tensor, slot_format: SlotFormat) -> Tensor:
    """int32 [N]: a row's gradient times 2^exponent is counted in integers."""
    octaves = (row_moment_N.int() + 128) >> 8
    return (slot_format.r0 - octaves).clamp_(-100, 100)


def quantize_slot(
    grad_NK: Tensor, row_exponent_N: Tensor, slot_format: SlotFormat, key: int
) -> tuple[Tensor, int, int]:
    """Integers of one slot's float32 gradient, and its numbers of non-finite and clipped entries.

    q = (trunc(clamp(g * 2^exponent, +-qmax) * 2^16) + r) >> 16 with r = 2^15, or for stochastic
    formats the low 16 bits of the hash under `key` = stream_key(.., STREAM_SLOT + slot).
    Non-finite entries become 0. Returns ([N, K] of `sum_dtype`, count, count). Power-of-two
    products, comparisons and truncation are exact everywhere; no addition that could be fused.
    """
    assert grad_NK.dtype == torch.float32
    limit = float(slot_format.qmax << 16)
    scale_N1 = float32_power_of_two(row_exponent_N + 16).unsqueeze(1)
    integers = torch.empty(grad_NK.shape, dtype=slot_format.sum_dtype, device=grad_NK.device)
    nonfinite = clipped = 0
    for rows in row_blocks(*grad_NK.shape):
        block = slice(rows.start, rows.stop)
        scaled = grad_NK[block] * scale_N1[block]
        low, high = torch.aminmax(scaled)
        if not (low >= -limit and high <= limit):  # NaN fails the comparisons too
            finite = grad_NK[block].isfinite()
            scaled.masked_fill_(~finite, 0.0)
            nonfinite += finite.numel() - int(finite.sum())
            clipped += int((scaled.abs() > limit).sum())
            scaled.clamp_(-limit, limit)
        q16 = scaled.int()
        if slot_format.stochastic:
            num_cols = grad_NK.shape[1]
            index = element_index(rows, num_cols, num_cols, grad_NK.device)
            q16 += low_bits(counter_hash(index, key))
        else:
            q16 += 1 << 15
        torch.bitwise_right_shift(q16, 16, out=q16)
        integers[block] = q16
    return integers, nonfinite, clipped


def quantize_exact(grad: Tensor) -> Tensor:
    """int64 of one slot's float32 gradient in units of 2^-36, for `calibrate`.

    Magnitudes are kept below 2^50, so the sum of 4096 slots fits; non-finite entries become 0.
    """
    finite = torch.where(grad.isfinite(), grad, 0.0)
    return (finite * 2.0**EXACT_BITS).clamp_(-(2.0**50), 2.0**50).long()


def fraction_bits(slot_format: SlotFormat) -> int:
    """Bits below the gradient's integer in momentum arithmetic: the sum is shifted to 21 bits."""
    return 21 - slot_format.sum_bits


def row_blocks(num_rows: int, num_cols: int) -> Iterator[range]:
    """Ranges of whole rows, of about BLOCK_ELEMENTS weights."""
    size = max(1, BLOCK_ELEMENTS // num_cols)
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))
