"""The strict verifier: which grade, if any, a completion answers with.

A completion is right only if its one answer is the last thing in it, so that a model cannot be paid for hedging with two
answers or for quoting an answer that the ad's text holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Judge = Callable[[str, Any], bool | None]
"""From a completion's text and the gold answer: right, wrong, or None where the completion does not answer properly."""

OPENED = "<answer>"
ANSWER = f"{OPENED}{{grade}}</answer>"
_THINK_END = "</think>"

# ASCII digits only: `\d` would take full-width and other scripts' digits.
_FINAL = re.compile(r"<answer>([0-9])</answer>\s*\Z")
# White space is matched in one place before the slash and one behind it: with `\s*/?\s*` a run of 10^5 spaces after a "<"
# would take minutes.
_ANY_TAG = re.compile(r"<\s*(?:/\s*)?answer", re.IGNORECASE)


def parse_grade(text: str, num_grades: int) -> int | None:
    """The grade (0 … num_grades−1) that `text` answers with, or None when it does not answer properly.

    Proper is: exactly one `<answer>g</answer>`, at the very end but for white space, g one ASCII digit on the scale. What
    stands in `<think>…</think>` is a reason and holds no answer.

    >>> parse_grade("Same product.<answer>3</answer>", 4)
    3
    >>> parse_grade("<answer>1</answer> or <answer>3</answer>", 4) is None
    True
    """
    text = _after_thinking(text)
    found = _FINAL.search(text)
    if found is None or len(_ANY_TAG.findall(text)) != 2:
        return None
    grade = int(found.group(1))
    return grade if grade < num_grades else None


def _after_thinking(text: str) -> str:
    """What follows the last `</think>`, where a reasoning model thinks; empty while the thinking has not ended."""
    if "<think>" not in text and _THINK_END not in text:
        return text
    _, end, rest = text.rpartition(_THINK_END)
    return rest if end else ""


def grade_judge(num_grades: int) -> Judge:
    """The judge of task `relevance`: is the answer the human grade?"""

    def judge(text: str, gold: int) -> bool | None:
        grade = parse_grade(text, num_grades)
        return None if grade is None else grade == gold

    return judge


def reward(verdict: bool | None, finished: bool) -> float:
    """+1 for a finished completion that is right, −1 for a wrong, unparsable or truncated one."""
    return 1.0 if finished and verdict else -1.0
