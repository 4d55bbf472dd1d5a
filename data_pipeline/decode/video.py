"""Video bytes to frames: MP4 and WebM through PyAV, decoding no further than the last frame needed.

Shape letters: F frames.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError, content_errors, validate_length
from data_pipeline.decode.image import validate_patches

MAX_FRAME_PIXELS = 8192 * 4320
MAX_ASPECT = 20
MAX_FRAME_RATE = 240  # frames decoded for a second of video at most
# Containers that hold their own data: a playlist would have FFmpeg open other files.
OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm"}
ROUNDING = 0.002  # seconds: containers round times to a millisecond or finer
MISSING = 0.5  # seconds between the last frame and the claimed end that are no fault


@dataclass(frozen=True)
class VideoConfig:
    """What becomes of a video: BEGIN_VIDEO, the patches of its frames in order, END_VIDEO."""

    size: int = 64  # pixels of a side, after the centre square is cut out
    patch: int = 16  # pixels of a patch's side
    num_frames: int = 8
    frames_per_second: float = 4.0
    sequence_length: int = 256  # positions of a row, caption and specials included

    @property
    def positions(self) -> int:
        return self.num_frames * (self.size // self.patch) ** 2

    def validate(self) -> None:
        validate_patches("data.video", self.size, self.patch)
        if self.num_frames < 1:
            raise UserError(f"data.video.num_frames: must be at least 1, not {self.num_frames}")
        if self.frames_per_second <= 0:
            raise UserError(
                f"data.video.frames_per_second: must be above 0, not {self.frames_per_second}"
            )
        validate_length(
            "data.video", self.sequence_length, self.positions, "patches", "size or num_frames"
        )


def decode_video(content: bytes, config: VideoConfig) -> np.ndarray:
    """The centre squares of the frames at 0, 1 / rate, 2 / rate ...: uint8 [F, size, size, 3] RGB.

    A frame is the first one at or after its time; after the end the last one is repeated. Raises
    ContentError for what is not a video, is damaged or ends early within these frames.
    """
    pixels = []
    with (
        content_errors(av.error.FFmpegError, ValueError, LookupError, MemoryError),
        av.open(io.BytesIO(content), options=OPTIONS, metadata_errors="replace") as container,
    ):
        stream = _stream(container)
        start = None
        for frame in _frames(container, stream, config):
            start = frame.time if start is None else start
            elapsed = frame.time - start + ROUNDING
            due = min(config.num_frames, 1 + int(elapsed * config.frames_per_second))
            if due > len(pixels):
                pixels += [_square(frame, config.size)] * (due - len(pixels))
            if len(pixels) == config.num_frames:
                return np.stack(pixels)
        if start is None or elapsed + MISSING < _seconds_claimed(container, stream):
            raise ContentError("ends early")
        pixels += [_square(frame, config.size)] * (config.num_frames - len(pixels))
        return np.stack(pixels)


def video_seconds(content: bytes) -> float:
    """The length that the header claims, 0 where it has none, of what `decode_video` takes."""
    with av.open(io.BytesIO(content), options=OPTIONS, metadata_errors="replace") as container:
        return _seconds_claimed(container, _stream(container))


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ContentError("no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ContentError("its codec is not known")
    _check_size(stream.codec_context)
    return stream


def _seconds_claimed(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """The length in the header, 0 where it has none for the video alone."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, config: VideoConfig
) -> Iterator[av.VideoFrame]:
    """Undamaged frames with a time, in order of display."""
    stream.codec_context.thread_count = 1  # the pipeline decodes many videos at a time
    limit = 1 + config.num_frames / config.frames_per_second * MAX_FRAME_RATE
    count = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ContentError("ends early")
        for frame in packet.decode():
            _check_size(frame)
            if frame.is_corrupt or frame.time is None:
                raise ContentError(f"frame {count} is damaged")
            count += 1
            if count > limit:
                raise ContentError(f"more than {MAX_FRAME_RATE} frames a second")
            yield frame


def _check_size(picture: av.VideoFrame | av.VideoCodecContext) -> None:
    short, long = sorted((picture.width, picture.height))
    if short < 1 or short * long > MAX_FRAME_PIXELS or long > MAX_ASPECT * short:
        raise ContentError(f"claims frames of {picture.width} x {picture.height} pixels")


def _square(frame: av.VideoFrame, size: int) -> np.ndarray:
    """The centre square, upright, scaled to uint8 [size, size, 3] RGB."""
    scale = size / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    left, top = (width - size) // 2, (height - size) // 2
    square = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(np.rot90(square, frame.rotation // 90))
