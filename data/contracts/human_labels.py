"""Grades that people gave to pairs after the table was made, such as in an audit: a kind of their own, with author and time.

They stand beside the pairs, so that the pairs table, its splits and its fingerprint stay as they are. In splits train and
pool they win over the grade that a pair has otherwise, a teacher's or the source's; valid and test are not touched by them.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

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
    ]
)


def read_human_labels(path: Path | None) -> dict[str, list[int]]:
    """The grades of each pair, one by each rater: the one imported last counts. Empty where there is no such file.

    Raises `ContractError` for a table of another schema.
    """
    if path is None or not path.exists():
        return {}
    rows = read_table(path, HUMAN_LABELS, columns=["pair_id", "rater", "grade", "imported_at"]).sort_by("imported_at")
    newest = {(row["pair_id"], row["rater"]): row["grade"] for row in rows.to_pylist()}
    grades: dict[str, list[int]] = {}
    for (pair_id, _), grade in sorted(newest.items()):
        grades.setdefault(pair_id, []).append(grade)
    return grades
