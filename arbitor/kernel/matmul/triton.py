"""The matmuls of a ternary linear on a GPU: operands, then cuBLASLt or a Triton kernel.

Oracle: `reference.py`, with the same codes and scales; sums differ in order and, in fp8, in the 14
bits of the tensor cores' accumulators: over all products for y and grad_x, over 128 at a time for
grad_w, whose further sum is float32.
Shape letters: M positions, N outputs, K inputs.
"""

from functools import lru_cache

import torch
from torch import Tensor

from arbitor.kernel.matmul.configs import LIBRARY, choose_gemm
from arbitor.kernel.matmul.decode_triton import decode_weight
from arbitor.kernel.matmul.gemm_triton import matmul_scaled
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.quantize_triton import quantize_gradient

# float32 would run as well (CUDA 12.9) and cost four bytes more a weight, here and in its reader.
_LIBRARY_GRADIENT = torch.bfloat16

__all__ = [
    "matmul_backward_weight",
    "matmul_backward_x",
    "matmul_forward",
    "quantize_gradient",
]


def matmul_forward(x: Quantized, latent_NK: Tensor, row_scale_N: Tensor) -> tuple[Tensor, str]:
    """bfloat16 y [M, N] and the path taken."""
    (M, K), N = x.codes.shape, latent_NK.shape[0]
    trits_NK, _ = decode_weight(latent_NK, x.codes.dtype)
    choice = choose_gemm("forward", x.codes.device, x.codes.dtype, M, N, K)
    if choice != LIBRARY:
        y_MN = matmul_scaled(x.codes, trits_NK, x.scale, row_scale_N, torch.bfloat16, choice)
        return y_MN, "triton"
    y_MN = torch._scaled_mm(
        x.codes,
        trits_NK.T,
        scale_a=x.scale,
        scale_b=row_scale_N.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_MN, "cublas"


def matmul_backward_x(grad: Quantized, latent_NK: Tensor) -> tuple[Tensor, str]:
    """bfloat16 gradient with respect to the dequantized input [M, K], and the path taken.

    `grad` is the first result of `quantize_gradient`.
    """
    (M, N), K = grad.codes.shape, latent_NK.shape[1]
    _, trits_KN = decode_weight(latent_NK, grad.codes.dtype, row_major=False, transposed=True)
    choice = choose_gemm("backward_x", grad.codes.device, grad.codes.dtype, M, K, N)
    if choice != LIBRARY:
        return matmul_scaled(
            grad.codes, trits_KN, grad.scale, None, torch.bfloat16, choice
        ), "triton"
    grad_MK = torch._scaled_mm(
        grad.codes,
        trits_KN.T,
        scale_a=grad.scale,
        scale_b=_ones(K, latent_NK.device),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return grad_MK, "cublas"


def matmul_backward_weight(grad: Quantized, x: Quantized) -> tuple[Tensor, str]:
    """Gradient with respect to the effective weight [N, K], and the path taken.

    `grad` is the second result of `quantize_gradient`, x has its positions contiguous. float32 from
    Triton; the library, which adds in float32 as well, rounds to bfloat16 in the end.
    """
    grad_NM, x_KM = grad.codes.T, x.codes.T
    (N, M), K = grad_NM.shape, x_KM.shape[0]
    choice = choose_gemm("backward_weight", grad_NM.device, grad_NM.dtype, N, K, M)
    if choice != LIBRARY:
        return matmul_scaled(grad_NM, x_KM, grad.scale, None, torch.float32, choice), "triton"
    grad_NK = torch._scaled_mm(
        grad_NM,
        x_KM.T,
        scale_a=grad.scale.reshape(N, 1),
        scale_b=_ones(K, grad_NM.device),
        out_dtype=_LIBRARY_GRADIENT,
        use_fast_accum=False,
    )
    return grad_NK, "cublas"


def _ones(count: int, device: torch.device) -> Tensor:
    """float32 [1, count] for the library, which wants a scale for every column."""
    return _one_bits(count, device).view(torch.float32)


@lru_cache(maxsize=256)
def _one_bits(count: int, device: torch.device) -> Tensor:
    """Kept between steps, hence integers: the bits of 1.0."""
    return torch.full((1, count), 0x3F800000, dtype=torch.int32, device=device)


def int8_backward(
    grad_MN: Tensor, x: Quantized, latent_NK: Tensor, row_scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the int8 route, bfloat16 [M, K] and float32 [N, K]: bfloat16 cuBLAS matmuls."""
    trits_NK, _ = decode_weight(latent_NK, torch.bfloat16)
    grad_MN = grad_MN.float()
    grad_MK = (grad_MN * row_scale_N).to(torch.bfloat16) @ trits_NK
    grad_NK = (grad_MN * x.scale).to(torch.bfloat16).T @ x.codes.to(torch.bfloat16)
    return grad_MK, grad_NK.float()
