"""The seven flows: the stages as Prefect tasks, in order, with a summary and a report at the end.

Reuse is by content (`pipeline.artifacts`), so Prefect's own cache is off. A stage is tried again only when an outside
service did not answer: anything else a retry would only hide, and an interrupted stage resumes by itself when the flow is
run again. What passes between tasks are small records; everything big stays in the run's folder.
"""

from __future__ import annotations

import logging
import shlex
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.tasks import exponential_backoff

from data.contracts import Unavailable
from flows.catalog import FLOWS
from flows.runtime import connect_logging, share_cores
from pipeline.artifacts import StageRecord
from pipeline.locks import exclusive
from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)

_RUN_NAME = "{settings.run}"
_BEGUN: set[UUID] = set()  # flow runs of this process that had their run's folder


def _service_was_away(task: Any, task_run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)


def _stage_task(name: str) -> Any:
    @task(
        name=name,
        task_run_name=f"{name} of {_RUN_NAME}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=4,
        retry_delay_seconds=exponential_backoff(30),  # 30, 60, 120, 240 seconds
        retry_jitter_factor=0.2,
        retry_condition_fn=_service_was_away,
    )
    def stage(settings: PipelineConfig) -> StageRecord:
        from flows.artifacts import progress_on_page
        from pipeline.stages import RUNNERS

        with progress_on_page(settings.run, name):
            return RUNNERS[name](settings)

    return stage


_TASKS = {name: _stage_task(name) for name in ("data", "teacher", "annotate", "student", "export", "score")}


@task(name="report", task_run_name=f"report of {_RUN_NAME}", cache_policy=NO_CACHE, persist_result=False)
def _finish(settings: PipelineConfig, flow_name: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    from pipeline.report.summary import finish_run

    return finish_run(settings, flow_name, records, spent)


def _run(name: str, settings: PipelineConfig) -> dict[str, Any]:
    """Run a flow's stages and those they need, reusing what is unchanged; returns the content of `summary.json`."""
    from flows.artifacts import publish
    from pipeline.executions import FLOW, executing
    from pipeline.report.summary import code_commit, reproduce_command, summary_metrics
    from pipeline.resume import remember
    from pipeline.stages import EXPERIMENTS, with_upstream
    from pipeline.tracking.tracker import tracking

    share_cores()
    connect_logging()
    records: list[StageRecord] = []
    spent: list[float] = []
    stages = with_upstream(FLOWS[name].stages)
    tags = {"flow": name, "stages": " ".join(stages), "commit": code_commit()}
    tags["command"] = reproduce_command(settings, name)
    execution = executing(
        settings,
        FLOW,
        settings.folder,
        config=settings,
        inputs={},
        tags=tags,
        # Beside the stage's experiment where they have one name: what is compared in one is alike.
        experiment=f"{name}-flow" if name in EXPERIMENTS.values() else name,
    )
    with exclusive(settings.folder, 60 * settings.wait_minutes), tracking(settings), execution as running:
        remember(settings, name)
        if (context := FlowRunContext.get()) is not None and context.flow_run is not None:
            _BEGUN.add(context.flow_run.id)
        for stage in stages:
            begin = time.monotonic()
            records.append(_TASKS[stage](settings))
            spent.append(round(time.monotonic() - begin, 1))
        summary = _finish(settings, name, records, spent)
        report = [Path(summary["report"])] if "report" in summary else []
        running.finish(summary_metrics(summary), artifacts=[settings.folder / "summary.json", *report])
    publish(summary)
    return summary


def _say_what_to_do(flow: Any, flow_run: Any, state: Any) -> None:
    """After a failure: where it stopped, what is kept, and how to go on; in the run's log, where people look first."""
    if flow_run.id not in _BEGUN:  # it was refused before it began, by a message that says why
        return
    settings = flow_run.parameters.get("settings") or {}
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    run, runs = values.get("run") or values.get("preset", ""), shlex.quote(str(values.get("runs") or "runs"))
    logger.error(
        "%s of run '%s' did not end well (%s). Finished stages and annotations are kept. Once the cause is mended, "
        "`prefect run %s --resume %s --runs %s` goes on from there, and so does the deployment's next run; causes and "
        "remedies: docs/operations.md",
        *(flow.name, run, state.name, flow.name, run, runs),
    )  # fmt: skip


_HOOKS: dict[str, Any] = {"on_failure": [_say_what_to_do], "on_crashed": [_say_what_to_do]}


@flow(name="data-prepare", description=FLOWS["data-prepare"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def data_prepare(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run data-prepare`."""
    return _run("data-prepare", settings)


@flow(name="teacher-train", description=FLOWS["teacher-train"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def teacher_train(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run teacher-train`."""
    return _run("teacher-train", settings)


@flow(name="annotate", description=FLOWS["annotate"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def annotate(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run annotate`."""
    return _run("annotate", settings)


@flow(name="student-distill", description=FLOWS["student-distill"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def student_distill(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-distill`."""
    return _run("student-distill", settings)


@flow(name="student-export", description=FLOWS["student-export"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def student_export(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-export`."""
    return _run("student-export", settings)


@flow(name="student-score", description=FLOWS["student-score"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def student_score(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-score`."""
    return _run("student-score", settings)


@flow(name="relevance-pipeline", description=FLOWS["relevance-pipeline"].help, flow_run_name=_RUN_NAME, **_HOOKS)
def relevance_pipeline(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run relevance-pipeline`."""
    return _run("relevance-pipeline", settings)
