"""The audit export: the right rows, worst first, as text that no spreadsheet runs."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.report import audit
from pipeline.report.audit import COLUMNS, cell, worst
from pipeline.settings import PipelineConfig

# pair, human grade, teacher's grade, agreement
ROWS = [
    ("a", 0, 3, 1.0),
    ("b", 2, 2, 0.5),
    ("c", None, 1, 0.25),
    ("d", 2, 1, 0.75),
    ("e", 3, 3, 1.0),
    ("f", None, 0, 1.0),
]
NAMES = ("pair_id", "human_grade", "teacher_grade", "agreement")
TABLES = [pa.Table.from_pylist([dict(zip(NAMES, row, strict=True)) for row in part]) for part in (ROWS[:3], ROWS[3:])]


def ids(**how: Any) -> list[str]:
    return [row["pair_id"] for row in worst(TABLES, **{"limit": 9} | how)]


def test_the_worst_come_first() -> None:
    assert ids() == ["a", "d", "c", "b"]
    assert ids(limit=2) == ["a", "d"]
    assert ids(what="disagreements") == ["a", "d"]
    assert ids(what="low-agreement") == ["c", "b"]
    assert ids(what="low-agreement", low=0.3) == ["c"]
    assert [row["why"] for row in worst(TABLES, 9)] == ["teacher and human differ"] * 2 + ["samples disagree"] * 2


@pytest.mark.spark
def test_a_spreadsheet_finds_no_formula(
    run: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "audit.csv"
    monkeypatch.setattr("sys.argv", ["audit", str(run.folder), str(out)])
    audit.main()
    with out.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert capsys.readouterr().out == f"{len(rows)} pairs in {out}\n"
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) > 20
    for row in rows:
        assert row["ad_title"].startswith("'=HYPERLINK(")
        assert row["reasoning"].startswith("'@SUM(1) because <script>")
        assert row["teacher_grade"] in row["votes"].split()
        assert row["human_grade"] != row["teacher_grade"] or float(row["agreement"]) <= 0.6
        assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for value in row.values())
    monkeypatch.setattr("sys.argv", ["audit", str(run.folder), str(out), "--key", "0123456789abcdef"])
    audit.main()  # rows of another key are not mixed in
    assert capsys.readouterr().out == f"0 pairs in {out}\n"


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@A1", " =1", "\t=1", "\x00=1", "\u200b=1", "＝1", "\r\n=1", "−=1"])
def test_what_begins_like_a_formula_is_text(text: str) -> None:
    assert cell(text)[0] in "'−"
    assert not set("\t\r\n\x00\u200b") & set(cell(text))


def test_ordinary_text_stays() -> None:
    for text in ("red shoes = 3", "5 - 3", "红色跑鞋 👟", "a@b"):
        assert cell(text) == text


def test_a_run_without_annotations_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["audit", str(tmp_path), str(tmp_path / "x.csv")])
    with pytest.raises(SystemExit) as ended:
        audit.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()
