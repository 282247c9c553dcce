"""Drift: what is recorded is read with the limits of today, and what an earlier release recorded is not misread."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from data.contracts import read_json, write_json
from pipeline import drift, drift_profile
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.drift import Check, DriftConfig, Measure
from pipeline.report.summary import summarise
from pipeline.resume import recorded_limits, remember
from pipeline.settings import PipelineConfig, apply_overrides, load_preset
from pipeline.stages import STAGES
from tests.pipeline.test_drift_ads import KEY, annotate, queries, write

LIMITS = DriftConfig()


def check(psi: float, key: str = "", **more: Any) -> Check:
    measure = Measure(name="common words in queries", expected="5.0%", found="20.0%", psi=psi)
    about: dict[str, Any] = {"against": "teacher", "at": datetime.now(UTC), "pairs": 400, "queries": 300, "known": 900}
    return Check(**about | {"annotation_key": key, "measures": [measure]} | more)


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


@pytest.mark.parametrize(
    ("limits", "level"), [({}, "stop"), ({"stop": 0.9}, "look"), ({"stop": 0.9, "look": 0.8}, "fine")]
)
def test_a_student_is_judged_by_the_limits_with_which_it_is_read(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], level: str
) -> None:
    """The stage that trained it ran with other limits, and with more checks than those of its annotations."""
    monkeypatch.setattr("pipeline.stages._base", lambda *_: None)
    monkeypatch.setattr("student.distill.distill", lambda *_: StageOutput(fingerprint="s", figures={}))
    annotations = settings.folder / "annotations"
    checks = [check(0.01, KEY), check(0.6, KEY), check(2.0, "another-key")]
    work = lambda out: StageOutput(fingerprint="a", figures={"annotation_key": KEY})  # noqa: E731
    run_stage(annotations, Recipe("annotate", settings.annotate, {}), work)
    drift.save(annotations, checks)
    student = settings.folder / "student"
    student.mkdir()
    trained = apply_overrides(settings, ["drift.stop=5", "drift.look=4"])
    STAGES["student"].work(trained, {"data": settings.folder / "pairs", "annotate": annotations}, student)
    found, sentence = drift.verdict_of_student(student, DriftConfig(**limits))
    assert found == level
    assert sentence == ("" if level == "fine" else checks[1].sentence())


def test_a_student_of_an_earlier_release_keeps_its_verdict_and_one_without_checks_is_fine(tmp_path: Path) -> None:
    assert drift.verdict_of_student(tmp_path, LIMITS) == ("fine", "")
    write_json(tmp_path / drift.STUDENT_FILE, {"level": "stop", "sentence": "common words (PSI 0.60)"})
    assert drift.verdict_of_student(tmp_path, LIMITS) == ("stop", "common words (PSI 0.60)")


@pytest.mark.parametrize(
    ("limits", "level"), [((), "look"), (("drift.look=0.3",), "fine"), (("drift.stop=0.2",), "stop")]
)
def test_a_summary_and_so_the_report_has_the_level_by_the_limits_of_today(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch, limits: tuple[str, ...], level: str
) -> None:
    """Though the stage is reused, whose figures have the level of then."""

    def prepare(settings: PipelineConfig, folders: Any, out: Path) -> StageOutput:
        drift.save(out, [check(0.2)])
        return StageOutput(fingerprint="d", figures={"rows": 3} | drift.figures([check(0.2)], settings.drift))

    monkeypatch.setitem(STAGES, "data", replace(STAGES["data"], work=prepare, reads_besides=lambda settings: {}))
    assert STAGES["data"].run(settings).figures["drift"] == "look"
    changed = apply_overrides(settings, limits)
    record = STAGES["data"].run(changed)
    assert record.reused
    figures = summarise(changed, "data-prepare", [record], [0.0])["stages"]["data"]["figures"]
    assert figures == {"rows": 3, "drift": level, "drift_psi": 0.2}


def test_the_limits_of_a_run_are_those_that_it_was_last_started_with(settings: PipelineConfig) -> None:
    assert recorded_limits(settings.folder) == LIMITS
    for stop in (0.5, 0.9):
        remember(apply_overrides(settings, [f"drift.stop={stop}"]), "relevance-pipeline")
        assert recorded_limits(settings.folder).stop == stop


def test_measures_of_ads_by_an_earlier_release_are_left_out(tmp_path: Path) -> None:
    ads = Measure(name="common words in ads", expected="5.0%", found="50.0%", psi=0.9)
    old = check(0.2)
    old.measures.append(ads)
    recorded = old.model_dump(mode="json", exclude={"version", "reason"})
    unjudged = recorded | {"measures": [], "known": 40}
    write_json(tmp_path / drift.FILE, {"checks": [recorded, unjudged]})
    first, second = drift.load(tmp_path)
    assert (first.level(LIMITS), first.worst.name) == ("look", "common words in queries")
    assert second.not_judged() == "the teacher learned from 40 queries only"
    drift.save(tmp_path, [*drift.load(tmp_path), old])  # today's stay, beside those
    assert [each.level(LIMITS) for each in drift.load(tmp_path) if each.measures] == ["look", "stop"]


def as_an_earlier_release(profile: Path) -> None:
    """That of version 1 counted the words of all ads of a query."""
    known = read_json(profile)
    del known["version"]
    known["words"]["ad"] = {f"w{i}": known["queries"] for i in range(40)}
    profile.write_text(json.dumps(known))


@pytest.mark.parametrize("labelled", ["same", "other"])
def test_a_profile_of_an_earlier_release_is_counted_again_or_refused(
    settings: PipelineConfig, labelled: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, pairs, pool = settings.folder, settings.folder / "pairs", queries(400, 2, "pool", 1)
    figures = {"fingerprint_labelled": labelled}
    run_stage(pairs, Recipe("data", settings.data, {}), lambda out: StageOutput(fingerprint="d", figures=figures))
    write(run, queries(600, 4, "train", 0), pool)

    def train(out: Path) -> StageOutput:
        drift_profile.remember(pairs, out)
        return StageOutput(fingerprint="t", figures={})

    run_stage(run / "teacher", Recipe("teacher", settings.teacher, {"data": "same"}), train)
    as_an_earlier_release(run / "teacher" / drift_profile.FILE)
    (of_pairs,) = drift.check_pairs(LIMITS, run, pairs, labelled)
    annotate(run, "a", pool, lambda row: 1)
    (of_annotations,) = drift.check_annotations(LIMITS, run, run / "annotations", KEY)
    if labelled == "same":
        assert [(each.known, each.level(LIMITS)) for each in (of_pairs, of_annotations)] == [(600, "fine")] * 2
        return
    assert of_pairs.measures == []
    reason = of_pairs.not_judged()
    assert "counts words as another release did" in reason
    assert "its next training writes it anew" in reason
    assert drift.figures([of_pairs], LIMITS) == {"drift_not_judged": reason}
    assert reason in caplog.text
    assert of_annotations.level(LIMITS) == "fine"  # against split train as it is now
