"""Sources of query–ad pairs: a registry by name, and the way in.

A source module exposes `LICENCE`, `GRADING` (how raw ratings become grades, in a sentence), `input_files(config)` and
`read(spark, config) -> (frame, scale)`; `frame` has the columns of `COLUMNS`, and may have `rating_variance` (of the
raters of one row) and `problem` and `detail` (strings: why the source could not read the row, and what it found). The
synthetic source instead exposes `SCALE` and `generate(rows, seed)`, and needs no Spark.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.contracts import GradeScale, digest_files
from data.sources.log import read_log
from data.sources.paths import list_files

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

SOURCES = {
    "synthetic": "data.sources.synthetic",
    "home_depot": "data.sources.home_depot",
    "wands": "data.sources.wands",
    "esci": "data.sources.esci",
    "crowdflower": "data.sources.crowdflower",
    "qbqtc": "data.sources.qbqtc",
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
    """The rows of the configured source and its grade scale; raises `ContractError` for a file that cannot be read.

    With a log its rows come too; `frequency` is null in all others.
    """
    module = import_module(SOURCES[config.source])
    if config.source == "synthetic":
        frame, scale = read_generated(spark, module.generate(config.rows, config.seed)), module.SCALE
    else:
        frame, scale = module.read(spark, config)
    if config.log is not None:
        frame = frame.unionByName(read_log(spark, config.log, config.encoding), allowMissingColumns=True)
    return frame, scale


def describe_source(config: DataConfig) -> dict[str, str]:
    """Licence and grading of the configured source, a sentence each."""
    module = import_module(SOURCES[config.source])
    return {"licence": module.LICENCE, "grading": module.GRADING}


def read_generated(spark: SparkSession, rows: Iterator[dict[str, Any]]) -> DataFrame:
    """Rows made by Python, as a Spark table. Taken in chunks, so that only their Arrow form is whole in memory."""
    chunks = []
    while chunk := list(islice(rows, _CHUNK)):
        for row in chunk:
            row["attributes"] = list((row.get("attributes") or {}).items())
        chunks.append(pa.Table.from_pylist(chunk, schema=COLUMNS))
    return spark.createDataFrame(pa.concat_tables(chunks) if chunks else COLUMNS.empty_table())


def input_fingerprint(config: DataConfig) -> str:
    """Hash of the files that source and log read, so that a changed file is noticed; empty when there are none.

    Raises `ContractError` when a file is not there.
    """
    files = [] if config.source == "synthetic" else import_module(SOURCES[config.source]).input_files(config)
    if config.log is not None:
        files = [*files, *list_files(config.log.path)]
    return digest_files(files) if files else ""
