"""Slot conversion and update on the backend in use.

Shape letters: N rows (outputs), K columns (inputs). Triton is imported where it runs: a CPU needs
none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.latent_update import reference
from arbitor.kernel.latent_update.moments import StepRates
from arbitor.kernel.latent_update.slots import SlotFormat, quantize_slot
from arbitor.kernel.latent_update.state import TernaryState


def add_slot(
    grad_NK: Tensor,
    row_exponent_N: Tensor,
    fmt: SlotFormat,
    key: int,
    sum_NK: Tensor,
    counters: Tensor,
) -> None:
    """Adds one slot's gradient as integers to `sum_NK`, of `fmt.sum_dtype`.

    Adds its numbers of non-finite and clipped entries to `counters`, int64 [2].
    """
    if runs_triton(grad_NK):
        from arbitor.kernel.latent_update.triton import quantize_slot_

        count_path("slot", "triton")
        quantize_slot_(grad_NK, row_exponent_N, fmt, key, sum_NK, counters)
        return
    count_path("slot", "torch")
    integers, nonfinite, clipped = quantize_slot(grad_NK.float(), row_exponent_N, fmt, key)
    sum_NK += integers
    counters += torch.tensor([nonfinite, clipped], device=counters.device)


def update(
    state: TernaryState,
    grad_sum_NK: Tensor,
    fmt: SlotFormat,
    rates: StepRates,
    key: int,
    updates: int,
    counters: Tensor,
) -> None:
    """The state's update number `updates` (from 1 on), in place.

    Adds the numbers of flipped trits, zero trits and saturated latents to `counters`, int64 [3].
    """
    if runs_triton(state.latent):
        from arbitor.kernel.latent_update.triton import update_

        count_path("update", "triton")
        update_(state, grad_sum_NK, fmt, rates, key, updates, counters)
        return
    count_path("update", "torch")
    stats = reference.update(state, grad_sum_NK, fmt, rates, key)
    counters += torch.tensor([stats.flips, stats.zeros, stats.saturated], device=counters.device)
