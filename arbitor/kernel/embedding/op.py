"""Embedding lookup and the table's gradient, on the backend in use.

Shape letters: M positions, V symbols, D width. Triton is imported where it runs: a CPU needs none.
"""

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.embedding import reference
from arbitor.kernel.latent_update.state import trits


def lookup(indices_M: Tensor, table_VD: Tensor, row_scale_V: Tensor) -> Tensor:
    """bfloat16 rows 2^s[v] * trit[v] for int64 indices, [M, D].

    `table_VD` is int8 latents, or the bfloat16 factors of 2^s themselves.
    """
    is_operand = table_VD.dtype == torch.bfloat16
    if runs_triton(table_VD) and not is_operand:
        from arbitor.kernel.embedding import triton

        count_path("embedding.forward", "triton")
        return triton.embedding_forward(indices_M, table_VD, row_scale_V)
    count_path("embedding.forward", "torch")
    operand_VD = table_VD if is_operand else trits(table_VD).to(torch.bfloat16)
    return reference.embedding_forward(indices_M, operand_VD, row_scale_V)


def lookup_backward(indices_M: Tensor, grad_MD: Tensor, num_rows: int) -> Tensor:
    """float32 gradient of the table's effective rows [V, D], summed in order of the positions."""
    if runs_triton(grad_MD):
        from arbitor.kernel.embedding import triton

        count_path("embedding.backward", "triton")
        return triton.embedding_backward(indices_M, grad_MD, num_rows)
    count_path("embedding.backward", "torch")
    return reference.embedding_backward(indices_M, grad_MD, num_rows)
