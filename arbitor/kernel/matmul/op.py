"""The matmuls of a ternary linear on the backend in use.

Shape letters: M positions, N outputs, K inputs. Triton and TileLang are imported where they run: a
CPU needs neither.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import active_backend, count_path, runs_triton
from arbitor.kernel.latent_update.fixed_point import POW2_Q16, float32_power_of_two
from arbitor.kernel.latent_update.state import LATENT_MAX, trits
from arbitor.kernel.matmul import reference
from arbitor.kernel.matmul.plane import plane_matmul, unpack_plane
from arbitor.kernel.matmul.quantize import Quantized


def forward(x: Quantized, weight_NK: Tensor, row_scale_N: Tensor) -> Tensor:
    """bfloat16 y [M, N] = 2^s * scale * (codes . weight).

    The weight is int8 latents, which stand for trits, the uint8 plane of packed ones, or a bfloat16
    operand. That one takes plain bfloat16 matmuls on every backend but TileLang.
    """
    if active_backend() == "tilelang":
        from arbitor.kernel.matmul import tilelang

        if weight_NK.dtype == torch.uint8:
            weight_NK = _latents_of_plane(weight_NK, x)
        y_MN, path = tilelang.matmul_forward(x, weight_NK, row_scale_N), "tilelang"
    elif weight_NK.dtype == torch.uint8:
        y_MN, path = _plane_forward(x, weight_NK, row_scale_N)
    elif _decodes_on_gpu(weight_NK):
        from arbitor.kernel.matmul import triton

        y_MN, path = triton.matmul_forward(x, weight_NK, row_scale_N)
    else:
        y_MN, path = reference.matmul_forward(x, _operand(weight_NK), row_scale_N), "torch"
    count_path("matmul.forward", path)
    return y_MN


def _plane_forward(x: Quantized, plane_NQ: Tensor, row_scale_N: Tensor) -> tuple[Tensor, str]:
    """Few positions read the plane itself; for many it is unpacked once."""
    if not runs_triton(plane_NQ):
        return plane_matmul(x, plane_NQ, row_scale_N), "torch"
    from arbitor.kernel.matmul import decode_gemv, triton

    if x.codes.shape[0] <= decode_gemv.MAX_POSITIONS:
        return decode_gemv.plane_matmul(x, plane_NQ, row_scale_N), "plane"
    return triton.matmul_forward(x, _latents_of_plane(plane_NQ, x), row_scale_N)


def _latents_of_plane(plane_NQ: Tensor, x: Quantized) -> Tensor:
    """int8 [N, K]: any latent outside the dead zone stands for its sign."""
    return unpack_plane(plane_NQ, x.codes.shape[1]) * LATENT_MAX


def backward(
    grad_MN: Tensor, x: Quantized, weight_NK: Tensor, row_scale_N: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the dequantized input [M, K] and the effective weight [N, K].

    Both float32 on the torch path; elsewhere the input's is bfloat16, the weight's as its path
    leaves it. One function, because the gradient of y is read once for both. `weight_NK` as in
    `forward`.
    """
    if not _decodes_on_gpu(weight_NK):
        grad_NK = reference.matmul_backward_weight(grad_MN, x, activation)
        operand_NK = _operand(weight_NK)
        grad_MK = reference.matmul_backward_x(grad_MN, operand_NK, row_scale_N, activation)
        paths = ("torch", "torch")
    elif activation == "int8":
        from arbitor.kernel.matmul import triton

        grad_MK, grad_NK = triton.int8_backward(grad_MN, x, weight_NK, row_scale_N)
        paths = ("cublas", "cublas")
    else:
        from arbitor.kernel.matmul import triton

        for_x, for_weight = triton.quantize_gradient(grad_MN, row_scale_N, x.scale)
        grad_NK, weight_path = triton.matmul_backward_weight(for_weight, x)
        grad_MK, x_path = triton.matmul_backward_x(for_x, weight_NK)
        paths = (x_path, weight_path)
    count_path("matmul.backward_x", paths[0])
    count_path("matmul.backward_weight", paths[1])
    return grad_MK, grad_NK


def row_scale(log2_scale_N: Tensor) -> Tensor:
    """float32 2^(log2_scale / 256) of int16 [N], the same bits everywhere."""
    if runs_triton(log2_scale_N):
        from arbitor.kernel.latent_update.device_math import device_tables
        from arbitor.kernel.matmul.decode_triton import decode_row_scale

        return decode_row_scale(log2_scale_N, device_tables(log2_scale_N.device)[1])
    log2_scale_N = log2_scale_N.int()
    mantissa_N = POW2_Q16.to(log2_scale_N.device)[log2_scale_N & 255].float()
    return mantissa_N * float32_power_of_two((log2_scale_N >> 8) - 16)


def _decodes_on_gpu(weight_NK: Tensor) -> bool:
    return weight_NK.dtype == torch.int8 and runs_triton(weight_NK)


def _operand(weight_NK: Tensor) -> Tensor:
    return trits(weight_NK).to(torch.bfloat16) if weight_NK.dtype == torch.int8 else weight_NK
