"""What the report shows of each stage, read from the stage's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
from markupsafe import Markup

from data.card import card_tables
from data.schema import ANNOTATIONS, PAIRS, GradeScale, read_table
from pipeline.audit import audit_rows
from pipeline.plots import Line, line_chart

EXAMPLES = 20
SCANNED = 20_000  # annotations looked at for examples and agreement; ids are hashes, so the first ones are a sample
MAX_TEXT = 1500

# Title, y-axis, range, and the metrics of one chart of the teacher's training.
_TEACHER_CHARTS: tuple[tuple[str, str, tuple[float, float] | None, tuple[str, ...]], ...] = (
    ("Rollouts: accuracy and parse rate", "share", (0.0, 1.0), ("accuracy", "parse_rate", "truncated")),
    ("Reward", "reward", None, ("reward",)),
    ("Groups", "share of groups", (0.0, 1.0), ("groups/all_right", "groups/mixed", "groups/all_wrong")),
    ("Advantage mass", "mean advantage", None, ("advantage/positive", "advantage/negative")),
    ("Entropy", "nats per token", None, ("entropy",)),
    ("KL against the warm start", "nats per token", None, ("kl",)),
    ("Completion length", "tokens", None, ("completions/mean_length", "completions/max_length")),
    ("Speed", "tokens per second", None, ("tokens_per_second",)),
)


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def funnel(folder: Path) -> dict[str, Any]:
    """From rows to pairs: each step with its share of the first, and the tables of the data card."""
    card = read_json(folder / "card.json")
    first = card.get("rows_in") or card.get("rows") or 1
    steps = [("rows in the source", card.get("rows_in"))]
    steps += [(name.replace("_", " "), card.get(name)) for name in
              ("rejected", "duplicates", "unlabelled_left_out", "not_sampled", "beyond_limits")]  # fmt: skip
    steps += [("pairs kept", card.get("rows"))]
    steps += [(f"… in {split}", card.get(f"rows_{split}")) for split in ("train", "valid", "test", "pool")]
    return {
        "steps": [(name, count, 100 * count / first) for name, count in steps if count is not None],
        # The steps above are its first table.
        "tables": card_tables(card)[1:],
    }


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is passed over."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def teacher(folder: Path) -> dict[str, Any]:
    """Training curves, and the evaluation by phase."""
    lines = metrics_lines(folder / "metrics.jsonl")
    charts = []
    for title, label, limits, names in _TEACHER_CHARTS:
        drawn = [line for name in names if (line := _series(lines, "agpo", name)) is not None]
        chart = line_chart(drawn, "AGPO step", label, y_range=limits)
        charts += [(title, chart)] if chart else []
    ks = sorted({key for line in lines for key in line if key.startswith("pass@")}, key=lambda key: int(key[5:]))
    # The warm start is where AGPO's curve begins.
    evaluated = [{**line, "phase": "valid"} for line in lines if line["phase"] in ("valid_warm_start", "valid_agpo")]
    valid = [
        line for name in ("accuracy", *ks, "parse_rate") if (line := _series(evaluated, "valid", name, marks=True))
    ]
    for title, label, drawn, limits in (
        ("Validation while training", "share", valid, (0.0, 1.0)),
        ("Warm start", "loss", [line for line in [_series(lines, "warm_start", "loss")] if line], None),
    ):
        chart = line_chart(drawn, "step", label, y_range=limits)
        charts += [(title, chart)] if chart else []
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
    phases = {name: figures for name, figures in evaluation.items() if isinstance(figures, dict)}
    rows = list(dict.fromkeys(key for figures in phases.values() for key in figures))
    curve = _pass_at_k(phases)
    return {"charts": charts + ([("pass@k", curve)] if curve else []), "phases": phases, "rows": rows}


def student(folder: Path) -> dict[str, Any]:
    """The evaluation table of all systems, the slices, the confusion matrix and the curves."""
    evaluation = read_json(folder / "evaluation.json")
    systems = evaluation["systems"]
    slices = evaluation.get("slices", [])
    curves = read_json(folder / "curves.json") if (folder / "curves.json").exists() else {}
    scale = GradeScale.load(folder / "model")
    return {
        "n": evaluation["n"],
        "n_queries": evaluation["n_queries"],
        "systems": systems,
        "metrics": list(dict.fromkeys(name for system in systems for name in system["metrics"])),
        "slices": slices,
        "slice_metrics": list(dict.fromkeys(name for part in slices for name in part["metrics"])),
        "comparisons": evaluation.get("comparisons", []),
        "confusion": evaluation.get("confusion", []),
        "grades": grade_names(scale),
        "ece_before": evaluation.get("ece_before_calibration"),
        "charts": student_charts(curves) + training_charts(folder / "metrics.jsonl"),
    }


def student_charts(curves: dict[str, Any]) -> list[tuple[str, Markup]]:
    """ROC, precision-recall and reliability of each system, as far as their points are there."""
    charts = []
    for title, key, (x, x_label), (y, y_label), diagonal in (
        ("ROC", "roc", ("fpr", "false positive rate"), ("tpr", "true positive rate"), "chance"),
        ("Precision and recall", "pr", ("recall", "recall"), ("precision", "precision"), ""),
        ("Reliability", "reliability", ("predicted", "predicted p(relevant)"), ("relevant", "relevant share"), "perfect"),
    ):  # fmt: skip
        lines = [
            Line(name, [point[x] for point in found[key]], [point[y] for point in found[key]], key == "reliability")
            for name, found in curves.items()
            if found.get(key)
        ]
        if not lines:
            continue
        if diagonal:
            lines.append(Line(diagonal, [0, 1], [0, 1], faint=True))
        charts.append((title, line_chart(lines, x_label, y_label, x_range=(0.0, 1.0), y_range=(0.0, 1.0))))
    return charts


def training_charts(path: Path) -> list[tuple[str, Markup]]:
    """The student's training loss, of each training."""
    if not path.exists():
        return []
    lines = metrics_lines(path)
    drawn = [line for phase in ("student", "gold_only") if (line := _series(lines, phase, "loss", name=phase))]
    chart = line_chart(drawn, "step", "loss")
    return [("Training loss", chart)] if chart else []


def grade_names(scale: GradeScale) -> list[str]:
    """`0 irrelevant`, …"""
    return [f"{number} {grade.name}" for number, grade in enumerate(scale.grades)]


def examples(annotations: Path, pairs: Path, key: str) -> dict[str, Any]:
    """Pairs annotated under `key` beside their human grades: about half of them disagreeing, and how often both agree.

    Human grades of the pool are for this comparison only; pairs without one are shown when there are no others.
    """
    scale = GradeScale.load(pairs)
    columns = ["pair_id", "grade", "reasoning", "agreement", "status"]
    found = _head(annotations, ANNOTATIONS, columns, pads.field("annotation_key") == key).sort_by("pair_id")
    if not found.num_rows:
        return {}
    ids = found["pair_id"].to_pylist()
    wanted = ["pair_id", "query", "ad_title", "ad_text", "grade"]
    human = read_table(pairs / "pairs", PAIRS, columns=wanted, where=pads.field("pair_id").isin(ids))
    by_id = {row["pair_id"]: row for row in human.to_pylist()}
    rows = []
    for row in found.to_pylist():
        pair = by_id.get(row["pair_id"])
        if pair is None or row["status"] != "ok" or row["grade"] is None:
            continue
        rows.append({
            "query": _cut(pair["query"]), "ad": _cut(pair["ad_title"]), "text": _cut(pair["ad_text"] or ""),
            "teacher": row["grade"], "human": pair["grade"], "reasoning": _cut(row["reasoning"] or ""),
            "agreement": row["agreement"],
        })  # fmt: skip
    judged = [row for row in rows if row["human"] is not None]
    agreeing = [row for row in judged if row["human"] == row["teacher"]]
    differing = [row for row in judged if row["human"] != row["teacher"]]
    half = EXAMPLES // 2
    shown = differing[: EXAMPLES - min(half, len(agreeing))]
    shown += agreeing[: EXAMPLES - len(shown)]
    confusion = [[sum(r["human"] == h and r["teacher"] == t for r in judged) for t in range(scale.size)]
                 for h in range(scale.size)]  # fmt: skip
    return {
        "rows": shown or rows[:EXAMPLES],
        "grades": grade_names(scale),
        "judged": len(judged),
        "agreeing": len(agreeing),
        "confusion": confusion if judged else [],
    }


def audit(annotations: Path, pairs: Path, key: str) -> dict[str, Any]:
    """The pairs that most deserve a second look: teacher against human, and samples against each other."""
    rows = audit_rows(annotations, pairs, key, limit=EXAMPLES, scanned=SCANNED)
    texts = ("query", "ad_title", "ad_text", "reasoning")
    shown = [row | {name: _cut(row[name] or "") for name in texts} for row in rows]
    return {"rows": shown, "grades": grade_names(GradeScale.load(pairs))} if shown else {}


def _head(folder: Path, schema: pa.Schema, columns: list[str], where: pads.Expression) -> pa.Table:
    """The first rows of a table; a whole one need not fit in memory."""
    if not folder.exists():
        raise FileNotFoundError(2, "no such folder", str(folder))
    dataset = pads.dataset(folder, format="parquet")
    if not dataset.files:
        return schema.empty_table().select(columns)
    return dataset.head(SCANNED, columns=columns, filter=where)


def _series(
    lines: list[dict[str, Any]], phase: str, metric: str, *, name: str = "", marks: bool = False
) -> Line | None:
    points = [(line["step"], line[metric]) for line in lines if line.get("phase") == phase and metric in line]
    return Line(name or metric, [x for x, _ in points], [y for _, y in points], marks) if points else None


def _pass_at_k(phases: dict[str, dict[str, Any]]) -> Markup:
    lines = []
    for phase, figures in phases.items():
        points = sorted(
            (int(key.removeprefix("pass@")), value) for key, value in figures.items() if key.startswith("pass@")
        )
        if points:
            lines.append(Line(phase, [k for k, _ in points], [value for _, value in points], marks=True))
    return line_chart(lines, "k", "pass@k")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
