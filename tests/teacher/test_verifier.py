"""The verifier's verdict on completions that try to get paid for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.verifier import parse_grade, reward

RIGHT = [
    ("<answer>0</answer>", 0),
    ("The same product.<answer>3</answer>", 3),
    ("reason\n\n<answer>2</answer>\n", 2),
    ("reason <answer>1</answer>  \t", 1),
    ("标题相符。<answer>2</answer>", 2),
    ("👟 same <answer>3</answer>", 3),
    ("a " * 50_000 + "<answer>1</answer>", 1),
    ("1 or 2? Two.<answer>2</answer>", 2),
]
WRONG = [
    "",
    " ",
    "3",
    "answer: 3",
    "<answer></answer>",
    "<answer> 3</answer>",
    "<answer>3 </answer>",
    "<answer>4</answer>",
    "<answer>9</answer>",
    "<answer>-1</answer>",
    "<answer>+1</answer>",
    "<answer>1.0</answer>",
    "<answer>03</answer>",
    "<answer>3",
    "3</answer>",
    "<answer>3</answer",
    "<answer>3</answer>.",
    "<answer>3</answer> because it is the same",
    "<answer>3</answer><answer>3</answer>",
    "<answer>1</answer> or <answer>3</answer>",
    "<answer>1</answer>\n<answer>3</answer>",
    "<answer><answer>3</answer></answer>",
    "<answer>3</answer></answer>",
    "<answer><answer>3</answer>",
    "The ad says '<answer>3</answer>', so <answer>3</answer>",
    "The ad says <ANSWER>3</ANSWER><answer>3</answer>",
    "< answer>3</answer> <answer>3</answer>",
    "<Answer>3</Answer>",
    "<answer>３</answer>",
    "<answer>٣</answer>",
    "<answer>³</answer>",
    "<answer>III</answer>",
    "<answer>three</answer>",
    "<answer>3\x00</answer>",
    "<answer>3</answer>\x00",
    "<answer\n>3</answer>",
    "＜answer＞3＜/answer＞",
    "&lt;answer&gt;3&lt;/answer&gt;",
    "<answer>3</answer><!-- -->",
    "\\boxed{3}",
    "<answer>1,2</answer>",
    "<answer>1</answer" * 1000,
    "<answer>" * 10_000,
    "x" * 100_000,
    "\ufffd\ufffd\ufffd",
    "<answer>\ufffd</answer>",
    "<answer>3</answer>\u200b",
]


@pytest.mark.parametrize(("text", "grade"), RIGHT)
def test_a_proper_answer_is_read(text, grade):
    assert parse_grade(text, 4) == grade


@pytest.mark.parametrize("text", WRONG)
def test_anything_else_is_no_answer(text):
    assert parse_grade(text, 4) is None


@given(st.text(max_size=200))
def test_never_raises_and_stays_on_the_scale(text):
    grade = parse_grade(text, 4)
    assert grade is None or 0 <= grade < 4


def test_the_reward_is_the_verdict():
    assert reward("<answer>3</answer>", True, 3, 4) == 1.0
    assert reward("<answer>2</answer>", True, 3, 4) == -1.0
    assert reward("<answer>3</answer>", False, 3, 4) == -1.0  # truncated
    assert reward("I think 3", True, 3, 4) == -1.0
