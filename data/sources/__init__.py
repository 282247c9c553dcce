"""Sources of query–ad pairs, and the way in: made up, a public set, or any table, with a log beside each."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import ValidationError

from data.config import DataConfig
from data.contracts import ContractError, GradeScale, digest_files
from data.sources import synthetic
from data.sources.labels import Source
from data.sources.paths import list_files, open_bytes, settings_of
from data.sources.public import public_files, public_set, read_public
from data.sources.table import check_columns, read_log, read_table, table_source

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_GENERATED = pa.schema(
    [(name, pa.string()) for name in ("query", "ad_title", "ad_text", "attributes", "grade", "rationale")]
)
_CHUNK = 20_000


def source_of(config: DataConfig) -> Source:
    """What the rows of the configured source mean; raises `ContractError` for a grade that its scale does not have."""
    if config.source_name == "synthetic":
        source = synthetic.SOURCE
    elif config.source_name == "table":
        source = table_source(config)
    else:
        source = public_set(config.source_name)
    return source if config.relevant_from is None else source.model_copy(update={"scale": _scale(source, config)})


def read_source(spark: SparkSession, config: DataConfig) -> DataFrame:
    """The rows of the configured source and of its log, as text; raises `ContractError` for a file that cannot be read.

    Columns: `query`, `ad_title` and any of `ad_text`, `attributes`, `grade` (the label), `rationale`, `variance` (of several
    raters), `frequency` (null but for rows of a log), and `problem` and `detail` (why a line is no row, and what it holds).
    """
    if config.source_name == "synthetic":
        rows = _read_generated(spark, synthetic.generate(config.rows, config.seed))
    elif config.source_name == "table":
        rows = read_table(spark, config)
    else:
        rows = read_public(spark, config)
    if config.log is None:
        return rows
    return rows.unionByName(read_log(spark, config.log, config.encoding), allowMissingColumns=True)


def source_label(config: DataConfig) -> str:
    """The source and where it lies, for people: `table labels.csv`, `synthetic (made up, 16,000 rows)`."""
    if config.source_name == "synthetic":
        label = f"synthetic (made up, {config.rows:,} rows)"
    else:
        label = f"{config.source_name} {config.path or 'in $ADS_RELEVANCE_DATA'}"
    return label if config.log is None else f"{label}, log {config.log.path}"


def read_texts(config: DataConfig) -> Iterator[dict[str, str]]:
    """The rows of `TEXTS`: the configured file's lines, without blank ones, or the made-up shop's catalogue.

    Raises `ContractError` when the file is not there, is not UTF-8 or has no text.
    """
    if config.texts is None:
        yield from synthetic.catalogue(config.seed) if config.source_name == "synthetic" else ()
        return
    try:
        with open_bytes(config.texts) as file:
            lines = ({"text": text} for line in io.TextIOWrapper(file, "utf-8-sig") if (text := line.strip()))
            if (first := next(lines, None)) is None:
                raise ContractError(f"`data.texts`: {config.texts} has no text; leave the setting out")
            yield from chain([first], lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"`data.texts`: {config.texts} cannot be read as UTF-8 text ({error})") from None


def input_files(config: DataConfig) -> list[Path]:
    """The files that source and log read; raises `ContractError` when one is not there."""
    files: list[Path] = []
    if config.source_name == "table" and config.path is not None:
        files = list_files(config.path, config.format)
    elif config.source_name != "synthetic":
        files = public_files(config)
    if config.texts is not None:
        if not config.texts.is_file():
            raise ContractError(f"there is no file {config.texts}; check `data.texts`")
        files.append(config.texts)
    if config.log is not None:
        with settings_of("data.log"):
            files += list_files(config.log.path, config.log.format)
    return files


def input_fingerprint(config: DataConfig) -> str:
    """Hash of the files that source and log read, so that a changed file is noticed; empty when there are none.

    Raises `ContractError` for a file or a mapped column that is not there.
    """
    files = input_files(config)
    check_columns(config)
    return digest_files(files) if files else ""


def _read_generated(spark: SparkSession, rows: Iterator[dict[str, Any]]) -> DataFrame:
    """Rows made by Python, as a Spark table of text. Taken in chunks, so that only their Arrow form is whole in memory."""
    as_text = (row | {"grade": str(row["grade"]), "attributes": json.dumps(row["attributes"])} for row in rows)
    chunks = []
    while chunk := list(islice(as_text, _CHUNK)):
        chunks.append(pa.Table.from_pylist(chunk, schema=_GENERATED))
    return spark.createDataFrame(pa.concat_tables(chunks))


def _scale(source: Source, config: DataConfig) -> GradeScale:
    try:
        return GradeScale.model_validate({"grades": source.scale.grades, "relevant_from": config.relevant_from})
    except ValidationError:
        highest = source.scale.size - 1
        raise ContractError(
            f"`data.relevant_from` is {config.relevant_from} and the highest grade is {highest}; choose 1 … {highest}"
        ) from None
