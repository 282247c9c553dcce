"""What MLflow gets of a run's folder, and that nothing it does can stop the work or lose anything."""

import json
import logging
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.contracts import ContractError, MetricsLog
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.executions import Registration, executing, reused
from pipeline.settings import PipelineConfig, load_preset
from pipeline.tracking.replay import replay
from pipeline.tracking.tracker import noted_runs, tracking, untracked
from tests.pipeline.tracking.helpers import artifacts, client, flow, python, runs_of, stage, steps, wait_for

ROOT = Path(__file__).parents[3]
Configure = Callable[..., PipelineConfig]


def test_a_stage_leaves_parameters_curves_metrics_lineage_and_files_once(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = configure()
    with stage(settings, "student", {"annotate": "abc123"}, experiment="student-distill") as execution:
        log = MetricsLog(settings.folder / "student" / "metrics.jsonl")
        for step in range(3):
            log.write("student", step, {"loss": 1.0 - 0.1 * step, "pass@4": 0.5})
        wait_for(lambda: noted_runs(settings.folder))
        run_id = noted_runs(settings.folder)["student"]
        wait_for(lambda: len(steps(settings, run_id, "student/loss")) == 3)
        assert client(settings).get_run(run_id).info.status == "RUNNING"
        execution.finish({"test_roc_auc": 0.9, "annotation_key": "k1"}, "f1", [log.path])
    (run,) = runs_of(settings, "student-distill")
    assert (run.info.status, run.info.run_name, run.info.run_id) == ("FINISHED", "sample", run_id)
    assert run.data.params["base"] == "scratch:small"
    assert run.data.params["learning_rate"] == str(settings.student.learning_rate)
    assert run.data.metrics == pytest.approx({"student/loss": 0.8, "student/pass_at_4": 0.5, "final/test_roc_auc": 0.9})
    tags = run.data.tags
    assert (tags["upstream.annotate"], tags["figure.annotation_key"], tags["fingerprint"]) == ("abc123", "k1", "f1")
    assert (tags["run"], tags["preset"], tags["stage"]) == ("sample", "sample", "student")
    # Artifacts lie beside the runs, not in whatever folder the process was started from.
    assert (settings.runs / "mlartifacts" / "student-distill").is_dir()

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", None)  # what the store has is not sent again
    with tracking(settings):
        pass
    assert untracked(settings.folder) == {}
    assert artifacts(settings, run) == {"metrics.jsonl"}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_what_did_not_end_well_shows_as_such(configure: Configure, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), stage(configure(), "score"):
        raise error("no such file")
    (run,) = runs_of(configure(), "score")
    assert (run.info.status, run.data.tags["error"]) == (status, "no such file")


def test_what_an_unreachable_store_lacks_is_said_and_sent_to_the_next(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mended = configure()
    (tmp_path / "a-file").write_text("")
    settings = configure(f"tracking.uri=sqlite:///{tmp_path}/a-file/no/mlflow.db")
    folder = settings.folder / "teacher"
    with stage(settings, "teacher") as execution:
        (folder / "notes.md").write_text("")
        MetricsLog(folder / "metrics.jsonl").write("agpo", 1, {"loss": 0.1})
        wait_for(lambda: "the work goes on" in caplog.text)
        assert untracked(settings.folder) == {}  # what is under way is not missing
        execution.finish({"rows": 2}, "f1", [folder / "notes.md"], Registration(role="teacher", folder=folder))
    remedy = f"sent by the next flow of this run, or by: python -m pipeline.tracking {settings.folder}"
    assert list(untracked(settings.folder)) == ["teacher"]
    assert untracked(settings.folder)["teacher"].endswith(remedy)
    assert caplog.records[-1].getMessage().startswith("teacher of run sample: not known to be in MLflow; kept in ")
    assert caplog.text.count("the work goes on") == 1
    with tracking(mended):  # the next flow, with another store
        pass
    assert untracked(settings.folder) == {}
    (run,) = runs_of(mended, "teacher")
    assert (run.info.status, run.data.metrics["final/rows"]) == ("FINISHED", 2)
    assert steps(mended, run.info.run_id, "agpo/loss") == [1]
    assert client(mended).get_model_version("ads-relevance-teacher", "1").run_id == run.info.run_id
    assert artifacts(mended, run) == {"notes.md", "teacher"}


def test_a_store_that_comes_back_within_a_stage_gets_everything(
    configure: Configure, empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    store = tmp_path / "store"
    store.write_text("")  # no folder yet
    settings = configure(f"tracking.uri=sqlite:///{store}/mlflow.db")
    with stage(settings, "student"):
        log = MetricsLog(settings.folder / "student" / "metrics.jsonl")
        for step in range(500):
            if step == 450:
                wait_for(lambda: "the work goes on" in caplog.text)
                store.unlink()
                store.mkdir()
                shutil.copy(empty_store, store)
                wait_for(lambda: "answers again" in caplog.text)
            log.write("student", step, {"loss": 1.0})
    (run,) = runs_of(settings, "student")
    assert (run.info.status, steps(settings, run.info.run_id, "student/loss")) == ("FINISHED", list(range(500)))
    assert (untracked(settings.folder), caplog.text.count("the work goes on")) == ({}, 1)


def test_a_store_that_never_answers_does_not_hold_the_work(
    configure: Configure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr("pipeline.tracking.tracker.CLOSE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        begin = time.monotonic()
        with stage(configure(f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"), "export"):
            pass
        assert time.monotonic() - begin < 50
    assert "(the store does not answer)" in caplog.text


def test_a_run_that_was_deleted_is_made_again(configure: Configure) -> None:
    settings = configure()
    with stage(settings, "export"):
        log = MetricsLog(settings.folder / "export" / "metrics.jsonl")
        log.write("x", 1, {"loss": 0.5})
        wait_for(lambda: noted_runs(settings.folder))
        lost = noted_runs(settings.folder)["export"]
        client(settings).delete_run(lost)
        with sqlite3.connect(settings.runs / "mlflow.db") as store:
            for table in ("params", "tags", "metrics", "latest_metrics", "runs"):
                store.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (lost,))
        log.write("x", 2, {"loss": 0.4})
    (run,) = runs_of(settings, "export")
    assert (run.info.status, steps(settings, run.info.run_id, "x/loss")) == ("FINISHED", [1, 2])
    client(settings).delete_run(run.info.run_id)
    with tracking(settings):  # a flow leaves what was complete deleted
        pass
    assert runs_of(settings, "export") == []
    assert replay(settings.folder, settings.tracking_uri) == ""
    (again,) = runs_of(settings, "export")
    assert steps(settings, again.info.run_id, "x/loss") == [1, 2]


def test_a_run_is_made_once_though_answers_are_lost(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    settings, create, lost = configure(), MlflowClient.create_run, []

    def create_and_lose_the_answer(*arguments: Any, **named: Any) -> Any:
        lost.append(create(*arguments, **named))
        raise ConnectionError("the answer is lost")

    monkeypatch.setattr("mlflow.MlflowClient.create_run", create_and_lose_the_answer)
    with flow(settings, "data", "export"), stage(settings, "export"):
        wait_for(lambda: len(lost) == 2)
    assert [len(runs_of(settings, name)) for name in ("relevance-pipeline", "export")] == [1, 1]
    assert untracked(settings.folder) == {}


def test_a_run_is_made_once_though_the_process_is_killed_before_it_is_noted(configure: Configure) -> None:
    settings = configure()
    code = """
create = mlflow.MlflowClient.create_run
def create_and_die(*arguments, **named):
    create(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
mlflow.MlflowClient.create_run = create_and_die
with tracking(settings), stage("score"):
    time.sleep(100)
"""
    assert python(code, settings.runs).returncode == -signal.SIGKILL
    with tracking(settings):
        pass
    (run,) = runs_of(settings, "score")
    assert run.info.status == "KILLED"
    assert run.data.params


def test_a_training_that_resumes_shows_its_whole_curve(configure: Configure) -> None:
    settings = configure()
    code = """
with stage("teacher"):
    for step in range(30):
        MetricsLog(settings.folder / "teacher" / "metrics.jsonl").write("agpo", step, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, settings.runs).returncode == -signal.SIGKILL
    log = MetricsLog(settings.folder / "teacher" / "metrics.jsonl")
    with stage(settings, "teacher"):
        wait_for(lambda: len(runs_of(settings, "teacher")) == 2)
        log.rewind("agpo", 19)  # to the last checkpoint
        for step in range(20, 40):
            log.write("agpo", step, {"loss": 0.5})
    killed, finished = runs_of(settings, "teacher")
    assert (killed.info.status, finished.info.status) == ("KILLED", "FINISHED")
    assert steps(settings, finished.info.run_id, "agpo/loss") == list(range(40))
    # As the file was when it was sent.
    assert steps(settings, killed.info.run_id, "agpo/loss") in (list(range(20)), list(range(30)))


def test_files_of_an_output_that_was_put_aside_are_found(configure: Configure) -> None:
    settings = configure()

    def train(seed: int) -> None:
        def work(out: Path) -> StageOutput:
            with executing(settings, "student", out, config=settings.student, inputs={}) as execution:
                MetricsLog(out / "metrics.jsonl").write("student", seed, {"loss": 1.0})
                (out / f"notes{seed}.md").write_text("")
                execution.finish({}, f"f{seed}", [out / f"notes{seed}.md"])
            return StageOutput(fingerprint=f"f{seed}", figures={})

        config = settings.student.model_copy(update={"seed": seed})
        run_stage(settings.folder / "student", Recipe("student", config, {}), work)

    for seed in range(3):
        train(seed)
    assert replay(settings.folder, settings.tracking_uri) == ""
    runs = runs_of(settings, "student")  # the first one's output has been deleted since
    assert [artifacts(settings, run) for run in runs] == [set(), {"notes1.md"}, {"notes2.md"}]
    assert [steps(settings, run.info.run_id, "student/loss") for run in runs] == [[], [1], [2]]


def test_a_flow_has_a_run_that_links_to_its_stages_and_back(configure: Configure) -> None:
    settings, parents = configure(), []
    for how in ("executed", "reused"):
        with flow(settings, "data", "teacher") as execution:
            if how == "reused":
                reused("data", settings.folder / "data")
            else:
                with stage(settings, "data"):
                    pass
            (settings.folder / "report.html").write_text("<p>")
            execution.finish({"seconds": 1.5, "data/rows": 2}, "", [settings.folder / "report.html"])
        (child,), parent = runs_of(settings, "data"), runs_of(settings, "relevance-pipeline")[-1]
        place = f"#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}"
        assert (parent.data.tags["stage.data"], parent.data.tags["run.data"]) == (how, child.info.run_id)
        assert parent.data.tags["mlflow.note.content"] == f"Stages: [data]({place}) {how}, teacher"
        assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"seconds": 1.5, "data/rows": 2})
        assert artifacts(settings, parent) == {"report.html"}
        parents.append(parent.info.run_id)
    assert child.data.tags["mlflow.parentRunId"] == parents[0]
    assert noted_runs(settings.folder) == {"flow": parents[1], "data": child.info.run_id}


def test_inputs_are_datasets_with_fingerprint_place_columns_and_counts(configure: Configure) -> None:
    settings = configure()
    figures, pairs = {"rows": 7, "rows_train": 4, "rows_test": 3, "card": "x"}, settings.folder / "pairs"
    run_stage(pairs, Recipe("data", settings.data, {}), lambda _: StageOutput(fingerprint="f" * 16, figures=figures))
    sources = {"data": pairs, "teacher": settings.folder / "teacher", "source": "synthetic"}
    with stage(settings, "annotate", {"data": "f" * 40, "teacher": "t1", "source": ""}, sources=sources):
        pass
    (run,) = runs_of(settings, "annotate")
    contexts = {each.dataset.name: each.tags[0].value for each in run.inputs.dataset_inputs}
    assert contexts == {"pairs": "data", "teacher": "model", "source": "data"}
    given = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
    assert (given["pairs"].digest, json.loads(given["pairs"].source)["uri"]) == ("f" * 36, str(pairs.resolve()))
    assert json.loads(given["pairs"].profile) == {"rows": 7, "rows_train": 4, "rows_test": 3}
    columns = {each["name"]: each["type"] for each in json.loads(given["pairs"].schema)["mlflow_colspec"]}
    assert (columns["query"], columns["grade"]) == ("string", "integer")
    assert (given["source"].digest, json.loads(given["source"].source)) == ("unchanging", {"uri": "synthetic"})


def test_tracking_can_be_switched_off(tmp_path: Path) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])
    with stage(settings, "data"):
        pass
    assert untracked(settings.folder) == {}
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
    assert "ter2" not in str(refused.value)
    assert load_preset("sample", ["tracking.uri=postgresql://mlflow@db/mlflow"]).tracking.uri


def test_secrets_are_in_no_file_and_in_no_log(
    configure: Configure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2-env")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-tracking")
    settings = configure(
        "spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2-spark",
        'annotate.engine.kind="openai"', 'annotate.engine.urls=["http://host:8000/v1"]',
        "annotate.engine.served_model=http://a/?sig=hunter2-sig",
    )  # fmt: skip

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("https://me:hunter2-error@host refused")

    tags = {"api_key": "hunter2-tag", "at": "https://u:hunter2-tag2@host", "command": "x --set a=http://u:hunter2-c@h"}
    more: dict[str, Any] = {"sources": {"source": "s3://k:hunter2-source@b"}, "tags": tags}
    with caplog.at_level(logging.DEBUG), flow(settings, "teacher", "annotate"):
        for name in ("teacher", "annotate"):
            with stage(settings, name, {"source": "f"}, **more) as execution:
                execution.finish({"password": "hunter2-figure", "rows": 1, "n": {"token": "hunter2"}}, "f")
        wait_for(lambda: runs_of(settings, "annotate"))
        monkeypatch.setattr("mlflow.MlflowClient.set_terminated", refuse)
    assert "refused" in caplog.text
    assert "hunter2" not in caplog.text
    (run,) = runs_of(settings, "annotate")
    assert run.data.params["engine.served_model"] == "http://a/?sig=***"
    assert run.data.tags["api_key"] == "***"
    for file in (each for each in settings.runs.rglob("*") if each.is_file()):
        assert b"hunter2" not in file.read_bytes(), file


def test_what_the_store_will_never_take_is_a_warning_and_does_not_hold_up_the_rest(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    settings = configure()
    folder = settings.folder / "teacher"
    with stage(settings, "teacher") as execution:
        (folder / "notes.md").write_text("")
        model = Registration(role="teacher", folder=folder / "model")  # which is not there
        execution.finish({"x" * 300: 1.0}, "f1", [folder / "notes.md"], model)
    with stage(settings, "export") as execution:
        execution.finish({"rows": 1})
    assert untracked(settings.folder) == {}
    (run,) = runs_of(settings, "teacher")
    assert (run.info.status, artifacts(settings, run)) == ("FINISHED", {"notes.md"})
    for what in ("metrics", "model"):
        assert caplog.text.count(f"MLflow has no {what} of teacher of run sample: ") == 1
    assert runs_of(settings, "export")[0].data.metrics == {"final/rows": 1}


def test_a_deleted_experiment_is_said_and_holds_up_only_its_own_runs(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    settings = configure()
    with stage(settings, "score"):
        pass
    number = runs_of(settings, "score")[0].info.experiment_id
    client(settings).delete_experiment(number)
    with flow(settings, "score", "export"), stage(settings, "score"), stage(settings, "export"):
        pass
    assert f"restore it with `mlflow experiments restore --experiment-id {number}`" in caplog.text
    assert list(untracked(settings.folder)) == ["score"]
    assert [each.info.status for each in runs_of(settings, "export")] == ["FINISHED"]
    client(settings).restore_experiment(number)
    assert replay(settings.folder, settings.tracking_uri) == ""
    runs, (parent,) = runs_of(settings, "score"), runs_of(settings, "relevance-pipeline")
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs] == [None, parent.info.run_id]
    assert parent.data.tags["run.score"] == runs[1].info.run_id


def test_a_store_of_another_version_is_said_in_one_sentence(configure: Configure) -> None:
    settings = configure()
    with sqlite3.connect(settings.runs / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    with stage(settings, "export"):
        pass
    assert list(untracked(settings.folder)) == ["export"]
    assert replay(settings.folder, settings.tracking_uri).endswith(
        "the store is of another version of MLflow: use that version, or back it up and run `mlflow db upgrade` on it"
    )
