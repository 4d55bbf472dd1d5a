"""Words, tables and the hash of `fixed_point`, their oracle, as the Triton kernels need them."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import LOG2_Q16, POW2_Q11, POW2_Q16


@lru_cache(maxsize=64)
def device_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """POW2_Q11, POW2_Q16 and LOG2_Q16 on a device; copied there once."""
    return POW2_Q11.to(device), POW2_Q16.to(device), LOG2_Q16.to(device)


@triton.jit
def row_exponent(moment, R0: tl.constexpr):
    """int32 `row_exponents` of int16 moments."""
    return tl.minimum(tl.maximum(R0 - ((moment.to(tl.int32) + 128) >> 8), -100), 100)


@triton.jit
def hash_word(word):
    """uint32 `mix` of a 32-bit integer tensor."""
    word = word.to(tl.uint32)
    word ^= word >> 16
    word = word * 0x7FEB352D
    word ^= word >> 15
    word = word * 0x846CA68B
    return word ^ (word >> 16)
