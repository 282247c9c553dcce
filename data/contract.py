"""The declared contract of one row, checked by SparkDQ: what must hold, and the reason under which a row is kept aside.

SparkDQ checks rows lazily inside Spark, without a job of its own. Of the other libraries that were tried, pandera's
PySpark backend does not load beside pandas 3 (it needs `pyspark.pandas`) and reports columns instead of rows; Databricks'
DQX is licensed for use with Databricks only.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from data.contracts import GradeScale

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from data.config import DataConfig

_LENGTHS = {
    "query": "the query is",
    "ad_title": "the ad title is",
    "ad_text": "the ad text is",
    "attributes_json": "the attributes are",
    "rationale": "the rationale is",
}
_FROM_SOURCE = "from_source"


def row_contract(config: DataConfig, scale: GradeScale) -> list[tuple[dict[str, Any], str]]:
    """Checks in SparkDQ's own notation, each with the reason of a row that fails it; the first that fails counts.

    A row that its source could not read comes with a `problem`, which is its reason. Nulls pass: what may not be missing
    is the query and the ad title, and whether those are empty is known only with their keys.
    """
    widest = sys.float_info.max
    size = config.max_text_chars
    return [
        ({"check-id": _FROM_SOURCE, "check": "not-null-check", "columns": ["problem"]}, ""),
        *[
            (
                {"check-id": f"{name}_too_long", "check": "string-max-length-check", "column": name, "max-length": size},
                f"{subject} longer than {size} characters",
            )
            for name, subject in _LENGTHS.items()
        ],
        *[
            (
                # Where bytes could not be decoded, readers leave U+FFFD: the text that was there is gone.
                {"check-id": f"{name}_damaged", "check": "regex-match-check", "column": name, "pattern": "^[^\ufffd]*$"},
                f"{subject} damaged: bytes that are no {config.encoding} (another `data.encoding`?)",
            )
            for name, subject in list(_LENGTHS.items())[:3]
        ],
        (
            {"check-id": "grade_off_scale", "check": "numeric-between-check", "columns": ["grade"], "min-value": 0,
             "max-value": scale.size - 1, "inclusive": [True, True]},
            f"the grade is not on the scale 0 … {scale.size - 1}",
        ),
        (
            {"check-id": "rating_not_finite", "check": "numeric-between-check", "columns": ["grade_raw"],
             "min-value": -widest, "max-value": widest, "inclusive": [True, True]},
            "the rating is not a finite number",
        ),
    ]  # fmt: skip


def with_fault(frame: DataFrame, contract: list[tuple[dict[str, Any], str]]) -> DataFrame:
    """`frame` with the column `fault`: the reason of the first check that a row fails, null for a sound row."""
    from pyspark.sql import functions as F
    from sparkdq.engine import BatchDQEngine
    from sparkdq.management import CheckSet

    checks = CheckSet()
    checks.add_checks_from_dicts([check for check, _ in contract])
    checked = BatchDQEngine(checks).run_batch(frame).df
    first = F.get("_dq_errors", F.lit(0))["check-id"]
    return checked.withColumn("fault", _reason(first, contract)).select(*frame.columns, "fault")


def _reason(check: Column, contract: list[tuple[dict[str, Any], str]]) -> Column:
    from pyspark.sql import functions as F

    column = F.when(check == _FROM_SOURCE, F.col("problem"))
    for declared, reason in contract:
        if declared["check-id"] != _FROM_SOURCE:
            column = column.when(check == declared["check-id"], reason)
    return column
