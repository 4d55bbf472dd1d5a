"""Cross entropy of each position, and the gradient of the logits. Oracle: `reference.py`.

A program has whole rows of logits in registers: made for the few hundred symbols of this model.
Shape letters: M positions, V symbols.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.kernel.triton_numeric import nearest, widen

# Positions of a program, warps.
_BLOCK_M, _WARPS = 8, 4


def cross_entropy_forward(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [M] each: the loss in nats, 0 without a target, and the log of the sum of
    exponentials."""
    M, V = logits_MV.shape
    loss_M = torch.empty(M, dtype=torch.float32, device=logits_MV.device)
    log_sum_M = torch.empty_like(loss_M)
    cross_entropy_forward_kernel[(triton.cdiv(M, _BLOCK_M),)](
        logits_MV.contiguous(),
        targets_M.contiguous(),
        loss_M,
        log_sum_M,
        M,
        V=V,
        BLOCK_M=_BLOCK_M,
        BLOCK_V=triton.next_power_of_2(V),
        num_warps=_WARPS,
    )
    return loss_M, log_sum_M


def cross_entropy_backward(
    logits_MV: Tensor, targets_M: Tensor, log_sum_M: Tensor, scale: Tensor
) -> Tensor:
    """(softmax - one-hot target) * scale, 0 without a target; scale is a scalar on the device."""
    M, V = logits_MV.shape
    grad_MV = torch.empty(M, V, dtype=logits_MV.dtype, device=logits_MV.device)
    cross_entropy_backward_kernel[(triton.cdiv(M, _BLOCK_M),)](
        logits_MV.contiguous(),
        targets_M.contiguous(),
        log_sum_M,
        scale,
        grad_MV,
        M,
        V=V,
        BLOCK_M=_BLOCK_M,
        BLOCK_V=triton.next_power_of_2(V),
        num_warps=_WARPS,
    )
    return grad_MV


@triton.jit
def cross_entropy_forward_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    log_sum_ptr,
    M,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.arange(0, BLOCK_V)
    in_m, row = m < M, m.to(tl.int64) * V
    mask = in_m[:, None] & (v < V)[None, :]
    logits = widen(tl.load(logits_ptr + row[:, None] + v[None, :], mask=mask, other=0.0))
    logits = tl.where((v < V)[None, :], logits, float("-inf"))
    largest = tl.max(logits, 1)
    log_sum = tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1)) + largest
    target = tl.load(targets_ptr + m, mask=in_m, other=-1)
    has_target = in_m & (target >= 0)
    at_target = widen(tl.load(logits_ptr + row + target, mask=has_target, other=0.0))
    tl.store(loss_ptr + m, tl.where(has_target, log_sum - at_target, 0.0), mask=in_m)
    tl.store(log_sum_ptr + m, log_sum, mask=in_m)


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr,
    targets_ptr,
    log_sum_ptr,
    scale_ptr,
    grad_ptr,
    M,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.arange(0, BLOCK_V)
    in_m, offsets = m < M, m.to(tl.int64)[:, None] * V + v[None, :]
    mask = in_m[:, None] & (v < V)[None, :]
    logits = widen(tl.load(logits_ptr + offsets, mask=mask, other=0.0))
    logits = tl.where((v < V)[None, :], logits, float("-inf"))
    log_sum = tl.load(log_sum_ptr + m, mask=in_m, other=0.0)
    target = tl.load(targets_ptr + m, mask=in_m, other=-1)
    probability = tl.exp(logits - log_sum[:, None])
    grad = tl.where(v[None, :] == target[:, None], probability - 1.0, probability)
    scale = tl.where(target >= 0, tl.load(scale_ptr), 0.0)
    grad *= scale[:, None]
    tl.store(grad_ptr + offsets, nearest(grad, grad_ptr.dtype.element_ty), mask=mask)
