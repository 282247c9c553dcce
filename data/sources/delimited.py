"""CSV and TSV files as Spark tables of the wanted columns.

A quote left open makes every reader take the following rows for one field. Such a field is taken apart again, and each of
its lines is a faulty row of its own, so that no row disappears in another.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import ContractError
from data.sources.paths import open_text, require_columns, spark_paths

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

LONGEST_FIELD = 4_000_000
"""Characters of a field at which reading stops: a quote left open must not draw the rest of a file into memory."""

_CORRUPT = "_corrupt_record"
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_JAVA_NAMES = {"latin-1": "ISO-8859-1"}


def read_delimited(
    spark: SparkSession, files: list[Path], columns: Mapping[Any, str], delimiter: str, encoding: str
) -> DataFrame:
    """The wanted columns of alike files under our names, with `problem` and `detail`."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType, StructField, StructType

    header = _header(files[0], delimiter, encoding)
    for other in files[1:]:
        if _header(other, delimiter, encoding) != header:
            raise ContractError(f"{other} has another header than {files[0]}; files of one folder must be alike")
    if len(header) == 1 < len(columns):
        _name_the_delimiter(files[0], header[0], delimiter)
    require_columns(columns, header, files[0])
    for theirs in columns.values():
        if header.count(theirs) > 1:
            raise ContractError(f"{files[0]} has more than one column '{theirs}'; rename all but one in its header")
    # By position: names that differ only in case, or hold dots and backticks, would be trouble to Spark.
    names = [f"c{i}" for i in range(len(header))]
    schema = StructType([StructField(name, StringType()) for name in [*names, _CORRUPT]])
    frame = (
        spark.read.schema(schema)
        .options(header=True, sep=delimiter, quote='"', escape='"', multiLine=True, mode="PERMISSIVE")
        .options(encoding=_JAVA_NAMES.get(encoding, encoding), maxCharsPerColumn=LONGEST_FIELD)
        # Without the columns that nobody wants, Spark does not see that a line has too few or too many.
        .options(columnNameOfCorruptRecord=_CORRUPT, columnPruning=False)
        .csv(spark_paths(files))
    )
    swallowed = _swallowed_rows(names, delimiter)
    frame = frame.withColumn("swallowed", swallowed)
    frame = frame.withColumn("line", F.explode(F.coalesce("swallowed", F.array(F.lit(None).cast("string")))))
    whole, broken = F.col("line").isNull(), F.col(_CORRUPT).isNotNull()
    problem = F.when(
        ~whole, "a quote was left open: a quoted field holds what look like rows of their own, this line among them"
    ).when(broken, "the line has too few or too many columns")
    chosen = [F.when(whole, F.col(names[header.index(theirs)])).alias(ours) for ours, theirs in columns.items()]
    detail = F.substring(F.coalesce("line", _CORRUPT), 1, 1000)
    # A file with quoted line breaks cannot be read in pieces: spread its rows for what comes next.
    return frame.select(*chosen, problem.alias("problem"), detail.alias("detail")).repartition(
        spark.sparkContext.defaultParallelism
    )


def _swallowed_rows(names: list[str], delimiter: str) -> Column:
    """The lines of a record that seems to be several rows, else null.

    Those are a broken record of several lines, and a whole one in which each line has columns enough to be a row. A comma
    before a space is taken for prose, so that a text of several lines seldom looks like rows.
    """
    from pyspark.sql import functions as F

    def lines(text: Column) -> Column:
        return F.filter(F.split(text, "\r\n|\r|\n"), lambda line: F.trim(line) != "")

    def is_row(line: Column) -> Column:
        return F.size(F.split(line, re.escape(delimiter) + "(?! )")) >= len(names)

    record = F.concat_ws(delimiter, *[F.coalesce(name, F.lit("")) for name in names])
    broken = F.when(F.col(_CORRUPT).contains("\n") | F.col(_CORRUPT).contains("\r"), lines(F.col(_CORRUPT)))
    several = F.lit(False)
    for name in names:
        several = several | F.coalesce(F.col(name).contains("\n"), F.lit(False))
    glued = several & F.lit(len(names) > 1) & F.forall(lines(record), is_row)
    return F.when(F.col(_CORRUPT).isNotNull(), broken).when(glued, lines(record))


def _header(path: Path, delimiter: str, encoding: str) -> list[str]:
    with open_text(path, encoding) as file:
        header = next(csv.reader(file, delimiter=delimiter), None)
    if not header:
        raise ContractError(f"{path} is empty or its first line is; a header with the column names is needed")
    if any("\ufffd" in name or "\x00" in name for name in header):
        raise ContractError(f"the first line of {path} is no {encoding} text; set `data.encoding`, or save it as UTF-8")
    return header


def _name_the_delimiter(path: Path, header: str, delimiter: str) -> None:
    for other, name in _DELIMITERS.items():
        if other != delimiter and other in header:
            raise ContractError(
                f"{path} has one column when read by {_DELIMITERS.get(delimiter, repr(delimiter))}, and its header holds "
                f"{name}; set `data.delimiter` to {other!r}"
            )
