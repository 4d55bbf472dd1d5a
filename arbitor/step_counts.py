"""Integer state that moves once a step, by what all slots of the step saw.

It is frozen while the slots run: no position, row or slot sees another through it, and the order of
the slots, their number of workers and restarts change nothing.
Shape letters: S slots of a step, L numbers that a slot counts.
"""

import torch
from torch import Tensor, nn


class StepCounts(nn.Module):
    """A training slot's forward pass calls `count`; the optimizer calls `apply_counts` once a
    step."""

    def __init__(self) -> None:
        super().__init__()
        self._slot_counts: Tensor | None = None

    def count(self, counts_L: Tensor) -> None:
        """Adds int64 [L] to what the slot has counted; L is the same for all slots of a step."""
        if torch.is_grad_enabled():
            before = self._slot_counts
            self._slot_counts = counts_L if before is None else before + counts_L

    def take_counts(self) -> Tensor:
        """What the slot that has just run counted."""
        counts_L, self._slot_counts = self._slot_counts, None
        assert counts_L is not None, "every slot that trains passes every counting module"
        return counts_L

    def apply_counts(self, counts_SL: Tensor, key: int) -> dict[str, float]:
        """Moves the state, a pure function of itself, the counts of all slots in their order and
        `key`, which stands for seed, step and module. Returns figures of the step for the log."""
        raise NotImplementedError
