"""The state of one weight matrix under the `bigint` rule.

Shape letters: N rows (outputs), K columns (inputs), G groups = ceil(K / group_size), Q bytes of a
row of the 2-bit plane.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.kernel.correlation.reference import group_log2_scale, num_groups
from arbitor.kernel.latent_update.state import init_state, trits
from arbitor.kernel.matmul.plane import pack_plane


@dataclass
class CorrelationState:
    """Integers; trits and row scales never change."""

    plane: Tensor  # uint8 [N, Q], the trits as `matmul/plane.py` packs them
    log2_scale: Tensor  # int16 [N], E in 1/256 octave
    corr_accum: Tensor  # int64 [N, G], sums of sign(gradient) * trit
    step_counter: Tensor  # int64 [1], slots so far: the same for every group


def init_correlation_state(
    num_rows: int, num_cols: int, gain: float, seed: int, name: str, group_size: int
) -> CorrelationState:
    """Trits and row scales of `init_state`; every group at its row's scale."""
    start = init_state(num_rows, num_cols, gain, seed, name)
    return CorrelationState(
        plane=pack_plane(trits(start.latent)),
        log2_scale=start.log2_scale,
        corr_accum=torch.zeros(num_rows, num_groups(num_cols, group_size), dtype=torch.int64),
        step_counter=torch.zeros(1, dtype=torch.int64),
    )


def relative_log2_scale(state: CorrelationState, group_size: int) -> Tensor:
    """int16 [N, G]: log2 of the groups' scales over their row's, in 1/256 octave."""
    own = torch.zeros_like(state.log2_scale).unsqueeze(1)
    return group_log2_scale(own, state.corr_accum, state.step_counter, group_size)
