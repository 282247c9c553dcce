"""Settings of the data stage: what is refused before any work, in words, and what is understood."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig, data_of_preset
from data.contracts import ContractError
from data.sources import input_fingerprint, read_texts, source_label

GRADES = [{"name": "no", "definition": "It is not."}, {"name": "yes", "definition": "It is."}]
TABLE = {"path": "a.csv", "columns": {"query": "q", "ad_title": "t", "grade": "g"}, "grades": GRADES}
LOG = {"path": "x.csv", "columns": {"query": "q", "ad_title": "t"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "table", "path": None}, "needs `path`"),
        (
            {"columns": {"query": "q"}},
            r"a table \(a `path` without `source` means one\) needs `columns` .* for ad_title",
        ),
        ({"columns": {"query": "q", "ad_title": "t", "tittle": "x"}}, "tittle"),
        ({"grades": []}, "needs `grades`"),
        ({"grade_thresholds": (2.0, 3.0)}, "needs 1 numbers for 2 grades"),
        ({"grade_thresholds": (float("nan"),)}, "finite"),
        ({"grades": [*GRADES, *GRADES[:1]], "grade_thresholds": (2.0, 1.0)}, "must rise"),
        ({"grade_thresholds": (1.0,), "grade_labels": {"a": 1}}, "not both"),
        ({"grade_labels": {"a": 3}}, "must map to grades 0 … 1"),
        ({"grade_labels": {"a": 1}, "columns": LOG["columns"]}, "need the column of `grade`"),
        ({"relevant_from": 2}, "below the number of grades, 2"),
        ({"max_train": 0}, "max_train"),
        ({"log": {"path": "x.csv", "columns": {"query": "q"}}}, "needs `columns`"),
        ({"log": LOG | {"head_traffic": 0.8}}, "`head_traffic` must be below"),
        ({"log": LOG, "shares": {"train": 1, "valid": 0, "test": 0, "pool": 0}}, "`shares.pool` must be above 0"),
        ({"delimiter": ";;"}, "one character, or comma, semicolon, tab, pipe"),
        ({"encoding": "klingon"}, "no text encoding 'klingon'"),
        ({"encoding": "base64"}, "no text encoding 'base64'"),
        ({"split_by": "ad"}, "split_by"),
        # What another source would read has no effect on this one.
        (
            {"source": "synthetic"},
            "has no effect on the source 'synthetic'; for a table of yours set `source` to 'table'",
        ),
        ({"source": "home_depot"}, "`columns` has no effect on the source 'home_depot'"),
        ({"path": None}, "`columns` has no effect on the source 'synthetic'"),
        ({"rows": 500}, "`rows` has no effect on the source 'table'"),
        ({"locale": "es"}, "`locale` has no effect on the source 'table'"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(TABLE | change)


@pytest.mark.parametrize("source", ["wands", "esci", "crowdflower"])
def test_a_set_that_has_no_usual_place_needs_a_path(source: str) -> None:
    with pytest.raises(ValidationError, match="path"):
        DataConfig.model_validate({"source": source})


def test_a_path_without_a_source_means_a_table() -> None:
    config = DataConfig.model_validate(TABLE)
    assert (config.source_name, source_label(config)) == ("table", "table a.csv")
    assert DataConfig().source_name == "synthetic"
    assert source_label(DataConfig(rows=500)) == "synthetic (made up, 500 rows)"
    assert source_label(DataConfig.model_validate(TABLE | {"log": LOG})) == "table a.csv, log x.csv"
    # A dump of the settings is read again as the same ones.
    assert DataConfig.model_validate(config.model_dump()) == config
    # Runs of an older version have its default of `rows` on record.
    assert DataConfig.model_validate(TABLE | {"source": "table", "rows": 20_000}).source_name == "table"


def test_a_preset_names_the_source_only_where_none_is_described() -> None:
    preset = {"source": "home_depot", "max_train": 5}
    assert data_of_preset(preset, {"columns": LOG["columns"], "path": "a.csv"}) == {"max_train": 5}
    assert data_of_preset(preset, {"seed": 1, "path": "train.csv"}) == preset
    assert data_of_preset(preset, {"columns": {}, "source": "table"}) == preset


def test_a_column_is_missed_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,t,g\n")
    table = TABLE | {"path": tmp_path / "a.csv", "columns": {"query": "q", "ad_title": "titel"}}
    with pytest.raises(ContractError, match=r"has no column 'titel' for our 'ad_title'"):
        input_fingerprint(DataConfig.model_validate(table))
    log = LOG | {"path": tmp_path / "a.csv", "columns": {"query": "q", "ad_title": "t", "frequency": "n"}}
    with pytest.raises(ContractError, match=r"has no column 'n' for our 'frequency'"):
        input_fingerprint(DataConfig.model_validate({"log": log}))


@pytest.mark.parametrize(
    ("content", "log", "fault"),
    [
        ("q;t\n", {}, r"set `data\.log\.delimiter` to 'semicolon'"),
        ("red shoes,a shoe\n", {}, r"none of the columns of `data\.log\.columns`.* in `data\.log\.header` if not"),
        ("q,t\n", {"columns": {"query": "q", "ad_title": "x"}}, r"check `data\.log\.columns`"),
        (None, {}, r"check `data\.log\.path`"),
        ("[1", {"format": "parquet"}, r"check the file or `data\.log\.format`"),
        ("q,t\n\x00\xff", {"format": "json"}, r"holds no JSON object"),
    ],
)
def test_a_fault_in_the_log_names_the_settings_of_the_log(
    tmp_path: Path, content: str | None, log: dict[str, Any], fault: str
) -> None:
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    given = LOG | {"path": tmp_path / "log.csv", "columns": {"query": "q", "ad_title": "t"}} | log
    with pytest.raises(ContractError, match=fault):
        input_fingerprint(DataConfig.model_validate({"log": given}))


def test_a_log_without_a_header_names_its_columns(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('red shoes;"a shoe\n')
    columns = {"query": "q", "ad_title": "t"}
    log = {"path": tmp_path / "log.csv", "columns": columns, "header": ["q", "t"], "delimiter": ";", "quotes": False}
    assert input_fingerprint(DataConfig.model_validate({"log": log}))


@pytest.mark.parametrize("name", ["path", "texts"])
def test_the_home_of_somebody_unknown_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValidationError, match="write the whole path"):
        DataConfig.model_validate(TABLE | {name: "~nobody-of-that-name/a.csv"})


def test_a_file_without_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n  \n")
    with pytest.raises(ContractError, match="has no text; leave the setting out"):
        list(read_texts(DataConfig(texts=tmp_path / "texts.txt")))


def test_a_file_of_texts_is_missed_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no file .*texts\.txt; check `data\.texts`"):
        input_fingerprint(DataConfig(texts=tmp_path / "texts.txt"))


@pytest.mark.parametrize("given", [{"path": "a.csv"}, {"columns": LOG["columns"]}, {"source": "home_depot"}])
def test_what_a_preset_says_of_the_made_up_shop_holds_for_no_other_source(given: dict[str, Any]) -> None:
    shop = {"rows": 16000, "shares": {"train": 0.1}}
    assert data_of_preset(shop, given) == {}
    assert data_of_preset(shop, {"seed": 1}) == data_of_preset(shop, {"source": "synthetic"}) == shop


@pytest.mark.parametrize(
    ("name", "character"), [("tab", "\t"), ("Semicolon", ";"), ("pipe", "|"), ("\\t", "\t"), ("~", "~"), (None, None)]
)
def test_delimiters_by_name(name: str | None, character: str | None) -> None:
    assert DataConfig.model_validate(TABLE | {"delimiter": name}).delimiter == character


@pytest.mark.parametrize(
    "name", ["utf-8", "latin-1", "Windows-1252", "x-MacRoman", "x-windows-949", "UTF-16", "gb18030"]
)
def test_encodings_of_python_and_of_java(name: str) -> None:
    assert "é".encode(DataConfig.model_validate(TABLE | {"encoding": name}).encoding, "replace")


def test_a_public_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADS_RELEVANCE_DATA", str(tmp_path))
    with pytest.raises(ContractError, match=rf"{tmp_path} has no qbqtc/train\.jsonl\.gz; set `data\.path`"):
        input_fingerprint(DataConfig(source="qbqtc"))
    monkeypatch.delenv("ADS_RELEVANCE_DATA")
    with pytest.raises(ContractError, match=r"ADS_RELEVANCE_DATA to the folder with home_depot/train\.csv\.gz"):
        input_fingerprint(DataConfig(source="home_depot"))
