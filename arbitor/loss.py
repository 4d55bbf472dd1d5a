"""Losses of the slots, by modality.

Shape letters: B sequences, T positions, V symbols.
"""

import torch.nn.functional as F
from torch import Tensor

from arbitor.batch import NO_TARGET


def symbol_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats per symbol over the positions that have a target, in float32."""
    return F.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=NO_TARGET
    )
