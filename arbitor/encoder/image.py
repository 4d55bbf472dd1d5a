"""Image encoder: square patches of pixels with ones appended -> D, and where in the picture.

Shape letters: D width, X values of a patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear

ALIGNMENT = 64  # of a linear's inputs: what the matmuls of a GPU like


@dataclass(frozen=True)
class PatchGrid:
    """`frames` squares of side x side patches, row by row; a run takes it from its data section."""

    patch: int = 16  # pixels of a patch's side
    side: int = 14  # patches of a frame's side
    frames: int = 1
    frames_per_second: float = 4.0  # of a film

    @property
    def patch_values(self) -> int:
        """RGB values of a patch (X)."""
        return 3 * self.patch**2

    @property
    def patches_per_frame(self) -> int:
        return self.side**2

    def validate(self) -> None:
        for name in ("patch", "side", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a grid of patches: expected at least 1")


def to_values(content: Tensor) -> Tensor:
    """uint8 pixel values -> float32 -1..1."""
    return content.float() / 127.5 - 1


def to_pixels(values: Tensor) -> Tensor:
    """The inverse of `to_values`; what is beyond the range is cut."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ImageEncoder(nn.Module):
    """Values [..., X], -1..1, of the patches with the numbers [...] -> bfloat16 [..., D].

    Appended ones, one at least, keep a patch's brightness through the norm.
    """

    def __init__(self, grid: PatchGrid, width: int, activation: str):
        super().__init__()
        self.side = grid.side
        self.ones = ALIGNMENT - grid.patch_values % ALIGNMENT
        self.patch = TernaryLinear(grid.patch_values + self.ones, width, activation)
        self.row = TernaryEmbedding(grid.side, width)
        self.column = TernaryEmbedding(grid.side, width)

    def forward(self, values: Tensor, number: Tensor) -> Tensor:
        extended = F.pad(values.to(torch.bfloat16), (0, self.ones), value=1.0)
        # Pixels carry no gradient: without this autograd would not call the linear's backward.
        extended.requires_grad_(torch.is_grad_enabled())
        place = number % self.side**2
        where = self.row(place // self.side) + self.column(place % self.side)
        return self.patch(extended) + where
