"""A Prefect server of its own, as `prefect server start` starts it, and the `prefect` command that talks to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@dataclass
class Server:
    """The environment in which commands talk to it."""

    environment: dict[str, str]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server's API answers."""
        url = self.environment["PREFECT_API_URL"] + path
        request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def call(self, *arguments: str) -> str:
        """What a `prefect` command prints; fails when it does."""
        done = subprocess.run(
            [PREFECT, *arguments],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """A `prefect` command that goes on, in a session of its own."""
        return subprocess.Popen(
            [PREFECT, *arguments], cwd=ROOT, env=self.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Prefect home of its own, and no server: the command starts its own."""
    home = tmp_path_factory.mktemp("prefect")
    inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return inherited | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[Server]:
    """The server, with the work pool of `prefect.yaml`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    server = Server(environment | {"PREFECT_API_URL": url, "COLUMNS": "240"})
    process = server.start("server", "start", "--port", str(port))
    try:
        wait_until(lambda: _is_healthy(url), 600)
        server.call("work-pool", "create", "ads-relevance", "--type", "process")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="session")
def wait() -> Callable[[Callable[[], bool], float], None]:
    """`wait(ready, seconds)` returns once `ready()` is true, and fails after so many seconds."""
    return wait_until


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(0.5)


def _is_healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
