"""A picture's bytes to pixels: JPEG, PNG and WebP through Pillow, the centre square, upright."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

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


class PictureError(Exception):
    """Content that is no picture, or too large a one; the message is the reason."""


PICTURE_ERRORS = (PictureError, *PILLOW_ERRORS)  # what damaged or foreign content raises


def decode_picture(content: bytes, side: int) -> np.ndarray:
    """The centre square, upright, as uint8 [side, side, 3] RGB; the first picture of several.

    Raises one of PICTURE_ERRORS, without decoding, for what is not an image or too large, and for
    content that ends early.
    """
    image = _open(content)
    image.draft("RGB", (side, side))  # JPEG: fewer coefficients, decoded faster
    orientation = _orientation(image.info.get("exif", b""))
    image = _rgb(image)
    square = min(image.size)
    left, top = (image.width - square) / 2, (image.height - square) / 2
    scaled = image.resize(
        (side, side),
        Image.Resampling.BILINEAR,
        box=(left, top, left + square, top + square),
    )
    if orientation in UPRIGHT:
        scaled = scaled.transpose(UPRIGHT[orientation])
    return np.array(scaled)


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) as stored, of content that `decode_picture` takes."""
    return _open(content).size


def _open(content: bytes) -> Image.Image:
    """The image with its header read; `Image.open` would warn of sizes that are refused here."""
    reader = next((READERS[start] for start in READERS if content.startswith(start)), None)
    if reader is None:
        raise PictureError("not a JPEG, PNG or WebP image" if content else "no bytes")
    image = reader(io.BytesIO(content))
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise PictureError(f"claims {image.width} x {image.height} pixels")
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
