"""What surrounds a flow's stages: our logs in Prefect's, and errors without tracebacks. Light to import."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

ROOMS = ("data", "teacher", "student", "pipeline", "flows")


def fail(message: str, code: int, remedy: str = "") -> NoReturn:
    """End the process with a message in one line, and below it what to do."""
    print(f"error: {' '.join(message.split())}", *remedy.splitlines(), sep="\n", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def refusals() -> Iterator[None]:
    """A `ContractError` in the body ends the process with its message and exit code 2: the command was wrong."""
    from data.contracts import ContractError

    try:
        yield
    except ContractError as error:
        fail(str(error), 2)


@contextmanager
def printing() -> Iterator[None]:
    """When nobody reads on what the body prints, as behind `head`, the process ends without a word, as other tools do.

    For printing alone: a server's or the JVM's broken pipe in the body would be taken for it.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer is written when Python ends, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """A SIGTERM in the body raises `Terminated`. Inside a flow Prefect has its own, and then sends the signal again."""

    def end(*_: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
            handler.addFilter(_inside_a_run)
            logger.addHandler(handler)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_one_line)
    logging.getLogger().addFilter(_no_interrupt)


def _inside_a_run(record: logging.LogRecord) -> bool:
    """Prefect's API takes only logs that belong to a flow run, and warns about each that does not."""
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _one_line(record: logging.LogRecord) -> bool:
    """A `ContractError` is a message for a person: of Prefect's two tracebacks (task, flow) one line is left."""
    from data.contracts import ContractError

    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, ContractError):
        record.msg, record.args = "%s", (error,)
        record.exc_info = record.exc_text = None
        return not record.name.startswith("prefect.flow_runs")
    return True


def _no_interrupt(record: logging.LogRecord) -> bool:
    """Py4J logs a Ctrl-C as an error with its traceback; the command line says in one line what has happened."""
    return not (isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], KeyboardInterrupt))
