"""What a tracked execution has to tell MLflow, kept in a file of its folder until the store has it.

Every entry is written to `_untracked.jsonl` first and sent from there by a thread, so a training step never waits for a
server, memory stays bounded, and a store that is down (or a process that is killed) loses nothing: tries are repeated ever
more rarely, and what is not sent at the end stays in the file for the next flow over the run's folder. All entries can be
sent twice without harm. The file is removed once it is empty.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data.contracts import first_line
from pipeline.artifacts import UNTRACKED
from pipeline.redact import redact_text
from pipeline.tracking.delivery import Delivery, StoppedError, parse

logger = logging.getLogger(__name__)

SEND_SECONDS = 5.0  # between two sendings to a store that answers
FIRST_BACKOFF, LAST_BACKOFF = 2.0, 60.0
CLOSE_SECONDS = 60.0  # how long the end of a stage waits for a store that does not answer


class Outbox:
    """The entries of one execution, and the thread that sends them.

    `folder` is where the file lies, and `label` what messages call the execution. Raises `OSError` when the file cannot be
    written, `BlockingIOError` when another process holds it.
    """

    def __init__(self, folder: Path, label: str, uri: str) -> None:
        self.path, self.label, self.uri = folder / UNTRACKED, label, uri
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _claim(self.path)
        self._writing = threading.Lock()
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._delivery = Delivery(self.path, uri, label, self._abandoned.is_set)
        self._healthy: bool | None = None  # None until the store has been tried
        self._error = ""
        self._sender = threading.Thread(target=self._run, name=f"mlflow {label}", daemon=True)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run, empty while it has not been made."""
        return self._delivery.run_id

    def put(self, op: str, **values: Any) -> None:
        """Write one entry; the first one starts the sending."""
        line = json.dumps({"op": op, **values}, ensure_ascii=False, default=str)
        with self._writing:
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        if self._sender.ident is None:
            self._sender.start()

    def close(self) -> str:
        """Send what is left, as far as the store answers, and return a sentence about what was not sent, or nothing."""
        self._closing.set()
        self._wake.set()
        reached, deadline = -1, 0.0
        while self._sender.is_alive():
            if self._delivery.offset != reached:
                reached, deadline = self._delivery.offset, time.monotonic() + CLOSE_SECONDS
            # A store that has taken something may be busy with something large, such as a model.
            answers = self._healthy or (self._healthy is None and self.run_id)
            if not answers and time.monotonic() > deadline:
                break
            self._sender.join(0.1)
        self._abandoned.set()  # a call that hangs may come back much later: it must not touch the file then
        try:
            self._delivery.trim()
        except OSError as error:  # a full disk: the whole file stays, and what is in it may be sent twice
            self._error = first_line(error)
        self._file.close()
        kept = describe(self.path)
        if kept and self._error:
            kept = f"{kept} (the last error was: {self._error})"
        return kept

    def _run(self) -> None:
        pause = SEND_SECONDS
        while True:
            last = self._closing.is_set()
            try:
                self._delivery.send()
            except StoppedError:
                return
            except Exception as error:  # whatever the store, the network or the client throw: the stage must go on
                pause = FIRST_BACKOFF if self._healthy is not False else min(2 * pause, LAST_BACKOFF)
                self._failed(error)
            else:
                if self._healthy is False and not last:
                    logger.info("MLflow (%s) answers again: %s is tracked on", redact_text(self.uri), self.label)
                self._healthy, pause = True, SEND_SECONDS
            if last:
                if self._healthy:
                    self._delivery.finish()
                return
            self._wake.wait(pause)

    def _failed(self, error: Exception) -> None:
        self._error = first_line(error)
        if self._healthy is not False and not self._closing.is_set():
            logger.warning(
                "MLflow (%s) does not take what is tracked of %s; the work goes on, all is kept in %s and tried again: %s",
                redact_text(self.uri), self.label, self.path, self._error,
            )  # fmt: skip
        self._healthy = False


def send_file(path: Path, uri: str, label: str) -> str:
    """Send one file that was left behind; returns a sentence about what is still not sent, or nothing.

    A file that a running stage holds is its own affair and passed over. Never raises.
    """
    try:
        with _held(path):
            delivery = Delivery(path, uri, label)
            try:
                delivery.send()
                delivery.finish()
            except Exception as error:  # as above
                delivery.trim()
                return f"{describe(path)} (the last error was: {first_line(error)})"
            delivery.trim()
    except (FileNotFoundError, BlockingIOError):
        return ""
    except OSError as error:
        return f"{path} cannot be sent: {first_line(error)}"
    return ""


def describe(path: Path) -> str:
    """What a file of unsent entries holds, in one sentence with the remedy; empty when there is none."""
    counted, run_folder, rest = {"metrics": 0, "artifact": 0, "register": 0}, path.parent.parent, set()
    try:
        with path.open("rb") as file:
            for line in file:
                entry = parse(line)
                op = entry.get("op", "")
                if op == "run" and entry["stage"] == "flow":
                    run_folder = path.parent
                if op in counted:
                    counted[op] += len(entry["values"]) if op == "metrics" else 1
                rest.add(op)
    except FileNotFoundError:
        return ""
    named = (("metrics", "metric value"), ("artifact", "file"), ("register", "model to register"))
    held = [f"{counted[op]:,} {_plural(what, counted[op])}" for op, what in named if counted[op]]
    held += [what for op, what in (("params", "settings"), ("tags", "tags"), ("end", "status")) if op in rest]
    listed = " and ".join(part for part in (", ".join(held[:-1]), held[-1]) if part) if held else "its run"
    return (
        f"not known to be in MLflow: {listed}; kept in {path} and sent by the next "
        f"flow of this run, or by: python -m pipeline.tracking.untracked {run_folder}"
    )


def is_held(path: Path) -> bool:
    """Whether an execution that is under way holds the file."""
    try:
        _claim(path).close()
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _plural(what: str, count: int) -> str:
    return what if count == 1 else what.replace("model ", "models ") if " to " in what else f"{what}s"


def _claim(path: Path) -> IO[bytes]:
    file = path.open("ab+", buffering=0)  # what a full disk did not take must not come up again on closing
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # a kill cut the last entry short
                file.write(b"\n")
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def _held(path: Path) -> Iterator[None]:
    if not path.exists():
        raise FileNotFoundError(path)
    file = _claim(path)
    try:
        yield
    finally:
        file.close()
