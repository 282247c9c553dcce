"""Which rows of a source are sound, and under which ids: the first half of the data stage.

A faulty row is never dropped silently: it keeps its columns and gets a `reason`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import DataConfig
from data.contracts import ContractError, GradeScale
from data.keys import keys_function
from data.maps import map_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

log = logging.getLogger(__name__)

_TEXTS = ("query", "ad_title", "ad_text", "rationale", "problem", "detail")
_OPTIONAL = {
    "problem": "string", "detail": "string", "rationale": "string", "attributes": "map<string,string>",
    "grade": "int", "grade_raw": "double", "rating_variance": "double", "frequency": "double",
}  # fmt: skip
_SUBJECTS = {
    "query": "the query is",
    "ad_title": "the ad title is",
    "ad_text": "the ad text is",
    "attributes_json": "the attributes are",
    "rationale": "the rationale is",
}
_REASONS_SHOWN = 5


def validated(frame: DataFrame, config: DataConfig, scale: GradeScale) -> DataFrame:
    """All rows of a source, each with `reason` (null: sound) and, if sound, its keys.

    Those are `pair_id` and `query_id` (hex), and as 64-bit hashes `near_query` (the same for near-duplicate queries), `ad`
    and `near_ad` (title and text; near-duplicate titles), and `point`, the query's place in the order of the splits.
    Text is valid UTF-8 afterwards; attributes have sorted keys and a JSON twin, `attributes_json`; an ad text, a
    rationale or attributes without content are null in a sound row.
    """
    from pyspark.sql import functions as F

    frame = _with_all_columns(frame).withColumn("fault", _fault(config, scale))
    sound = F.col("fault").isNull()
    # Only sound rows go to Python: a text of a gigabyte must not.
    arguments = [F.when(sound, F.col(name)) for name in ("query", "ad_title", "ad_text")]
    frame = frame.withColumn("keys", keys_function(config.seed, config.split_by)(*arguments))
    reason = (
        F.when(~sound, F.col("fault"))
        .when(F.col("keys.query_id").isNull(), "the query is empty or has no visible character")
        .when(F.col("keys.pair_id").isNull(), "the ad title is empty or has no visible character")
    )
    return frame.select(
        reason.alias("reason"),
        "detail",
        *[f"keys.{name}" for name in ("query_id", "near_query", "point", "pair_id", "ad", "near_ad")],
        "query",
        "ad_title",
        F.when(~sound | F.col("keys.has_text"), F.col("ad_text")).alias("ad_text"),
        "attributes",
        "attributes_json",
        "grade",
        "grade_raw",
        "rating_variance",
        "frequency",
        F.when(F.trim("rationale") != "", F.col("rationale")).alias("rationale"),
    )


def rejected_rows(rows: DataFrame) -> DataFrame:
    """The rows with a reason, as they are kept aside; `detail` is what the source holds (a label, a broken line)."""
    from pyspark.sql import functions as F

    names = ["reason", "detail", "query", "ad_title", "ad_text", "attributes", "grade", "grade_raw"]
    return rows.where(F.col("reason").isNotNull()).select(*names)


def refuse_too_many(rows: DataFrame, reasons: dict[str, int], total: int, config: DataConfig, folder: Path) -> None:
    """Raise `ContractError` with the commonest reasons, each with an example, when too many of `total` rows are faulty.

    `reasons` counts the rejected rows by reason; `folder` is where they are kept.
    """
    from pyspark.sql import functions as F

    rejected = sum(reasons.values())
    if rejected <= config.max_rejected_share * total:
        if rejected:
            log.warning("%d of %d rows are faulty and were kept aside in %s", rejected, total, folder)
        return
    parts = []
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS_SHOWN]:
        row = rows.where(F.col("reason") == reason).select("query", "ad_title", "detail").first()
        example = {name: value[:60] for name, value in row.asDict().items() if value} if row else {}
        # As Python writes it: control characters of a hostile row must not reach the terminal.
        cells = ", ".join(f"{name} {value!a}" for name, value in example.items())
        parts.append(f"{reason}: {count} (e.g. {cells or 'an empty row'})")
    raise ContractError(
        f"{rejected} of {total} rows are faulty, more than max_rejected_share {config.max_rejected_share:g} allows — "
        f"{'; '.join(parts)} — correct the file or the `data` settings, or raise the limit; see {folder}"
    )


def _with_all_columns(frame: DataFrame) -> DataFrame:
    from pyspark.sql import functions as F

    for name, kind in _OPTIONAL.items():
        if name not in frame.columns:
            frame = frame.withColumn(name, F.lit(None).cast(kind))
    # Bytes that are not UTF-8 pass through Spark unseen and then break Arrow, Python and every tokenizer.
    return frame.select(
        *[F.make_valid_utf8(name).alias(name) for name in _TEXTS],
        map_of(F.map_entries("attributes")).alias("attributes"),
        F.col("grade_raw").cast("double").alias("grade_raw"),
        F.col("grade").cast("int").alias("grade"),
        "rating_variance",
        "frequency",
    ).withColumn("attributes_json", F.to_json("attributes"))


def _fault(config: DataConfig, scale: GradeScale) -> Column:
    """The reason of the first check that a row fails, null for a sound row.

    A row that its source could not read comes with a `problem`, which is its reason. Nulls pass: what may not be missing
    is the query and the ad title, and whether those are empty is known only with their keys.
    """
    from pyspark.sql import functions as F

    limit = config.max_text_chars
    finite = F.abs("grade_raw") <= sys.float_info.max
    checks = [
        *[(F.length(name) > limit, f"{subject} longer than {limit} characters") for name, subject in _SUBJECTS.items()],
        *[
            # Where bytes could not be decoded, readers leave U+FFFD: the text that was there is gone.
            (
                F.contains(name, F.lit("\ufffd")),
                f"{_SUBJECTS[name]} damaged: bytes that are no {config.encoding} (another `data.encoding`?)",
            )
            for name in ("query", "ad_title", "ad_text")
        ],
        (~F.col("grade").between(0, scale.size - 1), f"the grade is not on the scale 0 … {scale.size - 1}"),
        (~finite, "the rating is not a finite number"),
    ]
    return F.coalesce("problem", *[F.when(failed, reason) for failed, reason in checks])
