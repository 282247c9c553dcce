"""From completions to an annotation, and to the metrics of an evaluation."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.contracts import ContractError
from teacher.engines.base import Completion
from teacher.evaluate import evaluate, label_metrics
from teacher.examples import Example
from teacher.reading import FLOOR, Aggregate, AnswerReader, Sample, aggregate, end_tokens

VOCABULARY = ["<|end|>", "Same", " brand", ".", "<answer", ">", "</answer>", "0", "1", "2", "3", ">2", ">3", "3<", "\n"]


class WordTokenizer:
    """A made-up tokenizer over a fixed list of pieces."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(text)]}

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
        (None, None, None, set()),
    ],
)
def test_every_end_token_that_the_model_names_ends_a_completion(tmp_path, generation, config, own, expected):
    for name, ids in (("generation_config.json", generation), ("config.json", config)):
        if ids is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    if expected:
        assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=own)) == expected
        return
    with pytest.raises(ContractError, match="set eos_token_id"):
        end_tokens(tmp_path, SimpleNamespace(eos_token_id=own))


@pytest.mark.parametrize(
    ("pieces", "at", "likely", "probs"),
    [
        (PLAIN, 5, {"3": 0.6, "2": 0.2, "Same": 0.15}, [FLOOR, FLOOR, 0.2, 0.6]),
        # A digit may share its token; "3" without its ">" would not be this answer.
        ([*PLAIN[:4], ">3", "</answer>", "\n", "<|end|>"], 4, {">3": 0.5, ">2": 0.25, "3": 0.2}, [0, 0, 1, 2]),
        (PLAIN, 5, {"3": 0.5, "3<": 0.25, "2": 0.25}, [0, 0, 0.25, 0.75]),  # other spellings of a grade count for it
    ],
)
def test_the_distribution_is_read_at_the_answer_digit(pieces, at, likely, probs):
    sample = READER.read(completion(pieces, likely, at))
    assert (sample.grade, sample.reasoning) == (3, "Same brand.")
    assert sample.probs == pytest.approx([value / sum(probs) for value in probs], abs=1e-5)


def test_without_logprobs_there_is_no_distribution_and_cut_off_or_unparsable_is_no_vote():
    assert READER.read(completion(PLAIN))[:2] == (3, None)
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
    result = aggregate(samples, 4)
    assert (result.grade, result.votes, result.n_unparsed, result.reasoning) == (3, [3, 3, 0], 1, "strong")
    assert result.agreement == pytest.approx(2 / 3)
    assert result.grade_probs == pytest.approx([1.1 / 3, 0.1 / 3, 0.3 / 3, 1.5 / 3])


def test_a_tie_goes_to_the_likelier_grade():
    samples = [Sample(0, [0.6, 0.4], "a"), Sample(1, [0.1, 0.9], "b")]
    assert aggregate(samples, 2).grade == 1
    assert aggregate(samples[::-1], 2).grade == 1
    assert aggregate([Sample(1, None, "b"), Sample(0, None, "a")], 2).grade == 0
    assert aggregate([Sample(None, None, "x")] * 3, 4) == Aggregate(None, None, None, None, [], 3)


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=9))
def test_aggregates_keep_their_promises(grades):
    result = aggregate([Sample(g, None, str(g)) for g in grades], 4)
    assert result.n_unparsed + len(result.votes) == len(grades)
    if result.votes:
        assert result.agreement == pytest.approx(max(result.votes.count(g) for g in range(4)) / len(result.votes))
        # Vote shares stand in for probabilities.
        assert result.grade_probs == pytest.approx([result.votes.count(g) / len(result.votes) for g in range(4)])
        assert result.reasoning == str(result.grade)
        assert aggregate([Sample(g, None, str(g)) for g in sorted(grades, key=str)], 4).grade == result.grade


class ScriptedEngine:
    """A made-up engine: prompt i gets the i-th list of completions, without log probabilities unless they are asked for."""

    def __init__(self, script):
        self.script = script

    def generate(self, prompts, sampling):
        rows = [self.script[prompt[0]][: sampling.n] for prompt in prompts]
        return rows if sampling.logprobs else [[replace(c, top_logprobs=None) for c in row] for row in rows]


def test_an_evaluation_reads_completions_as_the_annotation_does():
    """Every vote is 3; only the log probabilities at the answer say which pairs are the relevant ones."""
    script = [[completion(PLAIN, {"3": p, "0": 1 - p}, 5)] * 2 for p in (0.9, 0.6, 0.8, 0.7)]
    script[3][1] = completion(PLAIN, finish="length")
    examples = [Example(str(i), gold, "") for i, gold in enumerate((3, 0, 3, 0))]
    how = {"num_grades": 4, "relevant_from": 2, "samples": 2, "max_tokens": 9, "seed": 0}
    metrics = evaluate(ScriptedEngine(script), WordTokenizer(), examples, **how)
    assert metrics["auc"] == 1.0  # of the votes' shares it would be 0.5
    assert (metrics["accuracy"], metrics["pass@1"], metrics["greedy_parse_rate"]) == (0.5, 0.5, 1.0)
    assert (metrics["parse_rate"], metrics["truncated"], metrics["majority@2"]) == (7 / 8, 1 / 8, 0.5)
    blind = [[replace(c, top_logprobs=None) for c in row] for row in script]
    assert evaluate(ScriptedEngine(blind), WordTokenizer(), examples, **how)["auc"] == 0.5


def test_label_metrics_by_hand():
    gold, grades, relevant = np.array([0, 2, 3, 1]), np.array([0, 1, 3, 1]), np.array([0.0, 0.4, 1.0, 0.0])
    metrics = label_metrics(gold, grades, relevant, 2)
    # One grade off once, where 40 / 4 squared grades are expected of these margins by chance.
    expected = {"accuracy": 0.75, "macro_f1": (1 + 2 / 3 + 0 + 1) / 4, "kappa": 1 - 1 / 10, "auc": 1.0}
    assert metrics == pytest.approx(expected)
    assert {"auc", "kappa"}.isdisjoint(label_metrics(gold[:1], grades[:1], relevant[:1], 2))
    silent = np.array([0, -1, 3, 0])  # of what cannot be read nobody knows how far it is off
    assert label_metrics(gold, silent, relevant, 2)["kappa"] == pytest.approx(1 - 1 / 11)
    assert label_metrics(gold, grades, relevant, 2, np.full(4, 10)) == pytest.approx(metrics)


@pytest.mark.parametrize(
    ("text", "grade"), [("3", 3), (" 3", 3), ("3.", 3), ("30", None), ("31", None), ("4", None), ("", None)]
)
def test_an_opened_answer_is_one_digit(text, grade):
    answer = Completion(text=text, token_ids=[1], finish_reason="length", top_logprobs=None)
    assert AnswerReader(WordTokenizer(), 4).read_opened(answer).grade == grade
