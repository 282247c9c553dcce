"""The record of a run's executions: what was done when, with which settings and inputs, and how it ended.

`RUN/executions.jsonl` gets a line when the execution of a stage, a flow or a comparison begins and one when it ends, and one
for each stage that a flow reused. All lines of an execution make one `Execution`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import psutil
from pydantic import BaseModel

from data.contracts import ContractError, first_line
from pipeline.artifacts import read_record
from pipeline.redact import redact, redact_text

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)

EXECUTIONS = "executions.jsonl"
# In a stage's folder: which executions wrote there, so that it is known when it was put aside or another run has taken it.
WRITERS = "_executions.jsonl"
FLOW, COMPARE = "flow", "compare"
_COUNTS = ("rows", "rows_train", "rows_valid", "rows_test", "rows_pool", "queries", "pairs", "ok", "unparsed", "failed")
_CLOCK_SECONDS = 60.0  # by which a process may seem younger than its execution, when the clock was set
_flow: ContextVar[Execution | None] = ContextVar("flow", default=None)


class Registration(BaseModel):
    """A model to register: its folder and, for a student, that of its distillation."""

    role: Literal["teacher", "student"]
    folder: Path
    student: Path | None = None
    student_fingerprint: str = ""


class Execution(BaseModel):
    """An execution of a stage, a flow or a comparison. Times are milliseconds since 1970."""

    execution: str
    name: str
    experiment: str
    parent: str = ""
    folder: str
    """Relative to the run's folder; paths of files and models are relative to this."""
    tracking: dict[str, Any]
    """The settings of tracking, with `uri` as it was used."""
    started_at: int
    pid: int
    host: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    """By name: `fingerprint`, `source` (where it is, or what it is called), `counts`."""
    tags: dict[str, Any]
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    ended_at: int | None = None
    error: str = ""
    metrics: dict[str, Any] = {}
    fingerprint: str = ""
    artifacts: list[str] = []
    model: Registration | None = None
    reused: dict[str, str] = {}
    """Stages that a flow reused, and the execution that made each."""

    def finish(
        self,
        metrics: Mapping[str, Any],
        fingerprint: str = "",
        artifacts: Sequence[Path] = (),
        register: Registration | None = None,
    ) -> None:
        """What is recorded if the work ends well: final metrics, files to attach (those that exist), a model to register."""
        folder = Path(self.tags["folder"])
        self.metrics, self.fingerprint = redact(dict(metrics)), fingerprint
        self.artifacts = [_relative(path, folder) for path in artifacts if path.exists()]
        if register is not None:
            student, record = register.student, read_record(register.student) if register.student else None
            self.model = Registration(
                role=register.role,
                folder=Path(_relative(register.folder, folder)),
                student=Path(_relative(student, folder)) if student else None,
                student_fingerprint=record.fingerprint if record else "",
            )


@contextmanager
def executing(
    settings: PipelineConfig,
    name: str,
    folder: Path,
    *,
    config: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, str],
    sources: Mapping[str, str | Path] = {},
    tags: Mapping[str, Any] = {},
    experiment: str = "",
) -> Iterator[Execution]:
    """Record an execution of a stage, or of a flow or comparison (`FLOW`, `COMPARE`); a stage within a flow is its child.

    Parameters: folder of the stage, or of the run; inputs fingerprints by name, sources where each lies; tags of its run in
    MLflow; experiment without the prefix, by default the tag `flow`, else the name.
    """
    flow, tracking = _flow.get(), settings.tracking
    about = {"run": settings.run, "preset": settings.preset, "folder": str(folder.resolve()), **tags}
    execution = Execution(
        execution=uuid4().hex,
        name=name,
        experiment=f"{tracking.experiment_prefix}/{experiment or tags.get('flow', name)}",
        parent=flow.execution if flow else "",
        folder=_relative(folder, settings.folder),
        tracking=tracking.model_dump() | {"uri": settings.tracking_uri},
        started_at=_now(),
        pid=os.getpid(),
        host=socket.gethostname(),
        config=redact(config.model_dump(mode="json") if isinstance(config, BaseModel) else config),
        inputs={each: _input(fingerprint, sources.get(each, "")) for each, fingerprint in inputs.items()},
        tags=redact(about),
    )
    _append(settings.folder / EXECUTIONS, execution.model_dump(mode="json", exclude_defaults=True))
    if name not in (FLOW, COMPARE):
        _append(folder / WRITERS, {"execution": execution.execution})
    end: dict[str, Any] = {"execution": execution.execution, "status": "FINISHED"}
    token = _flow.set(execution) if name == FLOW else None
    try:
        yield execution
        end |= execution.model_dump(mode="json", include={"metrics", "fingerprint", "artifacts", "model"})
    except BaseException as error:  # whatever is no `Exception` is Ctrl-C, or the scheduler that ends the process
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        end |= {"status": status, "error": redact_text(first_line(error))}
        raise
    finally:
        _append(settings.folder / EXECUTIONS, {**end, "ended_at": _now()})
        if token is not None:
            _flow.reset(token)


def reused(name: str, folder: Path) -> None:
    """Record for the flow that is running, if there is one, that the output of a stage was reused."""
    if (flow := _flow.get()) is not None:
        maker = (read_writers(folder) or [""])[-1]
        _append(Path(flow.tags["folder"]) / EXECUTIONS, {"execution": flow.execution, "reused": {name: maker}})


def read_executions(run_folder: Path) -> list[Execution]:
    """The executions of a run, oldest first; those that ended without a word are KILLED."""
    values: dict[str, dict[str, Any]] = {}
    for line in _lines(run_folder / EXECUTIONS):
        known = values.setdefault(line["execution"], {"reused": {}})
        known["reused"] |= line.pop("reused", {})
        known |= line
    # Without a first line, which a full disk has cut short, nothing is known of an execution.
    executions = [Execution.model_validate(known) for known in values.values() if "started_at" in known]
    newest = {each.name: each.execution for each in executions}
    for each in executions:
        if each.status == "RUNNING" and (newest[each.name] != each.execution or not _is_alive(each)):
            each.status = "KILLED"
    return executions


def read_writers(folder: Path) -> list[str]:
    """The executions that wrote into a stage's folder, oldest first."""
    return [line["execution"] for line in _lines(folder / WRITERS)]


def _is_alive(execution: Execution) -> bool:
    if execution.host != socket.gethostname():
        return True  # cannot be seen from here
    try:
        process = psutil.Process(execution.pid)
        is_same = process.create_time() <= execution.started_at / 1000 + _CLOCK_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line by one write. A full disk is a warning: the work itself will say more, if it needs the disk."""
    data = json.dumps(line, default=str).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                data = b"\n" + data  # a kill cut the last line short
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        logger.warning("%s is not complete, so neither is what is tracked of it: %s", path, first_line(error))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except ValueError:  # cut short by a kill or a full disk
            continue


def _input(fingerprint: str, source: str | Path) -> dict[str, Any]:
    place, record = source, None
    if isinstance(source, Path):
        place = source.expanduser().resolve()
        try:
            record = read_record(place)
        except (ContractError, OSError):  # the stage itself says what is wrong with its input
            record = None
    counts = {name: record.figures[name] for name in _COUNTS if name in record.figures} if record else {}
    return {"fingerprint": fingerprint, "source": redact_text(str(place)), "counts": counts}


def _relative(path: Path, folder: Path) -> str:
    """From `folder`, so that it still holds when both are moved."""
    return os.path.relpath(path.resolve(), folder.resolve())


def _now() -> int:
    return int(time.time() * 1000)
