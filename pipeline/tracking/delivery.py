"""Sends the entries of an outbox to MLflow, in order, each as often as it takes.

Sending twice must do no harm, since an answer can be lost: a run is found again by its tag `execution`, MLflow ignores a
metric value that it has, the rest is overwritten. Entries, by `op`: run, params, tags, inputs, metrics, artifact, register,
link, end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import ContractError, first_line, write_json
from pipeline.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

RUN_FILE = "_mlflow.json"
BATCH = 1000  # metric values in one request, MLflow's limit
PARAMS = 100  # parameters or tags in one request, MLflow's limit
_REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"}
_CONNECTION = re.compile(r"Connection refused|Name or service not known|Read timed out|Connection aborted")
# Two threads (a flow's and its stage's) may open one store or want one run: the database is made, and a run found, once.
_OPENING = threading.Lock()


class StoppedError(Exception):
    """The sending was given up by who had asked for it."""


class _RunIsGoneError(Exception):
    pass


class Delivery:
    """The sending of one file; `offset` is where its unsent part begins."""

    def __init__(self, path: Path, uri: str, label: str, stopped: Callable[[], bool] = lambda: False) -> None:
        self.path, self.uri, self.label, self.stopped = path, uri, label, stopped
        self.offset = 0
        self.run_id = ""
        self._run_line = b""
        self._running = False  # a run has begun whose end has not been sent
        self._client: MlflowClient | None = None

    def send(self) -> None:
        """Send every whole entry from `offset` on; raises what the store raises, `StoppedError` when given up."""
        try:
            self._send()
        except _RunIsGoneError:  # another store than before, or an older copy of it: it is told everything
            self.offset, self._running = 0, False
            self._send()

    def _send(self) -> None:
        points: list[tuple[str, float, int, int]] = []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while True:
                before, line = file.tell(), file.readline()
                whole = line.endswith(b"\n")
                entry = parse(line) if whole else {}
                if whole and entry.get("op") == "metrics":
                    points += [(name, value, entry["time"], entry["step"]) for name, value in entry["values"].items()]
                    if len(points) < BATCH:
                        continue
                    before = file.tell()
                if points:
                    self._do({"op": "metrics"}, points)
                    points, self.offset = [], before
                if not whole:
                    return
                if entry and entry["op"] != "metrics":
                    self._do(entry, line)
                self.offset = file.tell()

    def finish(self) -> None:
        """Mark a run as KILLED whose process ended without a word."""
        if self._running:
            self._opened().set_terminated(self.run_id, "KILLED")
            self._running = False

    def trim(self) -> None:
        """Leave only what is unsent in the file, after the entry of its run; remove it when that is nothing."""
        if not self.path.exists():
            return
        if self.offset >= self.path.stat().st_size and not self._running:
            self.path.unlink()
        elif self.offset and self._run_line:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with self.path.open("rb") as old, temporary.open("wb") as new:
                new.write(self._run_line)
                old.seek(self.offset)
                shutil.copyfileobj(old, new)
            temporary.replace(self.path)
            self.offset = 0

    def _do(self, entry: dict[str, Any], content: Any) -> None:
        from mlflow.exceptions import MlflowException

        if self.stopped():
            raise StoppedError
        op = entry["op"]
        try:
            if op == "run":
                self._run(entry, content)
            elif op == "metrics":
                self._metrics(content)
            else:
                getattr(self, f"_{op}")(entry)
        except ContractError as error:
            self._refused(op, error)
        except MlflowException as error:
            gone = error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if gone and op not in ("run", "register", "link"):
                raise _RunIsGoneError(str(error)) from None
            if op == "run" or not (gone or error.error_code in _REFUSED):
                raise
            self._refused(op, error)  # or it would be tried for ever, and all that comes after it would wait
        if self.stopped():
            raise StoppedError

    def _refused(self, op: str, error: Exception) -> None:
        logger.warning("MLflow has no %s of %s, which will not change: %s", op, self.label, first_line(error))

    def _opened(self) -> MlflowClient:
        if self._client is None:
            self._client = open_client(self.uri)
        return self._client

    def _run(self, entry: dict[str, Any], line: bytes) -> None:
        if self._running:
            self.finish()
        with _OPENING:
            client = self._opened()
            if entry.get("run_id"):  # one that is complete, to which something is added
                self.run_id = entry["run_id"]
                client.get_run(self.run_id)
            else:
                parent = _find_or_create(client, entry["parent"]) if entry.get("parent") else ""
                self.run_id = _find_or_create(client, entry, parent)
                if parent:
                    _link(client, parent, entry["stage"], self.run_id, "executed")
                noted = {"run_id": self.run_id, "experiment_id": client.get_run(self.run_id).info.experiment_id}
                about = {"experiment": entry["experiment"], "uri": redact_text(self.uri)}
                write_json(self.path.with_name(RUN_FILE), noted | about)
                self._running = True
        self._run_line = line

    def _params(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in entry["values"].items()]
        for start in range(0, len(params), PARAMS):
            self._opened().log_batch(self.run_id, params=params[start : start + PARAMS])

    def _tags(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in entry["values"].items()]
        for start in range(0, len(tags), PARAMS):
            self._opened().log_batch(self.run_id, tags=tags[start : start + PARAMS])

    def _inputs(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._opened().log_inputs(
            self.run_id,
            [
                DatasetInput(
                    Dataset(**{key: value for key, value in each.items() if key != "context"}),
                    [InputTag("mlflow.data.context", each["context"])],
                )
                for each in entry["datasets"]
            ],
        )

    def _metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value, timestamp, step in points]
        for start in range(0, len(metrics), BATCH):
            self._opened().log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def _artifact(self, entry: dict[str, Any]) -> None:
        path = self.path.parent / entry["path"]
        if path.is_dir():
            self._opened().log_artifacts(self.run_id, str(path), entry["folder"])
        elif path.exists():
            self._opened().log_artifact(self.run_id, str(path), entry["folder"])
        else:
            raise ContractError(f"{path} is gone")

    def _register(self, entry: dict[str, Any]) -> None:
        from pipeline.tracking.registry import Registration, register

        register(self._opened(), self.run_id, self.path.parent, Registration.model_validate(entry["model"]))

    def _link(self, entry: dict[str, Any]) -> None:
        _link(self._opened(), self.run_id, entry["stage"], entry["run_id"], entry["how"])

    def _end(self, entry: dict[str, Any]) -> None:
        self._opened().set_terminated(self.run_id, entry["status"], entry["time"])
        self._running = False


def open_client(uri: str) -> MlflowClient:
    """A client of a store; also the store of MLflow's module-level functions from here on."""
    # A server that is gone must cost seconds, not the client's default of many minutes; `Outbox` tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("alembic", "mlflow.store.db", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for each try
    import mlflow

    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def parse(line: bytes) -> dict[str, Any]:
    """An entry; empty for a line that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _find_or_create(client: MlflowClient, run: dict[str, Any], parent: str = "") -> str:
    """The run of an execution; made unless an earlier try has made it."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(run["experiment"])
    if experiment is None:
        try:
            number = client.create_experiment(run["experiment"], run["artifact_location"])
        except MlflowException:  # another process was faster, or else the next call says what is wrong
            number = client.get_experiment_by_name(run["experiment"]).experiment_id
    else:
        number = experiment.experiment_id
    found = client.search_runs([number], filter_string=f"tags.execution = '{run['execution']}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {**run["tags"], "execution": run["execution"]}
    if parent:
        tags["mlflow.parentRunId"] = parent
    return client.create_run(number, run["time"], tags, run["name"]).info.run_id


def _link(client: MlflowClient, parent: str, stage: str, run_id: str, how: str) -> None:
    """Note on a flow's run which run made a stage's output.

    MLflow's pages list children of the parent's own experiment only, so the note holds the links.
    """
    client.set_tag(parent, f"run.{stage}", run_id)
    client.set_tag(parent, f"stage.{stage}", how)
    tags = client.get_run(parent).data.tags
    shown = []
    for name in tags.get("stages", stage).split():
        place = _page(client, tags.get(f"run.{name}", ""))
        shown.append(f"[{name}]({place})" if place else name)
        if f"stage.{name}" in tags:
            shown[-1] += f" {tags[f'stage.{name}']}"
    client.set_tag(parent, "mlflow.note.content", f"Stages: {', '.join(shown)}")


def _page(client: MlflowClient, run_id: str) -> str:
    """The address of a run within MLflow's pages; empty for one that is not there (any more)."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return ""
    try:
        return f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return ""


def now() -> int:
    """Milliseconds since 1970, MLflow's time."""
    return int(time.time() * 1000)
