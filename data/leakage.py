"""The leakage report: which queries and ads are in more than one split, as equal and as near-duplicate texts.

Splits are by query, so an ad that answers queries of several splits is in all of them. That is how it will be in use, too,
but a model that has learnt an ad by heart does better on it than on a new one: the report says how many those are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.contracts import SPLITS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_HASHES = {"near-duplicate queries": "near_query", "ads": "ad", "near-duplicate ads": "near_ad"}


def leakage(pairs: DataFrame) -> dict[str, dict[str, Any]]:
    """For queries and ads, exact and near: how many distinct ones, how many in several splits, and the pairs concerned.

    `pairs` has split, query_id, near_query, ad and near_ad. `by_split` counts the distinct ones of each split, and
    `also_in_train` the pairs of every other split whose query or ad is in train as well.
    """
    from pyspark.sql import functions as F

    # Ids for the queries, since none may be in two splits; 64-bit hashes are enough to count the others, all in one pass.
    queries = _sets(pairs.select(F.lit("queries").alias("kind"), F.col("query_id").alias("key"), "split"))
    kinds = F.array(*[F.struct(F.lit(kind).alias("kind"), F.col(c).alias("key")) for kind, c in _HASHES.items()])
    others = _sets(pairs.select(F.inline(kinds), "split"))
    return {
        name: _summary([row for row in (*queries, *others) if row["kind"] == name]) for name in ("queries", *_HASHES)
    }


def _sets(occurrences: DataFrame) -> list[Any]:
    """One row for each kind and set of splits (so at most 15 of a kind): keys that are in just those, and their pairs."""
    from pyspark.sql import functions as F

    counted = [F.count(F.when(F.col("split") == name, 1)).alias(name) for name in SPLITS]
    sets = occurrences.groupBy("kind", "key").agg(*counted)
    found = sets.groupBy("kind", *[(F.col(name) > 0).alias(f"in_{name}") for name in SPLITS])
    return found.agg(F.count("*").alias("keys"), *[F.sum(name).alias(name) for name in SPLITS]).collect()


def _summary(sets: list[Any]) -> dict[str, Any]:
    several = [row for row in sets if sum(row[f"in_{name}"] for name in SPLITS) > 1]
    return {
        "distinct": sum(row["keys"] for row in sets),
        "in_several_splits": sum(row["keys"] for row in several),
        "by_split": {name: sum(row["keys"] for row in sets if row[f"in_{name}"]) for name in SPLITS},
        "pairs": {name: sum(row[name] for row in sets) for name in SPLITS},
        "also_in_train": {name: sum(row[name] for row in several if row["in_train"]) for name in SPLITS[1:]},
    }
