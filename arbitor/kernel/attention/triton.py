"""Launches the attention kernels: softmax with bounded logits, and its gradients.

No running maximum: queries and keys of norm sqrt(H) at most, as the gain-free norms make them, keep
every logit within sqrt(H), and the sum of exponentials far inside float32. No atomics: every
result is summed by one program in a fixed order.
Shape letters: B sequences, T positions, J compressed blocks, N heads, H head width, S = T rounded
up to a multiple of every tile's block of queries; blocks of M queries and N keys.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.kernel.attention.backward_triton import (
    attention_backward_key_kernel,
    attention_backward_query_kernel,
)
from arbitor.kernel.attention.forward_triton import attention_forward_kernel


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the largest head width that they serve.
FORWARD = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)}
BACKWARD_QUERY = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)}
BACKWARD_KEY = {64: Tile(32, 64, 4, 3), 128: Tile(64, 64, 4, 2)}

# The tensor memory accelerator reads from addresses that are multiples of 16 bytes.
_ALIGNMENT = 8


class Visible(NamedTuple):
    """Which keys a position sees, `reference.attend`: 0 stands for no window."""

    window: int = 0
    stride: int = 1


def supports(query_BTNH: Tensor) -> bool:
    """Whether the kernels serve this dtype and head width."""
    return query_BTNH.dtype == torch.bfloat16 and query_BTNH.shape[-1] in (16, 32, 64, 128)


def readable(x_BTNH: Tensor) -> Tensor:
    """x, or a copy where its strides are none that the kernels read."""
    strides = x_BTNH.stride()
    aligned = all(stride and stride % _ALIGNMENT == 0 for stride in strides[:3])
    if aligned and strides[3] == 1 and x_BTNH.data_ptr() % (2 * _ALIGNMENT) == 0:
        return x_BTNH
    return x_BTNH.clone(memory_format=torch.contiguous_format)


def attention_forward(
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    compressed: Sequence[Tensor],
    visible: Visible,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H], contiguous, and log2 of the sums of exponentials, float32 [B, N, S].

    compressed: keys and values that some position sees, or nothing.
    """
    B, T, N, H = query_BTNH.shape
    S = _padded(T, H)
    out_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    log2_sum_BNS = torch.empty(B, N, S, dtype=torch.float32, device=query_BTNH.device)
    tile = _choose(FORWARD, H)
    attention_forward_kernel[(S // tile.block_m, B * N)](
        query_BTNH,
        *_key_tiles(key_BTNH, value_BTNH, compressed, tile.block_n),
        _tiles(out_BTNH, tile.block_m),
        log2_sum_BNS,
        T,
        N,
        S,
        *query_BTNH.stride()[:3],
        HAS_COMPRESSED=bool(compressed),
        **_constants(H, tile, visible),
    )
    return out_BTNH, log2_sum_BNS


def attention_backward_query(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    compressed: Sequence[Tensor],
    visible: Visible,
    out_BTNH: Tensor,
    log2_sum_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the query, contiguous [B, T, N, H], and the product of each query's output and
    its gradient, float32 [B, N, S], which the other gradients need."""
    B, T, N, H = query_BTNH.shape
    S = log2_sum_BNS.shape[2]
    grad_query_BTNH = torch.empty(B, T, N, H, dtype=query_BTNH.dtype, device=query_BTNH.device)
    delta_BNS = torch.empty_like(log2_sum_BNS)
    tile = _choose(BACKWARD_QUERY, H)
    attention_backward_query_kernel[(S // tile.block_m, B * N)](
        query_BTNH,
        grad_BTNH,
        *_key_tiles(key_BTNH, value_BTNH, compressed, tile.block_n),
        _tiles(out_BTNH, tile.block_m),
        _tiles(grad_query_BTNH, tile.block_m),
        log2_sum_BNS,
        delta_BNS,
        T,
        N,
        S,
        *query_BTNH.stride()[:3],
        *grad_BTNH.stride()[:3],
        LOGIT_SCALE=1 / math.sqrt(H),
        HAS_COMPRESSED=bool(compressed),
        **_constants(H, tile, visible),
    )
    return grad_query_BTNH, delta_BNS


def attention_backward_key(
    grad_BTNH: Tensor,
    query_BTNH: Tensor,
    key_BJNH: Tensor,
    value_BJNH: Tensor,
    is_compressed: bool,
    visible: Visible,
    log2_sum_BNS: Tensor,
    delta_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of a pair of keys and values, exact (J = T) or compressed, contiguous
    [B, J, N, H]."""
    B, T, N, H = query_BTNH.shape
    J = key_BJNH.shape[1]
    grad_key_BJNH, grad_value_BJNH = (
        torch.empty(B, J, N, H, dtype=x.dtype, device=x.device) for x in (key_BJNH, value_BJNH)
    )
    tile = _choose(BACKWARD_KEY, H)
    attention_backward_key_kernel[(triton.cdiv(J, tile.block_n), B * N)](
        key_BJNH,
        value_BJNH,
        _tiles(query_BTNH, tile.block_m),
        _tiles(grad_BTNH, tile.block_m),
        _tiles(grad_key_BJNH, tile.block_n),
        _tiles(grad_value_BJNH, tile.block_n),
        log2_sum_BNS,
        delta_BNS,
        T,
        J,
        N,
        log2_sum_BNS.shape[2],
        *key_BJNH.stride()[:3],
        *value_BJNH.stride()[:3],
        LOGIT_SCALE=1 / math.sqrt(H),
        COMPRESSED=is_compressed,
        **_constants(H, tile, visible),
    )
    return grad_key_BJNH, grad_value_BJNH


def _choose(tiles: dict[int, Tile], H: int) -> Tile:
    return tiles[min(width for width in tiles if width >= H)]


def _padded(T: int, H: int) -> int:
    """Positions up to which statistics are written: every block of queries is read whole."""
    blocks = [_choose(tiles, H).block_m for tiles in (FORWARD, BACKWARD_QUERY, BACKWARD_KEY)]
    return triton.cdiv(T, max(blocks)) * max(blocks)


def _tiles(x_BTNH: Tensor, block: int) -> TensorDescriptor:
    """Blocks of positions of one head: read as zeros and not written beyond the last position."""
    return TensorDescriptor.from_tensor(x_BTNH, [1, block, 1, x_BTNH.shape[3]])


def _key_tiles(
    key_BTNH: Tensor, value_BTNH: Tensor, compressed: Sequence[Tensor], block: int
) -> list[TensorDescriptor]:
    """Tiles of exact and compressed keys and values; without the latter, of the former twice."""
    exact = (key_BTNH, value_BTNH)
    return [_tiles(x, block) for x in (*exact, *(compressed or exact))]


def _constants(H: int, tile: Tile, visible: Visible) -> dict[str, float]:
    return {
        "LOG2_SCALE": math.log2(math.e) / math.sqrt(H),
        "H": H,
        "WINDOW": visible.window,
        "STRIDE": visible.stride,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
