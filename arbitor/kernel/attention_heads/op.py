"""Queries, keys and values of attention from the expanded projections, on the backend in use.

Triton is imported where it runs: a CPU needs none.
Shape letters: B sequences, T positions, N heads, H head width, W rotary width, P = W / 2 rotated
pairs, R = B * T * N rows.
"""

import torch
from torch import Tensor

from arbitor.kernel.attention_heads import reference
from arbitor.kernel.backend import count_path, runs_triton


def attention_heads(
    query_BTX: Tensor,
    expanded_BTX: Tensor,
    rotary_key_BTW: Tensor,
    rotation_2TP: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [B, T, N, H] as `reference.attention_heads` defines them.

    rotation: cosines and sines of the T positions, `reference.fixed_point`; rows contiguous, so a
    slice along T of a longer table will do. Attention reads the results, transposed, uncopied.
    """
    inputs = (query_BTX, expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads)
    if runs_triton(query_BTX):
        count_path("attention_heads.forward", "triton")
        return _HeadsFunction.apply(*inputs)
    count_path("attention_heads.forward", "torch")
    return reference.attention_heads(*inputs)


def key_heads(
    expanded_BTX: Tensor, rotary_key_BTW: Tensor, rotation_2TP: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Key and value [B, T, N, H] alone, for compressed and for cached positions."""
    inputs = (expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads)
    if runs_triton(expanded_BTX):
        count_path("key_heads.forward", "triton")
        return _KeyHeadsFunction.apply(*inputs)
    count_path("key_heads.forward", "torch")
    return reference.key_heads(*inputs)


def query_heads(query_BTX: Tensor, rotation_2TP: Tensor, num_heads: int) -> Tensor:
    """Query [B, T, N, H] alone, for generation: its kernel has no backward."""
    if runs_triton(query_BTX) and not torch.is_grad_enabled():
        from arbitor.kernel.attention_heads import triton

        count_path("query_heads.forward", "triton")
        return triton.heads_forward(query_BTX, None, None, rotation_2TP, num_heads)[0]
    count_path("query_heads.forward", "torch")
    return reference.query_heads(query_BTX, rotation_2TP, num_heads)


class _HeadsFunction(torch.autograd.Function):
    """Saves query and key, which attention keeps too, and an inverse rms for each normalized part.

    A normalized vector and its inverse rms are all that the gradient of a norm needs, and rotating
    commutes with it: the projections themselves can be freed.
    """

    @staticmethod
    def forward(ctx, query_BTX, expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads):
        from arbitor.kernel.attention_heads import triton

        query_BTNH, key_BTNH, value_BTNH, inverse_rms_4R = triton.heads_forward(
            query_BTX, expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads
        )
        ctx.save_for_backward(query_BTNH, key_BTNH, rotation_2TP, inverse_rms_4R)
        return query_BTNH, key_BTNH, value_BTNH

    @staticmethod
    def backward(ctx, grad_query_BTNH, grad_key_BTNH, grad_value_BTNH):
        from arbitor.kernel.attention_heads import triton

        count_path("attention_heads.backward", "triton")
        gradients = triton.heads_backward(
            grad_query_BTNH, grad_key_BTNH, grad_value_BTNH, *ctx.saved_tensors
        )
        return *gradients, None, None


class _KeyHeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads):
        from arbitor.kernel.attention_heads import triton

        _, key_BTNH, value_BTNH, inverse_rms_4R = triton.heads_forward(
            None, expanded_BTX, rotary_key_BTW, rotation_2TP, num_heads
        )
        ctx.save_for_backward(key_BTNH, rotation_2TP, inverse_rms_4R)
        return key_BTNH, value_BTNH

    @staticmethod
    def backward(ctx, grad_key_BTNH, grad_value_BTNH):
        from arbitor.kernel.attention_heads import triton

        count_path("key_heads.backward", "triton")
        _, *gradients = triton.heads_backward(
            None, grad_key_BTNH, grad_value_BTNH, None, *ctx.saved_tensors
        )
        return *gradients, None, None
