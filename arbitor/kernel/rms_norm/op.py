"""Gain-free RMSNorm with quantization of its result, on the backend in use.

Shape letters: M positions, K features. Triton is imported where it runs: a CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import quantize_activation
from arbitor.kernel.rms_norm import reference


def normalize(
    x_MK: Tensor, activation: str, for_backward: bool
) -> tuple[Quantized, Quantized | None, Tensor]:
    """Codes of x / rms(x), the same codes as backward wants to have them saved, inverse rms [M].

    On a GPU the saved codes have their positions contiguous, else they are the codes themselves.
    """
    if runs_triton(x_MK):
        from arbitor.kernel.rms_norm import triton

        count_path("rms_norm.forward", "triton")
        return triton.rms_norm_quantize(x_MK, activation, for_backward)
    count_path("rms_norm.forward", "torch")
    normalized_MK, inverse_rms_M = reference.rms_norm_forward(x_MK)
    x = quantize_activation(normalized_MK, activation)
    return x, x if for_backward else None, inverse_rms_M


def normalize_backward(
    grad_MK: Tensor, x: Quantized, inverse_rms_M: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient with respect to the norm's input, [M, K] in `dtype`; the quantizer passes it on."""
    if runs_triton(grad_MK):
        from arbitor.kernel.rms_norm import triton

        count_path("rms_norm.backward", "triton")
        return triton.rms_norm_backward_x(grad_MK, x, inverse_rms_M, dtype)
    count_path("rms_norm.backward", "torch")
    return reference.rms_norm_backward(grad_MK, x.values(), inverse_rms_M).to(dtype)
