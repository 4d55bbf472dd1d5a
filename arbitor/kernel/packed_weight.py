"""A weight that no longer learns: its trits as a 2-bit plane and its scales, for generation.

Shape letters: N rows (outputs), K columns (inputs), Q bytes of a row of the plane, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.kernel.latent_update.group_exponents import spread_over_groups
from arbitor.kernel.matmul import op as matmul
from arbitor.kernel.matmul.plane import unpack_plane


@dataclass
class PackedState:
    """Two bits a weight and 16 a row."""

    plane: Tensor  # uint8 [N, Q], `matmul/plane.py`
    log2_scale: Tensor  # int16 [N], 1/256 octave


@dataclass
class GroupedPackedState(PackedState):
    """With scales of groups of weights, relative to their row's."""

    group_scale: Tensor  # [N, G], int8 whole octaves or int16 1/256 octave


def packed_operand(state: PackedState, num_cols: int, group_size: int) -> Tensor:
    """bfloat16 [N, K]: trits, times their group's scale if it has one."""
    operand_NK = unpack_plane(state.plane, num_cols).to(torch.bfloat16)
    if isinstance(state, GroupedPackedState):
        octaves = 1 if state.group_scale.dtype == torch.int16 else 256
        log2_scale_NG = (state.group_scale.int() * octaves).to(torch.int16)
        scale_NG = matmul.row_scale(log2_scale_NG.flatten()).view_as(log2_scale_NG)
        operand_NK *= spread_over_groups(scale_NG.to(torch.bfloat16), group_size, num_cols)
    return operand_NK
