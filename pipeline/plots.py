"""Small line charts as inline SVG: no script, no file, colours from the page's own style sheet.

Drawn here rather than by a plotting library, so that a chart follows the page into dark mode and onto a phone, and
costs a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
MAX_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One named line; `x` and `y` of the same length. `marks` draws points, `faint` a thin dashed reference."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    faint: bool = False


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """An SVG element with its legend; points that are not finite are left out. Empty when nothing can be drawn."""
    kept = [_clean(line) for line in lines]
    kept = [line for line in kept if line.x]
    if not kept:
        return Markup("")
    x_low, x_high = x_range or _range([x for line in kept for x in line.x])
    y_low, y_high = y_range or _range([y for line in kept for y in line.y], margin=0.05)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for tick in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<line class="grid" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{px(tick):.1f}" x2="{px(tick):.1f}"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
        f"{escape(y_label)}</text>"
    )
    colour, legend = 0, []
    for line in kept:
        style = "faint" if line.faint else f"c{colour % 6}"
        colour += 0 if line.faint else 1
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="line {style}" points="{points}"/>')
        if line.marks or len(line.x) == 1:
            parts += [
                f'<circle class="{style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>'
                for x, y in zip(line.x, line.y, strict=True)
            ]
        legend.append(f'<span class="key {style}">{escape(line.name)}</span>')
    parts.append("</svg>")
    return Markup(f"<figure>{''.join(parts)}<figcaption>{' '.join(legend)}</figcaption></figure>")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _clean(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=False) if _finite(x) and _finite(y)]
    if len(points) > MAX_POINTS:  # evenly thinned, the last point kept
        stride = len(points) / MAX_POINTS
        points = [points[int(i * stride)] for i in range(MAX_POINTS)] + [points[-1]]
    return Line(line.name, [x for x, _ in points], [y for _, y in points], line.marks, line.faint)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _range(values: list[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)
