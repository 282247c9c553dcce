"""Task math: its loader, and what its judge accepts."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.math_task import load_problems, math_judge
from data.contracts import ContractError

MATH = Path(__file__).resolve().parents[3] / "shared" / "data" / "math"
SETS = {
    "gsm8k_train.jsonl.gz": 7473,
    "math_train.jsonl.gz": 7500,
    "gsm8k_test.jsonl": 1319,
    "math500.jsonl": 500,
    "aime2024.jsonl": 30,
    "aime2025.jsonl": 30,
    "amc23.jsonl": 40,
    "minerva.jsonl": 272,
    "olympiadbench.jsonl": 675,
}


class Chat:
    """A tokenizer as far as the loader uses one."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"[{message['role']}] {message['content']}" for message in messages) + " [assistant]"


@pytest.fixture(scope="module")
def judge():
    return math_judge()


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        ("half of 144 is \\boxed{72}", "72", True),
        ("\\boxed{72.0}", "72", True),
        ("\\boxed{\\frac{144}{2}}", "72", True),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("1 or 2? It is \\boxed{2}.", "2", True),
        *((text, "72", False) for text in ("\\boxed{71}", "\\boxed{1} or \\boxed{72}", "\\boxed{72} no, \\boxed{71}")),
        *((text, "72", False) for text in ("\\boxed{\\infty}", "\\boxed{720/100}")),
        # No box is no answer.
        *(
            (text, "72", None)
            for text in ("", "72", "the answer is 72", "\\boxed{", "\\boxed{}", "\\boxed" * 1000, "x" * 10**5)
        ),
    ],
)
def test_what_is_in_the_box_is_compared_however_written(judge, text, gold, verdict):
    assert judge(text, gold) is verdict


def test_a_tower_of_powers_does_not_hold_the_training_up(judge):
    assert not judge("\\boxed{9^{9^{9^{9}}}}", "72")


def test_problems_are_read_plain_and_gzipped(tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    for name in ("a.jsonl", "a.jsonl.gz"):
        problems = load_problems(tmp_path / name, Chat())
        assert [problem.gold for problem in problems] == ["1", "2", "3"]
        assert problems[0].prompt.startswith("[user] What is 0 + 1?")
        assert "\\boxed{}" in problems[0].prompt
    assert len(load_problems(tmp_path / "a.jsonl", Chat(), limit=2)) == 2


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", b"", "no problem"),
        ("a.jsonl", b"{\n", "line 1 is no JSON"),
        ("a.jsonl", b'{"question": "a"}\n', "lacks the text fields"),
        ("a.jsonl", b"[1]\n", "lacks"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a", "answer": "b"}\n' * 1000, mtime=0)[:60], "cannot be read"),
    ],
)
def test_a_bad_file_is_named(name, content, word, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ContractError, match=word):
        load_problems(tmp_path / name, Chat())
    with pytest.raises(ContractError, match="cannot be read"):
        load_problems(tmp_path / "absent.jsonl", Chat())


@pytest.mark.skipif(not MATH.is_dir(), reason="the math sets (shared/data/math) are not on this machine")
@pytest.mark.parametrize("name", sorted(SETS))
def test_the_real_sets_load_whole_and_their_answers_judge_themselves(judge, name):
    problems = load_problems(MATH / name, Chat())
    assert len(problems) == SETS[name]
    sample = problems[:: max(1, len(problems) // 30)]
    right = sum(judge(f"\\boxed{{{problem.gold}}}", problem.gold) is True for problem in sample)
    assert right >= 0.9 * len(sample)
