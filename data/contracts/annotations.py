"""Reading a folder of annotations: always the rows of one annotation key, and which key that is where none is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts.errors import ContractError
from data.contracts.files import read_json
from data.contracts.tables import ANNOTATIONS, open_table, read_table

KEY_FILE = "_annotations.json"
"""The file in which the annotation job notes the key that it annotated a folder under."""
_BATCH = 50_000  # rows


def annotation_key_of(folder: Path) -> str:
    """The annotation key that `folder` was last annotated under; empty when it holds no annotations.

    The job has noted it in `KEY_FILE`. In a folder without that note, made by other means, it is the key of the row that was
    created last. Raises `ContractError` when the note is damaged or a table there is none of annotations.
    """
    if (folder / KEY_FILE).exists():
        return str(read_json(folder / KEY_FILE)["annotation_key"])
    if not folder.is_dir():
        return ""
    rows = read_table(folder, ANNOTATIONS, columns=["annotation_key", "created_at"])
    newest = rows.filter(pc.equal(rows["created_at"], pc.max(rows["created_at"])))
    return max(newest["annotation_key"].to_pylist(), default="")


def read_annotations(
    folder: Path, columns: list[str], key: str = "", where: pads.Expression | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows under one key for which `where` holds, batch by batch; an empty key means `annotation_key_of(folder)`.

    Raises `ContractError` when the folder holds no annotations, or another table.
    """
    key = key or annotation_key_of(folder)
    if not key:
        raise ContractError(f"{folder} holds no annotations; run annotate first")
    dataset = open_table(folder, ANNOTATIONS)
    if dataset.files:
        chosen = pads.field("annotation_key") == key
        yield from dataset.to_batches(
            columns=columns, filter=chosen if where is None else chosen & where, batch_size=_BATCH
        )
