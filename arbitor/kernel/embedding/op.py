"""Embedding lookup and the table's gradient, on the backend in use.

Shape letters: M positions, V symbols, D width. Triton is imported where it runs: a CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.embedding import reference
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul.plane import unpack_plane


def lookup(indices_M: Tensor, table_VX: Tensor, row_scale_V: Tensor, width: int) -> Tensor:
    """bfloat16 rows 2^s[v] * trit[v] for int64 indices, [M, D = width].

    The table is int8 latents [V, D], the uint8 plane of packed trits, or the bfloat16 factors of
    2^s themselves.
    """
    if runs_triton(table_VX) and table_VX.dtype != torch.bfloat16:
        from arbitor.kernel.embedding import triton

        count_path("embedding.forward", "triton")
        return triton.embedding_forward(indices_M, table_VX, row_scale_V, width)
    count_path("embedding.forward", "torch")
    if table_VX.dtype == torch.uint8:
        operand_VD = unpack_plane(table_VX, width).to(torch.bfloat16)
    else:
        is_operand = table_VX.dtype == torch.bfloat16
        operand_VD = table_VX if is_operand else trits(table_VX).to(torch.bfloat16)
    return reference.embedding_forward(indices_M, operand_VD, row_scale_V)


def lookup_backward(indices_M: Tensor, grad_MD: Tensor, num_rows: int) -> Tensor:
    """float32 gradient of the table's effective rows [V, D], summed in order of the positions."""
    if runs_triton(grad_MD):
        from arbitor.kernel.embedding import triton

        count_path("embedding.backward", "triton")
        return triton.embedding_backward(indices_M, grad_MD, num_rows)
    count_path("embedding.backward", "torch")
    return reference.embedding_backward(indices_M, grad_MD, num_rows)
