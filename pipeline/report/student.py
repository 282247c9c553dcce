"""What the report shows of the student: every system against human labels, its slices, its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from data.contracts import GradeScale
from pipeline.report.parts import Charts, grade_names, metrics_lines, read_json, series
from pipeline.report.plots import Line, interval_axis, interval_scale, interval_strip, line_chart

METRICS = {
    "roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "ndcg_at_10": "NDCG@10", "f1": "F1", "macro_f1": "macro-F1",
    "accuracy": "accuracy", "ece": "ECE",
}  # fmt: skip
SYSTEMS = {
    "student": "student", "gold_only": "human labels alone", "bm25": "BM25",
    "bm25_relative": "BM25, share of the query's limit", "untrained_cosine": "untrained encoder's cosine",
    "teacher": "teacher",
}  # fmt: skip
_SLICED = ("roc_auc", "f1")  # metrics whose slices are drawn; the table below the drawing has all of them


def student(folder: Path) -> dict[str, Any]:
    """The evaluation of all systems with its forest plots, the confusion matrix and the curves."""
    evaluation = read_json(folder / "evaluation.json")
    systems, slices = evaluation["systems"], evaluation.get("slices", [])
    comparisons = evaluation.get("comparisons", [])
    curves = read_json(folder / "curves.json") if (folder / "curves.json").exists() else {}
    scale = GradeScale.load(folder / "model")
    return {
        "n": evaluation["n"],
        "n_queries": evaluation["n_queries"],
        "metrics": _metrics(systems),
        "systems": [_named(system, system_name(system["name"])) for system in systems],
        "forest": forest([(system_name(s["name"]), s["n"], s["metrics"].get("roc_auc")) for s in systems]),
        "comparisons": [
            forest([_compared(row) for row in comparisons if row["metric"] == metric], reference=0.0)
            | {"metric": METRICS.get(metric, metric)}
            for metric in dict.fromkeys(row["metric"] for row in comparisons)
        ],
        "slice_metrics": _metrics(slices),
        "slices": [_named(part, part["name"]) for part in slices],
        "slice_forests": [
            forest(
                [(part["name"], part["n"], part["metrics"].get(metric)) for part in slices], _overall(systems, metric)
            )
            | {"metric": METRICS[metric]}
            for metric in _SLICED
            if any(metric in part["metrics"] for part in slices)
        ],
        "confusion": evaluation.get("confusion", []),
        "grades": grade_names(scale),
        "ece_before": evaluation.get("ece_before_calibration"),
        "charts": student_charts(curves),
        "training": training_chart(folder / "metrics.jsonl"),
    }


def evaluation_table(folder: Path) -> list[dict[str, str]]:
    """A row for each system and a column for each metric, with its interval, as text: for a page that takes tables."""
    systems = read_json(folder / "evaluation.json")["systems"]
    metrics = _metrics(systems)
    rows = []
    for system in systems:
        row = {"system": system_name(system["name"]), "pairs": f"{system['n']:,}"}
        rows.append(row | {label: interval_text(system["metrics"].get(name)) for name, label in metrics.items()})
    return rows


def interval_text(figure: dict[str, float | None] | None) -> str:
    """`0.900 (0.850 to 0.950)`; a dash where there is no value."""
    if not figure or figure["value"] is None:
        return "–"
    text = f"{figure['value']:.3f}"
    low, high = figure.get("low"), figure.get("high")
    return text if low is None or high is None else f"{text} ({low:.3f} to {high:.3f})"


def system_name(name: str) -> str:
    """A system as people call it."""
    return SYSTEMS.get(name, name)


def forest(
    rows: list[tuple[str, int, dict[str, float | None] | None]], reference: float | None = None
) -> dict[str, Any]:
    """A dot-and-interval plot: (name, pairs, {value, low, high}) on one axis, `reference` through all of them.

    `pairs` are shown only where they differ.
    """
    figures = [figure or {"value": None} for _, _, figure in rows]
    axis = interval_axis([*(number for figure in figures for number in figure.values()), reference])
    same = len({n for _, n, _ in rows}) == 1
    drawn = []
    for (name, n, _), figure in zip(rows, figures, strict=True):
        value, low, high = figure["value"], figure.get("low"), figure.get("high")
        strip = interval_strip(value, low, high, axis, reference)
        drawn.append((name, None if same else n, interval_text(figure), strip))
    return {"rows": drawn, "scale": interval_scale(axis)}


def student_charts(curves: dict[str, Any]) -> Charts:
    """ROC, precision-recall and reliability of each system, as far as their points are there."""
    charts = []
    for title, key, (x, x_label), (y, y_label), diagonal in (
        ("ROC", "roc", ("fpr", "false positive rate"), ("tpr", "true positive rate"), "chance"),
        ("Precision and recall", "pr", ("recall", "recall"), ("precision", "precision"), ""),
        ("Reliability (a larger mark: more pairs)", "reliability", ("predicted", "predicted p(relevant)"),
         ("relevant", "relevant share"), "perfect"),
    ):  # fmt: skip
        lines = [
            Line(
                system_name(name),
                [point[x] for point in found[key]],
                [point[y] for point in found[key]],
                sizes=[point["n"] for point in found[key]] if key == "reliability" else (),
            )
            for name, found in curves.items()
            if found.get(key)
        ]
        if not lines:
            continue
        if diagonal:
            lines.append(Line(diagonal, [0, 1], [0, 1], faint=True))
        charts.append((title, line_chart(lines, x_label, y_label, x_range=(0.0, 1.0), y_range=(0.0, 1.0))))
    return charts


def training_chart(path: Path) -> Markup:
    """The student's training loss, of each training."""
    if not path.exists():
        return Markup("")
    lines = metrics_lines(path)
    drawn = [
        Line(system_name(phase), line.x, line.y)
        for phase in ("student", "gold_only")
        for line in series(lines, phase, ("loss",))
    ]
    return line_chart(drawn, "step", "loss", smooth=True)


def _metrics(parts: list[dict[str, Any]]) -> dict[str, str]:
    return {name: METRICS.get(name, name) for part in parts for name in part["metrics"]}


def _named(part: dict[str, Any], name: str) -> dict[str, Any]:
    return {"name": name, "n": part["n"], "metrics": part["metrics"]}


def _compared(row: dict[str, Any]) -> tuple[str, int, dict[str, float | None]]:
    figure = {"value": row["difference"], "low": row["low"], "high": row["high"]}
    other = system_name(row["b"])
    return other if row["a"] == "student" else f"{system_name(row['a'])} − {other}", row["n"], figure


def _overall(systems: list[dict[str, Any]], metric: str) -> float | None:
    found = next((s["metrics"].get(metric) for s in systems if s["name"] == "student"), None)
    return found["value"] if found else None
