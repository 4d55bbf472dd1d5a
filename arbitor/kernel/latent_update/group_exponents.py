"""Whole octaves per group of weights, beside the row scale: how they move, how an operand has them.

A weight is 2^(log2_scale / 256 + g) * trit. README.md says why the rule is what it is.
Shape letters: N rows (outputs), K columns (inputs), S groups = ceil(K / group_size).
"""

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import MOMENT_MAX, MOMENT_MIN, counter_hash
from arbitor.kernel.latent_update.moments import WORD_KEY, WORD_SCALE_STEP
from arbitor.kernel.latent_update.state import GroupedState, trits

LOWEST_SHIFT = -9  # the least power of two of e4m3
EXPONENT_MAX = 9  # on either side of the row's scale
GROUP_STREAM = 7


def move_group_exponents(state: GroupedState, group_size: int, words: Tensor) -> None:
    """One octave against the correlation of momentum and trits, where it is the group's own.

    With r = sum(momentum * trit) / sum(abs(momentum * trit)) of a group, after its update, and d =
    r - the mean r of its row, the exponent moves by -sign(d) with probability rate * (2 abs(d) - 1)
    if that is positive; rate is that of the row scale, in octaves. `words` are those of the update:
    integers throughout (r in 1/256), nothing waits for the device.
    """
    product_NK = state.momentum.int() * trits(state.latent)
    padding = -product_NK.shape[1] % group_size
    product = torch.nn.functional.pad(product_NK, (0, padding)).unflatten(1, (-1, group_size))
    mass_NS = product.abs().sum(2).clamp_(min=1)
    ratio_NS = torch.div(256 * product.sum(2), mass_NS, rounding_mode="trunc")
    row_N1 = torch.div(ratio_NS.sum(1, True), ratio_NS.shape[1], rounding_mode="trunc")
    own_NS = ratio_NS - row_N1
    excess_NS = (own_NS.abs() - 128).clamp_(min=0)
    chance_NS = (excess_NS * words[WORD_SCALE_STEP].long()) >> 15  # 1/65536
    index = torch.arange(chance_NS.numel(), dtype=torch.int32, device=words.device)
    stream = counter_hash(words[WORD_KEY] ^ GROUP_STREAM, 0)
    noise_NS = (counter_hash(index ^ stream, 0) & 0xFFFF).view_as(chance_NS)
    move_NS = own_NS.sign() * (noise_NS < chance_NS)
    moved_NS = (state.group_exponent - move_NS).clamp_(-EXPONENT_MAX, EXPONENT_MAX)
    state.group_exponent.copy_(moved_NS)


def scale_of_largest_group(log2_scale_N: Tensor, group_exponent_NS: Tensor) -> Tensor:
    """int16 [N], 1/256 octave: what multiplies the accumulator of `relative_exponents`."""
    log2_N = log2_scale_N.int() + 256 * group_exponent_NS.amax(1).int()
    return log2_N.clamp_(MOMENT_MIN, MOMENT_MAX).to(torch.int16)


def relative_exponents(group_exponent_NS: Tensor) -> Tensor:
    """int8 octaves of each group over the row's largest, -9 to 0: what an operand holds."""
    shift_NS = group_exponent_NS - group_exponent_NS.amax(1, keepdim=True)
    return shift_NS.clamp_(LOWEST_SHIFT, 0)


def spread_over_groups(scale_NS: Tensor, group_size: int, num_cols: int) -> Tensor:
    """[N, K]: each group's value at each of its weights."""
    return scale_NS.unsqueeze(2).expand(-1, -1, group_size).flatten(1)[:, :num_cols]
