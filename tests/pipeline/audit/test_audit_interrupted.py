"""A flow or an import that was killed leaves no report and no summary that mix what was with what is."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.contracts import HUMAN_LABELS_FILE, StageOutput, read_json
from flows.audit import audit_import
from pipeline.annotation.config import AnnotateConfig
from pipeline.artifacts import Recipe, run_stage
from pipeline.audit.answers import import_answers, summarise
from pipeline.audit.draw import export
from pipeline.locks import exclusive
from pipeline.report.page import finish_run
from pipeline.resume import remember
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, finished_stages
from tests.pipeline.audit.conftest import KEY, answered


@pytest.fixture
def reported(settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """A run that a flow has finished; its report has the table of the stages and their lineage alone."""
    monkeypatch.setattr("pipeline.report.page._SECTIONS", ())
    make(settings, "data", rows=300)
    records = finished_stages(settings.folder)
    assert list(records) == ["data", "annotate"]
    remember(settings, "annotate")
    finish_run(settings, "annotate", list(records.values()), [1.0, 2.0])
    return settings


def make(settings: PipelineConfig, stage: str, work: Any = None, **figures: Any) -> None:
    """The stage as another flow makes it anew, which does not come to its end."""

    def done(out: Path) -> StageOutput:
        return StageOutput(fingerprint=f"{stage}-{figures}", figures=figures)

    recipe = Recipe(stage, AnnotateConfig(), {"made": str(figures)})
    run_stage(STAGES[stage].path(settings), recipe, work or done, incremental=True, share=False)


def killed(*arguments: Any, **more: Any) -> None:
    raise KeyboardInterrupt


def imported(settings: PipelineConfig, draw: Path, rater: str = "anna") -> str:
    """The report that an import leaves."""
    audit_import(run=settings.run, files=[answered(draw, "1", rater)], folder=settings.runs)
    return (settings.folder / "report.html").read_text(encoding="utf-8")


def assert_agrees(settings: PipelineConfig, page: str) -> None:
    """Report and summary say of the stages what their records say."""
    records, summary = finished_stages(settings.folder), read_json(settings.folder / "summary.json")
    assert list(summary["stages"]) == list(records)
    for name, record in records.items():
        stage = summary["stages"][name]
        assert (stage["figures"], stage["fingerprint"], stage["key"]) == (
            record.figures,
            record.fingerprint,
            record.key,
        )
        assert f"<code>{record.key}</code>" in page


def test_a_report_after_a_flow_that_failed_between_its_stages(reported: PipelineConfig) -> None:
    draw, before = export(reported.folder, size=30), read_json(reported.folder / "summary.json")
    make(reported, "annotate", annotation_key=KEY, pairs=77_777)
    page = imported(reported, draw)
    assert_agrees(reported, page)
    assert "pairs 77,777" in page
    assert before["stages"]["annotate"]["key"] not in page
    assert "A later flow has not finished." in page
    assert "Annotations (made since)" in page
    after = read_json(reported.folder / "summary.json")
    assert after["stages"]["data"] == before["stages"]["data"]
    assert (after["flow"], after["finished_at"]) == (before["flow"], before["finished_at"])
    finish_run(reported, "annotate", list(finished_stages(reported.folder).values()), [0.0, 3.0])
    page = imported(reported, draw)
    assert "has not finished" not in page
    assert_agrees(reported, page)


def test_a_report_after_a_flow_that_was_killed_in_a_stage(reported: PipelineConfig) -> None:
    draw, key = export(reported.folder, size=30), finished_stages(reported.folder)["annotate"].key
    make(reported, "data", rows=200)
    with pytest.raises(KeyboardInterrupt):
        make(reported, "annotate", work=killed)
    page = imported(reported, draw)
    assert_agrees(reported, page)
    assert key not in page
    assert "Pairs (made since)" in page
    assert "Annotations (not finished)" in page


def test_a_report_of_a_run_that_is_as_its_flow_left_it(reported: PipelineConfig) -> None:
    draw, before = export(reported.folder, size=30), (reported.folder / "summary.json").read_bytes()
    page = imported(reported, draw)
    assert_agrees(reported, page)
    assert "has not finished" not in page
    assert (reported.folder / "summary.json").read_bytes() == before


def test_no_report_is_written_while_a_flow_works(
    reported: PipelineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, page = export(reported.folder, size=30), (reported.folder / "report.html").read_text(encoding="utf-8")
    with exclusive(reported.folder):  # it began when the answers were in
        monkeypatch.setattr("pipeline.audit.answers.exclusive", lambda folder: exclusive(folder / "elsewhere"))
        assert imported(reported, draw) == page
    assert "the report is not written" in capsys.readouterr().out
    assert (reported.folder / "audit" / HUMAN_LABELS_FILE).exists()


@pytest.mark.parametrize("step", ["pq.write_table", "write_json", "executing"])
def test_an_import_that_was_killed_leaves_no_summary_of_other_labels(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    audit, draw = settings.folder / "audit", export(settings.folder, size=30)
    import_answers(settings.folder, [answered(draw, "1", "anna", 10)], settings)
    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.audit.answers.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            import_answers(settings.folder, [answered(draw, "1", "bert", 20)], settings)
    if (audit / "audit.json").exists():
        assert read_json(audit / "audit.json")["labels"] == len(pq.read_table(audit / HUMAN_LABELS_FILE))
    import_answers(settings.folder, [answered(draw, "1", "bert", 20)], settings)
    summary = read_json(audit / "audit.json")
    assert (summary["labels"], summary["raters"]) == (30, 2)
    assert [draw["answered"] for draw in summary["draws"]] == [each.answered for each in summarise(settings.folder)]


def test_labels_that_cannot_be_summed_up_are_not_imported(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = export(settings.folder, size=30)

    def fails(*arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr("pipeline.audit.answers.agreements", fails)
    with pytest.raises(ValueError, match="no"):
        import_answers(settings.folder, [answered(draw, "1")], settings)
    assert not (settings.folder / "audit" / HUMAN_LABELS_FILE).exists()
