"""Media of known content, encoded in memory, and their damaged copies."""

import io
import time

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipeline.decode.content import ContentError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode_image(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def encode_audio(waveform: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def encode_video(
    frames: np.ndarray, rate: int, kind: str = "mp4", codec: str = "libx264", **options
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def refused(decode, content: bytes, config, reason: str | None = None) -> None:
    """`decode` raises ContentError, with `reason` in one short line, in a CPU second."""
    begin = time.process_time()
    with pytest.raises(ContentError, match=reason) as error:
        decode(content, config)
    assert time.process_time() - begin < 1
    assert 0 < len(str(error.value)) < 300 and "\n" not in str(error.value)


def damaged(decode, content: bytes, config, copies: int = 60) -> int:
    """How many of `copies` with flipped bits are refused; each ends soon and only in that way."""
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(copies):
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[rng.integers(0, len(content), 3)] ^= np.uint8(1) << rng.integers(0, 8, 3, np.uint8)
        begin = time.process_time()
        try:
            decode(flipped.tobytes(), config)
        except ContentError:
            count += 1
        assert time.process_time() - begin < 1
    return count
