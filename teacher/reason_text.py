"""What of a completion is a reason, and what can be wrong with its text.

`own` is always the text of the pair that a reason is for, which may speak of grades too: those of bolts. What was left out:
grades stated in other languages than English.
"""

from __future__ import annotations

import re

from data.contracts import ALONE

_NAMES_HINT = re.compile(
    r"\bhint\w*|\btold\b|\b(?:right|correct|given|provided|stated|actual) (?:grade|answer|label|rating)\b"
    r"|\b(?:grade|answer|label|rating|score)\b\W*(?:(?:is|was|of|be|ha[sd] (?:not )?been)\W+)?(?:given|provided|stated)",
    re.IGNORECASE,
)
# What ends a reason: its line, a tag of thinking or of the answer, and the answer in other words, with its clause.
_END = re.compile(r"\n|</?think|<\s*/?\s*answer", re.IGNORECASE)
_STATES_GRADE = re.compile(
    r"\b(?:grade[ds]?|answer|label|rat(?:ed|ing)|score)\b"
    r"(?:(?:\W+(?:is|was|as|of|at|an?|be|not|would|should))*\W*[0-9]\b|(?:\W+(?:is|as|of|be))+\W*\Z)",
    re.IGNORECASE,
)
_LOOSE_END = re.compile(r"[\s,;:(]*(?:\b(?:so|therefore|thus|hence|and)\b)?[\s,;:(]*\Z", re.IGNORECASE)
_CLAUSE = re.compile(r".*(?:[.,;:!?]\s|\()", re.DOTALL)
# A full stop behind a word of two letters is rather that of "in." or "ft.".
_SENTENCES = re.compile(r".*(?:\w{3}[\"')\]]*[.!?](?=\s|\Z)|[。！？])", re.DOTALL)
# What begins a word of some length, whatever its ending; of scripts without spaces, every two characters in a row.
_STEM = re.compile(rf"\b[^\W{ALONE}]{{4}}|(?=([{ALONE}]{{2}}))")


def reason_in(text: str, own: str, *, cut_off: bool) -> str | None:
    """The reason that a completion begins with: one line, without the grade where it states it.

    Of a completion that was `cut_off` these are its whole sentences; None if it has none.

    >>> reason_in(" The ad is for a shelf, so the grade is 0.", "oak table", cut_off=False)
    'The ad is for a shelf'
    """
    text = text.lstrip()
    end = _END.search(text)
    text = text[: end.start()] if end else text
    for stated in _STATES_GRADE.finditer(text):
        if stated.group().lower() not in own.lower():
            clause = _CLAUSE.match(text[: stated.start()])
            return _LOOSE_END.sub("", clause.group()) if clause else ""
    if end or not cut_off:
        return text.rstrip()
    whole = _SENTENCES.match(text)
    return whole.group() if whole else None


def says_nothing(reason: str, own: str, guideline: str) -> bool:
    """Whether a reason would do for any pair: no word of the pair is in it, but for those that the guideline has too."""
    stems = _stems(own) - _stems(guideline)
    return bool(stems) and not any(stem in reason.lower() for stem in stems)


def _stems(text: str) -> set[str]:
    return {found.group(1) or found.group() for found in _STEM.finditer(text.lower())}


def names_the_given(reason: str, own: str, name: str) -> bool:
    """Whether a reason shows that it was asked for with a grade given, of this name."""
    named = [found.group() for found in _NAMES_HINT.finditer(reason)]
    named += re.findall(rf"\b{re.escape(name)}\b", reason, re.IGNORECASE)
    return any(each.lower() not in own.lower() for each in named)
