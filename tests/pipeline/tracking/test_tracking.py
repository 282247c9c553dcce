"""What MLflow gets, and that nothing it does can stop a stage."""

import json
import logging
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from data.contracts import ContractError, Grade, GradeScale
from pipeline.artifacts import UNTRACKED, StageOutput, read_record
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import _run
from pipeline.tracking.flow_tracking import log_summary, track_flow
from pipeline.tracking.promotion import verdict
from pipeline.tracking.tracker import Tracker, attach_file, metric_name, track
from pipeline.tracking.untracked import send_untracked, untracked
from student.evaluation import write_predictions
from student.metrics import Comparison

ROOT = Path(__file__).parents[3]
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
    return load_preset("sample", [f"runs={tmp_path_factory.mktemp('runs')}", "share=false"])


def client(settings: PipelineConfig):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)


def runs_of(settings: PipelineConfig, stage: str) -> list:
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(f"ads-relevance/{stage}")
    return mlflow.search_runs([experiment.experiment_id]) if experiment else []


def newest(settings: PipelineConfig, experiment: str):  # type: ignore[no-untyped-def]
    return runs_of(settings, experiment)[0]


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / UNTRACKED).read_text().splitlines()]


def wait_for(ready: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    attach_file(settings, "student", tmp_path, tmp_path / "report.html")
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


def test_a_store_that_cannot_be_reached_is_said_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a-file").write_text("")
    settings = load_preset("sample", [f"runs={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/a-file/no/mlflow.db"])

    def work(out: Path, tracker: Tracker) -> StageOutput:
        for step in range(500):
            tracker.log(step, {"loss": 0.1, "entropy": 0.2})
        tracker.artifact(tmp_path / "a-file")
        tracker.register("teacher", out, "f1")
        return StageOutput(fingerprint="f1", figures={"rows": 2})

    with caplog.at_level(logging.WARNING, logger="pipeline"):
        record = _run(settings, "data", work)
    assert read_record(record.folder) is not None
    kept = record.folder / UNTRACKED
    expected = (
        f"not known to be in MLflow: 1,001 metric values, 1 file, 1 model to register, settings, tags and status; kept in "
        f"{kept} and sent by the next flow of this run, or by: python -m pipeline.tracking.untracked {settings.folder}"
    )
    assert untracked(settings.folder) == {"data": expected}
    assert expected in [each for each in caplog.records if each.name == "pipeline.tracking.tracker"][-1].getMessage()
    assert not (record.folder / "_mlflow.json").exists()
    # The store is mended by naming another one, and the next flow over this run tells it everything.
    mended = load_preset("sample", [f"runs={tmp_path}"])
    assert send_untracked(mended) == {}
    assert not kept.exists()
    (run,) = runs_of(mended, "data-prepare")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/rows"] == 2
    assert len(client(mended).get_metric_history(run.info.run_id, "loss")) == 500
    assert client(mended).get_model_version("ads-relevance-teacher", "1").run_id == run.info.run_id
    assert [item.path for item in client(mended).list_artifacts(run.info.run_id)] == ["a-file", "teacher"]


def test_a_store_that_never_answers_does_not_hold_the_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr("pipeline.tracking.outbox.CLOSE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = load_preset("sample", [f"runs={tmp_path}", f"tracking.uri={uri}"])
        with track(settings, "export", settings.export, {}, tmp_path / "export") as tracker:
            sender = tracker._outbox._sender  # type: ignore[union-attr]
            tracker.log(1, {"loss": 0.1})
        assert "1 metric value," in tracker.untracked
        sender.join(60)  # what was given up on ends by itself, and leaves the file as it is
    assert not sender.is_alive()
    assert [entry["op"] for entry in entries(tmp_path / "export")] == ["run", "params", "metrics", "end"]


def test_a_store_that_was_set_back_is_told_everything(settings: PipelineConfig, tmp_path: Path) -> None:
    with track(settings, "export", settings.export, {}, tmp_path) as tracker:
        tracker.log(1, {"loss": 0.5})
        wait_for(lambda: tracker.run_id)
        lost = tracker.run_id
        client(settings).delete_run(lost)
        with sqlite3.connect(settings.runs / "mlflow.db") as store:
            for table in ("params", "tags", "metrics", "latest_metrics", "runs"):
                store.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (lost,))
        tracker.log(2, {"loss": 0.4})
    (run,) = [each for each in runs_of(settings, "student-export") if each.data.metrics.get("loss")]
    assert run.info.run_id != lost
    assert run.info.status == "FINISHED"
    assert len(client(settings).get_metric_history(run.info.run_id, "loss")) == 2


def test_a_killed_process_leaves_a_run_that_ends_as_killed(settings: PipelineConfig) -> None:
    folder = settings.folder / "scores"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.settings import load_preset\n"
        "from pipeline.tracking.tracker import track\n"
        "settings = load_preset('sample', [f'runs={sys.argv[1]}'])\n"
        "with track(settings, 'score', settings.score, {}, settings.folder / 'scores') as tracker:\n"
        "    for step in range(30):\n"
        "        tracker.log(step, {'rows': step})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(settings.runs)], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    with (folder / UNTRACKED).open("a") as file:
        file.write('{"op": "metr')  # as a kill in the middle of writing leaves it
    with track(settings, "score", settings.score, {}, folder) as tracker:
        tracker.log(1, {"rows": 7.0})
    runs = [run for run in runs_of(settings, "student-score") if "rows" in run.data.metrics]
    assert sorted((run.info.status, run.data.metrics["rows"]) for run in runs) == [("FINISHED", 7), ("KILLED", 29)]
    assert untracked(settings.folder) == {}


def test_a_flow_has_a_run_that_links_to_its_stages_and_back(settings: PipelineConfig, tmp_path: Path) -> None:
    def work(out: Path, tracker: Tracker) -> StageOutput:
        return StageOutput(fingerprint="f1", figures={"rows": 2, "other": 1})

    settings = settings.model_copy(update={"run": "linked"})
    parents = []
    for _ in range(2):
        with track_flow(settings, "relevance-pipeline", ("data", "teacher")) as flow:
            record = _run(settings, "data", work)
            (tmp_path / "report.html").write_text("<p>")
            stage = {"in_flow": True, "figures": record.figures, "seconds": 1.5}
            summary = {"seconds": 1.5, "stages": {"data": stage}, "report": str(tmp_path / "report.html")}
            log_summary(flow, summary)
            assert untracked(settings.folder) == {}  # a run that is under way lacks nothing
            wait_for(lambda flow=flow: flow.run_id)
            parents.append(flow.run_id)
    store = client(settings)
    made, reused = (store.get_run(parent).data for parent in parents)
    child = store.get_run(made.tags["run.data"])
    assert child.data.tags["mlflow.parentRunId"] == parents[0]
    assert (made.tags["stage.data"], reused.tags["stage.data"]) == ("executed", "reused")
    assert reused.tags["run.data"] == child.info.run_id
    place = f"#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}"
    assert made.tags["mlflow.note.content"] == f"Stages: [data]({place}) executed, teacher"
    assert reused.tags["mlflow.note.content"] == f"Stages: [data]({place}) reused, teacher"
    assert made.metrics == {"seconds": 1.5, "data/rows": 2, "data/seconds": 1.5}
    assert [item.path for item in store.list_artifacts(parents[0])] == ["report.html"]
    assert {run.info.status for run in runs_of(settings, "relevance-pipeline")} == {"FINISHED"}

    with pytest.raises(KeyboardInterrupt), track_flow(settings, "student-export", ("data", "export")):
        raise KeyboardInterrupt
    # It has an experiment beside the stage's: what is compared in one is alike.
    assert [run.info.status for run in runs_of(settings, "student-export-flow")] == ["KILLED"]
    with track_flow(settings, "data-prepare", ("data",)) as flow:
        pass
    assert runs_of(settings, "data-prepare-flow") == []


def test_inputs_are_datasets_with_fingerprint_place_columns_and_counts(
    settings: PipelineConfig, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"run": "inputs"})
    figures = {"rows": 7, "rows_train": 4, "rows_test": 3, "card": "x"}
    _run(settings, "data", lambda out, tracker: StageOutput(fingerprint="f" * 16, figures=figures))
    (source,) = newest(settings, "data-prepare").inputs.dataset_inputs
    assert (source.dataset.name, json.loads(source.dataset.source)) == ("source", {"uri": "synthetic"})
    _run(settings, "teacher", lambda out, tracker: StageOutput(fingerprint="t", figures={}))
    (pairs,) = newest(settings, "teacher-train").inputs.dataset_inputs
    assert (pairs.dataset.name, pairs.dataset.digest) == ("pairs", "f" * 16)
    assert json.loads(pairs.dataset.source)["uri"] == str((settings.folder / "pairs").resolve())
    assert json.loads(pairs.dataset.profile) == {"rows": 7, "rows_train": 4, "rows_test": 3}
    columns = {each["name"]: each["type"] for each in json.loads(pairs.dataset.schema)["mlflow_colspec"]}
    assert columns["query"] == "string"
    assert columns["grade"] == "integer"
    _run(settings, "annotate", lambda out, tracker: StageOutput(fingerprint="a", figures={}))
    given = newest(settings, "annotate").inputs.dataset_inputs
    assert {(each.dataset.name, each.tags[0].value) for each in given} == {("pairs", "data"), ("teacher", "model")}


def test_tracking_can_be_switched_off(tmp_path: Path) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])
    with track(settings, "data", settings.data, {}, tmp_path) as tracker:
        tracker.figures({"a": 1.0})
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@mlflow.example.com", "https://hunter2@mlflow.example.com/x", "http://h/?token=hunter2",
        "postgresql://u:hunter2@db/mlflow", "sqlite:///a.db?password=hunter2", "http://me:hun@ter2@mlflow.example.com",
    ],
)  # fmt: skip
def test_an_address_with_a_password_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ContractError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or") as refused:
        load_preset("sample", [f"tracking.uri={uri}"])
    assert "hunter2" not in str(refused.value)
    assert "ter2" not in str(refused.value)
    assert load_preset("sample", ["tracking.uri=postgresql://mlflow@db/mlflow"]).tracking.uri


def test_secrets_are_in_no_file_of_the_store_and_in_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2-env")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-tracking")
    settings = load_preset(
        "sample",
        [
            f"runs={tmp_path}/runs", "run=secret",
            "spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2-spark",
            'annotate.engine.kind="openai"', 'annotate.engine.urls=["http://me:hunter2-url@host:8000/v1"]',
            "teacher.agpo.rollout_server=http://me:hunter2-rollout@host", "annotate.engine.served_model=http://a/?sig=hunter2-sig",
        ],
    )  # fmt: skip

    def work(out: Path, tracker: Tracker) -> StageOutput:
        tracker.tags({"api_key": "hunter2-tag", "at": "https://u:hunter2-tag2@host"})
        (out / "notes.md").write_text("notes")
        tracker.artifact(out / "notes.md")
        return StageOutput(
            fingerprint="f", figures={"password": "hunter2-figure", "rows": 1, "n": {"token": "hunter2"}}
        )

    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("https://me:hunter2-error@host refused")

    with caplog.at_level(logging.DEBUG), track_flow(settings, "annotate", ("data", "teacher", "annotate")) as flow:
        for stage in ("data", "teacher", "annotate"):
            _run(settings, stage, work)
        log_summary(flow, {"seconds": 1.0, "stages": {}, "command": "x --set spark.a.password=hunter2-command"})
        with monkeypatch.context() as patched:
            patched.setattr("mlflow.MlflowClient.set_terminated", broken)
            with track(settings, "score", settings.spark, {"source": "f"}, settings.folder / "scores",
                       {"source": "s3://key:hunter2-source@bucket"}):  # fmt: skip
                pass
    assert "hunter2" not in caplog.text
    assert "refused" in caplog.text
    (run,) = runs_of(settings, "annotate")
    assert run.data.params["engine.urls"] == '["http://***@host:8000/v1"]'
    assert run.data.tags["api_key"] == "***"
    # `_stage.json` is the run's own record, which is read again; everything else here was made for tracking.
    files = [each for each in (tmp_path / "runs").rglob("*") if each.is_file() and each.name != "_stage.json"]
    assert settings.folder / "scores" / UNTRACKED in files
    assert settings.runs / "mlflow.db" in files
    for file in files:
        assert b"hunter2" not in file.read_bytes(), file


def test_models_are_registered_with_aliases_and_the_student_can_be_loaded(
    settings: PipelineConfig, tmp_path: Path
) -> None:
    import mlflow

    teacher = tmp_path / "model"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"weights")
    (teacher / "model_card.md").write_text("# Teacher")
    with track(settings, "teacher", settings.teacher, {"data": "d1"}, tmp_path) as tracker:
        tracker.register("teacher", teacher, "t1")
        tracker.register("teacher", teacher, "t2")
    assert not tracker.untracked
    versions = client(settings)
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "champion").tags["fingerprint"] == "t1"
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "candidate").tags["fingerprint"] == "t2"
    run = newest(settings, "teacher-train")
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
        tracker.register("student", export, "e1", _predictions(tmp_path / "s1", noise=0.5))
        tracker.register("student", export, "e2", _predictions(tmp_path / "s2", noise=2.0))
    assert not tracker.untracked
    worse = versions.get_model_version_by_alias("ads-relevance-student", "candidate")
    assert worse.tags["promotion"].startswith("not champion: roc_auc -0.")
    assert versions.get_model_version_by_alias("ads-relevance-student", "champion").version == 1
    assert versions.get_model_version("ads-relevance-student", 1).tags["promotion"] == "champion: the first version"
    with track(settings, "export", settings.export, {"student": "s3"}, tmp_path) as tracker:
        tracker.register("student", export, "e3", _predictions(tmp_path / "s3", noise=0.2))
    assert not tracker.untracked
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


def test_a_disk_that_is_full_ends_the_tracking_and_nothing_else(tmp_path: Path) -> None:
    code = """
import logging, resource, signal, sys
from pathlib import Path
from pipeline.settings import load_preset
from pipeline.tracking.tracker import track
from pipeline.stages import stage_config
logging.basicConfig(level=logging.WARNING)
settings = load_preset("sample", [f"runs={sys.argv[1]}", "tracking.uri=http://127.0.0.1:9"])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing then fails with an error
folder = settings.folder / "teacher"
with track(settings, "teacher", stage_config(settings, "teacher"), {}, folder) as tracker:
    size = (folder / "_untracked.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, resource.RLIM_INFINITY))
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
print("the stage went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout == "the stage went on\n", done.stderr[-2000:]
    assert done.stderr.count("the rest of stage teacher of run sample is not tracked") == 1
