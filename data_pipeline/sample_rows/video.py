"""Videos: H.264 in MP4 of one moving shape, captioned as in "a green square moves left"."""

import io

import av
import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from data_pipeline.sample_rows.media import balanced, interleaved, media_table, uniforms
from data_pipeline.sample_rows.shapes import COLOURS, SHAPES, draw_shape

SIZE = 64
COUNT = 504  # each direction, colour and shape seven times
FRAMES_PER_SECOND = 8
NUM_FRAMES = 16
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def rows(times: int = 1) -> pa.Table:
    """`times` as many rows as the sample has."""
    pairs = interleaved(list(DIRECTIONS), list(COLOURS))
    scenes = balanced(times * COUNT, pairs, SHAPES, key="video")
    captions = [f"a {colour} {shape} moves {direction}" for (direction, colour), shape in scenes]
    videos = [_encode(_frames(i, *row)) for i, row in enumerate(scenes)]
    return media_table("video", "mp4", videos, captions)


def _frames(index: int, motion: tuple[str, str], shape: str) -> np.ndarray:
    """uint8 [NUM_FRAMES, SIZE, SIZE, 3]: from near one edge to near the other, at an even speed."""
    direction, colour = motion
    chance = uniforms(3, "video", index)
    ground = int(200 + 55 * chance[0])
    radius = SIZE * (0.12 + 0.06 * chance[1])
    drift = (SIZE / 2 - radius) * (chance[2] - 0.5)
    reach = SIZE / 2 - radius - 1
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    dx, dy = DIRECTIONS[direction]
    for i, frame in enumerate(frames):
        image = Image.new("RGB", (SIZE, SIZE), (ground, ground, ground))
        way = reach * (2 * i / (NUM_FRAMES - 1) - 1)
        x = SIZE / 2 + (way * dx if dx else drift)
        y = SIZE / 2 + (way * dy if dy else drift)
        draw_shape(ImageDraw.Draw(image), shape, colour, x, y, radius)
        frame[:] = np.asarray(image)
    return frames


def _encode(frames: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # Constant quality: x264's rate control gave other bytes in one encoding of twenty.
        options = {"preset": "veryfast", "qp": "20"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
