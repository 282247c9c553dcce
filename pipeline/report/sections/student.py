"""The student: every system against human labels, its slices, its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from markupsafe import Markup

from data.contracts import GradeScale, read_json
from pipeline.annotated import with_texts
from pipeline.artifacts import StageRecord
from pipeline.report.plots import interval_axis, line_chart
from pipeline.report.sections.teacher import curves, training_lines
from pipeline.report.text import interval
from pipeline.stages import DATA

METRICS = {
    "roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "ndcg_at_10": "NDCG@10", "f1": "F1", "macro_f1": "macro-F1",
    "accuracy": "accuracy", "quadratic_kappa": "quadratic κ", "ece": "ECE",
}  # fmt: skip
SYSTEMS = {
    "student": "student", "gold_only": "human labels alone", "with_suspects": "with the suspect labels", "bm25": "BM25",
    "bm25_relative": "BM25, share of the query's limit", "untrained_cosine": "untrained encoder's cosine",
    "warm_up": "warm-up alone", "teacher": "teacher",
}  # fmt: skip
SUSPECTS = 20  # shown
_SLICED = ("roc_auc", "f1")  # metrics whose slices are drawn; the table below the drawing has all of them
# Title; the curve's name; its x and y with their labels; the name of the diagonal.
_CURVES = (
    ("ROC", "roc", "fpr", "false positive rate", "tpr", "true positive rate", "chance"),
    ("Precision and recall", "pr", "recall", "recall", "precision", "precision", ""),
    ("Reliability (a larger mark: more pairs)", "reliability", "predicted", "predicted p(relevant)", "relevant",
     "relevant share", "perfect"),
)  # fmt: skip
Interval = dict[str, float | None]


def student_section(folder: Path, record: StageRecord) -> dict[str, Any]:
    """The evaluation of all systems with its dot-and-interval plots, the confusion matrix, the curves, suspect labels."""
    evaluation, lines = read_json(folder / "evaluation.json"), training_lines(folder)
    systems, slices, comparisons = evaluation["systems"], evaluation["slices"], evaluation["comparisons"]
    whole, scale = systems[0]["metrics"], GradeScale.load(folder / "model")
    losses = [
        (_name(phase), line)
        for phase in ("student", "gold_only")
        for _, line in curves(lines, [phase], ["loss"]).items()
    ]
    suspects = pq.read_table(folder / "suspects.parquet").to_pylist() if (folder / "suspects.parquet").exists() else []
    return evaluation | {
        "n_suspects": len(suspects),
        "suspects": with_texts(suspects[:SUSPECTS], folder.with_name(DATA.folder)),
        "metrics": _metrics(systems),
        "teacher_kept": evaluation.get("teacher_kept"),  # not in evaluations of earlier versions
        "named_systems": [(_name(each["name"]), each) for each in systems],
        "named_slices": [(part["name"], part) for part in slices],
        "forest": forest([(_name(each["name"]), each["n"], each["metrics"].get("roc_auc")) for each in systems]),
        "compared": [
            (METRICS[metric], forest([_compared(row) for row in comparisons if row["metric"] == metric], 0.0))
            for metric in dict.fromkeys(row["metric"] for row in comparisons)
        ],
        "sliced": [
            (METRICS[name], forest([(part["name"], part["n"], part["metrics"].get(name)) for part in slices],
                                   whole[name]["value"]))
            for name in _SLICED if slices and name in whole
        ],
        "grades": [f"{place} {grade.name}" for place, grade in enumerate(scale.grades)],
        "bad_ads": _bad_ads(evaluation.get("bad_ad_rates", []), scale),  # not measured by earlier versions
        "charts": _charts(read_json(folder / "curves.json")),
        "training": line_chart(losses, "step", "loss", smooth=True),
    }  # fmt: skip


def export_section(folder: Path, record: StageRecord) -> dict[str, Any]:
    """The exported student and, where there is more than one size, how good and how fast each one is."""
    place = folder / "ladder.json"
    sizes = read_json(place)["sizes"] if place.exists() else []
    points = {size["export"]["int8"]["pairs_per_second"]: size["roc_auc"]["value"] for size in sizes}
    chosen = {size["export"]["int8"]["pairs_per_second"]: size["roc_auc"]["value"] for size in sizes if size["chosen"]}
    lines = [("each size", pd.Series(points)), ("exported", pd.Series(chosen))] if sizes else []
    chart = line_chart(lines, "pairs per second, int8", "ROC-AUC on test", marks=True)
    return read_json(folder / "export.json") | {"sizes": sizes, "ladder": chart}


def evaluation_table(folder: Path) -> list[dict[str, str]]:
    """A row for each system and a column for each metric, with its interval, as text: for a page that takes tables."""
    systems = read_json(folder / "evaluation.json")["systems"]
    return [
        {"system": _name(system["name"]), "pairs": f"{system['n']:,}"}
        | {label: interval(system["metrics"].get(name)) for name, label in _metrics(systems).items()}
        for system in systems
    ]


def forest(rows: list[tuple[str, int, Interval | None]], reference: float | None = None) -> dict[str, Any]:
    """A dot-and-interval plot: (name, pairs, interval) in rows on one axis, and `reference`, a line through all of them."""
    ends = [end for _, _, interval in rows if interval for end in interval.values()]
    return {"rows": rows, "axis": interval_axis([*ends, reference]), "reference": reference}


def _charts(curves: dict[str, dict[str, list[dict[str, float]]]]) -> list[tuple[str, Markup]]:
    charts = []
    for title, curve, x, x_label, y, y_label, diagonal in _CURVES:
        points = {_name(system): pd.DataFrame(found[curve]) for system, found in curves.items() if found[curve]}
        lines = [(name, frame.set_index(x)[y]) for name, frame in points.items()]
        sizes = {name: frame["n"] for name, frame in points.items()} if curve == "reliability" else {}
        area = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
        charts.append(
            (title, line_chart(lines, x_label, y_label, marks=bool(sizes), sizes=sizes, diagonal=diagonal, **area))
        )
    return [chart for chart in charts if chart[1]]


def _bad_ads(rows: list[dict[str, Any]], scale: GradeScale) -> Markup:
    """The rate of bad ads by the share of traffic kept, a line for each grade that does not count as relevant."""
    rates = pd.DataFrame([[rate["value"] for rate in row["rates"]] for row in rows], [row["kept"] for row in rows])
    names = [grade.name if not k else f"{grade.name} or worse" for k, grade in enumerate(scale.grades)]
    lines = [(names[k], rates[k]) for k in rates]
    return line_chart(lines, "share of traffic kept, best first", "rate of bad ads", marks=True, x_range=(0.0, 1.0))


def _name(system: str) -> str:
    return SYSTEMS.get(system, system.replace("_", " "))


def _metrics(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {name: METRICS.get(name, name) for row in rows for name in row["metrics"]}


def _compared(row: dict[str, Any]) -> tuple[str, int, Interval]:
    return _name(row["b"]), row["n"], {"value": row["difference"], "low": row["low"], "high": row["high"]}
