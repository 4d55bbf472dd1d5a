"""Image bytes to pixels, as a run's configuration asks for them."""

from dataclasses import dataclass

import numpy as np

from arbitor.errors import UserError
from arbitor.media.picture import PICTURE_ERRORS, decode_picture
from data_pipeline.decode.content import content_errors, validate_length


@dataclass(frozen=True)
class ImageConfig:
    """What becomes of an image: BEGIN_IMAGE, `positions` patches, END_IMAGE, and a caption."""

    size: int = 224  # pixels of a side, after the centre square is cut out
    patch: int = 16  # pixels of a patch's side
    sequence_length: int = 256  # positions of a row, caption and specials included

    @property
    def positions(self) -> int:
        return (self.size // self.patch) ** 2

    def validate(self) -> None:
        validate_patches("data.image", self.size, self.patch)
        validate_length("data.image", self.sequence_length, self.positions, "patches", "size")


def validate_patches(section: str, size: int, patch: int) -> None:
    """Raises UserError unless patches tile the square."""
    if patch < 1 or size < 1 or size % patch:
        raise UserError(
            f"{section}.size: must be a multiple of patch ({patch}), at least one, not {size}"
        )


def decode_image(content: bytes, config: ImageConfig) -> np.ndarray:
    """The centre square, upright, as uint8 [size, size, 3] RGB; the first picture of several.

    Raises ContentError for content that holds no picture.
    """
    with content_errors(*PICTURE_ERRORS):
        return decode_picture(content, config.size)
