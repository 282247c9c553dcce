"""Which split a query belongs to: a matter of its own hash, so that adding rows moves no query.

All rows of a query and of its near-duplicates are in one split, so that no model is tested on a query it has seen. That a
split has its share of each grade is left to the hash: whoever balances grades exactly must look at the other rows, and
moves old pairs when rows are added. The data card says how far each split is from the whole, in standard deviations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.contracts import SPLITS
from data.text import stable_hash

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from data.config import Shares

_POINTS = 1 << 63
_BUCKETS = 1 << 12


def split_point(query_key: str, seed: int) -> int:
    """Place of a query (its key, or near key) in hash order: an integer in [0, 2⁶³), uniform over queries."""
    return int.from_bytes(stable_hash(str(seed), query_key)[:8], "big") >> 1


def split_bounds(shares: Shares) -> list[tuple[str, int]]:
    """Each split with the point below which its queries lie, in the order of `SPLITS`."""
    bounds, total = [], 0.0
    for name in SPLITS:
        total += getattr(shares, name)
        bounds.append((name, round(total * _POINTS)))
    last = max(i for i, name in enumerate(SPLITS) if getattr(shares, name) > 0)
    # Shares that sum to 0.9999999 must not leave a hole at the end.
    return [(name, _POINTS if i >= last else bound) for i, (name, bound) in enumerate(bounds)]


def split_of(point: int, shares: Shares) -> str:
    """The split of a query at `point`."""
    return next(name for name, bound in split_bounds(shares) if point < bound)


def within_limits(frame: DataFrame, limits: dict[str, int], by: str = "split") -> DataFrame:
    """Keep of each split in `limits` its first rows in hash order (by query, then by pair), at most that many.

    `frame` has the columns point, pair_id and `by`, whose values are the keys of `limits`. Queries are kept whole, except
    the last one of a split. The order of the rows plays no part, and an added row pushes out only rows that come after it.
    """
    if not limits:
        return frame
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    bucketed = frame.withColumn("bucket", F.shiftright("point", (_POINTS // _BUCKETS).bit_length() - 1))
    # Only the bucket in which a limit falls has to be sorted; the counts of all buckets fit on the driver.
    counts = bucketed.where(F.col(by).isin(*limits)).groupBy(by, "bucket").count().orderBy("bucket").collect()
    keep, cut, rest = ~F.col(by).isin(*limits), F.lit(False), F.lit(0)
    for name, limit in limits.items():
        whole, edge = 0, _BUCKETS
        for row in counts:
            if row[by] == name and edge == _BUCKETS:
                whole, edge = (whole, row["bucket"]) if whole + row["count"] > limit else (whole + row["count"], edge)
        here = F.col(by) == name
        keep = keep | (here & (F.col("bucket") < edge))
        cut = cut | (here & (F.col("bucket") == edge))
        rest = F.when(here, limit - whole).otherwise(rest)
    rank = F.row_number().over(Window.partitionBy(by).orderBy("point", "pair_id"))
    first = bucketed.where(cut).withColumn("rank", rank).where(F.col("rank") <= rest).drop("rank")
    return bucketed.where(keep).unionByName(first).drop("bucket")
