"""Where the content of a slot stands: its k-th row belongs to the k-th place of a sequence.

A place is a position whose symbol is PATCH or AUDIO_FRAME. Shapes do not depend on the symbols and
nothing asks the device, so that a slot can be recorded and replayed.
Shape letters: B sequences, T positions, P places of a sequence, X bytes of a place, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.batch import SlotBatch
from arbitor.vocab import AUDIO_FRAME, PATCH


@dataclass(frozen=True)
class Places:
    """The places among a slot's positions."""

    is_place_BT: Tensor  # bool
    before_BT: Tensor  # int64, the number of places before this position
    content_BPX: Tensor

    @staticmethod
    def of(batch: SlotBatch) -> "Places":
        is_place_BT = is_place(batch.symbols_BT)
        before_BT = is_place_BT.cumsum(1) - is_place_BT.long()
        return Places(is_place_BT, before_BT, batch.content_BPX)

    @property
    def number_BT(self) -> Tensor:
        """int64: the number of a position's place, and one that exists where it is none."""
        return self.before_BT.clamp(max=self.content_BPX.shape[1] - 1)

    def content(self) -> Tensor:
        """uint8 [B, T, X]: each place's content; elsewhere that of the next place or the last."""
        return _rows(self.content_BPX, self.number_BT)

    def next_content(self) -> Tensor:
        """uint8 [B, T, X]: the content of the first place after each position, or of the last."""
        after_BT = self.before_BT + self.is_place_BT.long()
        return _rows(self.content_BPX, after_BT.clamp(max=self.content_BPX.shape[1] - 1))

    def first_position(self) -> Tensor:
        """int64 [B]: of a sequence's first place; T where it has none."""
        return (self.is_place_BT.cumsum(1) == 0).sum(1)

    def fill(self, text_BTD: Tensor, encoded_BTD: Tensor) -> Tensor:
        """[B, T, D]: what was encoded of the content at the places, elsewhere that of the text."""
        return torch.where(self.is_place_BT.unsqueeze(-1), encoded_BTD, text_BTD)


def is_place(symbols: Tensor) -> Tensor:
    return (symbols == PATCH) | (symbols == AUDIO_FRAME)


def _rows(content_BPX: Tensor, number_BT: Tensor) -> Tensor:
    index_BTX = number_BT.unsqueeze(-1).expand(-1, -1, content_BPX.shape[-1])
    return content_BPX.gather(1, index_BTX)
