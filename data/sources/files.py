"""CSV, TSV, JSONL and Parquet files as Spark tables of the wanted columns, under our names, as text.

What was left out: JSON in other encodings than UTF-8, and Excel's own files.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.contracts import ContractError
from data.sources.delimited import read_delimited
from data.sources.paths import list_files, open_text, require_columns, spark_paths

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_CORRUPT = "_corrupt_record"
_SAMPLED_LINES = 1000


def file_format(path: Path, wanted: str) -> str:
    """`csv`, `tsv`, `jsonl` or `parquet`: what is wanted, or by the name when that is `auto`."""
    if wanted != "auto":
        return wanted
    name = path.name.lower()
    found = _SUFFIXES.get(Path(name.removesuffix(".gz")).suffix)
    if found is None:
        raise ContractError(
            f"the name of {path} does not tell its format; set `data.format` to csv, tsv, jsonl or parquet"
        )
    return found


def read_columns(
    spark: SparkSession,
    path: Path,
    wanted: str,
    columns: Mapping[Any, str],
    *,
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> DataFrame:
    """Read a file or a folder of alike files; `delimiter` and `encoding` are those of CSV and TSV files.

    `columns` maps our names to the file's. The result has our names as strings (a nested `attributes` as it is), plus
    `problem` and `detail`: the reason why a line could not be split into columns (else null), and the line.
    Raises `ContractError` for a missing, empty or unreadable file and for a column that is not there.
    """
    files = list_files(path)
    formats = {file_format(file, wanted) for file in files}
    if len(formats) > 1:
        raise ContractError(
            f"{path} mixes files of the formats {', '.join(sorted(formats))}; keep one format in a folder"
        )
    kind = formats.pop()
    with _readable(path, kind):
        if kind == "parquet":
            return _read_parquet(spark, files, columns)
        if kind == "jsonl":
            return _read_jsonl(spark, files, columns)
        return read_delimited(spark, files, columns, delimiter or ("," if kind == "csv" else "\t"), encoding)


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise ContractError(f"{path} cannot be read as {kind}: {error}; check the file or `data.format`") from error


def _read_jsonl(spark: SparkSession, files: list[Path], columns: Mapping[Any, str]) -> DataFrame:
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType, StructField, StructType

    require_columns(columns, _json_names(files[0]), files[0])
    names = list(dict.fromkeys(columns.values()))
    # As a string Spark keeps numbers, lists and objects in their JSON form.
    schema = StructType([StructField(name, StringType()) for name in [*names, _CORRUPT]])
    frame = (
        spark.read.schema(schema)
        .options(mode="PERMISSIVE", columnNameOfCorruptRecord=_CORRUPT, encoding="UTF-8")
        .json(spark_paths(files))
    )
    chosen = [F.col(_quoted(theirs)).alias(ours) for ours, theirs in columns.items()]
    line = F.col(_CORRUPT)
    problem = F.when(line.isNotNull(), "the line is not a JSON object")
    for ours, theirs in columns.items():
        if ours != "attributes":
            value = F.col(_quoted(theirs))
            nested = value.rlike(r"^[\[{]") & F.try_parse_json(value).isNotNull()
            problem = problem.when(nested, f"the {str(ours).replace('_', ' ')} is a list or an object, not text")
    frame = frame.select(*chosen, problem.alias("problem"), F.substring(line, 1, 1000).alias("detail"))
    return frame.repartition(spark.sparkContext.defaultParallelism) if files[0].suffix == ".gz" else frame


def json_names(path: Path) -> list[str]:
    """The keys of the first lines' objects, in the order in which they appear; raises `ContractError` for none."""
    with _readable(path, "jsonl"):
        return _json_names(path)


def _json_names(path: Path) -> list[str]:
    names: dict[str, None] = {}
    with open_text(path) as file:
        for line in islice(file, _SAMPLED_LINES):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                names.update(dict.fromkeys(record))
    if not names:
        raise ContractError(
            f"{path} holds no JSON object in its first {_SAMPLED_LINES} lines; one for each line is needed"
        )
    return list(names)


def _read_parquet(spark: SparkSession, files: list[Path], columns: Mapping[Any, str]) -> DataFrame:
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    schema = pq.read_schema(files[0])
    require_columns(columns, schema.names, files[0])
    chosen = []
    for ours, theirs in columns.items():
        kind = schema.field(theirs).type
        if pa.types.is_nested(kind) and ours != "attributes":
            raise ContractError(f"{files[0]}: column '{theirs}' for our '{ours}' is {kind}, expected text or a number")
        column = F.col(_quoted(theirs))
        chosen.append((column if pa.types.is_nested(kind) else column.cast("string")).alias(ours))
    none = F.lit(None).cast("string")
    try:
        frame = spark.read.parquet(*spark_paths(files))
        return frame.select(*chosen, none.alias("problem"), none.alias("detail"))
    except AnalysisException as error:
        raise ContractError(f"Spark cannot read {files[0]}: {str(error).splitlines()[0]}") from error


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
