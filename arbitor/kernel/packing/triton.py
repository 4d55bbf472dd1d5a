"""Base-3 packing on a GPU: the same bytes, trits and refusals as `reference.py`, its oracle.

Both functions wait for the device to say whether a value was out of range; checkpoints and the
start of inference can afford that. README.md has the layout and the roofline.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.packing import reference
from arbitor.kernel.packing.reference import TRITS_PER_BYTE

BLOCK_PACK = 512  # bytes a program
BLOCK_UNPACK = 2048  # trits a program


def pack_base3(trits: Tensor) -> Tensor:
    """uint8 [ceil(n/5)] of n int8 trits on a GPU; see `reference.pack_base3`."""
    flat = trits.contiguous().flatten()
    num_bytes = -(-flat.numel() // TRITS_PER_BYTE)
    packed = torch.empty(num_bytes, dtype=torch.uint8, device=trits.device)
    refused = torch.zeros(1, dtype=torch.int32, device=trits.device)
    if num_bytes:
        grid = (triton.cdiv(num_bytes, BLOCK_PACK),)
        pack_base3_kernel[grid](flat, packed, refused, flat.numel(), num_bytes, BLOCK=BLOCK_PACK)
    return reference.pack_base3(trits) if refused.item() else packed


def unpack_base3(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """int8 trits of `shape` from bytes on a GPU; see `reference.unpack_base3`."""
    num_trits = math.prod(shape)
    if packed.numel() != -(-num_trits // TRITS_PER_BYTE):
        return reference.unpack_base3(packed, shape)
    trits = torch.empty(tuple(shape), dtype=torch.int8, device=packed.device)
    refused = torch.zeros(1, dtype=torch.int32, device=packed.device)
    if num_trits:
        grid = (triton.cdiv(num_trits, BLOCK_UNPACK),)
        unpack_base3_kernel[grid](
            packed.contiguous(), trits, refused, num_trits, BLOCK=BLOCK_UNPACK
        )
    return reference.unpack_base3(packed, shape) if refused.item() else trits


@triton.jit
def pack_base3_kernel(
    trits_ptr, packed_ptr, refused_ptr, num_trits, num_bytes, BLOCK: tl.constexpr
):
    """A thread reads the five trits of its byte, the last first."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros((BLOCK,), tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for place in tl.static_range(5):
        trit_index = 5 * index + (4 - place)
        code = tl.load(trits_ptr + trit_index, trit_index < num_trits, -1).to(tl.int32) + 1
        largest = tl.maximum(largest, tl.abs(code - 1))
        byte = 3 * byte + code
    tl.store(packed_ptr + index, byte.to(tl.uint8), index < num_bytes)
    if tl.max(largest, 0) > 1:
        tl.store(refused_ptr, 1)


@triton.jit
def unpack_base3_kernel(packed_ptr, trits_ptr, refused_ptr, num_trits, BLOCK: tl.constexpr):
    """A thread a trit: byte / 3^place as a product with 65536 / 3^place, rounded up, is exact."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_trits
    byte_index = index // 5
    place = (index - 5 * byte_index).to(tl.int32)
    byte = tl.load(packed_ptr + byte_index, inside, 0).to(tl.int32)
    inverse = tl.where(place == 0, 65536, tl.where(place == 1, 21846, 7282))
    inverse = tl.where(place == 3, 2428, tl.where(place == 4, 810, inverse))
    digits = (byte * inverse) >> 16
    code = digits - 3 * ((digits * 21846) >> 16)
    tl.store(trits_ptr + index, (code - 1).to(tl.int8), inside)
    if tl.max(byte, 0) > 242:
        tl.store(refused_ptr, 1)
