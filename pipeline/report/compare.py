"""Two runs side by side: is the one's student better on the test rows that both were measured on, and what else differs.

Differences are b − a, with 95 % limits by a paired bootstrap over queries. Metrics that need more than the recorded
probabilities (accuracy, macro-F1) or whose bootstrap is biased (ECE) are compared unpaired, among each run's own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data.contracts import ContractError, GradeScale, read_json, write_json, write_text
from pipeline.artifacts import StageRecord
from pipeline.executions import COMPARE, executing
from pipeline.redact import flatten, redact
from pipeline.report.sections.student import METRICS
from pipeline.report.text import number, verdict
from pipeline.settings import build_settings, nearest
from pipeline.stages import STAGES, finished_stages
from pipeline.tracking.tracker import noted_runs, tracking

PAIRED = ("roc_auc", "pr_auc", "ndcg_at_10", "f1")
Pair = tuple[Any, Any]
Row = tuple[str, ...]


class Measure(BaseModel):
    """A metric of both students on the shared rows, and b − a; None where it is not defined on them."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def change(self) -> str:
        """The difference with its limits."""
        if self.difference is None or self.low is None:
            return "not defined"
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def verdict(self) -> str:
        """What the limits say of b."""
        if self.low is None or self.high is None:
            return "not defined"
        return verdict(self.low, self.high, "better", "worse")


class RunComparison(BaseModel):
    """What `compare_runs` finds. A pair is the value of a and that of b, None where it is absent."""

    a: str
    b: str
    folder_a: Path
    folder_b: Path
    n: int = 0
    n_queries: int = 0
    measures: list[Measure] = []
    not_compared: str = ""
    """Why there are no measures."""
    metrics: dict[str, dict[str, Pair]]
    """All metrics of the stages that either run has, by stage."""
    settings: dict[str, Pair]
    """Only what differs; so for the following."""
    inputs: dict[str, Pair]
    versions: dict[str, Pair]
    code: dict[str, Pair]

    @property
    def result(self) -> str:
        """The result in two sentences; ROC-AUC decides, as for the champion."""
        if self.not_compared:
            return f"The students of {self.a} and {self.b} are not compared: {self.not_compared}."
        first, *others = self.measures
        rest = "; ".join(f"{METRICS[each.metric]}: {each.verdict}" for each in others)
        return (
            f"{METRICS[first.metric]} of {self.b} minus {self.a}: {first.change} on {self.n:,} shared test pairs of "
            f"{self.n_queries:,} queries: {first.verdict}. {rest}."
        )

    def tables(self, *, equal: bool = True) -> list[tuple[str, Row, list[Row]]]:
        """What people are shown: (title, header, rows) of each table that has rows; without `equal` only what differs."""
        measures: list[Row] = [
            (METRICS[each.metric], _value(each.a), _value(each.b), each.change, each.verdict) for each in self.measures
        ]
        own: list[Row] = [
            (stage, name, *map(_value, metrics[name]))
            for stage, metrics in self.metrics.items()
            for name in STAGES[stage].headline
            if name in metrics and (equal or metrics[name][0] != metrics[name][1])
        ]
        kinds = {"setting": self.settings, "input": self.inputs, "version": self.versions, "code": self.code}
        differing: list[Row] = [
            (kind, name, *map(_value, pair)) for kind, pairs in kinds.items() for name, pair in pairs.items()
        ]
        tables: list[tuple[str, Row, list[Row]]] = [
            ("Students on the shared test pairs", ("metric", self.a, self.b, "b − a, 95 %", ""), measures),
            ("Key metrics, each run on its own", ("stage", "metric", self.a, self.b), own),
            ("What differs", ("", "", self.a, self.b), differing),
        ]
        return [table for table in tables if table[2]]


def compare_runs(a: Path, b: Path, *, n_boot: int = 1000, seed: int = 0) -> RunComparison:
    """Compare the runs in two folders; raises `ContractError` when one of them is not a run's folder."""
    records, summaries = [], []
    for folder in (a, b):
        records.append(finished_stages(folder))
        if not records[-1]:
            raise ContractError(f"{folder} is not the folder of a run: no stage has completed there")
        summaries.append(read_json(folder / "summary.json") if (folder / "summary.json").exists() else {})
    names = [folder.resolve().name for folder in (a, b)]
    if names[0] == names[1]:
        names = [f"{folder.resolve().parent.name}-{folder.resolve().name}" for folder in (a, b)]
    lacking = [name for name, each in zip(names, records, strict=True) if "student" not in each]
    metrics = [{stage: flatten(record.figures) for stage, record in each.items()} for each in records]
    return RunComparison(
        a=names[0],
        b=names[1],
        folder_a=a.resolve(),
        folder_b=b.resolve(),
        **({"not_compared": f"{lacking[0]} has no finished student"} if lacking else _measures(a, b, n_boot, seed)),
        metrics={stage: _pairs(*(each.get(stage, {}) for each in metrics)) for stage in metrics[0] | metrics[1]},
        settings=_different(*map(_settings, summaries, records)),
        inputs=_different(*(flatten({stage: record.inputs for stage, record in each.items()}) for each in records)),
        versions=_different(*(summary.get("versions", {}) for summary in summaries)),
        code=_different(*({"commit": summary.get("commit")} for summary in summaries)),
    )


def find_run(name: str, folder: Path) -> Path:
    """A run by its name in `folder`, or by the path of its own folder.

    Raises `ContractError` naming the nearest runs when there is none.
    """
    for place in (folder / name, Path(name).expanduser()):
        if place.is_dir() and any(place.glob("*/_stage.json")):
            return place
    known = sorted(path.parent.parent.name for path in folder.glob("*/*/_stage.json"))
    if not known:
        raise ContractError(f"no run '{name}': there is no run in {folder}; name another folder with --folder")
    raise ContractError(f"no run '{name}' in {folder}{nearest(name, known)}")


def save_comparison(comparison: RunComparison, folder: Path) -> tuple[Path, Path]:
    """Write `compare/A-vs-B.json` and `.md` into the folder of all runs, and the comparison into MLflow; returns both.

    The store is that of run b, the experiment PREFIX/compare.
    """
    place = folder / "compare"
    place.mkdir(parents=True, exist_ok=True)
    data, text = (place / f"{comparison.a}-vs-{comparison.b}.{ending}" for ending in ("json", "md"))
    write_json(data, comparison.model_dump(mode="json") | {"result": comparison.result})
    write_text(text, markdown(comparison))
    _track(comparison, data, text)
    return data, text


def markdown(comparison: RunComparison) -> str:
    """The comparison as a page of Markdown."""
    parts = [f"# {comparison.a} and {comparison.b}", comparison.result]
    for title, header, rows in comparison.tables():
        lines = [[cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in row] for row in rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
        parts.append(f"## {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _measures(a: Path, b: Path, n_boot: int, seed: int) -> dict[str, Any]:
    """The measures on the shared rows, or why there are none."""
    from student.evaluation import shared_predictions
    from student.metrics import Labels, compare, evaluate

    students = [folder / STAGES["student"].folder for folder in (b, a)]
    try:
        starts = {GradeScale.load(student / "model").relevant_from for student in students}
        if len(starts) > 1:
            return {"not_compared": "their scales count different grades as relevant"}
        rows = shared_predictions(*students)
    except ContractError as error:
        return {"not_compared": str(error)}
    labels = Labels(rows["grade"].to_numpy(), rows["query_id"].to_numpy(), starts.pop(), n_boot, seed)
    scores = [rows["p_relevant"].to_numpy(), rows["p_relevant_old"].to_numpy()]
    thresholds = [read_json(student / "model" / "student.json").get("threshold") for student in students]
    values = [
        # The values alone: it is their difference that gets an interval.
        evaluate(replace(labels, n_boot=1), score, threshold=threshold).metrics
        for score, threshold in zip(scores, thresholds, strict=True)
    ]
    measures = []
    for metric in PAIRED:
        if metric not in values[0] or metric not in values[1]:  # F1, of a student without a threshold
            continue
        change = compare(labels, scores[0], scores[1], metric=metric, thresholds=(thresholds[0], thresholds[1]))
        limits = change.model_dump(include={"difference", "low", "high"})
        measures.append(Measure(metric=metric, a=values[1][metric].value, b=values[0][metric].value, **limits))
    return {"measures": measures, "n": len(rows), "n_queries": int(rows["query_id"].nunique())}


def _track(comparison: RunComparison, data: Path, text: Path) -> None:
    path = comparison.folder_b / "summary.json"
    recorded = read_json(path)["settings"]["tracking"] if path.exists() else {}
    store = {name: value for name, value in recorded.items() if name in ("enabled", "uri", "experiment_prefix")}
    settings = build_settings({"preset": "", "run": COMPARE, "runs": str(data.parent.parent), "tracking": store})
    tags = {"run": data.stem, "name_a": comparison.a, "name_b": comparison.b, "mlflow.note.content": comparison.result}
    tags |= {"run_a": _mlflow_run(comparison.folder_a), "run_b": _mlflow_run(comparison.folder_b)}
    metrics: dict[str, float] = {"n": comparison.n, "n_queries": comparison.n_queries}
    for each in comparison.measures:
        values = each.model_dump(exclude={"metric"}, exclude_none=True)
        metrics |= {f"{each.metric}/{name}": value for name, value in values.items()}
    with tracking(settings), executing(settings, COMPARE, data.parent, config={}, inputs={}, tags=tags) as execution:
        execution.finish(metrics, artifacts=[data, text])


def _mlflow_run(folder: Path) -> str:
    """MLflow's id of the run's flow, or of its student; the run's name where there is none."""
    runs = noted_runs(folder)
    return runs.get("flow") or runs.get("student") or folder.name


def _settings(summary: dict[str, Any], records: dict[str, StageRecord]) -> dict[str, Any]:
    """Settings by dotted name; of a run that has not come to its summary those of its stages."""
    values = summary.get("settings") or {stage: record.config for stage, record in records.items()}
    return {name: value for name, value in flatten(redact(values)).items() if name not in ("run", "runs")}


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b}}


def _different(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    return {name: pair for name, pair in _pairs(a, b).items() if pair[0] != pair[1]}


def _value(value: Any) -> str:
    text = "–" if value is None else number(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
