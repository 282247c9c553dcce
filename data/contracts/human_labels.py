"""Grades that people gave to pairs after the table was made, such as in an audit: a kind of their own, with author and time.

They stand beside the pairs, so that the pairs table, its splits and its fingerprint stay as they are. In splits train and
pool they win over the grade that a pair has otherwise, a teacher's or the source's; valid and test are not touched by them.

Each keeps the scale that it was given on: the names of the grades in their order. A grade of another scale is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.contracts.scale import GradeScale
from data.contracts.tables import read_table

HUMAN_LABELS_FILE = "labels.parquet"
"""In the folder `audit` of a run."""
HUMAN_LABELS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("grade", pa.int32(), nullable=False),
        pa.field("rater", pa.string(), nullable=False),
        pa.field("draw", pa.string(), nullable=False),
        pa.field("note", pa.string(), nullable=False),
        pa.field("labelled_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("imported_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("scale", pa.list_(pa.string())),  # see `grade_names`; null: not recorded, by earlier releases
    ]
)
REMEDY = "grade those pairs again (audit-export, audit-import), or prepare the data with that scale"


@dataclass(frozen=True)
class HumanLabels:
    """The human labels that count on a scale, and those that do not."""

    grades: dict[str, list[int]] = field(default_factory=dict)
    """Of each pair, one by each rater: the one imported last."""
    skipped: int = 0
    """Labels that are left out because their grade is not of this scale."""
    remarks: tuple[str, ...] = ()
    """Sentences on labels that are left out, or whose scale is not recorded."""


def grade_names(scale: GradeScale) -> list[str]:
    """What makes scales of human labels the same: the names of the grades, in their order. Definitions may be reworded."""
    return [grade.name for grade in scale.grades]


def numbered(names: Sequence[str]) -> str:
    """A scale as people read it.

    >>> numbered(["no", "yes"])
    '(0 no, 1 yes)'
    """
    return f"({', '.join(f'{number} {name}' for number, name in enumerate(names))})"


def read_human_labels(path: Path | None, scale: GradeScale) -> HumanLabels:
    """The labels that were given on `scale`; none where there is no such file.

    Labels of earlier releases do not say their scale. They count if all their grades are on this one, and a remark says so.
    Raises `ContractError` for a table of another schema.
    """
    if path is None or not path.exists():
        return HumanLabels()
    columns = ["pair_id", "rater", "grade", "imported_at", "scale"]
    rows = read_table(path, HUMAN_LABELS, columns=columns).sort_by("imported_at").to_pylist()
    names = grade_names(scale)
    faults = [row["grade"] for row in rows if row["scale"] is None and not 0 <= row["grade"] < len(names)]
    of_scale = [row for row in rows if (not faults if row["scale"] is None else row["scale"] == names)]
    newest = {(row["pair_id"], row["rater"]): row for row in of_scale}
    skipped = {by: row for row in rows if (by := (row["pair_id"], row["rater"])) not in newest}
    grades: dict[str, list[int]] = {}
    for (pair_id, _), row in sorted(newest.items(), key=lambda item: item[0]):
        grades.setdefault(pair_id, []).append(row["grade"])
    remarks = _remarks(list(newest.values()), list(skipped.values()), numbered(names), faults)
    return HumanLabels(grades, len(skipped), tuple(f"{path}: {remark}" for remark in remarks))


def _remarks(counted: list[dict[str, Any]], skipped: list[dict[str, Any]], here: str, faults: list[int]) -> list[str]:
    """Sentences on labels of another scale, and on those without one; `here` is the scale they are read on."""
    remarks = []
    if others := [row["scale"] for row in skipped if row["scale"] is not None]:
        scales = " and ".join(sorted(set(map(numbered, others))))
        remarks.append(
            f"{len(others)} human labels are left out: they were given on the scale {scales}, and that of the pairs is "
            f"{here}; {REMEDY}"
        )
    if unknown := [row for row in skipped if row["scale"] is None]:
        remarks.append(
            f"{len(unknown)} human labels do not say their scale, and grade {faults[0]} is not on that of the pairs {here}; "
            f"they are left out: {REMEDY}"
        )
    if unrecorded := [row for row in counted if row["scale"] is None]:
        remarks.append(
            f"{len(unrecorded)} human labels do not say their scale; they are read on that of the pairs {here}"
        )
    return remarks
