"""Any CSV, TSV, JSONL or Parquet with a column mapping. Files are local; a folder of alike files is one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import ContractError, GradeScale
from data.html import visible_text_column
from data.sources.files import read_columns
from data.sources.labels import named_label, number, threshold_grade
from data.sources.paths import list_files

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from data.config import DataConfig


LICENCE = "the owner's"
GRADING = "as the settings `grade_thresholds` or `grade_labels` say; without them the label is the grade"


def input_files(config: DataConfig) -> list[Path]:
    """The file of `config.path`, or the files of that folder."""
    assert config.path is not None
    return list_files(config.path)


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows and the scale. An empty label (or NaN) is no label; any other that does not fit is a `problem`.

    `grade_raw` is the rating where labels are numbers, null where they are words.
    """
    from pyspark.sql import functions as F

    assert config.path is not None
    scale = GradeScale(grades=config.grades, relevant_from=config.relevant_from or len(config.grades) - 1)
    frame = read_columns(
        spark, config.path, config.format, config.columns, delimiter=config.delimiter, encoding=config.encoding
    )
    for name in ("ad_text", "attributes", "grade", "rationale"):
        if name not in frame.columns:
            frame = frame.withColumn(name, F.lit(None).cast("string"))
    if config.html:
        frame = frame.withColumns({name: visible_text_column(F.col(name)) for name in ("ad_title", "ad_text")})
    attributes, not_attributes = attributes_column(frame)
    raw, grade, not_grade = _grade(config)
    return frame.select(
        "query",
        "ad_title",
        "ad_text",
        attributes.alias("attributes"),
        raw.alias("grade_raw"),
        grade.alias("grade"),
        "rationale",
        F.coalesce("problem", not_grade, not_attributes).alias("problem"),
        F.coalesce("detail", F.when(not_grade.isNotNull(), F.col("grade"))).alias("detail"),
    ), scale


def _grade(config: DataConfig) -> tuple[Column, Column, Column]:
    """Columns of rating, grade and problem."""
    from pyspark.sql import functions as F

    text = F.trim("grade")
    given = F.col("grade").isNotNull() & (text != "") & (F.lower(text) != "nan")
    if config.grade_labels:
        grade = F.when(given, named_label(text, config.grade_labels, "int"))
        problem = F.when(given & grade.isNull(), "the label is not one of grade_labels")
        return F.lit(None).cast("double"), grade, problem
    raw = F.when(given, number(text))
    if config.grade_thresholds:
        grade = threshold_grade(raw, config.grade_thresholds)
        return raw, grade, F.when(given & raw.isNull(), "the label is not a number")
    fits = (raw == F.rint(raw)) & (raw >= 0) & (raw < len(config.grades))
    grade = F.when(fits, raw.try_cast("int"))
    return raw, grade, F.when(given & grade.isNull(), f"the grade is not on the scale 0 … {len(config.grades) - 1}")


def attributes_column(frame: DataFrame) -> tuple[Column, Column]:
    """Columns of attributes (map of strings) and problem, from JSON text, a map or a struct."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import MapType, StringType, StructType

    column, kind = F.col("attributes"), frame.schema["attributes"].dataType
    none = F.lit(None).cast("string")
    if isinstance(kind, MapType):
        return column.cast("map<string,string>"), none
    if isinstance(kind, StructType):
        # Through JSON, so that values of any type become text and the missing ones go.
        return F.from_json(F.to_json(column), "map<string,string>"), none
    if not isinstance(kind, StringType):
        raise ContractError(
            f"the column for 'attributes' is {kind.simpleString()}, expected a map, an object or JSON text"
        )
    given = column.isNotNull() & ~F.trim(column).isin("", "null")
    parsed = F.when(given, F.from_json(column, "map<string,string>"))
    return parsed, F.when(given & parsed.isNull(), "the attributes are not a JSON object")
