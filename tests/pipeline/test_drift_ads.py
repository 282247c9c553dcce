"""Drift: how many ads a query has, on either side, is no drift."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS
from pipeline import drift, drift_profile

KEY = "0123456789abcdef"
LIMITS = drift.DriftConfig()
WORDS = 2000
COMMON = 1 / np.arange(1, WORDS + 1)
"""How often each word is, as in a language."""
Ads = Callable[[int], int]


def hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def queries(count: int, ads: int | Ads, split: str, seed: int, *, query: int = 0, ad: int = 0) -> list[dict[str, Any]]:
    """The pairs of so many queries, each with so many ads; `query` and `ad` are where their topics' words begin."""
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()

    def text(first: int, length: int) -> str:
        return " ".join(f"w{first + word}" for word in rng.choice(WORDS, length, p=COMMON / COMMON.sum()))

    for number in range(count):
        query_id, of_query = hashed(seed, number), text(query, 3)
        for ad_number in range(ads if isinstance(ads, int) else ads(number)):
            row = {"pair_id": hashed(query_id, ad_number), "query_id": query_id, "query": of_query}
            rows.append(row | {"ad_title": text(ad, 5), "split": split, "source": "s"})
    return rows


def write(run: Path, *parts: list[dict[str, Any]]) -> None:
    (run / "pairs" / "pairs").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row for rows in parts for row in rows], schema=PAIRS)
    pq.write_table(table, run / "pairs" / "pairs" / "part.parquet")


def annotate(run: Path, name: str, rows: list[dict[str, Any]], grade: Callable[[dict[str, Any]], int]) -> None:
    row = {"annotation_key": KEY, "votes": [], "n_samples": 1, "n_unparsed": 0, "status": "ok", "error": ""}
    row |= {"prompt_tokens": 1, "completion_tokens": 1, "created_at": datetime.now(UTC)}
    annotations = [row | {"pair_id": each["pair_id"], "grade": grade(each)} for each in rows]
    (run / "annotations").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(annotations, schema=ANNOTATIONS), run / "annotations" / f"{KEY}-{name}.parquet")


def of_new_pairs(run: Path, train: list[dict[str, Any]], pool: list[dict[str, Any]]) -> drift.Check:
    """What data-prepare finds of the pool, with a teacher that learned from `train`."""
    write(run, train, pool)
    (run / "teacher").mkdir()
    drift_profile.remember(run / "pairs", run / "teacher")
    (check,) = drift.check_pairs(LIMITS, run, run / "pairs", "")
    return check


@pytest.mark.parametrize(("known", "new"), [(10, 1), (1, 10), (10, 10), (20, 2)])
def test_more_or_fewer_ads_of_a_query_are_no_drift(tmp_path: Path, known: int, new: int) -> None:
    check = of_new_pairs(tmp_path, queries(1000, known, "train", 0), queries(500, new, "pool", 1))
    assert (check.pairs, check.queries, check.known) == (500 * new, 500, 1000)
    assert check.worst.psi < 0.02, check.sentence()


@pytest.mark.parametrize(("known", "new"), [(10, 1), (1, 10), (10, 10)])
@pytest.mark.parametrize("part", ["query", "ad"])
def test_another_topic_is_seen_however_many_ads_a_query_has(tmp_path: Path, known: int, new: int, part: Any) -> None:
    """Of the queries, or of the ads alone."""
    pool = queries(500, new, "pool", 1, **{part: 1000})
    check = of_new_pairs(tmp_path, queries(1000, known, "train", 0), pool)
    assert check.level(LIMITS) == "stop"
    assert check.worst.name == {"query": "common words in queries", "ad": "common words in ads"}[part]


@pytest.mark.parametrize("ids", [100_000, 3000])
def test_a_sample_has_as_many_queries_with_few_ads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: int) -> None:
    """Of train, and perhaps of the pool, not all is read: two topics, of which one has nineteen ads a query."""
    monkeypatch.setattr("pipeline.drift_profile.SAMPLE", 4000)
    monkeypatch.setattr("pipeline.drift_profile.IDS", ids)
    train = queries(1000, 19, "train", 0) + queries(1000, 1, "train", 1, query=1000, ad=1000)
    pool = queries(300, 19, "pool", 2) + queries(300, 1, "pool", 3, query=1000, ad=1000)
    check = of_new_pairs(tmp_path, train, pool)
    assert 300 < check.known < 600
    assert check.pairs <= min(4000, 1.2 * ids)
    assert 200 < check.queries < 500
    assert check.worst.psi < 0.05, check.sentence()


@pytest.mark.parametrize("size", [3000, 100_000])
def test_grades_of_queries_with_many_ads_weigh_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Half of the queries have nineteen ads, all of grade 0; a later batch has one ad of each such query."""
    monkeypatch.setattr("pipeline.drift_profile.SAMPLE", size)
    first = queries(300, 19, "pool", 1) + queries(300, 1, "pool", 2)
    fewer = queries(300, 1, "pool", 3) + queries(300, 1, "pool", 4)
    many = {row["query_id"] for row in first[: 300 * 19] + fewer[:300]}
    write(tmp_path, queries(600, 2, "train", 0), first, fewer)
    annotations = tmp_path / "annotations"
    annotate(tmp_path, "a", first, lambda row: 0 if row["query_id"] in many else 2)
    drift.check_annotations(LIMITS, tmp_path, annotations, KEY)
    annotate(tmp_path, "b", fewer, lambda row: 0 if row["query_id"] in many else 2)
    *_, student = drift.check_annotations(LIMITS, tmp_path, annotations, KEY)
    assert (student.against, student.pairs) == ("student", 600)
    (grades,) = [measure for measure in student.measures if measure.name == "the teacher's grades"]
    assert grades.psi < 0.05, student.sentence()
    assert student.level(LIMITS) == "fine", student.sentence()
