"""Files that are damaged, hostile or simply odd: one sentence, or counted rejects; never a traceback, never a lost row."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.contracts import PAIRS, ContractError, read_table
from data.prepare import prepare
from data.sources import read_source
from data.validation import validated

pytestmark = pytest.mark.spark

GRADES = [{"name": "no", "definition": "It is not."}, {"name": "yes", "definition": "It is."}]
HEAD = "id,q,t,g\n"
LINES = [f"{i},query {i},title {i},{i % 2}\n" for i in range(8)]
OPEN_QUOTE = "a quote was left open: a quoted field holds what look like rows of their own, this line among them"
DAMAGED = "damaged: bytes that are no utf-8 (another `data.encoding`?)"
COLUMNS = "the line has too few or too many columns"


def config(path: Path, **more: Any) -> DataConfig:
    base = {"source": "table", "path": path, "columns": {"query": "q", "ad_title": "t", "grade": "g"}, "grades": GRADES}
    return DataConfig.model_validate(base | {"max_rejected_share": 1.0} | more)


def reasons(spark: Any, config: DataConfig) -> Counter[str | None]:
    """Rows by reason, None for sound ones."""
    frame, scale = read_source(spark, config)
    return Counter(row["reason"] for row in validated(frame, config, scale).collect())


def csv_of(*lines: str) -> bytes:
    return (HEAD + "".join(lines)).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Never closed: all that follows would be one field.
        (csv_of(*LINES[:3], '3,"query 3,title 3,1\n', *LINES[4:]), {None: 3, OPEN_QUOTE: 5}),
        # Closed in a later row, which leaves as many columns as the header has.
        (csv_of(*LINES[:3], '3,query 3,"title 3,1\n4,query 4,title 4",0\n', *LINES[5:]), {None: 6, OPEN_QUOTE: 2}),
        # … or another number of them.
        (
            csv_of(*LINES[:3], '3,"query 3,title 3,1\n', LINES[4], '5,query 5,"x",1\n', *LINES[6:]),
            {None: 5, OPEN_QUOTE: 3},
        ),
        # A quote inside a field opens none, and a real field of several lines stays whole.
        (csv_of('0,5" pipe,6" pipe,1\n', '1,"a ""b"", c\nand d, e\n",t,0\n', *LINES[2:]), {None: 8}),
        (csv_of(*LINES, "1,2\n", "1,2,3,4,5\n", "\n", "   \n"), {None: 8, COLUMNS: 3}),
        (csv_of(*LINES).replace(b"\n", b"\r\n"), {None: 8}),
        (b"\xef\xbb\xbf" + csv_of(*LINES), {None: 8}),
        (csv_of(*LINES[:7]) + "7,café,title,1\n".encode("latin-1"), {None: 7, f"the query is {DAMAGED}": 1}),
        (csv_of(*LINES[:7]) + b"7,query 7,\x80\x81,1\n", {None: 7, f"the ad title is {DAMAGED}": 1}),
        (
            csv_of(*LINES[:7], f"7,query 7,{'x' * 10**6},1\n"),
            {None: 7, "the ad title is longer than 20000 characters": 1},
        ),
        (csv_of(*LINES[:7], "7,que\x00ry 7,title,1\n"), {None: 8}),
        (csv_of(*LINES[:6], "6,q,t,yes\n", "7,q,t,1e400\n"), {None: 6, "the grade is not on the scale 0 … 1": 2}),
        # A name that nobody asks for may be there twice.
        (csv_of(*LINES).replace(b"id,q", b"x,q").replace(b"g\n", b"g,x,x\n", 1), {COLUMNS: 8}),
    ],
)
def test_csv_rows_are_all_there(spark: Any, tmp_path: Path, content: bytes, expected: dict[str | None, int]) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    assert reasons(spark, config(file)) == expected


def test_other_encodings_and_delimiters(spark: Any, tmp_path: Path) -> None:
    for encoding, delimiter in (("latin-1", ";"), ("utf-16", "|"), ("utf-8", "\t")):
        file = tmp_path / f"{encoding}.csv"
        file.write_bytes("q,t,g\ncafé,Crème brûlée,1\n".replace(",", delimiter).encode(encoding))
        frame, scale = read_source(spark, chosen := config(file, encoding=encoding, delimiter=delimiter))
        (row,) = validated(frame, chosen, scale).collect()
        assert (row["query"], row["ad_title"], row["grade"], row["reason"]) == ("café", "Crème brûlée", 1, None)


def test_json_lines_of_mixed_types(spark: Any, tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"q": "a", "t": "b", "g": 1}',
        b'{"q": 12, "t": 1.5, "g": "0"}',
        b'{"q": {"a": 1}, "t": "b", "g": 1}',
        b'{"q": "a", "t": ["b"], "g": 1}',
        b'{"q": "[not json", "t": "{b}", "g": 1}',
        b'{"q": "a", "t": "b", "g": true}',
        b'{"q": "a", "t": "b"',
        b"{q: a}",
        b"[1]",
        '{"q": "café", "t": "b", "g": 1}'.encode("latin-1"),
        b"",
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    assert reasons(spark, config(file)) == {
        None: 3,
        "the query is a list or an object, not text": 1,
        "the ad title is a list or an object, not text": 1,
        "the grade is not on the scale 0 … 1": 1,
        "the line is not a JSON object": 4,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", csv_of(*LINES).replace(b",", b";"), "header holds semicolons; set `data.delimiter`"),
        ("a.tsv", csv_of(*LINES), "header holds commas; set `data.delimiter`"),
        ("a.csv", csv_of(*LINES).replace(b"t,g", b"t,q", 1), "no column 'g'"),
        ("a.csv", b"q,q,t,g\na,b,c,1\n", "more than one column 'q'"),
        ("a.csv", "q,t,g\nx,y,1\n".encode("utf-16"), "set `data.encoding`"),
        ("a.csv", b"", "is empty"),
        ("a.csv", HEAD.encode(), "has no rows"),
        ("a.jsonl", b"", "no JSON object"),
        ("a.csv.gz", csv_of(*LINES), "cannot be read as csv"),
        ("a.parquet", csv_of(*LINES), "cannot be read as parquet"),
        ("a.xlsx", b"PK", "`data.format`"),
        ("a.csv", csv_of(*LINES[:2], '3,"' + "x" * 4_100_000), "a field of more than 4000000 characters"),
    ],
)
def test_one_sentence(spark: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ContractError, match=message.replace("(", "[(]")) as caught:
        prepare(config(tmp_path / name), tmp_path, spark)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "_scratch").exists()


def test_a_file_without_a_sound_row_is_all_rejects(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of("1,,title,1\n", '2,"query,title,1\n', "3,query,title,0\n"))
    figures = prepare(config(tmp_path / "a.csv"), tmp_path, spark).figures
    assert (figures["rows_in"], figures["rejected"], figures["rows"], figures["queries"]) == (3, 3, 0, 0)
    lines = {row["detail"] for row in pq.read_table(tmp_path / "rejected").to_pylist()}
    assert {'2,"query,title,1', "3,query,title,0"} <= lines


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_truncated_gzip(spark: Any, tmp_path: Path, name: str) -> None:
    records = [{"q": f"query {i}", "t": f"title {hash(str(i))}", "g": i % 2} for i in range(3000)]
    lines = [json.dumps(r) if "jsonl" in name else ",".join(map(str, r.values())) for r in records]
    whole = gzip.compress("\n".join(["q,t,g", *lines] if "csv" in name else lines).encode())
    (tmp_path / name).write_bytes(whole[:-2000])
    with pytest.raises(ContractError, match=name):
        prepare(config(tmp_path / name), tmp_path, spark)


def test_parquet_files_that_do_not_agree(spark: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ContractError, match="holds no file"):
        read_source(spark, config(folder))
    pq.write_table(pa.table({"q": ["a"], "t": ["b"], "g": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"q": ["c"], "t": ["d"], "g": [[1]]}), folder / "b.parquet")
    with pytest.raises(ContractError, match="cannot be read to its end"):
        prepare(config(folder), tmp_path, spark)
    (folder / "c.csv").write_text("x")
    with pytest.raises(ContractError, match="mixes files"):
        read_source(spark, config(folder))


def test_a_hostile_path_and_hostile_text(spark: Any, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "folder"; $(touch x) `y` %20 #1 [a-z]{b,c}* é'
    folder.mkdir()
    texts = [
        "'; DROP TABLE pairs; --",
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "$(rm -rf /)",
        "\u202eevil",
        "👨‍👩‍👧 ❤️",
    ]
    table = pa.table({"q": texts, "t": texts[::-1], "g": [0, 1] * 3})
    pq.write_table(table, folder / 'it\'s "a".parquet')
    (tmp_path / "out 'x'").mkdir()
    result = prepare(config(folder), tmp_path / "out 'x'", spark)
    assert (result.figures["rows_in"], result.figures["rows"]) == (6, 6)
    rows = read_table(tmp_path / "out 'x'" / "pairs", PAIRS).to_pylist()
    assert {row["query"] for row in rows} == set(texts)  # the text itself is kept
    assert not Path("x").exists()
