"""Pictures: JPEG scenes of two shapes, with captions such as "a red circle above a blue square"."""

import io

import pyarrow as pa
from PIL import Image, ImageDraw

from data_pipeline.sample_rows.media import balanced, media_table, uniforms
from data_pipeline.sample_rows.shapes import COLOURS, SHAPES, draw_shape

SIZE = 128
COUNT = 3240  # each pair of colours, shapes and a relation three times
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


def rows(times: int = 1) -> pa.Table:
    """`times` as many rows as the sample has."""
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    scenes = balanced(times * COUNT, list(RELATIONS), pairs, SHAPES, SHAPES, key="image")
    captions = [f"a {a} {first} {side} a {b} {second}" for side, (a, b), first, second in scenes]
    return media_table("image", "jpg", [_scene(i, *row) for i, row in enumerate(scenes)], captions)


def _scene(index: int, relation: str, colours: tuple[str, str], first: str, second: str) -> bytes:
    """The first shape on its side of the middle, the second opposite, on a light ground."""
    chance = uniforms(7, "image", index)
    ground = int(200 + 55 * chance[0])
    image = Image.new("RGB", (SIZE, SIZE), (ground, ground, ground))
    canvas = ImageDraw.Draw(image)
    for i, (sign, colour, shape) in enumerate(((1, colours[0], first), (-1, colours[1], second))):
        size, along, across = chance[1 + 3 * i : 4 + 3 * i]
        radius = SIZE * (0.11 + 0.08 * size)
        offset = SIZE * (0.25 + 0.04 * (along - 0.5)) * sign
        drift = SIZE * 0.3 * (across - 0.5)
        dx, dy = RELATIONS[relation]
        x = SIZE / 2 + (offset * dx if dx else drift)
        y = SIZE / 2 + (offset * dy if dy else drift)
        draw_shape(canvas, shape, colour, x, y, radius)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
