"""How good a teacher is: against human labels, greedily and over samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

from teacher.engines.base import Completion, Engine, Sampling
from teacher.examples import Example
from teacher.passk import majority_at_k, pass_at_k
from teacher.verifier import parse_grade

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation, and the votes that they come from."""

    figures: dict[str, float]
    votes: NDArray[np.int64]
    """(examples, samples) grades, −1 where a completion did not parse or was truncated."""


def evaluate(
    engine: Engine,
    tokenizer: Any,
    examples: list[Example],
    *,
    num_grades: int,
    relevant_from: int,
    samples: int,
    max_tokens: int,
    seed: int,
) -> Evaluation:
    """Measure the engine's model on labelled examples.

    Figures: `accuracy` and `macro_f1` of the greedy answer; `pass@1` … of samples at temperature 1 (powers of two up to
    `samples`), `majority@k` for the same k, `auc` of the share of votes for a relevant grade, `parse_rate`, `truncated`,
    `completion_tokens` (mean) and `distinct_reasons` (share of sampled completions that differ, within a prompt).
    """
    prompts = [tokenizer(example.prompt, add_special_tokens=False)["input_ids"] for example in examples]
    gold = np.array([example.gold for example in examples])
    greedy = engine.generate(
        prompts, Sampling(n=1, temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=seed, logprobs=0)
    )
    sampled = engine.generate(
        prompts, Sampling(n=samples, temperature=1.0, top_p=1.0, max_tokens=max_tokens, seed=seed, logprobs=0)
    )
    answers = _votes(greedy, num_grades)[:, 0]
    votes = _votes(sampled, num_grades)
    right = (votes == gold[:, None]).sum(axis=1)
    parsed = (votes >= 0).sum(axis=1)
    relevant = ((votes >= relevant_from).sum(axis=1) + 0.5 * (parsed == 0)) / np.maximum(parsed, 1)
    every = [completion for group in sampled for completion in group]
    figures = {
        "accuracy": float((answers == gold).mean()),
        "macro_f1": float(f1_score(gold, answers, labels=list(range(num_grades)), average="macro", zero_division=0)),
        "parse_rate": float((votes >= 0).mean()),
        "greedy_parse_rate": float((answers >= 0).mean()),
        "truncated": float(np.mean([completion.finish_reason == "length" for completion in every])),
        "completion_tokens": float(np.mean([len(completion.token_ids) for completion in every])),
        "distinct_reasons": float(np.mean([len({c.text for c in group}) / len(group) for group in sampled])),
    }
    is_relevant = gold >= relevant_from
    if 0 < is_relevant.sum() < len(gold):
        figures["auc"] = float(roc_auc_score(is_relevant, relevant))
    k = 1
    while k <= samples:
        figures[f"pass@{k}"] = float(pass_at_k(samples, right, k).mean())
        figures[f"majority@{k}"] = majority_at_k(votes, gold, k)
        k *= 2
    return Evaluation(figures, votes)


def _votes(completions: list[list[Completion]], num_grades: int) -> NDArray[np.int64]:
    def vote(completion: Completion) -> int:
        grade = parse_grade(completion.text, num_grades) if completion.finish_reason == "stop" else None
        return -1 if grade is None else grade

    return np.array([[vote(completion) for completion in group] for group in completions], dtype=np.int64)
