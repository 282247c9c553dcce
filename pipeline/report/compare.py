"""Two runs side by side: is the one's student better on the test rows that both were measured on, and what else differs.

Differences are b − a, with 95 % limits by a paired bootstrap over queries. Measures that need more than the kept
probabilities (accuracy, macro-F1) or whose bootstrap is biased (ECE) are among the figures, unpaired.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data.contracts import ContractError, GradeScale
from pipeline.artifacts import StageRecord
from pipeline.redact import flatten, redact
from pipeline.report.student import METRICS
from pipeline.settings import nearest
from pipeline.stages import STAGES, finished_stages
from pipeline.tracking.tracker import noted_runs

MEASURES = {name: METRICS[name] for name in ("roc_auc", "pr_auc", "ndcg_at_10", "f1")}
_NAMES_OF_THE_RUN = ("run", "runs")

Pair = tuple[Any, Any]


class Measure(BaseModel):
    """One measure of both students on the shared rows, and b − a; None where it is not defined on them."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """What the interval says of b."""
        if self.low is None or self.high is None:
            return "not defined"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference is shown"

    @property
    def is_shown(self) -> bool:
        """Whether the interval shows a difference."""
        return self.verdict in ("better", "worse")


class RunComparison(BaseModel):
    """What `compare_runs` found; of settings, inputs, versions and code only what differs, as (a, b), None where absent."""

    a: str
    b: str
    folder_a: Path
    folder_b: Path
    n: int = 0
    n_queries: int = 0
    measures: list[Measure] = []
    not_compared: str = ""
    """Why there are no measures."""
    settings: dict[str, Pair]
    inputs: dict[str, Pair]
    versions: dict[str, Pair]
    code: dict[str, Pair]
    figures: dict[str, dict[str, Pair]]
    """All figures of the stages that either run has, by stage."""
    mlflow_runs: dict[str, Pair]
    """MLflow's run ids of the flow and the stages."""

    @property
    def result(self) -> str:
        """The result in one sentence; ROC-AUC decides, as for the champion."""
        if self.not_compared:
            return f"The students of {self.a} and {self.b} are not compared: {self.not_compared}."
        first = self.measures[0]
        rows = f"on {self.n:,} shared test pairs of {self.n_queries:,} queries"
        name = MEASURES[first.metric]
        if first.difference is None or first.low is None or first.high is None:
            return f"{name} is not defined {rows}."
        others = [f"{MEASURES[each.metric]} is {each.verdict}" for each in self.measures[1:] if each.is_shown]
        beside = f" Beside it, {' and '.join(others)}." if others else ""
        if not first.is_shown:
            return (
                f"No difference is shown: {name} of {self.b} minus {self.a} is {first.difference:+.4f} "
                f"[{first.low:+.4f}, {first.high:+.4f}] {rows}.{beside}"
            )
        low, high = sorted((abs(first.low), abs(first.high)))
        way = "higher" if first.difference > 0 else "lower"
        return (
            f"{name} of {self.b} is {abs(first.difference):.4f} [{low:.4f}, {high:.4f}] {way} than that of {self.a} "
            f"{rows}: {first.verdict}.{beside}"
        )


def compare_runs(a: Path, b: Path, *, n_boot: int = 1000, seed: int = 0) -> RunComparison:
    """Compare the runs in two folders; raises `ContractError` when one of them is not a run's folder."""
    folders, names = (a, b), _labels(a, b)
    records, summaries = (
        [finished_stages(folder) for folder in folders],
        [read_json(folder / "summary.json") for folder in folders],
    )
    for folder, found in zip(folders, records, strict=True):
        if not found:
            raise ContractError(f"{folder} is not the folder of a run: no stage has completed there")
    measures, n, n_queries, reason = _measures(a, b, records, n_boot, seed)
    mlflow_runs = [noted_runs(folder) for folder in folders]
    return RunComparison(
        a=names[0],
        b=names[1],
        folder_a=a.resolve(),
        folder_b=b.resolve(),
        n=n,
        n_queries=n_queries,
        measures=measures,
        not_compared=reason,
        settings=_different(*(_settings(s, r) for s, r in zip(summaries, records, strict=True))),
        inputs=_different(*(flatten({name: each.inputs for name, each in found.items()}) for found in records)),
        versions=_different(*(summary.get("versions", {}) for summary in summaries)),
        code=_different(*({"commit": summary.get("commit")} for summary in summaries)),
        figures=_figures(*records),
        mlflow_runs={
            stage: (ids[0], ids[1])
            for stage in ("flow", *STAGES)
            if any(ids := [runs.get(stage, "") for runs in mlflow_runs])
        },
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


def _measures(
    a: Path, b: Path, records: list[dict[str, StageRecord]], n_boot: int, seed: int
) -> tuple[list[Measure], int, int, str]:
    for folder, found in zip((a, b), records, strict=True):
        if "student" not in found:
            return [], 0, 0, f"{folder.name} has no finished student"
    from student.evaluation import shared_predictions
    from student.metrics import compare, evaluate_ranking

    students = [folder / STAGES["student"].folder for folder in (b, a)]
    try:
        starts = {GradeScale.load(student / "model").relevant_from for student in students}
        if len(starts) > 1:
            return [], 0, 0, "their scales count different grades as relevant"
        rows = shared_predictions(*students)
    except ContractError as error:
        return [], 0, 0, str(error)
    relevant_from = starts.pop()
    grade, query = rows["grade"].to_numpy(), rows["query_id"].to_numpy()
    scores = [rows["p_relevant"].to_numpy(), rows["p_relevant_old"].to_numpy()]
    thresholds = [read_json(student / "model" / "student.json").get("threshold") for student in students]
    values = [
        # The values alone: it is their difference that gets an interval.
        evaluate_ranking(grade, score, query, relevant_from=relevant_from, threshold=threshold, n_boot=1).metrics
        for score, threshold in zip(scores, thresholds, strict=True)
    ]
    measures = []
    for metric in MEASURES:
        if metric == "f1" and None in thresholds:
            continue
        change = compare(
            scores[0],
            scores[1],
            grade,
            query,
            metric=metric,
            thresholds=(thresholds[0], thresholds[1]),
            relevant_from=relevant_from,
            n_boot=n_boot,
            seed=seed,
        )
        measures.append(
            Measure(
                metric=metric,
                a=values[1][metric].value,
                b=values[0][metric].value,
                difference=change.difference,
                low=change.low,
                high=change.high,
            )
        )
    return measures, len(rows), int(rows["query_id"].nunique()), ""


def _settings(summary: dict[str, Any], records: dict[str, StageRecord]) -> dict[str, Any]:
    """Settings by dotted key; of a run that has not come to its summary those of its stages."""
    values = summary.get("settings") or {name: record.config for name, record in records.items()}
    kept = {key: value for key, value in values.items() if key not in _NAMES_OF_THE_RUN}
    return flatten(redact(kept))


def _different(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def _figures(a: dict[str, StageRecord], b: dict[str, StageRecord]) -> dict[str, dict[str, Pair]]:
    table: dict[str, dict[str, Pair]] = {}
    for stage in STAGES:
        both = [flatten(found[stage].figures) if stage in found else {} for found in (a, b)]
        names = list({**both[0], **both[1]})
        if names:
            table[stage] = {name: (both[0].get(name), both[1].get(name)) for name in names}
    return table


def _labels(a: Path, b: Path) -> tuple[str, str]:
    first, second = a.resolve(), b.resolve()
    if first.name != second.name:
        return first.name, second.name
    return f"{first.parent.name}-{first.name}", f"{second.parent.name}-{second.name}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file, `ContractError` when it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ContractError(f"{path} is damaged ({error}); run its flow again") from None
    return found if isinstance(found, dict) else {}
