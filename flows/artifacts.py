"""The summary of a run on Prefect's own pages."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def publish(summary: dict[str, Any]) -> None:
    """Show the stages as a table and link the report from the flow run's page; a failure here is only a warning."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    from pipeline.summary import stage_rows

    key = "".join(c if c.isalnum() else "-" for c in summary["run"].lower()).strip("-") or "run"
    table = [dict(zip(("stage", "status", "seconds", "key figures"), row, strict=True)) for row in stage_rows(summary)]
    try:
        create_table_artifact(table=table, key=f"{key}-stages", description=f"Stages of run {summary['run']}")  # type: ignore[arg-type, unused-ignore]
        if summary.get("report"):
            create_link_artifact(link=summary["report_link"], link_text="Report", key=f"{key}-report")
    except Exception as error:  # the run is complete in its folder, whatever the server says
        logger.warning("the summary is not on Prefect's pages: %s", error)
