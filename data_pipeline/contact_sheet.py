"""Pictures side by side on one sheet, each with a few words beneath."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
FONT_SIZE = 13
LINE_HEIGHT = 17
MAX_LINES = 3


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Image.Image:
    """uint8 [H, W, 3] each, all of one size; a caption that is too long ends in '...'."""
    height, width = pictures[0].shape[:2]
    font = ImageFont.load_default(FONT_SIZE)
    lines = [_lines(caption, width, font) for caption in captions]
    tile_height = height + max(map(len, lines)) * LINE_HEIGHT + MARGIN
    rows = -(-len(pictures) // columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (tile_height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, words) in enumerate(zip(pictures, lines, strict=True)):
        x = MARGIN + i % columns * (width + MARGIN)
        y = MARGIN + i // columns * (tile_height + MARGIN)
        sheet.paste(Image.fromarray(picture), (x, y))
        for j, line in enumerate(words):
            draw.text((x, y + height + 2 + j * LINE_HEIGHT), line, "black", font)
    return sheet


def _lines(caption: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Broken between words where that is possible, and at the end of the picture where not."""
    lines, rest = [], " ".join(caption.split())
    while rest and len(lines) < MAX_LINES:
        count = len(rest)
        while count > 1 and font.getlength(rest[:count]) > width:
            count -= 1
        if count < len(rest) and " " in rest[:count]:
            count = rest[:count].rindex(" ") + 1
        lines.append(rest[:count].rstrip())
        rest = rest[count:]
    if rest:
        lines[-1] = lines[-1][:-3] + "..."
    return lines
