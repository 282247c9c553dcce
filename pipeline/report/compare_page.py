"""How a comparison of two runs is shown and kept: rows for tables, Markdown, JSON, MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.contracts import write_json
from pipeline.executions import COMPARE, executing
from pipeline.report.compare import MEASURES, RunComparison, read_json
from pipeline.report.summary import HEADLINES, number
from pipeline.settings import PipelineConfig, build_settings
from pipeline.tracking.tracker import tracking


def save_comparison(found: RunComparison, folder: Path) -> tuple[Path, Path]:
    """Write `compare/A-vs-B.json` and `.md` into the folder of all runs, and the comparison into MLflow; returns both.

    The store is that of run b, the experiment PREFIX/compare; what it does not take is kept in `compare/`.
    """
    place = folder / "compare"
    place.mkdir(parents=True, exist_ok=True)
    data, text = place / f"{found.a}-vs-{found.b}.json", place / f"{found.a}-vs-{found.b}.md"
    write_json(data, found.model_dump(mode="json") | {"result": found.result})
    text.write_text(markdown(found), encoding="utf-8")
    settings = _tracked_by(found.folder_b, folder)
    runs = [
        found.mlflow_runs.get("flow", ("", ""))[side] or found.mlflow_runs.get("student", ("", ""))[side]
        for side in (0, 1)
    ]
    tags = {"run": data.stem, "name_a": found.a, "name_b": found.b, "mlflow.note.content": found.result}
    tags |= {"run_a": runs[0] or found.a, "run_b": runs[1] or found.b}
    metrics: dict[str, float] = {"n": found.n, "n_queries": found.n_queries}
    for measure in found.measures:
        values = measure.model_dump(include={"a", "b", "difference", "low", "high"})
        metrics |= {f"{measure.metric}/{key}": value for key, value in values.items() if value is not None}
    with tracking(settings), executing(settings, COMPARE, place, config={}, inputs={}, tags=tags) as execution:
        execution.finish(metrics, artifacts=[data, text])
    return data, text


def measure_rows(found: RunComparison) -> list[tuple[str, ...]]:
    """Rows of the table of measures: name, a, b, b − a, 95 % interval, verdict."""
    rows = []
    for each in found.measures:
        limits = "" if each.low is None or each.high is None else f"[{each.low:+.4f}, {each.high:+.4f}]"
        values = [("–" if value is None else f"{value:.4f}") for value in (each.a, each.b)]
        change = "–" if each.difference is None else f"{each.difference:+.4f}"
        rows.append((MEASURES[each.metric], *values, change, limits, each.verdict))
    return rows


def figure_rows(found: RunComparison, *, equal: bool = True) -> list[tuple[str, ...]]:
    """The key figures of the stages side by side: stage, figure, a, b; without `equal` only those that differ."""
    rows = []
    for stage, figures in found.figures.items():
        for key in HEADLINES.get(stage, ()):
            if key in figures and (equal or figures[key][0] != figures[key][1]):
                rows.append((stage, key, *(_shown(value) for value in figures[key])))
    return rows


def difference_rows(found: RunComparison) -> list[tuple[str, ...]]:
    """What differs: kind, name, a, b."""
    kinds = {"setting": found.settings, "input": found.inputs, "version": found.versions, "code": found.code}
    return [
        (kind, key, *(_shown(value) for value in pair)) for kind, pairs in kinds.items() for key, pair in pairs.items()
    ]


def markdown(found: RunComparison) -> str:
    """The comparison as a page of Markdown."""
    parts = [f"# {found.a} and {found.b}", found.result]
    for title, head, rows in (
        ("Students on the shared test pairs", ("measure", found.a, found.b, "b − a", "95 %", ""), measure_rows(found)),
        ("Key figures, each run on its own", ("stage", "figure", found.a, found.b), figure_rows(found)),
        ("What differs", ("", "", found.a, found.b), difference_rows(found)),
    ):
        if rows:
            lines = [head, ("---",) * len(head), *rows]
            table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
            parts.append(f"## {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _tracked_by(run: Path, folder: Path) -> PipelineConfig:
    values: dict[str, Any] = {"preset": "", "run": COMPARE, "runs": str(folder)}
    recorded = (read_json(run / "summary.json").get("settings") or {}).get("tracking") or {}
    place = {key: recorded[key] for key in ("enabled", "uri", "experiment_prefix") if key in recorded}
    return build_settings(values | {"tracking": place})


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = number(value) if isinstance(value, int | float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
