"""Causal windows on the backend in use.

Shape letters: B sequences, T positions, D width, X = W * D columns of a window. Triton is imported
where it runs: a CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.causal_window import reference


def causal_window(x_BTD: Tensor, size: int) -> Tensor:
    """[B, T, W * D] as `reference.causal_window` defines it."""
    if runs_triton(x_BTD):
        count_path("causal_window.forward", "triton")
        return _WindowFunction.apply(x_BTD, size)
    count_path("causal_window.forward", "torch")
    return reference.causal_window(x_BTD, size)


class _WindowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD: Tensor, size: int) -> Tensor:
        from arbitor.kernel.causal_window import triton

        ctx.size = size
        return triton.window_forward(x_BTD, size)

    @staticmethod
    def backward(ctx, grad_BTX: Tensor) -> tuple[Tensor, None]:
        from arbitor.kernel.causal_window import triton

        count_path("causal_window.backward", "triton")
        return triton.window_backward(grad_BTX, ctx.size), None
