"""The client of an MLflow store, and its errors in words."""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from data.contracts import first_line
from pipeline.redact import redact_text

_CLIENT = {  # A server that is away must cost seconds, not the client's many minutes: it is tried again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def open_client(uri: str) -> Any:
    """A client of a store."""
    import mlflow

    for name, value in _CLIENT.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store.db", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    path = Path(uri.removeprefix("sqlite:///"))  # two processes must not create its tables at once
    with FileLock(path.with_name(f".{path.name}.lock")) if uri.startswith("sqlite:///") else nullcontext():
        return mlflow.MlflowClient(uri)


def explain(error: Exception) -> str:
    """An error of the store or its client in one line, with the remedy where it is known, and without logins."""
    text = redact_text(first_line(error))
    if error_code(error) in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", 401):
        return "it wants another login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if "database schema" in text or "Can't locate revision" in text:
        return "the store is of another version of MLflow: use that version, or back it up and run `mlflow db upgrade` on it"
    short = re.search(r"Connection refused|Name or service not known|Read timed out|Connection aborted", str(error))
    return short.group() if short else text


def error_code(error: Exception) -> str | int:
    """The code of an error of MLflow, or of HTTP; empty for other errors."""
    return getattr(error, "error_code", getattr(getattr(error, "response", None), "status_code", ""))
