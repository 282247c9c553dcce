"""Whether it pays to choose which pairs are annotated: students of 2,000 human labels and so many annotations of a pool, by
strategy.

    python -m benchmarks.choosing --pairs runs/home-depot/pairs --base DIR_OF_MINILM --device cuda --jobs 6

The annotator is the oracle of `benchmarks.student_learning`: 90 % of its grades are those that people gave. For each seed a
student of the human labels alone comes first; it measures what `uncertain` goes by, and all strategies put the pool in
order (`selection.parquet`, with the reason for each pair). Then each strategy's first pairs are annotated and a student
learns from them beside the human labels. A student is one process and one result file: an interrupted experiment goes on.
Out: `table.md`, `summary.json`, and one JSON line. A value is the mean of the seeds; its interval is of the test pairs, by
query, and that of the difference to `random` is paired.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import children, student_learning

if TYPE_CHECKING:
    from student.distill import Calibrated
    from student.resampling import Measures
    from student.setup import Setup

FIRST = "gold 2k"
STRATEGIES = ("random", "uncertain", "diverse", "mixture")
MIXTURE = {"uncertain": 0.5, "diverse": 0.25, "random": 0.25}
ACCURACY = 0.9


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/choosing"))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--counts", nargs="+", type=int, default=[1000, 2500, 5000, 10_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test-rows", type=int, default=4000)
    parser.add_argument("--valid-rows", type=int, default=1500)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each when more than one")
    parser.add_argument("--child", nargs=3, metavar=("SEED", "STRATEGY", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        student(options, int(options.child[0]), options.child[1], int(options.child[2]))
        return
    # The longest first.
    students = [(strategy, count) for count in sorted(options.counts, reverse=True) for strategy in options.strategies]
    for phase in ([(FIRST, 0)], students):
        points = [(str(seed), name, str(count)) for name, count in phase for seed in options.seeds]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda point: _child(options, *point), points))
    summary = summarise(options)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(table(summary), encoding="utf-8")
    print(json.dumps({"benchmark": "choosing", **summary}))


def student(options: argparse.Namespace, seed: int, name: str, count: int) -> None:
    """Train and measure one student; the first one of a seed also orders the pool."""
    import pyarrow.parquet as pq

    folder = options.out / f"seed-{seed}"
    options = argparse.Namespace(**vars(options) | {"seed": seed, "out": folder})
    if name == FIRST:
        student_learning.run(options, FIRST, then=lambda setup, first, place: order_pool(options, setup, first))
    else:
        chosen = pq.read_table(folder / "selection.parquet", filters=[("strategy", "=", name)])["pair_id"].to_pylist()
        if len(chosen) < count:
            raise SystemExit(f"the pool has {len(chosen)} pairs with a human grade: lower --counts from {count}")
        given = {"pool": count, "accuracy": ACCURACY, "chosen": chosen}
        student_learning.run(options, f"{name} {count}", given)
    shutil.rmtree(place_of(options.out, name, count) / "checkpoints", ignore_errors=True)


def order_pool(options: argparse.Namespace, setup: Setup, first: Calibrated) -> None:
    """Write every strategy's order of the pool, by the student `first`."""
    import pandas as pd
    import pyarrow.dataset as pads

    from student import selection
    from student.dataset import read_texts
    from student.distill import measured

    graded = (pads.field("split") == "pool") & pads.field("grade").is_valid()
    pool = read_texts(options.pairs, graded, setup.scale.size)
    pool = pool.take(np.argsort(pool.pair_ids))
    probs = measured(setup, "student", first, pool, pool).probs
    assert probs is not None
    vectors = np.hstack(setup.encoder().sides(pool.queries, pool.ads))
    size, count = len(pool), min(len(pool), max(options.counts))
    chosen = {
        "random": selection.random(size, count, np.random.default_rng(options.seed)),
        "uncertain": selection.uncertain(probs, count, np.random.default_rng(options.seed)),
        "diverse": selection.diverse(vectors, count, np.random.default_rng(options.seed)),
    }
    chosen["mixture"] = selection.mixture(chosen, MIXTURE, count)
    parts = [
        pd.DataFrame({"strategy": name, "pair_id": pool.pair_ids[rows], "why": why})
        for name, (rows, why) in chosen.items()
    ]
    pd.concat(parts).to_parquet(options.out / "selection.parquet", index=False)


def summarise(options: argparse.Namespace) -> dict[str, Any]:
    """ROC-AUC of every strategy and budget, and its paired difference to random choice, over the seeds."""
    import pyarrow.parquet as pq

    from data.contracts import GradeScale
    from student.evaluation import PREDICTIONS
    from student.metrics import Labels
    from student.resampling import bootstrap, limits

    points = [(FIRST, 0)] + [(strategy, count) for count in options.counts for strategy in options.strategies]
    places = [place_of(options.out / f"seed-{seed}", FIRST, 0) for seed in options.seeds]
    rows = pq.read_table(places[0] / PREDICTIONS).to_pandas()
    labels = Labels(rows["grade"].to_numpy(), rows["query_id"].to_numpy(), GradeScale.load(options.pairs).relevant_from)
    aucs, measures = [], []
    for name, count in points:
        folders = [place_of(options.out / f"seed-{seed}", name, count) for seed in options.seeds]
        scores = [pq.read_table(folder / PREDICTIONS)["p_relevant"].to_numpy() for folder in folders]
        of_seeds, measure = mean_roc_auc(labels, scores)
        aucs.append(of_seeds)
        measures.append(measure)
    draws = [of_point["roc_auc"] for of_point in bootstrap(measures, labels.n_queries, labels.n_boot, labels.seed)]
    students = []
    for i, (name, count) in enumerate(points):
        student = {"strategy": name, "annotations": count, "seeds": [round(auc, 4) for auc in aucs[i]]}
        student["roc_auc"] = _rounded(aucs[i].mean(), *limits(draws[i], labels.n_queries))
        if count and name != "random" and ("random", count) in points:
            j = points.index(("random", count))
            student["over_random_seeds"] = [round(gain, 4) for gain in aucs[i] - aucs[j]]
            gain = (aucs[i] - aucs[j]).mean(), *limits(draws[i] - draws[j], labels.n_queries)
            student["over_random"] = _rounded(*gain)
        students.append(student)
    return {"pairs": str(options.pairs), "seeds": options.seeds, "test_pairs": len(rows), "students": students}


def mean_roc_auc(labels: Any, scores: list[np.ndarray]) -> tuple[np.ndarray, Measures]:
    """The ROC-AUC of each of several scores (N,), and their mean as a measure to be resampled."""
    from student.metrics import roc_auc
    from student.resampling import Measures, ranked

    resampled = [ranked(labels.relevant, score, labels.query) for score in scores]
    of_scores = np.array([roc_auc(labels.relevant, score) for score in scores])
    return of_scores, Measures(
        {"roc_auc": float(of_scores.mean())},
        lambda counts: {"roc_auc": np.mean([each(counts)["roc_auc"] for each in resampled], axis=0)},
    )


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["| annotations | chosen by | ROC-AUC | over random | over random, by seed |", "|---|---|---|---|---|"]
    for row in summary["students"]:
        gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["over_random"]) if "over_random" in row else ""
        seeds = ", ".join(f"{each:+.3f}" for each in row.get("over_random_seeds", []))
        auc = "{:.3f} [{:.3f}, {:.3f}]".format(*row["roc_auc"])
        lines.append(f"| {row['annotations']:,} | {row['strategy']} | {auc} | {gain} | {seeds} |")
    return "\n".join(lines) + "\n"


def place_of(folder: Path, name: str, count: int) -> Path:
    """Where `student_learning.run` puts a student."""
    return folder / student_learning.stem(f"{name} {count}" if count else name)


def _rounded(*values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


def _child(options: argparse.Namespace, *point: str) -> None:
    children.run("benchmarks.choosing", *sys.argv[1:], "--child", *point, one_thread=options.jobs > 1)


if __name__ == "__main__":
    main()
