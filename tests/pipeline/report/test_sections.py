"""What the sections work out, checked against values worked out by hand."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.report.sections.annotation import agreement, cost, examples, failures
from pipeline.report.sections.student import evaluation_table, forest, student_section
from pipeline.report.sections.teacher import teacher_section
from pipeline.report.text import interval
from pipeline.settings import PipelineConfig
from pipeline.stages import finished_stages


def row(i: int, teacher: int, human: int | None, agreed: float = 1.0) -> dict[str, Any]:
    return {"pair_id": f"p{i:02}", "teacher_grade": teacher, "human_grade": human, "agreement": agreed}


def test_agreement_by_level_and_grade() -> None:
    rows = [row(1, 1, 1), row(2, 1, 0), row(3, 1, None), row(4, 0, 0, 0.5), row(5, 1, 0, 2 / 3)]
    found = agreement(pd.DataFrame(rows), 3)
    assert found["levels"] == [(1.0, 3, 0.5), (0.667, 1, 0.0), (0.5, 1, 1.0)]
    assert found["by_teacher"][0] == (1, 0.5, 1.0)
    assert found["by_teacher"][1] == (4, pytest.approx(11 / 12), pytest.approx(1 / 3))
    assert found["by_teacher"][2][0] == 0
    assert found["confusion"] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert (found["n"], found["judged"], found["same"]) == (5, 4, 0.5)
    without = agreement(pd.DataFrame([row(1, 1, None)]), 2)
    assert (without["judged"], without["confusion"]) == (0, [[0, 0], [0, 0]])
    assert math.isnan(without["same"])
    assert agreement(pd.DataFrame([row(1, 1, 1)])[:0], 2)["n"] == 0


def test_cost_in_engine_seconds() -> None:
    metrics = {"pairs": 40, "n_new": 20, "pairs_per_s": 4.0, "prompt_tokens": 400, "completion_tokens": 1600}
    # 20 new pairs at 4 a second, on two engines; (400 + 1600) / 40 tokens for each of 4 pairs a second
    assert cost(metrics, 2) == {"total": 10.0, "per_1000": 500.0, "tokens_per_s": 200.0}
    assert cost(metrics | {"n_new": 0, "pairs_per_s": 0.0}, 2) == {}


@pytest.mark.parametrize(
    ("same", "differing", "shown"),
    [(40, 40, (15, 15)), (40, 3, (3, 27)), (2, 40, (28, 2)), (0, 40, (30,)), (1, 0, (1,))],
)
def test_thirty_examples_half_of_them_differing(same: int, differing: int, shown: tuple[int, ...]) -> None:
    rows = [row(i, 1, 1) for i in range(same)] + [row(i, 1, 0) for i in range(differing)] + [row(99, 1, None)]
    groups = examples(rows)
    assert tuple(len(part) for _, part in groups) == shown
    assert groups[0][0] == ("Teacher and human differ" if differing else "Teacher and human agree")


def test_examples_without_human_grades() -> None:
    ((title, rows),) = examples([row(i, 1, None) for i in range(50)])
    assert (title, len(rows)) == ("Without a human grade", 30)
    assert examples([]) == []


def test_a_forest_has_one_axis_for_all_rows() -> None:
    plot = forest([("a", 5, {"value": 0.5, "low": 0.4, "high": 0.6}), ("b", 5, None)], reference=0.0)
    assert plot["axis"] == (0.0, 0.6)
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"


@pytest.mark.spark
def test_the_sections_of_a_real_run(run: PipelineConfig) -> None:
    record = finished_stages(run.folder)["annotate"]
    key, failed = record.figures["annotation_key"], record.figures["failed"]
    ((reason, count),) = failures(run.folder / "annotations", run.folder / "pairs", key)
    assert (reason.count("refused #: <"), count) == (1, failed)
    assert failures(run.folder / "annotations", run.folder / "pairs", "another") == []
    teacher = teacher_section(run.folder / "teacher", finished_stages(run.folder)["teacher"])
    assert [title for title, _ in teacher["charts"]] == [
        "Rollouts: accuracy and parse rate", "Groups: all right, mixed, all wrong", "Validation",
    ]  # fmt: skip
    assert {"Reward", "Advantage mass", "Entropy", "Completion length", "Warm start"} <= {t for t, _ in teacher["more"]}
    assert "warm start" in teacher["pass_at_k"]
    student, *others = evaluation_table(run.folder / "student")
    assert student["system"] == "student"
    assert {"human labels alone", "BM25"} <= {other["system"] for other in others}
    assert student["ROC-AUC"].startswith(f"{finished_stages(run.folder)['student'].figures['test_roc_auc']:.3f} (")


@pytest.mark.spark
@pytest.mark.parametrize("kept", [["student"], []])
def test_a_training_without_a_logged_loss_has_no_curve_of_it(
    run: PipelineConfig, tmp_path: Path, kept: list[str]
) -> None:
    record = finished_stages(run.folder)["student"]
    for name in ("student", "pairs"):
        shutil.copytree(run.folder / name, tmp_path / name)
    log = tmp_path / "student" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "loss" not in line or line["phase"] in kept]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = student_section(tmp_path / "student", record)["training"]
    assert ("student" in drawn, "human labels alone" in drawn) == (bool(kept), False)
