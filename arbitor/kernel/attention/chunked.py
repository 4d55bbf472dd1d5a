"""Attention with a window on plain torch, in memory linear in the positions: the path of a CPU.

Queries go in chunks, each with the keys that it sees; backward computes every chunk again.
Shape letters: B sequences, T positions, J compressed blocks, N heads, H head width, C queries and
S keys of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.kernel.attention.reference import exact_start

_CHUNK = 256


def attend(
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    compressed_key_BJNH: Tensor | None,
    compressed_value_BJNH: Tensor | None,
    window: int,
    stride: int,
) -> Tensor:
    """`reference.attend` in the inputs' dtype, contiguous."""
    if compressed_key_BJNH is None:
        compressed_key_BJNH, compressed_value_BJNH = key_BTNH[:, :0], value_BTNH[:, :0]
    pairs = (key_BTNH, value_BTNH, compressed_key_BJNH, compressed_value_BJNH)
    return _ChunkedFunction.apply(window, stride, query_BTNH, *pairs)


class _ChunkedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, window, stride, query_BTNH, *pairs):
        ctx.window = (window, stride)
        ctx.save_for_backward(query_BTNH, *pairs)
        out_BTNH = torch.empty_like(query_BTNH, memory_format=torch.contiguous_format)
        for slices in _chunks(query_BTNH.shape[1], window, stride, pairs):
            views = [x[:, s] for x, s in zip((query_BTNH, *pairs), slices, strict=True)]
            out_BTNH[:, slices[0]] = _attend_chunk(slices, *views, window, stride)
        return out_BTNH

    @staticmethod
    def backward(ctx, grad_BTNH):
        inputs, (window, stride) = ctx.saved_tensors, ctx.window
        # A key's gradient is a sum over chunks: in float32, rounded once.
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in inputs]
        for slices in _chunks(grad_BTNH.shape[1], window, stride, inputs[1:]):
            views = [x[:, s].detach() for x, s in zip(inputs, slices, strict=True)]
            with torch.enable_grad():
                leaves = [view.requires_grad_() for view in views]
                out = _attend_chunk(slices, *leaves, window, stride)
            chunk_grads = torch.autograd.grad(out, leaves, grad_BTNH[:, slices[0]])
            for grad, s, chunk_grad in zip(grads, slices, chunk_grads, strict=True):
                grad[:, s] += chunk_grad
        return None, None, *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _chunks(T: int, window: int, stride: int, pairs: tuple[Tensor, ...]) -> list[list[slice]]:
    """Of each chunk what it takes of queries, keys, values, compressed keys and values."""
    chunks = []
    for first in range(0, T, _CHUNK):
        end = min(first + _CHUNK, T)
        start, last_start = exact_start(torch.tensor([first, end - 1]), window, stride).tolist()
        blocks = min(last_start // stride, pairs[2].shape[1])
        exact, compressed = slice(start, end), slice(0, blocks)
        chunks.append([slice(first, end), exact, exact, compressed, compressed])
    return chunks


def _attend_chunk(slices, query_BCNH, key, value, compressed_key, compressed_value, window, stride):
    queries, exact, _, compressed, _ = slices
    device = query_BCNH.device
    t = torch.arange(queries.start, queries.stop, device=device)[:, None]
    s = torch.arange(exact.start, exact.stop, device=device)
    j = torch.arange(compressed.stop, device=device)
    start = exact_start(t, window, stride)
    seen_CS = torch.cat([j < start // stride, (s >= start) & (s <= t)], dim=1)
    key_BSNH = torch.cat([compressed_key, key], dim=1)
    value_BSNH = torch.cat([compressed_value, value], dim=1)
    return softmax_attention(query_BCNH, key_BSNH, value_BSNH, attn_mask=seen_CS)


def softmax_attention(
    query_BTNH: Tensor, key_BSNH: Tensor, value_BSNH: Tensor, **mask: Tensor | bool
) -> Tensor:
    """PyTorch's attention in float32, rounded once: its bfloat16 kernels round by their blocks, and
    what is generated key by key could not follow them."""
    inputs = (x.transpose(1, 2).float() for x in (query_BTNH, key_BSNH, value_BSNH))
    out_BNTH = F.scaled_dot_product_attention(*inputs, **mask)
    return out_BNTH.transpose(1, 2).to(query_BTNH.dtype)
