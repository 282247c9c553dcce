"""The countdown task: what its judge accepts, and that its problems can be solved."""

import random

import pytest

from benchmarks import countdown

GOLD = "4 7 2 9 -> 71 :"
CHAIN = "9 * 7 = 63 ; 4 * 2 = 8 ; 63 + 8 = 71"


@pytest.mark.parametrize(
    "text", [CHAIN, "4 * 2 = 8 ; 9 * 7 = 63 ; 8 + 63 = 71", "2 * 4 = 8 ; 7 * 9 = 63 ; 63 + 8 = 71"]
)
def test_any_right_chain_is_right(text):
    assert countdown.judge(text, GOLD) is True


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CHAIN.replace("= 63 ;", "= 64 ;"), "a wrong sum"),
        ("9 * 7 = 63 ; 9 - 2 = 7 ; 63 + 7 = 70", "a number used twice"),
        ("9 * 8 = 72 ; 72 - 1 = 71 ; 71 * 1 = 71", "a number that was not given"),
        ("9 * 7 = 63 ; 4 + 2 = 6 ; 63 + 6 = 69", "another target"),
        ("9 * 7 = 63 ; 9 - 2 = 7 ; 63 + 8 = 71", "a value that is gone"),
    ],
)
def test_a_chain_that_does_not_hold_is_wrong(text, why):
    assert countdown.judge(text, GOLD) is False, why


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        CHAIN + " ; 72 * 1 = 72",
        "9 * 7 = 63",
        CHAIN.replace("*", "/"),
        CHAIN.replace("=", "is"),
        CHAIN.replace("9", "９"),
    ],
)
def test_another_form_is_no_answer(text):
    assert countdown.judge(text, GOLD) is None


def test_problems_are_solvable_distinct_and_fixed_by_the_seed():
    made = countdown.make_problems(200, seed=3)
    assert all(countdown.judge(chain, problem.gold) is True for problem, chain in made)
    assert len({problem.prompt for problem, _ in made}) == 200
    assert made == countdown.make_problems(200, seed=3)
    assert made != countdown.make_problems(200, seed=4)


def test_a_random_chain_seldom_solves_a_problem():
    rng = random.Random(0)
    made = countdown.make_problems(100, seed=0)
    right = 0
    for problem, _ in made:
        numbers = [int(number) for number in problem.prompt.split(" -> ")[0].split()]
        right += sum(countdown.judge(countdown.random_chain(numbers, rng)[0], problem.gold) is True for _ in range(20))
    assert right / 2000 < 0.05


def test_one_token_for_each_word_and_a_chain_fits(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(countdown.make_model(tmp_path, 0))
    for problem, chain in countdown.make_problems(50, seed=0):
        ids = tokenizer(chain, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) + 1 <= countdown.MAX_TOKENS
        assert countdown.judge(tokenizer.decode(ids), problem.gold) is True
