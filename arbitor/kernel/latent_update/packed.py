"""Latents of 6 bits and momentum of 4: how they are stored, and back to the int8 of the update.

A row of latents is its lower nibbles, two a byte, then its upper bit pairs, four a byte; a row of
momentum is nibbles alone. The first element of a byte has its lowest bits; two's complement.
Shape letters: N rows (outputs), K columns (inputs).
"""

from dataclasses import replace

import torch
from torch import Tensor

from arbitor.kernel.latent_update.state import GroupedState, TernaryState
from arbitor.kernel.state_format import StateFormat


def stored_state(plain: TernaryState, format: StateFormat) -> TernaryState:
    """A fresh state (`init_state`) in its format; its latents are rounded to the coarser grid."""
    state = plain
    if format.latent_bits == 6:
        # To nearest, halves away from 0: 21 to 20 and 22 to 24, so every trit stays what it was.
        magnitude = (plain.latent.abs().clamp_(max=format.largest_latent) + 2) & ~3
        latent = plain.latent.sign() * magnitude
        state = replace(state, latent=pack_latent(latent))
    if format.momentum_bits == 4:
        state = replace(state, momentum=pack_nibbles(plain.momentum))
    if format.group_size:
        num_rows, num_cols = plain.latent.shape
        num_groups = -(-num_cols // format.group_size)
        exponents = plain.latent.new_zeros(num_rows, num_groups)
        state = GroupedState(**vars(state), group_exponent=exponents)
    return state


def plain_state(state: TernaryState, format: StateFormat, num_cols: int) -> TernaryState:
    """int8 latents and momentum for an update; every other tensor is the state's own."""
    latent = unpack_latent(state.latent, num_cols) if format.latent_bits == 6 else state.latent
    momentum = state.momentum
    if format.momentum_bits == 4:
        momentum = unpack_nibbles(momentum, num_cols)
    return replace(state, latent=latent, momentum=momentum)


def store_(state: TernaryState, plain: TernaryState, format: StateFormat) -> None:
    """Takes latents and momentum of an update back into the state, in place."""
    if format.latent_bits == 6:
        state.latent.copy_(pack_latent(plain.latent))
    if format.momentum_bits == 4:
        state.momentum.copy_(pack_nibbles(plain.momentum))


def pack_latent(latent_NK: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 2) + ceil(K / 4)] of int8 multiples of 4."""
    codes = latent_NK.view(torch.uint8) >> 2  # 6 bits
    return torch.cat([_pack(codes & 15, 4), _pack(codes >> 4, 2)], dim=1)


def unpack_latent(packed: Tensor, num_cols: int) -> Tensor:
    """int8 [N, K] multiples of 4."""
    nibbles, pairs = packed.split([-(-num_cols // 2), -(-num_cols // 4)], dim=1)
    low, high = _unpack(nibbles, 4, num_cols), _unpack(pairs, 2, num_cols)
    return (low << 2 | high << 6).view(torch.int8)


def pack_nibbles(x_NK: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 2)] of int8 -8 to 7."""
    return _pack(x_NK.view(torch.uint8) & 15, 4)


def unpack_nibbles(packed: Tensor, num_cols: int) -> Tensor:
    """int8 [N, K] of `pack_nibbles`."""
    return (_unpack(packed, 4, num_cols) << 4).view(torch.int8) >> 4


def _pack(codes_NK: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits, 8 / bits of them a byte."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes_NK, (0, -codes_NK.shape[1] % per_byte))
    packed = codes[:, ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[:, place::per_byte] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int, num_cols: int) -> Tensor:
    parts = [packed >> shift for shift in range(0, 8, bits)]
    codes = torch.stack(parts, dim=2).flatten(1)[:, :num_cols]
    return (codes & ((1 << bits) - 1)).contiguous()
