"""A grade means something on its scale alone: a draw and its answers keep theirs, and none is read on another."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.contracts import HUMAN_LABELS_FILE, ContractError, Grade, GradeScale, read_human_labels, read_json
from pipeline.audit.answers import import_answers, summarise
from pipeline.audit.draw import DRAWN, export
from pipeline.settings import PipelineConfig
from pipeline.stages import _human_labels
from tests.pipeline.audit.conftest import SCALE, answered

NAMES = ("no", "half", "full")
OTHERS = {
    "renamed": ("irrelevant", "half", "full"),
    "fewer": ("no", "full"),
    "more": ("no", "half", "full", "exact"),
    "reordered": ("full", "half", "no"),
}


def scale_of(*names: str) -> GradeScale:
    return GradeScale(grades=[Grade(name=name, definition="new words") for name in names], relevant_from=1)


def without_its_scale(draw: Path) -> None:
    """As an earlier release has left it."""
    content = read_json(draw / "draw.json")
    del content["scale"]
    (draw / "draw.json").write_text(json.dumps(content))


def labels_without_their_scale(settings: PipelineConfig) -> Path:
    path = settings.folder / "audit" / HUMAN_LABELS_FILE
    pq.write_table(pq.read_table(path).drop_columns(["scale"]), path)
    return path


@pytest.mark.parametrize("change", OTHERS)
def test_answers_on_a_scale_that_was_changed_since_the_draw_are_refused(settings: PipelineConfig, change: str) -> None:
    draw = export(settings.folder, size=30)
    assert read_json(draw / "draw.json")["scale"] == list(NAMES)
    import_answers(settings.folder, [answered(draw, "1", "bert")], settings)
    path = settings.folder / "audit" / HUMAN_LABELS_FILE
    before = path.read_bytes()
    scale_of(*OTHERS[change]).save(settings.folder / "pairs")
    with pytest.raises(ContractError, match=r"draw-1 .* \(0 no, 1 half, 2 full\).*audit-export") as refused:
        import_answers(settings.folder, [answered(draw, "1")], settings)
    assert f"0 {OTHERS[change][0]}, 1 " in str(refused.value)
    assert path.read_bytes() == before
    labels = read_human_labels(path, scale_of(*OTHERS[change]))
    assert (labels.grades, labels.skipped) == ({}, len(pq.read_table(path)))
    (remark,) = labels.remarks
    assert f"{labels.skipped} human labels are left out" in remark
    assert "(0 no, 1 half, 2 full)" in remark
    assert "audit-export" in remark
    assert _human_labels(settings) == {}
    assert summarise(settings.folder)[0].answered == labels.skipped  # what that draw said of its annotations stands


def test_a_scale_whose_words_alone_have_changed_is_the_same(settings: PipelineConfig) -> None:
    draw = export(settings.folder, size=30)
    scale = scale_of(*NAMES)
    scale.save(settings.folder / "pairs")
    assert import_answers(settings.folder, [answered(draw, "1")], settings).new
    labels = read_human_labels(settings.folder / "audit" / HUMAN_LABELS_FILE, scale)
    assert (labels.skipped, labels.remarks) == (0, ())
    assert set(map(tuple, labels.grades.values())) == {(1,)}


def test_a_pair_that_is_graded_again_counts_by_its_own_scale(settings: PipelineConfig) -> None:
    first = export(settings.folder, size=30)
    import_answers(settings.folder, [answered(first, "2")], settings)
    scale = scale_of(*OTHERS["reordered"])
    scale.save(settings.folder / "pairs")
    second = export(settings.folder, size=30)
    import_answers(settings.folder, [answered(second, "no", rows=10)], settings)
    path = settings.folder / "audit" / HUMAN_LABELS_FILE
    labels, former = read_human_labels(path, scale), read_human_labels(path, SCALE)
    assert list(labels.grades.values()) == [[2]] * 10
    pairs = len(pq.read_table(first / DRAWN))
    assert (labels.skipped, len(former.grades), former.skipped) == (pairs - 10, pairs, 0)
    assert [draw.answered for draw in summarise(settings.folder)] == [pairs, 10]


def test_answers_to_a_draw_of_an_earlier_release(settings: PipelineConfig, caplog: pytest.LogCaptureFixture) -> None:
    draw = export(settings.folder, size=30)
    without_its_scale(draw)
    with caplog.at_level(logging.WARNING):
        assert import_answers(settings.folder, [answered(draw, "2")], settings).new
    (message,) = caplog.messages
    assert "draw-1 does not say its scale" in message
    assert "(0 no, 1 half, 2 full)" in message
    labels = read_human_labels(settings.folder / "audit" / HUMAN_LABELS_FILE, SCALE)
    assert set(map(tuple, labels.grades.values())) == {(2,)}
    (remark,) = labels.remarks
    assert "do not say their scale" in remark
    for names in (OTHERS["fewer"], ("a", "b")):  # an answer, or the teacher's grades, are of more grades
        scale_of(*names).save(settings.folder / "pairs")
        with pytest.raises(ContractError, match=r"draw-1 does not say its scale, and .*audit-export"):
            import_answers(settings.folder, [answered(draw, "full", "bert")], settings)
    (summary,) = summarise(settings.folder)
    assert summary.agreements[0].n == summary.answered == len(labels.grades)


def test_labels_of_an_earlier_release(settings: PipelineConfig) -> None:
    draw = export(settings.folder, size=30)
    import_answers(settings.folder, [answered(draw, "2")], settings)
    path = labels_without_their_scale(settings)
    labels = read_human_labels(path, scale_of(*OTHERS["renamed"]))
    assert (len(labels.grades), labels.skipped) == (len(pq.read_table(path)), 0)
    (remark,) = labels.remarks
    assert "do not say their scale; they are read on that of the pairs (0 irrelevant, 1 half, 2 full)" in remark
    labels = read_human_labels(path, scale_of(*OTHERS["fewer"]))
    assert (labels.grades, labels.skipped) == ({}, len(pq.read_table(path)))
    (remark,) = labels.remarks
    assert "do not say their scale, and grade 2 is not on that of the pairs (0 no, 1 full)" in remark
    assert import_answers(settings.folder, [answered(draw, "2", "bert")], settings).new  # beside them, with its scale
    assert read_human_labels(path, SCALE).skipped == 0


@pytest.mark.parametrize(("what", "model"), [("sample", "teacher"), ("suspects", "student")])
def test_annotations_of_another_scale_than_the_pairs_are_not_drawn(
    settings: PipelineConfig, what: str, model: str
) -> None:
    folder = settings.folder / model / "model"
    folder.mkdir(parents=True)
    scale_of(*OTHERS["reordered"]).save(folder)
    if model == "student":
        manifest = settings.folder / "annotations" / "_stage.json"
        (folder.parent / manifest.name).write_text(manifest.read_text())
    with pytest.raises(ContractError, match=rf"{model}.*another scale \(0 full, .* run relevance-pipeline"):
        export(settings.folder, what)  # type: ignore[arg-type]
    assert not list(settings.folder.glob("audit/draw-*"))
