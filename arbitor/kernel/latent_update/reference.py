"""The integer update rule of a ternary matrix: the specification and the fast CPU path.

A weight is 2^log2_scale[row] * trit, and the trit is the sign of an int8 latent outside a dead
zone. Every slot (micro-batch) of a step turns its gradient into small integers; their sum over the
slots is exact in any order, and everything after it is integer. So the state after a step is a
function of (state before, sum, key) alone: not of devices, threads, ranks or the order of slots.
Float64 appears for sums of integers below 2^53, which are exact in any order, and nowhere else.

The rule is lab/results.md section 2: momentum 0.9, normalized by row and column second moments
(0.95) of the gradient, clipped at 3, stochastically rounded onto the latents; row scales move in
log2. The moments before the step normalize it, so one pass over a matrix is enough.

Shape letters: N rows (outputs), K columns (inputs), G momentum groups = ceil(K / 64), B rows of a
block, L = 64 lanes of a group. Units: see `fixed_point`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    BLOCK_ELEMENTS,
    EXACT_BITS,
    MOMENT_MAX,
    MOMENT_MIN,
    POW2_Q11,
    POW2_Q16,
    STREAM_INIT,
    SlotFormat,
    advance_moment,
    bit_length,
    counter_hash,
    element_index,
    ilog2,
    log2_fraction,
    low_bits,
    moment_memory,
    quantize_exact,
    quantize_slot,
    row_blocks,
    row_exponents,
    shift_left,
    slot_format,
    stream_key,
    substream_key,
    tensor_id,
)

__all__ = [
    "DEAD_ZONE",
    "GROUP",
    "SlotFormat",
    "StepRates",
    "TernaryState",
    "UpdateStats",
    "calibrate",
    "init_state",
    "quantize_exact",
    "quantize_slot",
    "row_exponents",
    "slot_format",
    "step_rates",
    "stream_key",
    "tensor_id",
    "trits",
    "update",
]

DEAD_ZONE = 21
GROUP = 64
LATENT_MAX = 127
CLIP = 3

# Momentum keeps 230/256 of itself and takes 26/256 of the new gradient.
MOMENTUM_WEIGHT = 230
EMPTY_GROUP = -128

_ONE_OVER_SQRT_2PI_Q64 = 7359186146747302452

_ROW_STREAM, _COL_STREAM, _SCALE_MOMENT_STREAM, _SCALE_STREAM, _TENSOR_STREAM = 2, 3, 4, 5, 6


@dataclass
class TernaryState:
    """All tensors of one weight matrix [N, K]; integers, updated in place."""

    latent: Tensor  # int8 [N, K], -127 to 127
    momentum: Tensor  # int8 [N, K]; of the gradient sum: momentum * 2^momentum_exponent
    momentum_exponent: Tensor  # int8 [N, G]; -128 for a group of zeros
    log2_scale: Tensor  # int16 [N], 1/256 octave
    scale_moment: Tensor  # int16 [N], log2 rms of the gradient of the row scale
    row_moment: Tensor  # int16 [N], log2 rms of the gradient sum, also the next two
    col_moment: Tensor  # int16 [K]
    tensor_moment: Tensor  # int16 [1]
    num_updates: Tensor  # int32 [1]; 0 = not calibrated yet


@dataclass(frozen=True)
class StepRates:
    """Host integers of one step of one tensor."""

    log2_latent_rate: int  # 1/256 octave
    max_latent_step: int  # 1/65536 latent; 0 freezes the latents
    scale_step: int  # 1/65536 of 1/256 octave


@dataclass(frozen=True)
class UpdateStats:
    """Numbers of weights after one update."""

    flips: int  # trits that changed
    zeros: int  # trits that are 0
    saturated: int  # latents at +-127


# ---- start --------------------------------------------------------------------------------------


def init_state(num_rows: int, num_cols: int, gain: float, seed: int, name: str) -> TernaryState:
    """A fresh state on the CPU: latents round(52.5 z), z normal, so that 32 % of trits are 0.

    Latents are the inverse normal distribution function (an integer table, 2^-32) of the hash of
    (seed, `name` = qualified name of the tensor, element). The row scale gives outputs of rms
    `gain` for inputs of rms 1: log2(gain / sqrt(K * 0.69)), 0.69 being the share of nonzero trits.
    """
    key = stream_key(seed, 0, tensor_id(name), STREAM_INIT)
    latent = torch.empty(num_rows, num_cols, dtype=torch.int8)
    thresholds = _normal_thresholds()
    for rows in row_blocks(num_rows, num_cols):
        index = element_index(rows, num_cols, num_cols, latent.device)
        uniform = counter_hash(index, key).long() & 0xFFFFFFFF
        rank = torch.bucketize(uniform, thresholds, right=True)
        latent[rows.start : rows.stop] = rank - LATENT_MAX
    variance = Fraction(gain) ** 2 / (num_cols * Fraction(69, 100))
    log2_scale = (log2_fraction(variance) + 256) >> 9
    return TernaryState(
        latent=latent,
        momentum=torch.zeros(num_rows, num_cols, dtype=torch.int8),
        momentum_exponent=torch.full(
            (num_rows, -(-num_cols // GROUP)), EMPTY_GROUP, dtype=torch.int8
        ),
        log2_scale=torch.full((num_rows,), log2_scale, dtype=torch.int16),
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
        x = ((2 * v + 1) << 128) // 105
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


# ---- one update ---------------------------------------------------------------------------------


def step_rates(latent_rate_q16: int, scale_rate_q16: int) -> StepRates:
    """Rates of a step in 1/65536: latents, and 1/256 octave of a row scale.

    3.0 and 2.56 (0.01 octave) times the tensor's multiplier times the schedule's factor are the
    rule's; a latent rate of 0 leaves every latent where it is.
    """
    assert 0 <= latent_rate_q16 <= 20 << 16, "the clip must stay below 64 latents"
    assert 0 <= scale_rate_q16 < 1 << 24
    log2_rate = log2_fraction(Fraction(latent_rate_q16, 1 << 16)) if latent_rate_q16 else 0
    return StepRates((log2_rate + 128) >> 8, CLIP * latent_rate_q16, scale_rate_q16)


def update(
    state: TernaryState, grad_sum_NK: Tensor, fmt: SlotFormat, rates: StepRates, key: int
) -> UpdateStats:
    """Apply the sum of `quantize_slot` over all slots of the step to the state, in place.

    `grad_sum_NK` int16 or int32, `key` = stream_key(seed, step, tensor_id, STREAM_UPDATE). Blocks
    of rows pass through the caches once; moments and scales follow when all rows are summed.
    """
    num_rows, num_cols = state.latent.shape
    assert grad_sum_NK.shape == state.latent.shape and num_rows * num_cols <= 1 << 32
    block_bits = max(BLOCK_ELEMENTS, num_cols).bit_length()
    assert max(2 * fmt.sum_bits, 30) + block_bits <= 53, "sums must be exact in float64"
    state.num_updates += 1
    updates = int(state.num_updates)
    exponent_N = row_exponents(state.row_moment, fmt)
    row_log2_N, col_log2_GL = _log2_normalizer(state, rates, updates)
    squares = GradientSquares(exponent_N, num_cols, fmt)
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
            fmt,
        )
        momentum, momentum_exponent = round_momentum(blended, exponent_N[block], noise, fmt)
        old = _grouped(state.latent[block])
        step = latent_step(momentum, momentum_exponent, row_log2_N[block], col_log2_GL, rates)
        new = move_latent(old, step, noise)

        old_trits, new_trits = trits(old), trits(new)
        scale_grad_N[block] = (blended * old_trits).sum((1, 2), dtype=torch.float64).long()
        state.momentum[block] = momentum.flatten(1)[:, :num_cols]
        state.momentum_exponent[block] = momentum_exponent
        state.latent[block] = new.flatten(1)[:, :num_cols]
        flips += int(torch.count_nonzero(new_trits - old_trits))
        nonzeros += int(torch.count_nonzero(new_trits))
        saturated += int(torch.count_nonzero((new.abs() - (LATENT_MAX - 1)).clamp_(min=0)))
    _update_moments(state, squares, updates, key)
    _update_scales(state, scale_grad_N, exponent_N, fmt, rates, updates, key)
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


@lru_cache(maxsize=1024)
def bias_correction(updates: int) -> int:
    """-log2(1 - (230/256)^updates) in 1/256 octave: momentum starts at 0; 0 from update 62 on."""
    decay = Fraction(MOMENTUM_WEIGHT, 256) ** min(updates, 100)
    return (128 - log2_fraction(1 - decay)) >> 8


def blend_momentum(
    momentum: Tensor,
    momentum_exponent_BG: Tensor,
    grad: Tensor,
    exponent_B: Tensor,
    fmt: SlotFormat,
) -> Tensor:
    """230/256 of the momentum and 26/256 of the gradient sum: int32 [B, G, 64], below 2^30.

    `momentum` int8 and `grad` int32 [B, G, 64]. Unit 2^-(row exponent + fraction bits + 8). The
    weight multiplies before the shift, which would otherwise drop bits always downwards.
    """
    unit_B1 = exponent_B.unsqueeze(1) + fraction_bits(fmt)
    places = (momentum_exponent_BG.int() + unit_B1).clamp_(-31, 15).unsqueeze(-1)
    blended = momentum.int() * (MOMENTUM_WEIGHT << places.clamp(min=0))
    blended >>= (-places).clamp_(min=0)
    return blended.add_(grad, alpha=(256 - MOMENTUM_WEIGHT) << fraction_bits(fmt))


def fraction_bits(fmt: SlotFormat) -> int:
    """Bits below the gradient's integer in momentum arithmetic: the sum is shifted to 21 bits."""
    return 21 - fmt.sum_bits


def round_momentum(
    blended: Tensor, exponent_B: Tensor, noise: Tensor, fmt: SlotFormat
) -> tuple[Tensor, Tensor]:
    """int32 momentum [B, G, 64] in +-127 and its exponents [B, G], by stochastic rounding.

    A group drops the bits that keep its largest magnitude within 7 bits; the upper 16 bits of the
    hash `noise` stand for those dropped (at most 23).
    """
    peak = blended.abs().amax(-1)
    dropped = (bit_length(peak) - 7).clamp_(min=0).int()
    exponent = dropped - (exponent_B.unsqueeze(1) + fraction_bits(fmt) + 8)
    exponent = torch.where(peak > 0, exponent.clamp_(-128, 127), EMPTY_GROUP)
    dropped.unsqueeze_(-1)
    dither = (noise >> 8).bitwise_and_(0xFFFF00)
    dither >>= 24 - dropped
    dither += blended
    dither >>= dropped
    return dither.clamp_(-LATENT_MAX, LATENT_MAX), exponent


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


def move_latent(latent: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """int8 latents minus the steps, rounded stochastically by the lower 16 bits of `noise`."""
    whole = low_bits(noise)
    whole += step
    whole >>= 16
    return (latent - whole).clamp_(-LATENT_MAX, LATENT_MAX).to(torch.int8)


# ---- moments and scales -------------------------------------------------------------------------


class GradientSquares:
    """Sums of squares of the gradient sum over rows and columns, int64, added up block by block.

    Columns add rows of different exponents, in units of 2^-(2 * lowest exponent + column_shift),
    where `column_shift` keeps the sum over the whole tensor below 2^62.
    """

    def __init__(self, exponent_N: Tensor, num_cols: int, fmt: SlotFormat):
        num_rows = len(exponent_N)
        spare_bits = 62 - 2 * fmt.sum_bits - (num_rows * num_cols - 1).bit_length()
        self.column_shift = max(0, spare_bits)
        self.lowest_exponent = int(exponent_N.min())
        self.exponent_N = exponent_N
        self.row_N = exponent_N.new_zeros(num_rows, dtype=torch.int64)
        self.col_K = exponent_N.new_zeros(num_cols, dtype=torch.int64)

    def add(self, block: slice, grad_BK: Tensor) -> None:
        """Add the int32 gradient sums of a block of rows."""
        squares_BK = grad_BK.double().square_()
        self.row_N[block] = squares_BK.sum(1).long()
        octaves_B = (2 * (self.exponent_N[block] - self.lowest_exponent)).clamp_(max=62)
        dropped_B = (octaves_B - self.column_shift).clamp_(min=0)
        if dropped_B.any():
            squares_BK = (squares_BK.long() >> dropped_B.unsqueeze(1)).double()
        # Rows of one exponent add up in one exact matmul, a one for each row that has it.
        distinct_D, member_B = octaves_B.unique(return_inverse=True)
        member_DB = torch.nn.functional.one_hot(member_B, len(distinct_D)).T.double()
        places_D1 = (self.column_shift - distinct_D).clamp(min=0).unsqueeze(1)
        self.col_K += ((member_DB @ squares_BK).long() << places_D1).sum(0)


def _update_moments(state: TernaryState, squares: GradientSquares, updates: int, key: int) -> None:
    """Advance the row, column and tensor moments; where the gradient is all zero they stay.

    A rare row would otherwise decay until its next gradient overflows the slot integers.
    """
    log2_rows, log2_cols = log2_fraction(len(squares.row_N)), log2_fraction(len(squares.col_K))
    row_offset = log2_cols + (2 * squares.exponent_N.long() << 16)
    col_offset = log2_rows + (2 * squares.lowest_exponent + squares.column_shift << 16)
    vectors = (  # one call for all: the vectors are short, a call costs more than its elements
        (state.row_moment, squares.row_N, row_offset, _ROW_STREAM),
        (state.col_moment, squares.col_K, col_offset, _COL_STREAM),
        (state.tensor_moment, squares.col_K.sum(0, True), col_offset + log2_cols, _TENSOR_STREAM),
    )
    moments, totals, offsets, streams = zip(*vectors, strict=True)
    total, old = torch.cat(totals), torch.cat(moments)
    offset = torch.cat([o + torch.zeros_like(t) for o, t in zip(offsets, totals, strict=True)])
    noise = torch.cat([_vector_noise(m, key, s) for m, s in zip(moments, streams, strict=True)])
    advanced = advance_moment(old, ilog2(total) - offset, moment_memory(updates), noise)
    advanced = torch.where(total > 0, advanced, old)
    for moment, new in zip(moments, advanced.split([len(m) for m in moments]), strict=True):
        moment.copy_(new)


def _update_scales(
    state: TernaryState,
    scale_grad_N: Tensor,
    exponent_N: Tensor,
    fmt: SlotFormat,
    rates: StepRates,
    updates: int,
    key: int,
) -> None:
    """Move log2_scale against the momentum's dot product with the trits, over its own rms.

    `scale_grad_N` int64 in the unit of `blend_momentum`. The quotient is kept to 3, and to 2^-20.
    """
    log2_grad = ilog2(scale_grad_N.abs()) - ((exponent_N + fraction_bits(fmt) + 8) << 16)
    if updates == 1:
        moment = ((log2_grad + 128) >> 8).clamp_(MOMENT_MIN, MOMENT_MAX)
    else:
        noise = _vector_noise(state.scale_moment, key, _SCALE_MOMENT_STREAM)
        memory = moment_memory(updates)
        moment = advance_moment(state.scale_moment, 2 * log2_grad, memory, noise)
    state.scale_moment.copy_(moment)
    ratio = log2_grad + ((bias_correction(updates) - moment.long()) << 8)
    ratio = ratio.clamp_(-20 << 16, 2 << 16) >> 8
    power = POW2_Q16.to(ratio.device)[ratio & 255].long()
    step = shift_left(power, ratio >> 8).clamp_(max=CLIP << 16) * scale_grad_N.sign()
    dither = low_bits(_vector_noise(state.log2_scale, key, _SCALE_STREAM))
    whole = ((step * rates.scale_step >> 16) + dither) >> 16
    state.log2_scale.copy_((state.log2_scale - whole).clamp_(MOMENT_MIN, MOMENT_MAX))


def _vector_noise(vector: Tensor, key: int, stream: int) -> Tensor:
    index = torch.arange(len(vector), dtype=torch.int32, device=vector.device)
    return counter_hash(index, substream_key(key, stream))
