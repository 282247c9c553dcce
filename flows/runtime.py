"""What surrounds a flow's stages: our logs in Prefect's, and errors without tracebacks."""

from __future__ import annotations

import logging
import os

from data.contracts import ContractError

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
