"""Attention of each position to the exact and compressed keys that it sees, on the backend in use.

Triton is imported where it runs: a CPU needs none.
Shape letters: B sequences, T positions, J compressed blocks, N heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.kernel.attention import chunked
from arbitor.kernel.backend import count_path, runs_triton


def attend(
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    compressed: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    stride: int = 1,
) -> Tensor:
    """Output [B, T, N, H], contiguous, as `reference.attend` defines it, in the inputs' dtype.

    Without a window (0) attention is causal and dense. Compressed keys and values [B, J, N, H] need
    one, and J of at least the blocks that the last position sees; further ones are ignored.
    Precondition of the Triton path: no query or key is longer than sqrt(H), as gain-free norms
    make them. It serves bfloat16 heads whose width is a power of two from 16 to 128; all else
    takes torch's path.
    """
    compressed = _seen(compressed, query_BTNH.shape[1], window, stride)
    inputs = (query_BTNH, key_BTNH, value_BTNH, *(compressed or (None, None)), window, stride)
    if runs_triton(query_BTNH):
        from arbitor.kernel.attention import triton

        if triton.supports(query_BTNH):
            count_path("attention.forward", "triton")
            return _AttentionFunction.apply(*inputs)
    count_path("attention.forward", "torch")
    if window:
        return chunked.attend(*inputs)
    heads = (query_BTNH, key_BTNH, value_BTNH)
    if query_BTNH.is_cuda:
        return _flash(*heads).contiguous()
    return chunked.softmax_attention(*heads, is_causal=True).contiguous()


def _flash(query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor) -> Tensor:
    """PyTorch's kernels for the inputs' dtype: fast ones, which a CPU lacks."""
    heads_BNTH = (x.transpose(1, 2) for x in (query_BTNH, key_BTNH, value_BTNH))
    return F.scaled_dot_product_attention(*heads_BNTH, is_causal=True).transpose(1, 2)


def _seen(
    compressed: tuple[Tensor, Tensor] | None, T: int, window: int, stride: int
) -> tuple[Tensor, Tensor] | None:
    """The compressed blocks that any of T positions sees."""
    if window < 0 or stride < 1:
        raise ValueError(f"attention: expected a window of 0 or more, stride {stride} 1 or more")
    if compressed is None:
        return None
    if not window:
        raise ValueError("attention: compressed keys are seen before a window; give its length")
    blocks = max(0, T - window) // stride
    if compressed[0].shape[1] < blocks:
        raise ValueError(
            f"attention: {T} positions with window {window} and stride {stride} see {blocks}"
            f" compressed blocks, got {compressed[0].shape[1]}"
        )
    return tuple(x[:, :blocks] for x in compressed)


class _AttentionFunction(torch.autograd.Function):
    """Saves inputs, output and the log of each query's sum of exponentials."""

    @staticmethod
    def forward(
        ctx, query_BTNH, key_BTNH, value_BTNH, compressed_key_BJNH, compressed_value_BJNH, *window
    ):
        from arbitor.kernel.attention import triton

        inputs = [triton.readable(x) for x in (query_BTNH, key_BTNH, value_BTNH)]
        pair = (compressed_key_BJNH, compressed_value_BJNH)
        compressed = [triton.readable(x) for x in pair if x is not None and x.shape[1]]
        ctx.visible = triton.Visible(*window)
        out_BTNH, log2_sum_BNS = triton.attention_forward(*inputs, compressed, ctx.visible)
        ctx.save_for_backward(out_BTNH, log2_sum_BNS, *inputs, *compressed)
        return out_BTNH

    @staticmethod
    def backward(ctx, grad_BTNH):
        from arbitor.kernel.attention import triton

        count_path("attention.backward", "triton")
        out_BTNH, log2_sum_BNS, query_BTNH, *exact_and_compressed = ctx.saved_tensors
        exact, compressed = exact_and_compressed[:2], exact_and_compressed[2:]
        grad_BTNH = triton.readable(grad_BTNH)
        grad_query_BTNH, delta_BNS = triton.attention_backward_query(
            grad_BTNH, query_BTNH, *exact, compressed, ctx.visible, out_BTNH, log2_sum_BNS
        )
        statistics = (ctx.visible, log2_sum_BNS, delta_BNS)
        grads = triton.attention_backward_key(grad_BTNH, query_BTNH, *exact, False, *statistics)
        compressed_grads = (None, None)
        if ctx.needs_input_grad[3]:
            compressed_grads = (grad_BTNH[:, :0], grad_BTNH[:, :0])
        if compressed:
            compressed_grads = triton.attention_backward_key(
                grad_BTNH, query_BTNH, *compressed, True, *statistics
            )
        return grad_query_BTNH, *grads, *compressed_grads, None, None
