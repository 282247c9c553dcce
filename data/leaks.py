"""The leakage report: which queries and ads are in more than one split, as equal and as near-duplicate texts.

Splits are by query, so an ad that answers queries of several splits is in all of them. That is how it will be in use, too,
but a model that has learnt an ad by heart does better on it than on a new one: the report says how many those are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.schema import SPLITS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def leakage(pairs: DataFrame) -> dict[str, dict[str, Any]]:
    """For queries and ads, exact and near: how many distinct ones, how many in several splits, and the pairs concerned.

    `pairs` has split, query_id, near_query, ad and near_ad. `also_in_train` counts the pairs of every other split whose
    query or ad is in train as well.
    """
    names = {
        "queries": "query_id",
        "near-duplicate queries": "near_query",
        "ads": "ad",
        "near-duplicate ads": "near_ad",
    }
    return {name: _across_splits(pairs, column) for name, column in names.items()}


def _across_splits(pairs: DataFrame, key: str) -> dict[str, Any]:
    from pyspark.sql import functions as F

    counts = pairs.groupBy(key).agg(*[F.count(F.when(F.col("split") == name, 1)).alias(name) for name in SPLITS])
    # One row for each set of splits, so at most 15.
    sets = (
        counts.groupBy(*[(F.col(name) > 0).alias(f"in_{name}") for name in SPLITS])
        .agg(F.count("*").alias("keys"), *[F.sum(name).alias(name) for name in SPLITS])
        .collect()
    )
    several = [row for row in sets if sum(row[f"in_{name}"] for name in SPLITS) > 1]
    others = [name for name in SPLITS if name != "train"]
    return {
        "distinct": sum(row["keys"] for row in sets),
        "in_several_splits": sum(row["keys"] for row in several),
        "pairs": {name: sum(row[name] for row in sets) for name in SPLITS},
        "also_in_train": {name: sum(row[name] for row in several if row["in_train"]) for name in others},
    }
