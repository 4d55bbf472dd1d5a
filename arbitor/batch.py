"""The tensors of one slot.

Shape letters: B sequences, T positions.
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

    @staticmethod
    def from_symbols(
        symbols: np.ndarray,
        *,
        step: int,
        slot: int,
        source: str,
        modality: str,
        device: torch.device | str = "cpu",
    ) -> "SlotBatch":
        """From packed symbols, uint16 [B, T + 1]; a PADDING symbol is never a target."""
        symbols = torch.from_numpy(symbols.astype(np.int64)).to(device)
        targets_BT = symbols[:, 1:].masked_fill(symbols[:, 1:] == PADDING, NO_TARGET)
        return SlotBatch(step, slot, source, modality, symbols[:, :-1], targets_BT)
