"""Charts show the numbers they were given, in the page's own colours, and nothing else."""

import re

import numpy as np
import pandas as pd
import pytest

from pipeline.report.plots import MAX_POINTS, interval_axis, line_chart


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


def test_a_name_that_begins_with_an_underscore_is_in_the_legend() -> None:
    svg = line_chart([series([0.5, 0.7], "_bad"), series([0.5, 0.7], "_")], "x", "y")
    assert ">\u200b_bad<" in svg
    assert ">\u200b_<" in svg


def test_colours_are_the_style_sheets() -> None:
    svg = line_chart([series([0, 1])], "x", "y")
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'href="#\w+"|url\(#\w+\)', "", svg))
    assert {"bg", "fg", "dim", "rule", "c0"} == set(re.findall(r"var\(--(\w+)\)", svg))


def test_lines_differ_in_more_than_colour() -> None:
    svg = line_chart([series([i, i], f"l{i}") for i in range(20)], "x", "y")
    styles = [style for style in re.findall(r'style="([^"]*)"', svg) if "stroke-width: 1.9" in style]
    assert len(set(styles)) == 20
    assert len(set(re.findall(r'<path id="(m\w+)"', svg))) >= 6  # markers


def test_steps_are_smoothed_only_where_there_are_many() -> None:
    short, long = (line_chart([series([0.0, 1.0] * n)], "x", "y", smooth=True) for n in (5, 20))
    assert ("mean of" in short, "stroke-opacity: 0.4" in short) == (False, False)
    assert ("mean of 4 points" in long, "stroke-opacity: 0.4" in long) == (True, True)


def test_a_long_line_is_thinned() -> None:
    noise = np.random.default_rng(0).normal(size=5001).tolist()
    drawn = max(re.findall(r'<path d="([^"]*)"', line_chart([series(noise)], "x", "y")), key=len)
    assert MAX_POINTS / 2 < drawn.count(" L ") <= 1.3 * MAX_POINTS


@pytest.mark.parametrize(
    ("numbers", "axis"),
    [([0.51, 0.98], (0.5, 1.0)), ([-0.03, 0.31, None], (-0.1, 0.4)), ([], (0.0, 1.0)), ([0.7], (0.2, 1.2))],
)
def test_an_axis_has_round_ends(numbers: list[float | None], axis: tuple[float, float]) -> None:
    assert interval_axis(numbers) == axis
