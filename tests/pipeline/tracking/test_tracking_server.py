"""Tracking through a real MLflow server on loopback: by its address alone, and when it is killed in the middle."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from data.contracts import MetricsLog
from pipeline.executions import Registration
from pipeline.settings import PipelineConfig, load_preset
from pipeline.tracking.tracker import noted_runs, untracked
from tests.pipeline.tracking.helpers import ROOT, client, flow, stage, steps, wait_for, write_export


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
        wait_for(self.is_healthy, 300)

    def is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        try:
            with urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

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


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", f"tracking.uri={server.uri}"])


def test_a_remote_store_needs_nothing_but_its_address(
    server: Server, settings: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    out, student, store = settings.folder / "export", settings.folder / "student", client(settings)
    with flow(settings, "student", "export"), stage(settings, "export", {"data": "d"}) as execution:
        write_export(out)
        (out / "export.json").write_text("{}")
        student.mkdir()
        (student / "test_predictions.parquet").write_text("")
        MetricsLog(out / "metrics.jsonl").write("export", 1, {"loss": 0.5})
        model = Registration(role="student", folder=out, student=student)
        execution.finish({"rows": 3}, "e", [out / "export.json"], model)
    assert untracked(settings.folder) == {}
    runs = noted_runs(settings.folder)
    parent, export = store.get_run(runs["flow"]), store.get_run(runs["export"])
    assert (parent.info.status, parent.data.tags["run.export"]) == ("FINISHED", runs["export"])
    assert (export.info.status, export.data.tags["mlflow.parentRunId"]) == ("FINISHED", runs["flow"])
    assert export.data.metrics == {"export/loss": 0.5, "final/rows": 3}
    assert {each.dataset.name for each in export.inputs.dataset_inputs} == {"pairs"}
    assert {item.path for item in store.list_artifacts(runs["export"])} == {"export.json", "predictions"}
    # Artifacts went through the server to its own place; this side has no store at all.
    assert list((server.folder / "artifacts").rglob("export.json"))
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlartifacts").exists()

    mlflow.set_tracking_uri(server.uri)
    loaded = mlflow.pyfunc.load_model("models:/ads-relevance-student@champion")
    assert loaded.metadata.signature.inputs.input_names() == ["query", "ad_title", "ad_text", "attributes"]
    assert list(loaded.input_example["query"]) == ["red running shoes"]
    assert loaded.predict(loaded.input_example)["p_relevant"].round(6).tolist() == [0.6]
    # With credentials in the environment, they go with every request and into nothing that is kept.
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    with stage(settings, "score"):
        pass
    for file in (each for folder in (tmp_path, server.folder) for each in folder.rglob("*") if each.is_file()):
        assert b"hunter2" not in file.read_bytes(), file


def test_a_server_that_stays_down_gets_everything_by_hand(
    server: Server, settings: PipelineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = settings.folder / "student"
    with flow(settings, "student", "export"):
        with stage(settings, "student") as execution:
            log = MetricsLog(folder / "metrics.jsonl")
            for step in range(40):
                if step == 20:
                    wait_for(lambda: "student" in noted_runs(settings.folder))
                    server.kill()
                log.write("student", step, {"loss": 1.0})
            (folder / "notes.md").write_text("notes")
            execution.finish({}, "f", [folder / "notes.md"])
        # A stage that begins while the server is down has no run at all yet.
        with pytest.raises(RuntimeError), stage(settings, "export"):
            raise RuntimeError
        wait_for(lambda: untracked(settings.folder))
    assert set(untracked(settings.folder)) == {"student", "export", "flow"}
    assert "(Connection refused)" in caplog.text
    run_id = noted_runs(settings.folder)["student"]

    def by_hand() -> tuple[int, str]:
        command = [sys.executable, "-m", "pipeline.tracking", settings.folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        return done.returncode, done.stdout

    assert by_hand() == (1, f"MLflow ({server.uri}) does not have all of {settings.folder}: Connection refused\n")
    server.start()
    assert by_hand() == (0, f"MLflow ({server.uri}) has all of {settings.folder}\n")
    assert untracked(settings.folder) == {}
    store, runs = client(settings), noted_runs(settings.folder)
    student, export, parent = (store.get_run(runs[name]) for name in ("student", "export", "flow"))
    assert [run.info.status for run in (student, export, parent)] == ["FINISHED", "FAILED", "FINISHED"]
    assert (runs["student"], steps(settings, run_id, "student/loss")) == (run_id, list(range(40)))
    assert [item.path for item in store.list_artifacts(run_id)] == ["notes.md"]
    assert export.data.tags["mlflow.parentRunId"] == runs["flow"]
    assert (parent.data.tags["run.export"], parent.data.tags["run.student"]) == (runs["export"], run_id)


def test_a_server_that_wants_a_login_is_said_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"You are not authenticated.")

        do_POST = do_GET

    with HTTPServer(("127.0.0.1", 0), Locked) as locked:
        threading.Thread(target=locked.serve_forever, daemon=True).start()
        settings = load_preset("sample", [f"runs={tmp_path}", f"tracking.uri=http://127.0.0.1:{locked.server_port}"])
        with stage(settings, "score"):
            pass
        locked.shutdown()
    assert "(it wants another login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or" in caplog.text
    assert list(untracked(settings.folder)) == ["score"]
