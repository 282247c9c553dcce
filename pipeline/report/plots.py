"""Charts as SVG inside the page: drawn by matplotlib, coloured by the page's style sheet.

Matplotlib knows no CSS variables. It draws with one stand-in colour for each variable of the style sheet, which is replaced
in the SVG, so that a chart follows the page into dark mode. Text stays text. Lines differ in dash and marker too, since
colour alone does not reach every reader.
"""

from __future__ import annotations

import io
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot, which keeps every figure and belongs to one thread
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 230  # about the size at which a chart is shown, so that its text is as large as it says
MAX_POINTS = 400
SMOOTHED = 30  # points from which a curve of single steps is shown by its moving mean
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "X", "P")
COLOURS = ("c0", "c1", "c2", "c3", "c4")
_MARKED = 6  # markers along a curve that has too many points to mark each
_LARGEST = 200.0  # area of the largest sized marker
_STAND_IN = {name: f"#0000{number:02x}" for number, name in enumerate(("bg", "fg", "dim", "rule", *COLOURS), start=1)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _STAND_IN["fg"],
    "axes.facecolor": "none",
    "axes.labelcolor": _STAND_IN["dim"],
    "axes.grid": True,
    "grid.color": _STAND_IN["rule"],
    "xtick.color": _STAND_IN["dim"],
    "ytick.color": _STAND_IN["dim"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
Lines = Iterable[tuple[Hashable, pd.Series]]
"""Named lines, each a series of y by x, such as the columns of a frame (`frame.items()`); NaN is no point."""


@rc_context(_STYLE)
def line_chart(
    lines: Lines,
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    smooth: bool = False,
    marks: bool = False,
    sizes: Mapping[Hashable, Sequence[float]] | None = None,
    diagonal: str = "",
) -> Markup:
    """A chart with its legend; empty when no line has a point.

    `smooth` is for values of single training steps: a line of at least `SMOOTHED` points is drawn as its moving mean over
    a tenth of them, with the steps themselves pale behind it. `marks` draws every point; with `sizes` (by line, one for each
    point) the area of its marker is proportional to its size. `diagonal` names a thin dotted line from (0, 0) to (1, 1).
    """
    axes, note = Figure().add_subplot(xlabel=x_label, ylabel=y_label), ""
    drawn = [(name, line) for name, line in ((name, line.dropna()) for name, line in lines) if len(line)]
    for place, (name, line) in enumerate(drawn):
        colour, marker = _STAND_IN[COLOURS[place % len(COLOURS)]], MARKERS[place % len(MARKERS)]
        if smooth and len(line) >= SMOOTHED:
            axes.plot(_thinned(line), color=colour, linewidth=1, alpha=0.4)
            window = round(len(line) / 10)
            line = line.rolling(window, center=True, min_periods=1).mean()
            note = f"bold: mean of {window} points; pale: each point"
        if sizes:
            areas = np.array(sizes[name]) / max(sizes[name]) * _LARGEST
            axes.scatter(line.index, line, areas, marker=marker, facecolor="none", edgecolor=colour, clip_on=False)
        line = _thinned(line)
        # A curve with too many points to mark each has a few marks, staggered so that lines that run together keep theirs.
        some = [int((place % len(MARKERS) / len(MARKERS) + i) * len(line) / _MARKED) for i in range(_MARKED)]
        look = {"color": colour, "marker": marker, "markerfacecolor": _STAND_IN["bg"], "clip_on": False}
        dash, every = DASHES[place % len(DASHES)], None if marks or sizes or len(line) <= _MARKED else some
        # A zero-width space before the name: a legend leaves out what begins with "_".
        axes.plot(line, dash, linewidth=1.9, markevery=every, label=re.sub("^_", "\u200b_", str(name)), **look)
    if not drawn:
        return Markup("")
    if diagonal:
        axes.plot([0, 1], [0, 1], ":", color=_STAND_IN["dim"], linewidth=1.2, label=diagonal)
    axes.set(xlim=x_range, ylim=y_range)
    if x_range is None:  # steps, or samples
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    return _markup(axes, note)


def _thinned(line: pd.Series) -> pd.Series:
    """At most about `MAX_POINTS` points, evenly spread, the last one among them."""
    step = max(1, len(line) // MAX_POINTS)
    return line.iloc[(len(line) - 1) % step :: step]


def interval_axis(numbers: Sequence[float | None]) -> tuple[float, float]:
    """Round ends around all numbers of a dot-and-interval plot."""
    finite = [number for number in numbers if number is not None and np.isfinite(number)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    ends = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return round(float(ends[0]), 12), round(float(ends[-1]), 12)


def _markup(axes: Any, note: str) -> Markup:
    """The finished chart for the page, with its legend and a note below it."""
    figure, names = axes.figure, axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, names)) > 16 else 2
    figure.set_size_inches(WIDTH / 72, (HEIGHT + 20 * -(-len(names) // columns)) / 72)
    figure.legend(loc="outside lower left", ncols=columns)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    head, _, drawing = out.getvalue().partition("</defs>")  # its style is for a file of its own
    # What no one refers to; the page has its own font.
    drawing = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"|font-family: [^;]*; ', "", drawing)
    drawing = re.sub(r"\s+", " ", drawing)
    for name, colour in _STAND_IN.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    box = re.findall(r'viewBox="[^"]*"', head)[0]
    label = escape(f"{axes.get_ylabel()} by {axes.get_xlabel()}")
    caption = f'<figcaption class="dim">{escape(note)}</figcaption>' if note else ""
    return Markup(f'<figure><svg class="chart" {box} role="img" aria-label="{label}">{drawing}{caption}</figure>')
