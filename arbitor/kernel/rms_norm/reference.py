"""Gain-free RMSNorm (Zhang and Sennrich 2019, without the gain), forward and backward.

Shape letters: M positions, K features.
"""

import torch
from torch import Tensor

EPSILON = 1e-6


def rms_norm_forward(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """float32 x / rms(x) [M, K] and the float32 inverse rms [M]; statistics in float32."""
    x_MK = x_MK.float()
    inverse_rms_M = torch.rsqrt(x_MK.square().mean(dim=-1) + EPSILON)
    return x_MK * inverse_rms_M.unsqueeze(-1), inverse_rms_M


def rms_norm_backward(grad_MK: Tensor, normalized_MK: Tensor, inverse_rms_M: Tensor) -> Tensor:
    """Gradient with respect to x: (g - x_hat * mean(g * x_hat)) / rms, float32 [M, K]."""
    projection_M1 = (grad_MK * normalized_MK).mean(dim=-1, keepdim=True)
    return (grad_MK - normalized_MK * projection_M1) * inverse_rms_M.unsqueeze(-1)
