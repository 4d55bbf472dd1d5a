"""HCA, heavily compressed attention: a block of `stride` positions becomes one latent and one key.

Each channel of latent and rotary key is a weighted mean over the block's positions. The weights are
a softmax inside the block, of a gate that reads the position's latent plus a table of the places in
a block: the table lets channels keep different positions from the first step on. The key is pooled
unrotated; heads rotate it as of the block's last position.
Shape letters: B sequences, T positions, J blocks, S positions of a block, R latent rank,
W rotary width, X = R + W.
"""

import torch
from torch import Tensor, nn

from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear


class BlockPooling(nn.Module):
    """Latents [B, T, R] and rotary keys [B, T, W] of whole blocks -> their caches, J = T / S.

    The caches are `hca_kv_cache` [B, J, R] and `hca_pe_cache` [B, J, W], made together.
    """

    def __init__(self, latent_rank: int, rotary_width: int, stride: int, activation: str):
        super().__init__()
        self.stride, self.ranks = stride, [latent_rank, rotary_width]
        self.gate = TernaryLinear(latent_rank, latent_rank + rotary_width, activation)
        self.place = TernaryEmbedding(stride, latent_rank + rotary_width)

    def forward(self, latent_BTR: Tensor, rotary_key_BTW: Tensor) -> tuple[Tensor, Tensor]:
        blocks = (-1, self.stride)
        place_SX = self.place(torch.arange(self.stride, device=latent_BTR.device))
        gate_BJSX = self.gate(latent_BTR).unflatten(1, blocks).float() + place_SX.float()
        both_BJSX = torch.cat([latent_BTR, rotary_key_BTW], dim=-1).unflatten(1, blocks)
        pooled_BJX = (gate_BJSX.softmax(dim=2) * both_BJSX).sum(dim=2)
        return pooled_BJX.to(latent_BTR.dtype).split(self.ranks, dim=-1)


def first_blocks(
    hca_kv_cache_BJR: Tensor, hca_pe_cache_BJW: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Both caches cropped to the blocks that are seen; neither is strided again.

    ValueError with the shapes where one of them has fewer.
    """
    shapes = [tuple(x.shape) for x in (hca_kv_cache_BJR, hca_pe_cache_BJW)]
    if min(shape[1] for shape in shapes) < num_blocks or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"attention: {num_blocks} compressed blocks are seen, but hca_kv_cache is {shapes[0]}"
            f" and hca_pe_cache {shapes[1]}; make both together, one entry a block"
        )
    return hca_kv_cache_BJR[:, :num_blocks], hca_pe_cache_BJW[:, :num_blocks]
