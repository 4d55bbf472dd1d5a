"""The `bigint` rule: trits are frozen, group scales follow the correlation of gradient and trit.

A weight is 2^x * trit with one x per `group_size` weights of a row, so d loss / d x = ln 2 * sum of
gradient * weight over the group. Where gradients and trits agree in sign, the scale must fall:

    x = E - 4 * corr_accum / (step_counter * group_size)     octaves,
    corr_accum += sum over the group of sign(gradient) * trit.

All state is integer, and every sum is exact in any order. A step goes: `accumulate_correlation`
for every slot into one int32 tensor of zeros, an all-reduce of that tensor, `finish_step`.

Shape letters: N rows (outputs), K columns (inputs), G groups = ceil(K / group_size).
"""

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import MOMENT_MAX, MOMENT_MIN

STRENGTH = 4  # octaves at full correlation


def num_groups(num_cols: int, group_size: int) -> int:
    """Groups of a row; the last may hold fewer weights."""
    return -(-num_cols // group_size)


def accumulate_correlation(
    grad_NK: Tensor, trits_NK: Tensor, corr_step_NG: Tensor, group_size: int
) -> None:
    """Add a slot's sums of sign(gradient) * trit to int32 `corr_step_NG`, in place.

    `grad_NK` float32 or bfloat16, `trits_NK` int8 of -1, 0, 1. The sign of NaN is 0.
    """
    num_cols = grad_NK.shape[1]
    signs = (grad_NK > 0).to(torch.int8) - (grad_NK < 0).to(torch.int8)
    padding = num_groups(num_cols, group_size) * group_size - num_cols
    products = torch.nn.functional.pad(signs * trits_NK, (0, padding))
    corr_step_NG += products.unflatten(1, (-1, group_size)).sum(2, dtype=torch.int32)


def finish_step(
    corr_accum_NG: Tensor, step_counter_NG: Tensor, corr_step_NG: Tensor, num_slots: int
) -> None:
    """Take a step's sum over all slots and workers into the int64 state, in place.

    The counter counts slots, so that |corr_accum| <= step_counter * group_size.
    """
    corr_accum_NG += corr_step_NG
    step_counter_NG += num_slots


def group_log2_scale(
    log2_scale_NG: Tensor, corr_accum_NG: Tensor, step_counter_NG: Tensor, group_size: int
) -> Tensor:
    """int16 [N, G]: log2 of the group scales in 1/256 octave.

    `log2_scale_NG` int16 is E, [N, 1] or [N, G]. The quotient is rounded to nearest, halves up; it
    is 0 before the first step.
    """
    count = (step_counter_NG * group_size).clamp(min=1)
    doubled = 2 * 256 * STRENGTH * corr_accum_NG + count
    fall = torch.div(doubled, 2 * count, rounding_mode="floor")
    return (log2_scale_NG - fall).clamp_(MOMENT_MIN, MOMENT_MAX).to(torch.int16)
