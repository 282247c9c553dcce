"""Rows of one pair become one: what their labels agree on, and how far they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

_KEYS = ("query_id", "near_query", "point", "split", "ad", "near_ad")


def merged_pairs(rows: DataFrame, grades: int) -> DataFrame:
    """One row for each pair_id: lower median of its labels, the first of its texts in text order, the sum of `frequency`.

    The lower median is always a label that somebody gave, and thresholds commute with it, so grade and rating agree.
    `rows` have grades below `grades`. Adds `rows`, `n_labels`, `grade_min`, `grade_max` and `rating_variance`: where rows
    bring a variance of their own, their mean plus the variance between the rows (the law of total variance).
    """
    from pyspark.sql import functions as F

    shown = F.struct("query", "ad_title", "ad_text", "attributes")
    # A map has no order of its own.
    order = F.struct("query", "ad_title", "ad_text", "attributes_json")
    # A reason must be one for the grade that stays, so the first reason of each grade is kept until that is known.
    reasons = [F.min(F.when(F.col("grade") == k, F.col("rationale"))).alias(f"reason_{k}") for k in range(grades)]

    def in_order(name: str) -> Column:
        # Sums of floats depend on their order, and so would the variance on the partitions.
        return F.array_sort(F.collect_list(name)).alias(f"all_{name}")

    # Few pairs are there twice, so merging before the shuffle would sort every row once more for nothing.
    grouped = (
        rows.repartition("pair_id")
        .groupBy("pair_id")
        .agg(
            # They follow from the normalised texts, which all rows of a pair share.
            *[F.first(name).alias(name) for name in _KEYS],
            F.min_by(shown, order).alias("shown"),
            F.count("*").alias("rows"),
            *[in_order(name) for name in ("grade", "grade_raw", "rating_variance", "frequency")],
            *reasons,
        )
    )
    # Of its own, so that it is not computed again for each rating.
    grouped = grouped.withColumn("mean", F.try_divide(_sum("all_grade_raw"), F.size("all_grade_raw")))
    grade = _lower_median("all_grade")
    reason = F.get(F.array(*[f"reason_{k}" for k in range(grades)]), grade)
    return grouped.select(
        "pair_id",
        *_KEYS,
        "shown.*",
        "rows",
        grade.alias("grade"),
        _lower_median("all_grade_raw").alias("grade_raw"),
        F.size("all_grade").alias("n_labels"),
        F.array_min("all_grade").alias("grade_min"),
        F.array_max("all_grade").alias("grade_max"),
        _total_variance().alias("rating_variance"),
        F.when(F.size("all_frequency") > 0, _sum("all_frequency")).alias("frequency"),
        reason.alias("rationale"),
    )


def _lower_median(name: str) -> Column:
    from pyspark.sql import functions as F

    return F.get(F.col(name), F.floor((F.size(name) - 1) / 2).cast("int"))


def _sum(name: str) -> Column:
    from pyspark.sql import functions as F

    return F.aggregate(F.col(name), F.lit(0.0), lambda total, value: total + value)


def _total_variance() -> Column:
    """Null for a pair with fewer than two ratings and no variance from its source."""
    from pyspark.sql import functions as F

    n = F.size("all_grade_raw")
    mean = F.col("mean")
    squares = F.aggregate(F.col("all_grade_raw"), F.lit(0.0), lambda total, x: total + (x - mean) * (x - mean))
    between = F.when(n > 1, squares / n)
    own = F.size("all_rating_variance")
    within = F.when(own > 0, _sum("all_rating_variance") / own)
    given = between.isNotNull() | within.isNotNull()
    return F.when(given, F.coalesce(between, F.lit(0.0)) + F.coalesce(within, F.lit(0.0)))
