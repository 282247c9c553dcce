"""How good a teacher is: against human labels, greedily and over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from teacher.engines.base import Completion, Engine, Sampling
from teacher.examples import Example
from teacher.passk import majority_at_k, pass_at_k
from teacher.reading import AnswerReader, Sample, aggregate, answer_logprobs

_LOGPROB_STEPS = 500_000  # tokens whose log probabilities are held at a time, about 600 bytes each


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
) -> dict[str, float]:
    """Metrics of the engine's model on labelled examples.

    `accuracy` and `macro_f1` of the greedy answer; `pass@1` … of samples at temperature 1 (powers of two up to `samples`),
    `majority@k` for the same k, `auc` of p(relevant) as annotations have it (see `aggregate`; 0.5 where no sample parsed),
    `parse_rate`, `truncated`, `completion_tokens` (mean) and `distinct_reasons` (share of sampled completions that
    differ, within a prompt).
    """
    prompts = [tokenizer(example.prompt, add_special_tokens=False)["input_ids"] for example in examples]
    gold = np.array([example.gold for example in examples])
    reader = AnswerReader(tokenizer, num_grades)
    greedy = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=max_tokens, seed=seed))
    answers = np.array([_vote(reader.read(completion)) for (completion,) in greedy])
    sampling = Sampling(n=samples, max_tokens=max_tokens, seed=seed, logprobs=answer_logprobs(num_grades))
    completions: list[list[Completion]] = []
    votes, relevant = [], []
    size = max(1, _LOGPROB_STEPS // (samples * max_tokens))
    for start in range(0, len(prompts), size):
        for group in engine.generate(prompts[start : start + size], sampling):
            read = [reader.read(completion) for completion in group]
            votes.append([_vote(sample) for sample in read])
            probs = aggregate(read, num_grades).grade_probs
            relevant.append(sum(probs[relevant_from:]) if probs else 0.5)
            completions.append([replace(completion, top_logprobs=None) for completion in group])
    return {
        **label_metrics(gold, answers, np.array(relevant), relevant_from),
        "greedy_parse_rate": float((answers >= 0).mean()),
        **_sampled_metrics(np.array(votes, dtype=np.int64), gold),
        **_completion_metrics(completions),
    }


def label_metrics(
    gold: np.ndarray, grades: np.ndarray, relevant: np.ndarray, relevant_from: int, counts: np.ndarray | None = None
) -> dict[str, float]:
    """A teacher's grades and p(relevant) against human grades, all (N,); a row stands for as many pairs as `counts` says.

    `accuracy`, `macro_f1` over the grades that humans gave, `kappa` (Cohen's, quadratic weights, of answers that can be
    read), and `auc`; the last two are absent where all pairs are of one grade or class.
    """
    labels = np.unique(gold)
    metrics = {
        "accuracy": float(accuracy_score(gold, grades, sample_weight=counts)),
        "macro_f1": float(
            f1_score(gold, grades, labels=labels, average="macro", zero_division=0, sample_weight=counts)
        ),
    }
    answered = grades >= 0
    if answered.any() and len(np.unique(gold[answered])) > 1:
        metrics["kappa"] = float(
            cohen_kappa_score(
                gold[answered],
                grades[answered],
                labels=np.arange(1 + max(gold.max(), grades.max())),  # also grades that nobody gave: they are far apart
                weights="quadratic",
                sample_weight=None if counts is None else counts[answered],
            )
        )
    is_relevant = gold >= relevant_from
    if len(np.unique(is_relevant)) == 2:
        metrics["auc"] = float(roc_auc_score(is_relevant, relevant, sample_weight=counts))
    return metrics


def _sampled_metrics(votes: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Of grades (examples, samples), −1 where a completion did not parse or was truncated."""
    samples = votes.shape[1]
    right = (votes == gold[:, None]).sum(axis=1)
    metrics = {"parse_rate": float((votes >= 0).mean())}
    k = 1
    while k <= samples:
        metrics[f"pass@{k}"] = float(pass_at_k(samples, right, k).mean())
        metrics[f"majority@{k}"] = majority_at_k(votes, gold, k)
        k *= 2
    return metrics


def _completion_metrics(groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
    every = [completion for group in groups for completion in group]
    return {
        "truncated": float(np.mean([completion.finish_reason != "stop" for completion in every])),
        "completion_tokens": float(np.mean([len(completion.token_ids) for completion in every])),
        "distinct_reasons": float(np.mean([len({c.text for c in group}) / len(group) for group in groups])),
    }


def _vote(sample: Sample) -> int:
    return -1 if sample.grade is None else sample.grade
