"""Small charts as inline SVG: no script, no file, colours from the page's own style sheet.

Drawn here rather than by a plotting library, so that a chart follows the page into dark mode and onto a phone, and
costs a few kilobytes. What tells lines apart is never colour alone: each has a dash and a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 380, 240  # about the size at which a chart is shown, so that its text is as large as it says
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 38
MAX_POINTS = 400
SMOOTHED = 30  # points from which a curve of single steps is shown by its moving mean
COLOURS, DASHES = 5, 4
# Circle, square, triangle, diamond, cross, plus.
SHAPES = (
    "",
    "M-1-1h2v2h-2z",
    "M0-1.2l1.2 2.2h-2.4z",
    "M0-1.3l1.3 1.3l-1.3 1.3l-1.3-1.3z",
    "M-1-1l2 2m0-2l-2 2",
    "M-1 0h2m-1-1v2",
)
_MARKS = 6  # markers along a curve that has too many points to mark each
_BIGGEST = 8.0  # radius of the largest sized marker


@dataclass(frozen=True)
class Line:
    """One named line; `x` and `y` of the same length. `marks` draws every point, `faint` a thin dashed reference.

    `sizes` (of the same length) makes the area of each point's marker proportional to it; such a line marks every point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    faint: bool = False
    sizes: Sequence[float] = ()


@dataclass(frozen=True)
class _Frame:
    """The axes of a chart: data ranges, and where a value is in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str, y_label: str) -> list[str]:
        parts = []
        for tick in ticks(*self.y):
            y = f"{self.py(tick):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{self.py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in ticks(*self.x):
            x = f"{self.px(tick):.1f}"
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(
            f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">{escape(y_label)}</text>'
        )
        return parts


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    smooth: bool = False,
) -> Markup:
    """A figure with its legend; points that are not finite are left out. Empty when nothing can be drawn.

    `smooth` is for values of single training steps: a line of at least `SMOOTHED` points is drawn as its moving mean over
    a tenth of them, with the steps themselves pale behind it.
    """
    kept = [line for line in map(_clean, lines) if line.x]
    if not kept:
        return Markup("")
    frame = _Frame(
        x_range or _range([x for line in kept for x in line.x]),
        y_range or _range([y for line in kept for y in line.y], margin=0.05),
    )
    parts, legend, place, window = frame.grid(x_label, y_label), [], 0, 0
    for line in kept:
        style = "faint" if line.faint else f"c{place % COLOURS} d{place % DASHES}"
        if smooth and len(line.x) >= SMOOTHED:
            window = round(len(line.x) / 10)
            parts.append(f'<polyline class="line pale c{place % COLOURS}" points="{_points(frame, _thin(line))}"/>')
            line = replace(line, y=moving_mean(line.y, window))
        line = _thin(line)
        parts.append(f'<polyline class="line {style}" points="{_points(frame, line)}"/>')
        if not line.faint:
            parts += _markers(frame, line, place)
        legend.append(_key(line.name, style, -1 if line.faint else place))
        place += 0 if line.faint else 1
    note = f"bold: mean of {window} points; pale: each point" if window else ""
    return _figure(parts, f"{y_label} by {x_label}", legend, note)


def area_chart(x: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str) -> Markup:
    """Shares that add up to 1, stacked, the first layer at the bottom; empty with fewer than two points.

    Each layer is (name, one share for each x). Many steps are averaged into fewer points, so that the mix can be seen.
    """
    rows = [row for row in zip(x, *[values for _, values in layers], strict=True) if all(map(_finite, row))]
    if len(rows) < 2:
        return Markup("")
    width = max(1, len(rows) // SMOOTHED)
    groups = [rows[i : i + width] for i in range(0, len(rows), width)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    frame = _Frame(_range([row[0] for row in means]), (0.0, 1.0))
    below = [0.0] * len(means)
    parts, legend = [], []
    for place, (name, _) in enumerate(layers):
        above = [low + row[place + 1] for low, row in zip(below, means, strict=True)]
        corners = [(row[0], top) for row, top in zip(means, above, strict=True)]
        corners += [(row[0], low) for row, low in zip(reversed(means), reversed(below), strict=True)]
        points = " ".join(f"{frame.px(a):.1f},{frame.py(b):.1f}" for a, b in corners)
        parts.append(f'<polygon class="area a{place}" points="{points}"/>')
        legend.append(
            f'<span class="key"><svg class="sample" viewBox="0 0 28 12"><rect class="area a{place}" width="28" height="12"/>'
            f"</svg>{escape(name)}</span>"
        )
        below = above
    note = f"means of {width} successive points" if width > 1 else ""
    # The topmost layer is named first, as the eye meets them.
    return _figure(parts + frame.grid(x_label, y_label), f"{y_label} by {x_label}", legend[::-1], note)


def interval_strip(
    value: float | None,
    low: float | None,
    high: float | None,
    axis: tuple[float, float],
    reference: float | None = None,
) -> Markup:
    """One row of a dot-and-interval (forest) plot, as wide as its cell; `reference` is a dashed line through all rows."""

    def at(number: float) -> str:
        share = (number - axis[0]) / (axis[1] - axis[0])
        return f"{4 + 92 * min(1.0, max(0.0, share)):.2f}%"

    parts = ['<line class="grid" x1="4%" x2="96%" y1="50%" y2="50%"/>']
    if reference is not None:
        parts.append(f'<line class="reference" x1="{at(reference)}" x2="{at(reference)}" y1="0" y2="100%"/>')
    if low is not None and high is not None:
        parts.append(f'<line class="whisker" x1="{at(low)}" x2="{at(high)}" y1="50%" y2="50%"/>')
    if value is not None:
        parts.append(f'<circle class="dot" cx="{at(value)}" cy="50%" r="4.5"/>')
    return Markup(f'<svg class="strip" aria-hidden="true">{"".join(parts)}</svg>')


def interval_scale(axis: tuple[float, float]) -> Markup:
    """The scale below the strips: the ends of the axis, which are round numbers."""
    return Markup(
        f'<svg class="strip" aria-hidden="true"><text x="4%" y="12" text-anchor="start">{axis[0]:g}</text>'
        f'<text x="96%" y="12" text-anchor="end">{axis[1]:g}</text></svg>'
    )


def interval_axis(numbers: Sequence[float | None]) -> tuple[float, float]:
    """Round ends around all numbers of a forest plot."""
    low, high = _range([number for number in numbers if _finite(number)] or [0.0, 1.0])  # type: ignore[misc]
    step = _step((high - low) / 5)
    return round(math.floor(low / step + 1e-9) * step, 12), round(math.ceil(high / step - 1e-9) * step, 12)


def share_bar(share: float) -> Markup:
    """A bar as long as `share` (0 … 1) of its cell."""
    width = 100 * min(1.0, max(0.0, share))
    return Markup(f'<svg class="bar" aria-hidden="true"><rect class="full" width="{width:.2f}%" height="100%"/></svg>')


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value with its neighbours, `window` values in all; fewer at the ends.

    >>> moving_mean([0, 3, 6, 3], 3)
    [1.5, 3.0, 4.0, 4.5]
    """
    before, after = (window - 1) // 2, window // 2
    cut = [values[max(0, i - before) : i + after + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in cut]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about so many."""
    step = _step((high - low) / about)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.85)


def _figure(parts: list[str], label: str, legend: list[str], note: str) -> Markup:
    drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    said = f'<span class="dim">({note})</span>' if note else ""
    return Markup(f"<figure>{drawing}{''.join(parts)}</svg><figcaption>{' '.join(legend)} {said}</figcaption></figure>")


def _points(frame: _Frame, line: Line) -> str:
    return " ".join(f"{frame.px(x):.1f},{frame.py(y):.1f}" for x, y in zip(line.x, line.y, strict=True))


def _markers(frame: _Frame, line: Line, place: int) -> list[str]:
    points = list(zip(line.x, line.y, line.sizes or [0.0] * len(line.x), strict=True))
    if not (line.marks or line.sizes) and len(points) > _MARKS:
        # Staggered, so that lines that run together keep their own marks.
        stride = len(points) / _MARKS
        points = [points[int((i + (place % len(SHAPES)) / len(SHAPES)) * stride)] for i in range(_MARKS)]
    most = max(line.sizes, default=0.0) or 1.0
    return [
        _marker(place, frame.px(x), frame.py(y), max(2.0, _BIGGEST * math.sqrt(size / most)) if line.sizes else 3.2)
        for x, y, size in points
    ]


def _marker(place: int, x: float, y: float, r: float) -> str:
    style, shape = f"mark c{place % COLOURS}", SHAPES[place % len(SHAPES)]
    if not shape:
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    return f'<path class="{style}" transform="translate({x:.1f} {y:.1f}) scale({r:.1f})" d="{shape}"/>'


def _key(name: str, style: str, place: int) -> str:
    mark = _marker(place, 14, 6, 3.2) if place >= 0 else ""
    sample = (
        f'<svg class="sample" viewBox="0 0 28 12"><line class="line {style}" x1="0" x2="28" y1="6" y2="6"/>{mark}</svg>'
    )
    return f'<span class="key">{sample}{escape(name)}</span>'


def _clean(line: Line) -> Line:
    sizes = line.sizes or [0.0] * len(line.x)
    points = [row for row in zip(line.x, line.y, sizes, strict=False) if all(map(_finite, row))]
    x, y, kept = [list(column) for column in zip(*points, strict=True)] if points else ([], [], [])
    return replace(line, x=x, y=y, sizes=kept if line.sizes else ())


def _thin(line: Line) -> Line:
    """At most `MAX_POINTS` points, evenly spread, and the last one."""
    if len(line.x) <= MAX_POINTS or line.sizes:
        return line
    kept = [int(i * len(line.x) / MAX_POINTS) for i in range(MAX_POINTS)] + [len(line.x) - 1]
    return replace(line, x=[line.x[i] for i in kept], y=[line.y[i] for i in kept])


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _range(values: list[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)
