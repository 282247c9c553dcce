"""What a flow would do, without doing it: which stages would be reused, which would run, and why."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pipeline.artifacts import StageRecord, completed, read_record, stage_key
from pipeline.redact import flatten
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, stage_config, stage_folder, stage_inputs


class Planned(BaseModel):
    """One stage: `action` is `reuse` or `run`, `reason` why."""

    stage: str
    action: str
    reason: str


def plan(settings: PipelineConfig, names: tuple[str, ...]) -> list[Planned]:
    """The fate of every stage in `names` (in running order). Reads manifests and code only, starts nothing."""
    rows: list[Planned] = []
    running: set[str] = set()
    for name in names:
        folder = stage_folder(settings, name)
        upstream = [needed for needed in STAGES[name].needs if needed in running]
        record = read_record(folder)
        if record is None:
            reason = "it has not completed in this run"
        elif upstream:
            reason = f"{' and '.join(upstream)} would run before it"
        else:
            inputs = stage_inputs(settings, name)
            key = stage_key(name, stage_config(settings, name), inputs, STAGES[name].code)
            if completed(folder, key) is not None:
                rows.append(
                    Planned(stage=name, action="reuse", reason=f"unchanged since {record.finished_at:%F %T} UTC")
                )
                continue
            reason = _difference(record, stage_config(settings, name).model_dump(mode="json"), inputs)
        running.add(name)
        rows.append(Planned(stage=name, action="run", reason=reason))
    return rows


def _difference(record: StageRecord, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Why a completed stage does not count: its settings, its inputs, or else its code."""
    before, now = flatten(record.config), flatten(config)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        shown = ", ".join(f"{record.stage}.{key}" for key in changed[:3])
        return f"changed settings: {shown}{' and more' if len(changed) > 3 else ''}"
    moved = sorted(key for key in record.inputs.keys() | inputs.keys() if record.inputs.get(key) != inputs.get(key))
    return f"changed inputs: {', '.join(moved)}" if moved else "its code changed"
