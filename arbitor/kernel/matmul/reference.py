"""Ternary matmul with eight-bit activations: the oracle, and the fast path on a CPU.

y[m, n] = 2^s[n] * scale[m] * sum_k codes[m, k] * trit[n, k]

The operands are bfloat16, which holds codes and trits exactly. The row scale 2^s is in neither of
them: it multiplies the accumulator. Shape letters: M positions, N outputs, K inputs.
"""

import torch
from torch import Tensor

from arbitor.kernel.matmul.quantize import Quantized, quantize_fp8, quantize_int8


def quantize_activation(normalized_MK: Tensor, activation: str) -> Quantized:
    """One scale per position over float32 [M, K]; `activation` is "fp8" (e4m3) or "int8"."""
    if activation == "int8":
        return quantize_int8(normalized_MK, axis=1)
    return quantize_fp8(normalized_MK, axis=1)


def matmul_forward(x: Quantized, trits_NK: Tensor, row_scale_N: Tensor) -> Tensor:
    """bfloat16 y [M, N]; trits are bfloat16 -1, 0, 1 and row_scale is float32."""
    accumulator_MN = (x.operand() @ trits_NK.T).float()
    return accumulator_MN.mul_(x.scale * row_scale_N).to(torch.bfloat16)


def matmul_backward_x(
    grad_MN: Tensor, trits_NK: Tensor, row_scale_N: Tensor, activation: str
) -> Tensor:
    """float32 gradient with respect to the dequantized input [M, K].

    The row scale is folded into the gradient before it is quantized per position. With int8
    activations the gradient stays bfloat16: int8 gradients cost 0.06 nats, fp8 ones nothing.
    """
    scaled_MN = grad_MN.float().mul_(row_scale_N)
    if activation == "int8":
        return (scaled_MN.to(torch.bfloat16) @ trits_NK).float()
    grad = quantize_fp8(scaled_MN, axis=1)
    return (grad.operand() @ trits_NK).float().mul_(grad.scale)


def matmul_backward_weight(grad_MN: Tensor, x: Quantized, activation: str) -> Tensor:
    """float32 gradient with respect to the effective weight 2^s * trit, [N, K].

    The positions' scales sit on the contracted axis, so they are folded into the gradient before it
    is quantized per output feature.
    """
    scaled_MN = grad_MN.float().mul_(x.scale)
    if activation == "int8":
        return (scaled_MN.to(torch.bfloat16).T @ x.operand()).float()
    grad = quantize_fp8(scaled_MN, axis=0)
    return (grad.operand().T @ x.operand()).float().mul_(grad.scale.T)
