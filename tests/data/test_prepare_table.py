"""The data stage on tables of every format: rows are accounted for, faults are named, nothing depends on order."""

import csv
import gzip
import io
import json
import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.contracts import DISAGREEMENT, PAIRS, RATIONALES, ContractError, GradeScale, read_table
from data.prepare import prepare
from data.sources import read_source, source_of
from data.sources.table import table_source
from data.text import key_id, normalise_key, pair_id
from data.validation import validated

pytestmark = pytest.mark.spark

GRADES = [
    {"name": "no", "definition": "It is not."},
    {"name": "so", "definition": "Partly."},
    {"name": "yes", "definition": "It is."},
]
COLUMNS = {"query": "search term", "ad_title": "Title.1", "ad_text": "text", "grade": "label", "attributes": "extra"}
HEADER = ["id", *COLUMNS.values()]
ALL_TO_POOL = {"train": 0, "valid": 0, "test": 0, "pool": 1}


def config(path: Path, **more: Any) -> DataConfig:
    base = {"source": "table", "path": path, "columns": COLUMNS, "grades": GRADES, "max_rejected_share": 1.0}
    return DataConfig.model_validate(base | {"shares": ALL_TO_POOL} | more)


def rows(count: int = 60) -> list[list[Any]]:
    """Sound rows: 3 ads for each query, text with quotes, separators and line breaks."""
    made = []
    for i in range(count):
        text = f'a "quoted", text\nin two lines\twith a tab {i}'
        made.append([i, f"Query {i // 3}", f"Title, {i}", text, i % 3, json.dumps({"size": i, "a": "x"})])
    return made


def as_csv(table: list[list[Any]], separator: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\n")
    writer.writerows([HEADER, *table])
    return buffer.getvalue()


def as_jsonl(table: list[list[Any]]) -> str:
    return "".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in table)


def pairs(out: Path) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in read_table(out / "pairs", PAIRS).to_pylist()}


def rejected(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "rejected").to_pylist()


def test_every_format_gives_the_same_table(spark: Any, tmp_path: Path) -> None:
    table = rows()
    folder = tmp_path / "with space, [brackets] and {braces}"  # patterns to Hadoop
    folder.mkdir()
    shuffled = random.Random(0).sample(table, len(table))
    (folder / "a.csv").write_text(as_csv(table), encoding="utf-8-sig")
    (folder / "a.tsv").write_text(as_csv(table, "\t"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl(shuffled).encode()))
    columns = dict(zip(HEADER, zip(*table, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "a.parquet")

    def checked(file: Path) -> list[str]:
        settings = config(file)
        return sorted(map(str, validated(read_source(spark, settings), source_of(settings), settings).collect()))

    first, *others = (checked(file) for file in sorted(folder.iterdir()))
    assert all(other == first for other in others)
    assert prepare(config(folder / "a.csv"), tmp_path, spark).figures["rejected"] == 0
    found = pairs(tmp_path)
    assert len(found) == len(first) == 60
    row = found[pair_id("Query 1", "Title, 4", 'a "quoted", text in two lines with a tab 4')]
    assert row["ad_text"] == 'a "quoted", text\nin two lines\twith a tab 4'
    assert dict(row["attributes"]) == {"size": "4", "a": "x"}
    assert (row["grade"], row["grade_raw"], row["source"]) == (1, 1.0, "table")
    ids = read_table(tmp_path / "pairs", PAIRS)["pair_id"].to_pylist()
    assert ids == sorted(ids)
    assert GradeScale.load(tmp_path).relevant_from == 2
    assert read_table(tmp_path / "rationales", RATIONALES).num_rows == 0


def test_faults_are_named_and_every_row_is_accounted_for(spark: Any, tmp_path: Path) -> None:
    bad = {
        "the query is empty or has no visible character": [["\x00\u200b", "t", "", 1, ""], ["  ", "t", "", 1, ""]],
        "the ad title is longer than 20000 characters": [["q", "t" * 20_001, "", 1, ""]],
        table_source(config(tmp_path)).labels.fault: [["q", "t", "", label, ""] for label in (3, "good", 1.5)],
        "the attributes are not a JSON object": [["q", "t", "", 1, "{oops"]],
    }
    table = rows(30) + [[0, *row] for group in bad.values() for row in group]
    text = as_csv(table) + "1,too,few\n" + "1,q,t,x,1,{},one,two\n"
    file = tmp_path / "bad.csv"
    file.write_bytes(text.encode() + b"9,caf\xe9,un\xff,,1,\n")
    expected = {reason: len(group) for reason, group in bad.items()} | {"the line has too few or too many columns": 2}
    expected["the query is damaged: bytes that are no utf-8 (another `data.encoding`?)"] = 1
    figures = prepare(config(file), tmp_path, spark).figures
    assert json.loads((tmp_path / "card.json").read_text())["rejected_by_reason"] == expected
    assert Counter(row["reason"] for row in rejected(tmp_path)) == expected
    assert (figures["rows_in"], figures["rows"], figures["rejected"]) == (40, 30, 10)

    with pytest.raises(ContractError, match="10 of 40 rows are faulty") as caught:
        prepare(config(file, max_rejected_share=0.2), tmp_path, spark)
    message = str(caught.value)
    assert message.count("(e.g. ") == 5
    assert any(f"detail {label!r}" in message for label in ("3", "good", "1.5"))
    assert not {"\n", "\x00"} & set(message)


def test_duplicates_become_their_lower_median_and_keep_their_variance(spark: Any, tmp_path: Path) -> None:
    columns = {"query": "q", "ad_title": "t", "grade": "r", "attributes": "a", "rationale": "why"}
    records = [
        {"q": "Red  Shoes", "t": "b", "r": 1.0, "why": "why 0"},
        {"q": "red shoes", "t": "B ", "r": 2.0, "a": {"k": 1, "z": None}, "why": "why 1"},
        {"q": "ＲＥＤ shoes", "t": "b", "r": 2.2, "why": "zzz"},
        {"q": "red shoes", "t": "b", "r": 3.0, "why": "why 2"},
        {"q": "red shoes", "t": "b", "r": None, "why": "of no grade"},
        {"q": "red shoes", "t": "other", "r": 3, "a": {}},
        *[{"q": "red shoes", "t": "agreed", "r": 2}] * 2,
    ]
    lines = [json.dumps(record) for record in records]
    lines.append('{"q": "red shoes", "t": "twice", "r": 1, "a": {"k": "1", "k": "2"}}')
    all_to_train = {"train": 1, "valid": 0, "test": 0, "pool": 0}
    more = {"columns": columns, "grade_thresholds": (1.5, 2.5), "shares": all_to_train}
    found, prints = [], set()
    for order in (lines, lines[::-1]):
        file = tmp_path / f"{len(found)}.jsonl"
        file.write_text("\n".join(order))
        result = prepare(config(file, **more), tmp_path, spark)
        assert (result.figures["rows"], result.figures["duplicates"], result.figures["queries"]) == (4, 5, 1)
        assert result.figures["conflicting_pairs"] == 1
        found.append(pairs(tmp_path))
        prints.add(result.fingerprint)
    assert len(prints) == 1
    assert found[0] == found[1]
    row = found[0][pair_id("red shoes", "b")]
    assert (row["grade"], row["grade_raw"], row["query"]) == (1, 2.0, "Red  Shoes")
    assert row["attributes"] is None
    assert found[0][pair_id("red shoes", "twice")]["attributes"] == [("k", "2")]
    # The reason is one given for the grade that won.
    reasons = read_table(tmp_path / "rationales", RATIONALES).to_pylist()
    assert reasons == [{"pair_id": row["pair_id"], "reasoning": "why 1"}]
    spread = {row["pair_id"]: row for row in read_table(tmp_path / "disagreement", DISAGREEMENT).to_pylist()}
    assert spread.keys() == {row["pair_id"], pair_id("red shoes", "agreed")}
    one = spread[row["pair_id"]]
    assert (one["n_labels"], one["grade_min"], one["grade_max"]) == (4, 0, 2)
    assert one["rating_variance"] == pytest.approx(np.var([1, 2, 2.2, 3]))
    assert spread[pair_id("red shoes", "agreed")]["rating_variance"] == 0.0
    labels = json.loads((tmp_path / "card.json").read_text())["labels"]
    assert labels == {"several": 2, "conflicting": 1, "far_apart": 1}


def test_a_query_is_in_one_split_and_unlabelled_rows_are_the_pools(spark: Any, tmp_path: Path) -> None:
    table = rows(300)
    for row in table:
        number = int(row[1].split()[1])
        row[1] = random.Random(row[0]).choice([row[1], row[1].upper(), f" {row[1]}\u200b"])
        if number % 4 == 0:
            row[4] = ""  # a query without labels
        elif row[0] % 3 == 0:
            row[4] = "NaN"  # one of its ads has none
    file = tmp_path / "a.csv"
    file.write_text(as_csv(table))
    result = prepare(config(file, max_train=20, shares={}), tmp_path, spark)
    found = pairs(tmp_path).values()
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(normalise_key(row["query"]), set()).add(row["split"])
    assert all(len(names) == 1 for names in splits.values())
    unlabelled = [splits[f"query {i}"] for i in range(0, 100, 4) if f"query {i}" in splits]
    assert unlabelled
    assert all(names == {"pool"} for names in unlabelled)
    assert all(row["grade"] is not None for row in found if row["split"] != "pool")
    # One id for each normalised query, however it is spelt.
    assert len({row["query"] for row in found}) > len(splits)
    assert {row["query_id"] for row in found} == {key_id(query) for query in splits}
    assert len({(row["query_id"], normalise_key(row["query"])) for row in found}) == len(splits)
    figures = result.figures
    assert figures["rows_train"] == 20
    assert figures["beyond_limits"] > 0
    assert figures["unlabelled_left_out"] > 0
    assert figures["rows"] + figures["unlabelled_left_out"] + figures["beyond_limits"] == 300


def test_the_literal_example_of_the_docs_leads_to_thresholds(spark: Any, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    example = tomllib.loads(page.partition("```toml\n# shop.toml")[2].partition("```")[0])["data"]
    names = ("query", "ad_title", "ad_text", "grade")
    lines = [";".join(example["columns"][name] for name in names)]
    lines += [f"red shoes {i};shoe {i};text;{1 + i % 9 / 4}" for i in range(90)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    example |= {"path": tmp_path / example["path"]}
    with pytest.raises(ContractError, match=r"for ratings set `data\.grade_thresholds`"):
        prepare(DataConfig.model_validate(example), tmp_path, spark)
    row = next(line for line in page.splitlines() if line.startswith("| ratings"))
    example |= tomllib.loads(next(code for code in row.split("`")[1::2] if "=" in code))
    figures = prepare(DataConfig.model_validate(example | {"shares": ALL_TO_POOL}), tmp_path, spark).figures
    assert (figures["rejected"], figures["rows"]) == (0, 90)


def test_splits_that_doom_later_stages_stop_the_run_after_the_card(spark: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(as_csv([row for row in rows(300) if row[4] < 2]))
    with pytest.raises(
        ContractError, match=r"split valid has 0 relevant and \d+ other labelled pairs and split test"
    ) as caught:
        prepare(config(file, shares={}), tmp_path, spark)
    assert all(remedy in str(caught.value) for remedy in ("data.shares", "data.seed", "card.md"))
    warnings = json.loads((tmp_path / "card.json").read_text())["warnings"]
    assert any(text.startswith("Split valid has 0 relevant") for text in warnings)
    assert "Split valid has 0 relevant" in (tmp_path / "card.md").read_text()
    prepare(config(file, shares={}, relevant_from=1), tmp_path, spark)
