"""The data stage on the synthetic source and on the real files of public sets."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.contracts import PAIRS, RATIONALES, SPLITS, TEXTS, ContractError, GradeScale, read_table
from data.prepare import prepare
from data.sources.paths import public_file
from data.sources.synthetic import catalogue
from data.text import near_key, normalise_key

pytestmark = pytest.mark.spark


def test_synthetic(spark: Any, tmp_path: Path) -> None:
    config = DataConfig(source="synthetic", rows=600, seed=1)
    result = prepare(config, tmp_path, spark)
    figures = result.figures
    assert figures["rows_in"] == 600
    assert figures["rejected"] == 0
    assert figures["rows"] + figures["duplicates"] == 600
    # A changed fingerprint would train the teacher of every run on record again.
    assert (result.fingerprint, figures["fingerprint_labelled"]) == ("8e9a9442e59577f3", "c74d1c3d1da22886")
    pairs = read_table(tmp_path / "pairs", PAIRS).to_pylist()
    scale = GradeScale.load(tmp_path)
    assert {row["grade"] for row in pairs} == set(range(scale.size))
    assert any(row["attributes"] for row in pairs)
    train = {row["pair_id"] for row in pairs if row["split"] == "train"}
    reasons = read_table(tmp_path / "rationales", RATIONALES)["pair_id"].to_pylist()
    assert set(reasons) == train
    assert len(reasons) == len(train) == figures["rationales"]
    assert read_table(tmp_path / "texts", TEXTS).num_rows == figures["texts"] == len(list(catalogue(1)))

    other = tmp_path / "again"
    other.mkdir()
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", "3")
    try:
        assert prepare(config, other, spark).fingerprint == result.fingerprint
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)


def test_texts_of_a_file_are_part_of_what_a_teacher_reads(spark: Any, tmp_path: Path) -> None:
    file, prints = tmp_path / "texts.txt.gz", set()
    for content in ("A kettle boils water.\n\n  Trainers are shoes. \n", "A kettle boils water.\n"):
        file.write_bytes(gzip.compress(content.encode()))
        out = tmp_path / str(len(prints))
        out.mkdir()
        figures = prepare(DataConfig(rows=600, seed=1, texts=file), out, spark).figures
        prints.add(figures["fingerprint_labelled"])
    assert read_table(tmp_path / "0" / "texts", TEXTS)["text"].to_pylist() == [
        "A kettle boils water.",
        "Trainers are shoes.",
    ]
    assert len(prints) == 2


def is_there(name: str) -> bool:
    try:
        return public_file(name).is_file()
    except ContractError:
        return False


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_there(name), reason=f"ADS_RELEVANCE_DATA names no folder with {name}")


def splits_of_queries(rows: list[dict[str, Any]], key: Callable[[str], str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(key(normalise_key(row["query"])), set()).add(row["split"])
    return found


@real("home_depot/train.csv.gz")
def test_home_depot_as_published(spark: Any, tmp_path: Path) -> None:
    config = DataConfig(source="home_depot", max_train=2000, max_valid=500, max_test=1000, max_pool=3000)
    figures = prepare(config, tmp_path, spark).figures
    assert figures["rows_in"] == 74_067
    assert figures["rejected"] == 0
    rows_of_splits = tuple(figures[f"rows_{split}"] for split in SPLITS)
    assert rows_of_splits == (2000, 500, 1000, 3000)
    rows = read_table(tmp_path / "pairs", PAIRS).to_pylist()
    assert all((row["grade_raw"] >= 2.33) == (row["grade"] == 2) for row in rows)
    assert all((row["grade_raw"] < 1.6) == (row["grade"] == 0) for row in rows)
    assert not any("&amp;" in row["ad_title"] for row in rows)
    for key in (str, near_key):
        assert all(len(splits) == 1 for splits in splits_of_queries(rows, key).values())


@pytest.mark.parametrize(
    ("source", "rows_in", "language"),
    [
        pytest.param("qbqtc", 20_000, "zh", marks=real("qbqtc/train.jsonl.gz")),
        pytest.param("qadsm", 9_000, "de", marks=real("qadsm_de/train.tsv.gz")),
    ],
)
def test_sets_in_other_languages_as_published(
    spark: Any, tmp_path: Path, source: Any, rows_in: int, language: str
) -> None:
    figures = prepare(DataConfig(source=source), tmp_path, spark).figures
    assert (figures["rows_in"], figures["rejected"]) == (rows_in, 0)
    rows = read_table(tmp_path / "pairs", PAIRS).to_pylist()
    for key in (str, near_key):
        assert all(len(splits) == 1 for splits in splits_of_queries(rows, key).values())
    card = json.loads((tmp_path / "card.json").read_text())
    assert max(card["languages"], key=card["languages"].get) == language
    assert all(row["deviations"] < 5 for row in card["balance"].values())
