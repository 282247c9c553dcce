"""Sources of query–ad pairs: a registry by name, and the way in.

A source module exposes `read(spark, config) -> (frame, scale)`; `frame` has the columns of `COLUMNS`, and may have
`problem` and `detail` (strings: why the source could not read the row, and what it found). The synthetic source
instead exposes `SCALE` and `generate(rows, seed)`, and needs no Spark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.schema import GradeScale

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

SOURCES = {
    "synthetic": "data.sources.synthetic",
    "home_depot": "data.sources.home_depot",
    "table": "data.sources.table",
}

COLUMNS = pa.schema(
    [
        pa.field("query", pa.string()),
        pa.field("ad_title", pa.string()),
        pa.field("ad_text", pa.string()),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
        pa.field("grade_raw", pa.float64()),
        pa.field("grade", pa.int32()),
        pa.field("rationale", pa.string()),
    ]
)

_CHUNK = 20_000


def read_source(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows of the configured source and its grade scale; raises `ContractError` for a file that cannot be read."""
    module = import_module(SOURCES[config.source])
    if config.source == "synthetic":
        return read_generated(spark, module.generate(config.rows, config.seed)), module.SCALE
    return module.read(spark, config)


def read_generated(spark: SparkSession, rows: Iterator[dict[str, Any]]) -> DataFrame:
    """Rows made by Python, as a Spark table. Taken in chunks, so that only their Arrow form is whole in memory."""
    chunks = []
    while chunk := list(islice(rows, _CHUNK)):
        for row in chunk:
            row["attributes"] = list((row.get("attributes") or {}).items())
        chunks.append(pa.Table.from_pylist(chunk, schema=COLUMNS))
    return spark.createDataFrame(pa.concat_tables(chunks) if chunks else COLUMNS.empty_table())


def input_fingerprint(config: DataConfig) -> str:
    """Hash of the files that the source reads, so that a changed file is noticed; empty for a source without files.

    Raises `ContractError` when the file is not there.
    """
    if config.source == "synthetic":
        return ""
    hashed = hashlib.sha256()
    for path in import_module(SOURCES[config.source]).input_files(config):
        hashed.update(path.name.encode("utf-8", "surrogateescape"))
        hashed.update(_file_hash(path))
    return hashed.hexdigest()[:16]


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
