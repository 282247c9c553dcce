"""What MLflow gets, and that nothing it does can stop a stage."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from data.schema import Grade, GradeScale
from pipeline.artifacts import StageOutput, read_record
from pipeline.promotion import verdict
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import _run
from pipeline.tracking import Tracker, attach_file, metric_name, track
from student.evaluation import write_predictions
from student.metrics import Comparison

SCORE_PY = """
import numpy as np

class Scorer:
    threshold = 0.5

    def __init__(self, folder):
        self.bias = float((folder / "bias.txt").read_text())

    def grade_probs(self, rows):
        assert all(value is not None for row in rows for value in row.values()), rows
        p = np.array([self.bias + 0.1 * len(row.get("attributes") or {}) for row in rows])
        return np.stack([1 - p, p], axis=1)

    def p_relevant(self, probs):
        return probs[:, 1]
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path_factory.mktemp('runs')}"])


def client(settings: PipelineConfig):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)


def runs_of(settings: PipelineConfig, stage: str) -> list:
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(f"ads-relevance/{stage}")
    return mlflow.search_runs([experiment.experiment_id]) if experiment else []


def test_a_stage_leaves_parameters_curves_figures_lineage_and_artifacts(
    settings: PipelineConfig, tmp_path: Path
) -> None:
    (tmp_path / "notes.md").write_text("hello")
    with track(settings, "student", settings.student, {"annotate": "abc123"}, tmp_path) as tracker:
        for step in range(3):
            tracker.log(step, {"student/loss": 1.0 - 0.1 * step, "pass@4": 0.5})
        tracker.figures({"test_roc_auc": 0.9, "annotation_key": "k1"})
        tracker.artifact(tmp_path / "notes.md")
        tracker.artifact(tmp_path / "not-there.md")
    (run,) = runs_of(settings, "student-distill")
    assert run.info.status == "FINISHED"
    assert run.data.params["base"] == "scratch:small"
    assert run.data.params["learning_rate"] == str(settings.student.learning_rate)
    assert run.data.metrics["final/test_roc_auc"] == 0.9
    assert run.data.tags["upstream.annotate"] == "abc123"
    assert run.data.tags["figure.annotation_key"] == "k1"
    history = client(settings).get_metric_history(run.info.run_id, "student/loss")
    assert [(point.step, round(point.value, 6)) for point in history] == [(0, 1.0), (1, 0.9), (2, 0.8)]
    assert run.data.metrics["pass_at_4"] == 0.5
    assert [item.path for item in client(settings).list_artifacts(run.info.run_id)] == ["notes.md"]

    (tmp_path / "report.html").write_text("<p>")
    attach_file(settings, tmp_path, tmp_path / "report.html")
    paths = {item.path for item in client(settings).list_artifacts(run.info.run_id)}
    assert paths == {"notes.md", "report.html"}
    # Artifacts lie beside the runs, not in whatever folder the process was started from.
    assert (settings.runs / "mlartifacts" / "student-distill").is_dir()


def test_a_failed_and_an_interrupted_stage_say_so(settings: PipelineConfig, tmp_path: Path) -> None:
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), track(settings, "score", settings.score, {}, tmp_path):
            raise error
        assert runs_of(settings, "student-score")[0].info.status == status


def test_a_reused_stage_makes_no_second_run(settings: PipelineConfig) -> None:
    calls = []

    def work(out: Path, tracker: Tracker) -> StageOutput:
        calls.append(out)
        tracker.log(1, {"rows": 2.0})
        return StageOutput(fingerprint="f1", figures={"rows": 2})

    for reused in (False, True):
        record = _run(settings, "data", work)
        assert record.reused is reused
    assert len(calls) == 1
    assert len(runs_of(settings, "data-prepare")) == 1


def test_a_store_that_cannot_be_reached_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a-file").write_text("")
    settings = load_preset(
        "sample", [f"runs={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/a-file/no/mlflow.db?password=hunter2"]
    )

    def work(out: Path, tracker: Tracker) -> StageOutput:
        for step in range(500):
            tracker.log(step, {"loss": 0.1})
        tracker.artifact(tmp_path / "a-file")
        return StageOutput(fingerprint="f1", figures={"rows": 2})

    with caplog.at_level(logging.WARNING, logger="pipeline"):
        record = _run(settings, "data", work)
    assert read_record(record.folder) is not None
    warnings = [each for each in caplog.records if each.name == "pipeline.tracking"]
    assert len(warnings) == 1
    assert "hunter2" not in warnings[0].getMessage()


def test_a_store_that_dies_in_mid_run_does_not_stop_the_stage(
    settings: PipelineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="pipeline"),
        track(settings, "export", settings.export, {}, tmp_path) as tracker,
    ):
        tracker._client.log_batch = _refuse  # type: ignore[union-attr, method-assign]
        for step in range(450):
            tracker.log(step, {"loss": 0.1})
        tracker.figures({"a": 1.0})
    assert [each.name for each in caplog.records].count("pipeline.tracking") == 1


def _refuse(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no route to host")


def test_tracking_can_be_switched_off(tmp_path: Path) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])
    with track(settings, "data", settings.data, {}, tmp_path) as tracker:
        tracker.figures({"a": 1.0})
    assert not (tmp_path / "mlflow.db").exists()


def test_secrets_in_settings_are_not_logged(settings: PipelineConfig, tmp_path: Path) -> None:
    config = load_preset("sample", ["spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2"]).spark
    with track(settings, "annotate", config, {}, tmp_path):
        pass
    (run,) = runs_of(settings, "annotate")
    assert "hunter2" not in json.dumps(run.data.params)
    assert run.data.params["extra.spark.hadoop.fs.s3a.secret.key"] == "***"


def test_models_are_registered_with_aliases_and_the_student_can_be_loaded(
    settings: PipelineConfig, tmp_path: Path
) -> None:
    import mlflow

    from pipeline.registry import register_student, register_teacher

    teacher = tmp_path / "model"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"weights")
    (teacher / "model_card.md").write_text("# Teacher")
    with track(settings, "teacher", settings.teacher, {"data": "d1"}, tmp_path) as tracker:
        register_teacher(tracker, teacher, "t1")
        register_teacher(tracker, teacher, "t2")
        assert not tracker.failed
    versions = client(settings)
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "champion").tags["fingerprint"] == "t1"
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "candidate").tags["fingerprint"] == "t2"
    (run,) = runs_of(settings, "teacher-train")
    files = {item.path for item in versions.list_artifacts(run.info.run_id, "teacher")}
    assert files == {"teacher/model_card.md"}  # no weights unless asked for

    export = tmp_path / "export"
    export.mkdir()
    GradeScale(grades=(Grade(name="bad", definition="b"), Grade(name="good", definition="g")), relevant_from=1).save(
        export
    )
    (export / "score.py").write_text(SCORE_PY)
    (export / "bias.txt").write_text("0.6")
    with track(settings, "export", settings.export, {"student": "s1"}, tmp_path) as tracker:
        register_student(tracker, export, _predictions(tmp_path / "s1", noise=0.5), "e1")
        register_student(tracker, export, _predictions(tmp_path / "s2", noise=2.0), "e2")
        assert not tracker.failed
    worse = versions.get_model_version_by_alias("ads-relevance-student", "candidate")
    assert worse.tags["promotion"].startswith("not champion: roc_auc -0.")
    assert versions.get_model_version_by_alias("ads-relevance-student", "champion").version == 1
    assert versions.get_model_version("ads-relevance-student", 1).tags["promotion"] == "champion: the first version"
    with track(settings, "export", settings.export, {"student": "s3"}, tmp_path) as tracker:
        register_student(tracker, export, _predictions(tmp_path / "s3", noise=0.2), "e3")
        assert not tracker.failed
    better = versions.get_model_version_by_alias("ads-relevance-student", "champion")
    assert better.version == 3
    assert better.tags["promotion"].startswith("champion: roc_auc +0.")
    assert better.tags["promotion"].endswith("against version 1")
    mlflow.set_tracking_uri(settings.tracking_uri)
    uri = "models:/ads-relevance-student@candidate"
    model = mlflow.pyfunc.load_model(uri)
    pairs = pd.DataFrame(
        {
            "query": ["a", "b"],
            "ad_title": ["t", "u"],
            "ad_text": ["x", None],
            "attributes": [{"colour": "red", "size": "9"}, None],
        }
    )
    scored = model.predict(pairs)
    assert scored["p_relevant"].round(6).tolist() == [0.8, 0.6]
    assert model.predict(pairs[["query", "ad_title"]])["relevant"].tolist() == [True, True]
    assert model.metadata.signature is not None
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "loaded")))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle")]
    assert "onnxruntime==" in (folder / "requirements.txt").read_text()


def _predictions(folder: Path, noise: float) -> Path:
    """What the distill stage keeps of a student that is right but for some noise."""
    rng = np.random.default_rng(0)
    grade = rng.integers(2, size=400)
    test = SimpleNamespace(pair_ids=[f"p{i}" for i in range(400)], query_id=np.arange(400) // 4, grade=grade)
    folder.mkdir()
    write_predictions(folder, test, 1 / (1 + np.exp(-(2 * grade - 1 + noise * rng.normal(size=400)))))
    return folder


def test_a_student_that_cannot_be_compared_is_no_champion() -> None:
    def found(difference: float | None, low: float | None, high: float | None) -> Comparison:
        return Comparison(a="new", b="old", metric="roc_auc", n=7, difference=difference, low=low, high=high)

    assert verdict(found(None, None, None), 0.1)[0] is False
    assert verdict(found(0.0, -0.004, 0.004), 0.005)[0] is True
    assert verdict(found(0.01, -0.006, 0.02), 0.005)[0] is False


@pytest.mark.parametrize(
    ("name", "safe"), [("pass@4", "pass_at_4"), ("groups/all_right", "groups/all_right"), ("a b(c)", "a b_c_")]
)
def test_metric_names(name: str, safe: str) -> None:
    assert metric_name(name) == safe
