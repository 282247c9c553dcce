"""The report shows what is there, says what is not, and never lets an ad's text become markup."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.schema import ANNOTATIONS, PAIRS, ContractError, Grade, GradeScale
from pipeline.artifacts import StageOutput, run_stage
from pipeline.plots import Line, line_chart, ticks
from pipeline.report import write_report
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import STAGES, stage_config
from pipeline.summary import finish_run, number, reproduce_command, stage_rows, summarise

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
SCALE = GradeScale(
    grades=(Grade(name="bad<b>", definition="no"), Grade(name="good", definition="yes")), relevant_from=1
)


def interval(value: float | None) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if value is None else value - 0.05,
        "high": None if value is None else value + 0.05,
    }


def fill(settings: PipelineConfig, stages: tuple[str, ...]) -> list:
    makers = {"data": _data, "teacher": _teacher, "annotate": _annotations, "student": _student}
    records = []
    for name in stages:
        records.append(
            run_stage(
                settings.folder / STAGES[name].folder,
                stage=name,
                config=stage_config(settings, name),
                inputs={"upstream": "1234abcd"},
                code=["data.schema"],
                work=makers.get(name, lambda out: StageOutput(fingerprint="f", figures={"fp32_max_abs_dp": 1e-6})),
            )
        )
    return records


def _data(out: Path) -> StageOutput:
    figures = {"rows_in": 100, "rejected": 3, "duplicates": 7, "rows": 90, "rows_train": 40, "rows_pool": 50}
    card = figures | {
        "grades_by_split": {"train": {"0 bad": 10, "1 good": 30}, "pool": {}},
        "rejected_by_reason": {f"query {HOSTILE}": 3},
    }
    (out / "card.json").write_text(json.dumps(card))
    SCALE.save(out)
    rows = [
        {"pair_id": f"p{i:02}", "query": f"q{i} {HOSTILE}", "ad_title": f"ad {HOSTILE}", "ad_text": HOSTILE,
         "attributes": None, "grade": i % 2, "grade_raw": None, "split": "pool", "source": "table"}
        for i in range(40)
    ]  # fmt: skip
    (out / "pairs").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), out / "pairs" / "a.parquet")
    return StageOutput(fingerprint="d", figures=figures)


def _teacher(out: Path) -> StageOutput:
    lines: list[dict[str, Any]] = [{"step": i, "phase": "warm_start", "loss": 3.0 / (i + 1)} for i in range(5)]
    lines += [
        {"step": i, "phase": "agpo", "accuracy": 0.4, "parse_rate": 1.0, "reward": -0.2, "entropy": 0.5,
         "groups/all_right": 0.2, "groups/mixed": 0.5, "groups/all_wrong": 0.3}
        for i in range(900)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 900, "pha'  # cut off by a kill
    (out / "metrics.jsonl").write_text(text)
    (out / "evaluation.json").write_text(json.dumps({"base": {"accuracy": 0.25, "pass@1": 0.25, "pass@2": 0.4}}))
    return StageOutput(fingerprint="t", figures={"base/accuracy": 0.25})


def _annotations(out: Path) -> StageOutput:
    rows = [
        {"pair_id": f"p{i:02}", "annotation_key": key, "grade": 1, "grade_probs": [0.2, 0.8],
         "reasoning": f"{key} because {HOSTILE}", "votes": [1], "agreement": 0.75, "n_samples": 1, "n_unparsed": 0,
         "status": "ok", "error": "", "prompt_tokens": 1, "completion_tokens": 1,
         "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
        for i in range(40) for key in ("old", "current")
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), out / "a.parquet")
    return StageOutput(fingerprint="a", figures={"annotation_key": "current", "ok_share": 1.0})


def _student(out: Path) -> StageOutput:
    metrics = {"roc_auc": interval(0.9), "pr_auc": interval(None)}
    evaluation = {
        "n": 50, "n_queries": 9, "confusion": [[5, 1], [2, 42]], "ece_before_calibration": 0.11,
        "systems": [
            {"name": "student", "n": 50, "metrics": metrics},
            {"name": "bm25", "n": 50, "metrics": {"roc_auc": interval(0.6)}},
        ],
        "slices": [{"name": "source: table", "n": 50, "n_relevant": 20, "metrics": metrics}],
        "comparisons": [
            {"a": "student", "b": "bm25", "metric": "roc_auc", "n": 50, "difference": 0.3, "low": 0.2, "high": 0.4},
        ],
    }  # fmt: skip
    curves = {
        "student": {
            "roc": [{"fpr": 0.0, "tpr": 0.0}, {"fpr": 0.2, "tpr": 0.9}, {"fpr": 1.0, "tpr": 1.0}],
            "pr": [{"recall": 0.0, "precision": 1.0}, {"recall": 1.0, "precision": 0.5}],
            "reliability": [{"predicted": 0.2, "relevant": 0.25, "n": 10}],
        },
        "bm25": {"roc": [{"fpr": 0.0, "tpr": 0.0}, {"fpr": 1.0, "tpr": 1.0}], "pr": [], "reliability": []},
    }
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    (out / "curves.json").write_text(json.dumps(curves))
    (out / "model").mkdir(exist_ok=True)
    SCALE.save(out / "model")
    return StageOutput(fingerprint="s", figures={"test_roc_auc": 0.9})


class Page(HTMLParser):
    """Collects what a browser would: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "circle", "polyline"):
            self.open.remove(tag)
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false", "teacher.seed=3"])


def test_a_whole_run(settings: PipelineConfig) -> None:
    records = fill(settings, ("data", "teacher", "annotate", "student", "export"))
    summary = finish_run(settings, "relevance-pipeline", records, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert summary["seconds"] == 15.0
    assert json.loads((settings.folder / "summary.json").read_text())["stages"]["teacher"]["seconds"] == 2.0
    html = Path(summary["report"]).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "Left out" not in page.text
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert "img" not in names
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert HOSTILE in page.text  # shown as text
    assert "current because" in page.text
    assert "old because" not in page.text
    assert names.count("svg") >= 9
    assert page.text.count("teacher: ") == 20 + 20  # examples, and those for a second look
    assert (
        page.text.count("human: 0 bad<b>") == 10 + 20
    )  # half of the examples are disagreements, and all of the others
    assert "--set teacher.seed=3" in page.text
    assert "0.900" in page.text
    assert "0.850 – 0.950" in page.text


def test_nothing_is_fetched(settings: PipelineConfig) -> None:
    fill(settings, ("data", "student"))
    finish_run(settings, "data-prepare", [], [])
    html = (settings.folder / "report.html").read_text(encoding="utf-8")
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert attribute.startswith("data:")
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_missing_parts_are_said(settings: PipelineConfig) -> None:
    records = fill(settings, ("data",))
    (settings.folder / "pairs" / "card.json").write_text("{")
    summary = finish_run(settings, "data-prepare", records, [1.0])
    text = Page(Path(summary["report"]).read_text(encoding="utf-8")).text
    assert text.count("Left out") == 7
    assert "metrics.jsonl is not there yet" in text
    assert "cannot be read" in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no summary\.json"):
        write_report(tmp_path)


def test_summary_keeps_stages_of_earlier_flows_apart(settings: PipelineConfig) -> None:
    records = fill(settings, ("data", "teacher"))
    summary = summarise(settings, "data-prepare", records[:1], [2.5])
    assert list(summary["stages"]) == ["data", "teacher"]
    assert not summary["stages"]["teacher"]["in_flow"]
    assert [row[:3] for row in stage_rows(summary)] == [("data", "done", "2.5")]


def test_the_command_makes_the_same_settings(settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    from flows.cli import run_app

    wanted = load_preset(
        "cpu-real",
        ["run=mine", "data.max_pool=none", "annotate.engine.kind=openai", 'annotate.engine.urls=["http://a:1/v1"]',
         "spark.extra.spark.a.b=x y", "teacher.prompt.guideline=It's \"so\"", "tracking.log_weights=true"],
    )  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr("flows.cli._run", lambda name, given: seen.append((name, given)))
    command = reproduce_command(wanted, "student-export")
    run_app(shlex.split(command)[2:], result_action="return_value")
    assert seen == [("student-export", wanted)]


def test_no_secret_in_summary_or_report(settings: PipelineConfig) -> None:
    secret = load_preset(
        "sample",
        [f"runs={settings.runs}", "tracking.enabled=false", "spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2"],
    )
    finish_run(secret, "data-prepare", fill(secret, ("data",)), [1.0])
    for name in ("summary.json", "report.html"):
        assert "hunter2" not in (secret.folder / name).read_text(encoding="utf-8")


def test_charts_leave_out_what_is_no_number() -> None:
    nan = float("nan")
    svg = str(line_chart([Line("a<b>", [0, 1, 2], [0.5, nan, 0.7])], "x", "y"))
    assert "nan" not in svg
    assert "a&lt;b&gt;" in svg
    assert str(line_chart([Line("a", [0.0], [nan])], "x", "y")) == ""
    assert "<circle" in str(line_chart([Line("a", [3.0], [0.5])], "x", "y"))


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 900, [0, 200, 400, 600, 800])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_numbers_are_readable() -> None:
    assert [number(v) for v in (74067, 0.123456, 1e-6, "x", True)] == ["74,067", "0.1235", "1e-06", "x", "True"]
