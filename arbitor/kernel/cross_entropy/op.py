"""Mean cross entropy on the backend in use.

Shape letters: M positions, V symbols. Triton is imported where it runs: a CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.cross_entropy import reference


def cross_entropy(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Mean over the positions with a target (int64, NO_TARGET if none), in nats, float32."""
    if runs_triton(logits_MV):
        count_path("cross_entropy.forward", "triton")
        return _CrossEntropyFunction.apply(logits_MV, targets_M)
    count_path("cross_entropy.forward", "torch")
    return reference.cross_entropy(logits_MV, targets_M)


class _CrossEntropyFunction(torch.autograd.Function):
    """Saves the logits as they are and the log of each position's sum of exponentials."""

    @staticmethod
    def forward(ctx, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        from arbitor.kernel.cross_entropy import triton

        loss_M, log_sum_M = triton.cross_entropy_forward(logits_MV, targets_M)
        num_targets = (targets_M >= 0).sum()
        ctx.save_for_backward(logits_MV, targets_M, log_sum_M, num_targets)
        return loss_M.sum() / num_targets

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        from arbitor.kernel.cross_entropy import triton

        count_path("cross_entropy.backward", "triton")
        logits_MV, targets_M, log_sum_M, num_targets = ctx.saved_tensors
        scale = grad / num_targets
        return triton.cross_entropy_backward(logits_MV, targets_M, log_sum_M, scale), None
