"""`student.metrics.evaluate`: its cost on many rows against resampling with scikit-learn, and the coverage of its intervals.

    python -m benchmarks.evaluation                      (a million rows, a thousand resamples; then 1,000 simulated samples)
    python -m benchmarks.evaluation --rows 100000 --simulations 100

The peer repeats the rows of each drawn query and calls scikit-learn for the same measures, as one would by hand; its time is
measured over a few resamples and multiplied. Coverage: how often the 95 % interval holds the truth, in samples of queries
whose rows resemble each other; the truth is the value on a sample of 200,000 queries. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from student.metrics import Labels, evaluate, expected_calibration_error, ndcg_by_query

Array = np.ndarray
GRADES, RELEVANT_FROM, THRESHOLD = 3, 2, 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--peer-resamples", type=int, default=5)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 400], help="in one simulated sample")
    options = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "evaluation"}
    if options.rows:
        found |= cost(options.rows, options.resamples, options.peer_resamples)
    if options.simulations:
        found["simulations"] = options.simulations
        found["coverage"] = {n: coverage(n, options.simulations) for n in options.queries}
    print(json.dumps(found))


def cost(rows: int, resamples: int, peer_resamples: int) -> dict[str, Any]:
    """Seconds of both sides, peak memory of ours, and the largest difference of the values from scikit-learn's."""
    grade, probs, query = draw(rows // 10, np.random.default_rng(1))
    begin = time.monotonic()
    result = evaluate(Labels(grade, query, RELEVANT_FROM, resamples, seed=2), probs, threshold=THRESHOLD)
    seconds = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ours = {name: interval.value for name, interval in result.metrics.items()}
    theirs = by_hand(grade, probs, query)
    difference = max(abs((ours[name] or 0) - value) for name, value in theirs.items())

    rng = np.random.default_rng(3)
    begin = time.monotonic()
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1], True])
    for _ in range(peer_resamples):
        drawn = rng.integers(len(starts) - 1, size=len(starts) - 1)
        drawn_rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in drawn])
        by_hand(grade[drawn_rows], probs[drawn_rows], np.repeat(np.arange(len(drawn)), np.diff(starts)[drawn]))
    peer = (time.monotonic() - begin) / peer_resamples * resamples
    return {
        "rows": len(grade),
        "resamples": resamples,
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
        "scikit_learn_seconds": round(peer, 1),
        "ratio": round(peer / seconds, 1),
        "max_difference_of_values": difference,
    }


def by_hand(grade: Array, probs: Array, query: Array) -> dict[str, float]:
    """The same measures by scikit-learn; NDCG@10 and ECE, which it has not in this form, by our functions."""
    relevant, score = grade >= RELEVANT_FROM, probs[:, RELEVANT_FROM:].sum(axis=1)
    predicted = probs.argmax(axis=1)
    ndcg, counted = ndcg_by_query(grade, score, query)
    return {
        "roc_auc": roc_auc_score(relevant, score),
        "pr_auc": average_precision_score(relevant, score),
        "f1": f1_score(relevant, score >= THRESHOLD),
        "macro_f1": f1_score(grade, predicted, average="macro"),
        "accuracy": accuracy_score(grade, predicted),
        "ndcg_at_10": float(ndcg[counted].mean()),
        "ece": expected_calibration_error(relevant, score),
    }


def coverage(queries: int, simulations: int) -> dict[str, float]:
    """Share of simulated samples of `queries` queries whose interval holds the truth, by measure."""
    truth = by_hand(*draw(200_000, np.random.default_rng(4)))
    held = dict.fromkeys(truth, 0)
    for i in range(simulations):
        grade, probs, query = draw(queries, np.random.default_rng([5, i]))
        labels = Labels(grade, query, RELEVANT_FROM, n_boot=500, seed=10_000 + i)
        measured = evaluate(labels, probs, threshold=THRESHOLD).metrics
        for name, value in truth.items():
            interval = measured[name]
            held[name] += interval.low is not None and interval.low <= value <= (interval.high or 0.0)
    return {name: round(count / simulations, 4) for name, count in held.items()}


def draw(queries: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Grades (N,), probabilities (N, 3) and query ids (N,) of some 10 rows a query.

    A query shifts what its rows are worth and how the model errs on all of them, so that rows of a query are no independent
    evidence.
    """
    size = rng.poisson(9, size=queries) + 1
    query = np.repeat(np.arange(queries), size)
    worth = rng.normal(size=queries)[query] + rng.normal(size=len(query))
    grade = np.digitize(worth, [-0.5, 0.8])
    seen = worth + 0.7 * rng.normal(size=queries)[query] + 0.7 * rng.normal(size=len(query))
    logits = np.stack([-1.5 * (seen + 0.5), np.full(len(query), 0.6), 1.5 * (seen - 0.8)], axis=1)
    odds = np.exp(logits)
    return grade, odds / odds.sum(axis=1, keepdims=True), query


if __name__ == "__main__":
    main()
