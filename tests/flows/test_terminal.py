"""The view of a running flow, on a terminal of its own."""

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from flows.terminal import StagesView

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, subprocess, sys, time
from flows.terminal import progress_view
logging.basicConfig(level=logging.INFO, format="%(message)s")
log = logging.getLogger("pipeline")
with progress_view(("teacher",)):
    log.info("data: reused", extra={"stage": "data", "state": "reused"})
    log.info("teacher: starting", extra={"stage": "teacher", "state": "running"})
    subprocess.run("echo from a child >&2", shell=True, check=True)
    subprocess.run("printf unended >&2", shell=True, check=True)
    log.info("agpo: step 3 of 8", extra={"progress": (3, 8)})
    keeps_the_terminal = subprocess.Popen(["sleep", "60"])
    subprocess.run("printf 'at the end' >&2", shell=True, check=True)
    began = time.monotonic()
assert time.monotonic() - began < 4 or sys.exit("the reader was not woken")
print("left", file=sys.stderr)
keeps_the_terminal.kill()
"""


def on_a_terminal(environment: dict[str, str]) -> str:
    main, other = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=other, stdout=subprocess.DEVNULL, env=environment
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


def test_a_person_sees_bars_below_every_line_written_to_stderr() -> None:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("CI", None)
    shown = on_a_terminal(environment)
    lines = ["data: reused", "teacher: starting", "from a child", "unended", "agpo: step 3 of 8", "at the end"]
    places = [shown.index(line) for line in lines]
    assert places == sorted(places)
    last = shown[places[-1] :]
    assert re.search(r"= data +━+ +reused", last)
    assert re.search(r"▸ teacher .* 3/8", last)
    assert last.rstrip().endswith("left")


def test_ci_gets_plain_lines() -> None:
    shown = on_a_terminal({**os.environ, "TERM": "xterm", "CI": "true"})
    lines = ["data: reused", "teacher: starting", "from a child", "unendedagpo: step 3 of 8", "at the endleft"]
    assert shown.splitlines() == lines


def test_a_stage_that_was_not_planned_and_records_of_others_change_nothing() -> None:
    view = StagesView(("data",), Console(file=open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115 - closed with it
    for more in ({"stage": "score", "state": "running"}, {"stage": "data", "state": "lost"}, {"progress": (1, 2)}, {}):
        view.handle(logging.makeLogRecord({"msg": "x", **more}))
    (task,) = view.progress.tasks
    assert (task.completed, task.started) == (0, False)
