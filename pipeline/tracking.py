"""Records the executions of stages with MLflow: parameters, metrics by step, artifacts, lineage.

Tracking is a witness, not a part of the work: when its store fails, one warning is logged and the stage goes on; the
same metrics stay in the stage's `metrics.jsonl`. A stage that is reused is not recorded again.
What was left out: sending later what could not be sent; autologging, which patches the libraries it watches.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.artifacts import write_json
from pipeline.redact import flatten, redact, redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from data.schema import Config
    from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

RUN_FILE = "_mlflow.json"
EXPERIMENTS = {
    "data": "data-prepare",
    "teacher": "teacher-train",
    "annotate": "annotate",
    "student": "student-distill",
    "export": "student-export",
    "score": "student-score",
}
FLUSH_METRICS = 200
FLUSH_SECONDS = 10.0
MAX_PARAM = 6000  # MLflow refuses longer values


class Tracker:
    """One MLflow run of one stage. Every method is safe to call: it never raises, and does nothing once tracking failed."""

    def __init__(self, settings: PipelineConfig, stage: str) -> None:
        self.settings = settings
        self.stage = stage
        self.experiment = f"{settings.tracking.experiment_prefix}/{EXPERIMENTS[stage]}"
        self.uri = settings.tracking_uri
        self.run_id = ""
        self.experiment_id = ""
        self.failed = not settings.tracking.enabled
        self._client: MlflowClient | None = None
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    @property
    def client(self) -> MlflowClient:
        """The open client; only inside `attempt`."""
        if self._client is None:
            raise RuntimeError("tracking is not open")
        return self._client

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """`action()`, or None when it or anything before it failed; the first failure is logged, once."""
        if self.failed:
            return None
        try:
            return action()
        except Exception as error:  # whatever the store, the network or the client throw: the stage must go on
            self.failed = True
            line = redact_text(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            logger.warning(
                "MLflow (%s) failed to %s, so the rest of stage %s is not tracked; its metrics stay in its folder: %s",
                redact_text(self.uri), what, self.stage, line[:300],
            )  # fmt: skip
            return None

    def open(self, config: Config, inputs: dict[str, str], folder: Path) -> None:
        """Create the run with its parameters and lineage, and note it in the stage's folder."""
        self.attempt("open a run", lambda: self._open(config, inputs, folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        """The stage's metrics sink: buffered, so that a training step never waits for a server."""
        now = int(time.time() * 1000)
        self._buffer += [(metric_name(name), float(value), now, step) for name, value in values.items()]
        if len(self._buffer) >= FLUSH_METRICS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        buffered, self._buffer = self._buffer, []
        self._flushed = time.monotonic()
        if buffered:
            self.attempt("log metrics", lambda: self._send(buffered))

    def figures(self, figures: dict[str, Any]) -> None:
        """Final figures: numbers become metrics `final/NAME` (a curve may have the bare name), the rest tags."""
        numbers = {key: value for key, value in flatten(figures).items() if isinstance(value, int | float)}
        now = int(time.time() * 1000)
        self._buffer += [(metric_name(f"final/{name}"), float(value), now, 0) for name, value in numbers.items()]
        self.flush()
        others = {f"figure.{key}": value for key, value in flatten(figures).items() if key not in numbers}
        self.tags(others)

    def tags(self, tags: dict[str, Any]) -> None:
        """Set tags on the run; secrets are hidden."""
        texts = {key: _text(value) for key, value in redact(tags).items()}

        def send() -> None:
            from mlflow.entities import RunTag

            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in texts.items()])

        if texts:
            self.attempt("set tags", send)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content into `folder`; a path that does not exist is passed over."""
        if path.is_dir():
            self.attempt(f"upload {path.name}", lambda: self.client.log_artifacts(self.run_id, str(path), folder))
        elif path.exists():
            self.attempt(f"upload {path.name}", lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self.attempt("end the run", lambda: self.client.set_terminated(self.run_id, status) if self.run_id else None)

    def _open(self, config: Config, inputs: dict[str, str], folder: Path) -> None:
        from mlflow.entities import Param

        self._client = open_client(self.settings)
        found = self._client.get_experiment_by_name(self.experiment)
        self.experiment_id = found.experiment_id if found else self._create_experiment()
        tags = {
            "run": self.settings.run,
            "preset": self.settings.preset,
            "stage": self.stage,
            "stage_folder": str(folder.resolve()),
            **{f"upstream.{name}": value for name, value in inputs.items()},
        }
        run = self._client.create_run(
            self.experiment_id, run_name=self.settings.run, tags={key: _text(v) for key, v in redact(tags).items()}
        )
        self.run_id = run.info.run_id
        parameters = flatten(redact(config.model_dump(mode="json")))
        batch = [Param(metric_name(key), _text(value)[:MAX_PARAM]) for key, value in parameters.items()]
        for start in range(0, len(batch), 100):
            self._client.log_batch(self.run_id, params=batch[start : start + 100])
        write_json(
            folder / RUN_FILE,
            {"run_id": self.run_id, "experiment_id": self.experiment_id, "experiment": self.experiment,
             "uri": redact_text(self.uri)},
        )  # fmt: skip

    def _create_experiment(self) -> str:
        location = None
        if not self.settings.tracking.uri:  # a server chooses its own place; SQLite would take the working directory
            place = self.settings.runs.expanduser().resolve() / "mlartifacts" / EXPERIMENTS[self.stage]
            location = place.as_uri()
        return str(self.client.create_experiment(self.experiment, artifact_location=location))

    def _send(self, buffered: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value, timestamp, step in buffered]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])


@contextmanager
def track(
    settings: PipelineConfig, stage: str, config: Config, inputs: dict[str, str], folder: Path
) -> Iterator[Tracker]:
    """A tracked execution of `stage`; `inputs` are the fingerprints of what it reads, kept as lineage tags."""
    tracker = Tracker(settings, stage)
    tracker.open(config, inputs, folder)
    try:
        yield tracker
    except Exception:
        tracker.close("FAILED")
        raise
    except BaseException:  # Ctrl-C, or the scheduler ends the process
        tracker.close("KILLED")
        raise
    tracker.close("FINISHED")


def open_client(settings: PipelineConfig) -> MlflowClient:
    """A client of the configured store; also the store of MLflow's module-level functions from here on."""
    # A server that is gone must cost seconds, not the client's default of many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow.store.db", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow

    settings.runs.expanduser().mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(settings.tracking_uri)
    return mlflow.MlflowClient(settings.tracking_uri)


def attach_file(settings: PipelineConfig, folder: Path, path: Path) -> None:
    """Add a file, such as the report, to the MLflow run that was noted in a stage's folder; never raises."""
    tracker = Tracker(settings, "data")

    def send() -> None:
        noted = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        tracker._client = open_client(settings)
        tracker.client.log_artifact(noted["run_id"], str(path))

    if (folder / RUN_FILE).exists():
        tracker.attempt(f"attach {path.name}", send)


def metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced: `pass@4` becomes `pass_at_4`."""
    return re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name.replace("@", "_at_"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
