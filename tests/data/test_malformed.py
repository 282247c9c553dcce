"""Damaged and hostile tables through the whole stage: counted rejects with a remedy, or one sentence; never a lost row."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.contracts import PAIRS, ContractError, read_table
from data.prepare import prepare
from data.sources import read_source

pytestmark = pytest.mark.spark

GRADES = [{"name": "no", "definition": "It is not."}, {"name": "yes", "definition": "It is."}]
ALL_TO_TRAIN = {"train": 1, "valid": 0, "test": 0, "pool": 0}


def config(path: Path, **more: Any) -> DataConfig:
    base = {"path": path, "columns": {"query": "q", "ad_title": "t", "grade": "g"}, "grades": GRADES}
    return DataConfig.model_validate(base | {"max_rejected_share": 1.0, "shares": ALL_TO_TRAIN} | more)


def test_a_wrong_encoding_is_found_out(spark: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = [f"red shoes {i},title {i},1" for i in range(30)] + ["café,crème “brûlée”,0", "müsli,title,1"]
    file.write_bytes("\n".join(["q,t,g", *rows]).encode("cp1252"))
    with pytest.raises(ContractError, match=r"2 of 32 .* looks like windows-1252 \('café'\), so set `data.encoding`"):
        prepare(config(file, max_rejected_share=0.05), tmp_path, spark)
    # Read as latin-1 nothing is rejected, but the quotes have become control characters.
    prepare(config(file, encoding="latin-1"), tmp_path, spark)
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["rejected"], card["text_signs"]["c1_controls"]) == (0, 1)
    assert any("1 pairs hold control characters" in text for text in card["warnings"])
    assert "control characters" in (tmp_path / "card.md").read_text()
    prepare(config(file, encoding="Windows-1252"), tmp_path, spark)
    assert {"café", "müsli"} <= set(read_table(tmp_path / "pairs", PAIRS)["query"].to_pylist())
    card = json.loads((tmp_path / "card.json").read_text())
    assert not any("pairs hold" in text for text in card["warnings"])


def test_texts_that_went_wrong_before_are_pointed_out(spark: Any, tmp_path: Path) -> None:
    rows = [
        {"q": "cafÃ©", "t": "a", "g": 1},
        {"q": "b", "t": 'say \\"hi\\"', "g": 0},
        {"q": "c", "t": "salt &amp; pepper", "g": 1},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(config(tmp_path / "a.jsonl"), tmp_path, spark)
    warnings = " ".join(json.loads((tmp_path / "card.json").read_text())["warnings"])
    assert all(
        sign in warnings for sign in ("1 pairs hold letters such as Ã©", "quotes after a backslash", "data.html")
    )


def test_a_file_without_a_sound_row_is_all_rejects(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "id,q,t,g\n" + "1,,title,1\n" + '2,"query,title,1\n' + "3,query,title,0\n" + f"4,q,{'x' * 10**6},1\n"
    )
    nothing = {"train": 0, "valid": 0, "test": 0, "pool": 1}
    figures = prepare(config(tmp_path / "a.csv", shares=nothing), tmp_path, spark).figures
    assert (figures["rows_in"], figures["rejected"], figures["rows"], figures["queries"]) == (4, 4, 0, 0)
    lines = {row["detail"] for row in pq.read_table(tmp_path / "rejected").to_pylist()}
    assert {'2,"query,title,1', "3,query,title,0"} <= lines


@pytest.mark.parametrize("depth", [500, 5_000, 19_000])
def test_a_cell_nested_deeper_than_python_follows_is_a_rejected_row(spark: Any, tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / "a.csv").write_text(f"q,t,g,a\nred,title,1,{{}}\nblue,title,1,{deep}\n")
    (tmp_path / "b.jsonl").write_text(
        '{"q": "red", "t": "title", "g": 1, "a": {}}\n' + f'{{"q": "blue", "t": "title", "g": 1, "a": {deep}}}\n'
    )
    columns = {"query": "q", "ad_title": "t", "grade": "g", "attributes": "a"}
    for name in ("a.csv", "b.jsonl"):
        figures = prepare(config(tmp_path / name, columns=columns), tmp_path / name[0], spark).figures
        assert (figures["rows_in"], figures["rejected"], figures["rows"]) == (2, 1, 1)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_what_only_the_workers_find_is_one_sentence(spark: Any, tmp_path: Path, name: str) -> None:
    records = [{"q": f"query {i}", "t": f"title {hash(str(i))}", "g": i % 2} for i in range(30_000)]
    lines = [json.dumps(r) if "jsonl" in name else ",".join(map(str, r.values())) for r in records]
    whole = gzip.compress("\n".join(["q,t,g", *lines] if "csv" in name else lines).encode())
    (tmp_path / name).write_bytes(whole[:-2000])
    with pytest.raises(
        ContractError, match=rf"^{tmp_path}/{name} cannot be read as \w+: Compressed file ended"
    ) as caught:
        prepare(config(tmp_path / name), tmp_path, spark)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "_scratch").exists()


def test_files_that_do_not_agree(spark: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ContractError, match="holds no file"):
        read_source(spark, config(folder))
    pq.write_table(pa.table({"q": ["a"], "t": ["b"], "g": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"q": ["c"], "t": ["d"], "g": [[1]]}), folder / "b.parquet")
    with pytest.raises(ContractError, match=r"b\.parquet: column 'g' for our 'grade' is list"):
        read_source(spark, config(folder))
    with pytest.raises(ContractError, match="`delimiter` has no effect"):
        read_source(spark, config(folder / "a.parquet", delimiter=";"))
    (folder / "c.csv").write_text("x")
    with pytest.raises(ContractError, match="mixes files"):
        read_source(spark, config(folder))
    (folder / "d.csv").write_text("q,t,g\n")
    with pytest.raises(ContractError, match=r"the source has no rows: table .*d\.csv"):
        prepare(config(folder / "d.csv"), tmp_path, spark)


def test_a_hostile_path_and_hostile_text(spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / 'it\'s a "folder"; $(touch x) `y` %20 #1 [a-z]{b,c}* é'
    folder.mkdir()
    texts = [
        "'; DROP TABLE pairs; --",
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "$(rm -rf /)",
        "\u202eevil",
        "nul \x00",
        "👨‍👩‍👧 ❤️",
    ]
    table = pa.table({"q": texts, "t": texts[::-1], "g": [0, 1, 0, 1, 0, 1, 1]})
    pq.write_table(table, folder / 'it\'s "a".parquet')
    (tmp_path / "out 'x'").mkdir()
    with caplog.at_level(logging.INFO):
        result = prepare(config(folder), tmp_path / "out 'x'", spark)
    assert (result.figures["rows_in"], result.figures["rows"]) == (7, 7)
    rows = read_table(tmp_path / "out 'x'" / "pairs", PAIRS).to_pylist()
    assert {row["query"] for row in rows} == set(texts)  # the text itself is kept
    assert not Path("x").exists()
    assert "\x00" not in caplog.text
