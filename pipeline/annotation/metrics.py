"""What an annotation table amounts to: counts, quality against withheld human grades, and a fingerprint.

Counted by Spark, so that the driver holds a few rows whatever the size of the table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.contracts import GradeScale

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_HASHED = ("pair_id", "status", "error", "grade", "grade_probs", "reasoning", "votes")
_REASONS = 100  # kinds of errors that are counted apart
_BROADCAST = 100_000  # human grades that are sent to every worker
_STEPS = 10_000  # p(relevant) is rounded to this resolution for the AUC, so that the counts stay few


def annotated(spark: SparkSession, out: Path, key: str) -> DataFrame:
    """The rows of `out` under `key`."""
    # The types of `ANNOTATIONS`, given so that Spark need not open every file to find them.
    schema = (
        "pair_id string, annotation_key string, grade int, grade_probs array<double>, reasoning string, votes array<int>, "
        "agreement double, n_samples int, n_unparsed int, status string, error string, prompt_tokens bigint, "
        "completion_tokens bigint, created_at timestamp"
    )
    return spark.read.schema(schema).option("pathGlobFilter", f"{key}-*.parquet").parquet(str(out))


def hash_sums(*columns: str) -> list[Column]:
    """Aggregates `hash0` and `hash1`: two 64-bit hashes of each row, added up over the rows.

    Equal for equal rows in any order, and a row that is there twice counts twice. Null without rows.
    """
    from pyspark.sql import functions as F

    # Decimals, as a sum of a few 64-bit numbers overflows.
    hashes = [F.xxhash64(F.lit(salt), *columns).cast("decimal(20,0)") for salt in (0, 1)]
    return [F.sum(value).alias(f"hash{i}") for i, value in enumerate(hashes)]


def table_figures(
    spark: SparkSession, out: Path, key: str, pairs: Path, split: str
) -> tuple[str, dict[str, Any], Counter[str]]:
    """Fingerprint, key figures and counted failures of the rows of `out` under `key`.

    The fingerprint depends on the rows only, not on their files or their order, nor on when they were made. Quality is
    measured on the pairs of `split` that have a human grade and an annotation with status ok; without such pairs
    those figures are absent.
    """
    from pyspark.sql import functions as F

    rows = annotated(spark, out, key)
    total = rows.agg(
        F.count("*").alias("pairs"),
        *[F.count(F.when(F.col("status") == status, 1)).alias(status) for status in ("ok", "unparsed", "failed")],
        *[F.sum(name).alias(name) for name in ("prompt_tokens", "completion_tokens", "n_samples", "n_unparsed")],
        F.avg("agreement").alias("agreement"),
        *hash_sums(*_HASHED),
    ).first()
    assert total is not None  # an aggregate without groups has one row
    count = total["pairs"]
    figures: dict[str, Any] = {
        "annotation_key": key,
        "pairs": count,
        "ok": total["ok"],
        "ok_share": total["ok"] / count if count else 0.0,
        "unparsed": total["unparsed"],
        "failed": total["failed"],
        "sample_parse_rate": 1 - total["n_unparsed"] / total["n_samples"] if total["n_samples"] else 0.0,
        "agreement": total["agreement"] or 0.0,
        "prompt_tokens": total["prompt_tokens"] or 0,
        "completion_tokens": total["completion_tokens"] or 0,
    }
    reasons: Counter[str] = Counter()
    if total["failed"]:
        # "too long: 812 tokens" and "too long: 790 tokens" are one reason.
        reason = F.substring(F.regexp_replace("error", r"\d+", "#"), 1, 160).alias("reason")
        found = rows.where(F.col("status") == "failed").groupBy(reason).count().orderBy(F.desc("count"), "reason")
        reasons = Counter({row["reason"]: row["count"] for row in found.limit(_REASONS).collect()})
    scale = GradeScale.load(pairs)
    figures |= quality(_judged(spark, rows, pairs, split, scale), scale)
    parts = [int(total[f"hash{i}"] or 0) % 2**64 for i in range(2)]
    return f"{parts[0]:016x}{parts[1]:016x}", figures, reasons


Judged = list[tuple[int, int, float, int]]


def _judged(spark: SparkSession, rows: DataFrame, pairs: Path, split: str, scale: GradeScale) -> Judged:
    """How often each (human grade, teacher's grade, rounded p(relevant)) occurs."""
    from pyspark.sql import functions as F

    graded = spark.read.parquet(str(pairs / "pairs")).where((F.col("split") == split) & F.col("grade").isNotNull())
    human = graded.select("pair_id", F.col("grade").alias("human"))
    few = human.count()
    if not few:
        return []
    if few <= _BROADCAST:  # then the whole table of annotations need not be shuffled for them
        human = F.broadcast(human)
    relevant = F.aggregate(
        F.slice("grade_probs", scale.relevant_from + 1, scale.size), F.lit(0.0), lambda total, p: total + p
    )
    ok = rows.where(F.col("status") == "ok").select("pair_id", "grade", F.round(relevant * _STEPS).alias("p"))
    counted = human.join(ok, "pair_id").groupBy("human", "grade", "p").count().collect()
    return [(row["human"], row["grade"], row["p"] / _STEPS, row["count"]) for row in counted]


def quality(judged: Judged, scale: GradeScale) -> dict[str, float]:
    """Accuracy, macro-F1 and AUC of p(relevant) for (human grade, teacher's grade, p(relevant), number of such pairs)."""
    if not judged:
        return {}
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    human, grades, p, counts = (np.array(column) for column in zip(*judged, strict=True))
    found = {
        "n_graded": float(counts.sum()),
        "accuracy": float(accuracy_score(human, grades, sample_weight=counts)),
        "macro_f1": float(
            f1_score(human, grades, average="macro", labels=np.unique(human), zero_division=0, sample_weight=counts)
        ),
    }
    relevant = human >= scale.relevant_from
    if len(np.unique(relevant)) == 2:  # undefined otherwise
        found["auc"] = float(roc_auc_score(relevant, p, sample_weight=counts))
    return found
