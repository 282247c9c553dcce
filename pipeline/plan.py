"""What a flow would do, without doing it: which stages would be reused, which would run, and why."""

from __future__ import annotations

from pydantic import BaseModel

from pipeline.artifacts import Recipe, StageRecord, read_record, reusable
from pipeline.redact import flatten
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, held_record, stage_config, stage_folder, stage_inputs


class Planned(BaseModel):
    """One stage: `action` is `reuse` or `run`, `reason` why."""

    stage: str
    action: str
    reason: str


def plan(settings: PipelineConfig, names: tuple[str, ...]) -> list[Planned]:
    """The fate of every stage in `names` (in running order). Reads manifests only, starts nothing."""
    from data.sources import source_label

    rows: list[Planned] = []
    known: dict[str, StageRecord] = {}  # stages that are done, here or in another run, and so have fingerprints
    for name in names:
        folder, stage = stage_folder(settings, name), STAGES[name]
        if (held := held_record(settings, name)) is not None:
            known[name] = held
            reason = f"held as it is since {held.finished_at:%F %T} UTC"
            rows.append(Planned(stage=name, action="reuse", reason=reason))
            continue
        record = read_record(folder)
        waiting = [needed for needed in stage.needs if needed not in known]
        if waiting:
            reason = f"{' and '.join(waiting)} would run before it"
            rows.append(Planned(stage=name, action="run", reason=reason))
            continue
        inputs = stage_inputs(settings, name, known)
        recipe = Recipe(name, stage_config(settings, name), inputs, stage.version)
        done = reusable(folder, recipe, incremental=stage.incremental, share=settings.share)
        if done is not None:
            known[name] = done
            reason = "unchanged since" if done.folder == folder else f"run '{done.made_by}' has made the same on"
            rows.append(Planned(stage=name, action="reuse", reason=f"{reason} {done.finished_at:%F %T} UTC"))
        elif record is None:
            rows.append(Planned(stage=name, action="run", reason="it has not completed in this run"))
        else:
            reason = _difference(record, recipe)
            rows.append(Planned(stage=name, action="run", reason=reason))
    for row in rows:
        if row.stage == "data":
            row.reason += f"; source: {source_label(settings.data)}"
    return rows


def _difference(record: StageRecord, recipe: Recipe) -> str:
    """Why a completed stage does not count: its settings, its inputs, or else its version."""
    before, now = flatten(record.config), flatten(recipe.config.model_dump(mode="json"))
    changed = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
    changed += sorted(before.keys() ^ now.keys())  # settings that came or went with a newer version
    if record.version != recipe.version:
        return f"version {recipe.version} of the stage, made by version {record.version}"
    if changed:
        shown = ", ".join(f"{record.stage}.{key}" for key in changed[:3])
        return f"changed settings: {shown}{' and more' if len(changed) > 3 else ''}"
    inputs = recipe.inputs
    moved = sorted(key for key in record.inputs.keys() | inputs.keys() if record.inputs.get(key) != inputs.get(key))
    return f"changed inputs: {', '.join(moved)}"
