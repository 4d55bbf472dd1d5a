"""The 2-bit plane of generation: four trits a byte, and the matmul on it.

A row of N is Q bytes; bits 2i and 2i + 1 of byte j hold trit[i * Q + j] in two's complement (01 is
1, 11 is -1): the top two bits of a byte, the others cleared, are +-64 as int8 and +-2 as e4m3.
Shape letters: M positions, N outputs, K inputs, Q bytes of a row.
"""

import torch
from torch import Tensor

from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import matmul_forward

_ALIGNMENT = 16  # bytes of a row come in multiples of the widest load


def pack_plane(trits_NK: Tensor) -> Tensor:
    """uint8 [N, Q] of int8 trits -1, 0, 1; the inputs behind the last are 0."""
    N, K = trits_NK.shape
    quarter = row_bytes_of(K)
    codes = torch.zeros(N, 4 * quarter, dtype=torch.uint8, device=trits_NK.device)
    codes[:, :K] = (trits_NK & 3).view(torch.uint8)
    plane_NQ = codes[:, :quarter].clone()
    for i in range(1, 4):
        plane_NQ |= codes[:, i * quarter : (i + 1) * quarter] << (2 * i)
    return plane_NQ


def unpack_plane(plane_NQ: Tensor, num_inputs: int) -> Tensor:
    """int8 trits [N, K] of `pack_plane`."""
    quarters = [(plane_NQ << (6 - 2 * i)).view(torch.int8) >> 6 for i in range(4)]
    return torch.cat(quarters, dim=1)[:, :num_inputs].contiguous()


def plane_matmul(x: Quantized, plane_NQ: Tensor, row_scale_N: Tensor) -> Tensor:
    """bfloat16 y [M, N]."""
    trits_NK = unpack_plane(plane_NQ, x.codes.shape[1])
    return matmul_forward(x, trits_NK.to(torch.bfloat16), row_scale_N)


def row_bytes_of(num_inputs: int) -> int:
    """Q of K inputs."""
    quarter = (num_inputs + 3) // 4
    return quarter + -quarter % _ALIGNMENT
