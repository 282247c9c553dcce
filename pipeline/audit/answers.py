"""The way back: raters' answers become human labels, every row of a file is accounted for, and the audit is summed up."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from data.contracts import (
    HUMAN_LABELS,
    HUMAN_LABELS_FILE,
    ContractError,
    GradeScale,
    read_table,
    whole_file,
    write_json,
)
from pipeline.audit.draw import DRAWN, FOLDER, Draw, draws_of
from pipeline.audit.estimate import Accuracy, Agreement, accuracy, agreements
from pipeline.audit.sheet import Answer, grade_of, read_answers
from pipeline.executions import executing
from pipeline.locks import exclusive
from pipeline.settings import PipelineConfig
from pipeline.stages import DATA
from pipeline.tracking.tracker import tracking

SUMMARY = "audit.json"
Row = dict[str, Any]


class DrawSummary(BaseModel):
    """What is known of one draw: how many of its pairs have an answer, and, of a sample, the annotations' accuracy."""

    name: str
    what: str
    annotation_key: str
    pairs: int
    answered: int
    accuracy: Accuracy | None = None
    agreements: list[Agreement] = []
    """Of the teacher and the raters, two by two."""


class Imported(BaseModel):
    """What became of the rows of some files: all of them are counted once."""

    rows: int
    new: int = 0
    changed: int = 0
    """A rater's grade of a pair that was another before; the old one stays on record and counts no more."""
    unchanged: int = 0
    """Known already, or there twice with the same grade."""
    unanswered: int = 0
    refused: list[str] = []
    """One sentence for each row that could not be used, with its file and line."""
    missing: int = 0
    """Pairs of the draws concerned that no file had a row of."""


def import_answers(run: Path, files: Iterable[Path], settings: PipelineConfig, rater: str = "") -> Imported:
    """Add the answers in `files` to the human labels of a run (`audit/labels.parquet`); sum the audit up in `audit.json`
    and MLflow.

    A row that cannot be used is refused and named, the others count. `settings` say where MLflow's store is. `rater` is the
    name for rows without one. Raises `ContractError` for a file that cannot be read, and where nothing was ever drawn.
    """
    audit, now = run / FOLDER, datetime.now(UTC)
    with exclusive(run):
        draws = {folder.name: _drawn(folder) for folder in draws_of(audit)}
        if not draws:
            raise ContractError(f"{audit} has no draw; run audit-export first")
        answers = [answer for file in files for answer in read_answers(file, rater)]
        imported = Imported(rows=len(answers))
        given = _sound(answers, draws, GradeScale.load(run / DATA.folder), imported)
        table = read_labels(audit)
        known = {(row["pair_id"], row["rater"]): row for row in table.sort_by("imported_at").to_pylist()}
        rows = []
        for answer, pair_id, draw, grade in given:
            before = known.get((pair_id, answer.rater))
            if before and (before["grade"], before["draw"], before["note"]) == (grade, draw, answer.note):
                imported.unchanged += 1
                continue
            imported.changed += before is not None
            imported.new += before is None
            label = {"pair_id": pair_id, "grade": grade, "rater": answer.rater, "draw": draw, "note": answer.note}
            rows.append(label | {"labelled_at": answer.labelled_at or now, "imported_at": now})
        concerned = {draw for _, _, draw, _ in given}
        seen = {answer.id for answer in answers}
        imported.missing = sum(f"{draw}/{pair_id}" not in seen for draw in concerned for pair_id in draws[draw])
        with whole_file(audit / HUMAN_LABELS_FILE) as temporary:
            pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(rows, schema=HUMAN_LABELS)]), temporary)
        _record(run, settings, imported)
    return imported


def read_labels(audit: Path) -> pa.Table:
    """All human labels that were ever imported."""
    path = audit / HUMAN_LABELS_FILE
    return read_table(path, HUMAN_LABELS) if path.exists() else HUMAN_LABELS.empty_table()


def summarise(run: Path) -> list[DrawSummary]:
    """Each draw of a run, oldest first, with what its own answers say.

    A pair that raters disagree on counts by the share of them that gave the teacher's grade.
    """
    audit, size = run / FOLDER, GradeScale.load(run / DATA.folder).size
    labels = read_labels(audit).sort_by("imported_at").to_pylist()
    return [_summary(folder, [row for row in labels if row["draw"] == folder.name], size) for folder in draws_of(audit)]


def _summary(folder: Path, labels: list[Row], size: int) -> DrawSummary:
    draw, drawn = Draw.load(folder), _drawn(folder)
    teacher = {pair_id: row["teacher_grade"] for pair_id, row in drawn.items() if row["teacher_grade"] is not None}
    by_rater: dict[str, dict[str, int]] = {}
    for row in labels:
        by_rater.setdefault(row["rater"], {})[row["pair_id"]] = row["grade"]
    by_pair: dict[str, list[int]] = {}
    for given in by_rater.values():
        for pair_id, grade in given.items():
            by_pair.setdefault(pair_id, []).append(grade)
    summary = DrawSummary(
        name=draw.name, what=draw.what, annotation_key=draw.annotation_key, pairs=len(drawn), answered=len(by_pair)
    )
    weights: dict[str, float] = {}
    if draw.what == "sample":
        values: dict[str, list[float]] = {}
        for pair_id, grades in by_pair.items():
            right = grades.count(teacher[pair_id]) / len(grades)
            values.setdefault(drawn[pair_id]["stratum"], []).append(right)
            weights[pair_id] = 1 / drawn[pair_id]["probability"]
        summary.accuracy = accuracy(draw.populations, values)
    summary.agreements = agreements({"teacher": teacher} | by_rater, weights, size)
    return summary


def _sound(
    answers: list[Answer], draws: dict[str, dict[str, Row]], scale: GradeScale, imported: Imported
) -> list[tuple[Answer, str, str, int]]:
    """Answer, pair, draw and grade of the rows that can be used; the others are counted in `imported`."""
    given: dict[tuple[str, str], list[tuple[Answer, str, str, int]]] = {}
    for answer in answers:
        draw, _, pair_id = answer.id.partition("/")
        try:
            if answer.fault:
                raise ValueError(answer.fault)
            if pair_id not in draws.get(draw, {}):
                raise ValueError(f"the id {answer.id[:60]!a} is of no pair that was drawn in this run")
            if not answer.grade:
                imported.unanswered += 1
                continue
            if not answer.rater:
                raise ValueError("it does not say who answered; fill the column 'rater', or give --rater")
            grade = grade_of(answer.grade, scale)
        except ValueError as error:
            imported.refused.append(f"{answer.file}, line {answer.line}: {error}")
            continue
        given.setdefault((pair_id, answer.rater), []).append((answer, pair_id, draw, grade))
    sound = []
    for same in given.values():
        if len({grade for *_, grade in same}) == 1:
            sound.append(same[-1])
            imported.unchanged += len(same) - 1
            continue
        grades = ", ".join(f"{grade} in line {answer.line}" for answer, *_, grade in same)
        for answer, *_ in same:
            where = f"{answer.file}, line {answer.line}"
            imported.refused.append(f"{where}: {answer.rater} gave different grades ({grades}); leave one")
    return sound


def _drawn(folder: Path) -> dict[str, Row]:
    return {row["pair_id"]: row for row in pq.read_table(folder / DRAWN).to_pylist()}


def _record(run: Path, settings: PipelineConfig, imported: Imported) -> None:
    """Write `audit.json`, and an execution with the same metrics for MLflow."""
    audit, draws = run / FOLDER, summarise(run)
    labels = read_labels(audit)
    counts = {
        "labels": labels.num_rows,
        "raters": len(labels["rater"].unique()),
        "pairs": len(labels["pair_id"].unique()),
    }
    write_json(audit / SUMMARY, counts | {"draws": [draw.model_dump(mode="json") for draw in draws]})
    metrics: dict[str, float] = {name: float(count) for name, count in counts.items()}
    for draw in draws:
        values: dict[str, float | None] = {"answered": draw.answered}
        if (found := draw.accuracy) is not None:
            values |= {"accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high}
        for each in draw.agreements:
            pair = f"{each.a} {each.b}"
            values |= {f"{pair}/kappa": each.kappa, f"{pair}/quadratic_kappa": each.quadratic_kappa}
        metrics |= {f"{draw.name}/{name}": value for name, value in values.items() if value is not None}
    config = imported.model_dump(exclude={"refused"}) | {"refused": len(imported.refused)}
    with tracking(settings), executing(settings, FOLDER, audit, config=config, inputs={}) as execution:
        execution.finish(metrics, artifacts=[audit / SUMMARY])
