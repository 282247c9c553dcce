"""Which rows of a source are sound, and under which ids: the first half of the data stage.

A faulty row is never dropped silently: it keeps its columns and gets a `reason`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.config import DataConfig
from data.schema import ContractError, GradeScale
from data.split import split_point
from data.text import key_id, normalise_key

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

log = logging.getLogger(__name__)

_TEXTS = ("query", "ad_title", "ad_text", "rationale", "problem", "detail")
_REASONS_SHOWN = 5
_KEYS = pa.struct(
    [("query_id", pa.string()), ("pair_id", pa.string()), ("point", pa.int64()), ("has_text", pa.bool_())]
)


def check_rows(frame: DataFrame, config: DataConfig, scale: GradeScale) -> DataFrame:
    """All rows of a source, each with `reason` (null: sound) and, if sound, `pair_id`, `query_id` and `point`.

    Text is valid UTF-8 afterwards; attributes have sorted keys and a JSON twin, `attributes_json`; an ad text, a
    rationale or attributes without content are null in a sound row.
    """
    from pyspark.sql import functions as F

    frame = _clean(frame).withColumn("fault", _fault(config, scale))
    sound = F.col("fault").isNull()
    # Only sound rows go to Python: a text of a gigabyte must not.
    arguments = [F.when(sound, F.col(name)) for name in ("query", "ad_title", "ad_text")]
    frame = frame.withColumn("keys", _keys_function(config.seed)(*arguments))
    reason = (
        F.when(~sound, F.col("fault"))
        .when(F.col("keys.query_id").isNull(), "the query is empty or has no visible character")
        .when(F.col("keys.pair_id").isNull(), "the ad title is empty or has no visible character")
    )
    return frame.select(
        reason.alias("reason"),
        "detail",
        "keys.query_id",
        "keys.pair_id",
        "keys.point",
        "query",
        "ad_title",
        F.when(~sound | F.col("keys.has_text"), F.col("ad_text")).alias("ad_text"),
        "attributes",
        "attributes_json",
        "grade",
        "grade_raw",
        F.when(F.trim("rationale") != "", F.col("rationale")).alias("rationale"),
    )


def rejected_rows(checked: DataFrame) -> DataFrame:
    """The rows with a reason, as they are kept aside; `detail` is what the source found (a label, a broken line)."""
    from pyspark.sql import functions as F

    names = ["reason", "detail", "query", "ad_title", "ad_text", "attributes", "grade", "grade_raw"]
    return checked.where(F.col("reason").isNotNull()).select(*names)


def refuse_too_many(checked: DataFrame, reasons: dict[str, int], rows: int, config: DataConfig, folder: Path) -> None:
    """Raise `ContractError` with the commonest reasons, each with an example, when too many of `rows` are faulty.

    `reasons` counts the rows by reason; `folder` is where they lie.
    """
    from pyspark.sql import functions as F

    rejected = sum(reasons.values())
    if rejected <= config.max_rejected_share * rows:
        if rejected:
            log.warning("%d of %d rows are faulty and were kept aside in %s", rejected, rows, folder)
        return
    parts = []
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS_SHOWN]:
        row = checked.where(F.col("reason") == reason).select("query", "ad_title", "detail").first()
        shown = {name: value[:60] for name, value in row.asDict().items() if value} if row else {}
        # As Python writes it: control characters of a hostile row must not reach the terminal.
        parts.append(f"{reason}: {count} (e.g. {', '.join(f'{k} {v!a}' for k, v in shown.items()) or 'an empty row'})")
    raise ContractError(
        f"{rejected} of {rows} rows are faulty, more than max_rejected_share {config.max_rejected_share:g} allows — "
        f"{'; '.join(parts)} — mend the source or the `data` settings, or raise the limit; see {folder}"
    )


def _clean(frame: DataFrame) -> DataFrame:
    from pyspark.sql import functions as F

    for name in ("problem", "detail"):
        if name not in frame.columns:
            frame = frame.withColumn(name, F.lit(None).cast("string"))
    # Bytes that are not UTF-8 pass through Spark unseen and then break Arrow, Python and every tokenizer.
    return frame.select(
        *[F.make_valid_utf8(name).alias(name) for name in _TEXTS],
        _sorted_map("attributes").alias("attributes"),
        F.col("grade_raw").cast("double").alias("grade_raw"),
        F.col("grade").cast("int").alias("grade"),
    ).withColumn("attributes_json", F.to_json("attributes"))


def _sorted_map(name: str) -> Column:
    """A map with sorted keys, each once, without null values; null when nothing is left."""
    from pyspark.sql import functions as F

    present = F.filter(F.map_entries(name), lambda e: e["value"].isNotNull())
    valid = F.transform(
        present,
        lambda e: F.struct(F.make_valid_utf8(e["key"]).alias("key"), F.make_valid_utf8(e["value"]).alias("value")),
    )
    entries = F.array_sort(valid)
    following = F.transform(F.slice(entries, 2, F.lit(2**31 - 1)), lambda e: e["key"])
    # Of a repeated key the greatest value stays: JSON objects hold such keys, and `map_from_entries` fails on them.
    last = F.zip_with(entries, following, lambda e, key: F.when(e.isNotNull() & ~e["key"].eqNullSafe(key), e))
    once = F.filter(last, lambda e: e.isNotNull())
    return F.when(F.size(once) > 0, F.map_from_entries(once))


def _fault(config: DataConfig, scale: GradeScale) -> Column:
    """The first fault of a row that Spark can see, else null."""
    from pyspark.sql import functions as F

    def too_long(name: str) -> Column:
        return F.length(name) > config.max_text_chars

    limit = f"longer than {config.max_text_chars} characters"
    rating = F.col("grade_raw")
    return (
        F.when(F.col("problem").isNotNull(), F.col("problem"))
        .when(too_long("query"), f"the query is {limit}")
        .when(too_long("ad_title"), f"the ad title is {limit}")
        .when(too_long("ad_text"), f"the ad text is {limit}")
        .when(too_long("attributes_json"), f"the attributes are {limit}")
        .when(too_long("rationale"), f"the rationale is {limit}")
        .when(~F.col("grade").between(0, scale.size - 1), f"the grade is not on the scale 0 … {scale.size - 1}")
        .when(F.isnan(rating) | (F.abs(rating) == float("inf")), "the rating is not a finite number")
    )


def _keys_function(seed: int) -> Any:
    """A Spark function of query, title and text (nullable) that returns the ids, or nulls where there are none."""
    from pyspark.sql.functions import arrow_udf

    def keys(query: pa.Array, title: pa.Array, text: pa.Array) -> pa.Array:
        rows = []
        for q, t, x in zip(query.to_pylist(), title.to_pylist(), text.to_pylist(), strict=True):
            query_key, title_key, text_key = normalise_key(q), normalise_key(t), normalise_key(x)
            rows.append(
                {
                    "query_id": key_id(query_key) if query_key else None,
                    "pair_id": key_id(query_key, title_key, text_key) if query_key and title_key else None,
                    "point": split_point(query_key, seed) if query_key else None,
                    "has_text": bool(text_key),
                }
            )
        return pa.array(rows, type=_KEYS)

    returns = "query_id string, pair_id string, point bigint, has_text boolean"
    return arrow_udf(keys, returns)  # type: ignore[call-overload]  # its kind follows from the annotations above
