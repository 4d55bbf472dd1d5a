"""What an update does once a row or column, on a GPU. Oracle: `moments.py`.

Shape letters: N rows (outputs), K columns (inputs).
"""

import triton
import triton.language as tl

from arbitor.kernel.latent_update import moments
from arbitor.kernel.latent_update.device_math import hash_word, row_exponent
from arbitor.kernel.triton_numeric import power_of_two

CLIP = tl.constexpr(moments.CLIP)
LOG2_RATE = tl.constexpr(moments.WORD_LOG2_RATE)
SCALE_STEP = tl.constexpr(moments.WORD_SCALE_STEP)
UPDATES = tl.constexpr(moments.WORD_UPDATES)
MEMORY = tl.constexpr(moments.WORD_MEMORY)
BIAS = tl.constexpr(moments.WORD_BIAS)
ROW_STREAM = tl.constexpr(moments.ROW_STREAM)
COL_STREAM = tl.constexpr(moments.COL_STREAM)
SCALE_MOMENT_STREAM = tl.constexpr(moments.SCALE_MOMENT_STREAM)
SCALE_STREAM = tl.constexpr(moments.SCALE_STREAM)
TENSOR_STREAM = tl.constexpr(moments.TENSOR_STREAM)


@triton.jit(do_not_specialize=["N", "K"])
def prepare_kernel(
    row_moment_ptr,
    col_moment_ptr,
    tensor_moment_ptr,
    pow2_q11_ptr,
    rows_ptr,
    cols_ptr,
    lowest_ptr,
    row_sums_ptr,
    col_sums_ptr,
    words_ptr,
    N,
    K,
    R0: tl.constexpr,
    FRACTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Factors: rows[0] exponent + fraction bits, [1] q11 power (bits of float32), [2] 6 - octave;
    cols float32 q11 power times octave. Also the block's lowest exponent, and zeros for every sum.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_cols = index < N, index < K
    moment = tl.load(row_moment_ptr + index, in_rows, 0).to(tl.int32)
    exponent = row_exponent(moment, R0)
    tl.store(lowest_ptr + tl.program_id(0), tl.min(tl.where(in_rows, exponent, 100), 0))
    log2 = tl.load(tensor_moment_ptr).to(tl.int32) - moment + tl.load(words_ptr + LOG2_RATE)
    tl.store(rows_ptr + index, exponent + FRACTION, in_rows)
    power = tl.load(pow2_q11_ptr + (log2 & 255)).to(tl.float32)
    tl.store(rows_ptr + N + index, power.to(tl.int32, bitcast=True), in_rows)
    tl.store(rows_ptr + 2 * N + index, 6 - (log2 >> 8), in_rows)
    zeros = tl.zeros((BLOCK,), tl.int64)
    tl.store(row_sums_ptr + index, zeros, in_rows)
    tl.store(row_sums_ptr + N + index, zeros, in_rows)

    log2 = -tl.load(col_moment_ptr + index, in_cols, 0).to(tl.int32)
    power = tl.load(pow2_q11_ptr + (log2 & 255)).to(tl.float32)
    # Beyond these octaves a step is -1, 0 or clipped whatever the row.
    scale = power * power_of_two(tl.minimum(tl.maximum(log2 >> 8, -95), 64))
    tl.store(cols_ptr + index, scale, in_cols)
    tl.store(col_sums_ptr + index, zeros, index <= K)  # the last is the sum over all columns


@triton.jit(do_not_specialize=["N", "K", "num_blocks", "log2_N", "log2_K", "column_shift"])
def finish_kernel(
    row_moment_ptr,
    col_moment_ptr,
    tensor_moment_ptr,
    scale_moment_ptr,
    log2_scale_ptr,
    num_updates_ptr,
    pow2_q16_ptr,
    log2_q16_ptr,
    rows_ptr,
    lowest_ptr,
    row_sums_ptr,
    col_sums_ptr,
    counters_ptr,
    words_ptr,
    N,
    K,
    num_blocks,
    log2_N,
    log2_K,
    column_shift,
    FRACTION: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    """Moments of rows, columns and tensor from the sums; the step of the row scales."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_cols = index < N, index < K
    key = tl.load(words_ptr)
    updates, memory = tl.load(words_ptr + UPDATES), tl.load(words_ptr + MEMORY)
    bias, scale_step = tl.load(words_ptr + BIAS), tl.load(words_ptr + SCALE_STEP)
    unit = tl.load(rows_ptr + index, in_rows, 0).to(tl.int64)
    total = tl.load(row_sums_ptr + index, in_rows, 0)
    old = tl.load(row_moment_ptr + index, in_rows, 0).to(tl.int64)
    mean = ilog2(total, log2_q16_ptr) - log2_K - ((unit - FRACTION) << 17)
    noise = stream_noise(index, key, ROW_STREAM)
    new = advance_moment(old, mean, memory, noise, pow2_q16_ptr, log2_q16_ptr)
    tl.store(row_moment_ptr + index, tl.where(total > 0, new, old).to(tl.int16), in_rows)

    grad = tl.load(row_sums_ptr + N + index, in_rows, 0)
    log2_grad = ilog2(tl.abs(grad), log2_q16_ptr) - ((unit + 8) << 16)
    old = tl.load(scale_moment_ptr + index, in_rows, 0).to(tl.int64)
    noise = stream_noise(index, key, SCALE_MOMENT_STREAM)
    moment = advance_moment(old, 2 * log2_grad, memory, noise, pow2_q16_ptr, log2_q16_ptr)
    first = tl.minimum(tl.maximum((log2_grad + 128) >> 8, -32768), 32767)
    moment = tl.where(updates == 1, first, moment)
    tl.store(scale_moment_ptr + index, moment.to(tl.int16), in_rows)
    ratio = log2_grad + ((bias - moment) << 8)
    ratio = tl.minimum(tl.maximum(ratio, -20 << 16), 2 << 16) >> 8
    octaves = ratio >> 8
    power = tl.load(pow2_q16_ptr + (ratio & 255)).to(tl.int64)
    step = (power << tl.maximum(octaves, 0)) >> tl.maximum(-octaves, 0)
    step = tl.minimum(step, CLIP << 16)
    step = tl.where(grad > 0, step, tl.where(grad < 0, -step, 0))
    dither = (stream_noise(index, key, SCALE_STREAM) & 0xFFFF).to(tl.int64)
    scale = tl.load(log2_scale_ptr + index, in_rows, 0).to(tl.int64)
    scale -= (((step * scale_step) >> 16) + dither) >> 16
    scale = tl.minimum(tl.maximum(scale, -32768), 32767)
    tl.store(log2_scale_ptr + index, scale.to(tl.int16), in_rows)

    block = tl.arange(0, BLOCK_BLOCKS)
    lowest = tl.min(tl.load(lowest_ptr + block, block < num_blocks, 100), 0).to(tl.int64)
    offset = log2_N + ((2 * lowest + column_shift) << 16)
    total = tl.load(col_sums_ptr + index, in_cols, 0)
    old = tl.load(col_moment_ptr + index, in_cols, 0).to(tl.int64)
    mean = ilog2(total, log2_q16_ptr) - offset
    noise = stream_noise(index, key, COL_STREAM)
    new = advance_moment(old, mean, memory, noise, pow2_q16_ptr, log2_q16_ptr)
    tl.store(col_moment_ptr + index, tl.where(total > 0, new, old).to(tl.int16), in_cols)

    if tl.program_id(0) == 0:
        zero = tl.arange(0, 1)
        square = tl.load(col_sums_ptr + K + zero)
        tensor_moment = tl.load(tensor_moment_ptr + zero).to(tl.int64)
        tensor_mean = ilog2(square, log2_q16_ptr) - offset - log2_K
        tensor_noise = stream_noise(zero, key, TENSOR_STREAM)
        advanced = advance_moment(
            tensor_moment, tensor_mean, memory, tensor_noise, pow2_q16_ptr, log2_q16_ptr
        )
        advanced = tl.where(square > 0, advanced, tensor_moment)
        tl.store(tensor_moment_ptr + zero, advanced.to(tl.int16))
        tl.store(num_updates_ptr, updates)
        if COUNT:  # the update subtracted the weights that are not 0
            tl.atomic_add(counters_ptr + 1, N.to(tl.int64) * K, sem="relaxed")


@triton.jit
def stream_noise(index, key, STREAM: tl.constexpr):
    """uint32 `counter_hash` of the index in a stream inside the stream `key`."""
    return hash_word(index ^ hash_word(key ^ STREAM).to(tl.int32))


@triton.jit
def ilog2(x, log2_q16_ptr):
    """int64 `ilog2` of int64 x >= 0, in q16 octaves."""
    top = (x & ~(x >> 1)).to(tl.float64).to(tl.int64, bitcast=True)
    characteristic = tl.maximum((top >> 52) - 1022, 0) - 1
    mantissa = x << tl.maximum(24 - characteristic, 0)
    mantissa = mantissa >> tl.maximum(characteristic - 24, 0)
    fraction = tl.maximum(mantissa - (1 << 24), 0)
    cell = fraction >> 16
    low = tl.load(log2_q16_ptr + cell)
    slope = tl.load(log2_q16_ptr + cell + 1) - low
    log2 = (characteristic << 16) + low + ((slope * (fraction & 0xFFFF)) >> 16)
    return tl.where(x > 0, log2, -(64 << 16))


@triton.jit
def advance_moment(old, log2_mean_square, memory, noise, pow2_q16_ptr, log2_q16_ptr):
    """int64 `advance_moment` of int64 moments; `noise` a hash."""
    ratio = tl.minimum(tl.maximum(log2_mean_square - (old << 9), -30 << 16), 24 << 16) >> 8
    octaves = ratio >> 8
    power = tl.load(pow2_q16_ptr + (ratio & 255)).to(tl.int64) * (256 - memory)
    power = (power << tl.maximum(octaves, 0)) >> tl.maximum(-octaves, 0)
    mixed = (memory << 16) + power
    step = (ilog2(mixed, log2_q16_ptr) - (24 << 16) + (noise & 511).to(tl.int64)) >> 9
    return tl.minimum(tl.maximum(old + step, -32768), 32767)
