"""The data stage: any source becomes the checked `pairs` table with leak-free splits.

Rows are checked, keyed, merged by `pair_id`, split by query and cut to the limits; every row that came in is accounted
for, or the stage fails. What was left out: near-duplicates (only equal normalised text is merged) and any change to
the text itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as pads
from pydantic import BaseModel, ValidationError

from data.check import check_rows, refuse_too_many, rejected_rows
from data.config import DataConfig
from data.schema import PAIRS, RATIONALES, SPLITS, ContractError, GradeScale, check_schema
from data.sources import read_source
from data.sources.files import spark_paths
from data.split import split_column, within_limits

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

_ROWS_PER_FILE = 250_000


class DataResult(BaseModel):
    """What the stage made: its fingerprint does not depend on row order or partitions; figures are flat."""

    fingerprint: str
    figures: dict[str, Any]


def prepare(config: DataConfig, out: Path, spark: SparkSession) -> DataResult:
    """Write `pairs/`, `rationales/`, `rejected/` (Parquet folders), `scale.json` and `card.json` into `out`.

    Every row of train, valid and test has a grade: a query without any label goes to the pool, and an unlabelled row of
    a query that lies elsewhere is left out (and counted), since a query must not be in two splits.

    Raises `ContractError` for a source that cannot be read, has no rows, or has more faulty rows than
    `max_rejected_share`, and `RuntimeError` if rows were lost or invented on the way.
    """
    from pyspark import StorageLevel
    from pyspark.sql import functions as F

    log.info("reading source '%s'", config.source)
    frame, scale = read_source(spark, config)
    scale = _with_relevant_from(scale, config.relevant_from)
    cached = [check_rows(frame, config, scale).persist(StorageLevel.MEMORY_AND_DISK)]
    try:
        checked = cached[0]
        reasons, accepted = _count_reasons(checked, config)
        rejected = sum(reasons.values())
        rows_in = accepted + rejected
        _write(rejected_rows(checked), out / "rejected", rejected)
        refuse_too_many(checked, reasons, rows_in, config, out / "rejected")

        placed = _placed(_merged(checked.where(F.col("reason").isNull()), scale), config)
        cached.append(placed.persist(StorageLevel.MEMORY_AND_DISK))
        counts = _counts(placed)
        pairs = sum(row["rows"] for row in counts)
        unlabelled = sum(row["rows"] for row in counts if row["split"] != "pool" and row["grade"] is None)
        kept = placed.where((F.col("split") == "pool") | F.col("grade").isNotNull())
        if unlabelled or config.limits:
            kept = within_limits(kept, config.limits)
            counts = _counts(kept)
        total = sum(row["rows"] for row in counts)
        distinct = kept.groupBy("split").agg(F.countDistinct("query_id").alias("queries")).collect()

        log.info("writing %d pairs from %d rows", total, rows_in)
        _write(kept.withColumn("source", F.lit(config.source)).select(*PAIRS.names), out / "pairs", total)
        reasoned = kept.where((F.col("split") == "train") & F.col("rationale").isNotNull())
        _write(reasoned.select("pair_id", F.col("rationale").alias("reasoning")), out / "rationales", total)
    finally:
        for one in cached:
            one.unpersist()

    account = {
        "rows_in": rows_in,
        "rejected": rejected,
        "duplicates": accepted - pairs,
        "unlabelled_left_out": unlabelled,
        "beyond_limits": pairs - unlabelled - total,
        "rows": _rows(out / "pairs", PAIRS),
    }
    if rows_in != sum(value for name, value in account.items() if name != "rows_in"):
        raise RuntimeError(f"rows were lost or invented while preparing {out}: {account}")
    figures: dict[str, Any] = {**account, "rationales": _rows(out / "rationales", RATIONALES)}
    queries = {row["split"]: row["queries"] for row in distinct}
    figures |= _shares(counts, queries, scale) | {"rejected_share": rejected / rows_in}
    scale.save(out)
    fingerprint = _fingerprint(spark, out, scale)
    _write_card(out, config.source, fingerprint, figures, reasons, counts, scale)
    empty = [split for split in SPLITS if not figures[f"rows_{split}"] and getattr(config.shares, split)]
    if empty:
        log.warning("no pairs in %s: the source has too few labelled queries for the shares", " and ".join(empty))
    return DataResult(fingerprint=fingerprint, figures=figures)


def _with_relevant_from(scale: GradeScale, wanted: int | None) -> GradeScale:
    if wanted is None:
        return scale
    try:
        return GradeScale(grades=scale.grades, relevant_from=wanted)
    except ValidationError:
        raise ContractError(
            f"`data.relevant_from` is {wanted} and the highest grade is {scale.size - 1}; choose 1 … {scale.size - 1}"
        ) from None


def _count_reasons(checked: DataFrame, config: DataConfig) -> tuple[dict[str, int], int]:
    """Faulty rows by reason, and the number of sound ones. The first action, so here a damaged file shows itself."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        found = {row["reason"]: row["count"] for row in checked.groupBy("reason").count().collect()}
    except (PySparkException, Py4JError) as error:
        raise ContractError(
            f"source '{config.source}' cannot be read to its end ({_root_cause(error)}); check {config.path or 'it'}"
        ) from error
    accepted = found.pop(None, 0)
    if not found and not accepted:
        raise ContractError(f"source '{config.source}' has no rows; check {config.path or 'its settings'}")
    return found, accepted


def _merged(rows: DataFrame, scale: GradeScale) -> DataFrame:
    """One row for each pair_id. Labels become their lower median, text that of the first row in text order.

    The lower median is always a label that somebody gave, and thresholds commute with it, so grade and rating agree.
    """
    from pyspark.sql import functions as F

    shown = F.struct("query", "ad_title", "ad_text", "attributes")
    # A map has no order of its own.
    order = F.struct("query", "ad_title", "ad_text", "attributes_json")
    # A reason must be one for the grade that stays, so the first reason of each grade is kept until that is known.
    reasons = [F.min(F.when(F.col("grade") == k, F.col("rationale"))).alias(f"reason_{k}") for k in range(scale.size)]
    grouped = rows.groupBy("pair_id").agg(
        # Both follow from the normalised query, which all rows of a pair share.
        F.first("query_id").alias("query_id"),
        F.first("point").alias("point"),
        F.min_by(shown, order).alias("shown"),
        F.expr("percentile_disc(0.5) WITHIN GROUP (ORDER BY grade)").cast("int").alias("grade"),
        F.expr("percentile_disc(0.5) WITHIN GROUP (ORDER BY grade_raw)").alias("grade_raw"),
        *reasons,
    )
    chosen = F.get(F.array(*[f"reason_{k}" for k in range(scale.size)]), F.col("grade"))
    return grouped.select("pair_id", "query_id", "point", "shown.*", "grade", "grade_raw", chosen.alias("rationale"))


def _placed(pairs: DataFrame, config: DataConfig) -> DataFrame:
    """Add `split`: by the query's hash, or the pool where no row of the query has a grade."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    labelled = F.max(F.col("grade").isNotNull()).over(Window.partitionBy("query_id"))
    split = F.when(F.col("labelled"), split_column(F.col("point"), config.shares)).otherwise("pool")
    return pairs.withColumn("labelled", labelled).withColumn("split", split).drop("labelled")


def _counts(pairs: DataFrame) -> list[Any]:
    from pyspark.sql import functions as F

    return pairs.groupBy("split", "grade").agg(F.count("*").alias("rows")).orderBy("split", "grade").collect()


def _write(frame: DataFrame, folder: Path, rows: int) -> None:
    """Few files, each sorted by pair_id where there is one; which rows share a file depends on their ids alone."""
    files = max(1, -(-rows // _ROWS_PER_FILE))
    if "pair_id" in frame.columns:
        frame = frame.repartition(files, "pair_id").sortWithinPartitions("pair_id")
    else:
        frame = frame.coalesce(files)
    frame.write.mode("overwrite").parquet(f"file://{folder.resolve()}")


def _rows(folder: Path, schema: pa.Schema) -> int:
    """Rows in the files as they lie there, from their footers; checks the contract on the way."""
    dataset = pads.dataset(folder, format="parquet")
    check_schema(dataset.schema, schema, str(folder))
    return dataset.count_rows()


def _fingerprint(spark: SparkSession, out: Path, scale: GradeScale) -> str:
    """Hash of the scale and of both tables as written, each as a sum of its rows' hashes: no order plays a part."""
    from pyspark.sql import functions as F

    parts = [scale.model_dump_json()]
    for name, schema in (("pairs", PAIRS), ("rationales", RATIONALES)):
        frame = spark.read.parquet(*spark_paths([out / name]))
        row = F.sha2(F.to_json(F.struct(*schema.names)), 256)
        # 2 × 60 bits of each row's hash; the sum of 10¹⁰ rows fits a decimal of 30 digits.
        words = [F.conv(F.substring(row, at, 15), 16, 10).cast("decimal(20,0)") for at in (1, 16)]
        (sums,) = frame.agg(F.count("*"), *[F.sum(word) for word in words]).collect()
        parts.append(" ".join(map(str, sums)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _shares(counts: list[Any], queries: dict[str, int], scale: GradeScale) -> dict[str, Any]:
    """Rows and queries by split, and the share of each grade among the graded rows of all splits."""
    by_split = {split: sum(row["rows"] for row in counts if row["split"] == split) for split in SPLITS}
    by_grade = [sum(row["rows"] for row in counts if row["grade"] == k) for k in range(scale.size)]
    graded, total = sum(by_grade), sum(by_split.values())
    return {
        **{f"rows_{split}": rows for split, rows in by_split.items()},
        "queries": sum(queries.values()),
        **{f"queries_{split}": queries.get(split, 0) for split in SPLITS},
        "graded_share": graded / total if total else 0.0,
        **{f"grade_{k}_share": n / graded if graded else 0.0 for k, n in enumerate(by_grade)},
    }


def _write_card(
    out: Path,
    source: str,
    fingerprint: str,
    figures: dict[str, Any],
    reasons: dict[str, int],
    counts: list[Any],
    scale: GradeScale,
) -> None:
    def name(grade: int | None) -> str:
        return "none" if grade is None else f"{grade} {scale.grades[grade].name}"

    by_split = {split: {name(row["grade"]): row["rows"] for row in counts if row["split"] == split} for split in SPLITS}
    card = {
        "source": source,
        "fingerprint": fingerprint,
        **figures,
        "rejected_by_reason": reasons,
        "grades_by_split": by_split,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _root_cause(error: Exception) -> str:
    """The innermost "Caused by" of a Spark error, in one line; the outer ones only say that a task failed."""
    lines = str(error).splitlines() or [repr(error)]
    lines = [line for line in lines if "Caused by:" in line] or lines[:1]
    return lines[-1].replace("Caused by:", "").strip()[:200]
