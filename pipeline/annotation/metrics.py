"""Metrics of a table of annotations: counts, quality against withheld human grades, and a fingerprint.

Counted by Spark, so that the driver holds a few rows whatever the size of the table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.contracts import ANNOTATIONS, GradeScale

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_HASHED = ("pair_id", "status", "error", "grade", "grade_probs", "reasoning", "votes")
_BROADCAST = 100_000  # human grades that are sent to every worker
_STEPS = 10_000  # p(relevant) is rounded to this resolution for the AUC, so that the counts stay few

Reasons = dict[str, Counter[str]]
"""For the statuses `failed` and `unparsed`: how often each error occurs."""


def annotated(spark: SparkSession, out: Path, key: str, others: DataFrame | None = None) -> DataFrame:
    """The rows of `out` under `key`, but those of the ids `others`, which are few."""
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.types import from_arrow_schema

    # The schema is given so that Spark need not open every file to find it.
    schema = from_arrow_schema(ANNOTATIONS)
    rows = spark.read.schema(schema).option("pathGlobFilter", f"{key}-*.parquet").parquet(str(out))
    return rows if others is None else rows.join(F.broadcast(others), "pair_id", "left_anti")


def measured_beside(spark: SparkSession, pairs: Path, split: str) -> DataFrame:
    """The ids of the splits `valid` and `test` that are not `split`: their rows measure the teacher, and do not count."""
    from pyspark.sql import functions as F

    beside = [other for other in ("valid", "test") if other != split]
    return spark.read.parquet(str(pairs / "pairs")).where(F.col("split").isin(beside)).select("pair_id")


def hash_sums(*columns: str) -> list[Column]:
    """Aggregates `hash0` and `hash1`: two 64-bit hashes of each row, added up over the rows.

    Equal for equal rows in any order, and a row that is there twice counts twice. Null without rows.
    """
    from pyspark.sql import functions as F

    # Decimals, as a sum of a few 64-bit numbers overflows.
    hashes = [F.xxhash64(F.lit(salt), *columns).cast("decimal(20,0)") for salt in (0, 1)]
    return [F.sum(value).alias(f"hash{i}") for i, value in enumerate(hashes)]


def table_metrics(
    spark: SparkSession, out: Path, key: str, pairs: Path, split: str
) -> tuple[str, dict[str, Any], Reasons]:
    """Fingerprint, metrics and the counted errors of the rows of `out` under `key`.

    The fingerprint depends on the rows only, not on their files or order, nor on when they were made; counts leave out the
    rows that only measure the teacher. Quality is measured on
    the pairs of `split` that have a human grade and an annotation with status ok; those metrics are absent without any.
    """
    from pyspark.sql import functions as F

    everything = annotated(spark, out, key)
    rows = annotated(spark, out, key, measured_beside(spark, pairs, split))
    total = rows.agg(
        F.count("*").alias("pairs"),
        *[F.count_if(F.col("status") == status).alias(status) for status in ("ok", "unparsed", "failed")],
        *[F.sum(name).alias(name) for name in ("prompt_tokens", "completion_tokens", "n_samples", "n_unparsed")],
        F.avg("agreement").alias("agreement"),
    ).first()
    sums = everything.agg(*hash_sums(*_HASHED)).first()
    assert total is not None  # an aggregate without groups has one row
    assert sums is not None
    metrics: dict[str, Any] = {
        "annotation_key": key,
        **{name: total[name] for name in ("pairs", "ok", "unparsed", "failed")},
        "ok_share": total["ok"] / total["pairs"] if total["pairs"] else 0.0,
        "sample_parse_rate": 1 - total["n_unparsed"] / total["n_samples"] if total["n_samples"] else 0.0,
        **{name: total[name] or 0 for name in ("n_samples", "agreement", "prompt_tokens", "completion_tokens")},
    }
    reasons: Reasons = {"failed": Counter(), "unparsed": Counter()}
    if total["ok"] < total["pairs"]:
        # "too long: 812 tokens" and "too long: 790 tokens" are one reason.
        reason = F.substring(F.regexp_replace("error", r"\d+", "#"), 1, 160).alias("reason")
        errors = rows.where(F.col("status") != "ok").groupBy("status", reason).count()
        for row in errors.orderBy(F.desc("count"), "reason").limit(100).collect():
            reasons[row["status"]][row["reason"]] = row["count"]
    metrics |= _quality(spark, rows, pairs, split)
    hashes = [int(sums[f"hash{i}"] or 0) % 2**64 for i in range(2)]
    return f"{hashes[0]:016x}{hashes[1]:016x}", metrics, reasons


def _quality(spark: SparkSession, rows: DataFrame, pairs: Path, split: str) -> dict[str, float]:
    """`label_metrics` of the usable rows, from counts of (human grade, teacher's grade, rounded p(relevant))."""
    from pyspark.sql import functions as F

    scale = GradeScale.load(pairs)
    graded = spark.read.parquet(str(pairs / "pairs")).where((F.col("split") == split) & F.col("grade").isNotNull())
    human = graded.select("pair_id", F.col("grade").alias("human"))
    count = human.count()
    if not count:
        return {}
    if count <= _BROADCAST:  # then the whole table of annotations need not be shuffled for them
        human = F.broadcast(human)
    relevant = F.aggregate(F.slice("grade_probs", scale.relevant_from + 1, scale.size), F.lit(0.0), lambda s, p: s + p)
    ok = rows.where(F.col("status") == "ok").select("pair_id", "grade", F.round(relevant * _STEPS).alias("p"))
    counted = human.join(ok, "pair_id").groupBy("human", "grade", "p").count().collect()
    if not counted:
        return {}
    from teacher.evaluate import label_metrics  # scikit-learn is a third of the driver's memory

    gold, grades, p, pairs_of = (np.array(column) for column in zip(*counted, strict=True))
    return {"n_graded": float(pairs_of.sum()), **label_metrics(gold, grades, p, scale.relevant_from, pairs_of)}
