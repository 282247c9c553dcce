"""Sources of query–ad pairs, and the way in: made up, a public set, or any table, with a log beside each."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import ValidationError

from data.config import DataConfig
from data.contracts import ContractError, GradeScale, digest_files
from data.sources import synthetic, table
from data.sources.labels import Labels, grade_numbers, json_attributes, named_values
from data.sources.paths import list_files, open_bytes
from data.sources.public import public_files, public_set, read_public
from data.sources.table import check_columns, read_log, read_table, table_labels, table_scale

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_GENERATED = pa.schema(
    [(name, pa.string()) for name in ("query", "ad_title", "ad_text", "attributes", "grade", "rationale")]
)
_CHUNK = 20_000


@dataclass(frozen=True)
class Source:
    """The rows of a source as text, and how they are to be read.

    `frame` has `query`, `ad_title` and any of `ad_text`, `attributes`, `grade` (the label), `rationale`, `variance` (of
    several raters), `frequency` (null but for rows of a log), and `problem` and `detail` (why a line is no row, and what it
    holds).
    """

    frame: DataFrame
    scale: GradeScale
    labels: Labels
    html: bool = False
    """Titles and texts are HTML."""
    attributes: Callable[[str], dict[str, str] | None] = json_attributes
    """The attributes that a cell holds; None when it cannot be read."""


def read_source(spark: SparkSession, config: DataConfig) -> Source:
    """The configured source, with the rows of its log; raises `ContractError` for a file that cannot be read."""
    if config.source_name == "synthetic":
        frame = _read_generated(spark, synthetic.generate(config.rows, config.seed))
        source = Source(
            frame, synthetic.SCALE, grade_numbers(synthetic.SCALE.size - 1, "the grade is not on the scale")
        )
    elif config.source_name == "table":
        source = Source(read_table(spark, config), table_scale(config), table_labels(config), config.html)
    else:
        chosen = public_set(config.source_name)
        attributes = named_values if config.source_name == "wands" else json_attributes
        source = Source(read_public(spark, config), chosen.scale, chosen.labels, chosen.html, attributes)
    if config.log is not None:
        log = read_log(spark, config.log, config.encoding)
        source = replace(source, frame=source.frame.unionByName(log, allowMissingColumns=True))
    return source if config.relevant_from is None else replace(source, scale=_relevant_from(source.scale, config))


def describe_source(config: DataConfig) -> dict[str, str]:
    """Licence of the configured source, and how its ratings become grades, a sentence each."""
    if config.source_name in ("synthetic", "table"):
        module = synthetic if config.source_name == "synthetic" else table
        return {"licence": module.LICENCE, "grading": module.GRADING}
    chosen = public_set(config.source_name)
    return {"licence": chosen.licence, "grading": chosen.grading}


def source_label(config: DataConfig) -> str:
    """The source and where it lies, for people: `table labels.csv`, `synthetic (made up, 16,000 rows)`."""
    if config.source_name == "synthetic":
        label = f"synthetic (made up, {config.rows:,} rows)"
    else:
        label = f"{config.source_name} {config.path or 'in $ADS_RELEVANCE_DATA'}"
    return label if config.log is None else f"{label}, log {config.log.path}"


def read_texts(config: DataConfig) -> Iterator[dict[str, str]]:
    """The rows of `TEXTS`: the configured file's lines, without blank ones, or the made-up shop's catalogue.

    Raises `ContractError` when the file is not there or is not UTF-8.
    """
    if config.texts is None:
        yield from synthetic.catalogue(config.seed) if config.source_name == "synthetic" else ()
        return
    try:
        with open_bytes(config.texts) as file:
            yield from ({"text": text} for line in io.TextIOWrapper(file, "utf-8-sig") if (text := line.strip()))
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
    return files + ([] if config.log is None else list_files(config.log.path, config.log.format))


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


def _relevant_from(scale: GradeScale, config: DataConfig) -> GradeScale:
    try:
        return GradeScale.model_validate({"grades": scale.grades, "relevant_from": config.relevant_from})
    except ValidationError:
        highest = scale.size - 1
        raise ContractError(
            f"`data.relevant_from` is {config.relevant_from} and the highest grade is {highest}; choose 1 … {highest}"
        ) from None
