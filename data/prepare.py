"""The data stage: any source becomes the checked `pairs` table with leak-free splits.

Rows are checked, keyed, merged by `pair_id`, split by query and cut to the limits; every row that came in is accounted
for, or the stage fails. What was left out: merging near-duplicates (they share a split, but only equal normalised text is
one pair) and any change to the text itself.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from data.card import write_card
from data.config import DataConfig
from data.contracts import PAIRS, SPLITS, ContractError, GradeScale
from data.merge import merged_pairs
from data.profile import languages, profile
from data.sources import describe_source, read_source
from data.sources.delimited import LONGEST_FIELD
from data.split import split_column, within_limits
from data.strata import sampled_log, strata_counts, with_stratum
from data.tables import companion_rows, count_rows, materialised, tables_fingerprints, write_table, write_tables
from data.validation import refuse_too_many, rejected_rows, validated

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)


class DataResult(BaseModel):
    """What the stage made: its fingerprint does not depend on row order or partitions; figures are flat."""

    fingerprint: str
    figures: dict[str, Any]


def prepare(config: DataConfig, out: Path, spark: SparkSession) -> DataResult:
    """Write `pairs/`, its companions (`rationales/`, `disagreement/`, with a log `frequencies/`), `rejected/`, `scale.json`,
    `card.json` and `card.md` into `out`; the tables are Parquet folders.

    Every row of train, valid and test has a grade. Its query alone decides about a pair's split, so an unlabelled row is
    used where its query falls to the pool, and is left out (and counted) elsewhere.

    Raises `ContractError` for a source that cannot be read, has no rows, or has more faulty rows than
    `max_rejected_share`, and `RuntimeError` if rows were lost or invented on the way or a query is in two splits.
    """
    log.info("reading source '%s'", config.source)
    frame, scale = read_source(spark, config)
    scale = _with_relevant_from(scale, config.relevant_from)
    scratch = out / "_scratch"
    try:
        rows, reasons, rows_in = _validated(frame, config, scale, out, scratch)
        usable, merge_counts = _usable_pairs(rows, config, scale, scratch)
        pairs, limit_counts = _selected(usable, merge_counts["usable"], config)
        log.info("writing %d pairs from %d rows", limit_counts["rows"], rows_in)
        write_tables(pairs, config.source, out, limit_counts["rows"])
        metrics, described = profile(pairs, scale)
        described["strata"] = {} if config.log is None else strata_counts(usable, pairs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    account = {
        "rejected": count_rows(out / "rejected"),
        "duplicates": merge_counts["duplicates"],
        "unlabelled_left_out": merge_counts["unlabelled_left_out"],
        **limit_counts,
        "rows": count_rows(out / "pairs", PAIRS),
    }
    if rows_in != sum(account.values()):
        raise RuntimeError(f"rows were lost or invented while preparing {out}: {rows_in} came in, {account}")
    if described["leakage"]["queries"]["in_several_splits"]:
        raise RuntimeError(f"queries are in more than one split of {out}: {described['leakage']['queries']}")
    scale.save(out)
    fingerprints = tables_fingerprints(spark, out, scale)
    metrics = {"rows_in": rows_in, **account, **companion_rows(out), **metrics}
    metrics |= {"rejected_share": account["rejected"] / rows_in, "fingerprint_labelled": fingerprints["labelled"]}
    card = {"source": config.source, **describe_source(config), "seed": config.seed, "split_by": config.split_by}
    card |= {"fingerprint": fingerprints["all"], **metrics, "rejected_by_reason": reasons, **described}
    write_card(out, card | {"languages": languages(out / "pairs")})
    empty = [split for split in SPLITS if not metrics[f"rows_{split}"] and getattr(config.shares, split)]
    if empty:
        log.warning("no pairs in %s: the source has too few labelled queries for the shares", " and ".join(empty))
    return DataResult(fingerprint=fingerprints["all"], figures=metrics)


def _validated(
    frame: DataFrame, config: DataConfig, scale: GradeScale, out: Path, scratch: Path
) -> tuple[DataFrame, dict[str, int], int]:
    """The sound rows, the rejected ones by reason (written to `rejected/`), and how many rows there are in all."""
    from pyspark.sql import functions as F

    with _damage_named(config):
        rows = materialised(validated(frame, config, scale), scratch / "validated")
        reasons = {row["reason"]: row["count"] for row in rows.groupBy("reason").count().collect()}
    total = sum(reasons.values())
    if not total:
        raise ContractError(f"source '{config.source}' has no rows; check {config.path or 'its settings'}")
    sound = reasons.pop(None, 0)
    write_table(rejected_rows(rows), out / "rejected", total - sound)
    refuse_too_many(rows, reasons, total, config, out / "rejected")
    return rows.where(F.col("reason").isNull()), reasons, total


def _usable_pairs(
    rows: DataFrame, config: DataConfig, scale: GradeScale, scratch: Path
) -> tuple[DataFrame, dict[str, int]]:
    """One row for each pair, with its split, without the unlabelled ones outside the pool; and what became of the rows."""
    from pyspark.sql import functions as F

    log.info("merging rows of the same pair")
    merged = merged_pairs(rows, scale.size).withColumn("split", split_column(F.col("point"), config.shares))
    if config.log is not None:
        merged = with_stratum(merged, config.log)
    merged = materialised(merged, scratch / "merged")
    usable = (F.col("split") == "pool") | F.col("grade").isNotNull()
    counts = merged.agg(
        F.count("*").alias("pairs"),
        F.coalesce(F.sum("rows"), F.lit(0)).alias("rows"),
        F.count_if(usable).alias("usable"),
    ).collect()[0]
    return merged.where(usable), {
        "usable": counts["usable"],
        "duplicates": counts["rows"] - counts["pairs"],
        "unlabelled_left_out": counts["pairs"] - counts["usable"],
    }


def _selected(usable: DataFrame, n_usable: int, config: DataConfig) -> tuple[DataFrame, dict[str, int]]:
    """The pairs within the limits of the log's strata and of the splits, and how many are beyond them."""
    sampled = usable if config.log is None else sampled_log(usable, config.log)
    selected = within_limits(sampled, config.limits)
    n_sampled = sampled.count() if config.log is not None and config.log.limits else n_usable
    n_selected = selected.count() if config.limits else n_sampled
    counts = {"not_sampled": n_usable - n_sampled, "beyond_limits": n_sampled - n_selected, "rows": n_selected}
    return selected, counts


def _with_relevant_from(scale: GradeScale, relevant_from: int | None) -> GradeScale:
    if relevant_from is None:
        return scale
    try:
        return GradeScale(grades=scale.grades, relevant_from=relevant_from)
    except ValidationError:
        highest = scale.size - 1
        raise ContractError(
            f"`data.relevant_from` is {relevant_from} and the highest grade is {highest}; choose 1 … {highest}"
        ) from None


@contextmanager
def _damage_named(config: DataConfig) -> Iterator[None]:
    """The first jobs read the source to its end, so here a damaged file shows itself; make a sentence of it."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise ContractError(
            f"source '{config.source}' cannot be read to its end ({_root_cause(error)}); check {config.path or 'it'}"
        ) from error


def _root_cause(error: Exception) -> str:
    """The innermost "Caused by" of a Spark error, in one line; the outer ones only say that a task failed."""
    text = str(error)
    if "exceeds the maximum number of characters" in text:
        return f"a field of more than {LONGEST_FIELD} characters: a quote left open?"
    lines = text.splitlines() or [repr(error)]
    lines = [line for line in lines if "Caused by:" in line] or lines[:1]
    return lines[-1].replace("Caused by:", "").strip()[:200]
