"""A reasoning task for the CPU: reach a target from four numbers, step by step.

    4 7 2 9 -> 71 : 9 * 7 = 63 ; 4 * 2 = 8 ; 63 + 8 = 71

The answer space is large (thousands of chains for each problem, few of them right), so that pass@k means something up to
k = 256, and many different chains can be right. Tokens are whole numbers and signs, so that a decoder of 0.8M weights can
learn the sums. It is a task like `relevance` and `math`: its problems, prompt and judge are here together.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teacher.examples import Problem
from teacher.scratch import write_decoder

NUMBERS = 4
SMALLEST, LARGEST = 1, 9
"""Of the numbers given."""
MOST = 99
"""No value on the way is larger, none is negative."""
MAX_TOKENS = 19
"""A chain of three steps, two separators, the end token; one to spare."""


@cache
def make_problems(count: int, seed: int) -> tuple[tuple[Problem, str], ...]:
    """Solvable problems, each with one right chain.

    Numbers are drawn, then the target from the values that just one of 60 random chains reaches: where many chains end
    anyway would be guessed. `gold` is the problem's own text, which is all that the judge needs. The first n of a larger
    `count` are the problems of count n.
    """
    rng = random.Random(seed)
    made: dict[str, tuple[Problem, str]] = {}
    while len(made) < count:
        numbers = [rng.randint(SMALLEST, LARGEST) for _ in range(NUMBERS)]
        ends = [random_chain(numbers, rng) for _ in range(60)]
        times = Counter(value for _, value in ends)
        reached = {value: chain for chain, value in ends if value >= 10 and times[value] == 1}
        if reached:
            target = rng.choice(sorted(reached))
            text = f"{' '.join(map(str, numbers))} -> {target} :"
            made.setdefault(text, (Problem(text, text), reached[target]))
    return tuple(made.values())


def random_chain(numbers: list[int], rng: random.Random) -> tuple[str, int]:
    """Random steps over `numbers`, and the value they end in."""
    left = list(numbers)
    steps = []
    while len(left) > 1:
        a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
        a, b = max(a, b), min(a, b)
        values = {sign: value for sign, value in (("+", a + b), ("-", a - b), ("*", a * b)) if value <= MOST}
        if not values:
            return random_chain(numbers, rng)
        sign = rng.choice(sorted(values))
        steps.append(f"{a} {sign} {b} = {values[sign]}")
        left.append(values[sign])
    return " ; ".join(steps), left[0]


def judge(text: str, gold: str) -> bool | None:
    """Right if correct steps use every number once and end in the target; None if it is not three steps of that form."""
    before, target = gold.removesuffix(" :").split(" -> ")
    left = [int(number) for number in before.split()]
    steps = [step.split() for step in text.split(";")]
    if len(steps) != NUMBERS - 1 or any(
        len(step) != 5 or step[3] != "=" or step[1] not in {"+", "-", "*"} for step in steps
    ):
        return None
    for a, sign, b, _, value in steps:
        if not all(number.isascii() and number.isdecimal() for number in (a, b, value)):
            return None
        for number in (int(a), int(b)):
            if number not in left:
                return False
            left.remove(number)
        found = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        if found != int(value):
            return False
        left.append(found)
    return left == [int(target)]


def make_model(out: Path, seed: int, hidden: int = 128, layers: int = 3) -> Path:
    """Write an untrained decoder and its tokenizer (one token for each number and sign) into `out`."""
    words = ["<|pad|>", "<|end|>", "<|unknown|>", *map(str, range(MOST + 1)), "+", "-", "*", "=", ";", "->", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return write_decoder(
        tokenizer, out, seed, hidden=hidden, layers=layers, heads=4, feed_forward=3 * hidden, positions=64
    )
