"""Context attention: exact keys of a window and, before it, compressed ones, in one softmax.

Position t attends to the exact keys b(t)..t and to the compressed blocks before b(t), with
b(t) = stride * floor(max(0, t + 1 - window) / stride): nothing twice and no gap. A window without
HCA slides; no window is dense attention. Training and generation follow the same rule, the one over
a whole sequence, the other from the KV ledger.
Shape letters: B sequences, T positions of a sequence or M further ones, D width, N heads, H head
width, R latent rank, W rotary width, L slots of a ring, J compressed blocks, S cached keys.
"""

import torch
from torch import Tensor, nn

from arbitor.attention.hca import BlockPooling, first_blocks
from arbitor.attention.kv_cache import CacheStep, LayerCache
from arbitor.attention.mla import MultiHeadLatentAttention, rotation_table
from arbitor.kernel.attention.cached import attend_seen
from arbitor.kernel.attention.op import attend


class ContextAttention(nn.Module):
    """bfloat16 [B, T, D] -> bfloat16 [B, T, D], the input with what attention found added.

    Position t sees positions 0..t of its own row, as far as window and blocks reach. `window` 0 is
    dense, `hca_stride` 0 compresses nothing.
    """

    def __init__(self, mla: MultiHeadLatentAttention, window: int, hca_stride: int):
        super().__init__()
        self.mla, self.window = mla, window
        self.hca = None
        if hca_stride:
            ranks = mla.latent_rank, mla.rotary_width
            self.hca = BlockPooling(*ranks, hca_stride, mla.compress.activation)

    def forward(
        self, hidden_BTD: Tensor, cache: LayerCache | None = None, step: CacheStep | None = None
    ) -> Tensor:
        """With a cache: T further positions of rows that it knows till there."""
        query_low_BTR, latent_BTR, rotary_key_BTW, hidden_BTD = self.mla.latents(hidden_BTD)
        inputs = (query_low_BTR, latent_BTR, rotary_key_BTW)
        if cache is None:
            mixed_BTNH = self._over_sequence(*inputs)
        else:
            mixed_BTNH = self._over_cache(*inputs, cache, step)
        return hidden_BTD + self.mla.output(mixed_BTNH.flatten(2))

    def blank_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """A cache that has seen nothing; `KvLedger.reserve` makes room for what grows."""
        stride = self.hca.stride if self.hca is not None else 0
        ring = self.window + max(1, stride) - 1 if self.window else 0

        def blank(slots: int) -> list[Tensor]:
            ranks = self.mla.latent_rank, self.mla.rotary_width
            return [torch.zeros(batch_size, slots, r, dtype=dtype, device=device) for r in ranks]

        return LayerCache(*blank(ring), *(blank(0) if stride else (None, None)))

    def _over_sequence(
        self, query_low_BTR: Tensor, latent_BTR: Tensor, rotary_key_BTW: Tensor
    ) -> Tensor:
        T, pairs, device = latent_BTR.shape[1], self.mla.rotary_width // 2, latent_BTR.device
        rotation = rotation_table(T, pairs, device)
        heads = self.mla.heads(query_low_BTR, latent_BTR, rotary_key_BTW, rotation)
        if not self.window:
            return attend(*heads)
        stride = self.hca.stride if self.hca is not None else 1
        blocks = max(0, T - self.window) // stride
        if self.hca is None or not blocks:
            return attend(*heads, None, self.window, stride)
        whole = slice(0, blocks * stride)
        hca_caches = self.hca(latent_BTR[:, whole], rotary_key_BTW[:, whole])
        rotation = rotation_table(blocks, pairs, device, stride)
        compressed = self.mla.keys(*first_blocks(*hca_caches, blocks), rotation)
        return attend(*heads, compressed, self.window, stride)

    def _over_cache(
        self,
        query_low_BMR: Tensor,
        latent_BMR: Tensor,
        rotary_key_BMW: Tensor,
        cache: LayerCache,
        step: CacheStep,
    ) -> Tensor:
        """What attention finds for M further positions, which the cache then knows too."""
        latent = torch.cat([cache.kv_cache, latent_BMR], dim=1)
        rotary_key = torch.cat([cache.pe_cache, rotary_key_BMW], dim=1)
        cache.kv_cache.index_copy_(1, step.slots, latent[:, -step.kept :])
        cache.pe_cache.index_copy_(1, step.slots, rotary_key[:, -step.kept :])
        if self.hca is not None:
            hca_caches = cache.hca_kv_cache, cache.hca_pe_cache
            if step.pooled is not None:
                pooled = self.hca(latent[:, step.pooled], rotary_key[:, step.pooled])
                for hca_cache, entries in zip(hca_caches, pooled, strict=True):
                    hca_cache.index_copy_(1, step.blocks, entries)
            blocks = step.seen_MS.shape[1] - latent.shape[1]
            hca_kv_cache, hca_pe_cache = first_blocks(*hca_caches, blocks)
            latent = torch.cat([latent, hca_kv_cache], dim=1)
            rotary_key = torch.cat([rotary_key, hca_pe_cache], dim=1)
        query_BMNH = self.mla.queries(query_low_BMR, step.query_rotation)
        key_BSNH, value_BSNH = self.mla.keys(latent, rotary_key, step.key_rotation)
        return attend_seen(query_BMNH, key_BSNH, value_BSNH, step.seen_MS)
