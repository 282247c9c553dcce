"""A Prefect server for the length of one `prefect run`, when none is configured.

Prefect can start one by itself, but in the terminal's process group and for as long as it lives: Ctrl-C ends it before
the flow can report, and a flow that is killed leaves it behind. This one is in a session of its own, and ends when its
parent has ended, so that Prefect's last logs still arrive.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

START_SECONDS = 180  # a busy machine with two cores needs half a minute


def ensure_server() -> None:
    """Use the configured Prefect server, or start one for this process; raises `RuntimeError` when it does not start."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The same as Prefect sets for its own temporary server: no pages, no scheduler.
    quiet = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.local_server", str(port), str(os.getpid())],
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(process, f"http://127.0.0.1:{port}/api/health")
    except BaseException:
        process.kill()
        process.wait()
        raise
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    refresh_global_settings_context()
    # It has no pages, so Prefect's line that points at them would only mislead.
    logging.getLogger("prefect.flow_runs").addFilter(lambda record: "View at http" not in record.getMessage())


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the local Prefect server ended with {process.returncode} before it was ready")
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the local Prefect server was not ready within {START_SECONDS} s")


def _end_with(parent: int) -> None:
    """Leave when `parent` is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    """`python -m flows.local_server PORT PARENT`."""
    import uvicorn

    port, parent = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    main()
