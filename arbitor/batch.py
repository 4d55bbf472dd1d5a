"""The tensors of one slot.

Shape letters: B sequences, T positions, P places of a sequence, X bytes of a place.
"""

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from arbitor.vocab import PADDING

NO_TARGET = -1

# A slot's content may lie in memory that other processes share: it is only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


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
    step_and_slot_2: Tensor | None = None  # int32, beside content: what noise depends on

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
        batch = SlotBatch(step, slot, source, modality, symbols[:, :-1], targets_BT)
        if content is None:
            return batch
        step_and_slot = torch.tensor([step, slot], dtype=torch.int32, device=device)
        content_BPX = torch.from_numpy(content).to(device)
        return replace(batch, content_BPX=content_BPX, step_and_slot_2=step_and_slot)

    @property
    def signature(self) -> Hashable:
        """Equal for slots that run the same launches: of one modality and of equal shapes."""
        return self.modality, *((name, x.shape, x.dtype) for name, x in self._tensors().items())

    def copy(self) -> "SlotBatch":
        """The slot with tensors of its own."""
        return replace(self, **{name: x.clone() for name, x in self._tensors().items()})

    def copy_from(self, other: "SlotBatch") -> None:
        """Fills the tensors with those of a slot of the same signature."""
        for name, tensor in self._tensors().items():
            tensor.copy_(getattr(other, name))

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
