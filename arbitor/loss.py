"""Losses of the slots, by modality.

Shape letters: B sequences, T positions, V symbols.
"""

from torch import Tensor

from arbitor.kernel.cross_entropy.op import cross_entropy


def symbol_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats per symbol over the positions that have a target, in float32."""
    return cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
