"""From a source's own labels to grades, as Spark expressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# Java's own parser also takes "1d" and "0x1p3", which no person writes as a rating.
_NUMBER = r"^[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]{1,3})?$"


def graded_rows(
    frame: DataFrame,
    *,
    ad_title: Column,
    grade_raw: Column,
    grade: Column,
    fault: Column,
    ad_text: Column | None = None,
    attributes: Column | None = None,
    **more: Column,
) -> DataFrame:
    """The rows of a source whose every row has a label, without rationales; see `data.sources.COLUMNS`.

    `frame` is what `read_columns` gives, with `query` and the label in `grade`. `fault` is the reason why a label is none,
    else null: such a row gets it as its `problem` unless it has one, and the label as its `detail`. `more` are further
    columns.
    """
    from pyspark.sql import functions as F

    none = F.lit(None)
    return frame.select(
        "query",
        ad_title.alias("ad_title"),
        (none.cast("string") if ad_text is None else ad_text).alias("ad_text"),
        (none.cast("map<string,string>") if attributes is None else attributes).alias("attributes"),
        grade_raw.alias("grade_raw"),
        grade.alias("grade"),
        *[column.alias(name) for name, column in more.items()],
        none.cast("string").alias("rationale"),
        F.coalesce("problem", fault).alias("problem"),
        F.coalesce("detail", F.when(fault.isNotNull(), F.col("grade"))).alias("detail"),
    )


def number(text: Column) -> Column:
    """The decimal number that a text is, as a double; null when it is none."""
    from pyspark.sql import functions as F

    return F.when(text.rlike(_NUMBER), text.try_cast("double"))


def threshold_grade(rating: Column, thresholds: Sequence[float]) -> Column:
    """The number of thresholds that `rating` reaches; null stays null."""
    from pyspark.sql import functions as F

    return reduce(add, ((rating >= F.lit(t)).cast("int") for t in thresholds))


def named_label(text: Column, values: Mapping[str, object], kind: str) -> Column:
    """What `values` gives for a label in words, cast to the Spark type `kind`; null for any other label."""
    from pyspark.sql import functions as F

    known = F.create_map(*[F.lit(part) for pair in values.items() for part in pair])
    return F.try_element_at(known, text).cast(kind)
