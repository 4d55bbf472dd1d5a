"""Embedding lookup in a ternary table and the gradient of the table.

Shape letters: M positions, V symbols (rows of the table), D width.
"""

import torch
from torch import Tensor


def embedding_forward(indices_M: Tensor, trits_VD: Tensor, row_scale_V: Tensor) -> Tensor:
    """bfloat16 rows 2^s[v] * trit[v] for int64 indices, [M, D]."""
    return (trits_VD[indices_M] * row_scale_V[indices_M].unsqueeze(-1)).to(torch.bfloat16)


def embedding_backward(indices_M: Tensor, grad_MD: Tensor, num_rows: int) -> Tensor:
    """float32 gradient of the table's effective rows [V, D]: the sum over each symbol's positions.

    `index_add_` on a CPU adds in the order of the positions, whatever the number of threads.
    """
    grad_VD = torch.zeros(num_rows, grad_MD.shape[-1], dtype=torch.float32, device=grad_MD.device)
    return grad_VD.index_add_(0, indices_M, grad_MD.float())
