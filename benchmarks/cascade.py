"""How many pairs an exported student spares a teacher, and what it costs: the limit chosen on valid, and met on test?

    python -m benchmarks.cascade --pairs runs/home-depot/pairs --export runs/home-depot/export

The teacher is an oracle: its grade is the human one with a given accuracy, else another one by chance. For each accuracy
the limit is chosen on `--valid-rows` labelled pairs of valid, for a loss of at most `--max-loss`, and measured on the
labelled pairs of test; `--draws` times, with other pairs of valid and other errors of the teacher each time. Prints one
JSON line: for each accuracy the share spared and the loss, on valid and on test (the mean, and where 90 % of the draws lie),
and the share of the draws that keep the limit on test; of the first draw also the 95 % interval of the loss on test, by
query.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--max-loss", type=float, default=0.005)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--valid-rows", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=6000, help="of valid and of test, at most, that the student scores")
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    scored = {split: scores(options, split) for split in ("valid", "test")}
    teachers = {f"{accuracy:g}": measure(options, scored, accuracy) for accuracy in options.accuracies}
    rows = {split: len(probs) for split, (probs, _, _) in scored.items()}
    right = {split: round(float((probs.argmax(1) == grade).mean()), 4) for split, (probs, grade, _) in scored.items()}
    print(json.dumps({"benchmark": "cascade", "rows": rows, "student_accuracy": right, "teachers": teachers}))


def scores(options: argparse.Namespace, split: str) -> tuple[Array, Array, Array]:
    """Of a split's labelled pairs: the student's probabilities (N, K), human grades (N,) and queries' numbers (N,)."""
    import pyarrow.dataset as pads

    from data.contracts import PAIRS, read_table
    from student.scorer import Scorer

    where = (pads.field("split") == split) & pads.field("grade").is_valid()
    table = read_table(options.pairs / "pairs", PAIRS, where=where).sort_by("pair_id")
    rows = np.random.default_rng(0).permutation(len(table))[: options.rows]
    pairs = table.take(rows).to_pylist()
    query = np.unique([row["query_id"] for row in pairs], return_inverse=True)[1]
    return Scorer(options.export, threads=1).grade_probs(pairs), np.array([row["grade"] for row in pairs]), query


def measure(
    options: argparse.Namespace, scored: dict[str, tuple[Array, Array, Array]], accuracy: float
) -> dict[str, Any]:
    """What the cascade does with a teacher of this accuracy."""
    from pipeline.annotation.cascade import choose_limit

    found: list[tuple[float, ...]] = []
    interval: list[float] = []
    for draw in range(options.draws):
        rng = np.random.default_rng(draw)
        costs = {}
        for split, (probs, grade, _) in scored.items():
            student_right, teacher_right = probs.argmax(axis=1) == grade, rng.random(len(grade)) < accuracy
            costs[split] = probs.max(axis=1), student_right, teacher_right
        rows = rng.permutation(len(costs["valid"][0]))[: options.valid_rows]
        on_valid = [column[rows] for column in costs["valid"]]
        limit = choose_limit(on_valid[0], on_valid[1], on_valid[2], options.max_loss, options.confidence)
        probability, student_right, teacher_right = costs["test"]
        spared = probability >= limit.probability
        cost = spared * (teacher_right.astype(float) - student_right)
        found.append((limit.share, limit.loss, spared.mean(), cost.mean(), cost.mean() <= options.max_loss))
        interval = interval or by_query(cost, scored["test"][2])
    columns = np.array(found, dtype=float).T
    names = ("valid_share", "valid_loss", "test_share", "test_loss")
    measured: dict[str, Any] = {
        name: [round(float(value), 4) for value in (column.mean(), *np.quantile(column, [0.05, 0.95]))]
        for name, column in zip(names, columns, strict=False)
    }
    return measured | {"within_limit": float(columns[4].mean()), "test_loss_first_draw": interval}


def by_query(cost: Array, query: Array) -> list[float]:
    """The mean cost (N,) of a pair with its 95 % interval."""
    from student.resampling import bootstrap, limits, summed, sums_by_query

    n_queries = int(query.max()) + 1
    mean = summed(sums_by_query([cost, np.ones(len(cost))], query), lambda sums: {"loss": sums[:, 0] / sums[:, 1]})
    (draws,) = bootstrap([mean], n_queries, 1000, 0)
    return [round(value or 0.0, 4) for value in (mean.values["loss"], *limits(draws["loss"], n_queries))]


if __name__ == "__main__":
    main()
