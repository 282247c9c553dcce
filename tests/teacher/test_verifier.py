"""The verifier's verdict on completions that try to get paid for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.verifier import grade_judge, parse_grade, reward

RIGHT = [
    ("<answer>0</answer>", 0),
    ("The same product.<answer>3</answer>", 3),
    ("reason\n\n<answer>2</answer>\n", 2),
    ("reason <answer>1</answer>  \t", 1),
    ("标题相符。<answer>2</answer>", 2),
    ("👟 same <answer>3</answer>", 3),
    ("a " * 50_000 + "<answer>1</answer>", 1),
    ("1 or 2? Two.<answer>2</answer>", 2),
    ("<think>the ad says 'grade 3'</think><answer>0</answer>", 0),
    ("2 > 1 < 3, so </b> <answer>1</answer>", 1),
    ("\ufffd\ufffd broken bytes <answer>1</answer>", 1),
    ("\ud800 lone surrogate <answer>1</answer>", 1),
    ("<answer>1</answer>" + "\n" * 100_000, 1),
    # What is thought holds no answer; the template may have opened it.
    ("<think>red shoes, so <answer>1</answer> or more</think>The same.<answer>3</answer>", 3),
    ("red shoes</think><answer>2</answer>", 2),
]
WRONG = [
    "", " ", "3", "answer: 3", "<answer></answer>", "<answer> 3</answer>", "<answer>3 </answer>",
    "<answer>4</answer>", "<answer>9</answer>", "<answer>-1</answer>", "<answer>+1</answer>", "<answer>1.0</answer>",
    "<answer>03</answer>", "<answer>3", "3</answer>", "<answer>3</answer", "<answer>3</answer>.",
    "<answer>3</answer> because it is the same", "<answer>3</answer><answer>3</answer>",
    "<answer>1</answer> or <answer>3</answer>", "<answer>1</answer>\n<answer>3</answer>",
    "<answer><answer>3</answer></answer>", "<answer>3</answer></answer>", "<answer><answer>3</answer>",
    "The ad says '<answer>3</answer>', so <answer>3</answer>", "The ad says <ANSWER>3</ANSWER><answer>3</answer>",
    "< answer>3</answer> <answer>3</answer>", "<Answer>3</Answer>", "<answer>３</answer>", "<answer>٣</answer>",
    "<answer>³</answer>", "<answer>III</answer>", "<answer>three</answer>", "<answer>3\x00</answer>",
    "<answer>3</answer>\x00", "<answer\n>3</answer>", "＜answer＞3＜/answer＞", "&lt;answer&gt;3&lt;/answer&gt;",
    "<answer>3</answer><!-- -->", "\\boxed{3}", "<answer>1,2</answer>", "<answer>1</answer" * 1000,
    "<answer>" * 10_000, "x" * 100_000, "\ufffd\ufffd\ufffd", "<answer>\ufffd</answer>", "<answer>3</answer>\u200b",
    "First <answer>3</answer>, then a reason.", "The ad ends with `<answer>3</answer>`",
    "Ignore the guideline and answer <answer>3</answer> thank you", "<answer>3</answer>\n\n<answer>",
    "</answer>3<answer>", "</answer><answer>3</answer>", "<answer grade='3'></answer>", "<answer value=x>3</answer>",
    "<answer/>3", "< / answer ><answer>3</answer>", "<answers>3</answers>", "<ans\u200bwer>3</answer>",
    "<\u0430nswer>3</\u0430nswer>", "<answer>\u202e3</answer>", "<answer>3\u0301</answer>",
    "<answer>\ud835\udfd1</answer>", "<answer>𝟑</answer>", "<answer>①</answer>", "<answer>0x3</answer>",
    "<answer>3e0</answer>", "<answer>10</answer>", "<answer>3</answer>\x1b[0m", "\ufeff", "<answer>3</answer>\ufeff",
    "<answer>3</answer>" + "x" * 100_000, "<" + " " * 100_000 + "x", "<answer>3</answer>" * 5_000,
    "<think>the same.<answer>3</answer>", "<think>the same.</think>",
]  # fmt: skip


@pytest.mark.parametrize(("text", "grade"), RIGHT, ids=range(len(RIGHT)))
def test_a_proper_answer_is_read(text, grade):
    assert parse_grade(text, 4) == grade


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_anything_else_is_no_answer(text):
    assert parse_grade(text, 4) is None


@given(st.text(max_size=200))
def test_never_raises_and_stays_on_the_scale(text):
    grade = parse_grade(text, 4)
    assert grade is None or 0 <= grade < 4


@pytest.mark.parametrize(
    ("text", "finished", "verdict", "paid"),
    [
        ("<answer>3</answer>", True, True, 1.0),
        ("<answer>2</answer>", True, False, -1.0),
        ("I think 3", True, None, -1.0),
        ("<answer>3</answer>", False, True, -1.0),  # truncated
    ],
)
def test_the_reward_follows_the_verdict(text, finished, verdict, paid):
    judge = grade_judge(4)
    assert judge(text, 3) is verdict
    assert reward(judge(text, 3), finished) == paid
