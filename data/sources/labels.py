"""From a source's own labels to grades, as Spark expressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column

# Java's own parser also takes "1d" and "0x1p3", which no person writes as a rating.
_NUMBER = r"^[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]{1,3})?$"


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
