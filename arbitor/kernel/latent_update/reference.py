"""The integer update rule of a ternary matrix: the specification and the fast CPU path.

A weight is 2^log2_scale[row] * trit, and the trit is the sign of an int8 latent outside a dead
zone. Every slot (micro-batch) of a step turns its gradient into small integers; their sum over the
slots is exact in any order, and everything after it is integer. So the state after a step is a
function of (state before, sum, key) alone: not of devices, threads, ranks or the order of slots.
Float64 appears for sums of integers below 2^53, which are exact in any order, and nowhere else.

The rule: momentum 0.9, normalized by row and column second moments
(0.95) of the gradient, clipped at 3, stochastically rounded onto the latents; row scales move in
log2. The moments before the step normalize it, so one pass over a matrix is enough.

Shape letters: N rows (outputs), K columns (inputs), G momentum groups = ceil(K / 64), B rows of a
block, L = 64 lanes of a group. Units: see `fixed_point`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    BLOCK_ELEMENTS,
    POW2_Q11,
    bit_length,
    counter_hash,
    element_index,
)
from arbitor.kernel.latent_update.moments import (
    MOMENTUM_WEIGHT,
    GradientSquares,
    StepRates,
    bias_correction,
    update_moments,
    update_scales,
)
from arbitor.kernel.latent_update.slots import (
    SlotFormat,
    fraction_bits,
    row_blocks,
    row_exponents,
)
from arbitor.kernel.latent_update.state import (
    EMPTY_GROUP,
    GROUP,
    TernaryState,
    trits,
)
from arbitor.kernel.state_format import INT8, StateFormat


@dataclass(frozen=True)
class UpdateStats:
    """Numbers of weights after one update."""

    flips: int  # trits that changed
    zeros: int  # trits that are 0
    saturated: int  # latents at their largest magnitude


def update(
    state: TernaryState,
    grad_sum_NK: Tensor,
    slot_format: SlotFormat,
    rates: StepRates,
    key: int,
    state_format: StateFormat = INT8,
) -> UpdateStats:
    """Apply the sum of `quantize_slot` over all slots of the step to the state, in place.

    The state is a `plain_state`; `state_format` says what grid its latents and momentum keep to.

    `grad_sum_NK` int16 or int32, `key` = stream_key(seed, step, tensor_id, STREAM_UPDATE). Blocks
    of rows pass through the caches once; moments and scales follow when all rows are summed.
    """
    num_rows, num_cols = state.latent.shape
    assert grad_sum_NK.shape == state.latent.shape and num_rows * num_cols <= 1 << 32
    block_bits = max(BLOCK_ELEMENTS, num_cols).bit_length()
    assert max(2 * slot_format.sum_bits, 30) + block_bits <= 53, "sums must be exact in float64"
    state.num_updates += 1
    updates = int(state.num_updates)
    exponent_N = row_exponents(state.row_moment, slot_format)
    row_log2_N, col_log2_GL = _log2_normalizer(state, rates, updates)
    squares = GradientSquares(exponent_N, num_cols, slot_format)
    scale_grad_N = torch.empty(num_rows, dtype=torch.int64, device=exponent_N.device)
    flips = nonzeros = saturated = 0
    for rows in row_blocks(num_rows, num_cols):
        block = slice(rows.start, rows.stop)
        grad = _grouped(grad_sum_NK[block]).int()
        squares.add(block, grad.flatten(1)[:, :num_cols])

        noise = element_index(rows, num_cols, col_log2_GL.numel(), grad.device)
        noise = counter_hash(noise, key).view_as(grad)
        blended = blend_momentum(
            _grouped(state.momentum[block]),
            state.momentum_exponent[block],
            grad,
            exponent_N[block],
            slot_format,
            state_format,
        )
        momentum, momentum_exponent = round_momentum(
            blended, exponent_N[block], noise, slot_format, state_format
        )
        old = _grouped(state.latent[block])
        step = latent_step(momentum, momentum_exponent, row_log2_N[block], col_log2_GL, rates)
        new = move_latent(old, step, noise, state_format)

        old_trits, new_trits = trits(old), trits(new)
        scale_grad_N[block] = (blended * old_trits).sum((1, 2), dtype=torch.float64).long()
        state.momentum[block] = momentum.flatten(1)[:, :num_cols]
        state.momentum_exponent[block] = momentum_exponent
        state.latent[block] = new.flatten(1)[:, :num_cols]
        flips += int(torch.count_nonzero(new_trits - old_trits))
        nonzeros += int(torch.count_nonzero(new_trits))
        beyond = new.abs() - (state_format.largest_latent - 1)
        saturated += int(torch.count_nonzero(beyond.clamp_(min=0)))
    update_moments(state, squares, updates, key)
    update_scales(state, scale_grad_N, exponent_N, slot_format, rates, updates, key)
    return UpdateStats(flips, num_rows * num_cols - nonzeros, saturated)


def _grouped(x_BK: Tensor) -> Tensor:
    """[B, G, 64], the last group filled up with zeros, which stay zero in every step below."""
    padding = -x_BK.shape[1] % GROUP
    if padding:
        x_BK = torch.nn.functional.pad(x_BK, (0, padding))
    return x_BK.unflatten(1, (-1, GROUP))


def _log2_normalizer(state: TernaryState, rates: StepRates, updates: int) -> tuple[Tensor, Tensor]:
    """log2 of latents per unit of momentum, as a sum of a row's and a column's share, int32.

    rate * rms(tensor) / (rms(row) * rms(column)) / (1 - 0.9^t); [N] and [G, 64], 1/256 octave.
    """
    row_log2_N = state.tensor_moment.int() - state.row_moment.int()
    row_log2_N += rates.log2_latent_rate + bias_correction(updates)
    return row_log2_N, _grouped(-state.col_moment.int().unsqueeze(0))[0]


def blend_momentum(
    momentum: Tensor,
    momentum_exponent_BG: Tensor,
    grad: Tensor,
    exponent_B: Tensor,
    slot_format: SlotFormat,
    state_format: StateFormat,
) -> Tensor:
    """230/256 of the momentum and 26/256 of the gradient sum: int32 [B, G, 64], below 2^30.

    `momentum` int8 and `grad` int32 [B, G, 64]. Unit 2^-(row exponent + fraction bits + 8). The
    weight multiplies before the shift, which would otherwise drop bits always downwards. Fewer bits
    of momentum drop more, so their exponents reach higher.
    """
    unit_B1 = exponent_B.unsqueeze(1) + fraction_bits(slot_format)
    places = (momentum_exponent_BG.int() + unit_B1).clamp_(-31, 23 - state_format.momentum_bits)
    places = places.unsqueeze(-1)
    blended = momentum.int() * (MOMENTUM_WEIGHT << places.clamp(min=0))
    blended >>= (-places).clamp_(min=0)
    return blended.add_(grad, alpha=(256 - MOMENTUM_WEIGHT) << fraction_bits(slot_format))


def round_momentum(
    blended: Tensor,
    exponent_B: Tensor,
    noise: Tensor,
    slot_format: SlotFormat,
    state_format: StateFormat,
) -> tuple[Tensor, Tensor]:
    """int32 momentum [B, G, 64] in +-127 and its exponents [B, G], by stochastic rounding.

    A group drops the bits that keep its largest magnitude within 7 bits; the upper 16 bits of the
    hash `noise` stand for those dropped (at most 23). With 4 bits: in +-7, 3 bits, at most 27.
    """
    peak = blended.abs().amax(-1)
    dropped = (bit_length(peak) - (state_format.momentum_bits - 1)).clamp_(min=0).int()
    exponent = dropped - (exponent_B.unsqueeze(1) + fraction_bits(slot_format) + 8)
    exponent = torch.where(peak > 0, exponent.clamp_(-128, 127), EMPTY_GROUP)
    dropped.unsqueeze_(-1)
    dither = (noise >> 8).bitwise_and_(0xFFFF00)
    dither >>= (24 - dropped).clamp_(min=0)
    dither <<= (dropped - 24).clamp_(min=0)
    dither += blended
    dither >>= dropped
    largest = state_format.largest_momentum
    return dither.clamp_(-largest, largest), exponent


def latent_step(
    momentum: Tensor,
    momentum_exponent_BG: Tensor,
    row_log2_B: Tensor,
    col_log2_GL: Tensor,
    rates: StepRates,
) -> Tensor:
    """momentum * 2^(exponent + row_log2 + col_log2) in 1/65536 latent, clipped: int32 [B, G, 64].

    127 * 4085^2 < 2^31 bounds the product with both fractional powers (q11 each). A shift below
    zero would exceed the clip, which stays below 2^22.
    """
    step = momentum * POW2_Q11.to(momentum.device)[row_log2_B & 255][:, None, None]
    step *= POW2_Q11.to(momentum.device)[col_log2_GL & 255]
    octaves_BG = momentum_exponent_BG + (row_log2_B >> 8).unsqueeze(1)
    places = (6 - octaves_BG).clamp_(-64, 64).unsqueeze(-1) - (col_log2_GL >> 8)
    step >>= places.clamp_(0, 31)
    return step.clamp_(-rates.max_latent_step, rates.max_latent_step)


def move_latent(
    latent: Tensor, step: Tensor, noise: Tensor, state_format: StateFormat = INT8
) -> Tensor:
    """int8 latents minus the steps, rounded stochastically onto the latents' grid.

    `noise` gives as many of its lower bits as lie below the grid: 16, or 18 for steps of 4.
    """
    places = 16 + state_format.latent_shift
    whole = noise & ((1 << places) - 1)
    whole += step
    whole >>= places
    largest = state_format.largest_latent >> state_format.latent_shift
    codes = ((latent >> state_format.latent_shift) - whole).clamp_(-largest, largest)
    return codes.to(torch.int8) << state_format.latent_shift
