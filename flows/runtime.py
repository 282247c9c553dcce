"""What surrounds a flow's stages: our logs in Prefect's, errors without tracebacks, one process for each run folder."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data.schema import ContractError

logger = logging.getLogger(__name__)

_LOOK_EVERY = 5.0  # seconds between two looks at a lock that another process holds
ROOMS = ("data", "teacher", "student", "pipeline", "flows")


class _InsideARun(logging.Filter):
    """Prefect's API takes only logs that belong to a flow run, and warns about each that does not."""

    def filter(self, record: logging.LogRecord) -> bool:
        from prefect.context import FlowRunContext, TaskRunContext

        return FlowRunContext.get() is not None or TaskRunContext.get() is not None


class _NoTraceback(logging.Filter):
    """A `ContractError` is a message for a person: of Prefect's two tracebacks (task, flow) one line is left."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, ContractError):
            if record.name.startswith("prefect.flow_runs"):
                return False
            record.msg, record.args = "%s", (error,)
            record.exc_info = record.exc_text = None
        return True


class _NoInterrupt(logging.Filter):
    """Py4J logs a Ctrl-C as an error with its traceback; the command line says in one line what has happened."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(error, KeyboardInterrupt)


def share_cores() -> None:
    """Let idle OpenMP threads sleep; set before torch is loaded, which reads it once.

    By default they spin, which on a machine whose cores are shared (by Spark, a server, another run) makes training and
    generation several times slower. A choice of the user's own is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def connect_logging() -> None:
    """Send the logs of this package's rooms to the console and to Prefect; calling it again changes nothing.

    Done here rather than by `PREFECT_LOGGING_EXTRA_LOGGERS`, so that it holds for a worker's process too, whatever its
    environment.
    """
    from prefect.logging.handlers import APILogHandler

    for name in ROOMS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
            handler = APILogHandler()
            handler.addFilter(_InsideARun())
            logger.addHandler(handler)
    for name, wanted in (("prefect.flow_runs", _NoTraceback), ("prefect.task_runs", _NoTraceback), ("", _NoInterrupt)):
        logger = logging.getLogger(name)
        if not any(isinstance(each, wanted) for each in logger.filters):
            logger.addFilter(wanted())


@contextmanager
def exclusive(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a run's folder for this process, waiting `wait` seconds for another that holds it.

    Raises `ContractError` when it is not to be had. The lock is the operating system's, so a process that was killed holds
    nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", wait, f"{folder} is", "or choose another run name"):
        yield


@contextmanager
def own_gpus(wait: float = 0.0) -> Iterator[None]:
    """Hold the GPUs that this process sees, so that two trainings do not share one; without GPUs, nothing happens.

    Waits and raises as `exclusive` does.
    """
    with ExitStack() as held:
        for gpu in visible_gpus():
            place = Path("~/.cache/ads-relevance").expanduser()
            place.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in gpu)
            held.enter_context(
                _held(place / f"gpu-{name}.lock", wait, f"GPU {gpu} is", "or set CUDA_VISIBLE_DEVICES to another")
            )
        yield


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted({name.strip() for name in chosen.split(",")} - {"", "-1", "NoDevFiles"})


@contextmanager
def _held(lock: Path, wait: float, what: str, otherwise: str) -> Iterator[None]:
    deadline, told = time.monotonic() + wait, False
    with lock.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                file.seek(0)
                holder = f"{what} in use by process {file.read().strip() or 'unknown'}"
            if time.monotonic() >= deadline:
                raise ContractError(f"{holder}; wait for it (wait_minutes does), {otherwise}")
            if not told:
                logger.info("%s; waiting up to %.0f minutes for it", holder, wait / 60)
                told = True
            time.sleep(min(_LOOK_EVERY, max(deadline - time.monotonic(), 0.01)))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
