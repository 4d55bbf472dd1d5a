"""Gain-free RMSNorm with quantization of its result, on the backend in use.

A gated norm takes gate and up, [M, X = 2 K], and normalizes their SwiGLU.
Shape letters: M positions, K features, X columns of the input. Triton is imported where it runs: a
CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import quantize_activation
from arbitor.kernel.rms_norm import reference
from arbitor.kernel.swiglu.reference import swiglu_backward, swiglu_forward


def normalize(
    x_MX: Tensor, activation: str, for_backward: bool, gated: bool = False
) -> tuple[Quantized, Quantized | None, Tensor]:
    """Codes of x / rms(x), the same codes as backward wants to have them saved, inverse rms [M].

    On a GPU the saved codes have their positions contiguous, else they are the codes themselves.
    """
    if runs_triton(x_MX):
        from arbitor.kernel.rms_norm import triton

        count_path("rms_norm.forward", "triton")
        return triton.rms_norm_quantize(x_MX, activation, for_backward, gated)
    count_path("rms_norm.forward", "torch")
    x_MK = swiglu_forward(x_MX) if gated else x_MX
    normalized_MK, inverse_rms_M = reference.rms_norm_forward(x_MK)
    x = quantize_activation(normalized_MK, activation)
    return x, x if for_backward else None, inverse_rms_M


def normalize_backward(
    grad_MK: Tensor,
    x: Quantized,
    inverse_rms_M: Tensor,
    dtype: torch.dtype,
    gate_and_up_MX: Tensor | None = None,
    residual_MX: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the input, in `dtype`, [M, 2 K] of a gated norm, else [M, K].

    The quantizer passes it on unchanged. A gated norm needs its input again. `residual` is what
    reaches the input on another way and is added.
    """
    if runs_triton(grad_MK):
        from arbitor.kernel.rms_norm import triton

        count_path("rms_norm.backward", "triton")
        return triton.rms_norm_backward_x(
            grad_MK, x, inverse_rms_M, dtype, gate_and_up_MX, residual_MX
        )
    count_path("rms_norm.backward", "torch")
    grad_MX = reference.rms_norm_backward(grad_MK, x.values(), inverse_rms_M)
    if gate_and_up_MX is not None:
        grad_MX = swiglu_backward(grad_MX, gate_and_up_MX)
    if residual_MX is not None:
        grad_MX += residual_MX
    return grad_MX.to(dtype)
