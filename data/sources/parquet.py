"""Parquet files, by row groups: the columns that are read, as text; what the others hold plays no part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.contracts import ContractError
from data.sources.paths import require_columns

BATCH_ROWS = 5000


@dataclass(frozen=True)
class ParquetRowGroup:
    """One row group of a file, and the columns that are read."""

    kind: ClassVar[str] = "parquet"
    path: Path
    number: int
    columns: tuple[str, ...]

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows as batches of text: the columns under `names`, and no `problem` and `detail`."""
        file = pq.ParquetFile(self.path)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[self.number], columns=list(self.columns)):
            none = pa.nulls(batch.num_rows, pa.string())
            columns = [as_text(batch.column(name)) for name in self.columns]
            yield pa.RecordBatch.from_arrays([*columns, none, none], list(names))


def open_parquet(path: Path, columns: Mapping[Any, str]) -> list[ParquetRowGroup]:
    """The row groups of a file; raises `ContractError` when a column is not there or is of a type that has no text."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    require_columns(columns, schema.names, path)
    for ours, theirs in columns.items():
        kind = schema.field(theirs).type
        where = f"{path}: column '{theirs}' for our '{ours}' is {kind}"
        if ours == "attributes" and pa.types.is_nested(kind):
            if not (pa.types.is_map(kind) or pa.types.is_struct(kind)):
                raise ContractError(f"{where}, expected a map, an object or JSON text")
            continue
        if pa.types.is_nested(kind):
            raise ContractError(f"{where}, expected text or a number")
        try:
            as_text(pa.array([], kind))
        except pa.ArrowException:
            raise ContractError(f"{where}, which cannot be read as text; write it as text or a number") from None
    return [ParquetRowGroup(path, number, tuple(columns.values())) for number in range(file.num_row_groups)]


def as_text(column: pa.Array) -> pa.Array:
    """A column of any plain type as text, and maps and structs as JSON."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary_decode())
    if pa.types.is_nested(kind):
        pairs_to_dict = dict if pa.types.is_map(kind) else lambda value: value
        values = [
            None if value is None else json.dumps(pairs_to_dict(value), default=str) for value in column.to_pylist()
        ]
        return pa.array(values, pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.array([value and value.decode("utf-8", "replace") for value in column.to_pylist()], pa.string())
    text = pc.cast(column, pa.string())
    # A whole number stays recognisable as a rating: 1.0, not 1.
    return pc.replace_substring_regex(text, r"^(-?[0-9]+)$", r"\1.0") if pa.types.is_floating(kind) else text
