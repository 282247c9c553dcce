"""Pairs and grades of each split, and how far the grades are from those of the whole table, measured by what chance does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data.contracts import SPLITS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def split_counts(pairs: DataFrame, grades: int) -> dict[str, dict[str, int]]:
    """For each split that has rows: `rows`, `n0` … of each grade, and the sums over its groups of near-duplicate queries.

    Those are `groups`, `n` (labelled rows), `nn` (Σ n²), `xx0` … (Σ x²) and `xn0` … (Σ x·n) with x the rows of one grade
    in a group; groups without a label count in none of them. `pairs` has split, near_query and grade.
    """
    from pyspark.sql import functions as F

    counted = [F.count(F.when(F.col("grade") == k, 1)).alias(f"n{k}") for k in range(grades)]
    groups = pairs.groupBy("split", "near_query").agg(F.count("*").alias("rows"), F.count("grade").alias("n"), *counted)
    # Exact as decimals; a double's last digits would depend on the partitions.
    n = F.col("n").cast("decimal(18,0)")
    each = [F.col(f"n{k}").cast("decimal(18,0)") for k in range(grades)]
    sums = groups.groupBy("split").agg(
        F.sum("rows").alias("rows"),
        F.count_if(F.col("n") > 0).alias("groups"),
        F.sum("n").alias("n"),
        F.sum(n * n).alias("nn"),
        *[F.sum(f"n{k}").alias(f"n{k}") for k in range(grades)],
        *[F.sum(x * x).alias(f"xx{k}") for k, x in enumerate(each)],
        *[F.sum(x * n).alias(f"xn{k}") for k, x in enumerate(each)],
    )
    rows = {row["split"]: row.asDict() for row in sums.collect()}
    return {
        split: {name: int(value) for name, value in rows[split].items() if name != "split"}
        for split in SPLITS
        if split in rows
    }


def grade_balance(counts: dict[str, dict[str, int]], grades: int) -> dict[str, dict[str, float]]:
    """For each split that has labels: the largest difference of a grade's share to its share in the whole table.

    `difference` is in shares; `deviations` is the largest difference in standard deviations of a split drawn at random by
    groups of near-duplicate queries (the linearised variance of a ratio under cluster sampling), so that about 2 to 3 is to
    be expected and more than 5 is not. `counts` are those of `split_counts`.
    """
    labelled = {split: row for split, row in counts.items() if row["n"]}
    total: dict[str, int] = {}
    for row in labelled.values():
        for name, value in row.items():
            total[name] = total.get(name, 0) + value
    return {split: _largest(row, total, grades) for split, row in labelled.items()} if len(labelled) > 1 else {}


def _largest(counts: dict[str, int], total: dict[str, int], grades: int) -> dict[str, float]:
    share = counts["groups"] / total["groups"]
    differences, deviations = [], []
    for k in range(grades):
        p = total[f"n{k}"] / total["n"]
        difference = abs(counts[f"n{k}"] / counts["n"] - p)
        spread = total[f"xx{k}"] - 2 * p * total[f"xn{k}"] + p * p * total["nn"]
        deviation = math.sqrt(max(0.0, spread * (1 - share) / share)) / total["n"]
        differences.append(difference)
        deviations.append(difference / deviation if deviation else 0.0)
    return {"difference": round(max(differences), 6), "deviations": round(max(deviations), 3)}
