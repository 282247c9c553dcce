"""The report shows every stage that has run, refuses damaged files, and never lets an ad's text become markup."""

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.contracts import ContractError
from pipeline.report.page import TEMPLATES, finish_run, write_report
from pipeline.report.summary import annotations_worth, stage_rows, summarise
from pipeline.report.text import number
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, finished_stages

pytestmark = pytest.mark.spark


class Page(HTMLParser):
    """Collects what a browser would: tags with their attributes, and the text of the page and of its sections."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []  # type: ignore[var-annotated]
        self.sections: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if section := dict(attrs).get("id") if tag == "section" else None:
            self.sections[section] = ""
        elif ("class", "tiles") in attrs:
            self.sections["tiles"] = ""
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))  # of SVG, which closes itself

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.sections:
            self.sections[list(self.sections)[-1]] += data


def finish(settings: PipelineConfig) -> dict[str, Any]:
    records = list(finished_stages(settings.folder).values())
    return finish_run(settings, "relevance-pipeline", records, [float(i + 1) for i in range(len(records))])


def written(settings: PipelineConfig) -> Page:
    return Page(Path(finish(settings)["report"]).read_text(encoding="utf-8"))


def keep_only(run: PipelineConfig, *stages: str) -> None:
    """Make the other stages such as have not completed: their sections need not be made."""
    for name in set(STAGES) - set(stages):
        (run.folder / STAGES[name].folder / "_stage.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def page(finished_run: PipelineConfig) -> Page:
    """The page of the whole run."""
    return written(finished_run)


@pytest.fixture(scope="module")
def metrics(finished_run: PipelineConfig) -> dict[str, dict[str, Any]]:
    return {name: record.figures for name, record in finished_stages(finished_run.folder).items()}


def test_every_section_shows_its_stages_metrics(page: Page, metrics: dict[str, dict[str, Any]], hostile: str) -> None:
    data, teacher, annotated, student, export = metrics.values()
    assert page.open == []
    assert "Left out" not in page.text
    expected = {
        "pairs": [f"{data['rows']:,}", "Grades by split", "Leakage between splits"],
        "teacher": [number(teacher["agpo/completion_tokens"]), number(teacher["test/completion_tokens"])],
        "annotation": [f"{annotated['failed']} failed", number(annotated["auc"]), "refused #: <"],
        "student": [f"{student['test_roc_auc']:.3f}", f"{student['bm25_roc_auc']:.3f}", "BM25", "0:precision=0.95"],
        "export": [f"{export['int8_megabytes']:.2f}", f"{export['int8_auc_loss']:.5f}", "in layers-1"],
        "examples": ["Teacher and human differ: 15 examples", "@SUM(1) because <script>"],
        "second_look": ["20 pairs", "teacher and human differ; samples disagree"],
        "lineage": ["--set teacher.seed=3", "ads-relevance"],
        "tiles": [
            f"Student, ROC-AUC on test{student['test_roc_auc']:.3f}95 % interval {student['test_roc_auc_low']:.3f} to ",
            f"Teacher, accuracy{teacher['warm_start/accuracy']:.3f} → {teacher['agpo/accuracy']:.3f}",
            f"on test {teacher['test/accuracy']:.3f}",
            f"Pairs annotated{annotated['pairs']}{100 * annotated['ok_share']:.1f} % usable",
            f"Export, int8{export['int8_megabytes']:.2f} MBROC-AUC lost {export['int8_auc_loss']:.5f}",
        ],
    }
    assert set(page.sections) == expected.keys()
    for section, texts in expected.items():
        assert [text for text in texts if text not in page.sections[section]] == [], section
    assert [tag for tag, _ in page.tags].count("figure") >= (3 + 5 + 1) + (4 + 1)  # teacher, student
    assert hostile in page.text  # shown as text
    assert "{{ 7 * 7 }}" in page.text


def test_nothing_is_executed_or_fetched(page: Page, finished_run: PipelineConfig) -> None:
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "base", "form", "image"})
    attributes = [(name, value or "") for _, found in page.tags for name, value in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]
    targets = [value for name, value in attributes if name in ("href", "xlink:href")]
    assert {target[0] for target in targets} == {"#"}
    assert {target[1:] for target in targets} <= {value for name, value in attributes if name == "id"}
    policy = next(found["content"] for tag, found in page.tags if "http-equiv" in found)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    styles = [value for name, value in attributes if name in ("style", "clip-path")]
    styles.append((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    assert not [style for style in styles if re.search(r"@import|url\((?!#)|http", style)]
    assert (finished_run.folder / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "student above"), (-0.3, -0.1, "student below"), (0.0, 0.3, "no difference"), (None, None, "not compared")],
)  # fmt: skip
def test_a_difference_is_called_one_only_if_its_interval_is_clear_of_zero(
    low: float | None, high: float | None, verdict: str, run: PipelineConfig
) -> None:
    path = run.folder / "student" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for row in evaluation["comparisons"]:
        row |= {"low": low, "high": high}
    path.write_text(json.dumps(evaluation))
    keep_only(run, "student")
    assert re.search(rf"BM25 0\.\d{{3}}: {verdict}", written(run).sections["tiles"])


def test_only_a_stage_that_has_not_completed_is_left_out(run: PipelineConfig) -> None:
    keep_only(run, "data", "export")
    page = written(run)
    out = {name for name, text in page.sections.items() if "Left out: the stage" in text}
    assert out == {"teacher", "annotation", "student", "examples", "second_look"}
    assert "Left out: the stage Teacher has not completed in this run." in page.sections["teacher"]


def drop(name: str) -> Any:
    def damaged(text: str) -> str:
        values = json.loads(text)
        del values[name]
        return json.dumps(values)

    return damaged


@pytest.mark.parametrize(
    ("stage", "file", "damage", "cause"),
    [
        ("data", "card.json", lambda text: text[:-2], "is damaged"),
        ("data", "card.json", drop("rows_pool"), "rows_pool"),
        ("teacher", "metrics.jsonl", None, "metrics.jsonl is missing"),
        ("teacher", "metrics.jsonl", lambda text: "{\n" + text, "JSONDecodeError"),
        ("teacher", "evaluation.json", drop("agpo"), "agpo"),
        ("annotate", "_stage.json", lambda text: text.replace('"n_new"', '"new"'), "n_new"),
        ("annotate", "*.parquet", lambda text: "PAR1", "too small|Parquet"),
        ("student", "evaluation.json", drop("slices"), "slices"),
        ("student", "evaluation.json", drop("ece_before_calibration"), "ece_before_calibration"),
        ("student", "curves.json", None, "No such file"),
        ("export", "export.json", None, "No such file"),
        ("export", "export.json", drop("batch_tokens"), "batch_tokens"),
    ],
)
def test_damage_is_one_sentence_and_the_run_stays_complete(
    stage: str, file: str, damage: Any, cause: str, run: PipelineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (run.folder / STAGES[stage].folder).glob(file):
        path.write_text(damage(path.read_text(errors="ignore"))) if damage else path.unlink()
    keep_only(run, stage, "data")
    with caplog.at_level(logging.ERROR):
        summary = finish(run)
    assert set(summary["stages"]) == {"data", stage}
    assert "report" not in summary
    (message,) = caplog.messages
    assert re.match(r"the report of run 'tiny' is not written: its section '\w+' cannot be made from ", message)
    assert re.search(cause, message)
    assert message.endswith("; run the stage again")
    assert "\n" not in message
    with pytest.raises(ContractError, match="cannot be made from"):
        write_report(run.folder)


def test_what_could_not_be_tracked_is_a_warning(run: PipelineConfig, hostile: str) -> None:
    keep_only(run, "data")
    assert "Not in the tracking server" not in written(run).text
    file = run.folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"untracked": {"data": f"refused {hostile}"}}))
    assert f"data: refused {hostile}" in Page(write_report(run.folder).read_text(encoding="utf-8")).text


def test_a_student_below_what_costs_no_label_and_drift_are_in_the_head(run: PipelineConfig) -> None:
    keep_only(run, "data", "student")
    finish(run)
    summary = json.loads((run.folder / "summary.json").read_text())
    summary["stages"]["student"]["figures"] = {"test_f1": 0.5, "below_floor": "the cosine is above it"}
    summary["stages"]["data"]["figures"]["drift"] = "look"
    (run.folder / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report(run.folder).read_text(encoding="utf-8")).text
    head = text.partition("Stages")[0]
    assert "Do not deploy this student. the cosine is above it." in head
    assert "Pairs: look. New pairs are unlike those" in head
    (_, *_, line) = stage_rows(summary)[-1]
    assert line == "below_floor the cosine is above it · test_f1 0.5"


def test_the_summary_keeps_stages_of_earlier_flows_apart(run: PipelineConfig) -> None:
    records = finished_stages(run.folder)
    summary = summarise(run, "data-prepare", [records["data"]], [2.5])
    assert list(summary["stages"]) == list(records)
    assert not summary["stages"]["teacher"]["in_flow"]
    assert [row[:3] for row in stage_rows(summary)] == [("data", "done", "2.5")]


def test_what_annotations_add_is_said_in_words(run: PipelineConfig) -> None:
    place = run.folder / "student" / "evaluation.json"
    evaluation = json.loads(place.read_text())
    row = {
        "a": "student",
        "b": "gold_only",
        "metric": "roc_auc",
        "n": 9,
        "difference": 0.02,
        "low": 0.001,
        "high": 0.04,
    }
    for low, high, said in (
        (0.001, 0.04, "they help"),
        (-0.1, 0.1, "no difference is shown"),
        (-0.2, -0.1, "they harm"),
    ):
        place.write_text(json.dumps(evaluation | {"comparisons": [row | {"low": low, "high": high}]}))
        summary = summarise(run, "student-distill", [finished_stages(run.folder)["student"]], [1.0])
        assert summary["annotations"].startswith("+0.0200 ROC-AUC over human labels alone")
        assert summary["annotations"].endswith(said)
    place.write_text(json.dumps(evaluation | {"comparisons": []}))
    assert annotations_worth(run.folder) == ""


def test_no_secret_in_summary_or_report(run: PipelineConfig) -> None:
    keep_only(run, "data")
    extra = {"spark.hadoop.fs.s3a.secret.key": "hunter2"}
    finish(run.model_copy(update={"spark": run.spark.model_copy(update={"extra": extra})}))
    for name in ("summary.json", "report.html"):
        assert "hunter2" not in (run.folder / name).read_text(encoding="utf-8")
