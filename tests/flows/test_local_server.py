"""The server of one run is reached whatever proxies are set, and does not outlive the run, however that ends."""

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]


def test_it_is_reached_behind_a_proxy_reports_nothing_and_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from flows.environment import set_environment\n"
        "set_environment()\n"
        "from flows.local_server import ensure_server\n"
        "from prefect.client.orchestration import get_client\n"
        "from prefect.settings import PREFECT_API_URL\n"
        "ensure_server(); ensure_server()\n"
        "client = get_client(sync_client=True)\n"
        "assert client.api_healthcheck() is None\n"
        "settings = client.request('GET', '/admin/settings').json()\n"
        "print(PREFECT_API_URL.value(), settings['server']['analytics_enabled'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    own = {"PREFECT_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # where nobody listens
    environment = {
        name: value for name, value in os.environ.items() if name.lower() not in ("prefect_api_url", "no_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment | own, stdout=subprocess.PIPE, text=True, timeout=240, check=False,
    )  # fmt: skip
    url, analytics = done.stdout.split()
    assert url.startswith("http://127.0.0.1:")
    assert analytics == "False"
    assert done.returncode == -9
    for _ in range(60):
        try:
            with urlopen(f"{url}/health", timeout=2):
                time.sleep(0.5)
        except URLError:
            return
    raise AssertionError("the server is still there")
