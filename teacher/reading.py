"""From the completions of one pair to votes, a grade, probabilities and reasoning, for annotation and evaluation alike.

A grade's probability comes from the model's own distribution over the grade digits at the answer, averaged over the
samples; where an engine gives no log probabilities, a sample counts as its vote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.contracts import ContractError, read_json
from teacher.engines.base import Completion
from teacher.verifier import ANSWER, parse_grade

FLOOR = 1e-6  # probability of a grade that is not among the reported tokens
_TAIL = "</answer>"
_ANSWER_END = re.compile(r"[0-9]</answer>\s*\Z")
_ANSWER_LENGTH = len(ANSWER.format(grade=0))
_THINK_TAGS = re.compile(r"</?think>")
_LONGEST_TAIL = 24  # tokens; the tail and white space are far fewer
_USUAL_TAIL = 8
_REMEMBERED = 100_000  # entries of a cache; answers are spelt in few ways


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The ids of all tokens that end a completion of the model in `folder`, for rewards, evaluation and annotation alike.

    They are the tokenizer's own end token and every `eos_token_id` of generation_config.json or, where that names none, of
    config.json: what vLLM and `transformers.generate` stop at. A completion is finished if its last token is one of them;
    an engine's finish reason `stop` says the same. Raises `ContractError` when there is none.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        named = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if named is not None:
            ids.update(named if isinstance(named, list) else [named])
            break
    if not (ids := ids - {None}):
        raise ContractError(f"{folder} names no end token: set eos_token_id in its generation_config.json")
    return frozenset(ids)


def answer_logprobs(num_grades: int) -> int:
    """How many log probabilities of a step to ask an engine for: the grades, and room for other spellings of them."""
    return min(20, num_grades + 4)


class Sample(NamedTuple):
    """One completion as read: its grade (None if unparsed or cut off), `probs` over the K grades, its reasoning."""

    grade: int | None
    probs: list[float] | None
    reasoning: str


class Aggregate(NamedTuple):
    """What the samples of one pair say together, as columns of `ANNOTATIONS`; the first four are None when none parsed."""

    grade: int | None
    grade_probs: list[float] | None
    agreement: float | None
    reasoning: str | None
    votes: list[int]
    n_unparsed: int


class AnswerReader:
    """Reads completions of one teacher: its tokenizer and its number of grades."""

    def __init__(self, tokenizer: Any, num_grades: int) -> None:
        self._tokenizer = tokenizer
        self.num_grades = num_grades
        # What tokens mean at the answer, and where the digit is from the end: the same few over and over.
        self._grades: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._places: dict[tuple[int, ...], int] = {}

    def read(self, completion: Completion) -> Sample:
        """A completion that did not end by itself has no grade, whatever it says."""
        text = completion.text
        grade = parse_grade(text, self.num_grades) if completion.finish_reason == "stop" else None
        if grade is None:
            return Sample(None, None, text.strip())
        return Sample(
            grade, self._distribution(completion, grade), _THINK_TAGS.sub("", text.rstrip()[:-_ANSWER_LENGTH]).strip()
        )

    def read_opened(self, completion: Completion) -> Sample:
        """A completion that goes on behind an opened answer tag: its first token is the grade, or it has none."""
        text = completion.text.strip()
        digit = text[:1]
        if digit not in map(str, range(self.num_grades)) or text[1:2].isdigit():  # 30 is not grade 3
            return Sample(None, None, "")
        return Sample(int(digit), self._distribution_at(0, completion, int(digit)), "")

    def _distribution(self, completion: Completion, grade: int) -> list[float] | None:
        """The model's distribution over the K grades at the answer digit, renormalised; None without log probabilities."""
        place = None if completion.top_logprobs is None else self._answer_place(completion.token_ids)
        return None if place is None else self._distribution_at(place, completion, grade)

    def _distribution_at(self, place: int, completion: Completion, grade: int) -> list[float] | None:
        """The same where the token at `place` is known to answer with `grade`."""
        if completion.top_logprobs is None or place >= len(completion.top_logprobs):
            return None
        chosen = (completion.token_ids[place], grade)
        grades = self._grades.get(chosen)
        if grades is None:
            grades = self._grades[chosen] = self._grades_beside(*chosen)
        if not grades:
            return None
        logprobs = completion.top_logprobs[place]
        mass = [0.0] * self.num_grades
        for token, other in grades:
            if token in logprobs:
                mass[other] += math.exp(logprobs[token])
        mass = [value if value > FLOOR else FLOOR for value in mass]
        total = sum(mass)
        return [value / total for value in mass]

    def _grades_beside(self, token: int, grade: int) -> list[tuple[int, int]]:
        """The tokens that answer in the place of `token`, which answered `grade`, each with its grade; itself among them.

        Empty when `token` does not show the grade.
        """
        # As the vocabulary writes it: decoding would lose a leading space, which makes another token. The digit may share
        # its token with its neighbours, as in ">3" or "3</": the other grades are spelt the same way or end elsewhere.
        spell, find = self._tokenizer.convert_ids_to_tokens, self._tokenizer.convert_tokens_to_ids
        head, digit, _ = str(spell(token)).rpartition(str(grade))
        if not digit:
            return []
        ends = [_TAIL[:length] for length in range(len(_TAIL) + 1)]
        spelt = {f"{head}{other}{end}": other for other in range(self.num_grades) for end in ends}
        found = {text: find(text) for text in spelt}
        # What the vocabulary lacks comes back as its unknown token, or as None.
        return [(t, spelt[text]) for text, t in found.items() if t is not None and spell(t) == text]

    def _answer_place(self, token_ids: Sequence[int]) -> int | None:
        """Index of the token that brings the answer's digit: the shortest tail that shows the digit starts with it."""
        end = tuple(token_ids[-_USUAL_TAIL:])
        usual = self._places.get(end)
        if usual is not None:
            return len(token_ids) + usual
        for place in range(len(token_ids) - 1, max(-1, len(token_ids) - 1 - _LONGEST_TAIL), -1):
            tail = list(token_ids[place:])
            text = self._tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if _ANSWER_END.search(text):
                if len(tail) <= len(end):  # then it is these last tokens alone that decide
                    if len(self._places) >= _REMEMBERED:
                        self._places.clear()
                    self._places[end] = -len(tail)
                return place
        return None


def aggregate(samples: Sequence[Sample], num_grades: int) -> Aggregate:
    """The grade and the probabilities that follow from the samples of one pair.

    grade: the majority of the votes; a tie goes to the higher mean probability, then to the lower grade.
    agreement: the share of the parsed samples that voted for the grade.
    probs: the mean over the parsed samples of their distribution, or of their vote where they have none.
    reasoning: of the sample that voted for the grade with the highest probability, the first among equals.
    """
    if len(samples) == 1 and samples[0].probs:  # what follows says the same, at some length
        (only,) = samples
        return Aggregate(only.grade, only.probs, 1.0, only.reasoning, [only.grade], 0)  # type: ignore[list-item]
    parsed = [sample for sample in samples if sample.grade is not None]
    unparsed = len(samples) - len(parsed)
    if not parsed:
        return Aggregate(None, None, None, None, [], unparsed)
    votes: list[int] = [sample.grade for sample in parsed]  # type: ignore[misc]
    shares = [
        sample.probs or [float(g == grade) for g in range(num_grades)]
        for sample, grade in zip(parsed, votes, strict=True)
    ]
    probs = [sum(column) / len(parsed) for column in zip(*shares, strict=True)]
    counts = [votes.count(grade) for grade in range(num_grades)]
    most = max(counts)
    grade = max((g for g in range(num_grades) if counts[g] == most), key=lambda g: (probs[g], -g))
    best = max(
        (place for place, vote in enumerate(votes) if vote == grade), key=lambda place: (shares[place][grade], -place)
    )
    return Aggregate(grade, probs, most / len(parsed), parsed[best].reasoning, votes, unparsed)
