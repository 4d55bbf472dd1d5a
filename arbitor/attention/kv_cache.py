"""The KV ledger: what generation keeps of the positions before, plain tensors layer by layer.

Tensors are written in place, at places that the device computes: a step can be recorded and
replayed as a CUDA graph until the ledger has to grow.
Shape letters: B sequences, L slots of a ring, C compressed blocks, R latent rank, W rotary width,
P = W / 2 rotated pairs, M further positions, S = L + M + C cached keys, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.attention.mla import rotation_at
from arbitor.kernel.attention.reference import exact_start


@dataclass
class LayerCache:
    """Of one layer of attention: exact latents in a ring, compressed ones as they come."""

    kv_cache: Tensor  # [B, L, R]; position p is in slot p % L
    pe_cache: Tensor  # [B, L, W], unrotated
    hca_kv_cache: Tensor | None  # [B, C, R]; blocks that are not whole yet are never seen
    hca_pe_cache: Tensor | None  # [B, C, W], unrotated


@dataclass(frozen=True)
class CacheStep:
    """What M further positions see and where they are kept: the same in every layer.

    Keys are those of the ring, of the M positions themselves, and of the compressed blocks.
    """

    seen_MS: Tensor  # bool
    query_rotation: Tensor  # int16 [2, M, P]
    key_rotation: Tensor  # int16 [2, S, P]
    kept: int  # how many of the last positions go into the ring
    slots: Tensor  # int64 [kept]
    # Of the blocks that they touch, int64: places of the positions in ring and M, and numbers.
    pooled: Tensor | None
    blocks: Tensor | None


@dataclass
class KvLedger:
    """Of a batch of sequences of equal length; `ARBModel.ledger` makes it.

    With a window the rings have window + stride - 1 slots, so they hold the positions that wait to
    be pooled as well; without one (0) they have a slot for every position.
    """

    window: int
    stride: int  # 0 where nothing is compressed
    num_pairs: int
    position: Tensor  # int64 [1], symbols so far
    embedded: Tensor  # [B, 2, D], embeddings of the last two symbols, zeros before the start
    layers: list[LayerCache | None]  # None for a layer without attention
    capacity: int = 0  # positions there is room for; to be reserved before they are read
    pools: bool = True  # whether the next positions may fill a block: if not, none is pooled

    def reserve(self, length: int) -> bool:
        """Makes room for `length` positions, at least twice the room before; whether it grew."""
        if length <= self.capacity:
            return False
        self.capacity = max(length, 2 * self.capacity)
        for layer in self.layers:
            if layer is None:
                continue
            if not self.window:
                layer.kv_cache = _grown(layer.kv_cache, self.capacity)
                layer.pe_cache = _grown(layer.pe_cache, self.capacity)
            if self.stride:
                # Further positions may touch two blocks that they do not fill.
                blocks = self.capacity // self.stride + 2
                layer.hca_kv_cache = _grown(layer.hca_kv_cache, blocks)
                layer.hca_pe_cache = _grown(layer.hca_pe_cache, blocks)
        return True

    def step(self, M: int) -> CacheStep | None:
        """The next M positions; None where no layer attends."""
        layer = next((layer for layer in self.layers if layer is not None), None)
        if layer is None:
            return None
        ring, stride = layer.kv_cache.shape[1], max(1, self.stride)
        position_M = self.position + torch.arange(M, device=self.position.device)
        start_M1 = exact_start(position_M, self.window, stride)[:, None]
        exact = torch.cat([self._in_ring(ring), position_M])
        seen = [(exact >= start_M1) & (exact <= position_M[:, None])]
        positions, pooled, blocks = [exact.clamp(min=0)], None, None
        if self.stride:
            block_C = torch.arange(layer.hca_kv_cache.shape[1], device=self.position.device)
            seen.append(block_C < start_M1 // stride)
            positions.append((block_C + 1) * stride - 1)
            if self.pools:
                pooled, blocks = self._pooled(ring, M)
        kept = min(M, ring)
        return CacheStep(
            seen_MS=torch.cat(seen, dim=1),
            query_rotation=rotation_at(position_M, self.num_pairs),
            key_rotation=rotation_at(torch.cat(positions), self.num_pairs),
            kept=kept,
            slots=position_M[M - kept :] % ring,
            pooled=pooled,
            blocks=blocks,
        )

    def _in_ring(self, ring: int) -> Tensor:
        """int64 [L]: the last position before the next one that a slot holds, negative if none."""
        slot = torch.arange(ring, device=self.position.device)
        return self.position - 1 - (self.position - 1 - slot) % ring

    def _pooled(self, ring: int, M: int) -> tuple[Tensor, Tensor]:
        """Blocks that the next M positions touch, and where their positions are.

        Of a block that is not whole the rest is made up; it is pooled again when the rest comes.
        """
        stride, device = self.stride, self.position.device
        count = (M + stride - 2) // stride + 1
        blocks = self.position // stride + torch.arange(count, device=device)
        position = (blocks[:, None] * stride + torch.arange(stride, device=device)).flatten()
        further = (ring + position - self.position).clamp(max=ring + M - 1)
        return torch.where(position < self.position, position % ring, further), blocks


def _grown(cache: Tensor, slots: int) -> Tensor:
    return F.pad(cache, (0, 0, 0, max(0, slots - cache.shape[1])))
