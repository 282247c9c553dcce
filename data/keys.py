"""The keys of a row, made in Spark's Python workers: everything that depends on normalised text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.split import split_point
from data.text import key_hash, key_id, near_key, normalise_key

if TYPE_CHECKING:
    from collections.abc import Callable

_KEYS = pa.struct(
    [
        ("query_id", pa.string()),
        ("near_query", pa.int64()),
        ("point", pa.int64()),
        ("pair_id", pa.string()),
        ("ad", pa.int64()),
        ("near_ad", pa.int64()),
        ("has_text", pa.bool_()),
    ]
)
_RETURNS = (
    "query_id string, near_query bigint, point bigint, pair_id string, ad bigint, near_ad bigint, has_text boolean"
)


def keys_function(seed: int, split_by: str) -> Callable[..., Any]:
    """A Spark function of query, title and text (nullable) that returns the keys, or nulls where there are none.

    `query_id` and `pair_id` are ids; `near_query`, `ad` (title and text) and `near_ad` (title) are hashes; `point` is the
    query's place in the order of the splits; `has_text` tells whether anything of the text is visible.
    """
    from pyspark.sql.functions import arrow_udf

    near = split_by == "near_query"

    def keys(query: pa.Array, title: pa.Array, text: pa.Array) -> pa.Array:
        texts = zip(query.to_pylist(), title.to_pylist(), text.to_pylist(), strict=True)
        rows = [_keys(q, t, x, seed, near) for q, t, x in texts]
        columns = zip(*rows, strict=True) if rows else [()] * len(_KEYS)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, _KEYS, strict=True)]
        return pa.StructArray.from_arrays(arrays, fields=list(_KEYS))

    return arrow_udf(keys, _RETURNS)  # type: ignore[call-overload]  # its kind follows from the annotations above


def _keys(query: str | None, title: str | None, text: str | None, seed: int, near: bool) -> tuple[Any, ...]:
    query_key, query_id, near_query, point = _of_query(query, seed, near)
    title_key, text_key = normalise_key(title), normalise_key(text)
    pair = key_id(query_key, title_key, text_key) if query_key and title_key else None
    ad, near_ad = (key_hash(title_key, text_key), key_hash(near_key(title_key))) if title_key else (None, None)
    return query_id, near_query, point, pair, ad, near_ad, bool(text_key)


@lru_cache(50_000)  # the rows of a query often come together
def _of_query(query: str | None, seed: int, near: bool) -> tuple[str, str | None, int | None, int | None]:
    key = normalise_key(query)
    if not key:
        return key, None, None, None
    near_query = near_key(key)
    return key, key_id(key), key_hash(near_query), split_point(near_query if near else key, seed)
