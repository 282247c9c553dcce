"""The table of systems, slices, comparisons and curves on human labels; and the comparison of two trained students.

`evaluate_systems` is the only place where the labels of split test are used. Nothing it returns goes back into a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from data.contracts import ContractError, words
from student.baselines import overlap
from student.dataset import Examples
from student.metrics import ECE_BINS, Comparison, Evaluation, Labels, compare, evaluate, roc_auc

Array = np.ndarray
MAX_POINTS = 200
PREDICTIONS = "test_predictions.parquet"
FREE = ("untrained_cosine", "warm_up")
"""The systems that a student must be above: they cost no label, and it has begun where they are."""


@dataclass(frozen=True)
class System:
    """One system's output on the test rows: a score (n,) and, where it grades, probabilities (n, K).

    `rows` (n,) are the test rows it covers, None = all. `threshold` was chosen without the test rows; `valid_roc_auc` is
    that on split valid, None where it was not measured.
    """

    name: str
    score: Array
    threshold: float | None
    probs: Array | None = None
    rows: Array | None = None
    valid_roc_auc: float | None = None


def evaluate_systems(systems: list[System], test: Examples, labels: Labels) -> dict[str, Any]:
    """The body of `evaluation.json`; the first system is the student, to which the others are compared."""
    student, table, comparisons = systems[0], [], []
    results: dict[str, Evaluation] = {}
    for system in systems:
        rows = np.arange(len(test)) if system.rows is None else system.rows
        of_rows = labels.take(rows)
        output = system.score if system.probs is None else system.probs
        slices = slice_masks(test) if system is student else None
        result = results[system.name] = evaluate(of_rows, output, threshold=system.threshold, slices=slices)
        table.append({"name": system.name, **result.model_dump(exclude={"slices"}), "threshold": system.threshold})
        if system is not student:
            names = (student.name, system.name)
            comparisons += [
                compare(of_rows, student.score[rows], system.score, metric=metric, names=names)
                for metric in ("roc_auc", "ndcg_at_10")
            ]
    assert student.probs is not None
    grades = list(range(student.probs.shape[1]))
    confusion = confusion_matrix(test.grade, student.probs.argmax(axis=1), labels=grades)
    return {
        "split": "test",
        "n": len(test),
        "n_queries": results[student.name].n_queries,
        "n_relevant": results[student.name].n_relevant,
        "systems": table,
        "slices": [part.model_dump() for part in results[student.name].slices],
        "comparisons": [comparison.model_dump() for comparison in comparisons],
        "confusion": confusion.tolist(),
        "teacher_kept": next((kept(student, system, labels) for system in systems if system.name == "teacher"), None),
    }


def kept(student: System, teacher: System, labels: Labels) -> dict[str, Any]:
    """How much of the teacher's ROC-AUC above chance the student keeps, on the `n` test rows that the teacher has graded.

    `share` is (student − ½) / (teacher − ½), None where the teacher is not above chance.
    """
    rows = np.arange(len(labels.grade)) if teacher.rows is None else teacher.rows
    relevant = labels.relevant[rows]
    ours, theirs = roc_auc(relevant, student.score[rows]), roc_auc(relevant, teacher.score)
    share = (ours - 0.5) / (theirs - 0.5) if theirs > 0.5 else None
    return {"n": len(rows), "share": share}


def floor(systems: list[System]) -> dict[str, Any]:
    """Whether the first system, the student, is above on split valid what was there without a label.

    Keys: `above`, None where split valid cannot say; `student`; and `systems`, ROC-AUC by the name of each that counts.
    """
    auc = {system.name: system.valid_roc_auc for system in systems if system.name in FREE and system.valid_roc_auc}
    student = systems[0].valid_roc_auc or float("nan")
    known = bool(np.isfinite([student, *auc.values()]).all())
    if not known:  # valid has one class
        return {"above": None, "student": None, "systems": dict.fromkeys(auc)}
    return {"above": student > max(auc.values(), default=0.0), "student": student, "systems": auc}


def floor_fault(evaluation: dict[str, Any]) -> str | None:
    """Why a student must not be promoted by its `evaluation.json`: it is no better than what costs no label. None if it is.

    An evaluation of an earlier version, and one whose split valid has one class, has no floor and no fault.
    """
    bound = evaluation.get("floor", {})
    if bound.get("above") is not False:
        return None
    name, auc = max(bound["systems"].items(), key=lambda system: system[1])
    warm_up = "warm it up on more pairs (`data.log`)" if "warm_up" in bound["systems"] else "set student.warm_up.pairs"
    return (
        f"the student is not above what costs no label: ROC-AUC on valid {bound['student']:.3f}, {name} {auc:.3f}; "
        f"label more pairs, annotate the pool, or {warm_up}"
    )


def slice_masks(test: Examples) -> dict[str, Array]:
    """Masks (N,) by source, words in the query, ads of the query, and share of the query's words in the ad."""
    length = np.array([len(words(query)) for query in test.queries])
    _, number, count = np.unique(test.query_id, return_inverse=True, return_counts=True)
    share = overlap(test.queries, test.ads)
    masks = {f"source: {source}": test.sources == source for source in sorted(set(test.sources))}
    masks |= _ranges("query words", length, {"1–2": (0, 2), "3–4": (3, 4), "5 or more": (5, np.inf)})
    masks |= _ranges("ads of the query", count[number], {"1–3": (1, 3), "4–10": (4, 10), "11 or more": (11, np.inf)})
    masks["query words in the ad: none"] = share == 0
    masks["query words in the ad: up to half"] = (share > 0) & (share <= 0.5)
    masks["query words in the ad: more than half"] = (share > 0.5) & (share < 1)
    masks["query words in the ad: all"] = share == 1
    return {name: mask for name, mask in masks.items() if mask.any()}


def curves(systems: list[System], test: Examples, relevant_from: int) -> dict[str, Any]:
    """The body of `curves.json`: points of the ROC, precision–recall and, for probabilities, reliability curves."""
    relevant = test.grade >= relevant_from
    drawn: dict[str, Any] = {}
    for system in systems:
        if not 0 < relevant.sum() < len(relevant):
            drawn[system.name] = {"roc": [], "pr": [], "reliability": []}
            continue
        fpr, tpr, _ = roc_curve(relevant, system.score)
        precision, recall, _ = precision_recall_curve(relevant, system.score)
        points = {"roc": _points(fpr=fpr, tpr=tpr), "pr": _points(recall=recall[::-1], precision=precision[::-1])}
        drawn[system.name] = points | {
            "reliability": [] if system.probs is None else reliability(relevant, system.score)
        }
    return drawn


def reliability(relevant: Array, p: Array) -> list[dict[str, float]]:
    """For each bin of predicted probability: the mean prediction, the share that is relevant, and the rows."""
    place = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    return [
        {"predicted": float(p[at].mean()), "relevant": float(relevant[at].mean()), "n": int(at.sum())}
        for at in (place == b for b in range(ECE_BINS))
        if at.any()
    ]


def write_predictions(folder: Path, test: Examples, p_relevant: Array) -> None:
    """Keep each test row's probability, so that a later student can be compared with this one on the same rows."""
    columns = {"pair_id": test.pair_ids, "query_id": test.query_id, "grade": test.grade, "p_relevant": p_relevant}
    pq.write_table(pa.table(columns), folder / PREDICTIONS)


def shared_predictions(new: Path, old: Path) -> Any:
    """The test rows that two students both have scored, with the same human grade: a frame by `pair_id`.

    Columns: query_id, grade, p_relevant, and p_relevant_old. Raises `ContractError` when there is none.
    """
    tables = []
    for folder in (new, old):
        if not (folder / PREDICTIONS).exists():
            raise ContractError(f"{folder} has no {PREDICTIONS}: it is not the folder of a finished student-distill")
        tables.append(pq.read_table(folder / PREDICTIONS).to_pandas().set_index("pair_id"))
    joined = tables[0].join(tables[1], rsuffix="_old", how="inner")
    joined = joined[joined["grade"] == joined["grade_old"]]
    if joined.empty:
        raise ContractError(f"{new} and {old} share no test row; evaluate both students on one pairs table")
    return joined


def compare_students(
    new: Path, old: Path, *, relevant_from: int, metric: str = "roc_auc", n_boot: int = 1000, seed: int = 0
) -> Comparison:
    """Paired bootstrap of two students on the test rows that both have scored; `low` ≥ −ε: the new one is no worse.

    `new` and `old` are the output folders of the distill stage. Raises `ContractError` when they share no test row with
    the same human grade.
    """
    rows = shared_predictions(new, old)
    labels = Labels(rows["grade"].to_numpy(), rows["query_id"].to_numpy(), relevant_from, n_boot, seed)
    scores = rows["p_relevant"].to_numpy(), rows["p_relevant_old"].to_numpy()
    return compare(labels, *scores, metric=metric, names=("new", "old"))


def _ranges(what: str, value: Array, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Array]:
    return {f"{what}: {name}": (value >= low) & (value <= high) for name, (low, high) in ranges.items()}


def _points(**columns: Array) -> list[dict[str, float]]:
    """At most `MAX_POINTS` of the curve's points, the two ends among them."""
    n = len(next(iter(columns.values())))
    chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))
    return [{name: float(column[i]) for name, column in columns.items()} for i in chosen]
