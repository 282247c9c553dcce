"""The build steps of `prefect.yaml`.

A deployment's parameters are the whole settings, not the name of a preset alone: Prefect's form sends back every field that
it shows, so what it shows must be what runs. A bad value is refused when the deployment is made. And the server gets an
automation for runs whose worker was killed, since nobody else would end them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from data.contracts import ContractError
from flows.catalog import FLOWS
from pipeline.redact import hidden_keys
from pipeline.settings import choose

AUTOMATION = "End silent runs of ads-relevance"
_HEARTBEAT = "prefect.flow-run.heartbeat"


def fill(
    preset: str = "",
    config: str | None = None,
    name: str = "",
    runs: str | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings as `prefect run` would choose them from the same words, for `{{ settings }}` in `parameters`.

    Raises `ContractError` for anything that is not valid, and for a secret: Prefect shows a deployment's parameters.
    """
    chosen = choose(preset, Path(config) if config else None, name, Path(runs) if runs else None, set)
    values = chosen.model_dump(mode="json")
    if secret := hidden_keys(values):
        raise ContractError(
            f"{', '.join(secret)} would be shown on Prefect's pages; leave it out, and give it to the worker's "
            "environment or to Spark's own configuration (SPARK_CONF_DIR)"
        )
    return {"settings": values}


def end_silent_runs(minutes: float = 5) -> dict[str, Any]:
    """Have the server end a deployment's run as Crashed once it has sent no heartbeat for so many minutes.

    Heartbeats are Prefect's; `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` of the work pool's job variables says how often. The
    automation of an earlier deployment is updated. A late heartbeat of a run that has ended does no harm: Prefect changes no
    finished run to Crashed.
    """
    from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType

    after = ("Pending", "Running")  # a worker may also be killed before its flow has begun
    expect = ("Running", "AwaitingConcurrencySlot", "Completed", "Failed", "TimedOut", "Crashed", "Cancelled")
    ours = [
        {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
        {"prefect.resource.role": "deployment"},
    ]
    trigger = EventTrigger(
        after={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in after)},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in expect)},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=[ResourceSpecification(labels) for labels in ours],
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(minutes=minutes),
    )
    message = f"No heartbeat for {minutes:g} minutes: was the worker or its machine killed?"
    action = ChangeFlowRunState(state=StateType.CRASHED, message=message)
    with get_client(sync_client=True) as client:
        existing = client.read_automations_by_name(AUTOMATION)
    automation = Automation(name=AUTOMATION, trigger=trigger, actions=[action], id=existing[0].id if existing else None)
    if existing:
        automation.update()
    else:
        automation.create()
    return {}
