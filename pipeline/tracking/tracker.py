"""Records the executions of stages and flows with MLflow: parameters, metrics by step, inputs, artifacts, lineage.

Tracking is a witness, not a part of the work: a stage never waits for the store and never fails by it. What the store does
not take is kept in the stage's folder and sent later (`pipeline.tracking.outbox`). A stage that is reused is not
recorded again; the run of a flow links to the run that made it. What was left out:
autologging, which patches the libraries it watches.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from data.contracts import first_line
from pipeline.artifacts import UNTRACKED, read_record
from pipeline.redact import flatten, redact, redact_text
from pipeline.tracking.delivery import RUN_FILE, now
from pipeline.tracking.inputs import dataset_inputs
from pipeline.tracking.outbox import Outbox, send_file

if TYPE_CHECKING:
    from data.contracts import Config
    from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)

EXPERIMENTS = {
    "data": "data-prepare",
    "teacher": "teacher-train",
    "annotate": "annotate",
    "student": "student-distill",
    "export": "student-export",
    "score": "student-score",
}
MAX_TEXT = 6000  # MLflow refuses longer values of parameters
# The flow that is running, for the stages inside it; they run in its thread.
_FLOW: ContextVar[Tracker | None] = ContextVar("flow", default=None)


class Tracker:
    """One MLflow run, of a stage or a flow. Every method is safe to call: it never raises and never waits for the store.

    Parameters: name what messages and tags call it (a stage, or `flow`); experiment without the prefix; folder where what is
    not sent yet is kept.
    """

    def __init__(self, settings: PipelineConfig, name: str, experiment: str, folder: Path) -> None:
        self.settings, self.name, self.folder = settings, name, folder
        self.experiment = f"{settings.tracking.experiment_prefix}/{experiment}"
        self.run_entry: dict[str, Any] = {}
        self.untracked = ""
        """After the end: a sentence about what MLflow did not take, or nothing."""
        self._outbox: Outbox | None = None

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty while the store has not been reached."""
        return self._outbox.run_id if self._outbox else ""

    def open(self, tags: dict[str, Any], parameters: dict[str, Any], datasets: list[dict[str, Any]]) -> None:
        """Begin the run; inside a flow it is a child of the flow's run."""
        if not self.settings.tracking.enabled:
            return
        flow, artifacts = _FLOW.get(), None
        if not self.settings.tracking.uri:  # a server chooses its own place; SQLite would take the working directory
            place = self.settings.runs.expanduser().resolve() / "mlartifacts" / self.experiment.partition("/")[2]
            artifacts = place.as_uri()
        about = {"run": self.settings.run, "preset": self.settings.preset, "folder": str(self.folder.resolve()), **tags}
        self.run_entry = {
            "experiment": self.experiment,
            "artifact_location": artifacts,
            "name": self.settings.run,
            "execution": uuid4().hex,
            "time": now(),
            "stage": self.name,
            "uri": self.settings.tracking_uri,
            "tags": {key: _text(value) for key, value in redact(about).items()},
        }
        parent = {"parent": flow.run_entry} if flow is not None and flow.run_entry else {}
        try:
            import mlflow  # noqa: F401 - here, and not in the thread, where it would race with the stage's own imports

            self._outbox = Outbox(self.folder, self._label(), self.settings.tracking_uri)
        except Exception as error:  # a broken installation, a folder that cannot be written: the stage will tell better
            logger.warning("%s is not tracked: %s", self._label(), first_line(error))
            self.run_entry = {}
            return
        self._put("run", **self.run_entry, **parent)
        values = {metric_name(key): _text(value)[:MAX_TEXT] for key, value in flatten(redact(parameters)).items()}
        self._put("params", values=values)
        if datasets:
            self._put("inputs", datasets=datasets)

    def log(self, step: int, values: dict[str, float]) -> None:
        """The stage's metrics sink."""
        named = {metric_name(name): float(value) for name, value in values.items()}
        self._put("metrics", step=step, time=now(), values=named)

    def figures(self, figures: dict[str, Any]) -> None:
        """Final figures: numbers become metrics `final/NAME` (a curve may have the bare name), the rest tags."""
        numbers = {key: value for key, value in flatten(figures).items() if isinstance(value, int | float)}
        self.log(0, {f"final/{name}": value for name, value in numbers.items()})
        self.tags({f"figure.{key}": value for key, value in flatten(figures).items() if key not in numbers})

    def tags(self, tags: dict[str, Any]) -> None:
        """Set tags on the run; secrets are hidden."""
        if tags:
            self._put("tags", values={metric_name(key): _text(value) for key, value in redact(tags).items()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content into `folder`; a path that does not exist is passed over."""
        if path.exists():
            self._put("artifact", path=self._relative(path), folder=folder)

    def register(self, role: str, folder: Path, fingerprint: str, student: Path | None = None) -> None:
        """Register the model in `folder` as a version of PREFIX-`role`; a student with the folder of its distillation."""
        chosen = self.settings.tracking
        model = {
            "role": role,
            "name": f"{chosen.experiment_prefix}-{role}",
            "run": self.settings.run,
            "folder": self._relative(folder),
            "fingerprint": fingerprint,
            "log_weights": chosen.log_weights,
            "promotion_margin": chosen.promotion_margin,
        }
        if student is not None:
            record = read_record(student)
            model |= {
                "student": self._relative(student),
                "student_fingerprint": record.fingerprint if record else "",
            }
        self._put("register", model=model)

    def link(self, stage: str, made_in: Path) -> None:
        """Note on a flow's run that a stage was reused, and which run had made it."""
        self.tags({f"stage.{stage}": "reused"})
        noted = _noted(made_in)
        if noted.get("run_id") and noted.get("uri") == redact_text(self.settings.tracking_uri):
            self._put("link", stage=stage, run_id=noted["run_id"], how="reused")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._put("end", status=status, time=now())
        if self._outbox is not None:
            self.untracked = self._outbox.close()
        if self.untracked:
            logger.warning("%s is %s", self._label(), self.untracked)

    def _put(self, op: str, **values: Any) -> None:
        if self._outbox is None:
            return
        try:
            self._outbox.put(op, **values)
        except OSError as error:  # a full disk; the stage itself will say so
            logger.warning("the rest of %s is not tracked: %s", self._label(), first_line(error))
            self._outbox.close()
            self._outbox = None

    def _relative(self, path: Path) -> str:
        """Relative, so that it still holds when a stage's old output is put aside."""
        return os.path.relpath(path.resolve(), self.folder.resolve())

    def _label(self) -> str:
        return f"{'flow' if self.name == 'flow' else f'stage {self.name}'} of run {self.settings.run}"


@contextmanager
def track(
    settings: PipelineConfig,
    stage: str,
    config: Config,
    inputs: dict[str, str],
    folder: Path,
    sources: dict[str, str | Path] | None = None,
) -> Iterator[Tracker]:
    """A tracked execution of `stage`; inside a flow that is tracked it is a child of the flow's run.

    `inputs` are the fingerprints of what it reads, kept as lineage tags and MLflow datasets; `sources` says where they are.
    """
    tracker = Tracker(settings, stage, EXPERIMENTS.get(stage, stage), folder)
    tags = {"stage": stage, **{f"upstream.{name}": value for name, value in inputs.items()}}
    tracker.open(tags, config.model_dump(mode="json"), dataset_inputs(inputs, sources or {}))
    with closing(tracker):
        yield tracker


@contextmanager
def closing(tracker: Tracker) -> Iterator[None]:
    """End `tracker`'s run with what becomes of the work inside."""
    try:
        yield
    except Exception:
        tracker.close("FAILED")
        raise
    except BaseException:  # Ctrl-C, or the scheduler ends the process
        tracker.close("KILLED")
        raise
    tracker.close("FINISHED")


@contextmanager
def inside(flow: Tracker) -> Iterator[None]:
    """Make the stages tracked within children of `flow`'s run."""
    token = _FLOW.set(flow)
    try:
        yield
    finally:
        _FLOW.reset(token)


def note_reused(stage: str, folder: Path) -> None:
    """Tell the flow that is running, if there is one, that a stage's output was reused."""
    flow = _FLOW.get()
    if flow is not None:
        flow.link(stage, folder)


def attach_file(settings: PipelineConfig, stage: str, folder: Path, path: Path) -> None:
    """Add a file, such as the report, to the MLflow run that was noted in the folder of `stage`; never raises.

    Where entries of that run wait for their store already, it waits with them.
    """
    noted = _noted(folder)
    if not settings.tracking.enabled or not noted.get("run_id"):
        return
    journal = folder / UNTRACKED
    waiting = journal.exists()
    entries: list[dict[str, Any]] = [{"op": "artifact", "path": os.path.relpath(path, folder), "folder": None}]
    if not waiting:
        entries.insert(0, {"op": "run", "run_id": noted["run_id"], "stage": stage, "uri": settings.tracking_uri})
    try:
        with journal.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    except OSError as error:
        logger.warning("%s is not attached to its run in MLflow: %s", path.name, first_line(error))
        return
    if not waiting and (found := send_file(journal, settings.tracking_uri, folder.name)):
        logger.warning("%s: %s", folder.name, found)


def metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced: `pass@4` becomes `pass_at_4`."""
    return re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name.replace("@", "_at_"))


def _noted(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
