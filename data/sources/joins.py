"""Sources in several files: labels are joined with what they are about, and no label is lost or doubled by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def one_for_each(frame: DataFrame, keys: list[str], columns: list[str]) -> DataFrame:
    """One row for each key: its columns, and `count`, how many different rows share it. Faulty lines are left out."""
    from pyspark.sql import functions as F

    sound = frame.where(F.col("problem").isNull()).select(*keys, *columns).distinct()
    return sound.groupBy(*keys).agg(F.count("*").alias("count"), *[F.first(name).alias(name) for name in columns])


def with_match(labels: DataFrame, others: DataFrame, keys: list[str], missing: str) -> DataFrame:
    """`labels` with the columns of their match in `others`; without one, or with several, a row gets a `problem`."""
    from pyspark.sql import functions as F

    joined = labels.join(others, keys, "left")
    problem = F.when(F.col("count").isNull(), missing).when(
        F.col("count") > 1, missing.replace(" is not in ", " has different rows in ")
    )
    key = F.concat_ws(" ", *keys)
    return joined.withColumns(
        {
            "detail": F.coalesce("detail", F.when(F.col("problem").isNull() & problem.isNotNull(), key)),
            "problem": F.coalesce("problem", problem),
        }
    ).drop("count")
