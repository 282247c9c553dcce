"""The strict verifier: which grade, if any, a completion answers with.

A completion is right only if its one answer is the last thing in it, so that a model cannot be paid for hedging with two
answers or for quoting an answer that the ad's text holds.
"""

from __future__ import annotations

import re

ANSWER = "<answer>{grade}</answer>"

# ASCII digits only: `\d` would take full-width and other scripts' digits.
_FINAL = re.compile(r"<answer>([0-9])</answer>\s*\Z")
_ANY_TAG = re.compile(r"<\s*/?\s*answer", re.IGNORECASE)


def parse_grade(text: str, num_grades: int) -> int | None:
    """The grade (0 … num_grades−1) that `text` answers with, or None when it does not answer properly.

    Proper is: exactly one `<answer>g</answer>`, at the very end but for white space, g one ASCII digit on the scale.

    >>> parse_grade("Same product.<answer>3</answer>", 4)
    3
    >>> parse_grade("<answer>1</answer> or <answer>3</answer>", 4) is None
    True
    """
    found = _FINAL.search(text)
    if found is None or len(_ANY_TAG.findall(text)) != 2:
        return None
    grade = int(found.group(1))
    return grade if grade < num_grades else None


def reward(text: str, finished: bool, gold: int, num_grades: int) -> float:
    """+1 for a finished completion whose grade is the human one, −1 for a wrong, unparsable or truncated one."""
    return 1.0 if finished and parse_grade(text, num_grades) == gold else -1.0
