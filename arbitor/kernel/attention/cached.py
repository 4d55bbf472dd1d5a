"""Attention of few queries to keys of a cache, whatever their order: for generation.

It rounds where the paths of training round, so that what is generated follows what was trained.
Shape letters: B sequences, M queries, S keys, N heads, H head width.
"""

import math

import torch
from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton


def attend_seen(
    query_BMNH: Tensor, key_BSNH: Tensor, value_BSNH: Tensor, seen_MS: Tensor
) -> Tensor:
    """One softmax over the keys that a query sees: [B, M, N, H] in the inputs' dtype.

    Needs no running maximum: logits are bounded, `README.md`. Where training runs in Triton,
    weights are rounded before they are multiplied, as there; elsewhere everything is float32.
    """
    if runs_triton(query_BMNH):
        from arbitor.kernel.attention import cached_triton

        if query_BMNH.shape[1] <= cached_triton.MAX_QUERIES:
            count_path("attention.cached", "triton")
            return cached_triton.attend_seen(query_BMNH, key_BSNH, value_BSNH, seen_MS)
    count_path("attention.cached", "torch")
    query_BNMH, key_BNSH, value_BNSH = (
        x.transpose(1, 2).float() for x in (query_BMNH, key_BSNH, value_BSNH)
    )
    scale = math.log2(math.e) / math.sqrt(query_BMNH.shape[-1])
    weight_BNMS = torch.exp2(query_BNMH @ key_BNSH.mT * scale) * seen_MS
    total_BNM1 = weight_BNMS.sum(dim=-1, keepdim=True)
    if runs_triton(query_BMNH):
        weight_BNMS = weight_BNMS.to(value_BSNH.dtype).float()
    return (weight_BNMS @ value_BNSH / total_BNM1).to(value_BSNH.dtype).transpose(1, 2)
