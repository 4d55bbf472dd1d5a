"""Noise and times of a slot from (seed, step, slot), by the integer hash of the update rule.

Step and slot lie on the device: a recorded slot that is replayed gets the noise of its own step.
"""

import math

import torch
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import (
    counter_hash,
    signed_word,
    substream_key,
    tensor_id,
)


def noise_key(step_and_slot: Tensor, seed: int) -> Tensor:
    """int32 [1]: the key of a slot's noise; `step_and_slot` is int32 [2]."""
    start = signed_word(substream_key(seed, tensor_id("video_head.noise")))
    of_step = counter_hash(step_and_slot[:1] ^ start, 0)
    return counter_hash(of_step ^ step_and_slot[1:], 0)


def uniform_words(count: int, key: Tensor) -> Tensor:
    """int32 [count]: 24 random bits each."""
    index = torch.arange(count, dtype=torch.int32, device=key.device)
    return (counter_hash(index ^ key, 0) >> 8) & 0xFFFFFF


def gaussian(count: int, key: Tensor) -> Tensor:
    """float32 [count], of mean 0 and variance 1 (Box and Muller 1958)."""
    half = -(-count // 2)
    uniform = (uniform_words(2 * half, key).float() + 0.5) * 2.0**-24
    radius = (-2 * uniform[:half].log()).sqrt()
    angle = 2 * math.pi * uniform[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
