"""What a run shows on Prefect's own pages: its stages, the student's evaluation, its report, and how far a stage is.

Prefect renders descriptions, links and the cells of tables as Markdown, so whatever is not a number of ours is escaped. The
pages are a convenience: a server that refuses costs one warning, never the run.
"""

from __future__ import annotations

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

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException

from data.contracts import on_progress
from pipeline.stages import STAGES

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 2.0
REFUSALS = (
    httpx.HTTPError,
    PrefectException,
    OSError,
    RuntimeError,
)  # of a server, in all the ways Prefect passes them on
_ACTIVE = re.compile(r"[\\`*\[\]<>&#|~!@]|(?<=:)/(?=/)|(?<=www)\.|\b_|_\b")


def publish(summary: dict[str, Any]) -> None:
    """Show stages and evaluation as tables and link the report on the flow run's page; a failure is only a warning."""
    try:
        _publish(summary)
    except REFUSALS as error:
        logger.warning("the summary is not on Prefect's pages: %s", error)


class PageProgress:
    """A listener of progress that shows it as a bar on the page of the running flow or task; the first call makes the bar.

    Outside of a run, and once the server has refused, it does nothing. It may be called often and from any thread: what it
    sends is one small request in `UPDATE_SECONDS`, and always the first 100 %.
    """

    def __init__(self, key: str, description: str = "") -> None:
        """`key` names the bar within Prefect (runs that share one are versions of it); `description` is plain text."""
        self._key, self._description = artifact_key(key), plain(description)
        self._artifact: UUID | None = None
        self._lock = threading.Lock()
        self._sent_at, self._sent, self._refused = -math.inf, 0.0, False

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`; more than all counts as all."""
        percent = min(100.0, max(0.0, 100 * done / max(total, 1)))
        with self._lock:
            now = time.monotonic()
            due = now - self._sent_at >= UPDATE_SECONDS or percent == 100.0 > self._sent
            if not due or self._refused or (FlowRunContext.get() is None and TaskRunContext.get() is None):
                return
            self._sent_at, self._sent = now, percent
            try:
                self._send(percent)
            except REFUSALS as error:
                self._refused = True
                logger.warning("progress is not on Prefect's pages: %s", error)

    def _send(self, percent: float) -> None:
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, key=self._key, description=self._description)  # type: ignore[assignment, unused-ignore]
        else:
            update_progress_artifact(self._artifact, percent)


@contextmanager
def progress_on_page(run: str, stage: str) -> Iterator[None]:
    """Show the stage's progress on the page of the running task while the body runs."""
    with on_progress(PageProgress(f"{run}-{stage}", f"{stage} of {run}: its present step")):
        yield


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
    from pipeline.report.sections.student import evaluation_table
    from pipeline.report.summary import stage_rows

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
