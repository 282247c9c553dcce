"""Attribute maps as Spark expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column


def map_of(entries: Column) -> Column:
    """A map with sorted keys from an array of (key, value): valid UTF-8, no null values, null when nothing is left.

    Of a repeated key the greatest value stays: JSON objects and feature lists hold such keys, and `map_from_entries` fails
    on them.
    """
    from pyspark.sql import functions as F

    present = F.filter(entries, lambda e: e["value"].isNotNull())
    valid = F.transform(
        present,
        lambda e: F.struct(F.make_valid_utf8(e["key"]).alias("key"), F.make_valid_utf8(e["value"]).alias("value")),
    )
    ordered = F.array_sort(valid)
    following = F.transform(F.slice(ordered, 2, F.lit(2**31 - 1)), lambda e: e["key"])
    last = F.zip_with(ordered, following, lambda e, key: F.when(e.isNotNull() & ~e["key"].eqNullSafe(key), e))
    once = F.filter(last, lambda e: e.isNotNull())
    return F.when(F.size(once) > 0, F.map_from_entries(once))
