"""A worker that is killed with its flow: its run ends as Crashed within the stated time, and the documented alert comes."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from flows.deploy import AUTOMATION, fill
from pipeline.locks import exclusive

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 3  # more than it takes to start a flow on a machine at work
BLOCK = "from prefect.blocks.webhook import Webhook; print(Webhook(url={!r}).save('on-call', overwrite=True))"


class OnCall(BaseHTTPRequestHandler):
    """Takes the alerts."""

    texts: list[str] = []  # noqa: RUF012

    def do_POST(self):
        self.texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): ...


@pytest.fixture
def on_call(server, tmp_path):
    """The alert of docs/operations.md, created as it says."""
    (documented,) = re.findall(r"```yaml\n(# automation\.yaml.*?)```", (ROOT / "docs/operations.md").read_text(), re.S)
    with HTTPServer(("127.0.0.1", 0), OnCall) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        code = BLOCK.format(f"http://127.0.0.1:{listener.server_port}/")
        saved = subprocess.run(
            [sys.executable, "-c", code], env=server.environment, capture_output=True, text=True, check=True
        )
        alert = yaml.safe_load(documented)
        alert["actions"][0]["block_document_id"] = saved.stdout.strip()
        (tmp_path / "automation.yaml").write_text(yaml.safe_dump(alert))
        server.call("automation", "create", "--from-file", str(tmp_path / "automation.yaml"))
        yield OnCall.texts
        listener.shutdown()


def test_the_run_of_a_killed_worker_ends_as_crashed_and_alerts(server, wait, on_call, tmp_path):
    def states():
        runs = server.post("/flow_runs/filter", {})
        return [run["state_name"] for run in runs if run["parameters"]["settings"]["run"] == "killed"]

    deployments = (ROOT / "prefect.yaml").read_text()
    assert "minutes: 5" in deployments
    (tmp_path / "prefect.yaml").write_text(deployments.replace("minutes: 5", f"minutes: {MINUTES}"))
    server.call("--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml"))
    # Each of the deployments has put it there, or found it.
    assert [a["name"] for a in server.post("/automations/filter", {})].count(AUTOMATION) == 1
    parameters = json.dumps(fill("sample", name="killed", runs=str(tmp_path), set=["wait_minutes=60"]))
    with exclusive(tmp_path / "killed"):  # the flow waits for its folder, and shows signs of life
        server.call("deployment", "run", "annotate/nightly-annotate", "--params", parameters)
        worker = server.start("worker", "start", "--pool", "ads-relevance")
        processes = []
        try:
            wait(lambda: states() == ["Running"], 600)
        finally:
            processes = [worker_process := psutil.Process(worker.pid), *worker_process.children(recursive=True)]
            for process in processes:
                process.kill()
            worker.wait(30)
        assert len(processes) > 1  # the flow's too
        wait(lambda: states() == ["Crashed"], 60 * MINUTES + 60)
    wait(lambda: on_call == ["annotate of killed: Crashed"], 60)
