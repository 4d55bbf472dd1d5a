"""The integer state of one weight matrix: how it starts and how it is calibrated.

Shape letters: N rows (outputs), K columns (inputs), G momentum groups = ceil(K / 64).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    EXACT_BITS,
    MOMENT_MAX,
    MOMENT_MIN,
    STREAM_INIT,
    bit_length,
    counter_hash,
    element_index,
    ilog2,
    log2_fraction,
    stream_key,
    tensor_id,
)
from arbitor.kernel.latent_update.slots import (
    row_blocks,
)

# Latents from -21 to 21 are the trit 0. A wider zone makes the rounding of a step small against it,
# a narrower one lets a latent go far beyond it, which long runs need more (LOG.md). One more than a
# multiple of 4: rounded to 6 bits, every latent keeps its trit.
DEAD_ZONE = 21
TWICE_SPREAD = 105  # twice the standard deviation of fresh latents, before they are clamped
GROUP = 64  # weights of a row that share a momentum exponent
LATENT_MAX = 127
EMPTY_GROUP = -128

_ONE_OVER_SQRT_2PI_Q64 = 7359186146747302452


@dataclass
class TernaryState:
    """All tensors of one weight matrix [N, K]; integers, updated in place.

    `packed.py` stores latents of 6 and momentum of 4 bits in fewer bytes under the same names.
    """

    latent: Tensor  # int8 [N, K], -127 to 127
    momentum: Tensor  # int8 [N, K]; of the gradient sum: momentum * 2^momentum_exponent
    momentum_exponent: Tensor  # int8 [N, G]; -128 for a group of zeros
    log2_scale: Tensor  # int16 [N], 1/256 octave
    scale_moment: Tensor  # int16 [N], log2 rms of the gradient of the row scale
    row_moment: Tensor  # int16 [N], log2 rms of the gradient sum, also the next two
    col_moment: Tensor  # int16 [K]
    tensor_moment: Tensor  # int16 [1]
    num_updates: Tensor  # int32 [1]; 0 = not calibrated yet


@dataclass
class GroupedState(TernaryState):
    """A state whose groups of weights have whole octaves beside their row's scale."""

    group_exponent: Tensor  # int8 [N, ceil(K / group_size)]


def init_state(num_rows: int, num_cols: int, gain: float, seed: int, name: str) -> TernaryState:
    """A fresh state: latents round(52.5 z) within +-127, z normal: 32 % of trits are 0.

    Latents are the inverse normal distribution function (an integer table, 2^-32) of the hash of
    (seed, `name` = qualified name of the tensor, element). The row scale gives outputs of rms
    `gain` for inputs of rms 1: log2(gain / sqrt(K * 0.69)), 0.69 being the share of nonzero trits.
    """
    state = blank_state(num_rows, num_cols)
    if state.latent.is_meta:  # shapes alone
        return state
    key = stream_key(seed, 0, tensor_id(name), STREAM_INIT)
    thresholds = _normal_thresholds().to(state.latent.device)
    for rows in row_blocks(num_rows, num_cols):
        index = element_index(rows, num_cols, num_cols, state.latent.device)
        uniform = counter_hash(index, key).long() & 0xFFFFFFFF
        rank = torch.bucketize(uniform, thresholds, right=True)
        state.latent[rows.start : rows.stop] = rank - LATENT_MAX
    variance = Fraction(gain) ** 2 / (num_cols * Fraction(69, 100))
    state.log2_scale.fill_((log2_fraction(variance) + 256) >> 9)
    return state


def blank_state(num_rows: int, num_cols: int) -> TernaryState:
    """The tensors of a state before its start, on torch's default device: all weights 0."""
    return TernaryState(
        latent=torch.zeros(num_rows, num_cols, dtype=torch.int8),
        momentum=torch.zeros(num_rows, num_cols, dtype=torch.int8),
        momentum_exponent=torch.full(
            (num_rows, -(-num_cols // GROUP)), EMPTY_GROUP, dtype=torch.int8
        ),
        log2_scale=torch.zeros(num_rows, dtype=torch.int16),
        scale_moment=torch.zeros(num_rows, dtype=torch.int16),
        row_moment=torch.zeros(num_rows, dtype=torch.int16),
        col_moment=torch.zeros(num_cols, dtype=torch.int16),
        tensor_moment=torch.zeros(1, dtype=torch.int16),
        num_updates=torch.zeros(1, dtype=torch.int32),
    )


@lru_cache(maxsize=1)
def _normal_thresholds() -> Tensor:
    """int64 [254]: 2^32 * P(52.5 z <= v + 1/2) for v = -127 to 126.

    The power series of the normal distribution function in 128-bit fixed point: no libm.
    """
    upper = []
    for v in range(LATENT_MAX):
        x = ((2 * v + 1) << 128) // TWICE_SPREAD
        power, total = x, 0
        for n in range(64):
            total += power // (2 * n + 1)
            power = -((((power * x) >> 128) * x) >> 128) // (2 * (n + 1))
        upper.append((1 << 31) + ((total * _ONE_OVER_SQRT_2PI_Q64) >> 160))
    lower = [(1 << 32) - threshold for threshold in reversed(upper)]
    return torch.tensor(lower + upper)


def trits(latent: Tensor) -> Tensor:
    """int8 of -1, 0, 1: the sign of int8 latents outside the dead zone."""
    return (latent - latent.clamp(-DEAD_ZONE, DEAD_ZONE)).clamp_(-1, 1)


def calibrate(state: TernaryState, exact_sum_NK: Tensor) -> bool:
    """Set the row, column and tensor moments from the int64 sum of `quantize_exact` over the slots.

    To be called once, on the gradients of the first update. Rows and columns without a gradient
    start 4 octaves below the largest. Returns False, changing nothing, if the sum is all zero.
    """
    assert int(state.num_updates) == 0, "a state is calibrated before its first update only"
    if not exact_sum_NK.any():
        return False
    state.row_moment.copy_(_log2_rms(exact_sum_NK, (1,)))
    state.col_moment.copy_(_log2_rms(exact_sum_NK, (0,)))
    state.tensor_moment.copy_(_log2_rms(exact_sum_NK, (0, 1)))
    return True


def _log2_rms(exact_sum_NK: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Moments over `dims`; each sum of squares drops low bits until it stays below 2^62."""
    count = math.prod(exact_sum_NK.shape[dim] for dim in dims)
    kept_bits = (62 - (count - 1).bit_length()) // 2
    magnitude = exact_sum_NK.abs()
    dropped = (bit_length(magnitude.amax(dims, keepdim=True)) - kept_bits).clamp_(min=0)
    squares = (magnitude >> dropped).square_().sum(dims).flatten()
    octaves = 2 * (dropped.flatten() - EXACT_BITS)
    log2_mean_square = ilog2(squares) - log2_fraction(count) + (octaves << 16)
    rms = (log2_mean_square + 256) >> 9
    rms = torch.where(squares > 0, rms, rms.max() - 4 * 256)
    return rms.clamp_(MOMENT_MIN, MOMENT_MAX)
