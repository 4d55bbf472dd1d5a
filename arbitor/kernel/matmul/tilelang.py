"""Forward matmul of a ternary linear in TileLang, an optional extra.

Oracle: `reference.py::matmul_forward`. Shape letters: M positions, N outputs, K inputs.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul.quantize import Quantized

try:
    import tilelang
    import tilelang.language as T
except ImportError:
    tilelang = None

_NAMES = {
    torch.float8_e4m3fn: ("float8_e4m3fn", "float32"),
    torch.int8: ("int8", "int32"),
    torch.bfloat16: ("bfloat16", "float32"),
}


def matmul_forward(x: Quantized, weight_NK: Tensor, row_scale_N: Tensor) -> Tensor:
    """bfloat16 y [M, N]; the weight is int8 latents or a bfloat16 operand."""
    if tilelang is None:
        raise UserError(
            "backend tilelang: TileLang is not installed; pip install 'arbitor[tilelang]'"
        )
    if weight_NK.dtype == torch.int8:
        codes, operand_NK = x.codes, trits(weight_NK).to(x.codes.dtype)
    else:
        codes, operand_NK = x.operand(), weight_NK
    kernel = _build(*codes.shape, weight_NK.shape[0], *_NAMES[codes.dtype])
    return kernel(codes, operand_NK, x.scale.flatten(), row_scale_N)


@lru_cache(maxsize=256)
def _build(M: int, K: int, N: int, operand: str, accumulator: str) -> Any:
    block_m, block_n, block_k = 128, 128, 64

    @T.prim_func
    def matmul_forward_kernel(
        x: T.Tensor((M, K), operand),
        trits: T.Tensor((N, K), operand),
        scale: T.Tensor((M,), "float32"),
        row_scale: T.Tensor((N,), "float32"),
        out: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(T.ceildiv(N, block_n), T.ceildiv(M, block_m), threads=256) as (bn, bm):
            x_shared = T.alloc_shared((block_m, block_k), operand)
            trits_shared = T.alloc_shared((block_n, block_k), operand)
            total = T.alloc_fragment((block_m, block_n), accumulator)
            scaled = T.alloc_fragment((block_m, block_n), "float32")
            T.clear(total)
            for k in T.Pipelined(T.ceildiv(K, block_k), num_stages=3):
                T.copy(x[bm * block_m, k * block_k], x_shared)
                T.copy(trits[bn * block_n, k * block_k], trits_shared)
                T.gemm(x_shared, trits_shared, total, transpose_B=True)
            for i, j in T.Parallel(block_m, block_n):
                scaled[i, j] = (
                    T.cast(total[i, j], "float32")
                    * scale[bm * block_m + i]
                    * row_scale[bn * block_n + j]
                )
            T.copy(scaled, out[bm * block_m, bn * block_n])

    return tilelang.compile(matmul_forward_kernel, out_idx=[-1])
