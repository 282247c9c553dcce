"""What adaptive samples cost and lose, against as many samples for every pair, on recorded completions of a real teacher.

    python -m benchmarks.annotate_adaptive TEACHER PAIRS RECORDING [--first 2] [--confidences 0.85 0.9 0.95]

The recording is one of `python -m benchmarks.replay` with `--samples 8`: its line i belongs to pair i of the pool. A pair's
further samples have the seeds that they have in a fixed number, so every side reads the same completions, only fewer of
them. For each side: samples, requests and completion tokens a pair, accuracy and ROC-AUC of p(relevant) against the withheld
human grades (a pair without a grade is wrong, its p(relevant) 0.5), and their differences from all recorded samples, with
95 % bootstrap intervals resampled by query. `fixed k` takes k samples of every pair. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay import completion_of, pool_rows
from pipeline.annotation.stopping import further_samples
from student.resampling import Array, Measures, bootstrap, limits, ranked, summed, sums_by_query
from teacher.prompt import load_prompt
from teacher.reading import AnswerReader, Sample, aggregate

Pair = Sequence[tuple[Sample, int]]
"""The samples of a pair, each with its tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--first", type=int, default=2, help="samples before the first decision")
    parser.add_argument("--confidences", type=float, nargs="+", default=[0.85, 0.9, 0.95])
    parser.add_argument("--fixed", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scale, recorded = load_prompt(options.teacher).scale, read(options.teacher, options.recording)
    rows = pool_rows(options.pairs, len(recorded))
    human = np.array([row["grade"] for row in rows])
    query = np.unique([row["query_id"] for row in rows], return_inverse=True)[1]
    n_max = min(map(len, recorded))
    rounds = {f"fixed {n}": [[n]] * len(recorded) for n in (n_max, *options.fixed)}
    for confidence in options.confidences:
        rounds[f"adaptive {confidence:g}"] = [
            adaptive(pair, scale.size, options.first, n_max, confidence) for pair in recorded
        ]
    sides, grades, measures = {}, {}, []
    for name, steps in rounds.items():
        taken = [pair[: counts[-1]] for pair, counts in zip(recorded, steps, strict=True)]
        results = [aggregate([sample for sample, _ in pair], scale.size) for pair in taken]
        grades[name] = np.array([-1 if result.grade is None else result.grade for result in results])
        relevant = np.array(
            [sum(result.grade_probs[scale.relevant_from :]) if result.grade_probs else 0.5 for result in results]
        )
        measures += quality(human, grades[name], relevant, scale.relevant_from, query)
        sides[name] = {
            "samples": round(float(np.mean([len(pair) for pair in taken])), 3),
            "requests": round(float(np.mean([len(counts) for counts in steps])), 3),
            "tokens": round(float(np.mean([sum(tokens for _, tokens in pair) for pair in taken])), 2),
            "same_grade": round(float((grades[name] == grades[f"fixed {n_max}"]).mean()), 4),
        }
    compare(sides, measures, int(query.max()) + 1, options)
    line = {"benchmark": "annotate_adaptive", "pairs": len(rows), "first": options.first, "seed": options.seed}
    print(json.dumps(line | {"sides": sides}))


def read(teacher: Path, recording: Path) -> list[Pair]:
    """The recorded samples of each pair."""
    from transformers import AutoTokenizer

    reader = AnswerReader(AutoTokenizer.from_pretrained(teacher), load_prompt(teacher).scale.size)
    with recording.open(encoding="utf-8") as lines:
        groups = ([completion_of(recorded) for recorded in json.loads(line)] for line in lines)
        return [[(reader.read(completion), len(completion.token_ids)) for completion in group] for group in groups]


def adaptive(pair: Pair, num_grades: int, first: int, n_max: int, confidence: float) -> list[int]:
    """How many samples the pair has after each round."""
    counts = [first]
    while True:
        so_far = aggregate([sample for sample, _ in pair[: counts[-1]]], num_grades)
        more = further_samples(so_far, counts[-1], n_max, confidence)
        if not more:
            return counts
        counts.append(counts[-1] + more)


def quality(human: Array, grades: Array, relevant: Array, relevant_from: int, query: Array) -> list[Measures]:
    """Accuracy, and ROC-AUC (with average precision, which comes with it); all arrays (N,)."""
    right = sums_by_query([(human == grades).astype(float), np.ones(len(human))], query)
    resampled = ranked(human >= relevant_from, relevant, query)
    once = resampled(np.ones((1, int(query.max()) + 1)))
    return [
        summed(right, lambda sums: {"accuracy": sums[:, 0] / sums[:, 1]}),
        Measures({name: float(value[0]) for name, value in once.items()}, resampled),
    ]


def compare(sides: dict[str, dict[str, Any]], measures: list[Measures], n_queries: int, options: Any) -> None:
    """Add to each side its share of the tokens of the first one, its quality, and the differences from the first one."""
    drawn = bootstrap(measures, n_queries, options.resamples, options.seed)
    tokens = next(iter(sides.values()))["tokens"]
    for place, side in enumerate(sides.values()):
        side["tokens_share"] = round(side["tokens"] / tokens, 3)
        for of, name in ((0, "accuracy"), (1, "roc_auc")):
            here, all_samples = measures[2 * place + of].values[name], measures[of].values[name]
            low, high = limits(drawn[2 * place + of][name] - drawn[of][name], n_queries)
            side[name] = round(here, 4)
            if place and low is not None and high is not None:
                side[f"{name}_difference"] = [round(value, 4) for value in (here - all_samples, low, high)]


if __name__ == "__main__":
    main()
