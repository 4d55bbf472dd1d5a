"""Video encoder: the image encoder for every frame, and which frame it is.

Shape letters: D width, X values of a patch.
"""

from torch import Tensor, nn

from arbitor.encoder.image import ImageEncoder, PatchGrid
from arbitor.kernel.ternary_scale import TernaryEmbedding


class VideoEncoder(nn.Module):
    """Values [..., X], -1..1, of the patches with the numbers [...] -> bfloat16 [..., D]."""

    def __init__(self, grid: PatchGrid, width: int, activation: str):
        super().__init__()
        self.patches_per_frame = grid.patches_per_frame
        self.image = ImageEncoder(grid, width, activation)
        self.frame = TernaryEmbedding(grid.frames, width)

    def forward(self, values: Tensor, number: Tensor) -> Tensor:
        return self.image(values, number) + self.frame(number // self.patches_per_frame)
