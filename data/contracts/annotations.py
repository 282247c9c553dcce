"""Which annotations of a folder are meant when nobody names their key."""

from __future__ import annotations

from pathlib import Path

from data.contracts.files import read_json
from data.contracts.tables import ANNOTATIONS, read_table

LAST_ANNOTATED = "_annotations.json"
"""Written by the annotation job at its end: the key that it annotated under."""


def annotation_key_of(folder: Path) -> str:
    """The key that `folder` was last annotated under; of a folder without the job's note, that of its newest row.

    Empty when there is no row.
    """
    if (folder / LAST_ANNOTATED).exists():
        return str(read_json(folder / LAST_ANNOTATED)["annotation_key"])
    rows = read_table(folder, ANNOTATIONS, columns=["created_at", "annotation_key"]).to_pylist()
    return max(((row["created_at"], row["annotation_key"]) for row in rows), default=(None, ""))[1]
