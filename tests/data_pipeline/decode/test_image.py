"""Images: what comes out of each format, patches, and what is refused."""

import struct
import zlib

import numpy as np
import pytest

from arbitor.errors import UserError
from arbitor.media.patches import from_patches, to_patches
from data_pipeline.decode.image import ImageConfig, decode_image
from tests.data_pipeline.media import BLUE, RED, WHITE, damaged, encode_image, refused

CONFIG = ImageConfig(size=32, patch=8, sequence_length=64)
FORMATS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
}


def corners(width=200, height=100):
    """White, its centre square red in the upper left quarter and blue in the lower right one."""
    pixels = np.full((height, width, 3), WHITE, np.uint8)
    side = min(width, height)
    square = pixels[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    square[: side // 2, : side // 2] = RED
    square[side // 2 :, side // 2 :] = BLUE
    return pixels


def assert_colours(pixels, upper_left, lower_right):
    # JPEG at this quality and the scaling's overshoot err by less than 12 inside a flat area.
    assert pixels.dtype == np.uint8
    assert abs(pixels[6, 6].astype(int) - upper_left).max() < 12
    assert abs(pixels[-7, -7].astype(int) - lower_right).max() < 12
    assert abs(pixels[6, -7].astype(int) - WHITE).max() < 12


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(200, 100), (100, 331), (1500, 1200), (20, 12)])
def test_the_centre_square_is_scaled_to_size(kind, shape):
    pixels = decode_image(encode_image(corners(*shape), kind, **FORMATS[kind]), CONFIG)
    assert pixels.shape == (32, 32, 3)
    assert_colours(pixels, RED, BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_the_exif_orientation_is_applied(kind, orientation):
    stored = corners()
    # By the EXIF standard's table of where the stored first row and column belong.
    stored = stored.swapaxes(0, 1) if orientation >= 5 else stored
    stored = stored[::-1] if orientation in (3, 4, 6, 7) else stored
    stored = stored[:, ::-1] if orientation in (2, 3, 7, 8) else stored
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    content = encode_image(np.ascontiguousarray(stored), kind, exif=exif, **FORMATS[kind])
    assert_colours(decode_image(content, CONFIG), RED, BLUE)


def test_grey_palette_alpha_and_16_bit_images_become_rgb():
    grey = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))
    expected = decode_image(encode_image(grey, "PNG"), CONFIG)
    assert (expected[..., 0] == expected[..., 2]).all() and expected.std() > 50
    deep = encode_image(grey.astype(np.uint16) << 8, "PNG")
    np.testing.assert_array_equal(decode_image(deep, CONFIG), expected)
    alpha = np.dstack([corners(), np.full((100, 200), 200, np.uint8)])
    assert_colours(decode_image(encode_image(alpha, "PNG"), CONFIG), RED, BLUE)


def test_patches_run_row_by_row_and_back():
    pixels = np.arange(2 * 32 * 32 * 3).astype(np.uint8).reshape(2, 32, 32, 3)
    patches = to_patches(pixels, 8)
    assert patches.shape == (2, CONFIG.positions, 8 * 8 * 3)
    np.testing.assert_array_equal(patches[1, 5], pixels[1, 8:16, 8:16].reshape(-1))
    np.testing.assert_array_equal(from_patches(patches, 8), pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_flipped_content_is_refused_or_decoded(kind):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    content = encode_image(noise, kind, **FORMATS[kind])
    for length in (0, 1, 3, 20, len(content) // 2, len(content) - 100):
        refused(decode_image, content[:length], CONFIG)
    damaged(decode_image, content, CONFIG)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def test_a_claimed_size_is_refused_before_memory_is_taken():
    refused(decode_image, png(30_000, 30_000), CONFIG, "30000 x 30000")
    refused(decode_image, png(2**31 - 1, 2**31 - 1), CONFIG)
    refused(decode_image, png(6_000, 6_000), CONFIG, "truncated")
    refused(decode_image, png(0, 5), CONFIG)
    jpeg = encode_image(corners(), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    claim = jpeg[:start] + struct.pack(">HH", 30_000, 30_000) + jpeg[start + 4 :]
    refused(decode_image, claim, CONFIG, "30000 x 30000")
    webp = bytearray(encode_image(corners(), "WEBP", lossless=True))
    start = webp.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1
    webp[start : start + 4] = (16_382 | 16_382 << 14).to_bytes(4, "little")
    refused(decode_image, bytes(webp), CONFIG, "268402689 pixels")


def test_other_content_is_refused():
    refused(decode_image, b"", CONFIG, "no bytes")
    refused(decode_image, b"GIF89a" + bytes(100), CONFIG, "not a JPEG, PNG or WebP")
    refused(decode_image, b"RIFF" + bytes(100), CONFIG)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"size": 100}, "data.image.size"),
        ({"patch": 0}, "data.image.size"),
        ({"size": 0}, "data.image.size"),
        ({"sequence_length": 197}, "data.image.sequence_length"),
    ],
)
def test_a_configuration_that_does_not_fit_names_its_key(values, key):
    ImageConfig().validate()
    ImageConfig(sequence_length=198).validate()
    with pytest.raises(UserError, match=key):
        ImageConfig(**values).validate()
