"""What the rows of a source mean: from the text of a cell to a grade, a number or attributes."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Literal

from pydantic import Field

from data.contracts import Config, GradeScale

# Python's own parser also takes "1_0" and "infinity", which no person writes as a rating.
_NUMBER = re.compile(r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]{1,3})?")


class Labels(Config):
    """How labels become grades: words by `words`, ratings by the number of `thresholds` that they reach."""

    words: dict[str, int] = Field(default_factory=dict)
    gains: dict[str, float] = Field(default_factory=dict)
    """What the publisher gives for each word in ranking: the rating that is kept."""
    thresholds: tuple[float, ...] = ()
    lowest: float = -sys.float_info.max
    highest: float = sys.float_info.max
    whole: bool = False
    missing: tuple[str, ...] | None = None
    """Labels, in upper case, that mean that there is none; without them every row must have a label."""
    fault: str
    """The reason of a row whose label is none of these."""

    def read(self, cell: str | None) -> tuple[float | None, int | None, str | None]:
        """Rating, grade and fault of a label, each None where there is none."""
        text = (cell or "").strip()
        if self.missing is not None and text not in self.words and (not text or text.upper() in self.missing):
            return None, None, None
        if self.words:
            return self.gains.get(text), self.words.get(text), None if text in self.words else self.fault
        rating = number(text)
        if rating is None or not self.lowest <= rating <= self.highest or (self.whole and rating % 1):
            return rating, None, self.fault
        return rating, sum(rating >= threshold for threshold in self.thresholds), None


class Source(Config):
    """How the rows of a source are to be read; `licence` and `grading` (from its ratings to grades) are sentences."""

    licence: str
    grading: str
    scale: GradeScale
    labels: Labels
    html: bool = False
    """Titles and texts are HTML."""
    attributes: Literal["json", "named values"] = "json"

    def read_attributes(self, cell: str) -> dict[str, str] | None:
        """The attributes that a cell holds; None when it cannot be read."""
        return json_attributes(cell) if self.attributes == "json" else named_values(cell)


def grade_numbers(highest: int, fault: str, missing: tuple[str, ...] | None = None) -> Labels:
    """Labels that are the grades themselves, 0 … `highest`."""
    thresholds = tuple(range(1, highest + 1))
    return Labels(thresholds=thresholds, lowest=0, highest=highest, whole=True, fault=fault, missing=missing)


def number(text: str | None) -> float | None:
    """The decimal number that a text is; None when it is none."""
    text = (text or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else None


def json_attributes(text: str) -> dict[str, str] | None:
    """The members of a JSON object as text, those that are null left out; None for anything else."""
    try:
        members = json.loads(text)
        if not isinstance(members, dict):
            return None
        return {encodable(k): encodable(as_text(v)) for k, v in members.items() if v is not None}
    except (ValueError, RecursionError):  # nested deeper than Python can follow
        return None


def named_values(text: str) -> dict[str, str]:
    """The members of `name:value|name:value`; a part without a name or a value is none."""
    parts = [
        (part.partition(":")[0].strip(), part.rpartition(":")[2].strip()) for part in text.split("|") if ":" in part
    ]
    return {name: value for name, value in sorted(parts) if name and value}


def encodable(text: str) -> str:
    """`text` with `?` for half a character, as a cut through an emoji leaves it in JSON's spelling."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(value: Any) -> str:
    """A JSON value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
