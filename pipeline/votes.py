"""From the completions of one pair to its annotation: votes, grade, probabilities, reasoning.

A grade's probability comes from the model's own distribution over the grade digits at the answer, averaged over the
samples; where an engine gives no log probabilities, a sample counts as its vote.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teacher.engines.base import Completion
from teacher.verifier import parse_grade

FLOOR = 1e-6  # probability of a grade that is not among the reported tokens
_TAIL = "</answer>"
_ANSWER_END = re.compile(r"[0-9]</answer>\s*\Z")
_ANSWER = re.compile(r"\s*<answer>[0-9]</answer>\s*\Z")
_LONGEST_TAIL = 24  # tokens; the tail and white space are far fewer


@dataclass(frozen=True)
class Sample:
    """One completion as read: its grade (None if unparsed or cut off), `probs` over the K grades, its reasoning."""

    grade: int | None
    probs: list[float] | None
    reasoning: str


@dataclass(frozen=True)
class Outcome:
    """A pair's annotation; `grade`, `probs`, `agreement` and `reasoning` are None when no sample parsed."""

    grade: int | None
    probs: list[float] | None
    agreement: float | None
    reasoning: str | None
    votes: list[int]
    n_unparsed: int


class AnswerReader:
    """Reads completions of one teacher: its tokenizer and its number of grades."""

    def __init__(self, tokenizer: Any, num_grades: int) -> None:
        self._tokenizer = tokenizer
        self._num_grades = num_grades
        self._spelt: dict[int, str] = {}

    def read(self, completion: Completion) -> Sample:
        """A completion that was cut off has no grade, whatever it says."""
        grade = None if completion.finish_reason == "length" else parse_grade(completion.text, self._num_grades)
        if grade is None:
            return Sample(None, None, completion.text.strip())
        return Sample(grade, self._distribution(completion, grade), _ANSWER.sub("", completion.text).strip())

    def _distribution(self, completion: Completion, grade: int) -> list[float] | None:
        """The model's distribution over the K grades at the answer digit, renormalised; None without log probabilities."""
        if completion.top_logprobs is None:
            return None
        place = self._answer_place(completion.token_ids)
        if place is None or place >= len(completion.top_logprobs):
            return None
        # The digit may share its token with its neighbours, as in ">3": the other grades are spelt the same way.
        head, digit, _ = self._spell(completion.token_ids[place]).rpartition(str(grade))
        if not digit:
            return None
        mass = [0.0] * self._num_grades
        for token, logprob in completion.top_logprobs[place].items():
            spelt = self._spell(token)
            if not spelt.startswith(head):
                continue
            other, rest = spelt[len(head) : len(head) + 1], spelt[len(head) + 1 :]
            if other in "0123456789"[: self._num_grades] and other and _TAIL.startswith(rest):
                mass[int(other)] += math.exp(logprob)
        mass = [max(value, FLOOR) for value in mass]
        return [value / sum(mass) for value in mass]

    def _answer_place(self, token_ids: Sequence[int]) -> int | None:
        """Index of the token that brings the answer's digit: the shortest tail that shows the digit starts with it."""
        for place in range(len(token_ids) - 1, max(-1, len(token_ids) - 1 - _LONGEST_TAIL), -1):
            tail = self._tokenizer.decode(
                list(token_ids[place:]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if _ANSWER_END.search(tail):
                return place
        return None

    def _spell(self, token: int) -> str:
        # As the vocabulary writes it: decoding would lose a leading space, which makes another token.
        if token not in self._spelt:
            self._spelt[token] = str(self._tokenizer.convert_ids_to_tokens(token))
        return self._spelt[token]


def combine(samples: Sequence[Sample], num_grades: int) -> Outcome:
    """The annotation that the samples of one pair amount to.

    grade: the majority of the votes; a tie goes to the higher mean probability, then to the lower grade.
    agreement: the share of the parsed samples that voted for the grade.
    probs: the mean over the parsed samples of their distribution, or of their vote where they have none.
    reasoning: of the sample that voted for the grade with the highest probability, the first among equals.
    """
    parsed = [(sample.grade, sample) for sample in samples if sample.grade is not None]
    unparsed = len(samples) - len(parsed)
    if not parsed:
        return Outcome(None, None, None, None, [], unparsed)
    shares = [sample.probs or [float(g == grade) for g in range(num_grades)] for grade, sample in parsed]
    probs = [sum(column) / len(parsed) for column in zip(*shares, strict=True)]
    votes = [grade for grade, _ in parsed]
    counts = Counter(votes)
    grade = max(counts, key=lambda g: (counts[g], probs[g], -g))
    mine = [(share[grade], -i) for i, share in enumerate(shares) if votes[i] == grade]
    best = parsed[-max(mine)[1]][1]
    return Outcome(grade, probs, counts[grade] / len(parsed), best.reasoning, votes, unparsed)
