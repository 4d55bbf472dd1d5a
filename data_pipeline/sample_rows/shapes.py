"""Coloured shapes, drawn for pictures and videos."""

from PIL import ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (240, 200, 30),
    "purple": (160, 40, 160),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle")


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, colour: str, x: float, y: float, radius: float
) -> None:
    """A shape as wide and high as 2 * radius around (x, y), in pixels."""
    box = (x - radius, y - radius, x + radius, y + radius)
    left, top, right, bottom = box
    fill = COLOURS[colour]
    if shape == "circle":
        canvas.ellipse(box, fill)
    elif shape == "square":
        canvas.rectangle(box, fill)
    else:
        canvas.polygon([(x, top), (left, bottom), (right, bottom)], fill)
