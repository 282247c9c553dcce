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

from data.balance import split_counts
from data.card import write_card
from data.config import DataConfig
from data.contracts import PAIRS, ContractError, GradeScale, StageOutput
from data.merge import merged_pairs
from data.profile import languages, profile
from data.quality import split_fault, split_warnings, text_warnings
from data.sources import input_files, read_source, read_texts, source_label, source_of
from data.sources.encodings import propose_encoding
from data.split import within_limits
from data.strata import sampled_log, strata_counts, with_stratum
from data.tables import (
    companion_rows,
    count_rows,
    materialised,
    tables_fingerprints,
    write_table,
    write_tables,
    write_texts,
)
from data.validation import DAMAGED, refuse_too_many, rejected_rows, validated

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)


def prepare(config: DataConfig, out: Path, spark: SparkSession) -> StageOutput:
    """Write `pairs/`, its companions (`rationales/`, `disagreement/`, `texts/`, with a log `frequencies/`), `rejected/`,
    `scale.json`, `card.json` and `card.md` into `out`; the tables are Parquet folders. The fingerprint does not
    depend on the order of the rows or on partitions.

    Every row of train, valid and test has a grade. Its query alone decides about a pair's split, so an unlabelled row is
    used where its query falls to the pool, and is left out (and counted) elsewhere.

    Raises `ContractError` for a source that cannot be read, has no rows, or has more faulty rows than
    `max_rejected_share`, and, when all is written, for splits that doom the later stages (see `split_fault`);
    `RuntimeError` if rows were lost or invented on the way or a query is in two splits.
    """
    log.info("reading %s", source_label(config))
    source = source_of(config)
    scale, scratch = source.scale, out / "_scratch"
    try:
        checked = validated(read_source(spark, config), source, config)
        rows, reasons, rows_in = _sound(checked, config, out, scratch)
        usable, merge_counts = _usable_pairs(rows, config, scale, scratch)
        pairs, limit_counts = _selected(usable, merge_counts["usable"], config)
        log.info("writing %d pairs from %d rows", limit_counts["rows"], rows_in)
        write_tables(pairs, config.source_name, out, limit_counts["rows"])
        write_texts(read_texts(config), out)
        counts = split_counts(pairs, scale.size)
        metrics, described = profile(pairs, counts, scale)
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
    fingerprints = tables_fingerprints(spark, out, scale, config.texts is not None)
    metrics = {"rows_in": rows_in, **account, **companion_rows(out), **metrics}
    metrics |= {"rejected_share": account["rejected"] / rows_in, "fingerprint_labelled": fingerprints["labelled"]}
    described["warnings"] = split_warnings(counts, described["balance"], config, scale)
    described["warnings"] += text_warnings(described["text_signs"], config)
    card: dict[str, Any] = {"source": config.source_name, "licence": source.licence, "grading": source.grading}
    card |= {"seed": config.seed, "split_by": config.split_by}
    card |= {"fingerprint": fingerprints["all"], **metrics, "rejected_by_reason": reasons, **described}
    write_card(out, card | {"languages": languages(out / "pairs")})
    for text in described["warnings"]:
        log.warning("%s", text)
    if fault := split_fault(counts, config, scale):
        raise ContractError(f"{fault}; {out / 'card.md'} says what is there")
    return StageOutput(fingerprint=fingerprints["all"], figures=metrics)


def _sound(checked: DataFrame, config: DataConfig, out: Path, scratch: Path) -> tuple[DataFrame, dict[str, int], int]:
    """The sound ones of the rows, the rejected ones by reason (written to `rejected/`), and the number of all rows."""
    from pyspark.sql import functions as F

    with _damage_named(config):
        rows = materialised(checked, scratch / "validated")
        reasons = {row["reason"]: row["count"] for row in rows.groupBy("reason").count().collect()}
    total = sum(reasons.values())
    if not total:
        raise ContractError(f"the source has no rows: {source_label(config)}")
    sound = reasons.pop(None, 0)
    write_table(rejected_rows(rows), out / "rejected", total - sound)
    hint = _encoding_hint(config) if any(DAMAGED in reason for reason in reasons) else ""
    refuse_too_many(rows, reasons, total, config, out / "rejected", hint)
    return rows.where(F.col("reason").isNull()), reasons, total


def _usable_pairs(
    rows: DataFrame, config: DataConfig, scale: GradeScale, scratch: Path
) -> tuple[DataFrame, dict[str, int]]:
    """One row for each pair, with its split, without the unlabelled ones outside the pool; and what became of the rows."""
    from pyspark.sql import functions as F

    log.info("merging rows of the same pair")
    merged = merged_pairs(rows, scale.size)
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


def _encoding_hint(config: DataConfig) -> str:
    proposals = (f"{file.name}: {proposal}" for file in input_files(config) if (proposal := propose_encoding(file)))
    first = next(proposals, "")
    return first and f"{first}, so set `data.encoding`"


@contextmanager
def _damage_named(config: DataConfig) -> Iterator[None]:
    """The first jobs read the source to its end, so here a damaged file shows itself; make a sentence of it."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = str(error).splitlines() or [repr(error)]
        # What a worker raised is in the text of Spark's error; its message is written for people already.
        for line in lines:
            if (marker := f"{ContractError.__name__}: ") in line:
                raise ContractError(line.partition(marker)[2]) from error
        cause = next((line for line in reversed(lines) if "Caused by:" in line), lines[0]).replace("Caused by:", "")
        raise ContractError(f"{source_label(config)} cannot be read to its end ({cause.strip()[:200]})") from error
