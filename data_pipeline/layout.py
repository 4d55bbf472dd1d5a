"""How a row of images, sound or video stands in a sequence: places, symbols and the caption.

[caption] BEGIN place ... place END, or BEGIN place ... place END [caption]: half and half, by a
hash of the run's seed and the row's id. Then END_OF_DOCUMENT, by which a caption's end is learned,
unless the sequence is full. A place is one patch or one frame of codes, X bytes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arbitor import vocab
from arbitor.audio_codec import NUM_CODES
from arbitor.media.patches import to_patches
from data_pipeline.decode.audio import AudioConfig, decode_audio_codes
from data_pipeline.decode.image import ImageConfig, decode_image
from data_pipeline.decode.video import VideoConfig, decode_video

MediaConfig = ImageConfig | AudioConfig | VideoConfig


@dataclass(frozen=True)
class Layout:
    """The form of a modality's sequences; `decode` raises ContentError."""

    sequence_length: int
    places: int  # at most, in a sequence
    place_bytes: int  # X
    begin: int
    place: int
    end: int
    decode: Callable[[bytes], np.ndarray]  # content -> uint8 [places or fewer, X]

    def symbols(self, places: int, caption: bytes, seed: int, row_id: int) -> tuple[list, bool]:
        """(the row's symbols, at most sequence_length; whether the caption had to be cut)."""
        kept = caption[: self.sequence_length - places - 2]
        content = [self.begin, *[self.place] * places, self.end]
        is_first = hashlib.blake2b(f"{seed} {row_id}".encode(), digest_size=1).digest()[0] & 1
        symbols = [*kept, *content] if is_first else [*content, *kept]
        ending = [vocab.END_OF_DOCUMENT] if len(symbols) < self.sequence_length else []
        return symbols + ending, len(kept) < len(caption)


def layout_of(config: MediaConfig) -> Layout:
    """The layout that a modality's configuration asks for."""

    def decode(content: bytes) -> np.ndarray:
        if isinstance(config, AudioConfig):
            return decode_audio_codes(content, config)
        if isinstance(config, ImageConfig):
            return to_patches(decode_image(content, config), config.patch)
        patches = to_patches(decode_video(content, config), config.patch)
        return patches.reshape(-1, patches.shape[-1])

    if isinstance(config, AudioConfig):
        modality, place_bytes = "audio", NUM_CODES
    else:
        modality = "image" if isinstance(config, ImageConfig) else "video"
        place_bytes = 3 * config.patch**2
    symbols = vocab.CONTENT_SYMBOLS[modality]
    return Layout(config.sequence_length, config.positions, place_bytes, *symbols, decode)


def describe(config: MediaConfig) -> list[Any]:
    """What the fingerprint takes in of a modality's configuration."""
    return [type(config).__name__, sorted(asdict(config).items())]
