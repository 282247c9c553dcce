"""From completions to an annotation."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.contracts import ContractError
from teacher.engines.base import Completion
from teacher.reading import FLOOR, AnswerReader, Outcome, Sample, combine, end_tokens

VOCABULARY = ["<|end|>", "Same", " brand", ".", "<answer", ">", "</answer>", "0", "1", "2", "3", ">2", ">3", "3<", "\n"]


class WordTokenizer:
    """A made-up tokenizer over a fixed list of pieces."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(VOCABULARY[i] for i in ids if not (skip_special_tokens and i == 0))

    def convert_ids_to_tokens(self, token):
        return VOCABULARY[token]

    def convert_tokens_to_ids(self, spelt):
        return VOCABULARY.index(spelt) if spelt in VOCABULARY else 0  # as tokenizers do that have an unknown token


def completion(pieces, answer_logprobs=None, answer_at=None, finish="stop"):
    ids = [VOCABULARY.index(piece) for piece in pieces]
    top = None
    if answer_logprobs is not None:
        top = [{i: 0.0} for i in ids]
        top[answer_at] = {VOCABULARY.index(piece): math.log(p) for piece, p in answer_logprobs.items()}
    return Completion(WordTokenizer().decode(ids), ids, finish, top)


READER = AnswerReader(WordTokenizer(), 4)
PLAIN = ["Same", " brand", ".", "<answer", ">", "3", "</answer>", "<|end|>"]


@pytest.mark.parametrize(
    ("generation", "config", "own", "expected"),
    [
        ([32000, 32001, 32007], 32000, 32000, {32000, 32001, 32007}),  # Phi-3 ends its turns with 32007
        ([1, 106], None, 1, {1, 106}),  # Gemma, <end_of_turn>
        (None, [128001, 128009], 128009, {128001, 128009}),  # Llama 3 names them in config.json too
        (None, None, 2, {2}),
        (7, 5, None, {7}),
    ],
)
def test_every_end_token_that_the_model_names_ends_a_completion(tmp_path, generation, config, own, expected):
    for name, ids in (("generation_config.json", generation), ("config.json", config)):
        if ids is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=own)) == expected


def test_a_model_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ContractError, match="set eos_token_id"):
        end_tokens(tmp_path, SimpleNamespace(eos_token_id=None))


def test_the_distribution_is_read_at_the_answer_digit():
    sample = READER.read(completion(PLAIN, {"3": 0.6, "2": 0.2, "Same": 0.15}, 5))
    assert sample.grade == 3
    assert sample.reasoning == "Same brand."
    total = 0.8 + 2 * FLOOR
    assert sample.probs == pytest.approx([FLOOR / total, FLOOR / total, 0.2 / total, 0.6 / total])


def test_a_digit_that_shares_its_token_is_found():
    pieces = ["Same", "<answer", ">3", "</answer>", "\n", "<|end|>"]
    sample = READER.read(completion(pieces, {">3": 0.5, ">2": 0.25, "3": 0.2}, 2))
    assert sample.grade == 3
    # "3" without its ">" would not be this answer
    assert sample.probs == pytest.approx([0, 0, 1 / 3, 2 / 3], abs=1e-5)


def test_other_spellings_of_a_grade_count_for_it():
    sample = READER.read(completion(PLAIN, {"3": 0.5, "3<": 0.25, "2": 0.25}, 5))
    assert sample.probs == pytest.approx([0, 0, 0.25, 0.75], abs=1e-5)


def test_without_logprobs_there_is_no_distribution():
    sample = READER.read(completion(PLAIN))
    assert (sample.grade, sample.probs) == (3, None)


def test_cut_off_or_unparsable_is_no_vote():
    assert READER.read(completion(PLAIN, finish="length")).grade is None
    assert READER.read(completion(["Same", ".", "<|end|>"])).grade is None
    assert READER.read(completion([*PLAIN[:-1], "Same", "<|end|>"])).grade is None


def test_majority_agreement_and_best_reasoning():
    samples = [
        Sample(3, [0.1, 0.1, 0.2, 0.6], "weak"),
        Sample(None, None, "rubbish"),
        Sample(3, [0.0, 0.0, 0.1, 0.9], "strong"),
        Sample(0, [1.0, 0.0, 0.0, 0.0], "wrong"),
    ]
    outcome = combine(samples, 4)
    assert (outcome.grade, outcome.votes, outcome.n_unparsed, outcome.reasoning) == (3, [3, 3, 0], 1, "strong")
    assert outcome.agreement == pytest.approx(2 / 3)
    assert outcome.probs == pytest.approx([1.1 / 3, 0.1 / 3, 0.3 / 3, 1.5 / 3])


def test_a_tie_goes_to_the_likelier_grade():
    samples = [Sample(0, [0.6, 0.4], "a"), Sample(1, [0.1, 0.9], "b")]
    assert combine(samples, 2).grade == 1
    assert combine(samples[::-1], 2).grade == 1
    assert combine([Sample(1, None, "b"), Sample(0, None, "a")], 2).grade == 0


def test_vote_shares_stand_in_for_probabilities():
    outcome = combine([Sample(g, None, str(g)) for g in (2, 2, 1, 2)], 3)
    assert outcome.probs == pytest.approx([0, 0.25, 0.75])


def test_nothing_parsed():
    assert combine([Sample(None, None, "x")] * 3, 4) == Outcome(None, None, None, None, [], 3)


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=9))
def test_combining_keeps_its_promises(grades):
    outcome = combine([Sample(g, None, str(g)) for g in grades], 4)
    assert outcome.n_unparsed + len(outcome.votes) == len(grades)
    if outcome.votes:
        assert outcome.agreement == pytest.approx(max(outcome.votes.count(g) for g in range(4)) / len(outcome.votes))
        assert sum(outcome.probs) == pytest.approx(1)
        assert outcome.reasoning == str(outcome.grade)
        assert combine([Sample(g, None, str(g)) for g in sorted(grades, key=str)], 4).grade == outcome.grade
