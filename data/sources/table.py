"""Any CSV, TSV, JSON or Parquet with a column mapping, and a log of unlabelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import MISSING_LABELS, DataConfig, LogConfig
from data.contracts import GradeScale
from data.sources.delimited import Dialect
from data.sources.files import open_parts, read_columns
from data.sources.labels import Labels, Source, grade_numbers
from data.sources.paths import settings_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_LOG = "data.log"
_NO_LABEL = ", and for what means that there is no label `data.missing_labels`"


def read_table(spark: SparkSession, config: DataConfig) -> DataFrame:
    """The mapped columns."""
    return read_columns(spark, *_table(config))


def check_columns(config: DataConfig) -> None:
    """Look at the headers of table and log; raises `ContractError` for what reading them would refuse, without Spark."""
    if config.source_name == "table":
        open_parts(*_table(config))
    if config.log is not None:
        with settings_of(_LOG):
            open_parts(*_log(config.log, config.encoding))


def table_source(config: DataConfig) -> Source:
    """What the settings say of the table; the highest grade is the relevant one."""
    return Source(
        licence="the owner's",
        grading="as the settings `grade_thresholds` or `grade_labels` say; without them the label is the grade",
        scale=GradeScale(grades=config.grades, relevant_from=len(config.grades) - 1),
        labels=_labels(config),
        html=config.html,
    )


def _labels(config: DataConfig) -> Labels:
    """How the settings make grades of labels. An empty label or one of `missing_labels` is none."""
    missing = tuple(label.upper() for label in config.missing_labels)
    if config.missing_labels == MISSING_LABELS:
        # "None" beside a grade that is written "none" is a slip, and nothing that may go without a word.
        missing = tuple(label for label in missing if label not in {word.upper() for word in config.grade_labels})
    if config.grade_labels:
        return Labels(
            words=config.grade_labels,
            missing=missing,
            fault=f"the label is not one of `data.grade_labels` (case matters){_NO_LABEL}",
        )
    if config.grade_thresholds:
        fault = f"the label is not a number with a decimal point; words need `data.grade_labels`{_NO_LABEL}"
        return Labels(thresholds=config.grade_thresholds, missing=missing, fault=fault)
    highest = len(config.grades) - 1
    remedy = f"for ratings set `data.grade_thresholds`, for words `data.grade_labels`{_NO_LABEL}"
    return grade_numbers(highest, f"the grade is not on the scale 0 … {highest}: {remedy}", missing)


def read_log(spark: SparkSession, config: LogConfig, encoding: str) -> DataFrame:
    """Rows without grades, with `frequency`, how often the pair was seen: text, never null; 1 where no column says it."""
    from pyspark.sql import functions as F

    frame = read_columns(spark, *_log(config, encoding), section=_LOG)
    frequency = F.coalesce("frequency", F.lit("")) if "frequency" in frame.columns else F.lit("1")
    return frame.withColumn("frequency", frequency)


def _table(config: DataConfig) -> tuple[Path, str, dict[Any, str], Dialect, str]:
    """Where the table lies and how it is read."""
    assert config.path is not None
    dialect = Dialect(config.delimiter, config.header, config.quotes)
    return config.path, config.format, {**config.columns}, dialect, config.encoding


def _log(config: LogConfig, encoding: str) -> tuple[Path, str, dict[Any, str], Dialect, str]:
    return (
        config.path,
        config.format,
        {**config.columns},
        Dialect(config.delimiter, config.header, config.quotes),
        encoding,
    )
