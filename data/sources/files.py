"""CSV, TSV, JSONL and Parquet files as Spark tables of the wanted columns, under our names, as text.

What was left out: other encodings than UTF-8 (a byte that is none becomes U+FFFD) and Excel's own files.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import ContractError

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


def list_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder (hidden ones and markers left out), sorted; never empty."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise ContractError(f"there is no file {path}{_nearest_file(path)}; check `data.path`")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
    if not files:
        raise ContractError(f"the folder {path} holds no file to read; check `data.path`")
    return files


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


def read_columns(spark: SparkSession, path: Path, wanted: str, columns: Mapping[Any, str]) -> DataFrame:
    """Read a file or a folder of alike files.

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
    try:
        if kind == "parquet":
            return _read_parquet(spark, files, columns)
        if kind == "jsonl":
            return _read_jsonl(spark, files, columns)
        return _read_csv(spark, files, columns, "," if kind == "csv" else "\t")
    except (OSError, EOFError, UnicodeError, csv.Error, pa.ArrowException) as error:
        raise ContractError(f"{path} cannot be read as {kind}: {error}; check the file or `data.format`") from error


def spark_paths(files: Iterable[Path]) -> list[str]:
    """Local files as Spark wants them: on the local file system whatever the default is, and no character a pattern."""
    return ["file://" + re.sub(r"([\\{}\[\]*?,])", r"\\\1", str(file.resolve())) for file in files]


def require_columns(columns: Mapping[Any, str], found: list[str], where: Path) -> None:
    """Raise `ContractError` for the first mapped column that is not in `found`, naming the nearest ones that are."""
    for ours, theirs in columns.items():
        if theirs in found:
            continue
        folded = {name.casefold(): name for name in found}
        near = [folded[n] for n in difflib.get_close_matches(theirs.casefold(), list(folded), n=3, cutoff=0.4)]
        hint = f"{'the nearest are' if near else 'it has'} {', '.join(map(repr, near or found[:10]))}"
        raise ContractError(f"{where} has no column '{theirs}' for our '{ours}': {hint}; mend `data.columns`")


def _read_csv(spark: SparkSession, files: list[Path], columns: Mapping[Any, str], separator: str) -> DataFrame:
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType, StructField, StructType

    header = _csv_header(files[0], separator)
    for other in files[1:]:
        if _csv_header(other, separator) != header:
            raise ContractError(f"{other} has another header than {files[0]}; files of one folder must be alike")
    require_columns(columns, header, files[0])
    for theirs in columns.values():
        if header.count(theirs) > 1:
            raise ContractError(f"{files[0]} has more than one column '{theirs}'; rename all but one in its header")
    # By position: names that differ only in case, or hold dots and backticks, would be trouble to Spark.
    names = [f"c{i}" for i in range(len(header))]
    schema = StructType([StructField(name, StringType()) for name in [*names, _CORRUPT]])
    frame = (
        spark.read.schema(schema)
        .options(header=True, sep=separator, quote='"', escape='"', multiLine=True, mode="PERMISSIVE", encoding="UTF-8")
        # Without the columns that nobody wants, Spark does not see that a line has too few or too many.
        .options(columnNameOfCorruptRecord=_CORRUPT, columnPruning=False)
        .csv(spark_paths(files))
    )
    chosen = [F.col(names[header.index(theirs)]).alias(ours) for ours, theirs in columns.items()]
    # A file with quoted line breaks cannot be read in pieces: spread its rows for what comes next.
    return _with_problem(frame, chosen, "the line has too few or too many columns").repartition(
        spark.sparkContext.defaultParallelism
    )


def _csv_header(path: Path, separator: str) -> list[str]:
    with _open_text(path) as file:
        header = next(csv.reader(file, delimiter=separator), None)
    if not header:
        raise ContractError(f"{path} is empty or its first line is; a header with the column names is needed")
    return header


def _read_jsonl(spark: SparkSession, files: list[Path], columns: Mapping[Any, str]) -> DataFrame:
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType, StructField, StructType

    require_columns(columns, _json_names(files[0]), files[0])
    names = list(dict.fromkeys(columns.values()))
    # As a string Spark keeps numbers and objects in their JSON form.
    schema = StructType([StructField(name, StringType()) for name in [*names, _CORRUPT]])
    frame = (
        spark.read.schema(schema)
        .options(mode="PERMISSIVE", columnNameOfCorruptRecord=_CORRUPT, encoding="UTF-8")
        .json(spark_paths(files))
    )
    chosen = [F.col(_quoted(theirs)).alias(ours) for ours, theirs in columns.items()]
    frame = _with_problem(frame, chosen, "the line is not a JSON object")
    return frame.repartition(spark.sparkContext.defaultParallelism) if files[0].suffix == ".gz" else frame


def _json_names(path: Path) -> list[str]:
    names: dict[str, None] = {}
    with _open_text(path) as file:
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


def _with_problem(frame: DataFrame, chosen: list, reason: str) -> DataFrame:
    from pyspark.sql import functions as F

    line = F.col(_CORRUPT)
    return frame.select(
        *chosen, F.when(line.isNotNull(), reason).alias("problem"), F.substring(line, 1, 1000).alias("detail")
    )


def _open_text(path: Path) -> IO[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    # utf-8-sig: the mark that Excel puts first is no part of a column's name.
    return opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="")  # type: ignore[operator]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.4)
    return f" (that folder has {', '.join(near)})" if near else ""
