"""Which rows of a source are sound, and under which ids: the first half of the data stage.

A faulty row is never dropped silently: it keeps its columns and gets a `reason`, that of the first check that it fails.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from data.config import MISSING_LABELS, DataConfig, Shares
from data.contracts import ContractError
from data.html import visible_text
from data.sources.labels import Source, number
from data.split import split_of, split_point
from data.text import key_hash, key_id, near_key, normalise_key

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

log = logging.getLogger(__name__)

DAMAGED = "damaged: bytes that are no"
_REASONS_SHOWN = 5
_SUBJECTS = {"query": "the query is", "ad_title": "the ad title is", "ad_text": "the ad text is",
             "attributes": "the attributes are", "rationale": "the rationale is"}  # fmt: skip
CELLS = pa.schema([(name, pa.string()) for name in (*_SUBJECTS, "grade", "variance", "frequency", "problem", "detail")])
"""What the checks read of a row; null what a source does not have."""
_COLUMNS = {
    "reason": "string", "detail": "string", "query": "string", "ad_title": "string", "ad_text": "string",
    "attributes": "map<string,string>", "attributes_json": "string", "grade": "int", "grade_raw": "double",
    "rating_variance": "double", "frequency": "double", "rationale": "string", "query_id": "string", "near_query": "bigint",
    "point": "bigint", "split": "string", "pair_id": "string", "ad": "bigint", "near_ad": "bigint",
}  # fmt: skip
_ARROW = {"string": pa.string(), "map<string,string>": pa.map_(pa.string(), pa.string()), "int": pa.int32(),
          "bigint": pa.int64(), "double": pa.float64()}  # fmt: skip
_ROW = pa.struct([(name, _ARROW[kind]) for name, kind in _COLUMNS.items()])
_NO_ATTRIBUTES = {"", *(label.upper() for label in MISSING_LABELS)}
_EMPTY = "the {} is empty or has no visible character"


class Keys(NamedTuple):
    """Ids of a row, and 64-bit hashes of what it shares with near-duplicates; all None where there are none."""

    query_id: str | None = None
    near_query: int | None = None
    point: int | None = None
    split: str | None = None
    pair_id: str | None = None
    ad: int | None = None
    near_ad: int | None = None
    has_text: bool = False


@dataclass(frozen=True)
class RowChecks:
    """The checks of one row; it travels to the workers as these few values."""

    source: Source
    config: DataConfig

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Rows of `CELLS` become rows of `_COLUMNS`."""
        for batch in batches:
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            yield pa.RecordBatch.from_struct_array(pa.array([self.check(*row) for row in rows], _ROW))

    def check(self, *cells: str | None) -> tuple[Any, ...]:
        """The columns of a row, in the order of `_COLUMNS`; `cells` are in that of `CELLS`. Without a reason it is sound and
        has keys."""
        query, title, text, attributes, rationale, label, variance, frequency, problem, detail = cells
        from_log = frequency is not None
        if self.source.html and not from_log:
            title, text = title and visible_text(title), text and visible_text(text)
        rating, grade, not_a_label = (None, None, None) if from_log else self.source.labels.read(label)
        uncounted = from_log and not 0 < (number(frequency) or 0) < 1e15
        without = not attributes or attributes.strip().upper() in _NO_ATTRIBUTES
        members = {} if without or attributes is None else self.source.read_attributes(attributes)
        compact = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":")) if members else None
        faults = (
            (problem, detail),
            (not_a_label, label),
            ("the frequency is not a number above 0 and below 1e15" if uncounted else None, frequency),
            ("the attributes are not a JSON object" if members is None else None, attributes),
            (self._fault_of_texts(query, title, text, compact, rationale), None),
        )
        reason, detail = next((fault for fault in faults if fault[0]), (None, None))
        keys = Keys() if reason else _keys(query, title, text, self.config)
        if not reason:
            reason = None if keys.pair_id else _EMPTY.format("ad title" if keys.query_id else "query")
            text = text if keys.has_text else None
        spread = number(variance)
        return (
            *(reason, detail, query, title, text, sorted(members.items()) if members else None, compact, grade, rating),
            *(spread if spread is not None and spread >= 0 else None, number(frequency)),
            *(rationale if rationale and rationale.strip() else None, *keys[:-1]),
        )

    def _fault_of_texts(self, *texts: str | None) -> str | None:
        limit = self.config.max_text_chars
        for subject, text in zip(_SUBJECTS.values(), texts, strict=True):
            if text and len(text) > limit:
                return f"{subject} longer than {limit} characters"
        for subject, text in zip(list(_SUBJECTS.values())[:3], texts[:3], strict=True):
            # Where bytes could not be decoded, readers leave U+FFFD: the text that was there is gone.
            if text and "\ufffd" in text:
                return f"{subject} {DAMAGED} {self.config.encoding} (another `data.encoding`?)"
        return None


def validated(rows: DataFrame, source: Source, config: DataConfig) -> DataFrame:
    """All rows (see `read_source`), each with `reason` (null: sound) and, if sound, its keys.

    Those are `pair_id` and `query_id` (hex), and as 64-bit hashes `near_query` (the same for near-duplicate queries), `ad`
    and `near_ad` (title and text; near-duplicate titles); `point` is the query's place in the order of the splits, and
    `split` its split.
    Attributes have sorted keys and a JSON twin, `attributes_json`; an ad text, a rationale or attributes without content are
    null in a sound row.
    """
    from pyspark.sql import functions as F

    cells = [F.col(name) if name in rows.columns else F.lit(None).cast("string").alias(name) for name in CELLS.names]
    columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
    return rows.select(*cells).mapInArrow(RowChecks(source, config), columns)


def rejected_rows(rows: DataFrame) -> DataFrame:
    """The rows with a reason, as they are kept aside; `detail` is what the source holds (a label, a broken line)."""
    from pyspark.sql import functions as F

    names = ["reason", "detail", "query", "ad_title", "ad_text", "attributes", "grade", "grade_raw"]
    return rows.where(F.col("reason").isNotNull()).select(*names)


def refuse_too_many(
    rows: DataFrame, reasons: dict[str, int], total: int, config: DataConfig, folder: Path, hint: str
) -> None:
    """Raise `ContractError` with the commonest reasons, each with an example, when too many of `total` rows are faulty.

    `reasons` counts the rejected rows by reason; `folder` is where they are kept; `hint` is a remedy that is known.
    """
    from pyspark.sql import functions as F

    rejected = sum(reasons.values())
    commonest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    if rejected <= config.max_rejected_share * total:
        if rejected:
            text = "%d of %d rows are faulty and were kept aside in %s, most of them because: %s%s"
            log.warning(text, rejected, total, folder, commonest[0][0], hint and f"; {hint}")
        return
    parts = []
    for reason, count in commonest[:_REASONS_SHOWN]:
        row = rows.where(F.col("reason") == reason).select("query", "ad_title", "detail").first()
        example = {name: value[:60] for name, value in row.asDict().items() if value} if row else {}
        # As Python writes it: control characters of a hostile row must not reach the terminal.
        cells = ", ".join(f"{name} {value!a}" for name, value in example.items())
        parts.append(f"{reason}: {count} (e.g. {cells or 'an empty row'})")
    raise ContractError(
        f"{rejected} of {total} rows are faulty, more than max_rejected_share {config.max_rejected_share:g} allows — "
        f"{'; '.join(parts)} — {hint or 'correct the file or the `data` settings'}, or raise the limit; see {folder}"
    )


def _keys(query: str | None, title: str | None, text: str | None, config: DataConfig) -> Keys:
    query_key, *of_query = _query_keys(query, config.seed, config.split_by, config.shares)
    title_key, text_key = normalise_key(title), normalise_key(text)
    pair = key_id(query_key, title_key, text_key) if query_key and title_key else None
    of_ad = (key_hash(title_key, text_key), key_hash(near_key(title_key))) if title_key else (None, None)
    return Keys._make([*of_query, pair, *of_ad, bool(text_key)])


@lru_cache(50_000)  # the rows of a query often come together
def _query_keys(query: str | None, seed: int, split_by: str, shares: Shares) -> tuple[Any, ...]:
    key = normalise_key(query)
    if not key:
        return key, None, None, None, None
    near = near_key(key)
    point = split_point(near if split_by == "near_query" else key, seed)
    return key, key_id(key), key_hash(near), point, split_of(point, shares)
