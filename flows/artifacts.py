"""What a run shows on Prefect's own pages: its stages, the student's evaluation, its report, and how far a stage is.

Prefect renders descriptions, links and the cells of tables as Markdown, so whatever is not a number of ours is escaped. The
pages are a convenience: a server that refuses costs one warning, never the run.
"""

from __future__ import annotations

import contextvars
import logging
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.runtime import ROOMS

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 2.0
_ACTIVE = re.compile(r"[\\`*\[\]<>&#|~!@]|(?<=:)/(?=/)|(?<=www)\.|\b_|_\b")


def publish(summary: dict[str, Any]) -> None:
    """Show stages and evaluation as tables and link the report on the flow run's page; a failure is only a warning."""
    try:
        _publish(summary)
    except Exception as error:  # the run is complete in its folder, whatever the server says
        logger.warning("the summary is not on Prefect's pages: %s", error)


class Progress:
    """A bar on the page of the running flow or task.

    Outside of a run, and once the server has refused, it does nothing. `update` may be called often and from any thread:
    what it sends is one small request in `UPDATE_SECONDS`, and always the first 100.
    """

    def __init__(self, key: str, description: str = "") -> None:
        """`key` names the bar within Prefect (runs that share one are versions of it); `description` is plain text."""
        from prefect.context import FlowRunContext, TaskRunContext

        self._artifact: UUID | None = None
        self._lock = threading.Lock()
        self._sent_at, self._sent = time.monotonic(), 0.0
        # Other threads do not know the run, nor which server it belongs to.
        self._context = contextvars.copy_context()
        if FlowRunContext.get() is None and TaskRunContext.get() is None:
            return
        from prefect.artifacts import create_progress_artifact

        self._artifact = self._call(
            lambda: create_progress_artifact(0.0, key=artifact_key(key), description=plain(description))
        )

    def update(self, percent: float) -> None:
        """Show `percent`, 0 … 100; what lies outside counts as the nearer end, and NaN as nothing."""
        if self._artifact is None or math.isnan(percent):
            return
        percent = min(100.0, max(0.0, percent))
        with self._lock:
            artifact, now = self._artifact, time.monotonic()
            done = percent == 100.0 and self._sent < 100.0
            if artifact is None or not (done or now - self._sent_at >= UPDATE_SECONDS):
                return
            from prefect.artifacts import update_progress_artifact

            self._sent_at, self._sent = now, percent
            self._artifact = self._call(lambda: update_progress_artifact(artifact, percent))

    def _call(self, request: Any) -> UUID | None:
        try:
            return self._context.run(request)
        except Exception as error:  # as above
            logger.warning("progress is not on Prefect's pages: %s", error)
            return None


class _Follower(logging.Handler):
    """Shows the progress that log records carry, see `flows.terminal`; the bar appears with the first of them."""

    def __init__(self, key: str, description: str) -> None:
        super().__init__()
        self._key, self._description = key, description
        self._bar: Progress | None = None

    def emit(self, record: logging.LogRecord) -> None:
        progress = getattr(record, "progress", None)
        if progress is None:
            return
        self._bar = self._bar or Progress(self._key, self._description)
        done, total = progress
        self._bar.update(100 * done / max(total, 1))


@contextmanager
def progress_on_page(run: str, stage: str) -> Iterator[None]:
    """Show the stage's progress on the page of the running task while the body runs."""
    follower = _Follower(f"{run}-{stage}", f"{stage} of {run}: its present step")
    for name in ROOMS:
        logging.getLogger(name).addHandler(follower)
    try:
        yield
    finally:
        for name in ROOMS:
            logging.getLogger(name).removeHandler(follower)


def artifact_key(text: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and dashes.

    >>> artifact_key("My run_2: Ü"), artifact_key("Ü")
    ('my-run-2', 'run')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def plain(text: object) -> str:
    """Text of which Markdown makes nothing but that text, on one line.

    >>> print(plain("[x](http://a) <b> a_b _c_ 0.5"))
    \\[x\\](http:\\//a) \\<b\\> a_b \\_c\\_ 0.5
    """
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", " ".join(str(text).split()))


def _publish(summary: dict[str, Any]) -> None:
    from prefect.artifacts import create_link_artifact, create_table_artifact

    from pipeline.report.sections.student import evaluation_table
    from pipeline.report.summary import stage_rows
    from pipeline.stages import STAGES

    key, run = artifact_key(summary["run"]), plain(summary["run"])
    stages = [dict(zip(("stage", "status", "seconds", "key figures"), row, strict=True)) for row in stage_rows(summary)]
    create_table_artifact(table=_plain_rows(stages), key=f"{key}-stages", description=f"Stages of run {run}")  # type: ignore[arg-type, unused-ignore]
    if not summary.get("report"):
        return
    report = Path(summary["report"])
    create_link_artifact(
        link=summary["report_link"].replace("(", "%28").replace(")", "%29"),
        link_text="Report",
        key=f"{key}-report",
        # A browser does not open a link from a server's page to a file; the path can be copied.
        description=f"Report of run {run}: {plain(report)}",
    )
    evaluation = report.parent / STAGES["student"].folder
    if "student" in summary["stages"] and (evaluation / "evaluation.json").exists():
        rows = _plain_rows(evaluation_table(evaluation))
        text = f"Systems of run {run} on human labels of the test split, with 95 % intervals"
        create_table_artifact(table=rows, key=f"{key}-evaluation", description=text)  # type: ignore[arg-type, unused-ignore]


def _plain_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{plain(name): plain(value) for name, value in row.items()} for row in rows]
