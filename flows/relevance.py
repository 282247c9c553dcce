"""The seven flows: the stages as Prefect tasks, in order, with a summary and a report at the end.

Reuse is by content (`pipeline.artifacts`), so Prefect's own cache is off; a stage is not retried, since a retry would
only hide a defect and an interrupted stage resumes by itself when the flow is run again. What passes between tasks are
small records; everything big stays in the run's folder.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.catalog import FLOWS
from flows.runtime import connect_logging, exclusive, share_cores
from pipeline.artifacts import StageRecord
from pipeline.settings import PipelineConfig

_RUN_NAME = "{settings.run}"


def _stage_task(name: str) -> Any:
    @task(name=name, task_run_name=f"{name} of {_RUN_NAME}", cache_policy=NO_CACHE, persist_result=False)
    def stage(settings: PipelineConfig) -> StageRecord:
        from pipeline.stages import RUNNERS

        return RUNNERS[name](settings)

    return stage


_TASKS = {name: _stage_task(name) for name in ("data", "teacher", "annotate", "student", "export", "score")}


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def _finish(settings: PipelineConfig, flow_name: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    from pipeline.summary import finish_run

    return finish_run(settings, flow_name, records, spent)


def _run(name: str, settings: PipelineConfig) -> dict[str, Any]:
    """Run a flow's stages and those they need, reusing what is unchanged; returns the content of `summary.json`."""
    from flows.artifacts import publish
    from pipeline.stages import with_upstream

    share_cores()
    connect_logging()
    records: list[StageRecord] = []
    spent: list[float] = []
    with exclusive(settings.folder):
        for stage in with_upstream(FLOWS[name].stages):
            begin = time.monotonic()
            records.append(_TASKS[stage](settings))
            spent.append(round(time.monotonic() - begin, 1))
        summary = _finish(settings, name, records, spent)
    publish(summary)
    return summary


@flow(name="data-prepare", description=FLOWS["data-prepare"].help, flow_run_name=_RUN_NAME)
def data_prepare(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run data-prepare`."""
    return _run("data-prepare", settings)


@flow(name="teacher-train", description=FLOWS["teacher-train"].help, flow_run_name=_RUN_NAME)
def teacher_train(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run teacher-train`."""
    return _run("teacher-train", settings)


@flow(name="annotate", description=FLOWS["annotate"].help, flow_run_name=_RUN_NAME)
def annotate(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run annotate`."""
    return _run("annotate", settings)


@flow(name="student-distill", description=FLOWS["student-distill"].help, flow_run_name=_RUN_NAME)
def student_distill(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-distill`."""
    return _run("student-distill", settings)


@flow(name="student-export", description=FLOWS["student-export"].help, flow_run_name=_RUN_NAME)
def student_export(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-export`."""
    return _run("student-export", settings)


@flow(name="student-score", description=FLOWS["student-score"].help, flow_run_name=_RUN_NAME)
def student_score(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run student-score`."""
    return _run("student-score", settings)


@flow(name="relevance-pipeline", description=FLOWS["relevance-pipeline"].help, flow_run_name=_RUN_NAME)
def relevance_pipeline(settings: PipelineConfig) -> dict[str, Any]:
    """`prefect run relevance-pipeline`."""
    return _run("relevance-pipeline", settings)
