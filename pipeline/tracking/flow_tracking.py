"""The MLflow run of a whole flow, to which the runs of its stages belong."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.redact import flatten, redact_command
from pipeline.stages import STAGES
from pipeline.tracking.tracker import Tracker, closing, inside
from pipeline.tracking.untracked import send_untracked

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig


@contextmanager
def track_flow(settings: PipelineConfig, flow: str, stages: tuple[str, ...]) -> Iterator[Tracker]:
    """A tracked execution of a flow: the stages within become children of its run, in the experiment PREFIX/FLOW.

    First sends what earlier executions could not. A flow named like a stage's experiment has its own in PREFIX/FLOW-flow, so
    that an experiment compares like with like; a flow of one stage needs no run beside the stage's.
    """
    send_untracked(settings)
    experiment = f"{flow}-flow" if flow in {stage.experiment for stage in STAGES.values()} else flow
    tracker = Tracker(settings, "flow", experiment, settings.folder)
    if len(stages) > 1:
        tracker.open({"flow": flow, "stages": " ".join(stages)}, settings.model_dump(mode="json"), [])
    with closing(tracker), inside(tracker):
        yield tracker


def log_summary(flow: Tracker, summary: dict[str, Any]) -> None:
    """The key figures of a summary as metrics STAGE/FIGURE of the flow's run, with its summary and report as files."""
    values: dict[str, float] = {"seconds": summary["seconds"]}
    for name, stage in summary["stages"].items():
        if not stage["in_flow"]:
            continue
        figures = flatten(stage["figures"])
        chosen = {key: figures[key] for key in STAGES[name].headline if isinstance(figures.get(key), int | float)}
        values |= {f"{name}/{key}": value for key, value in chosen.items()} | {f"{name}/seconds": stage["seconds"]}
    flow.log(0, values)
    command = shlex.join(redact_command(shlex.split(summary.get("command", ""))))
    flow.tags({"commit": summary.get("commit", ""), "command": command})
    flow.artifact(flow.folder / "summary.json")
    if summary.get("report"):
        flow.artifact(Path(summary["report"]))
