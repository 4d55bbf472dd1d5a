"""A weight that no longer learns: its trits as a 2-bit plane and its scales, for generation.

Shape letters: N rows (outputs), K columns (inputs), Q bytes of a row of the plane, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.kernel.latent_update.group_exponents import spread_over_groups
from arbitor.kernel.matmul import op as matmul


@dataclass
class PackedState:
    """Two bits a weight and 16 a row."""

    plane: Tensor  # uint8 [N, Q], `matmul/plane.py`
    log2_scale: Tensor  # int16 [N], 1/256 octave


@dataclass
class GroupedPackedState(PackedState):
    """With scales of groups of weights, relative to their row's."""

    group_scale: Tensor  # [N, G], int8 whole octaves or int16 1/256 octave


def scaled_operand(trits_NK: Tensor, group_scale_NG: Tensor | None, group_size: int) -> Tensor:
    """bfloat16 [N, K]: trits, times their group's scale (as in the packed state) if it has one."""
    operand_NK = trits_NK.to(torch.bfloat16)
    if group_scale_NG is not None:
        octaves = 1 if group_scale_NG.dtype == torch.int16 else 256
        log2_scale_NG = (group_scale_NG.int() * octaves).to(torch.int16)
        scale_NG = matmul.row_scale(log2_scale_NG.flatten()).view_as(log2_scale_NG)
        scale_NG = scale_NG.to(torch.bfloat16)
        operand_NK *= spread_over_groups(scale_NG, group_size, trits_NK.shape[1])
    return operand_NK
