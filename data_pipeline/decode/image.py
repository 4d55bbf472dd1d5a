"""Image bytes to pixels and patches: JPEG, PNG and WebP through Pillow.

Shape letters: P patches of an image.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError, content_errors

MAX_PIXELS = 50_000_000  # 150 MB decoded; a header may claim any size
READERS = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
# Every exception that Pillow raises for content. None is about a file: the bytes are in memory.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
PILLOW_ERRORS += (OverflowError, MemoryError, AttributeError, struct.error, zlib.error)
PILLOW_ERRORS += (Image.DecompressionBombError,)

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        if self.sequence_length < self.positions + 2:
            raise UserError(
                f"data.image.sequence_length: {self.positions} patches and 2 specials do not fit "
                f"{self.sequence_length}; set it to {self.positions + 2} or more, or size lower"
            )


def validate_patches(section: str, size: int, patch: int) -> None:
    """Raises UserError unless patches tile the square."""
    if patch < 1 or size < 1 or size % patch:
        raise UserError(
            f"{section}.size: must be a multiple of patch ({patch}), at least one, not {size}"
        )


def decode_image(content: bytes, config: ImageConfig) -> np.ndarray:
    """The centre square, upright, as uint8 [size, size, 3] RGB; the first picture of several.

    Raises ContentError, without decoding, for what is not an image or too large, and for content
    that ends early.
    """
    with content_errors(*PILLOW_ERRORS):
        image = _open(content)
        image.draft("RGB", (config.size, config.size))  # JPEG: fewer coefficients, decoded faster
        orientation = _orientation(image.info.get("exif", b""))
        image = _rgb(image)
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize(
            (config.size, config.size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + side, top + side),
        )
        if orientation in UPRIGHT:
            square = square.transpose(UPRIGHT[orientation])
        return np.array(square)


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) as stored, of content that `decode_image` takes."""
    return _open(content).size


def to_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [..., size, size, 3] -> [..., P, patch * patch * 3], row by row from the top left."""
    *lead, size, _, channels = pixels.shape
    side = size // patch
    tiles = pixels.reshape(*lead, side, patch, side, patch, channels).swapaxes(-4, -3)
    return tiles.reshape(*lead, side * side, patch * patch * channels)


def from_patches(patches: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `to_patches`: uint8 [..., P, patch * patch * 3] -> [..., size, size, 3]."""
    *lead, count, _ = patches.shape
    side = round(count**0.5)
    tiles = patches.reshape(*lead, side, side, patch, patch, 3).swapaxes(-4, -3)
    return tiles.reshape(*lead, side * patch, side * patch, 3)


def _open(content: bytes) -> Image.Image:
    """The image with its header read; `Image.open` would warn of sizes that are refused here."""
    reader = next((READERS[start] for start in READERS if content.startswith(start)), None)
    if reader is None:
        raise ContentError("not a JPEG, PNG or WebP image" if content else "no bytes")
    image = reader(io.BytesIO(content))
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ContentError(f"claims {image.width} x {image.height} pixels")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 (upright) where there is none that can be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff.startswith(b"II") else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == EXIF_ORIENTATION:
                return value
    except struct.error:
        pass
    return 1
