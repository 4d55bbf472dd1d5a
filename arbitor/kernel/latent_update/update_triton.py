"""The pass of an update over a matrix, on a GPU. Oracle: `reference.py`.

Shape letters: N rows (outputs), K columns (inputs), G momentum groups = ceil(K / 64).
"""

import triton
import triton.language as tl

from arbitor.kernel.latent_update.moments import WORD_MAX_STEP
from arbitor.kernel.latent_update.state import DEAD_ZONE
from arbitor.kernel.triton_numeric import INTERPRET, power_of_two

_MAGIC = tl.constexpr(1.5 * 2.0**23)  # float32 counts in ones here
_MAGIC_BITS = tl.constexpr(0x4B400000)
MAX_STEP = tl.constexpr(WORD_MAX_STEP)
ZONE = tl.constexpr(DEAD_ZONE)


@triton.jit(do_not_specialize=["N", "G", "num_blocks", "column_shift"])
def update_kernel(
    grad_ptr,
    latent_ptr,
    momentum_ptr,
    momentum_exponent_ptr,
    rows_ptr,
    cols_ptr,
    lowest_ptr,
    row_sums_ptr,
    col_sums_ptr,
    counters_ptr,
    words_ptr,
    N,
    K,
    G,
    num_blocks,
    column_shift,
    SUM_BITS: tl.constexpr,
    FRACTION: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    COUNT: tl.constexpr,
    MOMENTUM_WEIGHT: tl.constexpr,
    MOMENTUM_BITS: tl.constexpr,
    MOMENTUM_MAX: tl.constexpr,
    LATENT_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    """One group of 64 columns, STEPS tiles of BLOCK_N rows: steps 1 to 4 for every weight."""
    GROUP: tl.constexpr = 64
    TAKEN: tl.constexpr = (256 - MOMENTUM_WEIGHT) << FRACTION
    PLACES: tl.constexpr = 16 + LATENT_SHIFT  # below the grid of the latents
    BELOW: tl.constexpr = (1 << PLACES) - 1
    LATENT_MAX: tl.constexpr = 127 >> LATENT_SHIFT
    key, max_step = tl.load(words_ptr), tl.load(words_ptr + MAX_STEP)
    group = tl.program_id(0)
    lane = tl.arange(0, GROUP)
    col = group * GROUP + lane
    in_cols = col < K
    col_scale = tl.load(cols_ptr + col, in_cols, 0.0)[None, :]
    block = tl.arange(0, BLOCK_BLOCKS)
    lowest = tl.min(tl.load(lowest_ptr + block, block < num_blocks, 100), 0)
    col_sum = tl.zeros((BLOCK_N, GROUP), tl.int64)
    counts = tl.zeros((BLOCK_N, 4), tl.int32)

    first_row = tl.program_id(1) * (BLOCK_N * STEPS)
    tile_row = tl.arange(0, BLOCK_N)
    offset = tile_row[:, None] * K + col[None, :]
    base = first_row.to(tl.int64) * K
    grad_ptr += base
    latent_ptr += base
    momentum_ptr += base
    for step in range(STEPS):
        row = first_row + step * BLOCK_N + tile_row
        in_rows = row < N
        inside = in_rows[:, None]
        if not ALIGNED:
            inside = inside & in_cols[None, :]
        grad = tl.load(grad_ptr + offset, inside, 0).to(tl.int32)
        latent = tl.load(latent_ptr + offset, inside, 0).to(tl.int32)
        momentum = tl.load(momentum_ptr + offset, inside, 0).to(tl.int32)
        group_ptr = momentum_exponent_ptr + row * G + group
        exponent = tl.load(group_ptr, in_rows, 0).to(tl.int32)
        unit = tl.load(rows_ptr + row, in_rows, 0)
        row_power = tl.load(rows_ptr + N + row, in_rows, 0).to(tl.float32, bitcast=True)
        row_octave = tl.load(rows_ptr + 2 * N + row, in_rows, 0)

        # hash_word of row * K + col; where 64 divides K, one exclusive or brings in the column.
        if ALIGNED:
            word = ((row * K + group * GROUP) ^ key).to(tl.uint32)
            word = (word ^ (word >> 16))[:, None] ^ lane.to(tl.uint32)[None, :]
        else:
            word = (((row * K)[:, None] + col[None, :]) ^ key).to(tl.uint32)
            word ^= word >> 16
        word = word * 0x7FEB352D
        word ^= word >> 15
        word = word * 0x846CA68B  # its upper half is the hash's already
        low = ((word ^ (word >> 16)) & BELOW).to(tl.int32)

        square = grad.to(tl.uint32) * grad.to(tl.uint32)
        if SUM_BITS <= 13:  # 64 squares stay below 2^32
            row_sum = tl.sum(square, 1).to(tl.int64)
        elif SUM_BITS <= 15:  # 4 squares do
            quads = tl.sum(tl.reshape(square, (BLOCK_N, GROUP // 4, 4)), 2)
            row_sum = tl.sum(quads.to(tl.int64), 1)
        else:
            row_sum = tl.sum(square.to(tl.int64), 1)
        places = column_shift - tl.minimum(2 * (unit - FRACTION - lowest), 62)
        left, right = tl.maximum(places, 0), tl.maximum(-places, 0)
        if WIDE:
            col_sum += (square.to(tl.int64) << left.to(tl.int64)[:, None]) >> right[:, None]
        else:
            cut = square.to(tl.int32) >> tl.minimum(right, 31)[:, None]
            col_sum += cut.to(tl.int64) * (1 << left).to(tl.int64)[:, None]

        places = tl.minimum(tl.maximum(exponent + unit, -31), 23 - MOMENTUM_BITS)
        blended = momentum * (MOMENTUM_WEIGHT << tl.maximum(places, 0))[:, None]
        blended = (blended >> tl.maximum(-places, 0)[:, None]) + grad * TAKEN
        peak = tl.max(tl.abs(blended), 1)
        # Bit length from the exponent of a float that cannot have been rounded up.
        top = (peak & ~(peak >> 1)).to(tl.float32).to(tl.int32, bitcast=True)
        dropped = tl.maximum((top >> 23) - (125 + MOMENTUM_BITS), 0)
        exponent = tl.minimum(tl.maximum(dropped - (unit + 8), -128), 127)
        exponent = tl.where(peak > 0, exponent, -128)
        dither = tl.umulhi(word & 0xFFFF0000, (1 << dropped).to(tl.uint32)[:, None])
        momentum = (blended + dither.to(tl.int32)) >> dropped[:, None]
        momentum = tl.minimum(tl.maximum(momentum, -MOMENTUM_MAX), MOMENTUM_MAX)

        octave = tl.minimum(tl.maximum(row_octave - exponent, -64), 64)
        row_scale = (row_power * power_of_two(-octave))[:, None]
        move = clamped_floor(momentum.to(tl.float32) * row_scale, col_scale, max_step)
        # latent - ((move + low) >> 16), or on a coarser grid
        moved = (latent * 65536 + BELOW) - move - low
        moved = tl.minimum(tl.maximum(moved, -LATENT_MAX << PLACES), LATENT_MAX << PLACES | BELOW)
        moved = moved >> PLACES << LATENT_SHIFT

        trit = ((latent + (255 - ZONE)) >> 8) + ((latent + ZONE) >> 8)
        scale_sum = tl.sum(blended.to(tl.int64) * trit.to(tl.int64), 1)
        if COUNT:  # three counts of 10 bits: at most 16 a step, 63 steps
            new_trit = ((moved + (255 - ZONE)) >> 8) + ((moved + ZONE) >> 8)
            turn = new_trit - trit
            flags = (turn * turn + 3) >> 2
            flags += new_trit * new_trit * 1024
            reach = moved >> LATENT_SHIFT  # the square of the largest is 1 below this power
            flags += ((reach * reach + 2 * LATENT_MAX + 1) >> (14 - 2 * LATENT_SHIFT)) << 20
            counts += tl.sum(tl.reshape(flags, (BLOCK_N, 4, GROUP // 4)), 2)

        tl.store(latent_ptr + offset, moved.to(tl.int8), inside)
        tl.store(momentum_ptr + offset, momentum.to(tl.int8), inside)
        tl.store(group_ptr, exponent.to(tl.int8), in_rows)
        tl.atomic_add(row_sums_ptr + row, row_sum, in_rows, sem="relaxed")
        tl.atomic_add(row_sums_ptr + N + row, scale_sum, in_rows, sem="relaxed")
        grad_ptr += BLOCK_N * K
        latent_ptr += BLOCK_N * K
        momentum_ptr += BLOCK_N * K

    total = tl.sum(col_sum, 0)
    tl.atomic_add(col_sums_ptr + col, total, in_cols, sem="relaxed")
    tl.atomic_add(col_sums_ptr + K, tl.sum(total, 0), sem="relaxed")
    if COUNT:
        flips = tl.sum(tl.sum(counts & 1023, 1), 0)
        nonzeros = tl.sum(tl.sum((counts >> 10) & 1023, 1), 0)
        saturated = tl.sum(tl.sum(counts >> 20, 1), 0)
        tl.atomic_add(counters_ptr, flips.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + 1, -nonzeros.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + 2, saturated.to(tl.int64), sem="relaxed")


@triton.jit
def clamped_floor(x, y, limit):
    """int32 floor(x * y) within +-`limit` < 2^22, float32 x [B, L], y [1, L]: exact.

    One multiply-add that rounds down: the sum of the exact product and 1.5 * 2^23 counts in ones.
    Products too large for that lie beyond the limit on the right side, for rounding is monotone.
    """
    if INTERPRET:
        product = tl.floor(x.to(tl.float64) * y.to(tl.float64))
        return tl.minimum(tl.maximum(product, -limit), limit).to(tl.int32)
    total = tl.inline_asm_elementwise(
        "fma.rm.f32 $0, $1, $2, 0f4B400000;",
        "=f,f,f",
        [x, tl.broadcast_to(y, x.shape)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    reach = limit.to(tl.float32)
    total = tl.minimum(tl.maximum(total, _MAGIC - reach), _MAGIC + reach)
    return total.to(tl.int32, bitcast=True) - _MAGIC_BITS
