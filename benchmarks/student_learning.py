"""What warm-up and annotations are worth to a student: what costs no label, students of human labels alone, with a warm-up
on unlabelled pairs, and with a pool annotated.

    prefect run data-prepare --preset cpu-real --name home-depot --set data.max_train=null …   (see docs/results.md)
    python -m benchmarks.student_learning --pairs runs/home-depot/pairs --base DIR_OF_MINILM --out runs/student-learning

Runs named "teacher" learn from a real teacher's annotations (`--annotations`, as `benchmarks.gpu` brings them home); those
named "scorer" warm up by the cosine of the encoder in `--scorer`. In all others the annotator is an oracle: it reads the
withheld human grades of split pool and gives them with a given accuracy (a wrong grade is drawn evenly from the others; its
probabilities are that accuracy). Its reason names the words of the query that the
title has and lacks, and defines the grade that it gives. So the machinery is measured apart from what a teacher knows.
All students see the same nested samples; `--seed` draws the head, the order, and the pairs of the warm-up. A run is one
process and one result file: an interrupted experiment goes on.
Out: `table.md`, `curve.png`, `summary.json`, and one JSON line, of one seed; the intervals are of the test pairs, by query.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from benchmarks import children

if TYPE_CHECKING:
    from student.distill import Calibrated
    from student.setup import Setup

GOLD = 2000
POOL = 5000
SCORED = {"pairs": 8000, "encoder": "scorer"}  # a warm-up by the encoder of `--scorer`
PLAIN = "2k + 5k, accuracy 0.9"  # what the other objectives are compared with
RUNS: dict[str, dict[str, Any]] = {
    "untrained cosine": {"gold": 0},
    "warm-up 8k": {"gold": 0, "warm_up": {"pairs": 8000}},
    "2k, warm-up 8k": {"epochs": 4, "warm_up": {"pairs": 8000}},
    "warm-up 8k, BM25": {"gold": 0, "warm_up": {"pairs": 8000, "source": "bm25"}},
    "2k, warm-up 8k, BM25": {"epochs": 4, "warm_up": {"pairs": 8000, "source": "bm25"}},
    "warm-up 8k, mined": {"gold": 0, "warm_up": {"pairs": 8000, "hard_negatives": 0.33}},
    "2k, warm-up 8k, mined": {"epochs": 4, "warm_up": {"pairs": 8000, "hard_negatives": 0.33}},
    "warm-up 40k": {"gold": 0, "warm_up": {"pairs": 40_000}},
    "2k, warm-up 40k": {"epochs": 4, "warm_up": {"pairs": 40_000}},
    "warm-up 8k, scorer": {"gold": 0, "warm_up": {"pairs": 8000, "encoder": "scorer"}},
    "2k, warm-up 8k, scorer": {"epochs": 4, "warm_up": {"pairs": 8000, "encoder": "scorer"}},
    "gold 2k": {"gold": GOLD, "epochs": 4},
    "gold 2k, 10 epochs": {"gold": GOLD, "epochs": 10},
    "gold 2k, grades without ratings": {"gold": GOLD, "epochs": 4, "config": {"soft_gold": False}},
    "2k + 5k, accuracy 0.9": {"pool": POOL, "accuracy": 0.9},
    "2k + 5k, accuracy 1": {"pool": POOL, "accuracy": 1.0},
    "2k + 5k, accuracy 0.8": {"pool": POOL, "accuracy": 0.8},
    "2k + 10k, accuracy 0.9": {"pool": 10_000, "accuracy": 0.9},
    "2k + 5k, 0.9, margin-MSE": {"pool": POOL, "accuracy": 0.9, "config": {"margin_weight": 1.0}},
    "2k + 5k, 0.9, squared EMD": {"pool": POOL, "accuracy": 0.9, "config": {"ordinal_weight": 1.0}},
    "2k + 5k, 0.9, reasons": {"pool": POOL, "accuracy": 0.9, "config": {"contrastive_weight": 0.3}},
    "gold 10k": {"gold": 10_000},
    "2k + 2.5k, accuracy 0.9": {"pool": 2500, "accuracy": 0.9},
    "gold all": {"gold": None},
    "2k + 20k, accuracy 0.9": {"pool": 20_000, "accuracy": 0.9},
    **{
        f"2k + {pool // 1000}k, accuracy {accuracy}, warm-up": {"pool": pool, "accuracy": accuracy, "warm_up": SCORED}
        for accuracy in (0.8, 0.9)
        for pool in (5000, 20_000)
    },
    "2k + 8k, teacher": {"teacher": 8000},
    "2k + 20k, teacher": {"teacher": 20_000},
    "2k + 8k, teacher, warm-up": {"teacher": 8000, "warm_up": SCORED},
    "2k + 20k, teacher, warm-up": {"teacher": 20_000, "warm_up": SCORED},
    **{
        f"2k + {called}, {labels}, own warm-up": {
            "teacher": count,
            "warm_up": {"pairs": 8000},
            "config": {"soft_labels": labels},
        }
        for called, count in (("8k", 8000), ("20k", 20_000), ("pool", 10**9))
        for labels in ("teacher", "ensemble")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/student-learning"))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), help="all that need nothing else if left out")
    parser.add_argument("--test-rows", type=int, default=6000)
    parser.add_argument("--valid-rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scorer", type=Path, help="folder of a larger encoder, for the runs that name one")
    parser.add_argument(
        "--annotations", type=Path, help="a teacher's annotations of the pool, for the runs that name it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each when more than one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs = options.runs or [name for name in RUNS if not needs(name)]
    for name in [options.child] if options.child else options.runs:
        if lacking := [option for option in needs(name) if getattr(options, option) is None]:
            parser.error(f"run '{name}' needs --{' and --'.join(lacking)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        run(options, options.child)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: _child(options, name), options.runs))
    summary = summarise(options)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(table(summary), encoding="utf-8")
    plot(summary, options.out / "curve.png")
    print(json.dumps({"benchmark": "student_learning", **summary}))


def run(
    options: argparse.Namespace,
    name: str,
    given: dict[str, Any] | None = None,
    then: Callable[[Setup, Calibrated, Path], None] | None = None,
) -> None:
    """Train and measure one student; does nothing when its result is there.

    Parameters: given, what it learns from, that of `RUNS` if None; `then` is called with the student before its result is
    written.
    """
    from data.contracts import GradeScale, MetricsLog
    from student.config import StudentConfig
    from student.dataset import read_annotated, read_examples, read_training
    from student.distill import calibrate, measured, with_ensemble
    from student.evaluation import write_predictions
    from student.fit import fit
    from student.metrics import Labels, evaluate
    from student.model import save_tokenizer
    from student.peers import cosine, warmed_up, with_soft
    from student.rows import Rows
    from student.setup import Setup
    from student.warm_up import warm_up

    place = options.out / stem(name)
    if (place / "result.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {"gold": GOLD, "epochs": 2, "config": {}} | (RUNS[name] if given is None else given)
    scale = GradeScale.load(options.pairs)
    config = StudentConfig(
        base=f"path:{options.base}",
        epochs=plan["epochs"],
        patience=plan["epochs"],
        learning_rate=5e-5,
        max_length=64,
        device=options.device,
        seed=options.seed,
        warm_up=plan.get("warm_up", {}),
        **plan["config"],
    )
    annotations = place / "annotations" if "pool" in plan else None
    if annotations is not None:
        annotate(options.pairs, annotations, plan["pool"], plan["accuracy"], plan.get("chosen"))
    if "teacher" in plan:
        annotations = place / "annotations"
        _take_annotations(options, annotations, plan["teacher"])
    key, annotated = read_annotated(annotations, "", reasons=config.contrastive_weight > 0)
    rows = read_training(options.pairs, annotated, scale, config)
    gold = np.random.default_rng(1).permutation(np.flatnonzero(rows.grade >= 0))[: plan["gold"]]
    rows = rows.take(np.sort(np.r_[gold, np.flatnonzero(rows.grade < 0)]).astype(np.int64))
    # Where there are fewer labels, as many steps as with all of them.
    epochs = max(plan["epochs"], math.ceil(4 * GOLD / max(len(rows), 1)))
    config = config.model_copy(update={"epochs": epochs, "patience": epochs})
    valid, test = (
        graded.take(np.sort(np.random.default_rng(2).permutation(len(graded))[:count]))
        for graded, count in (
            (read_examples(options.pairs, scale, "valid"), options.valid_rows),
            (read_examples(options.pairs, scale, "test"), options.test_rows),
        )
    )
    tokenizer = save_tokenizer(options.base, place / "tokenizer", config.max_length)
    scorer = options.scorer if plan.get("warm_up", {}).get("encoder") else None
    setup = Setup(config, options.base, tokenizer, scale, options.device, scorer)
    begin = time.monotonic()
    metrics = MetricsLog(place / "metrics.jsonl")
    if "warm_up" in plan:
        base = warm_up(setup, options.pairs, valid, options.out / "warm_up", metrics)
        student, setup = warmed_up(replace(setup, base=base), valid, test), replace(setup, base=base)
    else:
        student = cosine(setup, valid, test)
    if plan["gold"] != 0:
        taught = Rows(rows, valid, test, key, annotated, with_soft(valid, annotated))
        if config.soft_labels == "ensemble":
            alone = rows.gold_only()
            equal = setup.for_as_many_steps(len(rows), len(alone))
            fitted = fit(equal, alone, valid, folder=place / "first", metrics=metrics, phase="gold_only")
            first = calibrate(setup, fitted, valid)
            taught, _ = with_ensemble(setup, first, taught)
        fitted = fit(
            setup, taught.training, taught.judged, folder=place / "checkpoints", metrics=metrics, phase="student"
        )
        calibrated = calibrate(setup, fitted, valid)
        student = measured(setup, "student", calibrated, valid, test)
        if then is not None:
            then(setup, calibrated, place)
    seconds = time.monotonic() - begin
    labels = Labels(test.grade, test.query_id, scale.relevant_from)
    output = student.score if student.probs is None else student.probs
    evaluation = evaluate(labels, output, threshold=student.threshold)
    write_predictions(place, test, student.score)
    result = {"n_gold": rows.n_gold, "n_annotated": rows.n_annotated, "seconds": seconds, **evaluation.model_dump()}
    (place / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def annotate(pairs: Path, out: Path, count: int, accuracy: float, chosen: Sequence[str] | None = None) -> None:
    """Write the oracle's annotations of `count` pairs of the pool, at random or the first that are `chosen` by pair_id;
    smaller counts are parts of larger ones, and a pair's annotation is the same in all."""
    from data.contracts import ANNOTATIONS, PAIRS, GradeScale, read_table, words

    scale = GradeScale.load(pairs)
    table = read_table(
        pairs / "pairs", PAIRS, where=(pads.field("split") == "pool") & pads.field("grade").is_valid()
    ).sort_by("pair_id")
    rng = np.random.default_rng(3)
    order, chance = rng.permutation(table.num_rows), rng.random(table.num_rows)
    other = rng.integers(1, scale.size, size=table.num_rows)
    if chosen is not None:
        place = {pair_id: i for i, pair_id in enumerate(table.column("pair_id").to_pylist())}
        order = np.array([place[pair_id] for pair_id in chosen])
    rows = []
    for i in order[:count]:
        pair = {name: table.column(name)[int(i)].as_py() for name in ("pair_id", "query", "ad_title", "grade")}
        grade = pair["grade"] if chance[i] < accuracy else (pair["grade"] + int(other[i])) % scale.size
        doubt = (1 - accuracy) / (scale.size - 1)
        asked, given = words(pair["query"]), set(words(pair["ad_title"]))
        has, lacks = (" ".join(w for w in asked if (w in given) is there) or "nothing" for there in (True, False))
        rows.append(
            {
                "pair_id": pair["pair_id"],
                "annotation_key": f"oracle-{accuracy:g}",
                "grade": grade,
                "grade_probs": [accuracy if k == grade else doubt for k in range(scale.size)],
                "reasoning": f"There: {has}. Not there: {lacks}. {scale.grades[grade].definition}",
                "votes": [grade],
                "agreement": 1.0,
                "n_samples": 1,
                "n_unparsed": 0,
                "status": "ok",
                "error": "",
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "created_at": datetime(2026, 1, 1, tzinfo=UTC),
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), out / "oracle.parquet")


def _take_annotations(options: argparse.Namespace, out: Path, count: int) -> None:
    """`count` of the annotations of the pool, smaller counts being parts of larger ones, and those of `valid`."""
    from data.contracts import ANNOTATIONS, PAIRS, read_table

    def of(split: str) -> pa.Table:
        ids = read_table(options.pairs / "pairs", PAIRS, columns=["pair_id"], where=pads.field("split") == split)
        table = read_table(options.annotations, ANNOTATIONS, where=pads.field("pair_id").isin(ids["pair_id"]))
        return table.sort_by("pair_id")

    pool = of("pool")
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(3).permutation(pool.num_rows)[:count]
    pq.write_table(pa.concat_tables([pool.take(np.sort(order)), of("valid")]), out / "teacher.parquet")


def summarise(options: argparse.Namespace) -> dict[str, Any]:
    """Measures of every student, and paired differences in ROC-AUC: from 2,000 human labels alone, and of those with
    another objective from the one without it."""
    from data.contracts import GradeScale
    from student.evaluation import compare_students

    relevant_from = GradeScale.load(options.pairs).relevant_from
    students = {}
    for name in options.runs:
        place = options.out / stem(name)
        result = json.loads((place / "result.json").read_text("utf-8"))
        row = {key: result[key] for key in ("n", "n_gold", "n_annotated", "seconds")}
        row["metrics"] = {
            key: [round(interval[end], 4) for end in ("value", "low", "high")]
            for key, interval in result["metrics"].items()
        }
        compared = {"gain": "gold 2k"}
        if {"pool", "config"} <= RUNS[name].keys():
            compared["objective_gain"] = PLAIN
        for key, other in compared.items():
            if other in options.runs and other != name:
                gain = compare_students(place, options.out / stem(other), relevant_from=relevant_from)
                row[key] = [round(value or 0.0, 4) for value in (gain.difference, gain.low, gain.high)]
        students[name] = row
    return {"pairs": str(options.pairs), "students": students}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| student | human labels | annotations | ROC-AUC | over 2k human labels alone | over soft labels alone | NDCG@10 | "
        "macro-F1 | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["students"].items():
        auc, ndcg, f1 = (
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["metrics"][key]) if key in row["metrics"] else ""
            for key in ("roc_auc", "ndcg_at_10", "macro_f1")
        )
        gain, objective = (
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[key]) if key in row else "" for key in ("gain", "objective_gain")
        )
        lines.append(
            f"| {name} | {row['n_gold']:,} | {row['n_annotated']:,} | {auc} | {gain} | {objective} | {ndcg} | "
            f"{f1} | {row['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    """ROC-AUC over the number of annotations, with the gold-only students as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    students = summary["students"]
    points = sorted(
        (row["n_annotated"], *row["metrics"]["roc_auc"])
        for name, row in students.items()
        if name.endswith("accuracy 0.9") or name == "gold 2k"
    )
    if points:
        at, value, low, high = (np.array(column) for column in zip(*points, strict=True))
        axes.errorbar(
            at, value, yerr=[value - low, high - value], marker="o", capsize=3, label="2k + annotations, 90 % right"
        )
    for name in ("gold 10k", "gold all"):
        if name in students:
            label = f"{students[name]['n_gold']:,} human labels"
            axes.axhline(students[name]["metrics"]["roc_auc"][0], linestyle="--", color="grey")
            axes.text(0, students[name]["metrics"]["roc_auc"][0], label, va="bottom", fontsize=8)
    axes.set_xlabel("annotations of the pool")
    axes.set_ylabel("ROC-AUC on human test labels")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def needs(name: str) -> list[str]:
    """The options without which a run is not what its name says."""
    plan = RUNS[name]
    asked = {"annotations": "teacher" in plan, "scorer": bool(plan.get("warm_up", {}).get("encoder"))}
    return [option for option, asked_for in asked.items() if asked_for]


def stem(name: str) -> str:
    """The folder of a run in `--out`."""
    return name.replace(" ", "_").replace(",", "").replace("+", "and").replace(".", "p")


def _child(options: argparse.Namespace, name: str) -> None:
    children.run("benchmarks.student_learning", *sys.argv[1:], "--child", name, one_thread=options.jobs > 1)


if __name__ == "__main__":
    main()
