"""Which rows of a log the pool takes: a sample of head, torso and tail queries, the same on every machine."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import accumulate
from typing import TYPE_CHECKING

from data.contracts import STRATA
from data.split import within_limits

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from data.config import LogConfig


def with_stratum(pairs: DataFrame, config: LogConfig) -> DataFrame:
    """Add `stratum` of the pair's query, null where no row of the query comes from the log.

    Queries of equal frequency are in one stratum, so a stratum can carry a little more of the traffic than it is asked to.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    # Exact, so that the order of the rows decides nothing and both sums of a query are equal.
    amount = F.col("frequency").cast("decimal(28,6)")
    seen = pairs.withColumn("query_frequency", F.sum(amount).over(Window.partitionBy("query_id")))
    queries = pairs.where(F.col("frequency").isNotNull()).groupBy("query_id").agg(F.sum(amount).alias("frequency"))
    # Frequencies are few where queries are many: most are seen once or twice.
    traffic = queries.groupBy("frequency").agg(F.sum("frequency").alias("traffic")).orderBy(F.desc("frequency"))
    head, torso = _bounds([(row["frequency"], row["traffic"]) for row in traffic.toLocalIterator()], config)
    frequency = F.col("query_frequency").cast("double")
    stratum = F.when(frequency >= head, STRATA[0]).when(frequency >= torso, STRATA[1])
    stratum = F.when(frequency.isNotNull(), stratum.otherwise(STRATA[2]))
    return seen.withColumn("stratum", stratum).drop("query_frequency")


def sampled_log(pairs: DataFrame, config: LogConfig) -> DataFrame:
    """`pairs` without the unlabelled ones of the log that are beyond the limit of their stratum.

    `pairs` has `stratum`. A pair that also has a label is no matter of the log's limits.
    """
    from pyspark.sql import functions as F

    if not config.limits:
        return pairs
    from_log = F.col("frequency").isNotNull() & F.col("grade").isNull()
    sample = within_limits(pairs.where(from_log), config.limits, by="stratum")
    return pairs.where(~from_log).unionByName(sample)


def strata_counts(usable: DataFrame, selected: DataFrame) -> dict[str, dict[str, int]]:
    """By stratum: queries and pairs of the log that can go to the pool, and the pairs that were taken."""
    from pyspark.sql import functions as F

    def counts(pairs: DataFrame) -> dict[str, dict[str, int]]:
        from_log = pairs.where(F.col("frequency").isNotNull() & F.col("grade").isNull()).groupBy("stratum")
        rows = from_log.agg(F.countDistinct("query_id").alias("queries"), F.count("*").alias("pairs")).collect()
        return {row["stratum"]: {"queries": row["queries"], "pairs": row["pairs"]} for row in rows}

    all_pairs, taken = counts(usable), counts(selected)
    return {
        name: all_pairs[name] | {"taken": taken.get(name, {"pairs": 0})["pairs"]}
        for name in STRATA
        if name in all_pairs
    }


def _bounds(traffic: list[tuple[Decimal, Decimal]], config: LogConfig) -> tuple[float, float]:
    """The lowest query frequency of the head and of the torso; `traffic` is by falling frequency."""
    total = float(sum(amount for _, amount in traffic))
    # A frequency belongs to the stratum in which its first query falls.
    before = [0.0, *accumulate(float(amount) for _, amount in traffic)]
    starts = [(float(frequency), start) for (frequency, _), start in zip(traffic, before, strict=False)]
    shares = (config.head_traffic, config.torso_traffic)
    head, torso = (min((f for f, start in starts if start < share * total), default=math.inf) for share in shares)
    return head, torso
