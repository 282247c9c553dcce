"""Tracking through a real MLflow server on loopback: by its address alone, and when it is killed within a stage."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
from mlflow import MlflowClient

from data.contracts import Grade, GradeScale
from pipeline.artifacts import UNTRACKED, StageOutput
from pipeline.settings import load_preset
from pipeline.stages import _run
from pipeline.tracking.flow_tracking import track_flow
from pipeline.tracking.tracker import Tracker, track
from pipeline.tracking.untracked import send_untracked, untracked
from student.evaluation import write_predictions

ROOT = Path(__file__).parents[3]
SCORE_PY = """
import numpy as np

class Scorer:
    threshold = 0.5

    def __init__(self, folder):
        pass

    def grade_probs(self, rows):
        return np.array([[0.3, 0.7] for _ in rows])

    def p_relevant(self, probs):
        return probs[:, 1]
"""


class Server:
    """`mlflow server` with a store and an artifact root of its own, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    started.start()
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SEND_SECONDS", 0.1), ("FIRST_BACKOFF", 0.1), ("LAST_BACKOFF", 0.5)):
        monkeypatch.setattr(f"pipeline.tracking.outbox.{name}", seconds)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def wait_for(ready, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def settings_of(server, folder):
    return load_preset("sample", [f"runs={folder}", f"tracking.uri={server.uri}", f"run={folder.name}"])


def history(server, run_id, name):
    return [point.step for point in MlflowClient(server.uri).get_metric_history(run_id, name)]


def test_a_remote_store_needs_nothing_but_its_address(server, tmp_path, monkeypatch):
    import mlflow

    settings = settings_of(server, tmp_path)

    def prepared(out: Path, tracker: Tracker) -> StageOutput:
        return StageOutput(fingerprint="d", figures={"rows": 3})

    def exported(out: Path, tracker: Tracker) -> StageOutput:
        grades = (Grade(name="bad", definition="b"), Grade(name="good", definition="g"))
        GradeScale(grades=grades, relevant_from=1).save(out)
        (out / "score.py").write_text(SCORE_PY)
        (out / "export.json").write_text("{}")
        tracker.log(1, {"loss": 0.5})
        tracker.artifact(out / "export.json")
        return StageOutput(fingerprint="e", figures={"rows": 3})

    def register(out: Path, tracker: Tracker, result: StageOutput) -> None:
        grade = np.arange(40) % 2
        test = SimpleNamespace(pair_ids=[f"p{i}" for i in range(40)], query_id=np.arange(40) // 4, grade=grade)
        write_predictions(settings.folder / "student", test, 0.2 + 0.5 * grade)
        tracker.register("student", out, result.fingerprint, student=settings.folder / "student")

    with track_flow(settings, "relevance-pipeline", ("data", "student", "export")) as flow:
        _run(settings, "data", prepared)
        for stage in ("teacher", "annotate", "student"):
            _run(settings, stage, prepared)
        _run(settings, "export", exported, register)
    assert not flow.untracked
    store = MlflowClient(server.uri)
    parent = store.get_run(flow.run_id)
    export = store.get_run(parent.data.tags["run.export"])
    assert (parent.info.status, export.info.status) == ("FINISHED", "FINISHED")
    assert export.data.tags["mlflow.parentRunId"] == flow.run_id
    assert export.data.metrics["final/rows"] == 3
    assert {each.dataset.name for each in export.inputs.dataset_inputs} == {"pairs", "student"}
    assert {item.path for item in store.list_artifacts(export.info.run_id)} == {"export.json", "predictions"}
    # Artifacts went through the server to its own place; this side has no store at all.
    assert list((server.folder / "artifacts").rglob("export.json"))
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlartifacts").exists()

    mlflow.set_tracking_uri(server.uri)
    model = mlflow.pyfunc.load_model("models:/ads-relevance-student@champion")
    assert [column.name for column in model.metadata.signature.inputs] == [
        "query", "ad_title", "ad_text", "attributes",
    ]  # fmt: skip
    example = model.input_example
    assert list(example["query"]) == ["red running shoes"]
    assert model.predict(example)["p_relevant"].round(6).tolist() == [0.7]
    # With credentials in the environment, they go with every request and into nothing that is kept.
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    with track(settings, "score", settings.score, {}, tmp_path / "scores"):
        pass
    for file in (each for folder in (tmp_path, server.folder) for each in folder.rglob("*") if each.is_file()):
        assert b"hunter2" not in file.read_bytes(), file


def test_a_server_killed_and_restarted_within_a_stage_gets_everything(server, tmp_path, caplog):
    settings = settings_of(server, tmp_path)
    with (
        caplog.at_level(logging.INFO, logger="pipeline"),
        track(settings, "student", settings.student, {}, tmp_path / "student") as tracker,
    ):
        for step in range(50):
            tracker.log(step, {"loss": 1.0, "lr": 0.1})
        wait_for(lambda: tracker.run_id and len(history(server, tracker.run_id, "loss")) == 50)
        server.kill()
        for step in range(50, 2000):
            tracker.log(step, {"loss": 1.0, "lr": 0.1})
        wait_for(lambda: "the work goes on" in caplog.text)
        server.start()
        for step in range(2000, 2050):
            tracker.log(step, {"loss": 1.0, "lr": 0.1})
        wait_for(lambda: "answers again" in caplog.text)
    assert history(server, tracker.run_id, "loss") == list(range(2050))
    assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert not (tmp_path / "student" / UNTRACKED).exists()
    assert caplog.text.count("the work goes on") == 1


def test_a_server_that_stays_down_is_told_by_the_next_flow(server, tmp_path, caplog):
    settings, folder = settings_of(server, tmp_path), tmp_path / tmp_path.name / "student"
    with track_flow(settings, "student-distill", ("data", "student")) as flow:
        with track(settings, "student", settings.student, {"data": "d"}, folder) as tracker:
            for step in range(20):
                tracker.log(step, {"loss": 1.0})
            wait_for(lambda: tracker.run_id and len(history(server, tracker.run_id, "loss")) == 20)
            server.kill()
            for step in range(20, 40):
                tracker.log(step, {"loss": 1.0})
            (folder / "notes.md").write_text("notes")
            tracker.artifact(folder / "notes.md")
        # A stage that begins while the server is down has no run at all yet.
        with pytest.raises(RuntimeError), track(settings, "export", settings.export, {}, folder.parent / "export"):
            raise RuntimeError
    kept = [json.loads(line) for line in (folder / UNTRACKED).read_text().splitlines()]
    assert [entry["op"] for entry in kept] == ["run", *["metrics"] * 20, "artifact", "end"]
    assert [(entry["step"], entry["values"]) for entry in kept[1:21]] == [(i, {"loss": 1.0}) for i in range(20, 40)]
    assert all(entry["time"] > 1e12 for entry in kept[1:21])
    assert kept[21]["path"] == "notes.md"
    assert kept[22]["status"] == "FINISHED"
    assert set(untracked(settings.folder)) == {"student", "export", "flow"}
    assert f"20 metric values, 1 file and status; kept in {folder / UNTRACKED}" in caplog.text
    for sentence in untracked(settings.folder).values():
        assert sentence.endswith(f"python -m pipeline.tracking.untracked {settings.folder}")
    assert "(the last error was: Connection refused)" in caplog.text
    assert set(send_untracked(settings)) == {"student", "export", "flow"}  # still down: nothing is lost by trying
    assert [json.loads(line) for line in (folder / UNTRACKED).read_text().splitlines()] == kept

    server.start()
    command = [sys.executable, "-m", "pipeline.tracking.untracked", str(settings.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "flow: sent\nexport: sent\nstudent: sent\n"), done.stderr
    assert untracked(settings.folder) == {}
    store = MlflowClient(server.uri)
    assert history(server, tracker.run_id, "loss") == list(range(40))
    student, parent = store.get_run(tracker.run_id), store.get_run(flow.run_id)
    assert (student.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert [item.path for item in store.list_artifacts(tracker.run_id)] == ["notes.md"]
    export = store.get_run(parent.data.tags["run.export"])
    assert (export.info.status, export.data.tags["mlflow.parentRunId"]) == ("FAILED", flow.run_id)
    assert parent.data.tags["run.student"] == tracker.run_id
