"""The audit: a known sample out, answers back without a loss, and an accuracy whose interval holds the truth."""

import csv
import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import (
    HUMAN_LABELS_FILE,
    PAIRS,
    ContractError,
    Grade,
    GradeScale,
    read_human_labels,
    read_json,
    write_json,
)
from pipeline.annotated import worst
from pipeline.audit.answers import import_answers, summarise
from pipeline.audit.draw import DRAWN, export, stratified
from pipeline.audit.estimate import accuracy, agreements, allocation
from pipeline.audit.sheet import cell, grade_of, read_answers
from pipeline.report.page import write_report
from pipeline.resume import remember
from pipeline.settings import PipelineConfig
from pipeline.stages import STUDENT
from tests.pipeline.audit.conftest import KEY, SCALE, annotations, read


def test_an_export_that_was_killed_and_a_copy_are_no_draws(
    settings: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(settings.folder, size=5)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.audit.draw.write_label_studio", killed)
        with pytest.raises(KeyboardInterrupt):
            export(settings.folder, size=5)
    shutil.copytree(folder, folder.with_name("draw-1-anna"))
    folder.with_name("draw-7").mkdir()  # of an earlier release, killed
    rows = read(folder / "sheet.csv")
    with (tmp_path / "back.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"grade": "2"} for row in rows)
    assert import_answers(settings.folder, [tmp_path / "back.csv"], settings, "ann").new == len(rows)
    assert [draw.name for draw in summarise(settings.folder)] == ["draw-1"]
    assert export(settings.folder, size=5).name == "draw-8"


def test_a_grade_whose_name_is_another_ones_number_is_asked_for() -> None:
    scale = GradeScale(grades=[Grade(name=n, definition=n) for n in ("1", "2", "3", "four")], relevant_from=1)
    assert [grade_of(text, scale) for text in ("0", "3 four", "1 2", "FOUR")] == [0, 3, 1, 3]
    with pytest.raises(ValueError, match="write '0 1' or '1 2'"):
        grade_of("1", scale)
    with pytest.raises(ValueError, match="none of 0 … 3"):
        grade_of("9", scale)


@pytest.mark.parametrize("what", ["sample", "doubtful"])
def test_pairs_that_measure_the_teacher_are_not_drawn(settings: PipelineConfig, what: Any) -> None:
    path = settings.folder / "pairs" / "pairs" / "part.parquet"
    rows = pq.read_table(path).to_pylist()
    measuring = {row["pair_id"] for row in rows[:120]}
    table = [row | ({"split": "valid"} if row["pair_id"] in measuring else {}) for row in rows]
    pq.write_table(pa.Table.from_pylist(table, schema=PAIRS), path)
    folder = export(settings.folder, what, size=300)
    assert not measuring & set(pq.read_table(folder / DRAWN)["pair_id"].to_pylist())
    if what == "sample":
        assert sum(read_json(folder / "draw.json")["populations"].values()) == 180


def test_the_sample_is_blind_and_its_probabilities_are_known(settings: PipelineConfig) -> None:
    folder = export(settings.folder, size=90)
    draw, drawn, sheet = (
        read_json(folder / "draw.json"),
        pq.read_table(folder / DRAWN).to_pandas(),
        read(folder / "sheet.csv"),
    )
    assert sum(draw["populations"].values()) == 300
    assert [row["id"] for row in sheet] == [f"draw-1/{pair}" for pair in drawn["pair_id"]]
    assert tuple(sheet[0]) == ("id", "query", "ad_title", "ad_text", "attributes", "grade", "note", "rater")
    weight = (1 / drawn["probability"]).groupby(drawn["stratum"]).sum()
    assert weight.to_dict() == pytest.approx(draw["populations"])
    assert drawn["stratum"].nunique() == 6
    assert not any(value.startswith(("=", "+", "-", "@")) for row in sheet for value in row.values())
    assert set(json.loads((folder / "tasks.json").read_text())[0]["data"]) == {
        "id",
        "query",
        "ad_title",
        "ad_text",
        "attributes",
    }
    assert '<Choice value="1 half" hint="half &lt;&amp;&gt;"/>' in (folder / "view.xml").read_text()
    doubtful = read(export(settings.folder, "doubtful", size=20) / "sheet.csv")
    assert len(doubtful) == 20
    assert all(row["why"] and row["reasoning"] == "because" and row["teacher_grade"] for row in doubtful)


def test_a_spreadsheet_comes_back_and_nothing_is_lost(settings: PipelineConfig, tmp_path: Path) -> None:
    folder = export(settings.folder, size=60)
    names = [row["id"] for row in read(folder / "sheet.csv")]
    grades = dict(zip(names, ["2", "1.0", "0,0", "Full", " 1  half "] * 20, strict=False))
    rows = [{"Grade": grades[name], "note": f"{name}; =2\nü", "id": name} for name in reversed(names[:-3])]
    rows += [
        rows[0],
        {**rows[1], "Grade": "0 no" if grades[rows[1]["id"]] != "0,0" else "2"},
        {"id": names[-1], "Grade": ""},
    ]
    rows += [{"id": "draw-1/nowhere", "Grade": "1"}, {"id": "", "Grade": "2"}, {"id": names[-2], "Grade": "maybe"}]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["Grade", "note", "id"], delimiter=";", restval="")
    writer.writeheader()
    writer.writerows(rows)
    back = tmp_path / "back.csv"
    for encoding in ("utf-8-sig", "cp1252", "utf-16"):
        back.write_bytes(text.getvalue().encode(encoding))
        assert [answer.note[-1:] for answer in read_answers(back)][:57] == ["ü"] * 57
    found = import_answers(settings.folder, [back], settings, "anna")
    assert (found.rows, found.new, found.unchanged, found.unanswered, found.missing) == (63, 56, 1, 1, 1)
    assert len(found.refused) == 5
    for reason in ("nowhere", "no id", "'maybe' is none of 0", "different grades"):
        assert any(reason in sentence for sentence in found.refused)
    assert found.rows == found.new + found.changed + found.unchanged + found.unanswered + len(found.refused)
    labels = read_human_labels(settings.folder / "audit" / HUMAN_LABELS_FILE, SCALE).grades
    assert len(labels) == 56
    assert labels[names[1].partition("/")[2]] == [1]
    again = import_answers(settings.folder, [back], settings, "anna")
    assert (again.new, again.changed, again.unchanged) == (0, 0, 57)
    assert len(import_answers(settings.folder, [back], settings).refused) == 62  # nobody knows who answered
    back.write_text("id,note\nx,y\n")
    with pytest.raises(ContractError, match="column 'grade' is missing"):
        import_answers(settings.folder, [back], settings)


def test_label_studio_comes_back_and_raters_are_compared(settings: PipelineConfig, tmp_path: Path) -> None:
    folder = export(settings.folder, size=60)
    teacher = pq.read_table(folder / DRAWN).column("teacher_grade").to_pylist()
    tasks = json.loads((folder / "tasks.json").read_text())
    for number, (task, grade) in enumerate(zip(tasks, teacher, strict=True)):
        given = {"from_name": "grade", "type": "choices", "value": {"choices": [f"{grade} {SCALE.grades[grade].name}"]}}
        annotation = {"completed_by": {"email": "b@x"}, "result": [given], "updated_at": "2026-02-03T04:05:06Z"}
        task["annotations"] = [annotation | {"was_cancelled": number == 0}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = import_answers(settings.folder, [tmp_path / "export.json"], settings)
    assert (found.new, found.unanswered, found.refused) == (len(tasks) - 1, 1, [])
    sheet = tmp_path / "c.csv"
    sheet.write_text(
        "id,grade,rater\n"
        + "".join(f"{task['data']['id']},{(g + 1) % 3},c\n" for task, g in zip(tasks, teacher, strict=True))
    )
    import_answers(settings.folder, [sheet], settings)
    (draw,) = summarise(settings.folder)
    assert draw.answered == len(tasks)
    assert draw.accuracy is not None
    assert draw.accuracy.value == pytest.approx(0.5, abs=0.02)  # b always agrees with the teacher, c never
    assert {(each.a, each.b): each.same for each in draw.agreements} == {
        ("teacher", "b@x"): 1.0, ("teacher", "c"): 0.0, ("b@x", "c"): 0.0,
    }  # fmt: skip
    assert draw.agreements[0].kappa == draw.agreements[0].quadratic_kappa == 1.0
    labels = pq.read_table(settings.folder / "audit" / HUMAN_LABELS_FILE).to_pylist()
    assert {row["labelled_at"] for row in labels if row["rater"] == "b@x"} == {
        datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    }


def test_the_interval_covers_the_truth_as_often_as_it_says(tmp_path: Path) -> None:
    right = annotations(tmp_path / "annotations", 3000)
    truth = np.mean(list(right.values()))
    covered, values = 0, []
    for seed in range(150):
        rows, populations = stratified(tmp_path / "annotations", KEY, 150, seed)
        answers: dict[str, list[float]] = {}
        for row in rows:
            answers.setdefault(row["stratum"], []).append(float(right[row["pair_id"]]))
        found = accuracy(populations, answers)
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
        values.append(found.value)
    assert 0.9 <= covered / 150 <= 0.99
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / 150**0.5)


def test_estimates_by_hand() -> None:
    found = accuracy({"a": 900, "b": 100}, {"a": [1, 1, 1, 0], "b": [0, 1]})
    assert (found.value, found.n, found.covered) == (pytest.approx(0.9 * 0.75 + 0.1 * 0.5), 6, 1.0)
    assert accuracy({"a": 900, "b": 100}, {"a": [1.0]}).covered == 0.9
    assert accuracy({"a": 9}, {}).value is None
    every = accuracy({"a": 4}, {"a": [1, 1, 1, 0]})
    assert every.low == every.value == every.high == 0.75
    assert allocation({"a": 1000, "b": 1000, "c": 5}, {"a": 0.1, "b": 0.3, "c": 0.5}, 100) == {"a": 24, "b": 71, "c": 5}
    (pair,) = agreements({"a": {"x": 0, "y": 1, "z": 2}, "b": {"x": 0, "y": 2, "z": 2}}, {}, 3)
    # observed 2/3, by chance 1/9 + 2/9 (grade 0: 1/3 × 1/3, grade 2: 1/3 × 2/3)
    assert pair.kappa == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    (alike,) = agreements({"a": {"x": 0}, "b": {"x": 0}}, {}, 3)
    assert (alike.same, alike.kappa) == (1.0, None)


def test_the_worst_come_first() -> None:
    # pair, human grade, teacher's grade, agreement
    rows = [
        ("a", 0, 3, 1.0),
        ("b", 2, 2, 0.5),
        ("c", None, 1, 0.25),
        ("d", 2, 1, 0.75),
        ("e", 3, 3, 1.0),
        ("f", None, 0, 1.0),
    ]
    names = ("pair_id", "human_grade", "teacher_grade", "agreement")
    tables = [
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in part]) for part in (rows[:3], rows[3:])
    ]

    def ids(limit: int = 9, **how: Any) -> list[str]:
        return [row["pair_id"] for row in worst(tables, limit, **how)]

    assert ids() == ["a", "d", "c", "b"]
    assert ids(limit=2) == ["a", "d"]
    assert ids(what="disagreements") == ["a", "d"]
    assert ids(what="low-agreement") == ["c", "b"]
    assert [row["why"] for row in worst(tables, 9)] == ["teacher and human differ"] * 2 + ["samples disagree"] * 2


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@A1", " =1", "\t=1", "\x00=1", "\u200b=1", "＝1", "\r\n=1", "−=1"])
def test_what_begins_like_a_formula_is_text(text: str) -> None:
    assert cell(text)[0] in "'−"
    assert not set("\t\r\n\x00\u200b") & set(cell(text))


def test_ordinary_text_stays() -> None:
    for text in ("red shoes = 3", "5 - 3", "红色跑鞋 👟", "a@b"):
        assert cell(text) == text


@pytest.mark.e2e
@pytest.mark.spark
def test_answers_reach_the_student_and_the_report(run: PipelineConfig, finished_run: PipelineConfig) -> None:
    from pipeline.report.page import finish_run
    from pipeline.stages import finished_stages

    before = STUDENT.inputs(run)
    folder = export(run.folder, size=30)
    sheet = folder / "sheet.csv"
    answered = [row | {"grade": "3", "note": "<b>", "rater": "<i>eve</i>"} for row in read(sheet)]
    with sheet.open("w", encoding="utf-8", newline="") as file:
        (writer := csv.DictWriter(file, answered[0])).writeheader()
        writer.writerows(answered)
    assert import_answers(run.folder, [sheet], run).new == len(read(sheet))
    assert STUDENT.inputs(run).keys() - before.keys() == {"human_labels"}
    records = list(finished_stages(run.folder).values())
    finish_run(run, "relevance-pipeline", records, [0.0] * len(records))
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "Audit by people" in page
    assert "teacher and &lt;i&gt;eve&lt;/i&gt;" in page
    assert "of earlier annotations" not in page
    assert "has not finished" not in page
    # Another flow annotates anew, and fails before the student.
    manifest = run.folder / "annotations" / "_stage.json"
    record = read_json(manifest)
    figures = record["figures"] | {"annotation_key": "another"}
    write_json(manifest, record | {"key": "anew", "figures": figures})
    remember(run, "relevance-pipeline")
    for file in (run.folder / "annotations").glob("*.parquet"):
        table = pq.read_table(file)
        names = pa.array(["another"] * len(table), pa.string())
        pq.write_table(table.set_column(table.schema.get_field_index("annotation_key"), "annotation_key", names), file)
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "of earlier annotations" in page
    assert "Annotations (made since)" in page
    assert read_json(run.folder / "summary.json")["stages"]["annotate"]["figures"]["annotation_key"] == "another"
