"""Slot conversion and update on the backend in use.

Shape letters: N rows (outputs), K columns (inputs). Triton is imported where it runs: a CPU needs
none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.latent_update import reference
from arbitor.kernel.latent_update.fixed_point import unsigned_word
from arbitor.kernel.latent_update.group_exponents import move_group_exponents
from arbitor.kernel.latent_update.moments import rates_and_key
from arbitor.kernel.latent_update.packed import plain_state, store_
from arbitor.kernel.latent_update.slots import SlotFormat, quantize_slot, row_exponents
from arbitor.kernel.latent_update.state import GroupedState, TernaryState
from arbitor.kernel.state_format import StateFormat


def add_slot(
    grad_NK: Tensor,
    row_moment_N: Tensor,
    slot_format: SlotFormat,
    key: Tensor,
    sum_NK: Tensor,
    counters: Tensor,
) -> None:
    """Adds one slot's gradient as integers to `sum_NK`, of `slot_format.sum_dtype`.

    `row_moment_N` int16 is the state's; `key` int32 [1] the slot's stream as a signed word.
    Adds its numbers of non-finite and clipped entries to `counters`, int64 [2].
    """
    if runs_triton(grad_NK):
        from arbitor.kernel.latent_update.triton import quantize_slot_

        count_path("slot", "triton")
        quantize_slot_(grad_NK, row_moment_N, slot_format, key, sum_NK, counters)
        return
    count_path("slot", "torch")
    exponent_N, word = row_exponents(row_moment_N, slot_format), unsigned_word(key.item())
    integers, nonfinite, clipped = quantize_slot(grad_NK.float(), exponent_N, slot_format, word)
    sum_NK += integers
    counters += torch.tensor([nonfinite, clipped], device=counters.device)


def update(
    state: TernaryState,
    grad_sum_NK: Tensor,
    slot_format: SlotFormat,
    words: Tensor,
    counters: Tensor,
    state_format: StateFormat,
) -> None:
    """The next update of the state, in place; `words` int32 [7] are those of `update_words`.

    Adds the numbers of flipped trits, zero trits and saturated latents to `counters`, int64 [3].
    Packed latents and momentum become int8 for the time of it.
    """
    plain = plain_state(state, state_format, grad_sum_NK.shape[1])
    if runs_triton(plain.latent):
        from arbitor.kernel.latent_update.triton import update_

        count_path("update", "triton")
        update_(plain, grad_sum_NK, slot_format, words, counters, state_format)
    else:
        count_path("update", "torch")
        rates, key = rates_and_key(words.tolist())
        stats = reference.update(plain, grad_sum_NK, slot_format, rates, key, state_format)
        counts = [stats.flips, stats.zeros, stats.saturated]
        counters += torch.tensor(counts, device=counters.device)
    if isinstance(plain, GroupedState):
        move_group_exponents(plain, state_format.group_size, words)
    store_(state, plain, state_format)
