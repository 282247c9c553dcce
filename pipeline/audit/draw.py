"""Pairs drawn for raters, and the files in which they get them.

A `sample` is drawn by strata of the annotations (the teacher's grade, and whether its samples agree), each by simple random
sampling, so that its answers give the annotations' accuracy without bias. Its raters do not see what the teacher said. The
other kinds are chosen, not drawn: their answers are labels, and no estimate is made of them.
"""

from __future__ import annotations

import heapq
import math
import os
import re
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pydantic import BaseModel

from data.contracts import (
    ContractError,
    GradeScale,
    grade_names,
    numbered,
    read_annotations,
    read_json,
    write_json,
    write_text,
)
from pipeline.annotated import of_the_split, usable_annotations, with_texts, worst
from pipeline.artifacts import read_record
from pipeline.audit.estimate import allocation
from pipeline.audit.sheet import write_label_studio, write_sheet
from pipeline.stages import ANNOTATE, DATA, STUDENT, TEACHER

What = Literal["sample", "doubtful", "disagreements", "low-agreement", "suspects"]
Row = dict[str, Any]
FOLDER = "audit"  # of a run
DRAWN = "draw.parquet"
# What raters see beside the texts, where they are asked to judge a judgement.
_DOUBTFUL = ("why", "human_grade", "teacher_grade", "agreement", "votes", "n_unparsed", "reasoning")
_SHOWN: dict[str, tuple[str, ...]] = {
    "sample": (),
    "suspects": ("why", "human_grade", "likely_grade", "teacher_grade", "expected_loss", "reasoning"),
}
_DRAWN = pa.schema(
    [("pair_id", pa.string()), ("stratum", pa.string()), ("probability", pa.float64()), ("teacher_grade", pa.int32())]
)
_DRAW = re.compile(r"draw-([0-9]+)")
_SURE = 0.05  # error rate that a stratum whose samples all agree is taken to have, for the allocation


class Draw(BaseModel):
    """What is recorded of a draw, beside its pairs; `populations` are the pairs of each stratum, of a sample only."""

    name: str
    what: What
    annotation_key: str
    seed: int
    size: int
    created_at: datetime
    populations: dict[str, int] = {}
    scale: list[str] | None = None
    """The names of the grades that raters were given, in their order; not in draws of earlier releases."""

    @classmethod
    def load(cls, folder: Path) -> Draw:
        """The draw in `folder`."""
        return cls.model_validate(read_json(folder / "draw.json"))


def export(run: Path, what: What = "sample", size: int = 300, seed: int = 0) -> Path:
    """Draw `size` pairs of a run and write `audit/draw-N/`; returns that folder.

    It holds `sheet.csv`, Label Studio's `tasks.json` and `view.xml`, `guide.txt` with the grades, and, not for raters,
    `draw.parquet` (pair_id, stratum, probability of being drawn, teacher_grade) and `draw.json`.

    Raises `ContractError` when the stage whose output is audited has not completed or is of another scale than the pairs,
    and when there is nothing to draw.
    """
    pairs, stage = run / DATA.folder, STUDENT if what == "suspects" else ANNOTATE
    record = read_record(run / stage.folder)
    if record is None:
        raise ContractError(f"{run / stage.folder} is not finished; run {stage.name} first")
    scale = GradeScale.load(pairs)
    _refuse_another_scale(run / (STUDENT if what == "suspects" else TEACHER).folder / "model", scale)
    key = str(record.figures.get("annotation_key", ""))
    rows, populations = _rows(run, what, size, seed, key)
    if not (rows := with_texts(rows, pairs)):
        raise ContractError(f"{run} has no pair to draw ({what})")
    audit = run / FOLDER
    audit.mkdir(exist_ok=True)
    numbers = [int(found[1]) for place in audit.iterdir() if (found := _DRAW.fullmatch(place.name))]
    place = audit / f"draw-{max(numbers, default=0) + 1}"
    folder = audit / f".{place.name}.{os.getpid()}"  # one that is killed is no draw
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for row in rows:
        row["id"] = f"{place.name}/{row['pair_id']}"
        row["votes"] = " ".join(map(str, row.get("votes") or ()))
    shown = _SHOWN.get(what, _DOUBTFUL)
    pq.write_table(pa.Table.from_pylist(rows, _DRAWN), folder / DRAWN)
    rows = [dict.fromkeys(shown) | row for row in rows]
    write_sheet(folder / "sheet.csv", rows, shown)
    write_label_studio(folder, rows, scale, shown)
    write_text(folder / "guide.txt", _guide(scale))
    draw = Draw(
        name=place.name, what=what, annotation_key=key, seed=seed, size=len(rows), created_at=datetime.now(UTC),
        populations=populations, scale=grade_names(scale),
    )  # fmt: skip
    write_json(folder / "draw.json", draw.model_dump(mode="json"))
    folder.rename(place)
    return place


def draws_of(audit: Path) -> list[Path]:
    """The folders of a run's draws, oldest first."""
    found = [folder for folder in audit.glob("draw-*") if _DRAW.fullmatch(folder.name)]
    whole = [folder for folder in found if (folder / "draw.json").exists()]
    return sorted(whole, key=lambda folder: int(folder.name.removeprefix("draw-")))


def _refuse_another_scale(model: Path, scale: GradeScale) -> None:
    """The pairs may have been prepared with other grades since `model` gave its own."""
    if (model / "scale.json").exists() and (names := grade_names(GradeScale.load(model))) != grade_names(scale):
        raise ContractError(
            f"{model} is of another scale {numbered(names)} than the pairs {numbered(grade_names(scale))}, so raters' "
            "grades would not compare; run relevance-pipeline first"
        )


def _rows(run: Path, what: What, size: int, seed: int, key: str) -> tuple[list[Row], dict[str, int]]:
    """The chosen rows, and the populations of a sample's strata."""
    if what == "sample":
        annotations, pairs = run / ANNOTATE.folder, run / DATA.folder
        return stratified(annotations, key, size, seed, of_the_split(annotations, pairs))
    if what == "suspects":
        path = run / STUDENT.folder / "suspects.parquet"
        if not path.exists():
            raise ContractError(
                f"{run / STUDENT.folder} names no suspects; set student.suspects and run student-distill"
            )
        return pq.read_table(path).slice(0, size).to_pylist(), {}
    kind: Any = "all" if what == "doubtful" else what
    return worst(usable_annotations(run / ANNOTATE.folder, run / DATA.folder, key), size, kind), {}


def stratified(
    annotations: Path, key: str, size: int, seed: int, where: pads.Expression | None = None
) -> tuple[list[Row], dict[str, int]]:
    """A stratified random sample of the usable annotations for which `where` holds, in random order, and the pairs of each
    stratum.

    Memory holds `size` rows for each stratum: each row has a random number, and a stratum gives those with the smallest.
    """
    rng = np.random.default_rng(seed)
    populations: Counter[str] = Counter()
    doubt: Counter[str] = Counter()
    smallest: dict[str, list[tuple[float, str, int]]] = {}
    ok = pads.field("status") == "ok"
    usable = ok if where is None else ok & where
    for batch in read_annotations(annotations, ["pair_id", "grade", "agreement"], key, usable):
        agreement = pc.fill_null(batch["agreement"], 1.0).to_numpy(zero_copy_only=False)
        columns = zip(rng.random(len(batch)), batch["pair_id"].to_pylist(), batch["grade"].to_pylist(), strict=True)
        for row, agreed in zip(columns, agreement, strict=True):
            stratum = f"grade {row[2]}, {'all' if agreed >= 1 else 'some'} samples agree"
            populations[stratum] += 1
            doubt[stratum] += 1 - agreed
            heap = smallest.setdefault(stratum, [])
            if len(heap) < size:
                heapq.heappush(heap, (-row[0], *row[1:]))
            elif row[0] < -heap[0][0]:
                heapq.heapreplace(heap, (-row[0], *row[1:]))
    error = {name: min(max(doubt[name] / populations[name], _SURE), 0.5) for name in populations}
    drawn = allocation(populations, {name: math.sqrt(p * (1 - p)) for name, p in error.items()}, size)
    rows = [
        {"pair_id": pair_id, "teacher_grade": grade, "stratum": name, "probability": drawn[name] / populations[name]}
        for name, heap in sorted(smallest.items())
        for _, pair_id, grade in sorted(heap, reverse=True)[: drawn[name]]
    ]
    return [rows[i] for i in rng.permutation(len(rows))], dict(populations)


def _guide(scale: GradeScale) -> str:
    lines = [f"{number} {grade.name}: {grade.definition}" for number, grade in enumerate(scale.grades)]
    how = (
        "Write the number or the name of a grade into the column 'grade', your name into 'rater'. Keep the column 'id'."
    )
    return "\n".join([how, *lines, ""])
