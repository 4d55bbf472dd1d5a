"""The tensors of one slot.

Shape letters: B sequences, T positions, P places of a sequence, X bytes of a place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.vocab import PADDING

NO_TARGET = -1


@dataclass(frozen=True)
class SlotBatch:
    """One micro-batch of one source: what `ARBModel` reads."""

    step: int
    slot: int
    source: str
    modality: str
    symbols_BT: Tensor  # int64, the symbol before each target
    targets_BT: Tensor  # int64, NO_TARGET where nothing is to be predicted
    # uint8: the k-th PATCH or AUDIO_FRAME of a sequence stands in row k; None for text and code.
    content_BPX: Tensor | None = None

    @staticmethod
    def from_symbols(
        symbols: np.ndarray,
        *,
        step: int,
        slot: int,
        source: str,
        modality: str,
        content: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> "SlotBatch":
        """From packed symbols, uint16 [B, T + 1], and content, uint8 [B, P, X].

        A PADDING symbol is never a target.
        """
        symbols = torch.from_numpy(symbols.astype(np.int64)).to(device)
        targets_BT = symbols[:, 1:].masked_fill(symbols[:, 1:] == PADDING, NO_TARGET)
        content_BPX = None if content is None else torch.from_numpy(content).to(device)
        return SlotBatch(step, slot, source, modality, symbols[:, :-1], targets_BT, content_BPX)
