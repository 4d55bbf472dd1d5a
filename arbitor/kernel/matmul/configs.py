"""Which implementation runs a matmul, by device, dtype and shape; nothing is timed.

It is the library (cuBLASLt through torch) for every fp8 shape that it takes, as measured, and the
tile of a Triton kernel elsewhere. Figures and commands: `README.md` of this folder and
`benchmarks/results/`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """A Triton tile. `exact` adds fp8 products in float32 every `block_k`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    exact: bool = False
    tma: bool = False  # operands through descriptors, where their rows are aligned


LIBRARY = "library"
Choice = str | GemmConfig

# The lab's best plain tile on an H100, of seven; the exact one keeps two accumulators in registers.
_FAST = GemmConfig(128, 256, 128, num_warps=8, num_stages=3)
_EXACT = GemmConfig(128, 128, 128, num_warps=8, num_stages=4, exact=True)
_SMALL = GemmConfig(64, 64, 64, num_warps=4, num_stages=3)
_SMALL_EXACT = GemmConfig(64, 64, 64, num_warps=4, num_stages=3, exact=True)
_SMALL_BELOW = 128  # rows or columns of the result


def choose_gemm(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int
) -> Choice:
    """The implementation of C[M, N] = A[M, K] B[N, K]^T for the op forward, backward_x or
    backward_weight."""
    if device.type == "cuda" and _library_takes(dtype, N, K):
        return LIBRARY
    exact = op == "backward_weight"
    if min(M, N) < _SMALL_BELOW:
        return _SMALL_EXACT if exact else _SMALL
    return _EXACT if exact else _FAST


def _library_takes(dtype: torch.dtype, N: int, K: int) -> bool:
    """int8 is faster in Triton, and the library would leave the scales to another kernel."""
    return dtype == torch.float8_e4m3fn and N % 16 == 0 and K % 16 == 0
