"""Line charts and bars as inline SVG: no script, no font, no file beside the page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 26  # of the plot's area
MOST_POINTS = 300  # of a line; more are means over neighbours
# Told apart by the colour-blind too (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")


def line_chart(
    title: str,
    series: Series,
    note: str = "",
    dashed: Series | None = None,
    names: Sequence[str] = (),
) -> str:
    """A figure with a line for each series over the steps; "" if no series has a point.

    `dashed` are thin lines in the colours of the series of the same names. A series in `names` has
    the colour of its place there, so that figures agree. Values that are not finite are left out.
    """
    drawn = {name: thin(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    thin_lines = {name: thin((dashed or {}).get(name, ())) for name in drawn}
    every = [point for points in (*drawn.values(), *thin_lines.values()) for point in points]
    axes = _Axes(every)
    shapes = axes.draw()
    entries = []
    places = [*names, *(name for name in drawn if name not in names)]
    for name in sorted(drawn, key=places.index):
        points, color = drawn[name], COLORS[places.index(name) % len(COLORS)]
        shapes.append(axes.line(points, color, name))
        if thin_lines[name]:
            shapes.append(axes.line(thin_lines[name], color, f"{name}, asked", dashed=True))
        last = f"{points[-1][1]:.4g}"
        entries.append(f'<li><i style="background:{color}"></i>{escape(name)} <b>{last}</b></li>')
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(shapes)
        + "</svg>"
    )
    caption = f"<figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>"
    return f'<figure>{caption}{drawing}<ul class="legend">{"".join(entries)}</ul></figure>'


def thin(points: Sequence[Point]) -> list[Point]:
    """The finite points, at most MOST_POINTS: beyond that the means over equal runs of them."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    size = -(-len(finite) // MOST_POINTS)
    if size <= 1:
        return finite
    runs = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(run[-1][0], math.fsum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """From values to places in the drawing."""

    def __init__(self, points: Sequence[Point]):
        self.left, self.right = min(x for x, _ in points), max(x for x, _ in points)
        low, high = min(y for _, y in points), max(y for _, y in points)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - margin, high + margin
        if low >= 0:
            self.low = max(0.0, self.low)

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> list[str]:
        """The grid, the numbers on it and the name of the axis of steps."""
        shapes = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            shapes.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            shapes.append(
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            )
        for value in ticks(self.left, self.right):
            if value != round(value):
                continue
            place = f'x="{self.x(value):.1f}" y="{HEIGHT - 8}"'
            shapes.append(f'<text {place} text-anchor="middle">{value:,.0f}</text>')
        return shapes

    def line(self, points: Sequence[Point], color: str, name: str, dashed: bool = False) -> str:
        """One point alone is a dot."""
        title = f"<title>{escape(name)}</title>"
        if len(points) == 1:
            (x, y) = points[0]
            circle = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3" fill="{color}"'
            return f'<circle class="series" data-name="{escape(name)}" {circle}>{title}</circle>'
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        style = ' stroke-dasharray="3 3" stroke-width="1"' if dashed else ' stroke-width="1.8"'
        return (
            f'<polyline class="series" data-name="{escape(name)}" points="{places}" fill="none"'
            f' stroke="{color}"{style}>{title}</polyline>'
        )


def share_bar(shares: Mapping[str, float]) -> str:
    """One bar cut into parts by their shares of the sum, with a legend in percent."""
    total = math.fsum(shares.values()) or 1.0
    rectangles, entries, left = [], [], 0.0
    for i, (name, value) in enumerate(shares.items()):
        color, width = COLORS[i % len(COLORS)], 100 * value / total
        rectangles.append(
            f'<rect x="{left:.3f}" width="{width:.3f}" y="0" height="6" fill="{color}">'
            f"<title>{escape(name)}</title></rect>"
        )
        entries.append(
            f'<li><i style="background:{color}"></i>{escape(name)} <b>{width:.1f} %</b></li>'
        )
        left += width
    drawing = '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none">'
    return f'{drawing}{"".join(rectangles)}</svg><ul class="legend">{"".join(entries)}</ul>'
