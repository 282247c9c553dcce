"""Charts show the numbers they were given, in the page's own colours, and nothing else."""

import re

import numpy as np
import pandas as pd
import pytest

from pipeline.report.plots import MAX_POINTS, area_chart, interval_axis, line_chart

Drawn = list[tuple[dict[str, str], list[tuple[float, float]]]]


def paths(svg: str) -> Drawn:
    """The style and the points of every line and area that is no line of the grid."""
    drawn = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    styles = [dict(part.strip().split(": ", 1) for part in style.split(";")) for _, style in drawn]
    points = [[tuple(map(float, p)) for p in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)] for d, _ in drawn]
    return [
        (style, place)
        for style, place in zip(styles, points, strict=True)
        if "var(--rule)" not in (style.get("stroke"), style.get("fill"))
    ]  # type: ignore[return-value]


def lines_of(svg: str) -> Drawn:
    """The lines of a chart in their order, and behind them their samples in the legend."""
    return [(style, points) for style, points in paths(svg) if style.get("stroke-width") == "1.9"]


def series(values: list[float], name: str = "a") -> tuple[str, pd.Series]:
    return name, pd.Series(values)


def test_what_is_no_number_is_left_out_and_text_stays_text() -> None:
    svg = line_chart([series([0.5, float("nan"), 0.7], "a<b> $x$"), series([float("nan")], "nothing")], "<i>", "y&")
    assert "nan" not in svg
    assert "nothing" not in svg
    for text in ("a&lt;b&gt; $x$", "&lt;i&gt;", "y&amp;"):
        assert text in svg
    assert line_chart([series([float("nan")])], "x", "y") == ""
    assert line_chart([], "x", "y", diagonal="chance") == ""


def test_colours_are_the_style_sheets() -> None:
    svg = line_chart([series([0, 1])], "x", "y") + area_chart(pd.DataFrame({"a": [0.5, 1], "b": [0.5, 0]}), "x", "y")
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'href="#\w+"|url\(#\w+\)', "", svg))
    assert {"bg", "fg", "dim", "rule", "c0", "a0", "a1"} == set(re.findall(r"var\(--(\w+)\)", svg))


def test_lines_differ_in_more_than_colour() -> None:
    svg = line_chart([series([i, i], f"l{i}") for i in range(20)], "x", "y")
    looks = {(style["stroke"], style.get("stroke-dasharray", "")) for style, _ in lines_of(svg)}
    assert len(looks) == 20
    assert len(set(re.findall(r'<path id="(m\w+)"', svg))) >= 6  # markers


def test_steps_are_smoothed_only_where_there_are_many() -> None:
    short, long = ([0.0, 1.0] * (n // 2) for n in (10, 40))
    assert "mean of" not in line_chart([series(short)], "x", "y", smooth=True)
    svg = line_chart([series(long)], "x", "y", smooth=True)
    assert "mean of 4 points" in svg
    ((_, pale),) = [line for line in paths(svg) if line[0].get("stroke-opacity") == "0.4"]
    (_, bold), _ = lines_of(svg)
    assert len({y for _, y in pale}) == 2
    assert np.ptp([y for _, y in bold[3:-3]]) < 1e-3  # the mean of four neighbours is one half everywhere


def test_a_long_line_is_thinned_to_its_end() -> None:
    noise = np.random.default_rng(0).normal(size=5001).tolist()
    (_, points), _ = lines_of(line_chart([series(noise)], "x", "y"))
    (_, whole), _ = lines_of(line_chart([series(noise[:2] + noise[-2:])], "x", "y"))
    assert MAX_POINTS / 2 < len(points) <= 1.3 * MAX_POINTS
    assert points[-1][0] == pytest.approx(whole[-1][0], abs=3)


def test_sized_marks_have_areas_in_proportion() -> None:
    svg = line_chart([series([0, 1])], "x", "y", sizes={"a": [25, 100]})
    small, large = [points for style, points in paths(svg) if "stroke-width" not in style and len(points) > 9][:2]
    assert np.ptp(large, axis=0) == pytest.approx(2 * np.ptp(small, axis=0), rel=1e-3)


def test_shares_are_stacked() -> None:
    shares = pd.DataFrame({"right": [0.2, 0.5], "mixed": [0.5, 0.25], "wrong": [0.3, 0.25]}, index=[1, 2])
    svg = area_chart(shares, "step", "share")
    areas = [points for style, points in paths(svg) if style.get("fill", "").startswith("var(--a") and len(points) > 4]
    heights = [np.ptp([y for x, y in area if x == min(p[0] for p in area)]) for area in areas]
    assert np.array(heights) / sum(heights) == pytest.approx([0.2, 0.5, 0.3], abs=1e-3)
    many = pd.DataFrame({"a": [0.0, 1.0, 0.5] * 30, "b": [1.0, 0.0, 0.5] * 30})
    assert "means of 3 successive points" in area_chart(many, "step", "share")
    assert area_chart(shares[:1], "x", "y") == ""


@pytest.mark.parametrize(
    ("numbers", "axis"),
    [([0.51, 0.98], (0.5, 1.0)), ([-0.03, 0.31, None], (-0.1, 0.4)), ([], (0.0, 1.0)), ([0.7], (0.2, 1.2))],
)
def test_an_axis_has_round_ends(numbers: list[float | None], axis: tuple[float, float]) -> None:
    assert interval_axis(numbers) == axis
