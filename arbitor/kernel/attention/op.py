"""Causal attention on the backend in use.

Triton is imported where it runs: a CPU needs none.
Shape letters: B sequences, T positions, N heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton


def attend(query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor) -> Tensor:
    """Output [B, T, N, H], contiguous, as `reference.attend` defines it, in the inputs' dtype.

    Precondition of the Triton path: no query or key is longer than sqrt(H), as gain-free norms
    make them. It serves bfloat16 heads whose width is a power of two from 16 to 128; all else
    takes torch's path.
    """
    inputs = (query_BTNH, key_BTNH, value_BTNH)
    if runs_triton(query_BTNH):
        from arbitor.kernel.attention import triton

        if triton.supports(query_BTNH):
            count_path("attention.forward", "triton")
            return _AttentionFunction.apply(*(triton.readable(x) for x in inputs))
    count_path("attention.forward", "torch")
    heads_first = (x.transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2).contiguous()


class _AttentionFunction(torch.autograd.Function):
    """Saves inputs, output and the log of each query's sum of exponentials."""

    @staticmethod
    def forward(ctx, query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor) -> Tensor:
        from arbitor.kernel.attention import triton

        out_BTNH, log2_sum_BNT = triton.attention_forward(query_BTNH, key_BTNH, value_BTNH)
        ctx.save_for_backward(query_BTNH, key_BTNH, value_BTNH, out_BTNH, log2_sum_BNT)
        return out_BTNH

    @staticmethod
    def backward(ctx, grad_BTNH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from arbitor.kernel.attention import triton

        count_path("attention.backward", "triton")
        grad_BTNH = triton.readable(grad_BTNH)
        query_BTNH, key_BTNH, value_BTNH, out_BTNH, log2_sum_BNT = ctx.saved_tensors
        inputs = (query_BTNH, key_BTNH, value_BTNH)
        grad_query, delta_BNT = triton.attention_backward_query(
            grad_BTNH, *inputs, out_BTNH, log2_sum_BNT
        )
        return grad_query, *triton.attention_backward_key(
            grad_BTNH, *inputs, log2_sum_BNT, delta_BNT
        )
