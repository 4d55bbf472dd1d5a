"""Fixed-point arithmetic of the update rule: random bits, logarithms, moments, slot gradients.

Every function gives the same bits on every device and with every number of threads. Tables are
computed in Python integers, because libm and the device libraries promise no particular last bit.

Units: a "q16 octave" is 1/65536 of a factor of two; a moment is a log2 rms in 1/256 octave.
"""

import hashlib
from fractions import Fraction
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

# Streams of random numbers that one (seed, step, tensor) owns; the update derives its own
# sub-streams from STREAM_UPDATE, and slot j rounds with STREAM_SLOT + j.
STREAM_UPDATE = 0
STREAM_INIT = 1
STREAM_SLOT = 8

SEEDS = range(1 << 32)
EXACT_BITS = 36
BLOCK_ELEMENTS = 1 << 17  # a block and its temporaries stay near the caches

MOMENT_MIN, MOMENT_MAX = -32768, 32767
LOG2_OF_ZERO = -(64 << 16)

_UINT32 = 0xFFFFFFFF
_MIX_FIRST = 0x7FEB352D
_MIX_SECOND = 0x846CA68B


# ---- random numbers: a hash of (seed, step, tensor, stream, element) ----------------------------


def tensor_id(qualified_name: str) -> int:
    """32-bit identity of a tensor, from its qualified name alone."""
    digest = hashlib.blake2b(qualified_name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def stream_key(seed: int, step: int, tensor_id: int, stream: int) -> int:
    """32-bit key of one stream of random numbers; all four arguments in [0, 2^32)."""
    key = 0
    for word in (seed, step, tensor_id, stream):
        key = substream_key(key, word)
    return key


def substream_key(key: int, word: int) -> int:
    """Key of a stream inside the stream `key`; `word` in [0, 2^32)."""
    assert 0 <= word <= _UINT32, f"{word} is no 32-bit word"
    return mix(key ^ word)


def signed_word(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word


def unsigned_word(word: int) -> int:
    """Inverse of `signed_word`."""
    return word & _UINT32


def mix(word: int) -> int:
    """The 32-bit finalizer "lowbias32" (Wellons, hash prospector), on a Python integer."""
    word ^= word >> 16
    word = (word * _MIX_FIRST) & _UINT32
    word ^= word >> 15
    word = (word * _MIX_SECOND) & _UINT32
    return word ^ (word >> 16)


def counter_hash(index: Tensor, key: int) -> Tensor:
    """`mix(index ^ key)` of an int32 tensor, as int32 (the 32 bits, whatever the sign).

    torch has no unsigned multiply or logical shift: int32 products wrap, and the mask after each
    arithmetic shift drops the copies of the sign.
    """
    word = index ^ signed_word(key)
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    word *= _MIX_FIRST
    word ^= (word >> 15).bitwise_and_(0x1FFFF)
    word *= signed_word(_MIX_SECOND)
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    return word


def low_bits(word: Tensor) -> Tensor:
    """The lower 16 bits of a hash, 0 to 65535."""
    return word & 0xFFFF


def element_index(rows: range, num_cols: int, width: int, device: torch.device) -> Tensor:
    """int32 [len(rows), width]: row * num_cols + column, modulo 2^32 as the hash reads it."""
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device).unsqueeze(1)
    return row * num_cols + torch.arange(width, dtype=torch.int32, device=device)


# ---- logarithms and powers of two ---------------------------------------------------------------


def _pow2_table(fraction_bits: int) -> Tensor:
    """int32 [256]: round(2^(f/256) * 2^fraction_bits); eight integer square roots are exact."""
    values = []
    for f in range(256):
        root = 1 << (f + 256 * (fraction_bits + 1))
        for _ in range(8):
            root = isqrt(root)
        values.append((root + 1) >> 1)
    return torch.tensor(values, dtype=torch.int32)


def _log2_table() -> Tensor:
    """int64 [257]: round(65536 * log2(1 + i/256)), one binary digit per squaring.

    128 fraction bits keep the error of 17 squarings below 2^-100.
    """
    values = []
    for i in range(256):
        mantissa, digits = (256 + i) << 120, 0
        for _ in range(17):
            mantissa = (mantissa * mantissa) >> 128
            carry = mantissa >> 129
            mantissa >>= carry
            digits = 2 * digits + carry
        values.append((digits + 1) >> 1)
    return torch.tensor([*values, 65536], dtype=torch.int64)


POW2_Q11 = _pow2_table(11)
POW2_Q16 = _pow2_table(16)
LOG2_Q16 = _log2_table()


def bit_length(x: Tensor) -> Tensor:
    """int64: number of bits of each x >= 0 of any integer dtype; 0 for 0.

    Read from the exponent of the double of x; clearing the bit below the top one first keeps the
    conversion from rounding up to the next power of two.
    """
    top = x & ~(x >> 1)
    return ((top.double().view(torch.int64) >> 52) - 1022).clamp_(min=0)


def ilog2(x: Tensor) -> Tensor:
    """log2 of int64 x >= 0 in q16 octaves (int64), within 2.3e-5 octave; -64 octaves for 0."""
    characteristic = bit_length(x) - 1
    mantissa = (x << (24 - characteristic).clamp(min=0)) >> (characteristic - 24).clamp(min=0)
    fraction = (mantissa - (1 << 24)).clamp_(min=0)
    table = LOG2_Q16.to(x.device)
    cell, remainder = fraction >> 16, fraction & 0xFFFF
    low = table[cell]
    log2 = (characteristic << 16) + low + (((table[cell + 1] - low) * remainder) >> 16)
    return torch.where(x > 0, log2, LOG2_OF_ZERO)


@lru_cache(maxsize=4096)
def log2_fraction(x: Fraction | int) -> int:
    """log2 of an exact number in (0, 2^60), in q16 octaves: `ilog2` of its leading 60 bits."""
    x = Fraction(x)
    shift = max(0, 60 - x.numerator.bit_length() + x.denominator.bit_length())
    leading = (x.numerator << shift) // x.denominator
    return int(ilog2(torch.tensor(leading))) - (shift << 16)


def shift_left(x: Tensor, places: Tensor) -> Tensor:
    """x << places, or the arithmetic x >> -places where `places` is negative."""
    return (x << places.clamp(min=0)) >> (-places).clamp(min=0)


def float32_power_of_two(exponent: Tensor) -> Tensor:
    """float32 2^exponent of int32 exponents in [-126, 127], built from its bits."""
    return ((exponent + 127) << 23).view(torch.float32)


# ---- running moments ----------------------------------------------------------------------------


def moment_memory(num_updates: int) -> int:
    """Weight of the past in 1/256 at update t = `num_updates` >= 1: a running mean, then 0.95.

    Starting as a mean leaves nothing for a bias correction to do.
    """
    return min(243, 256 * (num_updates - 1) // num_updates)


def advance_moment(moment: Tensor, log2_mean_square: Tensor, memory: int, noise: Tensor) -> Tensor:
    """One exponential step of a second moment that is kept as a logarithm.

    `moment` int16 (log2 rms, 1/256 octave), `log2_mean_square` int64 of the new value in q16
    octaves, `noise` a hash. Computes log2(memory/256 * 1 + (1 - memory/256) * 2^d) with d the new
    value over the old one, kept to [-30, 24] octaves; a step is often below 1/256 octave, hence
    the stochastic rounding. Returns int16.
    """
    old = moment.long()
    ratio = (log2_mean_square - (old << 9)).clamp_(-30 << 16, 24 << 16) >> 8
    power = POW2_Q16.to(moment.device)[ratio & 255].long() * (256 - memory)
    mixed = (memory << 16) + shift_left(power, ratio >> 8)
    step = (ilog2(mixed) - (24 << 16) + (noise & 511)) >> 9
    return (old + step).clamp_(MOMENT_MIN, MOMENT_MAX).to(torch.int16)
