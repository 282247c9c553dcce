"""The flows: their stages as Prefect tasks, in order, with a summary and a report at the end.

Reuse is by content (`pipeline.artifacts`), so Prefect's own cache is off. A stage is tried again only when an outside
service did not answer: anything else a retry would only hide, and an interrupted stage resumes by itself when the flow is
run again. What passes between tasks are small records; everything big stays in the run's folder.
"""

from __future__ import annotations

import logging
import shlex
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.tasks import exponential_backoff

from data.contracts import Unavailable
from flows.artifacts import progress_on_page, publish
from flows.catalog import FLOWS, Entry
from flows.environment import set_environment
from flows.runtime import connect_logging
from flows.terminal import show
from pipeline.artifacts import StageRecord
from pipeline.executions import FLOW, Execution, executing
from pipeline.locks import exclusive
from pipeline.plan import refuse_impossible
from pipeline.report.summary import code_commit, reproduce_command, summary_metrics
from pipeline.resume import remember
from pipeline.rounds import CHOSEN, RANDOM, begin_round, gains_stopped, point, write_curve
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, with_upstream
from pipeline.tracking.tracker import tracking

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # before the first retry; the next ones wait twice as long each
_RUN_NAME = "{settings.run}"


def _service_was_away(task: Any, task_run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)


def _stage_task(name: str) -> Any:
    return task(
        name=name,
        task_run_name=f"{name} of {_RUN_NAME}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=4,
        retry_delay_seconds=exponential_backoff(RETRY_SECONDS),
        retry_jitter_factor=0.2,
        retry_condition_fn=_service_was_away,
    )(STAGES[name].run)


@task(name="report", task_run_name=f"report of {_RUN_NAME}", cache_policy=NO_CACHE, persist_result=False)
def _finish(settings: PipelineConfig, flow_name: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    from pipeline.report.page import finish_run

    return finish_run(settings, flow_name, records, spent)


def _flow(entry: Entry) -> Any:
    def run(settings: PipelineConfig) -> dict[str, Any]:
        set_environment()
        connect_logging()
        given, settings = settings, entry.own(settings)
        stages = with_upstream(entry.stages, settings)
        records: list[StageRecord] = []
        spent: list[float] = []
        with (
            exclusive(settings.folder, 60 * settings.wait_minutes),
            tracking(settings),
            _executing(entry, settings, stages) as running,
        ):
            remember(given, entry.name)
            try:
                refuse_impossible(settings, stages)
                for name in stages:
                    begin = time.monotonic()
                    show(name, "running")
                    with progress_on_page(settings.run, name):
                        records.append(_stage_task(name)(settings))
                    show(name, "reused" if records[-1].reused else "done")
                    _announce_drift(settings.run, records[-1])
                    spent.append(round(time.monotonic() - begin, 1))
                summary = _finish(settings, entry.name, records, spent)
            except BaseException:
                _advise(settings)
                raise
            report = [Path(summary["report"])] if "report" in summary else []
            running.finish(summary_metrics(summary), artifacts=[settings.folder / "summary.json", *report])
        publish(summary)
        return summary

    return _named(run, entry, "the content of `summary.json`")


def _named(run: Any, entry: Entry, returns: str) -> Any:
    """The function as a flow of the entry's name."""
    run.__name__ = run.__qualname__ = entry.function
    run.__doc__ = f"`prefect run {entry.name}`: {returns}."
    return flow(name=entry.name, description=entry.help, flow_run_name=_RUN_NAME)(run)


def _loop(entry: Entry) -> Any:
    def run(settings: PipelineConfig) -> dict[str, Any]:
        set_environment()
        connect_logging()
        entry.own(settings)  # refuses settings without a budget
        with exclusive(settings.folder, 60 * settings.wait_minutes):
            remember(settings, entry.name)
            points, summary = _rounds(settings, CHOSEN, [])
            if settings.loop.compare_random:
                points += _rounds(settings, RANDOM, points[:1])[0][1:]
            report = write_curve(settings.folder, settings.run, points)
        return summary | {"report": str(report), "command": reproduce_command(settings, entry.name)}

    return _named(run, entry, "the summary of the last round")


def _rounds(
    settings: PipelineConfig, kind: str, points: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The points of all rounds, of which there are the first `points` already, and the summary of the last round."""
    points, summary = [*points], {}
    for number in range(len(points), settings.loop.rounds + 1):
        run = globals()["relevance_pipeline" if number else "student_from_labels"]
        summary = run(begin_round(settings, number, kind))
        points.append(point(number, kind, summary))
        logger.info("%s %d: ROC-AUC on valid %.4f", kind, number, points[-1]["valid_roc_auc"])
        if gains_stopped(points, settings.loop.min_gain):
            break
    return points, summary


def _announce_drift(run: str, record: StageRecord) -> None:
    """An event for automations where a stage has found new pairs unlike those before."""
    level = record.figures.get("drift", "fine")
    if level == "fine" or record.reused:
        return
    logger.warning("%s: new pairs are unlike those before (%s); the report says how", record.stage, level)
    resource = {"prefect.resource.id": f"ads-relevance.run.{run}", "prefect.resource.name": run}
    payload = {"stage": record.stage, "psi": record.figures["drift_psi"]}
    emit_event(f"ads-relevance.drift.{level}", resource, payload=payload)


def _executing(entry: Entry, settings: PipelineConfig, stages: tuple[str, ...]) -> AbstractContextManager[Execution]:
    """The record of the flow's own execution, to which those of its stages belong."""
    tags = {"flow": entry.name, "stages": " ".join(stages), "commit": code_commit()}
    tags["command"] = reproduce_command(settings, entry.name)
    # Beside the stage's experiment where they have one name: what is compared in one is alike.
    is_taken = entry.name in {stage.experiment for stage in STAGES.values()}
    experiment = f"{entry.name}-flow" if is_taken else entry.name
    return executing(settings, FLOW, settings.folder, config=settings, inputs={}, tags=tags, experiment=experiment)


def _advise(settings: PipelineConfig) -> None:
    """Say in the log of a deployment's run, where people look first, how to go on; `prefect run` says it by itself."""
    if runtime.deployment.id is None:
        return
    runs = shlex.quote(str(settings.runs))
    logger.error(
        "Finished stages and annotations are kept. Once the cause is removed, the deployment's next run goes on from there, "
        "or at once `prefect run --resume %s --runs %s`; causes and remedies: docs/operations.md",
        *(settings.run, runs),
    )


globals().update({entry.function: (_loop if entry.in_rounds else _flow)(entry) for entry in FLOWS.values()})
