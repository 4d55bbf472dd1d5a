"""Second moments of the gradient, and the row scales: what an update does once a row or column.

Shape letters: N rows (outputs), K columns (inputs), B rows of a block, D distinct exponents.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    MOMENT_MAX,
    MOMENT_MIN,
    POW2_Q16,
    advance_moment,
    counter_hash,
    ilog2,
    log2_fraction,
    low_bits,
    moment_memory,
    shift_left,
    signed_word,
    substream_key,
    unsigned_word,
)
from arbitor.kernel.latent_update.slots import (
    SlotFormat,
    fraction_bits,
)
from arbitor.kernel.latent_update.state import (
    TernaryState,
)

CLIP = 3  # bound of a normalized step, of latents and of scales

# Momentum keeps 230/256 of itself and takes 26/256 of the new gradient.
MOMENTUM_WEIGHT = 230

ROW_STREAM, COL_STREAM, SCALE_MOMENT_STREAM, SCALE_STREAM, TENSOR_STREAM = 2, 3, 4, 5, 6


@dataclass(frozen=True)
class StepRates:
    """Host integers of one step of one tensor."""

    log2_latent_rate: int  # 1/256 octave
    max_latent_step: int  # 1/65536 latent; 0 freezes the latents
    scale_step: int  # 1/65536 of 1/256 octave


def step_rates(latent_rate_q16: int, scale_rate_q16: int) -> StepRates:
    """Rates of a step in 1/65536: latents, and 1/256 octave of a row scale.

    3.0 and 2.56 (0.01 octave) times the tensor's multiplier times the schedule's factor are the
    rule's; a latent rate of 0 leaves every latent where it is.
    """
    assert 0 <= latent_rate_q16 <= 20 << 16, "the clip must stay below 64 latents"
    assert 0 <= scale_rate_q16 < 1 << 24
    log2_rate = log2_fraction(Fraction(latent_rate_q16, 1 << 16)) if latent_rate_q16 else 0
    return StepRates((log2_rate + 128) >> 8, CLIP * latent_rate_q16, scale_rate_q16)


@lru_cache(maxsize=1024)
def bias_correction(updates: int) -> int:
    """-log2(1 - (230/256)^updates) in 1/256 octave: momentum starts at 0; 0 from update 62 on."""
    decay = Fraction(MOMENTUM_WEIGHT, 256) ** min(updates, 100)
    return (128 - log2_fraction(1 - decay)) >> 8


# What a kernel needs to know of a step, by place in the words of an update.
WORD_KEY, WORD_LOG2_RATE, WORD_MAX_STEP, WORD_SCALE_STEP = 0, 1, 2, 3
WORD_UPDATES, WORD_MEMORY, WORD_BIAS = 4, 5, 6
NUM_WORDS = 7


def update_words(rates: StepRates, key: int, updates: int) -> list[int]:
    """NUM_WORDS words of 32 bits: the step as data, so that one recorded launch serves every step.

    `updates` is the number of this update, from 1 on; the rate includes its bias correction.
    """
    bias = bias_correction(updates)
    return [
        signed_word(key),
        rates.log2_latent_rate + bias,
        rates.max_latent_step,
        rates.scale_step,
        updates,
        moment_memory(updates),
        bias,
    ]


def rates_and_key(words: list[int]) -> tuple[StepRates, int]:
    """The rates and the key that `update_words` was given."""
    log2_rate = words[WORD_LOG2_RATE] - words[WORD_BIAS]
    rates = StepRates(log2_rate, words[WORD_MAX_STEP], words[WORD_SCALE_STEP])
    return rates, unsigned_word(words[WORD_KEY])


def column_shift_of(num_rows: int, num_cols: int, slot_format: SlotFormat) -> int:
    """The unit of the columns' sums of squares: it keeps the sum over the tensor below 2^62."""
    return max(0, 62 - 2 * slot_format.sum_bits - (num_rows * num_cols - 1).bit_length())


class GradientSquares:
    """Sums of squares of the gradient sum over rows and columns, int64, added up block by block.

    Columns add rows of different exponents, in units of 2^-(2 * lowest exponent + column_shift).
    """

    def __init__(self, exponent_N: Tensor, num_cols: int, slot_format: SlotFormat):
        num_rows = len(exponent_N)
        self.column_shift = column_shift_of(num_rows, num_cols, slot_format)
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


def update_moments(state: TernaryState, squares: GradientSquares, updates: int, key: int) -> None:
    """Advance the row, column and tensor moments; where the gradient is all zero they stay.

    A rare row would otherwise decay until its next gradient overflows the slot integers.
    """
    log2_rows, log2_cols = log2_fraction(len(squares.row_N)), log2_fraction(len(squares.col_K))
    row_offset = log2_cols + (2 * squares.exponent_N.long() << 16)
    col_offset = log2_rows + (2 * squares.lowest_exponent + squares.column_shift << 16)
    vectors = (  # one call for all: the vectors are short, a call costs more than its elements
        (state.row_moment, squares.row_N, row_offset, ROW_STREAM),
        (state.col_moment, squares.col_K, col_offset, COL_STREAM),
        (state.tensor_moment, squares.col_K.sum(0, True), col_offset + log2_cols, TENSOR_STREAM),
    )
    moments, totals, offsets, streams = zip(*vectors, strict=True)
    total, old = torch.cat(totals), torch.cat(moments)
    offset = torch.cat([o + torch.zeros_like(t) for o, t in zip(offsets, totals, strict=True)])
    noise = torch.cat([_vector_noise(m, key, s) for m, s in zip(moments, streams, strict=True)])
    advanced = advance_moment(old, ilog2(total) - offset, moment_memory(updates), noise)
    advanced = torch.where(total > 0, advanced, old)
    for moment, new in zip(moments, advanced.split([len(m) for m in moments]), strict=True):
        moment.copy_(new)


def update_scales(
    state: TernaryState,
    scale_grad_N: Tensor,
    exponent_N: Tensor,
    slot_format: SlotFormat,
    rates: StepRates,
    updates: int,
    key: int,
) -> None:
    """Move log2_scale against the momentum's dot product with the trits, over its own rms.

    `scale_grad_N` int64 in the unit of `blend_momentum`. The quotient is kept to 3, and to 2^-20.
    """
    log2_grad = ilog2(scale_grad_N.abs()) - ((exponent_N + fraction_bits(slot_format) + 8) << 16)
    if updates == 1:
        moment = ((log2_grad + 128) >> 8).clamp_(MOMENT_MIN, MOMENT_MAX)
    else:
        noise = _vector_noise(state.scale_moment, key, SCALE_MOMENT_STREAM)
        memory = moment_memory(updates)
        moment = advance_moment(state.scale_moment, 2 * log2_grad, memory, noise)
    state.scale_moment.copy_(moment)
    ratio = log2_grad + ((bias_correction(updates) - moment.long()) << 8)
    ratio = ratio.clamp_(-20 << 16, 2 << 16) >> 8
    power = POW2_Q16.to(ratio.device)[ratio & 255].long()
    step = shift_left(power, ratio >> 8).clamp_(max=CLIP << 16) * scale_grad_N.sign()
    dither = low_bits(_vector_noise(state.log2_scale, key, SCALE_STREAM))
    whole = ((step * rates.scale_step >> 16) + dither) >> 16
    state.log2_scale.copy_((state.log2_scale - whole).clamp_(MOMENT_MIN, MOMENT_MAX))


def _vector_noise(vector: Tensor, key: int, stream: int) -> Tensor:
    index = torch.arange(len(vector), dtype=torch.int32, device=vector.device)
    return counter_hash(index, substream_key(key, stream))
