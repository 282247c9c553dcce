"""Rows of Spark's Arrow batches in Python, for the jobs that work row by row: annotation and scoring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import Column

Row = dict[str, Any]
"""Columns of `PAIRS`; `attributes` is a list of [name, value], or None."""


def attributes_as_json(shorten: Callable[[Column], Column] = lambda text: text) -> Column:
    """The column `attributes` as JSON text, as `row_chunks` expects it: a list of [name, value], each put through `shorten`.

    As text, since Spark 4.3 hands a batch whose maps or lists are all null to Python at 12 to 15 µs a row, and text at less
    than one. As a list, since names that are equal once shortened would be an error in a map.
    """
    from pyspark.sql import functions as F

    entries = F.transform(F.map_entries("attributes"), lambda e: F.array(shorten(e["key"]), shorten(e["value"])))
    return F.to_json(entries).alias("attributes")


def row_chunks(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[list[Row]]:
    """The rows of `batches` in lists of `size` (the last may be shorter); at most one Arrow batch more is in memory."""
    rows: list[Row] = []
    for batch in batches:
        new = batch.to_pylist()
        for row in new:
            if row["attributes"] is not None:
                row["attributes"] = json.loads(row["attributes"])
        rows += new
        start = 0
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size
        rows = rows[start:]
    if rows:
        yield rows
