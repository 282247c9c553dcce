"""What the data card says of a prepared table: grades by split, texts, labels, languages, leakage."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from data.balance import grade_balance
from data.contracts import SPLITS, GradeScale
from data.quality import TEXT_SIGNS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LANGUAGE_SAMPLE = 2000
"""Pairs whose language is guessed: the first in id order, which is a random sample, since ids are hashes."""

_LANGUAGE_CHARS = 500
_LANGUAGES = [
    *("ar", "bg", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it", "ja"),
    *("ko", "lt", "lv", "ms", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sv", "th", "tr", "uk", "vi", "zh"),
]
_TEXTS = ("query", "ad_title", "ad_text")
_HASHES = {"near-duplicate queries": "near_query", "ads": "ad", "near-duplicate ads": "near_ad"}


def profile(
    pairs: DataFrame, counts: dict[str, dict[str, int]], scale: GradeScale
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flat metrics of the pairs (rows and queries by split, shares of the grades), and what else the card says.

    `counts` are those of `split_counts`.
    """
    leaks = _leakage(pairs)
    described: dict[str, Any] = {
        "grades_by_split": {split: _rows_by_grade(counts.get(split, {}), scale) for split in SPLITS},
        "balance": grade_balance(counts, scale.size),
        "leakage": leaks,
        **_texts_and_labels(pairs),
    }
    metrics = _split_metrics(counts, leaks["queries"]["by_split"], scale) | {
        "conflicting_pairs": described["labels"]["conflicting"],
        "ads_in_several_splits": leaks["ads"]["in_several_splits"],
    }
    return metrics, described


def languages(folder: Path) -> dict[str, int]:
    """Languages of a sample of the ads, by py3langid over title and text; short titles are often taken for a neighbour's."""
    columns = ["pair_id", "ad_title", "ad_text"]
    # Every file is sorted by id, so its head is enough.
    heads = [
        part.head(LANGUAGE_SAMPLE, columns=columns) for part in pads.dataset(folder, format="parquet").get_fragments()
    ]
    if not heads:
        return {}
    identifier = _identifier()
    sample = pa.concat_tables(heads).sort_by("pair_id").slice(0, LANGUAGE_SAMPLE).to_pylist()
    texts = (f"{row['ad_title']} {row['ad_text'] or ''}"[:_LANGUAGE_CHARS] for row in sample)
    return dict(Counter(str(identifier.classify(text)[0]) for text in texts).most_common())


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(_LANGUAGES)
    return identifier


def _texts_and_labels(pairs: DataFrame) -> dict[str, dict[str, Any]]:
    """`lengths` in characters of each text (rows that have it, mean, median, 95th percentile, longest), `labels` (pairs with
    several ones, with conflicting ones, with ones more than a grade apart) and `text_signs` (pairs with each of them)."""
    from pyspark.sql import functions as F

    apart = F.col("grade_max") - F.col("grade_min")
    columns = [
        F.count_if(F.col("n_labels") > 1).alias("several"),
        F.count_if(apart > 0).alias("conflicting"),
        F.count_if(apart > 1).alias("far_apart"),
        *[F.count_if(F.concat_ws("\n", *_TEXTS).rlike(sign)).alias(name) for name, (sign, _) in TEXT_SIGNS.items()],
    ]
    for name in _TEXTS:
        length = F.length(name)
        columns += [
            F.count(name).alias(f"{name} n"),
            F.sum(length).alias(f"{name} sum"),
            F.percentile(length, F.array(F.lit(0.5), F.lit(0.95))).alias(f"{name} percentiles"),
            F.max(length).alias(f"{name} max"),
        ]
    row = pairs.agg(*columns).collect()[0]
    lengths = {}
    for name in _TEXTS:
        if n := row[f"{name} n"]:
            median, p95 = row[f"{name} percentiles"]
            mean = round(row[f"{name} sum"] / n, 2)
            lengths[name] = {"n": n, "mean": mean, "median": median, "p95": p95, "max": row[f"{name} max"]}
    return {
        "lengths": lengths,
        "labels": {name: row[name] for name in ("several", "conflicting", "far_apart")},
        "text_signs": {name: row[name] for name in TEXT_SIGNS},
    }


def _rows_by_grade(counts: dict[str, int], scale: GradeScale) -> dict[str, int]:
    """Rows by grade and its name, those without one as `none`; grades without rows are left out."""
    rows = {f"{k} {grade.name}": counts.get(f"n{k}", 0) for k, grade in enumerate(scale.grades)}
    rows["none"] = counts.get("rows", 0) - counts.get("n", 0)
    return {name: count for name, count in rows.items() if count}


def _split_metrics(counts: dict[str, dict[str, int]], queries: dict[str, int], scale: GradeScale) -> dict[str, Any]:
    """Rows and queries by split, and the share of each grade among the graded rows of all splits."""

    def total(name: str) -> int:
        return sum(split[name] for split in counts.values())

    rows, graded = total("rows"), total("n")
    return {
        **{f"rows_{split}": counts.get(split, {}).get("rows", 0) for split in SPLITS},
        "queries": sum(queries.values()),
        **{f"queries_{split}": queries[split] for split in SPLITS},
        "graded_share": graded / rows if rows else 0.0,
        **{f"grade_{k}_share": total(f"n{k}") / graded if graded else 0.0 for k in range(scale.size)},
    }


def _leakage(pairs: DataFrame) -> dict[str, dict[str, Any]]:
    """For queries and ads, exact and near: how many distinct ones, how many in several splits, and the pairs concerned.

    `by_split` counts the distinct ones of each split, and `also_in_train` the pairs of every other split whose query or ad
    is in train as well. An ad that answers queries of several splits is in all of them, as it will be in use; but a model
    that has learnt an ad by heart does better on it than on a new one.
    """
    from pyspark.sql import functions as F

    # Ids for the queries, since none may be in two splits; 64-bit hashes are enough to count the others, all in one pass.
    kinds = F.array(*[F.struct(F.lit(kind).alias("kind"), F.col(c).alias("key")) for kind, c in _HASHES.items()])
    queries = pairs.select(F.lit("queries").alias("kind"), F.col("query_id").alias("key"), "split")
    sets = [row for keys in (queries, pairs.select(F.inline(kinds), "split")) for row in _split_sets(keys)]
    return {kind: _leaks([row for row in sets if row["kind"] == kind]) for kind in ("queries", *_HASHES)}


def _split_sets(keys: DataFrame) -> list[Any]:
    """One row for each kind and set of splits (so at most 15 of a kind): keys that are in just those, and their pairs."""
    from pyspark.sql import functions as F

    counted = [F.count(F.when(F.col("split") == name, 1)).alias(name) for name in SPLITS]
    sets = keys.groupBy("kind", "key").agg(*counted)
    sets = sets.groupBy("kind", *[(F.col(name) > 0).alias(f"in_{name}") for name in SPLITS])
    return sets.agg(F.count("*").alias("keys"), *[F.sum(name).alias(name) for name in SPLITS]).collect()


def _leaks(sets: list[Any]) -> dict[str, Any]:
    several = [row for row in sets if sum(row[f"in_{name}"] for name in SPLITS) > 1]
    return {
        "distinct": sum(row["keys"] for row in sets),
        "in_several_splits": sum(row["keys"] for row in several),
        "by_split": {name: sum(row["keys"] for row in sets if row[f"in_{name}"]) for name in SPLITS},
        "pairs": {name: sum(row[name] for row in sets) for name in SPLITS},
        "also_in_train": {name: sum(row[name] for row in several if row["in_train"]) for name in SPLITS[1:]},
    }
