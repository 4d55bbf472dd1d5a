"""Causal windows and their gradient, a pass each. Oracle: `reference.py`.

Shape letters: B sequences, T positions, M = B * T, D width, W positions of a window, X = W * D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.triton_numeric import nearest, widen

# Positions and columns of a program, warps.
_BLOCK_M, _BLOCK_D, _WARPS = 8, 256, 4


def window_forward(x_BTD: Tensor, size: int) -> Tensor:
    """[B, T, W * D]: positions t - W + 1 .. t side by side, zeros before the start."""
    B, T, D = x_BTD.shape
    out_BTX = torch.empty(B, T, size * D, dtype=x_BTD.dtype, device=x_BTD.device)
    _launch(causal_window_forward_kernel, x_BTD, out_BTX, size, D)
    return out_BTX


def window_backward(grad_BTX: Tensor, size: int) -> Tensor:
    """Gradient of x [B, T, D]: the sum over the windows that a position is in, in their order."""
    B, T, X = grad_BTX.shape
    out_BTD = torch.empty(B, T, X // size, dtype=grad_BTX.dtype, device=grad_BTX.device)
    _launch(causal_window_backward_kernel, grad_BTX, out_BTD, size, X // size)
    return out_BTD


def _launch(kernel, x: Tensor, out: Tensor, W: int, D: int) -> None:
    B, T, _ = x.shape
    kernel[(triton.cdiv(B * T, _BLOCK_M), triton.cdiv(D, _BLOCK_D))](
        x.contiguous(),
        out,
        B * T,
        T,
        D,
        W=W,
        BLOCK_M=_BLOCK_M,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
    )


@triton.jit
def causal_window_forward_kernel(
    x_ptr, out_ptr, M, T, D, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask, row = (m < M) & (d < D), m.to(tl.int64)
    for w in tl.static_range(W):
        back = W - 1 - w
        x = tl.load(x_ptr + (row - back) * D + d, mask=mask & (m % T >= back), other=0.0)
        tl.store(out_ptr + (row * W + w) * D + d, x, mask=mask)


@triton.jit
def causal_window_backward_kernel(
    grad_ptr, out_ptr, M, T, D, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask, row = (m < M) & (d < D), m.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for w in tl.static_range(W):
        ahead = W - 1 - w
        grad_ptrs = grad_ptr + ((row + ahead) * W + w) * D + d
        total += widen(tl.load(grad_ptrs, mask=mask & (m % T + ahead < T), other=0.0))
    tl.store(out_ptr + row * D + d, nearest(total, out_ptr.dtype.element_ty), mask=mask)
