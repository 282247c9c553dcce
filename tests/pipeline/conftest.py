"""A small run whose every text is hostile: what the report is made from."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, Grade, GradeScale
from pipeline.artifacts import Recipe, StageOutput, StageRecord, run_stage
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import STAGES

HOSTILE = (
    '<script>alert("x")</script> "><img src=x onerror=alert(1)> </pre></style><svg onload=alert(1)> '
    '<a href="javascript:alert(1)"> {{ 7 * 7 }} <link rel=stylesheet href=http://ads.invalid/x.css>'
)
SCALE = GradeScale(
    grades=(Grade(name="bad<b>", definition="no"), Grade(name="good", definition="yes")), relevant_from=1
)
Fill = Callable[[PipelineConfig, tuple[str, ...]], list[StageRecord]]


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def scale() -> GradeScale:
    return SCALE


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false", "teacher.seed=3"])


@pytest.fixture
def fill() -> Fill:
    """Writes the folders of the named stages, as the stages themselves would."""
    makers = {"data": _data, "teacher": _teacher, "annotate": _annotations, "student": _student, "export": _export}

    def made(settings: PipelineConfig, stages: tuple[str, ...]) -> list[StageRecord]:
        return [
            run_stage(
                settings.folder / STAGES[name].folder,
                Recipe(name, STAGES[name].config(settings), {"upstream": "1234abcd"}),
                makers[name],
            )
            for name in stages
        ]

    return made


def _interval(value: float | None) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def _data(out: Path) -> StageOutput:
    figures = {"rows_in": 100, "rejected": 3, "duplicates": 7, "rows": 90, "rows_train": 40, "rows_pool": 50}
    card = figures | {
        "grades_by_split": {"train": {"0 bad": 10, "1 good": 30}, "pool": {}},
        "rejected_by_reason": {f"query {HOSTILE}": 3},
    }
    (out / "card.json").write_text(json.dumps(card))
    SCALE.save(out)
    rows = [
        {"pair_id": f"p{i:02}", "query": f"q{i} {HOSTILE}", "ad_title": f"ad {HOSTILE}", "ad_text": HOSTILE * (1 + i % 2),
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
    phases = {
        "warm_start": {"accuracy": 0.25, "pass@1": 0.25, "pass@2": 0.4},
        "agpo": {"accuracy": 0.5, "pass@1": 0.45, "pass@2": 0.6},
    }
    (out / "evaluation.json").write_text(json.dumps(phases))
    figures = {f"{phase}/{name}": value for phase, found in phases.items() for name, value in found.items()}
    return StageOutput(fingerprint="t", figures=figures)


def _annotations(out: Path) -> StageOutput:
    rows = [
        {"pair_id": f"p{i:02}", "annotation_key": key, "grade": 1, "grade_probs": [0.2, 0.8],
         "reasoning": f"{key} because {HOSTILE}", "votes": [1, 1, 1, 0], "agreement": 0.75, "n_samples": 4,
         "n_unparsed": 0, "status": "ok", "error": "", "prompt_tokens": 10, "completion_tokens": 40,
         "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
        for i in range(38) for key in ("old", "current")
    ]  # fmt: skip
    failed = {"grade": None, "grade_probs": None, "reasoning": None, "votes": [], "agreement": None, "status": "failed"}
    rows += [rows[1] | failed | {"pair_id": f"p{i}", "error": f"too long: {i} {HOSTILE}"} for i in (38, 39)]
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), out / "a.parquet")
    figures = {
        "annotation_key": "current", "pairs": 40, "ok": 38, "ok_share": 0.95, "unparsed": 0, "failed": 2,
        "sample_parse_rate": 1.0, "agreement": 0.75, "prompt_tokens": 400, "completion_tokens": 1600,
        "n_graded": 38.0, "accuracy": 0.5, "n_new": 20, "n_reused": 20, "pairs_per_s": 4.0,
    }  # fmt: skip
    return StageOutput(fingerprint="a", figures=figures)


def _student(out: Path) -> StageOutput:
    metrics = {"roc_auc": _interval(0.9), "pr_auc": _interval(None), "f1": _interval(0.8)}
    evaluation = {
        "n": 50, "n_queries": 9, "confusion": [[5, 1], [2, 42]], "ece_before_calibration": 0.11,
        "systems": [
            {"name": "student", "n": 50, "metrics": metrics},
            {"name": "bm25", "n": 50, "metrics": {"roc_auc": _interval(0.6)}},
        ],
        "slices": [
            {"name": f"source: {HOSTILE}", "n": 50, "n_relevant": 20, "metrics": metrics},
            {"name": "query words: 1–2", "n": 3, "n_relevant": 3, "metrics": {"roc_auc": _interval(None)}},
        ],
        "comparisons": [
            {"a": "student", "b": "bm25", "metric": "roc_auc", "n": 50, "difference": 0.3, "low": 0.2, "high": 0.4},
        ],
    }  # fmt: skip
    curves = {
        "student": {
            "roc": [{"fpr": 0.0, "tpr": 0.0}, {"fpr": 0.2, "tpr": 0.9}, {"fpr": 1.0, "tpr": 1.0}],
            "pr": [{"recall": 0.0, "precision": 1.0}, {"recall": 1.0, "precision": 0.5}],
            "reliability": [
                {"predicted": 0.2, "relevant": 0.25, "n": 10},
                {"predicted": 0.9, "relevant": 1.0, "n": 40},
            ],
        },
        "bm25": {"roc": [{"fpr": 0.0, "tpr": 0.0}, {"fpr": 1.0, "tpr": 1.0}], "pr": [], "reliability": []},
    }
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    (out / "curves.json").write_text(json.dumps(curves))
    (out / "metrics.jsonl").write_text('{"step": 1, "phase": "student", "loss": 1.0}\n')
    (out / "model").mkdir(exist_ok=True)
    SCALE.save(out / "model")
    figures = {"test_roc_auc": 0.9, "test_roc_auc_low": 0.85, "test_roc_auc_high": 0.95, "bm25_roc_auc": 0.6}
    return StageOutput(fingerprint="s", figures=figures)


def _export(out: Path) -> StageOutput:
    forms = {
        "torch": {"pairs_per_second": 1000.0, "roc_auc": 0.9},
        "fp32": {"pairs_per_second": 2000.4, "roc_auc": 0.9, "megabytes": 4.0, "max_abs_dp": 1e-6},
        "int8": {"pairs_per_second": 3000.0, "roc_auc": 0.8975, "megabytes": 1.25, "max_abs_dp": 0.02},
    }
    (out / "export.json").write_text(json.dumps({"n": 50, "threads": 2, "batch_size": 8, "passed": True} | forms))
    figures = {
        "fp32_max_abs_dp": 1e-6,
        "int8_auc_loss": 0.0025,
        "int8_megabytes": 1.25,
        "int8_pairs_per_second": 3000.0,
    }
    return StageOutput(fingerprint="e", figures=figures)
