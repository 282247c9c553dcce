"""The view of a running flow, on a terminal of its own."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, pathlib, subprocess, sys
from prefect.logging.configuration import setup_logging
from data.contracts import log_progress
from flows.runtime import connect_logging
from flows.terminal import progress_view, show
setup_logging()
connect_logging()
log = logging.getLogger("pipeline")
with progress_view(("data", "teacher"), pathlib.Path(sys.argv[1])):
    log_progress(log, 1, 8, "before any stage runs")
    show("data", "reused")
    show("teacher", "running")
    show("another", "done")
    print("a line of Python", file=sys.stderr)
    subprocess.run("echo from a child >&2", shell=True, check=True)
    log_progress(log, 3, 8, "agpo: step %d of %d", 3, 8)
log_progress(log, 8, 8, "left")
"""


def on_a_terminal(environment: dict[str, str], log: Path) -> str:
    main, other = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log)], cwd=ROOT, stderr=other, stdout=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(other)
        shown = b""
        while True:
            try:
                read = os.read(main, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not read:
                break
            shown += read
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_person_sees_bars_below_the_log_and_what_children_write_is_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("CI", None)
    shown = on_a_terminal(environment, tmp_path / "new" / "stderr.log")
    lines = ["before any stage runs", "a line of Python", "agpo: step 3 of 8"]
    places = [shown.index(line) for line in lines]
    assert places == sorted(places)
    last = shown[places[-1] :]
    assert re.search(r"= data +━+ +reused", last)
    assert re.search(r"▸ teacher .* 3/8", last)
    assert last.rstrip().endswith("left")
    assert "from a child" not in shown
    assert (tmp_path / "new" / "stderr.log").read_text() == "from a child\n"


def test_ci_gets_plain_lines(tmp_path: Path) -> None:
    shown = on_a_terminal({**os.environ, "TERM": "xterm", "CI": "true"}, tmp_path / "stderr.log")
    lines = [line.rpartition(" - ")[2] for line in shown.splitlines()]
    assert lines == ["before any stage runs", "a line of Python", "from a child", "agpo: step 3 of 8", "left"]
    assert not (tmp_path / "stderr.log").exists()
