"""Each part of the report holds what its files say, checked against figures worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.contracts import GradeScale
from pipeline.artifacts import StageRecord
from pipeline.report.annotation import agreement, annotation, cost, examples, failures, looked_at
from pipeline.report.head import against, tiles
from pipeline.report.parts import export, funnel, teacher
from pipeline.report.student import evaluation_table, forest, interval_text, student
from pipeline.settings import PipelineConfig

Fill = Callable[[PipelineConfig, tuple[str, ...]], list[StageRecord]]


def row(i: int, teacher: int, human: int | None, agreed: float = 1.0) -> dict[str, Any]:
    return {
        "pair_id": f"p{i:02}", "query": "q", "ad_title": "t", "ad_text": None, "reasoning": "r", "votes": [teacher],
        "teacher_grade": teacher, "human_grade": human, "agreement": agreed,
    }  # fmt: skip


def test_the_funnel_starts_at_all_rows(settings: PipelineConfig, fill: Fill) -> None:
    fill(settings, ("data",))
    found = funnel(settings.folder / "pairs")
    assert found["steps"][:2] == [("rows in the source", 100, 1.0), ("rejected", 3, 0.03)]
    assert found["steps"][-1] == ("… in pool", 50, 0.5)
    assert [table.title for table in found["tables"]] == ["Kept aside", "Grades by split"]


def test_the_teachers_curves(settings: PipelineConfig, fill: Fill) -> None:
    fill(settings, ("teacher",))
    found = teacher(settings.folder / "teacher")
    assert [title for title, _ in found["charts"]] == [
        "Rollouts: accuracy and parse rate",
        "Groups: all right, mixed, all wrong",
    ]
    assert [title for title, _ in found["more"]] == ["Reward", "Entropy", "Warm start"]
    assert "warm start" in found["pass_at_k"]
    assert found["rows"] == ["accuracy", "pass@1", "pass@2"]


def test_cost_in_engine_seconds(settings: PipelineConfig, fill: Fill) -> None:
    (_, record) = fill(settings, ("data", "annotate"))
    record = record.model_copy(update={"config": {"engines": 2, "n": 4, "engine": {"kind": "vllm"}}})
    found = cost(record)
    assert found["engine_seconds"] == 10.0  # 20 new pairs at 4 a second, on two engines
    assert found["engine_seconds_per_1000"] == 500.0
    assert found["tokens_per_s"] == 200.0  # (400 + 1600) / 40 for each of 4 pairs a second
    assert (found["prompt_tokens_per_pair"], found["completion_tokens_per_pair"]) == (10.0, 40.0)
    nothing_new = record.model_copy(update={"figures": record.figures | {"n_new": 0, "pairs_per_s": 0.0}})
    assert "engine_seconds" not in cost(nothing_new)


def test_failures_are_counted_by_reason(settings: PipelineConfig, fill: Fill, hostile: str) -> None:
    (_, record) = fill(settings, ("data", "annotate"))
    reason = f"too long: # {hostile}".replace("1", "#").replace("7", "#")
    assert failures(settings.folder / "annotations", "current") == [(reason, 2)]
    assert failures(settings.folder / "annotations", "old") == []
    rows = looked_at(settings.folder / "annotations", settings.folder / "pairs", "current")
    found = annotation(settings.folder / "annotations", settings.folder / "pairs", record, rows)
    assert found["failures"] == [(reason, 2)]
    assert found["quality"] == {"n_graded": 38.0, "accuracy": 0.5}


def test_agreement_by_level_and_grade(scale: GradeScale) -> None:
    rows = [row(1, 1, 1), row(2, 1, 0), row(3, 1, None), row(4, 0, 0, 0.5), row(5, 1, 0, 2 / 3)]
    found = agreement(rows, scale)
    assert found["levels"] == [(1.0, 3, 0.6, 0.5), (0.667, 1, 0.2, 0.0), (0.5, 1, 0.2, 1.0)]
    bad, good = found["grades"]
    assert bad == ("0 bad<b>", 1, 0.2, 3, 0.75, 0.5, 1.0)
    assert good == ("1 good", 4, 0.8, 1, 0.25, pytest.approx(11 / 12), 1 / 3)
    assert found["confusion"] == [[1, 2], [0, 1]]
    assert (found["n"], found["judged"], found["same"]) == (5, 4, 0.5)
    assert agreement([row(1, 1, None)], scale)["confusion"] == []


@pytest.mark.parametrize(
    ("same", "differing", "shown"),
    [(40, 40, (15, 15)), (40, 3, (3, 27)), (2, 40, (28, 2)), (0, 40, (30,)), (1, 0, (1,))],
)
def test_thirty_examples_half_of_them_differing(
    same: int, differing: int, shown: tuple[int, ...], scale: GradeScale, tmp_path: Path
) -> None:
    scale.save(tmp_path)
    rows = [row(i, 1, 1) for i in range(same)] + [row(i, 1, 0) for i in range(differing)] + [row(99, 1, None)]
    groups = examples(rows, tmp_path)["groups"]
    assert tuple(len(part) for _, part in groups) == shown
    assert groups[0][0] == ("Teacher and human differ" if differing else "Teacher and human agree")


def test_examples_without_human_grades(scale: GradeScale, tmp_path: Path) -> None:
    scale.save(tmp_path)
    ((title, rows),) = examples([row(i, 1, None) for i in range(50)], tmp_path)["groups"]
    assert (title, len(rows)) == ("Without a human grade", 30)
    assert examples([], tmp_path) == {}


def test_the_students_part(settings: PipelineConfig, fill: Fill, hostile: str) -> None:
    fill(settings, ("student",))
    found = student(settings.folder / "student")
    assert [name for name, *_ in found["forest"]["rows"]] == ["student", "BM25"]
    assert [(name, text) for name, _, text, _ in found["comparisons"][0]["rows"]] == [
        ("BM25", "0.300 (0.200 to 0.400)")
    ]
    assert [plot["metric"] for plot in found["slice_forests"]] == ["ROC-AUC", "F1"]
    drawn = found["slice_forests"][0]["rows"]
    assert [(name, n, text) for name, n, text, _ in drawn] == [
        (f"source: {hostile}", 50, "0.900 (0.850 to 0.950)"),
        ("query words: 1–2", 3, "–"),
    ]
    assert [title for title, _ in found["charts"]] == [
        "ROC",
        "Precision and recall",
        "Reliability (a larger mark: more pairs)",
    ]
    assert 'r="8.0"' in found["charts"][2][1]
    assert 'r="4.0"' in found["charts"][2][1]  # a quarter of the pairs


def test_the_evaluation_as_a_table_of_text(settings: PipelineConfig, fill: Fill) -> None:
    fill(settings, ("student",))
    first, second = evaluation_table(settings.folder / "student")
    assert first == {
        "system": "student", "pairs": "50", "ROC-AUC": "0.900 (0.850 to 0.950)", "PR-AUC": "–",
        "F1": "0.800 (0.750 to 0.850)",
    }  # fmt: skip
    assert (second["system"], second["F1"]) == ("BM25", "–")


def test_a_forest_has_one_axis_for_all_rows() -> None:
    plot = forest([("a", 5, {"value": 0.5, "low": 0.4, "high": 0.6}), ("b", 5, None)], reference=0.0)
    assert [n for _, n, *_ in plot["rows"]] == [None, None]  # equal numbers are not worth repeating
    assert "0.6<" in plot["scale"]
    assert interval_text({"value": 0.5, "low": None, "high": None}) == "0.500"


def test_the_export_beside_the_student(settings: PipelineConfig, fill: Fill) -> None:
    fill(settings, ("export",))
    found = export(settings.folder / "export")
    assert list(found["forms"]) == ["torch", "fp32", "int8"]
    assert found["losses"] == {"fp32": 0.0, "int8": pytest.approx(0.0025)}


def test_tiles_say_how_the_run_came_out(settings: PipelineConfig, fill: Fill) -> None:
    stages = ("data", "teacher", "annotate", "student", "export")
    records = dict(zip(stages, fill(settings, stages), strict=True))
    found = {tile.section: tile for tile in tiles(records, settings.folder / "student")}
    assert found["student"].value == "0.900"
    assert found["student"].notes == [
        "95 % interval 0.850 to 0.950",
        "BM25 0.600: student above (+0.300, 0.200 to 0.400)",
    ]
    assert found["teacher"].value == "0.250 → 0.500"
    assert found["teacher"].notes == ["warm start → after AGPO, on valid", "pass@1 0.250 → 0.450"]
    assert found["annotation"].value == "40"
    assert found["annotation"].notes[-1] == "250.0 engine-seconds per 1,000 pairs"
    assert (found["export"].value, found["export"].notes[0]) == ("1.25 MB", "ROC-AUC lost 0.00250")
    assert tiles({}, settings.folder) == []
    (settings.folder / "student" / "evaluation.json").unlink()
    assert tiles(records, settings.folder / "student")[0].notes[-1] == "BM25 0.600"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "student above"), (-0.3, -0.1, "student below"), (-0.1, 0.3, "not told apart"), (0.0, 0.3, "not told apart"),
     (None, None, "difference")],
)  # fmt: skip
def test_a_difference_is_called_one_only_if_its_interval_is_clear_of_zero(
    low: float | None, high: float | None, said: str
) -> None:
    assert against({"low": low, "high": high, "difference": 0.2}).startswith(said)


def test_a_damaged_evaluation_keeps_the_other_tiles(settings: PipelineConfig, fill: Fill) -> None:
    records = dict(zip(("teacher", "student"), fill(settings, ("teacher", "student")), strict=True))
    (settings.folder / "student" / "evaluation.json").write_text(json.dumps({"n": 1})[:-1])
    assert [tile.section for tile in tiles(records, settings.folder / "student")] == ["student", "teacher"]
