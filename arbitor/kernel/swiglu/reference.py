"""SwiGLU (Shazeer 2020), silu(gate) * up, and its gradient; float32 throughout.

No kernel of its own: it runs inside the norm that follows, `rms_norm/triton.py`.
Shape letters: M positions, K gated features, X = 2 K: the gates, then what they let through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_forward(gate_and_up_MX: Tensor) -> Tensor:
    """float32 gate * sigmoid(gate) * up, [M, K]."""
    gate_MK, up_MK = gate_and_up_MX.float().chunk(2, dim=-1)
    return F.silu(gate_MK).mul_(up_MK)


def swiglu_backward(grad_MK: Tensor, gate_and_up_MX: Tensor) -> Tensor:
    """float32 gradient with respect to gate and up, [M, 2 K]."""
    gate_MK, up_MK = gate_and_up_MX.float().chunk(2, dim=-1)
    sigmoid_MK = gate_MK.sigmoid()
    silu_MK = gate_MK * sigmoid_MK
    slope_MK = sigmoid_MK + silu_MK * (1 - sigmoid_MK)
    return torch.cat([grad_MK * up_MK * slope_MK, grad_MK * silu_MK], dim=-1)
