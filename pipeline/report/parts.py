"""What the report shows of the data, the teacher and the export, read from the stages' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data.card import card_tables
from data.contracts import GradeScale
from pipeline.report.plots import Line, area_chart, line_chart

MAX_TEXT = 1500

# Title, y-axis, range, and the metrics of one chart of the teacher's training.
_Chart = tuple[str, str, tuple[float, float] | None, tuple[str, ...]]
_FIRST_CHARTS: tuple[_Chart, ...] = (
    ("Rollouts: accuracy and parse rate", "share", (0.0, 1.0), ("accuracy", "parse_rate", "truncated")),
)
_MORE_CHARTS: tuple[_Chart, ...] = (
    ("Reward", "reward", None, ("reward",)),
    ("Advantage mass", "mean advantage", None, ("advantage/positive", "advantage/negative")),
    ("Entropy", "nats per token", None, ("entropy",)),
    ("KL against the warm start", "nats per token", None, ("kl",)),
    ("Completion length", "tokens", None, ("completions/mean_length", "completions/max_length")),
    ("Speed", "tokens per second", None, ("tokens_per_second",)),
)
_MIX = ("groups/all_right", "groups/mixed", "groups/all_wrong")

Charts = list[tuple[str, Markup]]


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
        "steps": [(name, count, count / first) for name, count in steps if count is not None],
        # The steps above are its table of rows.
        "tables": [table for table in card_tables(card) if table.title != "Rows"],
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
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
    phases = {name: figures for name, figures in evaluation.items() if isinstance(figures, dict)}
    first = _step_charts(lines, _FIRST_CHARTS)
    first += [("Groups: all right, mixed, all wrong", _group_mix(lines))]
    first += [("Validation while training", _validation(lines))]
    more = _step_charts(lines, _MORE_CHARTS)
    more += [("Warm start", line_chart(series(lines, "warm_start", ("loss",)), "step", "loss", smooth=True))]
    return {
        "charts": [(title, chart) for title, chart in first if chart],
        "more": [(title, chart) for title, chart in more if chart],
        "phases": phases,
        "pass_at_k": _pass_at_k(phases),
        "rows": list(dict.fromkeys(key for figures in phases.values() for key in figures)),
    }


def export(folder: Path) -> dict[str, Any]:
    """Each form of the exported model: size, speed, and how far it is from the student it was made from."""
    found = read_json(folder / "export.json")
    forms = {name: found[name] for name in ("torch", "fp32", "int8") if name in found}
    losses = {
        name: forms["torch"]["roc_auc"] - form["roc_auc"]
        for name, form in forms.items()
        if name != "torch" and "torch" in forms
    }
    return {
        "n": found["n"],
        "threads": found["threads"],
        "batch": found["batch_size"],
        "forms": forms,
        "losses": losses,
    }


def grade_names(scale: GradeScale) -> list[str]:
    """`0 irrelevant`, …"""
    return [f"{number} {grade.name}" for number, grade in enumerate(scale.grades)]


def series(lines: list[dict[str, Any]], phase: str, metrics: tuple[str, ...], *, marks: bool = False) -> list[Line]:
    """A line for each of the metrics that the phase has."""
    found = []
    for metric in metrics:
        points = [(line["step"], line[metric]) for line in lines if line.get("phase") == phase and metric in line]
        if points:
            found.append(Line(metric, [x for x, _ in points], [y for _, y in points], marks))
    return found


def cut(text: str | None) -> str:
    """A text at a length that a page can hold; an absent one is empty."""
    text = text or ""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


def _step_charts(lines: list[dict[str, Any]], wanted: tuple[_Chart, ...]) -> Charts:
    return [
        (title, line_chart(series(lines, "agpo", names), "AGPO step", label, y_range=limits, smooth=True))
        for title, label, limits, names in wanted
    ]


def _group_mix(lines: list[dict[str, Any]]) -> Markup:
    steps = [line for line in lines if line.get("phase") == "agpo" and all(name in line for name in _MIX)]
    layers = [(name.removeprefix("groups/").replace("_", " "), [line[name] for line in steps]) for name in _MIX]
    return area_chart([line["step"] for line in steps], layers, "AGPO step", "share of groups")


def _validation(lines: list[dict[str, Any]]) -> Markup:
    ks = sorted({key for line in lines for key in line if key.startswith("pass@")}, key=lambda key: int(key[5:]))
    # The warm start is where AGPO's curve begins.
    evaluated = [{**line, "phase": "valid"} for line in lines if line["phase"] in ("valid_warm_start", "valid_agpo")]
    drawn = series(evaluated, "valid", ("accuracy", *ks, "parse_rate"), marks=True)
    return line_chart(drawn, "AGPO step", "share", y_range=(0.0, 1.0))


def _pass_at_k(phases: dict[str, dict[str, Any]]) -> Markup:
    lines = []
    for phase, figures in phases.items():
        points = sorted(
            (int(key.removeprefix("pass@")), value) for key, value in figures.items() if key.startswith("pass@")
        )
        if points:
            lines.append(Line(phase.replace("_", " "), [k for k, _ in points], [value for _, value in points], True))
    return line_chart(lines, "k", "pass@k") if any(len(line.x) > 1 for line in lines) else Markup("")
