"""One row after the other, without Spark: labels, attributes, faults in their order, ids."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.config import DataConfig
from data.sources.labels import Labels, json_attributes, named_values, number
from data.sources.public import public_set
from data.sources.table import table_source
from data.text import key_id, normalise_key, pair_id
from data.validation import CELLS, RowChecks

GRADES = [{"name": name, "definition": "d"} for name in ("no", "so", "yes")]
COLUMNS = {"query": "q", "ad_title": "t", "grade": "g"}


def config(**more: Any) -> DataConfig:
    return DataConfig.model_validate({"path": Path("a.csv"), "columns": COLUMNS, "grades": GRADES} | more)


def check(cells: dict[str, str | None], settings: DataConfig | None = None, **more: Any) -> dict[str, Any]:
    settings = settings or config()
    checks = RowChecks(table_source(settings).model_copy(update=more), settings)
    batch = pa.RecordBatch.from_pylist([{"query": "q", "ad_title": "t"} | cells], schema=CELLS)
    (checked,) = checks([batch])
    return checked.to_pylist()[0]


@pytest.mark.parametrize(
    ("cells", "reason", "detail"),
    [
        ({"query": "\x00\u200b"}, "the query is empty or has no visible character", None),
        ({"query": None}, "the query is empty or has no visible character", None),
        ({"ad_title": "\x07"}, "the ad title is empty or has no visible character", None),
        ({"ad_title": "t" * 20_001}, "the ad title is longer than 20000 characters", None),
        ({"ad_text": "x" * 20_001}, "the ad text is longer than 20000 characters", None),
        ({"rationale": "x" * 20_001}, "the rationale is longer than 20000 characters", None),
        ({"attributes": '{"a": "%s"}' % ("x" * 20_000)}, "the attributes are longer than 20000 characters", None),
        ({"query": "caf\ufffd"}, "the query is damaged: bytes that are no utf-8 (another `data.encoding`?)", None),
        ({"attributes": "{oops"}, "the attributes are not a JSON object", "{oops"),
        ({"attributes": "[1]"}, "the attributes are not a JSON object", "[1]"),
        ({"frequency": "?"}, "the frequency is not a number above 0 and below 1e15", "?"),
        ({"frequency": "0"}, "the frequency is not a number above 0 and below 1e15", "0"),
        ({"problem": "no row", "detail": "the line", "grade": "9"}, "no row", "the line"),
        # The first check that fails gives the reason.
        ({"grade": "9", "attributes": "[]", "ad_title": ""},
         "the grade is not on the scale 0 … 2: for ratings set `data.grade_thresholds`, for words `data.grade_labels`, "
         "and for what means that there is no label `data.missing_labels`", "9"),
    ],
)  # fmt: skip
def test_faults(cells: dict[str, str | None], reason: str, detail: str | None) -> None:
    row = check(cells)
    assert (row["reason"], row["detail"], row["pair_id"]) == (reason, detail, None)


def test_half_a_character_in_attributes_is_a_question_mark() -> None:
    row = check({"attributes": '{"name": "cut off \\ud83d", "\\udc00": ["\\ud83d"]}'})
    assert row["reason"] is None
    assert dict(row["attributes"]) == {"name": "cut off ?", "?": '["?"]'}


def test_a_sound_row_has_ids_and_what_it_holds() -> None:
    cells = {
        "query": " Red\x00 SHOES",
        "ad_text": " \u200b",
        "grade": " 1 ",
        "rationale": " ",
        "attributes": '{"z": 1, "a": "x"}',
    }
    row = check(cells)
    assert row["reason"] is None
    assert (row["query"], row["ad_text"], row["rationale"]) == (cells["query"], None, None)  # the text itself is kept
    assert (row["query_id"], row["pair_id"]) == (key_id(normalise_key("red shoes")), pair_id("red shoes", "t"))
    assert (row["grade"], row["grade_raw"]) == (1, 1.0)
    assert (row["attributes"], row["attributes_json"]) == ([("a", "x"), ("z", "1")], '{"a":"x","z":"1"}')
    near = check({"query": "shoe, red"})
    assert near["query_id"] != row["query_id"]
    assert (near["near_query"], near["split"]) == (row["near_query"], row["split"])
    log = check({"frequency": "2.5", "grade": "9"})
    assert (log["reason"], log["frequency"], log["grade"]) == (None, 2.5, None)


def test_html_becomes_text_but_not_in_a_log() -> None:
    cells = {"ad_title": "<b>a</b> &amp; b", "ad_text": "<p>"}
    assert (check(cells, html=True)["ad_title"], check(cells, html=True)["ad_text"]) == ("a & b", None)
    assert check(cells | {"frequency": "1"}, html=True)["ad_title"] == cells["ad_title"] == check(cells)["ad_title"]


MISSING = ["", " ", None, "NA", "n/a", "#N/A", "<NA>", "NaN", "None", "null", "\\N", "-", "--", "?"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"0": (0.0, 0), "2.0": (2.0, 2), "3": None, "1.5": None, "-1": None, "yes": None, "1e400": None, "1_0": None}
         | dict.fromkeys(MISSING, (None, None))),
        ({"grade_thresholds": (1.67, 2.33)}, {"1": (1.0, 0), "1.67": (1.67, 1), "2.33": (2.33, 2), "99": (99.0, 2),
                                               "x": None}),
        ({"grade_labels": {"bad": 0, "None": 1, "good": 2}}, {"bad": (None, 0), " None ": (None, 1), "NONE": None,
                                                            "Good": None, "": (None, None), "null": (None, None)}),
        ({"grade_labels": {"none": 0, "low": 1}}, {"none": (None, 0), "None": None, "NULL": (None, None)}),
        ({"grade_labels": {"null": 0, "n/a": 1}}, {"null": (None, 0), "Null": None, "N/A": None, "-": (None, None)}),
        ({"grade_labels": {"none": 0, "low": 1}, "missing_labels": ["None"]}, {"none": (None, 0), "NONE": (None, None)}),
        ({"missing_labels": ["Unsure"]}, {"unsure": (None, None), "": (None, None), "NA": None, "-": None}),
    ],
)  # fmt: skip
def test_labels_of_a_table(settings: dict[str, Any], expected: dict[str, tuple[Any, Any] | None]) -> None:
    labels = table_source(config(**settings)).labels
    for label, found in expected.items():
        assert labels.read(label) == ((*found, None) if found else (*labels.read(label)[:1], None, labels.fault)), label


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("home_depot", {"1.0": 0, "1.5": 0, "1.67": 1, "2.25": 1, "2.33": 2, "3": 2, "3.5": None, "": None, "x": None}),
        ("crowdflower", {"1": 0, "4": 3, "2.5": None, "5": None, "": None}),
        ("qbqtc", {"0": 0, "2": 2, "3": None, "": None}),
        ("qadsm", {"Bad": 0, "Good": 1, "good": None, "": None}),
        ("wands", {"Irrelevant": 0, "Partial": 1, " Exact": 2, "exact": None, "Maybe": None}),
        ("esci", {"I": 0, "C": 1, "S": 2, "E": 3, "X": None, "": None}),
    ],
)
def test_labels_of_public_sets(name: str, expected: dict[str, int | None]) -> None:
    chosen = public_set(name)
    for label, grade in expected.items():
        assert chosen.labels.read(label)[1:] == (grade, None if grade is not None else chosen.labels.fault)
    assert len(chosen.licence) > 2 < len(chosen.grading)
    raw = Labels(words={"a": 1}, gains={"a": 0.5}, fault="f").read("a")
    assert raw == (0.5, 1, None)


def test_numbers_and_attributes() -> None:
    assert [number(text) for text in ("1", " -.5 ", "1.", "1e3", "٣", "1d", "0x1p3", "inf", "", None)] == [
        1.0, -0.5, 1.0, 1000.0, None, None, None, None, None, None,
    ]  # fmt: skip
    assert json_attributes('{"a": null, "b": 1.5, "c": {"d": [true]}}') == {"b": "1.5", "c": '{"d": [true]}'}
    assert named_values("width:64.7|colour : oak|colour:pine|x|:y|z:") == {"width": "64.7", "colour": "pine"}
