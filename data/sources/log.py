"""Unlabelled pairs, such as a search log: rows that only the pool can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.sources.files import read_columns
from data.sources.labels import number
from data.sources.table import attributes_column

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import LogConfig


def read_log(spark: SparkSession, config: LogConfig, encoding: str) -> DataFrame:
    """The rows without grades, with `frequency`, how often the pair was seen; any but a positive number is a `problem`."""
    from pyspark.sql import functions as F

    frame = read_columns(
        spark, config.path, config.format, config.columns, delimiter=config.delimiter, encoding=encoding
    )
    for name in ("ad_text", "attributes"):
        if name not in frame.columns:
            frame = frame.withColumn(name, F.lit(None).cast("string"))
    if "frequency" not in frame.columns:
        frame = frame.withColumn("frequency", F.lit("1"))
    attributes, not_attributes = attributes_column(frame)
    frequency = number(F.trim("frequency"))
    sound = (frequency > 0) & (frequency < 1e15)
    faulty = F.when(F.coalesce(sound, F.lit(False)), None).otherwise(
        "the frequency is not a number above 0 and below 1e15"
    )
    return frame.select(
        "query",
        "ad_title",
        "ad_text",
        attributes.alias("attributes"),
        frequency.alias("frequency"),
        F.coalesce("problem", faulty, not_attributes).alias("problem"),
        F.coalesce("detail", F.when(faulty.isNotNull(), F.col("frequency"))).alias("detail"),
    )
