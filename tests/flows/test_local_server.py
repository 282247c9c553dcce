"""The server of one run must not outlive it, however the run ends."""

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from flows.local_server import ensure_server\n"
        "from prefect.settings import PREFECT_API_URL\n"
        "ensure_server(); ensure_server()\n"
        "print(PREFECT_API_URL.value(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
    )
    url = done.stdout.strip()
    assert url.startswith("http://127.0.0.1:")
    assert done.returncode == -9
    for _ in range(60):
        try:
            with urlopen(f"{url}/health", timeout=2):
                time.sleep(0.5)
        except URLError:
            return
    raise AssertionError("the server is still there")
