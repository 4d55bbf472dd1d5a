"""Mean cross entropy of logits against target symbols; a target below 0 is none.

Plain differentiable torch: the specification, and the path of a CPU. Shape letters: M positions,
V symbols.
"""

import torch.nn.functional as F
from torch import Tensor

from arbitor.batch import NO_TARGET


def cross_entropy(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Mean over the positions with a target, in nats, float32; NaN if there is none."""
    return F.cross_entropy(logits_MV.float(), targets_M, ignore_index=NO_TARGET)
