"""Rounding and scaling steps that the Triton kernels share.

Each does what `matmul/quantize.py` does with the same bits in and out, on a GPU and in Triton's
interpreter.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Adding and taking off 1.5 * 2^p rounds a float32 to a multiple of 2^(p - 23), ties to even.
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
_TO_SMALLEST_E4M3 = tl.constexpr(1.5 * 2.0**14)
_LOG2_LARGEST_CODE = tl.constexpr(7)


@triton.jit
def e4m3_bits(x):
    """The bits, as int8, of float32 |x| < 448 rounded to the nearest float8_e4m3fn, ties to even.

    Never a float8 tensor: Triton 3.6 gets those wrong between layouts on sm_90 (seen at 65 columns,
    and in transposed stores). The interpreter forgets the carry out of the mantissa when it casts,
    so there x is rounded before.
    """
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + _TO_SMALLEST_E4M3) - _TO_SMALLEST_E4M3
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
        return x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    pair = tl.inline_asm_elementwise(
        "{ .reg .b16 p; cvt.rn.satfinite.e4m3x2.f32 p, 0f00000000, $1; cvt.u32.u16 $0, p; }",
        "=r,f",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return pair.to(tl.int8)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """float32 to bfloat16 (ties to even) or float32; the interpreter alone would cut bits off."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def round_half_even(x):
    """float32 |x| < 2^22 to the nearest integer, as float32."""
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def power_of_two(exponent):
    """float32 2^exponent of int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(largest):
    """Exponent of the power-of-two scale that puts float32 `largest` into [128, 256)."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127 - _LOG2_LARGEST_CODE
    return tl.minimum(tl.maximum(exponent, -126), 126)


@triton.jit
def widen(x):
    """float32 of bfloat16 (or float32), by its bits: the interpreter gets subnormals wrong."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def loop_bound(x):
    """x, an integer up to which a kernel counts: the interpreter needs a Python number."""
    if INTERPRET:
        return x if isinstance(x, int) else x.handle.data.item()
    return x


@triton.jit
def dot(a, b, accumulator=None):
    """float32 matmul of bfloat16 operands, which the interpreter takes for integers."""
    if INTERPRET:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, accumulator)
