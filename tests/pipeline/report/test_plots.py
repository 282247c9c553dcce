"""Charts show the numbers they were given, and nothing that is no number."""

import re

import pytest

from pipeline.report.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    area_chart,
    interval_axis,
    interval_strip,
    line_chart,
    moving_mean,
    share_bar,
    ticks,
)


def polylines(svg: object) -> list[list[tuple[float, float]]]:
    drawn = re.findall(r'<(?:polyline|polygon) class="[^"]*" points="([^"]*)"', str(svg))
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in drawn]  # type: ignore[misc]


def test_a_line_goes_where_its_numbers_say() -> None:
    svg = line_chart([Line("a", [0, 1, 2], [0.0, 1.0, 0.5])], "x", "y", y_range=(0.0, 1.0))
    bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
    assert polylines(svg) == [[(LEFT, bottom), ((LEFT + WIDTH - RIGHT) / 2, TOP), (WIDTH - RIGHT, middle)]]


def test_charts_leave_out_what_is_no_number() -> None:
    nan = float("nan")
    svg = str(line_chart([Line("a<b>", [0, 1, 2], [0.5, nan, 0.7])], "x", "y"))
    assert "nan" not in svg
    assert "a&lt;b&gt;" in svg
    assert str(line_chart([Line("a", [0.0], [nan])], "x", "y")) == ""
    assert "<circle" in str(line_chart([Line("a", [3.0], [0.5])], "x", "y"))


def test_lines_differ_in_more_than_colour() -> None:
    svg = str(line_chart([Line(f"l{i}", [0, 1], [i, i]) for i in range(20)], "x", "y"))
    looks = re.findall(r'<polyline class="line ([^"]*)"', svg)
    assert len(set(looks)) == 20
    legend = svg.split("<figcaption>")[1]
    marks = [re.search(r' d="([^"]*)"', key) for key in legend.split('class="key"')[1:7]]
    assert len({mark and mark[1] for mark in marks}) == 6


def test_steps_are_smoothed_only_where_there_are_many() -> None:
    short, long = [Line("a", range(n), [0.0, 1.0] * (n // 2)) for n in (10, 40)]
    assert len(polylines(line_chart([short], "x", "y", smooth=True))) == 1
    pale, bold = polylines(line_chart([long], "x", "y", smooth=True))
    assert len({y for _, y in pale}) == 2
    assert len({y for _, y in bold[3:-3]}) == 1  # the mean of four neighbours is one half everywhere
    assert "mean of 4 points" in str(line_chart([long], "x", "y", smooth=True))


def test_a_long_line_is_thinned_to_its_end() -> None:
    (points,) = polylines(line_chart([Line("a", range(5001), range(5001))], "x", "y"))
    assert len(points) == 401
    assert points[-1][0] == WIDTH - RIGHT


def test_sized_marks_have_areas_in_proportion() -> None:
    svg = str(line_chart([Line("a", [0, 1], [0, 1], sizes=[25, 100])], "x", "y"))
    first, second = [float(r) for r in re.findall(r'<circle class="mark c0" [^>]*r="([\d.]+)"', svg)[:2]]
    assert second == 2 * first


def test_shares_are_stacked() -> None:
    layers = [("right", [0.2, 0.5]), ("mixed", [0.5, 0.25]), ("wrong", [0.3, 0.25])]
    svg = area_chart([1, 2], layers, "step", "share")
    height = HEIGHT - BOTTOM - TOP
    tops = [[(HEIGHT - BOTTOM - y) / height for _, y in corners[:2]] for corners in polylines(svg)]
    assert tops == [pytest.approx([0.2, 0.5], abs=1e-3), pytest.approx([0.7, 0.75], abs=1e-3), pytest.approx([1, 1])]
    assert re.findall(r"</svg>(\w+)</span>", str(svg)) == ["wrong", "mixed", "right"]  # as they lie
    many = area_chart(range(90), [("a", [0.0, 1.0, 0.5] * 30), ("b", [1.0, 0.0, 0.5] * 30)], "step", "share")
    assert {y for _, y in polylines(many)[0][:30]} == {(TOP + HEIGHT - BOTTOM) / 2}  # means of three
    assert str(area_chart([1], [("a", [1.0])], "x", "y")) == ""


def test_an_interval_is_drawn_on_its_axis() -> None:
    svg = str(interval_strip(0.5, 0.25, 1.0, (0.0, 1.0), reference=0.0))
    assert 'cx="50.00%"' in svg
    assert 'class="whisker" x1="27.00%" x2="96.00%"' in svg
    assert 'class="reference" x1="4.00%"' in svg
    assert "circle" not in str(interval_strip(None, None, None, (0.0, 1.0)))


@pytest.mark.parametrize(
    ("numbers", "axis"),
    [([0.51, 0.98], (0.5, 1.0)), ([-0.03, 0.31, None], (-0.1, 0.4)), ([], (0.0, 1.0)), ([0.7], (0.2, 1.2))],
)
def test_an_axis_has_round_ends(numbers: list[float | None], axis: tuple[float, float]) -> None:
    assert interval_axis(numbers) == axis


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [re.findall(r'width="([\d.]+%)"', str(share_bar(share))) for share in (0.125, 7.0)] == [
        ["12.50%"],
        ["100.00%"],
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 900, [0, 200, 400, 600, 800])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_a_moving_mean_is_of_neighbours() -> None:
    assert moving_mean([0, 3, 6, 3], 3) == [1.5, 3.0, 4.0, 4.5]
    assert moving_mean([1, 2], 1) == [1.0, 2.0]
