"""Replays the record of a run's executions into MLflow: runs, parameters, metrics, datasets, artifacts, model versions.

Everything can be sent twice without harm, since an answer can be lost: a run is found again by its tag `execution`, MLflow
keeps an equal metric value once, the rest is overwritten. `RUN/_mlflow.json` notes what the store has. A run gets the whole
`metrics.jsonl` of its stage, with what an execution that it resumed had logged: the run of a model shows all its training.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.contracts import ANNOTATIONS, PAIRS, ContractError, metric_lines, read_json, write_json
from pipeline.executions import COMPARE, FLOW, Execution, read_executions, read_writers
from pipeline.redact import flatten, redact_text
from pipeline.resume import recorded_limits
from pipeline.tracking.store import error_code, explain, open_client

logger = logging.getLogger(__name__)

NOTES = "_mlflow.json"
BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits for one request
MAX_TEXT, MAX_DIGEST = 6000, 36  # MLflow's limits for a parameter and for a dataset's digest
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "BAD_REQUEST",
    400,
    413,
    422,
}
_TABLES = {"data": ("pairs", PAIRS), "annotate": ("annotations", ANNOTATIONS), "base": ("base model", ())}
_TYPES = {"int32": "integer", "int64": "long"}  # Arrow's names, where MLflow's differ
Notes = dict[str, dict[str, Any]]


class Replay:
    """The sending of a run's folder to a store; between calls of `send` it remembers how far a running execution is.

    `by_hand` waits for another process that sends, and makes runs again that were deleted in the store.
    """

    def __init__(self, folder: Path, uri: str, *, by_hand: bool = False) -> None:
        import mlflow  # when there is something to track: it takes seconds

        self.folder, self.uri, self.by_hand = folder, uri, by_hand
        self.answered_at = 0.0
        """When the store answered last, by `time.monotonic`."""
        self._entities = mlflow.entities
        self._client: Any = None
        self._executions: list[Execution] = []
        self._notes: Notes = {}
        self._sent: dict[str, int] = {}  # metric lines of running executions
        self._warned: set[str] = set()

    def send(self) -> str:
        """Send what the store lacks; returns why something could not be sent, in one sentence, or nothing."""
        try:
            with FileLock(self.folder / ".mlflow.lock", timeout=10 if self.by_hand else 0):
                return self._send()
        except Timeout:
            return "another process is sending it"
        except Exception as error:  # whatever the store, the network or the client raise: the work must go on
            return explain(error)

    def _send(self) -> str:
        self._client = self._client or open_client(self.uri)
        self._notes = read_notes(self.folder, self.uri)
        self._executions = [each for each in read_executions(self.folder) if each.tracking["enabled"]]
        reasons = [self._step(step, each) for step in (self._deliver, self._link) for each in self._executions]
        return "; ".join(dict.fromkeys(reason for reason in reasons if reason))

    def _step(self, step: Callable[[Execution], None], execution: Execution) -> str:
        try:
            step(execution)
        except Exception as error:
            # A store that is away is so for all; by anything else the others are not held up.
            if isinstance(error, OSError) or error_code(error) not in {"", "PERMISSION_DENIED", *_REFUSALS}:
                raise
            return f"{execution.name}: {explain(error)}"
        return ""

    def _deliver(self, execution: Execution) -> None:
        """Send what the store lacks of one execution; all of it, when its run was deleted before it was complete."""
        if is_complete(execution, self._notes) and not self.by_hand:
            return
        note = self._notes.get(execution.execution)
        if note is None or not self._exists(note["run_id"]):
            note = self._begin(execution)
        if note.get("status") != execution.status:
            last = self._send_metrics(execution)
            if execution.status != "RUNNING":
                self._send_result(execution)
                self._client.set_terminated(note["run_id"], execution.status, execution.ended_at or last)
                self._note(execution, status=execution.status)

    def _begin(self, execution: Execution) -> dict[str, Any]:
        """Find the execution's run or create it; send its parameters and datasets."""
        experiment_id = self._experiment(execution.experiment)
        run = self._find(execution.execution, [experiment_id])
        if run is None:
            tags = {**execution.tags, "execution": execution.execution, "stage": execution.name}
            tags |= {f"upstream.{name}": given["fingerprint"] for name, given in execution.inputs.items()}
            tags = {metric_name(key): _text(value) for key, value in tags.items()}
            run = self._client.create_run(experiment_id, execution.started_at, tags, execution.tags["run"])
        run_id = str(run.info.run_id)
        self._sent.pop(execution.execution, None)
        self._notes[execution.execution] = {"name": execution.name, "run_id": run_id, "experiment_id": experiment_id}
        params = flatten(execution.config).items()
        self._log(execution, "params", [self._entities.Param(metric_name(key), _text(value)) for key, value in params])
        if execution.inputs:
            datasets = [self._dataset(name, given) for name, given in execution.inputs.items()]
            self._request(execution, "datasets", self._client.log_inputs, run_id, datasets)
        return self._note(execution)

    def _send_metrics(self, execution: Execution) -> int | None:
        """Send the metrics by step that are new; returns the time of the last."""
        place, start = self._place(execution), execution.started_at
        next_starts = [each.started_at for each in self._executions if each.folder == execution.folder]
        end = min((each for each in next_starts if each > start), default=None)
        lines = [{"time": start} | line for line in (metric_lines(place / "metrics.jsonl") if place else ())]
        lines = [line for line in lines if end is None or line["time"] < end]
        own = [line for line in lines if line["time"] >= start]
        new = own[self._sent.get(execution.execution, 0) :]
        if execution.status != "RUNNING":  # by then a training that resumed has dropped the steps that it repeated
            new = [line for line in lines if line["time"] < start] + new
        points = [
            self._entities.Metric(metric_name(f"{line['phase']}/{name}"), value, line["time"], line["step"])
            for line in new
            for name, value in line.items()
            if name not in ("phase", "step", "time")
        ]
        self._log(execution, "metrics", points)
        self._sent[execution.execution] = len(own)
        return own[-1]["time"] if own else None

    def _send_result(self, execution: Execution) -> None:
        """Send what an execution ended with. A stage's metrics are named `final/NAME`: a curve may have the bare name."""
        prefix, at = "" if execution.name in (FLOW, COMPARE) else "final/", execution.ended_at or execution.started_at
        values = flatten(execution.metrics)
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        metrics = [self._entities.Metric(metric_name(prefix + key), value, at, 0) for key, value in numbers.items()]
        tags = {f"figure.{key}": value for key, value in values.items() if key not in numbers}
        tags |= {"fingerprint": execution.fingerprint, "error": execution.error}
        self._log(execution, "metrics", metrics)
        self._log_tags(execution, tags)
        for path in execution.artifacts:
            self._upload(execution, path)
        made = {each.execution: each for each in self._executions}
        if execution.model is not None:
            self._register(execution, again=False)
        for maker in execution.reused.values():  # of stages that a flow has reused: its limits may be others
            if maker in self._notes and maker in made and made[maker].model is not None:
                self._register(made[maker], again=True)

    def _register(self, execution: Execution, *, again: bool) -> None:
        """Register the model of an execution, or judge it `again`, by the run's limits of drift."""
        from pipeline.tracking.registry import reconsider, register  # here, since it loads the student's evaluation

        run_id, limits = self._notes[execution.execution]["run_id"], recorded_limits(self.folder)
        given = (self._client, run_id, self._place(execution), execution, limits)
        self._request(execution, "model", reconsider if again else register, *given)

    def _link(self, flow: Execution) -> None:
        """Make the stages of a flow children of its run, and note on it which run made each stage's output.

        MLflow's pages list children of the parent's own experiment only, so the run's description holds the links.
        """
        note = self._notes.get(flow.execution)
        if flow.name != FLOW or note is None:
            return
        links = dict(note.get("links", {}))
        for child in (each for each in self._executions if each.parent == flow.execution):
            if (made := self._notes.get(child.execution)) is None:
                continue
            if made.get("parent") != note["run_id"]:
                self._log_tags(child, {"mlflow.parentRunId": note["run_id"]})
                self._note(child, parent=note["run_id"])
            links[child.name] = ["executed", made["experiment_id"], made["run_id"]]
        for stage, maker in flow.reused.items():
            if stage not in links:
                made_by = self._find(maker, [each.experiment_id for each in self._client.search_experiments()])
                links[stage] = ["reused", *((made_by.info.experiment_id, made_by.info.run_id) if made_by else ("", ""))]
        if links == note.get("links", {}):
            return
        tags: dict[str, str] = {}
        shown = []
        for stage in str(flow.tags.get("stages", " ".join(links))).split():
            how, experiment_id, run_id = links.get(stage, ("", "", ""))
            page = f"[{stage}](#/experiments/{experiment_id}/runs/{run_id})" if run_id else stage
            shown.append(f"{page} {how}".strip())
            tags |= {f"stage.{stage}": how, f"run.{stage}": run_id}
        self._log_tags(flow, tags | {"mlflow.note.content": f"Stages: {', '.join(shown)}"})
        self._note(flow, links=links)

    def _log(self, execution: Execution, kind: str, items: Sequence[Any]) -> None:
        run_id = self._notes[execution.execution]["run_id"]
        for start in range(0, len(items), BATCH[kind]):
            batch = {kind: items[start : start + BATCH[kind]]}
            self._request(execution, kind, self._client.log_batch, run_id, **batch)

    def _log_tags(self, execution: Execution, tags: dict[str, Any]) -> None:
        shown = {metric_name(key): _text(value) for key, value in tags.items() if value != ""}
        self._log(execution, "tags", [self._entities.RunTag(key, value) for key, value in shown.items()])

    def _upload(self, execution: Execution, path: str) -> None:
        def upload() -> None:
            if (place := self._place(execution)) is None or not (place / path).exists():
                raise ContractError(f"{path} is gone")
            self._client.log_artifact(self._notes[execution.execution]["run_id"], str((place / path).resolve()))

        self._request(execution, "file", upload)

    def _request(self, execution: Execution, what: str, request: Callable[..., Any], *args: Any, **named: Any) -> None:
        """Send one request. What the store will never take is a warning, so that it does not hold up what comes after."""
        try:
            request(*args, **named)
        except Exception as error:
            if not isinstance(error, ContractError) and error_code(error) not in _REFUSALS:
                raise
            self._warn(f"MLflow has no {what} of {execution.name} of run {execution.tags['run']}: {explain(error)}")
        self.answered_at = time.monotonic()

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            logger.warning("%s", sentence)
        self._warned.add(sentence)

    def _note(self, execution: Execution, **values: Any) -> dict[str, Any]:
        note = self._notes[execution.execution]
        note |= values
        write_json(self.folder / NOTES, {"uri": redact_text(self.uri), "executions": self._notes})
        return note

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is created if need be; raises `ContractError` for one that was deleted."""
        if (found := self._client.get_experiment_by_name(name)) is None:
            runs = self.folder.parent.resolve()
            # A server chooses its own place for artifacts; SQLite would take the working directory.
            is_default = self.uri == f"sqlite:///{runs / 'mlflow.db'}"
            place = (runs / "mlartifacts" / name.partition("/")[2]).as_uri() if is_default else None
            try:
                return str(self._client.create_experiment(name, place))
            except Exception as error:
                if error_code(error) != "RESOURCE_ALREADY_EXISTS":  # by another process, meanwhile
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise ContractError(
                f"the experiment {name} was deleted in MLflow: restore it with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or name others by tracking.experiment_prefix"
            )
        return str(found.experiment_id)

    def _find(self, execution: str, experiments: list[str]) -> Any:
        """The store's run of an execution; None without one."""
        runs = self._client.search_runs(experiments, f"tags.execution = '{execution}'", max_results=1)
        return runs[0] if runs and execution else None

    def _exists(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _place(self, execution: Execution) -> Path | None:
        """The folder that holds an execution's files: its own, or where that was put aside; None when they are gone."""
        folder = self.folder / execution.folder
        if execution.name in (FLOW, COMPARE):
            return folder
        places = (folder, folder.with_name(f"{folder.name}.previous"))
        return next((place for place in places if execution.execution in read_writers(place)), None)

    def _dataset(self, name: str, given: dict[str, Any]) -> Any:
        """An input as MLflow shows it: its digest is the fingerprint; `unchanging` where no file stands behind a name."""
        label, schema = _TABLES.get(name, (name, ()))
        columns = [{"name": each.name, "type": _TYPES.get(str(each.type), str(each.type))} for each in schema]
        dataset = self._entities.Dataset(
            name=label,
            digest=(given["fingerprint"] or "unchanging")[:MAX_DIGEST],
            source_type="local" if os.path.isabs(given["source"]) else "name",
            source=json.dumps({"uri": given["source"]}),
            schema=json.dumps({"mlflow_colspec": columns}) if columns else None,
            profile=json.dumps(given["counts"]) if given["counts"] else None,
        )
        context = "model" if name in ("teacher", "student", "export", "base") else "data"
        return self._entities.DatasetInput(dataset, [self._entities.InputTag("mlflow.data.context", context)])


def replay(folder: Path, uri: str) -> str:
    """Send a run's folder to a store by hand; returns what is not in the store then, in one sentence, or nothing."""
    reason = Replay(folder, uri, by_hand=True).send()
    return f"MLflow ({redact_text(uri)}) does not have all of {folder}: {reason}" if reason else ""


def read_notes(folder: Path, uri: str = "") -> Notes:
    """By execution `name`, `run_id`, `experiment_id`, and what the store has; nothing when it is about another store."""
    try:
        content = read_json(folder / NOTES)
    except (FileNotFoundError, ContractError):  # what the store has already is found there again
        return {}
    return content.get("executions", {}) if not uri or content.get("uri") == redact_text(uri) else {}


def is_complete(execution: Execution, notes: Notes) -> bool:
    """Whether the store has all of an execution."""
    return notes.get(execution.execution, {}).get("status") == execution.status


def metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced: `pass@4` becomes `pass_at_4`."""
    return re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name.replace("@", "_at_"))


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:MAX_TEXT]
