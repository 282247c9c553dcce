"""The way back: raters' answers become human labels, every row of a file is accounted for, and the audit is summed up."""

from __future__ import annotations

import logging
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
    grade_names,
    numbered,
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

logger = logging.getLogger(__name__)

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
    name for rows without one. Raises `ContractError` for a file that cannot be read, for answers to a draw of another scale
    than that of the pairs, and where nothing was ever drawn.
    """
    audit, now = run / FOLDER, datetime.now(UTC)
    with exclusive(run):
        draws = {folder.name: _drawn(folder) for folder in draws_of(audit)}
        if not draws:
            raise ContractError(f"{audit} has no draw; run audit-export first")
        answers = [answer for file in files for answer in read_answers(file, rater)]
        imported = Imported(rows=len(answers))
        scale = GradeScale.load(run / DATA.folder)
        scales = {name: Draw.load(audit / name).scale for name in draws}
        _refuse_another_scale(answers, draws, scales, scale)
        given = _sound(answers, draws, scale, imported)
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
            label |= {"labelled_at": answer.labelled_at or now, "imported_at": now}
            rows.append(label | {"scale": scales[draw]})
        concerned = {draw for _, _, draw, _ in given}
        seen = {answer.id for answer in answers}
        imported.missing = sum(f"{draw}/{pair_id}" not in seen for draw in concerned for pair_id in draws[draw])
        labels = pa.concat_tables([table, pa.Table.from_pylist(rows, schema=HUMAN_LABELS)])
        _write(run, settings, labels, imported)
    return imported


def read_labels(audit: Path) -> pa.Table:
    """All human labels that were ever imported."""
    path = audit / HUMAN_LABELS_FILE
    return read_table(path, HUMAN_LABELS) if path.exists() else HUMAN_LABELS.empty_table()


def summarise(run: Path) -> list[DrawSummary]:
    """Each draw of a run, oldest first, with what its own answers say.

    A pair that raters disagree on counts by the share of them that gave the teacher's grade.
    """
    return _summaries(run, read_labels(run / FOLDER))


def _summaries(run: Path, labels: pa.Table) -> list[DrawSummary]:
    size, rows = GradeScale.load(run / DATA.folder).size, labels.sort_by("imported_at").to_pylist()
    draws = draws_of(run / FOLDER)
    return [_summary(folder, [row for row in rows if row["draw"] == folder.name], size) for folder in draws]


def _summary(folder: Path, labels: list[Row], size: int) -> DrawSummary:
    """Of one draw, on its own scale; of a draw that does not say its scale, of `size` grades or as many as were given."""
    draw, drawn = Draw.load(folder), _drawn(folder)
    teacher = {pair_id: row["teacher_grade"] for pair_id, row in drawn.items() if row["teacher_grade"] is not None}
    size = len(draw.scale) if draw.scale else max([size, *(1 + grade for grade in teacher.values())])
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


def _refuse_another_scale(
    answers: list[Answer], draws: dict[str, dict[str, Row]], scales: dict[str, list[str] | None], scale: GradeScale
) -> None:
    """Raise `ContractError` for answers to a draw that was made on another scale than `scale`, which the pairs have now.

    A draw of an earlier release does not say its scale: all its grades must be on this one, and a warning says so.
    """
    remedy = "draw pairs anew (audit-export), or prepare the data with that scale again; nothing was imported"
    for name, own in scales.items():
        of_draw = [answer for answer in answers if answer.grade and answer.id.partition("/")[0] == name]
        if not of_draw or own == grade_names(scale):
            continue
        here = f"the pairs are now on the scale {numbered(grade_names(scale))}"
        if own is not None:
            raise ContractError(f"{name} was graded on the scale {numbered(own)}, and {here}; {remedy}")
        if fault := _off_scale(of_draw, draws[name], scale):
            raise ContractError(
                f"{name} does not say its scale, and {fault}; {here}; correct a mistyped grade, or {remedy}"
            )
        logger.warning("%s does not say its scale; its grades are read on %s", name, numbered(grade_names(scale)))


def _off_scale(answers: list[Answer], drawn: dict[str, Row], scale: GradeScale) -> str:
    """The first of the grades, the teacher's and the raters', that is not on the scale; empty where all are."""
    if (highest := max((row["teacher_grade"] or 0 for row in drawn.values()), default=0)) >= scale.size:
        return f"the teacher gave grade {highest} there"
    for answer in answers:
        try:
            grade_of(answer.grade, scale)
        except ValueError as error:
            return f"in {answer.file}, line {answer.line}, {error}"
    return ""


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


def _write(run: Path, settings: PipelineConfig, labels: pa.Table, imported: Imported) -> None:
    """Write the labels and what they say, and record an execution with the same metrics for MLflow.

    `audit.json` is there only beside the labels that it sums up: it is made before them, and written after them.
    """
    audit, draws = run / FOLDER, _summaries(run, labels)
    counts = {
        "labels": labels.num_rows,
        "raters": len(labels["rater"].unique()),
        "pairs": len(labels["pair_id"].unique()),
    }
    (audit / SUMMARY).unlink(missing_ok=True)
    with whole_file(audit / HUMAN_LABELS_FILE) as temporary:
        pq.write_table(labels, temporary)
    write_json(audit / SUMMARY, counts | {"draws": [draw.model_dump(mode="json") for draw in draws]})
    config = imported.model_dump(exclude={"refused"}) | {"refused": len(imported.refused)}
    with tracking(settings), executing(settings, FOLDER, audit, config=config, inputs={}) as execution:
        execution.finish(_metrics(counts, draws), artifacts=[audit / SUMMARY])


def _metrics(counts: dict[str, int], draws: list[DrawSummary]) -> dict[str, float]:
    """What `audit.json` says, as metrics by DRAW/METRIC."""
    metrics: dict[str, float] = {name: float(count) for name, count in counts.items()}
    for draw in draws:
        values: dict[str, float | None] = {"answered": draw.answered}
        if (found := draw.accuracy) is not None:
            values |= {"accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high}
        for each in draw.agreements:
            pair = f"{each.a} {each.b}"
            values |= {f"{pair}/kappa": each.kappa, f"{pair}/quadratic_kappa": each.quadratic_kappa}
        metrics |= {f"{draw.name}/{name}": value for name, value in values.items() if value is not None}
    return metrics
