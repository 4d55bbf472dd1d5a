"""Each position beside those before it. Plain differentiable torch: the specification.

Shape letters: B sequences, T positions, D width, W positions of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_window(x_BTD: Tensor, size: int) -> Tensor:
    """[B, T, W * D]: positions t - W + 1 .. t side by side, zeros before the start."""
    length = x_BTD.shape[1]
    padded = F.pad(x_BTD, (0, 0, size - 1, 0))
    return torch.cat([padded[:, i : i + length] for i in range(size)], dim=-1)
