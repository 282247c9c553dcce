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

from data.balance import grade_balance, split_counts
from data.card import languages, texts_and_labels, write_card
from data.check import check_rows, refuse_too_many, rejected_rows
from data.config import DataConfig
from data.contracts import PAIRS, SPLITS, ContractError, GradeScale
from data.leaks import leakage
from data.merge import merged_pairs
from data.sources import describe_source, read_source
from data.sources.delimited import LONGEST_FIELD
from data.split import split_column, within_limits
from data.strata import sampled_log, strata_counts, with_stratum
from data.tables import companion_rows, on_disk, rows_of, tables_fingerprints, write_table, write_tables

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
    from pyspark.sql import functions as F

    log.info("reading source '%s'", config.source)
    frame, scale = read_source(spark, config)
    scale = _with_relevant_from(scale, config.relevant_from)
    scratch = out / "_scratch"
    try:
        with _damage_named(config):
            checked = on_disk(check_rows(frame, config, scale), scratch / "checked")
            reasons = {row["reason"]: row["count"] for row in checked.groupBy("reason").count().collect()}
        accepted = reasons.pop(None, 0)
        rows_in = accepted + sum(reasons.values())
        if not rows_in:
            raise ContractError(f"source '{config.source}' has no rows; check {config.path or 'its settings'}")
        write_table(rejected_rows(checked), out / "rejected", rows_in - accepted)
        refuse_too_many(checked, reasons, rows_in, config, out / "rejected")

        log.info("merging %d rows", accepted)
        placed = merged_pairs(checked.where(F.col("reason").isNull()), scale.size).withColumn(
            "split", split_column(F.col("point"), config.shares)
        )
        if config.log is not None:
            placed = with_stratum(placed, config.log)
        placed = on_disk(placed, scratch / "placed")
        usable = (F.col("split") == "pool") | F.col("grade").isNotNull()
        found = placed.agg(
            F.count("*").alias("pairs"), F.sum("rows").alias("rows"), F.count_if(usable).alias("usable")
        ).first()

        sampled = placed.where(usable)
        if config.log is not None:
            sampled = sampled_log(sampled, config.log)
        kept = within_limits(sampled, config.limits)
        n_sampled = sampled.count() if config.log is not None and config.log.limits else found["usable"]
        n_kept = kept.count() if config.limits else n_sampled
        log.info("writing %d pairs from %d rows", n_kept, rows_in)
        write_tables(kept, config.source, out, n_kept)
        described = _described(kept, placed.where(usable), config, scale)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    account = {
        "rows_in": rows_in,
        "rejected": rows_of(out / "rejected"),
        "duplicates": (found["rows"] or 0) - found["pairs"],
        "unlabelled_left_out": found["pairs"] - found["usable"],
        "not_sampled": found["usable"] - n_sampled,
        "beyond_limits": n_sampled - n_kept,
        "rows": rows_of(out / "pairs", PAIRS),
    }
    if rows_in != sum(value for name, value in account.items() if name != "rows_in"):
        raise RuntimeError(f"rows were lost or invented while preparing {out}: {account}")
    leaks = described["leakage"]
    if leaks["queries"]["in_several_splits"]:
        raise RuntimeError(f"queries are in more than one split of {out}: {leaks['queries']}")
    scale.save(out)
    figures: dict[str, Any] = {
        **account,
        **companion_rows(out),
        **described.pop("shares"),
        "rejected_share": account["rejected"] / rows_in,
        "conflicting_pairs": described["labels"]["conflicting"],
        "ads_in_several_splits": leaks["ads"]["in_several_splits"],
    }
    fingerprints = tables_fingerprints(spark, out, scale)
    fingerprint, figures["fingerprint_labelled"] = fingerprints["all"], fingerprints["labelled"]
    settings = {"source": config.source, **describe_source(config), "seed": config.seed, "split_by": config.split_by}
    made = {"fingerprint": fingerprint, **figures, "rejected_by_reason": reasons, **described}
    write_card(out, {**settings, **made, "languages": languages(out / "pairs")})
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


def _described(kept: DataFrame, usable: DataFrame, config: DataConfig, scale: GradeScale) -> dict[str, Any]:
    """What the card says of the pairs that were `kept`, and of the log's among the `usable` ones."""
    counts = split_counts(kept, scale.size)
    leaks = leakage(kept)
    return {
        "shares": _shares(counts, leaks["queries"]["by_split"], scale),
        "grades_by_split": {split: _by_grade(counts.get(split, {}), scale) for split in SPLITS},
        "balance": grade_balance(counts, scale.size),
        "leakage": leaks,
        **texts_and_labels(kept),
        "strata": {} if config.log is None else strata_counts(usable, kept),
    }


def _by_grade(found: dict[str, int], scale: GradeScale) -> dict[str, int]:
    """Rows by grade and its name, those without one as `none`; what there is none of is left out."""
    rows = {f"{k} {grade.name}": found.get(f"n{k}", 0) for k, grade in enumerate(scale.grades)}
    rows["none"] = found.get("rows", 0) - found.get("n", 0)
    return {name: count for name, count in rows.items() if count}


def _shares(counts: dict[str, dict[str, int]], queries: dict[str, int], scale: GradeScale) -> dict[str, Any]:
    """Rows and queries by split, and the share of each grade among the graded rows of all splits."""

    def total(name: str) -> int:
        return sum(found[name] for found in counts.values())

    rows, graded = total("rows"), total("n")
    return {
        **{f"rows_{split}": counts.get(split, {}).get("rows", 0) for split in SPLITS},
        "queries": sum(queries.values()),
        **{f"queries_{split}": queries[split] for split in SPLITS},
        "graded_share": graded / rows if rows else 0.0,
        **{f"grade_{k}_share": total(f"n{k}") / graded if graded else 0.0 for k in range(scale.size)},
    }


def _root_cause(error: Exception) -> str:
    """The innermost "Caused by" of a Spark error, in one line; the outer ones only say that a task failed."""
    text = str(error)
    if "exceeds the maximum number of characters" in text:
        return f"a field of more than {LONGEST_FIELD} characters: a quote left open?"
    lines = text.splitlines() or [repr(error)]
    lines = [line for line in lines if "Caused by:" in line] or lines[:1]
    return lines[-1].replace("Caused by:", "").strip()[:200]
