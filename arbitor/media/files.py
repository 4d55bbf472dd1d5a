"""Pixels and codes as PNG, WAV and MP4.

Shape letters: F frames, H height, W width, C codes.
"""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
from PIL import Image

from arbitor.audio_codec import SAMPLING_RATE, decode

FRAME_SIDE = 96  # pixels of a film at least: players show smaller ones badly


def png(pixels_HW3: np.ndarray) -> bytes:
    """uint8 RGB, losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def wav(codes_FC: np.ndarray) -> bytes:
    """The sound of frames of codes, 16 bits at 16 kHz."""
    buffer = io.BytesIO()
    waveform = decode(codes_FC)
    soundfile.write(buffer, waveform, SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def mp4(frames_FHW3: np.ndarray, frames_per_second: float) -> bytes:
    """uint8 RGB as H.264, enlarged to FRAME_SIDE, an odd row or column cut off."""
    frames_FHW3 = enlarge(frames_FHW3, FRAME_SIDE)
    height, width = (side // 2 * 2 for side in frames_FHW3.shape[1:3])
    frames_FHW3 = np.ascontiguousarray(frames_FHW3[:, :height, :width])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(frames_per_second).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"qp": "10"})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for pixels in frames_FHW3:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def enlarge(pictures: np.ndarray, side: int) -> np.ndarray:
    """uint8 [..., H, W, 3]: each pixel becomes the smallest square that makes H `side` or more."""
    factor = -(-side // pictures.shape[-3])
    return pictures.repeat(factor, axis=-3).repeat(factor, axis=-2)
