"""Reading annotations as one table: always the rows of one annotation key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts import ANNOTATIONS, ContractError, check_schema

_BATCH = 50_000  # rows


def read_annotations(
    folder: Path, columns: list[str], key: str = "", where: pads.Expression | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows under `key` for which `where` holds, batch by batch; an empty key means the only one there is.

    Raises `ContractError` when the folder is not there, when it holds another table, or when no key is named and the rows
    are of several: rows of different teachers, prompts or sampling are never read as one.
    """
    chosen = pads.field("annotation_key") == (key or only_key(folder))
    yield from _batches(folder, columns, chosen if where is None else chosen & where)


def only_key(folder: Path) -> str:
    """The one annotation key of a folder; raises `ContractError` when it has none, or several."""
    keys: set[str] = set()
    for batch in _batches(folder, ["annotation_key"]):
        keys |= set(pc.unique(batch.column(0)).to_pylist())
    if len(keys) != 1:
        held = f"rows of {len(keys)} annotation keys ({', '.join(sorted(keys))})" if keys else "no rows"
        raise ContractError(f"{folder} holds {held}; name the key that is meant")
    return keys.pop()


def _batches(folder: Path, columns: list[str], where: pads.Expression | None = None) -> Iterator[pa.RecordBatch]:
    if not folder.is_dir():
        raise ContractError(f"{folder} does not exist; run annotate first")
    # Names starting with "_" are files being written; Arrow skips them.
    dataset = pads.dataset(folder, format="parquet")
    if dataset.files:
        check_schema(dataset.schema, ANNOTATIONS, str(folder))
        yield from dataset.to_batches(columns=columns, filter=where, batch_size=_BATCH)
