"""Files as users bring them, read without Spark: odd ones give their rows or counted faults, unreadable ones a sentence."""

import gzip
import io
import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.contracts import ContractError
from data.sources.delimited import Dialect
from data.sources.encodings import propose_encoding
from data.sources.files import open_parts, read_part
from data.sources.paths import list_files

COLUMNS = {"query": "q", "ad_title": "t", "grade": "g"}
HEAD = b"id,q,t,g\n"
LINES = [f"{i},query {i},title {i},{i % 2}\n".encode() for i in range(8)]
AB = [("a", "b", "1"), ("c", "d", "0")]
OPEN_QUOTE = "a quote was left open: a quoted field holds what look like rows of their own, this line among them"
COLUMN_COUNT = "the line has too few or too many columns"


def read(path: Path, *, columns: dict[str, str] = COLUMNS, format: str = "auto", **how: Any) -> list[tuple[Any, ...]]:
    """The rows of a file or folder, as Spark's workers read them."""
    parts = open_parts(path, format, columns, encoding=how.pop("encoding", "utf-8"), dialect=Dialect(**how))
    names = [*columns, "problem", "detail"]
    batches = [batch for part in pickle.loads(pickle.dumps(parts)) for batch in read_part(part, names)]  # noqa: S301
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def cells(path: Path, **how: Any) -> list[tuple[Any, ...]]:
    rows = read(path, **how)
    assert not any(row[-2] for row in rows), rows
    return [row[:-2] for row in rows]


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Never closed: all that follows would be one field.
        ([*LINES[:3], b'3,"query 3,title 3,1\n', *LINES[4:]], {None: 3, OPEN_QUOTE: 5}),
        # Closed in a later row, which leaves as many columns as the header has.
        ([*LINES[:3], b'3,query 3,"title 3,1\n4,query 4,title 4",0\n', *LINES[5:]], {None: 6, OPEN_QUOTE: 2}),
        # … or another number of them.
        ([*LINES[:3], b'3,"query 3,title 3,1\n', LINES[4], b'5,query 5,"x",1\n', *LINES[6:]], {None: 5, OPEN_QUOTE: 3}),
        # A quote inside a field opens none, and a real field of several lines stays whole.
        ([b'0,5" pipe,6" pipe,1\n', b'1,"a ""b"", c\nand d, e\n",t,0\n', *LINES[2:]], {None: 8}),
        ([*LINES, b"1,2\n", b"1,2,3,4,5\n"], {None: 8, COLUMN_COUNT: 2}),
        # Delimiters at the end of each row but the header.
        ([line.replace(b"\n", b",\n") for line in LINES[:4]] + LINES[4:], {None: 8}),
        # Rows without content are none, however many commas a spreadsheet has written.
        ([*LINES, b"\n", b"   \n", b",,,\n", b" , ,\n", b",,,,,,\n", b'"","",,""\r\n'], {None: 8}),
        # Line ends of several kinds, also where a quoted text has some.
        ([line.replace(b"\n", b"\r\n") for line in LINES[:6]] + LINES[6:], {None: 8}),
        ([LINES[0], b'1,"two\r\nlines",t,1\r\n', b"2,q,t,0\r", *LINES[3:]], {None: 8}),
        # A name that nobody asks for may be there twice.
        ([b"x,x,q,t,g\n", b"1,2,a,b,1\n"], {None: 1}),
    ],
)
def test_every_csv_row_is_there_or_counted(
    tmp_path: Path, content: list[bytes], expected: dict[str | None, int]
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"".join(content) if content[0].startswith(b"x") else HEAD + b"".join(content))
    assert Counter(row[-2] for row in read(file)) == expected
    if OPEN_QUOTE in expected:
        assert "4,query 4,title 4" in {str(row[-1]).rstrip('",0') for row in read(file)}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'q,t,g\nred,"Shoes,1\nblue, Blue shoes,0\ngreen,"Green",1\n', {OPEN_QUOTE: 3}),  # a space in one of the rows
        (b'q, t, g\nred, "Shoes, 1\nblue, Blue, 0\ngreen, "Green", 1\n', {OPEN_QUOTE: 3}),  # in all of them
        (b'q,t,g\nred,"Shoes, two, and\nboots, and hats",1\n', {None: 1}),  # prose
        (b'q, t, g\nred, "Shoes\nand boots", 1\n', {None: 1}),
        (b'q,t\nred,"Shoes, red\nand boots, blue"\n', {None: 1}),
    ],
)
def test_an_open_quote_is_seen_in_rows_with_spaces(
    tmp_path: Path, content: bytes, expected: dict[str | None, int]
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    columns = {"query": "q", "ad_title": "t"} | ({"grade": "g"} if b"g\n" in content[:10] else {})
    assert Counter(row[-2] for row in read(tmp_path / "a.csv", columns=columns)) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", b"\xef\xbb\xbfq,t,g\na,b,1\nc,d,0\n"),
        ("sep.csv", b"sep=;\r\nq;t;g\r\na;b;1\r\nc;d;0\r\n"),
        ("bom_and_sep.csv", b'\xef\xbb\xbf"sep=|"\nq|t|g\na|b|1\nc|d|0\n'),
        ("array.json", b'[{"q":"a","t":"b","g":1},\n {"q":"c","t":"d","g":0}]'),
        ("pretty.json", json.dumps([{"q": "a", "t": "b", "g": 1}, {"q": "c", "t": "d", "g": 0}], indent=2).encode()),
        ("lines.ndjson", b'\n{"q":"a","t":"b","g":1}\n\n{"g":0,"q":"c","t":"d","x":[1]}\n'),
        ("spaces.csv", b'q, t, g\na, "b", 1\nc,d, 0\n'),
        ("padded.csv", b"q ,t ,g\r\na,b,1\r\nc,d,0\r\n"),
        ("packed.csv", gzip.compress(b"q,t,g\na,b,1\nc,d,0\n", mtime=0)),
        ("train.csv.zip", zipped(**{"train.csv": b"q,t,g\na,b,1\nc,d,0\n", "__MACOSX/x": b"", "README.md": b"x"})),
        ("archive.zip", zipped(**{"in/train.tsv": b"q\tt\tg\na\tb\t1\nc\td\t0\n"})),
    ],
)
def test_ways_to_write_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert cells(tmp_path / name) == AB


def test_quotes_after_a_backslash(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(rb"""q,t,g
"a \"quoted\" text","4\" x 8\"",1
c,"C:\dir",0
""")
    assert cells(file) == [('a "quoted" text', '4" x 8"', "1"), ("c", "C:\\dir", "0")]
    file.write_bytes(
        b'q,t,g\n"a","a ""b"" in C:\\",1\nc,"ends in ""\\""",0\n'
    )  # doubled ones, and a backslash at the end
    assert cells(file) == [("a", 'a "b" in C:\\', "1"), ("c", 'ends in "\\"', "0")]


def test_a_file_without_header_and_quotes_that_are_characters(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('a\t"b" c\tx\t1\nd\t"e\tx\t0\n')
    header = ("q", "t", "more", "g")
    assert cells(file, header=header, quotes=False) == [("a", '"b" c', "1"), ("d", '"e', "0")]
    with pytest.raises(ContractError, match=r"`data.header` names 3 columns, and the first row of .* has 4"):
        read(file, header=header[1:])
    with pytest.raises(ContractError, match=r"first line is 'a', 'b c', .*: is it a header.* `data.header`"):
        read(file)


def test_a_folder_of_files_that_are_alike_where_it_matters(tmp_path: Path) -> None:
    for name in ("README", "README.md", "LICENSE.txt", "notes.txt", ".hidden.csv", "_SUCCESS"):
        (tmp_path / name).write_text("not a table")
    (tmp_path / "a.csv").write_text("q,t,g\na,b,1\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"g,more,t,q\n0,x,d,c\n"))
    assert cells(tmp_path) == cells(tmp_path, format="csv") == AB


def test_json_of_mixed_types(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"q": "a", "t": "b", "g": 1}',
        b'{"q": 12, "t": 1.5, "g": "0"}',
        b'{"q": {"a": 1}, "t": "b", "g": 1}',
        b'{"q": "a", "t": ["b"], "g": 1}',
        b'{"q": "[not json", "t": "{b}", "g": 1}',
        b'{"q": "half a pair \\ud83d", "t": "b", "g": true}',
        b'{"q": "a", "t": "b"',
        b"{q: a}",
        b"[1]",
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    rows = read(file)
    assert Counter(row[-2] for row in rows) == {
        None: 4,
        "the query is a list or an object, not text": 1,
        "the ad title is a list or an object, not text": 1,
        "the line is not a JSON object": 3,
    }
    assert rows[1][:3] == ("12", "1.5", "0")
    assert rows[5][2] == "true"


def test_parquet_columns_that_are_not_read_do_not_matter(tmp_path: Path) -> None:
    table = {
        "q": pa.array(["a", "c"]).dictionary_encode(), "t": [b"b", b"d"], "g": [1.0, None], "Q": [1, 2],
        "when": pa.array([1, 2], pa.timestamp("ns")), "took": pa.array([1, 2], pa.duration("ns")), "list": [[1], [2]],
        "half": pa.array([1, 2], pa.float16()), "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "object": [{"k": "1", "n": None}, None],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=1)
    assert cells(tmp_path) == [("a", "b", "1.0"), ("c", "d", None)]
    for name, expected in (("map", '{"k": 1}'), ("object", '{"k": "1", "n": null}')):
        assert cells(tmp_path, columns={"query": "q", "attributes": name})[0] == ("a", expected)
    for name, expected in (("when", "1970-01-01 00:00:00.000000001"), ("half", "1.0"), ("g", "1.0"), ("Q", "1")):
        assert cells(tmp_path, columns={"query": name})[0] == (expected,)
    with pytest.raises(ContractError, match=r"column 'list' for our 'query' is list.*, expected text or a number"):
        read(tmp_path, columns={"query": "list"})
    with pytest.raises(ContractError, match=r"column 'list' for our 'attributes' .* expected a map"):
        read(tmp_path, columns={"query": "q", "attributes": "list"})
    twice = pa.Table.from_arrays([pa.array([text]) for text in "abxx"], ["q", "t", "x", "x"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert cells(tmp_path, columns={"query": "q"}) == [("a",)]
    with pytest.raises(ContractError, match="more than one column 'x'"):
        read(tmp_path, columns={"query": "x"})


CSV = HEAD + b"".join(LINES)
# In both headers of a zip's member the flag that it is encrypted.
ENCRYPTED = (
    zipped(**{"a.csv": CSV})
    .replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1")
    .replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV.replace(b",", b";"), "header holds semicolons; set `data.delimiter` to 'semicolon'"),
        ("a.tsv", CSV, "header holds commas; set `data.delimiter` to 'comma'"),
        ("a.csv", CSV.replace(b"t,g", b"t,q", 1), "more than one column 'q'"),
        ("a.csv", CSV.replace(b"q,t,g", b"q,t,grade", 1), "no column 'g' for our 'grade'"),
        ("a.csv.zip", ENCRYPTED, "cannot be read .*encrypted.*: unpack it"),
        ("a.csv", b"", "is empty"),
        ("a.csv", HEAD + b'3,"' + b"x" * 4_100_000, "begins in line 2 has a field of more than 4000000 characters"),
        ("a.jsonl", b"", "no JSON object"),
        ("a.json", b'[{"q": "a"},\n{"q"', "cannot be read as json"),
        ("a.jsonl", CSV, "no JSON object"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:-9], "cannot be read as csv"),
        ("a.parquet", CSV, "cannot be read as parquet"),
        ("a.xlsx", b"PK", "is a spreadsheet: save the sheet as CSV"),
        ("a.csv", zipped(**{"[Content_Types].xml": b"", "xl/workbook.xml": b""}), "is a spreadsheet"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet"),
        ("a.zip", zipped(**{"a.csv": CSV, "b.csv": CSV}), "holds 2 files: unpack it"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "is packed: unpack it"),
        ("a.feather", b"ARROW1", "save the table as Parquet or CSV"),
        ("labels", CSV, "does not tell its format; set `data.format`"),
        ("a.csv", "q,t,Größe\nx,y,1\n".encode("cp1252"), r"looks like windows-1252 \('Größe'\); set `data.encoding`"),
        ("a.csv", CSV.decode().encode("utf-16"), "looks like utf-16; set `data.encoding`"),
        ("a.jsonl", b'{"q": 1}'.decode().encode("utf-16-le"), "looks like utf-16-le, so set `data.encoding`"),
    ],
)
def test_one_sentence_with_the_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ContractError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_other_programs_hide_in_a_folder_is_no_data(tmp_path: Path) -> None:
    folder = tmp_path / ".all" / "labels"  # what lies above is the user's
    for name in ("labels.csv", "more/labels.csv", ".ipynb_checkpoints/labels-checkpoint.csv", "_temporary/0/part.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CSV)
    assert list_files(folder) == [folder / "labels.csv", folder / "more" / "labels.csv"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/a.csv", "read from this machine only, so copy it here"),
        ("here/https://host/a.csv", "read from this machine only"),
        ("*.csv", "name the folder"),
        ("lables.csv", r"that folder has labels\.csv"),
        ("no/labels.csv", "nor a folder"),
    ],
)
def test_what_is_no_file_here(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "labels.csv").write_bytes(CSV)
    with pytest.raises(ContractError, match=f"there is no file .*{message}.*; check `data.path`"):
        list_files(tmp_path / path)


@pytest.mark.parametrize(
    ("text", "encoding", "proposed"),
    [
        ("café crème “à la carte” – 5 €", "cp1252", "windows-1252"),
        ("Schlüssel für Türen", "cp1252", "windows-1252"),
        ("świeca zapachowa żółta, łóżko dębowe", "cp1250", "cp1250"),
        ("красные туфли на каблуке", "cp1251", "cp1251"),
        ("赤い靴、ランニングシューズ", "shift_jis", "cp932"),
        ("小孩感冒过后久咳嗽该吃什么药", "gb18030", "gb18030"),
        ("réfrigérateur américain", "mac_roman", "mac_roman"),
        ("réfrigérateur américain", "cp850", "cp850"),
        ("red shoes", "utf-16", "utf-16"),
    ],
)
def test_encodings_are_read_by_name_and_proposed(tmp_path: Path, text: str, encoding: str, proposed: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(f"q;t;g\n{text};b;1\n".encode(encoding))
    chosen = DataConfig.model_validate(
        {"path": file, "columns": {"query": "q", "ad_title": "t"}, "grades": [{"name": "n", "definition": "d"}] * 2}
        | {"encoding": proposed, "delimiter": "semicolon"}
    )
    assert cells(file, delimiter=chosen.delimiter, encoding=chosen.encoding) == [(text, "b", "1")]
    assert propose_encoding(file).startswith(f"it looks like {proposed}")
    file.write_text(text, encoding="utf-8")
    assert propose_encoding(file) == ""
