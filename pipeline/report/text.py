"""How values are written for people."""

from __future__ import annotations

from typing import Any


def number(value: Any) -> str:
    """A number with 4 significant digits, thousands apart; anything else as it is.

    >>> [number(value) for value in (74067, 0.123456, 1e-6, "x", True)]
    ['74,067', '0.1235', '1e-06', 'x', 'True']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def verdict(low: float, high: float, above: str, below: str) -> str:
    """What the limits of a difference say: it is called one only if they do not reach 0.

    >>> verdict(0.1, 0.2, "better", "worse"), verdict(-0.1, 0.2, "better", "worse")
    ('better', 'no difference is shown')
    """
    return above if low > 0 else below if high < 0 else "no difference is shown"


def interval(values: dict[str, float | None] | None) -> str:
    """`0.900 (0.850 to 0.950)` of {value, low, high}; a dash where there is no value.

    >>> interval({"value": 0.9, "low": 0.85, "high": 0.95}), interval({"value": 0.5, "low": None}), interval(None)
    ('0.900 (0.850 to 0.950)', '0.500', '–')
    """
    if values is None or values["value"] is None:
        return "–"
    text = f"{values['value']:.3f}"
    return text if values["low"] is None else f"{text} ({values['low']:.3f} to {values['high']:.3f})"
