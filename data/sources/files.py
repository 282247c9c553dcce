"""CSV, TSV, JSON and Parquet files as Spark tables of the chosen columns, under our names, as text.

Python reads the files inside Spark's workers, a file or a row group for each task. What was left out: spreadsheets, and
object stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.contracts import ContractError
from data.sources.delimited import USUAL, DelimitedFile, Dialect, open_delimited
from data.sources.json_records import JsonFile, json_names
from data.sources.parquet import BATCH_ROWS, ParquetRowGroup, open_parquet
from data.sources.paths import Row, file_format, list_files, readable, require_columns, settings_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_BATCH_CHARS = 8_000_000
Part = DelimitedFile | JsonFile | ParquetRowGroup


def read_columns(
    spark: SparkSession,
    path: Path,
    format: str,
    columns: Mapping[Any, str],
    dialect: Dialect = USUAL,
    encoding: str = "utf-8",
    section: str = "data",
) -> DataFrame:
    """Read a file or a folder of alike files; `dialect` is that of CSV and TSV files, `encoding` of all but Parquet.

    `columns` maps our names to the file's. The result has our names as strings (nested `attributes` as JSON), plus
    `problem` and `detail`: the reason why a line could not be split into columns (else null), and the line.
    Raises `ContractError` for a missing, empty or unreadable file and for a column that is not there; it names the settings
    of `section`.
    """
    with settings_of(section):
        parts = open_parts(path, format, columns, dialect, encoding)
    names = [*columns, "problem", "detail"]

    def read(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in numbers:
            for number in batch.column(0).to_pylist():
                with settings_of(section):
                    yield from read_part(parts[number], names)

    count = max(1, len(parts))
    frame = spark.range(0, len(parts), 1, count).mapInArrow(read, ", ".join(f"{name} string" for name in names))
    # What comes next is more work than reading.
    tasks = spark.sparkContext.defaultParallelism
    return frame.repartition(tasks) if count < tasks else frame


def read_part(part: Part, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part in batches; `names` are our columns, `problem` and `detail`."""
    with readable(part.path, part.kind):
        yield from part.batches(names) if isinstance(part, ParquetRowGroup) else _batches(part.rows(), names)


def open_parts(
    path: Path, format: str, columns: Mapping[Any, str], dialect: Dialect = USUAL, encoding: str = "utf-8"
) -> list[Part]:
    """The parts of the files, after a look at their headers; raises `ContractError` for what `read_columns` refuses."""
    files = list_files(path, format)
    kind, *others = sorted({file_format(file, format) for file in files})
    if others:
        raise ContractError(f"{path} mixes files of the formats {', '.join([kind, *others])}; keep one in a folder")
    given = [name for name, usual in vars(USUAL).items() if getattr(dialect, name) != usual]
    if given and kind not in ("csv", "tsv"):
        raise ContractError(f"`{given[0]}` has no effect on {path}, which is read as {kind}; leave it out")
    parts: list[Part] = []
    keys: dict[str, None] = {}
    for file in files:
        with readable(file, kind):
            if kind == "parquet":
                parts += open_parquet(file, columns)
            elif kind == "json":
                keys |= dict.fromkeys(json_names(file, encoding))
                parts.append(JsonFile(file, encoding, columns))
            else:
                parts.append(open_delimited(file, columns, dialect, "," if kind == "csv" else "\t", encoding))
    if kind == "json":
        require_columns(columns, list(keys), files[0])
    return parts


def _batches(rows: Iterable[Row], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows as batches with the columns `names`, small in characters too."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(cell) for cell in row if cell)
        if len(batch) == BATCH_ROWS or size > _BATCH_CHARS:
            yield _record_batch(batch, names)
            batch, size = [], 0
    if batch:
        yield _record_batch(batch, names)


def _record_batch(rows: list[Row], names: Sequence[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_text_array(column) for column in zip(*rows, strict=True)], list(names))


def _text_array(cells: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(cells, pa.string())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold as an escape
        return pa.array([cell and cell.encode("utf-8", "replace").decode() for cell in cells], pa.string())
