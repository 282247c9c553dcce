"""How far the grades of each split are from those of the whole table, measured by what chance would do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from data.schema import SPLITS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def grade_balance(pairs: DataFrame, grades: int) -> dict[str, dict[str, float]]:
    """For each split that has labels: the largest difference of a grade's share to its share in the whole table.

    `difference` is in shares; `deviations` is the largest difference in standard deviations of a split drawn at random by
    groups of near-duplicate queries (the linearised variance of a ratio under cluster sampling), so that about 2 to 3 is to
    be expected and more than 5 is not. `pairs` has split, near_query and grade.
    """
    from pyspark.sql import functions as F

    counted = [F.count(F.when(F.col("grade") == k, 1)).alias(f"n{k}") for k in range(grades)]
    groups = (
        pairs.where(F.col("grade").isNotNull()).groupBy("split", "near_query").agg(F.count("*").alias("n"), *counted)
    )
    # Sums of squares of counts are exact as decimals; a double's last digits would depend on the partitions.
    n = F.col("n").cast("decimal(20,0)")
    each = [F.col(f"n{k}").cast("decimal(20,0)") for k in range(grades)]
    rows = (
        groups.groupBy("split")
        .agg(
            F.count("*").alias("groups"),
            F.sum("n").alias("n"),
            F.sum(n * n).alias("nn"),
            *[F.sum(f"n{k}").alias(f"n{k}") for k in range(grades)],
            *[F.sum(x * x).alias(f"xx{k}") for k, x in enumerate(each)],
            *[F.sum(x * n).alias(f"xn{k}") for k, x in enumerate(each)],
        )
        .collect()
    )
    total = {
        name: float(sum(row[name] for row in rows)) for name in (rows[0].asDict() if rows else {}) if name != "split"
    }
    return {
        split: _largest(row, total, grades)
        for split in SPLITS
        for row in rows
        if row["split"] == split and len(rows) > 1
    }


def _largest(row: Any, total: dict[str, float], grades: int) -> dict[str, float]:
    share = row["groups"] / total["groups"]
    differences, deviations = [], []
    for k in range(grades):
        p = total[f"n{k}"] / total["n"]
        difference = abs(row[f"n{k}"] / row["n"] - p)
        spread = total[f"xx{k}"] - 2 * p * total[f"xn{k}"] + p * p * total["nn"]
        deviation = math.sqrt(max(0.0, spread * (1 - share) / share)) / total["n"]
        differences.append(difference)
        deviations.append(difference / deviation if deviation else 0.0)
    return {"difference": round(max(differences), 6), "deviations": round(max(deviations), 3)}
